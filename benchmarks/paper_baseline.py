"""Claim: this is the paper's method on a real ImageNet DeiT-tiny, at every single block and every
span of two to four blocks; skipping the span beside it.

RBA (arXiv 2410.04941): one span is replaced by one linear map, plain least squares without bias, one
for all tokens, fitted on all calibration images. Reported on the test images, one JSON line a row.
`python -m benchmarks.paper_baseline` writes `benchmarks/results/paper_baseline.jsonl` and its table.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

from benchmarks.real_data import deit_tiny, imagenet
from rba_compress.core.inference import evaluating
from rba_compress.core.loader import read
from rba_compress.core.map_spec import MapSpec
from rba_compress.core.outputs import main_output
from rba_compress.core.plan import Plan, listed
from rba_compress.planning.plan_cost import plan_saving
from rba_compress.planning.span_fits import fit_span
from rba_compress.profiling.cost import cost
from rba_compress.profiling.fidelity import compare_outputs
from rba_compress.profiling.profiler import calibrate
from rba_compress.units.offers import supports
from rba_compress.units.splice import splice_shared

RESULTS = Path(__file__).parent / "results"
METHODS = {"skip": MapSpec(kind="identity"), "least squares": MapSpec(kind="linear")}


@dataclass
class Baseline:
    longest: int = 4
    """Longest span, in blocks."""
    out: Path = RESULTS / "paper_baseline.jsonl"


def main(how: Baseline) -> None:
    model = deit_tiny()
    calibration, test = imagenet(model, "calibration"), list(read(imagenet(model, "test")))
    (chain,) = supports(model, calibration[0]).chains
    (profiled,), samples = calibrate(model, [chain], enumerate(tqdm(read(calibration), "calibrate")))
    dense_cost = cost(model, test[0])
    with evaluating(model):
        original = [main_output(batch.run(model)) for batch in test]
    redundancy = profiled.block_redundancy
    rows: list[dict[str, Any]] = []
    for start, stop in tqdm(chain.spans(how.longest), "spans"):
        for method, spec in METHODS.items():
            replacement, tensors = fit_span(profiled, start, stop, spec)
            plan = Plan(replacements=(replacement,))
            compressed = splice_shared(model, plan, tensors)
            with evaluating(compressed):
                outputs = [main_output(batch.run(compressed)) for batch in test]
            found = compare_outputs("kl", zip(original, outputs, test, strict=True))
            saved = plan_saving([chain], [replacement]).macs
            assert replacement.diagnostics is not None
            row = {
                "benchmark": "paper_baseline",
                "model": "deit_tiny_patch16_224",
                "blocks": chain.paths[start:stop],
                "method": method,
                "top1_dense": found.accuracy_original,
                "top1": found.accuracy_compressed,
                "agreement": found.agreement,
                "kl": round(found.divergence, 4),
                "r2": round(replacement.diagnostics.r2, 4),
                "block_redundancy": [round(value, 2) for value in redundancy[start:stop]],
                "macs_kept": round(1 - saved / dense_cost.macs, 4),
                "calibration_images": samples,
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    how.out.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    how.out.with_suffix(".md").write_text(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, skip and least squares side by side."""
    lines = [
        "# The paper's method on DeiT-tiny: every span of one to four blocks",
        "",
        f"ImageNet sample, {rows[0]['calibration_images']} calibration and 500 test images; original "
        f"top-1 {rows[0]['top1_dense']}. One linear map (plain least squares, no bias) in place of "
        "the span, against skipping it. Block Redundancy is of the span's blocks on the class token.",
        "",
        "| blocks | MACs kept (skip / map) | top-1 skip | top-1 map | agreement skip | agreement map "
        "| KL skip | KL map | R² of the map | Block Redundancy |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for skip, fitted in zip(rows[::2], rows[1::2], strict=True):
        assert skip["blocks"] == fitted["blocks"]
        pairs = " | ".join(
            f"{skip[name]:.3f} | {fitted[name]:.3f}" for name in ("top1", "agreement", "kl")
        )
        redundancy = ", ".join(f"{value:.1f}" for value in skip["block_redundancy"])
        lines.append(
            f"| {listed(skip['blocks'])} | {skip['macs_kept']:.3f} / {fitted['macs_kept']:.3f} "
            f"| {pairs} | {fitted['r2']:.3f} | {redundancy} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Baseline))
