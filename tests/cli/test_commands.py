from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from matplotlib.image import imread
from PIL import Image
from safetensors.torch import load_file, save_file

from rba_compress import LoaderError, Profile, load
from rba_compress.artifacts.artifact import read_manifest
from rba_compress.cli.demo import free_directory
from rba_compress.cli.images import ImageFiles
from rba_compress.cli.main import main
from tests.core.test_distributed import free_port
from tests.networks import seeded
from tests.releases import reads_folders


@pytest.mark.slow
def test_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "mine.txt").write_text("mine")
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    printed = capsys.readouterr().out
    assert "loaded in a fresh process   outputs equal, bit for bit" in printed
    assert "accuracy" in printed
    replaced = read_manifest(tmp_path / "demo-2" / "compressed").plan.replacements
    assert sum(r.stop - r.start for r in replaced) >= 3  # nine of twelve blocks or fewer are left
    assert imread(tmp_path / "demo-2" / "similarity.png").std() > 0.1
    assert free_directory(tmp_path / "demo") == tmp_path / "demo-3"


@pytest.mark.slow
def test_supports_prints_chains_refusals_and_the_row_of_a_network(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["supports", "nn/mlp"]) == 0
    printed = capsys.readouterr().out
    assert "chain 1: 4 x _Residual, width 16, 1 to 4" in printed
    assert "nn/mlp: 1 chains, 4 blocks, found in" in printed
    assert "output of the same shape yes, finite yes, as by hand yes" in printed
    assert "saved and read back bit-equal: yes" in printed
    assert re.search(r"ONNX Runtime: \S+e-\d+ apart", printed)
    assert main(["supports", "test_vit", "--no-onnx"]) == 0
    printed = capsys.readouterr().out
    assert "behind it the first 1 of 101 positions are read" in printed
    assert "units: span, read_out, attention_free, mlp_free, read_out_mlp" in printed
    assert "ONNX Runtime: not tried" in printed
    assert main(["supports", "resnet1"]) == 2
    assert "did you mean" in capsys.readouterr().err
    assert main(["supports", "ese_vovnet19b_slim_dw"]) == 0
    printed = capsys.readouterr().out
    assert "nothing of a VovNet can be replaced: it has no blocks in a row that each add" in printed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty images in two class folders, a split file, and weights of a small ViT."""
    generator = torch.Generator().manual_seed(0)
    names = []
    for index in range(20):
        path = tmp_path / "images" / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (40, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
        names.append(f"class{index % 2}/{index}.png")
    (tmp_path / "split.txt").write_text("\n".join(names[:12]) + "\n")
    (tmp_path / "test.txt").write_text("\n".join(names[12:]) + "\n")
    model = seeded(timm.create_model, "test_vit", num_classes=2)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return tmp_path


def arguments(folder: Path, command: str = "compress", **changed: str) -> list[str]:
    options = {
        "model": "test_vit",
        "weights": str(folder / "weights.safetensors"),
        "images": str(folder / "images"),
        "split": str(folder / "split.txt"),
        "num-classes": "2",
        "macs": "0.95",
        "out": str(folder / "compressed"),
    }
    return [command] + [part for k, v in (options | changed).items() for part in (f"--{k}", v)]


@pytest.mark.slow
def test_compress_from_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"test-split": str(folder / "test.txt"), "device": "cpu"}
    assert main(arguments(folder, **more)) == 0
    printed = capsys.readouterr().out
    assert "on 8 samples (test split test.txt)" in printed
    assert "accuracy" in printed
    assert (folder / "compressed" / "similarity_blocks.png").is_file()
    assert load(folder / "compressed")(torch.zeros(1, 3, 160, 160)).shape == (1, 2)


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in two processes, as a user would."""
    how = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    ports = ["--dynamo_backend", "no", "--main_process_port", str(free_port())]
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            *how,
            *ports,
            "-m",
            "rba_compress",
            *arguments,
        ],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_two_processes_profile_and_compress_from_files(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Two images a batch: with three batches each process has a share of another size.
    more = {"device": "cpu", "batch-size": "4", "test-split": str(folder / "test.txt")}
    for out, count in (("one", 1), ("two", 2)):
        for command in ("profile", "compress"):
            asked = arguments(folder, command, **more, out=str(folder / f"{out}-{command}"))
            if count == 1:
                assert main(asked) == 0
            else:
                ended = launch(*asked)
                assert ended.returncode == 0, ended.stderr
                assert ended.stdout.count(f"saved to {folder / 'two'}-{command}") == 1  # one prints
    names = {p.name for p in (folder / "two-profile").iterdir()}
    assert names == {"profile.safetensors", "similarity_blocks.png"}
    one, two = (Profile.load(folder / f"{n}-profile" / "profile.safetensors") for n in ("one", "two"))
    assert (one.order, one.samples, one.lengths) == (two.order, two.samples, two.lengths)
    for a, b in zip(one.chains[0].moments.comoment, two.chains[0].moments.comoment, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))
    plans = [read_manifest(folder / f"{n}-compress").plan for n in ("one", "two")]
    assert [str(p) for p in plans[0].replacements] == [str(p) for p in plans[1].replacements]
    assert plans[0].forward_passes == plans[1].forward_passes
    reports = [
        json.loads((folder / f"{n}-compress" / "report.json").read_text()) for n in ("one", "two")
    ]
    assert reports[0]["fidelity"]["samples"] == reports[1]["fidelity"]["samples"] == 8
    for name in ("divergence", "agreement", "accuracy_compressed"):
        assert reports[0]["fidelity"][name] == pytest.approx(reports[1]["fidelity"][name], rel=1e-3)


