"""ONNX and `torch.export` files, each with a certificate of its parity with the network.

A file is written to a temporary directory, checked, run against the network on several batch sizes, and
moved to its target if every check holds; `certificate.json` beside it records the measurements.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from pydantic import JsonValue
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rba_compress.artifacts.artifact import WEIGHTS, load, read_manifest
from rba_compress.artifacts.certificate import (
    CERTIFICATES,
    OF_LEVEL,
    SIZES,
    TOLERANCES,
    Certificate,
    Format,
    InRuntime,
    Quantized,
    Runtime,
    Timed,
    Weight,
    certificates,
    compared,
    flat,
    leaves,
    open_file,
    open_in,
    read_certificate,
    require_valid,
)
from rba_compress.artifacts.int8 import BOUNDS, AsNetwork, Chosen, Int8File, quantised
from rba_compress.artifacts.levels import Levels
from rba_compress.artifacts.levels import load as load_levels
from rba_compress.artifacts.reference_io import Probe
from rba_compress.artifacts.shared_weights import SharedWeights
from rba_compress.core.batch import Batch
from rba_compress.core.errors import ExportError
from rba_compress.core.inference import evaluating, unwrap
from rba_compress.core.io import require_vacant, sealed, sha256, written_beside, written_whole
from rba_compress.core.loader import Part, Split
from rba_compress.core.loader_form import batch_of, form_of
from rba_compress.core.offload import in_memory
from rba_compress.graph.rewrite import copy_model
from rba_compress.profiling.fidelity import Criterion, Metric, fidelity
from rba_compress.profiling.latency import benchmark
from rba_compress.reporting.comparison import criterion_on
from rba_compress.reporting.report_data import versions

_PACKAGES: dict[Format, tuple[str, ...]] = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "pt2": ()}
FEWEST = 16
"""Samples that the activations of an int8 file are calibrated on at least."""
TIMED = (1, 32)
"""Batch sizes at which an int8 file is timed."""
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
    int8 = None if quantize is None else _Int8(bound, dict(metrics or {}))
    job = _Job("onnx", example, dynamic, tolerance, seconds, int8, others)
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
    return _export(_Job("pt2", example, dynamic, tolerance, 0.0), model, path)


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
    job = _Job("onnx", example, dynamic, tolerance, seconds)
    with written_whole(target) as folder:
        shared = SharedWeights(folder / "weights.bin")
        for k, network in enumerate(levels.networks):
            file = folder / f"level-{k:02}.onnx"
            original = folder / "level-00.onnx" if k else None
            found = _certified(job, network, original, file, None, shared=shared)
            _write_certificate(found, (file, shared.path), file.with_suffix(OF_LEVEL))
    return tuple(certificates(target))


@dataclass(frozen=True)
class _Job:
    """Settings of an export, as in `export_onnx`."""

    kind: Format
    example: Any
    dynamic: bool
    tolerance: float | None
    seconds: float
    int8: _Int8 | None = None
    runtimes: tuple[Runtime, ...] = ()
    """Runtimes beside ONNX Runtime."""


@dataclass(frozen=True)
class _Int8:
    """Settings of an int8 file, as in `export_onnx`."""

    bound: float | None
    metrics: dict[str, Metric]


@torch.inference_mode(False)
def _export(
    job: _Job, model: nn.Module | str | Path, path: str | Path, original: nn.Module | None = None
) -> Certificate:
    kind: Format = job.kind if job.int8 is None else "int8"
    target = Path(path).absolute()
    _require_free(target, kind)
    given = original is not None
    network, original, weights = _opened(job.kind, model, original)
    with written_beside(target) as folder:
        certified = partial(_certified, job) if job.int8 is None else _Int8Export(job, given).certified
        found = certified(network, original, folder / target.name, weights)
        files = [path for path in sorted(folder.iterdir()) if path.is_file()]
        _write_certificate(found, files, folder / CERTIFICATES[kind])
        return read_certificate(folder, kind)


def _write_certificate(found: Certificate, files: Sequence[Path], target: Path) -> None:
    """Write a certificate with the hashes of the files that it is of."""
    digests = {path.name: sha256(path) for path in files}
    content = found.model_copy(update={"sha256": digests}).model_dump_json(indent=2)
    target.write_bytes(sealed(content + "\n"))


def _certified(
    job: _Job,
    network: nn.Module,
    original: nn.Module | Path | None,
    target: Path,
    weights: str | None,
    *,
    shared: SharedWeights | None = None,
) -> Certificate:
    """Write a network to a file, and compare the file with it.

    Args:
        original: the original network, or its ONNX file.

    Returns:
        The certificate, still without hashes.
    """
    kind = job.kind
    batch = batch_of(network, job.example).to(network)
    dtype = _dtype(network)
    allowed = TOLERANCES[dtype] if job.tolerance is None else job.tolerance
    names = _input_names(network, batch), _output_names(_run(network, batch))
    half = _half(network, batch) if job.dynamic else None
    batches = _sized(batch, half) if job.dynamic else [batch]
    for each in batches if job.dynamic else ():
        _run(network, each, hint=": batches of any size are asked of it, see dynamic=False")
    trace = partial(_traced, batch=batches[-1], dynamic=job.dynamic, sequences=half is not None)
    compressed, runner = _written(kind, network, names, target, trace, shared=shared)
    parity = tuple(compared(network, runner, each, allowed, target.name) for each in batches)
    other, latency, twin = None, None, None
    with tempfile.TemporaryDirectory() as aside:
        if isinstance(original, Path):
            twin, other = original, _onnx_weight(original)
        elif original is not None:
            device = next(network.parameters()).device
            original = in_memory(copy_model(unwrap(original))).to(device, dtype)
            twin = Path(aside) / f"original{target.suffix}"
            other, _ = _written(kind, original, names, twin, trace)
        if twin is not None:
            latency = benchmark(open_file(kind, twin), runner, flat(batch), seconds=job.seconds)
        runtimes = []
        for name in job.runtimes:
            opened, said = open_in(name, target), f"{target.name} in {name}"
            apart = tuple(compared(network, opened, each, allowed, said) for each in batches)
            timed = tuple(_timed(job, name, opened, {"original": twin} if twin else {}, batch))
            runtimes.append(InRuntime(name=name, version=version(name), parity=apart, timed=timed))
    return Certificate(
        format=kind,
        file=target.name,
        sha256={},
        weights=weights,
        model=type(network).__name__,
        dtype=str(dtype).removeprefix("torch."),
        dynamic=job.dynamic,
        sequences=half is not None,
        input_names=tuple(names[0]),
        output_names=tuple(names[1]),
        probe=Probe.of(batch),
        preprocessing=_preprocessing(network),
        tolerance=allowed,
        parity=parity,
        compressed=compressed,
        original=other,
        latency=latency,
        runtimes=tuple(runtimes),
        versions=versions() | {name: version(name) for name in _PACKAGES[kind]},
    )


def _timed(
    job: _Job, runtime: Runtime, runner: nn.Module, others: Mapping[Any, Path], example: Batch
) -> Iterator[Timed]:
    """Yield paired latencies of a file and others in a runtime, at the batch sizes that it takes."""
    sizes = TIMED if job.dynamic else (len(example),)
    for size in sizes:
        batch = flat(example.select([k % len(example) for k in range(size)]))
        for name, path in others.items():
            latency = benchmark(open_in(runtime, path), runner, batch, seconds=job.seconds / len(sizes))
            yield Timed(batch=size, against=name, latency=latency)


class _Int8Export:
    """Export of a network in int8: in float first, then quantised, compared and timed.

    Args:
        given: True where the original has its own weights, so that outputs can be compared with it.
    """

    def __init__(self, job: _Job, given: bool) -> None:
        self._job, self._given = job, given
        assert job.int8 is not None
        self._how = job.int8
        self._parts: dict[Part, list[Batch]] = {}

    def certified(
        self, network: nn.Module, original: nn.Module | None, target: Path, weights: str | None
    ) -> Certificate:
        """Write the int8 file of a network; return its certificate, as `_certified`."""
        if _dtype(network) is not torch.float32:
            kind = str(_dtype(network)).removeprefix("torch.")
            raise ExportError(f"int8 is made of a network in float32, and this one is in {kind}")
        example = self._dealt(network)
        samples = {part: sum(map(len, batches)) for part, batches in self._parts.items()}
        own = replace(self._job, example=example, seconds=0.0, runtimes=())
        with tempfile.TemporaryDirectory() as aside:
            float_file, twin = Path(aside) / "float.onnx", Path(aside) / "original.onnx"
            found = _certified(own, network, None, float_file, weights)
            criterion, made = self._quantised(network, example, float_file, target)
            runner = open_file("onnx", target)
            test = self._parts["test"]
            output = _run(network, example.to(network))
            file, twins = AsNetwork(runner, output), dict[Any, Path]()
            quantized = Quantized(
                bound=self._bound(criterion),
                reached=made.divergence,
                calibrated=samples["fit"],
                chosen=samples["validation"],
                operations=made.operations,
                floats=made.floats,
                biases=made.biases,
                fidelity=fidelity(network, file, test, criterion),
                float_bytes=found.compressed.bytes,
            )
            if original is not None:
                original = in_memory(copy_model(unwrap(original)), device="cpu")
                if self._given:
                    compared_with = fidelity(original, file, test, criterion)
                    quantized = quantized.model_copy(update={"to_original": compared_with})
                other = _certified(own, original, None, twin, None)
                twins = {"original": twin} | self._rival(original, example, twin)
                timed = tuple(_timed(self._job, "onnxruntime", runner, twins, example))
                rival = twins.get("original in int8")
                update = {"original_int8": rival and _onnx_weight(rival), "timed": timed}
                quantized = quantized.model_copy(update=update)
                latency = next(t.latency for t in reversed(timed) if t.against == "original")
                found = found.model_copy(update={"original": other.compressed, "latency": latency})
            runtimes = []
            for name in self._job.runtimes:
                opened = open_in(name, target)
                file = AsNetwork(opened, output)
                own_fidelity = fidelity(network, file, test, criterion)
                timed = tuple(_timed(self._job, name, opened, twins, example))
                runtimes.append(
                    InRuntime(name=name, version=version(name), fidelity=own_fidelity, timed=timed)
                )
        found = found.model_copy(update={"runtimes": tuple(runtimes)})
        return self._compared(found, network, runner, target, quantized)

    def _dealt(self, network: nn.Module) -> Batch:
        """Deal the samples to fit, validation and test; return the first batch.

        Raises:
            ExportError: they are too few.
        """
        split = Split(self._job.example, 0)
        example = split.first(form_of(network))
        self._parts = {part: [] for part in ("fit", "validation", "test")}
        for part, _, batch in split.deal(*self._parts):
            self._parts[part].append(batch)
        fit = sum(map(len, self._parts["fit"]))
        if fit < FEWEST:
            raise ExportError(
                f"{fit} samples are too few to calibrate int8 on: half of the loader's are taken, pass "
                f"{2 * FEWEST} or more"
            )
        return example

    def _rival(self, original: nn.Module, example: Batch, file: Path) -> dict[Any, Path]:
        """Return the original's int8 file under the same bound; none where it cannot be held.

        A network with random weights is quantised whole, for its latency alone.
        """
        target = file.with_name("original-int8.onnx")
        try:
            self._quantised(original, example, file, target, bounded=self._given)
        except ExportError:
            return {}
        return {"original in int8": target}

    def _bound(self, criterion: Criterion) -> float:
        return BOUNDS.get(criterion.kind, 0.0) if self._how.bound is None else self._how.bound

    def _quantised(
        self,
        network: nn.Module,
        example: Batch,
        file: Path,
        target: Path,
        *,
        bounded: bool = True,
    ) -> tuple[Criterion, Int8File]:
        fit, choose = self._parts["fit"], self._parts["validation"]
        criterion, _ = criterion_on(network, example, choose, metrics=self._how.metrics)
        bound = self._bound(criterion) if bounded else math.inf
        chosen = Chosen(criterion, choose, bound, ("onnxruntime", *self._job.runtimes))
        return criterion, quantised(file, network, chosen, fit, target)

    def _compared(
        self,
        found: Certificate,
        network: nn.Module,
        runner: nn.Module,
        target: Path,
        quantized: Quantized,
    ) -> Certificate:
        """Return the certificate with the int8 file's distance on inputs like the example's.

        Two machines round differently: twice the distance that is measured here is allowed.
        """
        assert found.probe is not None
        sizes = SIZES if found.dynamic else (found.parity[0].batch,)
        draws = found.probe.draws(sizes, sequences=found.sequences)
        parity = tuple(compared(network, runner, each, math.inf, target.name) for each in draws)
        update = {
            "format": "int8",
            "file": target.name,
            "compressed": _onnx_weight(target),
            "parity": parity,
            "tolerance": 2 * max(each.max_rel for each in parity),
            "quantized": quantized,
        }
        return found.model_copy(update=update)


def _written(
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
    if _dtype(network) is torch.bfloat16 and kind == "onnx":
        raise ExportError(
            "the network is in bfloat16, which ONNX Runtime does not run on a CPU: export it in "
            "float32 or float16"
        )
    return network, original, weights


def _dtype(network: nn.Module) -> torch.dtype:
    return next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)


def _sized(batch: Batch, half: int | None) -> list[Batch]:
    """Return the example's samples in batches of several sizes; the second has sequences of `half`."""
    n = len(batch)
    sizes = (*SIZES[:-1], max(SIZES[-1], n))
    found = [batch.select([(row + k) % n for row in range(size)]) for k, size in enumerate(sizes)]
    if half is not None:
        found[1] = found[1].cut(half)
    return found


