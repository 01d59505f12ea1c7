"""Token merging: positions of a stream that are alike and matter little are joined.

Positions are split alternately into two sets. Each position of the first set has that one of the second
set as partner with which the pair costs least. The r cheapest pairs are joined into the partner's
place, as a weighted mean, and their sizes are added. The size of a position is the number of original
positions in it. Attention counts a position by its size: log(size) is added to the scores of its key.
With both, joining equal positions changes no output (Bolya et al., ICLR 2023).

The cost of a pair is Ward's (1963): w v / (w + v) times the squared distance of the two in the stream,
the weighted squared error of their mean. The weights are the square roots of size times the attention
that the read positions (class tokens) give to each. With attention alone, a DeiT-tiny with 28, 40 and
50 % of its cost off has 0.33, 0.43 and 0.46 of the divergence that it has with pairs chosen by the
cosine of keys, as Bolya et al. do; with sizes, 0.85, 0.92 and 0.97 of that. The mean is weighted by the
attention alone (0.91, 1.01 and 0.91 of a mean weighted by size).
Where no positions are read alone, all weights are the sizes (0.73, 0.82 and 0.79 of keys' cosines on
that network).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rba_compress.core.errors import ModelError


def most(positions: int, protected: int) -> int:
    """Return the largest number of positions that one merge can take away.

    Args:
        positions: the number of positions before it.
        protected: the number of positions, the first ones, that are not merged.
    """
    first, second = (positions + 1) // 2 - (protected + 1) // 2, positions // 2 - protected // 2
    return first if second > 0 else 0


def places(stream: Tensor, importance: Tensor | None, count: int, protected: int) -> Tensor:
    """Return the new place of each position after `count` of them were merged into others.

    Ties are broken by the position: the first one wins, except on CUDA, where any may.

    Args:
        stream: (N, T, d).
        importance: weights of the positions, (N, T), above 0; None for equal ones.
        count: the number of positions to take away, at most `most(T, protected)`.
        protected: the number of positions, the first ones, that are not merged.

    Raises:
        ModelError: there are too few positions.

    Returns:
        (N, T) int64, values 0 to T - count - 1, in the order of the positions that are kept.
    """
    positions = stream.shape[1]
    if count > most(positions, protected):
        least = max(2 * (count + (protected + 1) // 2) - 1, 2 * (protected // 2) + 2)
        raise ModelError(
            f"{positions} positions reach a block that merges {count} of them: give a larger input, "
            f"with which {least} or more reach it"
        )
    # Protected positions are cut off, not masked: what is left is compared alone.
    start, second = 2 * ((protected + 1) // 2), 2 * (protected // 2) + 1
    x = stream.to(torch.promote_types(stream.dtype, torch.float32))
    x = x - x.mean(1, keepdim=True)  # the same distances, with smaller rounding errors
    squares = torch.linalg.vector_norm(x, dim=-1).square()
    sums = squares[:, start::2, None] + squares[:, None, second::2]
    cost = torch.baddbmm(sums, x[:, start::2], x[:, second::2].transpose(1, 2), alpha=-2).clamp_min(0)
    if importance is not None:
        inverse = 1 / importance.to(x.dtype)
        cost = cost / (inverse[:, start::2, None] + inverse[:, None, second::2])
    best, partner = cost.min(-1)
    # torch.onnx cannot export a sort with stable=True. The default one is stable on CPUs, too.
    cheapest = best.sort(-1)[1][:, :count]
    source, target = 2 * cheapest + start, 2 * partner.gather(1, cheapest) + second
    new = torch.ones_like(squares, dtype=torch.long).scatter(1, source, 0).cumsum(1) - 1
    return new.scatter(1, source, new.gather(1, target))


def attention_of_reads(
    queries: Tensor, keys: Tensor, sizes: Tensor | None, reads: int, scale: float
) -> Tensor:
    """Return the attention that the first positions give to each, (N, T), a mean over heads and reads,
    above 0, in float32 or wider.

    Args:
        queries, keys: (N, heads, T, d); each key may be that of several queries' heads.
        sizes: (N, T, 1), or None where each is one.
        reads: the number of positions that give it, the first ones.
        scale: the factor of the scores.
    """
    heads = queries.shape[1] // keys.shape[1]
    keys = keys.repeat_interleave(heads, 1) if heads > 1 else keys
    scores = (queries[:, :, :reads, None] * keys[:, :, None]).sum(-1) * scale
    if sizes is not None:
        scores = scores + weights(sizes)
    return _above_zero(scores.softmax(-1).mean((1, 2)))


def rows_of_reads(attention: Tensor, heads: int, reads: int) -> Tensor:
    """Return the attention that the first positions give to each, as `attention_of_reads`.

    Args:
        attention: all of it, (N, heads, T, T) or (N heads, T, T).
        heads, reads: the number of heads, and of the positions that give it.
    """
    by_head = attention if attention.ndim == 4 else attention.unflatten(0, (-1, heads))
    return _above_zero(by_head[:, :, :reads].mean((1, 2)))


def _above_zero(attention: Tensor) -> Tensor:
    return attention.to(torch.promote_types(attention.dtype, torch.float32)).clamp_min(1e-12)


def importance_of_attention(attention: Tensor, sizes: Tensor | None) -> Tensor:
    """Return the square root of attention (N, T) times sizes (N, T, 1), or of attention alone."""
    return (attention if sizes is None else attention * sizes.squeeze(-1)).sqrt()


def unit_sizes(stream: Tensor) -> Tensor:
    """Return the sizes (N, T, 1) of positions of which none were merged, for a stream (N, T, d)."""
    return torch.ones_like(stream[..., :1])


def merged_sizes(sizes: Tensor, new: Tensor, count: int) -> Tensor:
    """Return the sizes of the positions that are left, (N, T - count, 1).

    Args:
        sizes: (N, T, 1), the number of original positions in each; floating point.
        new: the new place of each position, as `places` returns it.
        count: the number of positions that are taken away.
    """
    return _summed(sizes, new, new.shape[1] - count)


def shares(new: Tensor, weight: Tensor, count: int) -> Tensor:
    """Return the share of each position in the mean at its new place, (N, T, 1).

    Args:
        new: the new place of each position, as `places` returns it.
        weight: that of each position in the mean, (N, T), above 0.
        count: the number of positions that are taken away.
    """
    weight = weight[..., None]
    return weight / _summed(weight, new, new.shape[1] - count).gather(1, new[..., None])


def merge(stream: Tensor, share: Tensor, new: Tensor, count: int) -> Tensor:
    """Join positions into weighted means.

    Args:
        stream: (N, T, d).
        share: the share of each position in the mean, as `shares` returns it.
        new: the new place of each position, as `places` returns it.
        count: the number of positions that are taken away.

    Returns:
        (N, T - count, d).
    """
    return _summed(stream * share, new, new.shape[1] - count).to(stream.dtype)


def _summed(x: Tensor, new: Tensor, left: int) -> Tensor:
    """Return the sums (N, left, d) of the rows of `x` (N, T, d) that go to each place."""
    # Rows of all samples at once: whole rows are added, several times as fast as single numbers.
    # Half precision is summed in float32, as ONNX Runtime has no sums of it.
    n, wide = x.shape[0], torch.promote_types(x.dtype, torch.float32)
    rows = new + left * torch.arange(n, device=new.device)[:, None]
    total = x.new_zeros(n * left, x.shape[-1], dtype=wide)
    summed = total.index_add(0, rows.flatten(), x.to(wide).flatten(0, 1))
    return summed.view(n, left, -1).to(x.dtype)


def with_sizes(stream: Tensor, sizes: Tensor) -> Tensor:
    """Return a stream (N, T, d) with the sizes (N, T, 1) of its positions as the last channel."""
    return torch.cat([stream, sizes], -1)


def restored(stream: Tensor, sizes: Tensor, count: int) -> Tensor:
    """Repeat each position as often as its size says, one behind the other.

    Whatever does not depend on the order of positions, such as a mean, then counts each by its size.

    Args:
        stream, sizes: (N, T, d) and (N, T, 1).
        count: the number of positions that were taken away in all.

    Returns:
        (N, T + count, d).
    """
    n, left, width = stream.shape
    ends = sizes.squeeze(-1).cumsum(1)
    place = torch.arange(left + count, device=stream.device, dtype=ends.dtype) + 0.5
    index = (ends[:, None, :] < place[:, None]).long().sum(-1)
    return stream.gather(1, index[..., None].expand(n, left + count, width))


def turned(stream: Tensor, first: int) -> Tensor:
    """Return the positions of a stream in another order, the first ones in their places."""
    rest = stream[:, first:].flip(1)
    return torch.cat([stream[:, :first], rest.roll(rest.shape[1] // 2, 1)], 1)


def weights(sizes: Tensor) -> Tensor:
    """Return what is added to the scores of attention, (N, 1, 1, T), for sizes (N, T, 1)."""
    return sizes.log().transpose(1, 2)[:, None]
