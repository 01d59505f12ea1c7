"""Comparison of a compressed network with its original: cost, fidelity and latency as a report."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from rba_compress.core.batch import Batch
from rba_compress.core.config import Budget, Config
from rba_compress.core.cost import Cost
from rba_compress.core.distributed import current
from rba_compress.core.inference import evaluating, ran, unwrap
from rba_compress.core.loader import Split, read, workers_named
from rba_compress.core.loader_form import form_of
from rba_compress.core.plan import Plan
from rba_compress.graph.tracer import record
from rba_compress.planning.plan_cost import network_cost
from rba_compress.profiling.cost import cache_bytes, cost
from rba_compress.profiling.criterion import require_criterion
from rba_compress.profiling.fidelity import (
    Criterion,
    Fidelity,
    Function,
    Metric,
    OutputScales,
    fidelity,
)
from rba_compress.profiling.latency import Latency, benchmark
from rba_compress.profiling.profiler import Profile, without_moments
from rba_compress.reporting.changed_samples import MostChanged
from rba_compress.reporting.report import Report

HELD_OUT = "held out of the loader"


@workers_named()
@torch.inference_mode(False)
def compare(
    original: nn.Module,
    compressed: nn.Module,
    loader: Iterable[Any],
    *,
    divergence: Function | None = None,
    metrics: Mapping[str, Metric] | None = None,
) -> Report:
    """Measure a compressed network against its original on every sample of a loader.

    Args:
        original, compressed: two networks that take the same batches, such as a network and what `load`
            returned; neither is changed.
        loader: batches as for `compress`; with labels, accuracy is reported before and after.
        divergence: a user-defined divergence of the output, as in `profile`.
        metrics: metrics of the task by name, as in `profile`.

    Returns:
        Cost, fidelity with 95 % intervals, and paired latency on the loader's first batch.

    Raises:
        LoaderError: as `compress`.
        ModelError: a forward pass fails, or the outputs hold nothing that can be compared, or are of
            other shapes.
        ActivationError: the output of the original, or a metric of it, holds NaN or infinity.
    """
    original, compressed = unwrap(original), unwrap(compressed)
    split = Split(loader, 0)
    example = split.first(form_of(original))
    batches = read(loader, split.form)
    criterion, notes = criterion_on(original, example, batches, divergence=divergence, metrics=metrics)
    seen = without_moments(original, split, example, criterion, notes=notes)
    report = measured(
        original, compressed, read(loader, split.form), seen, Plan(), samples="the loader"
    )
    said = f"beside a {type(compressed).__name__}, as given"
    return report.model_copy(update={"plan": said, "forward_passes": None})


def criterion_on(
    model: nn.Module,
    example: Batch,
    batches: Iterable[Batch],
    *,
    divergence: Function | None = None,
    metrics: Mapping[str, Metric] | None = None,
) -> tuple[Criterion, tuple[str, ...]]:
    """Return the divergence and metrics of a network's output, scaled on batches, and the notes.

    Raises:
        LoaderError, ModelError: as `compare`.
    """
    recording = record(model, example.select([*range(min(2, len(example)))]).to(model))
    criterion, notes = require_criterion(
        model, recording, Config(), example.labels, function=divergence, metrics=metrics
    )
    scales = OutputScales(criterion)
    if any(output.divergence == "nse" for output in criterion.outputs):
        with evaluating(model):
            for batch in batches:
                moved = batch.to(model)
                scales.update(ran(model, moved), moved)
    return scales.merged(), notes


def measured(
    original: nn.Module,
    compressed: nn.Module,
    batches: Iterable[Batch],
    seen: Profile,
    plan: Plan,
    *,
    samples: str,
    seconds: float = 0.5,
) -> Report:
    """Measure a compressed network against the original: fidelity on `batches`, which `samples` names,
    cost and latency, for about `seconds`, on the first batch that was profiled.
    """
    watch = MostChanged(original)
    found = fidelity(original, compressed, batches, seen.criterion, watch)
    timed = Latency(
        **current().broadcast(
            lambda: benchmark(original, compressed, seen.example, seconds=seconds).model_dump()
        )
    )
    return Report(
        model=seen.model,
        plan=str(plan),
        samples=samples,
        original=seen.original,
        compressed=cost(compressed, seen.example),
        cache_original=cache_bytes(original, seen.example),
        cache_compressed=cache_bytes(compressed, seen.example),
        fidelity=found,
        latency=timed,
        forward_passes=plan.forward_passes,
        notes=(*seen.notes, *plan.notes, *_without_accuracy(found, seen)),
        warnings=(*seen.warnings, *_unsure(found), *_missed(plan.budget, found, timed)),
        changed=watch.found(),
    )


def _without_accuracy(found: Fidelity, seen: Profile) -> list[str]:
    """Return why labels that are there gave no accuracy, unless metrics took their place."""
    if seen.example.labels is None or found.accuracy_original is not None or found.metrics:
        return []
    return [
        "accuracy was not measured: the labels are no class of each sample. Pass what the task "
        'measures as metrics={"name": function(outputs, batch) -> (N,)}'
    ]


def _unsure(found: Fidelity) -> list[str]:
    if found.divergence_low is not None:
        return []
    return [f"no interval can be given on {found.samples} held-out samples: pass 20 samples or more"]


def _missed(budget: Budget | None, found: Fidelity, timed: Latency) -> list[str]:
    """Return the limits that held on the validation samples, or in earlier timing, but not here."""
    if budget is None:
        return []
    missed = budget.broken(found.divergence, found.agreement, found.accuracy_drop, found.metric_drops)
    limit = budget.latency
    if limit is not None and (timed.ratio if limit <= 1 else timed.compressed_ms) > limit:
        missed.append(f"latency <= {limit:g} (it is {timed.ratio:.3f}, {timed.compressed_ms:.4g} ms)")
    return [f"on these samples it does not hold that {text}" for text in missed]


def unmeasured(seen: Profile, plan: Plan) -> Report:
    """Return a report of a plan's cost alone."""
    nan = math.nan
    return Report(
        model=seen.model,
        plan=str(plan),
        samples=HELD_OUT,
        original=seen.original,
        compressed=Cost(**{k: getattr(network_cost(seen, plan), k) for k in ("macs", "params")}),
        fidelity=Fidelity(
            samples=0,
            kind=seen.criterion.kind,
            divergence=nan,
            agreement=None,
            cosine=nan,
            accuracy_original=None,
            accuracy_compressed=None,
        ),
        latency=Latency(
            original_ms=nan,
            compressed_ms=nan,
            ratio=nan,
            ratio_low=nan,
            ratio_high=nan,
            pairs=0,
            batch=len(seen.example),
            device="",
        ),
        forward_passes=plan.forward_passes,
        notes=(*seen.notes, *plan.notes),
        warnings=seen.warnings,
    )
