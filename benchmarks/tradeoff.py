"""Claim: a DeiT-tiny loses less than a point of top-1 for a sixth of its cost, and what more costs.

One search a split seed on the 500 calibration images of `RBA_DATA`, on its way through several budgets:
each goes on from the network that met the one before. Measured on the 500 test images, beside what
`benchmarks.methods` measured of the paper's map and of skipping, and `benchmarks.healing` of the
healed. Latency follows the share of MACs: `benchmarks.delivered_speed`.

`python -m benchmarks.tradeoff` writes `benchmarks/results/tradeoff.jsonl`, a row for each network on
its way; of the means over seeds a row for each method and budget, `tradeoff.csv` and `tradeoff.json`;
and a picture, `tradeoff.png`. `--seeds` alone makes the latter three of what is there.
"""

from __future__ import annotations

import csv
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.real_data import deit_tiny, imagenet
from rba_compress import Budget, Config, profile, search
from rba_compress.core.loader import read
from rba_compress.profiling.cost import cost
from rba_compress.profiling.fidelity import fidelity
from rba_compress.units.splice import splice_shared

RESULTS = Path(__file__).parent / "results"
RIVALS = {
    "linear, greedy": "the paper's map, block by block",
    "skip, greedy": "blocks skipped, greedily",
}
OURS, HEALED = "rba_compress", "rba_compress, healed"
STYLES = dict(zip((OURS, HEALED, *RIVALS.values()), ("o-", "*", "s--", "^:"), strict=True))
MEASURES = ("macs_kept", "top1", "agreement", "kl")


@dataclass
class Run:
    seeds: tuple[int, ...] = (0, 1, 2)
    """Deal the images to fit, validation and test samples."""
    macs: tuple[float, ...] = (0.95, 0.87, 0.8, 0.75, 0.67)
    """Shares to keep, one after the other."""
    out: Path = RESULTS / "tradeoff.jsonl"


def main(how: Run) -> None:
    rows = [json.loads(line) for line in how.out.read_text().splitlines()] if how.out.exists() else []
    for seed in how.seeds:
        rows = [row for row in rows if row["seed"] != seed]
        for row in path(seed, how.macs):
            rows.append(row)
            print(json.dumps(row), flush=True)
        kept = "".join(f"{json.dumps(row)}\n" for row in sorted(rows, key=lambda row: row["seed"]))
        how.out.write_text(kept)
    summary = [*ours(rows, how.macs), *healed(), *rivals()]
    for row in summary:
        print(json.dumps(row))
    (RESULTS / "tradeoff.json").write_text(json.dumps(summary, indent=2) + "\n")
    with (RESULTS / "tradeoff.csv").open("w", newline="") as file:
        written = csv.DictWriter(file, summary[0], lineterminator="\n")
        written.writeheader()
        written.writerows(summary)
    draw(rows, summary, RESULTS / "tradeoff.png")


def path(seed: int, shares: tuple[float, ...]) -> list[dict[str, Any]]:
    """Return a row for each budget; all searches share one profile, and so what they evaluated."""
    model = deit_tiny()
    calibration, test = imagenet(model, "calibration", 16), list(read(imagenet(model, "test", 50)))
    seen = profile(model, calibration, config=Config(seed=seed))
    start, passes, found = time.perf_counter(), 0.0, []
    for share in shares:
        solution = search(model, seen, calibration, budget=Budget(macs=share))
        passes += solution.plan.forward_passes
        compressed = splice_shared(model, solution.plan, solution.tensors)
        measured = fidelity(model, compressed, test, "kl")
        found.append(
            {
                "seed": seed,
                "budget": share,
                "macs_kept": round(cost(compressed, test[0]).macs / seen.original.macs, 4),
                "top1_dense": measured.accuracy_original,
                "top1": measured.accuracy_compressed,
                "agreement": measured.agreement,
                "kl": round(measured.divergence, 4),
                "seconds": round(time.perf_counter() - start),
                "forward_passes": round(passes, 2),
                "plan": str(solution.plan),
            }
        )
    return found


def mean(method: str, asked: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of one method at one budget, over its seeds, with the lowest and the highest top-1."""
    of = {name: round(statistics.mean(row[name] for row in rows), 4) for name in MEASURES}
    top1, original = [row["top1"] for row in rows], statistics.mean(row["top1_dense"] for row in rows)
    return {
        "method": method,
        "asked": asked,
        "seeds": len(rows),
        **of,
        "top1_low": min(top1),
        "top1_high": max(top1),
        "of_dense": round(of["top1"] / original, 4),
    }


def ours(rows: Sequence[dict[str, Any]], shares: Sequence[float]) -> list[dict[str, Any]]:
    """The network of every seed that met each budget."""
    found = []
    for share in shares:
        met = {row["seed"]: row for row in rows if row["budget"] == share}  # the last one met it
        found.append(mean(OURS, f"{share:.0%} of MACs", list(met.values())))
    return found


def healed() -> list[dict[str, Any]]:
    """The DeiT-tiny of `benchmarks.healing`, healed on all of its images."""
    plans: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in (RESULTS / "healing.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["case"] == "deit" and row["method"] == "healed":
            plans[row["plan"]].append(row)
    return [mean(HEALED, plan, rows) for plan, rows in plans.items()]


def rivals() -> list[dict[str, Any]]:
    """The paper's map and skipping, of `benchmarks.methods`."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in (RESULTS / "methods.jsonl").read_text().splitlines():
        row = json.loads(line)
        network, gone, method, *_ = row["key"].split("/")
        if network == "deit_tiny" and method in RIVALS:
            found[method, gone].append(row)
    named = sorted(found.items())
    return [mean(RIVALS[method], f"{gone} blocks gone", rows) for (method, gone), rows in named]


def draw(rows: list[dict[str, Any]], summary: list[dict[str, Any]], target: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 4.4), layout="constrained")
    axes = figure.subplots(1, 2)
    original = rows[0]["top1_dense"]
    for axis, name, first in ((axes[0], "top1", original), (axes[1], "kl", 0.0)):
        axis.plot(
            [100 * (1 - row["macs_kept"]) for row in rows],
            [row[name] for row in rows],
            ".",
            color="C0",
            alpha=0.35,
            label="each seed, each step",
        )
        for method, style in STYLES.items():
            own = [row for row in summary if row["method"] == method]
            points = [(100 * (1 - row["macs_kept"]), row[name]) for row in own]
            start = [] if method == HEALED else [(0.0, first)]
            size = 12 if method == HEALED else 6
            if points:
                axis.plot(*zip(*start, *points, strict=True), style, ms=size, label=method)
        axis.set_xlabel("multiply-accumulates saved, %")
        axis.grid(alpha=0.3)
        axis.set_xlim(-1, 36)
    axes[0].set_ylabel("top-1, 500 test images")
    axes[0].set_ylim(0.58, 0.82)
    axes[0].axhline(original, color="0.6", lw=0.8)
    axes[1].set_ylabel("KL divergence to the original network (nats)")
    axes[1].set_ylim(-0.02, 0.62)
    axes[0].legend(frameon=False, loc="lower left")
    figure.suptitle("DeiT-tiny, ImageNet: 500 unlabelled calibration images", fontsize=11)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main(tyro.cli(Run))
