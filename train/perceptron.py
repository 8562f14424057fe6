"""The MLP on embeddings: the reference's 512→256→64→C with LeakyReLU and dropout, stopped early."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from configs.errors import UserError
from configs.judging import Classifier as Settings

WEIGHTS, ORDER, DROPOUT, SUBSET = range(4)  # purposes of randomness
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Examples:
    """What a classifier learns from."""

    inputs: NDArray[np.float32]
    """(n, width): embeddings, and metadata beside them."""
    labels: Ints
    """(n,) class indices."""

    def take(self, rows: Ints) -> "Examples":
        """Some of them, in this order."""
        return Examples(self.inputs[rows], self.labels[rows])


@dataclass(frozen=True)
class Networks:
    """An MLP, or an ensemble of them: the mean of their logits."""

    members: Sequence[nn.Sequential]
    """In float64 on the CPU, so that the size of a batch cannot matter."""

    def __post_init__(self) -> None:
        for member in self.members:
            member.cpu().double().eval()

    def logits(self, vectors: NDArray[np.float32], extra: NDArray[np.float32]) -> Floats:
        """Embeddings (n, dim) and metadata (n, width) -> (n, classes)."""
        inputs = torch.from_numpy(np.concatenate([vectors, extra], axis=1)).double()
        with torch.inference_mode():
            return np.asarray(torch.stack([member(inputs) for member in self.members]).mean(dim=0).numpy())


@dataclass(frozen=True)
class Epoch:
    """How an epoch went."""

    number: int
    """From 1."""
    steps: int
    loss: float
    val_loss: float
    val_logits: Tensor
    """(n, classes)."""


def class_weights(labels: Ints, classes: int) -> Floats:
    """(classes,) inverse frequencies, with mean 1 over the samples; 1 where a class has none."""
    counts = np.bincount(labels, minlength=classes)
    return np.where(counts > 0, len(labels) / (classes * np.maximum(counts, 1)), 1.0)


def undersample(labels: Ints, *, seed: int, member: int) -> Ints:
    """Rows (m,) ascending: as many of each class as the rarest has, drawn without replacement."""
    draw = np.random.default_rng((seed, SUBSET, 0, member))
    kinds = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    size = min(map(len, kinds))
    return np.sort(np.concatenate([draw.choice(rows, size, replace=False) for rows in kinds]))


def mlp(dims: Sequence[int], dropout: float = 0.0) -> nn.Sequential:
    """Linear layers of these widths; LeakyReLU and dropout after each but the last."""
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise(dims):
        layers += [nn.Linear(width, following), nn.LeakyReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers[:-2])


def train(
    examples: Examples,
    val: Examples,
    classes: int,
    settings: Settings,
    *,
    member: int = 0,
    device: str = "cpu",
    each_epoch: Callable[[Epoch], None] | None = None,
) -> tuple[nn.Sequential, int]:
    """The network of the epoch with the lowest validation loss, and that epoch, from 1.

    What is drawn depends on `settings.seed` and `member` alone, and member 0 draws as if it were the only
    one: a trailing zero changes nothing in a SeedSequence of up to 4 words. torch's global generators are
    put back as they were.

    Raises:
        UserError: if it diverges.
    """
    weights = class_weights(examples.labels, classes)
    if settings.imbalance == "undersampling":
        examples = examples.take(undersample(examples.labels, seed=settings.seed, member=member))
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), _one_thread():
        return _train(examples, val, weights, settings, member, device, each_epoch)


def _train(
    examples: Examples,
    val: Examples,
    weights: Floats,
    settings: Settings,
    member: int,
    device: str,
    each_epoch: Callable[[Epoch], None] | None,
) -> tuple[nn.Sequential, int]:
    x, y = _tensors(examples, device)
    val_x, val_y = _tensors(val, device)
    # Validation is weighed whenever training is: by the loss, or by what is drawn.
    val_weight = torch.from_numpy(weights if settings.imbalance != "none" else np.ones_like(weights))
    val_weight = val_weight.float().to(device)
    weight = val_weight if settings.imbalance == "weights" else torch.ones_like(val_weight)

    torch.manual_seed(_seed(settings.seed, WEIGHTS, 0, member))
    network = mlp([x.shape[1], *settings.hidden, len(weight)], settings.dropout).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), settings.lr, weight_decay=settings.weight_decay)
    best_loss, best_epoch, best_state = float("inf"), 0, network.state_dict()
    for epoch in range(1, settings.epochs + 1):
        torch.manual_seed(_seed(settings.seed, DROPOUT, epoch, member))
        order = _order(examples.labels, settings, epoch, member)
        loss = _epoch(network, optimizer, x, y, weight, torch.from_numpy(order), settings.batch)
        with torch.inference_mode():
            logits = network.eval()(val_x)
            val_loss = F.cross_entropy(logits, val_y, val_weight).item()
        if not np.isfinite(loss + val_loss):
            raise UserError(
                f"classifier: the loss is {loss + val_loss} in epoch {epoch}; lower classifier.lr"
            )
        if each_epoch:
            each_epoch(Epoch(epoch, -(-len(order) // settings.batch), loss, val_loss, logits))
        if val_loss < best_loss:
            best_loss, best_epoch = val_loss, epoch
            best_state = copy.deepcopy(network.state_dict())
        elif settings.patience and epoch - best_epoch >= settings.patience:
            break
    network.load_state_dict(best_state)
    return network, best_epoch


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A network so small gains nothing by threads, and on a busy machine waits for the slowest at every
    step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _epoch(
    network: nn.Sequential,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    order: Tensor,
    batch: int,
) -> float:
    """One pass over the rows of `order`; returns the mean loss."""
    network.train()
    total = torch.zeros((), device=x.device)
    for rows in torch.split(order.to(x.device), batch):
        loss = F.cross_entropy(network(x[rows]), y[rows], weight)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        total += loss.detach() * len(rows)
    return total.item() / len(order)


def _order(labels: Ints, settings: Settings, epoch: int, member: int) -> Ints:
    """Rows of an epoch: all of them, or as many drawn of each class."""
    draw = np.random.default_rng((settings.seed, ORDER, epoch, member))
    if settings.imbalance != "sampling":
        return draw.permutation(len(labels))
    kinds = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    drawn = np.concatenate([draw.choice(rows, -(-len(labels) // len(kinds))) for rows in kinds])
    return np.asarray(draw.permutation(drawn)[: len(labels)])


def _tensors(examples: Examples, device: str) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(examples.inputs).to(device), torch.from_numpy(examples.labels).to(device)


def _seed(*entropy: int) -> int:
    """64 bits for torch.manual_seed from (seed, purpose, epoch, member)."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])
