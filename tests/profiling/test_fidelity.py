from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch import Tensor, nn

from rba_compress import Config, Plan, benchmark, splice, supports
from rba_compress.core.batch import Batch, as_batch
from rba_compress.core.cost import Cost
from rba_compress.core.loader import read
from rba_compress.core.map_spec import MapSpec
from rba_compress.graph.tracer import record
from rba_compress.planning.plan_cost import plan_saving
from rba_compress.planning.span_fits import fit_span
from rba_compress.profiling.cost import cost
from rba_compress.profiling.criterion import criterion_of
from rba_compress.profiling.fidelity import compare_outputs, divergence, fidelity
from rba_compress.profiling.profiler import profile
from tests.networks import Chain, loader, rows, seeded


def test_kl_equals_scipy() -> None:
    a, b = torch.randn(5, 7), torch.randn(5, 7)
    p, q = softmax(a.double().numpy(), axis=1), softmax(b.double().numpy(), axis=1)
    np.testing.assert_allclose(divergence("kl", a, b), rel_entr(p, q).sum(1), rtol=1e-9)
    assert not divergence("kl", a, a).any()


def test_squared_error_is_relative_to_each_sample() -> None:
    a, b = torch.randn(5, 2, 3), torch.randn(5, 2, 3)
    expected = [
        (x - y).double().square().sum() / x.double().square().sum() for x, y in zip(a, b, strict=True)
    ]
    torch.testing.assert_close(divergence("nse", a, b), torch.stack(expected))


def labelled(labels: torch.Tensor | None) -> Batch:
    return Batch((), {}, labels)


def test_fidelity_by_hand() -> None:
    original = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 2.0]])
    compressed = torch.tensor([[2.0, 0.0], [3.0, 2.0], [2.0, 0.0], [0.0, 2.0]])
    labels = torch.tensor([0, 1, 1, 1])
    found = compare_outputs(
        "kl", [(original[k], compressed[k], labelled(labels[k])) for k in (slice(3), slice(3, None))]
    )
    assert (found.samples, found.agreement) == (4, 0.75)
    assert (found.accuracy_original, found.accuracy_compressed) == (0.75, 0.5)
    unlabelled = compare_outputs("kl", [(original, compressed, labelled(None))])
    assert unlabelled.accuracy_original is None
    features = compare_outputs("nse", [(original, compressed, labelled(labels))])
    assert features.agreement is None
    assert features.accuracy_compressed is None


def test_scores_of_every_token() -> None:
    original = torch.eye(3).repeat(2, 1, 1) * 5  # (N, T, classes)
    compressed = original.clone()
    compressed[0, 0] = torch.tensor([0.0, 5.0, 0.0])
    found = compare_outputs("kl", [(original, compressed, labelled(torch.tensor([0, 1])))])
    assert found.agreement == pytest.approx((2 / 3 + 1) / 2)
    assert found.accuracy_original is None  # a label a sample says nothing of a token


def test_predicted_costs_are_the_measured_ones() -> None:
    model = seeded(Chain)
    seen = profile(model, loader())
    (profiled,) = seen.chains
    batch = as_batch(rows(3))
    assert (
        seen.original == cost(model, batch) == Cost(macs=4 * 8 + 4 * 256 + 24, params=40 + 4 * 280 + 27)
    )
    for spec in (
        MapSpec(kind="identity"),
        MapSpec(kind="linear"),
        MapSpec(kind="shrunk", shrink=0.5),
        MapSpec(kind="low_rank", rank=2),
    ):
        replacement, tensors = fit_span(profiled, 1, 3, spec)
        compressed = splice(model, Plan(replacements=(replacement,)), tensors)
        saved = plan_saving([profiled.chain], [replacement])
        left = Cost(macs=seen.original.macs - saved.macs, params=seen.original.params - saved.params)
        assert cost(compressed, batch) == left


class Averaged(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return ((super().forward(x) + super().forward(x)) / 2).log_softmax(-1)


class Normed(Chain):
    def __init__(self, depth: int = 4, width: int = 8) -> None:
        super().__init__(depth, width)
        self.head = nn.LayerNorm(width)


def output_kind(model: nn.Module) -> str:
    return criterion_of(model, record(model, as_batch(rows(2))), Config())[0].kind


class Softmaxed(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1)


class Sigmoid(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sigmoid()


def test_the_graph_tells_class_scores_from_features() -> None:
    assert output_kind(seeded(Chain)) == "kl"
    assert output_kind(seeded(Averaged)) == "kl"
    assert output_kind(seeded(Softmaxed)) == "kl"
    assert output_kind(seeded(Sigmoid)) == "bernoulli"
    assert output_kind(seeded(Normed)) == "cosine"


def test_latency_is_paired_and_keeps_the_mode() -> None:
    original, half = seeded(Chain, depth=40).train(), seeded(Chain, depth=4)
    found = benchmark(original, half, rows(64), seconds=0.2)
    assert found.pairs >= 7
    assert found.batch == 64
    assert found.ratio_low <= found.ratio <= found.ratio_high < 0.6
    assert original.training
    itself = benchmark(half, copy.deepcopy(half).to(torch.bfloat16), rows(64), seconds=0, pairs=1)
    assert itself.pairs == 2
    itself = benchmark(half, half, rows(64), seconds=0.2)
    assert 0.7 < itself.ratio < 1.4


def test_fidelity_runs_both_networks_where_they_are() -> None:
    original = seeded(Chain)
    half = seeded(Chain).to(torch.bfloat16)
    found = fidelity(original, half, read(loader()), "kl")
    assert 0 < found.divergence < 1e-3
    assert found.samples == 40
    assert supports(original, rows(2)).chains
