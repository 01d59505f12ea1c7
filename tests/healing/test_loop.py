from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rba_compress import (
    Architecture,
    ArtifactError,
    Budget,
    Healing,
    LoaderError,
    ModelError,
    PlanError,
    Result,
    compress,
    export_onnx,
    heal,
    load,
    profile,
    splice,
    verify,
)
from rba_compress.api import reopen
from rba_compress.artifacts.artifact import read_manifest
from rba_compress.cli.digits import ARCHITECTURE, ARGUMENTS, digits_model
from rba_compress.core.batch import Batch
from rba_compress.core.config import Augmentation
from rba_compress.core.loader import read
from rba_compress.core.map_spec import MapSpec
from rba_compress.healing.augmentation import augmented
from rba_compress.healing.student import Student
from rba_compress.planning.span_fits import fit_spans
from rba_compress.reporting.comparison import measured
from tests.networks import BRIEF, LIGHT, Chain, loader, rows, seeded, to_heal

TRAINED = ("maps", "norms", "adapters", "all")


@pytest.fixture(scope="module")
def original() -> nn.Module:
    return seeded(Chain, 6)


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    return loader(400, 50)


@pytest.fixture(scope="module")
def compressed(original: nn.Module, data: list[Tensor]) -> Result:
    """Network with a scale in place of some of six blocks, a poor stand-in."""
    config = LIGHT.model_copy(update={"maps": ("scale",)})
    return compress(original, data, budget=Budget(macs=0.7), config=config)


