"""Claim: spaces of networks that each learned a part of a task are worth that of one network which
learned all of it, once they are relative to the same anchors and averaged (Crisostomi et al., arXiv
2311.06547).

Three tasks that share samples, classes, or neither, five seeds, on digits and on the CIFAR-10 images of
`RBA_DATA` (the first 2,000 train, the others test). As in the source, a sample is read by the networks
whose task holds it, which tells what it is of; "task hidden" lets every network read every sample.

`python -m benchmarks.aggregation` writes `benchmarks/results/aggregation.jsonl` and a table of it,
`aggregation.md`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks.stitching import read
from rba_compress.cli.latent_demos.aggregation_trial import aggregating
from rba_compress.cli.latent_demos.trials import AggregationTrial

RESULTS = Path(__file__).parent / "results"


@dataclass
class Run:
    """Settings of the benchmark."""

    data: tuple[Literal["digits", "cifar10"], ...] = ("digits", "cifar10")
    trial: tyro.conf.OmitArgPrefixes[AggregationTrial] = AggregationTrial()  # noqa: RUF009
    out: Path = RESULTS / "aggregation.jsonl"


def main(how: Run) -> None:
    """Print and write a row for each data set, setting and space."""
    rows = []
    for name in how.data:
        for row in aggregating(read(name), how.trial).rows:
            rows.append({"data": name, "seeds": len(how.trial.seeds), **asdict(row)})
            print(json.dumps(rows[-1]), flush=True)
    how.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how.out.with_suffix(".md").write_text(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """A table for each data set and setting."""
    columns = {"knn": "k-NN", "linear": "linear", "separability": "separability", "cka": "CKA"}
    columns["task"] = "task told"
    lines = []
    for (data, setting), group in groupby(rows, key=lambda row: (row["data"], row["setting"])):
        lines += [f"**{data}, {setting}**", "", f"| space | {' | '.join(columns.values())} |"]
        lines.append("| --- |" + " --- |" * len(columns))
        for row in group:
            cells = [f"{row['mean'][key]:.3f} ± {row['spread'][key]:.3f}" for key in columns]
            lines.append(f"| {row['space']} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Run))
