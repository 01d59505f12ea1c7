"""Deep networks: levels that follow from the error of one, and layers re-solved in one go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rba_compress import Budget, Config, profile, search
from rba_compress.core.plan import Refit
from rba_compress.graph.rewrite import tensor_of
from rba_compress.planning import context as planning_context
from rba_compress.planning import descent
from rba_compress.planning.context import SearchContext
from rba_compress.planning.output_changes import output_changes
from rba_compress.planning.refinement import refit_together
from rba_compress.planning.sites import sites
from rba_compress.planning.state import Candidate, SearchState, with_candidate
from tests.test_language import llama


def texts() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 100, (8, 24), generator=generator)} for _ in range(24)]


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> SearchContext:
    """A search of a Llama of 4 layers, which counts as deep."""
    monkeypatch.setattr(planning_context, "DEEP", 3)
    model = llama(initializer_range=0.15)
    config = Config(units=("hidden_width",), window=1)
    seen = profile(model, texts(), config=config)
    return SearchContext.read(model, seen, texts(), Budget(macs=0.9))


def widths(context: SearchContext) -> list[Candidate]:
    return context.fitter.candidates(context.start, sites(context, context.start.solution.plan))


def narrowed(context: SearchContext, level: float) -> SearchState:
    """All layers with one share of their channels gone."""
    solution = context.start.solution
    for each in widths(context):
        if each.replacement.level == level:
            solution = with_candidate(solution, each)
    return context.state(solution, context.fitter.cost(solution.plan))


def test_one_run_of_a_site_tells_its_levels(context: SearchContext) -> None:
    options = widths(context)
    table = output_changes(context, context.start, options)
    assert len(context.record.runs) == len({each.site for each in options}) == 4
    assert len(table.options) == len(options) > 20
    for k, option in enumerate(table.options):
        at = option.chain, option.boundary
        solution = with_candidate(context.start.solution, option)
        true = float(context.divergences(context.start, solution, at, screen=True).mean())
        assert true / 2 < table.rise([k]) < true * 2, option.replacement
    # Levels of one site change the output in one direction.
    first = [k for k, each in enumerate(table.options) if each.site == table.options[0].site]
    lengths = table.gram.diagonal()[first] ** 0.5
    torch.testing.assert_close(
        torch.from_numpy(table.gram[first][:, first]), torch.from_numpy(lengths[:, None] * lengths)
    )


def test_all_layers_are_re_solved_in_one_go(context: SearchContext) -> None:
    state = narrowed(context, 0.5)
    runs: list[int] = []
    context.ran = lambda: runs.append(1)
    new = refit_together(context, state, 0, 0)
    assert new.mean < state.mean
    refits = new.solution.plan.refits
    assert [r.path for r in refits] == [f"model.layers.{b}.mlp.down_proj" for b in range(4)]
    assert len(runs) == 4 + len(context.config.refit_steps) + 1
    assert [step.action for step in context.log.steps] == ["refit"]
    assert len({r.step for r in refits}) == 1
    again = refit_together(context, new, 0, len(context.chains[0]))
    assert again is new


def test_all_layers_move_by_one_share(context: SearchContext, monkeypatch: pytest.MonkeyPatch) -> None:
    state, found = narrowed(context, 0.5), {}
    before = context.fitter.compressed(state.solution)
    for step in (0.5, 1.0):
        config = context.config.model_copy(update={"refit_steps": (step,)})
        monkeypatch.setattr(context, "config", config)
        found[step] = refit_together(context, state, 0, 0).solution
    for refit in found[1.0].plan.refits:
        assert isinstance(refit, Refit)
        name = f"{refit.key}weight"
        old = tensor_of(before, name).double()
        half, whole = (found[step].tensors[name].double() for step in (0.5, 1.0))
        torch.testing.assert_close(half, (old + whole) / 2, rtol=1e-5, atol=1e-6)


def test_what_does_not_help_is_left(context: SearchContext) -> None:
    state = narrowed(context, 0.5)
    strict: Any = context.config.model_copy(update={"tolerance": 0.9})
    context.config = strict
    assert refit_together(context, state, 0, 0) is state


def test_no_network_is_re_solved_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning_context, "DEEP", 3)
    model, solved = llama(), list[str]()

    def counted(context: SearchContext, state: SearchState, c: int, boundary: int) -> SearchState:
        solved.append(str(state.solution.plan.replacements))
        return refit_together(context, state, c, boundary)

    monkeypatch.setattr(descent, "refit_together", counted)
    config = Config(units=("hidden_width",), window=1, tolerance=0.0)
    seen = profile(model, texts(), config=config)
    for kept in (0.9, 0.8):
        search(model, seen, texts(), budget=Budget(macs=kept))
    assert len(solved) == len({*solved}) > 1
