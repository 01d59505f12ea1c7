"""vo_rank: values of fewer channels a head, and the output layer solved to do with them.

The directions are those of the values that the output layer reads most (see `linalg.narrowing.basis`).
Heads that share their values share the directions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rba_compress.core.errors import ModelError
from rba_compress.core.plan import Attention, Block, Chain, Replacement, Width
from rba_compress.graph.attention_heads import HeadSizes
from rba_compress.graph.rewrite import tensor_of
from rba_compress.linalg.maps import correction
from rba_compress.linalg.moments import PairMoments
from rba_compress.linalg.narrowing import FREE, basis, projected
from rba_compress.units.attention_width import (
    counted,
    first_channels,
    output_tensors,
    refused,
    turned_layer,
)
from rba_compress.units.channel_width import SOLVED
from rba_compress.units.width import (
    Inside,
    Levels,
    Reader,
    Seen,
    WidthUnit,
    narrowed,
    width_of,
)


class VoRank(WidthUnit):
    """Block whose values have fewer channels a head."""

    name = "vo_rank"
    of_heads = True

    def width(self, inside: Inside, b: int) -> tuple[Width | None, list[str]]:
        """Return the channels of a head's values."""
        try:
            attention = inside.attention(b)
            channels = attention.value.width
            width = Width(unit=self.name, channels=channels, attention=attention, macs=())
            return counted(self, inside, b, width), []
        except ModelError as error:
            return refused(error)

    def observed(self, block: Block) -> list[str]:
        """Return the layer that reads all heads."""
        return [f"{block.path}.{_attention(width_of(self, block)).output}"]

    def fits(
        self, model: nn.Module, chain: Chain, b: int, seen: Seen, levels: Levels
    ) -> list[tuple[Replacement, dict[str, Tensor]]]:
        """Fit every level; all of them share the directions."""
        block = chain.blocks[b]
        width = width_of(self, block)
        attention = _attention(width)
        value, times = attention.value, attention.repeated
        path = f"{block.path}.{attention.output}"
        features = seen.inputs[path].with_spectrum()
        gram = features.xx if attention.bias else features.raw_xx
        weight = tensor_of(model, f"{path}.weight").to(gram)
        heads, now = value.heads * times, len(gram) // (value.heads * times)
        each = gram.unflatten(0, (heads, now)).unflatten(-1, (heads, now))
        inner = each.diagonal(dim1=0, dim2=2).permute(2, 0, 1).unflatten(0, (-1, times)).sum(1)
        read = weight.unflatten(1, (value.heads, times, now)).permute(1, 0, 2, 3).flatten(1, 2)
        bases = [basis(g, w.T @ w) for g, w in zip(inner, read, strict=True)]
        lost = sum((b.lost for b in bases), start=torch.zeros(()))
        free = int((lost <= FREE * lost[0]).sum()) - 1
        found = []
        for kept, level in levels.kept(width.channels, now, free).items():
            into = torch.stack([b.into[:kept] for b in bases])
            back = torch.stack([b.back[:, :kept] for b in bases])
            all_in, all_back = (
                torch.block_diag(*part.repeat_interleave(times, 0)) for part in (into, back)
            )
            fit = projected(weight, features, all_in, all_back, bias=attention.bias)
            tensors = output_tensors(model, block, attention, fit)
            tensors |= turned_layer(model, block, value, into)
            own = tensor_of(model, f"{path}.weight").dtype
            tensors = {name: tensor.to(own) for name, tensor in tensors.items()}
            new = self.choice(chain, b, b + 1, level)
            found.append((narrowed(new, kept, tensors, fit.diagnostics), tensors))
        return found

    def tried(
        self, model: nn.Module, block: Block, width: Width
    ) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
        """Return the first half of each head's channels, and the output's others set to zero."""
        kept, attention = max(width.channels // 2, 1), _attention(width)
        value = attention.value
        new = first_channels(model, block, value, kept)
        output = tensor_of(model, f"{block.path}.{attention.output}.weight")
        split = output.unflatten(1, (-1, value.width))
        new[f"{attention.output}.weight"] = split[..., :kept].flatten(1)
        zeroed = split.clone()
        zeroed[..., kept:] = 0
        return kept, new, {f"{attention.output}.weight": zeroed.flatten(1)}

    def readers(self, block: Block) -> list[Reader]:
        """Return the layer that reads all heads, unless it ends a branch."""
        path = f"{block.path}.{_attention(width_of(self, block)).output}"
        return [] if any(branch.path == path for branch in block.branches) else [Reader(path)]

    def solved(
        self, model: nn.Module, block: Block, reader: Reader, gap: PairMoments
    ) -> dict[str, Tensor]:
        """Return the output layer's tensors, moved by the whole correction."""
        attention = _attention(width_of(self, block))
        change, shift = correction(gap, SOLVED, bias=attention.bias)
        found = {f"{reader.path}.weight": tensor_of(model, f"{reader.path}.weight").to(change) + change}
        if attention.bias:
            found[f"{reader.path}.bias"] = tensor_of(model, f"{reader.path}.bias").to(shift) + shift
        return found

    def resized(self, sizes: HeadSizes, kept: int) -> HeadSizes:
        """Return sizes with values of other widths."""
        return HeadSizes(sizes.heads, sizes.groups, sizes.rank, kept)

    def noun(self, width: Width | None) -> str:
        """Return "channels of values"."""
        return "channels of values"


def _attention(width: Width) -> Attention:
    assert width.attention is not None
    return width.attention
