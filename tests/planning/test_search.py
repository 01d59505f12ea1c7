from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import scipy.stats
import timm
import torch
from torch import Tensor, fx, nn

from rba_compress import (
    ActivationError,
    Budget,
    BudgetError,
    Config,
    LoaderError,
    MemoryLimitError,
    Plan,
    PlanError,
    Result,
    compress,
    profile,
    search,
    splice,
    supports,
)
from rba_compress.cli.digits import digits_data
from rba_compress.core.batch import as_batch
from rba_compress.core.cost import Cost
from rba_compress.core.loader import Split
from rba_compress.core.plan import EvaluatedCandidate, Site, listed
from rba_compress.graph.activations import run_with_streams
from rba_compress.planning.context import SearchContext
from rba_compress.planning.limits import Limits, progress
from rba_compress.planning.refinement import wins
from rba_compress.planning.search import _longest_new
from rba_compress.planning.search import run as search_run
from rba_compress.planning.selection import Selection, probes
from rba_compress.planning.state import Candidate, SearchState, Solution, with_candidate
from rba_compress.profiling.cost import cost
from rba_compress.profiling.fidelity import fidelity
from rba_compress.units.registry import unit_of
from tests.networks import BRIEF_SEARCH, LIGHT, Block, Chain, images, loader, rows, seeded


def test_profile_sees_what_stored_activations_say(digits: nn.Module, digits_loader: list[Any]) -> None:
    seen = profile(digits, digits_loader, config=Config(stride=1))
    (profiled,) = seen.chains
    stored: list[list[Tensor]] = [[] for _ in range(13)]
    with torch.no_grad():
        for batch in Split(digits_loader, 0).part("fit"):
            _, (streams,) = run_with_streams(digits, [profiled.chain], batch)
            for kept, h in zip(stored, streams, strict=True):
                kept.append(h)
    whole = [torch.cat(kept).double() for kept in stored]  # (N, 17, 64) each
    assert seen.samples == len(whole[0]) == 97
    assert profiled.moments.n == 97 * 17
    x, y = whole[3].reshape(-1, 64), whole[6].reshape(-1, 64)
    expected = (x - x.mean(0)).T @ (y - y.mean(0))
    error = (profiled.moments.comoments(3, 6) - expected).norm() / expected.norm()
    assert float(error) < 1e-6
    distance = [(b - a)[:, 0].square().sum(1).mean() for a, b in itertools.pairwise(whole)]
    assert profiled.block_redundancy == pytest.approx([-float(d) for d in distance], rel=1e-6)


def test_pooled_features_where_there_is_no_class_token() -> None:
    class Tokens(Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, None].expand(-1, 3, -1) * torch.arange(1, 4)[:, None]).mean(1)

    model = seeded(Tokens)
    seen = profile(model, loader())
    (profiled,) = seen.chains
    assert profiled.chain.positions == 3
    assert not profiled.chain.class_tokens
    whole = torch.cat([b.args[0] for b in Split(loader(), 0).part("fit")])
    with torch.no_grad():
        _, (streams,) = run_with_streams(model, [profiled.chain], as_batch(whole))
    first = (streams[1] - streams[0]).mean(1).square().sum(1).mean()
    assert profiled.block_redundancy[0] == pytest.approx(-float(first), rel=1e-6)


def test_padding_never_enters_the_moments() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, vocab_size=50
    )
    model = seeded(transformers.BertModel, config)
    ids = torch.randint(1, 50, (10, 6), generator=torch.Generator().manual_seed(0))
    short = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padding = torch.zeros(10, 5, dtype=torch.long)
    padded = {
        "input_ids": torch.cat([ids, padding], 1),
        "attention_mask": torch.cat([torch.ones_like(ids), padding], 1),
    }
    plain, masked = (
        profile(model, [batch], config=LIGHT).chains[0].moments for batch in (short, padded)
    )
    assert plain.n == masked.n == 5 * 6
    torch.testing.assert_close(plain.comoments(0, 2), masked.comoments(0, 2), rtol=1e-4, atol=1e-4)


