"""Hostile files: any change to what was saved is refused by name, and nothing in a file is run."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rba_compress import Budget, Profile, RBAError, Result, compress, load, profile, verify
from rba_compress.artifacts.artifact import MANIFEST, REPORT, WEIGHTS, read_report
from rba_compress.artifacts.weights import load_weights
from rba_compress.core.errors import ArtifactError, PlanError, WeightsError
from rba_compress.core.io import BLANK, sealed, sha256
from tests.hostile.cases import Case, table
from tests.networks import LIGHT, Chain, loader, seeded
from tests.releases import STORES_COMPLEX

Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def made() -> Result:
    return compress(seeded(Chain), loader(), budget=Budget(macs=0.8), config=LIGHT)


@pytest.fixture
def compressed(made: Result, tmp_path: Path) -> Path:
    made.save(tmp_path / "compressed")
    return tmp_path / "compressed"


def written(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def removed(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def resealed(change: Callable[[Any], Any]) -> Change:
    """Change of plan.json under a seal that fits, as an attacker would write one."""

    def apply(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        manifest["seal"] = BLANK
        (folder / MANIFEST).write_bytes(sealed(json.dumps(manifest)))

    return apply


def reweighed(change: Callable[[dict[str, Any]], Any]) -> Change:
    """Other weights under a hash that fits."""

    def apply(folder: Path) -> None:
        state = load_file(folder / WEIGHTS)
        change(state)
        save_file(state, folder / WEIGHTS)
        rehashed(folder)

    return apply


def rehashed(folder: Path) -> None:
    resealed(lambda m: m["sha256"].update({WEIGHTS: sha256(folder / WEIGHTS)}))(folder)


def foreign(content: bytes) -> Change:
    """Other bytes for weights, under a hash that fits."""

    def apply(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(content)
        rehashed(folder)

    return apply


def replacement(**changes: Any) -> Change:
    return resealed(lambda m: m["plan"]["replacements"][0].update(changes))


def block(**changes: Any) -> Change:
    return resealed(lambda m: m["plan"]["replacements"][0]["blocks"][0].update(changes))


def signature(**changes: Any) -> Change:
    return resealed(lambda m: m["plan"]["replacements"][0]["blocks"][0]["signature"].update(changes))


def built_by(**architecture: Any) -> Change:
    return resealed(lambda m: m.update(architecture=architecture))


def header(length: int, text: bytes = b"{}") -> bytes:
    return struct.pack("<Q", length) + text


def nested(depth: int) -> Any:
    template: Any = "stream"
    for _ in range(depth):
        template = {"list": [template]}
    return template


class Bomb:
    """Object that runs code when unpickled."""

    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("exploded"), "yes"))


PICKLED = pickle.dumps(Bomb())
TENSOR = b'{"a": {"dtype": "F32", "shape": [%s], "data_offsets": [0, %s]}}'
NOT_READ = r"plan.json is not a manifest that this version reads"

REFUSED = [
    Case("no directory", shutil.rmtree, ArtifactError, "plan.json is unreadable"),
    Case("no plan", removed(MANIFEST), ArtifactError, "plan.json is unreadable"),
    Case("no weights", removed(WEIGHTS), ArtifactError, "model.safetensors is missing"),
    Case("no report", removed(REPORT), ArtifactError, "report.json is missing: the artefact is incomplete"),
    Case("a directory for a plan", lambda f: (removed(MANIFEST)(f), (f / MANIFEST).mkdir()), ArtifactError,
         "unreadable"),
    Case("a directory for weights", lambda f: (removed(WEIGHTS)(f), (f / WEIGHTS).mkdir()), ArtifactError,
         "model.safetensors is missing"),
    Case("an empty plan", written(MANIFEST, b""), ArtifactError, NOT_READ),
    Case("half a plan", lambda f: written(MANIFEST, (f / MANIFEST).read_bytes()[:500])(f), ArtifactError,
         NOT_READ),
    Case("half of the weights", lambda f: written(WEIGHTS, (f / WEIGHTS).read_bytes()[:500])(f),
         ArtifactError, "is not what was saved"),
    Case("a plan that is a list", written(MANIFEST, b"[]"), ArtifactError, NOT_READ),
    Case("a plan that is a number", written(MANIFEST, b"7"), ArtifactError, NOT_READ),
    Case("a plan that is null", written(MANIFEST, b"null"), ArtifactError, NOT_READ),
    Case("a plan that is a picture", written(MANIFEST, b"\x89PNG\r\n\x1a\n\x00\xff"), ArtifactError, NOT_READ),
    Case("a plan in UTF-16", lambda f: written(MANIFEST, (f / MANIFEST).read_text().encode("utf-16"))(f),
         ArtifactError, NOT_READ),
    Case("a plan of a hundred thousand brackets", written(MANIFEST, b"[" * 100_000), ArtifactError, NOT_READ),
    Case("a plan that was pickled", written(MANIFEST, PICKLED), ArtifactError, NOT_READ),
    Case("a plan that is too large", lambda f: _sparse(f / MANIFEST, 1 << 29), ArtifactError,
         "536,870,912 bytes, more than any"),
    Case("a newer schema", resealed(lambda m: m.update(schema_version=99)), ArtifactError,
         "schema 99, this version reads up to .*: upgrade rba_compress"),
    Case("a schema that is a word", resealed(lambda m: m.update(schema_version="new")), ArtifactError,
         NOT_READ),
    Case("a plan that was edited", lambda f: written(MANIFEST, (f / MANIFEST).read_bytes().replace(
        b'"seed": 0', b'"seed": 1'))(f), ArtifactError, r"its seal does not fit\): get it anew"),
    Case("a seal that is gone", lambda f: written(MANIFEST, (f / MANIFEST).read_bytes().replace(
        b'"seal"', b'"sale"'))(f), ArtifactError, NOT_READ),
    Case("a field that there is not", resealed(lambda m: m.update(run="rm")), ArtifactError, NOT_READ),
    Case("a budget that means nothing", resealed(lambda m: m["plan"]["budget"].update(macs=-1)),
         ArtifactError, "-1 is neither"),
    Case("a file outside", resealed(lambda m: m["sha256"].update({"../secret": "0" * 64})), ArtifactError,
         "'../secret' is no file of this directory"),
    Case("a file at the root", resealed(lambda m: m["sha256"].update({"/etc/passwd": "0" * 64})),
         ArtifactError, "'/etc/passwd' is no file of this directory"),
    Case("a file of another system", resealed(lambda m: m["sha256"].update({r"..\secret": "0" * 64})),
         ArtifactError, "is no file of this directory"),
    Case("a file with a NUL", resealed(lambda m: m["sha256"].update({"a\0b": "0" * 64})), ArtifactError,
         "is no file of this directory"),
    Case("the directory itself", resealed(lambda m: m["sha256"].update({"..": "0" * 64})), ArtifactError,
         "is no file of this directory"),
    Case("weights without a hash", resealed(lambda m: m["sha256"].pop(WEIGHTS)), ArtifactError,
         "says nothing of model.safetensors"),
    Case("other bytes for weights", written(WEIGHTS, b"x" * 1000), ArtifactError, "is not what was saved"),
    Case("weights that were pickled", foreign(PICKLED), WeightsError, "not a readable safetensors file"),
    Case("weights of torch.save", lambda f: (torch.save({"a": torch.ones(3)}, f / WEIGHTS), rehashed(f)),
         WeightsError, "not a readable safetensors file"),
    Case("no byte of weights", foreign(b""), WeightsError, "not a readable safetensors file"),
    Case("a header of 2^60 bytes", foreign(header(1 << 60)), WeightsError, "not a readable safetensors"),
    Case("a header longer than the file", foreign(header(1000)), WeightsError, "not a readable safetensors"),
    Case("a header that is no JSON", foreign(header(2, b"xx")), WeightsError, "not a readable safetensors"),
    Case("a tensor of 2^60 numbers", foreign(header(len(t := TENSOR % (b"1152921504606846976", b"8")), t)),
         WeightsError, "not a readable safetensors"),
    Case("a tensor beyond the file", foreign(header(len(t := TENSOR % (b"1000", b"4000")), t)),
         WeightsError, "not a readable safetensors"),
    Case("a tensor of negative size", foreign(header(len(t := TENSOR % (b"-1", b"4")), t)), WeightsError,
         "not a readable safetensors"),
    Case("weights of another network", reweighed(lambda s: (s.clear(), s.update(seeded(
        Chain, 2, 5).state_dict()))), PlanError, r"shape|missing"),
    Case("a weight that is missing", reweighed(lambda s: s.pop("head.weight")), WeightsError,
         r"1 missing \(head.weight\)"),
    Case("a weight too many", reweighed(lambda s: s.update(more=torch.ones(1))), WeightsError,
         r"1 unknown \(more\)"),
    Case("a weight of another shape", reweighed(lambda s: s.update({"head.weight": torch.ones(3, 9)})),
         WeightsError, "head.weight .3, 9. for .3, 8."),
    Case("a weight of integers", reweighed(lambda s: s.update({"head.weight": torch.ones(3, 8).long()})),
         WeightsError, "of another kind .head.weight torch.int64 for torch.float32"),
    *([Case("a weight that is complex", reweighed(lambda s: s.update({"head.weight": torch.ones(
        3, 8, dtype=torch.complex64)})), WeightsError, "of another kind")] if STORES_COMPLEX else []),
    Case("a fitted tensor that is missing", resealed(lambda m: m["plan"]["replacements"][0].update(
        map={"kind": "affine"})), PlanError, "its tensor .*map.weight' is missing"),
    Case("a block that is not there", block(path="blocks.9"), PlanError, "no block 'blocks.9'"),
    Case("a block that is everything", block(path=""), ArtifactError, "at least 1 character"),
    Case("a block of Python's own", block(path="__class__"), PlanError, "no block '__class__'"),
    Case("a block that climbs", block(path="../blocks"), PlanError, "no block '../blocks'"),
    Case("a block of another class", block(type="Bottleneck"), PlanError, "is a Block, the plan replaces"),
    Case("a block inside of another", resealed(lambda m: m["plan"]["replacements"].append(
        {**m["plan"]["replacements"][0], "blocks": [{**m["plan"]["replacements"][0]["blocks"][0],
         "path": m["plan"]["replacements"][0]["blocks"][0]["path"] + ".up", "type": "Linear"}],
         "stop": m["plan"]["replacements"][0]["start"] + 1})), PlanError, "share the block"),
    Case("the same block twice", resealed(lambda m: m["plan"]["replacements"].append(
        m["plan"]["replacements"][0])), PlanError, "share the block"),
    Case("a span of no block", replacement(blocks=[]), ArtifactError, "0 blocks are no span"),
    Case("a span that runs backwards", replacement(start=3, stop=1), ArtifactError, "are no span 3:1"),
    Case("a span before the first", replacement(start=-1, stop=0), ArtifactError, "are no span -1:0"),
    Case("a unit that there is not", replacement(unit="head"), ArtifactError, NOT_READ),
    Case("a read-out of a block that has none", replacement(unit="read_out", reads=1), WeightsError,
         "does not fit a Chain"),
    Case("a map of no channel", replacement(width=0), ArtifactError, "no map is of 0 channels"),
    Case("a map of 2^40 channels", replacement(width=1 << 40, map={"kind": "affine"}), ArtifactError,
         "no map is of 1099511627776 channels"),
    Case("a map on an axis that is not there", replacement(axis=5), ArtifactError, "on axis 5 of 2"),
    Case("a map in seven dimensions", replacement(ndim=7, axis=1), ArtifactError, "on axis 1 of 7"),
    Case("a map of too high a rank", replacement(map={"kind": "low_rank", "rank": 99}), ArtifactError,
         "a map of rank 99 for 8 channels"),
    Case("a map that there is not", replacement(map={"kind": "cubic"}), ArtifactError, NOT_READ),
    Case("a stream from nowhere", signature(stream=["self", 0]), ArtifactError, "no place among"),
    Case("a stream that is all arguments", signature(stream=["args"]), ArtifactError, "no place among"),
    Case("an output that cannot be rebuilt", signature(output={"eval": "1+1"}), ArtifactError,
         "no part of a template"),
    Case("an output that is a number", signature(output=3), ArtifactError, "no part of a template"),
    Case("an output of two containers", signature(output={"list": [], "tuple": []}), ArtifactError,
         "no part of a template"),
    Case("an output of three hundred lists", signature(output=nested(300)), ArtifactError, NOT_READ),
    Case("an output of fifty lists", signature(output=nested(50)), ArtifactError, "no part of a template"),
    Case("arguments without keywords", signature(arguments={"dict": {"args": {"tuple": []}}}), ArtifactError,
         "no args and kwargs"),
    Case("a dtype that there is not", resealed(lambda m: m.update(buffers={"a": "load"})), ArtifactError,
         "'load' is no dtype of torch"),
    Case("an input of no dtype", resealed(lambda m: m["probe"]["inputs"][0].update(dtype="nn")),
         ArtifactError, "'nn' is no dtype of torch"),
    Case("a refit of what is gone", resealed(lambda m: m["plan"]["refits"].append({
        "path": m["plan"]["replacements"][0]["blocks"][0]["path"] + ".up", "step": 1.0})), PlanError,
         "inside of a block that is replaced"),
    Case("a refit of what never was", resealed(lambda m: m["plan"]["refits"].append({
        "path": "nowhere", "step": 1.0})), PlanError, "no layer 'nowhere'"),
    Case("a refit of a container", resealed(lambda m: m["plan"]["refits"].append({
        "path": "blocks", "step": 1.0})), PlanError, "no layer 'blocks'"),
    Case("a network that comes from a hub", built_by(name="hf-hub:evil/model"), ArtifactError,
         "'hf-hub:evil/model' is no name of an architecture"),
    Case("a network that lies in a directory", built_by(name="local-dir:/tmp"), ArtifactError, "is no name"),
    Case("a network with a checkpoint", built_by(name="resnet18", arguments={"checkpoint_path": "/x"}),
         ArtifactError, "checkpoint_path='/x' fetches or loads something"),
    Case("a network with pretrained weights", built_by(name="resnet18", arguments={"pretrained": True}),
         ArtifactError, "pretrained='True' fetches"),
    Case("a network with remote code", built_by(library="transformers", name="BertModel", arguments={
        "model_type": "bert", "auto_map": {"AutoModel": "evil--x"}}), ArtifactError, "auto_map="),
    Case("a network with a kernel of a hub", built_by(library="transformers", name="BertModel", arguments={
        "model_type": "bert", "text": [{"attn_implementation": "evil/kernel"}]}), ArtifactError,
         "attn_implementation='evil/kernel' fetches"),
    Case("a library that there is not", built_by(library="os", name="system"), ArtifactError, NOT_READ),
]  # fmt: skip


def _sparse(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


@table(REFUSED)
def test_what_is_not_what_was_saved_is_refused(
    case: Case, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    change: Change = case.make  # type: ignore[assignment]
    change(compressed)
    assert case.error is not None
    with pytest.raises(case.error, match=f"(?s){case.message}"):
        load(compressed, original=seeded(Chain))
    assert not (tmp_path / "exploded").exists()


BUILT = [
    Case("a network that the library lacks", built_by(name="no_such_net"), WeightsError, "cannot build"),
    Case("a class that is no network", built_by(library="transformers", name="AutoTokenizer"), WeightsError,
         "no model class of transformers"),
    Case("a name of Python's own", built_by(library="transformers", name="__builtins__"), WeightsError,
         "cannot build"),
    Case("an argument that there is not", built_by(name="resnet18", arguments={"colour": "red"}),
         WeightsError, "cannot build 'resnet18'"),
    Case("a class too many for any memory", built_by(name="resnet18", arguments={"num_classes": 10**15}),
         WeightsError, "cannot build 'resnet18'"),
    Case("a depth of words", built_by(name="vit_tiny_patch16_224", arguments={"depth": "deep"}),
         WeightsError, "cannot build"),
    Case("no architecture", resealed(lambda m: m.update(architecture=None)), ArtifactError,
         r"pass one, load\(dir, original=...\)"),
    Case("another architecture", built_by(name="resnet18"), PlanError, "has no block"),
]  # fmt: skip


@table(BUILT)
def test_what_cannot_be_built_is_refused(case: Case, compressed: Path) -> None:
    change: Change = case.make  # type: ignore[assignment]
    change(compressed)
    assert case.error is not None
    with pytest.raises(case.error, match=case.message):
        load(compressed)
    if "no architecture" not in case.name:
        with pytest.raises(RBAError, match=case.message):
            verify(compressed)


def test_a_link_in_place_of_the_weights_is_read(compressed: Path, tmp_path: Path, made: Result) -> None:
    # Hubs' caches are such links; what they lead to has the hash that was saved, or is refused.
    (compressed / WEIGHTS).rename(tmp_path / "blob")
    (compressed / WEIGHTS).symlink_to(tmp_path / "blob")
    assert torch.equal(load(compressed, original=seeded(Chain))(loader()[0]), made.model(loader()[0]))


OTHERS: list[tuple[str, Callable[[Path], Any], type[RBAError], str]] = [
    ("a report", read_report, ArtifactError, "not a report"),
    ("weights", lambda p: load_weights(seeded(Chain), p / REPORT), WeightsError,
     "not a readable|does not fit"),
    ("a profile", lambda p: Profile.load(p / REPORT), ArtifactError, "not a savedprofile"),
    ("a checkpoint", lambda p: profile(seeded(Chain), loader(), checkpoint=p / REPORT), ArtifactError,
     "not a checkpoint"),
]  # fmt: skip
CONTENTS = {
    "nothing": b"",
    "text": b"hello",
    "a pickle": PICKLED,
    "a JSON list": b"[1, 2]",
    "a safetensors file of another": header(2) + b"",
    "a header of 2^60 bytes": header(1 << 60),
    "nested brackets": b"[" * 100_000,
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize(("name", "read", "error", "message"), OTHERS, ids=[o[0] for o in OTHERS])
def test_other_files_are_refused(
    *, name: str, read: Any, error: type[RBAError], message: str, content: str, tmp_path: Path
) -> None:
    path = tmp_path / REPORT
    path.write_bytes(CONTENTS[content])
    with pytest.raises(error, match=message):
        read(tmp_path)
    assert path.read_bytes() == CONTENTS[content]


def test_a_profile_of_other_moments_is_refused(tmp_path: Path) -> None:
    from rba_compress.core.io import read_tensors, write_tensors
    from rba_compress.profiling.profiler import SavedProfile

    path = tmp_path / "seen"
    profile(seeded(Chain), loader()).save(path)
    record, tensors = read_tensors(path, SavedProfile)
    for name, value in (
        ("0.moments.mean", None),
        ("0.moments.mean", torch.ones(2, 2)),
        ("0.rows.cosine", None),
    ):
        others = {k: v for k, v in tensors.items() if k != name} | (
            {} if value is None else {name: value}
        )
        write_tensors(path, record, others)
        with pytest.raises(ArtifactError, match="does not hold the moments of its chains"):
            Profile.load(path)


def test_names_of_a_model_are_escaped_in_its_page(tmp_path: Path) -> None:
    class Net(Chain):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleDict({f"<script>{i}": b for i, b in enumerate(self.blocks)})  # type: ignore[assignment]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            for inner in self.blocks.values():  # type: ignore[operator]
                x = inner(x)
            return self.head(x)

    Net.__name__ = "<img src=x onerror=alert(1)>"
    found = compress(seeded(Net), loader(), budget=Budget(macs=0.8), config=LIGHT)
    found.report.to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script>0" not in page
    assert "<img src=x" not in page
    for shown in (found.report._repr_html_(), found.plan._repr_html_(), found.profile._repr_html_()):
        assert "<script>" not in shown
        assert "<img" not in shown
