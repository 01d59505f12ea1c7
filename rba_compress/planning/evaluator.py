"""Judges rewritten networks by the divergence of their output, at the cost of what changed."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rba_compress.core.batch import Batch
from rba_compress.core.distributed import Ranks, current
from rba_compress.core.errors import ActivationError
from rba_compress.core.inference import evaluating, ran
from rba_compress.core.memory import device_bytes
from rba_compress.core.offload import device_of
from rba_compress.core.plan import Chain
from rba_compress.graph.activations import observe
from rba_compress.planning.partial_run import Resumed
from rba_compress.profiling.fidelity import Criterion, Tally

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

    Where the streams of all boundaries would not fit into `memory`, every second one is kept, or every
    third, and so on; a candidate is run from the last one before it.

    Where several ranks work together each holds its share of the samples, and what is judged is of all.

    Args:
        dealt: the number of each sample among all that are chosen on, and the batches of them.
        size: of a batch; by default they stay as they are.
        memory: bytes for streams; by default half of the device's.
    """

    def __init__(
        self,
        dense: nn.Module,
        chains: Sequence[Chain],
        criterion: Criterion,
        dealt: Iterable[tuple[list[int], Batch]],
        *,
        size: int | None = None,
        memory: int | None = None,
    ) -> None:
        self.chains, self.criterion, self.ranks = chains, criterion, current()
        screened, others = regroup(list(dealt), size, self.ranks)
        self.batches = [batch.to(dense) for batch in (*screened, *others)]
        self._screened = len(screened)
        parts = (self.batches, screened)
        own = torch.tensor([[sum(map(len, part)) for part in parts]])
        self._counts = torch.cat(self.ranks.gathered(own)).tolist()
        """Of each rank: its samples, and those of them that are screened on."""
        self.held = sum(held for held, _ in self._counts)
        """Samples to choose on."""
        self.samples = 0.0
        self._memory = memory or device_bytes(device_of(dense)) // 2
        self._streams: list[list[dict[int, Tensor]]] = []
        with evaluating(dense):
            self.dense = [criterion.kept(ran(dense, batch)) for batch in self.batches]
        self.samples += self.held
        leaves = (leaf for output in self.dense for leaf in pytree.tree_leaves(output))
        flaws = sum(not bool(torch.isfinite(t).all()) for t in leaves if isinstance(t, Tensor))
        if self.ranks.sum(flaws):
            raise ActivationError("the model's output holds NaN or infinity on held-out samples")

    def rebase(self, slim: nn.Module) -> Judged:
        """Make `slim` the network that candidates change; returns how far it is from the dense one."""
        self._streams, apart = [], 1
        outputs: list[Any] = []
        with evaluating(slim):
            for batch in self.batches:
                seen = observe(slim, self.chains, batch)
                if not outputs:
                    taken = sum(h.nbytes for found in seen.streams for h in found.values())
                    apart = -(-taken * len(self.batches) // self._memory)
                self._streams.append([self._kept(found, apart) for found in seen.streams])
                outputs.append(self.criterion.kept(seen.output))
        self.samples += self.held
        tally, each = Tally(), []
        for batch, dense, output in zip(self.batches, self.dense, outputs, strict=True):
            each.append(self.criterion(dense, output, batch))
            if self.criterion.scores:
                tally.add(self.criterion.scored(dense, output, batch))
        tally = tally.merged(self.ranks.total)
        return Judged(self._of_all(each), tally.agreement, tally.accuracy_drop)

    @staticmethod
    def _kept(streams: dict[int, Tensor], apart: int) -> dict[int, Tensor]:
        """The last boundary of a chain, which later chains may need, and one in so many others."""
        return {b: h for b, h in streams.items() if b % apart == 0 or b == max(streams)}

    def __call__(
        self, slim: nn.Module, chain: int = 0, boundary: int = 0, *, screen: bool = False
    ) -> Tensor:
        """The divergence of each sample, (samples,) float64, infinite where it is not finite.

        Args:
            slim: a candidate that is the network in work up to `boundary` of `chain`; used up.
            screen: judge on the first of `SCREEN` shares of the samples, which are spread evenly.
        """
        found = []
        taken = range(self._screened if screen else len(self.batches))
        if taken:
            known = [b for b in self._streams[0][chain] if b <= boundary]
            boundary = max(known, default=0)
            resumed = Resumed(slim, self.chains, chain, boundary, self._streams[0])
        with evaluating(slim):
            for k in taken:
                output = self.batches[k].run(resumed.start(self._streams[k]))
                kept = self.criterion.kept(output)
                found.append(self.criterion(self.dense[k], kept, self.batches[k]))
        judged = self._of_all(found)
        blocks = sum(len(c) for c in self.chains)
        passed = boundary + sum(len(c) for c in self.chains[:chain])
        self.samples += len(judged) * (1 - passed / blocks)
        return judged

    def _of_all(self, found: list[Tensor]) -> Tensor:
        """The divergences of all ranks' samples, screened ones first, infinite where not finite."""
        own = torch.cat([torch.zeros(0, dtype=torch.float64), *(each.cpu() for each in found)])
        ranks = self.ranks.gathered(own)
        first = [part[:n] for part, (_, n) in zip(ranks, self._counts, strict=True)]
        rest = [part[n:] for part, (_, n) in zip(ranks, self._counts, strict=True)]
        values = torch.cat([*first, *rest])
        return torch.where(torch.isfinite(values), values, math.inf)


def regroup(
    dealt: list[tuple[list[int], Batch]], size: int | None, ranks: Ranks
) -> tuple[list[Batch], list[Batch]]:
    """The samples to screen on and the others, in batches of about `size`.

    They are dealt like cards to piles that each span the whole loader, of which the first are screened
    on. Batches whose tensors differ in shape (text of several lengths) stay as they are. What is
    screened on does not depend on how many ranks there are.

    Args:
        dealt: the number of each sample among those of all ranks, and the batches of them.
    """
    batches = [batch for _, batch in dealt]
    shapes = {
        zlib.crc32(repr([(name, t.shape[1:]) for name, t in batch.tensors.items()]).encode())
        for batch in batches
    }
    loose = any(
        t.ndim == 0 or len(t) != len(batch) for batch in batches for t in batch.tensors.values()
    )
    kinds = torch.cat(ranks.gathered(torch.tensor([*shapes, *[-1] * loose], dtype=torch.long)))
    if size is None or len(kinds.unique()) > 1 or -1 in kinds:
        firsts = torch.tensor([places[0] for places, _ in dealt], dtype=torch.long)
        order = torch.cat(ranks.gathered(firsts)).sort().values
        last = int(order[max(1, len(order) // SCREEN) - 1])
        return (
            [batch for places, batch in dealt if places[0] <= last],
            [batch for places, batch in dealt if places[0] > last],
        )
    places = [place for own, _ in dealt for place in own]
    piles = max(1, round(ranks.sum(len(places)) / size))
    screened = max(1, piles // SCREEN)
    hands: dict[tuple[bool, int], list[int]] = {}
    for row, place in enumerate(places):
        pile = place % piles
        later = pile >= screened
        # A rank has a part of each pile: so many make a batch.
        hands.setdefault((later, (pile - screened * later) // ranks.count), []).append(row)
    joined = Batch.join(batches) if batches else None
    found: tuple[list[Batch], list[Batch]] = [], []
    for (later, _), rows in sorted(hands.items()):
        assert joined is not None
        found[later].append(joined.select(rows))
    return found
