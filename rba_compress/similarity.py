"""How alike the boundaries of a chain are: (B, B) matrices, all from one pass over the data.

    redundancy  -mean ||h_j - h_i||^2 on the rows the head reads (class tokens, otherwise pooled
                features). Its entries (b-1, b) are the Block Redundancy of the paper, equation 1.
    cosine      mean over rows of cos(h_i, h_j)
    angular     mean over rows of arccos(cos(h_i, h_j)) / pi, 0 is the same direction
    cka         linear CKA ||C_ij||_F^2 / (||C_ii||_F ||C_jj||_F), Kornblith et al. 2019
    r2          R^2 of the best affine map h_i -> h_j, i <= j; tr(C_ij^T C_ii^+ C_ij) / tr(C_jj)

What a window left out, and r2 below the diagonal, is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rba_compress.maps import solve_gram
from rba_compress.moments import Moments, Total, full_precision

Metric = Literal["redundancy", "cosine", "angular", "cka", "r2"]
METRICS: tuple[Metric, ...] = get_args(Metric)
TITLES: dict[Metric, str] = {
    "cosine": "cosine",
    "cka": "linear CKA",
    "r2": "R² of the best affine map, row to column",
    "angular": "angular distance / π",
    "redundancy": "-mean squared distance (block redundancy)",
}


class RowSimilarity:
    """Streaming sums of what joint moments do not hold: cosines, angles, distances of read-out rows."""

    _SUMS = ("cosine", "angle", "distance", "rows", "read_rows")

    def __init__(self, boundaries: int, device: torch.device | str = "cpu") -> None:
        self.rows = 0.0
        """By their weight."""
        self.read_rows = 0.0
        zeros = torch.zeros(boundaries, boundaries, dtype=torch.float64, device=device)
        self.cosine, self.angle, self.distance = zeros, zeros.clone(), zeros.clone()

    def update(
        self, streams: Sequence[Tensor], read: Sequence[Tensor], weights: Tensor | None = None
    ) -> None:
        """Fold in one batch: each boundary's rows (rows, d) and its read-out rows (samples, d).

        Args:
            weights: how often each row counts, (rows,), on the CPU; once by default.
        """
        dtype = torch.promote_types(streams[0].dtype, torch.float32)
        with full_precision(streams[0].device):
            rows = torch.nn.functional.normalize(torch.stack([*streams], dim=1).to(dtype), dim=-1)
            cosine = (rows @ rows.mT).clamp(-1, 1).double()  # (rows, B, B)
        counted = torch.ones(len(rows)) if weights is None else weights
        self.rows += float(counted.sum(dtype=torch.float64))
        counted = counted.to(cosine)
        self.cosine += torch.tensordot(counted, cosine, 1)
        self.angle += torch.tensordot(counted, cosine.arccos(), 1) / torch.pi
        readout = torch.stack([h.double() for h in read])  # (B, samples, d)
        for i, h in enumerate(readout):
            self.distance[i] += (readout - h).square().sum((1, 2))
        self.read_rows += readout.shape[1]

    def __add__(self, other: RowSimilarity) -> RowSimilarity:
        return self._with(lambda name: getattr(self, name) + getattr(other, name))

    def merged(self, total: Total) -> RowSimilarity:
        """The sums over all processes' rows."""
        return self._with(lambda name: total(self.state()[name]))

    def state(self) -> dict[str, Tensor]:
        """All that it holds, float64; `restore` takes it."""
        return {name: torch.as_tensor(getattr(self, name), dtype=torch.float64) for name in self._SUMS}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over what another one held."""
        for name in self._SUMS:
            old, new = getattr(self, name), state[name]
            setattr(self, name, new.to(old.device) if isinstance(old, Tensor) else float(new))

    def _with(self, value: Callable[[str], Any]) -> RowSimilarity:
        changed = RowSimilarity(len(self.cosine), self.cosine.device)
        changed.restore({name: torch.as_tensor(value(name)) for name in self._SUMS})
        return changed


def matrix(metric: Metric, moments: Moments, rows: RowSimilarity) -> Tensor:
    """The (B, B) matrix of one metric, float64, on the CPU."""
    match metric:
        case "redundancy":
            return (-rows.distance / rows.read_rows).cpu()
        case "cosine":
            return (rows.cosine / rows.rows).cpu()
        case "angular":
            return (rows.angle / rows.rows).cpu()
        case "cka":
            return linear_cka(moments)
        case "r2":
            return linear_r2(moments)


def linear_cka(moments: Moments) -> Tensor:
    """Linear CKA of every pair of boundaries inside the window: (B, B)."""
    b = moments.boundaries
    power = torch.full((b, b), torch.nan, dtype=torch.float64)
    for j in range(b):
        for i in range(max(0, j - moments.window), j + 1):
            power[i, j] = power[j, i] = moments.comoments(i, j).square().sum()
    norm = power.diagonal().sqrt()
    return power / torch.outer(norm, norm)


def linear_r2(moments: Moments) -> Tensor:
    """R^2 of the best affine map of every pair i <= j inside the window: (B, B)."""
    b = moments.boundaries
    r2 = torch.full((b, b), torch.nan, dtype=torch.float64)
    for i in range(b):
        targets = range(i, min(b, i + moments.window + 1))
        cross = torch.cat([moments.comoments(i, j) for j in targets], dim=1)  # (d, k d)
        solved = solve_gram(moments.comoments(i, i), cross, 0.0)
        explained = (cross * solved).reshape(moments.width, -1, moments.width).sum((0, 2))
        for j, value in zip(targets, explained, strict=True):
            r2[i, j] = value / moments.comoments(j, j).trace()
    return r2
