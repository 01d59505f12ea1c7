"""Claim: a DeiT-tiny loses less than a point of top-1 for a sixth of its cost, and what more costs.

One search a split seed on the 500 calibration images of `RBA_DATA`, on its way through several budgets:
each goes on from the network that met the one before. Measured on the 500 test images.
`python -m benchmarks.curve` writes `benchmarks/results/curve.jsonl`, a row for each network on the way,
and draws them over what `benchmarks.methods` measured of the paper's method and of skipping
(`curve.png`); `--seeds` alone draws what is there.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.real_data import deit_tiny, imagenet
from rba_compress import Budget, Config, profile
from rba_compress.batches import read
from rba_compress.measure import cost, fidelity
from rba_compress.planner import Search
from rba_compress.surgery import splice_shared

RESULTS = Path(__file__).parent / "results"
RIVALS = {
    "linear, greedy": "the paper's map, block by block",
    "skip, greedy": "blocks skipped, greedily",
}


@dataclass
class Run:
    seeds: tuple[int, ...] = (0, 1, 2)
    """Deal the images to fit, choose and confirm."""
    macs: tuple[float, ...] = (0.95, 0.87, 0.8, 0.75, 0.67)
    """Shares to keep, one after the other."""
    out: Path = RESULTS / "curve.jsonl"


def main(how: Run) -> None:
    rows = [json.loads(line) for line in how.out.read_text().splitlines()] if how.out.exists() else []
    for seed in how.seeds:
        rows = [row for row in rows if row["seed"] != seed]
        for row in path(seed, how.macs):
            rows.append(row)
            print(json.dumps(row), flush=True)
        kept = "".join(f"{json.dumps(row)}\n" for row in sorted(rows, key=lambda row: row["seed"]))
        how.out.write_text(kept)
    summary = means(rows, how.macs)
    for row in summary:
        print(json.dumps(row))
    draw(rows, summary, RESULTS / "curve.png")


def path(seed: int, shares: tuple[float, ...]) -> list[dict[str, Any]]:
    """The networks of one search on its way through the budgets."""
    model = deit_tiny()
    calibration, test = imagenet(model, "calibration", 16), list(read(imagenet(model, "test", 50)))
    seen = profile(model, calibration, config=Config(seed=seed))
    run, start = Search(model, seen, calibration, Budget(macs=min(shares))), time.perf_counter()
    draft, found = run.start, []
    for share in shares:
        run.goal = run.limits = Budget(macs=share).limits(seen.dense.macs, seen.dense.params)
        steps = 0
        while steps == 0 or run.lacking(draft.load):
            if run.lacking(draft.load):
                after = run.step(draft)
                assert after is not None
                draft = after
            steps += 1
            solution = run.finished(draft)
            slim = splice_shared(model, solution.plan, solution.tensors)
            measured = fidelity(model, slim, test, "kl")
            found.append(
                {
                    "seed": seed,
                    "budget": share,
                    "macs_kept": round(cost(slim, test[0]).macs / seen.dense.macs, 4),
                    "top1_dense": measured.accuracy_dense,
                    "top1": measured.accuracy_slim,
                    "agreement": measured.agreement,
                    "kl": round(measured.divergence, 4),
                    "seconds": round(time.perf_counter() - start),
                    "forward_passes": solution.plan.forward_passes,
                    "plan": str(solution.plan),
                }
            )
    return found


def means(rows: list[dict[str, Any]], shares: tuple[float, ...]) -> list[dict[str, Any]]:
    """Over the seeds, of the network that met each budget."""
    found = []
    for share in shares:
        met: dict[int, dict[str, Any]] = {}
        for row in rows:
            if row["budget"] == share:
                met[row["seed"]] = row  # the last one met it
        of = {
            name: round(statistics.mean(row[name] for row in met.values()), 4)
            for name in ("macs_kept", "top1", "agreement", "kl")
        }
        dense = statistics.mean(row["top1_dense"] for row in met.values())
        of_dense = round(of["top1"] / dense, 4)
        found.append({"budget": share, "seeds": len(met), **of, "of_dense": of_dense})
    return found


def draw(rows: list[dict[str, Any]], summary: list[dict[str, Any]], target: Path) -> None:
    from matplotlib.figure import Figure

    rivals: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for line in (RESULTS / "methods.jsonl").read_text().splitlines():
        row = json.loads(line)
        network, gone, method, *_ = row["key"].split("/")
        if network == "deit_tiny" and method in RIVALS:
            rivals[method, int(gone)].append(row)
    figure = Figure(figsize=(10.4, 4.4), layout="constrained")
    axes = figure.subplots(1, 2)
    dense = rows[0]["top1_dense"]
    for axis, name, first in ((axes[0], "top1", dense), (axes[1], "kl", 0.0)):
        axis.plot(
            [0, *(100 * (1 - row["macs_kept"]) for row in summary)],
            [first, *(row[name] for row in summary)],
            "o-",
            lw=2,
            label="rba_compress",
        )
        axis.plot(
            [100 * (1 - row["macs_kept"]) for row in rows],
            [row[name] for row in rows],
            ".",
            color="C0",
            alpha=0.35,
            label="each seed, each step",
        )
        for (method, label), style in zip(RIVALS.items(), ("s--", "^:"), strict=True):
            points = [(0.0, first)]
            for (other, _), of_gone in sorted(rivals.items(), key=lambda item: item[0][1]):
                if other == method:
                    kept = statistics.mean(row["macs_kept"] for row in of_gone)
                    points.append((100 * (1 - kept), statistics.mean(row[name] for row in of_gone)))
            axis.plot(*zip(*points, strict=True), style, label=label)
        axis.set_xlabel("multiply-accumulates saved, %")
        axis.grid(alpha=0.3)
        axis.set_xlim(-1, 36)
    axes[0].set_ylabel("top-1, 500 test images")
    axes[0].set_ylim(0.58, 0.82)
    axes[0].axhline(dense, color="0.6", lw=0.8)
    axes[1].set_ylabel("KL divergence to the dense network (nats)")
    axes[1].set_ylim(-0.02, 0.62)
    axes[0].legend(frameon=False, loc="lower left")
    figure.suptitle("DeiT-tiny, ImageNet: no training, 500 unlabelled calibration images", fontsize=11)
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main(tyro.cli(Run))
