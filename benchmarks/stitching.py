"""Claim: a head reads an encoder that it was not trained with, in a space that both describe by the
same anchors, and no single invariance is the best everywhere (Cannistraci et al., arXiv 2310.01211).

Ten networks a task and data set (five seeds of a perceptron and of a convolutional network), digits and
the CIFAR-10 images of `RBA_DATA` (the first 2,000 train, the others test), to tell classes and to give
the image back. All ordered pairs are stitched: without any alignment, in the space of one invariance,
in the product of all four under each aggregation, and through a map fitted to the pair's anchors.

`python -m benchmarks.stitching` writes `benchmarks/results/stitching.jsonl` and a table of it,
`stitching.md`; with `--data` or `--tasks`, the rows of these alone.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks.resnet import loaders
from rba_compress.cli.digits import digits_data
from rba_compress.cli.latent_demos.networks import Data
from rba_compress.cli.latent_demos.stitching_trial import MAPS, METHODS, stitching
from rba_compress.cli.latent_demos.trials import Trial

RESULTS = Path(__file__).parent / "results"


@dataclass
class Run:
    """Settings of the benchmark."""

    data: tuple[Literal["digits", "cifar10"], ...] = ("digits", "cifar10")
    tasks: tuple[Literal["classification", "reconstruction"], ...] = (
        "classification",
        "reconstruction",
    )
    trial: tyro.conf.OmitArgPrefixes[Trial] = Trial()  # noqa: RUF009
    out: Path = RESULTS / "stitching.jsonl"


def read(name: str) -> Data:
    """The images of a data set, divided."""
    if name == "digits":
        return Data(*digits_data())
    (train,), (test,) = loaders(2000)
    return Data(train, test)


def main(how: Run) -> None:
    """Print and write a row for each data set, task, method and kind of pair."""
    before = how.out.read_text().splitlines() if how.out.exists() else []
    rows = [row for row in map(json.loads, before) if not _again(row, how)]
    for name in how.data:
        for task in how.tasks:
            trial = replace(how.trial, task=task)
            for row in stitching(read(name), trial).rows:
                rows.append({"data": name, "seeds": len(trial.seeds), **asdict(row)})
                print(json.dumps(rows[-1]), flush=True)
    rows.sort(key=lambda row: (row["data"] != "digits", row["task"]))
    how.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how.out.with_suffix(".md").write_text(table(rows))


def _again(row: dict[str, Any], how: Run) -> bool:
    """Return whether this run measures a row of an earlier run again."""
    return row["data"] in how.data and row["task"] in how.tasks


def table(rows: list[dict[str, Any]]) -> str:
    """A line a method; a column a data set, task and kind of pair; bold is the best without a fit."""
    columns = list(dict.fromkeys((r["data"], r["task"], r["pairs"]) for r in rows))
    of = {(r["data"], r["task"], r["pairs"], r["method"]): r for r in rows}
    best = {c: max(of[*c, m]["mean"] for m in METHODS if m not in MAPS) for c in columns}
    lines = ["| " + " | ".join(["bridge", *map(", ".join, columns)]) + " |"]
    lines.append("| --- |" + " --- |" * len(columns))
    for method in METHODS:
        cells = [method]
        for column in columns:
            row = of[*column, method]
            text = f"{row['mean']:.3f} ± {row['spread']:.3f}"
            cells.append(f"**{text}**" if row["mean"] == best[column] else text)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Run))
