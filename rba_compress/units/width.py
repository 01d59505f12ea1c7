"""Base of the units that narrow a block from the inside: fewer channels, and the reading layer solved.

The block keeps its form and its own code; its layers are replaced by smaller ones of the same kind.
Such a unit may stand beside others at the same block, as long as these keep the block's layers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch
from torch import Tensor, nn

from rba_compress.core.batch import Batch
from rba_compress.core.call_signature import Signature
from rba_compress.core.config import Config
from rba_compress.core.cost import Cost
from rba_compress.core.errors import ModelError
from rba_compress.core.map_spec import Diagnostics
from rba_compress.core.plan import (
    Attention,
    Block,
    Chain,
    HeadRows,
    Offer,
    Replacement,
    Site,
    Slice,
    Width,
)
from rba_compress.core.registry import UNITS
from rba_compress.graph.attention_heads import HeadSizes
from rba_compress.graph.channel_groups import ChannelGroups
from rba_compress.graph.rewrite import tensor_of
from rba_compress.linalg.moments import PairMoments, Total
from rba_compress.units.base import Level, Trial, Unit, keeps_layers
from rba_compress.units.block_variants import Traces

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.625, 0.75)
"""Levels: shares of the channels that are taken; 0 takes those that cost nothing."""
UNIFORM = tuple(k / 32 for k in range(25))
"""Levels where all blocks of a chain get one width: a single level must meet the budget."""


@dataclass(frozen=True)
class Levels:
    """Numbers of channels that may be kept."""

    shares: Sequence[float] = SHARES
    multiple: int = 1
    """Number of which kept channels are a multiple, rounded up."""

    def kept(self, channels: int, now: int, free: int) -> dict[int, float]:
        """Return the level of each number of channels to keep, the most first.

        Args:
            channels: number of channels of the original block.
            now: number of channels that are left.
            free: number of channels that cost nothing.
        """
        found: dict[int, float] = {}
        for share in self.shares:
            kept = (1 - share) * channels if share else now - free
            count = ceil(kept / self.multiple - 1e-9) * self.multiple
            if 0 < count < now:
                found.setdefault(count, share)
        return dict(sorted(found.items(), reverse=True))


@dataclass(frozen=True)
class Reader:
    """Layer that reads narrowed channels but ends no branch of linear layers; paths in the network."""

    path: str
    norm: str | None = None
    """BatchNorm behind the layer."""
    summed: bool = False
    """True where the norm's output is added to the block's input, or to that of `skip`."""
    skip: str | None = None


@dataclass(frozen=True)
class Seen:
    """Statistics of layers of one network, by path."""

    inputs: Mapping[str, PairMoments]
    """Moments of inputs; of a module, with its outputs as the targets."""
    heads: Mapping[str, HeadMoments]
    """Moments of outputs, head by head."""


@dataclass(frozen=True)
class HeadMoments:
    """Second moments of the outputs of a layer with heads, (heads, d, d) float64 sums."""

    whole: Tensor
    within: Tensor
    """The same, each sample's mean over positions subtracted."""
    rows: Tensor
    """Number of outputs, (), float64."""

    def __add__(self, other: HeadMoments) -> HeadMoments:
        return HeadMoments(self.whole + other.whole, self.within + other.within, self.rows + other.rows)

    def merged(self, total: Total | None, weight: float) -> HeadMoments:
        """Return the moments of all processes' outputs, those of this one counted `weight` times."""
        if total is None:
            return self
        whole, within, rows = (total(weight * part) for part in (self.whole, self.within, self.rows))
        return HeadMoments(whole, within, rows)


