"""Schedules, optimisers, and steps that are not taken because the loss or a gradient is not finite."""

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from configs.errors import UserError
from configs.training import Train
from train.ema import Average
from train.guard import Guard
from train.optimisation import Optimisation, _optimizer
from train.precision import exact_products
from train.schedule import learning_rate

CPU = torch.device("cpu")
TRUE, FALSE = torch.tensor(True), torch.tensor(False)


def test_the_step_schedule_falls_at_its_epochs() -> None:
    settings = Train(schedule="step", step_epochs=3, step_factor=0.5, warmup=1, lr=0.8, epochs=9)
    rates = [learning_rate(settings, step, 4) for step in range(36)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4:] == pytest.approx([0.8] * 8 + [0.4] * 12 + [0.2] * 12)


def test_the_constant_schedule_warms_up_and_stays() -> None:
    settings = Train(schedule="constant", warmup=0.5, lr=0.8)
    assert [learning_rate(settings, step, 4) for step in (0, 1, 2, 500)] == pytest.approx(
        [0.4, 0.8, 0.8, 0.8]
    )


def small() -> nn.Sequential:
    """A module with a norm's running statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))


def groups_of(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups, the second at a tenth of the rate."""
    first, second = ([*module[number].parameters()] for number in (0, 2))  # type: ignore[index]
    return [
        {"params": first, "weight_decay": 0.01},
        {"params": second, "weight_decay": 0.01, "lr_scale": 0.1},
    ]


def optimisation(module: nn.Module, precision: torch.dtype = torch.float32, **settings: Any) -> Optimisation:
    """Of a small module."""
    return Optimisation(groups_of(module), Train(**settings), device=CPU, precision=precision)


def losses(seed: int = 0) -> Iterator[Callable[[nn.Module], torch.Tensor]]:
    """Endless batches' losses."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randn(6, 4, generator=draw)
        yield lambda module, rows=rows: module(rows).square().mean()  # type: ignore[misc]


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_steps_are_those_of_torch_with_a_rate_a_group(name: str) -> None:
    mine, theirs = small(), small()
    ours = optimisation(mine, optimizer=name, grad_clip=0.5, momentum=0.8)
    groups = [{"params": theirs[0].parameters(), "lr": 0.2}, {"params": theirs[2].parameters(), "lr": 0.02}]
    oracle: torch.optim.Optimizer = torch.optim.AdamW(groups)
    if name == "sgd":
        oracle = torch.optim.SGD(oracle.param_groups, momentum=0.8, nesterov=True, weight_decay=0.01)
    clipped = [p for group in oracle.param_groups for p in group["params"]]
    for loss, _ in zip(losses(), range(3), strict=False):
        ours.backward(loss(mine))
        norm = ours.clip()
        ours.step(0.2, TRUE)
        oracle.zero_grad()
        loss(theirs).backward()
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(clipped, 0.5))
        oracle.step()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_skipped_step_leaves_no_trace(name: str, fused: bool) -> None:
    """As if its batch had never been: weights, moments and counters, the very first step too."""
    ends = []
    for bad_at in ((), (0, 3)):
        module = small()
        ours = optimisation(module, optimizer=name)
        ours._optimizer = _optimizer(groups_of(module), Train(optimizer=name), fused=fused)  # type: ignore[arg-type]
        ours._fused = fused  # torch has the kernels for CPUs too
        stream = losses()
        for step in range(5 if not bad_at else 7):
            bad = step in bad_at
            loss = (lambda m: m(torch.full((6, 4), math.nan)).sum()) if bad else next(stream)
            module[1].eval()
            ours.backward(loss(module))
            assert ours.clip().isfinite() != bad
            ours.step(0.1, torch.tensor(not bad))
        ends.append((module.state_dict(), ours.state()["optimizer"]["state"]))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def test_float16_scales_its_loss_and_backs_off_when_it_overflows() -> None:
    module = small()
    ours = optimisation(module, torch.float16)
    before = copy.deepcopy(module.state_dict())
    loss = next(losses())
    ours.backward(loss(module))
    scaled = module[0].weight.grad.abs().max()
    ours.clip()
    assert module[0].weight.grad.abs().max() < scaled / 1000
    ours.step(0.1, TRUE)
    assert ours.state()["scaler"]["scale"] == 65536
    ours.backward(module(torch.full((6, 4), 1e38)).sum())
    assert not ours.clip().isfinite()
    after = copy.deepcopy(module[0].weight)
    ours.step(0.1, FALSE)
    assert torch.equal(after, module[0].weight) and not torch.equal(after, before["0.weight"])
    assert ours.state()["scaler"]["scale"] == 32768
    other = optimisation(small(), torch.float16)
    other.load(ours.state())
    assert other.state()["scaler"] == ours.state()["scaler"]


def test_a_loaded_state_keeps_the_rates_and_decay_of_the_configuration() -> None:
    module = small()
    old, new, other = (optimisation(module, optimizer=name) for name in ("adamw", "adamw", "sgd"))
    old.backward(next(losses())(module))
    old.clip()
    old.step(0.1, TRUE)
    state = old.state()
    state["optimizer"]["param_groups"][1] |= {"lr_scale": 7, "weight_decay": 7}
    new.load(state)
    assert new._optimizer.param_groups[1]["lr_scale"] == 0.1
    assert new._optimizer.param_groups[1]["weight_decay"] == 0.01
    torch.testing.assert_close(new.state()["optimizer"]["state"], state["optimizer"]["state"])
    other.load(state)  # an optimiser that was changed, and allowed to be
    assert "exp_avg" not in other.state()["optimizer"]["state"][0]
    other.clip()
    other.step(0.1, TRUE)
    with pytest.raises(ValueError, match="other parameters"):
        new.load({"optimizer": torch.optim.AdamW(small().parameters()).state_dict()})


def judged(
    guard: Guard, step: int, *, loss: float = 1.0, norm: float = 1.0, bad_rows: tuple[int, ...] = ()
) -> bool:
    """One step's judgement; rows of 8 embeddings that are not finite."""
    embeddings = torch.ones(8, 3)
    embeddings[list(bad_rows)] = math.nan
    return bool(guard.judge(step, torch.tensor(loss), torch.tensor(norm), embeddings))


