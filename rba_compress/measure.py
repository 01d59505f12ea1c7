"""What a network costs and what it loses: the one implementation of each measure.

MACs are multiply-accumulates of one sample in products of matrices and convolutions, attention
included, counted on a recorded forward pass. Latency is a paired ratio in one run.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats
from torch import Tensor, fx, nn

from rba_compress.batches import Batch, as_batch, compared_outputs
from rba_compress.demand import packet_of
from rba_compress.errors import ActivationError, LoaderError, ModelError
from rba_compress.moments import Total
from rba_compress.offload import device_of, undispatched
from rba_compress.plan import Chain
from rba_compress.ranks import current
from rba_compress.recorder import Recording, evaluating, ran, record
from rba_compress.schema import Frozen
from rba_compress.streams import observe

Divergence = Literal["kl", "nse", "cosine", "given"]
Function = Callable[[Any, Any, Batch], Tensor]
"""A divergence of one's own: the outputs of the dense and of the slim network, as they return them, and
the batch -> the divergence of each sample, (N,), at least 0."""

DIVERGENCES = {
    "kl": "KL divergence to dense (nats)",
    "nse": "squared error to dense",
    "cosine": "1 - cosine to dense",
    "given": "divergence to dense",
}

_aten = torch.ops.aten
_PASSED = {
    _aten.view,
    _aten._unsafe_view,
    _aten.squeeze,
    _aten._to_copy,
    _aten.alias,
    _aten.add,
    _aten.div,
    _aten.mul,
    _aten._log_softmax,
}
_SCALED = {_aten.div, _aten.mul}
_PRODUCTS = {_aten.addmm, _aten.mm, _aten.linear, _aten.convolution}


class Cost(Frozen):
    """Of one sample, and of the network."""

    macs: int
    params: int


class Latency(Frozen):
    """A paired comparison: dense, slim, dense, slim, ... in one run."""

    dense_ms: float
    """Median of the dense runs."""
    slim_ms: float
    ratio: float
    """Median of slim/dense, pair by pair."""
    ratio_low: float
    """Its quartiles."""
    ratio_high: float
    pairs: int
    batch: int
    """Samples in a run."""
    device: str


class Fidelity(Frozen):
    """The slim network against the dense one, on samples that nothing was chosen on."""

    samples: int
    kind: Divergence
    divergence: float
    """Mean over samples of `kl`, KL(dense || slim) in nats, of each token where the output is of
    tokens; `nse`, ||dense - slim||^2 / ||dense||^2; `cosine`, 1 minus it; or what a function gave."""
    divergence_low: float | None = None
    """Its 95 % interval, by the bootstrap over samples."""
    divergence_high: float | None = None
    agreement: float | None
    """Share of equal argmax; None where the output is no class scores."""
    agreement_low: float | None = None
    """Its 95 % interval, as of the divergence."""
    agreement_high: float | None = None
    cosine: float
    """Mean cosine of the two outputs."""
    accuracy_dense: float | None
    """None where no labels came."""
    accuracy_slim: float | None
    drop_low: float | None = None
    """The 95 % interval of `accuracy_drop`, of samples in pairs."""
    drop_high: float | None = None

    @property
    def accuracy_drop(self) -> float | None:
        """None where no labels came."""
        if self.accuracy_dense is None or self.accuracy_slim is None:
            return None
        return self.accuracy_dense - self.accuracy_slim


def kept(part: float, whole: float) -> float:
    """What is left of a cost, as a share; all of it, where there was none."""
    return part / whole if whole else 1.0


def cost(model: nn.Module, batch: Batch) -> Cost:
    """MACs of one sample and the number of parameters (shared ones once)."""
    model = undispatched(model)
    parameters = sum(p.numel() for p in model.parameters())
    sample = batch.to(model).select(list(range(min(2, len(batch)))))
    return Cost(macs=record(model, sample).macs, params=parameters)


def output_shape(recording: Recording, model: nn.Module) -> tuple[int, ...]:
    """The shape of what a slim network is measured by: `logits`, or the first floating-point output.

    Raises:
        ModelError: there is none, or its first dimension does not count samples.
    """
    kind, named = type(model).__name__, recording.outputs.items()
    floats = [(path, n.meta["shape"]) for path, n in named if n.meta["dtype"].is_floating_point]
    if not floats:
        found = ", ".join(str(node.meta["dtype"]) for _, node in named) or "no tensor"
        raise ModelError(
            f"the output of {kind} holds no floating-point tensor ({found}): there is nothing to "
            "measure a slim network by"
        )
    shape: tuple[int, ...] = next((s for p, s in floats if p[-1:] == ("logits",)), floats[0][1])
    if shape[:1] != (recording.samples,):
        raise ModelError(
            f"{kind} gives an output of shape {shape} for {recording.samples} samples: what is lost is "
            "measured sample by sample. Let its output have one row a sample"
        )
    return shape


def require_labels(labels: Tensor | None, classes: int) -> None:
    """
    Raises:
        LoaderError: a label is of none of the model's classes.
    """
    if labels is None or not len(labels):
        return
    worst = next((v for v in (int(labels.min()), int(labels.max())) if not 0 <= v < classes), None)
    if worst is not None:
        raise LoaderError(
            f"a batch holds the label {worst}, the model has {classes} classes (0 to {classes - 1}): "
            "map the labels to them, or yield the inputs alone"
        )


def output_kind(recording: Recording) -> Divergence:
    """`kl` where the output comes from a linear layer and is (N, classes), also where it is
    (N, T, classes) and is called `logits`; sums, means of heads and a log-softmax behind the layer do
    not matter. `cosine` of any other (N, d), an embedding; `nse` of feature maps, of several outputs
    and all the rest.
    """
    named = recording.outputs.items()
    logits = next((n for path, n in named if path[-1:] == ("logits",)), None)
    floats = [(p, n) for p, n in named if n.meta["dtype"].is_floating_point]
    node = logits or next((n for _, n in floats), None)
    # Feature maps at several depths, say; what lies deeper is a key-value cache.
    if logits is None and sum(len(p) < 3 and len(n.meta["shape"]) > 1 for p, n in floats) > 1:
        return "nse"
    wanted = (2,) if logits is None else (2, 3)
    if node is None or len(node.meta["shape"]) not in wanted or node.meta["shape"][-1] < 2:
        return "nse"
    other: Divergence = "cosine" if len(node.meta["shape"]) == 2 else "nse"
    while packet_of(node) in _PASSED:
        source, *others = node.args
        # Scores over a temperature are scores; a vector over its own length is a direction.
        tensors = [n for n in others if isinstance(n, fx.Node)]
        scaled = packet_of(node) in _SCALED and any(math.prod(n.meta["shape"]) > 1 for n in tensors)
        if scaled or not isinstance(source, fx.Node):
            break
        node = source
    return "kl" if packet_of(node) in _PRODUCTS else other


def divergence(kind: Divergence, dense: Tensor, slim: Tensor, counted: Tensor | None = None) -> Tensor:
    """The divergence of each sample, (N,) float64.

    Args:
        kind: all but `given`.
        dense, slim: (N, ..., classes or features).
        counted: (N, T) of outputs (N, T, ...), true at the positions that count: not at padding.
    """
    if kind == "kl" and dense.ndim == 2:
        return _token_kl(dense, slim)
    if kind == "kl":
        # Sample by sample: copies of all logits of a language model are more than the network.
        found = [_token_kl(p, q) for p, q in zip(dense, slim, strict=True)]
        each = torch.stack(found).reshape(len(dense), -1)
        weight = torch.ones_like(each) if counted is None else counted.to(each).reshape(each.shape)
        return (each * weight).sum(1) / weight.sum(1).clamp_min(1)
    dense, slim = dense.double(), slim.double()
    if counted is not None:
        kept = counted.reshape(*counted.shape, *[1] * (dense.ndim - 2))
        dense, slim = dense * kept, slim * kept
    dense, slim = dense.reshape(len(dense), -1), slim.reshape(len(slim), -1)
    tiny = torch.finfo(dense.dtype).tiny
    if kind == "cosine":
        return 1 - torch.cosine_similarity(dense, slim, eps=tiny)
    return (dense - slim).square().sum(1) / dense.square().sum(1).clamp_min(tiny)


def _token_kl(dense: Tensor, slim: Tensor) -> Tensor:
    """KL(dense || slim) over the last dimension, in float64.

    Over a vocabulary in float32, good to 1e-6: there float64 takes as long as the network.
    """
    wide = torch.float32 if dense.shape[-1] > 4096 else torch.float64
    log_p, log_q = dense.to(wide).log_softmax(-1), slim.to(wide).log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64)


@dataclass(frozen=True)
class Criterion:
    """How far a slim network's output is from the dense one's."""

    kind: Divergence
    function: Function | None = None
    """Of `given` alone."""

    def kept(self, output: Any) -> Any:
        """What of a network's output is compared."""
        return output if self.kind == "given" else compared_outputs(output)

    def __call__(self, dense: Any, slim: Any, batch: Batch) -> Tensor:
        """The divergence of each sample, (N,) float64; of several outputs, their mean.

        Args:
            dense, slim: what `kept` gave.
            batch: what they were computed from; padding in its mask does not count.

        Raises:
            ActivationError: a function did not give one number a sample.
        """
        if self.function is None:
            pairs = zip(dense, slim, strict=True)
            each = [divergence(self.kind, a, b, real_tokens(batch, a)) for a, b in pairs]
            return torch.stack(each).mean(0)
        found = self.function(dense, slim, batch)
        if not isinstance(found, Tensor) or found.shape != (len(batch),):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ActivationError(
                f"the divergence function gave {shape} for {len(batch)} samples: return a tensor (N,)"
            )
        return found.double()


