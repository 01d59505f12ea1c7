"""Claim: every map fitted from moments equals an independent oracle on the rows behind them, to 1e-6.

Oracles: numpy's lstsq (minimum norm where singular), scikit-learn's Ridge, scipy's Procrustes, and
reduced-rank regression by SVD, in float64, on random, ill-conditioned (1e4 after scaling of the
channels) and singular inputs; moments carry the square of that number, so that 1e6 leaves 1e-5.
`python -m benchmarks.map_oracles` prints the largest relative difference of each map.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from scipy.linalg import orthogonal_procrustes
from sklearn.linear_model import Ridge

from rba_compress.core.map_spec import Kind, MapSpec
from rba_compress.linalg.maps import Fit, fit_map
from rba_compress.linalg.moments import PairMoments

Rows = Any  # float64 arrays; numpy types what its functions return in ever new ways

WIDTH, RANK, SHRINK, DAMPING = 12, 4, 0.6, 1e-2


def cases() -> dict[str, tuple[Rows, Rows]]:
    """Inputs x and targets y, (rows, 12) each."""
    rng = np.random.default_rng(0)

    def target(x: Rows) -> Rows:
        mixed = x @ rng.normal(size=(WIDTH, WIDTH)) * 0.3 + x
        return mixed + 0.1 * rng.normal(size=x.shape) * x.std() + rng.normal(size=WIDTH)

    plain = rng.normal(size=(300, WIDTH)) + rng.normal(size=WIDTH)
    rotation, _ = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))
    found = {
        "random": plain,
        "channels from 1e-6 to 1e6": plain * np.logspace(-6, 6, WIDTH),
        "condition 1e4": rng.normal(size=(300, WIDTH)) * np.logspace(0, -4, WIDTH) @ rotation,
        "rank 5 of 12": rng.normal(size=(300, 5)) @ rng.normal(size=(5, WIDTH)),
        "one constant row": np.repeat(rng.normal(size=(1, WIDTH)), 50, axis=0),
        "fewer rows than channels": rng.normal(size=(7, WIDTH)),
        "a dead channel": plain * (np.arange(WIDTH) != 3),
    }
    return {name: (x, target(x)) for name, x in found.items()}


def oracle(kind: Kind, x: Rows, y: Rows) -> tuple[Rows, Rows]:
    """The weight (d, d), y = x @ weight + bias, and the bias, straight from the rows."""
    zero = np.zeros(WIDTH)
    xc, yc = x - x.mean(0), y - y.mean(0)
    xc[:, np.ptp(x, axis=0) == 0] = 0  # no rounding where a channel is constant
    match kind:
        case "identity":
            return np.eye(WIDTH), zero
        case "scale":
            factors = [np.linalg.lstsq(x[:, [c]], y[:, c], rcond=None)[0][0] for c in range(WIDTH)]
            return np.diag(factors), zero
        case "linear":
            return np.linalg.lstsq(x, y, rcond=None)[0], zero
        case "affine":
            weight = np.linalg.lstsq(xc, yc, rcond=None)[0]
        case "low_rank":
            full = np.linalg.lstsq(xc, yc, rcond=None)[0]
            top = np.linalg.svd(xc @ full)[2][:RANK]
            weight = full @ top.T @ top
        case "orthogonal":
            weight = orthogonal_procrustes(xc, yc)[0]
        case "shrunk":
            alpha = DAMPING * float((xc**2).sum(0).mean())
            full = Ridge(alpha=alpha, solver="svd", fit_intercept=False).fit(xc, yc).coef_.T
            bias = y.mean(0) - x.mean(0) @ full
            return (1 - SHRINK) * np.eye(WIDTH) + SHRINK * full, SHRINK * bias
    return weight, y.mean(0) - x.mean(0) @ weight


def spec(kind: Kind) -> MapSpec:
    """The map as the oracle computes it; the ridge is checked on `shrunk`."""
    return MapSpec(
        kind=kind,
        rank=RANK if kind == "low_rank" else None,
        shrink=SHRINK if kind == "shrunk" else None,
        damping=DAMPING if kind == "shrunk" else 0.0,
    )


def dense_form(fit: Fit) -> tuple[Rows, Rows]:
    """The weight and bias of a fitted map, from the tensors that its module would hold."""
    tensors = {name: tensor.numpy() for name, tensor in fit.tensors.items()}
    match fit.spec.kind:
        case "identity":
            return np.eye(WIDTH), np.zeros(WIDTH)
        case "scale":
            return np.diag(tensors["weight"]), np.zeros(WIDTH)
        case "low_rank":
            return tensors["0.weight"].T @ tensors["1.weight"].T, tensors["1.bias"]
        case _:
            return tensors["weight"].T, tensors.get("bias", np.zeros(WIDTH))


def skipped(kind: Kind, case: str) -> bool:
    """Return whether a case has no oracle: Procrustes of singular cross moments is not unique."""
    singular = {"rank 5 of 12", "one constant row", "fewer rows than channels", "a dead channel"}
    return (kind == "orthogonal" and case in singular) or (
        kind == "low_rank" and case == "one constant row"
    )


def difference(kind: Kind, x: Rows, y: Rows) -> float:
    """Return the larger ||ours - oracle|| / ||oracle|| of the map and of its predictions."""
    pair = PairMoments.from_rows(torch.from_numpy(x), torch.from_numpy(y))
    weight, bias = dense_form(fit_map(spec(kind), pair))
    expected_weight, expected_bias = oracle(kind, x, y)
    ours, expected = np.vstack([weight, bias]), np.vstack([expected_weight, expected_bias])
    predicted, wanted = x @ weight + bias, x @ expected_weight + expected_bias
    return max(
        float(np.linalg.norm(ours - expected) / np.linalg.norm(expected)),
        float(np.linalg.norm(predicted - wanted) / np.linalg.norm(wanted)),
    )


def differences() -> dict[tuple[Kind, str], float]:
    """Return the difference of every map on every case that has an oracle."""
    kinds: tuple[Kind, ...] = (
        "identity", "scale", "linear", "affine", "low_rank", "orthogonal", "shrunk",
    )  # fmt: skip
    return {
        (kind, case): difference(kind, x, y)
        for kind in kinds
        for case, (x, y) in cases().items()
        if not skipped(kind, case)
    }


if __name__ == "__main__":
    found = differences()
    kinds = dict.fromkeys(kind for kind, _ in found)
    worst = {kind: max(v for (k, _), v in found.items() if k == kind) for kind in kinds}
    print(json.dumps({"benchmark": "map_oracles", "largest_relative_difference": worst}))