def _half(network: nn.Module, batch: Batch) -> int | None:
    """Return half the sequence length if the network accepts it; columns of codes have one length."""
    if batch.length is None or batch.length < 4:
        return None
    half = batch.length // 2
    try:
        _run(network, batch.cut(half))
    except ExportError:
        return None
    return half


def _run(network: nn.Module, batch: Batch, hint: str = "") -> Any:
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


def _traced(
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
    return _onnx_weight(file)


def _onnx_weight(file: Path) -> Weight:
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


def _input_names(network: nn.Module, batch: Batch) -> list[str]:
    """Return the names of a batch's inputs: the first parameters of forward, then the keywords."""
    parameters = list(inspect.signature(network.forward).parameters)
    return [*parameters[: len(batch.args)], *(k for k in batch.kwargs if k in batch.tensors)]


def _output_names(output: Any) -> list[str]:
    if isinstance(output, Mapping):
        keys = [key for key, value in output.items() for _ in leaves(value)]
    else:
        keys = ["output" for _ in leaves(output)]
    return [key if keys.count(key) == 1 else f"{key}_{k}" for k, key in enumerate(keys)]


def _preprocessing(network: nn.Module) -> dict[str, JsonValue] | None:
    if not isinstance(getattr(network, "pretrained_cfg", None), Mapping):
        return None
    from timm.data import resolve_data_config

    found = resolve_data_config({}, model=network)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}
