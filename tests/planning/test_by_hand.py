"""Spans chosen by hand: exactly these are replaced, by the map that a regression gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rba_compress import (
    ArtifactError,
    Budget,
    Config,
    ConfigError,
    Plan,
    PlanError,
    compress,
    load,
    profile,
    save,
    search,
    splice,
)
from rba_compress.core.loader import Split
from tests.networks import Block, Chain, loader, seeded


class Stages(nn.Module):
    """Two chains of blocks of one class and two widths. (N, 4) -> (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.layer1 = nn.Sequential(*(Block(8) for _ in range(3)))
        self.between = nn.Linear(8, 16)
        self.layer2 = nn.Sequential(*(Block(16) for _ in range(4)))
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer2(self.between(self.layer1(self.stem(x)))))


def streams(model: Any, x: Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        found = [model.stem(x)]
        for block in model.blocks:
            found.append(block(found[-1]))
    return [h.double().numpy() for h in found]


def of_plan(plan: Any) -> list[tuple[str, int, int, str]]:
    return [(r.chain, r.start, r.stop, r.map.kind) for r in plan.in_order]


def test_exactly_these_spans_get_the_papers_map(tmp_path: Path) -> None:
    model, data = seeded(Chain, 8), loader(400, 50)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = compress(model, data, spans=[(5, 7), (1, 3)], config=Config(maps=("linear",)))
    assert of_plan(result.plan) == [("blocks", 1, 3, "linear"), ("blocks", 5, 7, "linear")]
    assert result.plan.budget is None
    assert not result.plan.refits
    assert len(result.front) == 1
    fit = torch.cat([batch.args[0] for part, _, batch in Split(data, 0).deal("fit")])
    h = streams(model, fit)
    for start, stop in ((1, 3), (5, 7)):
        wanted = np.linalg.lstsq(h[start], h[stop], rcond=None)[0].T
        (found,) = (t for k, t in result.tensors.items() if k.startswith(f"blocks.{start}."))
        # Streams of 4 inputs in 8 channels determine a map to 1e-4, and its products to 1e-5.
        mapped = h[start] @ found.double().numpy().T
        np.testing.assert_allclose(mapped, h[start] @ wanted.T, rtol=1e-6, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    result.save(tmp_path / "saved")
    again = load(tmp_path / "saved", original=model)
    assert torch.equal(again(data[0]), result.model(data[0]))


def test_of_several_maps_the_nearest_output_wins() -> None:
    model, data = seeded(Chain, 8), loader(400, 50)
    chosen = compress(model, data, spans=[(2, 5)])
    (only,) = chosen.plan.replacements
    alone = {
        kind: compress(
            model, data, spans=[(2, 5)], config=Config(maps=(kind,), shrinks=(0.4, 0.7, 1.0))
        )
        for kind in ("identity", "shrunk", "folded")
    }
    reached = {kind: each.plan.steps[-1].divergence for kind, each in alone.items()}
    assert chosen.plan.steps[-1].divergence == min(reached.values())
    assert reached[only.map.kind] == min(reached.values())


def test_several_chains_are_named() -> None:
    model, data = seeded(Stages), loader(200, 50)
    config = Config(maps=("affine",))
    result = compress(model, data, spans={"layer2": [(1, 3)], "layer1": [(0, 1)]}, config=config)
    assert of_plan(result.plan) == [("layer1", 0, 1, "affine"), ("layer2", 1, 3, "affine")]
    with pytest.raises(PlanError, match="'layer1' of 3 blocks, 'layer2' of 4 blocks.*spans="):
        compress(model, data, spans=[(1, 3)], config=config)
    with pytest.raises(PlanError, match="there is no chain 'layer3'"):
        compress(model, data, spans={"layer3": [(1, 3)]}, config=config)


def test_the_read_out_of_a_vit_is_left_as_it_is(digits: nn.Module, digits_loader: list[Any]) -> None:
    result = compress(digits, digits_loader, spans=[(3, 6)], config=Config(maps=("linear",)))
    assert of_plan(result.plan) == [("blocks", 3, 6, "linear")]
    x = digits_loader[0][0]
    assert result.model.forward_features(x).shape == digits.forward_features(x).shape
    assert result.report.fidelity.samples == 19


@pytest.mark.parametrize(
    ("spans", "says"),
    [
        ([], "no span is given"),
        ((3, 6), "3 of spans=.* is no span"),
        ([(3, 3)], "is no span"),
        ([(-1, 2)], "is no span"),
        ([(0, 2, 4)], "is no span"),
        ([("a", "b")], "is no span"),
        ([(0, 3), (2, 4)], "0:3 and 2:4 share a block"),
    ],
)
def test_what_is_no_span_is_refused(spans: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        compress(seeded(Chain), loader(), spans=spans)


def test_spans_that_cannot_be_are_refused() -> None:
    model = seeded(Chain, 4)
    with pytest.raises(PlanError, match="no span 2:5: it has 'blocks' of 4 blocks"):
        compress(model, loader(), spans=[(2, 5)])
    with pytest.raises(ConfigError, match="leave out the budget"):
        compress(model, loader(), spans=[(2, 3)], budget=Budget(macs=0.9))
    with pytest.raises(ConfigError, match="2 blocks is longer than window=1"):
        compress(model, loader(), spans=[(1, 3)], config=Config(window=1))
    with pytest.raises(PlanError, match="folded map needs a kept block before it"):
        compress(model, loader(), spans=[(0, 2)], config=Config(maps=("folded",)))


def test_a_network_that_was_spliced_says_how_it_is_saved(tmp_path: Path) -> None:
    model = seeded(Chain, 4)
    network = splice(model, Plan(), {})
    with pytest.raises(ArtifactError, match=r"not a Chain: compress\(model, loader, spans="):
        save(network, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_one_profile_serves_many_spans() -> None:
    model, data = seeded(Chain, 8), loader(400, 50)
    config = Config(maps=("linear",))
    seen = profile(model, data, config=config)
    for span in ((1, 3), (4, 5)):
        alone = compress(model, data, spans=[span], config=config)
        found = search(model, seen, data, spans=[span])
        assert of_plan(found.plan) == [("blocks", *span, "linear")]
        assert found.plan.replacements[0].map == alone.plan.replacements[0].map
        torch.testing.assert_close(found.tensors, alone.tensors, rtol=1e-5, atol=1e-6)
        network = splice(model, found.plan, found.tensors)
        torch.testing.assert_close(network(data[0]), alone.model(data[0]))
    assert not seen.record.networks
    with pytest.raises(ConfigError, match="leave out the budget"):
        search(model, seen, data, spans=[(1, 3)], budget=Budget(macs=0.9))
    short = profile(model, data, config=Config(window=2))
    with pytest.raises(ConfigError, match="3 blocks is longer than window=2"):
        search(model, short, data, spans=[(1, 4)])
