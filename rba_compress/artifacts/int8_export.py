"""Export of a network in int8: in float first, then quantised, compared and timed."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rba_compress.artifacts.certificate import (
    SIZES,
    Certificate,
    InRuntime,
    Quantized,
    compared,
    open_file,
    open_in,
)
from rba_compress.artifacts.certification import Job, certify, timings
from rba_compress.artifacts.int8 import BOUNDS, AsNetwork, Chosen, Int8File, quantised
from rba_compress.artifacts.onnx_file import dtype_of, onnx_weight, run_checked
from rba_compress.core.batch import Batch
from rba_compress.core.errors import ExportError
from rba_compress.core.inference import unwrap
from rba_compress.core.loader import Part, Split
from rba_compress.core.loader_form import form_of
from rba_compress.core.offload import in_memory
from rba_compress.graph.rewrite import copy_model
from rba_compress.profiling.fidelity import Criterion, fidelity
from rba_compress.reporting.comparison import criterion_on

FEWEST = 16
"""Samples that the activations of an int8 file are calibrated on at least."""


class Int8Export:
    """Export of a network in int8: in float first, then quantised, compared and timed.

    Args:
        given: True where the original has its own weights, so that outputs can be compared with it.
    """

    def __init__(self, job: Job, given: bool) -> None:
        self._job, self._given = job, given
        assert job.int8 is not None
        self._how = job.int8
        self._parts: dict[Part, list[Batch]] = {}

    def certified(
        self, network: nn.Module, original: nn.Module | None, target: Path, weights: str | None
    ) -> Certificate:
        """Write the int8 file of a network; return its certificate, as `certify`."""
        if dtype_of(network) is not torch.float32:
            kind = str(dtype_of(network)).removeprefix("torch.")
            raise ExportError(f"int8 is made of a network in float32, and this one is in {kind}")
        example = self._dealt(network)
        samples = {part: sum(map(len, batches)) for part, batches in self._parts.items()}
        own = replace(self._job, example=example, seconds=0.0, runtimes=())
        with tempfile.TemporaryDirectory() as aside:
            float_file, twin = Path(aside) / "float.onnx", Path(aside) / "original.onnx"
            found = certify(own, network, None, float_file, weights)
            criterion, made = self._quantised(network, example, float_file, target)
            runner = open_file("onnx", target)
            test = self._parts["test"]
            output = run_checked(network, example.to(network))
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
                other = certify(own, original, None, twin, None)
                twins = {"original": twin} | self._rival(original, example, twin)
                timed = tuple(timings(self._job, "onnxruntime", runner, twins, example))
                rival = twins.get("original in int8")
                update = {"original_int8": rival and onnx_weight(rival), "timed": timed}
                quantized = quantized.model_copy(update=update)
                latency = next(t.latency for t in reversed(timed) if t.against == "original")
                found = found.model_copy(update={"original": other.compressed, "latency": latency})
            runtimes = []
            for name in self._job.runtimes:
                opened = open_in(name, target)
                file = AsNetwork(opened, output)
                own_fidelity = fidelity(network, file, test, criterion)
                timed = tuple(timings(self._job, name, opened, twins, example))
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
            "compressed": onnx_weight(target),
            "parity": parity,
            "tolerance": 2 * max(each.max_rel for each in parity),
            "quantized": quantized,
        }
        return found.model_copy(update=update)