class WidthUnit(Unit):
    """Unit that takes channels away inside one block."""

    inner = True
    whole: ClassVar[bool] = False
    """True where they are taken as a whole."""
    second: ClassVar[bool] = False
    """True where the channels lie in the second of two sublayers, behind a merge of positions."""

    def offers(self, trial: Trial) -> Iterable[Offer]:
        """Return nothing: a block that can be narrowed has `widths`."""
        return ()

    @abstractmethod
    def width(self, inside: Inside, b: int) -> tuple[Width | None, list[str]]:
        """Return the channels of a block that may be taken, and reasons why others may not."""

    def sites(self, chain: Chain, window: int | None) -> list[tuple[int, int]]:
        """Return the blocks that have such channels."""
        return [(b, b + 1) for b, block in enumerate(chain.blocks) if block.width(self.name)]

    def excludes(self, site: Site, other: Replacement) -> bool:
        """Return whether the other replacement, at the same block, does not keep its layers, or one of
        the two takes whole heads and the other one some of their channels.
        """
        if not other.inner:
            return not keeps_layers(other)
        theirs = UNITS[other.unit]
        if not (self.of_heads and isinstance(theirs, WidthUnit) and theirs.of_heads):
            return False
        return other.unit != self.name and (self.whole or theirs.whole)

    def levels(self, config: Config, chain: Chain) -> Sequence[Level]:
        """Return shares of the channels to take."""
        return SHARES

    def choice(self, chain: Chain, start: int, stop: int, level: Level = 0.5) -> Replacement:
        """Return the decision for a block and a share of its channels, not fitted yet."""
        return super().choice(chain, start, stop, level if isinstance(level, float) else 0.5)

    def observed(self, block: Block) -> list[str]:
        """Return the paths of the layers whose inputs a fit needs the moments of."""
        return []

    @abstractmethod
    def fits(
        self, model: nn.Module, chain: Chain, b: int, seen: Seen, levels: Levels
    ) -> list[tuple[Replacement, dict[str, Tensor]]]:
        """Fit every level of a block in closed form, from one statistic.

        Args:
            model: the compressed network as it is.
        """

    @abstractmethod
    def tried(
        self, model: nn.Module, block: Block, width: Width
    ) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
        """Return about half of the channels taken and nothing compensated, to try a block.

        Returns:
            The number of channels that are kept, the tensors by their names in the block, and tensors
            of the block as it is with which it computes the same.
        """

    def noun(self, width: Width | None) -> str:
        """Return what is counted: channels of something, or heads."""
        return "channels"

    def brief(self, new: Replacement) -> str:
        """Return the share of the channels or heads that is gone."""
        width = new.blocks[0].width(self.name)
        if width is None:
            return f"{new.kept} {self.noun(width)}"
        return f"{100 * (1 - new.kept / width.channels):.0f} % fewer {self.noun(width)}"

    def describe(self, new: Replacement) -> str:
        """Return the block, and how many channels or heads are kept."""
        block = new.blocks[0]
        width = block.width(self.name)
        of = f" of {width.channels}" if width else ""
        return f"{block.path} keeps {new.kept}{of} {self.noun(width)}"

    def tensor(self, model: nn.Module, block: Block, name: str) -> Tensor:
        """Return a tensor of a block in a network as it is."""
        return tensor_of(model, f"{block.path}.{name}")

    def head_rows(self, block: Block) -> list[HeadRows]:
        """Return the layers whose outputs a fit needs the moments of, head by head."""
        return []

    def modules(self, block: Block) -> dict[str, Signature]:
        """Return the modules whose inputs and outputs a fit needs the moments of, by path, with the way
        in which they are called.
        """
        return {}

    def gone(self, new: Replacement) -> list[str]:
        """Return the paths of modules that the decision takes out of the block."""
        return []

    def place(self, model: nn.Module, new: Replacement) -> None:
        """Put layers of another kind in their place, whose tensors are set afterwards."""

    def resized(self, sizes: HeadSizes, kept: int) -> HeadSizes:
        """Return the sizes of a block's attention with so many of the unit's channels."""
        return sizes

    def readers(self, block: Block) -> list[Reader]:
        """Return the layers that read the channels and end no branch, in order. Those that end one are
        re-solved like those of any kept block.
        """
        return []

    def solved(
        self, model: nn.Module, block: Block, reader: Reader, gap: PairMoments
    ) -> dict[str, Tensor]:
        """Return the tensors of a reading layer, solved anew.

        Args:
            gap: moments of (the layer's inputs, what its output lacks).

        Returns:
            The tensors by their names in the network.
        """
        return {}

    def saving(self, chain: Chain, new: Replacement, positions: int, *, narrow: bool) -> Cost:
        """Return the cost that is saved.

        Args:
            positions: number of positions in the sublayer of the channels.
            narrow: True where the block computes the read positions alone.
        """
        width = width_of(self, chain.blocks[new.start])
        return width.saving(width.channels - new.kept, positions, narrow=narrow)

    def cost(self, chain: Chain, new: Replacement, positions: int) -> tuple[list[Cost], int]:
        """Return the cost of a block in which nothing else is changed."""
        whole = Cost(macs=chain.macs[new.start], params=chain.params[new.start])
        return [whole - self.saving(chain, new, positions, narrow=False)], positions

    def require(self, new: Replacement) -> None:
        """Check that the decision is of one block and names what it narrows.

        Raises:
            ValueError: it does not.
        """
        super().require(new)
        if new.level is None or not 0 <= new.level < 1:
            raise ValueError(f"{self.name} takes a share of the channels away, not {new.level}")
        if any(not shape or min(shape) < 1 for shape in new.narrowed.values()):
            raise ValueError(f"{self.name} leaves nothing of {new.blocks[0].path}")

    def shapes(self, new: Replacement) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that are narrowed or solved."""
        return new.narrowed

    def unfoldable(self, new: Replacement) -> str | None:
        """Return why the decision gives no stock network; None where the block's own code runs it."""
        if width_of(self, new.blocks[0]).attention is None:
            return None
        return "a block that runs by its graph is not a block of the architecture"


