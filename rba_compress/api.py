"""Pipeline: profile, search and splice a network, and measure the result."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from rba_compress.artifacts.architecture import Architecture, architecture_of
from rba_compress.artifacts.artifact import (
    fitted_tensors,
    load,
    read_manifest,
    read_report,
    write_artifact,
)
from rba_compress.artifacts.levels import write_levels
from rba_compress.artifacts.pareto_front import Point
from rba_compress.core.batch import Batch, as_batch
from rba_compress.core.config import Budget, Config, Healing
from rba_compress.core.distributed import current
from rba_compress.core.errors import ArtifactError, FidelityError, PlanError
from rba_compress.core.inference import unwrap
from rba_compress.core.loader import Dealt, Split, workers_named
from rba_compress.core.loader_form import form_of
from rba_compress.core.offload import device_of, undispatched
from rba_compress.core.plan import ComparedOutput, Healed, Plan
from rba_compress.graph.rewrite import copy_model, replace_parameters
from rba_compress.graph.tracer import record
from rba_compress.healing.loop import distil
from rba_compress.healing.student import require_shapes
from rba_compress.planning.by_hand import ByHand, Spans, replaced
from rba_compress.planning.search import DEFAULT_BUDGET, searched
from rba_compress.planning.span_fits import paper_span
from rba_compress.planning.state import Solution
from rba_compress.profiling.criterion import criterion_of
from rba_compress.profiling.drift import ReferenceStatistics, Shift
from rba_compress.profiling.fidelity import Criterion, Function, Metric, fidelity
from rba_compress.profiling.profiler import Profile, fingerprint, profiled, without_moments
from rba_compress.reporting.comparison import HELD_OUT, measured, unmeasured
from rba_compress.reporting.report import Report, divergence_name
from rba_compress.reporting.report_data import Details, Summary
from rba_compress.units.offers import discover
from rba_compress.units.splice import splice, splice_shared

BOUNDS = {"kl": 0.5, "bernoulli": 0.5, "nse": 0.5, "cosine": 0.25}
"""Largest mean divergence of an output on held-out samples that a network may have if no budget was
given: half a nat of probabilities, half the variance of the output, 41 degrees."""


@dataclass(frozen=True, eq=False)
class Result:
    """Compressed network of the original's class, with its plan, report and profile."""

    model: nn.Module
    plan: Plan
    report: Report
    tensors: dict[str, Tensor]
    """Fitted tensors of the plan's maps, by their key in the compressed state dict."""
    profile: Profile
    front: tuple[Point, ...] = ()
    """Network of every step of the search; `front[k].splice(model)` builds one."""
    reference: ReferenceStatistics | None = None
    """Reference statistics for `check`; None for a result that was opened again."""

    def save(
        self,
        directory: str | Path,
        *,
        architecture: Architecture | None = None,
        delta: bool = False,
        fold: bool = False,
        hub: bool = False,
    ) -> None:
        """Save the result, as `rba_compress.save(result, directory)`."""
        save(self, directory, architecture=architecture, delta=delta, fold=fold, hub=hub)

    def save_levels(
        self,
        directory: str | Path,
        *,
        original: nn.Module,
        points: Sequence[Point] | None = None,
        architecture: Architecture | None = None,
    ) -> None:
        """Write the original network and points of the front to a new directory, with one set of
        weights; `load` returns a module with `set_level`. Of several ranks the first one writes.

        Args:
            directory: must not exist, or be empty; it is written whole or not at all.
            original: the network that was compressed.
            points: the levels, in any order; by default the whole front.
            architecture: as in `save`.

        Raises:
            ArtifactError: there is no point, or the directory is taken or cannot be written.
            PlanError: the points are of another network than `original`.
            WeightsError: `architecture` does not build this network.
        """
        if current().leads:
            levels = self.front if points is None else points
            write_levels(levels, unwrap(original), self.profile, directory, architecture=architecture)

    def check(self, batch: Any) -> Shift:
        """Return the drift of a batch from the calibration data, and warn if the batch has shifted.

        Args:
            batch: in any form that a loader may yield. Pass ten samples or more, mixed as they will be
                in use: one class alone is another distribution, too.

        Returns:
            The distance, and the threshold that one in a hundred batches of held-out samples exceeds.

        Raises:
            LoaderError: `batch` is not a batch.
            ModelError: the network does not take the batch.
            ArtifactError: the result was opened from a directory, which holds no moments, or the
                network's streams have no separate rows for each sample.
        """
        if self.reference is None:
            raise ArtifactError(
                "a result that was opened from a directory has no moments to compare with: check with "
                "the one that `compress` returned. Nor has one whose streams have no rows of their own "
                "for each sample"
            )
        found = self.reference.shift(self.model, as_batch(batch, self.profile.form))
        if found.shifted:
            warnings.warn(f"{found}: what the report says may not hold for them", stacklevel=2)
        return found

    def with_report(self, report: Report) -> Result:
        """Return the same result with another report, such as one on a test set."""
        kept = {
            "details": report.details or self.report.details,
            "plan": str(self.plan),
            "forward_passes": self.plan.forward_passes,
        }
        return replace(self, report=report.model_copy(update=kept))

    def __repr__(self) -> str:
        return f"Result({self.report.line})"

    def __str__(self) -> str:
        return self.report.table()

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


