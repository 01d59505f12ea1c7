"""Closed-form maps y ~ W x + b from second moments alone, which replace spans of blocks.

With n rows, means m_x, m_y and centred sums G = C_xx (d, d), R = C_xy (d, d) of `PairMoments`, and
the uncentred sums G0, R0:

    identity    W = I
    scale       w_c = R0_cc / G0_cc, per channel
    linear      W = (G0 + l I)^-1 R0                   the paper: least squares without bias
    affine      W = (G + l I)^-1 R,  b = m_y - W m_x   ridge regression with intercept
    low_rank    W = W_affine V V^T, V the top eigenvectors of W_affine^T G W_affine
                                                       reduced-rank regression, Izenman 1975
    orthogonal  W = U V^T of R = U S V^T               Procrustes, Schoenemann 1966
    shrunk      (1 - a) I + a W_affine, bias a b       a = 0 skips, a = 1 is the affine map
    folded      no module: the last linear layer before the span moves by a times its correction
                towards the span's target (`correction`); a = 0 skips

W acts on rows from the right (y = x W); modules store its transpose, as torch does. l is `damping`
times the mean diagonal of the Gram matrix. The solve is a Cholesky factorisation in float64 of the
Gram matrix scaled to unit diagonal, and where that is numerically singular the minimum-norm solution
by `eigh`. The moments carry the square of x's condition number: up to 1e5 a map of float64 rows is good
to 1e-6, at 1e6 to 1e-5, and directions whose singular value is below about 1e-7 of the largest count as
absent. Products of float32 rows are rounded at 1e-7: beyond a condition of 1e3 what the weakest
direction would explain is lost (a residual 2e-4 higher), unless damping keeps it out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rba_compress.core.map_spec import Diagnostics, Kind, MapSpec
from rba_compress.linalg.moments import PairMoments


@dataclass(frozen=True)
class Fit:
    """A fitted map: the tensors of its module's state dict (float64), and its diagnostics."""

    spec: MapSpec
    tensors: dict[str, Tensor]
    diagnostics: Diagnostics


@dataclass(frozen=True)
class _Solution:
    tensors: dict[str, Tensor]
    weight: Tensor  # (d, d), y = x @ weight
    bias: Tensor  # (d,)
    gram: Tensor
    ridge: float = 0.0


def solve_gram(gram: Tensor, target: Tensor, ridge: float) -> Tensor:
    """Return (gram + ridge I)^-1 target, or the minimum-norm solution where that matrix is singular.

    Args:
        gram: (d, d) symmetric, positive semi-definite, float64.
        target: (d, k).
        ridge: absolute, >= 0.

    Equals `numpy.linalg.lstsq` on the rows behind the moments for ridge 0.
    """
    d = len(gram)
    damped = gram + ridge * torch.eye(d, dtype=gram.dtype, device=gram.device)
    scale = damped.diagonal().clamp_min(0).sqrt()
    if bool((scale > 0).all()):
        factor, info = torch.linalg.cholesky_ex(damped / scale[:, None] / scale)
        # A squared pivot is the share of a channel's power that the channels before do not explain.
        smallest = factor.diagonal().square().min()
        if info.item() == 0 and smallest > 10 * d * torch.finfo(gram.dtype).eps:
            solved: Tensor = torch.cholesky_solve(target / scale[:, None], factor)
            return solved / scale[:, None]
    values, vectors = torch.linalg.eigh(damped)
    keep = values > values[-1].clamp_min(0) * d * torch.finfo(gram.dtype).eps
    inverse = torch.where(keep, 1 / torch.where(keep, values, 1), 0)
    result: Tensor = vectors @ (inverse[:, None] * (vectors.T @ target))
    return result


def _ridge(gram: Tensor, damping: float) -> float:
    return damping * float(gram.diagonal().mean())


def _identity(pair: PairMoments, spec: MapSpec) -> _Solution:
    eye = torch.eye(len(pair.xx), dtype=pair.xx.dtype, device=pair.xx.device)
    return _Solution({}, eye, torch.zeros_like(pair.mean_x), pair.xx)


