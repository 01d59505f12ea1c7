"""The contract of a unit: a change that the search may make to the blocks of a network.

A unit is one file of this folder and one line of `registry`. The contract covers where a unit may be
applied, with which settings (levels), which statistics a fit needs, how the unit is fitted, which cost
remains, and how a network is rewritten. The search, the plan and the artefact know this contract and no
unit by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from rba_compress.core.batch import Batch
from rba_compress.core.config import Config
from rba_compress.core.cost import UNREACHABLE, Cost
from rba_compress.core.errors import ModelError
from rba_compress.core.map_spec import MapSpec
from rba_compress.core.plan import ByPositions, Chain, Offer, Replacement, Site, macs_at
from rba_compress.core.registry import UNITS
from rba_compress.graph.rewrite import copy_model
from rba_compress.graph.tracer import record
from rba_compress.linalg.maps import build_map, fit_map, map_macs, map_parameters, map_shapes
from rba_compress.linalg.moments import PairMoments
from rba_compress.units.block_variants import (
    BlockGraph,
    Cut,
    Form,
    Thinned,
    Traces,
    example_inputs,
    thin,
)

IDENTITY = MapSpec(kind="identity")
Level = MapSpec | float
"""A setting of a unit: a map, or a number where it has none."""
Schedule = Callable[[float], dict[int, float]]
"""Levels by block, for a strength from 0 to 1: the stronger, the less the network costs."""


class Trial:
    """Block of a model, and a batch on which units are tried before they are offered there."""

    def __init__(
        self, model: nn.Module, chain: Chain, b: int, batch: Batch, traces: Traces, *, divisible: bool
    ) -> None:
        self.model, self.chain, self.block = model, chain, chain.blocks[b]
        self.batch, self.traces = batch, traces
        self.divisible = divisible
        """True where the block consists of two sublayers, and its graph computes the same output."""

    def offers(self, unit: Unit, *, narrow: bool, exact: bool = False) -> Iterator[Offer]:
        """Yield the remaining cost of the block, without the map; nothing where the unit cannot cut it.

        Args:
            narrow: only the positions that the output reads are computed.
            exact: the unit itself leaves the other positions out; otherwise the blocks before did.
        """
        reads = self.chain.reads
        form = Form(reads=reads, exact=exact)
        try:
            thinned = self.cut(unit, form)
        except ModelError:
            return
        tensors = example_inputs(thinned, self.block.signature)
        if narrow and not exact:
            stream = self.block.signature.stream_index
            tensors[stream] = tensors[stream][:, :reads]
        macs = self._macs(thinned, tensors)
        params = sum(p.numel() for p in thinned.parameters())
        merged = self.block.by_positions and (exact or not narrow)
        counts = self.counted(unit, form) if merged else ()
        yield Offer(unit=unit.name, narrow=narrow, macs=macs, params=params, by_positions=counts)

    def _macs(self, block: nn.Module, tensors: list[Tensor]) -> int:
        args, kwargs = self.block.signature.call(tensors)
        recording = record(block, Batch(args, kwargs, None))
        # The stream of the signature may have several rows for each sample.
        return round(recording.macs * recording.samples / len(self.batch))

    def places(self, unit: Cut, form: Form) -> ByPositions:
        """Count the MACs of a cut block where its chain may leave it some numbers of positions.

        Raises:
            ModelError: the block cannot be cut.
        """
        if self.block.by_positions:
            return self.counted(unit, form)
        thinned = self.cut(unit, form)
        macs = self._macs(thinned, example_inputs(thinned, self.block.signature))
        return ((self.chain.positions, macs),)

    def cut(self, unit: Cut, form: Form) -> Thinned:
        """Return the cut block.

        Raises:
            ModelError: the block cannot be cut.
        """
        copy = copy_model(self.model, share=True)
        return thin(copy, self.block, nn.Identity(), self.traces, unit=unit, form=form)

    def counted(self, unit: Cut, form: Form) -> ByPositions:
        """Count the MACs of a cut block at three numbers of positions, with sizes in the stream.

        Raises:
            ModelError: the block cannot be cut, or takes no other number of positions.
        """
        thinned = self.cut(unit, replace(form, sized=True, hands_sizes=not form.exact))
        tensors = example_inputs(thinned, self.block.signature)
        k, counts = self.block.signature.stream_index, []
        n, whole, width = tensors[k].shape
        for positions in (whole, whole - whole // 4, whole - whole // 2):
            tensors[k] = torch.ones(n, positions, width + 1).to(tensors[k])
            counts.append((positions, self._macs(thinned, tensors)))
        return tuple(counts)


class Unit(ABC):
    """A unit that keeps a part of one block and puts a fitted map in place of the rest."""

    name: ClassVar[str]
    searched: ClassVar[bool] = True
    """True where the search may choose the unit."""
    removes: ClassVar[bool] = False
    """True where nothing is left of the blocks."""
    mixes: ClassVar[bool] = True
    """True where the rest of the block lets a position read others."""
    inner: ClassVar[bool] = False
    """True where a block keeps its form, and its layers get fewer channels: see `units.width`."""
    of_heads: ClassVar[bool] = False
    """True where heads of attention are narrowed, or taken out."""
    replaces: ClassVar[bool] = False
    """True where a block keeps its form, and a layer is put in place of what other units narrow."""
    fitted: ClassVar[bool] = True
    """True where the unit holds a map, which is fitted to the original streams."""
    stock: ClassVar[bool] = False
    """True where stock networks may come out of it, with fewer blocks or of other widths."""
    gguf: ClassVar[bool] = False
    """True where llama.cpp has an architecture that says it."""
    scheduled: ClassVar[bool] = False
    """True where `schedules` set the levels of all blocks at once, so that the search's table needs one
    level of each site alone.
    """
    unread: ClassVar[bool] = False
    """True where the map acts on the positions that the output does not read, and on no others."""
    of_stream: ClassVar[bool] = True
    """True where the residual of a fit is a squared error of the stream."""

    # --- where

    @abstractmethod
    def offers(self, trial: Trial) -> Iterable[Offer]:
        """Return the unit's offers for a block, each verified on the trial; empty without any."""

    def sites(self, chain: Chain, window: int | None) -> list[tuple[int, int]]:
        """Return every (start, stop) of a chain where the unit may be applied."""
        return [(b, b + 1) for b, block in enumerate(chain.blocks) if block.offer(self.name)]

    def excludes(self, site: Site, other: Replacement) -> bool:
        """Return whether the unit cannot replace `other`, which is at the same blocks already."""
        # The stream between the sublayers of a cut block cannot be read any more.
        between = self.source(site.start) % 1 > 0 and not other.inner
        return between or UNITS[other.unit].removes

    # --- with which settings

    def levels(self, config: Config, chain: Chain) -> Sequence[Level]:
        """Return the unit's settings, the one that saves most first: for maps the identity."""
        return [spec for spec in config.specs(chain.width) if spec.kind != "folded"]

    def schedules(self, chain: Chain, blocks: Sequence[int]) -> dict[tuple[int, int], Schedule]:
        """Return schedules by their shape, two whole numbers; shapes next to each other are alike.

        Args:
            blocks: those of the chain that may get a level.
        """
        return {}

    def choice(self, chain: Chain, start: int, stop: int, level: Level = IDENTITY) -> Replacement:
        """Return the decision for a site and a level, not fitted yet."""
        mapped = isinstance(level, MapSpec)
        return Replacement(
            chain=chain.name,
            start=start,
            stop=stop,
            blocks=chain.blocks[start:stop],
            map=level if mapped else IDENTITY,
            level=None if mapped else level,
            width=chain.width,
            ndim=chain.ndim,
            axis=chain.axis,
            unit=self.name,
            reads=chain.reads if self.unread else 0,
        )

    def folds(self, level: Level) -> bool:
        """Return whether the layer before the site is re-solved instead of a map."""
        return False

    # --- from which statistics

    def source(self, start: int) -> float:
        """Return the boundary that the map reads; halves lie between the sublayers of a block."""
        return start

    def target(self, stop: int) -> float:
        """Return the boundary that the map is fitted to."""
        return stop

    def fit(self, new: Replacement, moments: PairMoments) -> tuple[Replacement, dict[str, Tensor]]:
        """Fit in closed form.

        Args:
            new: what `choice` returned.
            moments: of rows of the compressed network's stream at `source` and of the original's at
                `target`; where `unread` is set, of the positions that are not read.

        Returns:
            The decision with its diagnostics, and the tensors by their names in `build`'s module.
        """
        fit = fit_map(new.map, moments)
        return new.model_copy(update={"diagnostics": fit.diagnostics.rounded()}), fit.tensors

    # --- at which cost

    def cost(self, chain: Chain, new: Replacement, positions: int) -> tuple[list[Cost], int]:
        """Return the remaining cost of each block, and the number of positions left behind them.

        Args:
            positions: number of positions before the blocks, in one sample.
        """
        read = chain.reads * max(chain.rows, 1)
        merged = chain.merged(positions)
        narrow = new.exact or (positions < chain.positions and not merged)
        left = chain.blocks[new.start].offer(self.name, narrow=narrow) or Offer(
            unit=self.name, narrow=narrow
        )
        if merged and not left.by_positions:
            return [UNREACHABLE], positions
        macs = macs_at(left.by_positions, positions) if merged else left.macs
        positions = read if new.exact else positions
        return [Cost(macs=macs, params=left.params) + self.map_cost(new, positions)], positions

    def map_cost(self, new: Replacement, positions: int) -> Cost:
        """Return the cost of the map."""
        macs = positions * map_macs(new.map, new.width)
        return Cost(macs=macs, params=map_parameters(new.map, new.width))

    def exact(self, chain: Chain, old: Replacement) -> Replacement | None:
        """Return a decision with the same fitted tensors that leaves out the positions that nothing
        reads; None where the unit has none of its own.
        """
        return None

    def unfoldable(self, new: Replacement) -> str | None:
        """Return why the decision gives no stock network with fewer blocks; None where it gives one."""
        return "a thinned block is not a block of the architecture"

    # --- how the network is rewritten

    def require(self, new: Replacement) -> None:
        """Check that the decision is of one block.

        Raises:
            ValueError: the decision is of several blocks.
        """
        if len(new.blocks) != 1:
            raise ValueError(f"{self.name} is of one block, not of {len(new.blocks)}")

    def shapes(self, new: Replacement) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor of `build`'s state dict."""
        return map_shapes(new.map, new.width, ndim=new.ndim, axis=new.axis)

    def build(self, new: Replacement) -> nn.Module:
        """Build the module that holds the fitted tensors, `<first block>.map` in the network."""
        return build_map(new.map, new.width, ndim=new.ndim, axis=new.axis)

    def rewrite(
        self, model: nn.Module, new: Replacement, module: nn.Module, traces: Traces, form: Form
    ) -> nn.Module:
        """Return the module that replaces the blocks; the model is left as it is.

        Args:
            module: the module of `build`, with its tensors.
            form: the form in which a cut block is run.

        Raises:
            ModelError: the unit cannot cut the block.
        """
        return thin(model, new.blocks[0], module, traces, unit=self, form=form)

    def cut(self, block: BlockGraph, form: Form) -> fx.Node:
        """Edit a traced block, whose node `block.mapped` is the map, and return its output.

        Args:
            form: the form in which the block is run.
        """
        raise ModelError(f"{self.name} leaves nothing of a block")

    @abstractmethod
    def describe(self, new: Replacement) -> str:
        """Return the decision as one line of text."""

    def brief(self, new: Replacement) -> str:
        """Return what is gone from a block, in a few words."""
        return self.describe(new)


def keeps_layers(new: Replacement) -> bool:
    """Return whether a replacement keeps all layers of its block, so that they may be narrowed."""
    return new.exact or not UNITS[new.unit].fitted


def beside(new: Replacement, other: Replacement) -> bool:
    """Return whether two replacements may be at the same block: one narrows its layers, and the other
    keeps them or narrows others.
    """
    if new.inner and other.inner:
        units = UNITS[new.unit], UNITS[other.unit]
        taken = all(u.of_heads for u in units) and any(u.replaces for u in units)
        return new.unit != other.unit and not taken
    return (new.inner and keeps_layers(other)) or (other.inner and keeps_layers(new))


def built(unit: Unit, new: Replacement) -> nn.Module:
    """Build a unit's module on the meta device, so that no random numbers are drawn."""
    with torch.device("meta"):
        return unit.build(new)
