"""Trades of merged positions between blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from rba_compress import Budget, Config, Plan, profile, search
from rba_compress.core.plan import Site
from rba_compress.planning.context import SearchContext
from rba_compress.planning.output_changes import output_changes
from rba_compress.planning.sites import sites
from rba_compress.planning.stages import _solved
from rba_compress.planning.state import SearchState, Solution, with_candidate
from rba_compress.planning.trades import SITES, WIDTH, _trades, _with, traded, widened
from rba_compress.units.token_merge import TOKEN_MERGE
from tests.networks import images, seeded

SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "depth": 6, "embed_dim": 32, "num_heads": 2}


def started(budget: float, **merges: int) -> tuple[SearchContext, SearchState]:
    """A search and a network that merges positions at blocks."""
    model = seeded(timm.create_model, "vit_tiny_patch16_224", **SIZES, num_classes=5)
    data = list(images(40, 32).split(10))
    run = SearchContext.read(
        model, profile(model, data, config=Config(seed=0)), data, Budget(macs=budget)
    )
    chain = run.chains[0]
    chosen = [
        TOKEN_MERGE.choice(chain, int(b[1:]), int(b[1:]) + 1, float(r)) for b, r in merges.items()
    ]
    plan = run.start.solution.plan.model_copy(update={"replacements": tuple(chosen)})
    return run, run.state(Solution(plan, {}), run.fitter.cost(plan))


def levels(plan: Plan) -> dict[int, float]:
    return {r.start: r.level or 0.0 for r in plan.in_order}


def test_a_trade_meets_the_budget_and_lowers_the_divergence() -> None:
    run, state = started(0.72, b0=7, b1=3)
    assert not run.limits.lacking(state.cost)
    found = traded(run, state, run.spent.trades)
    assert levels(found.solution.plan) != levels(state.solution.plan)
    assert not run.limits.lacking(found.cost)
    assert run.fitter.cost(found.solution.plan) == found.cost
    assert found.mean < 0.9 * state.mean
    evaluated = run.state(found.solution, found.cost)  # as a whole, not from a boundary
    assert evaluated.mean == pytest.approx(found.mean, rel=1e-4)
    again, same = started(0.72, b0=7, b1=3)
    assert levels(traded(again, same, run.spent.trades).solution.plan) == levels(found.solution.plan)


def test_a_narrowed_block_gets_its_channels_back_for_more_merges(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, state = started(0.72, b0=5, b1=2)
    options = run.fitter.narrower(state.solution, 0, [Site(0, 1, 2, "hidden_width")])
    lossy = next(o for o in options if o.replacement.diagnostics.r2 < 0.999)  # type: ignore[union-attr]
    solution = with_candidate(state.solution, lossy)
    state = run.state(solution, run.fitter.cost(solution.plan))
    run.limits.costs["macs"] = state.cost.macs
    trades = [trade for trade in _trades(run, state) if trade.width is not None]
    assert {(trade.down, trade.steps) for trade in trades} == {(1, WIDTH)}
    assert {trade.up for trade in trades} == set(range(5))
    made = [made for made in (_with(run, state, trade) for trade in trades) if made is not None]
    assert made
    for each in made:
        assert all(r.unit == "token_merge" for r in each.plan.replacements)
        assert not run.limits.lacking(run.fitter.cost(each.plan))
        assert not each.tensors
    tried: list[Solution] = []
    own = run.divergences

    def kept(state: SearchState, solution: Solution, *args: Any, **kwargs: Any) -> Any:
        tried.append(solution)
        return own(state, solution, *args, **kwargs)

    monkeypatch.setattr(run, "divergences", kept)
    traded(run, state, 6)
    first = [not any(r.inner for r in each.plan.replacements) for each in tried[:SITES]]
    assert first == [True] * SITES


@pytest.mark.parametrize("lossy", [True, False])
def test_all_blocks_are_widened_where_a_schedule_of_merges_is_better(*, lossy: bool) -> None:
    run, state = started(0.72, b0=5, b1=2)
    options = run.fitter.narrower(state.solution, 0, [Site(0, 4, 5, "hidden_width")])
    order = sorted(options, key=lambda o: o.saving.macs)
    solution = with_candidate(state.solution, order[-1 if lossy else 0])
    if lossy:
        zeros = {name: torch.zeros_like(tensor) for name, tensor in solution.tensors.items()}
        solution = replace(solution, tensors=zeros)
    state = run.state(solution, run.fitter.cost(solution.plan))
    run.limits.costs["macs"] = state.cost.macs
    found = widened(run, state, lambda cost: not run.limits.lacking(cost))
    assert (found is not state) == lossy
    if lossy:
        assert {r.unit for r in found.solution.plan.replacements} == {"token_merge"}
        assert not found.solution.tensors
        assert not run.limits.lacking(found.cost)
        evaluated = run.state(found.solution, found.cost)
        assert evaluated.mean == pytest.approx(found.mean, rel=1e-4)
        assert found.mean < state.mean


def test_a_trade_that_breaks_a_limit_of_quality_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    run, state = started(0.72, b0=7, b1=3)
    monkeypatch.setattr(run.limits, "broken", lambda _: ["agreement"])
    assert traded(run, state, run.spent.trades) is state


def test_no_more_networks_are_evaluated_than_the_effort_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    run, state = started(0.72, b0=7, b1=3)
    screened = []
    own = run.divergences

    def counted(*args: Any, screen: bool) -> Any:
        screened.append(args)
        return own(*args, screen=screen)

    monkeypatch.setattr(run, "divergences", counted)
    traded(run, state, 5)
    assert len(screened) == 5
    assert traded(run, state, 0) is state
    assert len(screened) == 5


def test_a_budget_that_needs_no_stage_trades_half_as_often_and_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = seeded(timm.create_model, "vit_tiny_patch16_224", **SIZES | {"depth": 4}, num_classes=5)
    data, asked = list(images(20, 32).split(10)), []

    def counted(run: SearchContext, state: SearchState, most: int) -> SearchState:
        asked.append(most)
        return traded(run, state, most)

    monkeypatch.setattr("rba_compress.planning.descent.traded", counted)
    seen = profile(model, data, config=Config(units=("token_merge",)))
    plans = [search(model, seen, data, budget=Budget(macs=macs)).plan for macs in (0.6, 0.7, 0.7)]
    assert asked == [48, 24]
    assert plans[1].replacements == plans[2].replacements


def test_without_merges_there_is_nothing_to_trade() -> None:
    run, state = started(0.9)
    assert traded(run, state, run.spent.trades) is state


def require_resumed_bit_equal(
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    action: str,
    *,
    interrupt: tuple[str, Any],
    call: int,
    macs: float = 0.7,
) -> None:
    """Interrupt a search at a call of a function, and require that it then ends as if it had not been.

    Args:
        path: its checkpoint.
        action: a kind of decision that the search has to take.
        interrupt: the name of the function, and what it does otherwise.
        call: the number of the call that is interrupted.
        macs: the budget of the search.
    """
    model = seeded(timm.create_model, "vit_tiny_patch16_224", **SIZES | {"depth": 4}, num_classes=5)
    data = list(images(20, 32).split(10))
    how = Config(units=("token_merge",))
    monkeypatch.setattr("rba_compress.planning.progress.EVERY", 0.0)

    def searched() -> Solution:
        seen = profile(model, data, config=how)
        return search(model, seen, data, budget=Budget(macs=macs), checkpoint=path)

    name, own = interrupt
    monkeypatch.setattr(name, own)
    expected, calls = searched(), []
    assert action in {step.action for step in expected.plan.steps}

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return own(*args)

    with monkeypatch.context() as patch:
        patch.setattr(name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            searched()
    assert path.exists()
    found = searched()
    assert found.plan.model_dump_json() == expected.plan.model_dump_json()
    assert all(torch.equal(found.tensors[key], value) for key, value in expected.tensors.items())


def test_a_search_that_is_interrupted_in_its_trades_ends_bit_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lower(_: Any, after: torch.Tensor, before: torch.Tensor) -> bool:
        # Of few samples, it is rarely lower by more than a standard error.
        return bool(after.mean() < before[: len(after)].mean())

    monkeypatch.setattr("rba_compress.planning.descent.scheduled", lambda _, state, *others: state)
    at = "rba_compress.planning.trades.promises", lower
    require_resumed_bit_equal(tmp_path / "checkpoint", monkeypatch, "trade", interrupt=at, call=3)


def test_the_solver_knows_what_one_change_of_a_merged_network_costs() -> None:
    """The exact read-out saves less where few positions reach it."""
    run, state = started(0.6, b0=5, b1=3, b3=2)
    fitted = run.fitter.candidates(state, sites(run, state.solution.plan))
    merges = [c for c in fitted if c.site.unit == TOKEN_MERGE.name]
    table = output_changes(run, state, merges)
    found = _solved(run, state, table, lowest=0.3)
    single = [(c.size, run.limits.size(cost)) for c, _, cost in found if len(c.rows) == 1]
    assert len(single) > 3
    assert all(solved == pytest.approx(true, rel=1e-9) for solved, true in single)