def real_tokens(batch: Batch, output: Tensor) -> Tensor | None:
    """Where an output (N, T, ...) is of real tokens, (N, T), true there; None where all count."""
    mask = batch.padding(decoder=True)
    if mask is None or output.ndim < 3 or mask.shape != output.shape[:2]:
        return None
    return mask.to(output.device)


def gap(wanted: Tensor, found: Tensor) -> tuple[float, float]:
    """The largest difference of two outputs, and its share of the largest absolute value wanted.

    Infinite where shapes differ, or where something else than zeros is found for zeros; NaN where
    either holds one, which is below no tolerance.
    """
    if wanted.shape != found.shape:
        return math.inf, math.inf
    if not wanted.numel():
        return 0.0, 0.0
    a, b = wanted.detach().cpu().double(), found.detach().cpu().double()
    apart, scale = float((a - b).abs().max()), float(a.abs().max())
    if scale == 0:
        return apart, math.inf if apart else 0.0
    return apart, apart / scale


def scored(dense: Tensor, slim: Tensor, labels: Tensor | None, counted: Tensor | None = None) -> Tensor:
    """What two networks' class scores (N, ..., classes) are worth, sample by sample.

    Args:
        labels: (N,) integers, which count where a sample has one argmax.
        counted: as in `divergence`.

    Returns:
        (N, 3) float64: whether they agree (a share where there are tokens), and whether each is right;
        NaN where that is not known.

    Raises:
        LoaderError: as `require_labels`.
    """
    first, second = dense.argmax(-1), slim.argmax(-1)
    equal = (first == second).double().reshape(len(first), -1)
    weight = torch.ones_like(equal) if counted is None else counted.to(equal).reshape(equal.shape)
    agreed = (equal * weight).sum(1) / weight.sum(1).clamp_min(1)
    if labels is None or labels.shape != first.shape:
        right = [torch.full_like(agreed, torch.nan)] * 2
    else:
        require_labels(labels, dense.shape[-1])
        right = [(found == labels.to(found.device)).double() for found in (first, second)]
    return torch.stack([agreed, *right], 1)


