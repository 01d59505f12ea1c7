"""Offers of units on the blocks of a network, each tried before it is offered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rba_compress.core.batch import Batch
from rba_compress.core.errors import ModelError, RBAError
from rba_compress.core.inference import evaluating, unwrap
from rba_compress.core.loader_form import batch_of
from rba_compress.core.offload import undispatched
from rba_compress.core.outputs import float_outputs
from rba_compress.core.plan import Chain, Plan, Refusal, Width
from rba_compress.core.registry import searched_units
from rba_compress.graph.channel_groups import ChannelGroups
from rba_compress.graph.discovery import Support, find_chains
from rba_compress.graph.rewrite import copy_model, replace_blocks, resize
from rba_compress.graph.tracer import Recording
from rba_compress.units.base import Trial, Unit
from rba_compress.units.block_variants import Cut, Form, Traces, thin
from rba_compress.units.read_out import READ_OUT
from rba_compress.units.registry import unit_of
from rba_compress.units.splice import splice_shared
from rba_compress.units.token_merge import TOKEN_MERGE, Turned, carries_sizes, merging_costs
from rba_compress.units.whole import WHOLE
from rba_compress.units.width import Inside, WidthUnit, narrowed

MOST_ORDERED = 6
"""Numbers of first positions that are tried to be class tokens and registers."""


@torch.inference_mode(False)
def supports(model: nn.Module, example: Any) -> Support:
    """Find the chains of replaceable blocks of `model`, each verified by rewriting, and all refusals.

    Args:
        model: any `nn.Module` or `fx.GraphModule`; left as it is.
        example: one batch, in any form that a loader may yield; at most four samples are used.

    Raises:
        LoaderError: the example is not a batch.
        ModelError: the model is of a kind that cannot be rewritten, or its forward pass fails.
    """
    model = undispatched(unwrap(model))
    found, _ = discover(model, batch_of(model, example))
    return found


def discover(
    model: nn.Module,
    batch: Batch,
    traces: Traces | None = None,
    units: Sequence[str] | None = None,
    *,
    read_outs: bool = True,
) -> tuple[Support, Recording]:
    """Find the chains of `model` with the offers of units; return the recording of two samples, too.

    Args:
        traces: cache of traced blocks.
        units: names of the units to try; by default all that a search may choose.
        read_outs: True to try exact read-outs, too.

    Raises:
        ModelError: the forward pass fails; rows of a batch depend on each other.
    """
    support, recording, two = find_chains(model, batch)
    names = searched_units() if units is None else units
    tried = [unit for unit in map(unit_of, names) if not (unit.removes or unit.inner)]
    inner = [unit for unit in map(unit_of, names) if isinstance(unit, WidthUnit)]
    if read_outs and READ_OUT not in tried:
        tried.append(READ_OUT)
    traces = traces or Traces()
    merges = TOKEN_MERGE in tried and read_outs
    chains, refusals = [], list(support.refusals)
    groups = ChannelGroups(model, recording) if inner else None
    for bare in support.chains:
        refused: list[Refusal] = []
        chain = _with_offers(model, bare, two, traces, tried, merges=merges)
        if groups is not None:
            inside = Inside(model, chain, two, groups, traces)
            chain, refused = _with_widths(inside, inner)
        chains.append(chain)
        refusals += refused
    fixed = []
    for bare in support.fixed:
        if groups is None:
            break
        chain, refused = _with_widths(Inside(model, bare, two, groups, traces), inner)
        refusals += refused
        if chain.blocks[0].widths:
            fixed.append(chain)
    return Support(tuple(chains), tuple(refusals), tuple(fixed)), recording


def _with_widths(inside: Inside, units: Sequence[WidthUnit]) -> tuple[Chain, list[Refusal]]:
    """Return the chain with the channels that units may take inside its blocks, and refusals.

    One block of each kind and size is tried.
    """
    chain = inside.chain
    known: dict[Any, str | None] = {}
    refused: dict[tuple[str, str], list[str]] = {}
    blocks = []
    for b, block in enumerate(chain.blocks):
        widths: list[Width] = []
        for unit in units:
            width, reasons = unit.width(inside, b)
            if width is not None:
                key = block.type, block.signature.model_dump_json(), width.model_dump_json()
                if key not in known:
                    known[key] = _width_flaw(inside, b, unit, width)
                if known[key] is None:
                    widths.append(width)
                else:
                    reasons = [*reasons, f"{known[key]}"]
            for reason in reasons:
                named = reason.removeprefix(f"{block.path}.").replace(f"{block.path}.", "")
                refused.setdefault((unit.name, named), []).append(block.path)
        blocks.append(block.model_copy(update={"widths": tuple(widths)}))
    refusals = [
        Refusal(paths=tuple(paths), type=chain.blocks[0].type, reason=f"{unit} of {reason}")
        for (unit, reason), paths in refused.items()
    ]
    return chain.model_copy(update={"blocks": tuple(blocks)}), refusals


def _with_offers(
    model: nn.Module,
    chain: Chain,
    batch: Batch,
    traces: Traces,
    units: Sequence[Unit],
    *,
    merges: bool,
) -> Chain:
    """Return the chain with the verified offers of its blocks, and whether they can merge positions.

    Blocks of one kind and size share the offers of the first of them.
    """
    if not units:
        return chain
    if chain.reads and (
        flaw := _flaw(model, chain, len(chain) - 1, READ_OUT, batch=batch, traces=traces)
    ):
        chain = chain.model_copy(update={"reads": 0, "unread": flaw})
    known: dict[Any, dict[str, Any]] = {}
    blocks, unmerged = [], ""
    if merges:
        chain = chain.model_copy(
            update={"ordered": chain.reads or _ordered(model, chain, batch=batch, traces=traces)}
        )
        if chain.ordered is None:
            merges, unmerged = False, "what follows hands out positions, or reads them by their places"
    for b, block in enumerate(chain.blocks):
        key = (block.type, chain.macs[b], chain.params[b], block.signature.model_dump_json())
        if key not in known:
            inner = any(unit is not READ_OUT for unit in units)
            divisible = inner and _flaw(model, chain, b, WHOLE, batch=batch, traces=traces) is None
            found: dict[str, Any] = {}
            trial = Trial(model, chain, b, batch, traces, divisible=divisible)
            if merges and not (flaw := carries_sizes(trial)):
                found = merging_costs(trial)
                trial.block = block.model_copy(update=found)
            elif merges:
                unmerged = f"{block.path}: {flaw}"
            offers = [offer for unit in units for offer in unit.offers(trial)]
            known[key] = found | {"units": tuple(o for o in offers if o.macs < chain.macs[b])}
        blocks.append(block.model_copy(update=known[key]))
    return chain.model_copy(update={"blocks": tuple(blocks), "unmerged": unmerged})


def _width_flaw(inside: Inside, b: int, unit: WidthUnit, width: Width) -> str | None:
    """Return why a block's channels cannot be taken; None where they can.

    With some channels taken and nothing compensated, the network must compute what it computes with the
    weights that read them, or make them, set to zero.
    """
    model, block = inside.model, inside.chain.blocks[b].model_copy(update={"widths": (width,)})
    if width.channels < 2 and width.module is None:
        return "it has one channel"
    try:
        kept, tensors, masked = unit.tried(model, block, width)
        blocks = (*inside.chain.blocks[:b], block, *inside.chain.blocks[b + 1 :])
        chain = inside.chain.model_copy(update={"blocks": blocks})
        new = narrowed(unit.choice(chain, b, b + 1), kept, tensors, None)
        named = {f"{new.key}{name}": tensor for name, tensor in tensors.items()}
        narrow = splice_shared(model, Plan(replacements=(new,)), named, inside.traces)
        zeroed = copy_model(model, share=True)
        resize(zeroed, {f"{new.key}{name}": tensor for name, tensor in masked.items()})
        return _apart(zeroed, narrow, inside.batch, "with fewer channels")
    except RBAError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  a block whose code needs all channels is not narrowed
        return f"its code takes no other number of channels: {type(error).__name__}: {error}"


def _ordered(model: nn.Module, chain: Chain, *, batch: Batch, traces: Traces) -> int | None:
    """Return the number of positions behind which the order does not matter to the output; None where
    it matters, or where the last block cannot be run from its graph.
    """
    if chain.ndim != 3:
        return None
    for first in range(MOST_ORDERED):
        form = Form(reads=first)
        if _flaw(model, chain, len(chain) - 1, Turned(), batch=batch, traces=traces, form=form) is None:
            return first
    return None


def _flaw(
    model: nn.Module,
    chain: Chain,
    b: int,
    unit: Cut,
    *,
    batch: Batch,
    traces: Traces,
    form: Form | None = None,
) -> str | None:
    """Return why a block cannot be run from its graph; None where it can, with the same output.

    A read-out is tried in its exact form, which leaves the output unchanged, too.
    """
    form, block = form or Form(reads=chain.reads, exact=unit is READ_OUT), chain.blocks[b]
    compressed = copy_model(model, share=True)
    try:
        cut = thin(compressed, block, nn.Identity(), traces, unit=unit, form=form)
        replace_blocks(compressed, [block], cut)
        return _apart(model, compressed, batch, "without them")
    except ModelError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001  a block that cannot be run is not thinned
        return f"the thinned model fails: {type(error).__name__}: {error}"


def _apart(model: nn.Module, compressed: nn.Module, batch: Batch, without: str) -> str | None:
    """Return how the outputs of two networks differ; None where they do not."""
    with evaluating(model), evaluating(compressed):
        originals, outputs = (float_outputs(batch.run(m)) for m in (model, compressed))
    for name, original in originals.items():
        found = outputs.get(name)
        if found is None or original.shape != found.shape:
            return f"the model's output has another shape {without}"
        allowed = min(1000 * torch.finfo(original.dtype).eps, 0.05) * original.abs().max()
        if not bool((original - found).abs().max() <= allowed) and bool(torch.isfinite(original).all()):
            return f"the model's output is another one {without}"
    return None
