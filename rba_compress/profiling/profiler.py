"""Profiling: one pass over the calibration data for all that the fits, search and plots need."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from rba_compress.core.batch import Batch, Form
from rba_compress.core.config import Config, StoredConfig
from rba_compress.core.cost import Cost
from rba_compress.core.distributed import Ranks, current
from rba_compress.core.errors import ActivationError, ArtifactError, ModelError, PlanError
from rba_compress.core.inference import evaluating, unwrap
from rba_compress.core.io import below, read_tensors, tensor_digest, write_tensors
from rba_compress.core.loader import Split, workers_named
from rba_compress.core.loader_form import form_of
from rba_compress.core.memory import device_bytes, within_memory
from rba_compress.core.offload import device_of, loaded, undispatched
from rba_compress.core.plan import Chain, ComparedOutput, Divergence, Refusal, in_order
from rba_compress.core.schema import Frozen
from rba_compress.core.tables import html_table
from rba_compress.core.weight_types import require_plain_weights
from rba_compress.graph.activations import attention_mask, run_with_streams
from rba_compress.graph.discovery import require_chains
from rba_compress.linalg.moments import moment_bytes
from rba_compress.profiling.chain_statistics import ChainProfile, started, states_of
from rba_compress.profiling.cost import cost
from rba_compress.profiling.criterion import require_criterion
from rba_compress.profiling.fidelity import (
    Criterion,
    Function,
    Metric,
    OutputScales,
)
from rba_compress.profiling.search_record import SavedRecord, SearchRecord
from rba_compress.units.block_variants import Traces
from rba_compress.units.offers import discover

EVERY = 30.0
"""Seconds between checkpoints."""


class SavedProfile(Frozen):
    """The JSON header of a saved profile."""

    former: ClassVar[Mapping[str, str]] = {"dense": "original"}

    schema_version: Literal[3] = 3
    model: str
    weights: str
    chains: tuple[Chain, ...]
    fixed: tuple[Chain, ...] = ()
    window: int | None
    refusals: tuple[Refusal, ...]
    original: Cost
    divergence: Divergence
    outputs: tuple[ComparedOutput, ...]
    form: Form
    notes: tuple[str, ...]
    samples: int
    config: StoredConfig
    order: tuple[int, ...]
    lengths: tuple[int, ...]
    keywords: dict[str, JsonValue]
    warnings: tuple[str, ...]
    record: SavedRecord = SavedRecord()


class Checkpoint(Frozen):
    """The JSON header of an unfinished profile."""

    schema_version: Literal[3] = 3
    weights: str
    loader: int
    config: StoredConfig
    rank: tuple[int, int]
    """Rank of the process, and the number of ranks."""
    batches: int
    samples: int


@dataclass(frozen=True, eq=False)
class Profile:
    """Result of `profile`: moments and similarity of every chain, costs, refusals."""

    model: str
    """Class of the model."""
    weights: str
    """SHA-256 of its weights."""
    chains: tuple[ChainProfile, ...]
    refusals: tuple[Refusal, ...]
    original: Cost
    criterion: Criterion
    """Divergence that the search minimises."""
    samples: int
    """Number of samples in the moments."""
    config: Config
    example: Batch
    """The loader's first batch, on which costs and latency are measured."""
    order: tuple[int, ...]
    """Digests of the loader's batches; see `Split`."""
    lengths: tuple[int, ...]
    """Number of samples of the loader, or of each loader in a sum of profiles."""
    window: int | None = None
    """Length of the longest span whose moments were kept; None keeps all."""
    form: Form = field(default_factory=Form)
    """Roles of a batch's items: inputs and labels."""
    notes: tuple[str, ...] = ()
    """Interpretation of a batch's items and of the output, one note a line."""
    warnings: tuple[str, ...] = ()
    traces: Traces = field(default_factory=Traces, repr=False)
    """Traced blocks of the model, for the search; no file holds them."""
    record: SearchRecord = field(default_factory=SearchRecord, repr=False)
    """Networks that searches of this profile evaluated: a search for another budget continues there."""
    fixed: tuple[Chain, ...] = ()
    """Blocks that can only be narrowed, each as a chain for itself."""

    @property
    def in_order(self) -> list[Chain]:
        """All chains in the order in which they run."""
        return in_order([profiled.chain for profiled in self.chains], self.fixed)

    def split(self, loader: Iterable[Any]) -> Split:
        """Return the parts of the profiled loader; of a sum, pass its loaders one behind the other."""
        how, stretch = (self.config.seed, self.order, self.lengths, self.form), self.config.stretch
        return Split(loader, *how, stretch=stretch)

    def __add__(self, other: Profile) -> Profile:
        """Return the profile of both loaders, one behind the other.

        Raises:
            PlanError: the profiles differ in weights, chains, settings or batch sizes.
        """
        for what in ("model", "weights", "window", "config", "original", "form"):
            if getattr(self, what) != getattr(other, what):
                raise PlanError(f"the two profiles differ in their {what}: profile both alike")
        kinds = [[(o.name, o.divergence) for o in p.criterion.outputs] for p in (self, other)]
        given = [(p.criterion.function, p.criterion.metrics) for p in (self, other)]
        if kinds[0] != kinds[1] or given[0] != given[1]:
            raise PlanError("the two profiles differ in their criterion: profile both alike")
        pairs = list(zip(self.chains, other.chains, strict=True))
        of_rows = {*_warnings(self.chains), *_warnings(other.chains)}
        others = [w for w in (*self.warnings, *other.warnings) if w not in of_rows]
        return replace(
            self,
            chains=tuple(a + b for a, b in pairs),
            samples=self.samples + other.samples,
            order=self.order + other.order,
            lengths=self.lengths + other.lengths,
            record=SearchRecord(),
            warnings=(*dict.fromkeys(others), *_warnings([a + b for a, b in pairs])),
        )

    def save(self, path: str | Path) -> None:
        """Write the profile to one safetensors file with a JSON header; only the first rank writes.

        The file holds the loader's first batch, because costs and latency are measured on it, and no
        metrics, which are functions.

        Raises:
            ArtifactError: the file cannot be written, or the divergence is a function, which no file
                can hold.
        """
        if not current().leads:
            return
        if self.criterion.function is not None:
            raise ArtifactError("the profile's divergence is a function: a file cannot hold it")
        keywords, example = self.example.state()
        record, evaluated = self.record.state()
        own = {name: getattr(self, name) for name in SavedProfile.model_fields if hasattr(self, name)}
        chains = [p.chain for p in self.chains]
        header = SavedProfile(
            **own | {"chains": chains, "divergence": self.criterion.kind, "record": record},
            outputs=self.criterion.outputs,
            keywords=keywords,
        )
        tensors = {f"example.{name}": tensor for name, tensor in example.items()}
        tensors |= {f"record.{name}": tensor for name, tensor in evaluated.items()}
        write_tensors(Path(path), header, tensors | states_of(self.chains))

    @staticmethod
    def load(path: str | Path, *, device: torch.device | str = "cpu") -> Profile:
        """Return a saved profile, its moments on a device.

        Raises:
            ArtifactError: the file is missing, not a profile, or not what was saved.
        """
        header, tensors = read_tensors(Path(path), SavedProfile)
        chains = started(header.chains, header.window, device)
        restore(Path(path), chains, tensors)
        example = below("example.", tensors)
        record = SearchRecord()
        record.restore(header.record, below("record.", tensors))
        own = {n: getattr(header, n) for n in Profile.__dataclass_fields__ if hasattr(header, n)}
        return Profile(
            **own
            | {
                "chains": chains,
                "record": record,
                "criterion": Criterion(header.divergence, None, header.outputs),
                "example": Batch.restored(header.keywords, example, wrapped=header.form.wrapped),
            }
        )

    def __repr__(self) -> str:
        chains = ", ".join(f"{p.chain.name} ({len(p.chain)} blocks)" for p in self.chains)
        return (
            f"Profile({self.model}: {chains}; {self.samples} samples, "
            f"{self.original.macs / 1e6:.1f} MMACs, {self.original.params / 1e6:.2f} M parameters)"
        )

    def _repr_html_(self) -> str:
        head = ("block", "type", "MACs", "parameters", "block redundancy")
        rows = [
            (block.path, block.type, f"{macs:,}", f"{params:,}", f"{redundancy:.4g}")
            for seen in self.chains
            for block, macs, params, redundancy in zip(
                seen.chain.blocks,
                seen.chain.macs,
                seen.chain.params,
                seen.block_redundancy,
                strict=True,
            )
        ]
        return html_table(repr(self), head, rows)


def fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of a state dict, read one by one.

    Raises:
        ModelError: a weight is not a plain tensor.
    """
    require_plain_weights(model)
    named = sorted(undispatched(model).state_dict().items())
    return tensor_digest((name, loaded(t)) for name, t in named if isinstance(t, Tensor))


@workers_named()
def profile(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    config: Config | None = None,
    divergence: Function | None = None,
    metrics: Mapping[str, Metric] | None = None,
    checkpoint: str | Path | None = None,
) -> Profile:
    """Find the chains of `model` and take the joint moments of their boundaries in one pass.

    Args:
        model: any `nn.Module` or `fx.GraphModule`, in any mode, on any device; not changed.
        loader: batches as in `rba_compress.core.loader`; half of the samples is used, the rest is
            held out for `search` and the report.
        config: `window`, `stride`, `memory`, `divergence` and `seed` matter here.
        divergence: a user-defined function in place of `config.divergence`: it maps the two networks'
            outputs and the batch to the divergence of each sample, (N,).
        metrics: metrics of the task by name, which a budget may limit: each maps a network's output and
            the batch to the value of each sample, (N,); higher is better.
        checkpoint: a file that is written twice a minute, and removed at the end. If the file exists at
            the start, profiling resumes from it, with the same result as without an interruption.

    Raises:
        LoaderError: the loader is empty, one-shot, too small or of changing kind.
        ModelError: the model cannot be analysed, or its moments do not fit into memory with any window;
            NoChainError: nothing in it can be replaced.
        MemoryLimitError: memory ran out nevertheless.
        ActivationError: activations hold NaN or infinity.
        ArtifactError: the checkpoint cannot be written, or is of another profile.
    """
    return profiled(
        model, loader, config=config, divergence=divergence, metrics=metrics, checkpoint=checkpoint
    )


@torch.inference_mode(False)
def profiled(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    config: Config | None,
    divergence: Function | None,
    metrics: Mapping[str, Metric] | None,
    checkpoint: str | Path | None,
    require: Callable[[Sequence[Chain]], None] | None = None,
) -> Profile:
    """Profile as `profile` does, and call `require` with the chains before the loader is read."""
    config = Config.of(config) or Config()
    model, traces = undispatched(unwrap(model)), Traces()
    split = Split(loader, config.seed, stretch=config.stretch)
    example = split.first(form_of(model))
    support, recording = discover(
        model, example, traces, config.units, read_outs=not config.keep_features
    )
    criterion, notes = require_criterion(
        model, recording, config, example.labels, function=divergence, metrics=metrics
    )
    require_chains(support, model)
    if require is not None:
        require(support.chains)
    ranks, weights = split.ranks, fingerprint(model)
    if ranks.count > 1:
        _require_equal_ranks(ranks, weights, example, config)
    window, narrowed = _window(support.chains, config, _accumulator_device(model))
    size = _moments_size(support.chains, window)
    scales = OutputScales(criterion)
    with within_memory(_memory_needs(support.chains, len(example), size)):
        states, samples = calibrate(
            model,
            support.chains,
            _fit_batches(split, len(example), size),
            window=window,
            stride=config.stride,
            checkpoint=None if checkpoint is None else _started(checkpoint, weights, example, config),
            scales=scales,
        )
    return Profile(
        model=type(model).__name__,
        weights=weights,
        chains=states,
        fixed=support.fixed,
        refusals=support.refusals,
        original=Cost(macs=recording.macs, params=sum(p.numel() for p in model.parameters())),
        criterion=scales.merged(),
        samples=samples,
        config=config,
        example=example,
        order=split.order(),
        lengths=(split.samples,),
        window=window,
        form=split.form or Form(),
        notes=(str(split.form), *notes),
        traces=traces,
        warnings=(*narrowed, *_copied(*split.copies), *_warnings(states)),
    )


def without_moments(
    model: nn.Module,
    split: Split,
    example: Batch,
    criterion: Criterion,
    *,
    config: Config | None = None,
    refusals: tuple[Refusal, ...] = (),
    notes: tuple[str, ...] = (),
) -> Profile:
    """Return a profile of a loader that was not read, to measure networks by.

    Args:
        split: the split of the loader, whose first batch was read.
        example: that batch.
    """
    assert split.form is not None
    return Profile(
        model=type(model).__name__,
        weights=fingerprint(model),
        chains=(),
        refusals=refusals,
        original=cost(model, example),
        criterion=criterion,
        samples=0,
        config=config or Config(),
        example=example,
        order=(),
        lengths=(),
        form=split.form,
        notes=(str(split.form), *notes),
    )


def _require_equal_ranks(ranks: Ranks, weights: str, example: Batch, config: Config) -> None:
    """
    Raises:
        RankError: ranks were given other models, loaders or settings.
    """
    ranks.require_equal("model", int(weights[:15], 16))
    ranks.require_equal("loader", example.digest())
    ranks.require_equal("config", zlib.crc32(config.model_dump_json().encode()))


def _fit_batches(split: Split, size: int, memory: int) -> Iterable[tuple[int, Batch]]:
    """Return the fit batches behind a bar, each with the index of its first sample."""
    dealt = ((places[0], batch) for _, places, batch in split.deal("fit"))
    said = f"profile of {split.form}, {memory / 2**20:,.0f} MB of moments"
    bar: Iterable[tuple[int, Batch]] = split.ranks.bar(
        dealt, said, split.expected("fit", size), unit="batch"
    )
    return bar


def _memory_needs(chains: Sequence[Chain], samples: int, size: int) -> str:
    """Return what a profile takes of memory, and what to do where that is too much."""
    streams = sum((len(c) + 1) * c.positions * c.width for c in chains) * samples * 4
    return (
        f"the moments take {size:,} bytes, and the streams of {samples} samples {streams:,}, "
        "beside the network. Pass smaller batches, or Config(window=...), or Config(memory=...)"
    )


def _started(
    checkpoint: str | Path, weights: str, example: Batch, config: Config
) -> tuple[Path, Checkpoint]:
    """Return the file of this rank's own checkpoint, and its header before the first batch."""
    ranks = current()
    path = Path(f"{checkpoint}.{ranks.rank}" if ranks.count > 1 else checkpoint)
    header = Checkpoint(
        weights=weights,
        loader=example.digest(),
        config=config,
        rank=(ranks.rank, ranks.count),
        batches=0,
        samples=0,
    )
    return path, header


