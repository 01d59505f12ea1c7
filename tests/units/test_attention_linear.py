"""attention_linear: a linear layer in place of attention, by the network that it makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from rba_compress import (
    Budget,
    Config,
    Healing,
    compress,
    export_onnx,
    heal,
    load,
    profile,
    splice,
    supports,
)
from rba_compress.core.plan import Plan, Site
from rba_compress.planning.context import SearchContext
from rba_compress.planning.sites import sites
from rba_compress.planning.state import Candidate, with_candidate
from rba_compress.profiling.cost import cost
from rba_compress.units.channel_width import SOLVED
from tests.networks import seeded
from tests.test_language import (
    SIZES,
    ids,
    llama,
    require_cached_decoding_to_equal_uncached,
    require_padding_on_the_left_to_change_nothing,
    texts,
)

CONFIG = Config(units=("attention_linear",))


def qwen3() -> nn.Module:
    """Heads that are twice as wide together as the stream, with norms of queries and keys."""
    return seeded(transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**SIZES, head_dim=16))


def fitted(
    model: nn.Module, data: list[Any], config: Config = CONFIG
) -> tuple[SearchContext, list[Candidate]]:
    """A search at its start, and the option of each layer."""
    run = SearchContext.read(model, profile(model, data, config=config), data, Budget(macs=0.99))
    wanted = [Site(0, b, b + 1, "attention_linear") for b in range(len(run.chains[0]))]
    return run, run.fitter.candidates(run.start, wanted)


def without_attention(model: nn.Module, *layers: int) -> tuple[nn.Module, SearchContext, Plan]:
    run, options = fitted(model, texts())
    solution = run.start.solution
    for layer in layers:
        solution = with_candidate(solution, options[layer])
    return splice(model, solution.plan, solution.tensors), run, solution.plan


@pytest.mark.parametrize("build", [llama, qwen3])
def test_the_layer_is_the_ridge_regression_of_what_attention_computes(build: Any) -> None:
    model, seen = build().double(), []

    def keep(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((kwargs["hidden_states"].flatten(0, 1), output[0].flatten(0, 1)))

    run, options = fitted(model, texts())
    attention = model.get_submodule("model.layers.1.self_attn")
    attention.register_forward_hook(keep, with_kwargs=True)
    with torch.no_grad():
        for batch in run.fitter.batches:
            batch.run(model)
    x, y = (np.concatenate([pair[k].double().numpy() for pair in seen]) for k in (0, 1))
    gram = x.T @ x
    ridge = SOLVED * np.trace(gram) / len(gram)
    wanted = np.linalg.solve(gram + ridge * np.eye(len(gram)), x.T @ y).T
    found = options[1].tensors["model.layers.1.self_attn.o_proj.weight"].numpy()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("build", [llama, qwen3])
def test_attention_that_is_linear_is_replaced_for_nothing(build: Any) -> None:
    """A single token attends to itself alone: values and output are one linear layer."""
    model, data = build(), list(ids(200, 1).split(20))
    run, options = fitted(model, [{"input_ids": part} for part in data])
    assert all(option.replacement.diagnostics.r2 > 1 - 1e-3 for option in options)  # type: ignore[union-attr]
    solution = run.start.solution
    for option in options:
        solution = with_candidate(solution, option)
    compressed = splice(model, solution.plan, solution.tensors)
    with torch.no_grad():
        apart = compressed(data[0]).logits - model(data[0]).logits
    assert apart.abs().max() < 0.05 * model(data[0]).logits.abs().max()


@pytest.mark.parametrize("build", [llama, qwen3])
def test_it_costs_what_is_counted(build: Any) -> None:
    compressed, run, plan = without_attention(build(), 0, 2)
    counted, measured = run.fitter.cost(plan), cost(compressed, run.profile.example)
    assert (counted.macs, counted.params) == (measured.macs, measured.params)
    assert counted.macs < run.start.cost.macs


@pytest.mark.parametrize("layers", [(0,), (2,), (0, 1), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("build", [llama, qwen3])
def test_cached_decoding_equals_uncached(build: Any, layers: tuple[int, ...]) -> None:
    require_cached_decoding_to_equal_uncached(without_attention(build(), *layers)[0])


def test_a_layer_without_attention_holds_no_cache() -> None:
    compressed: Any = without_attention(llama(), 0, 2)[0]
    with torch.no_grad():
        cache = compressed(ids(), use_cache=True).past_key_values
    held = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    assert len([layer for layer in held if layer.keys.numel()]) == 2
    assert cache.get_seq_length() == ids().shape[1]


def test_left_padding_changes_nothing_of_what_is_generated() -> None:
    require_padding_on_the_left_to_change_nothing(without_attention(llama(), 0, 2)[0])


@pytest.mark.parametrize("delta", [False, True])
def test_it_is_searched_with_widths_saved_and_reloaded(delta: bool, tmp_path: Path) -> None:
    config = Config(units=("attention_linear", "hidden_width"), multiple=1)
    model = llama()
    with torch.no_grad():
        model.get_submodule("model.layers.1.self_attn.o_proj").weight.zero_()  # type: ignore[operator, union-attr]
    found = compress(model, texts(), budget=Budget(macs=0.75), config=config)
    units = [(r.unit, r.start) for r in found.plan.replacements]
    assert ("attention_linear", 1) in units
    assert any(unit == "hidden_width" for unit, _ in units)
    found.save(tmp_path / "saved", delta=delta)
    again: Any = load(tmp_path / "saved", original=model if delta else None)
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, found.model(ids()).logits)


@pytest.mark.slow
def test_it_is_exported_and_healed(tmp_path: Path) -> None:
    config = Config(units=("attention_linear",))
    model = llama()
    found = compress(model, texts(), budget=Budget(macs=0.9), config=config)
    assert any(r.unit == "attention_linear" for r in found.plan.replacements)
    certificate = export_onnx(found.model, tmp_path / "model.onnx", {"input_ids": ids()})
    assert all(parity.max_rel <= certificate.tolerance for parity in certificate.parity)
    healing = Healing(train="all", rate=1e-3, epochs=2, batch=8, augment=())
    healed = heal(found, texts(), original=model, healing=healing)
    healed.save(tmp_path / "healed")
    again: Any = load(tmp_path / "healed")
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, healed.model(ids()).logits)


def test_attention_that_cannot_be_replaced_is_refused_with_the_reason() -> None:
    sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 100, "n_positions": 64}
    gpt2 = seeded(transformers.GPT2LMHeadModel, transformers.GPT2Config(**sizes))
    assert "attention_linear of attention: the block's branches" in str(supports(gpt2, ids()))


def test_narrower_attention_is_replaced_and_not_narrowed_again() -> None:
    config = Config(units=("head_width", "attention_linear"))
    run, _ = fitted(llama(), texts(), config)
    heads = run.fitter.narrower(run.start.solution, 0, [Site(0, 1, 2, "head_width")])[-1]
    narrow = run.state(with_candidate(run.start.solution, heads), run.start.cost)
    places = {site.unit for site in sites(run, narrow.solution.plan) if site.start == 1}
    assert places == {"head_width", "attention_linear"}
    (linear,) = run.fitter.candidates(narrow, [Site(0, 1, 2, "attention_linear")])
    solution = with_candidate(narrow.solution, linear)
    assert [r.unit for r in solution.plan.replacements] == ["attention_linear"]
    compressed = splice(run.model, solution.plan, solution.tensors)
    assert run.fitter.cost(solution.plan).macs == cost(compressed, run.profile.example).macs
    places = {site.unit for site in sites(run, solution.plan) if site.start == 1}
    assert not places


def test_a_sampled_text_is_the_same_with_and_without_a_cache() -> None:
    compressed: Any = without_attention(llama(), 1, 3)[0]
    prompt, found = ids(), []
    for cached in (True, False):
        torch.manual_seed(0)
        found.append(
            compressed.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=10,
                do_sample=True,
                use_cache=cached,
                eos_token_id=None,
            )
        )
    assert torch.equal(*found)
