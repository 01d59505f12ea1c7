"""One pass over the calibration data: everything that the fits, the search and the plots need."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rba_compress.batches import Batch, Split
from rba_compress.chains import discover, require_chains
from rba_compress.errors import ActivationError
from rba_compress.measure import Cost, Criterion, Function, output_kind
from rba_compress.moments import Moments
from rba_compress.offload import loaded, undispatched
from rba_compress.plan import Chain, Config, Refusal
from rba_compress.recorder import Recording, evaluating, unwrap
from rba_compress.similarity import Metric, RowSimilarity, matrix
from rba_compress.streams import as_rows, attention_mask, run_with_streams


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
    batches = tqdm(split.part("fit"), "profile", unit="batch", disable=None)
    states, samples = calibrate(model, support.chains, batches, window=config.window)
    return Profile(
        model=type(model).__name__,
        weights=fingerprint(model),
        chains=states,
        refusals=support.refusals,
        dense=Cost(macs=recording.macs, params=sum(p.numel() for p in model.parameters())),
        criterion=_criterion(recording, config, divergence),
        samples=samples,
        config=config,
        example=example,
        order=tuple(split.order),
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
    batches: Iterable[Batch],
    *,
    window: int | None = None,
) -> tuple[tuple[ChainProfile, ...], int]:
    """Run `model` over the batches and fold the streams of every chain; returns the samples, too.

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
        for batch in batches:
            moved = batch.to(model)
            _, streams = run_with_streams(model, chains, moved)
            for state, boundaries in zip(states, streams, strict=True):
                _fold(state, [h.to(device) for h in boundaries], attention_mask(moved, state.chain))
            if samples == 0:
                _require_finite(states)
            samples += len(batch)
    _require_finite(states)
    return states, samples


def _accumulator_device(model: nn.Module) -> torch.device:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "mps" else device  # which has no float64


def _fold(state: ChainProfile, streams: list[Tensor], mask: Tensor | None) -> None:
    axis = state.chain.axis
    rows = [as_rows(h, axis, mask) for h in streams]
    state.moments.update(rows)
    state.rows.update(rows, [_read_rows(h, state.chain, mask) for h in streams])


def _read_rows(stream: Tensor, chain: Chain, mask: Tensor | None) -> Tensor:
    """What a head reads: the class tokens' rows, otherwise the mean over positions, (samples, d)."""
    tokens = stream.movedim(chain.axis, -1)
    if chain.class_tokens:
        return tokens[:, list(chain.class_tokens)].flatten(0, 1)
    tokens = tokens.reshape(len(tokens), -1, tokens.shape[-1])
    if mask is None or mask.shape != tokens.shape[:2]:
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
