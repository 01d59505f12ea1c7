"""Drift detection: distance of later data from the calibration data, by the streams between blocks.

At every boundary that a compressed network still has, the rows x (T, d) of a sample are projected on
the principal directions of the profiled rows, in units of their standard deviations, so that rows of
that distribution have mean 0 and covariance I. Each sample is summarised by these numbers:

    spread    log of the mean square of the coordinates, over rows and directions
    centre    the mean row, along the first directions

The reference is the mean and standard deviation of each number over N held-out samples. With z the
numbers of a batch of n samples in those units, its distance is

    sqrt(mean over numbers of n (mean_n z)^2 / (1 + n / N))          # about 1 without drift

so that a shift which all samples of a batch share stands out, and variation between samples does not.
One in a hundred batches of n held-out samples, drawn with replacement, exceeds the threshold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rba_compress.core.batch import Batch
from rba_compress.core.distributed import current
from rba_compress.core.inference import evaluating
from rba_compress.core.plan import Chain, Plan
from rba_compress.core.schema import Frozen
from rba_compress.graph.activations import attention_mask, observe
from rba_compress.linalg.moments import full_precision
from rba_compress.profiling.chain_statistics import ChainProfile

POSITIONS = 64
"""Number of positions of a sample that are measured, evenly spaced."""
DIRECTIONS = 32
"""Number of principal directions along which the mean row is measured."""
RARE = 0.01
"""Share of batches without drift that are reported as shifted."""
_DRAWS = 2000


class Shift(Frozen):
    """Distance of a batch from the data that a network was calibrated on."""

    samples: int
    distance: float
    """Distance from the held-out samples, about 1 without drift."""
    threshold: float
    """Distance that one in a hundred batches of as many held-out samples exceeds."""
    boundary: str
    """Boundary where the batch is furthest from the reference, named by the module that outputs it."""

    @property
    def shifted(self) -> bool:
        """True if the distance exceeds the threshold, or is NaN."""
        return not self.distance <= self.threshold

    def __str__(self) -> str:
        said = "outside of" if self.shifted else "within"
        return (
            f"{self.samples} samples lie {said} the calibration data: distance {self.distance:.2f}, "
            f"threshold {self.threshold:.2f}, furthest at {self.boundary}"
        )


@dataclass(frozen=True, eq=False)
class Place:
    """Boundary of a chain, and the distribution of its profiled rows."""

    chain: Chain
    boundary: int
    mean: Tensor
    """Mean row, (d,) float32."""
    whitening: Tensor
    """(d, d) float32, whose columns are the directions, largest variance first."""

    @classmethod
    def of(cls, profiled: ChainProfile, boundary: int) -> Place:
        """Build a place from the profiled moments."""
        moments = profiled.moments
        values, vectors = torch.linalg.eigh(moments.comoments(boundary, boundary) / max(moments.n, 1.0))
        # Directions of almost no variance would have no scale: add a thousandth of the mean variance.
        floor = 1e-3 * values.mean().clamp_min(torch.finfo(values.dtype).tiny)
        whitening = vectors / (values.clamp_min(0) + floor).sqrt()
        return cls(profiled.chain, boundary, moments.mean[boundary].float(), whitening.flip(1).float())

    @property
    def name(self) -> str:
        """Name of the boundary: the module whose output it is, or the input of the first block."""
        blocks = self.chain.blocks
        return blocks[self.boundary - 1].path if self.boundary else f"the input of {blocks[0].path}"

    @property
    def count(self) -> int:
        """Number of statistics of a sample at this boundary."""
        return 1 + min(DIRECTIONS, len(self.mean))

    def numbers(self, stream: Tensor, samples: int, mask: Tensor | None) -> Tensor:
        """Return the spread and the centre of every sample of a stream: (N, count) float64, on the CPU.

        Args:
            samples: N; the stream has one or several rows for each.
            mask: true at real tokens, in the stream's own layout.
        """
        tokens = stream.detach().movedim(self.chain.axis, -1).movedim(self.chain.sample_axis, 0)
        tokens = tokens[..., : len(self.mean)]  # behind a merge, sizes are the last channel
        mask = None if mask is None else mask.movedim(self.chain.sample_axis, 0)
        rows = tokens.reshape(samples, -1, tokens.shape[-1]).to(self.mean.device)
        counted = torch.ones(rows.shape[:2], device=rows.device)
        if mask is not None and mask.shape == counted.shape:
            counted = mask.to(counted)
        places = torch.linspace(0, rows.shape[1] - 1, min(POSITIONS, rows.shape[1])).round().long()
        rows, counted = (t.index_select(1, places.to(t.device)).float() for t in (rows, counted))
        share = counted / counted.sum(1, keepdim=True).clamp_min(1)
        with full_precision(rows.device):
            white = (rows - self.mean) @ self.whitening
        spread = (white.square().mean(-1) * share).sum(1).clamp_min(torch.finfo(white.dtype).tiny)
        centre = (white[..., :DIRECTIONS] * share[..., None]).sum(1)
        return torch.cat([spread.log()[:, None], centre], 1).cpu().double()


@dataclass(frozen=True, eq=False)
class ReferenceStatistics:
    """Reference statistics of held-out samples inside a compressed network."""

    places: tuple[Place, ...]
    held: Tensor
    """Statistics of every held-out sample, place by place: (N, numbers) float64."""

    @classmethod
    def of(
        cls, compressed: nn.Module, plan: Plan, chains: Sequence[ChainProfile], batches: Iterable[Batch]
    ) -> ReferenceStatistics | None:
        """Collect the statistics of held-out batches, of all ranks together. Return None if no boundary
        has separate rows for each sample.
        """
        # Rows that several samples share tell nothing of one sample.
        places = tuple(place for place in _places(plan, chains) if place.chain.rows)
        if not places:
            return None
        bare = cls(places, torch.zeros(0, sum(p.count for p in places), dtype=torch.float64))
        own = torch.cat([bare.held, *(bare.numbers(compressed, batch) for batch in batches)])
        return cls(places, torch.cat(current().gathered(own)))

    def numbers(self, compressed: nn.Module, batch: Batch) -> Tensor:
        """Return the statistics of every sample, place by place: (N, numbers) float64, on the CPU."""
        chains = list({place.chain.name: place.chain for place in self.places}.values())
        moved = batch.to(compressed)
        with evaluating(compressed):
            streams = observe(compressed, chains, moved).streams
        seen = {chain.name: found for chain, found in zip(chains, streams, strict=True)}
        found = [
            place.numbers(
                seen[place.chain.name][place.boundary],
                len(batch),
                attention_mask(moved, place.chain),
            )
            for place in self.places
        ]
        return torch.cat(found, 1)

    def shift(self, compressed: nn.Module, batch: Batch) -> Shift:
        """Return the distance of a batch from the held-out samples."""
        return self.shift_of(self.numbers(compressed, batch))

    def shift_of(self, numbers: Tensor) -> Shift:
        """Return the distance of samples with these statistics from the held-out samples."""
        n, known = len(numbers), len(self.held)
        spread = self.held.std(0, correction=0)
        # Statistics that never vary have no scale: rounding alone would look like a large shift.
        unit = spread.clamp_min(1e-3)
        held = (self.held - self.held.mean(0)) / unit
        off = ((numbers - self.held.mean(0)) / unit).mean(0)
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randint(known, (_DRAWS, n), generator=generator)
        # Count how often each sample was drawn: a product instead of a copy of the rows of every draw.
        times = torch.zeros(_DRAWS, known, dtype=held.dtype)
        times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=held.dtype))
        distances = (n * (times @ held / n).square().mean(1)).sqrt()
        each = [part.square().mean() for part in off.split([p.count for p in self.places])]
        worst = int(torch.stack(each).nan_to_num(torch.inf).argmax())
        return Shift(
            samples=n,
            distance=float((n * off.square().mean() / (1 + n / known)).sqrt()),
            threshold=float(distances.quantile(1 - RARE)),
            boundary=self.places[worst].name,
        )


def _places(plan: Plan, chains: Sequence[ChainProfile]) -> Iterator[Place]:
    """Yield the boundaries that a compressed network still has: not those inside a replaced span."""
    for profiled in chains:
        spans = [r for r in plan.replacements if r.chain == profiled.chain.name]
        gone = {b for r in spans for b in range(r.start + 1, r.stop)}
        kept = (b for b in range(len(profiled.chain) + 1) if b not in gone)
        yield from (Place.of(profiled, b) for b in kept)