def calibrate(
    model: nn.Module,
    chains: Sequence[Chain],
    batches: Iterable[tuple[int, Batch]],
    *,
    window: int | None = None,
    stride: int = 1,
    checkpoint: tuple[Path, Checkpoint] | None = None,
    scales: OutputScales | None = None,
) -> tuple[tuple[ChainProfile, ...], int]:
    """Run `model` over the batches and accumulate the statistics of every chain.

    With several ranks, `batches` are those of this rank, and the result is of all ranks.

    Args:
        batches: the index of each batch's first sample, and the batch.
        window: as in `Moments`.
        stride: as in `ChainProfile.update`.
        checkpoint: the file to resume from and to write to, and the header that it must match.
        scales: accumulates the outputs of this rank.

    Returns:
        The statistics of the chains, and the number of samples.

    Raises:
        ActivationError: a stream holds NaN or infinity.
    """
    device = _accumulator_device(model)
    states = started(chains, window, device)
    scales = scales or OutputScales(Criterion("nse"))
    samples = done = 0
    if checkpoint is not None and checkpoint[0].exists():
        done, samples = _resumed(*checkpoint, states, scales)
    written = time.monotonic()
    with evaluating(model):
        for count, (first, batch) in enumerate(batches, start=1):
            if count <= done:
                continue
            moved = batch.to(model)
            output, streams = run_with_streams(model, chains, moved)
            scales.update(output, moved)
            for state, boundaries in zip(states, streams, strict=True):
                mask = attention_mask(moved, state.chain)
                state.update([h.to(device) for h in boundaries], mask, first=first, stride=stride)
            if samples == 0:
                _require_finite(states)
            samples += len(batch)
            if checkpoint is not None and time.monotonic() - written >= EVERY:
                path, header = checkpoint
                header = header.model_copy(update={"batches": count, "samples": samples})
                outputs = {f"outputs.{name}": t for name, t in scales.state().items()}
                write_tensors(path, header, states_of(states) | outputs)
                written = time.monotonic()
    ranks = current()
    if ranks.count > 1:
        states = tuple(state.merged(ranks.total) for state in states)
        samples = int(ranks.sum(samples))
    _require_finite(states)
    if checkpoint is not None:
        checkpoint[0].unlink(missing_ok=True)
    return states, samples


