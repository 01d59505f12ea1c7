"""Discovery of the replaceable blocks of any network, each chain verified by rewriting the network.

Every chain of the analysis is rewritten and run before it is reported, so that no chain is reported
that cannot be replaced exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rba_compress.core.batch import Batch
from rba_compress.core.call_signature import Signature
from rba_compress.core.errors import ModelError, NoChainError
from rba_compress.core.inference import evaluating
from rba_compress.core.outputs import main_output
from rba_compress.core.plan import Block, Chain, Refusal, listed
from rba_compress.core.schema import nested
from rba_compress.core.weight_types import require_plain_weights
from rba_compress.graph.activations import observe, run_with_streams
from rba_compress.graph.block_analysis import analyse, fixed_chains, residuals_outside
from rba_compress.graph.independence import require_independent
from rba_compress.graph.rewrite import Held, copy_model, replace_blocks
from rba_compress.graph.tracer import Recording, graph_arguments, record


@dataclass(frozen=True)
class Support:
    """Replaceable chains of a model, and refusals with their reasons."""

    chains: tuple[Chain, ...]
    refusals: tuple[Refusal, ...]
    fixed: tuple[Chain, ...] = ()
    """Blocks that change the shape of the stream, each as a chain for itself: they can be narrowed."""

    def __str__(self) -> str:
        lines = []
        for chain in self.chains:
            kind = chain.blocks[0].type
            lines.append(
                f"chain {chain.name}: {len(chain)} x {kind}, width {chain.width}, {listed(chain.paths)}"
            )
            if chain.reads:
                lines.append(
                    f"  behind it the first {chain.reads} of {chain.positions} positions are read"
                )
            else:
                lines.append(f"  behind it every position is computed: {chain.unread}")
            if chain.unmerged:
                lines.append(f"  no positions can be merged: {chain.unmerged}")
            elif any(block.second for block in chain.blocks):
                lines.append("  positions can be merged between the sublayers of a block")
            offers = [offer.unit for block in chain.blocks for offer in block.units]
            offers += [width.unit for block in chain.blocks for width in block.widths]
            units = dict.fromkeys(offers)
            lines.append(f"  units: {', '.join(('span', *units))}")
        if self.fixed:
            lines.append(f"narrowed alone: {', '.join(chain.name for chain in self.fixed)}")
        lines += [f"refused {refusal}" for refusal in self.refusals]
        return "\n".join(lines) or "no module maps a tensor to one of the same shape"

    def __repr__(self) -> str:
        chains = ", ".join(f"{chain.name} ({len(chain)} blocks)" for chain in self.chains) or "no chain"
        return f"Support({chains}; {len(self.refusals)} refusals)"


@torch.inference_mode(False)
def find_chains(model: nn.Module, batch: Batch) -> tuple[Support, Recording, Batch]:
    """Find the chains of `model`, without the offers of units.

    Recordings of other samples drop chains that depend on the input's values.

    Returns:
        The chains and the refusals, the recording they were found in, and its two samples.

    Raises:
        ModelError: the forward pass fails; rows of a batch depend on each other.
    """
    _require_weights(model)
    size = len(batch)
    batch = batch.to(model)
    first = batch.select(list(range(min(2, size))))
    recording = record(model, first)
    analysis = analyse(model, recording)
    again = [analyse(model, record(model, other)).chains for other in _others(batch)]
    found: list[Chain] = []
    refusals: list[Refusal] = []
    for chain in analysis.chains:
        if any(nested(b.path, o.path) for b in chain.blocks for c in found for o in c.blocks):
            continue
        joined: Chain | None = chain
        for others in again:
            joined = None if joined is None else _joined(joined, others)
        if joined is None:
            refusals.append(_refuse(chain, "its control flow differs between two batches"))
            continue
        verified, refused = _verified(model, joined, first)
        refusals += refused
        found += verified
    order = [call.path for call in recording.calls]
    found.sort(key=lambda chain: order.index(chain.blocks[0].path))
    seen = [path for chain in found for path in (b.path for b in chain.blocks)]
    told = [path for refusal in refusals for path in refusal.paths]
    refusals = [r for r in refusals if not any(nested(p, s) for p in r.paths for s in seen)]
    if found:
        require_independent(model, batch)
        found = _with_samples(model, found, batch, first)
    fixed = [c for c in fixed_chains(model, recording, analysis, found) if _resumable(model, c, first)]
    refusals += analysis.refusals([*seen, *told])
    known = [*seen, *(path for refusal in refusals for path in refusal.paths)]
    refusals += residuals_outside(recording, known)
    support = Support(tuple(found), tuple(refusals), tuple(fixed))
    return support, recording, first


def _with_samples(model: nn.Module, chains: list[Chain], batch: Batch, first: Batch) -> list[Chain]:
    """Return the chains with the axis along which streams count samples, found on two batch sizes."""
    others = ([0], list(range(min(4, len(batch)))))  # an exported program may take no batch of one
    for rows in (rows for rows in others if len(rows) != len(first)):
        try:
            with evaluating(model):
                streams = [run_with_streams(model, chains, b)[1] for b in (first, batch.select(rows))]
        except ModelError:
            continue
        sizes = len(first), len(rows)
        return [
            chain.model_copy(update=_samples(two[0], other[0], sizes))
            for chain, two, other in zip(chains, *streams, strict=True)
        ]
    return chains


def _samples(a: Tensor, b: Tensor, sizes: tuple[int, int]) -> dict[str, int]:
    """Return `sample_axis` and `rows` of a stream, from batches of two sizes that start alike."""
    n, m = sizes
    for axis in range(a.ndim):
        each = a.shape[axis] // n
        if not each or (a.shape[axis], b.shape[axis]) != (each * n, each * m) or (axis and each > 1):
            continue
        one, other = (t.movedim(axis, 0)[:each] for t in (a, b))
        alike = one.shape == other.shape and torch.allclose(one, other, rtol=1e-2, atol=1e-3)
        return {"sample_axis": axis, "rows": each if alike else 0}
    return {"rows": 0}


def _require_weights(model: nn.Module) -> None:
    """Check that every weight has a value and is a plain tensor.

    Raises:
        ModelError: a weight has no value yet, or is no plain tensor.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ModelError(
                f"{name} is a lazy parameter without a size: run the model on a batch first"
            )
        if tensor.is_meta:
            raise ModelError(f"{name} lies on the meta device, without a value: load the weights first")
    require_plain_weights(model)


