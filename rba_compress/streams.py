"""Reading the stream at every boundary of chains during one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from rba_compress.batches import Batch
from rba_compress.errors import ModelError
from rba_compress.plan import Chain
from rba_compress.recorder import graph_arguments


def run_with_streams(
    model: nn.Module, chains: Sequence[Chain], batch: Batch
) -> tuple[Any, list[list[Tensor]]]:
    """The model's output, and for each chain its streams h_0 .. h_L, as the model made them.

    Raises:
        ModelError: a block writes into its input, so that a boundary is gone when it is read.
    """
    streams: list[dict[int, Tensor]] = [{} for _ in chains]
    versions: list[tuple[Tensor, int, str]] = []

    def keep(chain: int, boundary: int, tensor: Tensor) -> None:
        blocks = chains[chain].blocks
        streams[chain][boundary] = tensor
        if boundary < len(blocks):
            versions.append((tensor, tensor._version, blocks[boundary].path))

    if isinstance(model, fx.GraphModule):
        output = _run_graph(model, chains, batch, keep)
    else:
        output = _run_module(model, chains, batch, keep)
    for tensor, version, path in versions:
        if tensor._version != version:
            raise ModelError(f"the block {path} changes its input in place")
    return output, [[found[j] for j in range(len(found))] for found in streams]


def _run_module(
    model: nn.Module,
    chains: Sequence[Chain],
    batch: Batch,
    keep: Callable[[int, int, Tensor], None],
) -> Any:
    handles = []
    for c, chain in enumerate(chains):
        for b, block in enumerate(chain.blocks):
            module, signature = model.get_submodule(block.path), block.signature
            assert signature is not None, "blocks of a plain module have a signature"
            if b == 0:

                def before(_: Any, args: Any, kwargs: Any, c: int = c, s: Any = signature) -> None:
                    keep(c, 0, s.stream_in(args, kwargs))

                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))

            def after(_: Any, __: Any, out: Any, c: int = c, b: int = b, s: Any = signature) -> None:
                keep(c, b + 1, s.stream_out(out))

            handles.append(module.register_forward_hook(after))
    try:
        return batch.run(model)
    finally:
        for handle in handles:
            handle.remove()


def _run_graph(
    model: fx.GraphModule,
    chains: Sequence[Chain],
    batch: Batch,
    keep: Callable[[int, int, Tensor], None],
) -> Any:
    wanted: dict[str, list[tuple[int, int]]] = {}
    for c, chain in enumerate(chains):
        for b, block in enumerate(chain.blocks):
            assert block.nodes is not None, "blocks of a GraphModule have stream nodes"
            if b == 0:
                wanted.setdefault(block.nodes[0], []).append((c, 0))
            wanted.setdefault(block.nodes[1], []).append((c, b + 1))

    class Reader(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            for place in wanted.get(n.name, ()):
                keep(*place, result)
            return result

    return Reader(model).run(*graph_arguments(model, batch))


def as_rows(stream: Tensor, axis: int, mask: Tensor | None = None) -> Tensor:
    """The positions of a stream as rows (N * positions, d).

    `mask` (N, positions), where given, is true at the positions that count.
    """
    rows = stream.movedim(axis, -1)
    if mask is not None and rows.ndim == 3 and mask.shape == rows.shape[:2]:
        return rows[mask]
    return rows.reshape(-1, rows.shape[-1])


def attention_mask(batch: Batch, chain: Chain) -> Tensor | None:
    """The padding mask (N, T) of a text batch, true at real tokens; None where there is none.

    A decoder that has an input of its own has a mask of its own.
    """
    decoder = "decoder_input_ids" in batch.kwargs and "decoder" in chain.blocks[0].path
    mask = batch.kwargs.get("decoder_attention_mask" if decoder else "attention_mask")
    return mask.bool() if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
