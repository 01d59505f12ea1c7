"""Exported files of networks: traced by `torch.export`, and written with named inputs and outputs."""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rba_compress.artifacts.certificate import (
    Format,
    Weight,
    leaves,
    open_file,
    require_valid,
)
from rba_compress.artifacts.shared_weights import SharedWeights
from rba_compress.core.batch import Batch
from rba_compress.core.errors import ExportError
from rba_compress.core.inference import evaluating

EXTERNAL = 1_900_000_000
"""Bytes of weights above which weights go to a file of their own: protobuf ends at 2 GiB."""


class _Flat(nn.Module):
    """Network as a module from the tensors of a batch, in order, to those of its output."""

    def __init__(self, network: nn.Module, batch: Batch) -> None:
        super().__init__()
        self.network = network
        self.places = len(batch.args)
        self.keys = [key for key, value in batch.kwargs.items() if isinstance(value, Tensor)]
        self.constants = {k: v for k, v in batch.kwargs.items() if k not in self.keys}
        self.wrapped = batch.wrapped

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(self.keys, tensors[self.places :], strict=True))
        batch = Batch(tensors[: self.places], {**named, **self.constants}, None, self.wrapped)
        return leaves(batch.run(self.network))


def write_file(
    kind: Format,
    network: nn.Module,
    names: tuple[list[str], list[str]],
    file: Path,
    trace: Callable[[nn.Module], torch.export.ExportedProgram],
    *,
    shared: SharedWeights | None = None,
) -> tuple[Weight, nn.Module]:
    """Export a network to a file; return its weight, and the file opened as a module."""
    # ONNX has attention decomposed. Decomposed from another form than the plain (math) one, attention
    # with a bias has other strides than it was traced with, and views of it fail.
    with sdpa_kernel(SDPBackend.MATH) if kind == "onnx" else nullcontext(), _without_full_masks():
        weight = _write(kind, trace(network), names, file, shared)
    return weight, open_file(kind, file)


@contextmanager
def _without_full_masks() -> Iterator[None]:
    """Let the models of transformers leave out masks that hide nothing, as they do when they are run.

    While torch.export traces them, they make one where none is given. A block that was cut on calls
    without a mask cannot take it.
    """
    masking: Any = sys.modules.get("transformers.masking_utils")
    name = "_ignore_bidirectional_mask_sdpa"
    own = getattr(masking, name, None)
    if own is None:
        yield
        return

    def ignored(padding: Tensor | None, length: int, window: int | None = None) -> bool:
        return own(padding, length, window) or (padding is None and (window is None or length < window))

    setattr(masking, name, ignored)
    try:
        yield
    finally:
        setattr(masking, name, own)


def dtype_of(network: nn.Module) -> torch.dtype:
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


def run_checked(network: nn.Module, batch: Batch, hint: str = "") -> Any:
    """Run the network on a batch.

    Raises:
        ExportError: the network does not run on the batch.
    """
    try:
        with evaluating(network):
            return batch.run(network)
    except Exception as error:
        shapes = {name: tuple(tensor.shape) for name, tensor in batch.tensors.items()}
        raise ExportError(
            f"the {type(network).__name__} does not run on the example ({shapes}){hint}: {error}"
        ) from error


def traced_program(
    network: nn.Module, batch: Batch, *, dynamic: bool, sequences: bool
) -> torch.export.ExportedProgram:
    """Return the network's program, from the tensors of a batch to those of its output."""
    whole, tensors = _Flat(network, batch), tuple(batch.tensors.values())
    shapes: tuple[dict[int, Any], ...] | None = None
    if dynamic:
        # Without a bound torch < 2.8 finds that it may be too long.
        rows = torch.export.Dim("batch", max=2**31)
        long = torch.export.Dim.DYNAMIC  # its bound is the network's
        shapes = tuple(
            ({0: rows} if tensor.ndim and len(tensor) == len(batch) else {})
            | ({1: long} if sequences and batch.is_sequence(tensor) else {})
            for tensor in tensors
        )
    try:
        with warnings.catch_warnings(), evaluating(whole):
            warnings.simplefilter("ignore")  # warnings of torch about its own passes
            return torch.export.export(
                whole, tensors, dynamic_shapes=None if shapes is None else (shapes,), strict=False
            )
    except Exception as error:
        raise ExportError(
            f"torch.export cannot trace the {type(network).__name__}"
            f"{' for batches of any size (try dynamic=False)' if dynamic else ''}: {error}"
        ) from error


def _write(
    kind: Format,
    program: torch.export.ExportedProgram,
    names: tuple[list[str], list[str]],
    file: Path,
    shared: SharedWeights | None,
) -> Weight:
    """Write the file, with named inputs and outputs, and return its size."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "pt2":
            torch.export.save(program, file)
            return Weight(bytes=file.stat().st_size, nodes=len(program.graph.nodes), opset=None)
        return _write_onnx(program, names, file, shared)


def _write_onnx(
    program: torch.export.ExportedProgram,
    names: tuple[list[str], list[str]],
    file: Path,
    shared: SharedWeights | None,
) -> Weight:
    inputs, outputs = names
    try:
        exported = torch.onnx.export(
            program, dynamo=True, input_names=inputs, output_names=outputs, verbose=False
        )
    except Exception as error:
        raise ExportError(_lacking(program, error)) from error
    assert exported is not None
    size = sum(t.numel() * t.element_size() for t in program.state_dict.values())
    exported.save(file, external_data=size > EXTERNAL)
    if shared is not None:
        shared.take(file)
    require_valid(file)
    return onnx_weight(file)


def onnx_weight(file: Path) -> Weight:
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    size = sum(p.stat().st_size for p in file.parent.iterdir() if p.name.startswith(file.name))
    opset = next(each.version for each in model.opset_import if not each.domain)
    return Weight(bytes=size, nodes=len(model.graph.node), opset=opset)


def _lacking(program: torch.export.ExportedProgram, error: Exception) -> str:
    """Return a message on the operation that the exporter lacks, and the module that it comes from."""
    found = re.search(r"op='([\w.:]+)'", str(error))
    if found is None:
        # Keep the summary of the exception, without the advice and the terminal's colours.
        text = re.sub(r"\x1b\[\d+m", "", str(error))
        _, _, summary = text.rpartition("## Exception summary")
        return f"torch.onnx cannot export the network: {summary.strip().splitlines()[0]}"
    name = found[1]
    for node in program.run_decompositions().graph.nodes:
        if str(node.target).startswith(name):
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            path, module = stack[-1] if stack else ("", "")
            path = re.sub(r"^L\['self'\]\.?|^network\.?", "", str(path))
            kind = module if isinstance(module, str) else module.__name__
            return (
                f"ONNX lacks the operation {name} of {path or 'the network'} "
                f"({kind.rpartition('.')[2]}): write it in other operations there"
            )
    return f"ONNX lacks the operation {name}"


def input_names(network: nn.Module, batch: Batch) -> list[str]:
    """Return the names of a batch's inputs: the first parameters of forward, then the keywords."""
    parameters = list(inspect.signature(network.forward).parameters)
    return [*parameters[: len(batch.args)], *(k for k in batch.kwargs if k in batch.tensors)]


def output_names(output: Any) -> list[str]:
    if isinstance(output, Mapping):
        keys = [key for key, value in output.items() for _ in leaves(value)]
    else:
        keys = ["output" for _ in leaves(output)]
    return [key if keys.count(key) == 1 else f"{key}_{k}" for k, key in enumerate(keys)]
