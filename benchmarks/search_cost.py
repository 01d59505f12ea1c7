"""Claim: a search with every unit and refinement costs fewer than a hundred forward passes, and its
screening loses little.

`compress` of the real DeiT-tiny to nine of its twelve blocks' worth of MACs, on 500 calibration images,
counted in forward passes over them. Then, at the first step, every span is judged on all samples that
are chosen on: where the best of them stood when it was screened, and what is lost by it.
`python -m benchmarks.search_cost` appends a JSON line to `benchmarks/results/search_cost.jsonl`.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.real_data import deit_tiny, imagenet
from rba_compress import Budget, Config, compress, profile
from rba_compress.api import compare
from rba_compress.core.loader import read
from rba_compress.core.plan import Site
from rba_compress.planning.context import SearchContext
from rba_compress.planning.limits import progress
from rba_compress.planning.selection import FINALISTS, Selection, probes


@dataclass
class Run:
    macs: float = 0.75
    """Share to keep: nine of twelve blocks."""
    seed: int = 0
    screening: bool = True
    out: Path = Path(__file__).parent / "results" / "search_cost.jsonl"


def screening(model: Any, loader: list[Any], seed: int) -> dict[str, Any]:
    """Of the first step: the rank that screening gave the span that is best on all samples."""
    config = Config(units=("span",), maps=("identity", "shrunk"), seed=seed)
    seen = profile(model, loader, config=config)
    run = SearchContext.read(model, seen, loader, Budget(macs=0.75))
    sites: list[Site] = [s for s in Selection(run, run.start).sites() if s[2] - s[1] <= 3]
    moves = run.fitter.candidates(run.start, sites)
    lacking = run.limits.lacking(run.start.cost)

    def score(site: Site, *, screen: bool) -> float:
        """The least divergence a site has for what it saves."""
        own = probes(run, [m for m in moves if m.site == site])
        judged = (run.evaluate(run.start, m, screen=screen) for m in own)
        return min(float(j.mean()) for j in judged) / progress(own[0].saving, lacking)

    whole = {site: score(site, screen=False) for site in sites}
    screened = {site: score(site, screen=True) for site in sites}
    best = min(sites, key=lambda site: whole[site])
    order = sorted(sites, key=lambda site: screened[site])
    kept = min(whole[site] for site in order[:FINALISTS])
    return {
        "sites": len(sites),
        "finalists": FINALISTS,
        "rank_of_the_best": order.index(best) + 1,
        "lost_by_screening": round(kept / whole[best] - 1, 4),
    }


def main(how: Run) -> None:
    model = deit_tiny()
    calibration, test = (imagenet(model, part, 16) for part in ("calibration", "test"))
    start = time.perf_counter()
    found = compress(model, calibration, budget=Budget(macs=how.macs), config=Config(seed=how.seed))
    took = time.perf_counter() - start
    report = compare(
        model, found.model, read(test), found.profile, found.plan, samples="test split", seconds=0.2
    )
    row: dict[str, Any] = {
        "benchmark": "search_cost",
        "cores": os.cpu_count(),
        "seed": how.seed,
        "macs_kept": round(report.compressed.macs / report.original.macs, 4),
        "forward_passes": found.plan.forward_passes,
        "seconds": round(took),
        "top1_dense": report.fidelity.accuracy_original,
        "top1": report.fidelity.accuracy_compressed,
        "kl": round(report.fidelity.divergence, 4),
        "steps": [f"{s.action} {s.change}" for s in found.plan.steps],
    }
    if how.screening:
        row["screening"] = screening(model, calibration, how.seed)
    print(json.dumps(row), flush=True)
    with how.out.open("a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Run))