@workers_named()
@torch.inference_mode(False)
def compress(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    budget: Budget | None = None,
    config: Config | None = None,
    spans: Spans | None = None,
    divergence: Function | None = None,
    metrics: Mapping[str, Metric] | None = None,
    checkpoint: str | Path | None = None,
) -> Result:
    """Rewrite `model` into a cheaper network of the same class, without training.

    Args:
        model: any `nn.Module` or `fx.GraphModule`, in any mode, on any device; not changed.
            DataParallel, DistributedDataParallel and `torch.compile` wrappers are taken off. Where
            accelerate has dispatched a module over devices or to disk, so is the result: kept blocks
            keep their hooks, maps and re-solved layers lie in memory where the block ran, and the rest
            of a thinned block is loaded as it runs.
        loader: an iterable of batches that can be read more than once: tensors, tuples of the model's
            inputs by position, the last item integer labels or targets of the output's shape, or dicts
            of keywords with labels under `labels`; the report's first line says how items were read.
            Of ten samples, five are fit samples, four validation samples and one is a test sample.
            Several processes (`accelerate launch`) are each given the whole loader and read their share
            of it.
        budget: what the compressed network may cost; by default three quarters of the MACs.
        config: the settings of the search.
        spans: spans (start, stop) of blocks `start..stop-1` to replace by hand: exactly these, without
            a search and with every position computed, by the map in `config.maps`; of several maps by
            the one whose output diverges least on the validation samples. `{"layer3": [(1, 3)]}` names
            the chain where there are several.
        divergence: a user-defined divergence of the output, as in `profile`.
        metrics: metrics of the task by name, as in `profile`: reported before and after, and limited by
            `Budget(metric_drop={name: 0.01})`.
        checkpoint: a file that is written twice a minute while the search runs, and removed at the end;
            `<checkpoint>.profile` is the same for the profile. If a file exists at the start, the work
            resumes from it, with the same result as without an interruption.

    Raises:
        RBAError: one of its subclasses, before anything is changed: `LoaderError`, `ModelError`,
            `NoChainError`, `ActivationError`, `BudgetError`, `ConfigError`, `MemoryLimitError`; and
            `FidelityError` where no budget was given and the best network is further than `BOUNDS`;
            `PlanError` where the network does not have the spans.
    """
    # Long: each parameter is a choice of its own, and most calls give two or three.
    budget, original = Budget.of(budget), unwrap(model)
    hand = ByHand.given(spans, budget)
    if hand is not None:
        config = hand.config(Config.of(config) or Config())
    seen = profiled(
        original,
        loader,
        config=config,
        divergence=divergence,
        metrics=metrics,
        checkpoint=None if checkpoint is None else f"{checkpoint}.profile",
        require=None if hand is None else hand.require,
    )
    dealt = list(seen.split(loader).deal("fit", "validation", "test"))
    test = [batch for part, _, batch in dealt if part == "test"]
    # Held-out samples that cannot be compared raise an error here, before the search.
    fidelity(original, original, test, seen.criterion)
    in_place = undispatched(original)
    if hand is None:
        found = searched(in_place, seen, dealt, budget, checkpoint)
    else:
        found = replaced(in_place, seen, dealt, hand)
    return _result(original, seen, found, dealt, asked=(budget, hand) != (None, None))


