"""Language models: caches, padding, bfloat16, and stock models of fewer layers."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rba_compress import Budget, Config, compress, load, supports
from rba_compress.core.batch import as_batch
from rba_compress.core.distributed import current
from rba_compress.core.map_spec import MapSpec
from rba_compress.planning.context import SearchContext
from rba_compress.planning.evaluator import fewer
from rba_compress.planning.span_fits import fit_spans
from rba_compress.profiling.profiler import profile
from rba_compress.units.splice import splice
from tests.networks import seeded
from tests.releases import reads_attention_type

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama(**changes: Any) -> nn.Module:
    return seeded(transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES | changes))


def gemma2() -> nn.Module:
    """Layers of sliding and of full attention in turn."""
    config = transformers.Gemma2Config(**SIZES, head_dim=8, sliding_window=6)
    return seeded(transformers.Gemma2ForCausalLM, config)


def ids(n: int = 2, length: int = 8, seed: int = 0) -> Tensor:
    return torch.randint(3, 100, (n, length), generator=torch.Generator().manual_seed(seed))


def texts(samples: int = 20) -> list[dict[str, Tensor]]:
    whole = ids(samples, 12)
    return [{"input_ids": part} for part in whole.split(5)]


def without(model: nn.Module, *layers: int) -> nn.Module:
    """The model with affine maps in place of layers, as calibration fits them."""
    seen = profile(model, texts())
    spans = [(layer, layer + 1) for layer in layers]
    found = fit_spans(seen.chains[0], spans, MapSpec(kind="affine", damping=0.01))
    return splice(model, found.plan, found.tensors)


def greedy(model: Any, prompt: Tensor, steps: int = 10) -> Tensor:
    """Decode without a cache: the whole text goes through the model at every step."""
    with torch.no_grad():
        for _ in range(steps):
            logits = model(input_ids=prompt, use_cache=False).logits
            prompt = torch.cat([prompt, logits[:, -1:].argmax(-1)], 1)
    return prompt


@pytest.mark.parametrize("layers", [(0,), (2,), (0, 1), (1, 3)], ids=str)
@pytest.mark.parametrize("build", [llama, pytest.param(gemma2, marks=reads_attention_type)])
def test_cached_decoding_equals_uncached(build: Any, layers: tuple[int, ...]) -> None:
    require_cached_decoding_to_equal_uncached(without(build(), *layers))


def require_cached_decoding_to_equal_uncached(compressed: Any) -> None:
    prompt = ids()
    wanted = greedy(compressed, prompt)
    how = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(prompt)
    for cache in (None, "static"):
        found = compressed.generate(prompt, attention_mask=mask, cache_implementation=cache, **how)
        assert torch.equal(found, wanted), cache


def require_padding_on_the_left_to_change_nothing(compressed: Any) -> None:
    prompt = ids()
    alone = [greedy(compressed, prompt[:1, 3:]), greedy(compressed, prompt[1:])]
    padded, mask = prompt.clone(), torch.ones_like(prompt)
    padded[0, :3], mask[0, :3] = 0, 0
    found = compressed.generate(
        padded, attention_mask=mask, max_new_tokens=10, do_sample=False, eos_token_id=None
    )
    assert torch.equal(found[0, 3:], alone[0][0])
    assert torch.equal(found[1], alone[1][0])


def test_left_padding_changes_nothing_of_what_is_generated() -> None:
    require_padding_on_the_left_to_change_nothing(without(llama(), 0, 2))


@pytest.mark.slow
def test_the_divergence_is_of_real_tokens_alone() -> None:
    model = llama()
    how = Config(units=("span",), maps=("shrunk",), shrinks=(1.0,), refit=False)
    plans = []
    for junk in (5, 77):
        loader = []
        for batch in texts():
            mask = torch.ones_like(batch["input_ids"])
            mask[::2, 9:] = 0
            loader.append({"input_ids": batch["input_ids"].masked_fill(mask == 0, junk),
                           "attention_mask": mask})  # fmt: skip
        result = compress(model, loader, budget=Budget(macs=0.85), config=how)
        plans.append((str(result.plan), result.report.fidelity.divergence))
        assert result.plan.divergence == "kl"
        assert result.report.fidelity.agreement is not None
    assert plans[0][0] == plans[1][0]
    assert plans[0][1] == pytest.approx(plans[1][1], rel=1e-6)


def test_a_slim_language_model_is_a_stock_one_where_it_folds(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    result = compress(model, texts(), budget=Budget(macs=0.85), config=Config(stock=True))
    result.save(tmp_path / "stock", fold=True, hub=True)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    assert again.config.num_hidden_layers < 4
    prompt = ids()
    how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(prompt)
    wanted = result.model.generate(prompt, attention_mask=mask, **how)  # type: ignore[operator]
    assert torch.equal(again.generate(prompt, attention_mask=mask, **how), wanted)
    ours = compress(
        model, texts(), budget=Budget(macs=0.85), config=Config(maps=("shrunk",), units=("span",))
    )
    ours.save(tmp_path / "ours")
    loaded: Any = load(tmp_path / "ours")
    assert torch.equal(loaded.generate(prompt, attention_mask=mask, **how),
                       ours.model.generate(prompt, attention_mask=mask, **how))  # type: ignore[operator]  # fmt: skip


FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3")


@pytest.mark.parametrize("unit", ["span", "hidden_width"])
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            kind, marks=pytest.mark.slow if kind in ("Llama", "Gemma3") else pytest.mark.catalogue
        )
        for kind in FAMILIES
    ],
)
def test_a_stock_checkpoint_of_each_family(kind: str, unit: str, tmp_path: Path) -> None:
    """Fewer layers, or narrower ones: transformers alone loads and generates from what is saved."""
    sizes = SIZES | ({"head_dim": 8} if kind == "Qwen3" or kind.startswith("Gemma") else {})
    config = getattr(transformers, f"{kind}{'Text' * (kind == 'Gemma3')}Config")(**sizes)
    model = seeded(getattr(transformers, f"{kind}ForCausalLM"), config)
    how = Config(stock=True, effort="quick", units=(unit,))
    result: Any = compress(model, texts(40), budget=Budget(macs=0.9), config=how)
    result.save(tmp_path / "stock", fold=True, hub=True)
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stock").eval()
    fewer = again.config.num_hidden_layers, again.config.intermediate_size
    assert fewer[unit == "hidden_width"] < (4, 64)[unit == "hidden_width"]
    prompt = ids()
    with torch.no_grad():
        wanted, found = result.model(input_ids=prompt).logits, again(input_ids=prompt).logits
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    decode = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(again.generate(prompt, **decode), result.model.generate(prompt, **decode))


@pytest.mark.slow
def test_bfloat16() -> None:
    model = llama().to(torch.bfloat16)
    result = compress(model, texts(), budget=Budget(macs=0.85), config=Config(units=("span",)))
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    prompt = ids()
    compressed: Any = result.model
    found = compressed.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False
    )
    assert found.shape[1] > prompt.shape[1]


def test_hidden_states_are_asked_for() -> None:
    example = {"input_ids": ids(), "output_hidden_states": True}
    found = supports(llama(), example)
    assert not found.chains
    assert "LlamaDecoderLayer" in str(found)


def test_choosing_takes_fewer_tokens_than_fitting() -> None:
    """Validation samples are left out, evenly, where each has many tokens; fit samples are not."""
    model = llama(max_position_embeddings=1024)
    data = [{"input_ids": part, "use_cache": False} for part in ids(90, 600).split(10)]
    seen = profile(model, data, config=Config(units=("span",), window=1, maps=("identity",)))
    run = SearchContext.read(model, seen, data, Budget(macs=0.9))
    assert (run.fitter.held, run.evaluator.held) == (45, 32)
    short = [{"input_ids": x["input_ids"][:, :12], "use_cache": False} for x in data]
    seen = profile(model, short, config=seen.config)
    assert SearchContext.read(model, seen, short, Budget(macs=0.9)).evaluator.held == 36


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 9))
def test_fewer_samples_are_spread_evenly(samples: int, most: int, size: int) -> None:
    rows = torch.arange(samples)
    dealt = [(part.tolist(), as_batch(part[:, None])) for part in rows.split(size)]
    found = fewer(dealt, most, current())
    kept = [int(x) for _, batch in found for x in batch.args[0]]
    assert [place for places, _ in found for place in places] == list(range(min(samples, most)))
    assert len(kept) == len({*kept}) == min(samples, most)
    gaps = {b - a for a, b in itertools.pairwise(kept)}
    assert max(gaps, default=1) - min(gaps, default=1) <= 1
