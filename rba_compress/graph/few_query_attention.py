"""Attention of few queries, without keys and values.

With k = x W_k + b_k and v = x W_v + b_v

    softmax(q k^T + m) v = softmax((q W_k^T) x^T + m) x W_v + b_v

since q b_k^T is the same for every key, and the rows of a softmax sum to one. Projecting T keys and
values costs 2 T width^2 multiply-accumulates. The right-hand side costs 2 T width (heads * queries)
instead, less by the factor of a head's channels over the queries.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    q: Tensor,
    keys: Tensor | tuple[Tensor, Tensor],
    values: Tensor | tuple[Tensor, Tensor, Tensor | None],
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Compute attention of few queries, with the key projection applied to the queries and the value
    projection applied to the result.

    Args:
        q: (N, heads, queries, d).
        keys: (N, heads, T, d), or (x, weight) with x (N, T, width) and weight (heads * d, width).
        values: likewise, of as many heads of another size, with a bias or None behind the weight.
        mask: boolean (true where a key counts) or additive, broadcast to (N, heads, queries, T).
        scale: factor of the products of queries and keys.

    Returns:
        (N, heads, queries, size of a value).
    """
    n, heads, queries, d = q.shape
    # Products per head, since broadcasting a weight over samples copies it for each of them.
    if isinstance(keys, tuple):
        x, weight = keys
        moved = torch.bmm(_by_head(q * scale), weight.reshape(heads, d, -1))
        moved = _by_sample(moved, n, queries).reshape(n, heads * queries, -1)
        scores = torch.bmm(moved, x.transpose(1, 2)).reshape(n, heads, queries, -1)
    else:
        scores = torch.matmul(q * scale, keys.transpose(-1, -2))
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(mask.logical_not(), -torch.inf)
    elif mask is not None:
        scores = scores + mask
    shares = torch.softmax(scores, -1)
    if not isinstance(values, tuple):
        return torch.matmul(shares, values)
    x, weight, bias = values
    means = torch.bmm(shares.reshape(n, heads * queries, -1), x).reshape(n, heads, queries, -1)
    by_head = weight.reshape(heads, -1, weight.shape[-1])
    read = torch.bmm(_by_head(means), by_head.transpose(1, 2))
    if bias is not None:
        read = read + bias.reshape(heads, 1, -1)
    return _by_sample(read, n, queries)


def _by_head(tensor: Tensor) -> Tensor:
    """Reshape (N, heads, queries, d) to (heads, N * queries, d)."""
    _, heads, _, d = tensor.shape
    return tensor.transpose(0, 1).reshape(heads, -1, d)


def _by_sample(tensor: Tensor, n: int, queries: int) -> Tensor:
    """Reshape (heads, N * queries, d) to (N, heads, queries, d)."""
    heads, _, d = tensor.shape
    return tensor.reshape(heads, n, queries, d).transpose(0, 1)
