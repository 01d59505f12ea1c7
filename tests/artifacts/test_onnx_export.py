"""Exports against ONNX Runtime and the network itself, and each way in which they are refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from torch import Tensor, nn

from benchmarks.delivery import flips
from rba_compress import (
    Architecture,
    ArtifactError,
    ExportError,
    Result,
    export_onnx,
    export_pt2,
    verify,
)
from rba_compress.artifacts import onnx_file as exporting
from rba_compress.artifacts.certificate import OnnxModel, read_certificate
from rba_compress.cli.digits import ARCHITECTURE, ARGUMENTS, digits_model
from rba_compress.cli.main import main
from tests.conftest import once
from tests.networks import Chain, rows, seeded
from tests.releases import half_onnx

DIGITS = Architecture(name=ARCHITECTURE, arguments=dict(ARGUMENTS))


@pytest.fixture(scope="session")
def delivered(
    result: Result, held_out: tuple[Tensor, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An artefact with a certified model.onnx; tests that change files work on a copy."""

    def build() -> Path:
        directory = tmp_path_factory.mktemp("delivered") / "compressed"
        result.save(directory, architecture=DIGITS)
        export_onnx(directory, directory / "model.onnx", held_out[0][:16])
        return directory

    found: Path = once(tmp_path_factory, "delivered", build)
    return found


