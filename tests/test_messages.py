"""Words at the right moment: what a wrong name, a near miss, or a value at a prompt says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rba_compress import (
    ArtifactError,
    Budget,
    Config,
    ConfigError,
    Healing,
    NoChainError,
    RBAError,
    Result,
    compress,
    export_onnx,
    load,
    profile,
    search,
    supports,
)
from tests.networks import LIGHT, Chain, loader, rows, seeded


class SumOutside(nn.Module):
    """Residual network whose sums stand in its own forward. (N, 4) -> (N, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = x + layer(x).relu()
        return self.head(x)


def test_a_sum_outside_of_the_blocks_is_told() -> None:
    model = seeded(SumOutside)
    said = "layers.0, layers.1, layers.2 and 1 more (Linear): its output is added to its own input"
    assert said in str(supports(model, rows(4)))
    with pytest.raises(NoChainError, match="put the sum into the forward of a module"):
        compress(model, loader())
    assert "added to its own input" not in str(supports(seeded(Chain), rows(4)))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"windw": 2}, "did you mean 'window'"),
        ({"units": ("spam",)}, "hidden_width.*did you mean 'span'"),
        ({"maps": ("afine",)}, "'orthogonal'.*did you mean 'affine'"),
        ({"effort": "quik"}, "did you mean 'quick'"),
        ({"divergence": "kll"}, "did you mean 'kl'"),
        ({"deploy": "onnx"}, "'any', 'gguf'"),
    ],
)
def test_a_wrong_name_is_answered_with_the_near_ones(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Config(**settings)
    with pytest.raises(RBAError, match="did you mean 'macs'"):
        Budget(mac=0.5)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="did you mean 'maps'"):
        Healing(train="map")  # type: ignore[arg-type]


def test_a_metric_of_similarity_that_is_none_lists_them() -> None:
    seen = profile(seeded(Chain), loader(), config=LIGHT).chains[0]
    with pytest.raises(ConfigError, match="'cka', 'r2'.*did you mean 'cosine'"):
        seen.similarity("cosin")  # type: ignore[arg-type]


def test_a_module_of_ones_own_is_asked_for(tmp_path: Path) -> None:
    model = seeded(Chain, 6)
    compress(model, loader(), spans=[(2, 3)], config=LIGHT).save(tmp_path / "out")
    for action in (lambda: load(tmp_path / "out"), lambda: export(tmp_path / "out", tmp_path / "out")):
        with pytest.raises(ArtifactError, match=r"pass one, load\(dir, original=...\), and what"):
            action()
    export(load(tmp_path / "out", original=model), tmp_path)


def export(model: Any, folder: Path) -> None:
    export_onnx(model, folder / "model.onnx", rows(4))


def test_values_at_a_prompt_fit_three_lines(result: Result, digits: nn.Module) -> None:
    model, data = seeded(Chain, 12), loader(200, 50)
    seen = profile(model, data, config=LIGHT)
    found = search(model, seen, data, budget=Budget(macs=0.6))
    values = [
        result,
        result.plan,
        result.report,
        result.profile,
        result.profile.chains[0],
        result.profile.chains[0].chain,
        *result.front,
        found,
        Config(),
        Healing(),
        Budget(macs=0.5),
        supports(digits, torch.zeros(2, 1, 8, 8)),
        supports(seeded(SumOutside), rows(4)),
    ]
    for value in values:
        said = repr(value)
        assert said.startswith(f"{type(value).__name__}(")
        assert len(said) <= 360, said
        assert said.count("\n") < 3
    assert "accuracy" in str(result)
    assert str(result.report) == result.report.table()


def test_public_names_are_loaded_where_they_are_used() -> None:
    import rba_compress

    assert set(rba_compress._HOMES) == set(rba_compress.__all__)
    assert set(rba_compress.__all__) <= set(dir(rba_compress))
    assert rba_compress.latent.__name__ == "rba_compress.latent"
    with pytest.raises(AttributeError, match="has no attribute 'compres'"):
        rba_compress.compres  # noqa: B018
