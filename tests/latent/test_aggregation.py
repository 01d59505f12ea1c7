"""Spaces of several networks as one: the mean by hand, its laws, and networks that learned parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rba_compress import SpaceError
from rba_compress.cli.digits import digits_data
from rba_compress.cli.latent_demos.aggregation_trial import SEVERAL, aggregating, divided
from rba_compress.cli.latent_demos.networks import Data
from rba_compress.cli.latent_demos.pictures import plot_aggregated
from rba_compress.cli.latent_demos.trials import SETTINGS, AggregationTrial
from rba_compress.latent import Anchors, RelativeProjection, aggregate, class_separability
from rba_compress.linalg.similarity import INVARIANTS
from tests.latent.test_stitching import broken, rotation, space


@pytest.mark.parametrize("metric", INVARIANTS)
def test_a_sample_is_the_mean_over_the_spaces_that_hold_it(metric: Any) -> None:
    spaces = [space(4, 5), space(3, 7, 1)]
    anchors = [Anchors(space(6, 5, 2)), Anchors(space(6, 7, 3))]
    ids = [("a", "b", "c", "d"), ("c", "x", "a")]
    found = aggregate(spaces, anchors, ids=ids, metric=metric, weights=(1, 3))
    one, two = (RelativeProjection(a, metric)(s) for a, s in zip(anchors, spaces, strict=True))
    expected = torch.stack(
        [(one[0] + 3 * two[2]) / 4, one[1], (one[2] + 3 * two[0]) / 4, one[3], two[1]]
    )
    assert found.ids == ("a", "b", "c", "d", "x")
    assert found.held.tolist() == [2, 1, 2, 1, 1]
    torch.testing.assert_close(found.space, expected)


def test_without_ids_all_spaces_hold_all_samples() -> None:
    x, anchors = space(9, 4), Anchors(space(3, 4, 1))
    found = aggregate([x, 2 * x], [anchors, Anchors(2 * anchors.vectors)])
    torch.testing.assert_close(found.space, RelativeProjection(anchors)(x))
    assert found.ids == tuple(range(9))


@given(seed=st.integers(0, 10**6), weights=st.tuples(*[st.floats(0.1, 10)] * 3))
def test_coordinates_and_the_order_of_spaces_do_not_matter(
    seed: int, weights: tuple[float, ...]
) -> None:
    spaces = [space(6, 5, seed + k) for k in range(3)]
    rows = (0, 2, 4)
    ids = [range(6), range(3, 9), range(2, 8)]
    anchors = [Anchors(s[[*rows]]) for s in spaces]
    turned = [s @ rotation(5, seed + 9 + k) for k, s in enumerate(spaces)]
    before = aggregate(spaces, anchors, ids=ids, weights=weights)
    after = aggregate(turned, [Anchors(s[[*rows]]) for s in turned], ids=ids, weights=weights)
    torch.testing.assert_close(after.space, before.space)
    other = aggregate(spaces[::-1], anchors[::-1], ids=ids[::-1], weights=weights[::-1])
    order = [other.ids.index(name) for name in before.ids]
    torch.testing.assert_close(other.space[order], before.space)


def test_separability_is_what_the_source_computes() -> None:
    x, labels = space(40, 5), torch.arange(40) % 4
    pairs = []
    for a in range(4):
        for b in range(4):
            if a != b:
                one, two = (x[labels == c].numpy() for c in (a, b))
                width = [np.linalg.norm(p - p.mean(0), axis=1).mean() for p in (one, two)]
                pairs.append(np.linalg.norm(one.mean(0) - two.mean(0)) / (sum(width) / 2))
    assert class_separability(x, labels) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda x, a: aggregate([], []), "0 spaces with 0 anchors: pass one or more"),
        (lambda x, a: aggregate([x, x], [a]), "2 spaces with 1 anchors"),
        (lambda x, a: aggregate([x, x], [a, a], weights=(1,)), "2 spaces with 1 weights"),
        (lambda x, a: aggregate([x], [a], weights=(0,)), "space 0 has the weight 0: leave it out"),
        (lambda x, a: aggregate([x, x[:3]], [a, a]), "space 0 has 5 samples and space 1 has 3"),
        (lambda x, a: aggregate([x], [a], ids=[(1, 2)]), "5 samples and 2 different ids in 2"),
        (lambda x, a: aggregate([x], [a], ids=[(1, 2, 3, 4, 4)]), "5 samples and 4 different ids in 5"),
        (lambda x, a: aggregate([x, x], [a, Anchors(x[:3])]), "2 anchors of one space and 3"),
        (lambda x, a: aggregate([broken(x, 1)], [a]), "space 0: 1 of 5 rows hold NaN"),
        (lambda x, a: aggregate([x], [a], metric="dot"), "metric 'dot' is not known"),
        (
            lambda x, a: aggregate([x, x.to("meta")], [a, a]),
            "space 0 is on cpu and space 1 on meta",
        ),
        (lambda x, a: class_separability(x, torch.zeros(5)), "5 labels of 1 classes for 5 samples"),
    ],
)
def test_what_cannot_be_merged_is_refused(what: Any, message: str) -> None:
    x = space(5, 4)
    with pytest.raises(SpaceError, match=message):
        what(x, Anchors(x[:2]))


def test_tasks_share_what_their_setting_says() -> None:
    data, how = Data(*digits_data()), AggregationTrial(anchors=50)
    for setting in SETTINGS:
        parts, anchors = divided(setting, data, how, torch.Generator().manual_seed(0))
        train = [set(part.train) for part in parts]
        classes = [set(data.train[1][part.train].tolist()) for part in parts]
        assert set.union(*classes) == set(range(10))
        assert set.union(*({*part.test} for part in parts)) == set(range(len(data.test[1])))
        assert len(set(anchors)) == 50
        if setting == "shared samples":
            assert len(set.intersection(*classes)) == 4
            assert {*anchors} < set.intersection(*train)
            continue
        assert not set.intersection(*train)
        assert not {*anchors} & set.union(*train)
        assert len(set.intersection(*classes)) == (10 if setting == "shared classes" else 0)


@pytest.mark.slow
def test_networks_that_learned_parts_are_merged() -> None:
    data, how = Data(*digits_data()), AggregationTrial(seeds=(0,), anchors=48, steps=80)
    state = torch.random.get_rng_state()
    found = aggregating(data, how)
    assert torch.equal(torch.random.get_rng_state(), state)
    rows = {(row.setting, row.space): row.mean for row in found.rows}
    for setting in SETTINGS:
        assert rows[setting, "end to end"].cka == pytest.approx(1)
        assert rows[setting, "end to end"].knn > 0.9
        assert rows[setting, "aggregated"].task > rows[setting, "end to end"].task
    # All classes are in every task, and which task a digit is of cannot be seen in it.
    assert rows["shared classes", "end to end"].task < 0.45
    assert rows["shared classes", "aggregated"].task > 0.95
    assert rows["shared classes", "aggregated, task hidden"].task < 0.45
    assert (found.owners["neither"] >= 0).all()
    assert (found.owners["shared samples"] == SEVERAL).any()
    figure = plot_aggregated(found, ("end to end", "aggregated"))
    assert len(figure.axes) == 2 * len(SETTINGS)
    again = aggregating(data, AggregationTrial(settings=("neither",), seeds=(0,), anchors=48, steps=80))
    assert again.rows == tuple(row for row in found.rows if row.setting == "neither")