def test_the_certificate_of_an_artefact(
    delivered: Path, result: Result, digits: nn.Module, held_out: tuple[Tensor, Tensor]
) -> None:
    certificate = read_certificate(delivered)
    assert [parity.batch for parity in certificate.parity] == [1, 3, 16]
    assert all(0 <= parity.max_rel <= 1e-4 == certificate.tolerance for parity in certificate.parity)
    assert all(parity.argmax_agreement == 1 for parity in certificate.parity)
    assert certificate.compressed.bytes == (delivered / "model.onnx").stat().st_size
    assert certificate.compressed.nodes == len(onnx.load(delivered / "model.onnx").graph.node)
    assert certificate.original is not None
    assert certificate.latency is not None
    assert certificate.latency.pairs >= 7
    assert certificate.preprocessing is not None
    # The oracle: ONNX Runtime by hand, on images that the export never saw, in a batch of a new size.
    session = onnxruntime.InferenceSession(delivered / "model.onnx", providers=["CPUExecutionProvider"])
    x = held_out[0][50:63]
    (found,) = session.run(None, {certificate.input_names[0]: x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, result.model(x).numpy(), atol=1e-4)
    checks = verify(delivered)
    assert any("model.onnx: outputs at batch 1, 3, 8 are at most" in line for line in checks)


@pytest.mark.parametrize("name", ["model.onnx", "certificate.json"])
def test_any_flipped_byte_of_an_export_is_caught(name: str, delivered: Path) -> None:
    path = delivered / name
    good = path.read_bytes()
    try:
        for place, mask in flips(len(good)):
            changed = bytearray(good)
            changed[place] ^= mask
            path.write_bytes(changed)
            with pytest.raises(ArtifactError):
                verify(delivered)
        path.unlink()
        with pytest.raises(ArtifactError, match=r"is missing|has no certificate"):
            verify(delivered)
    finally:
        path.write_bytes(good)


@pytest.mark.slow
def test_verify_measures_the_file_and_not_its_certificate(
    delivered: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another network with right hashes all over is a lie that parity alone finds."""
    wrong = digits_model()
    with torch.no_grad():
        wrong.head.bias += 0.1
    for name in ("plan.json", "model.safetensors", "report.json"):
        (tmp_path / name).write_bytes((delivered / name).read_bytes())
    export_onnx(wrong, tmp_path / "model.onnx", torch.rand(4, 1, 8, 8))
    assert main(["verify", str(tmp_path)]) == 4
    assert "from the network's outputs" in capsys.readouterr().err
    (tmp_path / "model.onnx").rename(tmp_path / "other.onnx")
    (tmp_path / "certificate.json").unlink()
    assert main(["verify", str(tmp_path)]) == 4
    assert "other.onnx has no certificate" in capsys.readouterr().err


@pytest.mark.slow
def test_a_module_and_a_static_shape(tmp_path: Path) -> None:
    model = seeded(Chain).train()
    certificate = export_onnx(model, tmp_path / "chain.onnx", rows(4), original=model)
    assert model.training
    assert certificate.original == certificate.compressed
    found = OnnxModel(tmp_path / "chain.onnx")(rows(7))[0]
    with torch.no_grad():
        torch.testing.assert_close(found, model.eval()(rows(7)))
    (line, *more) = verify(tmp_path)
    assert "SHA-256 is as written" in line
    assert "needs the network" in more[0]
    fixed = tmp_path / "fixed"
    certificate = export_onnx(model, fixed / "chain.onnx", rows(4), dynamic=False)
    assert [parity.batch for parity in certificate.parity] == [4]
    with pytest.raises(Exception, match="invalid dimensions"):
        OnnxModel(fixed / "chain.onnx")(rows(7))


@pytest.mark.slow
def test_text_of_any_length(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
    )
    model = seeded(transformers.BertModel, config)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (4, 12), generator=generator)
    mask = (torch.arange(12) < torch.tensor([[12], [7], [3], [9]])).long()
    example = {"input_ids": ids, "attention_mask": mask}
    certificate = export_onnx(model, tmp_path / "bert.onnx", example)
    assert certificate.input_names == ("input_ids", "attention_mask")
    assert certificate.sequences
    assert certificate.output_names == ("last_hidden_state", "pooler_output")
    runner = OnnxModel(tmp_path / "bert.onnx")
    longer = torch.randint(0, 50, (2, 31), generator=generator)
    with torch.no_grad():
        wanted = model(input_ids=longer, attention_mask=torch.ones_like(longer)).last_hidden_state
    torch.testing.assert_close(runner(longer, torch.ones_like(longer))[0], wanted, atol=1e-5, rtol=1e-4)


class Codes(nn.Module):
    """Network for integer codes (N, 5), a table for each column, as of clinical records."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(7, 4) for _ in range(5))
        self.rest = Chain()

    def forward(self, codes: Tensor) -> Tensor:
        columns = zip(self.tables, codes.unbind(1), strict=True)
        return self.rest(torch.stack([table(column) for table, column in columns]).sum(0))


def test_integers_in_columns_are_no_sequences(tmp_path: Path) -> None:
    codes = torch.randint(0, 7, (6, 5), generator=torch.Generator().manual_seed(0))
    certificate = export_onnx(seeded(Codes), tmp_path / "codes.onnx", codes)
    assert certificate.dynamic
    assert not certificate.sequences
    assert len(certificate.parity) == 3


@pytest.mark.slow
@pytest.mark.parametrize("form", [pytest.param("onnx", marks=half_onnx), "pt2"])
def test_half_precision_is_measured_or_refused_by_name(
    form: str, result: Result, held_out: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    export = export_onnx if form == "onnx" else export_pt2
    model = copy.deepcopy(result.model).half()
    certificate = export(model, tmp_path / f"half.{form}", held_out[0][:8])
    assert certificate.dtype == "float16"
    assert max(parity.max_rel for parity in certificate.parity) <= certificate.tolerance == 1e-2
    with pytest.raises(ExportError, match="in bfloat16, which ONNX Runtime does not run on a CPU"):
        export_onnx(model.bfloat16(), tmp_path / "brain" / "model.onnx", held_out[0][:8])


@pytest.mark.slow
def test_a_torch_export_program(
    result: Result, held_out: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    certificate = export_pt2(result.model, tmp_path / "compressed.pt2", held_out[0][:8])
    assert [parity.batch for parity in certificate.parity] == [1, 3, 8]
    program = torch.export.load(tmp_path / "compressed.pt2").module()
    with torch.no_grad():
        torch.testing.assert_close(program(held_out[0][:5])[0], result.model(held_out[0][:5]))
    assert "SHA-256 is as written" in verify(tmp_path)[0]


def test_large_weights_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "EXTERNAL", 100)
    certificate = export_onnx(seeded(Chain, width=64), tmp_path / "chain.onnx", rows(4))
    assert sorted(certificate.sha256) == ["chain.onnx", "chain.onnx.data"]
    assert certificate.compressed.bytes == sum(
        (tmp_path / name).stat().st_size for name in certificate.sha256
    )
    verify(tmp_path)
    data = tmp_path / "chain.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ArtifactError, match="chain.onnx.data is not what was saved"):
        verify(tmp_path)


class Eigen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.eigvals(x[:, None] * x[:, :, None]).abs()


class Lacking(Chain):
    def __init__(self) -> None:
        super().__init__(depth=1)
        self.spectrum = Eigen()

    def forward(self, x: Tensor) -> Tensor:
        return self.spectrum(super().forward(x))


class Other(Chain):
    """Network that runs other code during export."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (0.5 if torch.compiler.is_compiling() else 0.0)


class Fixed(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.reshape(4, 4))


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (Lacking, rows(4), r"ONNX lacks the operation aten.linalg_eig of spectrum \(Eigen\)"),
        (Other, rows(4), r"is 0.5 from the network's outputs on a batch of 1"),
        (
            Chain,
            torch.zeros(2, 5),
            r"the Chain does not run on the example \(\{'input 0': \(2, 5\)\}\)",
        ),
        (
            Fixed,
            rows(4),
            r"not run on the example \(\{'input 0': \(1, 4\)\}\): batches of any size .* dynamic=False",
        ),
    ],
)
def test_what_cannot_be_exported_is_named_and_leaves_no_file(
    model: type[nn.Module], example: Tensor, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExportError, match=message):
        export_onnx(seeded(model), tmp_path / "model.onnx", example)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_is_there_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("mine")
    with pytest.raises(ExportError, match=r"model.onnx exists: name a new file, or remove it first"):
        export_onnx(seeded(Chain), path, rows(4))
    assert path.read_text() == "mine"
    (tmp_path / "certificate.json").write_text(json.dumps({"file": "model.onnx"}))
    with pytest.raises(ExportError, match=r"certificate.json is that of model.onnx: name another dir"):
        export_onnx(seeded(Chain), tmp_path / "other.onnx", rows(4))
    path.unlink()  # a certificate of nothing is in nobody's way
    assert export_onnx(seeded(Chain), tmp_path / "other.onnx", rows(4)).file == "other.onnx"

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rba_compress.core.io.flush", full)
    with pytest.raises(ExportError, match=r"cannot write .*No space left on device"):
        export_onnx(seeded(Chain), tmp_path / "deep" / "model.onnx", rows(4))
    assert not list((tmp_path / "deep").iterdir())
