"""Fold, hub layout, bytes flipped, kills in mid-save: what leaves the house is what was measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from benchmarks.delivery import flips
from rba_compress import (
    Architecture,
    ArtifactError,
    Budget,
    Config,
    PlanError,
    Result,
    compress,
    load,
    verify,
)
from rba_compress.artifacts.artifact import read_manifest
from rba_compress.cli.digits import ARCHITECTURE, ARGUMENTS
from rba_compress.cli.main import main
from rba_compress.core.io import written_whole
from tests.networks import LIGHT, Chain, loader, seeded
from tests.releases import reads_folders

DIGITS = Architecture(name=ARCHITECTURE, arguments=dict(ARGUMENTS))

ALONE = """
import sys
sys.modules["rba_compress"] = None  # importing it raises
"""


def script(code: str, *arguments: object) -> str:
    """Return what code prints in a fresh process of one thread."""
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert found.returncode == 0, found.stderr
    return found.stdout


def alone(code: str, *arguments: object) -> str:
    """Return what code prints where this package cannot be imported."""
    return script(ALONE + code, *arguments)


@pytest.fixture(scope="module")
def folding(digits: nn.Module, digits_loader: list[Any]) -> Result:
    config = Config(stock=True, units=("span",), refit=False, shrinks=(0.6,), window=2)
    return compress(digits, digits_loader, budget=Budget(macs=0.85), config=config)


@pytest.mark.slow
@reads_folders
def test_a_foldable_search_folds_into_a_stock_timm_network(
    folding: Result, held_out: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    kinds = {r.map.kind for r in folding.plan.replacements}
    assert kinds <= {"identity", "folded"}
    assert folding.plan.config.keep_features
    folding.save(tmp_path / "compressed", architecture=DIGITS, fold=True, hub=True)
    manifest = read_manifest(tmp_path / "compressed")
    assert manifest.folded is not None
    depth = 12 - sum(r.stop - r.start for r in folding.plan.replacements)
    assert manifest.folded.arguments["depth"] == depth < 12
    x = held_out[0][:50]
    loaded = load(tmp_path / "compressed")
    assert len(loaded.blocks) == depth
    assert not any(type(m).__module__.startswith("rba_compress") for m in loaded.modules())
    with torch.no_grad():
        wanted = folding.model(x)
        assert (loaded(x) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    torch.save(x, tmp_path / "x.pt")
    printed = alone(
        """
import timm, torch, json
from safetensors.torch import load_file
directory, name, arguments, x = sys.argv[1:]
x = torch.load(x, weights_only=True)
model = timm.create_model(name, **json.loads(arguments)).eval()
model.load_state_dict(load_file(directory + "/model.safetensors"), strict=True)
local = timm.create_model("local-dir:" + directory, pretrained=True).eval()
with torch.no_grad():
    assert torch.equal(model(x), local(x))
    torch.save(model(x), directory + "/../y.pt")