@pytest.mark.slow
def test_heal_from_files(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"test-split": str(folder / "test.txt"), "device": "cpu"}
    assert main(arguments(folder, **more, macs="0.8")) == 0
    capsys.readouterr()
    names = ("weights", "images", "split", "test-split")
    asked = arguments(folder, "heal", **more, out=str(folder / "healed"))
    given = dict(zip(asked[1::2], asked[2::2], strict=True))
    asked = [part for name in names for part in (f"--{name}", given[f"--{name}"])]
    brief = ["--epochs", "2", "--rate", "1e-4", "--device", "cpu"]
    assert (
        main(["heal", str(folder / "compressed"), *asked, *brief, "--out", str(folder / "healed")]) == 0
    )
    printed = capsys.readouterr().out
    assert "on 8 samples (test split test.txt)" in printed
    healed = read_manifest(folder / "healed").plan.healed
    assert (healed is None) == ("healing did not help" in printed)
    assert load(folder / "healed")(torch.zeros(1, 3, 160, 160)).shape == (1, 2)
    assert main(["verify", str(folder / "healed")]) == 0
    ended = launch(
        "heal", str(folder / "compressed"), *asked, *brief, "--out", str(folder / "together")
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count(f"saved to {folder / 'together'}") == 1  # one of two prints
    assert load(folder / "together")(torch.zeros(1, 3, 160, 160)).shape == (1, 2)
    other = seeded(timm.create_model, "test_vit", num_classes=2).state_dict()
    save_file({name: t + 1 for name, t in other.items()}, folder / "weights.safetensors")
    assert (
        main(
            ["heal", str(folder / "compressed"), *asked, "--device", "cpu", "--out", str(folder / "x")]
        )
        == 2
    )
    assert "was made from another VisionTransformer" in capsys.readouterr().err


@pytest.mark.slow
@reads_folders
def test_a_stock_network_from_files(folder: Path) -> None:
    assert main([*arguments(folder, device="cpu", macs="0.9"), "--stock", "--hub"]) == 0
    found = timm.create_model(f"local-dir:{folder / 'compressed'}", pretrained=True)
    original = timm.create_model("test_vit", num_classes=2)
    assert sum(p.numel() for p in found.parameters()) < sum(p.numel() for p in original.parameters())
    x = torch.zeros(1, 3, 160, 160)
    assert torch.equal(found.eval()(x), load(folder / "compressed")(x))
    assert main(["verify", str(folder / "compressed")]) == 0


@pytest.mark.slow
def test_what_is_reported_on_is_not_calibrated_on(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"test-split": str(folder / "test.txt"), "device": "cpu"}
    both = arguments(folder, **(more | {"split": str(folder / "test.txt")}))
    assert main(both) == 2
    assert "8 images are in" in capsys.readouterr().err
    everything = arguments(folder, **more)
    at = everything.index("--split")
    assert main(everything[:at] + everything[at + 2 :]) == 0
    model = seeded(timm.create_model, "test_vit", num_classes=2)
    tests = ImageFiles(folder / "images", folder / "test.txt", model)
    rest = ImageFiles(folder / "images", None, model, without=tests.paths)
    assert len(rest) == 12
    assert not set(rest.paths) & set(tests.paths)


def test_labels_of_other_classes_are_no_labels(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = seeded(timm.create_model, "test_vit", num_classes=5)
    assert isinstance(ImageFiles(folder / "images", None, model)[0], torch.Tensor)
    save_file(model.state_dict(), folder / "weights.safetensors")
    changed = {"num-classes": "5", "accuracy-drop": "0.1", "device": "cpu"}
    assert main(arguments(folder, **changed)) == 2
    assert "has 2 class folders, the model other classes" in capsys.readouterr().err


@pytest.mark.slow
def test_search_writes_the_front(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "front"
    more = {"out": str(out), "macs": "0.8", "device": "cpu"}
    assert main([*arguments(folder, "search", **more), "--front"]) == 0
    rows = json.loads((out / "front.json").read_text())
    assert f"saved to {out}" in capsys.readouterr().out
    assert len((out / "front.csv").read_text().splitlines()) == len(rows) + 1
    assert imread(out / "front.png").std() > 0.05
    original = timm.create_model("test_vit", num_classes=2)
    original.load_state_dict(load_file(folder / "weights.safetensors"))
    for row in rows:
        assert load(out / row["point"], original=original)(torch.zeros(1, 3, 160, 160)).shape == (1, 2)
    assert rows[-1]["macs_kept"] <= 0.8

    last = folder / "last"
    assert main(arguments(folder, "search", **(more | {"out": str(last)}))) == 0
    (row,) = json.loads((last / "front.json").read_text())
    assert row["plan"] == rows[-1]["plan"]


@pytest.mark.parametrize(
    ("changed", "code", "message"),
    [
        ({"macs": "0.01"}, 3, "no plan reaches macs <="),
        ({"macs": "1.5"}, 3, "1.5 is neither a share"),
        ({"model": "no_such_net"}, 2, "timm cannot build 'no_such_net'"),
        ({"num-classes": "3"}, 2, "does not fit a VisionTransformer: 2 of another shape"),
        ({"weights": "absent.safetensors"}, 2, "is not a readable safetensors file"),
        ({"images": "absent"}, 2, "absent is not a folder of images"),
        ({"split": "absent.txt"}, 2, "absent.txt is not a file of image paths"),
        ({"test-split": "absent.txt"}, 2, "absent.txt is not a file of image paths"),
        ({"split": "{folder}/weights.safetensors"}, 2, "is not a text file of image paths"),
        ({"batch-size": "0"}, 2, "a batch of 0 images"),
        ({"shrinks": "2"}, 2, "shrinks.0=2.0 will not do: Input should be less than or equal to 1"),
        ({"device": "no_such_device"}, 2, "the device 'no_such_device' cannot be used"),
        ({"out": "{folder}/images"}, 4, "images is not empty: name a new directory"),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(
    folder: Path,
    changed: dict[str, str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changed = {k: v.format(folder=folder) for k, v in changed.items()}
    assert main(arguments(folder, **({"device": "cpu"} | changed))) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("rba-compress: ")
    assert message in error
    assert not (folder / "compressed").exists()


SAID = "class0/0.png\nclass1/1.png\nclass0/2.png\n"
READ = {
    "a byte-order mark": SAID.encode("utf-8-sig"),
    "files joined, each with a mark": b"\xef\xbb\xbfclass0/0.png\n\xef\xbb\xbfclass1/1.png\nclass0/2.png",
    "line ends of Windows": SAID.replace("\n", "\r\n").encode(),
    "separators of Windows": SAID.replace("/", "\\").encode(),
    "quotes": b'"class0/0.png"\n"class1/1.png"\n\'class0/2.png\'\n',
    "blank lines and spaces": b"\n class0/0.png \t\n\nclass1/1.png\n./class0/2.png\n\n",
    "absolute paths": b"{images}/class0/0.png\n{images}/class1/1.png\n{images}/class1/../class0/2.png\n",
}


@pytest.mark.parametrize("content", READ.values(), ids=READ.keys())
def test_a_split_is_read_however_its_lines_are_written(folder: Path, content: bytes) -> None:
    model, images = seeded(timm.create_model, "test_vit", num_classes=2), folder / "images"
    (folder / "own.txt").write_bytes(content.replace(b"{images}", str(images).encode()))
    files = ImageFiles(images, folder / "own.txt", model)
    assert [str(path.relative_to(images)) for path in files.paths] == SAID.split()
    assert [int(files[k][1]) for k in range(3)] == [0, 1, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (SAID.encode("utf-16"), "not a text file of image paths in UTF-8: .* Save it as UTF-8"),
        (SAID.encode("utf-16-le"), "in UTF-8: it holds a NUL byte"),
        (b"class0/0.png,0\nclass1/1.png,1\n", "lacks: .*0.png,0'. It has one path relative"),
        (b"\xe2\x80\x8bclass0/0.png\n", r"lacks: .*\\u200bclass0/0.png"),
        (b"../images/class0/0.png\n", "0.png, which lies outside of .*images"),
        (b"{folder}/split.txt\n", "split.txt, which lies outside of .*images"),
    ],
)
def test_a_split_of_another_kind_is_refused(folder: Path, content: bytes, message: str) -> None:
    model = seeded(timm.create_model, "test_vit", num_classes=2)
    (folder / "own.txt").write_bytes(content.replace(b"{folder}", str(folder).encode()))
    with pytest.raises(LoaderError, match=message):
        ImageFiles(folder / "images", folder / "own.txt", model)


def test_images_that_are_absent_are_named(folder: Path) -> None:
    model = seeded(timm.create_model, "test_vit", num_classes=2)
    (folder / "bad.txt").write_text("class0/0.png\nclass7/none.png\n")
    with pytest.raises(LoaderError, match=r"bad.txt names 1 images that .* lacks: .*none.png"):
        ImageFiles(folder / "images", folder / "bad.txt", model)
    (folder / "void").mkdir()
    with pytest.raises(LoaderError, match=r"no images in .*void: expected .*<class>/<image>"):
        ImageFiles(folder / "void", None, model)
    (folder / "images" / "root.png").write_bytes(b"no image")
    (folder / "shallow.txt").write_text("root.png\n")
    with pytest.raises(LoaderError, match=r"root.png lies in no class folder: expected"):
        ImageFiles(folder / "images", folder / "shallow.txt", model)
    (folder / "images" / "class0" / "deep").mkdir()
    (folder / "images" / "root.png").rename(folder / "images" / "class0" / "deep" / "x.png")
    (folder / "deep.txt").write_text("class0/deep/x.png  \n")
    with pytest.raises(LoaderError, match=r"x.png is not a readable image"):
        ImageFiles(folder / "images", folder / "deep.txt", model)[0]
    everything = ImageFiles(folder / "images", None, model)
    assert len(everything) == 20
    assert {int(everything[i][1]) for i in range(20)} == {0, 1}


def test_an_interrupt_is_clean_and_says_how_to_go_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for name in ("compress", "profile"):
        monkeypatch.setattr(f"rba_compress.cli.commands.{name}", interrupted)
    for command, more, said in (
        ("compress", [], "no artefact is half-written: run it again, with --checkpoint FILE to go on"),
        ("profile", [], "run it again, with --checkpoint FILE to go on"),
        ("profile", ["--checkpoint", "seen.ckpt"], "the same command goes on from seen.ckpt"),
    ):
        assert main([*arguments(folder, command, device="cpu"), *more]) == 130
        assert said in capsys.readouterr().err
        assert not (folder / "compressed").exists()


def test_a_fault_is_one_line_and_a_traceback_where_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("of something")

    monkeypatch.setattr("rba_compress.cli.commands.checks", broken)
    assert main(["verify", "compressed"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(
        "an internal error; please report it: ZeroDivisionError: of something; --debug shows where"
    )
    assert main(["verify", "compressed", "--debug"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(["verify", "absent", "--debug"]) == 4
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.slow
def test_the_help_fits_a_screen_and_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "rba_compress", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "100"},
    )
    assert len(ended.stdout.splitlines()) <= 40
    assert "130 interrupted" in ended.stdout
    for shell in ("bash",):
        with pytest.raises(SystemExit) as stopped:
            main(["--tyro-print-completion", shell])
        assert not stopped.value.code
        script = capsys.readouterr().out
        assert all(name in script for name in ("demo", "compress", "verify", "bench", "latent"))


@pytest.mark.slow
def test_what_is_written_is_timed_exported_and_told_as_json(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*given: str) -> Any:
        assert main([*given, "--json"]) == 0
        return json.loads(capsys.readouterr().out)  # one value and nothing else

    made = told(*arguments(folder, device="cpu"), "--html")
    assert made["macs_kept"] <= 0.95
    assert (folder / "compressed" / "report.html").is_file()
    compressed = str(folder / "compressed")
    timed = told("bench", compressed, "--batch-sizes", "1", "2", "--seconds", "0.1", "--device", "cpu")
    assert [timed[size]["batch"] for size in ("1", "2")] == [1, 2]
    assert timed["2"]["pairs"] >= 7
    exported = told("export", compressed, "--inputs", str(folder / "images"), "--samples", "4")
    assert exported["file"] == str(folder / "compressed" / "model.onnx")
    assert 0 <= exported["max_rel"] <= 1e-4
    assert any("model.onnx" in line for line in told("verify", compressed)["held"])
    assert told("report", compressed)["macs"] == made["macs"]
    seen = told(*arguments(folder, "profile", device="cpu", out=str(folder / "seen")))
    assert len(seen["chains"][0]["block_redundancy"]) == seen["chains"][0]["blocks"] == 6
    assert told("supports", "nn/mlp", "--no-onnx")["found"] == [{"name": "1", "blocks": 4}]
    (folder / "x.npy").write_text("no array")
    assert main(["export", compressed, "--inputs", str(folder / "x.npy")]) == 2
    assert "x.npy is not a readable .npy file" in capsys.readouterr().err
    assert main(["bench", compressed, "--batch-sizes", "0"]) == 2
    assert "a batch of 0 samples" in capsys.readouterr().err


@pytest.mark.slow
def test_a_saved_model_is_exported_in_int8(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, device="cpu")) == 0
    for path in list((folder / "images").rglob("*.png")):
        path.with_name(f"again-{path.name}").write_bytes(path.read_bytes())
    compressed, images = str(folder / "compressed"), str(folder / "images")
    given = ["export", compressed, "--int8", "--images", images, "--batch-size", "8"]
    assert main([*given, "--bound", "1e-12"]) == 4
    assert "larger bound=" in capsys.readouterr().err
    assert main([*given, "--weights", str(folder / "weights.safetensors"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["file"] == str(folder / "compressed" / "model.int8.onnx")
    made = told["quantized"]
    assert made["calibrated"] == 20
    assert made["to_original"]["samples"] == made["fidelity"]["samples"] == 4
    assert made["fidelity"]["accuracy_original"] is not None
    assert told["compressed"]["bytes"] < made["float_bytes"] / 2
    assert main(["verify", compressed]) == 0
    assert "model.int8.onnx: outputs at batch 1, 3, 8" in capsys.readouterr().out
    assert main(given) == 4
    assert "model.int8.onnx exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "give --inputs"),
        (["--int8"], "--int8 needs samples"),
        (["--int8", "--to", "gguf", "--images", "."], "--int8 writes ONNX"),
        (["--int8", "--out", "x.pt2", "--images", "."], "--int8 writes ONNX"),
    ],
)
def test_what_an_export_needs_is_said(
    given: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tmp_path), *given]) == 2
    assert says in capsys.readouterr().err


QUICK = {
    "stitch": ("--seeds", "0", "--anchors", "32", "--encoder-steps", "60", "--head-steps", "20"),
    "anchors": ("--repetitions", "1", "--anchors", "60", "--samples", "200", "--runs", "least squares"),
    "aggregate": ("--settings", "neither", "--steps", "40", "--anchors", "32"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_spaces_of_several_networks_are_tabled_and_drawn(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    asked = ["latent", name, *QUICK[name], "--out", str(tmp_path / "mine")]
    assert main(asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"saved to {tmp_path / 'mine-2' / 'picture.png'}"
    assert imread(tmp_path / "mine-2" / "picture.png").std() > 0.05  # not blank
    if name != "stitch":
        return
    assert main([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["out"] == str(tmp_path / "mine-3")
    assert len(told["rows"]) == len(lines) - 3  # without its head, a rule, and where it was saved
    assert main(["latent", "anchors", "--repetitions", "1", "--seeds", "1"]) == 2
    assert "1 seeds: pass two or more pairs that are known" in capsys.readouterr().err


@pytest.mark.slow
def test_spans_by_hand_and_an_evaluation_on_other_images(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = arguments(folder, maps="linear", spans="0:1", device="cpu")
    at = options.index("--macs")
    assert main([*options[:at], *options[at + 2 :]]) == 0
    (only,) = read_manifest(folder / "compressed").plan.replacements
    assert (only.start, only.stop, only.map.kind) == (0, 1, "linear")
    capsys.readouterr()
    asked = ["evaluate", str(folder / "compressed"), "--images", str(folder / "images")]
    assert main([*asked, "--json", "--weights", str(folder / "weights.safetensors")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["samples"] == 20
    original = seeded(timm.create_model, "test_vit", num_classes=2)
    files = ImageFiles(folder / "images", None, original)
    x, y = (torch.stack(part) for part in zip(*(files[k] for k in range(20)), strict=True))
    for name, model in (("accuracy_original", original), ("accuracy", load(folder / "compressed"))):
        with torch.no_grad():
            assert told[name] == float((model(x).argmax(-1) == y).double().mean())


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"spans": "3-6"}, "--spans 3-6: write START:STOP"),
        ({"spans": "1:2"}, "leave out the limits"),
        ({"macs": "x"}, "macs"),
    ],
)
def test_usage_is_checked_before_anything_is_loaded(
    folder: Path, changed: dict[str, str], says: str
) -> None:
    code = (
        "import sys; from rba_compress.cli.main import main\n"
        "try:\n    code = main(sys.argv[1:])\nexcept SystemExit as end:\n    code = end.code\n"
        "print('torch' in sys.modules, code)"
    )
    asked = [sys.executable, "-c", code, *arguments(folder, **changed)]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert found.stdout.split() == ["False", "2"]
    assert says in found.stderr


def test_help_loads_no_torch() -> None:
    code = (
        "import sys, rba_compress\nfrom rba_compress.cli.main import main\n"
        "try:\n    main(['compress', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'timm', 'scipy', 'transformers'} & set(sys.modules), sys.modules.keys()"
    )
    assert (
        "--spans"
        in subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
    )


@pytest.mark.slow
def test_an_image_model_of_transformers_reads_images(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.ViTConfig(
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        id2label={0: "class1", 1: "class0"},
    )
    model = seeded(transformers.ViTForImageClassification, config)
    model.save_pretrained(folder / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    how = ["--model", f"hf:{folder / 'vit'}", "--images", str(folder / "images"), "--device", "cpu"]
    out = str(folder / "out")
    assert main(["compress", *how, "--macs", "0.9", "--effort", "quick", "--out", out]) == 0
    processor = transformers.AutoImageProcessor.from_pretrained(out)
    assert processor.size["height"] == 32
    capsys.readouterr()
    assert main(["evaluate", out, *how, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    paths = sorted((folder / "images").glob("*/*.png"))
    with torch.no_grad():
        pixels = processor([Image.open(p) for p in paths], return_tensors="pt")["pixel_values"]
        scores = [m(pixel_values=pixels).logits.argmax(-1) for m in (model, load(out))]
    # The model's own names say which folder is which class.
    wanted = torch.tensor([{"class1": 0, "class0": 1}[p.parent.name] for p in paths])
    for name, found in zip(("accuracy_original", "accuracy"), scores, strict=True):
        assert told[name] == pytest.approx(float((found == wanted).double().mean()))
    assert (
        main(["compress", *how, "--text", str(folder / "split.txt"), "--out", str(folder / "no")]) == 2
    )
    assert "read with a text: leave out --images" in capsys.readouterr().err
