"""Steps whose loss or gradient is not finite: seen, counted and undone on the device."""

import torch
from torch import nn

from configs.errors import UserError

REMEDY = "lower train.lr, or set train.precision=float32; a new run.folder starts from the beginning"


class Guard:
    """Judges every step, and remembers on the device what the host asks for at the logging interval.

    The gradients have been averaged over the ranks and the loss is of all their samples, so every rank comes
    to the same judgement without a word between them.
    """

    def __init__(self, module: nn.Module, *, limit: int, world_size: int, device: torch.device) -> None:
        """
        Args:
            module: its floating buffers (BatchNorm's running statistics) are put back after a bad step: one
                NaN would stay in them for ever.
            limit: bad steps in a row that end the run.
        """
        self._limit, self._world_size = limit, world_size
        self._buffers = [b for b in module.buffers() if b.is_floating_point()]
        self._sound = self._flat()
        # Bad steps in all, in a row by now, the most in a row, and the step that the row began with.
        self._counts = torch.zeros(4, dtype=torch.int64, device=device)
        self._ranks = torch.zeros(world_size, dtype=torch.bool, device=device)

    def judge(
        self, step: int, loss: torch.Tensor, norm: torch.Tensor, embeddings: torch.Tensor
    ) -> torch.Tensor:
        """Whether a step may be taken, a boolean scalar on the device.

        Args:
            step: its number, from 1.
            norm: of the gradients of all parameters.
            embeddings: of the global batch (B, dim), in the order of the ranks.
        """
        good = loss.isfinite() & norm.isfinite()
        bad = ~good
        total, row, most, first = self._counts.unbind()
        row = (row + 1) * bad
        begins = row == 1
        self._counts = torch.stack([total + bad, row, most.maximum(row), first.where(~begins, step)])
        ranks = ~embeddings.isfinite().view(self._world_size, -1).all(1)
        self._ranks = torch.where(begins, ranks, self._ranks)
        if self._buffers:
            self._sound = torch.where(good, self._flat(), self._sound)
            parts = torch.split(self._sound, [b.numel() for b in self._buffers])
            torch._foreach_copy_(
                self._buffers, [p.view_as(b) for p, b in zip(parts, self._buffers, strict=True)]
            )
        return good

    def check(self) -> int:
        """Steps skipped so far; the host waits for the device.

        Raises:
            UserError: if as many in a row as are allowed were bad, naming the first of them and the ranks.
        """
        total, _, most, first = self._counts.tolist()
        if most >= self._limit:
            ranks = [rank for rank, bad in enumerate(self._ranks.tolist()) if bad]
            where = f"rank {', '.join(map(str, ranks))}" if ranks else "no rank alone"
            what = "embeddings" if ranks else "embeddings were finite, but not the loss or a gradient"
            raise UserError(
                f"{most} steps in a row were not finite and were skipped, from step {first} on, which began "
                f"on {where} ({what}); {REMEDY}"
            )
        return int(total)

    def state(self) -> dict[str, torch.Tensor]:
        """For a checkpoint."""
        return {"counts": self._counts, "ranks": self._ranks}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """From a checkpoint; a row of bad steps that began on other ranks than there are now begins anew."""
        self._counts = state["counts"].to(self._counts.device)
        ranks = state.get("ranks")
        if ranks is not None and len(ranks) == self._world_size:
            self._ranks = ranks.to(self._ranks.device)
        else:
            self._counts[1] = 0

    def _flat(self) -> torch.Tensor:
        return torch.cat([b.detach().flatten() for b in self._buffers]) if self._buffers else torch.empty(0)
