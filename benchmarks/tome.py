"""Token merging as published, for timm's vision transformers: pairs by the cosine of attention's keys.

Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023), with the keys of all heads together,
which is a little better on a DeiT-tiny than their mean over heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from rba_compress.graph.token_merging import (
    merge,
    merged_sizes,
    places,
    shares,
    unit_sizes,
    weights,
)


class ToMe(nn.Module):
    """A vision transformer of timm whose blocks merge positions, (N, 3, H, W) to class scores.

    Args:
        model: the network, whose modules are used as they are.
        counts: the number of positions to take away, by block.
    """

    def __init__(self, model: nn.Module, counts: Mapping[int, int]) -> None:
        super().__init__()
        self.model, self.counts = model, dict(counts)

    def forward(self, images: Tensor) -> Tensor:
        model: Any = self.model
        x, sizes = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images)))), None
        for b, block in enumerate(model.blocks):
            attn, (n, positions, width) = block.attn, x.shape
            qkv = attn.qkv(block.norm1(x)).reshape(n, positions, 3, attn.num_heads, attn.head_dim)
            q, k, v = qkv.permute(2, 0, 3, 1, 4)
            mask = None if sizes is None else weights(sizes)
            mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + block.ls1(attn.proj(mixed.transpose(1, 2).reshape(n, positions, width)))
            count = self.counts.get(b, 0)
            if count:
                # The squared distance of unit vectors falls as their cosine rises.
                keys = functional.normalize(k.transpose(1, 2).flatten(2), dim=-1)
                new = places(keys, None, count, model.num_prefix_tokens)
                before = unit_sizes(x) if sizes is None else sizes
                x = merge(x, shares(new, before.squeeze(-1), count), new, count)
                sizes = merged_sizes(before, new, count)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        found: Tensor = model.forward_head(model.norm(x))
        return found
