"""Streaming joint second moments of the boundaries of a chain.

For boundaries `h_0 .. h_L`, each (rows, d), every closed-form fit and every moment-based similarity
needs only the row count n, the means m_i and the comoments

    C_ij = sum over rows of (h_i - m_i)^T (h_j - m_j)        # (d, d), i <= j

Batches are folded in as they are seen and two states merge exactly (Chan, Golub, LeVeque 1979):

    n = n_a + n_b,   e_i = m_b,i - m_a,i,   m_i = m_a,i + (n_b / n) e_i
    C_ij = C_a,ij + C_b,ij + (n_a n_b / n) e_i^T e_j

so the memory does not depend on the number of rows, and the order of batches does not matter.
Products are taken in float32 (float64 for float64 streams) on the batch's centred rows, whatever the
model's dtype; everything is accumulated in float64. Where squares would leave the range of the dtype,
the rows of a boundary are first scaled to about 1 by a power of two, which rounds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_FLOAT64 = torch.float64

_HELD = 4
"""Number of rows per channel that are buffered and folded in together."""

Total = Callable[[Tensor], Tensor]
"""Function that returns the sum over several processes of a tensor that each of them has."""


def pooled(total: Total, n: float, mean: Tensor) -> tuple[float, Tensor, Tensor]:
    """Return count and means (..., d) of all processes' rows, and this process's means minus those."""
    rows = float(total(mean.new_tensor(n)))
    whole = total(n * mean) / max(rows, 1.0)
    return rows, whole, mean - whole


@dataclass(frozen=True)
class Spread:
    """Count, mean (C,) and sum of squares around the mean (C,) of rows, float64; spreads add up."""

    n: float
    mean: Tensor
    squares: Tensor

    @property
    def variance(self) -> Tensor:
        return self.squares / self.n

    @classmethod
    def of(cls, rows: Tensor) -> Spread:
        """Return the spread of rows (n, C)."""
        mean = rows.mean(0)
        return cls(float(len(rows)), mean, (rows - mean).square().sum(0))

    def flat(self) -> Spread:
        """Return the spread of all numbers as rows of one channel."""
        mean = self.mean.mean(0, keepdim=True)
        squares = self.squares.sum() + self.n * (self.mean - mean).square().sum()
        return Spread(self.n * len(self.mean), mean, squares[None])

    def __add__(self, other: Spread) -> Spread:
        if len(self.mean) != len(other.mean):  # for example sequences of another length
            return self.flat() + other.flat()
        n, gap = self.n + other.n, other.mean - self.mean
        share = other.n / n
        squares = self.squares + other.squares + gap.square() * self.n * share
        return Spread(n, self.mean + gap * share, squares)

    def merged(self, total: Total | None, weight: float) -> Spread:
        """Return the spread of all processes' rows, this one's counted `weight` times."""
        if total is None:
            return self
        n, mean, gap = pooled(total, self.n * weight, self.mean)
        return Spread(n, mean, total(weight * (self.squares + self.n * gap.square())))


@dataclass(frozen=True)
class PairMoments:
    """Weighted first and second moments of paired rows x (rows, d_x) and y (rows, d_y), float64.

    `xx` (d_x, d_x), `xy` (d_x, d_y) and `yy` (d_y,), the diagonal that fits need, are centred sums, not
    divided by n. Moments of disjoint rows add up.
    """

    n: float
    mean_x: Tensor  # (d_x,)
    mean_y: Tensor  # (d_y,)
    xx: Tensor
    xy: Tensor
    yy: Tensor
    spectrum: Tensor | None = None
    """Eigenvalues of xx (d_x,), ascending, where they are known."""

    @classmethod
    def from_rows(cls, x: Tensor, y: Tensor) -> PairMoments:
        """Return the moments of rows x (rows, d_x) and y (rows, d_y), one row or more."""
        x, y = (rows.to(torch.promote_types(rows.dtype, torch.float32)) for rows in (x, y))
        mean_x, mean_y = x.mean(0, dtype=_FLOAT64), y.mean(0, dtype=_FLOAT64)
        # The mean is rounded; the share of the rounding error in the products is subtracted below.
        shift_x, shift_y = mean_x.to(x.dtype), mean_y.to(y.dtype)
        rest_x, rest_y = mean_x - shift_x, mean_y - shift_y
        x, y, n = x - shift_x, y - shift_y, float(len(x))
        by_x, by_y = (_power(rows.abs().amax()) if rows.numel() else 1.0 for rows in (x, y))
        if (by_x, by_y) != (1.0, 1.0):
            x, y = x * by_x, y * by_y
        with full_precision(x.device):
            xx, xy = (x.T @ x).to(_FLOAT64) / by_x**2, (x.T @ y).to(_FLOAT64) / (by_x * by_y)
        return cls(
            n,
            mean_x,
            mean_y,
            xx - n * torch.outer(rest_x, rest_x),
            xy - n * torch.outer(rest_x, rest_y),
            y.square().sum(0, dtype=_FLOAT64) / by_y**2 - n * rest_y.square(),
        )

    def __add__(self, other: PairMoments) -> PairMoments:
        """Return the moments of both sets of rows."""
        n = self.n + other.n
        if self.n == 0 or other.n == 0:
            return other if self.n == 0 else self
        gap_x, gap_y = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        between = self.n * other.n / n
        return PairMoments(
            n,
            self.mean_x + gap_x * (other.n / n),
            self.mean_y + gap_y * (other.n / n),
            self.xx + other.xx + between * torch.outer(gap_x, gap_x),
            self.xy + other.xy + between * torch.outer(gap_x, gap_y),
            self.yy + other.yy + between * gap_y.square(),
        )

    def merged(self, total: Total) -> PairMoments:
        """Return the moments of all processes' rows."""
        n, means, gap = pooled(total, self.n, torch.cat([self.mean_x, self.mean_y]))
        (mean_x, mean_y), (gap_x, gap_y) = (
            both.split([len(self.mean_x), len(self.mean_y)]) for both in (means, gap)
        )
        return PairMoments(
            n,
            mean_x,
            mean_y,
            total(self.xx + self.n * torch.outer(gap_x, gap_x)),
            total(self.xy + self.n * torch.outer(gap_x, gap_y)),
            total(self.yy + self.n * gap_y.square()),
        )

    def with_spectrum(self) -> PairMoments:
        """Return these moments with the eigenvalues of xx, for fits of several maps or targets."""
        return replace(self, spectrum=torch.linalg.eigvalsh(self.xx))

    def weighted(self, weight: float) -> PairMoments:
        """Return the moments with every row counted `weight` times."""
        return replace(
            self,
            n=self.n * weight,
            xx=self.xx * weight,
            xy=self.xy * weight,
            yy=self.yy * weight,
            spectrum=None,
        )

    def targets(self, columns: slice) -> PairMoments:
        """Return the moments of x and some of y's columns."""
        return replace(self, mean_y=self.mean_y[columns], xy=self.xy[:, columns], yy=self.yy[columns])

    @property
    def raw_xx(self) -> Tensor:
        """Sum of x^T x, not centred: (d_x, d_x)."""
        return self.xx + self.n * torch.outer(self.mean_x, self.mean_x)

    @property
    def raw_xy(self) -> Tensor:
        """Sum of x^T y, not centred: (d_x, d_y)."""
        return self.xy + self.n * torch.outer(self.mean_x, self.mean_y)


