"""Base of the units that take whole channels: which ones, and the reading layer solved to do without.

The channels to take are those without which the reading layer, solved anew, loses least (see
`linalg.narrowing`). Channels that are constant, or that others tell exactly, are lost for nothing: the
lowest level takes these alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from rba_compress.core.map_spec import Diagnostics
from rba_compress.core.plan import Block, Chain, ChannelGroup, Replacement, Width
from rba_compress.graph.rewrite import tensor_of
from rba_compress.linalg.maps import correction
from rba_compress.linalg.moments import PairMoments
from rba_compress.linalg.narrowing import compensated, removal
from rba_compress.units.width import (
    Levels,
    Reader,
    Seen,
    WidthUnit,
    entries,
    narrowed,
    taken_from,
    width_of,
)

SOLVED = 1e-3
"""Ridge of a reading layer that is solved anew, relative to the Gram matrix's mean diagonal."""


class ChannelWidth(WidthUnit):
    """Unit that takes channels of which a layer reads each on its own."""

    rounded: ClassVar[bool] = True
    """True where the numbers of channels are rounded to a multiple."""

    def observed(self, block: Block) -> list[str]:
        """Return the layers that read the channels."""
        width = width_of(self, block)
        return [f"{block.path}.{group.reader}" for group in width.groups]

    def fits(
        self, model: nn.Module, chain: Chain, b: int, seen: Seen, levels: Levels
    ) -> list[tuple[Replacement, dict[str, Tensor]]]:
        """Fit every level; all of them share one order of the channels."""
        block = chain.blocks[b]
        width = width_of(self, block)
        readers = [
            _Reader(partial(self.tensor, model, block), block, group, seen) for group in width.groups
        ]
        levels = levels if self.rounded else replace(levels, multiple=1)
        now = min(reader.channels for reader in readers)
        least = min(levels.kept(width.channels, now, 0), default=1)
        for reader in readers:
            reader.rank(most=now - least)
        free = min(reader.order.free for reader in readers)
        found = []
        for kept, level in levels.kept(width.channels, now, free).items():
            tensors: dict[str, Tensor] = {}
            for reader in readers:
                diagnostics = reader.narrow(kept, tensors)
            # Held in the network's precision, for there are many levels.
            tensors = {
                name: tensor.to(self.tensor(model, block, name).dtype)
                for name, tensor in tensors.items()
            }
            new = self.choice(chain, b, b + 1, level)
            found.append((narrowed(new, kept, tensors, diagnostics), tensors))
        return found

    def readers(self, block: Block) -> list[Reader]:
        """Return the layers that read the channels and end no branch.

        A layer whose own outputs are narrowed too, as the second of a bottleneck, has none to compare.
        """
        width = width_of(self, block)
        found, ends = [], {branch.path for branch in block.branches}
        narrowed = {cut.tensor for group in width.groups for cut in group.slices[:-1]}
        for group in width.groups:
            path = f"{block.path}.{group.reader}"
            norm = f"{block.path}.{group.norm}" if group.norm else None
            skip = f"{block.path}.{group.skip}" if group.skip else None
            if path not in ends and f"{group.reader}.weight" not in narrowed:
                found.append(Reader(path, norm, group.skip is not None, skip))
        return found

    def solved(
        self, model: nn.Module, block: Block, reader: Reader, gap: PairMoments
    ) -> dict[str, Tensor]:
        """Return the reader's weight and constant, moved by the whole correction."""
        width = width_of(self, block)
        group = next(g for g in width.groups if f"{block.path}.{g.reader}" == reader.path)
        change, shift = correction(gap, SOLVED, bias=bool(group.shift))
        name = f"{reader.path}.weight"
        weight = tensor_of(model, name).to(change)
        change = change.T if group.slices[-1].dim == 0 else change
        found = {name: weight + change.reshape(weight.shape)}
        if group.shift:
            constant = tensor_of(model, f"{block.path}.{group.shift}").to(shift)
            found[f"{block.path}.{group.shift}"] = constant + _sign(group) * shift
        return found

    def tried(
        self, model: nn.Module, block: Block, width: Width
    ) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
        """Return every other channel taken, and the reading layers' weights of these set to zero."""
        stays, gone = torch.arange(0, width.channels, 2), torch.arange(1, width.channels, 2)
        new: dict[str, Tensor] = {}
        masked: dict[str, Tensor] = {}
        for group in width.groups:
            for each in group.slices:
                before = new.get(each.tensor, self.tensor(model, block, each.tensor))
                new[each.tensor] = taken_from(before, stays, each)
            own = group.slices[-1]
            weight = masked.get(own.tensor, self.tensor(model, block, own.tensor))
            masked[own.tensor] = weight.index_fill(own.dim, entries(gone, own, width.channels), 0)
        return len(stays), new, masked


class _Reader:
    """Layer that reads a group of channels, with the moments of these."""

    def __init__(
        self, tensor: Callable[[str], Tensor], block: Block, group: ChannelGroup, seen: Seen
    ) -> None:
        self._tensor, self._group = tensor, group
        *self._others, self._own = group.slices
        weight = self._tensor(self._own.tensor)
        self._kernel, self._turned = weight.shape[2:], self._own.dim == 0
        self.channels = weight.shape[self._own.dim] // self._own.size
        self._weight = weight.T if self._turned else weight.flatten(1)
        self._features = seen.inputs[f"{block.path}.{group.reader}"].with_spectrum()

    def rank(self, most: int) -> None:
        """Find the order in which channels are taken."""
        bias = bool(self._group.shift)
        self.order = removal(self._weight, self._features, self.channels, most, bias=bias)

    def narrow(self, kept: int, tensors: dict[str, Tensor]) -> Diagnostics:
        """Add the tensors of the block with some channels alone, those of earlier groups narrowed
        further.
        """
        stays = self.order.kept(self.channels - kept, self.channels)
        bias = self._group.shift
        fit = compensated(self._weight, self._features, stays, self.channels, bias=bool(bias))
        solved = fit.weight.T if self._turned else fit.weight
        tensors[self._own.tensor] = solved.reshape(*solved.shape[:1], -1, *self._kernel)
        if bias:
            constant = tensors.get(bias)
            constant = self._tensor(bias) if constant is None else constant
            tensors[bias] = constant.to(fit.shift) + _sign(self._group) * fit.shift
        for each in self._others:
            before = tensors.get(each.tensor)
            before = self._tensor(each.tensor) if before is None else before
            tensors[each.tensor] = taken_from(before, stays, each)
        return fit.diagnostics


def _sign(group: ChannelGroup) -> int:
    """Return -1 where a BatchNorm subtracts its running mean from what the reader computes."""
    return 1 if group.shift == f"{group.reader}.bias" else -1
