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
from rba_compress.linalg.moments import PairMoments
from rba_compress.linalg.narrowing import FREE, basis
from rba_compress.units.attention_width import counted, refused, rows_of, turned_rows
from rba_compress.units.width import (
    Inside,
    Levels,
    Reader,
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

    def observed(self, block: Block) -> list[str]:
        """Return no layers: no inputs are needed."""
        return []

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
        keys = seen.heads[f"{block.path}.{key.layer}"].within
        now, times = keys.shape[-1], query.heads // key.heads
        bases = [
            basis(inner, outer)
            for inner, outer in zip(keys, queries.unflatten(0, (-1, times)).sum(1), strict=True)
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
                weight, bias = rows_of(model, block, rows)
                tensors[f"{rows.layer}.weight"] = turned_rows(each, weight)
                if bias is not None:
                    tensors[f"{rows.layer}.bias"] = turned_rows(each, bias)
            share = float(lost[kept] / lost[0]) if lost[0] > 0 else 0.0
            diagnostics = Diagnostics(
                residual=float(lost[kept]),
                r2=1 - share,
                effective_rank=float(now),
                condition=1.0,
                damping=0.0,
                rows=1.0,
            )
            new = self.choice(chain, b, b + 1, level)
            found.append((narrowed(new, kept, tensors, diagnostics), tensors))
        return found

    def tried(
        self, model: nn.Module, block: Block, width: Width
    ) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
        """Return the first half of each head's channels, and the queries' others set to zero."""
        kept, new, masked = max(width.channels // 2, 1), {}, {}
        query, key = _parts(width)
        for rows in (query, key):
            for name, tensor in zip(("weight", "bias"), rows_of(model, block, rows), strict=True):
                if tensor is not None:
                    heads = tensor.unflatten(0, (rows.heads, rows.width))
                    new[f"{rows.layer}.{name}"] = heads[:, :kept].flatten(0, 1)
        gone = torch.arange(query.heads * query.width).view(query.heads, query.width)[:, kept:]
        for source in filter(None, (query.source, query.bias)):
            tensor = tensor_of(model, f"{block.path}.{source}")
            masked[source] = tensor.index_fill(0, (query.first + gone.flatten()).to(tensor.device), 0)
        return kept, new, masked

    def readers(self, block: Block) -> list[Reader]:
        """Return no layers: nothing reads the channels but their product."""
        return []

    def solved(
        self, model: nn.Module, block: Block, reader: Reader, gap: PairMoments
    ) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def resized(self, sizes: HeadSizes, kept: int) -> HeadSizes:
        """Return sizes with another rank."""
        return HeadSizes(sizes.heads, sizes.groups, kept, sizes.width)

    def describe(self, new: Replacement) -> str:
        """Return the block and the rank."""
        width = new.blocks[0].width(self.name)
        of = f" of {width.channels}" if width else ""
        return f"{new.blocks[0].path} keeps {new.kept}{of} channels of queries and keys"


def _parts(width: Width) -> tuple[HeadRows, HeadRows]:
    attention = width.attention
    assert isinstance(attention, Attention)
    assert attention.query is not None
    assert attention.key is not None
    return attention.query, attention.key
