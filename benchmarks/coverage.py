"""Claim: one network of each family is found, compressed by one span, saved, read back and exported.

Every network of `rba_compress.catalogue`: one of each family of timm, small configurations of
transformers, torchvision and torch.nn. Weights are random and inputs small: the claim is of breadth,
not of quality. A row without chains says why; none crashes and none gives a wrong result.

`python -m benchmarks.coverage` writes `benchmarks/results/coverage.jsonl` and its table.
"""

from __future__ import annotations

import json
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

from rba_compress.cli.catalogue import names, network
from rba_compress.cli.coverage import Row, tried

RESULTS = Path(__file__).parent / "results"


@dataclass
class Run:
    """Settings of the benchmark."""

    networks: tuple[str, ...] = ()
    """By default all that are not in `out` yet."""
    onnx: bool = True
    """Export each, which takes most of the time."""
    threads: int = 1
    out: Path = RESULTS / "coverage.jsonl"


def read(path: Path) -> dict[str, Row]:
    """The rows of an earlier run, by network."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [Row.model_validate_json(line) for line in lines]
    return {row.network: row for row in rows}


def main(how: Run) -> None:
    """Print a JSON line for each network, and totals."""
    torch.set_num_threads(how.threads)
    warnings.simplefilter("ignore")  # of libraries that meet sizes they were not made for
    rows = read(how.out)
    wanted = how.networks or [name for name in names() if name not in rows]
    for name in tqdm(wanted, "networks", disable=None):
        _, row = tried(network(name), onnx=how.onnx)
        rows[name] = row
        print(row.model_dump_json(), flush=True)
        ordered = [rows[known] for known in names() if known in rows]
        how.out.write_text("".join(f"{r.model_dump_json()}\n" for r in ordered))
        how.out.with_suffix(".md").write_text(table(ordered))
    print(json.dumps(totals(list(rows.values()))))


def totals(rows: Sequence[Row]) -> dict[str, float]:
    """Counts over all rows."""
    found = [row for row in rows if row.chains]
    return {
        "networks": len(rows),
        "with_chains": len(found),
        "chains": sum(row.chains for row in rows),
        "blocks": sum(row.blocks for row in rows),
        "wrong": sum(not row.right for row in rows),
        "reloaded_bit_equal": sum(row.reloaded is True for row in rows),
        "onnx": sum(row.onnx is not None for row in rows),
        "onnx_fixed": sum(row.onnx_fixed for row in rows),
        "onnx_worst": max((row.onnx for row in rows if row.onnx is not None), default=0.0),
        "onnx_refused": sum(bool(row.onnx_error) for row in rows),
        "onnx_refused_dense_too": sum(bool(row.dense_onnx_error) for row in rows),
        "seconds_to_find_median": statistics.median(row.seconds for row in rows),
        "seconds_to_find_most": max(row.seconds for row in rows),
    }


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    summed, timm = totals(rows), [row for row in rows if "/" not in row.network]
    lines = [
        "# Networks tried from end to end",
        "",
        f"{len(rows)} networks with random weights, {len(timm)} of them of timm "
        f"({sum(r.chains for r in timm)} chains, {sum(r.blocks for r in timm)} blocks there; "
        f"{summed['chains']} and {summed['blocks']} in all). {summed['with_chains']} have chains; in "
        "each, one block was replaced by a shrunk map.",
        "",
        "- as by hand: the output is, bit for bit, what the original gives with the map's value "
        "put in place of the block's by a hook",
        "- reloaded: saved, read back, and the output is the same bit for bit",
        "- ONNX: the largest difference of ONNX Runtime's outputs, relative to the largest output; "
        "fixed: of one batch size, for the exporter gives no file of any",
        "",
        "| network | chains | blocks | found in | same shape, finite | as by hand | reloaded | ONNX |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    marks = {True: "yes", False: "NO", None: ""}
    for r in rows:
        parity = "" if r.onnx is None else f"{r.onnx:.0e}{', fixed' if r.onnx_fixed else ''}"
        if r.onnx_error:
            parity = "refused, as the original" if r.dense_onnx_error else "refused"
        shape = marks[None if r.shape_kept is None else r.shape_kept and bool(r.finite)]
        cells = [r.network, str(r.chains), str(r.blocks), f"{r.seconds:.1f} s", shape]
        lines.append(f"| {' | '.join([*cells, marks[r.by_hand], marks[r.reloaded], parity])} |")
    for title, picked in (
        ("Without chains", [(r.network, r.refusal) for r in rows if r.refusal]),
        ("Without ONNX", [(r.network, r.onnx_error.splitlines()[0]) for r in rows if r.onnx_error]),
    ):
        lines += ["", f"## {title}", "", *(f"- {name}: {reason}" for name, reason in picked)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Run))
