"""Evaluation of compressed networks by the divergence of their output."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rba_compress.core.batch import Batch
from rba_compress.core.distributed import Ranks, current
from rba_compress.core.errors import ActivationError
from rba_compress.core.inference import evaluating
from rba_compress.core.memory import device_bytes
from rba_compress.core.offload import device_of
from rba_compress.core.plan import Chain
from rba_compress.graph.activations import Observed, observe
from rba_compress.planning.effort import SPENT, Spent
from rba_compress.planning.partial_run import Resumed
from rba_compress.profiling.fidelity import Criterion, Tally


@dataclass(frozen=True)
class Evaluation:
    """Distance of a network's output from the original's, on the validation samples."""

    divergence: Tensor
    """Divergence of each sample, (samples,) float64, infinite where it is not finite."""
    agreement: float | None = None
    """Share of equal argmax; None where the output is not class scores."""
    accuracy_drop: float | None = None
    """Loss of accuracy; None without labels."""
    metric_drops: dict[str, float] = field(default_factory=dict)
    """Loss of each metric of the task."""

    @property
    def mean(self) -> float:
        return float(self.divergence.mean())


class Evaluator:
    """Evaluator of candidates on the validation samples.

    The evaluator holds the original's outputs, and the current network's streams in an activation
    cache. A candidate is run from the boundary behind which it first changes the stream. `samples`
    counts the samples run; a run through a part of the blocks counts as that share. Runs of the
    original and runs that fill the cache are included.

    Where the streams of all boundaries would not fit into `memory`, every second boundary is cached, or
    every third, and so on; a candidate is run from the last cached boundary before its own.

    With several ranks, each holds its share of the samples, and results are of all of them.

    Args:
        dealt: the indices of each batch's samples among all validation samples, and the batch.
        size: the batch size; by default batches stay as they are.
        memory: bytes for the activation cache; by default half of the device's memory.
        effort: decides the number of samples to screen on.
    """

    def __init__(
        self,
        original: nn.Module,
        chains: Sequence[Chain],
        criterion: Criterion,
        dealt: Iterable[tuple[list[int], Batch]],
        *,
        size: int | None = None,
        memory: int | None = None,
        effort: Spent = SPENT["default"],
    ) -> None:
        self.chains, self.criterion, self.ranks = chains, criterion, current()
        screened, others = regroup(list(dealt), size, self.ranks, effort)
        self.batches = [batch.to(original) for batch in (*screened, *others)]
        self._screened = len(screened)
        parts = (self.batches, screened)
        own = torch.tensor([[sum(map(len, part)) for part in parts]])
        self._counts = torch.cat(self.ranks.gathered(own)).tolist()
        """Number of samples of each rank, and of those that are screened on."""
        self.held: int = sum(held for held, _ in self._counts)
        """Number of validation samples."""
        self.screened: int = sum(screened for _, screened in self._counts)
        """Number of samples that are screened on."""
        self.samples = 0.0
        self._memory = memory or device_bytes(device_of(original)) // 2
        self._streams: list[list[dict[int, Tensor]]] = []
        self._apart = 1
        self.current: list[Any] = []
        """Outputs of the current network on the screened batches."""
        self._measured: dict[int, Tensor] = {}
        """Metrics of the network that was run last, by batch."""
        self.expected: list[Any] = []
        with evaluating(original):
            for k, batch in enumerate(self.batches):
                seen = observe(original, self.chains, batch)
                self._cache(seen)
                self.expected.append(self._compared(k, seen.output))
        self.current = self.expected[: self._screened]
        self._wanted = self._means()
        self.samples += self.held
        leaves = (leaf for output in self.expected for leaf in pytree.tree_leaves(output))
        flaws = sum(not bool(torch.isfinite(t).all()) for t in leaves if isinstance(t, Tensor))
        if self.ranks.sum(flaws):
            raise ActivationError("the model's output holds NaN or infinity on held-out samples")
        self.start = self._evaluated(enumerate(self.expected))
        """Evaluation of the original, which is the current network at first."""

    def _cache(self, seen: Observed) -> list[dict[int, Tensor]]:
        """Add a batch's streams to the cache, as many as fit for all batches; return them."""
        if not self._streams:
            taken = sum(h.nbytes for found in seen.streams for h in found.values())
            self._apart = -(-taken * len(self.batches) // self._memory)
        self._streams.append([self._kept(found, self._apart) for found in seen.streams])
        return self._streams[-1]

    def _compared(self, k: int, output: Any) -> Any:
        """Return what is compared of an output on the batch k, whose metrics are kept."""
        if self.criterion.metrics:
            self._measured[k] = self.criterion.measured(output, self.batches[k])
        return self.criterion.kept(output)

    def _means(self) -> Tensor:
        """Return the mean of each metric of the network that was run last, (metrics,)."""
        names = self.criterion.metrics
        sums = torch.zeros(len(names) + 1, dtype=torch.float64)
        for values in self._measured.values():
            sums += torch.cat([values.sum(0), values.new_tensor([len(values)])])
        sums = self.ranks.total(sums) if names else sums
        return sums[:-1] / sums[-1].clamp_min(1)

    def rebase(self, model: nn.Module, chain: int = 0, boundary: int = 0) -> Evaluation:
        """Make `model` the current network, from which candidates differ, and evaluate it.

        Args:
            model, chain, boundary: as in `outputs`.
        """
        self.samples += self.price(chain, boundary)
        boundary = self._cached(chain, boundary)
        before, self._streams = self._streams, []
        known = before or [[{} for _ in self.chains]] * len(self.batches)
        resumed = Resumed(model, self.chains, chain, boundary, known[0]) if self.batches else None
        outputs: list[Any] = []
        with evaluating(model):
            for k, batch in enumerate(self.batches):
                assert resumed is not None
                seen = observe(resumed.start(known[k]), self.chains, batch)
                streams = self._cache(seen)
                streams[:chain] = known[k][:chain]
                if boundary:
                    old = known[k][chain]
                    first = {b: h for b, h in old.items() if b <= boundary}
                    streams[chain] = first | {b: h for b, h in streams[chain].items() if b > boundary}
                outputs.append(self._compared(k, seen.output))
        self.current = outputs[: self._screened]
        return self._evaluated(enumerate(outputs))

    def _cached(self, chain: int, boundary: int) -> int:
        """Return the last cached boundary of a chain that is not behind another."""
        if not self._streams:
            return boundary
        return max((b for b in self._streams[0][chain] if b <= boundary), default=0)

    def evaluation(self, model: nn.Module, chain: int = 0, boundary: int = 0) -> Evaluation:
        """Evaluate a candidate on all validation samples; arguments as in `outputs`."""
        return self._evaluated(self.outputs(model, chain, boundary))

    def _evaluated(self, outputs: Iterable[tuple[int, Any]]) -> Evaluation:
        tally, each = Tally(), []
        for k, output in outputs:
            each.append(self.criterion(self.expected[k], output, self.batches[k]))
            if self.criterion.scores:
                tally.add(self.criterion.scored(self.expected[k], output, self.batches[k]))
        tally = tally.merged(self.ranks.total)
        drops = dict(zip(self.criterion.metrics, (self._wanted - self._means()).tolist(), strict=True))
        return Evaluation(self.of_all(each), tally.agreement, tally.accuracy_drop, drops)

    @staticmethod
    def _kept(streams: dict[int, Tensor], apart: int) -> dict[int, Tensor]:
        """Return the streams to cache: every `apart`-th, and the last, which later chains may need."""
        return {b: h for b, h in streams.items() if b % apart == 0 or b == max(streams)}

    def __call__(
        self, model: nn.Module, chain: int = 0, boundary: int = 0, *, screen: bool = False
    ) -> Tensor:
        """Return the divergence of each sample, (samples,) float64, infinite where it is not finite.

        Args:
            model, chain, boundary, screen: as in `outputs`.
        """
        return self.of_all(
            [
                self.criterion(self.expected[k], kept, self.batches[k])
                for k, kept in self.outputs(model, chain, boundary, screen=screen)
            ]
        )

    def outputs(
        self, model: nn.Module, chain: int = 0, boundary: int = 0, *, screen: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """Yield the number of each of this rank's batches and what is compared of the model's output.

        Args:
            model: a candidate that equals the current network up to `boundary` of `chain`; changed in
                place.
            screen: run a share of the samples alone, which are spread evenly.
        """
        taken = range(self._screened if screen else len(self.batches))
        if taken:
            boundary = self._cached(chain, boundary)
            resumed = Resumed(model, self.chains, chain, boundary, self._streams[0])
        self.samples += self.price(chain, boundary, screen=screen)
        with evaluating(model):
            for k in taken:
                output = self.batches[k].run(resumed.start(self._streams[k]))
                # Options that are screened need no metrics of the task.
                yield k, self.criterion.kept(output) if screen else self._compared(k, output)

    def price(self, chain: int, boundary: int, *, screen: bool = False) -> float:
        """Return the samples that a run counts for, as `outputs`; a partial run counts as its share."""
        boundary = self._cached(chain, boundary)
        blocks = sum(len(c) for c in self.chains)
        passed = boundary + sum(len(c) for c in self.chains[:chain])
        run = sum(screened if screen else held for held, screened in self._counts)
        return float(run * (1 - passed / blocks))

    def of_all(self, found: list[Tensor]) -> Tensor:
        """Return the divergences of all ranks' samples, screened ones first, infinite if not finite."""
        own = torch.cat([torch.zeros(0, dtype=torch.float64), *(each.cpu() for each in found)])
        ranks = self.ranks.gathered(own)
        first = [part[:n] for part, (_, n) in zip(ranks, self._counts, strict=True)]
        rest = [part[n:] for part, (_, n) in zip(ranks, self._counts, strict=True)]
        values = torch.cat([*first, *rest])
        return torch.where(torch.isfinite(values), values, math.inf)


def fewer(
    dealt: list[tuple[list[int], Batch]], most: int, ranks: Ranks
) -> list[tuple[list[int], Batch]]:
    """Return at most so many samples, spread evenly over all, with their new numbers.

    Args:
        dealt: the indices of each batch's samples among those of all ranks, and the batch.
    """
    samples = int(ranks.sum(sum(len(places) for places, _ in dealt)))
    if samples <= most:
        return dealt
    found = []
    for places, batch in dealt:
        # The sample that is the first with the number k of `most`.
        kept = [r for r, place in enumerate(places) if place * most % samples < most]
        if kept:
            found.append(([places[r] * most // samples for r in kept], batch.select(kept)))
    return found


def regroup(
    dealt: list[tuple[list[int], Batch]],
    size: int | None,
    ranks: Ranks,
    effort: Spent = SPENT["default"],
) -> tuple[list[Batch], list[Batch]]:
    """Return the samples to screen on and the others, in batches of about `size`.

    Batches are stratified: each spans the whole loader, and the first ones are those to screen on.
    Batches whose tensors differ in shape (text of several lengths) stay as they are. The samples to
    screen on do not depend on the number of ranks.

    Args:
        dealt: the indices of each batch's samples among those of all ranks, and the batch.
        effort: decides the number of samples to screen on.
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
        last = int(order[max(1, len(order) // effort.screen) - 1])
        return (
            [batch for places, batch in dealt if places[0] <= last],
            [batch for places, batch in dealt if places[0] > last],
        )
    places = [place for own, _ in dealt for place in own]
    samples = ranks.sum(len(places))
    strata = max(1, round(samples / size), min(effort.screen, int(samples / effort.fewest)))
    screened = max(1, strata // effort.screen)
    rows_of: dict[tuple[bool, int], list[int]] = {}
    for row, place in enumerate(places):
        stratum = place % strata
        later = stratum >= screened
        # Each rank has a part of each stratum: as many parts as there are ranks make a batch.
        rows_of.setdefault((later, (stratum - screened * later) // ranks.count), []).append(row)
    joined = Batch.join(batches) if batches else None
    found: tuple[list[Batch], list[Batch]] = [], []
    for (later, _), rows in sorted(rows_of.items()):
        assert joined is not None
        found[later].append(joined.select(rows))
    return found
