"""Settings of the trials of latent spaces; nothing here loads torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Task = Literal["classification", "reconstruction"]
Kind = Literal["mlp", "conv"]
Setting = Literal["shared samples", "shared classes", "neither"]
SETTINGS: tuple[Setting, ...] = get_args(Setting)


@dataclass(frozen=True)
class Trial:
    """Settings of the stitching trial: training and stitching.

    Args:
        seeds: seeds of initial weights and the order of samples, one network of each kind a seed.
        kinds: kinds of encoders.
        anchors: number of anchors.
        width: channels of every space.
        encoder_steps, head_steps: steps of Adam, at `batch` samples.
    """

    task: Task = "classification"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    kinds: tuple[Kind, ...] = ("mlp", "conv")
    anchors: int = 128
    width: int = 64
    encoder_steps: int = 600
    head_steps: int = 400
    batch: int = 64
    rate: float = 1e-3


@dataclass(frozen=True)
class AnchorTrial:
    """Settings of the anchor trial: hidden pairs, recovery and heads.

    Args:
        repetitions: number of repetitions, each with seeds, anchors and a head of its own.
        seeds: number of pairs that are not hidden.
        anchors: number of anchors in all.
        samples: number of training samples that anchors are looked for in.
        head_steps: training steps of the head that reads the relative space.
        runs: ways to bootstrap.
    """

    repetitions: int = 5
    seeds: int = 15
    anchors: int = 300
    samples: int = 1000
    head_steps: int = 400
    runs: tuple[str, ...] = ("adam, as published", "adam", "least squares")


@dataclass(frozen=True)
class AggregationTrial:
    """Settings of the aggregation trial: division, training and merging.

    Args:
        settings: what the tasks have in common: the samples of four classes, beside two classes of its
            own in each; all classes, with different samples; or neither, three or four classes each.
        seeds: seeds of the division, the weights and the order of samples.
        tasks: number of tasks.
        anchors: number of anchors, from the shared samples in the first setting, otherwise set apart
            before the division.
        width: channels of every space.
        steps: steps of Adam for each network.
        neighbours: number of neighbours in k-NN.
    """

    settings: tuple[Setting, ...] = SETTINGS
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tasks: int = 3
    anchors: int = 128
    width: int = 64
    steps: int = 600
    neighbours: int = 5
