"""Aggregation trial: quality of one space merged from networks that each learned a part of a task."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from tqdm import tqdm

from rba_compress.cli.latent_demos.networks import Data, trained
from rba_compress.cli.latent_demos.trials import AggregationTrial, Setting
from rba_compress.latent.aggregation import aggregate, class_separability
from rba_compress.latent.anchors import Anchors
from rba_compress.linalg.similarity import relative

WHOLE, SINGLE = "end to end", "single"
SEVERAL, NONE = -1, -2


@dataclass(frozen=True)
class Part:
    """Rows of the training and of the test images that one task has."""

    train: list[int]
    test: list[int]


@dataclass(frozen=True)
class Worth:
    """Quality of a space on the test images.

    `task` is the accuracy of a linear model that predicts the task of a sample, among the samples that
    belong to one task. Accuracy above that of the end-to-end network shows traces of the network that
    encoded a sample.
    """

    knn: float
    linear: float
    separability: float
    cka: float
    """Linear CKA with the end-to-end network's space."""
    task: float


@dataclass(frozen=True)
class Row:
    """Result of one space in one setting: means over seeds, and standard deviations."""

    setting: Setting
    space: str
    mean: Worth
    spread: Worth


@dataclass(frozen=True)
class Aggregation:
    """Results of every setting, and the last seed's spaces of the test images, for figures."""

    rows: tuple[Row, ...]
    spaces: dict[Setting, dict[str, Tensor]]
    owners: dict[Setting, Tensor]
    """The task of each test image; -1 where several hold it."""
    labels: Tensor


def divided(
    setting: Setting, labels: Data, how: AggregationTrial, generator: torch.Generator
) -> tuple[list[Part], list[int]]:
    """Return the tasks' parts, and the training rows that are anchors."""
    order = torch.randperm(labels.classes, generator=generator).tolist()
    train, test = labels.train[1], labels.test[1]
    rows = torch.randperm(len(train), generator=generator).tolist()
    if setting == "shared samples":
        shared = order[:4]
        anchors = [row for row in rows if int(train[row]) in shared][: how.anchors]
        own = [order[4:][k :: how.tasks] for k in range(how.tasks)]
        return [_of_classes([*shared, *classes], labels) for classes in own], anchors
    anchors, rows = rows[: how.anchors], rows[how.anchors :]
    if setting == "shared classes":
        others = torch.randperm(len(test), generator=generator).tolist()
        return [Part(rows[k :: how.tasks], others[k :: how.tasks]) for k in range(how.tasks)], anchors
    parts = [_of_classes(order[k :: how.tasks], labels) for k in range(how.tasks)]
    apart = set(anchors)
    return [Part([r for r in part.train if r not in apart], part.test) for part in parts], anchors


def _of_classes(classes: Sequence[int], data: Data) -> Part:
    wanted = torch.tensor([*classes])
    own = [torch.isin(labels, wanted).nonzero().flatten() for _, labels in (data.train, data.test)]
    return Part(own[0].tolist(), own[1].tolist())


def aggregating(data: Data, how: AggregationTrial) -> Aggregation:
    """Divide, train and merge in every setting."""
    spaces: dict[Setting, dict[str, Tensor]] = {}
    owners: dict[Setting, Tensor] = {}
    rows: list[Row] = []
    total = len(how.seeds) * len(how.settings) * (how.tasks + 1)
    with tqdm(total=total, desc="aggregation", unit="network", disable=None) as bar:
        for setting in how.settings:
            worths: dict[str, list[Worth]] = {}
            for seed in how.seeds:
                merged = merging(setting, data, how, seed, bar.update)
                for name, worth in merged.worths(data, how):
                    worths.setdefault(name, []).append(worth)
            spaces[setting] = {name: test for name, (_, test) in merged.spaces.items()}
            owners[setting] = merged.owners[1]
            rows += [
                Row(setting, name, _over(of, statistics.fmean), _over(of, statistics.pstdev))
                for name, of in worths.items()
            ]
    return Aggregation(tuple(rows), spaces, owners, data.test[1])


