"""Claim: this is the paper's method on a real ImageNet DeiT-tiny, at every single block and every
span of two to four blocks; skipping the span beside it.

RBA (arXiv 2410.04941): one span is replaced by one linear map, plain least squares without bias, one
for all tokens, fitted on the fit half of the calibration images. Each row is a call of `search` with
`spans=` on one profile, and one of `compare` on the test images.
`python -m benchmarks.paper_baseline` writes `benchmarks/results/paper_baseline.jsonl` and a table, the
shortest spans first; rows that are there are kept, so that it goes on where it was interrupted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

from benchmarks.real_data import deit_tiny, imagenet
from rba_compress import Config, compare, profile, search, splice
from rba_compress.core.plan import listed

RESULTS = Path(__file__).parent / "results"
METHODS = {"skip": "identity", "least squares": "linear"}


@dataclass
class Baseline:
    longest: int = 4
    """Longest span, in blocks."""
    out: Path = RESULTS / "paper_baseline.jsonl"


def main(how: Baseline) -> None:
    model = deit_tiny()
    # Latency is measured on the first batch, for each row: a small one is enough.
    calibration, test = (imagenet(model, split, batch_size=5) for split in ("calibration", "test"))
    profiles = {
        method: profile(
            model,
            calibration,
            config=Config(maps=(kind,), units=("span",), keep_features=True, window=how.longest),
        )
        for method, kind in METHODS.items()
    }
    (chain,) = profiles["skip"].chains
    lines = how.out.read_text().splitlines() if how.out.exists() else []
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    done = {(*row["blocks"], row["method"]) for row in rows}
    spans = sorted(chain.chain.spans(how.longest), key=lambda span: (span[1] - span[0], span))
    for start, stop in tqdm(spans, "spans"):
        for method, profiled in profiles.items():
            if (*chain.chain.paths[start:stop], method) in done:
                continue
            found = search(model, profiled, calibration, spans=[(start, stop)])
            (replacement,) = found.plan.replacements
            report = compare(model, splice(model, found.plan, found.tensors), test)
            assert replacement.diagnostics is not None
            row = {
                "benchmark": "paper_baseline",
                "model": "deit_tiny_patch16_224",
                "blocks": chain.chain.paths[start:stop],
                "method": method,
                "top1_dense": report.fidelity.accuracy_original,
                "top1": report.fidelity.accuracy_compressed,
                "agreement": report.fidelity.agreement,
                "kl": round(report.fidelity.divergence, 4),
                "r2": round(replacement.diagnostics.r2, 4),
                "block_redundancy": [round(x, 2) for x in chain.block_redundancy[start:stop]],
                "macs_kept": round(report.compressed.macs / report.original.macs, 4),
                "latency": round(report.latency.ratio, 4),
                "fit_images": profiled.samples,
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
            how.out.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    how.out.with_suffix(".md").write_text(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, skip and least squares side by side."""
    longest = max(len(row["blocks"]) for row in rows)
    lines = [
        f"# The paper's method on DeiT-tiny: every span of up to {longest} blocks",
        "",
        f"ImageNet sample, {rows[0]['fit_images']} images to fit and 500 test images; original "
        f"top-1 {rows[0]['top1_dense']}. One linear map (plain least squares, no bias) in place of "
        "the span, against skipping it. Block Redundancy is of the span's blocks on the class token.",
        "",
        "| blocks | MACs kept (skip / map) | top-1 skip | top-1 map | agreement skip | agreement map "
        "| KL skip | KL map | R² of the map | Block Redundancy |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    skips, maps = ([row for row in rows if row["method"] == method] for method in METHODS)
    for skip in skips:
        fitted = next(row for row in maps if row["blocks"] == skip["blocks"])
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
