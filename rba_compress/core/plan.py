"""Plans: the changes to a network and their reasons, without tensors, read and written as JSON."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from rba_compress.core.call_signature import Signature
from rba_compress.core.config import Budget, Config, Healing, StoredConfig
from rba_compress.core.cost import Cost
from rba_compress.core.map_spec import Diagnostics, MapSpec
from rba_compress.core.registry import UNITS, UnitName
from rba_compress.core.schema import Frozen, ModulePath
from rba_compress.core.tables import html_table

REPR = 200
"""Characters of a plan in the representation of a value."""


class Branch(Frozen):
    """The last linear layer of a residual branch: its output, times `scale`, is added to the stream."""

    path: ModulePath
    scale: str | None = None
    """Name of the layer scale, a parameter (d,); None where there is none."""
    norm: str | None = None
    """Path of the LayerNorm behind the sum; None where there is none."""


ByPositions = tuple[tuple[int, int], ...]
"""Three pairs of a number of positions and the MACs of one sample, because attention grows with the
square; empty where positions cannot be merged."""


def macs_at(counts: ByPositions, positions: int) -> int:
    """Return the MACs at a number of positions, by the quadratic through three counts."""
    total = Fraction(0)
    for k, (x, value) in enumerate(counts):
        term = Fraction(value)
        for other, (y, _) in enumerate(counts):
            if other != k:
                term *= Fraction(positions - y, x - y)
        total += term
    return round(total)


class Offer(Cost):
    """Remaining cost of a block that a unit cuts, without the unit's map."""

    unit: UnitName
    narrow: bool
    """True for a block that computes only the positions that the output reads."""
    by_positions: ByPositions = ()
    """MACs where merging has left fewer positions."""


class Slice(Frozen):
    """Tensor of a block of which narrowing keeps some channels."""

    tensor: ModulePath
    """Path from the block."""
    dim: int = Field(ge=0, le=4)
    """Dimension of the channels."""
    parts: int = Field(1, ge=1, le=8)
    """Number of equal parts along that dimension with all channels each: 2 where a layer computes the
    values and their gates."""
    size: int = Field(1, ge=1)
    """Number of entries of each channel: those of a head, where heads are the channels."""


class ChannelGroup(Frozen):
    """Channels between layers of a block: one layer reads them, and what lies between acts on each
    channel separately.
    """

    reader: ModulePath
    """Path of the reading layer, from the block."""
    channels: int = Field(gt=0)
    slices: tuple[Slice, ...]
    """Tensors of the layers that compute the channels and of those in between; the reader's weight."""
    shift: str = ""
    """Tensor that takes a constant of the reader's output: its bias, or with a minus sign the running
    mean of a BatchNorm behind it; empty where there is none."""
    norm: str = ""
    """Path of the BatchNorm behind the reader, from the block; empty where there is none."""
    skip: str | None = None
    """Path of the module to whose output that BatchNorm's is added, empty for the block's input; None
    where there is no such sum."""


class HeadRows(Frozen):
    """Channels of heads, one head after the other, that a linear layer computes.

    Keys have no bias here: it adds the same to a query's product with every key, and cancels in the
    softmax.
    """

    layer: ModulePath
    """Path of the layer from the block. A part of `source` gets one of its own when channels are taken.
    """
    source: ModulePath
    """Weight of the layer that computes them in the original block."""
    bias: str = ""
    """Bias of that layer; empty where there is none."""
    first: int = Field(ge=0)
    """First row in the weight."""
    heads: int = Field(gt=0)
    width: int = Field(gt=0)
    """Channels of a head."""
    positions_first: bool = False
    """True where the layer's output counts positions before samples."""

    @property
    def rows(self) -> slice:
        """Rows of the weight."""
        return slice(self.first, self.first + self.heads * self.width)

    @property
    def part(self) -> bool:
        """True where the source computes more than these channels."""
        return f"{self.layer}.weight" != self.source


