"""Fidelity of a compressed network to its original: the one implementation of each measure.

The measures are the divergence of outputs, their agreement and cosine, and accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from rba_compress.core.batch import Batch
from rba_compress.core.distributed import current
from rba_compress.core.errors import ActivationError, LoaderError, ModelError
from rba_compress.core.inference import evaluating, ran
from rba_compress.core.outputs import float_outputs, per_sample
from rba_compress.core.plan import ComparedOutput, Divergence
from rba_compress.core.schema import Frozen
from rba_compress.linalg.moments import Spread, Total

LARGE = 4096
"""Classes above which a vocabulary counts as large."""
Function = Callable[[Any, Any, Batch], Tensor]
"""User-defined divergence: the raw outputs of the original and of the compressed network, and the batch
-> the divergence of each sample, (N,), at least 0."""

Metric = Callable[[Any, Batch], Tensor]
"""Metric of the task: the raw output of a network, and the batch -> the value of each sample, (N,);
higher is better."""

DIVERGENCES = {
    "kl": "KL divergence to original (nats)",
    "bernoulli": "Bernoulli KL to original (nats)",
    "nse": "squared error to original",
    "cosine": "1 - cosine to original",
    "given": "divergence to original",
}


class MetricChange(Frozen):
    """Mean of a metric over samples, before and after."""

    original: float
    compressed: float
    drop_low: float | None = None
    """95 % interval of `drop`, over paired samples."""
    drop_high: float | None = None

    @property
    def drop(self) -> float:
        """Metric of the original minus that of the compressed network."""
        return self.original - self.compressed


class Fidelity(Frozen):
    """Fidelity of the compressed network to the original, on samples that no choice was based on."""

    former: ClassVar[Mapping[str, str]] = {
        "accuracy_dense": "accuracy_original",
        "accuracy_slim": "accuracy_compressed",
    }

    samples: int
    kind: Divergence
    divergence: float
    """Mean over samples of the sum over outputs of their divergences (`divergence`); or the mean of a
    user-defined divergence."""
    outputs: dict[str, float] = Field(default_factory=dict)
    """Mean divergence of each output, by name."""
    divergence_low: float | None = None
    """95 % interval of `divergence`, by the bootstrap over samples."""
    divergence_high: float | None = None
    agreement: float | None
    """Share of equal argmax; None where the output is not class scores."""
    agreement_low: float | None = None
    """95 % interval of `agreement`, by the bootstrap over samples."""
    agreement_high: float | None = None
    cosine: float
    """Mean cosine of the two outputs."""
    accuracy_original: float | None
    """Accuracy of the original; None without labels."""
    accuracy_compressed: float | None
    drop_low: float | None = None
    """95 % interval of `accuracy_drop`, over paired samples."""
    drop_high: float | None = None
    metrics: dict[str, MetricChange] = Field(default_factory=dict)
    """Metrics of the task, by name."""

    @property
    def metric_drops(self) -> dict[str, float]:
        """Drop of each metric of the task."""
        return {name: change.drop for name, change in self.metrics.items()}

    @property
    def accuracy_drop(self) -> float | None:
        """Accuracy of the original minus that of the compressed network; None without labels."""
        if self.accuracy_original is None or self.accuracy_compressed is None:
            return None
        return self.accuracy_original - self.accuracy_compressed


def require_labels(labels: Tensor | None, classes: int) -> None:
    """Require integer labels to be classes of the model.

    Raises:
        LoaderError: an integer label is none of the model's classes.
    """
    if labels is None or not len(labels) or labels.ndim != 1 or labels.is_floating_point():
        return
    worst = next((v for v in (int(labels.min()), int(labels.max())) if not 0 <= v < classes), None)
    if worst is not None:
        raise LoaderError(
            f"a batch holds the label {worst}, the model has {classes} classes (0 to {classes - 1}): "
            "map the labels to them, or yield the inputs alone"
        )


def divergence(
    kind: Divergence,
    original: Tensor,
    compressed: Tensor,
    counted: Tensor | None = None,
    *,
    probabilities: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Return the divergence of each sample, (N,) float64.

    With p, q the two outputs of one sample, P = softmax(p) and s the sigmoid:

        kl         sum_c P_c (log P_c - log Q_c), the mean over positions
        bernoulli  sum_c s(p_c) (p_c - q_c) - log(1 + e^p_c) + log(1 + e^q_c), the mean over positions
        nse        ||p - q||^2 / (numbers of p * scale), or / ||p||^2 without a scale
        cosine     1 - <p, q> / (||p|| ||q||)

    Args:
        kind: all but `given`.
        original, compressed: (N, ..., classes or features).
        counted: (N, T) for outputs (N, T, ...): true at the positions that count, false at padding.
        probabilities: true if the outputs are P or s instead of scores.
        scale: as in `ComparedOutput`.
    """
    if kind in ("kl", "bernoulli"):
        each = _token_kl if kind == "kl" else _label_kl
        if original.ndim <= 2:
            return each(
                original.reshape(len(original), -1),
                compressed.reshape(len(compressed), -1),
                probabilities,
            )
        # Sample by sample: copies of all logits of a language model would be larger than the network.
        rows = [each(p, q, probabilities) for p, q in zip(original, compressed, strict=True)]
        values = torch.stack(rows).reshape(len(original), -1)
        weight = torch.ones_like(values) if counted is None else counted.to(values)
        weight = weight.reshape(values.shape)
        return (values * weight).sum(1) / weight.sum(1).clamp_min(1)
    original, compressed = original.double(), compressed.double()
    numbers = torch.full(
        (len(original),), original[:1].numel(), dtype=torch.float64, device=original.device
    )
    if counted is not None:
        kept = counted.reshape(*counted.shape, *[1] * (original.ndim - 2))
        original, compressed = original * kept, compressed * kept
        numbers = counted.double().mean(1) * numbers
    original, compressed = original.reshape(len(original), -1), compressed.reshape(len(compressed), -1)
    tiny = torch.finfo(original.dtype).tiny
    if kind == "cosine":
        return 1 - torch.cosine_similarity(original, compressed, eps=tiny)
    power = original.square().sum(1) if scale is None else scale * numbers
    return (original - compressed).square().sum(1) / power.clamp_min(tiny)


def _token_kl(original: Tensor, compressed: Tensor, probabilities: bool) -> Tensor:
    """Return KL(original || compressed) over the last dimension, in float64.

    A large vocabulary is computed in float32, accurate to 1e-6: float64 would take as long as the
    network.
    """
    wide = torch.float32 if original.shape[-1] > LARGE else torch.float64
    original, compressed = original.to(wide), compressed.to(wide)
    if probabilities:
        original, compressed = (
            t.clamp_min(torch.finfo(wide).tiny).log() for t in (original, compressed)
        )
    log_p, log_q = original.log_softmax(-1), compressed.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64)


def _label_kl(original: Tensor, compressed: Tensor, probabilities: bool) -> Tensor:
    """Return KL(original || compressed) of independent Bernoulli variables, summed over the last
    dimension.
    """
    if probabilities:
        low = torch.finfo(original.dtype).eps  # a sigmoid in float32 is 1 from 17 on
        original, compressed = (t.double().clamp(low, 1 - low).logit() for t in (original, compressed))
    p, q = original.double(), compressed.double()
    each = p.sigmoid() * (p - q) - nn.functional.softplus(p) + nn.functional.softplus(q)
    return each.clamp_min(0).sum(-1)


@dataclass(frozen=True)
class Criterion:
    """Divergence of a compressed network's outputs from the original's, summed over outputs.

    Outputs are summed, not averaged, so that a limit on the sum is a limit on each output.
    """

    kind: Divergence
    """Divergence of the main output."""
    function: Function | None = None
    """User-defined divergence, for `given` alone."""
    outputs: tuple[ComparedOutput, ...] = ()
    """Outputs that are compared; if empty, every floating-point output is compared by `kind`."""
    metrics: Mapping[str, Metric] = field(default_factory=dict, hash=False)
    """Metrics of the task, which are reported and may be limited; no divergence depends on them."""

    def measured(self, output: Any, batch: Batch) -> Tensor:
        """Return the metrics of each sample, (N, metrics) float64 on the CPU.

        Raises:
            ActivationError: a metric did not return one number per sample.
        """
        rows = []
        for name, metric in self.metrics.items():
            given = metric(output, batch)
            if not isinstance(given, Tensor) or given.shape != (len(batch),):
                shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
                raise ActivationError(
                    f"the metric {name!r} gave {shape} for {len(batch)} samples: return a tensor (N,)"
                )
            rows.append(given.detach().double().cpu()[:, None])
        return torch.cat(rows, 1)

    def kept(self, output: Any) -> Any:
        """Return the part of an output that is compared: tensors by name; all of it for `given`.

        Raises:
            ModelError: an output that is compared is not there.
        """
        if self.kind == "given":
            return output
        tensors = float_outputs(output)
        if self.outputs:
            missing = [each.name for each in self.outputs if each.name not in tensors]
            if missing:
                raise ModelError(
                    f"the network's output has no {', '.join(map(repr, missing))}: it has "
                    f"{', '.join(map(repr, tensors))}"
                )
            return {each.name: tensors[each.name] for each in self.outputs}
        samples = next(iter(tensors.values())).shape[:1]
        rows = {name: t for name, t in tensors.items() if t.ndim and t.shape[:1] == samples}
        return rows or tensors

    def each(self, original: Any, compressed: Any, batch: Batch) -> dict[str, Tensor]:
        """Return the divergence of each sample in each output, (N,) float64.

        Args:
            original, compressed: results of `kept`.
            batch: the batch that they were computed from; padding in its mask does not count.

        Raises:
            ActivationError: a user-defined divergence did not return one number per sample.
        """
        if self.function is None:
            known = {output.name: output for output in self.outputs}
            samples = len(next(iter(original.values())))  # the main output has one row for each
            found = {}
            for name, a in original.items():
                how = known.get(name) or ComparedOutput(name=name, divergence=self.kind)
                found[name] = divergence(
                    how.divergence,
                    per_sample(a, samples),
                    per_sample(compressed[name], samples),
                    real_tokens(batch, a),
                    probabilities=how.probabilities,
                    scale=how.scale,
                )
            return found
        given = self.function(original, compressed, batch)
        if not isinstance(given, Tensor) or given.shape != (len(batch),):
            shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ActivationError(
                f"the divergence function gave {shape} for {len(batch)} samples: return a tensor (N,)"
            )
        return {"": given.double()}

    def __call__(self, original: Any, compressed: Any, batch: Batch) -> Tensor:
        """Return the divergence of each sample, summed over the outputs of `each`, (N,) float64."""
        return torch.stack([*self.each(original, compressed, batch).values()]).sum(0)

    @property
    def scores(self) -> bool:
        """True if the main output holds scores of classes or labels."""
        return self.kind in ("kl", "bernoulli")

    def scored(self, original: Any, compressed: Any, batch: Batch) -> Tensor:
        """Return agreement and correctness of the main outputs, (N, 3) float64 as `scored`; NaN if they
        are not scores.
        """
        (a, *_), (b, *_) = original.values(), compressed.values()
        if not self.scores:
            return torch.full((len(a), 3), torch.nan, dtype=torch.float64)
        flags = [each.probabilities for each in self.outputs[:1]]
        return scored(
            self.kind, a, b, batch.labels, real_tokens(batch, a), probabilities=any(flags)
        ).double()


class OutputScales:
    """Variances of the outputs that are compared by squared error, accumulated batch by batch."""

    def __init__(self, criterion: Criterion) -> None:
        self.criterion = criterion
        self._names = [each.name for each in criterion.outputs if each.divergence == "nse"]
        self._spreads: dict[str, Spread] = {}

    def update(self, output: Any, batch: Batch) -> None:
        """Fold in the original's output on one batch."""
        tensors = float_outputs(output) if self._names else {}
        for name in self._names:
            values = tensors[name].double()
            counted = real_tokens(batch, values)
            if counted is not None:
                values = values[counted]
            # Channels come last in vectors and in sequences, not in images.
            rows = values.flatten(0, -2) if values.ndim in (2, 3) else values.reshape(-1, 1)
            new = Spread.of(rows)
            self._spreads[name] = self._spreads[name] + new if name in self._spreads else new

    def merged(self) -> Criterion:
        """Return the criterion with the scales of all processes' batches."""
        for name in self._names:
            own = self._spreads.get(name)
            numbers = [] if own is None else [own.mean.new_tensor([own.n]), own.mean, own.squares]
            row = torch.cat([torch.zeros(0, dtype=torch.float64), *(part.cpu() for part in numbers)])
            whole: Spread | None = None
            for part in current().gathered(row):
                if len(part):
                    mean, squares = part[1:].chunk(2)
                    new = Spread(float(part[0]), mean, squares)
                    whole = new if whole is None else whole + new
            if whole is not None:
                self._spreads[name] = whole
        outputs = tuple(
            each.model_copy(update={"scale": self._scale(each.name)}) for each in self.criterion.outputs
        )
        return replace(self.criterion, outputs=outputs)

    def _scale(self, name: str) -> float | None:
        """Return the mean variance of an output's numbers; None if they hardly vary, so that their
        power becomes the scale.
        """
        spread = self._spreads.get(name)
        if spread is None:
            return None
        variance, power = float(spread.variance.mean()), float(spread.mean.square().mean())
        return variance if variance > 1e-12 * power else None

    def state(self) -> dict[str, Tensor]:
        """Return all tensors of the scales; `restore` reads them."""
        return {
            f"{k}.{part}": torch.as_tensor(getattr(self._spreads[name], part), dtype=torch.float64)
            for k, name in enumerate(self._names)
            if name in self._spreads
            for part in ("n", "mean", "squares")
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Load a `state` of the same outputs."""
        for k, name in enumerate(self._names):
            n, mean, squares = (state[f"{k}.{part}"] for part in ("n", "mean", "squares"))
            self._spreads[name] = Spread(float(n), mean, squares)


def real_tokens(batch: Batch, output: Tensor) -> Tensor | None:
    """Return the mask (N, T) of an output (N, T, ...), true at real tokens; None if all count."""
    mask = batch.padding(decoder=True)
    if mask is None or output.ndim < 3 or mask.shape != output.shape[:2]:
        return None
    return mask.to(output.device)


def gap(wanted: Tensor, found: Tensor) -> tuple[float, float]:
    """Return the largest difference of two outputs, and its share of the largest absolute value wanted.

    Both are infinite where shapes differ. The share is infinite where zeros are wanted and other values
    found. NaN in an output gives NaN, so that every tolerance check fails.
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


def scored(
    kind: Divergence,
    original: Tensor,
    compressed: Tensor,
    labels: Tensor | None,
    counted: Tensor | None = None,
    *,
    probabilities: bool = False,
) -> Tensor:
    """Return agreement and correctness of two networks' scores (N, ..., classes), sample by sample.

    Args:
        kind: `kl`, where the class with the highest score is predicted, or `bernoulli`, where each
            label with a positive score is.
        labels: (N,) integers, or 0 and 1 for each of several labels; they are used if they have the
            shape of the predictions.
        counted, probabilities: as in `divergence`.

    Returns:
        (N, 3) float64: whether the networks agree (a share over tokens or labels, where there are
        several), and whether each is right; NaN where the labels are not known.

    Raises:
        LoaderError: as `require_labels`.
    """
    if kind == "kl":
        first, second = original.argmax(-1), compressed.argmax(-1)
        if labels is not None and labels.ndim > 1 and labels.shape == original.shape:
            labels = labels.argmax(-1)  # one-hot
    else:
        first, second = (t > (0.5 if probabilities else 0) for t in (original, compressed))
    equal = (first == second).double().reshape(len(first), -1)
    weight = torch.ones_like(equal)
    if counted is not None:
        each = equal.shape[1] // counted.shape[1]
        weight = counted.to(equal).repeat_interleave(each, 1)
    agreed = (equal * weight).sum(1) / weight.sum(1).clamp_min(1)
    right = [torch.full_like(agreed, torch.nan)] * 2
    if labels is not None and labels.numel() == first.numel() and len(labels) == len(first):
        if kind == "kl":
            require_labels(labels, original.shape[-1])
        known = labels.to(first.device).reshape(first.shape)
        right = [
            (each == known.to(each.dtype)).double().reshape(len(first), -1).mean(1)
            for each in (first, second)
        ]
    return torch.stack([agreed, *right], 1)


@dataclass
class Tally:
    """Counts of equal and of correct predictions of two networks, over batches."""

    samples: int = 0
    agreed: float = 0.0
    labelled: int = 0
    right_original: float = 0.0
    right_compressed: float = 0.0

    def add(self, rows: Tensor) -> None:
        """Count one batch of `scored` rows, (N, 3)."""
        agreed, first, second = rows.unbind(1)
        self.samples += len(agreed)
        self.agreed += float(agreed.sum())
        if not bool(first.isnan().any()):
            self.labelled += len(first)
            self.right_original += float(first.sum())
            self.right_compressed += float(second.sum())

    def merged(self, total: Total) -> Tally:
        """Return the counts of all processes."""
        own = torch.tensor(astuple(self), dtype=torch.float64)
        samples, agreed, labelled, *right = total(own).tolist()
        return Tally(int(samples), agreed, int(labelled), *right)

    @property
    def agreement(self) -> float | None:
        """Share of equal predictions; None where nothing was counted."""
        return self.agreed / self.samples if self.samples else None

    def accuracy(self, right: float) -> float | None:
        """Return `right` as a share of the samples; None if a sample had no label."""
        return right / self.samples if self.samples and self.labelled == self.samples else None

    @property
    def accuracy_drop(self) -> float | None:
        """Accuracy of the original minus that of the compressed network; None if a label is missing."""
        return self.accuracy(self.right_original - self.right_compressed)


@dataclass(frozen=True)
class Compared:
    """Outputs of two networks on one batch, compared sample by sample."""

    original: Any
    compressed: Any
    batch: Batch
    rows: Tensor
    """Rows (N, 5) float64 on the CPU: divergence, cosine, and those of `scored`; NaN if not known."""


def compare_outputs(
    criterion: Criterion | Divergence,
    outputs: Iterable[tuple[Any, Any, Batch]],
    watch: Callable[[Compared], None] | None = None,
) -> Fidelity:
    """Compare batches of (original output, compressed output, batch), those of all ranks together.

    Accuracy is reported where every batch has labels and the outputs are class scores.

    Args:
        watch: called with each compared batch.
    """
    how = criterion if isinstance(criterion, Criterion) else Criterion(criterion)
    found: list[Tensor] = []
    means: dict[str, Tensor] = {}
    measured: list[tuple[Tensor, Tensor]] = []
    for original, compressed, batch in outputs:
        kept_by = how if how.function is None else Criterion("nse")
        a, b = (_on_cpu(kept_by.kept(output)) for output in (original, compressed))
        _require_alike(a, b)
        each = how.each(a, b, batch) if how.function is None else how.each(original, compressed, batch)
        each = {name: values.cpu() for name, values in each.items()}
        for name, values in each.items():
            means[name] = torch.cat([means.get(name, values[:0]), values])
        cosines = Criterion("cosine").each(a, b, batch).values()
        columns = [sum(each.values())[:, None], 1 - torch.stack([*cosines]).mean(0)[:, None]]  # type: ignore[index]
        columns.append(how.scored(a, b, batch))
        found.append(torch.cat(columns, 1))
        if how.metrics:
            measured.append((how.measured(original, batch), how.measured(compressed, batch)))
        if watch is not None:
            watch(Compared(original, compressed, batch, found[-1]))
    rows = torch.cat(current().gathered(torch.cat([torch.zeros(0, 5, dtype=torch.float64), *found])))
    diverged, cosine, agreed, *right = rows.unbind(1)
    low, high = interval(diverged)
    agreed_low, agreed_high = interval(agreed)
    drop_low, drop_high = interval(right[0] - right[1])
    named = [output.name for output in how.outputs] or [*means]
    parts = {name: torch.cat(current().gathered(means.get(name, diverged[:0]))) for name in named}
    return Fidelity(
        samples=len(rows),
        kind=how.kind,
        divergence=float(diverged.mean()),
        divergence_low=low,
        divergence_high=high,
        outputs={name: float(values.mean()) for name, values in parts.items() if name},
        agreement=_known_mean(agreed),
        agreement_low=agreed_low,
        agreement_high=agreed_high,
        cosine=float(cosine.mean()),
        accuracy_original=_known_mean(right[0]),
        accuracy_compressed=_known_mean(right[1]),
        drop_low=drop_low,
        drop_high=drop_high,
        metrics=_metric_changes([*how.metrics], measured),
    )


def _require_alike(original: dict[str, Tensor], compressed: dict[str, Tensor]) -> None:
    """Require that the outputs of two networks can be compared.

    Raises:
        ModelError: an output of the original is missing, or has another shape.
    """
    before, after = ({k: tuple(t.shape) for k, t in x.items()} for x in (original, compressed))
    if any(after.get(name) != shape for name, shape in before.items()):
        raise ModelError(
            f"the outputs of the two networks cannot be compared: the original gives {before}, and the "
            f"other one {after}"
        )


def _metric_changes(names: list[str], measured: list[tuple[Tensor, Tensor]]) -> dict[str, MetricChange]:
    """Return the mean of each metric over the samples of all ranks, with the interval of its drop.

    Raises:
        ActivationError: a metric of the original is not finite.
    """
    none = torch.zeros(0, len(names), dtype=torch.float64)
    before, after = (
        torch.cat(current().gathered(torch.cat([none, *part])))
        for part in (zip(*measured, strict=True) if measured else ([], []))
    )
    changes = {}
    for k, name in enumerate(names):
        if not bool(before[:, k].isfinite().all()):
            raise ActivationError(f"the metric {name!r} of the original is NaN or infinite on a sample")
        low, high = interval(before[:, k] - after[:, k])
        changes[name] = MetricChange(
            original=float(before[:, k].mean()),
            compressed=float(after[:, k].mean()),
            drop_low=low,
            drop_high=high,
        )
    return changes


def _on_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.float().cpu() for name, tensor in tensors.items()}


def _known_mean(values: Tensor) -> float | None:
    return None if not len(values) or bool(values.isnan().any()) else float(values.mean())


def interval(values: Tensor) -> tuple[float | None, float | None]:
    """Return the 95 % percentile bootstrap interval of a mean over samples (Efron 1979), from 2,000
    resamples.
    """
    if len(values) < 2 or not bool(torch.isfinite(values).all()):
        return None, None
    from scipy import stats  # slow to import

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
    original: nn.Module,
    compressed: nn.Module,
    batches: Iterable[Batch],
    criterion: Criterion | Divergence,
    watch: Callable[[Compared], None] | None = None,
) -> Fidelity:
    """Run two networks, in any mode and on any device, on the same batches and compare their outputs.

    Args:
        watch: called with each compared batch.

    Raises:
        ModelError: a forward pass fails.
        ActivationError: the output of the original network, or a metric of it, holds NaN or infinity.
    """

    with evaluating(original):
        return compared_with(run_original(original, batches), compressed, criterion, watch)


def run_original(original: nn.Module, batches: Iterable[Batch]) -> Iterator[tuple[Any, Batch]]:
    """Yield the output of the original, in evaluation mode, on each batch, and the batch on its device.

    Raises:
        ModelError, ActivationError: as `fidelity`.
    """
    for batch in batches:
        moved = batch.to(original)
        output = ran(original, moved)
        if not all(bool(t.isfinite().all()) for t in float_outputs(output).values()):
            raise ActivationError("the model's output holds NaN or infinity on held-out samples")
        yield output, moved


def compared_with(
    outputs: Iterable[tuple[Any, Batch]],
    compressed: nn.Module,
    criterion: Criterion | Divergence,
    watch: Callable[[Compared], None] | None = None,
) -> Fidelity:
    """Compare a network, in any mode, with outputs of the original that are known, as `fidelity`.

    Args:
        outputs: outputs of the original, and their batches.
    """
    with evaluating(compressed):
        both = ((output, ran(compressed, batch.to(compressed)), batch) for output, batch in outputs)
        return compare_outputs(criterion, both, watch)