def _resumed(
    path: Path, expected: Checkpoint, states: Sequence[ChainProfile], scales: OutputScales
) -> tuple[int, int]:
    """Load a checkpoint into the states, and return the numbers of batches and samples in it.

    Raises:
        ArtifactError: the checkpoint is of another profile.
    """
    header, tensors = read_tensors(path, Checkpoint)
    if header.model_copy(update={"batches": 0, "samples": 0}) != expected:
        raise ArtifactError(
            f"{path} is the checkpoint of another profile (of other weights, data, settings or number "
            "of processes): name another file, or remove it"
        )
    restore(path, states, tensors, scales)
    return header.batches, header.samples


def restore(
    path: Path,
    states: Sequence[ChainProfile],
    tensors: Mapping[str, Tensor],
    scales: OutputScales | None = None,
) -> None:
    """Load the tensors of a file into the statistics of chains and outputs.

    Raises:
        ArtifactError: the file holds something else.
    """
    try:
        for k, state in enumerate(states):
            state.restore(str(k), tensors)
        if scales is not None:
            scales.restore(below("outputs.", tensors))
    except (KeyError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{path} does not hold the moments of its chains: {error}") from error


def _moments_size(chains: Sequence[Chain], window: int | None) -> int:
    """Return the size of the moments of chains in bytes."""
    return sum(moment_bytes(len(chain) + 1, chain.width, window) for chain in chains)


def _window(
    chains: Sequence[Chain], config: Config, device: torch.device
) -> tuple[int | None, list[str]]:
    """Return the longest span whose moments fit into memory, and a warning if it is not as configured.

    Raises:
        ModelError: not even the moments of single blocks fit.
    """

    size = partial(_moments_size, chains)
    # Machines may differ: take the limit that holds on all of them.
    own = torch.tensor([config.memory or device_bytes(device) // 2])
    limit = int(torch.cat(current().gathered(own)).min())
    asked = config.window
    if size(asked) <= limit:
        return asked, []
    longest = asked or max(map(len, chains))
    fitting = [w for w in range(1, longest + 1) if size(w) <= limit]
    text = (
        f"the moments of {'all spans' if asked is None else f'spans of up to {asked} blocks'} would "
        f"take {size(asked) / 2**20:,.0f} MB of the {limit / 2**20:,.0f} MB that they may (`memory`)"
    )
    if not fitting:
        raise ModelError(f"{text}; those of single blocks {size(1) / 2**20:,.0f} MB: raise `memory`")
    return fitting[-1], [f"{text}: those of spans of up to {fitting[-1]} blocks were taken"]


def _accumulator_device(model: nn.Module) -> torch.device:
    device = device_of(model)
    return torch.device("cpu") if device.type == "mps" else device  # which has no float64


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


def _copied(copies: int, held: int) -> list[str]:
    if not copies:
        return []
    return [
        f"{copies} of {held} held-out samples are copies of samples that are fitted on: what is "
        "measured on them is too good. Remove duplicates"
    ]


def _warnings(states: Iterable[ChainProfile]) -> tuple[str, ...]:
    return tuple(
        f"chain {s.chain.name}: {s.moments.n:.0f} rows for {s.chain.width} channels; its maps are "
        "decided by the damping. Pass more samples"
        for s in states
        if s.moments.n <= s.chain.width
    )
