"""ONNX and `torch.export` files, each with a certificate of its parity with the network.

A file is written to a temporary directory, checked, run against the network on several batch sizes, and
moved to its target if every check holds; `certificate.json` beside it records the measurements.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from rba_compress.artifacts.artifact import WEIGHTS, load, read_manifest
from rba_compress.artifacts.certificate import (
    CERTIFICATES,
    OF_LEVEL,
    Certificate,
    Format,
    Runtime,
    certificates,
    read_certificate,
)
from rba_compress.artifacts.certification import Int8Settings, Job, certify
from rba_compress.artifacts.int8_export import Int8Export
from rba_compress.artifacts.levels import Levels
from rba_compress.artifacts.levels import load as load_levels
from rba_compress.artifacts.onnx_file import dtype_of
from rba_compress.artifacts.shared_weights import SharedWeights
from rba_compress.core.errors import ExportError
from rba_compress.core.inference import unwrap
from rba_compress.core.io import require_vacant, sealed, sha256, written_beside, written_whole
from rba_compress.core.offload import in_memory
from rba_compress.profiling.fidelity import Metric


def export_onnx(
    model: nn.Module | str | Path,
    path: str | Path,
    example: Any,
    *,
    original: nn.Module | None = None,
    dynamic: bool = True,
    tolerance: float | None = None,
    seconds: float = 2.0,
    runtimes: Sequence[Runtime] = ("onnxruntime",),
    quantize: Literal["int8"] | None = None,
    bound: float | None = None,
    metrics: Mapping[str, Metric] | None = None,
) -> Certificate:
    """Write a network as ONNX, with `certificate.json` beside it, or neither.

    Args:
        model: a network in any mode, or the directory of an artefact that `load` reads alone.
        path: the file to write; neither the file nor a certificate of another file may exist there.
        example: a batch of real inputs in any form that a loader may yield, on which the file is
            compared; the more samples, the more is compared. With `quantize` a loader of batches, which
            is split as in `compress`: activations are calibrated on fit samples, the operations that
            stay in float are chosen on validation samples, and test samples are reported on.
        original: the network to compare cost and latency with, and an int8 file's outputs; by default,
            for an artefact whose architecture is known, the original with random weights.
        dynamic: allow batches of any size, and sequences of any length for inputs (N, T) of integers.
        tolerance: the largest difference of outputs, relative to the largest absolute value of the
            output; by default 1e-4 in float32, 1e-2 in float16, 1e-9 in float64.
        seconds: the duration of timing in ONNX Runtime.
        runtimes: runtimes to compare and time the file in: "onnxruntime", always, and "openvino".
        quantize: "int8" for static quantisation in QDQ form (see `artifacts.int8`).
        bound: the largest mean divergence of an int8 file from the network in float on the validation
            samples; by default `int8.BOUNDS`.
        metrics: metrics of the task by name, as in `profile`, for the certificate of an int8 file.

    Raises:
        ExportError: the example does not run, the network has an operation that ONNX lacks, ONNX
            Runtime cannot run the file, or its outputs differ; for int8 there are too few samples, the
            network is not in float32, or the bound holds for no operation; nothing is left at `path`.
        LoaderError: an int8 file's samples cannot be read.
        ArtifactError, WeightsError: the directory holds no artefact that loads.
    """
    # Long: each parameter is a choice of its own, and most calls give none.
    others = _others(runtimes)
    if quantize not in (None, "int8"):
        raise ExportError(f'quantize={quantize!r} is not known: pass "int8", or leave it out')
    int8 = None if quantize is None else Int8Settings(bound, dict(metrics or {}))
    job = Job("onnx", example, dynamic, tolerance, seconds, int8, others)
    return _export(job, model, path, original)


def _others(runtimes: Sequence[str]) -> tuple[Runtime, ...]:
    """Return the runtimes beside ONNX Runtime.

    Raises:
        ExportError: one is not known, or not installed.
    """
    known: tuple[Runtime, ...] = get_args(Runtime)
    unknown = [name for name in runtimes if name not in known]
    if unknown:
        raise ExportError(f"no runtime is called {unknown[0]!r}: there are {', '.join(known)}")
    others = tuple(name for name in known[1:] if name in runtimes)
    for name in others:
        if importlib.util.find_spec(name) is None:
            raise ExportError(f"{name} is not installed: pip install 'rba-compress[{name}]'")
    return others


def export_pt2(
    model: nn.Module | str | Path,
    path: str | Path,
    example: Any,
    *,
    dynamic: bool = True,
    tolerance: float | None = None,
) -> Certificate:
    """Write a network as `torch.export` does, with the checks of `export_onnx`.

    Raises:
        ExportError, ArtifactError, WeightsError: as `export_onnx`.
    """
    return _export(Job("pt2", example, dynamic, tolerance, 0.0), model, path)


@torch.inference_mode(False)
def export_onnx_levels(
    model: Levels | str | Path,
    directory: str | Path,
    example: Any,
    *,
    dynamic: bool = True,
    tolerance: float | None = None,
    seconds: float = 2.0,
) -> tuple[Certificate, ...]:
    """Write every level of a network as an ONNX file of its own; the files share their weights.

        level-00.onnx, level-01.onnx, ...   the original network, and its compressed forms
        level-00.certificate.json, ...      the certificate of each
        weights.bin                         weights to which all of them refer

    Args:
        model: what `load` returned of a directory with levels, or that directory.
        directory: must not exist, or be empty; it is written whole or not at all.
        example, dynamic, tolerance, seconds: as in `export_onnx`.

    Raises:
        ExportError: as `export_onnx`; or the network has no levels.
        ArtifactError: the directory is taken or cannot be written.
    """
    target = Path(directory).absolute()
    require_vacant(target)
    levels = model if isinstance(model, nn.Module) else load_levels(model)
    if not isinstance(levels, Levels):
        raise ExportError(f"{model} has no levels: export it with export_onnx")
    job = Job("onnx", example, dynamic, tolerance, seconds)
    with written_whole(target) as folder:
        shared = SharedWeights(folder / "weights.bin")
        for k, network in enumerate(levels.networks):
            file = folder / f"level-{k:02}.onnx"
            original = folder / "level-00.onnx" if k else None
            found = certify(job, network, original, file, None, shared=shared)
            _write_certificate(found, (file, shared.path), file.with_suffix(OF_LEVEL))
    return tuple(certificates(target))


@torch.inference_mode(False)
def _export(
    job: Job, model: nn.Module | str | Path, path: str | Path, original: nn.Module | None = None
) -> Certificate:
    kind: Format = job.kind if job.int8 is None else "int8"
    target = Path(path).absolute()
    _require_free(target, kind)
    given = original is not None
    network, original, weights = _opened(job.kind, model, original)
    with written_beside(target) as folder:
        certified = partial(certify, job) if job.int8 is None else Int8Export(job, given).certified
        found = certified(network, original, folder / target.name, weights)
        files = [path for path in sorted(folder.iterdir()) if path.is_file()]
        _write_certificate(found, files, folder / CERTIFICATES[kind])
        return read_certificate(folder, kind)


def _write_certificate(found: Certificate, files: Sequence[Path], target: Path) -> None:
    """Write a certificate with the hashes of the files that it is of."""
    digests = {path.name: sha256(path) for path in files}
    content = found.model_copy(update={"sha256": digests}).model_dump_json(indent=2)
    target.write_bytes(sealed(content + "\n"))


def _opened(
    kind: Format, model: nn.Module | str | Path, original: nn.Module | None
) -> tuple[nn.Module, nn.Module | None, str | None]:
    """Return the network in memory, the original if it is known, and the hash of saved weights.

    Raises:
        ExportError: the network is in a precision that the format's runtime does not run.
    """
    weights = None
    if not isinstance(model, nn.Module):
        root = Path(model)
        manifest = read_manifest(root)
        weights = manifest.sha256[WEIGHTS]
        if kind == "onnx" and original is None and manifest.architecture is not None:
            original = manifest.architecture.build()
        model = load(root)
    network = in_memory(unwrap(model), device="cpu")
    if dtype_of(network) is torch.bfloat16 and kind == "onnx":
        raise ExportError(
            "the network is in bfloat16, which ONNX Runtime does not run on a CPU: export it in "
            "float32 or float16"
        )
    return network, original, weights


def _require_free(target: Path, kind: Format) -> None:
    certificate = target.parent / CERTIFICATES[kind]
    if target.exists() or target.is_symlink():
        raise ExportError(f"{target} exists: name a new file, or remove it first")
    if certificate.exists() and (target.parent / _named(certificate)).is_file():
        raise ExportError(f"{certificate} is that of {_named(certificate)}: name another directory")


def _named(certificate: Path) -> str:
    """Return the name of the file that a certificate is of."""
    try:
        return str(json.loads(certificate.read_bytes())["file"])
    except (OSError, ValueError, KeyError, TypeError):
        return certificate.name
