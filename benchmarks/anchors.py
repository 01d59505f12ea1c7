"""Claim: 15 known pairs take the place of 300 parallel anchors (Cannistraci et al., arXiv 2303.00721).

Pairs of spaces of the same images, whose pairing is hidden but for 15 seeds: DeiT-tiny (ImageNet) and
ResNet-20 (CIFAR-10) on the CIFAR images of `RBA_DATA`, both ways, and two seeds of one small network
and two architectures on digits. Anchors are looked for among the first half of the images; on the
others, each sample looks for its counterpart by its relative representation (Jaccard, MRR, cosine), and
a head that was trained on the one space reads the other.

`python -m benchmarks.anchors` writes `benchmarks/results/anchors.jsonl` and its table, and
`python -m benchmarks.anchors --data cifar10 --samples 2000 --runs "least squares"` the rows of twice as
many samples.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import interpolate
from tqdm import tqdm

from benchmarks.real_data import cifar10, deit_tiny, resnet20
from rba_compress.cli.digits import digits_data
from rba_compress.cli.latent_demos.anchor_trial import Pair, recovering
from rba_compress.cli.latent_demos.networks import Data, trained
from rba_compress.cli.latent_demos.trials import AnchorTrial, Kind

RESULTS = Path(__file__).parent / "results"


@dataclass
class Run:
    """Settings of the benchmark."""

    data: tuple[Literal["digits", "cifar10"], ...] = ("digits", "cifar10")
    """DeiT-tiny takes two minutes to see the CIFAR images."""
    trial: tyro.conf.OmitArgPrefixes[AnchorTrial] = AnchorTrial()  # noqa: RUF009
    out: Path = RESULTS / "anchors.jsonl"


@torch.no_grad()
def cifar_pairs() -> list[Pair]:
    """DeiT-tiny's class token, and the pooled features of ResNet-20, both ways."""
    images, labels = cifar10()  # normalised with the statistics that DeiT takes, too
    wide, narrow = deit_tiny(), resnet20()
    body, narrow.linear = nn.Sequential(narrow), nn.Identity()
    spaces: dict[str, Tensor] = {"ResNet-20": torch.cat([body(part) for part in images.split(200)])}
    seen = []
    for part in tqdm(images.split(50), desc="DeiT-tiny", disable=None):
        large = interpolate(part, size=224, mode="bicubic")
        seen.append(wide.forward_head(wide.forward_features(large), pre_logits=True))  # type: ignore[operator]
    spaces["DeiT-tiny"] = torch.cat(seen)
    half = len(images) // 2

    def pair(x: str, y: str) -> Pair:
        train, test = (
            (spaces[x][p], spaces[y][p], labels[p]) for p in (slice(half), slice(half, None))
        )
        return Pair(f"{x} -> {y}, CIFAR", train, test)

    return [pair("DeiT-tiny", "ResNet-20"), pair("ResNet-20", "DeiT-tiny")]


def digits_pairs() -> list[Pair]:
    """Two seeds of a convolutional network, and a perceptron beside one."""
    data = Data(*digits_data())

    def spaces(kind: Kind, seed: int) -> tuple[Tensor, Tensor]:
        whole = trained(kind, data.train, data.classes, width=64, steps=600, seed=seed)
        with torch.no_grad():
            return whole[0](data.train[0]), whole[0](data.test[0])

    def pair(name: str, x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> Pair:
        return Pair(name, (x[0], y[0], data.train[1]), (x[1], y[1], data.test[1]))

    one, other, third = spaces("conv", 0), spaces("conv", 1), spaces("mlp", 0)
    return [pair("two seeds, digits", one, other), pair("two architectures, digits", third, one)]


def main(how: Run) -> None:
    """Print and write a row for each pair and way to have anchors."""
    before = how.out.read_text().splitlines() if how.out.exists() else []
    found = {_key(row): row for row in map(json.loads, before)}
    pairs = {"digits": digits_pairs, "cifar10": cifar_pairs}
    for pair in [pair for name in how.data for pair in pairs[name]()]:
        for row in map(asdict, recovering(pair, how.trial).rows):
            found[_key(row)] = {"repetitions": how.trial.repetitions, **row}
            print(json.dumps(row), flush=True)
    order = list(dict.fromkeys(row["pair"] for row in found.values()))
    rows = sorted(found.values(), key=lambda row: (order.index(row["pair"]), row["samples"]))
    how.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    how.out.with_suffix(".md").write_text(table(rows))


def _key(row: dict[str, Any]) -> tuple[str, int, str]:
    """Key of a row: a later run of the same key replaces the row."""
    return row["pair"], row["samples"], row["anchors"]


def table(rows: list[dict[str, Any]]) -> str:
    """A table for each pair."""
    head = "anchors | samples | Jaccard | MRR | cosine | of the gap in MRR | accuracy | right | seconds"
    lines = []
    for pair, group in groupby(rows, key=lambda row: row["pair"]):
        lines += [f"**{pair}**", "", f"| {head} |", "| --- |" + " --- |" * 8]
        for row in group:
            cells = [row["anchors"], f"{row['samples']:,}", f"{row['jaccard']:.3f}"]
            cells += [f"{row['mrr']:.3f} ± {row['mrr_spread']:.3f}", f"{row['cosine']:.3f}"]
            cells += [f"{row['recovered']:.2f} ± {row['recovered_spread']:.2f}"]
            cells += [f"{row['accuracy']:.3f}", f"{row['right']:.2f}", f"{row['seconds']:.1f}"]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Run))
