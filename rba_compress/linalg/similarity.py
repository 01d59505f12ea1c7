"""Similarity of the boundaries of a chain: (B, B) matrices, all from one pass over the data.

    redundancy  -mean ||h_j - h_i||^2 on the rows the head reads (class tokens, otherwise pooled
                features). Its entries (b-1, b) are the Block Redundancy of the paper, equation 1.
    cosine      mean over rows of cos(h_i, h_j)
    angular     mean over rows of arccos(cos(h_i, h_j)) / pi, 0 is the same direction
    cka         linear CKA ||C_ij||_F^2 / (||C_ii||_F ||C_jj||_F), Kornblith et al. 2019
    r2          R^2 of the best affine map h_i -> h_j, i <= j; tr(C_ij^T C_ii^+ C_ij) / tr(C_jj)
    relative_*  correlation of the relative spaces of the rows the head reads: 1 where a map to which
                the metric is invariant connects the two; see `relative_similarity`

Entries outside the window, and r2 below the diagonal, are NaN. `relative_similarity` also takes the
spaces of several networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from rba_compress.core.errors import ConfigError, SpaceError, did_you_mean
from rba_compress.linalg.maps import solve_gram
from rba_compress.linalg.moments import Moments, Total, full_precision

Invariant = Literal["cosine", "euclidean", "l1", "linf"]
INVARIANTS: tuple[Invariant, ...] = get_args(Invariant)
NORMS: dict[Invariant, float] = {"euclidean": 2.0, "l1": 1.0, "linf": float("inf")}

Relative = Literal["relative_cosine", "relative_euclidean", "relative_l1", "relative_linf"]
RELATIVE: dict[Relative, Invariant] = dict(zip(get_args(Relative), INVARIANTS, strict=True))
Metric = Literal["redundancy", "cosine", "angular", "cka", "r2"] | Relative
METRICS: tuple[Metric, ...] = ("redundancy", "cosine", "angular", "cka", "r2", *RELATIVE)
TITLES: dict[Metric, str] = {
    "cosine": "cosine",
    "cka": "linear CKA",
    "r2": "R² of the best affine map, row to column",
    "angular": "angular distance / π",
    "redundancy": "-mean squared distance (block redundancy)",
    "relative_cosine": "relative, cosine: alike up to an orthogonal map and a scale",
    "relative_euclidean": "relative, Euclidean: alike up to an orthogonal map and a shift",
    "relative_l1": "relative, L1: alike up to a signed permutation and a shift",
    "relative_linf": "relative, L∞: alike up to a signed permutation and a shift",
}

KEPT = 256
"""Number of samples, the first ones, whose read-out rows are kept for relative similarity."""


def check_space(space: Tensor, name: str) -> None:
    """Check that a space is a non-empty matrix of finite floats.

    Raises:
        SpaceError: the space is something else; the message says what.
    """
    if space.ndim != 2 or not space.numel() or not space.is_floating_point():
        raise SpaceError(
            f"{name}: {tuple(space.shape)} of {space.dtype}, where (samples, channels) of floats "
            "are needed: pool or flatten each sample first"
        )
    broken = (~space.isfinite()).any(dim=1).nonzero().flatten()
    if len(broken):
        raise SpaceError(
            f"{name}: {len(broken)} of {len(space)} rows hold NaN or infinity, the first is row "
            f"{int(broken[0])}: leave them out, in every space"
        )


def check_spaces(spaces: Sequence[Tensor]) -> None:
    """Check that spaces are of the same samples, as far as can be told, and on one device.

    Raises:
        SpaceError: they are not.
    """
    for k, space in enumerate(spaces):
        if len(space) != len(spaces[0]):
            raise SpaceError(
                f"space 0 has {len(spaces[0])} samples and space {k} has {len(space)}: take the same "
                "samples in every space"
            )
        if space.device != spaces[0].device:
            raise SpaceError(
                f"space 0 is on {spaces[0].device} and space {k} on {space.device}: move them to one "
                "device"
            )
        check_space(space, f"space {k}")


def require(value: str, known: Sequence[str], what: str) -> None:
    """Check that a name is a known one.

    Raises:
        SpaceError: the name is not known.
    """
    if value not in known:
        raise SpaceError(f"{what} {value!r} is not known: choose one of {', '.join(known)}")


def relative(x: Tensor, anchors: Tensor, metric: Invariant) -> Tensor:
    """Return the similarities of vectors (..., d) to anchors (K, d): (..., K).

    Raises:
        SpaceError: the vectors have another width, or are on another device, than the anchors.
    """
    if x.shape[-1] != anchors.shape[1] or x.device != anchors.device:
        raise SpaceError(
            f"vectors of {x.shape[-1]} channels on {x.device}, anchors of {anchors.shape[1]} on "
            f"{anchors.device}: take both from one space, on one device"
        )
    if metric == "cosine":
        unit = torch.nn.functional.normalize
        return unit(x, dim=-1) @ unit(anchors, dim=-1).mT
    flat = x.reshape(-1, x.shape[-1])
    # Computed by matrix products, small distances would be lost to cancellation.
    how = "donot_use_mm_for_euclid_dist"
    distance = torch.cdist(flat, anchors.to(flat), p=NORMS[metric], compute_mode=how)
    return distance.reshape(*x.shape[:-1], len(anchors))


def relative_similarity(
    spaces: Sequence[Tensor], metric: Invariant = "cosine", *, anchors: Sequence[int] | None = None
) -> Tensor:
    """Return the similarity of each pair of spaces, by their relative spaces: (S, S), float64, -1..1.

    The similarity is Pearson's correlation of the spaces' similarities of samples to anchors, which are
    the same samples everywhere (representational similarity analysis, Kriegeskorte et al. 2008; as
    relative spaces, Cannistraci et al. 2024). It is 1 where a map to which the metric is invariant
    leads from the one space to the other, whatever their coordinates:

        cosine      an orthogonal map, times a scale
        euclidean   an orthogonal map, times a scale, and a shift
        l1, linf    a signed permutation, times a scale, and a shift

    Args:
        spaces: (N, d_s) each, of any widths, with the same samples in the same order: boundaries of one
            network, or several networks.
        anchors: rows that are anchors; every row by default, which takes S N^2 numbers.

    Raises:
        SpaceError: an unknown metric; spaces of other samples, with NaN, or on two devices.
    """
    require(metric, INVARIANTS, "the metric")
    check_spaces(spaces)
    rows = torch.arange(len(spaces[0])) if anchors is None else torch.tensor([*anchors])
    # The similarity of a sample to itself is the same in every space.
    others = torch.arange(len(spaces[0]))[:, None] != rows
    seen = []
    for space in spaces:
        entries = relative(space.double(), space[rows].double(), metric).cpu()[others]
        entries = entries - entries.mean()
        seen.append(entries / entries.norm())
    stacked = torch.stack(seen)
    return (stacked @ stacked.T).clamp(-1, 1)


class RowSimilarity:
    """Streaming sums that joint moments do not hold: cosines, angles, distances of read-out rows.

    `kept` holds the read-out rows of the first samples, each at the place of its number, so that they
    add up like the other sums. Where the profiles of two loaders add up, a place stands for the mean of
    two samples; an affine map takes this mean to the mean of the two samples' images.
    """

    _SUMS = ("cosine", "angle", "distance", "rows", "read_rows", "kept", "places")

    def __init__(self, boundaries: int, width: int, device: torch.device | str = "cpu") -> None:
        self.rows = 0.0
        """Total weight of the rows."""
        self.read_rows = 0.0
        zeros = torch.zeros(boundaries, boundaries, dtype=torch.float64, device=device)
        self.cosine, self.angle, self.distance = zeros, zeros.clone(), zeros.clone()
        self.kept = zeros.new_zeros(boundaries, KEPT, width)
        self.places = zeros.new_zeros(KEPT)
        """Number of rows whose sum each place of `kept` holds."""

    def update(
        self,
        streams: Sequence[Tensor],
        read: Sequence[Tensor],
        weights: Tensor | None = None,
        *,
        first: int = 0,
    ) -> None:
        """Fold in one batch: each boundary's rows (rows, d) and its read-out rows (samples, d).

        Args:
            weights: weight of each row, (rows,), on the CPU; 1 by default.
            first: the number of the first read-out row.
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
        if first < KEPT:
            places = slice(first, min(first + readout.shape[1], KEPT))
            self.kept[:, places] += readout[:, : places.stop - first]
            self.places[places] += 1

    def spaces(self) -> tuple[Tensor, ...]:
        """Return the read-out rows that were kept, (samples, d) of each boundary."""
        seen = self.places > 0
        return (self.kept[:, seen] / self.places[seen, None]).unbind(0)

    def __add__(self, other: RowSimilarity) -> RowSimilarity:
        return self._with(lambda name: getattr(self, name) + getattr(other, name))

    def merged(self, total: Total) -> RowSimilarity:
        """Return the sums over all processes' rows."""
        return self._with(lambda name: total(self.state()[name]))

    def state(self) -> dict[str, Tensor]:
        """Return all sums, float64; `restore` takes them."""
        return {name: torch.as_tensor(getattr(self, name), dtype=torch.float64) for name in self._SUMS}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take over the `state` of another one."""
        for name in self._SUMS:
            old, new = getattr(self, name), state[name]
            setattr(self, name, new.to(old.device) if isinstance(old, Tensor) else float(new))

    def _with(self, value: Callable[[str], Any]) -> RowSimilarity:
        changed = RowSimilarity(len(self.cosine), self.kept.shape[2], self.cosine.device)
        changed.restore({name: torch.as_tensor(value(name)) for name in self._SUMS})
        return changed


def matrix(metric: Metric, moments: Moments, rows: RowSimilarity) -> Tensor:
    """Return the (B, B) matrix of one metric, float64, on the CPU.

    Raises:
        ConfigError: there is no such metric.
    """
    if metric not in METRICS:
        raise ConfigError(f"there is no metric {metric!r}: {did_you_mean(metric, METRICS)}")
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
        case _:
            return relative_similarity(rows.spaces(), RELATIVE[metric])


def linear_cka(moments: Moments) -> Tensor:
    """Return linear CKA of every pair of boundaries inside the window: (B, B)."""
    b = moments.boundaries
    power = torch.full((b, b), torch.nan, dtype=torch.float64)
    for j in range(b):
        for i in range(max(0, j - moments.window), j + 1):
            power[i, j] = power[j, i] = moments.comoments(i, j).square().sum()
    norm = power.diagonal().sqrt()
    return power / torch.outer(norm, norm)


def linear_r2(moments: Moments) -> Tensor:
    """Return R^2 of the best affine map of every pair i <= j inside the window: (B, B)."""
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
