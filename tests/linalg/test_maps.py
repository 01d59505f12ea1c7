from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from benchmarks.map_oracles import differences
from rba_compress.core.map_spec import Diagnostics, Kind, MapSpec
from rba_compress.linalg.maps import (
    build_map,
    correction,
    fit_map,
    map_macs,
    map_parameters,
    map_shapes,
    solve_gram,
)
from rba_compress.linalg.moments import PairMoments

ALL: tuple[Kind, ...] = ("identity", "scale", "linear", "affine", "low_rank", "orthogonal", "shrunk")


def spec(kind: Kind, damping: float = 0.0) -> MapSpec:
    return MapSpec(
        kind=kind,
        damping=damping,
        rank=2 if kind == "low_rank" else None,
        shrink=0.5 if kind == "shrunk" else None,
    )


def pair(n: int = 60, d: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, PairMoments]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64) + 1
    y = x @ torch.randn(d, d, generator=generator, dtype=torch.float64) + 2
    y += 0.1 * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return x, y, PairMoments.from_rows(x, y)


@pytest.mark.parametrize(("which", "difference"), differences().items(), ids=str)
def test_every_map_equals_its_oracle(which: tuple[Kind, str], difference: float) -> None:
    assert difference < 1e-6


@pytest.mark.parametrize("kind", ALL)
def test_the_module_computes_the_map_and_the_diagnostics_describe_it(kind: Kind) -> None:
    x, y, moments = pair()
    fit = fit_map(spec(kind), moments)
    module = build_map(fit.spec, 5, ndim=2, axis=-1).double()
    module.load_state_dict(fit.tensors)
    residual = (y - module(x).detach()).square().sum(1).mean()
    total = (y - y.mean(0)).square().sum(1).mean()
    d = fit.diagnostics
    assert d.residual == pytest.approx(float(residual), rel=1e-9)
    assert d.r2 == pytest.approx(float(1 - residual / total), rel=1e-9)
    assert d.rows == 60
    spectrum = torch.linalg.eigvalsh(torch.cov(x.T, correction=0))
    share = spectrum / spectrum.sum()
    assert d.effective_rank == pytest.approx(float((-share * share.log()).sum().exp()))
    assert map_parameters(fit.spec, 5) == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("kind", ALL)
def test_one_map_for_tokens_and_for_feature_maps(kind: Kind) -> None:
    fit = fit_map(spec(kind), pair()[2])
    modules = {
        (ndim, axis): build_map(fit.spec, 5, ndim=ndim, axis=axis).double()
        for ndim, axis in ((2, -1), (4, 1), (4, 3), (3, 1))
    }
    for module in modules.values():
        state = module.state_dict()
        module.load_state_dict({k: fit.tensors[k].reshape(v.shape) for k, v in state.items()})
    stream = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    rows = modules[2, -1](stream.reshape(-1, 5)).reshape(stream.shape)
    torch.testing.assert_close(modules[4, 3](stream), rows)
    channels_second = modules[4, 1](stream.movedim(-1, 1))
    torch.testing.assert_close(channels_second.movedim(1, -1), rows)
    torch.testing.assert_close(modules[3, 1](stream[0].movedim(-1, 1)).movedim(1, -1), rows[0])
    if kind in ("linear", "affine", "orthogonal", "shrunk"):
        assert isinstance(modules[2, -1], nn.Linear)
        assert isinstance(modules[4, 1], nn.Conv2d)


def test_shrunk_runs_from_the_identity_to_the_affine_map() -> None:
    moments = pair()[2]
    ends = [fit_map(MapSpec(kind="shrunk", shrink=a), moments).tensors for a in (0.0, 1.0)]
    torch.testing.assert_close(ends[0]["weight"], torch.eye(5, dtype=torch.float64))
    assert not ends[0]["bias"].any()
    affine = fit_map(MapSpec(kind="affine"), moments).tensors
    torch.testing.assert_close(ends[1], affine)


