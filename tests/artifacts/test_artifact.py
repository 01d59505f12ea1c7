from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from rba_compress import (
    Architecture,
    ArtifactError,
    Budget,
    Config,
    PlanError,
    Report,
    Result,
    WeightsError,
    compress,
    load,
    save,
    verify,
)
from rba_compress.artifacts.artifact import read_manifest, read_report
from rba_compress.artifacts.weights import load_weights
from rba_compress.cli.digits import ARCHITECTURE, ARGUMENTS, digits_model
from rba_compress.core.io import BLANK, sealed, sha256
from rba_compress.profiling.profiler import fingerprint
from rba_compress.units.registry import unit_of
from tests.networks import LIGHT, Chain, images, loader, rows, seeded

DIGITS = Architecture(name=ARCHITECTURE, arguments=dict(ARGUMENTS))


@pytest.fixture
def compressed(result: Result, tmp_path: Path) -> Path:
    save(result, tmp_path / "compressed", architecture=DIGITS)
    return tmp_path / "compressed"


def test_what_is_saved_is_loaded_bit_equal(
    compressed: Path, result: Result, held_out: tuple[Tensor, Tensor], digits: nn.Module
) -> None:
    assert sorted(p.name for p in compressed.iterdir()) == [
        "model.safetensors",
        "plan.json",
        "report.json",
    ]
    assert len({p.stat().st_mode for p in compressed.iterdir()}) == 1
    manifest = read_manifest(compressed)
    assert manifest.plan == result.plan
    assert manifest.original_weights == fingerprint(digits)
    assert manifest.architecture == DIGITS
    told = result.report.model_copy(update={"changed": ()})  # no sample of a user's is written
    assert result.report.changed
    assert read_report(compressed) == told
    assert Report.model_validate_json((compressed / "report.json").read_text()).seal is not None
    x = held_out[0][:50]
    for loaded in (load(compressed), load(compressed, original=digits_model(pretrained=False))):
        assert type(loaded) is type(result.model)
        assert torch.equal(loaded(x), result.model(x))
        assert not loaded.training


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.bfloat16, torch.float64)),
    ],
)
def test_other_dtypes_come_back_bit_equal(dtype: torch.dtype, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"img_size": 32, "depth": 4, "embed_dim": 32, "num_heads": 2}
    model = seeded(timm.create_model, "vit_tiny_patch16_224", num_classes=5, **sizes).to(dtype)
    data = list(images(40).split(10))
    found = compress(model, data, budget=Budget(macs=0.8), config=LIGHT)
    assert any(unit_of(r.unit).removes for r in found.plan.replacements)
    found.save(tmp_path / "compressed")
    x = images(10, seed=1).to(dtype)
    loaded = load(tmp_path / "compressed")
    assert loaded(x).dtype == dtype
    assert torch.equal(loaded(x), found.model(x))


def test_a_timm_model_tells_its_own_architecture(tmp_path: Path) -> None:
    model = seeded(
        timm.create_model, "vit_tiny_patch16_224", num_classes=7, img_size=32, in_chans=1, depth=4
    )
    data = [x.mean(1, keepdim=True) for x in images(30).split(10)]
    compress(model, data, budget=Budget(macs=0.95), config=LIGHT).save(tmp_path / "compressed")
    known = read_manifest(tmp_path / "compressed").architecture
    assert known == Architecture(
        name="vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        arguments={"num_classes": 7, "img_size": [32, 32], "in_chans": 1, "depth": 4},
    )
    assert load(tmp_path / "compressed")(data[0]).shape == (10, 7)


@pytest.mark.slow
def test_an_architecture_that_cannot_be_rebuilt_is_asked_for(tmp_path: Path) -> None:
    model = seeded(timm.create_model, "vit_tiny_patch16_224", img_size=32, depth=4, embed_dim=48)
    model.blocks[0].norm1.eps = 0.1  # no argument of timm builds that
    data = list(images(30).split(10))
    found = compress(model, data, budget=Budget(macs=0.8), config=LIGHT)
    with pytest.warns(UserWarning, match=r"is not this network .* pass save\(architecture=...\), or"):
        found.save(tmp_path / "compressed")
    assert read_manifest(tmp_path / "compressed").architecture is None
    with pytest.raises(ArtifactError, match=r"how to build a VisionTransformer: pass one, load"):
        load(tmp_path / "compressed")
    loaded = load(tmp_path / "compressed", original=model)
    assert torch.equal(loaded(data[0]), found.model(data[0]))


