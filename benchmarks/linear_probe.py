"""Claim: replaced blocks of an encoder without a head keep what a linear probe reads.

The paper's protocol for encoders (arXiv 2410.04941): features are frozen, a span of blocks is
replaced by one plain linear map, and a linear classifier is trained on the features. Here the
encoder is an ImageNet DeiT-tiny without its head. The data are CIFAR-10 images, enlarged to 224 x
224: 500 to fit the map on (half of them are fit samples), `train` others to train the probe on, and
`test` others to test it on. The probe is a multinomial logistic regression (scikit-learn, lbfgs, C
= 0.01, at most 1,000 iterations) on the class token behind the last norm, standardised by the
training features of the same encoder. It is trained anew for each encoder, as in the paper.

`python -m benchmarks.linear_probe` writes `benchmarks/results/linear_probe.jsonl` and its table.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.real_data import cifar10, deit_tiny
from rba_compress import Config, compress
from rba_compress.core.inference import evaluating
from rba_compress.core.map_spec import Kind

RESULTS = Path(__file__).parent / "results"
SPANS = ((9, 10), (8, 10), (3, 6))
METHODS: dict[str, Kind] = {"skip": "identity", "linear": "linear"}


@dataclass
class Probe:
    """Settings of the benchmark."""

    train: int = 1000
    test: int = 600
    out: Path = RESULTS / "linear_probe.jsonl"


def features(encoder: nn.Module, images: Tensor) -> NDArray[np.float64]:
    """Features of images, (N, d)."""
    found = []
    with evaluating(encoder):
        for part in tqdm(images.split(50), "features", disable=None):
            large = nn.functional.interpolate(part, size=224, mode="bicubic", antialias=True)
            found.append(encoder(large))
    return torch.cat(found).double().numpy()


def accuracy(encoder: nn.Module, images: Tensor, labels: Tensor, how: Probe) -> float:
    """Accuracy of a probe that is trained on the encoder's features."""
    x, y = features(encoder, images), labels.numpy()
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    probe.fit(x[: how.train], y[: how.train])
    return float(probe.score(x[how.train :], y[how.train :]))


def main(how: Probe) -> None:
    """Print a JSON line for the original, and for each span and map."""
    encoder: Any = deit_tiny()
    encoder.reset_classifier(0)
    images, labels = cifar10()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    large = nn.functional.interpolate(images[:500], size=224, mode="bicubic", antialias=True)
    rest = slice(500, 500 + how.train + how.test)
    whole = accuracy(encoder, images[rest], labels[rest], how)
    rows: list[dict[str, Any]] = [{"method": "original", "span": None, "accuracy": whole}]
    print(json.dumps(rows[0]), flush=True)
    for span in SPANS:
        for method, kind in METHODS.items():
            config = Config(maps=(kind,))
            result = compress(encoder, list(large.split(50)), spans=[span], config=config)
            found = accuracy(result.model, images[rest], labels[rest], how)
            kept = result.report.summary.macs_kept
            rows.append({"method": method, "span": span, "macs_kept": kept, "accuracy": found})
            print(json.dumps(rows[-1]), flush=True)
    how.out.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    how.out.with_suffix(".md").write_text(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown, a line a span."""
    by = {(row["method"], str(row["span"])): row for row in rows}
    lines = [
        "# Linear probe on a DeiT-tiny encoder, CIFAR-10",
        "",
        f"Accuracy of a linear probe on frozen features; {rows[0]['accuracy']:.3f} on the original's.",
        "",
        "| blocks | MACs kept | skipped | plain linear map (the paper) |",
        "| --- | --- | --- | --- |",
    ]
    for span in SPANS:
        each = [by[method, str(span)] for method in METHODS]
        cells = " | ".join(f"{row['accuracy']:.3f}" for row in each)
        lines.append(f"| {span[0]} to {span[1] - 1} | {each[1]['macs_kept']:.3f} | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(tyro.cli(Probe))