def _scale(pair: PairMoments, spec: MapSpec) -> _Solution:
    gram, cross = pair.raw_xx.diagonal(), pair.raw_xy.diagonal()
    ridge = _ridge(pair.raw_xx, spec.damping)
    power = gram + ridge
    weight = torch.where(power > 0, cross / torch.where(power > 0, power, 1), 0)
    return _Solution({"weight": weight}, weight.diag(), torch.zeros_like(weight), gram.diag(), ridge)


def _linear(pair: PairMoments, spec: MapSpec) -> _Solution:
    ridge = _ridge(pair.raw_xx, spec.damping)
    weight = solve_gram(pair.raw_xx, pair.raw_xy, ridge)
    return _Solution({"weight": weight.T}, weight, torch.zeros_like(pair.mean_y), pair.raw_xx, ridge)


def _with_bias(pair: PairMoments, weight: Tensor, ridge: float = 0.0) -> _Solution:
    bias = pair.mean_y - pair.mean_x @ weight
    return _Solution({"weight": weight.T, "bias": bias}, weight, bias, pair.xx, ridge)


def _ridge_regression(pair: PairMoments, damping: float) -> tuple[Tensor, float]:
    """Return (C_xx + l I)^-1 C_xy, and l.

    A channel whose spread does not exceed the rounding error of its mean is constant and predicts
    nothing. All channels of a class token before the first block are constant.
    """
    noise = 64 * torch.finfo(pair.xx.dtype).eps * pair.mean_x
    varies = pair.xx.diagonal() > pair.n * noise.square()
    gram = pair.xx * torch.outer(varies, varies)
    ridge = _ridge(gram, damping)
    return solve_gram(gram, pair.xy * varies[:, None], ridge), ridge


def _affine(pair: PairMoments, spec: MapSpec) -> _Solution:
    weight, ridge = _ridge_regression(pair, spec.damping)
    return _with_bias(pair, weight, ridge)


def _low_rank(pair: PairMoments, spec: MapSpec) -> _Solution:
    assert spec.rank is not None
    full, ridge = _ridge_regression(pair, spec.damping)
    _, vectors = torch.linalg.eigh(full.T @ pair.xx @ full)
    top = vectors[:, -spec.rank :]  # (d, r)
    weight = full @ top @ top.T
    bias = pair.mean_y - pair.mean_x @ weight
    tensors = {"0.weight": (full @ top).T, "1.weight": top, "1.bias": bias}
    return _Solution(tensors, weight, bias, pair.xx, ridge)


def _orthogonal(pair: PairMoments, spec: MapSpec) -> _Solution:
    u, _, vt = torch.linalg.svd(pair.xy, full_matrices=False)
    return _with_bias(pair, u @ vt)


def _shrunk(pair: PairMoments, spec: MapSpec) -> _Solution:
    assert spec.shrink is not None
    a, full = spec.shrink, _affine(pair, spec)
    weight = a * full.weight
    weight.diagonal().add_(1 - a)
    bias = a * full.bias
    return _Solution({"weight": weight.T, "bias": bias}, weight, bias, full.gram, full.ridge)


_FITS: dict[Kind, Callable[[PairMoments, MapSpec], _Solution]] = {
    "identity": _identity,
    "scale": _scale,
    "linear": _linear,
    "affine": _affine,
    "low_rank": _low_rank,
    "orthogonal": _orthogonal,
    "shrunk": _shrunk,
    "folded": _identity,
}


def fit_map(spec: MapSpec, pair: PairMoments) -> Fit:
    """Fit the map of `spec` to the moments of (x, y).

    Raises:
        ValueError: the rank asked for exceeds the width.
    """
    if spec.rank is not None and spec.rank > len(pair.xx):
        raise ValueError(f"a map of rank {spec.rank} for {len(pair.xx)} channels: use `affine`")
    solution = _FITS[spec.kind](pair, spec)
    return Fit(spec, solution.tensors, _diagnose(solution, pair))


def correction(pair: PairMoments, damping: float, *, bias: bool = True) -> tuple[Tensor, Tensor]:
    """Return the change of a linear layer's weight and bias that closes a gap in its output.

    With x the layer's inputs and y the gap (the target minus the layer's present output), the change is
    the ridge solution around the present weights: D = (G + l m I)^-1 R, m the mean of G's diagonal. The
    `damping` l is about 1, far above rounding errors, so that the change is large only where the data
    support it.

    Returns:
        (d_y, d_x) in torch's layout, and (d_y,), zero where `bias` is false.
    """
    gram, cross = (pair.xx, pair.xy) if bias else (pair.raw_xx, pair.raw_xy)
    change = solve_gram(gram, cross, _ridge(gram, damping))
    shift = pair.mean_y - pair.mean_x @ change
    return change.T, shift if bias else torch.zeros_like(shift)