def _result(
    original: nn.Module, seen: Profile, found: Solution, dealt: Sequence[Dealt], *, asked: bool
) -> Result:
    """Splice a solution and measure it on the test samples.

    Args:
        asked: True if its cost was asked for, however far it is from the original.
    """
    test = [batch for part, _, batch in dealt if part == "test"]
    compressed = splice(original, found.plan, found.tensors, traces=seen.traces)
    steps = _Steps()
    front = steps.run(
        "the front", lambda: measure_front(original, seen, found, test, samples=HELD_OUT), ()
    )
    bare = unmeasured(seen, found.plan)
    report = (
        front[-1].report
        if front
        else steps.run(
            "the report",
            lambda: measured(original, compressed, test, seen, found.plan, samples=HELD_OUT),
            bare,
        )
    )
    # Where the exact read-out alone met the budget, there was no step.
    drawn = [point.report.summary for point in front] or [report.summary]
    drawn += steps.run("the paper's map at this cost", lambda: _rival(original, seen, report, test), [])
    details = steps.run(
        "the details of the report",
        lambda: Details.of(
            seen,
            found.plan,
            drawn,
            front_samples=HELD_OUT,
            options=_options(architecture_of(original)),
        ),
        None,
    )
    if report is not bare:
        _require_near(report, seen.criterion.outputs, asked=asked)
    reference = steps.run(
        "the statistics of `check`", lambda: _reference(compressed, found.plan, seen, dealt), None
    )
    warned = (*report.warnings, *steps.failed)
    report = report.model_copy(update={"details": details, "warnings": warned})
    return Result(compressed, found.plan, report, found.tensors, seen, front, reference)


class _Steps:
    """Runner of the steps after a search: a failed step adds a warning and keeps the search's result.

    Several processes must fail together, so that there an error ends all of them.
    """

    def __init__(self) -> None:
        self.failed: list[str] = []

    def run(self, what: str, step: Callable[[], Any], otherwise: Any) -> Any:
        """Return the result of a step, or `otherwise` if it fails."""
        try:
            return step()
        except Exception as error:
            if current().count > 1:
                raise
            self.failed.append(f"{what} could not be computed: {type(error).__name__}: {error}")
            return otherwise


def _rival(original: nn.Module, seen: Profile, report: Report, test: Sequence[Batch]) -> list[Summary]:
    """Measure the paper's choice at the cost of a report, if there is one."""
    rival = paper_span(seen, report.compressed.macs)
    if rival is None:
        return []
    network = splice_shared(original, rival.plan, rival.tensors)
    found = measured(original, network, test, seen, rival.plan, samples=HELD_OUT, seconds=0)
    return [found.summary.model_copy(update={"method": "paper"})]


def _reference(
    compressed: nn.Module, plan: Plan, seen: Profile, dealt: Iterable[Dealt]
) -> ReferenceStatistics | None:
    """Return the reference statistics of held-out samples inside the compressed network."""
    held = (batch for part, _, batch in dealt if part != "fit")
    return ReferenceStatistics.of(compressed, plan, seen.chains, held)


def _require_near(report: Report, compared: Sequence[ComparedOutput], *, asked: bool) -> None:
    """Require a network that is near the original, unless its cost was asked for.

    Raises:
        FidelityError: the output is not finite, or without a budget further away than `BOUNDS`.
    """
    found = report.fidelity
    if not found.samples:
        return
    if not math.isfinite(found.divergence):
        raise FidelityError("the compressed network's output holds NaN or infinity on held-out samples")
    kinds = {output.name: output.divergence for output in compared} or {"": found.kind}
    means = found.outputs or {"": found.divergence}
    bounds = {name: BOUNDS.get(kinds.get(name, found.kind), math.inf) for name in means}
    far = next((name for name, mean in means.items() if mean > bounds[name]), None)
    if asked or far is None:
        return
    low, high = found.divergence_low, found.divergence_high
    interval = "" if low is None or high is None else f" (95 % interval {low:.3g} to {high:.3g})"
    where = f" in its output {far!r}" if len(means) > 1 else ""
    raise FidelityError(
        f"the best network found within {DEFAULT_BUDGET!r} has a {divergence_name(found)} of "
        f"{means[far]:.3g}{where}{interval} on {found.samples} held-out samples, above "
        f"{bounds[far]:g}, which is as far as goes unasked. Pass more samples, a budget of quality "
        "such as Budget(divergence=0.1), or the budget that you accept this for"
    )


