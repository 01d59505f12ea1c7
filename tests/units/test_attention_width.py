"""head_width, qk_rank and vo_rank: narrower attention, by the network that it makes."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn

from rba_compress import Budget, Config, profile
from rba_compress.core.plan import Site
from rba_compress.planning.context import SearchContext
from rba_compress.planning.state import Candidate, undone, with_candidate, without_unread
from rba_compress.profiling.cost import cost
from rba_compress.units.splice import splice
from tests.networks import images, seeded

UNITS = ("head_width", "qk_rank", "vo_rank")


def vit(**kwargs: object) -> nn.Module:
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
    return seeded(timm.create_model, "vit_tiny_patch16_224", **(size | {"num_classes": 5} | kwargs))


def fitted(
    model: nn.Module, data: list[Tensor], units: tuple[str, ...] = UNITS
) -> tuple[SearchContext, list[Candidate]]:
    """A search at its start, and every option inside the blocks."""
    seen = profile(model, data, config=Config(units=units, multiple=1, refit=False))
    run = SearchContext.read(model, seen, data, Budget(macs=0.99))
    sites = [
        Site(c, b, b + 1, unit)
        for c, chain in enumerate(run.chains)
        for b, block in enumerate(chain.blocks)
        for unit in units
        if block.width(unit)
    ]
    return run, run.fitter.candidates(run.start, sites)


class Encoder(nn.Module):
    """torch's own encoder behind a linear layer: (N, T, 12) -> (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(24, 4, 48, batch_first=True, dropout=0.0)
        self.stem = nn.Linear(12, 24)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.stem(x)).mean(1))


def hugging_face() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        num_labels=5,
    )
    return seeded(ViTForImageClassification, config)


NETWORKS = {
    "fused, timm": lambda: (vit(), list(images(40, 32).split(10))),
    "separate, transformers": lambda: (hugging_face(), list(images(40, 32).split(10))),
    "torch.nn": lambda: (
        seeded(Encoder),
        list(torch.randn(40, 9, 12, generator=torch.Generator().manual_seed(0)).split(10)),
    ),
}


@pytest.mark.parametrize("units", [("head_width",), ("qk_rank", "vo_rank")], ids="+".join)
@pytest.mark.parametrize("name", NETWORKS)
def test_narrower_attention_costs_what_is_counted(name: str, units: tuple[str, ...]) -> None:
    model, data = NETWORKS[name]()
    run, options = fitted(model, data, units)
    assert {o.site.unit for o in options} == {*units}
    solution = run.start.solution
    for site in dict.fromkeys(each.site for each in options):
        of_site = [each for each in options if each.site == site]
        solution = with_candidate(solution, of_site[len(of_site) // 2])
    solution = without_unread(solution, run.profile)
    compressed = splice(model, solution.plan, solution.tensors)
    assert type(compressed) is type(model)
    counted, expected = cost(compressed, run.profile.example), run.fitter.cost(solution.plan)
    assert (counted.macs, counted.params) == (expected.macs, expected.params)
    for old in list(solution.plan.replacements):
        if old.inner:
            solution = undone(solution, old)
    with torch.no_grad():
        x = data[0]
        again = splice(model, solution.plan, solution.tensors)
        torch.testing.assert_close(again(x), model(x), rtol=1e-4, atol=1e-5)
