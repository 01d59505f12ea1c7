"""Claim: what a profile and a search cost grows with depth, width and samples by these exponents.

ViTs of 65 tokens with random weights; one of depth, width and samples is varied at a time, the others
are 12 blocks, 192 channels and 160 samples. Watching is timed at every position, in turn with a plain
pass, and each exponent is the slope of a line through the logarithms. A search takes a quarter of the
MACs away and is counted in forward passes. `python -m benchmarks.scaling` writes
`benchmarks/results/scaling.json`.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from timm.models import VisionTransformer
from torch import nn

from benchmarks.profile_cost import every_span, plain, seconds, spec
from rba_compress import Budget, Config, profile, search
from rba_compress.core.batch import as_batch
from rba_compress.linalg.moments import moment_bytes
from rba_compress.planning.span_fits import fit_spans
from rba_compress.profiling.profiler import calibrate
from rba_compress.units.offers import discover

SIZES = {"depth": (6, 12, 24), "width": (96, 192, 384, 768), "samples": (80, 160, 320)}
MIDDLE = {"depth": 12, "width": 192, "samples": 160}
BATCH = 16


@dataclass
class Scaling:
    pairs: int = 5
    only_search: bool = False
    """Measure the searches alone."""
    out: Path = Path(__file__).parent / "results" / "scaling.json"


def network(depth: int, width: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: nn.Module = VisionTransformer(
            img_size=64,
            patch_size=8,
            depth=depth,
            embed_dim=width,
            num_heads=width // 32,
            num_classes=10,
        )
        return model.eval()


def measured(depth: int, width: int, samples: int, pairs: int) -> dict[str, float]:
    model = network(depth, width)
    images = torch.randn(samples, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    batches = [as_batch(part) for part in images.split(BATCH)]
    (chain,) = discover(model, batches[0])[0].chains
    plain(model, batches)
    times: list[tuple[float, float]] = []
    for _ in range(pairs):
        bare = seconds(lambda: plain(model, batches))
        times.append((bare, seconds(lambda: calibrate(model, [chain], enumerate(batches)))))
    (profiled,), _ = calibrate(model, [chain], enumerate(batches))
    profiled.moments.pair(0, 1)  # what is held is folded in
    return {
        "plain": statistics.median(bare for bare, _ in times),
        "watching": statistics.median(watched - bare for bare, watched in times),
        "fits": seconds(lambda: fit_spans(profiled, every_span(chain), spec("shrunk", width))),
        "bytes": moment_bytes(depth + 1, width),
    }


def searched(depth: int) -> dict[str, float]:
    """A search by whole blocks and one by every unit, on images that the network has never seen."""
    model = network(depth, 96)
    images = torch.randn(80, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    data = list(images.split(BATCH))
    found: dict[str, float] = {}
    for name, config in (("spans", Config(units=("span",))), ("units", Config())):
        seen = profile(model, data, config=config)
        start = time.perf_counter()
        plan = search(model, seen, data, budget=Budget(macs=0.75)).plan
        found |= {f"{name}_passes": plan.forward_passes, f"{name}_seconds": time.perf_counter() - start}
    return found


def exponent(sizes: tuple[int, ...], values: list[float]) -> float:
    return round(float(np.polyfit(np.log(sizes), np.log(values), 1)[0]), 2)


def main(how: Scaling) -> None:
    rows: list[dict[str, Any]] = []
    exponents: dict[str, dict[str, float]] = {}
    if how.only_search:  # the other rows stay as they were measured
        before = json.loads(how.out.read_text())
        exponents = before["exponents"]
        rows = [row for row in before["rows"] if "spans_passes" not in row]
    for what, sizes in () if how.only_search else SIZES.items():
        found = [measured(**MIDDLE | {what: size}, pairs=how.pairs) for size in sizes]
        rows += [{what: size, **row} for size, row in zip(sizes, found, strict=True)]
        exponents[what] = {key: exponent(sizes, [row[key] for row in found]) for key in found[0]}
    depths = SIZES["depth"]
    searches = [searched(depth) for depth in depths]
    rows += [{"depth": depth, **row} for depth, row in zip(depths, searches, strict=True)]
    exponents["search_depth"] = {k: exponent(depths, [s[k] for s in searches]) for k in searches[0]}
    text = {"benchmark": "scaling", "cores": os.cpu_count(), "exponents": exponents, "rows": rows}
    print(json.dumps({k: v for k, v in text.items() if k != "rows"}))
    how.out.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Scaling))
