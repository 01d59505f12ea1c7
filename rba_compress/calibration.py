"""One pass over the calibration data: everything that the fits, the search and the plots need."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rba_compress.batches import Batch, Split
from rba_compress.chains import discover, require_chains
from rba_compress.errors import ActivationError
from rba_compress.measure import Cost, Criterion, Function, output_kind
from rba_compress.moments import Moments, Total
from rba_compress.offload import loaded, undispatched
from rba_compress.plan import Chain, Config, Refusal
from rba_compress.ranks import current
from rba_compress.recorder import Recording, evaluating, unwrap
from rba_compress.similarity import Metric, RowSimilarity, matrix
from rba_compress.streams import as_rows, attention_mask, run_with_streams

DENSE = 16
"""So many rows a channel are profiled before positions are left out."""


@dataclass(frozen=True, eq=False)
class ChainProfile:
    """One chain and what calibration saw of it."""

    chain: Chain
    moments: Moments
    rows: RowSimilarity

    def similarity(self, metric: Metric) -> Tensor:
        """How alike its boundaries are: (blocks + 1, blocks + 1), float64."""
        return matrix(metric, self.moments, self.rows)

    @property
    def block_redundancy(self) -> list[float]:
        """The paper's Block Redundancy of each block; higher is more redundant."""
        return [float(value) for value in self.similarity("redundancy").diagonal(1)]

    def update(
        self, streams: Sequence[Tensor], mask: Tensor | None, *, first: int = 0, stride: int = 1
    ) -> None:
        """Fold in the streams of one batch.

        Args:
            mask: (N, positions), true at real tokens.
            first: the number of the batch's first sample.
            stride: once there were `DENSE` rows a channel, one position in so many is taken of those
                that no head reads, and counts for all; which ones moves on from batch to batch.
        """
        axis = self.chain.axis
        shape = streams[0].movedim(axis, -1).shape[:-1]
        positions = shape[1:].numel()
        mask = mask if mask is not None and mask.shape == shape else None
        taken = weights = None
        if stride > 1 and first * positions >= DENSE * self.chain.width:
            taken, weights = self._taken(positions, first, stride)
            weights = weights.repeat(len(streams[0]))
        kept = mask if mask is None or taken is None else mask[:, taken]
        if kept is not None and weights is not None:
            weights = weights[kept.flatten().cpu()]
        rows = [as_rows(h, axis, kept, taken) for h in streams]
        self.moments.update(rows, weights)
        self.rows.update(rows, [_read_rows(h, self.chain, mask) for h in streams], weights)

    def _taken(self, positions: int, first: int, stride: int) -> tuple[Tensor, Tensor]:
        """The positions that are taken, and how often each counts."""
        read = {*self.chain.class_tokens, *range(self.chain.reads)}
        others = [p for p in range(positions) if p not in read]
        kept = others[first % stride :: stride] or others
        weight = dict.fromkeys(kept, len(others) / max(len(kept), 1)) | dict.fromkeys(read, 1.0)
        taken = sorted(weight)
        return torch.tensor(taken), torch.tensor([weight[p] for p in taken])

    def merged(self, total: Total) -> ChainProfile:
        """What all processes saw."""
        return ChainProfile(self.chain, self.moments.merged(total), self.rows.merged(total))