def test_a_row_of_bad_steps_ends_the_run_with_its_first_step_and_rank() -> None:
    guard = Guard(nn.Module(), limit=3, world_size=4, device=CPU)
    assert judged(guard, 1) and not judged(guard, 2, loss=math.nan) and not judged(guard, 3, norm=math.inf)
    assert judged(guard, 4) and guard.check() == 2  # not in a row
    for step in (5, 6, 7):
        assert not judged(guard, step, loss=math.nan, bad_rows=(2, 7) if step == 5 else (0,))
    assert judged(guard, 8)  # before the host asked
    with pytest.raises(UserError, match=r"3 steps in a row .* from step 5 on, which began on rank 1, 3"):
        guard.check()


def test_a_gradient_that_overflows_is_of_no_rank_alone() -> None:
    guard = Guard(nn.Module(), limit=1, world_size=2, device=CPU)
    assert not judged(guard, 9, norm=math.inf)
    with pytest.raises(UserError, match=r"from step 9 on, which began on no rank alone .*lower train\.lr"):
        guard.check()


def test_what_the_guard_counts_goes_on_after_a_checkpoint() -> None:
    first, second = (Guard(nn.Module(), limit=2, world_size=2, device=CPU) for _ in range(2))
    judged(first, 1, loss=math.nan, bad_rows=(5,))
    second.load(first.state())
    judged(second, 2, loss=math.nan, bad_rows=(0, 5))
    with pytest.raises(UserError, match="from step 1 on, which began on rank 1 "):
        second.check()


def test_a_row_that_began_on_other_ranks_begins_anew() -> None:
    many, one = (Guard(nn.Module(), limit=2, world_size=size, device=CPU) for size in (4, 1))
    judged(many, 1, loss=math.nan, bad_rows=(7,))
    one.load(many.state())
    judged(one, 2, loss=math.nan, bad_rows=(7,))
    assert one.check() == 2
    judged(one, 3, loss=math.nan)
    with pytest.raises(UserError, match="from step 2 on, which began on rank 0 "):
        one.check()


def test_running_statistics_forget_a_bad_step() -> None:
    module = small()
    guard = Guard(module, limit=9, world_size=1, device=CPU)
    module(torch.randn(6, 4))
    assert judged(guard, 1)
    before = {name: value.clone() for name, value in module.named_buffers()}
    module(torch.full((6, 4), math.nan))
    assert module[1].running_mean.isnan().all()
    assert not judged(guard, 2, loss=math.nan)
    assert torch.equal(module[1].running_mean, before["1.running_mean"])
    assert torch.equal(module[1].running_var, before["1.running_var"])
    module(torch.randn(6, 4))
    assert judged(guard, 3) and not torch.equal(module[1].running_mean, before["1.running_mean"])


def test_the_average_is_torchs_once_warm_and_follows_closely_before() -> None:
    module = small()
    mine, theirs = (
        Average(module, 0.6),
        AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.6), use_buffers=True),
    )  # type: ignore[arg-type]
    theirs.update_parameters(module)  # torch's first update copies
    for step in range(100, 105):
        with torch.no_grad():
            module(torch.randn(6, 4))
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter))
        mine.update(step, TRUE)
        theirs.update_parameters(module)
    for (name, ours), other in zip(mine.state().items(), theirs.module.state_dict().values(), strict=True):
        if ours.is_floating_point():
            torch.testing.assert_close(ours, other, msg=name)
    assert mine.encoder[1].num_batches_tracked == module[1].num_batches_tracked == 5  # type: ignore[index]
    young = Average(module, 0.999)
    with torch.no_grad():
        module[0].weight.add_(1)
    before = young.encoder[0].weight.clone()  # type: ignore[index]
    young.update(0, TRUE)
    torch.testing.assert_close(young.encoder[0].weight, before + 0.9)  # type: ignore[index]
    young.update(1, FALSE)
    torch.testing.assert_close(young.encoder[0].weight, before + 0.9)  # type: ignore[index]


def test_exact_products_are_asked_for_and_given_back() -> None:
    torch.set_float32_matmul_precision("high")
    with exact_products():
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")
