"""Streaming joint second moments of the boundaries of a chain.

For boundaries `h_0 .. h_L`, each (rows, d), every closed-form fit and every moment-based similarity
needs only the row count n, the means m_i and the comoments

    C_ij = sum over rows of (h_i - m_i)^T (h_j - m_j)        # (d, d), i <= j

Batches are folded in as they are seen and two states merge exactly (Chan, Golub, LeVeque 1979):

    n = n_a + n_b,   e_i = m_b,i - m_a,i,   m_i = m_a,i + (n_b / n) e_i
    C_ij = C_a,ij + C_b,ij + (n_a n_b / n) e_i^T e_j

so the memory does not depend on the number of rows, and the order of batches does not matter.
Products are taken in float32 (float64 for float64 streams) on the batch's centred rows, whatever the
model's dtype; everything is accumulated in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_FLOAT64 = torch.float64

Total = Callable[[Tensor], Tensor]
"""The sum over several processes of a tensor that each of them has."""


def pooled(total: Total, n: float, mean: Tensor) -> tuple[float, Tensor, Tensor]:
    """The count and the means (..., d) of all processes' rows, and how far this one's are from them."""
    rows = float(total(mean.new_tensor(n)))
    whole = total(n * mean) / max(rows, 1.0)
    return rows, whole, mean - whole


@dataclass(frozen=True)
class PairMoments:
    """Weighted first and second moments of paired rows x (rows, d_x) and y (rows, d_y), float64.

    `xx` (d_x, d_x), `xy` (d_x, d_y) and `yy` (d_y,), of which fits need the diagonal alone, are
    centred sums, not divided by n. Moments of disjoint rows add up.
    """

    n: float
    mean_x: Tensor  # (d_x,)
    mean_y: Tensor  # (d_y,)
    xx: Tensor
    xy: Tensor
    yy: Tensor

    @classmethod
    def from_rows(cls, x: Tensor, y: Tensor) -> PairMoments:
        """The moments of rows x (rows, d_x) and y (rows, d_y), one row or more."""
        x, y = (rows.to(torch.promote_types(rows.dtype, torch.float32)) for rows in (x, y))
        mean_x, mean_y = x.mean(0, dtype=_FLOAT64), y.mean(0, dtype=_FLOAT64)
        # The mean, rounded: what that leaves is in the products and taken out again.
        shift_x, shift_y = mean_x.to(x.dtype), mean_y.to(y.dtype)
        rest_x, rest_y = mean_x - shift_x, mean_y - shift_y
        x, y, n = x - shift_x, y - shift_y, float(len(x))
        with full_precision(x.device):
            xx, xy = (x.T @ x).to(_FLOAT64), (x.T @ y).to(_FLOAT64)
        return cls(
            n,
            mean_x,
            mean_y,
            xx - n * torch.outer(rest_x, rest_x),
            xy - n * torch.outer(rest_x, rest_y),
            y.square().sum(0, dtype=_FLOAT64) - n * rest_y.square(),
        )

    def __add__(self, other: PairMoments) -> PairMoments:
        """The moments of both sets of rows."""
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
        """The moments of all processes' rows."""
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

    def weighted(self, weight: float) -> PairMoments:
        """The moments with every row counted `weight` times."""
        return replace(
            self, n=self.n * weight, xx=self.xx * weight, xy=self.xy * weight, yy=self.yy * weight
        )

    def targets(self, columns: slice) -> PairMoments:
        """The moments of x and some of y's columns."""
        return replace(self, mean_y=self.mean_y[columns], xy=self.xy[:, columns], yy=self.yy[columns])

    @property
    def raw_xx(self) -> Tensor:
        """sum x^T x, not centred: (d_x, d_x)."""
        return self.xx + self.n * torch.outer(self.mean_x, self.mean_x)

    @property
    def raw_xy(self) -> Tensor:
        """sum x^T y, not centred: (d_x, d_y)."""
        return self.xy + self.n * torch.outer(self.mean_x, self.mean_y)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Float32 products are float32: no tf32, no bfloat16 passes, no autocast of the caller's."""
    backends = [torch.backends.cuda.matmul, torch.backends.mkldnn]
    backends += [getattr(torch.backends.mkldnn, "matmul", None)]
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