def _others(batch: Batch) -> list[Batch]:
    """Return batches of two that may take other control flow in the model than the first two."""
    found = []
    if len(batch) > 2:
        found.append(batch.select([len(batch) - 2, len(batch) - 1]))
    mask = batch.kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        # Models often drop a mask of ones, but not one with a zero.
        for last in (0, 1):
            full = torch.ones_like(mask)
            full[0, -1] = last
            masked = replace(batch, kwargs={**batch.kwargs, "attention_mask": full})
            found.append(masked.select(list(range(min(2, len(batch))))))
    return found


def _joined(chain: Chain, others: Sequence[Chain]) -> Chain | None:
    """Return the chain with its blocks' call signatures in `others`; None where it is not there."""
    other = next((o for o in others if [*map(_core, o.blocks)] == [*map(_core, chain.blocks)]), None)
    if other is None:
        return None
    blocks = [_with_variant(a, b.signature) for a, b in zip(chain.blocks, other.blocks, strict=True)]
    same = chain.reads == other.reads
    return chain.model_copy(
        update={
            "blocks": tuple(blocks),
            "reads": chain.reads if same else 0,
            "unread": chain.unread if same else "which of its positions are read differs",
        }
    )


def _core(block: Block) -> Block:
    signature = Signature(stream=block.signature.stream, output=block.signature.output)
    return block.model_copy(update={"signature": signature, "variants": ()})


def _with_variant(block: Block, other: Signature) -> Block:
    known = (block.signature, *block.variants)
    if not all(signature.inputs for signature in (*known, other)):
        return block.model_copy(update={"signature": _core(block).signature, "variants": ()})
    if any(signature.arguments == other.arguments for signature in known):
        return block
    return block.model_copy(update={"variants": (*block.variants, other)})


def _verified(model: nn.Module, chain: Chain, batch: Batch) -> tuple[list[Chain], list[Refusal]]:
    """Return the chain if it can be rewritten, without its first block if only that prevents it."""
    reason = _verify(model, chain, batch)
    if reason is None:
        return [chain], []
    if len(chain) > 1:
        rest = chain.model_copy(
            update={
                "blocks": chain.blocks[1:],
                "macs": chain.macs[1:],
                "params": chain.params[1:],
            }
        )
        if _verify(model, rest, batch) is None:
            return [rest], [_refuse(chain.model_copy(update={"blocks": chain.blocks[:1]}), reason)]
    return [], [_refuse(chain, reason)]


def why_none(support: Support, model: nn.Module) -> str:
    """Return a message on why nothing of a model can be replaced; empty where something can."""
    if support.chains:
        return ""
    said = (
        f"nothing of a {type(model).__name__} can be replaced: it has no blocks in a row that each add "
        "to a stream of one shape, which the next block alone reads"
    )

    def weight(refusal: Refusal) -> int:
        parts = (model.get_submodule(path).parameters() for path in refusal.paths)
        return sum(p.numel() for part in parts for p in part)

    closest = max(support.refusals, key=weight, default=None)
    return said if closest is None else f"{said}. Closest: {closest}"


