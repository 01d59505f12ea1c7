"""Samples of a training: those to train on, in a new order each epoch, and those held out."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

import torch

from rba_compress.core.batch import Batch, class_labels
from rba_compress.core.config import Healing, mixed_seed
from rba_compress.core.errors import LoaderError
from rba_compress.core.loader import Split
from rba_compress.profiling.fidelity import Criterion

HELD = 2
"""Ratio of validation samples to those of them that are held out of training."""


class Shuffled:
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
        generator = torch.Generator().manual_seed(mixed_seed(self._seed, round_))
        return torch.randperm(self.count, generator=generator).tolist()


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


def require_labels(samples: Samples, criterion: Criterion, healing: Healing) -> None:
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