class Attention(Frozen):
    """Attention inside a block, by its layers."""

    query: HeadRows | None = None
    """None where something else than a layer makes the queries, such as rotary embeddings or norms."""
    key: HeadRows | None = None
    value: HeadRows
    output: ModulePath
    """Layer that reads all heads, from the block."""
    bias: bool
    """True where that layer has a bias."""
    repeated: int = Field(1, gt=0)
    """Heads of queries that read the same keys and values."""
    rank: int = Field(gt=0)
    """Channels of a head's queries and keys."""


CountName = Literal[
    "num_heads",
    "num_attention_heads",
    "num_key_value_heads",
    "attn_dim",
    "all_head_size",
    "embed_dim",
    "split_size",
    "inner_dim",
]
"""Names of attributes from which libraries' attention takes its sizes."""


class Count(Frozen):
    """Attribute of a module that says a size, as a multiple of the number of channels."""

    module: str
    """Path from the block; empty for the block itself."""
    name: CountName
    each: int = Field(gt=0)


class Called(Frozen):
    """Module inside of a block, and how the block calls it."""

    path: ModulePath
    """Path from the block."""
    signature: Signature


class Width(Frozen):
    """Channels of a block that a unit may take away, and the saving: for t channels
    t * macs - t^2 * macs_squared, and likewise for the parameters.
    """

    unit: UnitName
    channels: int = Field(gt=0)
    groups: tuple[ChannelGroup, ...] = ()
    """Groups of so many channels each, narrowed alike."""
    attention: Attention | None = None
    """Attention whose sizes the unit changes, so that the block runs by its graph; None where the
    block's own code runs."""
    counts: tuple[Count, ...] = ()
    """Attributes from which the block's code takes sizes."""
    module: Called | None = None
    """Module in whose place a layer is put; None where layers are narrowed."""
    macs: ByPositions
    """MACs of one channel; one pair where positions cannot be merged."""
    macs_squared: int = 0
    narrow: ByPositions = ()
    """`macs` where the block computes the read positions alone."""
    params: int = 0
    params_squared: int = 0
    bias: int = 0
    """Parameters that go with the first channel: the bias of the keys, which cancels in the softmax."""
    narrow_bias: int = 0
    """`bias` where the block computes the read positions alone, and may have none anyway."""

    def saving(self, taken: int, positions: int, *, narrow: bool = False) -> Cost:
        """Return the cost that is saved without some channels."""
        macs = macs_at(self.narrow if narrow else self.macs, positions)
        return Cost(
            macs=taken * macs - taken**2 * self.macs_squared,
            params=taken * self.params - taken**2 * self.params_squared,
        )


class Site(NamedTuple):
    """Blocks `start:stop` of a chain, and a unit that may be applied there."""

    chain: int
    start: int
    stop: int
    unit: str


class Block(Frozen):
    """Replaceable block: its module path, and its connections."""

    path: ModulePath
    type: str
    signature: Signature = Signature()
    """Call signature; in a GraphModule, that of a module that takes the stream and `sides`."""
    variants: tuple[Signature, ...] = ()
    """Other call signatures of the block, for example with and without a mask."""
    nodes: tuple[str, str] | None = None
    """Names of the fx nodes of the stream before and after the block, in a GraphModule."""
    sides: tuple[str, ...] = ()
    """Names of the other fx nodes outside of the block that it reads, in a GraphModule."""
    branches: tuple[Branch, ...] = ()
    """Residual branches in order; empty where they cannot be told apart."""
    units: tuple[Offer, ...] = ()
    """Offers of the units that can cut the block."""
    by_positions: ByPositions = ()
    """MACs of the block where merging has left fewer positions."""
    second: int = 0
    """MACs of the second sublayer for one position."""
    widths: tuple[Width, ...] = ()
    """Channels inside the block that units may take away."""

    @field_validator("signature", mode="before")
    @classmethod
    def _schema_1(cls, value: Any) -> Any:
        """Accept plans of schema 1, whose blocks of a GraphModule have no signature."""
        return Signature() if value is None else value

    def offer(self, unit: str, *, narrow: bool = False) -> Offer | None:
        """Return the offer of a unit; None where the block has none."""
        return next((u for u in self.units if (u.unit, u.narrow) == (unit, narrow)), None)

    def width(self, unit: str) -> Width | None:
        """Return the channels that a unit may take away; None where it may take none."""
        return next((w for w in self.widths if w.unit == unit), None)


