"""Closed forms that make a linear layer's input narrower.

With G the second moments of the features z that a layer W reads (centred where the layer has a bias,
which then takes the means), leaving out the features T costs, after the best change of the others,

    E ||W_T z_T - D z_K||^2    least at    D = W_T G_TK (G_KK + l I)^-1

which is the ridge solution around the present weights. The order in which features are taken is that of
the optimal brain surgeon (Hassibi and Stork 1993; Frantar and Alistarh 2022): always the feature with
the least increase of that error,

    w_j^T (H_jj)^-1 w_j,    H = (G + l I)^-1

with W and H downdated after each. A feature may be several columns: the patches of a convolution have
one for each place of the kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rba_compress.core.map_spec import Diagnostics
from rba_compress.linalg.maps import condition, effective_rank, solve_gram
from rba_compress.linalg.moments import PairMoments

RIDGE = 1e-6
"""Ridge, relative to the mean diagonal of G: above the rounding errors of products in float32."""
FREE = 1e-5
"""Share of a layer's output that may be lost with channels that count as free."""
_SUBSET = 64
"""Channels of which the cheapest are taken one by one before all others are downdated."""


@dataclass(frozen=True)
class Removal:
    """Order in which channels are taken, and what is lost after each."""

    order: Tensor
    """Channels, the first to be taken first, (taken,)."""
    lost: Tensor
    """Increase of the squared error, as a share of the output's variance, after each, (taken,)."""

    @property
    def free(self) -> int:
        """Number of channels that are lost for nothing."""
        return int((self.lost <= FREE).sum())

    def kept(self, taken: int, channels: int) -> Tensor:
        """Return the channels that stay when some are taken, ascending."""
        left = torch.ones(channels, dtype=torch.bool, device=self.order.device)
        left[self.order[:taken]] = False
        return left.nonzero().flatten()


def removal(weight: Tensor, features: PairMoments, channels: int, most: int, *, bias: bool) -> Removal:
    """Return the order in which to take channels.

    Args:
        weight: of the layer that reads them, (outputs, channels * columns), the columns of a channel
            next to each other.
        features: moments of the layer's inputs.
        channels: number of channels.
        most: number of channels to take at most.
        bias: True where the layer's bias takes the means.
    """
    gram = features.xx if bias else features.raw_xx
    weight = weight.to(gram)
    total = float(((weight @ gram) * weight).sum())
    whole = _Surgeon(weight, _inverse(gram), torch.arange(channels, device=gram.device))
    order: list[int] = []
    lost: list[float] = []
    while len(order) < most:
        ranked = whole.losses().sort()
        bound = float(ranked.values[_SUBSET]) if len(ranked.values) > _SUBSET else math.inf
        # All others are downdated at once, when the cheapest of the subset is no longer below them.
        places = ranked.indices[:_SUBSET][ranked.values[:_SUBSET] < math.inf].sort().values
        subset, taken = whole.part(places), 0
        while taken < len(places) and len(order) < most:
            losses = subset.losses()
            j = int(losses.argmin())
            if taken and float(losses[j]) > bound:
                break
            taken += 1
            order.append(int(subset.channels[j]))
            lost.append(max(float(losses[j]), 0.0))
            subset.take(torch.tensor([j], device=gram.device))
        whole.take(places[~subset.left])
        whole = whole.compacted()
    tiny = torch.finfo(gram.dtype).tiny
    shares = torch.tensor(lost, dtype=gram.dtype).cumsum(0) / max(total, tiny)
    return Removal(torch.tensor(order, dtype=torch.long), shares)


def _inverse(gram: Tensor) -> Tensor:
    ridge = _ridge(gram)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(gram + ridge * eye)
    if int(failed):  # rounding made it indefinite
        values, vectors = torch.linalg.eigh(gram)
        inverse: Tensor = (vectors / values.clamp_min(0).add(ridge)) @ vectors.T
        return inverse
    return torch.cholesky_inverse(factor)


def _ridge(gram: Tensor) -> float:
    return max(RIDGE * float(gram.diagonal().mean()), torch.finfo(gram.dtype).tiny)


def _columns(channels: Tensor, columns: int, device: torch.device) -> Tensor:
    """Return the columns of some channels."""
    first = channels.to(device) * columns
    return (first[:, None] + torch.arange(columns, device=device)).flatten()


class _Surgeon:
    """Weights and the inverse of their features' moments, changed in place as channels are taken."""

    def __init__(self, weight: Tensor, inverse: Tensor, channels: Tensor) -> None:
        self.weight, self.inverse, self.channels = weight.clone(), inverse, channels
        self.left = torch.ones(len(channels), dtype=torch.bool, device=channels.device)
        """True for the channels that are left."""
        self.columns = len(inverse) // len(channels)

    def losses(self) -> Tensor:
        """Return the increase of the squared error without each channel alone, (channels,); infinite
        for those that are taken.
        """
        n, columns = len(self.channels), self.columns
        if columns == 1:
            found = self.weight.square().sum(0) / self.inverse.diagonal().where(self.left, 1.0)
        else:
            each = self.weight.reshape(-1, n, columns).permute(1, 2, 0)
            blocks = self.inverse.reshape(n, columns, n, columns).diagonal(dim1=0, dim2=2)
            eye = torch.eye(columns, dtype=self.inverse.dtype, device=self.inverse.device)
            blocks = blocks.permute(2, 0, 1).where(self.left[:, None, None], eye)
            found = (each * torch.linalg.solve(blocks, each)).sum((1, 2))
        return found.where(self.left, math.inf)

    def part(self, places: Tensor) -> _Surgeon:
        """Return some of the channels, with their share of the weights and of the inverse."""
        at = _columns(places, self.columns, self.inverse.device)
        return _Surgeon(self.weight[:, at], self.inverse[at][:, at], self.channels[places])

    def take(self, places: Tensor) -> None:
        """Take channels away, and change the others to stand in for them."""
        at = _columns(places, self.columns, self.inverse.device)
        across = self.inverse[at]
        share = torch.linalg.solve(across[:, at], across)
        self.weight.addmm_(self.weight[:, at], share, alpha=-1)
        self.inverse.addmm_(across.T.contiguous(), share, alpha=-1)
        self.left[places] = False

    def compacted(self) -> _Surgeon:
        """Return the channels that are left alone, where they are few."""
        if 2 * int(self.left.sum()) > len(self.left):
            return self
        return self.part(self.left.nonzero().flatten())


