"""head_width: fewer heads of attention, or fewer groups of heads that share keys and values.

The heads to take are those without which the output layer, solved anew, loses least.
"""

from __future__ import annotations

from torch import Tensor, nn

from rba_compress.core.errors import ModelError
from rba_compress.core.plan import Block, ChannelGroup, Replacement, Site, Slice, Width
from rba_compress.graph.attention_heads import HeadSizes
from rba_compress.units.attention_width import counted, excluded, original, refused
from rba_compress.units.channel_width import ChannelWidth
from rba_compress.units.width import Inside, width_of


class HeadWidth(ChannelWidth):
    """Block whose attention has fewer heads."""

    name = "head_width"
    rounded = False

    def width(self, inside: Inside, b: int) -> tuple[Width | None, list[str]]:
        """Return the heads, or groups of heads, that the output layer reads."""
        try:
            attention = inside.attention(b)
            if attention.query is None or attention.key is None:
                raise ModelError("its queries and keys are not heads of a linear layer alone")
            value, times = attention.value, attention.repeated
            if value.heads == 1:
                raise ModelError("all of its heads share their keys and values")
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
            width = Width(
                unit=self.name, channels=value.heads, groups=(group,), attention=attention, macs=()
            )
            return counted(self, inside, b, width), []
        except ModelError as error:
            return refused(error)

    def excludes(self, site: Site, other: Replacement) -> bool:
        """Return whether the other replacement changes the channels of the heads."""
        return excluded(self, other) or super().excludes(site, other)

    def tensor(self, model: nn.Module, block: Block, name: str) -> Tensor:
        """Return a tensor of a block, also of a layer that is a part of another one so far."""
        attention = width_of(self, block).attention
        assert attention is not None
        return original(model, block, attention, name)

    def resized(self, sizes: HeadSizes, kept: int) -> HeadSizes:
        """Return sizes with fewer heads."""
        times = sizes.heads // sizes.groups
        return HeadSizes(kept * times, kept, sizes.rank, sizes.width)

    def describe(self, new: Replacement) -> str:
        """Return the block and the number of heads that are kept."""
        width = new.blocks[0].width(self.name)
        of = f" of {width.channels}" if width else ""
        grouped = width is not None and width.attention is not None and width.attention.repeated > 1
        return f"{new.blocks[0].path} keeps {new.kept}{of} {'groups of heads' if grouped else 'heads'}"
