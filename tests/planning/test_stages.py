"""The search in stages: its table, its sites, its descent."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import nn

from benchmarks import greedy
from rba_compress import ActivationError, Budget, BudgetError, Config, profile, splice
from rba_compress.core.batch import as_batch
from rba_compress.core.cost import Cost
from rba_compress.core.loader import Split
from rba_compress.core.plan import Site
from rba_compress.planning.context import SearchContext
from rba_compress.planning.descent import Descent, _price, descend, trusted
from rba_compress.planning.output_changes import FAR, FEWEST, _Options, _Runs, output_changes
from rba_compress.planning.plan_cost import network_cost
from rba_compress.planning.sites import sites
from rba_compress.planning.stages import Verified
from rba_compress.planning.state import (
    Candidate,
    SearchState,
    Solution,
    removed_length,
    with_candidate,
)
from rba_compress.profiling.cost import cost
from rba_compress.profiling.fidelity import fidelity
from rba_compress.units.registry import unit_of
from tests.networks import LIGHT, Block, Chain, images, loader, rows, seeded
from tests.planning.test_budget import blocks_kept
from tests.planning.test_search import Normed, normed


def started(budget: Budget, config: Config = LIGHT, depth: int = 4) -> SearchContext:
    model = seeded(Chain, depth)
    return SearchContext.read(model, profile(model, loader(), config=config), loader(), budget)


def descended(model: nn.Module, data: list[Any], budget: Budget, config: Config) -> Solution:
    seen = profile(model, data, config=config)
    return descend(SearchContext.read(model, seen, data, budget))


def test_sizes_are_on_one_scale_for_all_limits() -> None:
    """One limit: the share of that cost. Several: of the one that is furthest from being met, such that
    the smallest limited share is where all are met."""
    macs = started(Budget(macs=0.5)).limits
    assert macs.goal_size == 0.5
    assert macs.size(Cost(macs=270, params=5)) == pytest.approx(0.25)
    assert macs.saved(Cost(macs=1080), Cost(macs=540)) == pytest.approx(0.5)
    params = started(Budget(params=0.5)).limits
    assert params.size(Cost(macs=5, params=1187 // 4)) == pytest.approx(0.25, abs=1e-3)
    quality = started(Budget(divergence=0.5)).limits
    assert quality.goal_size == 0
    assert quality.size(Cost(macs=270, params=1)) == pytest.approx(0.25)
    both = started(Budget(macs=0.8, params=0.5)).limits
    assert both.goal_size == pytest.approx(0.5)
    assert both.size(Cost(macs=1080, params=1187)) == pytest.approx(1)
    assert both.size(Cost(macs=864, params=593)) == pytest.approx(0.5, abs=2e-3)
    assert both.size(Cost(macs=864, params=1187)) == pytest.approx(1)  # parameters are still to go
    assert both.size(Cost(macs=972, params=593)) == pytest.approx(0.75, abs=2e-3)  # half of the MACs


def test_an_estimate_of_latency_is_lowered_until_a_measured_one_holds() -> None:
    run = started(Budget(macs=0.5))
    run.limits.costs = {"latency": 0.8}
    run.limits.tighten(0.8, 0.9)  # half of the estimated saving is real
    assert run.limits.costs["latency"] == pytest.approx(0.6)
    run.limits.tighten(0.6, 0.81)
    assert run.limits.costs["latency"] < 0.6


def test_sites_grow_with_the_depth_and_not_with_its_square() -> None:
    count = {
        d: len(sites(r := started(Budget(macs=0.5), depth=d), r.start.solution.plan)) for d in (8, 16)
    }
    assert count == {8: 8 + 7 + 6 + 5, 16: 16 + 15 + 14 + 13}


def test_a_span_may_grow_and_join_others_and_not_cut_through_them() -> None:
    run = started(Budget(macs=0.5), depth=6)
    move = Candidate(0, unit_of("span").choice(run.chains[0], 1, 3), {}, Cost(macs=512, params=560))
    draft = run.state(with_candidate(run.start.solution, move), run.start.cost - move.saving)
    found = {(s.start, s.stop) for s in sites(run, draft.solution.plan)}
    assert {(1, 3), (0, 3), (1, 4), (0, 6), (3, 4), (0, 1)} <= found
    assert not {(1, 2), (2, 3), (2, 4), (0, 2)} & found
    run.skipped = {Site(0, 4, 5, "span"), Site(0, 1, 4, "span")}
    again = {(s.start, s.stop) for s in sites(run, draft.solution.plan)}
    assert found - again == {(4, 5)}  # what holds the old one is measured in every stage


def test_the_table_predicts_single_options_exactly_and_pairs_closely(
    digits: nn.Module, digits_loader: list[Any]
) -> None:
    """Against the true divergence on the screened samples."""
    config = Config(maps=("shrunk",), shrinks=(1.0,), units=("span",), window=1)
    data = digits_loader[:1]
    run = SearchContext.read(digits, profile(digits, data, config=config), data, Budget(macs=0.3))
    fitted = run.fitter.candidates(run.start, sites(run, run.start.solution.plan))
    table = output_changes(run, run.start, fitted)
    screened = run.evaluator.screened

    def true(*rows: int) -> float:
        state = run.start
        for row in rows:
            state = replace(state, solution=with_candidate(state.solution, table.options[row]))
        at = 0, min(table.options[row].boundary for row in rows)
        return float(run.divergences(run.start, state.solution, at)[:screened].mean())

    alone = [true(row) for row in range(len(table.options))]
    for row in range(len(table.options)):
        assert table.rise([row]) == pytest.approx(alone[row], rel=1e-5)
    full = [k for k, o in enumerate(table.options) if o.replacement.map.shrink == 1]
    errors = [
        (abs(table.rise([a, b]) - true(a, b)), abs(alone[a] + alone[b] - true(a, b)))
        for a, b in itertools.combinations(sorted(full, key=lambda k: alone[k])[:4], 2)
    ]
    form, sums = (sum(e) for e in zip(*errors, strict=True))
    assert form < 0.9 * sums  # with interactions, predictions are nearer than sums of single rises


def test_taking_back_is_a_row_of_the_table() -> None:
    """A replacement of the current network, undone: the rise is that of the network without it."""
    run = started(Budget(macs=0.5), depth=6)
    move = run.fitter.candidates(run.start, [Site(0, 2, 3, "span")])[-1]
    draft = run.state(with_candidate(run.start.solution, move), run.start.cost - move.saving)
    table = output_changes(run, draft, [])
    assert len(table.undone) == 1
    screened = run.evaluator.screened
    before = float(draft.evaluation.divergence[:screened].mean())
    assert table.rise([0]) == pytest.approx(-before, rel=1e-5)  # back to the original


def test_the_next_stage_starts_where_predictions_held() -> None:
    run = started(Budget(macs=0.5))
    order = partial(_price, run.start, run.limits)

    def verified(size: float, seen: float, predicted: float, unseen: float = 0.0) -> Verified:
        evaluation = replace(run.start.evaluation, divergence=torch.tensor([seen, unseen]))
        cost = Cost(macs=round(size * run.start.cost.macs))
        return Verified(replace(run.start, evaluation=evaluation, cost=cost), size, predicted)

    good, better, wild = (
        verified(0.85, 0.011, 0.01),
        verified(0.845, 0.012, 0.01),
        verified(0.8, 0.9, 0.02),
    )
    assert trusted(run.start, [good, wild], 1.0, 1) == [good]
    alike = trusted(run.start, [better, good, wild], 1.0, 1)
    assert alike == [better, good]
    assert sorted(alike, key=lambda v: order(v.state))[0] is good  # within a hundredth: the nearer
    worse = verified(0.7, 2.0, 0.03)
    assert trusted(run.start, [wild, worse], 1.0, 1) == [wild]  # none held: the smaller step
    assert trusted(run.start, [wild, worse], 0.75, 1) == [worse]  # but not too small a step
    assert trusted(run.start, [wild, worse], 0.65, 1) == [worse]
    unlucky = verified(0.8, 0.02, 0.02, unseen=0.9)  # its prediction was of the first sample
    assert trusted(run.start, [good, unlucky], 1.0, 1) == [unlucky]


def test_of_networks_of_several_sizes_the_one_that_pays_is_taken() -> None:
    """A little more divergence for a little more that is saved, at a lower rise for it."""
    run = started(Budget(macs=0.5))
    whole = run.start.cost.macs

    def at(size: float, mean: float) -> SearchState:
        evaluation = replace(run.start.evaluation, divergence=torch.tensor([mean]))
        return replace(run.start, cost=Cost(macs=round(size * whole)), evaluation=evaluation)

    near, far, worse = at(0.9, 0.012), at(0.88, 0.0132), at(0.88, 0.0156)
    order = partial(_price, run.start, run.limits)
    assert sorted([near, worse, far], key=order) == [far, near, worse]


def test_a_result_far_below_the_budget_has_a_rival_that_just_meets_it() -> None:
    run = started(Budget(macs=0.7))
    descent, whole = object.__new__(Descent), run.start.cost.macs
    descent.context, descent.limits = run, run.limits

    def at(size: float, mean: float) -> SearchState:
        evaluation = replace(run.start.evaluation, divergence=torch.tensor([mean]))
        return replace(run.start, cost=Cost(macs=int(size * whole)), evaluation=evaluation)

    over, near, worse, far = at(0.71, 0.01), at(0.69, 0.03), at(0.695, 0.04), at(0.6, 0.02)
    sized = [(over, 0.71), (near, 0.69), (worse, 0.695), (far, 0.6)]
    descent.verified = [Verified(state, size, 0.0) for state, size in sized]
    assert descent.larger(far) is near
    assert descent.larger(near) is None
    descent.verified = [each for each in descent.verified if each.state not in (near, worse)]
    assert descent.larger(far) is None


def test_options_that_fits_tell_to_be_far_too_expensive_are_not_run() -> None:
    """Those that are left out cost more than any that is of interest, and are priced all the same."""
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}
    model = seeded(timm.create_model, "vit_tiny_patch16_224", **size, num_classes=5)
    units = ("token_merge", "hidden_width", "span", "attention_free", "mlp_free")
    config, data = Config(units=units, multiple=1), list(images(40).split(10))
    run = SearchContext.read(model, profile(model, data, config=config), data, Budget(macs=0.7))
    candidates = run.fitter.candidates(run.start, sites(run, run.start.solution.plan))
    measured = []
    for every in (True, False):
        run.record.every = every
        run.record.runs.clear()
        options = _Options(run, run.start, candidates, _Runs(run, run.start))
        measured.append((options, {c.site for c, _ in options.measured()}))
    (all_of_them, every_site), (some, ran) = measured
    left_out = every_site - ran
    assert len(left_out) >= 4
    assert min(all_of_them.prices[site] for site in left_out) > some.highest()
    assert left_out <= set(some.prices)
    assert left_out <= run.skipped


def test_sites_that_are_far_from_paying_are_not_run_again() -> None:
    run = started(Budget(macs=0.5), depth=6)
    found = run.fitter.candidates(run.start, sites(run, run.start.solution.plan))
    run.prices = {Site(0, 0, 4, "span"): 1e9}  # of an earlier stage
    output_changes(run, run.start, [c for c in found if removed_length(c.site) == 1])
    singles = {Site(0, b, b + 1, "span") for b in range(6)}
    assert set(run.prices) == {*singles, Site(0, 0, 4, "span")}
    assert Site(0, 0, 4, "span") in run.skipped
    cheapest = sorted(singles, key=lambda site: run.prices[site])[:FEWEST]
    assert run.skipped.isdisjoint(cheapest)
    limit = FAR * max(run.prices[site] for site in cheapest)
    assert all(run.prices[site] > limit for site in run.skipped)


@pytest.mark.parametrize(
    ("block", "seed", "settings", "refined"),
    [
        (Block, 0, {}, "refit"),
        (Normed, 1, {"maps": ("identity",), "refit": False}, "statistics"),
    ],
)
def test_every_step_costs_and_diverges_as_it_says(
    block: type[nn.Module], seed: int, settings: dict[str, Any], refined: str
) -> None:
    model, data = normed(block, seed)
    config = Config(units=("span",), window=2, refit_steps=(1.0,), **settings)
    seen = profile(model, data, config=config)
    found = descend(SearchContext.read(model, seen, data, Budget(macs=0.5)))
    steps, choose = found.plan.steps, list(Split(data, 0).part("validation"))
    assert (found.plan.budget, found.plan.config) == (Budget(macs=0.5), config)
    assert {step.action for step in steps} >= {"stage", "choose", refined}
    assert 1 < found.plan.forward_passes < 100
    for point in found.points:
        compressed = splice(model, point.plan, point.tensors)
        measured = cost(compressed, as_batch(rows(2)))
        said = network_cost(seen, point.plan)
        assert (measured.macs, measured.params) == (said.macs, said.params)
    last = steps[-1]
    measured = cost(splice(model, found.plan, found.tensors), as_batch(rows(2)))
    assert (last.macs, last.params) == (measured.macs, measured.params)
    divergence = fidelity(
        model, splice(model, found.plan, found.tensors), choose, seen.criterion.kind
    ).divergence
    assert last.divergence == pytest.approx(divergence, rel=1e-4)
    assert found.points[-1].plan == found.plan


@pytest.mark.parametrize("share", [1e-6, 0.5])
def test_the_step_that_breaks_a_limit_is_said_and_not_taken(share: float) -> None:
    model = seeded(Chain)
    whole = descended(model, loader(), Budget(macs=56), LIGHT).plan.steps[-1].divergence
    limit = share * whole
    found = descended(model, loader(), Budget(divergence=limit), LIGHT)
    stop = next(step for step in found.plan.steps if step.action == "stop")
    assert stop.divergence > limit
    compressed = splice(model, found.plan, found.tensors)
    choose = list(Split(loader(), 0).part("validation"))
    divergence = fidelity(model, compressed, choose, found.plan.divergence).divergence
    assert divergence <= limit


def test_latency_is_followed_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """An estimate that is too good is lowered; what no network reaches is an error with the best."""
    monkeypatch.setattr("rba_compress.planning.context.benchmark", blocks_kept)
    model = seeded(Chain, depth=8)
    found = descended(model, loader(), Budget(latency=0.75), LIGHT)
    compressed = splice(model, found.plan, found.tensors)
    assert sum(isinstance(m, Block) for m in compressed.modules()) <= 6
    monkeypatch.setattr(
        "rba_compress.planning.context.benchmark",
        lambda *_, **__: blocks_kept(seeded(Chain), seeded(Chain)),
    )
    message = r"to latency <= 0.900: the best reachable has .*, 1.000 of the latency at"
    with pytest.raises(BudgetError, match=message):
        descended(seeded(Chain), loader(), Budget(latency=0.9), LIGHT)


def test_a_network_that_no_option_leaves_finite_is_named() -> None:
    class Brittle(Chain):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.stem(x)
            for block in self.blocks:
                hidden = block(hidden)
            skipped = (hidden == self.stem(x)).all()
            return self.head(hidden).masked_fill(skipped, float("inf"))

    config = Config(maps=("identity",), window=4)
    with pytest.raises(ActivationError, match="every candidate makes the model's output NaN"):
        descended(seeded(Brittle), loader(), Budget(macs=100), config)


def test_the_same_inputs_give_the_same_plan() -> None:
    config = Config(units=("span",), maps=("shrunk", "folded"), window=2, refit_dampings=(1.0,))
    plans = [descended(seeded(Chain), loader(), Budget(macs=0.5), config) for _ in range(2)]
    assert plans[0].plan == plans[1].plan
    assert all(torch.equal(plans[1].tensors[k], v) for k, v in plans[0].tensors.items())


def test_the_greedy_rival_of_the_benchmarks_meets_a_budget() -> None:
    model = seeded(Chain, 5)
    config = LIGHT.model_copy(update={"refit": True, "window": 2})
    seen = profile(model, loader(), config=config)
    found = greedy.run(SearchContext.read(model, seen, loader(), Budget(macs=0.5)))
    actions = {step.action for step in found.plan.steps}
    assert "take" in actions
    measured = cost(splice(model, found.plan, found.tensors), as_batch(rows(2)))
    assert measured.macs <= 0.5 * seen.original.macs