def test_damping_is_absolute_in_the_diagnostics_and_bounds_the_condition() -> None:
    x, _, moments = pair()
    gram = (x - x.mean(0)).T @ (x - x.mean(0))
    free, damped = (fit_map(spec("affine", lam), moments).diagnostics for lam in (0.0, 10.0))
    assert damped.damping == pytest.approx(10 * float(gram.diagonal().mean()))
    assert free.damping == 0
    assert free.condition == pytest.approx(float(torch.linalg.cond(gram)))
    assert damped.condition < 2
    assert damped.residual > free.residual


def test_a_degenerate_fit_is_reported_and_not_raised() -> None:
    constant = torch.ones(30, 5, dtype=torch.float64) * 0.3
    _, y, _ = pair(30)
    fit = fit_map(spec("affine"), PairMoments.from_rows(constant, y))
    assert fit.diagnostics.condition == math.inf
    assert fit.diagnostics.effective_rank <= 1 + 1e-9
    assert not fit.tensors["weight"].any()
    torch.testing.assert_close(fit.tensors["bias"], y.mean(0))
    assert fit_map(spec("linear"), PairMoments.from_rows(y, constant * 0)).diagnostics.r2 == 0


def test_costs() -> None:
    assert [map_macs(spec(kind), 5) for kind in ALL] == [0, 0, 25, 25, 20, 25, 25]
    assert [map_parameters(spec(kind), 5) for kind in ALL] == [0, 5, 25, 30, 25, 30, 30]


def test_settings_belong_to_their_kind() -> None:
    with pytest.raises(ValidationError, match="`rank` is set for the map 'low_rank'"):
        MapSpec(kind="low_rank")
    with pytest.raises(ValidationError, match="`shrink` is set for the map 'shrunk'"):
        MapSpec(kind="affine", shrink=0.5)
    with pytest.raises(ValueError, match="a map of rank 6 for 5 channels: use `affine`"):
        fit_map(MapSpec(kind="low_rank", rank=6), pair()[2])


def test_names_for_people() -> None:
    assert str(spec("low_rank")) == "low_rank(2)"
    assert str(spec("shrunk")) == "shrunk(0.5)"
    assert str(spec("linear")) == "linear"


@pytest.mark.parametrize("kind", ["scale", "linear", "affine", "low_rank", "shrunk"])
def test_damping_is_ridge_regression_on_the_rows(kind: Kind) -> None:
    x, y, moments = pair()
    a, b = x.numpy(), y.numpy()
    if kind not in ("scale", "linear"):
        a, b = a - a.mean(0), b - b.mean(0)
    gram = a.T @ a * (np.eye(5) if kind == "scale" else 1)
    ridge = 0.7 * np.trace(gram) / 5
    expected = np.linalg.solve(
        gram + ridge * np.eye(5), a.T @ b * (np.eye(5) if kind == "scale" else 1)
    )
    whole = spec(kind, 0.7).model_copy(update={"rank": 5} if kind == "low_rank" else {})
    for known in (moments, moments.with_spectrum()):
        fit = fit_map(whole, known)
        module = build_map(whole, 5, ndim=2, axis=-1).double()
        module.load_state_dict(fit.tensors)
        zero = module(torch.zeros(1, 5, dtype=torch.float64))
        weight = (module(torch.eye(5, dtype=torch.float64)) - zero).detach().numpy()
        wanted = (np.eye(5) + expected) / 2 if kind == "shrunk" else expected
        np.testing.assert_allclose(weight, wanted, rtol=1e-9, atol=1e-12)
        residual = (y - module(x).detach()).square().sum(1).mean()
        assert fit.diagnostics.residual == pytest.approx(float(residual), rel=1e-9)
        assert fit.diagnostics.damping == pytest.approx(ridge)
        assert fit.diagnostics.condition == pytest.approx(np.linalg.cond(gram + ridge * np.eye(5)))


