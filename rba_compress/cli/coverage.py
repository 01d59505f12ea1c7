"""Coverage check: every step tried on one network. One span is replaced, saved, read back and exported.

The check shows whether an architecture is supported at all. Weights and inputs may be random.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rba_compress.artifacts.artifact import load, write_artifact
from rba_compress.artifacts.onnx_export import export_onnx
from rba_compress.cli.catalogue import Network
from rba_compress.core.batch import Batch, as_batch
from rba_compress.core.errors import ExportError
from rba_compress.core.inference import evaluating
from rba_compress.core.map_spec import MapSpec
from rba_compress.core.schema import Frozen
from rba_compress.graph.activations import run_with_streams
from rba_compress.graph.discovery import Support, why_none, with_value
from rba_compress.planning.span_fits import fit_spans
from rba_compress.profiling.profiler import calibrate, fingerprint
from rba_compress.units.offers import discover
from rba_compress.units.splice import splice

SPEC = MapSpec(kind="shrunk", shrink=0.7, damping=1e-4)


class Row(Frozen):
    """Result of one network; None where a step was not reached, or not requested."""

    network: str
    chains: int
    blocks: int
    """Number of blocks in all chains."""
    refusal: str = ""
    """Reason why there is no chain."""
    seconds: float
    """Seconds taken to find the chains."""
    span: str = ""
    """Replacement of a span."""
    shape_kept: bool | None = None
    finite: bool | None = None
    by_hand: bool | None = None
    """True if the compressed network's output is bit-equal to that of the original with the map's value
    put in place of the block's by hand."""
    reloaded: bool | None = None
    """True if the saved network, read back, gives the same outputs bit for bit."""
    onnx: float | None = None
    """Largest difference of ONNX Runtime's outputs, relative to the largest output."""
    onnx_fixed: bool = False
    """True if the file takes the batch's own shape alone, because a dynamic batch size failed."""
    onnx_error: str = ""
    """Reason why there is no ONNX file."""
    dense_onnx_error: str | None = None
    """Reason why the original has no ONNX file either; tried only if the compressed one has none."""

    @property
    def right(self) -> bool:
        """True if no step failed; a refusal, or an export that is refused, is not a failure."""
        return False not in (self.shape_kept, self.finite, self.by_hand, self.reloaded)

    def __str__(self) -> str:
        found = (
            f"{self.network}: {self.chains} chains, {self.blocks} blocks, found in {self.seconds:.1f} s"
        )
        if self.refusal:
            return f"{found}; {self.refusal}"
        said = {None: "not tried", True: "yes", False: "NO"}
        parity = self.onnx_error or ("not tried" if self.onnx is None else f"{self.onnx:.1e} apart")
        parity += ", of this batch size alone" if self.onnx_fixed else ""
        return (
            f"{found}\n{self.span}: output of the same shape {said[self.shape_kept]}, finite "
            f"{said[self.finite]}, as by hand {said[self.by_hand]}\nsaved and read back bit-equal: "
            f"{said[self.reloaded]}\nONNX Runtime: {parity}"
        )


@torch.inference_mode(False)
def tried(network: Network, *, onnx: bool = True) -> tuple[Support, Row]:
    """Build a network and try every step on it.

    Args:
        network: a network of `rba_compress.cli.catalogue.network`.
        onnx: also export the network, which takes most of the time.

    Raises:
        ModelError: the network cannot be built, or its forward pass fails.
    """
    model = network.build()
    batch = as_batch(network.example(model))
    start = time.perf_counter()
    support, _ = discover(model, batch)
    row = Row(
        network=network.name,
        chains=len(support.chains),
        blocks=sum(map(len, support.chains)),
        refusal=why_none(support, model),
        seconds=round(time.perf_counter() - start, 2),
    )
    if not support.chains:
        return support, row
    chain = max(support.chains, key=len)
    (profiled,), _ = calibrate(model, [chain], [(0, batch)], window=1)
    middle = len(chain) // 2
    solution, block = fit_spans(profiled, [(middle, middle + 1)], SPEC), chain.blocks[middle]
    compressed = splice(model, solution.plan, solution.tensors).eval()
    with evaluating(model), evaluating(compressed):
        output, (streams,) = run_with_streams(model, [chain], batch)
        original, found = _tensors(output), _tensors(batch.run(compressed))
        value = compressed.get_submodule(f"{block.path}.map")(streams[middle])
        by_hand = _tensors(with_value(model, block, batch, value))
    result: dict[str, Any] = {
        "span": str(solution.plan.replacements[0]),
        "shape_kept": [t.shape for t in original] == [t.shape for t in found],
        "finite": all(bool(torch.isfinite(t).all()) for t in found),
        "by_hand": _equal(found, by_hand),
    }
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of `load` needing the original, which is expected
        root = Path(temporary)
        manifest = write_artifact(
            compressed,
            solution.plan,
            root / "compressed",
            example=batch,
            original_weights=fingerprint(model),
        )
        again = load(root / "compressed", original=None if manifest.architecture else network.build())
        with evaluating(again):
            result["reloaded"] = _equal(found, _tensors(batch.run(again)))
        if onnx:
            result |= _exported(compressed, model, root, batch)
    return support, row.model_copy(update=result)


def _exported(compressed: nn.Module, original: nn.Module, root: Path, batch: Batch) -> dict[str, Any]:
    example = (*batch.args, batch.kwargs)[0]

    def export(model: nn.Module, dynamic: bool) -> float:
        path = root / f"{id(model)}-{dynamic}" / "model.onnx"
        path.parent.mkdir()
        found = export_onnx(model, path, example, dynamic=dynamic, seconds=0)
        return max(parity.max_rel for parity in found.parity)

    result: dict[str, Any] = {}
    for dynamic in (True, False):
        try:
            return {"onnx": export(compressed, dynamic), "onnx_fixed": not dynamic}
        except ExportError as error:
            result = {"onnx_error": str(error)}
    try:
        export(original, dynamic=False)
    except ExportError as error:
        result["dense_onnx_error"] = str(error)
    return result


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))
