"""Certificates: measurements of an exported file against the network that it was exported from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import JsonValue
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rba_compress.artifacts.reference_io import Probe
from rba_compress.core.batch import Batch
from rba_compress.core.errors import ExportError
from rba_compress.core.inference import evaluating
from rba_compress.core.io import Sealed, read_sealed
from rba_compress.core.schema import Frozen
from rba_compress.profiling.fidelity import Fidelity, gap
from rba_compress.profiling.latency import Latency

SCHEMA = 1
Format = Literal["onnx", "pt2", "int8"]
"""Formats; "int8" is an ONNX file whose layers are quantised."""
Runtime = Literal["onnxruntime", "openvino"]
CERTIFICATES: dict[Format, str] = {
    "onnx": "certificate.json",
    "pt2": "certificate.pt2.json",
    "int8": "certificate.int8.json",
}
OF_LEVEL = ".certificate.json"
"""End of the name of a level's certificate, behind that of its file without suffix."""
SIZES = (1, 3, 8)
"""Batch sizes to compare on; the last one is larger where the example is."""
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference allowed, relative to the largest absolute value of the outputs."""


class Parity(Frozen):
    """Difference between a file's outputs and the network's on one batch."""

    batch: int
    max_abs: float
    max_rel: float
    """Difference over the largest absolute value of that output; the largest of all outputs."""
    argmax_agreement: float | None
    """Share of equal argmax along the last axis of the first output; None if the axis has one entry."""


class Weight(Frozen):
    """Size of a file."""

    bytes: int
    """Total size of its parts."""
    nodes: int
    """Number of operations of its graph."""
    opset: int | None


class Timed(Frozen):
    """Paired latency of a file and another one, the original network's, at a batch size."""

    batch: int
    against: Literal["original", "original in int8"]
    latency: Latency


class InRuntime(Frozen):
    """A file in a further runtime, beside ONNX Runtime."""

    name: Runtime
    version: str
    parity: tuple[Parity, ...] = ()
    """Difference from the network in float; empty for a file in int8."""
    fidelity: Fidelity | None = None
    """Fidelity of an int8 file to the network in float, on the test samples; None for a float file."""
    timed: tuple[Timed, ...] = ()
    """Paired latency against the original network's file in the same runtime."""


class Quantized(Frozen):
    """Int8 file: what was quantised, and how far it is from the networks in float."""

    bound: float
    """Largest mean divergence from the network in float, on the samples that were chosen on."""
    reached: float
    """Divergence that was reached on them."""
    calibrated: int
    """Number of samples that activations were calibrated on."""
    chosen: int
    """Number of samples that the operations in float were chosen on."""
    operations: int
    """Number of operations in int8."""
    floats: dict[str, float]
    """Operations that stayed in float for the bound, with the divergence that each costs in int8."""
    biases: int
    """Number of biases that were corrected; 0 where that did not help."""
    fidelity: Fidelity
    """Fidelity to the network in float, on samples that nothing was calibrated or chosen on."""
    to_original: Fidelity | None = None
    """Fidelity to the original in float, on the same samples; None if it was not given."""
    float_bytes: int
    """Size of the file in float."""
    original_int8: Weight | None = None
    """Size of the original in int8."""
    timed: tuple[Timed, ...] = ()

    def __str__(self) -> str:
        kept = f", {len(self.floats)} in float" if self.floats else ""
        said = [f"{self.operations} operations in int8{kept}"]
        for name, found in (("the model in float", self.fidelity), ("the original", self.to_original)):
            if found is not None:
                said.append(f"{found.kind} {found.divergence:.2g} from {name}")
        best = self.fidelity if self.to_original is None else self.to_original
        if best.accuracy_original is not None and best.accuracy_compressed is not None:
            said.append(f"accuracy {best.accuracy_original:.3f} to {best.accuracy_compressed:.3f}")
        if best.agreement is not None:
            said.append(f"agreement {best.agreement:.3f}")
        said += [
            f"latency {t.latency.ratio:.3f} of the {t.against} at batch {t.batch}" for t in self.timed
        ]
        return "; ".join(said)

    __repr__ = __str__


class Certificate(Sealed):
    """Content of certificate.json: the exported file, and its measured parity with the network."""

    former: ClassVar[Mapping[str, str]] = {"dense": "original", "slim": "compressed"}

    schema_version: int = SCHEMA
    format: Format
    file: str
    sha256: dict[str, str]
    """Hashes of the file, and of external weights beside it."""
    weights: str | None
    """SHA-256 of the artefact's weights that it was exported from."""
    model: str
    """Class of the network."""
    dtype: str
    dynamic: bool
    """True if batches of any size may be run."""
    sequences: bool
    """True if inputs (N, T) of integers may have any length T."""
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    probe: Probe | None
    """Statistics of the inputs that it was exported with; no sample of them is kept."""
    preprocessing: dict[str, JsonValue] | None
    """Settings of timm: input_size, mean, std, interpolation, crop_pct, crop_mode."""
    tolerance: float
    """Largest max_rel that is allowed."""
    parity: tuple[Parity, ...]
    compressed: Weight
    original: Weight | None
    """Size of the original network, exported in the same way; None if it was not available."""
    latency: Latency | None
    """Paired latency of both in ONNX Runtime; None if the original network was not available."""
    runtimes: tuple[InRuntime, ...] = ()
    """The file in further runtimes."""
    quantized: Quantized | None = None
    """Measurements of an int8 file, whose `parity` is to the network in float; None for others."""
    versions: dict[str, str]

    def __repr__(self) -> str:
        worst = max((p.max_rel for p in self.parity), default=0.0)
        speed = f", {self.latency.ratio:.3f} of the original's latency" if self.latency else ""
        size = f"{self.compressed.bytes:,} bytes"
        if self.quantized is not None:
            return f"Certificate({self.file}: {size}, {self.quantized})"
        return f"Certificate({self.file}: {size}, {worst:.1e} from PyTorch at the most{speed})"

    __str__ = __repr__


