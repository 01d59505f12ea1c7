"""The front between cost and divergence: every step of one search as a network of its own."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rba_compress.artifact import write_artifact
from rba_compress.calibration import Profile
from rba_compress.files import require_vacant, written_whole
from rba_compress.plan import Plan
from rba_compress.report import Report
from rba_compress.surgery import splice

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class Point:
    """A network on the way from the dense one to the budget, with the proof of what it costs."""

    plan: Plan
    report: Report
    tensors: dict[str, Tensor]
    """The fitted tensors of its plan, by their key in the slim state dict."""

    def splice(self, model: nn.Module) -> nn.Module:
        """Its network, from the dense one that was searched.

        Raises:
            PlanError, ModelError: as `rba_compress.splice`.
        """
        return splice(model, self.plan, self.tensors)

    def row(self) -> dict[str, Any]:
        """Its measures under one name each; what was not measured is None."""
        report, f, t = self.report, self.report.fidelity, self.report.latency
        return {
            "macs": report.slim.macs,
            "macs_kept": round(report.slim.macs / report.dense.macs, 5),
            "params": report.slim.params,
            "params_kept": round(report.slim.params / report.dense.params, 5),
            "latency_ratio": round(t.ratio, 4),
            "latency_low": round(t.ratio_low, 4),
            "latency_high": round(t.ratio_high, 4),
            "divergence": f.divergence if math.isfinite(f.divergence) else None,
            "divergence_low": f.divergence_low,
            "divergence_high": f.divergence_high,
            "agreement": f.agreement,
            "accuracy": f.accuracy_slim,
            "accuracy_dense": f.accuracy_dense,
            "samples": f.samples,
            "plan": str(self.plan),
        }


def write_front(
    points: Sequence[Point], model: nn.Module, seen: Profile, directory: str | Path
) -> None:
    """Write a front to a new directory, all of it or nothing.

        front.json, front.csv, front.png   a row for each point
        point-01, point-02, ...            its network as a delta: `load(dir, base=model)`

    Args:
        points: of one search.
        model: the dense network that was searched.
        seen: its profile.
        directory: must not exist, or be empty.

    Raises:
        ArtifactError: the directory is taken or cannot be written.
    """
    target = Path(directory).absolute()
    require_vacant(target)
    rows = [{"point": f"point-{k:02}", **point.row()} for k, point in enumerate(points, start=1)]
    with written_whole(target) as temporary:
        (temporary / "front.json").write_text(json.dumps(rows, indent=2) + "\n")
        with (temporary / "front.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0] if rows else ["point"])
            table.writeheader()
            table.writerows(rows)
        plot_front(points).savefig(temporary / "front.png", dpi=120)
        for row, point in zip(rows, points, strict=True):
            write_artifact(
                point.splice(model),
                point.plan,
                temporary / row["point"],
                example=seen.example,
                dense_weights=seen.weights,
                report=point.report,
                delta=True,
            )


def plot_front(points: Sequence[Point]) -> Figure:
    """Divergence, and agreement or accuracy, over what is kept of MACs and latency."""
    from matplotlib.figure import Figure

    rows = [point.row() for point in points]
    scores = [name for name in ("agreement", "accuracy") if rows and rows[-1][name] is not None]
    figure = Figure(figsize=(4.8 * (1 + bool(scores)), 4.2), layout="constrained")
    axes = figure.subplots(1, 1 + bool(scores), squeeze=False)[0]
    kept, latency = ([1.0, *(row[name] for row in rows)] for name in ("macs_kept", "latency_ratio"))
    divergence = [0.0, *(math.nan if row["divergence"] is None else row["divergence"] for row in rows)]
    known = [row for row in rows if row["divergence_low"] is not None]
    axes[0].plot(kept, divergence, "o-", label="MACs")
    axes[0].plot(latency, divergence, "s:", label="measured latency")
    axes[0].errorbar(
        [row["macs_kept"] for row in known],
        [row["divergence"] for row in known],
        yerr=[
            [row["divergence"] - row["divergence_low"] for row in known],
            [row["divergence_high"] - row["divergence"] for row in known],
        ],
        fmt="none",
        ecolor="C0",
        capsize=3,
        label="95 % interval",
    )
    kind = points[0].report.fidelity.kind if points else "kl"
    axes[0].set_ylabel("KL divergence to dense (nats)" if kind == "kl" else "squared error to dense")
    axes[0].legend(frameon=False)
    for name in scores:
        first = 1.0 if name == "agreement" else rows[0]["accuracy_dense"]
        style = "o-" if name == "agreement" else "s:"
        axes[1].plot(kept, [first, *(row[name] for row in rows)], style, label=name)
        axes[1].set_ylabel("share of samples")
        axes[1].legend(frameon=False)
    for axis in axes:
        axis.set_xlabel("kept of the dense network")
        axis.invert_xaxis()
        axis.grid(alpha=0.3)
    return figure