def _options(architecture: Architecture | None) -> str:
    """Return the options of a shell command, or an empty string if none can build the network."""
    if architecture is None or architecture.library != "timm":
        return ""
    classes = architecture.arguments.get("num_classes")
    if architecture.arguments.keys() - {"num_classes"} or not classes:
        return ""
    return f"--model {architecture.name} --num-classes {classes}"


@overload
def heal(
    compressed: Result,
    loader: Iterable[Any],
    *,
    original: nn.Module,
    healing: Healing | None = None,
    checkpoint: str | Path | None = None,
) -> Result: ...
@overload
def heal(
    compressed: nn.Module,
    loader: Iterable[Any],
    *,
    original: nn.Module,
    healing: Healing | None = None,
    checkpoint: str | Path | None = None,
) -> nn.Module: ...
@workers_named()
@torch.inference_mode(False)
def heal(
    compressed: Result | nn.Module,
    loader: Iterable[Any],
    *,
    original: nn.Module,
    healing: Healing | None = None,
    checkpoint: str | Path | None = None,
) -> Result | nn.Module:
    """Train a compressed network towards its original for some minutes, on the original's own outputs.

    Args:
        compressed: what `compress` returned, or a compressed network alone; not changed.
        loader: batches as for `compress`; labels are read only where `healing.labels` asks for them.
            Seven samples of ten are trained on, two are held out to choose the best state, and one is
            left for the report. Several processes are each given the whole loader.
        original: the network that the compressed one was made from; not changed.
        healing: the settings of the training; by default ten epochs.
        checkpoint: a file that is written twice a minute, and removed at the end. If the file exists at
            the start, training resumes from it, with the same result as without an interruption.

    Returns:
        A result whose plan records the healing, or a network if a network was given. It is never worse
        on the held-out samples than before: if training did not help, the network is unchanged, and the
        report of a result says so (for a network, a warning).

    Raises:
        PlanError: the compressed network was not made from this original.
        ModelError: there is nothing to train, or weights are of low precision or offloaded.
        LoaderError: there are too few samples to hold any out, or requested labels are missing.
        ArtifactError: the checkpoint cannot be written, or is of another training.
        RankError: one of several processes ended.
    """
    healing, original = Healing.of(healing) or Healing(), unwrap(original)
    path = None if checkpoint is None else Path(checkpoint)
    if not isinstance(compressed, Result):
        network = unwrap(compressed)
        require_shapes(original, network)
        split = Split(loader, healing.seed)
        example = split.first(form_of(original))
        recording = record(original, example.to(original))
        criterion, _, _ = criterion_of(original, recording, Config(), example.labels)
        chains = discover(original, example)[0].chains if healing.features else ()
        course = distil(original, network, split, criterion, healing, chains=chains, checkpoint=path)
        if course.note:
            warnings.warn(course.note, stacklevel=2)
        healed = copy_model(network)
        replace_parameters(healed, course.weights)
        return healed
    seen = compressed.profile
    if fingerprint(original) != seen.weights:
        raise PlanError(
            f"the compressed network was made from another {seen.model}: pass its own original"
        )
    split, chains = seen.split(loader), tuple(p.chain for p in seen.chains)
    split.first(form_of(original))  # labels may come that were not there before
    if healing.features and not chains:  # of a result that was opened again
        chains = discover(original, seen.example)[0].chains
    course = distil(
        original,
        compressed.model,
        split,
        seen.criterion,
        healing,
        chains=chains,
        checkpoint=path,
    )
    model, plan, tensors = compressed.model, compressed.plan, compressed.tensors
    if course.healed is not None:
        healed_plan = plan.model_copy(update={"healed": _after(plan.healed, course.healed)})
        plan, tensors = healed_plan, {**tensors, **course.weights}
        model = copy_model(model)
        replace_parameters(model, course.weights)
    report = measured(original, model, split.part("test"), seen, plan, samples=HELD_OUT)
    details = compressed.report.details
    if details is not None and course.healed is not None:
        healed_row = report.summary.model_copy(update={"method": "healed"})
        details = details.model_copy(update={"front": (*details.front, healed_row)})
    notes = (*report.warnings, *filter(None, [course.note]))
    report = report.model_copy(update={"details": details, "warnings": notes})
    held = seen.split(loader).deal("validation", "test")
    reference = compressed.reference and _reference(model, plan, seen, held)
    return replace(
        compressed, model=model, plan=plan, tensors=tensors, report=report, reference=reference
    )