@dataclass
class Tally:
    """Counts over batches of class scores (N, ..., classes) of two networks."""

    samples: int = 0
    agreed: float = 0.0
    labelled: int = 0
    right_dense: int = 0
    right_slim: int = 0

    def add(
        self, dense: Tensor, slim: Tensor, labels: Tensor | None, counted: Tensor | None = None
    ) -> None:
        """One batch; labels are (N,) integers, and count where a sample has one argmax. `counted` as
        in `divergence`."""
        agreed, first, second = scored(dense, slim, labels, counted).unbind(1)
        self.samples += len(agreed)
        self.agreed += float(agreed.sum())
        if not bool(first.isnan().any()):
            self.labelled += len(first)
            self.right_dense += int(first.sum())
            self.right_slim += int(second.sum())

    def merged(self, total: Total) -> Tally:
        """The counts of all processes."""
        own = torch.tensor(astuple(self), dtype=torch.float64)
        samples, agreed, *counts = total(own).tolist()
        return Tally(int(samples), agreed, *map(int, counts))

    @property
    def agreement(self) -> float | None:
        """Share of equal argmax; None where nothing was counted."""
        return self.agreed / self.samples if self.samples else None

    def accuracy(self, right: int) -> float | None:
        """`right` as a share; None where a sample had no label."""
        return right / self.samples if self.samples and self.labelled == self.samples else None

    @property
    def accuracy_drop(self) -> float | None:
        """What the slim network gets right less, as a share."""
        return self.accuracy(self.right_dense - self.right_slim)


