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

import functools
import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rba_compress.core.batch import Batch, class_labels
from rba_compress.core.config import RATES, Healing
from rba_compress.core.distributed import Ranks
from rba_compress.core.errors import ArtifactError, LoaderError, ModelError, PlanError, RankError
from rba_compress.core.inference import evaluating
from rba_compress.core.io import below, read_tensors, write_tensors
from rba_compress.core.loader import Split
from rba_compress.core.offload import device_of
from rba_compress.core.outputs import main_output, per_sample
from rba_compress.core.plan import Chain, Healed
from rba_compress.core.schema import Frozen
from rba_compress.core.weight_types import require_plain_weights
from rba_compress.graph.activations import observe
from rba_compress.graph.rewrite import copy_model
from rba_compress.healing.augmentation import Mixed, augmented
from rba_compress.profiling.fidelity import Criterion
from rba_compress.profiling.profiler import EVERY, fingerprint

HELD = 2
"""Ratio of validation samples to those of them that are held out of training."""


FAR = ("rate", "step", "before", "best", "best_step", "since")
"""Fields of a checkpoint's header that record the progress of a training."""


class Training(Frozen):
    """The JSON header of a checkpoint: the identity of a training, and its progress."""

    schema_version: Literal[1] = 1
    original: str
    compressed: str
    data: str
    healing: Healing
    ranks: int
    rate: float = math.nan
    step: int = 0
    before: float = math.nan
    best: float = math.nan
    best_step: int = 0
    since: int = 0
    """Number of epochs without a new best state."""


@dataclass(frozen=True)
class Course:
    """Result of a training."""

    weights: dict[str, Tensor]
    """Trained tensors by their key in the compressed network; empty if training did not help."""
    healed: Healed | None
    note: str = ""
    """Message for the user."""


Seen = tuple[Any, list[Tensor]]
"""Output of a network, and the streams behind its chains."""


class _Watched(nn.Module):
    """Network that also returns the streams behind its chains."""

    def __init__(self, model: nn.Module, chains: Sequence[Chain]) -> None:
        super().__init__()
        self.model, self.chains = model, chains

    def forward(self, batch: Batch) -> Seen:
        if not self.chains:
            return batch.run(self.model), []
        seen = observe(self.model, self.chains, batch)
        return seen.output, [s[len(c)] for s, c in zip(seen.streams, self.chains, strict=True)]


class Student(nn.Module):
    """Compressed network of which some tensors are trained and all others are frozen.

    Its parameters are the trained ones: whole tensors, and the factors U (out, r) and V (r, in) of
    adapters W + U V on others (Hu et al. 2022), with U = 0 at the start.
    """

    def __init__(
        self, compressed: nn.Module, healing: Healing, new: Sequence[str], chains: Sequence[Chain] = ()
    ) -> None:
        """Choose the tensors to train.

        Args:
            compressed: not changed.
            new: names of the parameters that the original does not have, those of maps.

        Raises:
            ModelError: the network has no parameter of the requested kind.
        """
        super().__init__()
        own = {name: p for name, p in compressed.named_parameters() if p.is_floating_point()}
        self.keys, self.adapted = _chosen(compressed, own, healing, new)
        if not self.keys and not self.adapted:
            raise ModelError(
                f"train={healing.train!r}: the compressed network has no such parameter; its maps are "
                "identities, say. Train 'norms', 'adapters' or 'all'"
            )
        generator = torch.Generator().manual_seed(healing.seed)
        self.values = nn.ParameterList(own[key].detach().clone() for key in self.keys)
        self.ups, self.downs = nn.ParameterList(), nn.ParameterList()
        for weight in (own[key].detach() for key in self.adapted):
            rows, columns = weight.flatten(1).shape
            self.ups.append(weight.new_zeros(rows, healing.rank))
            drawn = torch.randn(healing.rank, columns, generator=generator) / columns**0.5
            self.downs.append(drawn.to(weight))
        # In a tuple, so that frozen parameters are not registered here.
        self._frozen = (_Watched(compressed, chains),)
        self._own = own

    def weights(self) -> dict[str, Tensor]:
        """Return the trained tensors, by their key in the compressed network's state dict."""
        found: dict[str, Tensor] = dict(zip(self.keys, self.values, strict=True))
        for key, up, down in zip(self.adapted, self.ups, self.downs, strict=True):
            weight = self._own[key].detach()
            found[key] = weight + (up @ down).view_as(weight)
        return found

    def forward(self, batch: Batch) -> Seen:
        named = {f"model.{key}": weight for key, weight in self.weights().items()}
        found: Seen = functional_call(self._frozen[0], named, (batch,))
        return found


