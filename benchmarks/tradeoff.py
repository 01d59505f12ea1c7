"""Claim: what a DeiT-tiny loses for what it saves, beside what a user would do instead.

One search a split seed on the 500 calibration images of `RBA_DATA` meets several budgets, one after the
other, with every unit and without merging; merging with one number of positions for all blocks, or with
a number that falls from block to block, needs no search. All are measured on the 500 test images,
beside what `benchmarks.methods` measured of the paper's map and of skipping. Latency follows the share
of MACs: `benchmarks.delivered_speed`.

`python -m benchmarks.tradeoff` writes `benchmarks/results/tradeoff.jsonl`, a row for each network; of
the means over seeds a row for each method and budget, `tradeoff.csv` and `tradeoff.json`; and a
picture, `tradeoff.png`. `--seeds` alone makes the latter three of what is there.
"""

from __future__ import annotations

import csv
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.quality import quality
from benchmarks.real_data import deit_tiny, imagenet
from benchmarks.tome import ToMe
from rba_compress import Budget, Config, profile, search, supports
from rba_compress.core.loader import read
from rba_compress.graph.token_merging import most
from rba_compress.units.registry import unit_of
from rba_compress.units.splice import splice_shared

RESULTS = Path(__file__).parent / "results"
OURS, UNMERGED = "rba_compress", "rba_compress without merging"
UNIFORM, FALLING = "same merge in every block", "merges fall over the blocks"
RIVALS = {
    "linear, greedy": "the paper's map, block by block",
    "skip, greedy": "blocks skipped, greedily",
}
STYLES = dict(zip((OURS, UNMERGED, UNIFORM, FALLING, *RIVALS.values()), "osDv^P", strict=True))
SEARCHED = {
    OURS: (0.87, 0.8, 0.73, 0.67, 0.6, 0.5, 0.45),
    UNMERGED: (0.95, 0.87, 0.8, 0.734, 0.67),
}
"""Shares of MACs to keep, one after the other."""
MEASURES = ("macs_kept", "top1", "agreement", "kl")


@dataclass
class Run:
    seeds: tuple[int, ...] = (0, 1, 2)
    """Deal the images to fit, validation and test samples."""
    methods: tuple[str, ...] = (OURS, UNMERGED, UNIFORM, FALLING)
    out: Path = RESULTS / "tradeoff.jsonl"