@dataclass(frozen=True)
class Compared:
    """One batch of outputs against another, sample by sample."""

    dense: Any
    slim: Any
    batch: Batch
    rows: Tensor
    """(N, 5) float64 on the CPU: divergence, cosine, and what `scored` gives; NaN where not known."""


def compare_outputs(
    criterion: Criterion | Divergence,
    outputs: Iterable[tuple[Any, Any, Batch]],
    watch: Callable[[Compared], None] | None = None,
) -> Fidelity:
    """Compare batches of (dense output, slim output, batch), those of all ranks together.

    Accuracy is reported where every batch has labels and the outputs are class scores.

    Args:
        watch: is told of each batch.
    """
    how = criterion if isinstance(criterion, Criterion) else Criterion(criterion)
    found: list[Tensor] = []
    for dense, slim, batch in outputs:
        a, b = ([t.float().cpu() for t in compared_outputs(output)] for output in (dense, slim))
        each = how(a, b, batch) if how.function is None else how(dense, slim, batch)
        columns = [each.cpu()[:, None], 1 - Criterion("cosine")(a, b, batch)[:, None]]
        if how.kind == "kl":
            columns.append(scored(a[0], b[0], batch.labels, real_tokens(batch, a[0])))
        else:
            columns.append(torch.full((len(each), 3), torch.nan, dtype=torch.float64))
        found.append(torch.cat(columns, 1))
        if watch is not None:
            watch(Compared(dense, slim, batch, found[-1]))
    rows = torch.cat(current().gathered(torch.cat([torch.zeros(0, 5, dtype=torch.float64), *found])))
    diverged, cosine, agreed, *right = rows.unbind(1)
    low, high = interval(diverged)
    agreed_low, agreed_high = interval(agreed)
    drop_low, drop_high = interval(right[0] - right[1])
    return Fidelity(
        samples=len(rows),
        kind=how.kind,
        divergence=float(diverged.mean()),
        divergence_low=low,
        divergence_high=high,
        agreement=_known_mean(agreed),
        agreement_low=agreed_low,
        agreement_high=agreed_high,
        cosine=float(cosine.mean()),
        accuracy_dense=_known_mean(right[0]),
        accuracy_slim=_known_mean(right[1]),
        drop_low=drop_low,
        drop_high=drop_high,
    )


def _known_mean(values: Tensor) -> float | None:
    return None if bool(values.isnan().any()) else float(values.mean())