def require_chains(support: Support, model: nn.Module) -> None:
    """Check that a model has a chain.

    Raises:
        NoChainError: there is none; the message lists the refusals.
    """
    if not support.chains:
        raise NoChainError(f"{why_none(support, model)}\n{support}")


def _refuse(chain: Chain, reason: str) -> Refusal:
    return Refusal(paths=tuple(b.path for b in chain.blocks), type=chain.blocks[0].type, reason=reason)


def _resumable(model: nn.Module, chain: Chain, batch: Batch) -> bool:
    """Return whether a network runs from the stream behind a chain, to the same output."""
    copy, held = copy_model(model, share=True), Held()
    try:
        seen = observe(model, [chain], batch)
        held.value = seen.streams[0][len(chain)]
        replace_blocks(copy, chain.blocks, held)
        with evaluating(copy):
            output = batch.run(copy)
    except Exception:  # noqa: BLE001  whatever fails, the blocks are left as they are
        return False
    pairs = zip(pytree.tree_leaves(seen.output), pytree.tree_leaves(output), strict=False)
    return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))


# --- verification by rewriting ---------------------------------------------------------------


class _Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


class _Rebuilt(nn.Module):
    """Module that runs a block and rebuilds its output from the stream by the signature's template."""

    def __init__(self, block: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.block, self.signature = block, signature

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stream = self.signature.stream_out(self.block(*args, **kwargs))
        return self.signature.rebuild(stream, args, kwargs)


def _verify(model: nn.Module, chain: Chain, batch: Batch) -> str | None:
    """Return why the chain cannot be rewritten; None where it was rewritten and passed these checks.

    1. Two runs agree. 2. The blocks' outputs, rebuilt from their streams, change nothing (plain
    modules). 3. With every block skipped, the output keeps its shape. 4. `0.5 x` spliced in place of an
    interior block gives, bit for bit, the output of the untouched model with that value substituted.
    """
    try:
        with evaluating(model):
            output, (streams,) = run_with_streams(model, [chain], batch)
            original = main_output(output)
            if not _same(original, main_output(batch.run(model))):
                return "two runs on the same batch differ: is it random in eval mode?"
            if not isinstance(model, fx.GraphModule):
                rebuilt = main_output(batch.run(_rebuilt(model, chain)))
                if not _same(original, rebuilt):
                    return "rebuilding its output from its stream changes the model's output"
            skipped = copy_model(model, share=True)
            replace_blocks(skipped, chain.blocks, nn.Identity())
            if main_output(batch.run(skipped)).shape != original.shape:
                return "skipping it changes the shape of the model's output"
            block = chain.blocks[len(chain) // 2]
            halved = copy_model(model, share=True)
            replace_blocks(halved, [block], _Half())
            by_hand = with_value(model, block, batch, 0.5 * streams[len(chain) // 2])
            if not _same(main_output(by_hand), main_output(batch.run(halved))):
                return "a map in its place does not give what its value put in by hand gives"
    except AttributeError as error:
        missing = str(error).split("'")[-2:-1]
        return f"the code around it reads its attribute {missing[0] if missing else error!r}"
    except Exception as error:  # noqa: BLE001  a chain that cannot be run is refused with its error
        return f"the rewritten model fails: {type(error).__name__}: {error}"
    return None


def _same(a: Tensor, b: Tensor) -> bool:
    """Return True if tensors are bit-equal, NaN included; calibration refuses NaN, not this check."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


def _rebuilt(model: nn.Module, chain: Chain) -> nn.Module:
    wrapped = copy_model(model, share=True)
    for block in chain.blocks:
        assert block.signature is not None
        inner = wrapped.get_submodule(block.path)
        wrapped.set_submodule(block.path, _Rebuilt(inner, block.signature))
    return wrapped


def with_value(model: nn.Module, block: Block, batch: Batch, stream: Tensor) -> Any:
    """Return the untouched model's output with `stream` in place of the output stream of `block`."""
    if isinstance(model, fx.GraphModule):

        class Replaying(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                result = super().run_node(n)
                return stream if block.nodes and n.name == block.nodes[1] else result

        return Replaying(model).run(*graph_arguments(model, batch))
    signature = block.signature
    assert signature is not None

    def put(_: Any, __: Any, output: Any) -> Any:
        old = signature.stream_out(output)
        return pytree.tree_map(lambda value: stream if value is old else value, output)

    handle = model.get_submodule(block.path).register_forward_hook(put)
    try:
        return batch.run(model)
    finally:
        handle.remove()