class Moments:
    """The joint second moments of `boundaries` streams of `width` channels.

    Args:
        boundaries: number of streams B (blocks + 1).
        width: channels d.
        window: the largest j - i for which C_ij is kept; None keeps all pairs.
        device: where products and sums live.

    Memory: 8 d^2 bytes for each kept pair; all pairs are B (B + 1) / 2.
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
        self.n = 0.0
        self.mean = torch.zeros(boundaries, width, dtype=_FLOAT64, device=device)
        # comoment[j][k] is C_ij of i = first(j) + k
        self.comoment = [
            torch.zeros(j - self._first(j) + 1, width, width, dtype=_FLOAT64, device=device)
            for j in range(boundaries)
        ]

    @property
    def boundaries(self) -> int:
        return len(self.mean)

    @property
    def width(self) -> int:
        return self.mean.shape[1]

    def _first(self, j: int) -> int:
        return max(0, j - self.window)

    @torch.no_grad()
    def update(self, streams: Sequence[Tensor]) -> None:
        """Fold in one batch: `boundaries` tensors (rows, d) with the same rows. No rows, no change."""
        rows = len(streams[0])
        if rows == 0:
            return
        batch = Moments.__new__(Moments)
        batch.window, batch.n = self.window, float(rows)
        batch.mean = torch.stack([h.mean(0, dtype=_FLOAT64) for h in streams])
        dtype = torch.promote_types(streams[0].dtype, torch.float32)
        shift = batch.mean.to(dtype)
        # What rounding the mean to `dtype` leaves; its product is taken out again below.
        rest = batch.mean - shift.to(_FLOAT64)
        centred = torch.stack([h.to(dtype) for h in streams]) - shift[:, None]  # (B, rows, d)
        batch.comoment = []
        with full_precision(centred.device):
            for j in range(self.boundaries):
                first = self._first(j)
                product = centred[first : j + 1].mT @ centred[j]  # (k, d, d)
                excess = rows * rest[first : j + 1, :, None] * rest[j]
                batch.comoment.append(product.to(_FLOAT64) - excess)
        self._absorb(batch)

    def _absorb(self, other: Moments) -> None:
        total = self.n + other.n
        if total == 0:
            return
        gap = other.mean - self.mean
        between = self.n * other.n / total
        for j, new in enumerate(other.comoment):
            self.comoment[j] += new
            if between:
                self.comoment[j] += between * gap[self._first(j) : j + 1, :, None] * gap[j]
        self.mean += gap * (other.n / total)
        self.n = total

    def _copy(self) -> Moments:
        copy = Moments.__new__(Moments)
        copy.window, copy.n, copy.mean = self.window, self.n, self.mean.clone()
        copy.comoment = [c.clone() for c in self.comoment]
        return copy

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets of rows.

        Raises:
            ValueError: the two differ in boundaries, width or window.
        """
        ours = (self.boundaries, self.width, self.window)
        theirs = (other.boundaries, other.width, other.window)
        if ours != theirs:
            raise ValueError(f"moments of (boundaries, width, window) {ours} and {theirs}")
        merged = self._copy()
        merged._absorb(other)
        return merged

    def merged(self, total: Total) -> Moments:
        """The moments of all processes' rows."""
        merged = self._copy()
        merged.n, merged.mean, gap = pooled(total, self.n, self.mean)
        for j, own in enumerate(self.comoment):
            between = self.n * gap[self._first(j) : j + 1, :, None] * gap[j]
            merged.comoment[j] = total(own + between)
        return merged

    def weighted(self, weight: float) -> Moments:
        """The moments with every row counted `weight` times."""
        scaled = self._copy()
        scaled.n *= weight
        scaled.comoment = [c * weight for c in self.comoment]
        return scaled

    def comoments(self, i: int, j: int) -> Tensor:
        """C_ij (d, d) for any order of i and j.

        Raises:
            ValueError: the pair lies outside the window.
        """
        if i > j:
            return self.comoments(j, i).T
        if j - i > self.window:
            raise ValueError(f"boundaries {i} and {j} are further apart than the window {self.window}")
        return self.comoment[j][i - self._first(j)]

    def pair(self, i: int, j: int) -> PairMoments:
        """The moments of (h_i, h_j), from which any map h_i -> h_j is fitted."""
        return PairMoments(
            self.n,
            self.mean[i],
            self.mean[j],
            self.comoments(i, i),
            self.comoments(i, j),
            self.comoments(j, j).diagonal(),
        )

    def mean_square_distance(self, i: int, j: int) -> float:
        """E ||h_i - h_j||^2, the mean over rows."""
        spread = (
            self.comoments(i, i).trace()
            + self.comoments(j, j).trace()
            - 2 * self.comoments(i, j).trace()
        )
        return float(spread / self.n + (self.mean[i] - self.mean[j]).square().sum())
