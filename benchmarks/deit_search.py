"""Claim: the main job on a real DeiT-tiny, from end to end, takes minutes, and this is what it decides.

`compress` on the 500 calibration images of `RBA_DATA`, reported on its 500 test images, one JSON line a
split seed, with the decisions and the seconds. `python -m benchmarks.deit_search --seeds 0 1 2` appends
them to `benchmarks/results/deit_search.jsonl`.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.real_data import deit_tiny, imagenet
from rba_compress import Budget, Config, compress
from rba_compress.core.loader import read
from rba_compress.reporting.comparison import measured


@dataclass
class Run:
    macs: float = 0.77
    """Share to keep; 0.77 takes three of twelve blocks."""
    seeds: tuple[int, ...] = (0,)
    """Deal the images to fit, validation and test samples."""
    out: Path = Path(__file__).parent / "results" / "deit_search.jsonl"


def main(how: Run) -> None:
    model = deit_tiny()
    calibration, test = (imagenet(model, part, 16) for part in ("calibration", "test"))
    for seed in how.seeds:
        start = time.perf_counter()
        found = compress(model, calibration, budget=Budget(macs=how.macs), config=Config(seed=seed))
        seconds = time.perf_counter() - start
        report = measured(
            model, found.model, read(test), found.profile, found.plan, samples="test split"
        )
        fidelity, latency = report.fidelity, report.latency
        ratios = (latency.ratio, latency.ratio_low, latency.ratio_high)
        row = {
            "benchmark": "deit_search",
            "seed": seed,
            "macs_kept": round(report.compressed.macs / report.original.macs, 4),
            "top1_dense": fidelity.accuracy_original,
            "top1": fidelity.accuracy_compressed,
            "agreement": fidelity.agreement,
            "kl": round(fidelity.divergence, 4),
            "latency_ratio": [round(ratio, 3) for ratio in ratios],
            "device": latency.device,
            "seconds": round(seconds),
            "forward_passes": found.plan.forward_passes,
            "plan": str(found.plan),
            "steps": [f"{s.action} {s.change}: {s.divergence:.4f}" for s in found.plan.steps],
        }
        print(json.dumps(row), flush=True)
        with how.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Run))
