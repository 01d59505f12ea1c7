"""Fits on the network as it is by now: towards the original streams, behind what is replaced already.

The network in work and the original run side by side over the samples to fit on. `g` are the streams
of the first, `h` of the second; a map over the span (i, j) is fitted to (g_i, h_j), so that it makes up
for what the changes before it did. Class tokens are kept apart from the other rows, so that every
weight of theirs comes from one pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rba_compress.batches import Batch
from rba_compress.moments import PairMoments
from rba_compress.plan import Branch, Chain
from rba_compress.recorder import evaluating
from rba_compress.streams import Observed, attention_mask, observe
from rba_compress.surgery import copy_model, replace_blocks


@dataclass(frozen=True)
class Rows:
    """Moments of class tokens and of all other rows."""

    others: PairMoments
    class_tokens: PairMoments | None = None

    @classmethod
    def of(cls, chain: Chain, x: Tensor, y: Tensor, mask: Tensor | None) -> Rows:
        """Of inputs x and targets y, channels on the chain's axis; features may be of another width."""
        y = y.movedim(chain.axis, -1)
        x = x.movedim(chain.axis, -1).reshape(*y.shape[:-1], -1)
        if mask is not None and y.ndim == 3 and mask.shape == y.shape[:2]:
            return cls(PairMoments.from_rows(x[mask], y[mask]))
        if not chain.class_tokens:
            return cls(PairMoments.from_rows(x.flatten(0, -2), y.flatten(0, -2)))
        tokens = torch.zeros(y.shape[1], dtype=torch.bool, device=y.device)
        tokens[list(chain.class_tokens)] = True
        return cls(
            PairMoments.from_rows(x[:, ~tokens].flatten(0, 1), y[:, ~tokens].flatten(0, 1)),
            PairMoments.from_rows(x[:, tokens].flatten(0, 1), y[:, tokens].flatten(0, 1)),
        )

    def __add__(self, other: Rows) -> Rows:
        if self.class_tokens is None or other.class_tokens is None:
            return Rows(self.others + other.others)
        return Rows(self.others + other.others, self.class_tokens + other.class_tokens)

    def weighted(self, weight: float) -> PairMoments:
        """All rows, each class token counted `weight` times."""
        if self.class_tokens is None:
            return self.others
        return self.others + self.class_tokens.weighted(weight)


@dataclass(frozen=True)
class SpanRows:
    """For one first block: (g_i, [h_j of every j]), and the same for the layer before it."""

    stops: tuple[int, ...]
    width: int
    maps: Rows
    folds: Rows | None
    """(features of the last linear layer before the span, [(h_j - g_i) / scale])."""

    def columns(self, stop: int) -> slice:
        """Where the target `stop` stands among the columns."""
        index = self.stops.index(stop)
        return slice(index * self.width, (index + 1) * self.width)

    def __add__(self, other: SpanRows) -> SpanRows:
        folds = None if self.folds is None or other.folds is None else self.folds + other.folds
        return SpanRows(self.stops, self.width, self.maps + other.maps, folds)


def scale_of(model: nn.Module, branch: Branch) -> Tensor | float:
    """The layer scale of a branch, or 1."""
    if branch.scale is None:
        return 1.0
    parent, _, name = branch.scale.rpartition(".")
    scale: Tensor = getattr(model.get_submodule(parent), name)
    return scale.detach()


def _lacking(gap: Tensor, scale: Tensor | float) -> Tensor:
    """What a layer's output lacks, before its layer scale; nothing where the scale shuts it off."""
    if isinstance(scale, float):
        return gap
    return gap / torch.where(scale.abs() > 1e-6, scale, torch.inf)


def span_rows(
    dense: nn.Module,
    slim: nn.Module,
    chain: Chain,
    batches: Iterable[Batch],
    *,
    spans: Sequence[tuple[int, int]],
    folds: dict[int, Branch],
) -> dict[int, SpanRows]:
    """The moments of every span, by first block, in one pass of both networks.

    Args:
        spans: (start, stop), each boundary present in `slim`.
        folds: the last branch before a first block, where that can be refitted.
    """
    stops = {i: tuple(sorted(j for start, j in spans if start == i)) for i, _ in spans}
    last = max(j for _, j in spans)
    found: dict[int, SpanRows] = {}
    paths = [folds[i].path for i in stops if i in folds]
    with evaluating(dense), evaluating(slim):
        for moved in batches:
            h = observe(dense, [chain], moved, stop=(0, last)).streams[0]
            seen = observe(slim, [chain], moved, layers=paths, stop=(0, max(stops)))
            g, mask = seen.streams[0], attention_mask(moved, chain)
            for i, ends in stops.items():
                targets = torch.cat([h[j] for j in ends], chain.axis)
                maps = Rows.of(chain, g[i], targets, mask)
                gaps = None
                if i in folds:
                    scale = scale_of(slim, folds[i])
                    gap = torch.cat([_lacking(h[j] - g[i], scale) for j in ends], chain.axis)
                    gaps = Rows.of(chain, seen.layers[folds[i].path][0], gap, mask)
                new = SpanRows(ends, chain.width, maps, gaps)
                found[i] = found[i] + new if i in found else new
    return found


