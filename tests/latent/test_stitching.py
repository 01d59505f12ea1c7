"""Relative spaces against their definitions and laws; anchors; stitching of networks that share nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scipy.spatial.distance import cdist
from torch import Tensor, nn

from rba_compress import SpaceError, export_onnx
from rba_compress.cli.digits import digits_data
from rba_compress.cli.latent_demos.networks import Data
from rba_compress.cli.latent_demos.stitching_trial import METHODS, stitching
from rba_compress.cli.latent_demos.trials import Trial
from rba_compress.core.map_spec import MapSpec
from rba_compress.latent import (
    Anchors,
    InvarianceProduct,
    RelativeProjection,
    farthest_points,
    k_means,
    random_points,
    stitch,
)
from rba_compress.linalg.similarity import INVARIANTS
from tests.networks import seeded

SCIPY = {"euclidean": "euclidean", "l1": "cityblock", "linf": "chebyshev"}


def space(rows: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64)


def rotation(width: int, seed: int) -> Tensor:
    return torch.linalg.qr(space(width, width, seed)).Q


def signed_permutation(width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (width,), generator=generator).double() * 2 - 1
    return torch.eye(width, dtype=torch.float64)[torch.randperm(width, generator=generator)] * signs


@pytest.mark.parametrize("metric", INVARIANTS)
def test_a_projection_is_what_scipy_says(metric: Any) -> None:
    x, anchors = space(50, 7), space(9, 7, 1)
    found = RelativeProjection(anchors, metric)(x)
    if metric == "cosine":
        expected = 1 - cdist(x.numpy(), anchors.numpy(), "cosine")
    else:
        expected = cdist(x.numpy(), anchors.numpy(), SCIPY[metric])
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)
    tokens = RelativeProjection(anchors, metric)(x.reshape(5, 10, 7))
    assert torch.equal(tokens, found.reshape(5, 10, 9))


@given(seed=st.integers(0, 10**6), width=st.integers(1, 9), scale=st.floats(1e-3, 1e3))
def test_each_invariance_holds(seed: int, width: int, scale: float) -> None:
    x, anchors, shift = space(20, width, seed), space(5, width, seed + 1), space(1, width, seed + 2)
    turn, swap = rotation(width, seed + 3), signed_permutation(width, seed + 4)

    def held(metric: Any, move: Any) -> None:
        before = RelativeProjection(anchors, metric)(x)
        after = RelativeProjection(move(anchors), metric)(move(x))
        torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)

    held("cosine", lambda v: scale * v @ turn)
    held("euclidean", lambda v: v @ turn + scale * shift)
    for metric in ("l1", "linf"):
        held(metric, lambda v: v @ swap + scale * shift)


def test_no_invariance_is_claimed_that_does_not_hold() -> None:
    x, anchors, turn = space(20, 6), space(5, 6, 1), rotation(6, 2)

    def gap(metric: Any, move: Any) -> float:
        before = RelativeProjection(anchors, metric)(x)
        return float((RelativeProjection(move(anchors), metric)(move(x)) - before).abs().max())

    assert gap("cosine", lambda v: v + 1) > 0.1
    assert gap("euclidean", lambda v: 2 * v) > 0.1
    assert gap("l1", lambda v: v @ turn) > 0.1
    assert gap("linf", lambda v: v @ turn) > 0.1


@pytest.mark.parametrize("aggregation", ["concatenation", "sum", "attention"])
def test_a_product_is_kept_and_bound_to_another_space(aggregation: Any, tmp_path: Path) -> None:
    x, turn = space(30, 6).float(), rotation(6, 5).float()
    anchors = space(8, 6, 1).float()
    product = seeded(
        InvarianceProduct, ("cosine", "euclidean"), aggregation, anchors=8, width=12, heads=2
    )
    here, there = product.bind(anchors), product.bind(anchors @ turn)
    assert here(x).shape == (30, product.width)
    assert product.width == (16 if aggregation == "concatenation" else 12)
    torch.testing.assert_close(there(x @ turn), here(x), rtol=1e-4, atol=1e-5)
    save_file(here.state_dict(), tmp_path / "product.safetensors")
    again = InvarianceProduct(("cosine", "euclidean"), aggregation, anchors=8, width=12, heads=2).bind(
        torch.ones(8, 6)
    )
    again.load_state_dict(load_file(tmp_path / "product.safetensors"))
    assert torch.equal(again(x), here(x))


def test_the_sum_is_what_the_paper_writes() -> None:
    x, anchors = space(5, 4).float(), space(6, 4, 1).float()
    product = seeded(InvarianceProduct, ("cosine", "l1"), "sum", anchors=6, width=3)
    expected = torch.zeros(5, 3)
    for branch, metric in zip(product.branches, ("cosine", "l1"), strict=True):
        raw = RelativeProjection(anchors, metric)(x)
        normed = (raw - raw.mean(1, keepdim=True)) / (
            raw.var(1, keepdim=True, correction=0) + 1e-5
        ).sqrt()
        expected += torch.tanh(normed @ branch[1].weight.T + branch[1].bias)
    torch.testing.assert_close(product.bind(anchors)(x), expected)


@pytest.mark.parametrize("select", [random_points, farthest_points, k_means])
def test_anchors_are_different_rows_and_the_same_for_a_seed(select: Any) -> None:
    x = space(60, 3)
    state = torch.random.get_rng_state()
    rows = select(x, 12, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(set(rows)) == 12
    assert all(0 <= row < 60 for row in rows)
    assert select(x, 12, seed=4) == rows
    assert len(set(select(x, 60))) == 60


def test_farthest_points_cover_and_k_means_sit_in_the_middle() -> None:
    centres = 100 * torch.eye(4, dtype=torch.float64)
    x = (centres[:, None] + space(100, 4).reshape(4, 25, 4)).reshape(100, 4)
    for rows in (farthest_points(x, 4), k_means(x, 4)):
        assert sorted(row // 25 for row in rows) == [0, 1, 2, 3]
    for row in k_means(x, 4):
        cluster = x[row // 25 * 25 :][:25]
        nearest = (cluster - cluster.mean(0)).norm(dim=1).argmin()
        assert row == row // 25 * 25 + int(nearest)


class Encoder(nn.Module):
    """Encoder of the same features in coordinates of its own."""

    def __init__(self, turn: Tensor) -> None:
        super().__init__()
        self.turn = nn.Parameter(turn)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x) @ self.turn


@pytest.fixture
def apart() -> tuple[Encoder, Encoder, Tensor]:
    """Two encoders that differ by an orthogonal map, and inputs."""
    return Encoder(rotation(6, 1).float()), Encoder(rotation(6, 2).float()), space(40, 6).float()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_a_head_reads_another_encoder(metric: Any, apart: tuple[Encoder, Encoder, Tensor]) -> None:
    one, other, x = apart
    rows = farthest_points(x, 10)
    anchors = [Anchors.of(encoder(x).detach(), rows) for encoder in (one, other)]
    head = seeded(nn.Linear, 10, 3)
    own = stitch(one, head, anchors[0], anchors[0], metric)
    stitched = stitch(other, head, anchors[1], anchors[0], metric, classes=3)
    torch.testing.assert_close(stitched(x), own(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["linear", "affine", "orthogonal"])
def test_a_map_is_fitted_between_the_anchors(kind: Any, apart: tuple[Encoder, Encoder, Tensor]) -> None:
    one, other, x = apart
    head = seeded(nn.Linear, 6, 3)
    anchors = [Anchors.of(encoder(x).detach(), range(20)) for encoder in (one, other)]
    stitched = stitch(other, head, anchors[1], anchors[0], MapSpec(kind=kind))
    torch.testing.assert_close(stitched(x), head(one(x)), rtol=1e-3, atol=1e-4)
    assert torch.equal(stitched.encoder.turn, other.turn)


@pytest.mark.slow
def test_widths_may_differ_and_the_network_is_exported(tmp_path: Path) -> None:
    x = space(40, 6).float()
    wide = nn.Sequential(nn.Linear(6, 9, bias=False), nn.Tanh())
    narrow = seeded(nn.Linear, 6, 4)
    with torch.no_grad():
        source, target = Anchors(wide(x)), Anchors(narrow(x))
    head = seeded(nn.Linear, 4, 3)
    for kind in ("affine", "orthogonal"):
        stitched = stitch(wide, head, source, target, MapSpec(kind=kind)).eval()
        assert stitched(x).shape == (40, 3)
    turn = stitched.bridge.weight
    torch.testing.assert_close(turn @ turn.T, torch.eye(4), rtol=1e-5, atol=1e-5)
    relative = stitch(wide, seeded(nn.Linear, 40, 3), source, target, "cosine").eval()
    certificate = export_onnx(relative, tmp_path / "stitched.onnx", x, seconds=0.1)
    assert max(parity.max_rel for parity in certificate.parity) <= 1e-4


def test_the_parts_are_left_as_they_were() -> None:
    x = space(8, 4).float()
    head = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3)).train()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    stitched = stitch(nn.Identity(), head, Anchors(x), Anchors(x))
    assert head.training
    assert stitched.training
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def broken(x: Tensor, row: int) -> Tensor:
    x = x.clone()
    x[row, 0] = torch.nan
    return x


def stitched_with(source: Anchors, target: Anchors, bridge: Any = "cosine", **more: Any) -> Any:
    return stitch(nn.Identity(), nn.Linear(4, 3), source, target, bridge, **more)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            lambda x: RelativeProjection(x, "cosin"),
            r"metric 'cosin' is not known: choose one of cosine",
        ),  # type: ignore[arg-type]
        (
            lambda x: RelativeProjection(x * torch.tensor([[1], [0], [1], [1]])),
            "anchor 1: take other samples",
        ),
        (
            lambda x: RelativeProjection(broken(x, 2)),
            "1 of 4 rows hold NaN or infinity, the first is row 2",
        ),
        (
            lambda x: RelativeProjection(x[None]),
            r"\(1, 4, 6\) of torch.float32, where \(samples, channels\)",
        ),
        (
            lambda x: RelativeProjection(x)(x[:, :5]),
            "vectors of 5 channels on cpu, anchors of 6 on cpu",
        ),
        (
            lambda x: RelativeProjection(x)(x.to("meta")),
            "vectors of 6 channels on meta, anchors of 6 on cpu",
        ),
        (lambda x: InvarianceProduct(("l2",), anchors=4), "metric 'l2' is not known"),  # type: ignore[arg-type]
        (lambda x: InvarianceProduct(aggregation="mean", anchors=4), "aggregation 'mean' is not known"),  # type: ignore[arg-type]
        (
            lambda x: InvarianceProduct((), anchors=4),
            r"the metrics are \[\]: name one or more, each once",
        ),
        (
            lambda x: InvarianceProduct(aggregation="attention", anchors=4, heads=3),
            "3 heads do not divide",
        ),
        (lambda x: InvarianceProduct(anchors=5).bind(x), "4 anchors where 5 were meant"),
        (lambda x: Anchors(x, (1, 2)), "4 anchors with 2 ids"),
        (lambda x: Anchors(x, (1, 2, 2, 3)), "the anchor 2 is there twice"),
        (lambda x: random_points(x, 5), "5 anchors of 4 samples: ask for 1 to 4"),
        (lambda x: farthest_points(x[[0, 0, 1, 1]], 3), "2 different samples"),
        (
            lambda x: stitched_with(Anchors(x), Anchors(x[:3])),
            "4 anchors of one space and 3 of the other",
        ),
        (
            lambda x: stitched_with(Anchors.of(x, (0, 1, 2, 3)), Anchors.of(x, (0, 2, 1, 3))),
            r"in another order, from place 1 on \(1 and 2\): sort both by their ids",
        ),
        (
            lambda x: stitched_with(Anchors.of(x, (0, 1, 2)), Anchors.of(x, (0, 1, 3))),
            r"1 anchors are other samples in the other space \(such as 2\)",
        ),
        (lambda x: stitched_with(Anchors(x), Anchors(x), classes=10), "4 anchors for 10 classes"),
        (
            lambda x: stitched_with(Anchors(x), Anchors(x), MapSpec(kind="identity")),
            "'identity' does not lead",
        ),
        (
            lambda x: stitched_with(Anchors(x), Anchors(x), MapSpec(kind="affine")),
            "the head does not take",
        ),
    ],
)
def test_what_does_not_fit_is_refused(what: Any, message: str) -> None:
    with pytest.raises(SpaceError, match=message):
        what(space(4, 6).float())


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "reconstruction"])
def test_networks_that_were_trained_apart_are_stitched(task: Any) -> None:
    trial = Trial(task=task, seeds=(0,), anchors=48, encoder_steps=150, head_steps=120)
    state = torch.random.get_rng_state()
    rows = {row.method: row for row in stitching(Data(*digits_data()), trial).rows}
    assert torch.equal(torch.random.get_rng_state(), state)
    assert set(rows) == set(METHODS)
    assert {(row.pairs, row.count) for row in rows.values()} == {("two architectures", 2)}
    assert rows["absolute"].own > 0.5
    assert rows["absolute"].mean < 0.3
    for method in ("cosine", "euclidean", "product, sum", "orthogonal map"):
        assert rows[method].mean > rows["absolute"].mean + 0.3
    again = stitching(Data(*digits_data()), trial).rows
    assert {row.method: row for row in again} == rows
