"""The pipeline: profile, search, splice, and the proof of what came out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rba_compress.artifact import Architecture, write_artifact
from rba_compress.batches import Batch
from rba_compress.calibration import Profile, profile
from rba_compress.measure import benchmark, cost, fidelity
from rba_compress.plan import Budget, Config, Plan
from rba_compress.planner import search
from rba_compress.recorder import unwrap
from rba_compress.report import Report
from rba_compress.surgery import splice


@dataclass(frozen=True, eq=False)
class Result:
    """A slim network of the original's class, and how it came about."""

    model: nn.Module
    plan: Plan
    report: Report
    tensors: dict[str, Tensor]
    """The fitted tensors of the plan's maps, by their key in the slim state dict."""
    profile: Profile

    def save(self, directory: str | Path, *, architecture: Architecture | None = None) -> None:
        """As `rba_compress.save(result, directory)`."""
        save(self, directory, architecture=architecture)

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
) -> Result:
    """Rewrite `model` into a cheaper network of the same class, without training.

    Args:
        model: any `nn.Module` or `fx.GraphModule`, in any mode, on any device; left as it is.
            DataParallel, DistributedDataParallel and `torch.compile` wrappers are taken off.
        loader: an iterable of batches that can be read more than once: tensors, tuples whose first
            item is the input and whose second may be integer labels, or dicts of keywords. Seven
            samples of ten fit the maps, two choose, one confirms.
        budget: what the slim network may cost; by default three quarters of the MACs.
        config: how to search.

    Raises:
        RBAError: one of its subclasses, before anything is changed: `LoaderError`, `ModelError`,
            `NoChainError`, `ActivationError`, `BudgetError`.
    """
    dense = unwrap(model)
    seen = profile(dense, loader, config=config)
    found = search(dense, seen, loader, budget=budget)
    slim = splice(dense, found.plan, found.tensors)
    confirm = seen.split(loader).part("confirm")
    report = compare(dense, slim, confirm, seen, found.plan, samples="held out of the loader")
    return Result(slim, found.plan, report, found.tensors, seen)


def save(result: Result, directory: str | Path, *, architecture: Architecture | None = None) -> None:
    """Write a result to a new directory; `load` reads it back, bit-equal.

    Args:
        result: what `compress` returned.
        directory: must not exist, or be empty; it is written whole or not at all.
        architecture: the timm name and arguments of the dense network. By default what the model
            tells of itself; where that does not build this very network, `load` asks for `model=`.

    Raises:
        ArtifactError: the directory is taken or cannot be written.
        WeightsError: `architecture` does not build this network.
    """
    write_artifact(
        result.model,
        result.plan,
        directory,
        example=result.profile.example.select([0]),
        dense_weights=result.profile.weights,
        report=result.report,
        architecture=architecture,
    )


def compare(
    dense: nn.Module,
    slim: nn.Module,
    batches: Iterable[Batch],
    seen: Profile,
    plan: Plan,
    *,
    samples: str,
) -> Report:
    """Measure a slim network against the dense one: fidelity on `batches`, which `samples` names,
    cost and latency on the first batch that was profiled.
    """
    found = fidelity(dense, slim, batches, seen.divergence)
    return Report(
        model=seen.model,
        plan=str(plan),
        samples=samples,
        dense=seen.dense,
        slim=cost(slim, seen.example),
        fidelity=found,
        latency=benchmark(dense, slim, seen.example),
        warnings=seen.warnings,
    )