def test_every_decision_is_logged_with_its_margin(result: Result) -> None:
    plan = result.plan
    assert [s.action for s in plan.steps if s.action == "take"]
    for step in plan.steps:
        # A span is taken because it is the best; a refinement because it lowers the divergence.
        assert step.action == "take" or step.margin > 0
    assert {c.map.kind for c in plan.candidates} >= {"identity", "shrunk"}
    last = plan.steps[-1]
    assert (last.macs, last.params) == (result.report.compressed.macs, result.report.compressed.params)
    assert sum(r.stop - r.start for r in plan.replacements) >= 3
    assert all(r.diagnostics is not None for r in plan.replacements if not r.exact)
    assert plan.forward_passes > 1
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_what_is_taken_first_beats_every_other_finalist(result: Result) -> None:
    """Of spans that bring as much towards the budget, the one with the least divergence."""
    first = [c for c in result.plan.candidates if c.step == 0]
    step = result.plan.steps[0]
    alike = [c for c in first if c.macs == step.macs]
    assert step.divergence == pytest.approx(min(c.divergence for c in alike), rel=1e-6)


def test_the_logged_divergence_is_the_measured_one(
    result: Result, digits: nn.Module, digits_loader: list[Any]
) -> None:
    choose = list(Split(digits_loader, 0).part("validation"))
    found = fidelity(digits, result.model, choose, "kl")
    assert found.divergence == pytest.approx(result.plan.steps[-1].divergence, rel=1e-4)


@pytest.mark.slow
def test_no_span_is_ever_worse_than_skipped(digits: nn.Module, digits_loader: list[Any]) -> None:
    """In held-out divergence, over a third of the 78 spans of the chain."""
    config = Config(units=("span",), keep_features=True)
    seen = profile(digits, digits_loader[:1], config=config)
    run = SearchContext.read(digits, seen, digits_loader[:1], Budget(macs=0.5))
    spans: list[Site] = [Site(0, *span, "span") for span in seen.chains[0].chain.spans()[::3]]
    moves = run.fitter.candidates(run.start, spans)
    better = 0
    for span in spans:
        of_span = [m for m in moves if m.site == span]
        results = Selection(run, run.start).evaluated(of_span, lambda _, judged: float(judged.mean()))
        (skip,) = (score for score, _, m, _ in results if m.replacement.map.kind == "identity")
        assert results[0][0] <= skip
        better += results[0][0] < skip
    assert better > 13  # and mostly better


@pytest.mark.slow
def test_a_folded_plan_is_a_stock_network(digits: nn.Module, digits_loader: list[Any]) -> None:
    config = LIGHT.model_copy(update={"keep_features": True, "window": 2})
    compressed = compress(digits, digits_loader, budget=Budget(macs=0.85), config=config)
    kinds = {r.map.kind for r in compressed.plan.replacements}
    assert kinds <= {"identity", "folded"}
    assert not [k for k in compressed.model.state_dict() if k not in digits.state_dict()]


@pytest.mark.slow
def test_a_loader_sorted_by_class_gives_the_quality_of_a_shuffled_one(digits: nn.Module) -> None:
    (images, labels), (test_images, test_labels) = digits_data()
    orders = {"shuffled": torch.arange(400), "sorted": labels[:400].argsort(stable=True)}
    test = as_batch((test_images, test_labels))
    found = {}
    for name, order in orders.items():
        data = list(zip(images[order].split(50), labels[order].split(50), strict=True))
        compressed = compress(digits, data, budget=Budget(macs=0.7), config=LIGHT)
        found[name] = fidelity(digits, compressed.model, [test], "kl").divergence
    assert found["sorted"] < 1.5 * found["shuffled"] + 0.005


@pytest.mark.slow
def test_several_chains_share_one_budget() -> None:
    model = seeded(
        timm.create_model, "convnext_atto", depths=(1, 1, 3, 2), dims=(8, 16, 24, 32), num_classes=5
    )
    data = list(images(20, 32).split(10))
    config = Config(shrinks=(0.6,), swaps=0, units=("span",), window=2)
    compressed = compress(model, data, budget=Budget(params=0.6), config=config)
    assert compressed.report.compressed.params <= 0.6 * compressed.report.original.params
    assert len({c.chain for c in compressed.plan.candidates}) > 1
    traced = compress(fx.symbolic_trace(model), data, budget=Budget(params=0.6), config=config)
    assert str(traced.plan) == str(compressed.plan)
    assert torch.equal(traced.model(data[0]), compressed.model(data[0]))