class Inside:
    """Inside of a chain's blocks, to find channels in."""

    def __init__(
        self, model: nn.Module, chain: Chain, batch: Batch, groups: ChannelGroups, traces: Traces
    ) -> None:
        self.model, self.chain, self.batch = model, chain, batch
        self.groups, self.traces = groups, traces
        self.counts: dict[Hashable, Width] = {}
        """Widths of blocks whose channels were counted, one of each kind and size."""

    def attention(self, b: int) -> Attention:
        """Return the attention of a block.

        Raises:
            ModelError: it has none that is understood, or several forms of call.
        """
        traced = self.traces.of(self.model, self.chain.blocks[b])
        if len({each.attention for each in traced}) > 1:
            raise ModelError("its attention differs between calls")
        return traced[0].attention


def width_of(unit: WidthUnit, block: Block) -> Width:
    """Return the channels of a block that a unit may take."""
    found = block.width(unit.name)
    assert found is not None
    return found


def head_sizes(block: Block, inner: Iterable[Replacement]) -> HeadSizes | None:
    """Return the sizes of a block's attention with what narrows the block; None where they stay."""
    found: HeadSizes | None = None
    for new in inner:
        unit, width = UNITS[new.unit], block.width(new.unit)
        if isinstance(unit, WidthUnit) and width is not None and width.attention is not None:
            found = unit.resized(found or HeadSizes.of(width.attention), new.kept)
    return found


def entries(channels: Tensor, each: Slice, count: int) -> Tensor:
    """Return the indices of some of `count` channels along the dimension of a slice."""
    parts, within = torch.arange(each.parts) * count, torch.arange(each.size)
    first = (parts[:, None] + channels.cpu()) * each.size
    return (first[..., None] + within).flatten()


def taken_from(tensor: Tensor, kept: Tensor, each: Slice) -> Tensor:
    """Return a tensor with some channels alone."""
    count = tensor.shape[each.dim] // (each.parts * each.size)
    return tensor.index_select(each.dim, entries(kept, each, count).to(tensor.device))


def narrowed(
    new: Replacement, kept: int, tensors: Mapping[str, Tensor], diagnostics: Diagnostics | None
) -> Replacement:
    """Return a decision with what was fitted for it."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    update = {"narrowed": shapes, "kept": kept, "diagnostics": diagnostics and diagnostics.rounded()}
    return new.model_copy(update=update)