def test_the_users_own_class_and_a_graph_module(tmp_path: Path) -> None:
    model = seeded(Chain)
    for name, form in (("module", model), ("graph", fx.symbolic_trace(model))):
        found = compress(form, loader(), budget=Budget(macs=0.8))
        found.save(tmp_path / name)
        before = {k: v.clone() for k, v in form.state_dict().items()}
        loaded = load(tmp_path / name, original=form)
        assert torch.equal(loaded(rows(5)), found.model(rows(5)))
        assert all(torch.equal(v, before[k]) for k, v in form.state_dict().items())


class Tied(Chain):
    def __init__(self) -> None:
        super().__init__(width=4)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.stem.weight


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    found = compress(seeded(Tied), loader(), budget=Budget(macs=0.8))
    found.save(tmp_path / "compressed")
    stored = load_file(tmp_path / "compressed" / "model.safetensors")
    assert "head.weight" not in stored
    loaded = load(tmp_path / "compressed", original=seeded(Tied))
    assert loaded.head.weight is loaded.stem.weight
    assert torch.equal(loaded(rows(5)), found.model(rows(5)))


def test_a_wrong_architecture_is_refused_before_anything_is_written(
    result: Result, tmp_path: Path
) -> None:
    wrong = Architecture(name=ARCHITECTURE, arguments={**ARGUMENTS, "num_heads": 2})
    with pytest.raises(WeightsError, match="is not this network: its outputs differ"):
        result.save(tmp_path / "compressed", architecture=wrong)
    other = Architecture(name="resnet18")
    with pytest.raises(WeightsError, match="is not this network: PlanError: .* has no block"):
        result.save(tmp_path / "compressed", architecture=other)
    with pytest.raises(WeightsError, match="timm cannot build 'no_such_net'"):
        Architecture(name="no_such_net").build()
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_taken_is_left_alone(result: Result, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="is not empty: name a new directory, or empty it first"):
        result.save(tmp_path)
    with pytest.raises(ArtifactError, match="note.txt is a file: name a new directory"):
        result.save(tmp_path / "note.txt")
    assert (tmp_path / "note.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    save(result, tmp_path / "empty", architecture=DIGITS)
    assert load(tmp_path / "empty")


def test_a_save_that_is_cut_off_leaves_nothing(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rba_compress.core.io.flush", full)
    with pytest.raises(ArtifactError, match=r"cannot write .*compressed: .*No space left on device"):
        result.save(tmp_path / "compressed", architecture=DIGITS)
    assert not list(tmp_path.iterdir())


def test_a_damaged_artefact_is_named(compressed: Path) -> None:
    weights = compressed / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=r"model.safetensors is not what was saved \(its SHA-256"):
        load(compressed)
    weights.unlink()
    with pytest.raises(ArtifactError, match="model.safetensors is missing: the artefact is incomplete"):
        load(compressed)


def test_a_newer_a_foreign_and_no_manifest_are_named(compressed: Path, tmp_path: Path) -> None:
    manifest = compressed / "plan.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"schema_version": 8}))
    with pytest.raises(ArtifactError, match="has schema 8, this version reads up to 7: upgrade"):
        load(compressed)
    old = {k: v for k, v in content.items() if k not in ("seal", "folded", "probe")}
    old["architecture"] = {k: v for k, v in old["architecture"].items() if k != "library"}
    manifest.write_text(json.dumps(old | {"schema_version": 2}))
    assert load(compressed)
    manifest.write_text(json.dumps(old))
    with pytest.raises(ArtifactError, match=r"plan.json is not what was saved \(its seal does not fit"):
        load(compressed)
    manifest.write_text('{"spans": []}')
    with pytest.raises(ArtifactError, match=r"plan.json is not a manifest"):
        load(compressed)
    manifest.write_text("[")
    with pytest.raises(ArtifactError, match=r"plan.json is not a manifest that this version reads"):
        load(compressed)
    with pytest.raises(ArtifactError, match=r"plan.json is unreadable: .*No such file"):
        load(tmp_path / "nothing")


def test_another_model_is_refused(compressed: Path) -> None:
    with pytest.raises(PlanError, match="Chain has no block 'blocks"):
        load(compressed, original=seeded(Chain, depth=2))
    with pytest.raises((PlanError, WeightsError), match=r"has no layer 'blocks|does not fit a Chain"):
        load(compressed, original=seeded(Chain, depth=12))
    wider = timm.create_model(ARCHITECTURE, **{**ARGUMENTS, "num_classes": 11})
    with pytest.raises(WeightsError, match=r"does not fit a VisionTransformer: 2 of another shape"):
        load(compressed, original=wider)


def test_weights_that_do_not_fit_are_refused_and_change_nothing(tmp_path: Path) -> None:
    model = seeded(Chain)
    state = {k: v + 1 for k, v in model.state_dict().items()}
    path = tmp_path / "weights.safetensors"
    cases = [
        ({k: v for k, v in state.items() if "head" not in k}, r"2 missing \(head.bias, head.weight\)"),
        (state | {"extra": torch.ones(1)}, r"1 unknown \(extra\)"),
        (state | {"head.bias": torch.ones(5)}, r"1 of another shape \(head.bias \(5,\) for \(3,\)\)"),
    ]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for bad, message in cases:
        save_file(bad, path)
        with pytest.raises(WeightsError, match=message):
            load_weights(model, path)
    with pytest.raises(WeightsError, match="is not a readable safetensors file"):
        load_weights(model, tmp_path / "absent.safetensors")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    save_file(state, path)
    load_weights(model, path)
    assert torch.equal(model.head.bias, before["head.bias"] + 1)


def test_a_pickle_is_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return exec, (f"open({str(tmp_path / 'sprung')!r}, 'w')",)

    path = tmp_path / "weights.safetensors"
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(WeightsError, match="is not a readable safetensors file"):
        load_weights(seeded(Chain), path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [pickle.dumps({"head.bias": 1}), b"", b"\x10" + b"\0" * 7 + b"{}"])
def test_weights_that_are_no_safetensors_are_named_whatever_their_hash(
    content: bytes, compressed: Path
) -> None:
    """A pickle, an empty and a truncated file, in a manifest that a forger has sealed anew."""
    (compressed / "model.safetensors").write_bytes(content)
    manifest = read_manifest(compressed)
    hashes = manifest.sha256 | {"model.safetensors": sha256(compressed / "model.safetensors")}
    forged = manifest.model_copy(update={"sha256": hashes, "seal": BLANK})
    (compressed / "plan.json").write_bytes(sealed(forged.model_dump_json(indent=2)))
    with pytest.raises(WeightsError, match="model.safetensors is not a readable safetensors file"):
        load(compressed)
    with pytest.raises(ArtifactError, match="does not load: .* is not a readable safetensors file"):
        verify(compressed)


def test_a_result_is_a_value(result: Result) -> None:
    assert "blocks." in repr(result)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.plan = None  # type: ignore[misc, assignment]


class Buffered(Chain):
    """A float32 buffer that no state dict holds, whatever the dtype of the weights."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__(depth)
        self.register_buffer("shift", torch.linspace(0, 1, 4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward((x + self.shift).to(x.dtype))


def test_buffers_that_no_state_dict_holds_keep_their_dtype(tmp_path: Path) -> None:
    model = seeded(Buffered).to(torch.bfloat16)
    model.shift = torch.linspace(0, 1, 4)
    found = compress(model, loader(), budget=Budget(macs=0.8))
    found.save(tmp_path / "compressed")
    x = rows(5).to(torch.bfloat16)
    for skeleton in (model, seeded(Buffered)):
        loaded = load(tmp_path / "compressed", original=skeleton)
        assert loaded.shift.dtype == torch.float32
        assert torch.equal(loaded(x), found.model(x))


def test_a_fit_without_a_finite_condition_is_saved_and_read(tmp_path: Path) -> None:
    model = seeded(Chain, width=32)  # fewer rows than channels: the plain Gram matrix is singular
    config = Config(maps=("linear",), units=("span",))
    found = compress(model, loader(20), budget=Budget(macs=0.8), config=config)
    conditions = [r.diagnostics.condition for r in found.plan.replacements if r.diagnostics]
    assert float("inf") in conditions
    found.save(tmp_path / "compressed")
    assert read_manifest(tmp_path / "compressed").plan == found.plan
    assert load(tmp_path / "compressed", original=model)


def test_a_whole_artefact_takes_any_weights_and_a_delta_those_of_its_original(tmp_path: Path) -> None:
    model = seeded(Chain)
    found = compress(model, loader(), budget=Budget(macs=0.8))
    found.save(tmp_path / "whole")
    found.save(tmp_path / "delta", delta=True)
    for name in ("whole", "delta"):
        loaded = load(tmp_path / name, original=nn.DataParallel(model))
        assert torch.equal(loaded(rows(3)), found.model(rows(3)))
    with torch.no_grad():
        model.head.bias += 1
    assert torch.equal(load(tmp_path / "whole", original=model)(rows(3)), found.model(rows(3)))
    with pytest.raises(WeightsError, match="original is not the Chain that .*delta was made from"):
        load(tmp_path / "delta", original=model)