def _after(first: Healed | None, second: Healed) -> Healed:
    """Return the record of a network that was healed, perhaps for a second time."""
    if first is None:
        return second
    return second.model_copy(update={"keys": tuple(sorted({*first.keys, *second.keys}))})


@workers_named()
def reopen(directory: str | Path, loader: Iterable[Any], *, original: nn.Module) -> Result:
    """Return a saved result, to heal it: without its profile's moments and its front.

    Args:
        directory: the directory that `save` wrote.
        loader: batches as for `compress`.
        original: the network that the compressed one was made from.

    Raises:
        ArtifactError: as `load`; or the artefact is folded, or was compared by a function.
        PlanError: the artefact was made from another network.
        LoaderError: as `compress`.
    """
    manifest, original = read_manifest(Path(directory)), unwrap(original)
    if manifest.folded:
        raise ArtifactError(f"{directory} is folded: heal the result before it is saved with fold=True")
    kind = manifest.plan.divergence
    if kind == "given":
        raise ArtifactError(f"{directory} was compared by a function of one's own: heal the result")
    weights = fingerprint(original)
    if weights != manifest.original_weights:
        raise PlanError(f"{directory} was made from another {manifest.model}: pass its own original")
    compressed = load(directory, original=original).to(device_of(original))
    plan, how = manifest.plan, manifest.plan.config
    split = Split(loader, how.seed, stretch=how.stretch)
    example = split.first(form_of(original))
    criterion = Criterion(kind, None, plan.outputs)
    seen = without_moments(original, split, example, criterion, config=how, refusals=plan.refusals)
    report = read_report(Path(directory)) or measured(
        original, compressed, seen.split(loader).part("test"), seen, plan, samples=HELD_OUT
    )
    return Result(compressed, plan, report, fitted_tensors(plan, compressed.state_dict()), seen)


def measure_front(
    original: nn.Module, seen: Profile, found: Solution, batches: Sequence[Batch], *, samples: str
) -> tuple[Point, ...]:
    """Compare the network of every step of a search with the original, as `compare`."""
    points = []
    for solution in current().bar(found.points, "front", unit="point"):
        compressed = splice_shared(original, solution.plan, solution.tensors, seen.traces)
        # The steps before the last are timed for less: at least seven pairs.
        seconds = 0.5 if solution is found.points[-1] else 0.05
        report = measured(
            original, compressed, batches, seen, solution.plan, samples=samples, seconds=seconds
        )
        points.append(Point(solution.plan, report, solution.tensors))
    return tuple(points)


def save(
    result: Result,
    directory: str | Path,
    *,
    architecture: Architecture | None = None,
    delta: bool = False,
    fold: bool = False,
    hub: bool = False,
) -> None:
    """Write a result to a new directory; `load` reads the network back, bit-equal. Of several ranks the
    first one writes.

    Args:
        result: what `compress` returned.
        directory: must not exist, or be empty; it is written whole or not at all.
        architecture: the architecture of the original network; by default the one that the model
            states. If that does not build exactly this network, `load` asks for `original=`.
        delta: write the fitted tensors alone; `load(dir, original=...)` takes the original network.
        fold: write a stock network with fewer blocks, for plans of identities and folded maps alone:
            timm or transformers load its weights without this package.
        hub: write config.json and a model card beside it, to upload with `huggingface_hub`.

    Raises:
        ArtifactError: `result` is no result; the directory is taken or cannot be written; `delta` was
            combined with `fold` or `hub`.
        PlanError: the plan cannot be folded; search with `Config(stock=True)`.
        WeightsError: `architecture` does not build this network.
    """
    if not isinstance(result, Result):
        raise ArtifactError(
            f"save takes what compress returned, not a {type(result).__name__}: "
            "compress(model, loader, spans=[(3, 6)]) replaces blocks that you choose, and what it "
            "returns can be saved, reported and exported"
        )
    if not current().leads:
        return
    write_artifact(
        result.model,
        result.plan,
        directory,
        example=result.profile.example,
        original_weights=result.profile.weights,
        report=result.report,
        architecture=architecture,
        delta=delta,
        fold=fold,
        hub=hub,
    )
