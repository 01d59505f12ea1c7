"""Int8 ONNX files: the bound holds, biases are corrected, and the certificate says how far they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from rba_compress import ExportError, export_onnx
from rba_compress.artifacts import int8, int8_export, onnx_file
from rba_compress.artifacts.certificate import OnnxModel, read_certificate
from rba_compress.artifacts.int8 import AsNetwork, Chosen, _Quantiser, quantised
from rba_compress.artifacts.verification import verify
from rba_compress.core.batch import Batch, as_batch
from rba_compress.core.errors import LoaderError
from rba_compress.core.loader import Split
from rba_compress.core.loader_form import form_of
from rba_compress.profiling.fidelity import Criterion, fidelity
from tests.networks import seeded


class Layers(nn.Module):
    """A grouped convolution, a plain one, a layer on positions, and a head. (N, 4, 8, 8) -> (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.plain = nn.Conv2d(8, 12, 1)
        self.tokens = nn.Linear(12, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(self.grouped(x).relu()).relu()
        return self.head(self.tokens(x.flatten(2).mT).relu().mean(1)) * 8


def samples(count: int = 80, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list((torch.randn(count, 4, 8, 8, generator=generator) + 0.5).split(10))


def exported(model: nn.Module, path: Path) -> Path:
    export_onnx(model, path, samples(8)[0])
    return path


def batches(seed: int) -> list[Batch]:
    return [as_batch(x) for x in samples(seed=seed)]


@pytest.mark.parametrize("layer", ["grouped", "plain", "tokens", "head"])
def test_a_corrected_bias_takes_the_mean_error_away(layer: str, tmp_path: Path) -> None:
    """In ONNX Runtime, of one layer in int8: the error of its output's mean, per channel."""
    model = seeded(Layers)
    part = {"grouped": model.grouped, "plain": model.plain}.get(layer, getattr(model, layer))
    width = {"grouped": 4, "plain": 8, "tokens": 12, "head": 16}[layer]
    shape = (80, width, 8, 8) if isinstance(part, nn.Conv2d) else (80, 6, width)
    # Skewed inputs, so that rounding and clipping move the mean.
    x = torch.rand(shape, generator=torch.Generator().manual_seed(0)) ** 4 * 3
    fit = [as_batch(each) for each in x.split(20)]
    export_onnx(part, tmp_path / "float.onnx", x[:8])
    quantiser = _Quantiser(tmp_path / "float.onnx", fit, tmp_path)
    channels = (1, 2, 3) if isinstance(part, nn.Conv2d) else (0, 1)

    def error() -> np.ndarray:
        quantiser.write(quantiser.nodes, tmp_path / "int8.onnx")
        with torch.no_grad():
            gap = OnnxModel(tmp_path / "int8.onnx")(x)[0] - part(x)
        if isinstance(part, nn.Conv2d) and layer == "grouped":
            gap = gap[..., 1:-1, 1:-1]  # the border reads zeros
        axes = tuple(k for k in range(gap.ndim) if k != (1 if len(channels) == 3 else gap.ndim - 1))
        return np.asarray(gap.double().mean(axes))

    before = error()
    quantiser.correct()
    assert quantiser.biases == 1
    assert np.abs(error()).mean() < np.abs(before).mean() / 3
    quantiser.restore()
    np.testing.assert_array_equal(error(), before)


def test_the_most_sensitive_stay_in_float(tmp_path: Path) -> None:
    model = seeded(Layers)
    file, criterion = exported(model, tmp_path / "float.onnx"), Criterion("kl")

    def made(bound: float) -> Any:
        target = tmp_path / f"{bound}.onnx"
        chosen = Chosen(criterion, batches(1), bound)
        found = quantised(file, model, chosen, batches(0), target)
        network = AsNetwork(OnnxModel(target), model(samples(10)[0]))
        reached = fidelity(model, network, batches(1), criterion).divergence
        assert reached == pytest.approx(found.divergence, rel=1e-4)
        assert reached <= bound
        return found

    whole = made(1.0)
    assert (whole.operations, whole.floats) == (4, {})
    tight = made(whole.divergence / 4)
    assert 0 < tight.operations < 4
    assert len(tight.floats) == 4 - tight.operations
    with pytest.raises(ExportError, match=r"no operation .* at a divergence of 1e-12.*larger bound="):
        made(1e-12)


def test_an_int8_file_and_its_certificate(tmp_path: Path) -> None:
    model, original, data = seeded(Layers), seeded(Layers), samples(120)
    with torch.no_grad():
        original.head.weight += 0.02  # type: ignore[operator]
    found = export_onnx(
        model,
        tmp_path / "model.onnx",
        data,
        original=original,
        quantize="int8",
        seconds=0.1,
        metrics={"first": lambda output, batch: output[:, 0]},
    )
    assert found == read_certificate(tmp_path, "int8")
    made = found.quantized
    assert made is not None
    parts = {part: [*Split(data, 0).part(part)] for part in ("fit", "validation", "test")}
    counts = {part: sum(map(len, batches)) for part, batches in parts.items()}
    assert (made.calibrated, made.chosen, made.fidelity.samples) == tuple(counts.values())
    assert made.reached <= made.bound == 0.02
    runner = OnnxModel(tmp_path / "model.onnx")
    network = AsNetwork(runner, model(data[0]))
    for to, stated in ((model, made.fidelity), (original, made.to_original)):
        own = fidelity(to, network, parts["test"], "kl")
        assert stated is not None
        assert stated.divergence == pytest.approx(own.divergence, rel=1e-4)
        assert stated.metrics.keys() == {"first"}
    assert {(each.batch, each.against) for each in made.timed} == {
        (size, name) for size in (1, 32) for name in ("original", "original in int8")
    }
    assert [p.batch for p in found.parity] == [1, 3, 8]
    assert (tmp_path / "model.onnx").stat().st_size == found.compressed.bytes
    assert made.original_int8 is not None
    assert verify(tmp_path)[-1].startswith("model.onnx: opens")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["certificate.int8.json", "model.onnx"]


@pytest.mark.slow
def test_openvino_runs_the_same_file(tmp_path: Path) -> None:
    """In float and in int8; OpenVINO itself is run again here, on samples that were not chosen on."""
    openvino = pytest.importorskip("openvino")
    model, data, both = seeded(Layers), samples(120), ("onnxruntime", "openvino")

    def run(path: Path, x: Tensor) -> Tensor:
        compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return torch.from_numpy(compiled([x.numpy()])[0].copy())

    path = tmp_path / "float.onnx"
    found = export_onnx(model, path, data[0], original=seeded(Layers), runtimes=both, seconds=0.1)
    (there,) = found.runtimes
    assert (there.name, there.fidelity) == ("openvino", None)
    assert max(p.max_rel for p in there.parity) <= 1e-4
    assert [t.batch for t in there.timed] == [1, 32]
    with torch.no_grad():
        torch.testing.assert_close(run(path, data[1]), model(data[1]), rtol=1e-4, atol=1e-4)
    path = tmp_path / "int8.onnx"
    how = {"original": seeded(Layers), "runtimes": both, "quantize": "int8", "seconds": 0.1}
    (there,) = export_onnx(model, path, data, **how).runtimes
    test = [*Split(data, 0).part("test")]
    assert there.fidelity is not None
    assert {t.against for t in there.timed} == {"original", "original in int8"}

    class Again(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return run(path, x)

    own = fidelity(model, Again(), test, "kl")
    assert there.fidelity.divergence == pytest.approx(own.divergence, rel=1e-3)


@pytest.mark.slow
def test_a_model_of_transformers_is_called_by_its_keywords(tmp_path: Path) -> None:
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        vocab_size=100,
        num_labels=3,
        initializer_range=0.3,
    )
    model: Any = seeded(transformers.BertForSequenceClassification, config)
    generator = torch.Generator().manual_seed(0)
    data = [
        {
            "input_ids": torch.randint(3, 100, (8, 12), generator=generator),
            "attention_mask": (torch.arange(12) < 4 + torch.arange(8)[:, None]).long(),
            "labels": torch.arange(8) % 3,
        }
        for _ in range(10)
    ]
    made = export_onnx(model, tmp_path / "model.onnx", data, quantize="int8", seconds=0.1).quantized
    assert made is not None
    assert made.fidelity.divergence <= 0.05
    file = OnnxModel(tmp_path / "model.onnx")
    test = [*Split(data, 0, form=form_of(model)(data[0])).part("test")]
    agreed = torch.cat(
        [
            file(*batch.tensors.values())[0].argmax(-1) == batch.run(model).logits.argmax(-1)
            for batch in test
        ]
    )
    assert made.fidelity.agreement == float(agreed.double().mean())


def test_weights_of_a_large_file_lie_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of 2 GiB is lowered: the network computes the same from one file and from two."""
    model = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 5)))
    outputs = []
    for name, limit in (("one", int8.EXTERNAL), ("two", 100)):
        for module in (int8, onnx_file):
            monkeypatch.setattr(module, "EXTERNAL", limit)
        target = tmp_path / name / "model.onnx"
        target.parent.mkdir()
        found = export_onnx(model, target, samples(), quantize="int8", seconds=0.1)
        outputs.append(OnnxModel(target)(samples()[0])[0])
        assert sorted(found.sha256) == ["model.onnx", "model.onnx.data"][: len(outputs)]
        assert found.compressed.bytes == sum(p.stat().st_size for p in target.parent.glob("model.*"))
        assert verify(target.parent)[-1].startswith("model.onnx: opens")
    assert torch.equal(*outputs)


def test_a_runtime_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ExportError, match="no runtime is called 'tensorrt': there are onnxruntime"):
        export_onnx(seeded(Layers), tmp_path / "x.onnx", samples()[0], runtimes=("tensorrt",))  # type: ignore[arg-type]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"openvino is not installed: .*\[openvino\]"):
        export_onnx(seeded(Layers), tmp_path / "x.onnx", samples()[0], runtimes=("openvino",))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "data", "how", "says"),
    [
        (Layers, samples(20), {}, "9 samples are too few|10 samples are too few"),
        (Layers, samples(), {"quantize": "int4"}, "quantize='int4' is not known: pass \"int8\""),
        (lambda: Layers().double(), [x.double() for x in samples()], {}, "float32.* is in float64"),
        (lambda: Layers().bfloat16(), [x.bfloat16() for x in samples()], {}, "bfloat16"),
        (nn.ReLU, samples(), {}, "no linear layer or convolution"),
        (Layers, samples(), {"bound": 0.0}, "larger bound="),
    ],
)
def test_what_cannot_be_int8_leaves_nothing(
    model: Any, data: Any, how: dict[str, Any], says: str, tmp_path: Path
) -> None:
    how = {"quantize": "int8", "seconds": 0.1} | how
    with pytest.raises(ExportError, match=says):
        export_onnx(seeded(model), tmp_path / "model.onnx", data, **how)
    assert not list(tmp_path.iterdir())


def test_a_loader_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoaderError):
        export_onnx(seeded(Layers), tmp_path / "model.onnx", [3], quantize="int8")
    assert not list(tmp_path.iterdir())
    assert int8_export.FEWEST == 16
