"""`compare`, metrics of the task, and what a report says where accuracy was not measured."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rba_compress import (
    ActivationError,
    Budget,
    BudgetError,
    Config,
    LoaderError,
    ModelError,
    compare,
    compress,
)
from rba_compress.core.batch import Batch
from tests.networks import LIGHT, Chain, loader, rows, seeded


class Segmenter(nn.Module):
    """Scores of three classes for each of 6 x 6 pixels. (N, 4, 6, 6) -> (N, 3, 6, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = Chain(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x.movedim(1, -1)).movedim(-1, 1)


def miou(outputs: Tensor, batch: Batch) -> Tensor:
    """Mean intersection over union of each image."""
    assert batch.labels is not None
    found, wanted = outputs.argmax(1).flatten(1), batch.labels.flatten(1)
    each = []
    for c in range(3):
        both = ((found == c) & (wanted == c)).sum(1)
        union = ((found == c) | (wanted == c)).sum(1)
        each.append(torch.where(union > 0, both / union.clamp_min(1), torch.ones(())))
    return torch.stack(each).mean(0)


def segmented(model: nn.Module, samples: int = 200) -> list[tuple[Tensor, Tensor]]:
    """Images with the classes that the network itself gives, of which some are wrong."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 4, 6, 6, generator=draw)
    with torch.no_grad():
        labels = model(x).argmax(1)
    wrong = torch.rand(labels.shape, generator=draw) < 0.1
    labels = torch.where(wrong, (labels + 1) % 3, labels)
    return [*zip(x.split(50), labels.split(50), strict=True)]


def test_compare_measures_every_sample() -> None:
    model, other = seeded(Chain, 6), seeded(Chain, 6)
    with torch.no_grad():
        other.blocks[3].down.weight.mul_(0.5)  # type: ignore[union-attr]
    x = rows(230)
    labels = model(x).argmax(-1)
    report = compare(model, other, [*zip(x.split(50), labels.split(50), strict=True)])
    with torch.no_grad():
        p, q = (m(x).double().log_softmax(-1) for m in (model, other))
    assert report.fidelity.samples == 230
    assert report.fidelity.divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), 1e-5)
    assert report.fidelity.accuracy_original == 1
    assert report.fidelity.accuracy_compressed == pytest.approx(
        float((other(x).argmax(-1) == labels).float().mean())
    )
    assert report.forward_passes is None
    assert "the search took" not in report.table()
    assert report.compressed == report.original


def test_compare_refuses_what_compress_refuses() -> None:
    model = seeded(Chain, 4)
    with pytest.raises(LoaderError, match="label 7, the model has 3 classes"):
        compare(model, model, [(rows(10), torch.full((10,), 7))])
    with pytest.raises(LoaderError):
        compare(model, model, [])


class Pair(nn.Module):
    """Two outputs, or the one that is asked for."""

    def __init__(self, only: str = "") -> None:
        super().__init__()
        self.scores, self.rest, self.only = nn.Linear(4, 3), nn.Linear(4, 2), only

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = {"scores": self.scores(x), "rest": self.rest(x)}
        return {self.only: found[self.only]} if self.only else found


def test_compare_names_outputs_that_are_not_alike() -> None:
    data = loader()
    with pytest.raises(ModelError, match=r"cannot be compared: .*\(10, 3\).* \(10, 4\)"):
        compare(seeded(Chain), nn.Flatten(), data)
    with pytest.raises(ModelError, match="the network's output has no 'rest': it has 'scores'"):
        compare(Pair(), Pair("scores"), data)
    assert compare(Pair("scores"), Pair(), data).fidelity.samples == 40


def test_a_metric_is_reported_before_and_after_with_its_interval() -> None:
    model = seeded(Segmenter)
    data = segmented(model, 400)
    result = compress(
        model, data, spans=[(2, 4)], config=Config(maps=("identity",)), metrics={"mIoU": miou}
    )
    report = compare(model, result.model, data, metrics={"mIoU": miou})
    found = report.fidelity.metrics["mIoU"]
    with torch.no_grad():
        each = [
            torch.cat([miou(m(x), Batch((x,), {}, y)) for x, y in data]).double().numpy()
            for m in (model, result.model)
        ]
    assert found.original == pytest.approx(each[0].mean())
    assert found.compressed == pytest.approx(each[1].mean())
    gap = each[0] - each[1]
    assert found.drop == pytest.approx(gap.mean())
    half = 1.96 * gap.std() / np.sqrt(len(gap))
    assert found.drop_low == pytest.approx(gap.mean() - half, abs=0.2 * half)
    assert found.drop_high == pytest.approx(gap.mean() + half, abs=0.2 * half)
    assert "mIoU" in report.table()
    assert "mIoU" in result.report.fidelity.metrics
    assert "a loss of" in report._repr_html_()


def test_a_metric_limits_the_search() -> None:
    model = seeded(Segmenter)
    data = segmented(model, 200)
    how: dict[str, Any] = {"config": LIGHT, "metrics": {"mIoU": miou}}
    loose = compress(model, data, budget=Budget(metric_drop={"mIoU": 0.2}), **how)
    tight = compress(model, data, budget=Budget(metric_drop={"mIoU": 0.01}), **how)
    assert loose.report.compressed.macs < tight.report.compressed.macs
    other = seeded(Segmenter)
    with pytest.raises(BudgetError, match="limits 'mIOU', and the metrics are 'mIoU'"):
        compress(other, data, budget=Budget(metric_drop={"mIOU": 0.1}), **how)
    with pytest.raises(BudgetError, match="drop of mIoU <= 0"):
        compress(other, data, budget=Budget(macs=0.5, metric_drop={"mIoU": 0.0}), **how)


@pytest.mark.parametrize("limit", [0.01, {}, {"mIoU": -1}, {"mIoU": "x"}])
def test_what_limits_no_metric_is_refused(limit: Any) -> None:
    with pytest.raises(BudgetError):
        Budget(metric_drop=limit)


def test_a_metric_gives_one_finite_number_for_each_sample() -> None:
    model, data = seeded(Chain, 4), loader()
    with pytest.raises(ActivationError, match=r"'mean' gave \(\) for 10 samples"):
        compare(model, model, data, metrics={"mean": lambda outputs, _: outputs.mean()})
    with pytest.raises(ActivationError, match="'bad' of the original is NaN"):
        compare(model, model, data, metrics={"bad": lambda outputs, _: outputs.mean(1) * torch.nan})


def test_accuracy_that_was_not_measured_is_told() -> None:
    model = seeded(Segmenter)
    data = segmented(model, 40)
    assert "accuracy was not measured" in compare(model, model, data).table()
    measured = compare(model, model, data, metrics={"mIoU": miou})
    assert "accuracy was not measured" not in measured.table()


def test_a_report_of_few_samples_says_so_first() -> None:
    model = seeded(Chain, 4)
    few = compare(model, model, loader(50)).table().splitlines()
    assert any("on 50 samples one of them is 2.0 points" in line for line in few[:3])
    assert "points" not in compare(model, model, loader(100)).table()