class Chain(Frozen):
    """Sequence of blocks: the output stream of each is read by the next one, and by nothing else."""

    name: str
    blocks: tuple[Block, ...]
    width: int
    """Channels of the stream."""
    ndim: int
    """Dimensions of the stream."""
    axis: int
    """Channel axis of the stream."""
    positions: int
    """Positions of the stream in one sample: tokens, or pixels."""
    sample_axis: int = 0
    """The axis of the stream that counts samples: 1 of (T, N, d)."""
    rows: int = 1
    """Consecutive rows of each sample along that axis, such as the frames of a video; 0 where no rows
    are those of one sample."""
    class_tokens: tuple[int, ...] = ()
    """Token positions that are selected one by one after the chain; empty where there are none."""
    reads: int = 0
    """Number of positions, the first ones, that are the only ones read behind the chain; 0 where others
    are read."""
    unread: str = ""
    """Reason why every position is computed; empty where `reads` limits them."""
    ordered: int | None = None
    """Number of positions, the first ones, that must keep their places, because what follows the chain
    gives the same output for any order of the others; None where the order of all matters."""
    unmerged: str = ""
    """Reason why no positions can be merged; empty where some blocks can merge them."""
    macs: tuple[int, ...] = ()
    """Multiply-accumulates of each block, for one sample."""
    params: tuple[int, ...] = ()
    """Parameters of each block."""
    after: int | None = None
    """Number of chains of replaceable blocks that run before, for a block that changes the shape of the
    stream and can only be narrowed; None where blocks are replaceable."""

    def __repr__(self) -> str:
        return f"Chain({self.name!r}: {len(self)} x {self.blocks[0].type}, width {self.width})"

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def paths(self) -> tuple[str, ...]:
        """Module paths of the chain's blocks, in order."""
        return tuple(block.path for block in self.blocks)

    def merged(self, positions: int) -> bool:
        """Return whether merging left so many: fewer than all positions, more than the read ones."""
        return self.reads * max(self.rows, 1) < positions < self.positions

    def spans(self, window: int | None = None) -> list[tuple[int, int]]:
        """Return every span (start, stop) of at most `window` blocks."""
        longest = len(self) if window is None else window
        return [
            (start, stop)
            for start in range(len(self))
            for stop in range(start + 1, min(start + longest, len(self)) + 1)
        ]


def in_order(chains: Sequence[Chain], fixed: Sequence[Chain]) -> list[Chain]:
    """Return chains of replaceable blocks and others in the order in which they run."""
    places = [(k, 1, chain) for k, chain in enumerate(chains)]
    places += [(chain.after or 0, 0, chain) for chain in fixed]
    return [chain for *_, chain in sorted(places, key=lambda place: place[:2])]


def listed(paths: Sequence[str]) -> str:
    """Return paths of consecutive blocks as text; of more than three, the first and the last."""
    return ", ".join(paths) if len(paths) <= 3 else f"{paths[0]} to {paths[-1]}"


def boundary_names(paths: Sequence[str]) -> list[str]:
    """Return short names of a chain's boundaries for a figure: `in`, then the path of the block that
    outputs the stream, without the parents that all blocks share.
    """
    split = [path.split(".") for path in paths]
    while all(len(parts) > 1 for parts in split) and len({parts[0] for parts in split}) == 1:
        split = [parts[1:] for parts in split]
    return ["in", *(".".join(parts) for parts in split)]


