"""Hostile budgets and settings: each is refused by name before anything is run, or met."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from rba_compress import Budget, Config, Healing, RBAError, compress, heal, profile, search
from rba_compress.core.errors import BudgetError, ConfigError
from tests.hostile.cases import Case, table
from tests.networks import LIGHT, Chain, loader, seeded


def budget(**limits: Any) -> Callable[[], Any]:
    return lambda: compress(seeded(Chain), loader(), budget=Budget(**limits), config=LIGHT)


def config(**settings: Any) -> Callable[[], Any]:
    return lambda: compress(seeded(Chain), loader(), budget=Budget(macs=0.8), config=Config(**settings))


def embedding() -> nn.Module:
    """Network whose output is not class scores."""
    return nn.Sequential(seeded(Chain), nn.LayerNorm(3))


def given(what: str, value: Any) -> Callable[[], Any]:
    options: dict[str, Any] = {"budget": Budget(macs=0.8), "config": LIGHT, what: value}
    return lambda: compress(seeded(Chain), loader(), **options)


REFUSED = [
    Case("nothing asked", budget(), BudgetError, r"needs a limit, such as Budget\(macs=0.75\)"),
    Case("a negative share", budget(macs=-0.5), BudgetError, "-0.5 is neither a share in .* nor a positive"),
    Case("a negative count", budget(macs=-5), BudgetError, "-5 is neither"),
    Case("nothing left", budget(macs=0), BudgetError, "0 is neither"),
    Case("nothing left, as a share", budget(params=0.0), BudgetError, "0.0 is neither"),
    Case("a share above 1", budget(macs=1.2), BudgetError, "1.2 is neither a share"),
    Case("per cent", budget(macs=75.0), BudgetError, "75.0 is neither a share"),
    Case("NaN", budget(macs=math.nan), BudgetError, "nan is neither"),
    Case("infinity", budget(params=math.inf), BudgetError, "inf is neither"),
    Case("a string", budget(macs="75%"), BudgetError, "'75%' is no limit: give a share"),
    Case("a bool", budget(macs=True), BudgetError, "True is no limit"),
    Case("a complex number", budget(macs=0.5j), BudgetError, "0.5j is no limit"),
    Case("a tensor", budget(macs=torch.tensor(0.5)), BudgetError, r"tensor\(0.5000\) is no limit"),
    Case("a list", budget(params=[0.5]), BudgetError, r"\[0.5\] is no limit"),
    Case("a limit that there is not", budget(flops=0.5), BudgetError, "no 'flops': did you mean"),
    Case("a limit with a letter missing", budget(mac=0.5), BudgetError, "no 'mac': did you mean 'macs'"),
    Case("a negative latency", budget(latency=-1.0), BudgetError, "-1.0 is no latency"),
    Case("no latency", budget(latency=0), BudgetError, "0 is no latency: give a share in"),
    Case("an endless latency", budget(latency=math.inf), BudgetError, "inf is no latency"),
    Case("a negative divergence", budget(divergence=-0.1), BudgetError, "divergence=-0.1 is not between"),
    Case("a divergence that is NaN", budget(divergence=math.nan), BudgetError, "divergence=nan"),
    Case("an agreement above 1", budget(agreement=95), BudgetError, "agreement=95 is not between 0 and 1"),
    Case("an accuracy drop in points", budget(accuracy_drop=2), BudgetError, "accuracy_drop=2 is not"),
    Case("less than is reachable", budget(macs=0.01), BudgetError,
         r"no plan reaches macs <= .*the cheapest reachable is .* macs \(0\.\d+\)"),
    Case("fewer parameters than are reachable", budget(params=0.01), BudgetError, "no plan reaches params <="),
    Case("one multiply-accumulate", budget(macs=1), BudgetError, "An int is absolute: 1.0 keeps all"),
    Case("half of it and no loss", budget(macs=0.5, divergence=0.0), BudgetError,
         "no plan was found that reaches macs .* within divergence <= 0"),
    Case("half of it and the same answers", budget(macs=0.5, divergence=1e-12, agreement=1.0), BudgetError,
         "no plan was found that reaches macs .* within "),
    Case("accuracy without labels", budget(macs=0.8, accuracy_drop=0.01), BudgetError, "needs labels"),
    Case("agreement without classes", lambda: compress(embedding(), loader(), budget=Budget(agreement=0.9),
         config=LIGHT), BudgetError, "of class scores; Sequential gives none"),
    Case("a number for a budget", given("budget", 0.75), BudgetError, "the budget is a float: pass a rba_com"),
    Case("a dict for a budget", given("budget", {"macs": 0.75}), BudgetError, "the budget is a dict"),
    Case("a config for a budget", given("budget", LIGHT), BudgetError, "the budget is a Config"),
    Case("a dict for a config", given("config", {"refit": False}), ConfigError, "the config is a dict"),
    Case("a budget for a config", given("config", Budget(macs=0.8)), ConfigError, "the config is a Budget"),
    Case("a number for a healing", lambda: heal(seeded(Chain), loader(), original=seeded(Chain), healing=3),  # type: ignore[call-overload]
         ConfigError, "the healing is a int: pass a rba_compress.Healing"),
    Case("a number for a budget of a search", lambda: search(seeded(Chain), profile(seeded(Chain), loader()),
         loader(), budget=0.5), BudgetError, "the budget is a float"),  # type: ignore[arg-type]
    Case("a setting that there is not", config(map=("affine",)), ConfigError, "no 'map': did you mean 'maps'"),
    Case("a map that there is not", config(maps=("ridge",)), ConfigError, "maps.0='ridge' will not do: .*affine"),
    Case("a unit that there is not", config(units=("layer",)), ConfigError, "units.0='layer' will not do"),
    Case("no unit that a stock network has", config(stock=True, units=("token_merge",)), ConfigError,
         "no unit of .'token_merge'. gives a stock network: .*'span'"),
    Case("a dial above 1", config(shrinks=(1.5,)), ConfigError, "shrinks.0=1.5 will not do"),
    Case("no dial", config(shrinks=()), ConfigError, "shrinks=.* will not do"),
    Case("a negative damping", config(damping=-1), ConfigError, "damping=-1 will not do"),
    Case("a negative window", config(window=-1), ConfigError, "window=-1 will not do"),
    Case("a rank of nothing", config(rank=0), ConfigError, "rank=0 will not do"),
    Case("a stride of nothing", config(stride=0), ConfigError, "stride=0 will not do"),
    Case("a seed that is a word", config(seed="x"), ConfigError, "seed='x' will not do: .*integer"),
    Case("a divergence that there is not", config(divergence="mse"), ConfigError, "divergence='mse' will not"),
    Case("a rate of nothing", lambda: Healing(rate=0), ConfigError, "rate=0 will not do"),
    Case("an augmentation that there is not", lambda: Healing(augment=("rotate",)), ConfigError, "'rotate'"),
    Case("memory for nothing", config(memory=10), RBAError, "those of single blocks .*: raise `memory`"),
]  # fmt: skip


@table(REFUSED)
def test_a_budget_or_setting_is_refused_by_name(case: Case) -> None:
    assert case.error is not None
    with pytest.raises(case.error, match=f"(?s){case.message}"):
        case.make()


RIGHT = [
    Case("all of it", budget(macs=1.0)),
    Case("more than all of it", budget(macs=10**12)),
    Case("a share that is numpy's", budget(macs=__import__("numpy").float32(0.8))),
    Case("a count that is numpy's", budget(macs=__import__("numpy").int64(900))),
    Case("every loss", budget(divergence=1e300)),
    Case("no loss", budget(divergence=0.0)),
    Case("the same answers", budget(agreement=1.0)),
    Case("no map but the identity", config(maps=())),
    Case("every map", config(maps=("identity", "scale", "linear", "affine", "low_rank", "orthogonal"))),
    Case("a map twice", config(maps=("affine", "affine"))),
    Case("a rank above the width", config(maps=("low_rank",), rank=10**6)),
    Case("a window beyond the chain", config(window=10**6)),
    Case("a window of one", config(window=1)),
    Case("a stride beyond the positions", config(stride=10**6)),
    Case("a huge damping", config(maps=("affine",), damping=1e30)),
    Case("no damping", config(maps=("affine",), damping=0.0)),
    Case("a negative seed", config(seed=-1)),
    Case("a seed of a hundred digits", config(seed=10**100)),
]


@table(RIGHT)
def test_a_budget_or_setting_is_met(case: Case) -> None:
    result = case.make()
    assert not any("does not hold" in w for w in result.report.warnings if "divergence" not in w)
    limits = result.plan.budget.limits(result.report.original.macs, result.report.original.params)
    assert all(getattr(result.report.compressed, name) <= limit for name, limit in limits.items())
    assert math.isfinite(result.report.fidelity.divergence)