def main(how: Run) -> None:
    for method in how.methods if how.seeds else ():
        for seed in how.seeds if method in SEARCHED else (0,):
            found = path(seed, method) if method in SEARCHED else merged(method)
            for seen in found:
                row = {"method": method, "seed": seed} | seen
                print(json.dumps(row), flush=True)
                key = ("method", "seed", "budget")
                rows = [r for r in _rows(how.out) if [r[k] for k in key] != [row[k] for k in key]]
                text = "".join(f"{json.dumps(each)}\n" for each in [*rows, row])
                how.out.write_text(text)
    rows = _rows(how.out)
    summary = [*ours(rows), *rivals()]
    for row in summary:
        print(json.dumps(row))
    (RESULTS / "tradeoff.json").write_text(json.dumps(summary, indent=2) + "\n")
    with (RESULTS / "tradeoff.csv").open("w", newline="") as file:
        written = csv.DictWriter(file, summary[0], lineterminator="\n")
        written.writeheader()
        written.writerows(summary)
    draw(rows, summary, RESULTS / "tradeoff.png")


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def path(seed: int, method: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each budget; all searches share one profile, and so what they evaluated."""
    model = deit_tiny()
    calibration, test = imagenet(model, "calibration", 16), list(read(imagenet(model, "test", 50)))
    units = [name for name in Config().units if method == OURS or unit_of(name).fitted]
    seen = profile(model, calibration, config=Config(seed=seed, units=units))
    start, passes = time.process_time(), 0.0
    for share in SEARCHED[method]:
        solution = search(model, seen, calibration, budget=Budget(macs=share))
        passes += solution.plan.forward_passes
        compressed = splice_shared(model, solution.plan, solution.tensors)
        yield (
            {"budget": share}
            | quality(model, compressed, test)
            | {
                "cpu_seconds": round(time.process_time() - start),
                "forward_passes": round(passes, 2),
                "plan": str(solution.plan),
            }
        )


def merged(method: str) -> Iterator[dict[str, Any]]:
    """Yield a row for each number of positions that a block merges, on average."""
    model = deit_tiny()
    test = list(read(imagenet(model, "test", 50)))
    (chain,) = supports(model, imagenet(model, "calibration", 16)[0]).chains
    sites = range(len(chain) - 1)
    for mean in (2, 4, 6, 8, 10, 12, 14, 16):
        falling = [round(2 * mean * (1 - b / sites[-1])) for b in sites]
        counts = falling if method == FALLING else [mean] * len(sites)
        left, chosen = chain.positions, {}
        for b, wanted in zip(sites, counts, strict=True):
            count = min(wanted, most(left, chain.reads))
            left -= count
            chosen[b] = count
        compressed = ToMe(model, chosen).eval()
        yield {"budget": mean} | quality(model, compressed, test) | {"plan": f"{method}: {counts}"}


def mean(method: str, asked: str, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the means of one method at one budget over its seeds, and the lowest and highest top-1."""
    of = {name: float(f"{statistics.mean(row[name] for row in rows):.4g}") for name in MEASURES}
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


def ours(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean over seeds of each method and budget."""
    found: dict[tuple[str, float], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["method"], row["budget"]].append(row)
    asked = {False: "{:.0%} of MACs", True: "{} positions a block"}
    counted = (UNIFORM, FALLING)
    return [mean(m, asked[m in counted].format(b), seeds) for (m, b), seeds in found.items()]


def rivals() -> list[dict[str, Any]]:
    """Return the means of the paper's map and of skipping, from `benchmarks.methods`."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for line in (RESULTS / "methods.jsonl").read_text().splitlines():
        row = json.loads(line)
        network, gone, method, *_ = row["key"].split("/")
        if network == "deit_tiny" and method in RIVALS:
            found[method, gone].append(row)
    named = sorted(found.items())
    return [mean(RIVALS[method], f"{gone} blocks gone", rows) for (method, gone), rows in named]


def draw(rows: list[dict[str, Any]], summary: list[dict[str, Any]], target: Path) -> None:
    """Draw top-1 and KL divergence over the MACs saved, each method's means over seeds as a line."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.4, 4.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name in zip(axes, ("top1", "kl"), strict=True):
        for k, (method, marker) in enumerate(STYLES.items()):
            own = [row for row in summary if row["method"] == method]
            points = sorted((100 * (1 - row["macs_kept"]), max(row[name], 1e-4)) for row in own)
            if points:
                width = 2.2 if method == OURS else 1.2
                axis.plot(
                    *zip(*points, strict=True),
                    color=f"C{k}",
                    marker=marker,
                    ms=5,
                    lw=width,
                    label=method,
                )
        seeds = [row for row in rows if row["method"] == OURS]
        axis.plot(
            [100 * (1 - row["macs_kept"]) for row in seeds],
            [max(row[name], 1e-4) for row in seeds],
            ".",
            color="C0",
            alpha=0.35,
        )
        axis.set_xlabel("multiply-accumulates saved, %")
        axis.grid(alpha=0.3)
        axis.set_xlim(3, 62)
    axes[0].set_ylabel("top-1, 500 test images")
    axes[0].set_ylim(0.6, 0.82)
    axes[0].axhline(rows[0]["top1_dense"], color="0.6", lw=0.8)
    axes[1].set_ylabel("KL divergence to the original (nats)")
    axes[1].set_yscale("log")
    axes[1].set_ylim(2e-4, 5)
    axes[1].legend(frameon=False, loc="lower right", fontsize=8)
    figure.suptitle(
        "DeiT-tiny, ImageNet: 500 unlabelled calibration images, nothing trained", fontsize=11
    )
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main(tyro.cli(Run))