class Replacement(Frozen):
    """Replacement of the span `start:stop` of a chain by one map, or of one block by a thinned one."""

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
    """Channel axis of the stream."""
    unit: UnitName = "span"
    level: float | None = None
    """Numeric setting of a unit that has no map."""
    behind: tuple[Block, ...] = ()
    """All later blocks of the chain, where the unit merges positions: their stream carries sizes."""
    restores: bool = False
    """True where the last of the blocks behind repeats merged positions, for what follows reads all."""
    reads: int = 0
    """Number of positions, the first ones, that a read-out computes in full, or that are not merged."""
    exact: bool = False
    """True where the other positions are not computed at all, since nothing reads them; the map is then
    unused."""
    narrowed: dict[ModulePath, tuple[int, ...]] = Field(default_factory=dict)
    """Shapes of the tensors that the unit narrows or solves anew, by their paths from the block."""
    kept: int = 0
    """Number of channels that are kept of each group; 0 where the unit narrows nothing."""
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
        """Prefix of the unit's tensors in a state dict of the compressed model."""
        return f"{self.blocks[0].path}." + ("" if self.inner else "map.")

    @property
    def inner(self) -> bool:
        """True where the block keeps its form, and its layers have fewer channels."""
        return UNITS[self.unit].inner

    @property
    def runs_by_graph(self) -> bool:
        """True where the block's own code does not run it."""
        width = self.blocks[0].width(self.unit)
        return not UNITS[self.unit].removes and (width is None or width.attention is not None)

    def owns(self, name: str) -> bool:
        """Return whether a tensor of a state dict is one that the unit sets."""
        return name.startswith(self.key) and (
            not self.inner or name.removeprefix(self.key) in self.narrowed
        )

    def __str__(self) -> str:
        return UNITS[self.unit].describe(self)


_WIDEST = 1 << 24


_CHANNELS_SECOND = {(1, 3), (1, 4), (1, 5)}
"""Channel axis and number of dimensions of streams whose maps are 1x1 convolutions."""


STATISTICS = ("running_mean", "running_var")
"""Buffers of a BatchNorm that are re-estimated."""


class Refit(Frozen):
    """Kept layer whose tensors were computed anew; one of the three kinds below."""

    path: ModulePath
    step: float
    """Share of the correction that was taken; of the last one, where the layer was re-solved again."""

    @property
    def key(self) -> str:
        """Prefix of the layer's tensors in a state dict."""
        return f"{self.path}."

    def owns(self, name: str) -> bool:
        """Return whether a tensor of a state dict is one that the refit sets."""
        return name.startswith(self.key)


class SolvedRefit(Refit):
    """Linear layer that ends a branch of a kept block, with a new weight and bias."""

    chain: str
    block: int
    damping: float = 0.0

    def __str__(self) -> str:
        return f"{self.path} refitted ({self.damping:g}, {self.step:g})"


class LayerRefit(SolvedRefit):
    """Layer solved towards the original stream."""

    kind: Literal["layer"] = "layer"
    chain: str = ""
    block: int = -1


class FoldRefit(SolvedRefit):
    """Layer solved towards the stream behind the span that follows its block: the span's map."""

    kind: Literal["fold"] = "fold"


class NormRefit(Refit):
    """BatchNorm with running statistics of its inputs in the compressed network."""

    kind: Literal["norm"] = "norm"

    def owns(self, name: str) -> bool:
        """Return whether a tensor is one of the running statistics; weight and bias stay."""
        return name in {f"{self.key}{statistic}" for statistic in STATISTICS}

    def __str__(self) -> str:
        return f"{self.path} re-estimated ({self.step:g})"


AnyRefit = Annotated[LayerRefit | FoldRefit | NormRefit, Field(discriminator="kind")]


def _of_today(value: Any) -> Any:
    """Return a refit with its kind; up to schema 6, two flags said it."""
    if not isinstance(value, dict) or "kind" in value:
        return value
    folded, norm = value.get("folded"), value.get("statistics")
    kind = "norm" if norm else "fold" if folded else "layer"
    gone = {"folded", "statistics", *(("chain", "block", "damping") if norm else ())}
    return {"kind": kind} | {k: v for k, v in value.items() if k not in gone}


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


class ComparedOutput(Frozen):
    """Output of the network, and the divergence by which it is evaluated."""

    name: str
    divergence: Divergence
    probabilities: bool = False
    """True where the output holds probabilities, behind a softmax or a sigmoid, instead of scores."""
    scale: float | None = None
    """Divisor of squared errors: the variance of one number of the output on calibration samples,
    around the mean of its channel. None divides by the mean square of each sample."""


