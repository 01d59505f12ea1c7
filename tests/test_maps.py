from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from benchmarks.map_oracles import differences
from rba_compress.maps import Kind, MapSpec, build_map, fit_map, map_macs, map_parameters
from rba_compress.moments import PairMoments

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
