from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rba_compress import ArtifactError, Result, WeightsError, load, save
from rba_compress.artifacts.pareto_front import write_front
from rba_compress.cli.digits import digits_model
from rba_compress.profiling.fidelity import interval


def test_every_point_of_the_front_is_spliced_without_searching_again(
    result: Result, digits: nn.Module, digits_loader: list[Any]
) -> None:
    points = result.front
    assert len(points) >= 2
    kept = [point.report.compressed.macs for point in points]
    assert kept == sorted(kept, reverse=True)
    assert points[-1].report.compressed == result.report.compressed
    x = digits_loader[0][0]
    assert torch.equal(points[-1].splice(digits)(x), result.model(x))
    for point in points:
        f = point.report.fidelity
        assert f.divergence_low is not None
        assert f.divergence_high is not None
        assert f.divergence_low <= f.divergence <= f.divergence_high
        assert point.report.latency.pairs >= 7
        assert point.plan.steps[-1].macs == point.report.compressed.macs


@pytest.mark.slow
def test_a_front_is_written_and_each_point_loads(
    result: Result, digits: nn.Module, digits_loader: list[Any], tmp_path: Path
) -> None:
    out = tmp_path / "front"
    write_front(result.front, digits, result.profile, out)
    rows = json.loads((out / "front.json").read_text())
    with (out / "front.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["point"] for row in rows] == [row["point"] for row in table]
    assert float(table[0]["divergence"]) == rows[0]["divergence"]
    assert (out / "front.png").stat().st_size > 10_000
    x = digits_loader[0][0]
    for row, point in zip(rows, result.front, strict=True):
        assert row["macs"] == point.report.compressed.macs
        assert row["plan"] == str(point.plan)
        again = load(out / row["point"], original=digits)
        assert torch.equal(again(x), point.splice(digits)(x))
    size = (out / "point-01" / "model.safetensors").stat().st_size
    assert size < 0.5 * sum(p.numel() * 4 for p in digits.parameters())
    with pytest.raises(ArtifactError, match="is not empty: name a new directory"):
        write_front(result.front, digits, result.profile, out)
    assert not list(tmp_path.glob(".*"))


def test_a_delta_asks_for_its_original(result: Result, tmp_path: Path) -> None:
    save(result, tmp_path / "delta", delta=True)
    with pytest.raises(
        ArtifactError, match=r"is a delta: pass the VisionTransformer that it was made of"
    ):
        load(tmp_path / "delta")
    other = digits_model()
    with torch.no_grad():
        other.head.bias += 1
    with pytest.raises(WeightsError, match="original is not the VisionTransformer"):
        load(tmp_path / "delta", original=other)


def test_the_interval_is_of_the_mean() -> None:
    values = torch.from_numpy(np.random.default_rng(0).exponential(size=200))
    low, high = interval(values)
    assert low is not None
    assert high is not None
    error = float(values.std()) / 200**0.5
    assert low == pytest.approx(float(values.mean()) - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(float(values.mean()) + 1.96 * error, abs=0.3 * error)
    assert interval(values) == (low, high)
    assert interval(values[:1]) == (None, None)
    assert interval(torch.tensor([1.0, float("inf")])) == (None, None)