class EvaluatedCandidate(Frozen):
    """Option that the search ran alone, on the screened validation samples."""

    step: int
    """Number of decisions before the run."""
    chain: str
    start: int
    stop: int
    unit: UnitName = "span"
    map: MapSpec
    level: float | None = None
    divergence: float
    """Divergence of the output with the change."""
    macs: int
    params: int
    dropped: str = ""
    """Reason for which the option was not combined with others; empty where it was."""


Action = Literal[
    "take",
    "stage",
    "schedule",
    "trade",
    "settle",
    "solve",
    "swap",
    "refit",
    "statistics",
    "choose",
    "stop",
]
"""Kinds of decisions; "stop" comes before a step that breaks a limit of quality; "take", "settle" and
"swap" are of a greedy search."""


class Step(Frozen):
    """Decision of the search, and its result."""

    action: Action
    change: str
    divergence: float
    """Divergence of the output after the decision."""
    margin: float
    """Increase of the divergence with the next best network of the stage, or without the change; where
    the search stopped, increase by the step that was not taken. A margin that is negligible beside the
    divergence means a tie: see `rba_compress.planning.search`."""
    predicted: float | None = None
    """Divergence that output changes predicted; None for decisions without a prediction."""
    macs: int
    params: int


class Healed(Frozen):
    """Record of a training after splicing: settings, samples and result."""

    healing: Healing
    data: str
    """SHA-256 of the training samples."""
    samples: int
    rate: float | None = None
    """Peak learning rate that was chosen."""
    steps: int
    """Optimiser steps to the state that was kept."""
    before: float
    """Objective on held-out samples before the training."""
    after: float
    keys: tuple[str, ...] = ()
    """Names of the parameters that were trained, in this training or an earlier one."""


class Plan(Frozen):
    """Replacements in a network, and the reasons for what is not replaced. Holds no tensors."""

    replacements: tuple[Replacement, ...] = ()
    refits: tuple[Annotated[AnyRefit, BeforeValidator(_of_today)], ...] = ()
    refusals: tuple[Refusal, ...] = ()
    steps: tuple[Step, ...] = ()
    """The decisions, in order."""
    candidates: tuple[EvaluatedCandidate, ...] = ()
    """Every option that was run for the decisions."""
    budget: Budget | None = None
    config: StoredConfig = Field(default_factory=Config)
    divergence: Divergence = "nse"
    """Divergence of the main output, which was minimised."""
    outputs: tuple[ComparedOutput, ...] = ()
    """Outputs that were evaluated, the main one first; their divergences were added up."""
    forward_passes: float = 0.0
    """Samples that the search ran through a whole network's worth of blocks, over the loader's."""
    healed: Healed | None = None
    notes: tuple[str, ...] = ()
    """Facts about the search for the reader of a report, one a line."""

    @property
    def in_order(self) -> list[Replacement]:
        """Replacements in the order of the network, chain by chain."""
        return sorted(self.replacements, key=lambda r: (r.chain, r.start))

    def at(self, chain: Chain, start: int, stop: int) -> list[Replacement]:
        """Return the replacements that share a block with a span of a chain."""
        own = [r for r in self.replacements if r.chain == chain.name]
        return [r for r in own if r.start < stop and start < r.stop]

    def __repr__(self) -> str:
        return f"Plan({textwrap.shorten(str(self), REPR, placeholder=' ...')})"

    def _repr_html_(self) -> str:
        fits = ((str(r), r.diagnostics) for r in self.in_order)
        done = [
            (text, "" if d is None else f"R² {d.r2:.4f}, rank {d.effective_rank:.1f}")
            for text, d in fits
        ]
        left = [(", ".join(refusal.paths[:3]), refusal.reason) for refusal in self.refusals]
        return html_table(repr(self), ("what", "how well, or why not"), [*done, *left])

    def __str__(self) -> str:
        text = "; ".join(map(str, self.in_order)) or "nothing replaced"
        normed = sum(isinstance(refit, NormRefit) for refit in self.refits)
        kept = sum(isinstance(refit, LayerRefit) for refit in self.refits)
        text += f"; kept layers re-solved: {kept}" if kept else ""
        text += f"; BatchNorms re-estimated: {normed}" if normed else ""
        text += f"; healed in {self.healed.steps} steps" if self.healed else ""
        return text + ("; every position is computed" if self.config.keep_features else "")
