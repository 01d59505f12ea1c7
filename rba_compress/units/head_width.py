"""head_width: fewer heads of attention, or fewer groups of heads that share keys and values.

The heads to take are those without which the output layer, solved anew, loses least.
"""

from __future__ import annotations

from collections import Counter
from typing import get_args

from torch import Tensor, nn

from rba_compress.core.errors import ModelError
from rba_compress.core.plan import (
    Block,
    ChannelGroup,
    Count,
    CountName,
    Slice,
    Width,
)
from rba_compress.graph.attention_heads import HeadSizes, NoAttentionError
from rba_compress.units.attention_width import counted, original, refused
from rba_compress.units.channel_width import ChannelWidth
from rba_compress.units.width import Inside, width_of

_SHARED = "all of its heads share their keys and values"


class HeadWidth(ChannelWidth):
    """Block whose attention has fewer heads."""

    name = "head_width"
    rounded = False
    of_heads = True
    whole = True
    stock = True
    gguf = True

    def width(self, inside: Inside, b: int) -> tuple[Width | None, list[str]]:
        """Return the heads, or groups of heads, that the output layer reads."""
        try:
            return counted(self, inside, b, self._by_graph(inside, b)), []
        except NoAttentionError:
            return None, []
        except ModelError as error:
            by_graph = error
        try:
            return self._by_code(inside, b), []
        except ModelError as error:
            return refused(error if "calls of" not in str(error) else by_graph)

    def _by_code(self, inside: Inside, b: int) -> Width:
        """Return the heads of a block whose own code may run with fewer.

        Raises:
            ModelError: the attention is not understood.
        """
        chain, block = inside.chain, inside.chain.blocks[b]
        group, macs = inside.groups.heads(block.path)
        if group.channels == 1:
            raise ModelError(_SHARED)
        model, times = inside.model, Counter(each.tensor for each in group.slices)
        for layer in {name.rpartition(".")[0] for name in times if name.endswith("weight")}:
            macs += inside.groups.macs_of(f"{block.path}.{layer}")
        width = Width(
            unit=self.name,
            channels=group.channels,
            groups=(group,),
            macs=((chain.positions, macs // group.channels),),
            params=sum(inside.groups.size(f"{block.path}.{n}") for n in times) // group.channels,
        )
        above = f"{block.path}.{group.reader}".rpartition(".")[0]
        found = vars(model.get_submodule(above))
        counts = tuple(
            Count(
                module=above.removeprefix(block.path).removeprefix("."),
                name=name,
                each=found[name] // group.channels,
            )
            for name in get_args(CountName)
            if type(found.get(name)) is int and found[name] and not found[name] % group.channels
        )
        return width.model_copy(update={"counts": counts})

    def _by_graph(self, inside: Inside, b: int) -> Width:
        """Return the heads of a block that runs by its graph.

        Raises:
            ModelError: the block cannot be traced, or its attention is not understood.
        """
        attention = inside.attention(b)
        if attention.query is None or attention.key is None:
            raise ModelError("its queries and keys are not heads of a linear layer alone")
        value, times = attention.value, attention.repeated
        if value.heads == 1:
            raise ModelError(_SHARED)
        slices = []
        for rows, count in ((attention.query, times), (attention.key, 1), (value, 1)):
            size = rows.width * count
            slices.append(Slice(tensor=f"{rows.layer}.weight", dim=0, size=size))
            if rows.bias:
                slices.append(Slice(tensor=f"{rows.layer}.bias", dim=0, size=size))
        output = f"{attention.output}.weight"
        slices.append(Slice(tensor=output, dim=1, size=value.width * times))
        group = ChannelGroup(
            reader=attention.output,
            channels=value.heads,
            slices=tuple(slices),
            shift=f"{attention.output}.bias" if attention.bias else "",
        )
        return Width(
            unit=self.name, channels=value.heads, groups=(group,), attention=attention, macs=()
        )

    def tensor(self, model: nn.Module, block: Block, name: str) -> Tensor:
        """Return a tensor of a block, also of a layer that is a part of another one so far."""
        attention = width_of(self, block).attention
        if attention is None:
            return super().tensor(model, block, name)
        return original(model, block, attention, name)

    def resized(self, sizes: HeadSizes, kept: int) -> HeadSizes:
        """Return sizes with fewer heads."""
        times = sizes.heads // sizes.groups
        return HeadSizes(kept * times, kept, sizes.rank, sizes.width)

    def noun(self, width: Width | None) -> str:
        """Return "heads", or "groups of heads" that share keys and values."""
        sizes = {each.size for group in (width.groups if width else ()) for each in group.slices}
        return "groups of heads" if len(sizes) > 1 else "heads"
