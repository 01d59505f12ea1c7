"""Hostile numbers: every map of every stream is finite, is what it says, and as good as an oracle's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rba_compress import Budget, Config, compress
from rba_compress.core.map_spec import Kind, MapSpec
from rba_compress.linalg.maps import build_map, fit_map
from rba_compress.linalg.moments import Moments, PairMoments
from tests.networks import Chain, loader, seeded

Rows = tuple[Tensor, Tensor]
GENERATOR = torch.Generator()


def normal(n: int, d: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mapped(x: Tensor, noise: float = 0.1) -> Rows:
    """Return x and an affine image of x with noise."""
    d = x.shape[1]
    return x, x @ normal(d, d, 1) + normal(1, d, 2) + noise * normal(len(x), d, 3)


def scaled(scale: float) -> Rows:
    x, y = mapped(normal(200))
    return scale * x, scale * y


def with_column(x: Tensor, column: int, value: Tensor | float) -> Tensor:
    x = x.clone()
    x[:, column] = value
    return x


STREAMS: dict[str, Callable[[], Rows]] = {
    "ordinary": lambda: mapped(normal(200)),
    "of rank two": lambda: mapped(normal(200, 2) @ normal(2, 6, 4)),
    "fewer samples than channels": lambda: mapped(normal(4)),
    "one sample": lambda: mapped(normal(1)),
    "one sample many times": lambda: mapped(normal(1).repeat(50, 1), noise=0),
    "all zero": lambda: (torch.zeros(50, 6, dtype=torch.float64), torch.zeros(50, 6, dtype=torch.float64)),
    "zero to something": lambda: (torch.zeros(50, 6, dtype=torch.float64), normal(50)),
    "something to zero": lambda: (normal(50), torch.zeros(50, 6, dtype=torch.float64)),
    "something to a constant": lambda: (normal(50), torch.ones(50, 6, dtype=torch.float64)),
    "a dead channel": lambda: mapped(with_column(normal(200), 2, 0.0)),
    "a constant channel": lambda: mapped(with_column(normal(200), 2, 7.0)),
    "a channel twice": lambda: mapped(with_column(normal(200), 2, normal(200)[:, 3])),
    "a channel that is nearly another": lambda: mapped(
        with_column(normal(2000), 2, normal(2000)[:, 3] + 1e-5 * normal(2000, seed=9)[:, 0])),
    "of scale 1e-30": lambda: scaled(1e-30),
    "of scale 1e-20": lambda: scaled(1e-20),
    "of scale 1e-10": lambda: scaled(1e-10),
    "of scale 1e10": lambda: scaled(1e10),
    "of scale 1e20": lambda: scaled(1e20),
    "of scale 1e30": lambda: scaled(1e30),
    "from 1e-25 to 1e25": lambda: (scaled(1e-25)[0], scaled(1e25)[1]),
    "denormal": lambda: scaled(1e-40),
    "channels of many scales": lambda: mapped(normal(200) * torch.logspace(-4, 4, 6, dtype=torch.float64)),
    "far from zero": lambda: mapped(normal(400) + 1e4),
    "one sample far away": lambda: mapped(torch.cat([normal(200), 1e6 * normal(1, seed=5)])),
    "itself": lambda: (normal(200), normal(200)),
    "its mirror image": lambda: (normal(200), -normal(200)),
    "of one channel": lambda: mapped(normal(200, 1)),
    "without relation": lambda: (normal(200), normal(200, seed=6)),
    "of a few values": lambda: mapped(normal(200).sign()),
}  # fmt: skip


def spec(kind: Kind, width: int) -> MapSpec:
    damping = 1e-9 if kind in ("affine", "low_rank", "shrunk") else 0.0
    return MapSpec(
        kind=kind,
        damping=damping,
        rank=max(1, width // 2) if kind == "low_rank" else None,
        shrink=0.6 if kind in ("shrunk", "folded") else None,
    )


def applied(kind: Kind, x: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    module = build_map(spec(kind, x.shape[1]), x.shape[1], ndim=2, axis=-1).double()
    module.load_state_dict(tensors)
    with torch.no_grad():
        found: Tensor = module(x)
    return found


def error(y: Tensor, found: Tensor) -> float:
    return float((y - found).square().sum(1).mean())


def oracle(kind: Kind, x: NDArray[Any], y: NDArray[Any]) -> NDArray[Any]:
    """Return the output of the best map of a kind, by numpy; for the narrow kinds an upper bound."""
    if kind == "linear":
        return np.asarray(x @ np.linalg.lstsq(x, y, rcond=1e-7)[0])
    if kind == "affine":
        mean_x, mean_y = x.mean(0), y.mean(0)
        return np.asarray(
            (x - mean_x) @ np.linalg.lstsq(x - mean_x, y - mean_y, rcond=1e-7)[0] + mean_y
        )
    if kind == "scale":
        power = (x * x).sum(0)
        return np.asarray(x * np.where(power > 0, (x * y).sum(0) / np.where(power > 0, power, 1), 0))
    if kind in ("low_rank", "orthogonal"):
        return np.broadcast_to(y.mean(0), y.shape) + (x - x.mean(0) if kind == "orthogonal" else 0)
    return x


@pytest.mark.parametrize("kind", get_args(Kind))
@pytest.mark.parametrize("stream", STREAMS)
def test_maps_of_hostile_streams(stream: str, kind: Kind) -> None:
    x, y = (rows.float() for rows in STREAMS[stream]())
    width = x.shape[1]
    moments = Moments(2, width)
    for batch in range(0, len(x), 37):
        moments.update([x[batch : batch + 37], y[batch : batch + 37]])
    x, y = x.double(), y.double()
    for pair in (moments.pair(0, 1), PairMoments.from_rows(x.float(), y.float())):
        fit = fit_map(spec(kind, width), pair)
        assert all(bool(t.isfinite().all()) for t in fit.tensors.values())
        found = applied(kind, x, fit.tensors)
        assert bool(found.isfinite().all())
        # What is said of the residual is so. Each is of numbers rounded to float32 and squared.
        spread = float((y.square().sum(1) + x.square().sum(1)).mean())
        assert fit.diagnostics.residual == pytest.approx(error(y, found), rel=1e-3, abs=1e-5 * spread)
        best = error(y, torch.from_numpy(oracle(kind, x.numpy(), y.numpy()).copy()))
        if kind != "shrunk":
            assert error(y, found) <= best * (1 + 1e-3) + 1e-6 * spread
        assert math.isfinite(fit.diagnostics.r2)
        assert 0 <= fit.diagnostics.effective_rank <= width + 1e-6


@pytest.mark.parametrize("power", [-100, -60, -20, 20, 60, 100])
def test_a_network_of_another_scale_gets_the_same_plan(power: int) -> None:
    """Powers of two round nothing: the network computes the same through a stream of another scale."""

    def network(scale: float) -> nn.Module:
        model: Any = seeded(Chain)
        with torch.no_grad():
            for tensor in (
                *model.stem.parameters(),
                *(p for b in model.blocks for p in b.down.parameters()),
            ):
                tensor.mul_(scale)
            for tensor in (model.head.weight, *(b.up.weight for b in model.blocks)):
                tensor.div_(scale)
        return model

    config = Config(maps=("shrunk", "folded"), refit_dampings=(1.0,))
    plain, other = (
        compress(network(scale), loader(80), budget=Budget(macs=0.8), config=config)
        for scale in (1.0, 2.0**power)
    )
    assert [str(r) for r in other.plan.replacements] == [str(r) for r in plain.plan.replacements]
    assert other.report.fidelity.divergence == pytest.approx(plain.report.fidelity.divergence, rel=1e-4)
    for mine, theirs in zip(other.plan.in_order, plain.plan.in_order, strict=True):
        assert mine.diagnostics is not None
        assert theirs.diagnostics is not None
        assert mine.diagnostics.r2 == pytest.approx(theirs.diagnostics.r2, abs=1e-6)
