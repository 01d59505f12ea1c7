"""Models of transformers on the command line, with text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from rba_compress import LoaderError, ModelError, load
from rba_compress.artifacts.artifact import read_report
from rba_compress.cli.main import main
from rba_compress.cli.texts import TextModel, perplexity
from rba_compress.core.batch import as_batch
from tests.networks import seeded
from tests.test_language import SIZES, llama


def tokenizer(tokens: int = 100) -> Any:
    """A tokenizer of single characters."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(k): k - 29 for k in range(32, 29 + tokens)}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")  # type: ignore[assignment]
    made.decoder = decoders.Fuse()  # type: ignore[assignment]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def words(seed: int = 0, count: int = 120) -> str:
    generator = np.random.default_rng(seed)
    return " ".join("".join(chr(97 + k) for k in generator.integers(0, 26, 5)) for _ in range(count))


def written(path: Path) -> None:
    """Write a language model with its tokenizer, a text to calibrate on and one to test on."""
    llama().save_pretrained(path / "model")  # type: ignore[operator]
    tokenizer().save_pretrained(path / "model")
    (path / "text.txt").write_text(words())
    (path / "test.txt").write_text(words(1, 60))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A language model with its tokenizer, a text to calibrate on and one to test on."""
    written(tmp_path)
    return tmp_path


def arguments(folder: Path, command: str = "compress", **changed: str) -> list[str]:
    options = {
        "model": f"hf:{folder / 'model'}",
        "text": str(folder / "text.txt"),
        "test-text": str(folder / "test.txt"),
        "length": "16",
        "effort": "quick",
        "macs": "0.9",
        "device": "cpu",
        "out": str(folder / "out"),
    }
    return [command] + [part for k, v in (options | changed).items() for part in (f"--{k}", v)]


def test_a_language_model_is_compressed_on_a_text(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    compressed: Any = load(folder / "out")
    model, test = TextModel.read(str(folder / "model")), folder / "test.txt"
    batches = [as_batch(item) for item in model.loader(test, length=16, batch_size=16)]
    measured = [perplexity(network, batches) for network in (model.network, compressed)]
    assert told["perplexity"] == pytest.approx(measured, rel=1e-5)
    report: Any = read_report(folder / "out")
    # Four layers of two key heads of eight channels, and as many values, in float32.
    assert report.cache_original == 4 * 2 * 2 * 8 * 4
    cached: Any = compressed(torch.arange(3, 9)[None], use_cache=True).past_key_values
    held = sum(
        layer.keys.nbytes + layer.values.nbytes for layer in cached.layers if layer.keys is not None
    )
    assert report.cache_compressed == held / 6
    assert "cache, bytes a token" in report.table()
    again = transformers.AutoTokenizer.from_pretrained(folder / "out")
    prompt = again("hello world", return_tensors="pt")
    found = compressed.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert again.decode(found[0]).startswith("hello world")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (
            {"images": "x", "accuracy-drop": "0.1"},
            "read with a text: leave out --images, --accuracy-drop",
        ),
        ({"model": "test_vit"}, "test_vit is read with images: leave out --text, --test-text"),
    ],
)
def test_options_of_another_kind_of_model_are_refused(
    folder: Path, changed: dict[str, str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, **changed)) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("command", ["profile", "search"])
def test_a_language_model_is_profiled_and_searched(folder: Path, command: str) -> None:
    assert main(arguments(folder, command)) == 0
    assert any((folder / "out").iterdir())


@pytest.mark.slow
def test_a_stock_language_model_from_files(folder: Path) -> None:
    assert main([*arguments(folder, macs="0.85"), "--stock", "--hub"]) == 0
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "out").eval()
    ids = torch.randint(3, 100, (2, 8))
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, load(folder / "out")(ids).logits)


@pytest.mark.slow
def test_an_encoder_reads_a_document_a_line(folder: Path) -> None:
    sizes = {k: v for k, v in SIZES.items() if "key_value" not in k and "initializer" not in k}
    config = transformers.BertConfig(**sizes | {"num_labels": 3})
    seeded(transformers.BertForSequenceClassification, config).save_pretrained(folder / "model")
    (folder / "text.txt").write_text("\n".join(words(seed, 2 + seed % 3) for seed in range(40)))
    model = TextModel.read(str(folder / "model"))
    first = model.loader(folder / "text.txt", length=16, batch_size=8)[0]
    assert first["input_ids"].shape == (8, 16)
    assert 0 in first["attention_mask"]
    assert main(arguments(folder, **{"test-text": str(folder / "text.txt")})) == 0
    assert load(folder / "out")(**first).logits.shape == (8, 3)


def test_perplexity_by_definition(folder: Path) -> None:
    model = TextModel.read(str(folder / "model"))
    batches = [as_batch(x) for x in model.loader(folder / "test.txt", length=16, batch_size=8)]
    found = perplexity(model.network, batches)
    lost = []
    for batch in batches:
        ids = batch.kwargs["input_ids"]
        with torch.no_grad():
            logits = model.network(ids).logits.double().numpy()
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        rows = np.take_along_axis(logs[:, :-1], ids[:, 1:, None].numpy(), -1)
        lost.append(-rows.ravel())
    assert found == pytest.approx(float(np.exp(np.concatenate(lost).mean())), rel=1e-5)


def test_texts_and_models_that_cannot_be_used_are_named(folder: Path) -> None:
    model = TextModel.read(str(folder / "model"))
    short = folder / "short.txt"
    short.write_text("a")
    with pytest.raises(LoaderError, match=r"has 1 tokens, and sequences of 16"):
        model.loader(short, length=16, batch_size=2)
    with pytest.raises(LoaderError, match="2 and 1 are the least"):
        model.loader(short, length=1, batch_size=2)
    short.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LoaderError, match="is not a text file in UTF-8"):
        model.loader(short, length=16, batch_size=2)
    tokenizer(200).save_pretrained(folder / "model")
    with pytest.raises(LoaderError, match=r"has 200 tokens, the model 100"):
        TextModel.read(str(folder / "model"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "model" / name).unlink()
    with pytest.raises(LoaderError, match="has no tokenizer"):
        TextModel.read(str(folder / "model"))
    with pytest.raises(ModelError, match="transformers cannot read"):
        TextModel.read(str(folder / "nothing"))
    assert not (folder / "out").exists()


def test_what_is_missing_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(folder / "out")]
    assert main([*arguments(folder)[:3], *out]) == 2
    assert "is compressed on --text FILE" in capsys.readouterr().err
    assert main(["compress", "--model", "test_vit", *out]) == 2
    assert "test_vit needs --weights" in capsys.readouterr().err
    assert not (folder / "out").exists()


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=100, d_model=16, d_ff=16, num_layers=2, num_heads=2, d_kv=8
    )
    config.architectures = ["T5ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="is an encoder-decoder"):
        TextModel.read(str(tmp_path))


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model, its texts, and the model that was compressed."""
    path = tmp_path_factory.mktemp("compressed")
    written(path)
    assert main(arguments(path)) == 0
    return path