class OpenVinoModel(nn.Module):
    """ONNX file in OpenVINO on the CPU, in float32, from tensors in the file's order to all outputs."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        import openvino

        # Without the hint, OpenVINO computes in bfloat16 where the processor has it.
        how = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        self.compiled = openvino.Core().compile_model(str(path), "CPU", how)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        found = self.compiled([t.numpy() for t in tensors])
        return tuple(torch.from_numpy(found[k].copy()) for k in range(len(self.compiled.outputs)))


class OnnxModel(nn.Module):
    """ONNX file in ONNX Runtime on the CPU, from tensors in the file's order to all outputs."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Spinning threads of one session would slow down the next session that is timed.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.names = [given.name for given in self.session.get_inputs()]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = {n: t.numpy() for n, t in zip(self.names, tensors, strict=True)}
        return tuple(torch.from_numpy(found) for found in self.session.run(None, given))


def read_certificate(directory: Path, kind: Format = "onnx") -> Certificate:
    """Return the certificate of a directory.

    Raises:
        ArtifactError: it is missing, of a newer schema, not a certificate, or not as it was written.
    """
    return read_sealed(directory / CERTIFICATES[kind], Certificate, newest=SCHEMA)


def certificates(directory: Path) -> list[Certificate]:
    """Return all certificates of a directory: of its one file in a format, and of each level.

    Raises:
        ArtifactError: one is of a newer schema, not a certificate, or not as it was written.
    """
    names = [*CERTIFICATES.values(), *sorted(p.name for p in directory.glob(f"*{OF_LEVEL}"))]
    paths = [directory / name for name in names if (directory / name).exists()]
    return [read_sealed(path, Certificate, newest=SCHEMA) for path in paths]


def compared(
    network: nn.Module, runner: nn.Module, batch: Batch, tolerance: float, name: str
) -> Parity:
    """Return the difference between a file's outputs and the network's on one batch.

    Raises:
        ExportError: the file does not run, or its outputs differ by more than `tolerance`.
    """
    moved = batch.to(network)
    with evaluating(network):
        wanted = leaves(moved.run(network))
    try:
        with torch.no_grad():
            found = leaves(flat(moved).run(runner))
    except Exception as error:
        raise ExportError(f"{name} does not run on a batch of {len(batch)}: {error}") from error
    shapes = [[tuple(t.shape) for t in each] for each in (wanted, found)]
    if shapes[0] != shapes[1]:
        raise ExportError(f"{name} gives outputs of shapes {shapes[1]}, the network of {shapes[0]}")
    furthest, relative = 0.0, 0.0
    for a, b in zip(wanted, found, strict=True):
        apart, share = gap(a, b)
        if not share <= tolerance:  # NaN fails, too
            raise ExportError(
                f"{name} is {apart:.3g} from the network's outputs on a batch of {len(batch)}, "
                f"{share:.3g} of the largest, allowed are {tolerance:.3g}: see whether the "
                "network runs other code in export, or allow more by tolerance="
            )
        furthest, relative = max(furthest, apart), max(relative, share)
    first, second = wanted[0].detach().cpu(), found[0]
    classes = first.ndim > 1 and first.shape[-1] > 1
    agreed = float((first.argmax(-1) == second.argmax(-1)).double().mean()) if classes else None
    return Parity(batch=len(batch), max_abs=furthest, max_rel=relative, argmax_agreement=agreed)


def open_file(kind: Format, file: Path) -> nn.Module:
    """Return a file as a module from tensors to tensors.

    Raises:
        ExportError: the file cannot be read.
    """
    try:
        if kind != "pt2":
            return OnnxModel(file)
        module: nn.Module = torch.export.load(file).module()
    except Exception as error:
        raise ExportError(f"{file.name} cannot be opened: {error}") from error
    return module


def open_in(runtime: Runtime, file: Path) -> nn.Module:
    """Return an ONNX file in a runtime as a module from tensors to tensors.

    Raises:
        ExportError: the runtime is not installed, or does not run the file.
    """
    if runtime == "onnxruntime":
        return open_file("onnx", file)
    try:
        return OpenVinoModel(file)
    except ImportError as error:
        raise ExportError(f"{error}: pip install 'rba-compress[openvino]'") from error
    except Exception as error:
        raise ExportError(f"OpenVINO cannot open {file.name}: {error}") from error


def require_valid(file: Path) -> None:
    """Require a file that onnx.checker accepts.

    Raises:
        ExportError: onnx.checker refuses the file.
    """
    import onnx

    try:
        onnx.checker.check_model(str(file), full_check=True)
    except Exception as error:
        raise ExportError(f"onnx.checker refuses {file.name}: {error}") from error


def leaves(output: Any) -> tuple[Tensor, ...]:
    """Return the tensors of a network's output, in order."""
    return tuple(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))


def flat(batch: Batch) -> Batch:
    """Return the tensors of a batch, in order and on the CPU, as the inputs of a file."""
    return Batch(tuple(tensor.cpu() for tensor in batch.tensors.values()), {}, None)