print(sum(p.numel() for p in local.parameters()))
""",
        tmp_path / "compressed",
        manifest.folded.name,
        json.dumps(manifest.folded.arguments),
        tmp_path / "x.pt",
    )
    assert int(printed) == folding.report.compressed.params
    stock = torch.load(tmp_path / "y.pt", weights_only=True)
    assert (stock - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    verify(tmp_path / "compressed")


def test_a_model_card_holds_the_measured_table(folding: Result, tmp_path: Path) -> None:
    folding.save(tmp_path / "stock", architecture=DIGITS, fold=True, hub=True)
    folding.save(tmp_path / "ours", architecture=DIGITS, hub=True)
    for name, library in (("stock", "timm"), ("ours", "rba_compress")):
        card = (tmp_path / name / "README.md").read_text()
        assert f"library_name: {library}\n" in card
        assert (
            f"| MACs | {folding.report.original.macs:,} | {folding.report.compressed.macs:,} |" in card
        )
        assert ("from rba_compress import load" in card) == (name == "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert "model_type" not in config  # transformers must not take it for a network of its own
    assert config["library_name"] == "rba_compress"
    (tmp_path / "ours" / "README.md").write_text("# My own words\n")
    verify(tmp_path / "ours")


def vit(**changes: Any) -> nn.Module:
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=16,
        patch_size=8,
        num_labels=5,
        **changes,
    )
    return seeded(transformers.ViTForImageClassification, config)


def pixels(n: int = 30) -> list[dict[str, Tensor]]:
    drawn = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": part} for part in drawn.split(10)]


@pytest.mark.slow
def test_a_hugging_face_network_needs_the_directory_alone(tmp_path: Path) -> None:
    model = vit()
    found = compress(model, pixels(), budget=Budget(macs=0.8), config=LIGHT)
    found.save(tmp_path / "compressed")
    known = read_manifest(tmp_path / "compressed").architecture
    assert known is not None
    assert (known.library, known.name) == ("transformers", "ViTForImageClassification")
    loaded = load(tmp_path / "compressed")
    with torch.no_grad():
        assert torch.equal(loaded(**pixels()[0]).logits, found.model(**pixels()[0]).logits)
    verify(tmp_path / "compressed")


@pytest.mark.slow
def test_a_hugging_face_network_folds(tmp_path: Path) -> None:
    found = compress(vit(), pixels(), budget=Budget(macs=0.8), config=Config(stock=True))
    found.save(tmp_path / "compressed", fold=True, hub=True)
    torch.save(pixels()[0]["pixel_values"], tmp_path / "x.pt")
    alone(
        """
import torch
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification
from safetensors.torch import load_file
directory = sys.argv[1]
model = AutoModelForImageClassification.from_pretrained(directory).eval()
bare = ViTForImageClassification(ViTConfig.from_pretrained(directory)).eval()
bare.load_state_dict(load_file(directory + "/model.safetensors"), strict=True)
x = torch.load(directory + "/../x.pt", weights_only=True)
with torch.no_grad():
    assert torch.equal(model(x).logits, bare(x).logits)
    torch.save(model(x).logits, directory + "/../y.pt")
""",
        tmp_path / "compressed",
    )
    with torch.no_grad():
        wanted = found.model(**pixels()[0]).logits
    stock = torch.load(tmp_path / "y.pt", weights_only=True)
    assert (stock - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.slow
def test_stages_of_blocks_fold(tmp_path: Path) -> None:
    model = seeded(timm.create_model, "resnet26d", num_classes=5)
    data = list(torch.randn(30, 3, 32, 32, generator=torch.Generator().manual_seed(0)).split(10))
    how = Config(stock=True, effort="quick")
    found = compress(model, data, budget=Budget(macs=0.97), config=how)
    found.save(tmp_path / "compressed", fold=True)
    stock = read_manifest(tmp_path / "compressed").folded
    assert stock is not None
    assert sum(stock.arguments["layers"]) < 8  # type: ignore[arg-type]
    with torch.no_grad():
        wanted = found.model(data[0])
        apart = (load(tmp_path / "compressed")(data[0]) - wanted).abs().max()
    assert apart <= 1e-5 * wanted.abs().max()


def test_what_cannot_be_folded_is_refused_with_the_reason(
    result: Result, folding: Result, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=r"thinned block is not a block .* Config\(stock=True\)"):
        result.save(tmp_path / "compressed", architecture=DIGITS, fold=True)
    mapped = compress(seeded(Chain), loader(), budget=Budget(macs=0.8), config=Config(maps=("linear",)))
    if any(r.map.kind == "linear" for r in mapped.plan.replacements):
        with pytest.raises(PlanError, match="a linear map on a residual stream has no place"):
            mapped.save(tmp_path / "compressed", fold=True)
    own = compress(seeded(Chain), loader(), budget=Budget(macs=0.8), config=Config(stock=True))
    with pytest.raises(PlanError, match="a Chain is neither timm's nor transformers'"):
        own.save(tmp_path / "compressed", fold=True)
    wrong = Architecture(name=ARCHITECTURE, arguments={**ARGUMENTS, "num_heads": 2})
    with pytest.raises(PlanError, match=r"timm builds no .* that is this network .*outputs are"):
        folding.save(tmp_path / "compressed", architecture=wrong, fold=True)
    with pytest.raises(ArtifactError, match="a delta needs the original beside it"):
        folding.save(tmp_path / "compressed", delta=True, fold=True)
    assert not (tmp_path / "compressed").exists()


def test_verify_says_what_held_and_what_was_not_checked(
    result: Result, digits: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result.save(tmp_path / "compressed", architecture=DIGITS)
    assert main(["verify", str(tmp_path / "compressed")]) == 0
    printed = capsys.readouterr().out
    assert "model.safetensors: SHA-256 is as written" in printed
    assert "reload: the network is built anew, its outputs are as recorded" in printed
    result.save(tmp_path / "delta", delta=True)
    assert any("not checked, it needs the VisionTransformer" in s for s in verify(tmp_path / "delta"))
    assert "reload: the network is built anew" in verify(tmp_path / "delta", original=digits)[-1]
    assert main(["verify", str(tmp_path / "nothing")]) == 4
    assert "plan.json is unreadable" in capsys.readouterr().err


class Roots(Chain):
    """Network with finite outputs for rows in falling order, NaN for any other."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (x[:, :-1] - x[:, 1:]).sqrt().sum(-1, keepdim=True)


