from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rba_compress
from rba_compress import Budget, Config, FidelityError, Result, compress, supports
from rba_compress.cli.digits import Split
from tests.networks import BRIEF_SEARCH, LIGHT, Chain, loader, rows, seeded


def test_the_main_job(result: Result, digits: nn.Module, held_out: tuple[Tensor, Tensor]) -> None:
    x, labels = held_out
    assert type(result.model) is type(digits)
    # The head reads one token, and the others are not computed: whoever asks for them sees that.
    assert result.model.forward_features(x).shape == (len(x), 1, 64)
    assert result.model.get_classifier() is result.model.head
    accuracy = [(m(x).argmax(-1) == labels).float().mean() for m in (digits, result.model)]
    assert accuracy[0] - accuracy[1] <= 0.01  # within a point of the original
    assert result.report.compressed.macs <= 0.85 * result.report.original.macs
    assert result.report.latency.ratio < 1  # on blocks this small, calls cost as much as products


@pytest.mark.slow
def test_features_are_kept_where_they_are_asked_for(
    digits: nn.Module, digits_loader: list[Any], held_out: Split
) -> None:
    config = Config(**(LIGHT.model_dump() | {"keep_features": True, "window": 1}))
    compressed = compress(digits, digits_loader[:1], budget=Budget(macs=0.9), config=config)
    x = held_out[0][:4]
    assert compressed.model.forward_features(x).shape == digits.forward_features(x).shape
    assert "every position is computed" in compressed.report.table()
    assert not any(r.exact for r in compressed.plan.replacements)


@pytest.mark.slow
def test_the_exact_pass_alone_costs_nothing(
    digits: nn.Module, digits_loader: list[Any], held_out: Split
) -> None:
    """Nothing else is done where the exact pass meets the budget."""
    compressed = compress(digits, digits_loader[:1], budget=Budget(macs=0.95), config=BRIEF_SEARCH)
    (only,) = compressed.plan.replacements
    assert only.exact
    assert compressed.report.fidelity.divergence < 1e-9
    assert compressed.front == ()
    assert "others not computed" in compressed.report.table()
    torch.testing.assert_close(compressed.model(held_out[0]), digits(held_out[0]), rtol=1e-5, atol=1e-5)
    # Down to the last sample that it computes for: seven percent of the network.
    assert compressed.report.compressed.macs < 0.93 * compressed.report.original.macs


def test_the_report_is_of_samples_that_nothing_was_chosen_on(result: Result) -> None:
    fidelity = result.report.fidelity
    assert fidelity.samples == 19  # one in ten of 192
    assert fidelity.kind == "kl"
    assert fidelity.accuracy_original is not None
    table = result.report.table()
    for word in ("accuracy", "agreement", "parameters", "MACs", "latency, batch", "KL divergence"):
        assert word in table