@pytest.mark.slow
def test_a_compressed_language_model_is_exported_timed_and_continued(
    compressed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, model = str(compressed / "out"), f"hf:{compressed / 'model'}"
    text = str(compressed / "text.txt")
    capsys.readouterr()
    told = []
    for command in (
        ["export", out, "--inputs", text, "--length", "16", "--samples", "4"],
        ["bench", out, "--batch-sizes", "1", "--seconds", "0.1", "--device", "cpu"],
        ["generate", out, "--model", model, "--prompt", "hello", "--tokens", "5", "--device", "cpu"],
        ["report", out],
    ):
        assert main([*command, "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out))
    exported, timed, generated, _ = told
    assert exported["max_rel"] < 1e-4
    assert timed["1"]["pairs"] > 0
    network: Any = load(compressed / "out")
    tokens = TextModel.compressed(compressed / "out").tokenizer
    found = network.generate(**tokens("hello", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert generated["compressed"] == tokens.decode(found[0], skip_special_tokens=True)
    assert generated["original"].startswith("hello")


@pytest.mark.slow
def test_a_compressed_language_model_is_healed(
    compressed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--model", f"hf:{compressed / 'model'}", "--text", str(compressed / "text.txt")]
    more = ["--length", "16", "--epochs", "1", "--device", "cpu", "--out", str(compressed / "healed")]
    capsys.readouterr()
    assert main(["heal", str(compressed / "out"), *asked, *more, "--json"]) == 0
    before, after = json.loads(capsys.readouterr().out)["perplexity"]
    assert after > 0
    assert before > 0
    transformers.AutoTokenizer.from_pretrained(compressed / "healed")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["heal", "--text", "x", "--out", "y"], "pass --model hf:DIR"),
        (["heal", "--model", "gpt", "--text", "x", "--out", "y"], "is given as hf:DIR"),
        (["generate", "--model", "gpt", "--prompt", "x"], "is given as hf:DIR"),
    ],
)
def test_the_original_is_asked_for(
    compressed: Path, command: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command[0], str(compressed / "out"), *command[1:]]) in (2, 4)
    assert reason in capsys.readouterr().err
