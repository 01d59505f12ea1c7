"""Claim: a search in stages takes a fraction of a greedy search's passes, and predicts what it finds.

Each search on the same network, profile and budgets, in one run: forward passes, CPU seconds, the
share of MACs that is left, and on test samples the KL divergence to the original, the agreement and
top-1. For each stage the predicted divergence and the true one. `python -m benchmarks.stages` appends
a JSON line for each search to `benchmarks/results/stages.jsonl` and draws predicted against true
divergences (`stages.png`).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks.greedy import run
from benchmarks.methods import CASES, Case
from rba_compress import Budget, Config, profile
from rba_compress.core.config import Effort
from rba_compress.planning.context import SearchContext
from rba_compress.planning.descent import descend
from rba_compress.profiling.fidelity import fidelity
from rba_compress.units.splice import splice_shared

RESULTS = Path(__file__).parent / "results"


@dataclass
class Run:
    """Networks, budgets and searches."""

    networks: tuple[str, ...] = ("digits_vit", "resnet20", "deit_tiny")
    macs: tuple[float, ...] = (0.8, 0.6)
    searches: tuple[Effort | str, ...] = ("default", "greedy")
    """Efforts of the search in stages, or greedy."""
    seed: int = 0
    out: Path = RESULTS / "stages.jsonl"


def row(case: Case, macs: float, name: str, seed: int) -> dict[str, Any]:
    """Return what one search takes and what its network loses."""
    greedy = name == "greedy"
    config = Config(seed=seed) if greedy else Config(seed=seed, effort=name)
    seen = profile(case.model, case.calibration, config=config)
    context = SearchContext.read(case.model, seen, case.calibration, Budget(macs=macs))
    started = time.process_time()
    found = (run if greedy else descend)(context)
    seconds = time.process_time() - started
    network = splice_shared(case.model, found.plan, found.tensors)
    measured = fidelity(case.model, network, case.test, "kl")
    stages = [(s.predicted, s.divergence) for s in found.plan.steps if s.action == "stage"]
    return {
        "search": name,
        "passes": found.plan.forward_passes,
        "cpu_seconds": round(seconds, 1),
        "macs_kept": round(found.plan.steps[-1].macs / seen.original.macs, 4),
        "kl": float(f"{measured.divergence:.4g}"),
        "agreement": measured.agreement,
        "top1": measured.accuracy_compressed,
        "stages": [[float(f"{each:.3g}") for each in pair if each is not None] for pair in stages],
        "plan": str(found.plan),
    }


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the predicted divergence of each stage against the true one."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4.5), layout="constrained")
    axis = figure.subplots()
    low, high = float("inf"), 0.0
    for network, marker in zip(CASES, "os^", strict=True):
        pairs = [pair for r in rows if r["network"] == network for pair in r["stages"] if pair[0] > 0]
        if pairs:
            predicted, true = zip(*pairs, strict=True)
            axis.loglog(predicted, true, marker, label=network, alpha=0.7)
            low, high = min(low, *predicted, *true), max(high, *predicted, *true)
    axis.plot([low, high], [low, high], "k-", linewidth=0.8, label="equal")
    axis.plot([low, high], [2 * low, 2 * high], "k:", linewidth=0.8, label="true is twice as high")
    axis.set_xlabel("predicted divergence of a stage")
    axis.set_ylabel("true divergence on all validation samples")
    axis.legend()
    figure.savefig(path, dpi=120)


def main(how: Run) -> None:
    """Print and append a row for each search."""
    torch.set_num_threads(1)
    for network in how.networks:
        case = CASES[network]()
        for macs in how.macs:
            for name in how.searches:
                found = {"network": network, "seed": how.seed, "budget": macs}
                found |= row(case, macs, name, how.seed)
                print(json.dumps(found), flush=True)
                with how.out.open("a") as file:
                    file.write(json.dumps(found) + "\n")
    draw([json.loads(line) for line in how.out.read_text().splitlines()], how.out.with_suffix(".png"))


if __name__ == "__main__":
    main(tyro.cli(Run))
