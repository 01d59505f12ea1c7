"""What is done to a network, and why: a `Plan`, without tensors, that reads and writes JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from rba_compress.core.call_signature import Signature
from rba_compress.core.config import Budget, Config, Healing
from rba_compress.core.cost import Cost
from rba_compress.core.map_spec import Diagnostics, MapSpec
from rba_compress.core.registry import UNITS, UnitName
from rba_compress.core.schema import Frozen, ModulePath
from rba_compress.core.tables import html_table


class Branch(Frozen):
    """The last linear layer of a residual branch: its output, times `scale`, is added to the stream."""

    path: ModulePath
    scale: str | None = None
    """A parameter (d,), the layer scale."""
    norm: str | None = None
    """A LayerNorm that the sum goes through, where it stands behind the sum."""


class Offer(Cost):
    """Cost that is left of a block which a unit cuts, its map aside."""

    unit: UnitName
    narrow: bool
    """Whether for the positions that the output reads alone."""


class Site(NamedTuple):
    """A place where something may be done, and the unit that does it."""

    chain: int
    start: int
    stop: int
    unit: str


class Block(Frozen):
    """A replaceable block: its module path, and how it is wired."""

    path: ModulePath
    type: str
    signature: Signature = Signature()
    """How it is called; in a GraphModule, as a module that takes the stream and `sides`."""
    variants: tuple[Signature, ...] = ()
    """Other ways in which it is called, with a mask or without say."""
    nodes: tuple[str, str] | None = None
    """In a GraphModule: the fx nodes of the stream before and after it."""
    sides: tuple[str, ...] = ()
    """In a GraphModule: the other fx nodes outside of it that it reads."""
    branches: tuple[Branch, ...] = ()
    """Its residual branches in order; empty where they cannot be told apart."""
    units: tuple[Offer, ...] = ()
    """What units can cut it down to."""

    @field_validator("signature", mode="before")
    @classmethod
    def _schema_1(cls, value: Any) -> Any:
        """Plans of schema 1 had none in a GraphModule."""
        return Signature() if value is None else value

    def offer(self, unit: str, *, narrow: bool = False) -> Offer | None:
        """Return the offer of a unit; None where the block has none."""
        return next((u for u in self.units if (u.unit, u.narrow) == (unit, narrow)), None)


class Chain(Frozen):
    """Blocks in sequence: each one's stream input is the one before's output, read by nobody else."""

    name: str
    blocks: tuple[Block, ...]
    width: int
    """Channels of the stream."""
    ndim: int
    """Dimensions of the stream."""
    axis: int
    """Its channel axis."""
    positions: int
    """Positions of the stream in one sample: tokens, or pixels."""
    sample_axis: int = 0
    """The axis of the stream that counts samples: 1 of (T, N, d)."""
    rows: int = 1
    """Rows along that axis for each sample, one behind the other: the frames of a video, say; 0 where
    no rows are those of one sample."""
    class_tokens: tuple[int, ...] = ()
    """Token positions that are selected one by one after the chain; empty where there are none."""
    reads: int = 0
    """Behind the chain the first so many positions are read, and no others; 0 where others are."""
    unread: str = ""
    """Why no position is left uncomputed."""
    macs: tuple[int, ...] = ()
    """Multiply-accumulates of each block, for one sample."""
    params: tuple[int, ...] = ()
    """Parameters of each block."""

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def paths(self) -> tuple[str, ...]:
        """Module paths of its blocks, in order."""
        return tuple(block.path for block in self.blocks)

    def spans(self, window: int | None = None) -> list[tuple[int, int]]:
        """Every span (start, stop) of at most `window` blocks."""
        longest = len(self) if window is None else window
        return [
            (start, stop)
            for start in range(len(self))
            for stop in range(start + 1, min(start + longest, len(self)) + 1)
        ]


def listed(paths: Sequence[str]) -> str:
    """Paths of consecutive blocks for a person; of more than three, the first and the last."""
    return ", ".join(paths) if len(paths) <= 3 else f"{paths[0]} to {paths[-1]}"


def boundary_names(paths: Sequence[str]) -> list[str]:
    """Short names of a chain's boundaries in a figure: `in`, then the block that puts the stream out,
    by its path without the parents that all blocks share.
    """
    split = [path.split(".") for path in paths]
    while all(len(parts) > 1 for parts in split) and len({parts[0] for parts in split}) == 1:
        split = [parts[1:] for parts in split]
    return ["in", *(".".join(parts) for parts in split)]


class Replacement(Frozen):
    """The span `start:stop` of a chain replaced by one map, or a block of it thinned."""

    chain: str
    start: int
    stop: int
    blocks: tuple[Block, ...]
    """The blocks of the span, in order."""
    map: MapSpec
    width: int
    """Channels of the stream."""
    ndim: int
    """Dimensions of the stream."""
    axis: int
    """Its channel axis."""
    unit: UnitName = "span"
    level: float | None = None
    """The setting of a unit that has no map."""
    reads: int = 0
    """In a read-out: how many positions are computed in full, the first ones."""
    exact: bool = False
    """Whether the others are not computed at all, for nothing reads them; the map is unused then."""
    diagnostics: Diagnostics | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if not 0 <= self.start < self.stop or len(self.blocks) != self.stop - self.start:
            raise ValueError(f"{len(self.blocks)} blocks are no span {self.start}:{self.stop}")
        UNITS[self.unit].require(self)
        last = self.axis in (-1, self.ndim - 1)
        known = last or (self.axis, self.ndim) in _CHANNELS_SECOND
        if not (0 < self.width <= _WIDEST and 0 < self.ndim <= 8 and known):
            raise ValueError(f"no map is of {self.width} channels on axis {self.axis} of {self.ndim}")
        if self.map.rank is not None and self.map.rank > self.width:
            raise ValueError(f"a map of rank {self.map.rank} for {self.width} channels")
        return self

    @property
    def key(self) -> str:
        """Prefix of its tensors in a state dict of the compressed model."""
        return f"{self.blocks[0].path}.map."

    def __str__(self) -> str:
        return UNITS[self.unit].describe(self)


_WIDEST = 1 << 24


_CHANNELS_SECOND = {(1, 3), (1, 4), (1, 5)}
"""Axis and dimensions of the streams that 1x1 convolutions are for."""


class Refit(Frozen):
    """A kept linear layer with a new weight and bias, solved towards the original stream; or a
    BatchNorm with running statistics of what reaches it by now."""

    chain: str = ""
    """Of a linear layer, as is its block."""
    block: int = -1
    path: ModulePath
    damping: float = 0.0
    step: float
    """Share of the correction that was taken; of the last, where the layer was re-solved again."""
    folded: bool = False
    """Whether it stands in for the span right behind its block."""
    statistics: bool = False
    """Whether it is a BatchNorm."""

    @property
    def key(self) -> str:
        """Prefix of its tensors in a state dict."""
        return f"{self.path}."

    def __str__(self) -> str:
        if self.statistics:
            return f"{self.path} re-estimated ({self.step:g})"
        return f"{self.path} refitted ({self.damping:g}, {self.step:g})"


class Refusal(Frozen):
    """A candidate that is not replaced, and why."""

    paths: tuple[str, ...]
    type: str
    reason: str

    def __str__(self) -> str:
        shown = ", ".join(self.paths[:3]) + (
            f" and {len(self.paths) - 3} more" if self.paths[3:] else ""
        )
        return f"{shown} ({self.type}): {self.reason}"


Divergence = Literal["kl", "bernoulli", "nse", "cosine", "given"]
"""Measures of how far an output is from the original's: see `rba_compress.profiling.fidelity`."""