@pytest.mark.slow
def test_same_inputs_and_seed_same_plan_byte_for_byte(
    result: Result, digits: nn.Module, digits_loader: list[Any]
) -> None:
    again = compress(digits, digits_loader, budget=Budget(macs=0.85), config=BRIEF_SEARCH)
    assert again.plan.model_dump_json() == result.plan.model_dump_json()
    assert all(torch.equal(again.tensors[k], v) for k, v in result.tensors.items())


def test_another_seed_is_another_split() -> None:
    seeds = [Config(**(LIGHT.model_dump() | {"seed": seed})) for seed in (0, 0, 1)]
    found = [compress(seeded(Chain), loader(), budget=Budget(macs=0.9), config=seed) for seed in seeds]
    assert found[0].plan == found[1].plan
    assert found[0].plan.steps[-1].divergence != found[2].plan.steps[-1].divergence


@pytest.mark.slow
def test_a_module_and_its_graph_get_the_same_plan() -> None:
    sizes: dict[str, Any] = {"img_size": 32, "depth": 2, "embed_dim": 32, "num_heads": 2}
    model, data = seeded(timm.create_model, "vit_tiny_patch16_224", **sizes), list(images(20).split(10))
    budget, config = Budget(macs=0.8), Config(shrinks=(0.6,), swaps=0)
    plain = compress(model, data, budget=budget, config=config)
    graph = compress(fx.symbolic_trace(model), data, budget=budget, config=config)
    assert {r.unit for r in plain.plan.replacements} - {"span"}
    assert isinstance(graph.model, fx.GraphModule)
    assert [str(c) for c in graph.plan.candidates] == [str(c) for c in plain.plan.candidates]
    x = data[0]
    assert torch.equal(graph.model(x), plain.model(x))


def test_a_budget_that_is_met_leaves_the_network_alone() -> None:
    model = seeded(Chain)
    compressed = compress(model, loader(), budget=Budget(macs=1.0))
    assert not compressed.plan.replacements
    assert torch.equal(compressed.model(rows(5)), model(rows(5)))


@pytest.mark.parametrize(
    "budget", [Budget(macs=0.6), Budget(params=0.6), Budget(macs=700), Budget(macs=0.8, params=600)]
)
def test_the_slim_network_meets_its_budget(budget: Budget) -> None:
    model = seeded(Chain)
    compressed = compress(model, loader(), budget=budget)
    measured = cost(compressed.model, as_batch(rows(2)))
    assert measured == compressed.report.compressed
    for name, limit in budget.limits(
        compressed.report.original.macs, compressed.report.original.params
    ).items():
        assert getattr(measured, name) <= limit


def test_an_unreachable_budget_names_the_cheapest_reachable() -> None:
    message = r"no plan reaches macs <= 50 \(of 1,080 macs, .* cheapest reachable is 56 macs"
    with pytest.raises(BudgetError, match=message):
        compress(seeded(Chain), loader(), budget=Budget(macs=50))


def test_a_window_bounds_the_spans() -> None:
    seen = profile(seeded(Chain), loader(), config=Config(window=2))
    solution = search(seeded(Chain), seen, loader(), budget=Budget(macs=0.6))
    assert {c.stop - c.start for c in solution.plan.candidates} <= {1, 2}


def test_every_map_kind_is_searched_and_spliced() -> None:
    kinds = ("scale", "linear", "affine", "low_rank", "orthogonal", "shrunk")
    model = seeded(Chain)
    seen = profile(model, loader(), config=Config(maps=kinds))
    solution = search(model, seen, loader(), budget=Budget(macs=0.8))
    assert {c.map.kind for c in solution.plan.candidates} == {"identity", *kinds}
    assert splice(model, solution.plan, solution.tensors)(rows(2)).isfinite().all()


def test_fewer_samples_than_channels_is_allowed_and_said() -> None:
    compressed = compress(seeded(Chain, width=32), loader(20), budget=Budget(macs=0.8))
    (warning,) = compressed.report.warnings
    assert "10 rows for 32 channels; its maps are decided by the damping" in warning
    assert f"warning: {warning}" in compressed.report.table()


def test_infinite_activations_name_the_block() -> None:
    model = seeded(Chain)
    with torch.no_grad():
        model.blocks[2].down.bias[0] = float("nan")
    with pytest.raises(ActivationError, match=r"the output of blocks.2 holds NaN or infinity: check"):
        profile(model, loader())
    nan = rows(40)
    nan[10:20, 0] = float("nan")
    with pytest.raises(ActivationError, match=r"the input of blocks.0 holds NaN"):
        profile(seeded(Chain), list(nan.split(10)))


