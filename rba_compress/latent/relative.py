"""Relative representations: samples by their similarities to anchors, and products of such spaces.

Moschella et al. 2023 (arXiv 2209.15430) describe a sample by its cosines to anchors, which are
invariant to an orthogonal map and a rescaling of the space. Cannistraci et al. 2024 (2310.01211)
combine several such spaces, because the map that connects two networks is not known beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from rba_compress.core.errors import SpaceError
from rba_compress.latent.anchors import Anchors
from rba_compress.linalg.similarity import INVARIANTS, Invariant, relative, require

Aggregation = Literal["concatenation", "sum", "attention"]


def _vectors(anchors: Anchors | Tensor, metrics: Sequence[Invariant]) -> Tensor:
    """Return a copy of the anchors' vectors, after checking them for the metrics."""
    vectors = (anchors if isinstance(anchors, Anchors) else Anchors(anchors)).vectors.detach().clone()
    none = (vectors.norm(dim=1) == 0).nonzero().flatten()
    if "cosine" in metrics and len(none):
        raise SpaceError(
            f"{len(none)} of {len(vectors)} anchors have length zero, the first is anchor "
            f"{int(none[0])}: take other samples, or a distance"
        )
    return vectors


class RelativeProjection(nn.Module):
    """Similarities of vectors (..., d) to K anchors (K, d): (..., K).

        cosine      cos(x, a): invariant to orthogonal maps and rescaling
        euclidean   ||x - a||_2: invariant to orthogonal maps and translations
        l1, linf    ||x - a||_1, max |x - a|: invariant to signed permutations and translations

    where the map is applied to samples and anchors together.

    Raises:
        SpaceError: an unknown metric; anchors that are no matrix of finite numbers; for the cosine, an
            anchor of length zero, which has no direction. In a forward pass, vectors of another width
            or on another device than the anchors.
    """

    anchors: Tensor

    def __init__(self, anchors: Anchors | Tensor, metric: Invariant = "cosine") -> None:
        super().__init__()
        require(metric, INVARIANTS, "the metric")
        self.register_buffer("anchors", _vectors(anchors, [metric]))
        self.metric: Invariant = metric

    def forward(self, x: Tensor) -> Tensor:
        return relative(x, self.anchors, self.metric)

    def extra_repr(self) -> str:
        return f"{len(self.anchors)} anchors, {self.metric}"


class _Attention(nn.Module):
    """Self-attention over M branches (..., M, width), then their mean: (..., width)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, branches: Tensor) -> Tensor:
        attended, _ = self.attention(branches, branches, branches, need_weights=False)
        mixed: Tensor = self.norm(branches + attended)
        return mixed.mean(dim=-2)


class InvarianceProduct(nn.Module):
    """Combination of several relative spaces of the same anchors: M tensors (N, K) -> (N, width).

    The learned weights never see the space of the anchors, so that the product, and the head behind it,
    serve every space: `bind` it to the anchors of one space, train, and bind it to those of another.

        concatenation   the branches side by side, (N, M K); nothing is learned
        sum             LayerNorm, Linear, Tanh on each branch, then the sum: the paper's best
        attention       LayerNorm and Linear on each branch, self-attention over the M of them, the mean

    Args:
        metrics: the invariances, one or more.
        aggregation: one of the above.
        anchors: their number K.
        width: of the output, K by default; `concatenation` has its own.
        heads: of the attention; they must divide `width`.

    Raises:
        SpaceError: an unknown metric or aggregation, no metric, or one twice; a width that `heads` does
            not divide.
    """

    def __init__(
        self,
        metrics: Sequence[Invariant] = INVARIANTS,
        aggregation: Aggregation = "sum",
        *,
        anchors: int,
        width: int | None = None,
        heads: int = 1,
    ) -> None:
        super().__init__()
        for metric in metrics:
            require(metric, INVARIANTS, "the metric")
        require(aggregation, get_args(Aggregation), "the aggregation")
        if not metrics or len(set(metrics)) < len(metrics):
            raise SpaceError(f"the metrics are {list(metrics)}: name one or more, each once")
        self.metrics, self.count, self.aggregation = tuple(metrics), anchors, aggregation
        self.width = width = width or anchors
        if aggregation == "concatenation":
            self.width = anchors * len(metrics)
            return
        if aggregation == "attention" and width % heads:
            raise SpaceError(f"{heads} heads do not divide a width of {width}: change one of them")
        last = [nn.Tanh()] if aggregation == "sum" else []
        self.branches = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(anchors), nn.Linear(anchors, width), *last) for _ in metrics
        )
        if aggregation == "attention":
            self.mixed = _Attention(width, heads)

    def forward(self, spaces: Sequence[Tensor]) -> Tensor:
        if self.aggregation == "concatenation":
            return torch.cat([*spaces], dim=-1)
        branches = [branch(space) for branch, space in zip(self.branches, spaces, strict=True)]
        if self.aggregation == "sum":
            return torch.stack(branches).sum(0)
        mixed: Tensor = self.mixed(torch.stack(branches, dim=-2))
        return mixed

    def bind(self, anchors: Anchors | Tensor) -> BoundProduct:
        """Return this product, its weights shared, in the space of these anchors: (N, d) -> (N, width).

        Raises:
            SpaceError: another number of anchors; and see `RelativeProjection`.
        """
        return BoundProduct(self, anchors)


class BoundProduct(nn.Module):
    """`InvarianceProduct` in the space of its anchors; the state dict holds both."""

    anchors: Tensor

    def __init__(self, product: InvarianceProduct, anchors: Anchors | Tensor) -> None:
        super().__init__()
        if len(anchors) != product.count:
            raise SpaceError(f"{len(anchors)} anchors where {product.count} were meant: take as many")
        self.register_buffer("anchors", _vectors(anchors, product.metrics))
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        joint: Tensor = self.product([relative(x, self.anchors, m) for m in self.product.metrics])
        return joint