class JudgedOutput(Frozen):
    """An output of the network, and the divergence that it is judged by."""

    name: str
    divergence: Divergence
    probabilities: bool = False
    """Whether it holds probabilities, behind a softmax or a sigmoid, and no scores."""
    scale: float | None = None
    """The variance of one number of the output on calibration samples, around the mean of its channel,
    which squared errors are divided by; None divides by the mean square of each sample."""


class EvaluatedCandidate(Frozen):
    """One change that the search evaluated on all validation samples."""

    step: int
    """Decisions before it. To settle or swap a span, others were judged with that span undone."""
    chain: str
    start: int
    stop: int
    unit: UnitName = "span"
    map: MapSpec
    level: float | None = None
    divergence: float
    """Of the output, with the change."""
    macs: int
    params: int


Action = Literal["take", "settle", "swap", "refit", "statistics", "stop"]
"""What a search decides; to stop, before a step that breaks a limit of quality."""


class Step(Frozen):
    """One decision of the search, and what it came to."""

    action: Action
    change: str
    divergence: float
    """Of the output behind it."""
    margin: float
    """How far the divergence would be above at the price of the next best span, or without the change;
    where the search stopped, how far the step that was not taken raised it. Where it is nothing beside
    the divergence, the choice was a tie: see `rba_compress.planning.search`."""
    macs: int
    params: int


class Healed(Frozen):
    """That a network was trained after it was spliced: how, on what, and what came of it."""

    healing: Healing
    data: str
    """SHA-256 of the samples that it was trained on."""
    samples: int
    rate: float | None = None
    """The peak of the learning rate, as it was chosen."""
    steps: int
    """Optimiser steps to the state that was kept."""
    before: float
    """The objective on held-out samples, of what went in."""
    after: float
    keys: tuple[str, ...] = ()
    """Parameters that were trained, now or in an earlier training."""


class Plan(Frozen):
    """What is replaced by what, and why the rest was not. Holds no tensors."""

    replacements: tuple[Replacement, ...] = ()
    refits: tuple[Refit, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    steps: tuple[Step, ...] = ()
    """The decisions, in order."""
    candidates: tuple[EvaluatedCandidate, ...] = ()
    """Every finalist that was judged for them."""
    budget: Budget | None = None
    config: Config = Field(default_factory=Config)
    divergence: Divergence = "nse"
    """The divergence that was minimised, of the main output."""
    outputs: tuple[JudgedOutput, ...] = ()
    """The outputs that were judged, the main one first; their divergences were summed up."""
    forward_passes: float = 0.0
    """Samples that the search sent through a whole network's worth of blocks, over the loader's."""
    healed: Healed | None = None

    @property
    def in_order(self) -> list[Replacement]:
        """The replacements as they lie in the network, chain by chain."""
        return sorted(self.replacements, key=lambda r: (r.chain, r.start))

    def __repr__(self) -> str:
        return f"Plan({self})"

    def _repr_html_(self) -> str:
        fits = ((str(r), r.diagnostics) for r in self.in_order)
        done = [
            (text, "" if d is None else f"R² {d.r2:.4f}, rank {d.effective_rank:.1f}")
            for text, d in fits
        ]
        left = [(", ".join(refusal.paths[:3]), refusal.reason) for refusal in self.refusals]
        return html_table(str(self), ("what", "how well, or why not"), [*done, *left])

    def __str__(self) -> str:
        text = "; ".join(map(str, self.in_order)) or "nothing replaced"
        normed = sum(refit.statistics for refit in self.refits)
        kept = sum(not refit.folded for refit in self.refits) - normed
        text += f"; kept layers re-solved: {kept}" if kept else ""
        text += f"; BatchNorms re-estimated: {normed}" if normed else ""
        text += f"; healed in {self.healed.steps} steps" if self.healed else ""
        return text + ("; every position is computed" if self.config.keep_features else "")
