"""Judges rewritten networks by the divergence of their output, at the cost of what changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rba_compress.batches import Batch
from rba_compress.errors import ActivationError
from rba_compress.fitting import Resumed
from rba_compress.measure import Criterion, Tally, real_tokens
from rba_compress.plan import Chain
from rba_compress.recorder import evaluating
from rba_compress.streams import observe

SCREEN = 4
"""One sample of so many is screened on. 25 images missed the best span of a DeiT-tiny, 50 did not."""


@dataclass(frozen=True)
class Judged:
    """How far a network's output is from the dense one's, on the samples to choose on."""

    divergence: Tensor
    """Of each sample, (samples,) float64, infinite where it is not finite."""
    agreement: float | None = None
    """Share of equal argmax; None where the output is no class scores."""
    accuracy_drop: float | None = None
    """None where there are no labels."""

    @property
    def mean(self) -> float:
        return float(self.divergence.mean())


class Judge:
    """Holds the samples to choose on, the dense outputs, and the streams of the network in work.

    A candidate that first changes the stream behind a boundary is run from there on. `samples` counts
    the samples sent through a whole network's worth of blocks, dense runs and stored streams included.
    """

    def __init__(
        self,
        dense: nn.Module,
        chains: Sequence[Chain],
        criterion: Criterion,
        batches: Iterable[Batch],
        *,
        size: int | None = None,
    ) -> None:
        self.chains, self.criterion = chains, criterion
        self.batches = [batch.to(dense) for batch in regroup(list(batches), size)]
        self.samples = 0.0
        self._streams: list[list[dict[int, Tensor]]] = []
        with evaluating(dense):
            self.dense = [criterion.kept(batch.run(dense)) for batch in self.batches]
        self.samples += self.held
        leaves = (leaf for output in self.dense for leaf in pytree.tree_leaves(output))
        if not all(bool(torch.isfinite(t).all()) for t in leaves if isinstance(t, Tensor)):
            raise ActivationError("the model's output holds NaN or infinity on held-out samples")

    @property
    def held(self) -> int:
        """Samples to choose on."""
        return sum(len(batch) for batch in self.batches)

    def rebase(self, slim: nn.Module) -> Judged:
        """Make `slim` the network that candidates change; returns how far it is from the dense one."""
        self._streams, outputs = [], []
        with evaluating(slim):
            for batch in self.batches:
                seen = observe(slim, self.chains, batch)
                self._streams.append(seen.streams)
                outputs.append(self.criterion.kept(seen.output))
        self.samples += self.held
        tally, each = Tally(), []
        for batch, dense, output in zip(self.batches, self.dense, outputs, strict=True):
            each.append(self.criterion(dense, output, batch))
            if self.criterion.kind == "kl":
                (a, *_), (b, *_) = dense, output
                tally.add(a, b, batch.labels, real_tokens(batch, a))
        return Judged(_finite(torch.cat(each)), tally.agreement, tally.accuracy_drop)

    def __call__(
        self, slim: nn.Module, chain: int = 0, boundary: int = 0, *, screen: bool = False
    ) -> Tensor:
        """The divergence of each sample, (samples,) float64, infinite where it is not finite.

        Args:
            slim: a candidate that is the network in work up to `boundary` of `chain`; used up.
            screen: judge on the first of `SCREEN` shares of the samples, which are spread evenly.
        """
        resumed = Resumed(slim, self.chains, chain, boundary, self._streams[0])
        taken = range(max(1, len(self.batches) // SCREEN) if screen else len(self.batches))
        found = []
        with evaluating(slim):
            for k in taken:
                output = self.batches[k].run(resumed.start(self._streams[k]))
                kept = self.criterion.kept(output)
                found.append(self.criterion(self.dense[k], kept, self.batches[k]))
        judged = _finite(torch.cat(found))
        blocks = sum(len(c) for c in self.chains)
        passed = boundary + sum(len(c) for c in self.chains[:chain])
        self.samples += len(judged) * (1 - passed / blocks)
        return judged


def _finite(values: Tensor) -> Tensor:
    return torch.where(torch.isfinite(values), values, math.inf)


def regroup(batches: list[Batch], size: int | None) -> list[Batch]:
    """The samples in batches of about `size`, dealt like cards so that each spans the whole loader.

    Batches whose tensors differ in shape (text of several lengths) stay as they are.
    """
    shapes = {tuple((name, t.shape[1:]) for name, t in batch.tensors.items()) for batch in batches}
    whole = all(
        t.ndim and t.shape[0] == len(batch) for batch in batches for t in batch.tensors.values()
    )
    if size is None or len(shapes) > 1 or not whole:
        return batches
    joined = Batch.join(batches)
    piles = max(1, round(len(joined) / size))
    return [joined.select(list(range(start, len(joined), piles))) for start in range(piles)]