def effective_rank(spectrum: Tensor) -> float:
    """Return exp of the entropy of eigenvalues, normalised; Roy and Vetterli 2007."""
    share = spectrum / spectrum.sum().clamp_min(torch.finfo(spectrum.dtype).tiny)
    return float(torch.special.entr(share).sum().exp())


def condition(spectrum: Tensor) -> float:
    """Return the largest over the smallest eigenvalue of a Gram matrix, inf beyond 1e12."""
    high, low = float(spectrum.max()), float(spectrum.min())
    return high / low if low > 1e-12 * high else float("inf")


def _diagnose(solution: _Solution, pair: PairMoments) -> Diagnostics:
    weight = solution.weight
    total = pair.yy.sum()
    centred = total - 2 * (weight * pair.xy).sum() + (weight * (pair.xx @ weight)).sum()
    offset = pair.mean_y - pair.mean_x @ weight - solution.bias
    residual = centred.clamp_min(0) / pair.n + offset.square().sum()
    known = pair.spectrum
    spectrum = (torch.linalg.eigvalsh(pair.xx) if known is None else known).clamp_min(0)
    own = solution.gram is pair.xx
    gram = (spectrum if own else torch.linalg.eigvalsh(solution.gram).clamp_min(0)) + solution.ridge
    return Diagnostics(
        residual=float(residual),
        r2=float(1 - residual * pair.n / total) if total > 0 else 0.0,
        effective_rank=effective_rank(spectrum),
        condition=condition(gram),
        damping=solution.ridge,
        rows=pair.n,
    )


class ChannelScale(nn.Module):
    """Module that multiplies each channel of x by a factor."""

    def __init__(self, width: int, spread: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width, *[1] * spread))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {
    3: nn.Conv1d,
    4: nn.Conv2d,
    5: nn.Conv3d,
}


def build_map(spec: MapSpec, width: int, *, ndim: int, axis: int) -> nn.Module:
    """Build the module of a map, with unset weights, for streams of `ndim` dimensions.

    It is `nn.Linear` for channels on the last axis, a 1x1 convolution for channels on axis 1.
    """
    last = axis in (-1, ndim - 1)

    def linear(inputs: int, outputs: int, bias: bool) -> nn.Module:
        if last:
            return nn.Linear(inputs, outputs, bias=bias)
        return _CONVOLUTIONS[ndim](inputs, outputs, 1, bias=bias)

    match spec.kind:
        case "identity" | "folded":
            return nn.Identity()
        case "scale":
            return ChannelScale(width, 0 if last else ndim - 2)
        case "low_rank":
            assert spec.rank is not None
            return nn.Sequential(linear(width, spec.rank, False), linear(spec.rank, width, True))
        case _:
            return linear(width, width, spec.kind != "linear")


def map_shapes(
    spec: MapSpec, width: int, *, ndim: int = 2, axis: int = -1
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a map's tensors by name: those of `build_map`, without building a module."""
    last = axis in (-1, ndim - 1)
    kernel = () if last else (1,) * (ndim - 2)
    match spec.kind:
        case "identity" | "folded":
            return {}
        case "scale":
            return {"weight": (width, *kernel)}
        case "low_rank":
            assert spec.rank is not None
            down, up = (spec.rank, width, *kernel), (width, spec.rank, *kernel)
            return {"0.weight": down, "1.weight": up, "1.bias": (width,)}
        case _:
            bias = {} if spec.kind == "linear" else {"bias": (width,)}
            return {"weight": (width, width, *kernel), **bias}


def map_macs(spec: MapSpec, width: int) -> int:
    """Return the multiply-accumulates of the map per position."""
    match spec.kind:
        case "identity" | "folded" | "scale":  # torch counts matrix products only
            return 0
        case "low_rank":
            assert spec.rank is not None
            return 2 * width * spec.rank
        case _:
            return width * width


def map_parameters(spec: MapSpec, width: int) -> int:
    """Return the number of parameters of the map."""
    return sum(math.prod(shape) for shape in map_shapes(spec, width).values())
