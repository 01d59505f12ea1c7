from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rba_compress import Budget, BudgetError, Config, compress
from rba_compress.core.loader import Split
from rba_compress.core.plan import Site
from rba_compress.planning.context import SearchContext
from rba_compress.profiling.fidelity import fidelity
from rba_compress.profiling.latency import Latency, benchmark, block_times
from rba_compress.profiling.profiler import profile
from rba_compress.reporting.comparison import measured
from tests.networks import LIGHT, Block, Chain, loader, seeded

QUICK = LIGHT.model_copy(update={"window": 2})


def classifier() -> tuple[nn.Module, list[Any]]:
    """A network of eight blocks, and inputs with the classes that it gives them."""
    model = seeded(Chain, depth=8)
    with torch.no_grad():
        return model, [(x, model(x).argmax(-1)) for x in loader(200, 50)]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({}, r"a budget needs a limit, such as Budget\(macs=0.75\)"),
        ({"macs": 1.5}, r"1.5 is neither a share in \(0, 1\] nor a positive count"),
        ({"macs": -3}, "-3 is neither"),
        ({"params": 0.0}, "0.0 is neither"),
        ({"params": "half"}, "'half' is no limit: give a share"),
        ({"latency": 0}, r"0 is no latency: give a share in \(0, 1\] or milliseconds"),
        ({"latency": float("nan")}, "nan is no latency"),
        ({"divergence": -0.1}, "divergence=-0.1 is not between 0 and 1.79769e"),
        ({"agreement": 1.1}, "agreement=1.1 is not between 0 and 1"),
        ({"agreement": True}, "True is no limit: give a number such as 0.05"),
        ({"accuracy_drop": 2}, "accuracy_drop=2 is not between 0 and 1"),
    ],
)
def test_a_contradictory_budget_is_named(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Budget(**limits)


def test_limits_of_quality_alone_take_what_they_allow() -> None:
    """The cheapest network that was evaluated whose output still holds."""
    found = {}
    model, data = classifier()
    for limit in (0.001, 0.01):
        compressed = compress(model, data, budget=Budget(divergence=limit), config=QUICK)
        held = list(Split(data, 0).part("validation"))
        assert fidelity(model, compressed.model, held, "kl").divergence <= limit
        (stop,) = (step for step in compressed.plan.steps if step.action == "stop")
        assert stop.divergence > limit
        assert stop.change == f"divergence <= {limit:g} (it is {stop.divergence:.4g})"
        found[limit] = compressed.report.compressed.macs
    assert found[0.01] < found[0.001] < compressed.report.original.macs


@pytest.mark.parametrize("limits", [{"agreement": 0.97}, {"accuracy_drop": 0.05}])
def test_agreement_and_accuracy_hold_on_the_samples_to_choose_on(
    limits: dict[str, float],
) -> None:
    model, data = classifier()
    compressed = compress(model, data, budget=Budget(**limits), config=QUICK)
    assert compressed.plan.replacements
    found = fidelity(model, compressed.model, Split(data, 0).part("validation"), "kl")
    assert found.agreement is not None
    assert found.accuracy_original is not None
    assert found.accuracy_compressed is not None
    if "agreement" in limits:
        assert found.agreement >= limits["agreement"]
    else:
        assert found.accuracy_original - found.accuracy_compressed <= limits["accuracy_drop"]


def test_cost_and_quality_together() -> None:
    model, data = classifier()
    both = Budget(macs=0.9, divergence=0.2)
    compressed = compress(model, data, budget=both, config=QUICK)
    assert compressed.report.compressed.macs <= 0.9 * compressed.report.original.macs
    message = (
        r"no plan was found that reaches macs <= .* within divergence <= 1e-07 \(it is .*\): the best "
        r"within it has .* macs \(.*\), .* params \(.*\) at divergence .*; the next step, .* breaks it"
    )
    with pytest.raises(BudgetError, match=message):
        compress(model, data, budget=Budget(macs=0.3, divergence=1e-7), config=QUICK)


@pytest.mark.parametrize(
    ("name", "holds", "breaks"), [("divergence", 2.0, 0.5), ("latency", 1e6, 1e-6)]
)
def test_what_does_not_hold_on_the_held_out_samples_is_said(
    name: str, holds: float, breaks: float
) -> None:
    model = seeded(Chain)
    seen = profile(model, loader())
    compressed = compress(model, loader(), budget=Budget(macs=0.5), config=LIGHT)
    confirm = list(seen.split(loader()).part("test"))
    scale = compressed.report.fidelity.divergence if name == "divergence" else 1.0
    for limit, said in ((holds, False), (breaks, True)):
        plan = compressed.plan.model_copy(update={"budget": Budget(**{name: limit * scale})})
        warnings = measured(model, compressed.model, confirm, seen, plan, samples="some").warnings
        assert any(f"on these samples it does not hold that {name} <=" in w for w in warnings) is said


def blocks_kept(original: nn.Module, compressed: nn.Module, *_: Any, **__: Any) -> Latency:
    """A timer that shows the share of blocks that are left."""
    of = [sum(isinstance(m, Block) for m in model.modules()) for model in (original, compressed)]
    ratio = of[1] / of[0]
    return Latency(
        original_ms=10,
        compressed_ms=10 * ratio,
        ratio=ratio,
        ratio_low=ratio,
        ratio_high=ratio,
        pairs=7,
        batch=1,
        device="cpu",
    )


@pytest.mark.parametrize("limit", [0.75, 7.5])
def test_latency_is_followed_by_the_clock_and_no_further(
    limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rba_compress.planning.context.benchmark", blocks_kept)
    compressed = compress(seeded(Chain, depth=8), loader(), budget=Budget(latency=limit), config=LIGHT)
    kept = sum(isinstance(m, Block) for m in compressed.model.modules())
    assert 4 <= kept <= 6  # six of eight are fast enough; a span may bring more than what was asked


@pytest.mark.parametrize("limit", [0.75, 7.5])
def test_the_dense_network_takes_all_of_its_time(limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rba_compress.planning.context.benchmark", blocks_kept)
    monkeypatch.setattr("rba_compress.planning.context.block_times", lambda *_: [[0.1, 0.2, 0.3, 0.2]])
    model = seeded(Chain)
    seen = profile(model, loader(), config=LIGHT)
    run = SearchContext.read(model, seen, loader(), Budget(latency=limit))
    assert run.limits.costs == {"latency": pytest.approx(0.75)}
    assert run.limits.lacking(run.start.cost) == ["latency"]
    (move, *_) = run.fitter.candidates(run.start, [Site(0, 1, 3, "span")])
    assert move.saving.latency == pytest.approx(0.5)


@pytest.mark.slow
def test_latency_is_measured_on_the_real_network(digits: nn.Module, digits_loader: list[Any]) -> None:
    compressed = compress(digits, digits_loader, budget=Budget(latency=0.8), config=QUICK)
    timed = benchmark(digits, compressed.model, digits_loader[0], seconds=3)
    assert timed.ratio < 0.85  # met when it was measured; machines are noisy
    assert compressed.report.compressed.macs > 0.55 * compressed.report.original.macs


def test_a_latency_that_is_out_of_reach_names_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: Any, **__: Any) -> Latency:
        return blocks_kept(seeded(Chain), seeded(Chain))

    monkeypatch.setattr("rba_compress.planning.context.benchmark", slow)
    message = (
        r"no plan of the units span and the maps folded brings the network to latency <= 0.900: "
        r"the best reachable has .*, 1.000 of the latency at"
    )
    for budget in (Budget(latency=0.9), Budget(latency=0.9, macs=0.9)):
        with pytest.raises(BudgetError, match=message):
            compress(seeded(Chain), loader(), budget=budget, config=LIGHT)


def test_block_times_are_shares_of_one_pass(digits: nn.Module, digits_loader: list[Any]) -> None:
    seen = profile(digits, digits_loader[:2])
    (times,) = block_times(digits, [seen.chains[0].chain], seen.example)
    assert len(times) == 12
    assert all(0 < share < 0.5 for share in times)
    assert 0.5 < sum(times) < 1


def test_limits_that_cannot_be_measured_are_refused() -> None:
    class Regression(Chain):
        def forward(self, x: Any) -> Any:
            return super().forward(x).tanh()

    with pytest.raises(BudgetError, match="are of class scores; Regression gives none: limit"):
        compress(seeded(Regression), loader(), budget=Budget(agreement=0.9))
    with pytest.raises(
        BudgetError, match=r"accuracy_drop needs labels: let every batch of the loader be \(i"
    ):
        compress(seeded(Chain), loader(), budget=Budget(accuracy_drop=0.01))


def test_a_budget_of_several_limits_meets_each() -> None:
    model = seeded(Chain)
    budget = Budget(macs=0.8, params=600, divergence=50.0)
    compressed = compress(model, loader(), budget=budget, config=Config(shrinks=(0.6,)))
    assert compressed.report.compressed.macs <= 0.8 * compressed.report.original.macs
    assert compressed.report.compressed.params <= 600
    choose = Split(loader(), 0).part("validation")
    assert fidelity(model, compressed.model, choose, compressed.plan.divergence).divergence <= 50.0


def test_labels_count_where_every_batch_has_them() -> None:
    labelled = [(x, torch.zeros(len(x), dtype=torch.long)) for x in loader()]
    mixed = [labelled[0], *loader()[1:]]
    for data in (mixed, mixed[::-1]):
        with pytest.raises(BudgetError, match="accuracy_drop needs labels: let every batch"):
            compress(seeded(Chain), data, budget=Budget(accuracy_drop=0.1), config=LIGHT)
        assert compress(seeded(Chain), data, budget=Budget(macs=0.8), config=LIGHT).plan.replacements