@dataclass(frozen=True)
class Merged:
    """Spaces of the training and the test images in one setting, and the task of each image."""

    spaces: dict[str, tuple[Tensor, Tensor]]
    owners: tuple[Tensor, Tensor]
    """Task of each image: `SEVERAL` where several tasks hold an image, `NONE` where none does."""

    def worths(self, data: Data, how: AggregationTrial) -> Iterator[tuple[str, Worth]]:
        """Yield the quality of every space; of single networks, the mean."""
        singles = []
        for name, spaces in self.spaces.items():
            worth = self._worth(spaces, data, how)
            if name.startswith(SINGLE):
                singles.append(worth)
            else:
                yield name, worth
        yield SINGLE, _over(singles, statistics.fmean)

    def _worth(self, spaces: tuple[Tensor, Tensor], data: Data, how: AggregationTrial) -> Worth:
        (train, test), owners = spaces, self.owners
        held = owners[0] != NONE
        fitted, labels = train[held].numpy(), data.train[1][held].numpy()
        knn = KNeighborsClassifier(how.neighbours).fit(fitted, labels)
        linear = _linear().fit(fitted, labels)
        alone = [owner >= 0 for owner in owners]
        told = _linear().fit(train[alone[0]].numpy(), owners[0][alone[0]].numpy())
        return Worth(
            knn=knn.score(test.numpy(), data.test[1].numpy()),
            linear=linear.score(test.numpy(), data.test[1].numpy()),
            separability=class_separability(test, data.test[1]),
            cka=_cka(test, self.spaces[WHOLE][1]),
            task=told.score(test[alone[1]].numpy(), owners[1][alone[1]].numpy()),
        )


def merging(
    setting: Setting, data: Data, how: AggregationTrial, seed: int, progress: Callable[[], object]
) -> Merged:
    """Train a network on each task and one on all of them, and merge the spaces of the tasks."""
    parts, anchors = divided(setting, data, how, torch.Generator().manual_seed(seed))
    images, labels = data.train

    def encoder(rows: list[int], number: int) -> nn.Module:
        number += seed * (how.tasks + 1)
        whole = trained(
            "conv",
            (images[rows], labels[rows]),
            data.classes,
            width=how.width,
            steps=how.steps,
            seed=number,
        )
        progress()
        return whole[0]

    encoders = [encoder(part.train, k + 1) for k, part in enumerate(parts)]
    whole = encoder(sorted({row for part in parts for row in part.train}), 0)
    with torch.no_grad():
        read = _Read(encoders, whole, images[anchors])
        train, train_owners = read.of(images, [part.train for part in parts])
        test, test_owners = read.of(data.test[0], [part.test for part in parts])
    return Merged({n: (train[n], test[n]) for n in train}, (train_owners, test_owners))


class _Read:
    """Networks of the tasks and the end-to-end network, which encode images."""

    def __init__(self, encoders: list[nn.Module], whole: nn.Module, anchors: Tensor) -> None:
        self.encoders, self.whole = encoders, whole
        self.parallel = [Anchors(encoder(anchors)) for encoder in encoders]
        self.anchors = whole(anchors)

    def of(self, images: Tensor, held: list[list[int]]) -> tuple[dict[str, Tensor], Tensor]:
        """Return every space of the images, NaN where no task holds an image, and each image's task."""
        seen = torch.stack([encoder(images) for encoder in self.encoders])
        holds = torch.zeros(len(held), len(images), 1)
        for task, rows in enumerate(held):
            holds[task, rows] = 1
        ours = [space[rows] for space, rows in zip(seen, held, strict=True)]
        merged = aggregate(ours, self.parallel, ids=held)
        aggregated = torch.full((len(images), len(self.anchors)), torch.nan)
        aggregated[[int(k) for k in merged.ids]] = merged.space
        count, end_to_end = holds.sum(0).flatten(), self.whole(images)
        owners = torch.where(count == 1, holds[..., 0].argmax(0), SEVERAL)
        return {
            WHOLE: end_to_end,
            f"{WHOLE}, relative": relative(end_to_end, self.anchors, "cosine"),
            "aggregated": aggregated,
            "aggregated, task hidden": aggregate([*seen], self.parallel).space,
            "naive": (holds * seen).sum(0) / holds.sum(0),
            "naive, task hidden": seen.mean(0),
            **{f"{SINGLE} {task}": space for task, space in enumerate(seen)},
        }, owners.masked_fill(count == 0, NONE)


def _linear() -> Pipeline:
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))


def _cka(x: Tensor, y: Tensor) -> float:
    """Return the linear CKA of two spaces of the same samples."""
    x, y = (space.double() - space.double().mean(0) for space in (x, y))
    return float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def _over(worths: Sequence[Worth], fold: Callable[[list[float]], float]) -> Worth:
    return Worth(*(fold([getattr(w, f.name) for w in worths]) for f in fields(Worth)))