def kl(original: nn.Module, compressed: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        wanted, found = original(x).double().log_softmax(1), compressed(x).double().log_softmax(1)
    return float(F.kl_div(found, wanted, log_target=True, reduction="batchmean"))


@pytest.mark.parametrize("train", TRAINED)
def test_a_healed_network_is_closer_to_its_original(
    original: nn.Module, data: list[Tensor], compressed: Result, train: Any
) -> None:
    before = {name: p.clone() for name, p in compressed.model.state_dict().items()}
    originals = {name: p.clone() for name, p in original.state_dict().items()}
    healing = BRIEF.model_copy(update={"train": train, "rate": 5e-3, "rank": 2, "epochs": 8})
    healed = heal(compressed, data, original=original, healing=healing)
    fresh = rows(500, seed=7)
    assert kl(original, healed.model, fresh) < kl(original, compressed.model, fresh)
    record = healed.plan.healed
    assert record is not None
    assert record.after < record.before
    assert (record.samples, len(record.data)) == (280, 64)
    assert record.steps % (280 // 32) == 0
    assert "healed in" in healed.report.table()
    # What went in is as it was, and trains no more than it did.
    assert all(torch.equal(p, before[name]) for name, p in compressed.model.state_dict().items())
    assert all(torch.equal(p, originals[name]) for name, p in original.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in healed.model.parameters())
    changed = {n for n, p in healed.model.named_parameters() if not torch.equal(p, before[n])}
    maps = {name for name in before if name not in originals}
    assert changed <= set(record.keys)
    if train == "maps":
        assert changed == maps
    if train == "norms":
        assert all(before[name].ndim == 1 for name in changed - maps)
    if train == "adapters":
        grown = {
            n: (healed.model.state_dict()[n] - before[n]) for n in changed if n.endswith("up.weight")
        }
        assert grown
        assert all(torch.linalg.matrix_rank(g, rtol=1e-3) <= 2 for g in grown.values())


@pytest.mark.slow
def test_it_is_saved_reloaded_exported_and_certified_as_any_other(
    tmp_path: Path, digits: nn.Module, digits_loader: list[Any]
) -> None:
    seen = profile(digits, digits_loader)
    found = fit_spans(seen.chains[0], [(3, 4), (6, 7), (8, 10)], MapSpec(kind="shrunk", shrink=0.7))
    compressed = splice(digits, found.plan, found.tensors)
    report = measured(digits, compressed, read(digits_loader), seen, found.plan, samples="all of them")
    result = Result(compressed, found.plan, report, found.tensors, seen)
    healing = Healing(train="all", rate=1e-4, epochs=4, batch=32, augment=())
    healed = heal(result, digits_loader, original=digits, healing=healing)
    assert healed.plan.healed is not None
    x = digits_loader[0][0][:4]
    healed.save(
        tmp_path / "compressed", architecture=Architecture(name=ARCHITECTURE, arguments=ARGUMENTS)
    )
    healed.save(tmp_path / "delta", delta=True)
    for again in (load(tmp_path / "compressed"), load(tmp_path / "delta", original=digits)):
        assert torch.equal(again(x), healed.model(x))
    assert read_manifest(tmp_path / "compressed").plan.healed == healed.plan.healed
    certificate = export_onnx(tmp_path / "compressed", tmp_path / "compressed" / "model.onnx", x)
    assert max(p.max_rel for p in certificate.parity) < 1e-4
    assert verify(tmp_path / "compressed")
    # Healed once more, from the directory.
    opened = reopen(tmp_path / "delta", digits_loader, original=digits)
    assert torch.equal(opened.model(x), healed.model(x))
    twice = heal(
        opened, digits_loader, original=digits, healing=healing.model_copy(update={"train": "maps"})
    )
    assert twice.plan.healed is None or set(twice.plan.healed.keys) >= set(healed.plan.healed.keys)


def test_a_network_of_ones_own(original: nn.Module, data: list[Tensor], compressed: Result) -> None:
    healed = heal(compressed.model, data, original=original, healing=BRIEF)
    assert type(healed) is Chain
    assert kl(original, healed, rows(500, seed=7)) < kl(original, compressed.model, rows(500, seed=7))


def test_it_is_never_worse_than_what_went_in(
    original: nn.Module, data: list[Tensor], compressed: Result
) -> None:
    wild = BRIEF.model_copy(update={"rate": 100.0, "epochs": 1})
    healed = heal(compressed, data, original=original, healing=wild)
    assert healed.plan == compressed.plan
    assert healed.model is compressed.model
    assert "healing did not help and the network is as it was" in healed.report.table()
    with pytest.warns(UserWarning, match="healing did not help"):
        heal(compressed.model, data, original=original, healing=wild)


def test_the_same_seed_gives_the_same_network(
    original: nn.Module, data: list[Tensor], compressed: Result
) -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, second = (heal(compressed, data, original=original, healing=BRIEF) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(t, second.tensors[key]) for key, t in first.tensors.items())
    other = heal(compressed, data, original=original, healing=BRIEF.model_copy(update={"seed": 1}))
    assert any(not torch.equal(t, other.tensors[key]) for key, t in first.tensors.items())


class Poisoned(nn.Module):
    """A `Chain` whose output is NaN from a number of training steps on."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = seeded(Chain, 6)
        self.left = 10**9

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.left -= 1
        return self.chain(x) * (1.0 if self.left > 0 else torch.nan)


def test_a_loss_that_is_nan_stops_and_keeps_the_best(data: list[Tensor]) -> None:
    original = Poisoned()
    config = LIGHT.model_copy(update={"maps": ("linear",)})
    compressed = compress(original, data, budget=Budget(macs=0.7), config=config)
    compressed.model.left = 20  # type: ignore[assignment]
    healed = heal(compressed, data, original=original, healing=BRIEF)
    assert "the loss is NaN or infinite at step 19: what was best is kept" in healed.report.table()
    assert healed.plan.healed is not None
    assert healed.plan.healed.steps == 16
    assert all(bool(torch.isfinite(t).all()) for t in healed.tensors.values())


def test_labels_are_learned_from_where_they_are_asked_for(
    original: nn.Module, data: list[Tensor], compressed: Result
) -> None:
    # Labels of another network than the original: only they can teach them.
    other = seeded(Chain, 2)
    labelled = [(x, other(x).argmax(1)) for x in data]
    x = rows(500, seed=7)
    right = []
    for share in (0.0, 1.0):
        healing = Healing(train="all", rate=1e-2, epochs=8, labels=share, smoothing=0.05)
        healed = heal(compressed, labelled, original=original, healing=healing)
        right.append(float((healed.model(x).argmax(1) == other(x).argmax(1)).float().mean()))
    assert right[1] > right[0] + 0.1
    with pytest.raises(LoaderError, match="labels are asked for: let every batch"):
        heal(compressed, data, original=original, healing=Healing(labels=0.5))


def test_streams_are_matched_where_they_are_asked_for(
    original: nn.Module, data: list[Tensor], compressed: Result
) -> None:
    def error(model: nn.Module) -> float:
        ends: list[Tensor] = []
        for network in (original, model):
            handle = network.head.register_forward_pre_hook(lambda _, args: ends.append(args[0]))  # type: ignore[union-attr]
            network(rows(500, seed=7))
            handle.remove()
        return float((ends[0] - ends[1]).detach().norm())

    healing = BRIEF.model_copy(update={"rate": 5e-3})
    plain = heal(compressed, data, original=original, healing=healing)
    matched = heal(
        compressed, data, original=original, healing=healing.model_copy(update={"features": 10.0})
    )
    assert error(matched.model) < error(plain.model)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from rba_compress.healing import loop as healing
healing.EVERY = 0.0
torch.set_num_threads(1)
from tests.networks import BRIEF, to_heal
from rba_compress import heal
step = healing._Run.step
def deadly(self, number, rate):
    if number == 23:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, number, rate)
healing._Run.step = deadly
original, data, compressed = to_heal()
heal(compressed, data, original=original, healing=BRIEF, checkpoint=Path(sys.argv[1]))
"""
"""A training that is killed in its third epoch, in a process of its own."""


@pytest.mark.slow
def test_a_training_that_was_killed_goes_on_to_the_same_end(tmp_path: Path) -> None:
    path = tmp_path / "heal.checkpoint"
    ended = subprocess.run([sys.executable, "-c", KILLED, path], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert path.is_file()
    original, data, compressed = to_heal()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with pytest.raises(ArtifactError, match="is the checkpoint of another training"):
            other = BRIEF.model_copy(update={"seed": 5})
            heal(compressed, data, original=original, healing=other, checkpoint=path)
        resumed = heal(compressed, data, original=original, healing=BRIEF, checkpoint=path)
        assert not path.exists()
        whole = heal(compressed, data, original=original, healing=BRIEF)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(p, whole.state_dict()[name]) for name, p in resumed.state_dict().items())


def images(n: int) -> Batch:
    x = torch.rand(n, 3, 12, 16, generator=torch.Generator().manual_seed(0))
    return Batch((x,), {}, torch.arange(n))


def test_augmentations_are_what_they_say() -> None:
    batch = images(64)
    (x,) = batch.args

    def run(*how: Augmentation, seed: int = 3) -> Any:
        return augmented(batch, how, torch.Generator().manual_seed(seed))

    (flipped,) = run("flip").batch.args
    same = [torch.equal(a, b) for a, b in zip(flipped, x, strict=True)]
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(flipped, x, strict=True)]
    assert all(a != b for a, b in zip(same, mirrored, strict=True))
    assert 16 < sum(same) < 48
    mixed = run("mix")
    expected = torch.stack(
        [
            s * own + (1 - s) * x[other]
            for own, other, s in zip(x, mixed.order, mixed.share, strict=True)
        ]
    )
    torch.testing.assert_close(mixed.batch.args[0], expected)
    cut = run("cut")
    (pasted,) = cut.batch.args
    other = (pasted != x).any(1)  # (n, h, w)
    moved = cut.order != torch.arange(64)
    share = other[moved].float().mean((1, 2))
    torch.testing.assert_close(share, 1 - cut.share[moved])
    assert torch.equal(pasted.movedim(1, -1)[other], x[cut.order].movedim(1, -1)[other])
    # A crop of a ramp is a ramp within its bounds, of another slope.
    ramp = torch.linspace(0, 1, 33).expand(8, 1, 33, 33)
    (part,) = augmented(
        Batch((ramp,), {}, None), ("crop",), torch.Generator().manual_seed(0)
    ).batch.args
    inner = part[:, :, :, 1:-1]
    assert float(inner.diff(n=2, dim=-1).abs().max()) < 0.02
    assert float(part.min()) >= 0
    assert float(part.max()) <= 1
    assert float((inner[..., -1] - inner[..., 0]).max()) < 1
    scores = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    soft = torch.zeros(64, 64)
    soft[range(64), batch.labels] += mixed.share
    soft[range(64), batch.labels[mixed.order]] += 1 - mixed.share  # type: ignore[index]
    wanted = F.cross_entropy(scores, soft, reduction="none")
    torch.testing.assert_close(mixed.cross_entropy(scores, 0.0), wanted)
    # Rows and text are left alone.
    text = Batch((), {"input_ids": torch.zeros(2, 5, dtype=torch.long)}, None)
    assert augmented(text, ("flip", "crop", "mix"), torch.Generator()).batch is text


def test_what_cannot_be_healed_is_refused(
    original: nn.Module, data: list[Tensor], compressed: Result, digits: nn.Module, result: Result
) -> None:
    with pytest.raises(PlanError, match="the compressed network was made from another Chain"):
        heal(compressed, data, original=Chain(6))
    with pytest.raises(PlanError, match="the VisionTransformer was not made from this Chain"):
        heal(result.model, data, original=original)
    with pytest.raises(PlanError, match=r"was not made from this Chain: stem\.weight is of another"):
        heal(compressed.model, data, original=seeded(Chain, 6, 16))
    with pytest.raises(LoaderError, match="the loader has 3 samples, none of them dealt to"):
        heal(compressed.model, [rows(3)], original=original)
    with pytest.raises(ModelError, match="train='maps': the compressed network has no such parameter"):
        heal(original, data, original=original, healing=Healing(train="maps"))
    half = digits_model().half()
    with pytest.raises(ModelError, match="too coarse for small steps"):
        heal(half, [torch.zeros(20, 1, 8, 8)], original=half)
    with pytest.raises(LoaderError, match="the loader is empty"):
        heal(compressed.model, [], original=original)


def test_adapters_start_at_the_slim_network(compressed: Result) -> None:
    student = Student(compressed.model, Healing(train="adapters", rank=2), [])
    weights = student.weights()
    assert len(student.adapted) >= 8
    own = compressed.model.state_dict()
    assert all(torch.equal(weights[key], own[key]) for key in weights)
    assert not {id(p) for p in student.parameters()} & {id(p) for p in compressed.model.parameters()}