class Resumed(nn.Module):
    """Ignores its input and gives back `value`, the stream at a boundary that was seen before."""

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None

    def forward(self, _: Tensor) -> Tensor:
        assert self.value is not None, "set before every pass"
        return self.value


def resume(model: nn.Module, chains: Sequence[Chain], chain: int, boundary: int) -> Resumed | None:
    """Make `model` start at a boundary of a chain, from the stream that is set on what is returned.

    In place: pass a copy. Earlier blocks of the chain and all blocks of earlier chains are passed over.
    At boundary 0 there is nothing to put the stream in place of: the whole model runs.
    """
    if boundary == 0:
        return None
    for earlier in chains[:chain]:
        replace_blocks(model, earlier.blocks, nn.Identity())
    start = Resumed()
    replace_blocks(model, chains[chain].blocks[:boundary], start)
    return start


@dataclass(frozen=True)
class _Step:
    """A model that runs from streams that are held, and stops at a boundary."""

    model: nn.Module
    start: Resumed | None
    held: list[Tensor]
    chain: Chain
    batches: Sequence[Batch]
    stop: int

    def run(self, k: int, layers: Sequence[str]) -> Observed:
        """Batch `k`, within `evaluating(self.model)`."""
        if self.start is not None:
            self.start.value = self.held[k]
        return observe(self.model, [self.chain], self.batches[k], layers=layers, stop=(0, self.stop))


class Walk:
    """Walks down a chain with both networks, holding the samples' streams at one boundary."""

    def __init__(
        self, dense: nn.Module, chains: Sequence[Chain], chain: int, batches: Sequence[Batch]
    ) -> None:
        self.dense, self.chains, self.index = dense, chains, chain
        self.batches = batches
        self.boundary = 0
        self.samples = 0.0
        """Samples sent through a whole network's worth of the chain."""
        self._h: list[Tensor] = []
        self._g: list[Tensor] = []

    @property
    def chain(self) -> Chain:
        return self.chains[self.index]

    def to(self, slim: nn.Module, boundary: int) -> None:
        """Go on to a boundary; what lies before it in `slim` must not have changed since."""
        if self._h and boundary == self.boundary:
            return
        reached = []
        for model, held in ((self.dense, self._h), (slim, self._g)):
            step = self._step(model, held, boundary)
            with evaluating(step.model):
                every = range(len(self.batches))
                reached.append([step.run(k, ()).streams[0][boundary] for k in every])
        self._h, self._g = reached
        self.boundary = boundary

    def _step(self, model: nn.Module, held: list[Tensor], stop: int) -> _Step:
        first = self.boundary if held else 0
        resumed = copy_model(model, share=True)
        start = resume(resumed, self.chains, self.index, first)
        share = (stop - first) / len(self.chain)
        self.samples += share * sum(len(batch) for batch in self.batches)
        return _Step(resumed, start, held, self.chain, self.batches, stop)

    def gaps(self, slim: nn.Module, branches: Sequence[Branch]) -> Rows:
        """(features of the last branch, what its output lacks), over the block at the boundary.

        `branches` are the block's, up to the one that is asked for. What is lacking is the original
        stream behind that branch minus the stream there by now.
        """
        paths = [branch.path for branch in branches]
        total: Rows | None = None
        stop = self.boundary + 1
        dense, light = (
            self._step(model, held, stop) for model, held in ((self.dense, self._h), (slim, self._g))
        )
        scales = [scale_of(self.dense, branch) for branch in branches]
        with evaluating(dense.model), evaluating(light.model):
            for k, batch in enumerate(self.batches):
                ours, theirs = light.run(k, paths).layers, dense.run(k, paths).layers
                gap = self._h[k] - self._g[k]
                for path, scale in zip(paths, scales, strict=True):
                    gap = gap + (theirs[path][1] - ours[path][1]).reshape(gap.shape) * scale
                mask = attention_mask(batch, self.chain)
                lacking = _lacking(gap, scales[-1])
                new = Rows.of(self.chain, ours[paths[-1]][0], lacking, mask)
                total = new if total is None else total + new
        assert total is not None
        return total
