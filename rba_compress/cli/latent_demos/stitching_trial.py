"""Stitching trial: heads on encoders that they were not trained with, for each pair of networks.

Each network is an encoder trained with a head of its own, to classify or to reconstruct its input. The
encoder is then frozen, and for every bridge a head is trained on its space alone: no network sees
another one before the pair is stitched. All random state is passed in.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rba_compress.cli.latent_demos.networks import Data, encoder, fit, head, score
from rba_compress.cli.latent_demos.trials import Kind, Task, Trial
from rba_compress.core.map_spec import MapSpec
from rba_compress.latent.anchors import Anchors, random_points
from rba_compress.latent.relative import Aggregation, InvarianceProduct
from rba_compress.latent.stitching import bridge_between
from rba_compress.linalg.similarity import INVARIANTS, Invariant

MAPS = {
    "affine map": MapSpec(kind="affine", damping=1e-2),
    "orthogonal map": MapSpec(kind="orthogonal"),
}
"""Maps fitted to the anchors of both spaces: strong baselines, which must be fitted for every pair."""
PRODUCTS: dict[str, Aggregation] = {f"product, {name}": name for name in get_args(Aggregation)}
TRAINED = ("absolute", *INVARIANTS, *PRODUCTS)
"""Methods with a head of their own; a map leads to the space that the absolute one reads."""
METHODS = (*TRAINED, *MAPS)
Bridge = Invariant | InvarianceProduct | MapSpec | None


@dataclass(frozen=True)
class Row:
    """Result of one method over all ordered pairs of networks: accuracy, or R² of the pixels.

    `own` is the mean over networks of the head on the encoder that it was trained with.
    """

    task: Task
    method: str
    pairs: str
    count: int
    mean: float
    spread: float
    """The standard deviation over pairs."""
    own: float


def bridge_of(method: str, how: Trial) -> Bridge:
    """Return the bridge of a method between two spaces, not trained yet; None for no bridge."""
    if method in PRODUCTS:
        return InvarianceProduct(INVARIANTS, PRODUCTS[method], anchors=how.anchors)
    known: dict[str, Bridge] = {"absolute": None, **{m: m for m in INVARIANTS}, **MAPS}
    return known[method]


def crossed(source: Anchors, target: Anchors, bridge: Bridge) -> nn.Module:
    """Return the module of a bridge from one space to another."""
    return nn.Identity() if bridge is None else bridge_between(source, target, bridge)


@dataclass
class _Network:
    """Space of the test images of one encoder, and the heads and bridges on that space."""

    kind: Kind
    test: Tensor
    anchors: Anchors
    bridges: dict[str, Bridge]
    heads: dict[str, nn.Module]

    def reads(self, other: _Network, method: str) -> Tensor:
        """Return the output of this network's head on the test images as `other` encodes them."""
        bridge = crossed(other.anchors, self.anchors, self.bridges[method])
        output: Tensor = self.heads["absolute" if method in MAPS else method](bridge(other.test))
        return output


def networks(data: Data, how: Trial, progress: Callable[[str], None]) -> Iterator[_Network]:
    """Yield the network of each kind and seed, trained, with its heads."""
    x, labels = data.train
    target = labels if how.task == "classification" else x.flatten(1)
    outputs = data.classes if how.task == "classification" else x[0].numel()
    rows = random_points(x.flatten(1), how.anchors)
    for kind, seed in itertools.product(how.kinds, how.seeds):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            body = encoder(kind, x[0], how.width)
            whole = nn.Sequential(body, head(how.width, outputs))
            fit(whole, (x, target), how.encoder_steps, seed=seed, batch=how.batch, rate=how.rate)
            progress("encoder")
            with torch.no_grad():
                train, test = body(x), body(data.test[0])
            anchors = Anchors.of(train, rows)
            bridges = {method: bridge_of(method, how) for method in MAPS}
            heads: dict[str, nn.Module] = {}
            for method in TRAINED:
                bridges[method] = bridge_of(method, how)
                bridge = crossed(anchors, anchors, bridges[method])
                heads[method] = head(bridge(train[:1]).shape[1], outputs)
                fit(
                    nn.Sequential(bridge, heads[method]),
                    (train, target),
                    how.head_steps,
                    seed=seed,
                    batch=how.batch,
                    rate=how.rate,
                )
                progress("heads")
        yield _Network(kind, test, anchors, bridges, heads)


@torch.no_grad()
def table(made: Sequence[_Network], data: Data, how: Trial) -> list[Row]:
    """Score every method over the ordered pairs of one kind, and of two."""
    images, labels = data.test
    target = labels if how.task == "classification" else images.flatten(1)
    rows = []
    for method in METHODS:
        own = statistics.fmean(score(n.reads(n, method), target) for n in made)
        for pairs, alike in (("one architecture", True), ("two architectures", False)):
            found = [
                score(one.reads(other, method), target)
                for one, other in itertools.permutations(made, 2)
                if (one.kind == other.kind) == alike
            ]
            if found:
                spread = statistics.stdev(found) if len(found) > 1 else 0.0
                mean = statistics.fmean(found)
                rows.append(Row(how.task, method, pairs, len(found), mean, spread, own))
    return rows


@dataclass(frozen=True)
class Stitching:
    """Results of every pair, and the spaces of the test images, by network."""

    rows: tuple[Row, ...]
    spaces: dict[str, Tensor]


def stitching(data: Data, how: Trial) -> Stitching:
    """Train the networks of a trial and stitch every pair of them."""
    each = 1 + len(TRAINED)
    with tqdm(total=each * len(how.seeds) * len(how.kinds), desc=how.task, disable=None) as bar:

        def progress(what: str) -> None:
            bar.set_postfix_str(what, refresh=False)
            bar.update()

        made = [*networks(data, how, progress)]
    names = [f"{kind} {seed}" for kind, seed in itertools.product(how.kinds, how.seeds)]
    spaces = {name: network.test for name, network in zip(names, made, strict=True)}
    return Stitching(tuple(table(made, data, how)), spaces)
