"""Linear layers that a network's outputs come from, and what they lack in a compressed network."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rba_compress.core.batch import Batch
from rba_compress.core.inference import evaluating
from rba_compress.core.outputs import float_outputs
from rba_compress.core.plan import Chain, Divergence
from rba_compress.core.schema import nested
from rba_compress.graph.activations import observe
from rba_compress.linalg.moments import PairMoments, PairSums
from rba_compress.profiling.fidelity import Criterion

LEAST = -12.0
"""Log-probability below which a class counts as impossible, in the original as in the compressed
network: how far below is decided by no sample, and would take most of a squared error.
"""


def output_layers(
    model: nn.Module, chains: Sequence[Chain], criterion: Criterion, batch: Batch
) -> dict[str, Divergence]:
    """Return the linear layers whose output (N, outputs) is compared, by path, and its divergence.

    Left out are layers with tied weights, those that are called more than once, and parts of blocks.
    """
    blocks = [block.path for chain in chains for block in chain.blocks]
    used = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    linear = [
        path
        for path, layer in model.named_modules()
        if type(layer) is nn.Linear
        and not any(nested(path, block) for block in blocks)
        and all(used.count(id(parameter)) == 1 for parameter in layer.parameters())
    ]
    with evaluating(model):
        ((outputs, calls),) = _runs(model, linear, [batch])
    how = {output.name: output.divergence for output in criterion.outputs}
    compared = {
        id(output): how.get(name, criterion.kind)
        for name, output in float_outputs(outputs).items()
        if output.ndim == 2 and len(output) == len(batch) and (name in how or not how)
    }
    once = {path: id(seen[0][1]) for path, seen in calls.items() if len(seen) == 1}
    return {path: compared[output] for path, output in once.items() if output in compared}


def output_gap(
    original: nn.Module,
    compressed: nn.Module,
    path: str,
    batches: Sequence[Batch],
    *,
    divergence: Divergence,
) -> PairMoments:
    """Return the moments of a layer's input in the compressed network, and of what its output lacks.

    Of class scores (divergence kl) the log-probabilities are compared.
    """

    def scores(output: Tensor) -> Tensor:
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        return output.log_softmax(-1).clamp_min(LEAST) if divergence == "kl" else output

    sums = PairSums()
    with evaluating(original), evaluating(compressed):
        runs = (_runs(network, [path], batches) for network in (original, compressed))
        for (_, wanted), (_, found) in zip(*runs, strict=True):
            ((_, y),), ((x, reached),) = wanted[path], found[path]
            sums.add(x, scores(y) - scores(reached))
    moments = sums.moments()
    assert moments is not None
    return moments


def _runs(
    model: nn.Module, layers: Sequence[str], batches: Sequence[Batch]
) -> Iterator[tuple[Any, dict[str, list[tuple[Tensor, Tensor]]]]]:
    """Yield the output of each batch, and the input and output of each call of some layers."""
    for batch in batches:
        calls: dict[str, list[tuple[Tensor, Tensor]]] = {path: [] for path in layers}

        def add(path: str, x: Tensor, y: Tensor, calls: Any = calls) -> None:
            calls[path].append((x, y))

        seen = observe(model, [], batch, layers=layers, on_layer=add)
        yield seen.output, calls
