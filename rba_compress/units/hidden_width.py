"""hidden_width: fewer channels between two layers of a block, such as the neurons of an MLP."""

from __future__ import annotations

from collections import Counter

from rba_compress.core.plan import Chain, ChannelGroup, Width
from rba_compress.graph.channel_groups import ChannelGroups
from rba_compress.units.channel_width import ChannelWidth
from rba_compress.units.width import Inside


class HiddenWidth(ChannelWidth):
    """Block with fewer channels between its layers."""

    name = "hidden_width"
    second = True
    stock = True
    gguf = True

    def width(self, inside: Inside, b: int) -> tuple[Width | None, list[str]]:
        """Return the channels between layers: of several numbers, the one that costs most."""
        groups, chain = inside.groups, inside.chain
        found, reasons = groups.of(chain.blocks[b].path)
        if not found:
            return None, reasons
        spent: Counter[int] = Counter()
        for group in found:
            spent[group.channels] += groups.macs(chain.blocks[b].path, group)
        channels = max(spent, key=lambda count: (spent[count], count))
        alike = tuple(group for group in found if group.channels == channels)
        return self._counted(groups, chain, b, alike), reasons

    def _counted(
        self, groups: ChannelGroups, chain: Chain, b: int, alike: tuple[ChannelGroup, ...]
    ) -> Width:
        """Count what a channel costs: a layer between two groups costs the product of both."""
        block, c = chain.blocks[b], alike[0].channels
        slices = [each for group in alike for each in group.slices]
        times = Counter(each.tensor for each in slices)
        layers = {name.rpartition(".")[0]: n for name, n in times.items() if name.endswith("weight")}
        macs = {layer: groups.macs_of(f"{block.path}.{layer}") for layer in layers}
        once = sum(count * layers[layer] for layer, count in macs.items()) // c
        twice = sum(count for layer, count in macs.items() if layers[layer] > 1) // c**2
        sizes = {name: groups.size(f"{block.path}.{name}") for name in times}
        places = [chain.positions, *(at for at, _ in block.by_positions if at != chain.positions)]
        return Width(
            unit=self.name,
            channels=c,
            groups=alike,
            macs=tuple((at, once * at // chain.positions) for at in places),
            macs_squared=twice,
            narrow=((chain.positions, once * chain.reads * chain.rows // chain.positions),),
            params=sum(times[name] * size for name, size in sizes.items()) // c,
            params_squared=sum(size for name, size in sizes.items() if times[name] > 1) // c**2,
        )

    def noun(self, width: Width | None) -> str:
        """Return "hidden channels"."""
        return "hidden channels"
