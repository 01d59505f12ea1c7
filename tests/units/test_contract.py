"""A custom unit, from the search to the artefact, by its class and one line of registration."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rba_compress
from rba_compress import Budget, Config, ConfigError, PlanError, compress, load, supports
from rba_compress.core.config import Config as Settings
from rba_compress.core.cost import Cost
from rba_compress.core.plan import Chain as FoundChain
from rba_compress.core.plan import Offer, Replacement, Site
from rba_compress.core.registry import UNITS, register
from rba_compress.linalg.moments import PairMoments
from rba_compress.profiling.cost import cost
from rba_compress.units.base import Level, Trial, Unit
from rba_compress.units.block_variants import Form, Traces
from tests.networks import Chain, loader, seeded

# Begin: a unit in one file.


class ShiftModule(nn.Module):
    """x + bias."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class Shift(Unit):
    """A block replaced by a share of the mean change that it makes, y = x + a (E y - E x)."""

    name = "shift"
    removes = True
    mixes = False

    def offers(self, trial: Trial) -> Iterable[Offer]:
        return ()

    def sites(self, chain: FoundChain, window: int | None) -> list[tuple[int, int]]:
        return chain.spans(1)

    def excludes(self, site: Site, other: Replacement) -> bool:
        return UNITS[other.unit].removes

    def levels(self, config: Settings, chain: FoundChain) -> list[Level]:
        return [0.5, 1.0]

    def fit(self, new: Replacement, moments: PairMoments) -> tuple[Replacement, dict[str, Tensor]]:
        assert new.level is not None
        return new, {"bias": new.level * (moments.mean_y - moments.mean_x)}

    def cost(self, chain: FoundChain, new: Replacement, positions: int) -> tuple[list[Cost], int]:
        return [Cost(params=chain.width)], positions

    def shapes(self, new: Replacement) -> dict[str, tuple[int, ...]]:
        return {"bias": (new.width,)}

    def build(self, new: Replacement) -> nn.Module:
        return ShiftModule(new.width)

    def rewrite(
        self, model: nn.Module, new: Replacement, module: nn.Module, traces: Traces, form: Form
    ) -> nn.Module:
        return module

    def describe(self, new: Replacement) -> str:
        return f"{new.blocks[0].path} -> shift({new.level:g})"


# End.


@pytest.fixture
def shift() -> Iterator[Shift]:
    yield register(Shift())
    del UNITS["shift"]


def test_a_unit_is_searched_spliced_saved_and_loaded(shift: Shift, tmp_path: Path) -> None:
    model = seeded(Chain)
    config = Config(units=("shift",))
    found = compress(model, loader(), budget=Budget(macs=0.6), config=config)
    new = found.plan.replacements
    assert len(new) == 2
    assert {r.unit for r in new} == {"shift"}
    assert all(r.level in (0.5, 1.0) for r in new)
    assert {(c.unit, c.level) for c in found.plan.candidates} == {("shift", 0.5), ("shift", 1.0)}
    assert "-> shift(" in found.report.table()
    assert found.report.compressed == cost(found.model, found.profile.example)
    for r in new:
        assert isinstance(found.model.get_submodule(f"{r.blocks[0].path}.map"), ShiftModule)
    found.save(tmp_path / "shifted")
    x = loader()[0]
    again = load(tmp_path / "shifted", original=seeded(Chain))
    assert torch.equal(again(x), found.model(x))
    with pytest.raises(PlanError, match="a thinned block is not a block of the architecture"):
        found.save(tmp_path / "stock", fold=True)


def test_the_first_shift_is_the_mean_change_of_its_block(shift: Shift) -> None:
    model = seeded(Chain)
    found = compress(
        model, loader(), budget=Budget(macs=0.8), config=Config(units=("shift",), refit=False)
    )
    (new,) = found.plan.replacements
    (part,) = supports(model, loader()[0]).chains
    fit = [batch.to(model) for batch in found.profile.split(loader()).part("fit")]
    seen: list[tuple[Tensor, Tensor]] = []
    block = model.get_submodule(part.blocks[new.start].path)
    handle = block.register_forward_hook(lambda _, given, output: seen.append((given[0], output)))
    with torch.no_grad():
        for batch in fit:
            batch.run(model)
    handle.remove()
    x, y = (torch.cat(each).double().flatten(0, -2) for each in zip(*seen, strict=True))
    assert new.level is not None
    expected = new.level * (y.mean(0) - x.mean(0))
    torch.testing.assert_close(found.tensors[f"{new.key}bias"].double(), expected, rtol=1e-5, atol=1e-7)


def test_it_stands_beside_the_units_of_the_package(shift: Shift) -> None:
    """Every registered unit is searched by default."""
    assert "shift" in Config().units
    found = compress(seeded(Chain), loader(), budget=Budget(macs=0.3))
    assert {c.unit for c in found.plan.candidates} == {"span", "hidden_width", "shift"}


def test_a_unit_that_is_not_registered_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="'shift' is none of the units span, read_out, attention_free"
    ):
        Config(units=("shift",))
    with pytest.raises(ConfigError, match="'whole' is none of the units"):
        Config(units=("whole",))
    found = compress(seeded(Chain), loader(), budget=Budget(macs=0.6))
    plan = json.loads(found.plan.model_dump_json())
    plan["replacements"][0]["unit"] = "shift"
    with pytest.raises(ValueError, match="there is no unit 'shift': known are span, read_out"):
        type(found.plan).model_validate(plan)


def test_two_units_of_one_name_are_refused(shift: Shift) -> None:
    with pytest.raises(ValueError, match="there is a unit 'shift' already"):
        register(Shift())


def test_no_name_of_a_unit_is_compared_outside_its_room() -> None:
    root = Path(rba_compress.__file__).parent
    for path in sorted(root.rglob("*.py")):
        if path.parent.name == "units":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare | ast.match_case | ast.Subscript):
                parts = [node.pattern] if isinstance(node, ast.match_case) else [node]
                inside = [n for part in parts for n in ast.walk(part) if isinstance(n, ast.Constant)]
                named = {n.value for n in inside if isinstance(n.value, str)} & UNITS.keys()
                assert not named, f"{path}:{node.lineno} compares {named}"  # type: ignore[union-attr]