@pytest.mark.parametrize("power", [-200, 0, 200])
@pytest.mark.parametrize("ridge", [0.0, 0.5])
@pytest.mark.parametrize("case", ["regular", "graded", "singular", "dead", "negative", "zero"])
def test_a_solve_is_that_of_the_pseudoinverse(case: str, ridge: float, power: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    if case == "graded":
        x *= torch.logspace(-6, 6, 5, dtype=torch.float64)
    if case == "singular":
        x[:, 4] = 2 * x[:, 1]
    if case in ("dead", "negative"):
        x[:, 2] = 0
    x *= case != "zero"
    gram, target = x.T @ x, x.T @ torch.randn(40, 3, generator=generator, dtype=torch.float64)
    if case == "negative":
        gram[2, 2] = -1e-18  # what a rounding leaves of a channel that is dead
    scale = np.sqrt(np.diag(gram.numpy()).clip(1e-300)) if case == "graded" else np.ones(5)
    damped = (gram.numpy() + ridge * np.eye(5)) / scale / scale[:, None]
    inverse = np.linalg.pinv(damped, rcond=1e-12, hermitian=True) / scale / scale[:, None]
    found = solve_gram(gram * 2.0**power, target * 2.0**power, ridge * 2.0**power)
    np.testing.assert_allclose(found, inverse @ target.numpy(), rtol=1e-6, atol=1e-9)


def test_a_channel_within_the_rounding_of_its_mean_predicts_nothing() -> None:
    _, y, _ = pair()
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(30)
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x[:, 0] = 1e8 + 1.5e-8 * sign  # one rounding of 1e8
    x[:, 1] = 1e3 + 1e-6 * sign
    y = torch.stack([1e6 * (x[:, 1] - 1e3), y[:, 0], 1e8 * (x[:, 0] - 1e8)], dim=1)
    fit = fit_map(spec("affine"), PairMoments.from_rows(x, y))
    assert not fit.tensors["weight"][:, 0].any()
    assert float(fit.tensors["weight"][0, 1]) == pytest.approx(1e6, rel=1e-4)


def test_folded_needs_no_module_and_costs_nothing() -> None:
    folded = MapSpec(kind="folded", shrink=0.5)
    assert isinstance(build_map(folded, 5, ndim=3, axis=-1), nn.Identity)
    assert isinstance(build_map(spec("identity"), 5, ndim=4, axis=1), nn.Identity)
    assert (map_macs(folded, 5), map_parameters(folded, 5)) == (0, 0)
    x, y, moments = pair()
    fit = fit_map(folded, moments)
    assert not fit.tensors
    assert fit.diagnostics.residual == pytest.approx(float((y - x).square().sum(1).mean()))


@pytest.mark.parametrize(("ndim", "module"), [(3, nn.Conv1d), (4, nn.Conv2d), (5, nn.Conv3d)])
@pytest.mark.parametrize("kind", ["scale", "linear", "affine", "low_rank"])
def test_channels_second_take_convolutions_of_their_dimensions(
    ndim: int, module: type[nn.Module], kind: Kind
) -> None:
    x = torch.randn(2, 5, *range(2, ndim), generator=torch.Generator().manual_seed(0))
    built = build_map(spec(kind), 5, ndim=ndim, axis=1)
    if kind == "scale":
        assert torch.equal(built(x), x)
    else:
        assert isinstance(built[0] if kind == "low_rank" else built, module)  # type: ignore[index]
        biases = [name for name, _ in built.named_parameters() if name.endswith("bias")]
        assert biases == {"linear": [], "affine": ["bias"], "low_rank": ["1.bias"]}[kind]
    assert built(x).shape == x.shape
    for axis in (-1, ndim - 1):
        last = build_map(spec(kind), 5, ndim=ndim, axis=axis)
        assert last(x.movedim(1, -1)).shape == x.movedim(1, -1).shape


@pytest.mark.parametrize("bias", [True, False])
def test_a_correction_without_damping_is_least_squares(bias: bool) -> None:
    x, y, moments = pair()
    a = np.hstack([x.numpy(), np.ones((60, 1))]) if bias else x.numpy()
    expected = np.linalg.lstsq(a, y.numpy())[0]
    change, shift = correction(moments, 0.0, bias=bias)
    np.testing.assert_allclose(change.T, expected[:5], rtol=1e-9)
    np.testing.assert_allclose(shift, expected[5] if bias else np.zeros(5), rtol=1e-9)
    found = correction(moments, 0.0)
    assert bool(found[1].any())


def test_a_spec_and_its_diagnostics_are_read_back_from_json() -> None:
    found = Diagnostics(residual=1, r2=0.5, effective_rank=2, condition=math.inf, damping=0, rows=9)
    assert Diagnostics.model_validate_json(found.model_dump_json()) == found
    for wanted in (spec("low_rank"), spec("shrunk"), MapSpec(kind="affine", damping=math.inf)):
        assert MapSpec.model_validate_json(wanted.model_dump_json()) == wanted
    assert MapSpec(kind="affine").damping == 0
    with pytest.raises(ValidationError, match="frozen"):
        found.rows = 3
    with pytest.raises(ValidationError, match="frozen"):
        wanted.damping = 3
    with pytest.raises(ValidationError, match="Extra inputs"):
        MapSpec(kind="affine", ridge=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "affine", "damping": -1e-9},
        {"kind": "low_rank", "rank": 0},
        {"kind": "shrunk", "shrink": -0.01},
        {"kind": "folded", "shrink": 1.01},
        {"kind": "folded"},
        {"kind": "shrunk", "shrink": 0.5, "rank": 2},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        MapSpec(**settings)  # type: ignore[arg-type]


def test_the_least_and_the_most_of_each_setting_are_allowed() -> None:
    assert str(MapSpec(kind="folded", shrink=1)) == "folded(1)"
    assert str(MapSpec(kind="shrunk", shrink=0)) == "shrunk(0)"
    assert str(MapSpec(kind="low_rank", rank=1)) == "low_rank(1)"
    _, y, moments = pair()
    one, whole = (fit_map(MapSpec(kind="low_rank", rank=rank), moments) for rank in (1, 5))
    affine = fit_map(spec("affine"), moments)
    assert whole.diagnostics.residual == pytest.approx(affine.diagnostics.residual)
    assert affine.diagnostics.residual < one.diagnostics.residual
    assert one.diagnostics.residual < float((y - y.mean(0)).square().sum(1).mean())


def test_nothing_has_no_rank_and_explains_nothing() -> None:
    _, y, _ = pair()
    found = fit_map(spec("affine"), PairMoments.from_rows(torch.zeros_like(y), y)).diagnostics
    assert found.effective_rank == 1
    assert found.condition == math.inf
    assert found.r2 == pytest.approx(0, abs=1e-12)
    assert found.residual == pytest.approx(float((y - y.mean(0)).square().sum(1).mean()))
    damped = fit_map(spec("affine", 1.0), PairMoments.from_rows(y, y)).diagnostics
    assert damped.r2 < 1
    exact = fit_map(spec("identity"), PairMoments.from_rows(y, y)).diagnostics
    assert (exact.residual, exact.r2) == (pytest.approx(0, abs=1e-9), pytest.approx(1))


@pytest.mark.parametrize(("ndim", "axis"), [(2, -1), (3, 2), (3, 1), (4, 1), (4, 3), (5, 1)])
@pytest.mark.parametrize("kind", get_args(Kind))
def test_shapes_by_arithmetic_are_those_of_the_module(kind: Kind, ndim: int, axis: int) -> None:
    rank = 2 if kind == "low_rank" else None
    spec = MapSpec(kind=kind, rank=rank, shrink=0.5 if kind in ("shrunk", "folded") else None)
    built = build_map(spec, 6, ndim=ndim, axis=axis)
    shapes = {name: tuple(t.shape) for name, t in built.state_dict().items()}
    assert map_shapes(spec, 6, ndim=ndim, axis=axis) == shapes
    assert map_parameters(spec, 6) == sum(p.numel() for p in built.parameters())