@dataclass(frozen=True)
class Compensation:
    """Weights of a narrower layer, and a constant of its output."""

    weight: Tensor
    """(outputs, kept columns)."""
    shift: Tensor
    """(outputs,); zero where the layer has no bias."""
    diagnostics: Diagnostics


def compensated(
    weight: Tensor, features: PairMoments, kept: Tensor, channels: int, *, bias: bool
) -> Compensation:
    """Return the layer that reads some of its features and stands in for the others.

    Args:
        weight, features, channels, bias: as in `removal`.
        kept: channels that stay, ascending.
    """
    gram = features.xx if bias else features.raw_xx
    weight, columns = weight.to(gram), len(gram) // channels
    left = torch.ones(channels, dtype=torch.bool, device=gram.device)
    left[kept] = False
    taken = _columns(left.nonzero().flatten(), columns, gram.device)
    at = _columns(kept, columns, gram.device)
    lost = weight[:, taken]
    # Features that stay, and what is taken as the target.
    inner, cross = gram[at][:, at], gram[at][:, taken] @ lost.T
    ridge = _ridge(gram)
    change = solve_gram(inner, cross, ridge)
    shift = lost @ features.mean_x[taken] - change.T @ features.mean_x[at]
    residual = ((lost @ gram[taken][:, taken]) * lost).sum() - (change * cross).sum()
    total = ((weight @ gram) * weight).sum()
    new = weight[:, at] + change.T
    return Compensation(
        new,
        shift if bias else torch.zeros_like(shift),
        _diagnostics(features, gram, ridge, residual, total),
    )


def _diagnostics(
    features: PairMoments, gram: Tensor, ridge: float, residual: Tensor, total: Tensor
) -> Diagnostics:
    """Return the diagnostics of a fit with a squared error, of an output with so much variance."""
    spectrum = features.spectrum
    spectrum = (torch.linalg.eigvalsh(gram) if spectrum is None else spectrum).clamp_min(0)
    error = float(residual.clamp_min(0))
    return Diagnostics(
        residual=error / features.n,
        r2=1 - error / float(total) if total > 0 else 1.0,
        effective_rank=effective_rank(spectrum),
        condition=condition(spectrum + ridge),
        damping=ridge,
        rows=features.n,
    )


@dataclass(frozen=True)
class Basis:
    """Directions of a head's channels, the most important first."""

    into: Tensor
    """(directions, channels): z' = into z."""
    back: Tensor
    """(channels, directions): z = back z' with all directions."""
    lost: Tensor
    """Squared error without each direction and those behind it, (directions + 1,); the last is 0."""


def basis(inner: Tensor, outer: Tensor) -> Basis:
    """Return the directions of z in which a bilinear or linear reading of z is best kept.

    With S the square root of the moments of z and R^T R those of its reader, the singular vectors V of
    R S keep most of E ||R z||^2 with z' = V^T S^-1 z and z = S V z'. For the values of a head, R is the
    output layer's weight; for its keys, R is the square root of the moments of the queries, because
    E (q^T k)^2 = ||C_q^1/2 C_k^1/2||^2.

    Args:
        inner: moments of z, (channels, channels).
        outer: R^T R, (channels, channels).
    """
    values, vectors = torch.linalg.eigh(inner)
    known = values > values[-1].clamp_min(0) * 1e-12
    root = vectors * values.clamp_min(0).sqrt()
    inverse = vectors * torch.where(known, values.clamp_min(0).rsqrt(), 0)
    energy, turned = torch.linalg.eigh(root.T @ outer @ root)
    energy, turned = energy.flip(0).clamp_min(0), turned.flip(1)
    left = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
    return Basis((inverse @ turned).T, root @ turned, left)


def projected(
    weight: Tensor, features: PairMoments, into: Tensor, back: Tensor, *, bias: bool
) -> Compensation:
    """Return the layer that reads `into z` in place of z, solved anew around `weight back`.

    Args:
        weight: (outputs, features).
        features: moments of z.
        into: (directions, features); `back` is about its inverse.
        bias: as in `removal`.
    """
    gram = features.xx if bias else features.raw_xx
    weight = weight.to(gram)
    first = weight @ back
    lost = weight - first @ into
    inner, cross = into @ gram @ into.T, into @ gram @ lost.T
    ridge = _ridge(inner)
    change = solve_gram(inner, cross, ridge)
    new = first + change.T
    shift = (weight - new @ into) @ features.mean_x
    residual = ((lost @ gram) * lost).sum() - (change * cross).sum()
    total = ((weight @ gram) * weight).sum()
    return Compensation(
        new,
        shift if bias else torch.zeros_like(shift),
        _diagnostics(features, gram, ridge, residual, total),
    )
