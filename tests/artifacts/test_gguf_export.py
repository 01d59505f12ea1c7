"""GGUF files: what llama.cpp computes from them, against PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from rba_compress import ArtifactError, Budget, Config, ExportError, Result, compress, export_gguf
from rba_compress.cli.main import main
from tests.networks import Chain, loader, seeded
from tests.texts import TEXTS, byte_tokenizer, causal

pytest.importorskip("xllamacpp")


def written(
    path: Path, model: nn.Module, config: Config, *, macs: float = 0.85, fold: bool = False
) -> Result:
    """Compress a model, and write it with a tokenizer."""
    torch.manual_seed(0)
    ids = torch.randint(3, 330, (30, 16), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": part, "use_cache": False} for part in ids.split(10)]
    found = compress(model, data, budget=Budget(macs=macs), config=config)
    found.save(path, fold=fold)
    byte_tokenizer().save_pretrained(path)
    return found


UNITS: dict[str, dict[str, Any]] = {
    "attention_linear": {"units": ("attention_linear",)},
    "widths": {"units": ("hidden_width", "head_width"), "multiple": 1},
    "spans": {"units": ("span",), "maps": ("identity", "folded")},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UNITS)
def test_llama_cpp_computes_what_pytorch_does(name: str, tmp_path: Path) -> None:
    found = written(tmp_path / "out", causal(), Config(**UNITS[name], effort="quick"))
    assert found.plan.replacements
    certificate = export_gguf(tmp_path / "out", tmp_path / "model.gguf", TEXTS, type="f32")
    assert certificate.architecture == ("llama" if name == "spans" else "deci")
    assert certificate.greedy_equal == certificate.greedy == 64
    assert certificate.max_gap < 1e-3
    long = export_gguf(tmp_path / "out", tmp_path / "long.gguf", [" ".join(TEXTS * 20)], type="f32")
    assert long.greedy_equal == 64  # of a text that is longer than the network reads
    known = json.loads((tmp_path / "model.gguf.certificate.json").read_text())
    assert known == json.loads(certificate.model_dump_json())
    assert known["bytes"] == (tmp_path / "model.gguf").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_a_stock_network_keeps_its_architecture(kind: str, tmp_path: Path) -> None:
    changes = {"head_dim": 16} if kind == "Qwen3" else {}
    model = causal(kind, **changes)
    for name, parameter in model.named_parameters():
        if name.endswith((".bias", "q_norm.weight", "k_norm.weight")):  # as after training
            generator = torch.Generator().manual_seed(len(name))
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    found = written(tmp_path / "out", model, Config(stock=True, effort="quick"), fold=True)
    assert found.plan.replacements
    certificate = export_gguf(tmp_path / "out", tmp_path / "model.gguf", TEXTS, type="f32")
    assert certificate.architecture == {"Mistral": "llama"}.get(kind, kind.lower())
    assert certificate.greedy_equal == 64
    assert certificate.max_gap < 1e-3


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a network whose layers have widths of their own."""
    path = tmp_path_factory.mktemp("gguf") / "out"
    # Embeddings as small as trained ones, whose logits do not saturate.
    model = causal(initializer_range=0.1)
    found = written(path, model, Config(deploy="gguf", effort="quick"), macs=0.7)
    assert {r.unit for r in found.plan.replacements} <= {
        "span",
        "hidden_width",
        "head_width",
        "attention_linear",
    }
    return path


@pytest.mark.slow
def test_types_are_smaller_and_near(uneven: Path, tmp_path: Path) -> None:
    sizes = []
    for kind in ("f32", "f16", "q8_0"):
        found = export_gguf(uneven, tmp_path / f"{kind}.gguf", TEXTS, type=kind)  # type: ignore[arg-type]
        sizes.append(found.bytes)
        assert found.mean_gap <= found.max_gap
    assert sizes[0] > sizes[1] > sizes[2]


@pytest.mark.slow
def test_the_command_writes_a_file(uneven: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = uneven.parent / "text.txt"
    text.write_text("\n\n".join([TEXTS[0], "too short", TEXTS[2]]))
    assert main(["export", str(uneven), "--to", "gguf", "--inputs", str(text), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["file"] == "model.gguf"
    assert told["type"] == "f16"
    assert told["texts"] == 2
    assert main(["export", str(uneven), "--to", "gguf", "--inputs", "x.npy"]) == 2
    assert "compared on a text" in capsys.readouterr().err


@pytest.mark.slow
def test_what_has_no_place_in_a_file_is_refused(uneven: Path, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    with pytest.raises(ExportError, match="no text to compare"):
        export_gguf(uneven, target, ["  "])
    with pytest.raises(ExportError, match="no GGUF file is written in 'q2_k'"):
        export_gguf(uneven, target, TEXTS, type="q2_k")  # type: ignore[arg-type]
    mapped = causal()
    how = Config(units=("span",), maps=("linear",), effort="quick")
    found = written(tmp_path / "mapped", mapped, how)
    assert any(r.map.kind == "linear" for r in found.plan.replacements)
    with pytest.raises(ExportError, match=r"-> linear has no place in a GGUF file: .*deploy='gguf'"):
        export_gguf(tmp_path / "mapped", target, TEXTS)
    written(tmp_path / "qwen", causal("Qwen2"), Config(units=("hidden_width",), effort="quick"))
    with pytest.raises(ExportError, match=r"a qwen2 of layers of several widths .*stock=True"):
        export_gguf(tmp_path / "qwen", target, TEXTS)
    other = transformers.GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64, vocab_size=384
    )
    written(tmp_path / "other", seeded(transformers.GPTNeoXForCausalLM, other), Config(effort="quick"))
    with pytest.raises(ExportError, match="a gpt_neox is not written as GGUF: llama, "):
        export_gguf(tmp_path / "other", target, TEXTS)
    written(tmp_path / "bare", causal(), Config(deploy="gguf", effort="quick"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).unlink()
    with pytest.raises(ExportError, match="has no tokenizer that is written as GGUF"):
        export_gguf(tmp_path / "bare", target, TEXTS)
    for changes, reason in (
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type='linear'"),
    ):
        path = tmp_path / reason
        written(path, causal(**changes), Config(deploy="gguf", effort="quick"))
        with pytest.raises(ExportError, match=f"a llama of {reason} is not written as GGUF"):
            export_gguf(path, target, TEXTS)
    written(tmp_path / "near", causal("Mistral", sliding_window=8), Config(stock=True, effort="quick"))
    with pytest.raises(ExportError, match="a mistral of sliding_window=8 is not written"):
        export_gguf(tmp_path / "near", target, TEXTS)
    compress(seeded(Chain), loader(), budget=Budget(macs=0.8)).save(tmp_path / "chain")
    with pytest.raises((ExportError, ArtifactError), match="GGUF|original"):
        export_gguf(tmp_path / "chain", target, TEXTS)
    assert not target.exists()
    target.write_text("mine")
    with pytest.raises(ExportError, match="exists"):
        export_gguf(uneven, target, TEXTS)
    assert target.read_text() == "mine"
    target.rename(tmp_path / "model.gguf.certificate.json")
    with pytest.raises(ExportError, match=r"certificate.json exists"):
        export_gguf(uneven, target, TEXTS)


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_not_left(
    uneven: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rba_compress.artifacts.gguf_export.PAIRED", ())
    with pytest.raises(ExportError, match="from PyTorch in the log-probability of a token, in f32"):
        export_gguf(uneven, tmp_path / "model.gguf", TEXTS, type="f32")
    assert not list(tmp_path.iterdir())