def test_outputs_that_are_no_numbers_are_not_recorded(tmp_path: Path) -> None:
    samples = [x.sort(descending=True).values for x in loader()]
    found = compress(seeded(Roots), samples, budget=Budget(macs=0.8), config=LIGHT)
    found.save(tmp_path / "compressed")
    probe = read_manifest(tmp_path / "compressed").probe
    assert probe is not None
    assert probe.outputs == ()
    assert verify(tmp_path / "compressed", original=seeded(Roots))


def test_verify_notices_another_network_behind_right_hashes(
    result: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result.save(tmp_path / "compressed", architecture=DIGITS)

    def build(self: Architecture) -> nn.Module:
        # As a library would whose defaults changed.
        return seeded(timm.create_model, self.name, **{**self.arguments, "num_heads": 2})

    monkeypatch.setattr(Architecture, "build", build)
    with pytest.raises(ArtifactError, match="not the network that was saved: its outputs are"):
        verify(tmp_path / "compressed")


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json", "report.json"])
def test_any_flipped_byte_of_an_artefact_is_caught(name: str, result: Result, tmp_path: Path) -> None:
    result.save(tmp_path / "compressed", architecture=DIGITS)
    path = tmp_path / "compressed" / name
    good = path.read_bytes()
    for place, mask in flips(len(good)):
        changed = bytearray(good)
        changed[place] ^= mask
        path.write_bytes(changed)
        with pytest.raises(ArtifactError):
            verify(tmp_path / "compressed")
        with pytest.raises(ArtifactError):
            load(tmp_path / "compressed")
    for cut in (0, 7, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(ArtifactError):
            verify(tmp_path / "compressed")


KILLED = """
import os, signal, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from rba_compress import Budget, compress, load, save
from rba_compress.artifacts.artifact import read_manifest
from tests.networks import Chain, LIGHT, loader, rows, seeded
folder = Path(sys.argv[1])
model = seeded(Chain)
found = compress(model, loader(), budget=Budget(macs=0.8), config=LIGHT)
save(found, folder / "before")
before = {p.name: p.read_bytes() for p in (folder / "before").iterdir()}

def child(limit, target):
    # Dies by SIGKILL at the line before which `limit` others of the writing code were run.
    count = 0
    def trace(frame, event, _):
        nonlocal count
        if not frame.f_code.co_filename.endswith(("artifact.py", "hub.py", "files.py", "weights.py")):
            return None
        if event == "line":
            count += 1
            if count > limit:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    save(found, target, hub=True)
    sys.settrace(None)
    os._exit(0)

def large(limit, target):
    # Dies by the kernel's SIGXFSZ in the middle of a file, at byte `limit`.
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    save(found, target, hub=True)
    os._exit(0)

killed = whole = 0
for way, limits in ((child, range(0, 2000)), (large, (0, 1, 100, 1000, 2000, 4000, 6000))):
    for limit in limits:
        target = folder / f"{way.__name__}{limit}"
        if limit % 2:
            target.mkdir()
        pid = os.fork()
        if pid == 0:
            way(limit, target)
        _, status = os.waitpid(pid, 0)
        died = os.WIFSIGNALED(status)
        assert died or os.WEXITSTATUS(status) == 0, status
        if target.exists() and any(target.iterdir()):
            assert torch.equal(load(target, original=model)(rows(3)), found.model(rows(3)))
            whole += 1
        else:
            assert died
        assert {p.name: p.read_bytes() for p in (folder / "before").iterdir()} == before
        killed += died
        if way is child and not died:
            break
    assert way is large or not died
print(killed, whole)
"""


@pytest.mark.slow
def test_a_save_that_is_killed_at_any_line_leaves_what_was_there(tmp_path: Path) -> None:
    killed, whole = map(int, script(KILLED, tmp_path).split())
    assert killed > 100  # every line that writes, and some bytes in mid-file
    assert whole >= 1


def test_of_two_saves_into_one_directory_one_wins(result: Result, tmp_path: Path) -> None:
    target = tmp_path / "compressed"
    with (
        pytest.raises(ArtifactError, match=r"cannot write .*compressed"),
        written_whole(target) as temporary,
    ):
        (temporary / "mine").write_text("late")
        result.save(target, architecture=DIGITS)  # another process, meanwhile
    verify(target)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["compressed"]


RACED = """
import os, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from rba_compress import ArtifactError, Budget, compress, save, verify
from tests.networks import Chain, LIGHT, loader, seeded
found = compress(seeded(Chain), loader(), budget=Budget(macs=0.8), config=LIGHT)
for race in range(20):
    target = Path(sys.argv[1]) / str(race)
    children = []
    for _ in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                save(found, target)
            except ArtifactError:
                os._exit(7)
            os._exit(0)
    codes = sorted(os.WEXITSTATUS(os.waitpid(child, 0)[1]) for child in children)
    assert codes == [0, 7], codes
    verify(target)
assert len(list(Path(sys.argv[1]).iterdir())) == 20
"""


@pytest.mark.slow
def test_two_processes_that_save_at_once(tmp_path: Path) -> None:
    script(RACED, tmp_path)


def test_a_read_only_place_is_named(result: Result, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtifactError, match="cannot write"):
        result.save(tmp_path / "file" / "compressed", architecture=DIGITS)
    with pytest.raises(ArtifactError, match="cannot write"):
        result.save("/proc/compressed", architecture=DIGITS)  # nobody writes there, not even root
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_a_full_disk_is_named(result: Result, tmp_path: Path) -> None:
    code = """
import resource, sys
from rba_compress import ArtifactError, Budget, compress, save
from tests.networks import Chain, LIGHT, loader, seeded
found = compress(seeded(Chain), loader(), budget=Budget(macs=0.8), config=LIGHT)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # a write beyond fails, as on a full disk
try:
    save(found, sys.argv[1] + "/compressed")
except ArtifactError as error:
    print(error)
"""
    printed = script(code, tmp_path)
    assert "cannot write" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_stock_search_narrows_all_blocks_alike(tmp_path: Path) -> None:
    """One hidden width and fewer blocks, which timm's own arguments say."""
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}
    model = seeded(timm.create_model, "vit_tiny_patch16_224", **size, num_classes=5)
    data = [part["pixel_values"].repeat(1, 1, 2, 2) for part in pixels(40)]
    found = compress(model, data, budget=Budget(macs=0.6), config=Config(stock=True, effort="quick"))
    kept = {r.kept for r in found.plan.replacements if r.inner}
    narrowed = {r.start for r in found.plan.replacements if r.inner}
    gone = {b for r in found.plan.replacements if not r.inner for b in range(r.start, r.stop)}
    assert len(kept) == 1
    assert narrowed | gone == set(range(len(found.profile.chains[0].chain)))
    found.save(tmp_path / "stock", fold=True)
    stock = load(tmp_path / "stock")
    assert type(stock) is type(model)
    with torch.no_grad():
        x = data[0]
        torch.testing.assert_close(stock(x), found.model(x), rtol=1e-4, atol=1e-5)
    arguments = json.loads((tmp_path / "stock" / "plan.json").read_text())["folded"]["arguments"]
    assert arguments["mlp_ratio"] * model.embed_dim == pytest.approx(kept.pop())  # type: ignore[operator]