def interval(values: Tensor) -> tuple[float | None, float | None]:
    """The 95 % percentile bootstrap interval of a mean over samples (Efron 1979); 2,000 resamples."""
    if len(values) < 2 or not bool(torch.isfinite(values).all()):
        return None, None
    found = stats.bootstrap(
        (values.numpy(),),
        np.mean,
        n_resamples=2000,
        method="percentile",
        batch=max(1, 10_000_000 // len(values)),
        random_state=0,
    ).confidence_interval
    return float(found.low), float(found.high)


def fidelity(
    dense: nn.Module,
    slim: nn.Module,
    batches: Iterable[Batch],
    criterion: Criterion | Divergence,
    watch: Callable[[Compared], None] | None = None,
) -> Fidelity:
    """Run two networks, in any mode and on any device, on the same batches and compare.

    Args:
        watch: is told of each batch.

    Raises:
        ModelError: a forward pass fails.
        ActivationError: the output of the dense network holds NaN or infinity.
    """

    def outputs() -> Iterator[tuple[Any, Any, Batch]]:
        for batch in batches:
            moved = batch.to(dense)
            wanted = ran(dense, moved)
            if not all(bool(t.isfinite().all()) for t in compared_outputs(wanted)):
                raise ActivationError("the model's output holds NaN or infinity on held-out samples")
            yield wanted, ran(slim, batch.to(slim)), moved

    with evaluating(dense), evaluating(slim):
        return compare_outputs(criterion, outputs(), watch)


def benchmark(
    dense: nn.Module, slim: nn.Module, example: Any, *, seconds: float = 1.0, pairs: int = 7
) -> Latency:
    """Time two networks in pairs on one batch, after a warm-up of two.

    Args:
        dense, slim: on one device, in any mode; they run in eval mode.
        example: one batch in any form that a loader may yield.
        seconds: go on for about as long.
        pairs: but take at least so many, and no fewer than 2.
    """
    batch = example if isinstance(example, Batch) else as_batch(example)
    inputs = {id(dense): batch.to(dense), id(slim): batch.to(slim)}
    device = device_of(dense)
    clock = _clock(dense)

    def once(model: nn.Module) -> float:
        start = clock()
        inputs[id(model)].run(model)
        return clock() - start

    times: list[tuple[float, float]] = []
    with evaluating(dense), evaluating(slim):
        for _ in range(2):
            once(dense), once(slim)
        end = time.perf_counter() + seconds
        while len(times) < max(pairs, 2) or time.perf_counter() < end:
            times.append((once(dense), once(slim)))
    ratios = [slim_time / dense_time for dense_time, slim_time in times]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Latency(
        dense_ms=1e3 * statistics.median(t for t, _ in times),
        slim_ms=1e3 * statistics.median(t for _, t in times),
        ratio=middle,
        ratio_low=low,
        ratio_high=high,
        pairs=len(times),
        batch=len(batch),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    )


def block_times(
    model: nn.Module, chains: Sequence[Chain], batch: Batch, *, passes: int = 7
) -> list[list[float]]:
    """Of each chain, the shares of its blocks in the network's time, the median over passes.

    A block is compared with the pass that it is part of: a pass that something else slowed down is
    slow as a whole.
    """
    moved, clock = batch.to(model), _clock(model)
    shares: list[list[list[float]]] = []
    with evaluating(model):
        for _ in range(passes + 1):
            start = clock()
            reached = observe(model, chains, moved, clock=clock).times
            whole = clock() - start
            shares.append([[(at[b + 1] - at[b]) / whole for b in range(len(at) - 1)] for at in reached])
    # The first pass is a warm-up.
    return [
        [statistics.median(seen[c][b] for seen in shares[1:]) for b in range(len(chain))]
        for c, chain in enumerate(chains)
    ]


def _clock(model: nn.Module) -> Callable[[], float]:
    """Seconds, read when the model's device has done its work."""
    device = device_of(model)

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock
