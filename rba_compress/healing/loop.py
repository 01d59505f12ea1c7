"""Healing by distillation: the original network teaches the compressed one, without labels.

The objective is that of the search: the divergence of the output from the original's. The original is
run on every augmented image (Hinton, Vinyals, Dean 2015; Beyer et al. 2022, who show that teacher and
student must see the same crop). Both networks run in eval mode: no dropout, and BatchNorms keep their
statistics.

Of ten samples, seven are trained on. Two of the validation samples are held out to choose the best
state. The test sample is left for reports. The result is the best state, or the initial state if no
other is better.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rba_compress.core.config import RATES, Healing, mixed_seed
from rba_compress.core.distributed import Ranks
from rba_compress.core.errors import RankError
from rba_compress.core.inference import evaluating
from rba_compress.core.loader import Split
from rba_compress.core.offload import device_of
from rba_compress.core.outputs import main_output, per_sample
from rba_compress.core.plan import Chain, Healed
from rba_compress.graph.rewrite import copy_model
from rba_compress.healing.augmentation import Mixed, augmented
from rba_compress.healing.checkpoint import Training, read_checkpoint, write_checkpoint
from rba_compress.healing.samples import Samples, Shuffled, require_labels
from rba_compress.healing.student import Student, Watched, require_trainable
from rba_compress.profiling.fidelity import Criterion
from rba_compress.profiling.profiler import EVERY, fingerprint


@dataclass(frozen=True)
class Course:
    """Result of a training."""

    weights: dict[str, Tensor]
    """Trained tensors by their key in the compressed network; empty if training did not help."""
    healed: Healed | None
    note: str = ""
    """Message for the user."""


@dataclass(frozen=True)
class _Objective:
    """Training objective of each sample."""

    criterion: Criterion
    healing: Healing
    chains: Sequence[Chain]

    def __call__(
        self, wanted: tuple[Any, list[Tensor]], found: tuple[Any, list[Tensor]], mixed: Mixed
    ) -> Tensor:
        """Return the objective of each sample, (N,) float64.

        Args:
            wanted, found: outputs and streams of the original and of the student.
        """
        how, (a, b) = self.healing, (self.criterion.kept(seen[0]) for seen in (wanted, found))
        each = self.criterion(a, b, mixed.batch)
        if how.labels:
            scores = main_output(found[0]).float()
            each = (1 - how.labels) * each + how.labels * mixed.cross_entropy(scores, how.smoothing)
        for chain, h, g in zip(self.chains, wanted[1], found[1], strict=True):
            own, to = (t.movedim(chain.axis, -1).movedim(chain.sample_axis, 0) for t in (g, h))
            own, to = own.double(), to.double()
            own, to = (t.reshape(len(t), -1, chain.width) for t in (own, to))
            to = to[:, : own.shape[1]]  # behind a read-out, other positions are absent
            error = (own - to).square().sum((1, 2)) / to.square().sum((1, 2)).clamp_min(1e-12)
            error = per_sample(error, len(each))  # a row may be a frame of a sample
            error = error.mean(1) if error.ndim > 1 else error
            error = error if error.shape == each.shape else error.mean()
            each = each + how.features * error / len(self.chains)
        return each


def distil(
    original: nn.Module,
    compressed: nn.Module,
    split: Split,
    criterion: Criterion,
    healing: Healing,
    *,
    chains: Sequence[Chain] = (),
    checkpoint: Path | None = None,
) -> Course:
    """Train a compressed network towards its original; neither is changed.

    Args:
        chains: chains whose last streams are matched, if `healing.features` is set.
        checkpoint: a file that is written twice a minute, and removed at the end. If the file exists at
            the start, training resumes from it, with the same result as without an interruption.

    Raises:
        LoaderError, ModelError, PlanError, ArtifactError, RankError: as `rba_compress.heal`.
    """
    known = dict(original.named_parameters())
    new = [name for name, _ in compressed.named_parameters() if name not in known]
    require_trainable(original, compressed, known)
    ranks, samples = split.ranks, Samples.of(split)
    require_labels(samples, criterion, healing)
    watched = chains if healing.features else ()
    student = Student(copy_model(compressed, share=True), healing, new, watched)
    header = Training(
        original=fingerprint(original),
        compressed=fingerprint(compressed),
        data=samples.data,
        healing=healing,
        ranks=ranks.count,
    )
    run = _Run(
        Watched(original, watched), student, samples, _Objective(criterion, healing, watched), ranks
    )
    try:
        return run(header, checkpoint)
    except RuntimeError as error:
        if ranks.count > 1 and not isinstance(error, torch.OutOfMemoryError):
            raise RankError(
                f"one of the {ranks.count} processes ended while it trained: {error}"
            ) from error
        raise


class _Run:
    """State of one training."""

    def __init__(
        self,
        teacher: Watched,
        student: Student,
        samples: Samples,
        objective: _Objective,
        ranks: Ranks,
    ) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        self.teacher, self.student, self.objective, self.ranks = teacher, student, objective, ranks
        self.healing, self.samples = objective.healing, samples
        size = max(1, self.healing.batch // ranks.count)
        self.shuffled = Shuffled(samples.train, size, mixed_seed(self.healing.seed, ranks.rank))
        drawn = int(ranks.sum(self.shuffled.count))
        self.epoch = max(1, drawn // (size * ranks.count))
        """Number of steps per epoch."""
        self.steps = self.epoch * self.healing.epochs
        # Unused parameters have no gradient: a read-out, for one, computes no keys of its last block.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        on_cpu = device_of(teacher).type == "cpu"
        self.accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[unused])
        if self.accelerator.num_processes != ranks.count:
            raise RankError(
                f"accelerate knows of {self.accelerator.num_processes} of {ranks.count} processes: "
                "start them with `accelerate launch`, on CPUs with --cpu"
            )
        optimizer = torch.optim.AdamW(student.parameters(), lr=0.0, weight_decay=0.0)
        with ranks.answered():
            self.trained, self.optimizer = self.accelerator.prepare(
                student, optimizer, device_placement=[False, False]
            )
        self.held = [batch.to(teacher) for batch in samples.held]
        with evaluating(teacher):
            self.wanted = [teacher(batch) for batch in self.held]
        self.best = {key: weight.detach().clone() for key, weight in student.weights().items()}

    def __call__(self, header: Training, checkpoint: Path | None) -> Course:
        if checkpoint is not None and checkpoint.exists():
            header, self.best = read_checkpoint(
                checkpoint, header, self.student, self.optimizer, device_of(self.teacher)
            )
        else:
            first = self.measure()
            rate = self.healing.rate or self._chosen_rate()
            header = header.model_copy(update={"before": first, "best": first, "rate": rate})
        written, note = time.monotonic(), ""
        bar = self.ranks.bar(total=self.steps, initial=header.step, desc="heal", unit="step")
        with bar:
            while header.step < self.steps and header.since < self.healing.patience:
                bar.set_postfix(held_out=f"{header.best:.4f}", refresh=False)
                if not self.step(header.step, header.rate * self._share(header.step, self.steps)):
                    note = f"the loss is NaN or infinite at step {header.step}: what was best is kept"
                    break
                header = header.model_copy(update={"step": header.step + 1})
                if header.step % self.epoch == 0:
                    header = self._evaluated(header)
                bar.update()
                if checkpoint is not None and time.monotonic() - written >= EVERY:
                    if self.ranks.leads:
                        write_checkpoint(checkpoint, header, self.best, self.student, self.optimizer)
                    written = time.monotonic()
        if checkpoint is not None and self.ranks.leads:
            checkpoint.unlink(missing_ok=True)
        return self._course(header, note)

    def _evaluated(self, header: Training) -> Training:
        """Measure the student, keep its state if it is the best, and return the updated header."""
        value = self.measure()
        if not value < header.best:
            return header.model_copy(update={"since": header.since + 1})
        self.best = {key: weight.detach().clone() for key, weight in self.student.weights().items()}
        return header.model_copy(update={"best": value, "best_step": header.step, "since": 0})

    def _course(self, header: Training, note: str) -> Course:
        if not header.best_step:
            unchanged = (
                "healing did not help and the network is as it was: on held-out samples "
                f"{header.before:.4g} before, and no less in {header.step} steps"
            )
            return Course({}, None, "; ".join(filter(None, [note, unchanged])))
        healed = Healed(
            healing=self.healing,
            data=header.data,
            samples=self.samples.count,
            rate=header.rate,
            steps=header.best_step,
            before=header.before,
            after=header.best,
            keys=tuple(sorted(self.best)),
        )
        return Course(self.best, healed, note)

    def _chosen_rate(self) -> float:
        """Return the rate of `RATES` whose trial ends with the lowest held-out objective. The student
        and its optimiser are restored.

        A trial is a whole training in a tenth of the epochs, with the whole schedule of the rate: at a
        constant rate, short trials prefer rates that are too low (Wu et al. 2018).
        """
        start = [value.detach().clone() for value in self.student.parameters()]
        worth = {}
        rates, steps = RATES[self.healing.train], math.ceil(self.healing.epochs / 10) * self.epoch
        with self.ranks.bar(total=len(rates) * steps, desc="rates", unit="step") as bar:
            for rate in rates:
                for number in range(steps):
                    self.step(number, rate * self._share(number, steps))
                    bar.update()
                value = self.measure()
                worth[rate] = value if math.isfinite(value) else math.inf
                with torch.no_grad():
                    for own, before in zip(self.student.parameters(), start, strict=True):
                        own.copy_(before)
                self.optimizer.state.clear()
        return min(rates, key=worth.__getitem__)

    def step(self, number: int, rate: float) -> bool:
        """Take one step of the optimiser if its gradient is finite; return whether it is."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(
            mixed_seed(self.healing.seed, self.ranks.rank, number)
        )
        batch = self.shuffled.deal(number).to(self.teacher)
        mixed = augmented(batch, self.healing.augment, generator)
        with evaluating(self.teacher):
            wanted = self.teacher(mixed.batch)
        device = device_of(self.teacher).type
        with torch.autocast(device, torch.bfloat16, enabled=self.healing.bf16):
            found = self.trained(mixed.batch)
        loss = self.objective(wanted, found, mixed).mean()
        with self.ranks.answered():  # the ranks share their gradients here
            self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.trained.parameters(), 1.0)
        finite = bool(torch.isfinite(norm))
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return finite

    def _share(self, step: int, steps: int) -> float:
        """Return the share of the peak learning rate: a linear warm-up, then half a cosine
        (Loshchilov, Hutter 2017).
        """
        warm = self.healing.warmup * steps
        if step < warm:
            return (step + 1) / (warm + 1)
        return (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1))) / 2

    def measure(self) -> float:
        """Return the mean objective on the held-out samples of all processes."""
        total = 0.0
        with evaluating(self.student), torch.no_grad():
            for wanted, batch in zip(self.wanted, self.held, strict=True):
                total += float(self.objective(wanted, self.student(batch), Mixed(batch)).sum())
        return self.ranks.sum(total) / self.ranks.sum(sum(map(len, self.held)))
