"""Statistics of a chain on the calibration samples: its moments and similarities, batch by batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rba_compress.core.io import below
from rba_compress.core.plan import Chain
from rba_compress.graph.activations import as_rows
from rba_compress.linalg.moments import Moments, Total
from rba_compress.linalg.similarity import Metric, RowSimilarity, matrix

Connection = Literal["identity", "signed permutation", "orthogonal map", "affine map", "none of these"]

DENSE = 16
"""Number of rows per channel that are profiled before positions are left out."""


@dataclass(frozen=True, eq=False)
class ChainProfile:
    """Statistics of one chain on the calibration samples."""

    chain: Chain
    moments: Moments
    rows: RowSimilarity

    def __repr__(self) -> str:
        return f"ChainProfile({self.chain!r}, {self.moments.n:,.0f} rows)"

    def similarity(self, metric: Metric) -> Tensor:
        """Return the similarity of every two boundaries: (blocks + 1, blocks + 1), float64.

        Raises:
            ConfigError: there is no such metric.
        """
        return matrix(metric, self.moments, self.rows)

    def connection(self, start: int, stop: int, *, at_least: float = 0.95) -> Connection:
        """Return the narrowest class of maps that leads from one boundary to another.

        Each class is tested with similarities that are invariant to it: the identity with the cosine, a
        signed permutation with the lower of the relative L1 and L-infinity similarities, an orthogonal
        map with the higher of the relative cosine and Euclidean ones, an affine map with R².

        Args:
            at_least: the similarity, of at most 1, from which on two boundaries count as the same.
        """

        def alike(metric: Metric) -> float:
            return float(self.similarity(metric)[start, stop])

        found: dict[Connection, float] = {
            "identity": alike("cosine"),
            "signed permutation": min(alike("relative_l1"), alike("relative_linf")),
            "orthogonal map": max(alike("relative_cosine"), alike("relative_euclidean")),
            "affine map": alike("r2"),
        }
        return next((name for name, value in found.items() if value >= at_least), "none of these")

    @property
    def block_redundancy(self) -> list[float]:
        """Block Redundancy of each block, as defined in the paper; higher is more redundant."""
        return [float(value) for value in self.similarity("redundancy").diagonal(1)]

    def update(
        self, streams: Sequence[Tensor], mask: Tensor | None, *, first: int = 0, stride: int = 1
    ) -> None:
        """Fold in the streams of one batch.

        Args:
            mask: (N, positions), true at real tokens.
            first: the index of the batch's first sample.
            stride: after `DENSE` rows per channel, one in `stride` of the positions that no head reads
                is taken, weighted to stand for all of them. The offset changes from batch to batch.
        """
        axis = self.chain.axis
        shape = streams[0].movedim(axis, -1).shape[:-1]
        positions = shape[1:].numel()
        mask = mask if mask is not None and mask.shape == shape else None
        taken = weights = None
        first *= max(self.chain.rows, 1)
        if min(stride, positions) > 1 and first * positions >= DENSE * self.chain.width:
            taken, weights = self._taken(positions, first, stride)
            weights = weights.repeat(len(streams[0]))
        kept = mask if mask is None or taken is None else mask[:, taken]
        if kept is not None and weights is not None:
            weights = weights[kept.flatten().cpu()]
        rows = [as_rows(h, axis, kept, taken) for h in streams]
        self.moments.update(rows, weights)
        read = [_read_rows(h, self.chain, mask) for h in streams]
        self.rows.update(rows, read, weights, first=first * max(1, len(self.chain.class_tokens)))

    def _taken(self, positions: int, first: int, stride: int) -> tuple[Tensor, Tensor]:
        """Return the positions that are taken, and the weight of each."""
        read = {*self.chain.class_tokens, *range(self.chain.reads)}
        others = [p for p in range(positions) if p not in read]
        kept = others[first % stride :: stride] or others
        weight = dict.fromkeys(kept, len(others) / max(len(kept), 1)) | dict.fromkeys(read, 1.0)
        taken = sorted(weight)
        return torch.tensor(taken), torch.tensor([weight[p] for p in taken])

    def __add__(self, other: ChainProfile) -> ChainProfile:
        return ChainProfile(self.chain, self.moments + other.moments, self.rows + other.rows)

    def merged(self, total: Total) -> ChainProfile:
        """Return the statistics of all processes together."""
        return ChainProfile(self.chain, self.moments.merged(total), self.rows.merged(total))

    def state(self, key: str) -> dict[str, Tensor]:
        """Return the tensors of the statistics, by names that start with `key`, for `restore`."""
        parts = {"moments": self.moments.state(), "rows": self.rows.state()}
        return {f"{key}.{p}.{name}": t for p, named in parts.items() for name, t in named.items()}

    def restore(self, key: str, state: Mapping[str, Tensor]) -> None:
        """Load the `state` of statistics of the same chain and window."""
        self.moments.restore(below(f"{key}.moments.", state))
        self.rows.restore(below(f"{key}.rows.", state))


def started(
    chains: Sequence[Chain], window: int | None, device: torch.device | str
) -> tuple[ChainProfile, ...]:
    """Return empty statistics of every chain."""
    return tuple(
        ChainProfile(
            chain,
            Moments(len(chain) + 1, chain.width, window=window, device=device),
            RowSimilarity(len(chain) + 1, chain.width, device),
        )
        for chain in chains
    )


def _read_rows(stream: Tensor, chain: Chain, mask: Tensor | None) -> Tensor:
    """Return the rows that a head reads: the class tokens, (samples * tokens, d), where the chain has
    any; otherwise the mean over positions, (samples, d).
    """
    tokens = stream.movedim(chain.axis, -1)
    if chain.class_tokens:
        return tokens[:, list(chain.class_tokens)].flatten(0, 1)
    tokens = tokens.movedim(chain.sample_axis, 0)
    mask = None if mask is None else mask.movedim(chain.sample_axis, 0)
    tokens = tokens.reshape(len(tokens), -1, tokens.shape[-1])
    if mask is None:
        return tokens.mean(1)
    return (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def states_of(states: Sequence[ChainProfile]) -> dict[str, Tensor]:
    """Return the states of several chains in one mapping."""
    return {name: t for k, state in enumerate(states) for name, t in state.state(str(k)).items()}
