"""Claim: at batch 1, blocks of fewer positions are not faster in proportion, however these are removed.

A DeiT-tiny that simply drops positions where a plan merges them, and the merged network, each in turn
with the original, at batch 1, eager and compiled. `excess` is the ratio of latencies over the share of
MACs that the plan keeps; that of the network that drops positions is a lower bound for any way to merge
them. `python -m benchmarks.merge_floor` prints a JSON line for each plan and form.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.delivered_speed import MERGES, plans, spliced
from benchmarks.real_data import deit_tiny
from rba_compress import benchmark, supports
from rba_compress.core.batch import as_batch
from rba_compress.profiling.cost import cost


@dataclass
class Run:
    seconds: float = 4.0
    """For each comparison, and at least seven pairs."""


class Dropping(nn.Module):
    """A DeiT of timm that drops its last positions behind attention, (N, 3, H, W) to class scores.

    Args:
        model: the network, whose modules are used as they are.
        counts: the number of positions to drop, by block.
    """

    def __init__(self, model: nn.Module, counts: Mapping[int, int]) -> None:
        super().__init__()
        self.model, self.counts = model, dict(counts)

    def forward(self, images: Tensor) -> Tensor:
        model: Any = self.model
        x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
        *blocks, last = model.blocks
        for b, block in enumerate(blocks):
            x = x + block.attn(block.norm1(x))
            x = x[:, : x.shape[1] - self.counts.get(b, 0)].contiguous()
            x = x + block.mlp(block.norm2(x))
        x = x[:, :1] + _first(last.attn, last.norm1(x))
        x = x + last.mlp(last.norm2(x))
        found: Tensor = model.head(model.norm(x)[:, 0])
        return found


def _first(attn: Any, x: Tensor) -> Tensor:
    """Return what attention gives the first position, (N, 1, d)."""
    n, positions, width = x.shape
    weight, bias = attn.qkv.weight, attn.qkv.bias
    q = functional.linear(x[:, :1], weight[:width], bias[:width]).unflatten(-1, (attn.num_heads, -1))
    kv = functional.linear(x, weight[width:], bias[width:])
    k, v = kv.view(n, positions, 2, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    mixed = functional.scaled_dot_product_attention(q.transpose(1, 2), k, v)
    found: Tensor = attn.proj(mixed.transpose(1, 2).reshape(n, 1, width))
    return found


def main(how: Run) -> None:
    model = deit_tiny().eval()
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (chain,) = supports(model, x).chains
    x = x[:1]
    with torch.no_grad():
        torch.testing.assert_close(Dropping(model, {})(x), model(x))
    for name, counts in MERGES.items():
        merged, dropping = spliced(model, plans(chain)[name]), Dropping(model, counts).eval()
        kept = cost(merged, as_batch(x)).macs / cost(model, as_batch(x)).macs
        for form in ("eager", "compiled"):
            torch.compiler.reset()
            networks: list[Any] = [model, dropping, merged]
            if form == "compiled":
                networks = [torch.compile(each, dynamic=False) for each in networks]
            row = {"plan": name, "form": form, "macs_kept": round(kept, 4)}
            for key, network in zip(("dropped", "merged"), networks[1:], strict=True):
                found = benchmark(networks[0], network, x, seconds=how.seconds)
                row[f"{key}_excess"] = round(found.ratio / kept, 3)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Run))