def test_nan_on_the_samples_to_choose_on_is_named() -> None:
    clean = rows(40)
    start = 0
    for batch in Split([torch.arange(40.0)[:, None]], 0).part("validation"):
        start = int(batch.args[0][0, 0])
    dirty = clean.clone()
    dirty[start] = float("inf")
    model = seeded(Chain)
    with pytest.raises(ActivationError, match="output holds NaN or infinity on held-out samples"):
        compress(model, [dirty])


def test_a_profile_of_another_model_is_refused(digits: nn.Module) -> None:
    seen = profile(seeded(Chain), loader())
    with pytest.raises(PlanError, match="the profile is of a Chain, the model is a VisionTransformer"):
        search(digits, seen, loader())


def test_a_profile_of_other_weights_is_refused() -> None:
    seen = profile(seeded(Chain), loader())
    other = seeded(Chain)
    with torch.no_grad():
        other.head.bias += 1
    with pytest.raises(PlanError, match="of a Chain with other weights: profile this one"):
        search(other, seen, loader())


def test_a_network_that_no_candidate_leaves_finite_is_named() -> None:
    class Needing(Chain):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.stem(x)
            for block in self.blocks:
                hidden = block(hidden)
            skipped = (hidden == self.stem(x)).all()
            return self.head(hidden).masked_fill(skipped, float("inf"))

    model = seeded(Needing)
    config = Config(maps=("identity",), window=4)
    with pytest.raises(ActivationError, match="every candidate makes the model's output NaN"):
        compress(model, loader(), budget=Budget(macs=100), config=config)


def test_a_decoder_has_a_mask_of_its_own() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 3}
    model = seeded(transformers.T5Model, transformers.T5Config(vocab_size=50, **sizes))
    ids = torch.randint(1, 50, (10, 6), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(6) < 3).long().expand(10, -1)
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids}
    rows_seen = {p.chain.name: p.moments.n for p in profile(model, [batch], config=LIGHT).chains}
    assert rows_seen == {"encoder.block": 5 * 3, "decoder.block": 5 * 6}


def test_loader_errors_reach_the_user_of_compress() -> None:
    with pytest.raises(LoaderError, match="one-shot generator"):
        compress(seeded(Chain), (x for x in loader()))
    with pytest.raises(LoaderError, match="the loader is empty"):
        compress(seeded(Chain), [])
    with pytest.raises(LoaderError, match="batch 1 holds input 0 in float64"):
        compress(seeded(Chain), [rows(10), rows(10).double()])


def test_fewer_streams_are_kept_where_memory_is_small_and_the_plan_is_the_same() -> None:
    model, data = seeded(Chain, depth=12), loader()
    plans, kept, passes = [], [], []
    for memory in (None, 4_000, 1):  # of 16 samples, 13 boundaries, 8 channels in float32
        config = Config(units=("span",), swaps=0, memory=memory, window=1)
        seen = profile(model, data, config=config.model_copy(update={"memory": None}))
        run = SearchContext.read(model, replace(seen, config=config), data, Budget(macs=0.9))
        found = search_run(run)
        plans.append(found.plan)
        kept.append(sorted(run.evaluator._streams[0][0]))
        passes.append(found.plan.forward_passes)
    assert [len(boundaries) for boundaries in kept] == [13, 7, 2]  # every second one; the ends alone
    for plan in plans[1:]:
        assert [str(r) for r in plan.replacements] == [str(r) for r in plans[0].replacements]
        found, expected = ([s.divergence for s in p.steps] for p in (plan, plans[0]))
        assert found == pytest.approx(expected, rel=1e-5)
    assert passes == sorted(passes)
    assert passes[2] > passes[0]


