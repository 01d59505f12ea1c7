"""The pipeline: profile, search, splice, and the proof of what came out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rba_compress.architecture import Architecture
from rba_compress.artifact import write_artifact
from rba_compress.batches import Batch
from rba_compress.calibration import Profile, profile
from rba_compress.drafts import Solution
from rba_compress.front import Point
from rba_compress.measure import Fidelity, Function, Latency, benchmark, cost, fidelity
from rba_compress.plan import Budget, Config, Plan
from rba_compress.planner import search
from rba_compress.ranks import current
from rba_compress.recorder import unwrap
from rba_compress.report import Report
from rba_compress.surgery import splice, splice_shared


@dataclass(frozen=True, eq=False)
class Result:
    """A slim network of the original's class, and how it came about."""

    model: nn.Module
    plan: Plan
    report: Report
    tensors: dict[str, Tensor]
    """The fitted tensors of the plan's maps, by their key in the slim state dict."""
    profile: Profile
    front: tuple[Point, ...] = ()
    """The network of every step on the way there; `front[k].splice(model)` builds one."""

    def save(
        self,
        directory: str | Path,
        *,
        architecture: Architecture | None = None,
        delta: bool = False,
        fold: bool = False,
        hub: bool = False,
    ) -> None:
        """As `rba_compress.save(result, directory)`."""
        save(self, directory, architecture=architecture, delta=delta, fold=fold, hub=hub)

    def with_report(self, report: Report) -> Result:
        """The same result with another report, on a test set say."""
        return replace(self, report=report)

    def __repr__(self) -> str:
        return f"Result({self.plan})\n{self.report.table()}"


@torch.inference_mode(False)
def compress(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    budget: Budget | None = None,
    config: Config | None = None,
    divergence: Function | None = None,
) -> Result:
    """Rewrite `model` into a cheaper network of the same class, without training.

    Args:
        model: any `nn.Module` or `fx.GraphModule`, in any mode, on any device; left as it is.
            DataParallel, DistributedDataParallel and `torch.compile` wrappers are taken off. Where
            accelerate has dispatched a module over devices or to disk, the slim one stays so: kept
            blocks keep their hooks, maps and re-solved layers lie in memory where the block ran, and
            what is left of a thinned block is loaded as it runs.
        loader: an iterable of batches that can be read more than once: tensors, tuples whose first
            item is the input and whose second may be integer labels, or dicts of keywords. Five
            samples of ten fit the maps, four choose, one confirms. Several processes (`accelerate
            launch`) are each given the whole loader and read their share of it.
        budget: what the slim network may cost; by default three quarters of the MACs.
        config: how to search.
        divergence: a function of one's own for what the output may not lose, as in `profile`.

    Raises:
        RBAError: one of its subclasses, before anything is changed: `LoaderError`, `ModelError`,
            `NoChainError`, `ActivationError`, `BudgetError`.
    """
    dense = unwrap(model)
    seen = profile(dense, loader, config=config, divergence=divergence)
    found = search(dense, seen, loader, budget=budget)
    confirm = list(seen.split(loader).part("confirm"))
    front = measure_front(dense, seen, found, confirm, samples="held out of the loader")
    slim = splice(dense, found.plan, found.tensors)
    report = (
        front[-1].report
        if front
        else compare(dense, slim, confirm, seen, found.plan, samples="held out of the loader")
    )
    return Result(slim, found.plan, report, found.tensors, seen, front)


def measure_front(
    dense: nn.Module, seen: Profile, found: Solution, batches: Sequence[Batch], *, samples: str
) -> tuple[Point, ...]:
    """Compare the network of every step of a search with the dense one, as `compare`."""
    points = []
    for solution in current().bar(found.points, "front", unit="point"):
        slim = splice_shared(dense, solution.plan, solution.tensors)
        # The steps on the way are timed for less: at least seven pairs.
        seconds = 1.0 if solution is found.points[-1] else 0.2
        report = compare(dense, slim, batches, seen, solution.plan, samples=samples, seconds=seconds)
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
    """Write a result to a new directory; `load` reads it back, bit-equal. Of several ranks the first
    one writes.

    Args:
        result: what `compress` returned.
        directory: must not exist, or be empty; it is written whole or not at all.
        architecture: what builds the dense network. By default what the model tells of itself; where
            that does not build this very network, `load` asks for `model=`.
        delta: write what was fitted alone; `load(dir, base=...)` takes the original network.
        fold: write a stock network with fewer blocks, for plans of identities and folded maps alone:
            timm or transformers load its weights without this package.
        hub: write config.json and a model card beside it, to upload with `huggingface_hub`.

    Raises:
        ArtifactError: the directory is taken or cannot be written; delta, and fold or hub.
        PlanError: the plan cannot be folded; search with `Config(foldable=True)`.
        WeightsError: `architecture` does not build this network.
    """
    if not current().leads:
        return
    write_artifact(
        result.model,
        result.plan,
        directory,
        example=result.profile.example,
        dense_weights=result.profile.weights,
        report=result.report,
        architecture=architecture,
        delta=delta,
        fold=fold,
        hub=hub,
    )


def compare(
    dense: nn.Module,
    slim: nn.Module,
    batches: Iterable[Batch],
    seen: Profile,
    plan: Plan,
    *,
    samples: str,
    seconds: float = 1.0,
) -> Report:
    """Measure a slim network against the dense one: fidelity on `batches`, which `samples` names,
    cost and latency, for about `seconds`, on the first batch that was profiled.
    """
    found = fidelity(dense, slim, batches, seen.criterion)
    timed = Latency(
        **current().told(lambda: benchmark(dense, slim, seen.example, seconds=seconds).model_dump())
    )
    return Report(
        model=seen.model,
        plan=str(plan),
        samples=samples,
        dense=seen.dense,
        slim=cost(slim, seen.example),
        fidelity=found,
        latency=timed,
        forward_passes=plan.forward_passes,
        warnings=(*seen.warnings, *_missed(plan.budget, found, timed)),
    )


def _missed(budget: Budget | None, found: Fidelity, timed: Latency) -> list[str]:
    """Limits that held on the samples to choose on, or when it was timed, and do not hold here."""
    if budget is None:
        return []
    missed = budget.broken(found.divergence, found.agreement, found.accuracy_drop)
    limit = budget.latency
    if limit is not None and (timed.ratio if limit <= 1 else timed.slim_ms) > limit:
        missed.append(f"latency <= {limit:g} (it is {timed.ratio:.3f}, {timed.slim_ms:.4g} ms)")
    return [f"on these samples it does not hold that {text}" for text in missed]
