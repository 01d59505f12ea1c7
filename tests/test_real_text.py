"""Real text models, from packages that carry their weights: skipped where those are absent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import language, sentences
from benchmarks.real_data import data_root, smollm2, wikitext2
from rba_compress import Budget, Config, profile, search
from rba_compress.core.batch import as_batch
from rba_compress.core.map_spec import MapSpec
from rba_compress.planning.span_fits import fit_spans
from rba_compress.profiling.profiler import calibrate
from rba_compress.units.offers import supports
from rba_compress.units.splice import splice

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of transformers and torch, on files of older versions
    pytest.mark.skipif(not (data_root() / "wikitext2").exists(), reason="RBA_DATA has no WikiText-2"),
]


def packaged(build: Callable[[], Any]) -> Any:
    """Build a value from a package, or skip with the name of what is absent."""
    try:
        return build()
    except (FileNotFoundError, ImportError) as error:
        pytest.skip(str(error))


def test_a_sentence_encoder_loses_a_layer_and_loads_everywhere(tmp_path: Path) -> None:
    loaders = pytest.importorskip("sentence_transformers")
    transformers = pytest.importorskip("transformers")
    model, tokenizer = packaged(sentences.encoder)
    calibration = sentences.loader(tokenizer, sentences.sentences("calibration", 120), 20)
    how = Config(stock=True, window=1, refit=False)
    seen = profile(model, calibration, config=how, divergence=sentences.embedding_divergence)
    found = search(model, seen, calibration, budget=Budget(macs=0.85))
    compressed = splice(model, found.plan, found.tensors)
    texts = sentences.sentences("test", 120)
    test = sentences.loader(tokenizer, texts, 20)
    wanted = sentences.embeddings(compressed, test)
    measured = sentences.fidelity(sentences.embeddings(model, test), wanted)
    # Without re-solving kept layers, on a fifth of the samples; the table has the goal.
    assert measured["spearman"] > 0.94
    sentences.write_stock(compressed, found, seen, tmp_path / "stock")
    again = transformers.AutoModel.from_pretrained(tmp_path / "stock").eval()
    assert again.config.num_hidden_layers == 5
    torch.testing.assert_close(sentences.embeddings(again, test), wanted, rtol=1e-4, atol=1e-4)
    theirs = loaders.SentenceTransformer(str(tmp_path / "stock"), device="cpu")
    encoded = theirs.encode(texts, convert_to_tensor=True, batch_size=20)
    torch.testing.assert_close(encoded, wanted, rtol=1e-4, atol=1e-4)


def test_a_language_model_decodes_without_layers() -> None:
    model, tokenizer = packaged(smollm2)
    how = language.Run(length=128)
    loader = language.sequences(tokenizer, "calibration", 1024, how)
    (chain,) = supports(model, {"input_ids": loader[0]["input_ids"][:1]}).chains
    assert len(chain) == 30
    (profiled,), _ = calibrate(model, [chain], enumerate(as_batch(b) for b in loader), window=1)
    spec = MapSpec(kind="shrunk", shrink=0.5, damping=1e-4)
    found = fit_spans(profiled, [(0, 1), (14, 15)], spec)
    compressed: Any = splice(model, found.plan, found.tensors)
    prompts = [line[:60] for line in wikitext2("test")[:2]]
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = compressed.generate(**batch, **settings)
    assert torch.equal(cached, compressed.generate(**batch, use_cache=False, **settings))
    assert torch.equal(cached, compressed.generate(**batch, cache_implementation="static", **settings))
    for row, prompt in enumerate(prompts):
        alone = compressed.generate(**tokenizer(prompt, return_tensors="pt"), **settings)
        assert torch.equal(cached[row, -8:], alone[0, -8:])