def _chosen(
    compressed: nn.Module, own: dict[str, nn.Parameter], healing: Healing, new: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Return the names of the parameters that are trained, and of those that get an adapter."""
    match healing.train:
        case "maps":
            return [name for name in own if name in new], []
        case "all":
            return list(own), []
    keys = [name for name, p in own.items() if name in new or p.ndim == 1]
    if healing.train == "norms":
        return keys, []
    tables = {id(m.weight) for m in compressed.modules() if isinstance(m, nn.Embedding)}
    adapted = [
        name
        for name, p in own.items()
        if name not in keys
        and name.rpartition(".")[2] == "weight"
        and id(p) not in tables
        and min(p.flatten(1).shape) > healing.rank
    ]
    return keys, adapted


class _Shuffled:
    """Training samples of one process, shuffled anew for every epoch."""

    def __init__(self, batches: list[Batch], size: int, seed: int) -> None:
        shapes = {repr([(k, t.shape[1:]) for k, t in b.tensors.items()]) for b in batches}
        whole = all(t.ndim and len(t) == len(b) for b in batches for t in b.tensors.values())
        self._joined = Batch.join(batches) if len(shapes) == 1 and whole else None
        self._batches, self._seed = batches, seed
        self.count = len(batches) if self._joined is None else len(self._joined)
        """Number of samples; of batches, if samples differ in shape (text of several lengths)."""
        self._size = 1 if self._joined is None else size

    def deal(self, step: int) -> Batch:
        """Return the batch of a step."""
        places = range(step * self._size, (step + 1) * self._size)
        drawn = [self._order(place // self.count)[place % self.count] for place in places]
        return self._batches[drawn[0]] if self._joined is None else self._joined.select(drawn)

    @functools.lru_cache(maxsize=2)  # noqa: B019  as long as a training
    def _order(self, round_: int) -> list[int]:
        generator = torch.Generator().manual_seed(_mixed(self._seed, round_))
        return torch.randperm(self.count, generator=generator).tolist()


def _mixed(*numbers: int) -> int:
    """Return a seed made of several numbers."""
    hashed = hashlib.blake2b(repr(numbers).encode(), digest_size=7)
    return int.from_bytes(hashed.digest(), "big")


@dataclass(frozen=True)
class Samples:
    """Training and held-out samples of one process."""

    train: list[Batch]
    held: list[Batch]
    count: int
    """Number of training samples in all processes."""
    data: str
    """SHA-256 of the training samples of all processes."""

    @classmethod
    def of(cls, split: Split) -> Samples:
        """Read the samples of a loader.

        Raises:
            LoaderError: the loader has too few samples to hold any out, or fewer batches than
                processes.
        """
        train, held, digests = [], [], []
        for part, places, batch in split.deal("fit", "validation"):
            out = [r for r, p in enumerate(places) if part == "validation" and p % HELD == 0]
            kept = [r for r in range(len(batch)) if r not in out]
            if out:
                held.append(batch.select(out))
            if kept:
                train.append(batch.select(kept))
                digests.append([2 * places[0] + (part == "validation"), train[-1].digest(whole=True)])
        ranks = split.ranks
        if ranks.sum(not train):
            raise LoaderError("the loader has fewer batches than there are processes: smaller batches")
        known = torch.cat(ranks.gathered(torch.tensor(digests))).tolist()
        data = hashlib.sha256(repr([digest for _, digest in sorted(known)]).encode()).hexdigest()
        return cls(train, held, int(ranks.sum(sum(map(len, train)))), data)


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
    _require_trainable(original, compressed, known)
    ranks, samples = split.ranks, Samples.of(split)
    _require_labels(samples, criterion, healing)
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
        _Watched(original, watched), student, samples, _Objective(criterion, healing, watched), ranks
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
        teacher: _Watched,
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
        self.shuffled = _Shuffled(samples.train, size, _mixed(self.healing.seed, ranks.rank))
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
            header = self._resumed(checkpoint, header)
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
                    self._write(checkpoint, header)
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
        generator = torch.Generator().manual_seed(_mixed(self.healing.seed, self.ranks.rank, number))
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

    # --- checkpoints

    def _write(self, path: Path, header: Training) -> None:
        if not self.ranks.leads:
            return
        tensors = {f"best.{key}": weight for key, weight in self.best.items()}
        tensors |= {f"value.{name}": value for name, value in self.student.named_parameters()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        write_tensors(path, header, {name: t.detach() for name, t in tensors.items()})

    def _resumed(self, path: Path, expected: Training) -> Training:
        """Resume from a checkpoint, and return its header.

        Raises:
            ArtifactError: the checkpoint is of another training.
        """
        header, tensors = read_tensors(path, Training)
        far = {name: getattr(header, name) for name in FAR}
        if header != expected.model_copy(update=far):
            raise ArtifactError(
                f"{path} is the checkpoint of another training (of other networks, data, settings or "
                "number of processes): name another file, or remove it"
            )
        device = device_of(self.teacher)
        self.best = {key: t.to(device) for key, t in below("best.", tensors).items()}
        with torch.no_grad():
            for name, value in self.student.named_parameters():
                value.copy_(tensors[f"value.{name}"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in below("optimizer.", tensors).items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        return header


def _require_trainable(
    original: nn.Module, compressed: nn.Module, known: dict[str, nn.Parameter]
) -> None:
    """Require two networks that can be trained towards each other.

    Raises:
        PlanError: the compressed network was not made from this original.
        ModelError: its weights are of low precision, or weights of either are offloaded.
    """
    shared = {name: p for name, p in compressed.named_parameters() if name in known}
    other = next((n for n, p in shared.items() if p.shape != known[n].shape), None)
    if type(compressed) is not type(original) or other is not None or not shared:
        raise PlanError(
            f"the {type(compressed).__name__} was not made from this {type(original).__name__}"
            + (f": {other} is of another shape" if other else "")
        )
    for what, model in (("original", original), ("compressed", compressed)):
        if any(p.is_meta for p in model.parameters()):
            raise ModelError(
                f"weights of the {what} network are offloaded: load it into memory to heal"
            )
        require_plain_weights(model)
    low = {p.dtype for p in compressed.parameters() if p.is_floating_point()} - {
        torch.float32,
        torch.float64,
    }
    if low:
        raise ModelError(
            f"weights in {low.pop()} are too coarse for small steps: heal model.float(), and with "
            "bf16=True multiply in bfloat16"
        )


def _require_labels(samples: Samples, criterion: Criterion, healing: Healing) -> None:
    """Require labels of class scores, if the objective uses labels.

    Raises:
        LoaderError: labels are requested but missing, or the output is not class scores.
    """
    if not healing.labels:
        return
    if criterion.kind != "kl":
        raise LoaderError("labels are of class scores, and this network's output is none: labels=0")
    if any(class_labels(batch.labels) is None for batch in (*samples.train, *samples.held)):
        raise LoaderError("labels are asked for: let every batch of the loader be (input, labels)")