@pytest.mark.parametrize(("apart", "first"), [(1e-9, 1), (-1e-9, 1), (1e-3, 0), (-1e-3, 1), (0.0, 1)])
def test_a_near_tie_goes_to_what_saves_most(
    apart: float, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (chain,) = supports(seeded(Chain), rows(4)).chains
    judged = [torch.full((3,), 0.7), torch.full((3,), 0.7 * (1 + apart))]
    moves = [
        Candidate(0, unit_of("span").choice(chain, start, start + 1), {}, Cost(macs=macs, params=0))
        for start, macs in ((0, 10), (1, 20))
    ]
    monkeypatch.setattr(SearchContext, "evaluate", lambda _, __, each: judged[each.replacement.start])
    context = SearchContext.__new__(SearchContext)
    context.config, context.log = Config(), SimpleNamespace(evaluated=lambda *_: None)  # type: ignore[assignment]
    selection = Selection.__new__(Selection)
    selection.context, selection.state = context, None  # type: ignore[assignment]
    ordered = selection.evaluated(moves, lambda _, each: float(each.mean()))
    assert [move.replacement.start for _, _, move, _ in ordered] == [first, 1 - first]


def started(budget: Budget, config: Config = LIGHT, depth: int = 4) -> SearchContext:
    model = seeded(Chain, depth)
    return SearchContext.read(model, profile(model, loader(), config=config), loader(), budget)


def test_each_limit_lacks_what_is_above_it() -> None:
    run = started(Budget(macs=0.5, params=600))
    assert run.limits.lacking(Cost(macs=600, params=700)) == {"macs": 60, "params": 100}
    assert run.limits.lacking(Cost(macs=540, params=601)) == {"params": 1}
    assert not run.limits.lacking(Cost(macs=540, params=600))
    assert run.limits.lacking(Cost(macs=600, params=700), Cost(macs=590, params=700)) == {"macs": 10}
    assert progress(Cost(macs=30, params=10), {"macs": 60, "params": 5}) == 0.5
    assert progress(Cost(macs=30, params=10), {"macs": 15, "params": 40}) == 0.25
    assert progress(Cost(macs=30, params=10), {"params": 10}) == 1
    original = run.start.cost
    assert (original.macs, original.params) == (1080, 67 + 4 * 280)
    assert run.limits.share(original) == 1
    assert run.limits.share(Cost(macs=675, params=600)) == 0.25
    assert run.limits.share(Cost(macs=675, params=600 + 587 // 2)) == pytest.approx(0.5, abs=1e-3)
    assert run.limits.share(Cost(macs=500, params=600)) == 0


def test_each_limit_of_quality_is_broken_by_itself() -> None:
    limits = Limits.__new__(Limits)
    limits.budget = Budget(divergence=0.1, agreement=0.9, accuracy_drop=0.2)
    good: dict[str, Any] = {"mean": 0.1, "agreement": 0.9, "accuracy_drop": 0.2}
    for bad in ({}, {"mean": 0.11}, {"agreement": 0.89}, {"accuracy_drop": 0.21}):
        draft: Any = SimpleNamespace(evaluation=SimpleNamespace(**(good | bad)))
        said = " ".join(limits.broken(draft)).replace("divergence", "mean")
        assert [name for name in good if name in said] == [*bad]


def test_a_search_without_memory_says_what_it_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(Chain)
    seen = profile(model, loader(), config=LIGHT)

    def starved(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("rba_compress.planning.search.run", starved)
    # Five boundaries of eight channels in float32; four targets of 8 x 8 in float64.
    said = "the streams of a sample take 160 bytes, .* and a fit of every span .* takes 2,048[.]"
    with pytest.raises(MemoryLimitError, match=said):
        search(model, seen, loader(), budget=Budget(macs=0.5))


def test_quality_alone_goes_down_to_the_stem_and_the_head() -> None:
    run = started(Budget(divergence=1.0))
    assert (run.limits.floor.macs, run.limits.floor.params) == (4 * 8 + 8 * 3, 4 * 8 + 8 + 8 * 3 + 3)
    assert run.limits.lacking(run.start.cost) == {"macs": 4 * 256}
    assert not run.limits.costs


def test_of_two_times_the_least_difference_is_noise() -> None:
    run = started(Budget(macs=0.5))
    run.limits.costs = {"latency": 0.5}
    assert run.limits.lacking(Cost(macs=0, params=0, latency=0.9)) == {"latency": pytest.approx(0.4)}
    assert run.limits.lacking(
        Cost(macs=0, params=0, latency=0.9), Cost(macs=0, params=0, latency=0.85)
    ) == {"latency": pytest.approx(0.03)}
    assert not run.limits.lacking(
        Cost(macs=0, params=0, latency=0.9), Cost(macs=0, params=0, latency=0.89)
    )


def test_a_refinement_wins_by_more_than_the_tolerance_and_the_standard_error() -> None:
    run = started(Budget(macs=0.5), LIGHT.model_copy(update={"tolerance": 0.1}))
    now = torch.full((20,), 2.0, dtype=torch.float64)
    assert wins(run, now - 0.21, now)
    assert not wins(run, now - 0.19, now)
    assert not wins(run, now, now)
    assert not wins(run, now + 1, now)
    assert wins(run, now[:1] - 0.21, now[:1])
    assert not wins(run, now[:1] - 0.19, now[:1])
    noise = torch.randn(20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = 5 * (noise - noise.mean())
    error = float(scipy.stats.sem(noise.numpy()))
    assert wins(run, now - noise - 1.01 * error, now)
    assert not wins(run, now - noise - 0.99 * error, now)


def spans(sites: list[Site]) -> list[tuple[int, int]]:
    assert all(chain == 0 and unit == "span" for chain, _, _, unit in sites)
    return [(start, stop) for _, start, stop, _ in sites]


def test_sites_are_free_and_no_longer_than_what_is_asked() -> None:
    """A block is 256 macs; 540 are to go, then 284."""
    run = started(Budget(macs=0.5))
    every = [(a, b) for a in range(4) for b in range(a + 1, 5)]
    assert sorted(spans(Selection(run, run.start).sites())) == [s for s in every if s[1] - s[0] <= 3]
    near = Selection(run, run.start, run.start.cost.model_copy(update={"macs": 1080 - 256})).sites()
    assert sorted(spans(near)) == [(0, 1), (1, 2), (2, 3), (3, 4)]
    chain = run.chains[0]
    move = Candidate(0, unit_of("span").choice(chain, 1, 2), {}, Cost(macs=256, params=280))
    draft = run.state(with_candidate(run.start.solution, move), run.start.cost - move.saving)
    assert sorted(spans(Selection(run, draft).sites())) == [(0, 1), (2, 3), (2, 4), (3, 4)]
    back = run.without(draft, move.replacement)
    assert not back.solution.plan.replacements
    assert back.cost == run.start.cost
    assert back.mean == pytest.approx(0, abs=1e-12)


def test_the_longest_new_span_of_a_step() -> None:
    run = started(Budget(macs=0.5), depth=8)
    chain = run.chains[0]

    def draft(*units: tuple[int, int, Any]) -> SearchState:
        skips = tuple(unit_of(unit[2]).choice(chain, *unit[:2]) for unit in units)
        return replace(run.start, solution=Solution(Plan(replacements=skips), {}))

    old = draft((0, 4, "span"))
    after = draft((0, 4, "span"), (4, 5, "span"), (5, 7, "span"), (7, 8, "mlp_free"))
    assert _longest_new(old, after) == 2
    assert _longest_new(old, draft((0, 4, "span"), (7, 8, "mlp_free"))) == 0
    assert _longest_new(old, draft((0, 5, "span"))) == 5


def test_the_promising_and_the_new_are_screened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rba_compress.planning.selection.PROMISING", 2)
    run = started(Budget(macs=0.5), depth=8)
    chain = run.chains[0]
    moves = [
        Candidate(0, unit_of("span").choice(chain, b, b + 1), {}, Cost(macs=100 * (b + 1)))
        for b in (0, 1, 2, 3, 4)
    ]
    sites = [move.site for move in moves]
    # Rises for the progress: 0.1, 0.2, 0.05 and 0.5.
    run.rises = dict(zip(sites[:4], (0.1, 0.4, 0.15, 2.0), strict=True))
    selection = Selection(run, run.start)
    selection.lacking = {"macs": 1000.0}
    assert selection.promising(moves) == [sites[0], sites[2], sites[4]]


def test_a_probe_is_the_middle_of_a_dial() -> None:
    run = started(
        Budget(macs=0.5), Config(maps=("affine", "shrunk"), shrinks=(0.9, 0.1, 0.5), units=("span",))
    )
    moves = run.fitter.candidates(run.start, [Site(0, 1, 2, "span"), Site(0, 2, 3, "span")])
    found = [(m.site[1], str(m.replacement.map)) for m in probes(run, moves)]
    maps = ("identity", "affine", "shrunk(0.5)")
    assert sorted(found) == sorted((start, name) for start in (1, 2) for name in maps)


class Normed(Block):
    """With a BatchNorm behind it, each twice as wide as that before."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.norm = nn.BatchNorm1d(width, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(torch.relu(self.up(x))))


def normed(block: type[nn.Module], seed: int) -> tuple[nn.Module, list[Tensor]]:
    """A network of six blocks and its samples, with statistics of its BatchNorms taken on them."""
    model, data = seeded(Chain, 6, block=block), [*rows(60, seed).split(10)]
    for index, each in enumerate(model.blocks if block is Normed else ()):
        nn.init.constant_(each.norm.weight, 2.0**index)
    with torch.no_grad():
        model.train()(torch.cat(data))
    model.eval()
    return model, data


@pytest.mark.parametrize(
    ("block", "seed", "settings", "refined"),
    [
        (Block, 0, {"swaps": 0}, "refit"),
        (Block, 5, {"refit": False}, "settle"),
        (Block, 11, {}, "swap"),
        (Normed, 0, {"maps": ("identity",), "refit": False}, "statistics"),
    ],
)
def test_every_step_costs_and_diverges_as_it_says(
    block: type[nn.Module], seed: int, settings: dict[str, Any], refined: str
) -> None:
    model, data = normed(block, seed)
    config = Config(units=("span",), window=2, refit_steps=(1.0,), **settings)
    seen = profile(model, data, config=config)
    found = search(model, seen, data, budget=Budget(macs=0.5))
    steps, choose = found.plan.steps, list(Split(data, 0).part("validation"))
    assert (found.plan.budget, found.plan.config) == (Budget(macs=0.5), config)
    assert {step.action for step in steps} >= {"take", refined}
    assert 1 < found.plan.forward_passes < 100
    before = 0.0
    for step in steps:
        assert step.action == "take" or step.margin == pytest.approx(before - step.divergence, rel=1e-6)
        before = step.divergence
    for index, step in enumerate(steps):
        if step.action == "settle":
            made = [c for c in found.plan.candidates if c.step == index]
            of_span = [c.divergence for c in made if step.change.startswith(f"{named(c)} -> ")]
            assert step.divergence == pytest.approx(min(of_span), rel=1e-6)
    for point in found.points:
        compressed, last = splice(model, point.plan, point.tensors), point.plan.steps[-1]
        measured = cost(compressed, as_batch(rows(2)))
        assert (last.macs, last.params) == (measured.macs, measured.params)
        divergence = fidelity(model, compressed, choose, seen.criterion.kind).divergence
        assert last.divergence == pytest.approx(divergence, rel=1e-4)
        assert steps[: len(point.plan.steps)] == point.plan.steps
    assert found.points[-1].plan.steps == steps
    # The first step, from what was judged: the least rise for what it brings of the half that is asked.
    original = seen.original.macs
    first = [c for c in found.plan.candidates if c.step == 0]
    score = {str(c): c.divergence / min((original - c.macs) / (original / 2), 1) for c in first}
    best = min(first, key=lambda c: score[str(c)])
    others = [c for c in first if (c.start, c.stop) != (best.start, best.stop)]
    progress = min((original - best.macs) / (original / 2), 1)
    margin = (min(score[str(c)] for c in others) - score[str(best)]) * progress
    assert steps[0].divergence == pytest.approx(best.divergence, rel=1e-6)
    assert steps[0].margin == pytest.approx(margin, rel=1e-4)
    assert steps[0].change == f"{named(best)} -> {best.map}"


def named(candidate: EvaluatedCandidate) -> str:
    return listed([f"blocks.{b}" for b in range(candidate.start, candidate.stop)])


@pytest.mark.parametrize("share", [1e-6, 0.5])
def test_the_step_that_breaks_a_limit_is_said_and_not_taken(share: float) -> None:
    model = seeded(Chain)
    whole = compress(model, loader(), budget=Budget(macs=56), config=LIGHT).plan.steps[-1].divergence
    limit = share * whole
    found = search(
        model, profile(model, loader(), config=LIGHT), loader(), budget=Budget(divergence=limit)
    )
    steps = found.plan.steps
    assert steps[-1].action == "stop"
    assert steps[-1].divergence > limit
    assert all(step.divergence <= limit for step in steps[:-1])
    before = steps[-2].divergence if len(steps) > 1 else 0.0
    assert steps[-1].margin == pytest.approx(steps[-1].divergence - before, rel=1e-6)
    assert len(found.points) == sum(step.action == "take" for step in steps)
    compressed = splice(model, found.plan, found.tensors)
    choose = list(Split(loader(), 0).part("validation"))
    divergence = fidelity(model, compressed, choose, found.plan.divergence).divergence
    assert divergence == pytest.approx(before, rel=1e-4, abs=1e-12)
