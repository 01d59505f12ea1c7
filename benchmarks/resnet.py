"""Claim: a convolutional block is worth a 1x1 map, and BatchNorms behind it statistics of their own.

The CIFAR-10 ResNet-20 of `RBA_DATA`: 2,000 images to calibrate (half to fit, two fifths to choose),
2,000 others to measure. Every block that keeps its stream's shape is taken away alone: skipped, by a
plain least-squares map (RBA, arXiv 2410.04941), and by a shrunk map whose dial is chosen by held-out
KL; each as it is, and with the statistics of the BatchNorms behind it re-estimated where held-out KL
falls.

`python -m benchmarks.resnet` writes `benchmarks/results/resnet.jsonl` and its table.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from torch import Tensor

from benchmarks.quality import quality
from benchmarks.real_data import cifar10, resnet20
from rba_compress import Budget, Config, profile, search
from rba_compress.core.batch import as_batch
from rba_compress.core.plan import NormRefit, Site
from rba_compress.planning.context import SearchContext
from rba_compress.planning.refinement import statistics as re_estimated
from rba_compress.planning.state import Solution, with_candidate
from rba_compress.units.splice import splice_shared

RESULTS = Path(__file__).parent / "results"
KINDS = {"skipped": "identity", "plain": "linear", "shrunk": "shrunk"}


@dataclass
class Run:
    """Settings of the benchmark."""

    batch_size: int = 100
    seed: int = 0
    """Deals the images to fit and to choose on."""
    out: Path = RESULTS / "resnet.jsonl"


def loaders(batch_size: int) -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    """The first 2,000 images to calibrate on, the others to test on."""
    images, labels = cifar10()
    pairs = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    return pairs[: len(pairs) // 2], pairs[len(pairs) // 2 :]


def single_blocks(search: SearchContext) -> Iterator[tuple[str, str, Solution]]:
    """Yield (block, method, solution) for each block alone, by each method."""
    draft = search.start
    for c, chain in enumerate(search.chains):
        for b, block in enumerate(chain.blocks):
            moves = search.fitter.candidates(draft, [Site(c, b, b + 1, "span")])
            for method, kind in KINDS.items():
                judged = [
                    search.state(with_candidate(draft.solution, move), draft.cost - move.saving)
                    for move in moves
                    if move.replacement.map.kind == kind
                ]
                best = min(judged, key=lambda d: d.mean)
                yield block.path, method, best.solution
                yield block.path, f"{method}, re-estimated", re_estimated(search, best).solution


def main(how: Run) -> None:
    """Print a JSON line for each block and method, and for the searches."""
    model = resnet20()
    calibration, test = loaders(how.batch_size)
    config = Config(maps=("linear", "shrunk"), units=("span",), seed=how.seed)
    seen = profile(model, calibration, config=config)
    single = SearchContext.read(model, seen, calibration, Budget(macs=0.5))
    found = list(single_blocks(single))
    for share in (0.9, 0.8, 0.7):
        for statistics in (False, True):
            own = Config(statistics=statistics, seed=how.seed)
            profiled = profile(model, calibration, config=own)
            solution = search(model, profiled, calibration, budget=Budget(macs=share))
            name = f"search, {share:.0%} of MACs"
            found.append((name, "re-estimated" if statistics else "as it is", solution))
    batches = [as_batch(pair) for pair in test]
    rows = []
    for block, method, solution in found:
        compressed = splice_shared(model, solution.plan, solution.tensors)
        rows.append(
            {"block": block, "method": method}
            | quality(model, compressed, batches)
            | {
                "norms": sum(isinstance(r, NormRefit) for r in solution.plan.refits),
                "plan": str(solution.plan),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    how.out.write_text("".join(f"{json.dumps(r)}\n" for r in rows))
    how.out.with_suffix(".md").write_text(table(rows))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    original = rows[0]["top1_dense"]
    lines = [
        "# CIFAR-10 ResNet-20, one block taken away",
        "",
        f"2,000 test images, original top-1 {original:.4f}. Re-estimated: statistics of the BatchNorms "
        "behind it, where held-out KL falls by more than a standard error (norms: how many were).",
        "",
        "| block | method | MACs kept | top-1 | agreement | KL, 95 % interval | norms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['block']} | {r['method']} | {r['macs_kept']:.3f} | {r['top1']:.4f} "
        f"| {r['agreement']:.4f} | {r['kl']:.3f} [{r['kl_low']:.3f}, {r['kl_high']:.3f}] "
        f"| {r['norms']} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Run))