class PairSums:
    """Moments of paired rows that are added batch by batch, in one pass over the matrices for each.

    Products are taken around the means of each batch, rounded to the dtype of its rows. The means are
    kept, and what lies between them is added at the end.
    """

    def __init__(self) -> None:
        self._weights: list[float] = []
        self._means: list[tuple[Tensor, Tensor]] = []
        """Means of x and of y in each batch, float64, and what is lost of them by rounding."""
        self._lost: list[tuple[Tensor, Tensor]] = []
        self._sums: list[Tensor] = []
        """Sums of the products xx, xy and yy, float64."""

    def add(self, x: Tensor, y: Tensor, weight: float = 1.0) -> None:
        """Add rows x (rows, d_x) and y (rows, d_y), each counted `weight` times."""
        x, y = (rows.to(torch.promote_types(rows.dtype, torch.float32)) for rows in (x, y))
        if not self._sums:
            d_x, d_y = x.shape[1], y.shape[1]
            sizes = ((d_x, d_x), (d_x, d_y), (d_y,))
            self._sums = [torch.zeros(size, dtype=_FLOAT64, device=x.device) for size in sizes]
        if not len(x):
            return
        means = [rows.mean(0, dtype=_FLOAT64) for rows in (x, y)]
        shift_x, shift_y = (mean.to(x.dtype) for mean in means)
        self._weights.append(weight * len(x))
        self._means.append((means[0], means[1]))
        self._lost.append((means[0] - shift_x, means[1] - shift_y))
        x, y = x - shift_x, y - shift_y
        by_x, by_y = (_power(rows.abs().amax()) if rows.numel() else 1.0 for rows in (x, y))
        if (by_x, by_y) != (1.0, 1.0):
            x, y = x * by_x, y * by_y
        xx, xy, yy = self._sums
        with full_precision(x.device):
            xx.add_(x.T @ x, alpha=weight / by_x**2)
            xy.add_(x.T @ y, alpha=weight / (by_x * by_y))
        yy.add_(y.square().sum(0, dtype=_FLOAT64), alpha=weight / by_y**2)

    def moments(self) -> PairMoments | None:
        """Return the moments of all rows so far; None where nothing was added."""
        if not self._sums:
            return None
        xx, xy, yy = self._sums
        if not self._weights:
            d_x, d_y = xy.shape
            return PairMoments(0.0, xy.new_zeros(d_x), xy.new_zeros(d_y), xx, xy, yy)
        n, weights = sum(self._weights), xx.new_tensor(self._weights)[:, None]
        means = [torch.stack(part) for part in zip(*self._means, strict=True)]
        mean_x, mean_y = ((weights * part).sum(0) / n for part in means)
        gap_x, gap_y = means[0] - mean_x, means[1] - mean_y
        lost_x, lost_y = (torch.stack(part) for part in zip(*self._lost, strict=True))
        return PairMoments(
            n,
            mean_x,
            mean_y,
            xx + (weights * gap_x).T @ gap_x - (weights * lost_x).T @ lost_x,
            xy + (weights * gap_x).T @ gap_y - (weights * lost_x).T @ lost_y,
            yy + (weights * (gap_y.square() - lost_y.square())).sum(0),
        )


