"""attention_linear: a linear layer in place of a block's attention, on attention's own input.

The block's own code runs, so that caches, masks and generation work as before; the layer has the place
of attention's last one. It is fitted to what attention computes (NBL, NeurIPS 2025).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rba_compress.core.call_signature import Signature
from rba_compress.core.errors import ModelError
from rba_compress.core.map_spec import MapSpec
from rba_compress.core.offload import execution_device, hold
from rba_compress.core.plan import Block, Called, Chain, ChannelGroup, Replacement, Site, Width
from rba_compress.graph.rewrite import tensor_of
from rba_compress.linalg.maps import fit_map
from rba_compress.units.channel_width import SOLVED
from rba_compress.units.width import Inside, Levels, Seen, WidthUnit, narrowed, width_of


class LinearAttention(nn.Module):
    """Linear layer that is called as the attention in whose place it is.

    Args:
        name: name of the layer, that of attention's last one.
        layer: (..., channels of the stream) to the same.
        signature: how the block calls attention.
    """

    def __init__(self, name: str, layer: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.add_module(name, layer)
        self.signature = signature

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (layer,) = self.children()
        stream = layer(self.signature.stream_in(args, kwargs))
        return self.signature.rebuild(stream, args, kwargs)


class AttentionLinear(WidthUnit):
    """Block whose attention is a linear layer."""

    name = "attention_linear"
    of_heads = True
    whole = True
    replaces = True
    gguf = True

    def width(self, inside: Inside, b: int) -> tuple[Width | None, list[str]]:
        """Return attention as the one thing to take, in blocks that run by their own code."""
        chain, block = inside.chain, inside.chain.blocks[b]
        groups = inside.groups
        if block.units or block.nodes is not None or chain.ndim != 3 or not groups.attends(block.path):
            return None, []  # `attention_free` is for blocks that run by their graph
        if not block.branches:
            return None, ["attention: the block's branches cannot be told apart"]
        branch = block.branches[0]
        path = branch.path.rpartition(".")[0]
        if branch.norm is not None or not groups.attends(path):
            return None, []
        try:
            groups.require_heads(branch.path)
            called = groups.called(block.path, branch.path)
        except ModelError as error:
            return None, [f"attention: {error}"]
        reader, size = branch.path.removeprefix(f"{block.path}."), chain.width**2
        bias = groups.size(f"{branch.path}.bias")
        module = inside.model.get_submodule(path)
        group = ChannelGroup(
            reader=reader, channels=1, slices=(), shift=f"{reader}.bias" if bias else ""
        )
        return Width(
            unit=self.name,
            channels=1,
            groups=(group,),
            module=called,
            macs=((chain.positions, groups.macs_of(path) - chain.positions * size),),
            params=sum(p.numel() for p in module.parameters()) - size - bias,
        ), []

    def excludes(self, site: Site, other: Replacement) -> bool:
        """Return whether the other replacement is the same, or does not keep the block's layers.

        Narrower attention is replaced.
        """
        return other.unit == self.name or (not other.inner and super().excludes(site, other))

    def modules(self, block: Block) -> dict[str, Signature]:
        """Return attention."""
        called = _called(width_of(self, block))
        return {f"{block.path}.{called.path}": called.signature}

    def fits(
        self, model: nn.Module, chain: Chain, b: int, seen: Seen, levels: Levels
    ) -> list[tuple[Replacement, dict[str, Tensor]]]:
        """Fit the layer, with a bias where attention's last layer has one."""
        block = chain.blocks[b]
        width = width_of(self, block)
        (group,) = width.groups
        pair = seen.inputs[f"{block.path}.{_called(width).path}"].with_spectrum()
        kind = "affine" if group.shift else "linear"
        fit = fit_map(MapSpec(kind=kind, damping=SOLVED), pair)
        dtype = tensor_of(model, f"{block.path}.{group.reader}.weight").dtype
        tensors = {f"{group.reader}.{name}": each.to(dtype) for name, each in fit.tensors.items()}
        new = self.choice(chain, b, b + 1, 0.0)
        return [(narrowed(new, 0, tensors, fit.diagnostics), tensors)]

    def tried(
        self, model: nn.Module, block: Block, width: Width
    ) -> tuple[int, dict[str, Tensor], dict[str, Tensor]]:
        """Return a layer of zeros, and zeros for the weight of attention's last layer."""
        (group,) = width.groups
        weight = tensor_of(model, f"{block.path}.{group.reader}.weight")
        outputs = tensor_of(model, f"{block.path}.{group.reader}.bias") if group.shift else None
        size = min(weight.shape) if outputs is None else len(outputs)
        new = {f"{group.reader}.weight": weight.new_zeros(size, size)}
        if outputs is not None:
            new[f"{group.reader}.bias"] = outputs
        return 0, new, {f"{group.reader}.weight": torch.zeros_like(weight)}

    def gone(self, new: Replacement) -> list[str]:
        """Return the path of attention."""
        block = new.blocks[0]
        return [f"{block.path}.{_called(width_of(self, block)).path}"]

    def place(self, model: nn.Module, new: Replacement) -> None:
        """Put a layer in place of attention, whose tensors are set afterwards."""
        block = new.blocks[0]
        (group,), called = width_of(self, block).groups, _called(width_of(self, block))
        path, reader = f"{block.path}.{called.path}", f"{block.path}.{group.reader}"
        hold(model, reader)
        old = model.get_submodule(path)
        weight = tensor_of(model, f"{reader}.weight")
        layer = torch.nn.utils.skip_init(
            nn.Linear,
            new.width,
            new.width,
            bias=bool(group.shift),
            device=execution_device(model, weight, reader),
            dtype=weight.dtype,
        )
        name = group.reader.removeprefix(f"{called.path}.")
        placed = LinearAttention(name, layer, called.signature)
        model.set_submodule(path, placed.train(old.training))

    def unfoldable(self, new: Replacement) -> str | None:
        """Return why no stock network has such a block."""
        return "a block whose attention is a linear layer is not a block of the architecture"

    def brief(self, new: Replacement) -> str:
        """Return the layer in place of attention."""
        return "attention is one linear layer"

    def describe(self, new: Replacement) -> str:
        """Return the block, and what it has in place of attention."""
        return f"{new.blocks[0].path} attention -> linear layer on its own input"


def _called(width: Width) -> Called:
    assert width.module is not None
    return width.module
