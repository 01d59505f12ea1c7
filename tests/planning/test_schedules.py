"""Schedules of merged positions: levels of all blocks at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import timm
from hypothesis import given, settings
from hypothesis import strategies as st

from rba_compress import Budget, Config, profile, search
from rba_compress.core.plan import Chain
from rba_compress.graph.token_merging import most
from rba_compress.planning import schedules
from rba_compress.planning.context import SearchContext
from rba_compress.planning.schedules import scheduled
from rba_compress.planning.state import SearchState, changed
from rba_compress.units.span import SPAN
from rba_compress.units.token_merge import TOKEN_MERGE
from tests.networks import images, seeded
from tests.planning.test_trades import SIZES, levels, require_resumed_bit_equal, started


def chain_of(blocks: int, positions: int) -> Chain:
    """Chain of which only the numbers of blocks and of positions matter."""
    sizes = {"blocks": (None,) * blocks, "positions": positions, "reads": 1, "ordered": 1}
    return Chain.model_construct(**cast("Any", sizes))


@given(
    st.integers(2, 40),
    st.integers(8, 300),
    st.sets(st.integers(0, 39)),
    st.lists(st.floats(0, 1), min_size=2, max_size=2),
)
@settings(max_examples=60, deadline=None)
def test_a_stronger_schedule_leaves_fewer_positions_and_never_too_few(
    blocks: int, positions: int, taken: set[int], strengths: list[float]
) -> None:
    chain, free = chain_of(blocks, positions), [b for b in range(blocks - 1) if b not in taken]
    for (first, ramp), schedule in TOKEN_MERGE.schedules(chain, free).items():
        left = []
        for strength in sorted(strengths):
            now, found = positions, schedule(strength)
            assert set(found) <= {b for b in free if b >= round(first * blocks / 12)}
            for count in found.values():
                assert 1 <= count <= most(now, 1)
                now -= int(count)
            left.append(now)
        assert left[0] >= left[1] - len(free) / 2  # numbers are rounded in each block
        assert schedule(0.0) == {}
        if free and first == ramp == 0:
            assert schedule(1.0)[free[0]] == most(positions, 1)


def test_a_schedule_takes_the_same_share_of_what_is_left() -> None:
    schedule = TOKEN_MERGE.schedules(chain_of(12, 197), range(11))[2, 3]
    assert schedule(0.25) == {
        2: 8.0,
        3: 16.0,
        4: 22.0,
        5: 19.0,
        6: 16.0,
        7: 14.0,
        8: 12.0,
        9: 11.0,
        10: 10.0,
    }


def least(run: SearchContext, state: SearchState) -> Any:
    return lambda cost: cost.macs <= state.cost.macs


def test_a_schedule_costs_no_more_and_lowers_the_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    run, state = started(0.9, b3=8, b4=4)
    screened, own = [], run.divergences

    def counted(*args: Any, screen: bool) -> Any:
        screened.append(args[1].plan.replacements)
        return own(*args, screen=screen)

    monkeypatch.setattr(run, "divergences", counted)
    found = scheduled(run, state, run.start, least(run, state))
    assert levels(found.solution.plan) != levels(state.solution.plan)
    assert found.cost.macs <= state.cost.macs
    assert run.fitter.cost(found.solution.plan) == found.cost
    assert found.mean < state.mean
    assert len(screened) == len(set(map(str, screened))) <= run.spent.shapes
    evaluated = run.state(found.solution, found.cost)  # as a whole, not from a boundary
    assert evaluated.mean == pytest.approx(found.mean, rel=1e-4)
    again, same = started(0.9, b3=8, b4=4)
    alike = scheduled(again, same, again.start, least(again, same))
    assert levels(alike.solution.plan) == levels(found.solution.plan)


def test_other_replacements_stay() -> None:
    run, state = started(0.9, b3=8, b4=4)
    other = SPAN.choice(run.chains[0], 2, 3)
    solution = changed(state.solution, add=[other])
    state = run.state(solution, run.fitter.cost(solution.plan))
    found = scheduled(run, state, run.start, least(run, state))
    assert found is not state
    assert other in found.solution.plan.replacements
    assert 2 not in {r.start for r in found.solution.plan.replacements if r.unit == TOKEN_MERGE.name}


@pytest.mark.parametrize("why", ["no merges", "no cost is low enough", "quality", "none is better"])
def test_a_state_stays_where_no_schedule_is_better(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run, state = started(0.9, **({} if why == "no merges" else {"b3": 8, "b4": 4}))
    if why == "quality":
        monkeypatch.setattr(run.limits, "broken", lambda _: ["agreement"])
    if why == "none is better":
        state.evaluation.divergence.zero_()
    low = why != "no cost is low enough"
    met = lambda cost: low and cost.macs <= state.cost.macs  # noqa: E731
    assert scheduled(run, state, run.start, met) is state


def test_every_stage_goes_on_from_a_schedule_that_is_better(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = seeded(timm.create_model, "vit_tiny_patch16_224", **SIZES, num_classes=5)
    data = list(images(20, 32).split(10))
    seen = profile(model, data, config=Config(units=("token_merge",)))
    asked = []

    def counted(context: SearchContext, state: SearchState, *others: Any) -> SearchState:
        asked.append(state.mean)
        return scheduled(context, state, *others)

    monkeypatch.setattr("rba_compress.planning.descent.scheduled", counted)
    plan = search(model, seen, data, budget=Budget(macs=0.65)).plan
    stages = [step.divergence for step in plan.steps if step.action == "stage"]
    assert len(stages) >= 2
    assert set(stages[:-1]) <= set(asked)  # those from which a further stage starts
    assert len(asked) == len(stages)  # and once at the budget
    assert all(step.margin > 0 for step in plan.steps if step.action == "schedule")


def test_the_weakest_schedule_that_costs_little_enough_is_taken() -> None:
    build: Any = float
    met: Any = lambda strength: strength >= 0.3  # noqa: E731
    assert 0.3 <= cast("Any", schedules._weakest(build, met)) < 0.302
    assert schedules._weakest(build, lambda _: False) is None


@pytest.mark.parametrize(
    ("function", "own", "call"),
    [
        pytest.param("descent.scheduled", scheduled, 1, id="before a stage"),
        pytest.param("schedules._weakest", schedules._weakest, 4, id="among the shapes"),
        pytest.param("descent.scheduled", scheduled, 2, id="at the budget"),
    ],
)
def test_a_search_that_is_interrupted_in_its_schedules_ends_bit_equal(
    function: str, own: Any, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, path = (f"rba_compress.planning.{function}", own), tmp_path / "checkpoint"
    require_resumed_bit_equal(path, monkeypatch, "schedule", interrupt=at, call=call, macs=0.5)
