"""Common parts of the units that narrow attention: its layers, and the cost of a channel."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

from torch import Tensor, nn

from rba_compress.core.plan import Attention, Block, ByPositions, HeadRows, Width
from rba_compress.graph.attention_heads import HeadSizes, NoAttentionError, part_layers
from rba_compress.graph.rewrite import copy_model, resize, tensor_of
from rba_compress.linalg.narrowing import Compensation
from rba_compress.units.base import Trial
from rba_compress.units.block_variants import Cut, Form
from rba_compress.units.read_out import READ_OUT
from rba_compress.units.token_merge import SIZED
from rba_compress.units.width import Inside, WidthUnit


def counted(unit: WidthUnit, inside: Inside, b: int, width: Width) -> Width:
    """Return the width with what one of its channels costs, counted with and without half of them.

    Raises:
        ModelError: the block cannot be run with fewer.
    """
    chain, attention = inside.chain, width.attention
    assert attention is not None
    block = chain.blocks[b].model_copy(update={"widths": (width,)})
    key = block.type, chain.macs[b], chain.params[b], width.model_dump_json()
    if key in inside.counts:
        return inside.counts[key]
    kept, tensors, _ = unit.tried(inside.model, block, width)
    narrow = copy_model(inside.model, share=True)
    part_layers(narrow, block.path, attention)
    resize(narrow, {f"{block.path}.{name}": tensor for name, tensor in tensors.items()})
    fewer, taken = unit.resized(HeadSizes.of(attention), kept), width.channels - kept
    whole, less = (
        Trial(model, chain, b, inside.batch, inside.traces, divisible=False)
        for model in (inside.model, narrow)
    )

    def saved(cut: Cut, form: Form) -> ByPositions:
        before, after = whole.places(cut, form), less.places(cut, replace(form, heads=fewer))
        pairs = zip(before, after, strict=True)
        return tuple((at, round(Fraction(a - c, taken))) for (at, a), (_, c) in pairs)

    sizes = sum(tensor.numel() for tensor in tensors.values())
    each = sum(original(inside.model, block, attention, name).numel() for name in tensors) - sizes
    each //= taken

    def bias(cut: Cut, form: Form) -> int:
        cuts = whole.cut(cut, form), less.cut(cut, replace(form, heads=fewer))
        before, after = (sum(p.numel() for p in block.parameters()) for block in cuts)
        return before - after - each * taken

    fields: dict[str, Any] = {"macs": saved(SIZED, Form()), "params": each, "bias": bias(SIZED, Form())}
    if chain.reads and block.offer(READ_OUT.name, narrow=True) is not None:
        exact = Form(reads=chain.reads, exact=True)
        fields |= {"narrow": saved(READ_OUT, exact), "narrow_bias": bias(READ_OUT, exact)}
    inside.counts[key] = width.model_copy(update=fields)
    return inside.counts[key]


def refused(reason: object) -> tuple[None, list[str]]:
    """Return a refusal, where the block has attention at all."""
    return None, [] if isinstance(reason, NoAttentionError) else [f"attention: {reason}"]


def output_tensors(
    model: nn.Module, block: Block, attention: Attention, fit: Compensation
) -> dict[str, Tensor]:
    """Return the tensors of the layer that reads all heads, solved anew."""
    found = {f"{attention.output}.weight": fit.weight}
    if attention.bias:
        bias = tensor_of(model, f"{block.path}.{attention.output}.bias")
        found[f"{attention.output}.bias"] = bias.to(fit.shift) + fit.shift
    return found


def original(model: nn.Module, block: Block, attention: Attention, name: str) -> Tensor:
    """Return a tensor of a block by the name that it has once its attention is narrowed."""
    for rows in (attention.query, attention.key, attention.value):
        if rows is not None and rows.part:
            if name == f"{rows.layer}.weight":
                return rows_of(model, block, rows)[0]
            if name == f"{rows.layer}.bias":
                bias = rows_of(model, block, rows)[1]
                assert bias is not None
                return bias
    return tensor_of(model, f"{block.path}.{name}")


def rows_of(model: nn.Module, block: Block, rows: HeadRows) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of heads in a network as it is, whether or not they have a layer of their
    own.
    """
    try:
        layer = model.get_submodule(f"{block.path}.{rows.layer}")
    except AttributeError:
        layer = None
    if layer is not None and isinstance(getattr(layer, "weight", None), Tensor):
        weight = tensor_of(model, f"{block.path}.{rows.layer}.weight")
        bias = tensor_of(model, f"{block.path}.{rows.layer}.bias") if rows.bias else None
        return weight, bias
    weight = tensor_of(model, f"{block.path}.{rows.source}")[rows.rows]
    bias = tensor_of(model, f"{block.path}.{rows.bias}")[rows.rows] if rows.bias else None
    return weight, bias


def first_channels(model: nn.Module, block: Block, rows: HeadRows, kept: int) -> dict[str, Tensor]:
    """Return the tensors of a layer with the first channels of each head alone."""
    found = {}
    for name, tensor in zip(("weight", "bias"), rows_of(model, block, rows), strict=True):
        if tensor is not None:
            heads = tensor.unflatten(0, (rows.heads, rows.width))
            found[f"{rows.layer}.{name}"] = heads[:, :kept].flatten(0, 1)
    return found


def turned_layer(model: nn.Module, block: Block, rows: HeadRows, into: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a layer with the channels of each head turned.

    Args:
        into: (heads, directions, channels).
    """
    found = {}
    for name, tensor in zip(("weight", "bias"), rows_of(model, block, rows), strict=True):
        if tensor is not None:
            found[f"{rows.layer}.{name}"] = _turned(into, tensor)
    return found


def _turned(into: Tensor, tensor: Tensor) -> Tensor:
    """Return a weight or bias (heads * channels, ...) with the channels of each head turned."""
    rows = tensor.unflatten(0, (len(into), -1)).to(into)
    rows = rows[..., None] if rows.ndim == 2 else rows
    found: Tensor = (into @ rows).flatten(0, 1).reshape(-1, *tensor.shape[1:])
    return found.to(tensor.dtype)
