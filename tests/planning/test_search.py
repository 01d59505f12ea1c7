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
)
from rba_compress.cli.digits import digits_data
from rba_compress.core.batch import as_batch
from rba_compress.core.cost import Cost
from rba_compress.core.loader import Split
from rba_compress.core.plan import Site
from rba_compress.graph.activations import run_with_streams
from rba_compress.planning.context import SearchContext
from rba_compress.planning.descent import descend
from rba_compress.planning.limits import Limits
from rba_compress.planning.refinement import wins
from rba_compress.planning.state import with_candidate
from rba_compress.profiling.cost import cost
from rba_compress.profiling.fidelity import fidelity
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
    assert [s.action for s in plan.steps if s.action == "stage"]
    for step in plan.steps:
        assert (step.predicted is not None) == (step.action == "stage")
        # A stage is a choice; a refinement lowers the divergence.
        assert step.action in ("stage", "choose") or step.margin > 0
    assert {c.map.kind for c in plan.candidates} >= {"identity", "shrunk"}
    last = plan.steps[-1]
    assert (last.macs, last.params) == (result.report.compressed.macs, result.report.compressed.params)
    assert sum(r.stop - r.start for r in plan.replacements) >= 3
    assert all(r.diagnostics is not None for r in plan.replacements if not r.exact)
    assert plan.forward_passes > 1
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


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
        means = {
            str(m.replacement.map): float(
                run.divergences(
                    run.start, with_candidate(run.start.solution, m), (0, m.boundary)
                ).mean()
            )
            for m in moves
            if m.site == span
        }
        better += min(means.values()) < means["identity"]
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
    test, how = as_batch((test_images, test_labels)), LIGHT.model_copy(update={"effort": "quick"})
    found = {}
    for name, order in orders.items():
        data = list(zip(images[order].split(50), labels[order].split(50), strict=True))
        compressed = compress(digits, data, budget=Budget(macs=0.7), config=how)
        found[name] = fidelity(digits, compressed.model, [test], "kl").divergence
    assert found["sorted"] < 1.5 * found["shuffled"] + 0.005


@pytest.mark.slow
def test_several_chains_share_one_budget() -> None:
    model = seeded(
        timm.create_model, "convnext_atto", depths=(1, 1, 3, 2), dims=(8, 16, 24, 32), num_classes=5
    )
    data = list(images(20, 32).split(10))
    config = Config(shrinks=(0.6,), units=("span",), window=2)
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
    budget, config = Budget(macs=0.8), Config(shrinks=(0.6,))
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
        config = Config(units=("span",), memory=memory, window=1)
        seen = profile(model, data, config=config.model_copy(update={"memory": None}))
        run = SearchContext.read(model, replace(seen, config=config), data, Budget(macs=0.9))
        found = descend(run)
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


def started(budget: Budget, config: Config = LIGHT, depth: int = 4) -> SearchContext:
    model = seeded(Chain, depth)
    return SearchContext.read(model, profile(model, loader(), config=config), loader(), budget)


def test_each_limit_lacks_what_is_above_it() -> None:
    run = started(Budget(macs=0.5, params=600))
    assert run.limits.lacking(Cost(macs=600, params=700)) == ["macs", "params"]
    assert run.limits.lacking(Cost(macs=540, params=601)) == ["params"]
    assert not run.limits.lacking(Cost(macs=540, params=600))
    original = run.start.cost
    assert (original.macs, original.params) == (1080, 67 + 4 * 280)


def test_each_limit_of_quality_is_broken_by_itself() -> None:
    limits = Limits.__new__(Limits)
    limits.budget = Budget(divergence=0.1, agreement=0.9, accuracy_drop=0.2, metric_drop={"m": 0.3})
    good: dict[str, Any] = {"mean": 0.1, "agreement": 0.9, "accuracy_drop": 0.2}
    good["metric_drops"] = {"m": 0.3}
    for bad in ({}, {"mean": 0.11}, {"agreement": 0.89}, {"accuracy_drop": 0.21}):
        draft: Any = SimpleNamespace(evaluation=SimpleNamespace(**(good | bad)))
        said = " ".join(limits.broken(draft)).replace("divergence", "mean")
        assert [name for name in good if name in said] == [*bad]
    draft = SimpleNamespace(evaluation=SimpleNamespace(**(good | {"metric_drops": {"m": 0.31}})))
    assert limits.broken(draft) == ["drop of m <= 0.3 (it is 0.31)"]


def test_a_search_without_memory_says_what_it_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = seeded(Chain)
    seen = profile(model, loader(), config=LIGHT)

    def starved(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("rba_compress.planning.search.descend", starved)
    # Five boundaries of eight channels in float32; four targets of 8 x 8 in float64.
    said = "the streams of a sample take 160 bytes, .* and a fit of every span .* takes 2,048[.]"
    with pytest.raises(MemoryLimitError, match=said):
        search(model, seen, loader(), budget=Budget(macs=0.5))


def test_quality_alone_goes_down_to_the_stem_and_the_head() -> None:
    run = started(Budget(divergence=1.0))
    assert (run.limits.floor.macs, run.limits.floor.params) == (4 * 8 + 8 * 3, 4 * 8 + 8 + 8 * 3 + 3)
    assert not run.limits.costs


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
