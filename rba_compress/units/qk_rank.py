"""qk_rank: queries and keys of fewer channels, so that their products change least.

A constant that is added to all keys of a sample cancels in the softmax, so that the keys are centred.
Heads that share their keys share the directions (see `linalg.narrowing.basis`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rba_compress.core.errors import ModelError
from rba_compress.core.map_spec import Diagnostics
from rba_compress.core.plan import Attention, Block, Chain, HeadRows, Replacement, Width
from rba_compress.graph.attention_heads import HeadSizes
from rba_compress.graph.rewrite import tensor_of
from rba_compress.linalg.maps import condition, effective_rank
from rba_compress.linalg.narrowing import FREE, basis
from rba_compress.units.attention_width import counted, first_channels, refused, turned_layer
from rba_compress.units.width import (
    HeadMoments,
    Inside,
    Levels,
    Seen,
    WidthUnit,
    narrowed,
    width_of,
)


class QkRank(WidthUnit):
    """Block whose queries and keys have fewer channels a head."""

    name = "qk_rank"
    of_stream = False
    of_heads = True

    def width(self, inside: Inside, b: int) -> tuple[Width | None, list[str]]:
        """Return the channels of a head's queries and keys."""
        try:
            attention = inside.attention(b)
            if attention.query is None or attention.key is None:
                raise ModelError(
                    "rotary embeddings, norms or other operations lie between the layers of its "
                    "queries or keys and their product"
                )
            width = Width(unit=self.name, channels=attention.rank, attention=attention, macs=())
            return counted(self, inside, b, width), []
        except ModelError as error:
            return refused(error)

    def head_rows(self, block: Block) -> list[HeadRows]:
        """Return the layers of queries and keys."""
        return list(_parts(width_of(self, block)))

    def fits(
        self, model: nn.Module, chain: Chain, b: int, seen: Seen, levels: Levels
    ) -> list[tuple[Replacement, dict[str, Tensor]]]:
        """Fit every level; all of them share the directions."""
        block = chain.blocks[b]
        width = width_of(self, block)
        query, key = _parts(width)
        queries = seen.heads[f"{block.path}.{query.layer}"].whole
        keys = seen.heads[f"{block.path}.{key.layer}"]
        now, times = keys.within.shape[-1], query.heads // key.heads
        bases = [
            basis(inner, outer)
            for inner, outer in zip(keys.within, queries.unflatten(0, (-1, times)).sum(1), strict=True)
        ]
        lost = sum((each.lost for each in bases), start=torch.zeros(()))
        free = int((lost <= FREE * lost[0]).sum()) - 1
        found = []
        for kept, level in levels.kept(width.channels, now, free).items():
            into = torch.stack([each.into[:kept] for each in bases])
            back = torch.stack([each.back[:, :kept].T for each in bases])
            # The product is the same for any scale of the two factors.
            scale = (back.norm(dim=-1) / into.norm(dim=-1).clamp_min(1e-30)).sqrt()[..., None]
            turned = {query: (back / scale).repeat_interleave(times, 0), key: into * scale}
            tensors: dict[str, Tensor] = {}
            for rows, each in turned.items():
                tensors |= turned_layer(model, block, rows, each)
            new = self.choice(chain, b, b + 1, level)
            found.append((narrowed(new, kept, tensors, _diagnostics(keys, lost, kept)), tensors))
        return found

    def tried(
        self, model: nn.Module, block: Block, width: Width
    ) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
        """Return the first half of each head's channels, and the queries' others set to zero."""
        kept, masked = max(width.channels // 2, 1), {}
        query, key = _parts(width)
        new = first_channels(model, block, query, kept) | first_channels(model, block, key, kept)
        gone = torch.arange(query.heads * query.width).view(query.heads, query.width)[:, kept:]
        for source in filter(None, (query.source, query.bias)):
            tensor = tensor_of(model, f"{block.path}.{source}")
            masked[source] = tensor.index_fill(0, (query.first + gone.flatten()).to(tensor.device), 0)
        return kept, new, masked

    def resized(self, sizes: HeadSizes, kept: int) -> HeadSizes:
        """Return sizes with another rank."""
        return HeadSizes(sizes.heads, sizes.groups, kept, sizes.width)

    def noun(self, width: Width | None) -> str:
        """Return "channels of queries and keys"."""
        return "channels of queries and keys"


def _diagnostics(keys: HeadMoments, lost: Tensor, kept: int) -> Diagnostics:
    """Return the diagnostics of a rank: the residual is that of products of queries and keys, summed
    over heads, the spectrum that of the keys of all heads.
    """
    values = torch.linalg.eigvalsh(keys.within).clamp_min(0).flatten()
    return Diagnostics(
        residual=float(lost[kept] / keys.rows**2),
        r2=1 - float(lost[kept] / lost[0]) if lost[0] > 0 else 1.0,
        effective_rank=effective_rank(values),
        condition=condition(values),
        damping=0.0,
        rows=float(keys.rows),
    )


def _parts(width: Width) -> tuple[HeadRows, HeadRows]:
    attention = width.attention
    assert isinstance(attention, Attention)
    assert attention.query is not None
    assert attention.key is not None
    return attention.query, attention.key