def modes(model: nn.Module) -> list[bool]:
    return [m.training for m in model.modules()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = seeded(Chain, depth=8).to(dtype)
    data = loader(200, 50)  # in float32
    compressed = compress(model, data, budget=Budget(macs=0.8), config=LIGHT)
    assert {p.dtype for p in compressed.model.parameters()} == {dtype}
    assert compressed.report.fidelity.agreement is not None
    assert compressed.report.fidelity.agreement > 0.7


def test_a_model_in_train_mode_comes_back_in_train_mode() -> None:
    model = seeded(Chain).train()
    model.blocks[0].eval()
    before = modes(model)
    compressed = compress(model, loader(), budget=Budget(macs=0.8))
    assert modes(model) == before
    assert compressed.model.training
    reference = compress(seeded(Chain), loader(), budget=Budget(macs=0.8))
    assert compressed.plan == reference.plan


def test_wrappers_are_taken_off() -> None:
    plain = seeded(Chain)
    reference = compress(plain, loader(), budget=Budget(macs=0.8), config=LIGHT)
    wrapped: list[nn.Module] = [nn.DataParallel(seeded(Chain)), torch.compile(seeded(Chain))]  # type: ignore[list-item]
    for model in wrapped:
        found = compress(model, loader(), budget=Budget(macs=0.8), config=LIGHT)
        assert type(found.model) is Chain
        assert found.plan == reference.plan
        assert torch.equal(found.model(rows(3)), reference.model(rows(3)))


def test_a_distributed_wrapper_is_taken_off(tmp_path: Any) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(seeded(Chain))
        assert len(supports(model, rows(4)).chains[0]) == 4
    finally:
        torch.distributed.destroy_process_group()


def test_batches_of_every_form_give_the_same_plan() -> None:
    model = seeded(Chain)
    plans = [
        compress(model, data, budget=Budget(macs=0.8), config=LIGHT).plan
        for data in (
            loader(),
            [(x, torch.zeros(10, dtype=torch.long)) for x in loader()],
            [[x] for x in loader()],
            [{"x": x} for x in loader()],
        )
    ]
    assert all(plan == plans[0] for plan in plans)


def test_features_without_classes_are_measured_by_their_error() -> None:
    class Features(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.LayerNorm(8)

    compressed = compress(seeded(Features), loader(), budget=Budget(macs=0.8))
    assert compressed.plan.divergence == "cosine"
    assert compressed.report.fidelity.agreement is None
    assert "1 - cosine" in compressed.report.table()


def test_random_state_is_not_touched(digits_loader: list[Any]) -> None:
    before = torch.get_rng_state()
    assert torch.is_grad_enabled()
    compress(seeded(Chain), loader(), budget=Budget(macs=0.8))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


def test_the_public_names() -> None:
    promised = "profile search splice compress save load supports benchmark Budget Config Plan Profile RBAError"
    assert set(promised.split()) <= set(rba_compress.__all__)
    assert all(hasattr(rba_compress, name) for name in rba_compress.__all__)


@pytest.mark.slow
def test_import_has_no_side_effects_and_is_lazy() -> None:
    code = (
        "import random, torch; state = torch.get_rng_state(), random.getstate();"
        "threads = torch.get_num_threads();"
        "import rba_compress, sys;"
        "assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1];"
        "assert torch.get_num_threads() == threads and not torch.cuda.is_initialized();"
        "heavy = {'matplotlib', 'onnx', 'onnxruntime', 'sklearn', 'transformers', 'timm'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def loud() -> nn.Module:
    """Network whose blocks each turn the stream round: nothing can be left out."""
    model: Any = seeded(Chain, depth=4)
    generator = torch.Generator().manual_seed(3)
    for block in model.blocks:
        block.up.weight.data = 2 * torch.randn(16, 8, generator=generator)
        block.down.weight.data = 2 * torch.randn(8, 16, generator=generator)
    return model


def test_without_a_budget_nothing_far_from_the_original_is_returned() -> None:
    with pytest.raises(
        FidelityError,
        match=r"within Budget\(macs=0.75\) has a KL divergence of [\d.]+ \(95 % interval [\d.]+ to [\d.]+\)"
        r" on 20 held-out samples, above 0.5, .* Pass more samples, a budget of quality",
    ):
        compress(loud(), loader(200, 20), config=LIGHT)
    accepted = compress(loud(), loader(200, 20), budget=Budget(macs=0.75), config=LIGHT)
    assert accepted.report.fidelity.divergence > 0.5
    near = compress(seeded(Chain), loader(200, 20), config=LIGHT)
    assert near.report.fidelity.divergence <= 0.5
    own = compress(
        loud(), loader(200, 20), config=LIGHT, divergence=lambda a, b, _: (a - b).norm(dim=-1)
    )
    assert own.report.fidelity.divergence > 0.5  # whose unit nobody else knows


def test_every_result_has_its_interval_or_says_why_not() -> None:
    few = compress(seeded(Chain), [rows(10)], budget=Budget(macs=0.8), config=LIGHT)
    assert few.report.fidelity.divergence_low is None
    assert (
        "no interval can be given on 1 held-out samples: pass 20 samples or more" in few.report.warnings
    )
    some = compress(seeded(Chain), loader(), budget=Budget(macs=0.8), config=LIGHT).report.fidelity
    assert some.divergence_low is not None
    assert some.agreement_low is not None


def test_the_samples_are_dealt_once() -> None:
    """A profile reads the loader; what a search, the report and `check` need is read once more."""

    class Counted(list[Tensor]):
        batches = 0

        def __iter__(self) -> Any:
            for batch in super().__iter__():
                Counted.batches += 1
                yield batch

    data = Counted(loader())
    compress(seeded(Chain), data, budget=Budget(macs=0.8), config=LIGHT)
    assert Counted.batches <= 2 * len(data) + 1  # and the first batch, for its form
