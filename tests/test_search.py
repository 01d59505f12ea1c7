from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from rba_compress import (
    ActivationError,
    Budget,
    BudgetError,
    Config,
    LoaderError,
    Plan,
    PlanError,
    Result,
    compress,
    profile,
    search,
    splice,
)
from rba_compress.batches import Split, as_batch
from rba_compress.measure import cost, fidelity
from rba_compress.streams import run_with_streams
from tests.networks import Chain, loader, rows, seeded


def test_profile_sees_what_stored_activations_say(digits: nn.Module, digits_loader: list[Any]) -> None:
    seen = profile(digits, digits_loader)
    (profiled,) = seen.chains
    stored: list[list[Tensor]] = [[] for _ in range(13)]
    with torch.no_grad():
        for batch in Split(digits_loader, 0).part("fit"):
            _, (streams,) = run_with_streams(digits, [profiled.chain], batch)
            for kept, h in zip(stored, streams, strict=True):
                kept.append(h)
    whole = [torch.cat(kept).double() for kept in stored]  # (N, 17, 64) each
    assert seen.samples == len(whole[0]) == 224
    assert profiled.moments.n == 224 * 17
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
    plain, masked = (profile(model, [batch]).chains[0].moments for batch in (short, padded))
    assert plain.n == masked.n == 7 * 6
    torch.testing.assert_close(plain.comoments(0, 2), masked.comoments(0, 2), rtol=1e-4, atol=1e-4)


def test_the_search_takes_the_best_of_what_it_judged(result: Result) -> None:
    plan = result.plan
    divergences = [c.divergence for c in plan.candidates]
    assert divergences == sorted(divergences)
    best = plan.candidates[0]
    (chosen,) = plan.replacements
    assert (chosen.start, chosen.stop, chosen.map) == (best.start, best.stop, best.map)
    assert {c.map.kind for c in plan.candidates} == {"identity", "shrunk", "linear"}
    assert all(c.stop - c.start == 3 for c in plan.candidates)  # the shortest that meet the budget
    assert plan.forward_passes == len(plan.candidates) + 1
    assert chosen.diagnostics is not None
    assert 0 < chosen.diagnostics.r2 < 1
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_the_judged_divergence_is_the_measured_one(
    result: Result, digits: nn.Module, digits_loader: list[Any]
) -> None:
    choose = list(Split(digits_loader, 0).part("choose"))
    found = fidelity(digits, result.model, choose, "kl")
    assert found.divergence == pytest.approx(result.plan.candidates[0].divergence, rel=1e-4)


def test_same_inputs_and_seed_same_plan_byte_for_byte(
    result: Result, digits: nn.Module, digits_loader: list[Any]
) -> None:
    again = compress(digits, digits_loader, budget=Budget(macs=0.8))
    assert again.plan.model_dump_json() == result.plan.model_dump_json()
    assert all(torch.equal(again.tensors[k], v) for k, v in result.tensors.items())
    other = compress(digits, digits_loader, budget=Budget(macs=0.8), config=Config(seed=1))
    assert other.plan.candidates[0].divergence != result.plan.candidates[0].divergence


def test_a_module_and_its_graph_get_the_same_plan(digits: nn.Module, digits_loader: list[Any]) -> None:
    traced = fx.symbolic_trace(digits)
    budget, config = Budget(macs=0.8), Config(maps=("shrunk",))
    plain = compress(digits, digits_loader[:2], budget=budget, config=config)
    graph = compress(traced, digits_loader[:2], budget=budget, config=config)
    assert isinstance(graph.model, fx.GraphModule)
    assert [str(c) for c in graph.plan.candidates] == [str(c) for c in plain.plan.candidates]
    x = digits_loader[0][0]
    assert torch.equal(graph.model(x), plain.model(x))


def test_a_budget_that_is_met_leaves_the_network_alone() -> None:
    model = seeded(Chain)
    slim = compress(model, loader(), budget=Budget(macs=1.0))
    assert not slim.plan.replacements
    assert torch.equal(slim.model(rows(5)), model(rows(5)))


@pytest.mark.parametrize(
    "budget", [Budget(macs=0.6), Budget(params=0.6), Budget(macs=700), Budget(macs=0.8, params=600)]
)
def test_the_slim_network_meets_its_budget(budget: Budget) -> None:
    model = seeded(Chain)
    slim = compress(model, loader(), budget=budget)
    measured = cost(slim.model, as_batch(rows(2)))
    assert measured == slim.report.slim
    for name, limit in budget.limits(slim.report.dense.macs, slim.report.dense.params).items():
        assert getattr(measured, name) <= limit


def test_an_unreachable_budget_names_the_cheapest_reachable() -> None:
    message = r"no single span reaches macs <= 50 \(of 1,080 macs, .* cheapest reachable is 56 macs"
    with pytest.raises(BudgetError, match=message):
        compress(seeded(Chain), loader(), budget=Budget(macs=50))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, r"a budget needs a limit, such as Budget\(macs=0.75\)"),
        ({"macs": 1.5}, r"1.5 is neither a share in \(0, 1\] nor a positive count"),
        ({"macs": -3}, "-3 is neither"),
        ({"params": 0.0}, "0.0 is neither"),
        ({"params": "half"}, "'half' is no limit: give a share"),
    ],
)
def test_a_contradictory_budget_is_named(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(**limits)


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
    slim = compress(seeded(Chain, width=32), loader(20), budget=Budget(macs=0.8))
    (warning,) = slim.report.warnings
    assert "14 rows for 32 channels; its maps are decided by the damping" in warning
    assert f"warning: {warning}" in slim.report.table()


def test_infinite_activations_name_the_block() -> None:
    model = seeded(Chain)
    with torch.no_grad():
        model.blocks[2].down.bias[0] = float("nan")
    with pytest.raises(ActivationError, match=r"the output of blocks.2 holds NaN or infinity: check"):
        profile(model, loader())
    nan = rows(40)
    nan[17, 0] = float("nan")
    with pytest.raises(ActivationError, match=r"the input of blocks.0 holds NaN"):
        profile(seeded(Chain), list(nan.split(10)))


def test_nan_on_the_samples_to_choose_on_is_named() -> None:
    clean = rows(40)
    start = 0
    for batch in Split([torch.arange(40.0)[:, None]], 0).part("choose"):
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
    config = Config(maps=("identity",))
    with pytest.raises(ActivationError, match="every candidate makes the model's output NaN"):
        compress(model, loader(), budget=Budget(macs=100), config=config)


def test_a_decoder_has_a_mask_of_its_own() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "num_layers": 3}
    model = seeded(transformers.T5Model, transformers.T5Config(vocab_size=50, **sizes))
    ids = torch.randint(1, 50, (10, 6), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(6) < 3).long().expand(10, -1)
    batch = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids}
    rows_seen = {p.chain.name: p.moments.n for p in profile(model, [batch]).chains}
    assert rows_seen == {"encoder.block": 7 * 3, "decoder.block": 7 * 6}


def test_loader_errors_reach_the_user_of_compress() -> None:
    with pytest.raises(LoaderError, match="one-shot generator"):
        compress(seeded(Chain), (x for x in loader()))
    with pytest.raises(LoaderError, match="the loader is empty"):
        compress(seeded(Chain), [])
    with pytest.raises(LoaderError, match="batch 1 holds input 0 in float64"):
        compress(seeded(Chain), [rows(10), rows(10).double()])
