"""Pareto front between cost and divergence: every step of one search as a network of its own."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from rba_compress.artifacts.artifact import write_artifact
from rba_compress.core.io import require_vacant, written_whole
from rba_compress.core.plan import Plan
from rba_compress.profiling.profiler import Profile
from rba_compress.reporting.plots import plot_pareto
from rba_compress.reporting.report import Report
from rba_compress.units.splice import splice


@dataclass(frozen=True, eq=False)
class Point:
    """Network of one step of a search, with its measured report."""

    plan: Plan
    report: Report
    tensors: dict[str, Tensor]
    """Fitted tensors of the plan, by their key in the compressed state dict."""

    def __repr__(self) -> str:
        return f"Point({self.report.line})"

    def splice(self, model: nn.Module) -> nn.Module:
        """Return the network of this point, from the original that was searched.

        Raises:
            PlanError, ModelError: as `rba_compress.splice`.
        """
        return splice(model, self.plan, self.tensors)


def write_front(
    points: Sequence[Point], model: nn.Module, seen: Profile, directory: str | Path
) -> None:
    """Write a front to a new directory, all of it or nothing.

        front.json, front.csv, front.png   a row for each point
        point-01, point-02, ...            its network as a delta: `load(dir, original=model)`

    Args:
        points: the points of one search.
        model: the original network that was searched.
        seen: its profile.
        directory: must not exist, or be empty.

    Raises:
        ArtifactError: the directory is taken or cannot be written.
    """
    target = Path(directory).absolute()
    require_vacant(target)
    front = [point.report.summary for point in points]
    rows = [{"point": f"point-{k:02}", **row.model_dump()} for k, row in enumerate(front, start=1)]
    with written_whole(target) as temporary:
        (temporary / "front.json").write_text(json.dumps(rows, indent=2) + "\n")
        with (temporary / "front.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0] if rows else ["point"])
            table.writeheader()
            table.writerows(rows)
        kind = points[0].report.fidelity.kind if points else "kl"
        plot_pareto(front, kind).savefig(temporary / "front.png", dpi=120)
        for row, point in zip(rows, points, strict=True):
            write_artifact(
                point.splice(model),
                point.plan,
                temporary / row["point"],
                example=seen.example,
                original_weights=seen.weights,
                report=point.report,
                delta=True,
            )
