"""Export of a network in float, compared with the network on several batch sizes and timed."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import JsonValue
from torch import nn

from rba_compress.artifacts.certificate import (
    SIZES,
    TOLERANCES,
    Certificate,
    Format,
    InRuntime,
    Runtime,
    Timed,
    compared,
    flat,
    open_file,
    open_in,
)
from rba_compress.artifacts.onnx_file import (
    dtype_of,
    input_names,
    onnx_weight,
    output_names,
    run_checked,
    traced_program,
    write_file,
)
from rba_compress.artifacts.reference_io import Probe
from rba_compress.artifacts.shared_weights import SharedWeights
from rba_compress.core.batch import Batch
from rba_compress.core.errors import ExportError
from rba_compress.core.inference import unwrap
from rba_compress.core.loader_form import batch_of
from rba_compress.core.offload import in_memory
from rba_compress.graph.rewrite import copy_model
from rba_compress.profiling.fidelity import Metric
from rba_compress.profiling.latency import benchmark
from rba_compress.reporting.report_data import versions

PACKAGES: dict[Format, tuple[str, ...]] = {"onnx": ("onnx", "onnxruntime", "onnxscript"), "pt2": ()}
TIMED = (1, 32)
"""Batch sizes at which a file is timed."""


@dataclass(frozen=True)
class Job:
    """Settings of an export, as in `export_onnx`."""

    kind: Format
    example: Any
    dynamic: bool
    tolerance: float | None
    seconds: float
    int8: Int8Settings | None = None
    runtimes: tuple[Runtime, ...] = ()
    """Runtimes beside ONNX Runtime."""


@dataclass(frozen=True)
class Int8Settings:
    """Settings of an int8 file, as in `export_onnx`."""

    bound: float | None
    metrics: dict[str, Metric]


def certify(
    job: Job,
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
    dtype = dtype_of(network)
    allowed = TOLERANCES[dtype] if job.tolerance is None else job.tolerance
    names = input_names(network, batch), output_names(run_checked(network, batch))
    half = _half(network, batch) if job.dynamic else None
    batches = _sized(batch, half) if job.dynamic else [batch]
    for each in batches if job.dynamic else ():
        run_checked(network, each, hint=": batches of any size are asked of it, see dynamic=False")
    trace = partial(traced_program, batch=batches[-1], dynamic=job.dynamic, sequences=half is not None)
    compressed, runner = write_file(kind, network, names, target, trace, shared=shared)
    parity = tuple(compared(network, runner, each, allowed, target.name) for each in batches)
    other, latency, twin = None, None, None
    with tempfile.TemporaryDirectory() as aside:
        if isinstance(original, Path):
            twin, other = original, onnx_weight(original)
        elif original is not None:
            device = next(network.parameters()).device
            original = in_memory(copy_model(unwrap(original))).to(device, dtype)
            twin = Path(aside) / f"original{target.suffix}"
            other, _ = write_file(kind, original, names, twin, trace)
        if twin is not None:
            latency = benchmark(open_file(kind, twin), runner, flat(batch), seconds=job.seconds)
        runtimes = []
        for name in job.runtimes:
            opened, said = open_in(name, target), f"{target.name} in {name}"
            apart = tuple(compared(network, opened, each, allowed, said) for each in batches)
            timed = tuple(timings(job, name, opened, {"original": twin} if twin else {}, batch))
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
        versions=versions() | {name: version(name) for name in PACKAGES[kind]},
    )


def timings(
    job: Job, runtime: Runtime, runner: nn.Module, others: Mapping[Any, Path], example: Batch
) -> Iterator[Timed]:
    """Yield paired latencies of a file and others in a runtime, at the batch sizes that it takes."""
    sizes = TIMED if job.dynamic else (len(example),)
    for size in sizes:
        batch = flat(example.select([k % len(example) for k in range(size)]))
        for name, path in others.items():
            latency = benchmark(open_in(runtime, path), runner, batch, seconds=job.seconds / len(sizes))
            yield Timed(batch=size, against=name, latency=latency)


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
        run_checked(network, batch.cut(half))
    except ExportError:
        return None
    return half


def _preprocessing(network: nn.Module) -> dict[str, JsonValue] | None:
    if not isinstance(getattr(network, "pretrained_cfg", None), Mapping):
        return None
    from timm.data import resolve_data_config

    found = resolve_data_config({}, model=network)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items()}