@dataclass(frozen=True, eq=False)
class Profile:
    """What `profile` saw: moments and similarity of every chain, costs, refusals."""

    model: str
    """Class of the model."""
    weights: str
    """SHA-256 of its weights."""
    chains: tuple[ChainProfile, ...]
    refusals: tuple[Refusal, ...]
    dense: Cost
    criterion: Criterion
    """What the search minimises."""
    samples: int
    """Samples that the moments were taken of."""
    config: Config
    example: Batch
    """The loader's first batch, on which costs and latency are taken."""
    order: tuple[int, ...]
    """Digests of the loader's batches; see `Split`."""
    warnings: tuple[str, ...] = ()

    def split(self, loader: Iterable[Any]) -> Split:
        """The parts of the loader that was profiled."""
        return Split(loader, self.config.seed, self.order)

    def __repr__(self) -> str:
        chains = ", ".join(f"{p.chain.name} ({len(p.chain)} blocks)" for p in self.chains)
        return (
            f"Profile({self.model}: {chains}; {self.samples} samples, "
            f"{self.dense.macs / 1e6:.1f} MMACs, {self.dense.params / 1e6:.2f} M parameters)"
        )


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a state dict, read one by one."""
    digest = hashlib.sha256()
    for name, tensor in sorted(undispatched(model).state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            flat = loaded(tensor).detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(flat.numpy().data)
    return digest.hexdigest()


@torch.inference_mode(False)
def profile(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    config: Config | None = None,
    divergence: Function | None = None,
) -> Profile:
    """Find the chains of `model` and take the joint moments of their boundaries in one pass.

    Args:
        model: any `nn.Module` or `fx.GraphModule`, in any mode, on any device; left as it is.
        loader: batches as in `rba_compress.batches`; half of the samples is used, the rest is
            held out for `search` and the report.
        config: `window`, `divergence` and `seed` matter here.
        divergence: a function of one's own in place of `config.divergence`: of the two networks'
            outputs and the batch, the divergence of each sample, (N,).

    Raises:
        LoaderError: the loader is empty, one-shot, too small or of changing kind.
        ModelError: the model cannot be analysed; NoChainError: nothing in it can be replaced.
        ActivationError: activations hold NaN or infinity.
    """
    config = config or Config()
    model = undispatched(unwrap(model))
    split = Split(loader, config.seed)
    example = split.first()
    support, recording = discover(model, example)
    require_chains(support, model)
    ranks, weights = split.ranks, fingerprint(model)
    if ranks.count > 1:
        ranks.require_equal("model", int(weights[:15], 16))
        ranks.require_equal("loader", example.digest())
        ranks.require_equal("config", zlib.crc32(config.model_dump_json().encode()))
    dealt = ((places[0], batch) for _, places, batch in split.deal("fit"))
    states, samples = calibrate(
        model,
        support.chains,
        ranks.bar(dealt, "profile", unit="batch"),
        window=config.window,
        stride=config.stride,
    )
    return Profile(
        model=type(model).__name__,
        weights=weights,
        chains=states,
        refusals=support.refusals,
        dense=Cost(macs=recording.macs, params=sum(p.numel() for p in model.parameters())),
        criterion=_criterion(recording, config, divergence),
        samples=samples,
        config=config,
        example=example,
        order=split.order(),
        warnings=_warnings(states),
    )


def _criterion(recording: Recording, config: Config, function: Function | None) -> Criterion:
    if function is not None:
        return Criterion("given", function)
    kind = config.divergence
    return Criterion(output_kind(recording) if kind == "auto" else kind)


def calibrate(
    model: nn.Module,
    chains: Sequence[Chain],
    batches: Iterable[tuple[int, Batch]],
    *,
    window: int | None = None,
    stride: int = 1,
) -> tuple[tuple[ChainProfile, ...], int]:
    """Run `model` over the batches and fold the streams of every chain; returns the samples, too.

    Where several ranks work together, `batches` are one's own, and what comes back is of all of them.

    Args:
        batches: the number of each one's first sample, and the batch.
        window: of `Moments`.
        stride: of `ChainProfile.update`.

    Raises:
        ActivationError: a stream holds NaN or infinity.
    """
    device = _accumulator_device(model)
    states = tuple(
        ChainProfile(
            chain,
            Moments(len(chain) + 1, chain.width, window=window, device=device),
            RowSimilarity(len(chain) + 1, device),
        )
        for chain in chains
    )
    samples = 0
    with evaluating(model):
        for first, batch in batches:
            moved = batch.to(model)
            _, streams = run_with_streams(model, chains, moved)
            for state, boundaries in zip(states, streams, strict=True):
                mask = attention_mask(moved, state.chain)
                state.update([h.to(device) for h in boundaries], mask, first=first, stride=stride)
            if samples == 0:
                _require_finite(states)
            samples += len(batch)
    ranks = current()
    if ranks.count > 1:
        states = tuple(state.merged(ranks.total) for state in states)
        samples = int(ranks.sum(samples))
    _require_finite(states)
    return states, samples


def _accumulator_device(model: nn.Module) -> torch.device:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "mps" else device  # which has no float64


def _read_rows(stream: Tensor, chain: Chain, mask: Tensor | None) -> Tensor:
    """What a head reads: the class tokens' rows, otherwise the mean over positions, (samples, d)."""
    tokens = stream.movedim(chain.axis, -1)
    if chain.class_tokens:
        return tokens[:, list(chain.class_tokens)].flatten(0, 1)
    tokens = tokens.reshape(len(tokens), -1, tokens.shape[-1])
    if mask is None:
        return tokens.mean(1)
    return (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def _require_finite(states: Iterable[ChainProfile]) -> None:
    for state in states:
        blocks = state.chain.blocks
        for j, comoment in enumerate(state.moments.comoment):
            power = comoment[-1].diagonal()
            if not bool(torch.isfinite(power).all() & torch.isfinite(state.moments.mean[j]).all()):
                where = f"the output of {blocks[j - 1].path}" if j else f"the input of {blocks[0].path}"
                raise ActivationError(
                    f"{where} holds NaN or infinity: check the calibration samples; in float16, run "
                    "the model in bfloat16 or float32"
                )


def _warnings(states: Iterable[ChainProfile]) -> tuple[str, ...]:
    return tuple(
        f"chain {s.chain.name}: {s.moments.n:.0f} rows for {s.chain.width} channels; its maps are "
        "decided by the damping. Pass more samples"
        for s in states
        if s.moments.n <= s.chain.width
    )