def _power(peak: Tensor) -> float:
    """Return the power of two that scales rows with this largest absolute value to about 1; 1 where the
    squares of the rows lie well within the range of their dtype.
    """
    limits, value = torch.finfo(peak.dtype), float(peak)
    if limits.tiny**0.25 < value < limits.max**0.25 or not 0 < value < math.inf:
        return 1.0
    # A denormal number may be further from 1 than any power that the dtype holds.
    exponent = max(math.frexp(limits.tiny)[1], min(-math.frexp(limits.tiny)[1], math.frexp(value)[1]))
    return 2.0**-exponent


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute float32 products in float32: no tf32, no bfloat16 passes, no autocast of the caller's.

    Only the settings of matrix products are changed: `torch.backends.mkldnn.fp32_precision` applies to
    all backends and operations, and while it is set torch cannot tell whether cuDNN may use TF32, which
    makes every trace fail.
    """
    backends: list[Any] = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    known = [b for b in backends if hasattr(b, "fp32_precision")]
    with torch.autocast(device.type, enabled=False):
        if known:  # torch 2.9 and newer; mixing with the older setting raises
            before = [b.fp32_precision for b in known]
            try:
                for backend in known:
                    backend.fp32_precision = "ieee"
                yield
            finally:
                for backend, value in zip(known, before, strict=True):
                    backend.fp32_precision = value
        else:
            precision = torch.get_float32_matmul_precision()
            try:
                torch.set_float32_matmul_precision("highest")
                yield
            finally:
                torch.set_float32_matmul_precision(precision)


def moment_bytes(boundaries: int, width: int, window: int | None = None) -> int:
    """Return the bytes that `Moments` take: 8 d^2 for each pair, B (B + 1) / 2 pairs without a window;
    the buffered rows, twice while they are folded in; and a product.
    """
    window = boundaries - 1 if window is None else min(window, boundaries - 1)
    pairs = sum(min(j, window) + 1 for j in range(boundaries))
    held = 4 * _HELD * width * boundaries * width
    return 8 * pairs * width**2 + 2 * held + 4 * (window + 1) * width**2


class Moments:
    """Joint second moments of `boundaries` streams of `width` channels.

    Rows are buffered until there are four per channel, then folded in together: adding to the float64
    sums takes as long as the products of that many rows.

    Args:
        boundaries: number of streams B (blocks + 1).
        width: channels d.
        window: the largest j - i for which C_ij is kept; None keeps all pairs.
        device: of the products and sums; see `moment_bytes`.
    """

    def __init__(
        self,
        boundaries: int,
        width: int,
        *,
        window: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.window = boundaries - 1 if window is None else min(window, boundaries - 1)
        self._n = 0.0
        self._mean = torch.zeros(boundaries, width, dtype=_FLOAT64, device=device)
        # _comoment[j][k] is C_ij of i = first(j) + k
        self._comoment = [
            torch.zeros(j - self._first(j) + 1, width, width, dtype=_FLOAT64, device=device)
            for j in range(boundaries)
        ]
        self._held: list[tuple[Tensor, Tensor | None]] = []  # (B, rows, d) and (rows,)
        self._spectra: dict[int, Tensor] = {}  # eigenvalues of C_ii

    @property
    def n(self) -> float:
        """Total weight of the rows."""
        self._fold()
        return self._n

    @property
    def mean(self) -> Tensor:
        """Means of the streams, (B, d)."""
        self._fold()
        return self._mean

    @property
    def comoment(self) -> list[Tensor]:
        """List over j of C_ij for every i that is kept, (i, d, d), C_jj last."""
        self._fold()
        return self._comoment

    @property
    def boundaries(self) -> int:
        return len(self._mean)

    @property
    def width(self) -> int:
        return self._mean.shape[1]

    def _first(self, j: int) -> int:
        return max(0, j - self.window)

    @torch.no_grad()
    def update(self, streams: Sequence[Tensor], weights: Tensor | None = None) -> None:
        """Fold in one batch: `boundaries` tensors (rows, d) of the same rows, which may be none.

        Args:
            weights: weight of each row, (rows,), on the CPU; 1 by default.
        """
        if len(streams[0]):
            with full_precision(streams[0].device):
                self._held.append((torch.stack([*streams]), weights))
            if sum(rows.shape[1] for rows, _ in self._held) >= _HELD * self.width:
                self._fold()

    @torch.no_grad()
    def _fold(self) -> None:
        if not self._held:
            return
        dtype = torch.promote_types(self._held[0][0].dtype, torch.float32)
        rows = torch.cat([held.to(dtype) for held, _ in self._held], dim=1)  # (B, rows, d)
        weights = None
        if any(w is not None for _, w in self._held):
            weights = self._held_weights()
        n = float(rows.shape[1] if weights is None else weights.sum(dtype=_FLOAT64))
        self._held.clear()
        if weights is not None:
            weights = weights.to(rows)[:, None]
        mean = (rows if weights is None else rows * weights).sum(1, dtype=_FLOAT64) / n
        shift = mean.to(dtype)
        rows -= shift[:, None]
        if weights is not None:
            rows *= weights.sqrt()
        by = [_power(peak) for peak in rows.abs().amax((1, 2)).cpu()]
        scaled = any(power != 1 for power in by)
        if scaled:
            rows *= rows.new_tensor(by)[:, None, None]
        # The mean is rounded to `dtype`; the share of the rounding error in the products is subtracted.
        rest, gap, total = mean - shift.to(_FLOAT64), mean - self._mean, self._n + n
        left = torch.stack([self._n * n / total * gap, -n * rest], dim=-1)  # (B, d, 2)
        right = torch.stack([gap, rest], dim=-2)  # (B, 2, d)
        with full_precision(rows.device):
            for j, comoment in enumerate(self._comoment):
                before = slice(self._first(j), j + 1)
                product = rows[before].mT @ rows[j]
                if scaled:
                    whole = rows.new_tensor(by[before], dtype=_FLOAT64) * by[j]
                    product = product.to(_FLOAT64) / whole[:, None, None]
                comoment.add_(product)
                comoment.baddbmm_(left[before], right[j].expand(len(comoment), -1, -1))
        self._mean += gap * (n / total)
        self._n = total
        self._spectra.clear()

    def _held_weights(self) -> Tensor:
        """Return the weights of all buffered rows, on the CPU."""
        return torch.cat([torch.ones(h.shape[1]) if w is None else w.float() for h, w in self._held])

    def state(self) -> dict[str, Tensor]:
        """Return all sums and buffered rows, to continue in another process with `restore`."""
        named = {"n": torch.tensor(self._n, dtype=_FLOAT64), "mean": self._mean}
        named |= {f"comoment.{j}": comoment for j, comoment in enumerate(self._comoment)}
        if self._held:
            named["held"] = torch.cat([rows for rows, _ in self._held], dim=1)
            named["weights"] = self._held_weights()
        return named

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over the `state` of other moments of the same boundaries, width and window.

        Raises:
            KeyError, ValueError: the state is not of such moments.
        """
        device, own = self._mean.device, {"mean": self._mean}
        own |= {f"comoment.{j}": comoment for j, comoment in enumerate(self._comoment)}
        for name, tensor in own.items():
            if state[name].shape != tensor.shape:
                raise ValueError(
                    f"{name} has shape {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
                )
        self._n, self._mean = float(state["n"]), state["mean"].to(device)
        self._comoment = [state[f"comoment.{j}"].to(device) for j in range(len(self._comoment))]
        self._held = [(state["held"].to(device), state["weights"])] if "held" in state else []
        self._spectra.clear()

    def _copy(self) -> Moments:
        self._fold()
        copy = Moments.__new__(Moments)
        copy.window, copy._n, copy._mean = self.window, self._n, self._mean.clone()
        copy._comoment = [c.clone() for c in self._comoment]
        copy._held, copy._spectra = [], {}
        return copy

    def __add__(self, other: Moments) -> Moments:
        """Return the moments of both sets of rows.

        Raises:
            ValueError: the two differ in boundaries, width or window.
        """
        ours = (self.boundaries, self.width, self.window)
        theirs = (other.boundaries, other.width, other.window)
        if ours != theirs:
            raise ValueError(f"moments of (boundaries, width, window) {ours} and {theirs}")
        both, total = self._copy(), self.n + other.n
        if total == 0:
            return both
        gap, between = other.mean - self.mean, self.n * other.n / total
        for j, comoment in enumerate(both._comoment):
            comoment.add_(other.comoment[j])
            if between:
                comoment.add_(between * gap[self._first(j) : j + 1, :, None] * gap[j])
        both._mean += gap * (other.n / total)
        both._n = total
        return both

    def merged(self, total: Total) -> Moments:
        """Return the moments of all processes' rows."""
        merged = self._copy()
        merged._n, merged._mean, gap = pooled(total, self.n, self.mean)
        for j, own in enumerate(self.comoment):
            between = self.n * gap[self._first(j) : j + 1, :, None] * gap[j]
            merged._comoment[j] = total(own + between)
        return merged

    def weighted(self, weight: float) -> Moments:
        """Return the moments with every row counted `weight` times."""
        scaled = self._copy()
        scaled._n *= weight
        scaled._comoment = [c * weight for c in self.comoment]
        return scaled

    def comoments(self, i: int, j: int) -> Tensor:
        """Return C_ij (d, d) for any order of i and j.

        Raises:
            ValueError: the pair lies outside the window.
        """
        if i > j:
            return self.comoments(j, i).T
        if j - i > self.window:
            raise ValueError(f"boundaries {i} and {j} are further apart than the window {self.window}")
        return self.comoment[j][i - self._first(j)]

    def pair(self, i: int, j: int, *, spectrum: bool = False) -> PairMoments:
        """Return the moments of (h_i, h_j), from which any map h_i -> h_j is fitted.

        Args:
            spectrum: include the eigenvalues of C_ii, which are cached for the next pair.
        """
        if spectrum and i not in self._spectra:
            self._spectra[i] = torch.linalg.eigvalsh(self.comoments(i, i))
        return PairMoments(
            self.n,
            self.mean[i],
            self.mean[j],
            self.comoments(i, i),
            self.comoments(i, j),
            self.comoments(j, j).diagonal(),
            self._spectra.get(i),
        )

    def mean_square_distance(self, i: int, j: int) -> float:
        """Return E ||h_i - h_j||^2, the mean over rows."""
        spread = (
            self.comoments(i, i).trace()
            + self.comoments(j, j).trace()
            - 2 * self.comoments(i, j).trace()
        )
        return float(spread / self.n + (self.mean[i] - self.mean[j]).square().sum())
