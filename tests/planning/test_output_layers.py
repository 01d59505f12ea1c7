"""Layers that outputs come from: found, solved as numpy does, and taken only where that helps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from torch import Tensor, fx, nn

from rba_compress import Budget, Config, compress, load, profile
from rba_compress.core.batch import as_batch
from rba_compress.core.plan import LayerRefit, Site
from rba_compress.planning import output_layers as module
from rba_compress.planning.context import SearchContext
from rba_compress.planning.output_layers import output_gap, output_layers
from rba_compress.planning.refinement import DAMPINGS, outputs
from rba_compress.planning.state import with_candidate
from rba_compress.profiling.fidelity import Criterion
from tests.networks import Chain, loader, rows, seeded


class Two(nn.Module):
    """Two outputs by name, of which one comes from a layer, and one from a softmax behind a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.rest = nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"scores": self.scores(x), "rest": self.rest(x).softmax(-1)}


class Tied(nn.Module):
    """A layer whose weight another layer has, too."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


class PerPosition(nn.Module):
    """Scores of each position. (N, 4) -> (N, 4, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[..., None])


@pytest.mark.parametrize(
    ("network", "found"),
    [
        (Chain, {"head": "kl"}),
        (lambda: fx.symbolic_trace(Chain()), {"head": "kl"}),
        (Two, {"scores": "kl"}),
        (Tied, {}),
        (Twice, {}),
        (PerPosition, {}),
    ],
)
def test_it_is_found(network: Any, found: dict[str, str]) -> None:
    batch = as_batch(rows(5))
    assert output_layers(seeded(network), [], Criterion("kl"), batch) == found


def test_it_is_found_in_timm_and_in_transformers() -> None:
    vit = seeded(timm.create_model, "test_vit", num_classes=5)
    image = as_batch(torch.zeros(2, 3, 160, 160))
    assert output_layers(vit, [], Criterion("kl"), image) == {"head": "kl"}
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=9
    )
    bert = seeded(transformers.BertForSequenceClassification, config)
    batch = as_batch({"input_ids": torch.ones(3, 4, dtype=torch.long)})
    assert output_layers(bert, [], Criterion("kl"), batch) == {"classifier": "kl"}


@pytest.mark.parametrize("divergence", ["kl", "nse"])
def test_the_correction_is_that_of_numpy(divergence: Any) -> None:
    """Least squares of the original's scores, of which those of impossible classes are cut off."""
    original, compressed = seeded(Chain), seeded(Chain)
    with torch.no_grad():
        compressed.get_submodule("head").bias += torch.tensor([40.0, 0.0, -1.0])  # type: ignore[operator]
        compressed.get_submodule("blocks")[1].up.weight *= 0.5  # type: ignore[index, union-attr]
    data = [as_batch(x) for x in loader(60)]
    found = output_gap(original, compressed, "head", data, divergence=divergence)
    traced = output_gap(original, fx.symbolic_trace(compressed), "head", data, divergence=divergence)
    assert torch.equal(traced.xy, found.xy)
    features: list[Tensor] = []
    compressed.get_submodule("head").register_forward_pre_hook(lambda _, x: features.append(x[0]))
    y, z = (
        torch.cat([network(*batch.args) for batch in data]).detach().double().numpy()
        for network in (original, compressed)
    )
    if divergence == "kl":
        y, z = (a - np.log(np.exp(a).sum(1, keepdims=True)) for a in (y, z))
        assert (z < module.LEAST).any()
        y, z = (np.maximum(a, module.LEAST) for a in (y, z))
    x = torch.cat(features).detach().double().numpy()
    wanted, *_ = np.linalg.lstsq(x - x.mean(0), (y - z) - (y - z).mean(0), rcond=None)
    mine = np.linalg.lstsq(found.xx.numpy(), found.xy.numpy(), rcond=None)[0]
    np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.mean_y.numpy(), (y - z).mean(0), rtol=1e-5, atol=1e-5)


def drafted(model: nn.Module, data: list[Tensor]) -> tuple[SearchContext, Any]:
    """A search in which one block was taken away."""
    how = Config(maps=("identity",), units=("span",))
    context = SearchContext.read(model, profile(model, data, config=how), data, Budget(macs=0.5))
    (move,) = context.fitter.candidates(context.start, [Site(0, 1, 2, "span")])
    draft = context.state(
        with_candidate(context.start.solution, move), context.start.cost - move.saving
    )
    return context, draft


def test_it_is_a_step_of_the_search_that_must_help() -> None:
    model, data = seeded(Chain), loader(400)
    with torch.no_grad():
        model.get_submodule("head").weight *= 4  # type: ignore[operator]
    context, draft = drafted(model, data)
    better = outputs(context, draft)
    assert better.mean < 0.9 * draft.mean
    (refit,) = better.solution.plan.refits
    assert isinstance(refit, LayerRefit)
    assert (refit.path, refit.step) == ("head", 1.0)
    assert refit.damping in DAMPINGS
    assert context.log.steps[-1].action == "refit"
    assert str(better.solution.plan).endswith("layers re-solved: 1")
    # Solved again, it is listed once.
    again = outputs(context, better)
    assert len(again.solution.plan.refits) == 1
    # What does not help is not taken.
    assert outputs(context, context.start) is context.start


def test_no_layer_of_an_output_is_moved_without_refits() -> None:
    model, data = seeded(Chain), loader(200)
    for config in (Config(refit=False), Config(effort="quick")):
        found = compress(model, data, budget=Budget(macs=0.8), config=config)
        assert not [r for r in found.plan.refits if r.path == "head"]


def test_a_result_with_it_is_reloaded(tmp_path: Path) -> None:
    model, data = seeded(Chain), loader(400)
    with torch.no_grad():
        model.get_submodule("head").weight *= 4  # type: ignore[operator]
    found = compress(model, data, budget=Budget(macs=0.8))
    assert [r for r in found.plan.refits if r.path == "head"]
    found.save(tmp_path / "delta", delta=True)
    again = load(tmp_path / "delta", original=model)
    assert torch.equal(again(rows(9)), found.model(rows(9)))
    assert not torch.equal(found.model.get_submodule("head").weight, model.get_submodule("head").weight)  # type: ignore[arg-type]
