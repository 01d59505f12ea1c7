"""Streams at every boundary of chains, read during one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, fx, nn
from torch.utils.hooks import RemovableHandle

from rba_compress.core.batch import Batch
from rba_compress.core.errors import ModelError
from rba_compress.core.inference import running
from rba_compress.core.plan import Chain
from rba_compress.graph.rewrite import BlockModule
from rba_compress.graph.tracer import graph_arguments


class _Reached(BaseException):
    """Signal that ends a forward pass early; no `Exception`, so no handler takes it for an error."""


@dataclass
class Observed:
    """Observations of one forward pass."""

    output: Any = None
    """Output of the model; None where the pass was stopped early."""
    streams: list[dict[int, Tensor]] = field(default_factory=list)
    """Streams of each chain by boundary; in a rewritten GraphModule, without those inside of a span."""
    layers: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Input and output of each layer that ran as a module, by path."""
    times: list[dict[int, float]] = field(default_factory=list)
    """Readings of the clock for each chain, by boundary."""


def observe(
    model: nn.Module,
    chains: Sequence[Chain],
    batch: Batch,
    *,
    layers: Sequence[str] = (),
    stop: tuple[int, int] | None = None,
    on_layer: Callable[[str, Any, Any], None] | None = None,
    clock: Callable[[], float] | None = None,
) -> Observed:
    """Run a model, rewritten or not, and keep the streams of its chains without copying them.

    Args:
        layers: paths of modules whose inputs and outputs are kept, too; `MERGE` of a block that merges
            positions gives the new place of each, and its share in the mean there.
        stop: (chain, boundary) after which the pass is ended.
        on_layer: called with the path, the input and the output of each of the layers, instead of
            keeping them.
        clock: read at every boundary.

    Raises:
        ModelError: the forward pass fails; a block runs twice, or writes into its input, so that the
            stream at a boundary is overwritten.
    """
    seen = Observed(streams=[{} for _ in chains], times=[{} for _ in chains])
    versions: list[tuple[Tensor, int, str]] = []

    def keep(chain: int, boundary: int, tensor: Tensor) -> None:
        blocks = chains[chain].blocks
        if boundary in seen.streams[chain]:
            raise ModelError(_other_ways(blocks[max(boundary - 1, 0)].path, "ran twice", batch))
        last = boundary == len(blocks)
        # What follows the chain may overwrite it, as with `relu_`.
        seen.streams[chain][boundary] = tensor.clone() if last else tensor
        if clock is not None:
            seen.times[chain][boundary] = clock()
        if not last and not tensor.is_inference():  # inference tensors have no version
            versions.append((tensor, tensor._version, blocks[boundary].path))
        if stop == (chain, boundary):
            raise _Reached

    def keep_layer(path: str, given: Any, output: Any) -> None:
        # Blocks overwrite them, as with `x += shortcut`.
        seen.layers[path] = (_copied(given), _copied(output))

    on_layer = on_layer or keep_layer
    handles = _hook_layers(model, layers, on_layer)
    try:
        with running(model, batch):
            if isinstance(model, fx.GraphModule):
                watched = {f"{path}.weight": partial(on_layer, path) for path in layers}
                seen.output = _run_graph(model, chains, batch, keep, watched)
            else:
                handles += _hook_blocks(model, chains, keep)
                seen.output = batch.run(model)
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    for tensor, version, path in versions:
        if tensor._version != version:
            raise ModelError(f"the block {path} changes its input in place")
    return seen


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


class _Watch:
    """Handle that ends the watching of a block that runs by a graph."""

    def __init__(self, block: BlockModule) -> None:
        self._block = block

    def remove(self) -> None:
        """End it."""
        self._block.watching = None


def _hook_layers(
    model: nn.Module, layers: Sequence[str], on_layer: Callable[[str, Any, Any], None]
) -> list[RemovableHandle | _Watch]:
    def after(_: Any, args: Any, kwargs: Any, output: Any, path: str) -> None:
        # The first argument is the stream, by position or by name.
        on_layer(path, next(iter((*args, *kwargs.values()))), output)

    handles: list[RemovableHandle | _Watch] = []
    for path in layers:
        block, name = _graph_run(model, path)
        if block is None:
            hook = partial(after, path=path)
            handles.append(model.get_submodule(path).register_forward_hook(hook, with_kwargs=True))
        else:
            block.watching = {**(block.watching or {}), name: partial(on_layer, path)}
            handles.append(_Watch(block))
    return handles


def _graph_run(model: nn.Module, path: str) -> tuple[BlockModule | None, str]:
    """Return the block that runs a layer by its graph, and the layer's path in it; None where the layer
    runs as a module.
    """
    module, names = model, path.split(".")
    for k, name in enumerate(names):
        if isinstance(module, BlockModule) and name != "map":
            return module, ".".join(names[k:])
        module = module.get_submodule(name)
    return None, path


def run_with_streams(
    model: nn.Module, chains: Sequence[Chain], batch: Batch
) -> tuple[Any, list[list[Tensor]]]:
    """Return the output of a model that is not rewritten, and each chain's streams h_0 .. h_L.

    Raises:
        ModelError: as `observe`; a block did not run.
    """
    seen = observe(model, chains, batch)
    for chain, found in zip(chains, seen.streams, strict=True):
        missing = next((b for b, block in enumerate(chain.blocks) if b + 1 not in found), None)
        if missing is not None:
            raise ModelError(_other_ways(chain.blocks[missing].path, "did not run", batch))
    return seen.output, [[found[j] for j in range(len(found))] for found in seen.streams]


def _other_ways(path: str, what: str, batch: Batch) -> str:
    return (
        f"the block {path} {what} on a batch of {len(batch)} samples: the forward pass takes other "
        "ways for other data. Pass data that takes one way, or a network without such branches"
    )


def _hook_blocks(
    model: nn.Module, chains: Sequence[Chain], keep: Callable[[int, int, Tensor], None]
) -> list[RemovableHandle]:
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
    return handles


def _run_graph(
    model: fx.GraphModule,
    chains: Sequence[Chain],
    batch: Batch,
    keep: Callable[[int, int, Tensor], None],
    watched: Mapping[str, Callable[[Any, Any], None]],
) -> Any:
    """Run a GraphModule.

    Args:
        watched: by the name of a weight, what is called with its layer's input and output.
    """
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
            # An exported program multiplies weights outside of their modules.
            for node in n.all_input_nodes if n.op == "call_function" else ():
                if node.op == "get_attr" and str(node.target) in watched:
                    watched[str(node.target)](self.env[n.all_input_nodes[0]], result)
            return result

    return Reader(model).run(*graph_arguments(model, batch))


def as_rows(
    stream: Tensor, axis: int, mask: Tensor | None = None, taken: Tensor | None = None
) -> Tensor:
    """Return the positions of a stream as rows (N * positions, d).

    Args:
        mask: (N, positions), true at the positions to keep, among those taken.
        taken: indices of the positions that are taken; all by default.
    """
    rows = stream.movedim(axis, -1)
    if taken is not None:
        rows = rows.flatten(1, -2).index_select(1, taken.to(rows.device))
    if mask is not None:
        return rows[mask]
    return rows.reshape(-1, rows.shape[-1])


def attention_mask(batch: Batch, chain: Chain) -> Tensor | None:
    """Return the padding mask of a text batch, true at real tokens: (N, T), or (T, N) where the stream
    counts samples second; None where there is none.

    A decoder that has an input of its own has a mask of its own.
    """
    mask = batch.padding(decoder="decoder" in chain.blocks[0].path)
    return mask if mask is None or chain.sample_axis != 1 else mask.T
