"""Methods of the compressed network's class: each does the right thing, or says what to call instead."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rba_compress import (
    Budget,
    Config,
    ModelError,
    NoChainError,
    Plan,
    Result,
    compress,
    load,
    splice,
    supports,
)
from rba_compress.core.errors import ArtifactError
from tests.networks import LIGHT, Chain, loader, rows, seeded

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*deprecated:FutureWarning"
)  # of transformers' own calls
SPANS = Config(units=("span",), maps=("shrunk",), shrinks=(1.0,), refit=False)
REFUSED = (
    r"writes no compressed \w+: from_pretrained would build the stock network, with random weights in"
)
SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4,
         "num_attention_heads": 2, "initializer_range": 0.2}  # fmt: skip


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, max_position_embeddings=32)
    return seeded(transformers.LlamaForCausalLM, config)


def bert() -> nn.Module:
    config = transformers.BertConfig(**SIZES, max_position_embeddings=32, num_labels=3)
    return seeded(transformers.BertForSequenceClassification, config)


class Wrapper(nn.Module):
    """A network of transformers inside of another module."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = bert()

    def forward(self, input_ids: Tensor) -> Any:
        return self.encoder(input_ids).logits


def texts() -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 50, (40, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": part} for part in ids.split(10)]


@functools.cache
def result_of(build: Callable[[], nn.Module], config: Config = SPANS) -> Result:
    """A result that tests share: they change a copy of its model."""
    return compress(build(), texts(), budget=Budget(macs=0.85), config=config)


def model_of(build: Callable[[], nn.Module], config: Config = SPANS) -> Any:
    return copy.deepcopy(result_of(build, config).model)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output = model(**texts()[0])
    found: Tensor = getattr(output, "logits", output)
    return found


@pytest.mark.parametrize(
    ("build", "path"),
    [(llama, ""), (llama, "model"), (bert, ""), (Wrapper, "encoder")],
    ids=["the model", "its inner model", "an exact read-out", "wrapped"],
)
def test_what_from_pretrained_would_read_wrongly_is_not_written(
    build: Callable[[], nn.Module], path: str, tmp_path: Path
) -> None:
    original, compressed = build(), model_of(build)
    for network in (
        compressed,
        copy.deepcopy(compressed),
        reread(compressed),
        copy.deepcopy(compressed).to(torch.float64),
    ):
        assert type(network) is type(original)
        writer: Any = network.get_submodule(path)
        for method in ("save_pretrained", "push_to_hub"):
            with pytest.raises(ArtifactError, match=f"^{method} {REFUSED} .*layers?.3"):
                getattr(writer, method)(tmp_path / "stock")
    assert not (tmp_path / "stock").exists()
    torch.testing.assert_close(logits(reread(compressed)), logits(compressed), rtol=0, atol=0)
    writer = original.get_submodule(path)
    writer.save_pretrained(tmp_path / "original")  # type: ignore[operator]
    again = type(writer).from_pretrained(tmp_path / "original").eval()  # type: ignore[attr-defined]
    assert sorted(again.state_dict()) == sorted(writer.state_dict())


def reread(model: nn.Module) -> Any:
    """The model, written by torch.save and read again."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_what_is_named_instead_reads_back(tmp_path: Path) -> None:
    result = result_of(llama)
    result.save(tmp_path / "compressed", hub=True)
    again = load(tmp_path / "compressed")
    torch.testing.assert_close(logits(again), logits(result.model), rtol=0, atol=0)
    with pytest.raises(ArtifactError, match=REFUSED):
        again.save_pretrained(tmp_path / "stock")  # type: ignore[operator]


def test_a_network_without_a_replaced_block_is_written(tmp_path: Path) -> None:
    network: Any = splice(llama(), Plan(), {})
    network.save_pretrained(tmp_path / "stock")
    again = type(network).from_pretrained(tmp_path / "stock").eval()
    torch.testing.assert_close(logits(again), logits(network))


def test_a_folded_network_is_written(tmp_path: Path) -> None:
    result = result_of(llama, Config(stock=True))
    result.save(tmp_path / "folded", fold=True, hub=True)
    again: Any = load(tmp_path / "folded")
    again.save_pretrained(tmp_path / "stock")
    stock = type(again).from_pretrained(tmp_path / "stock").eval()
    torch.testing.assert_close(logits(stock), logits(result.model), rtol=1e-4, atol=1e-4)


def test_a_mixin_of_the_hub_is_refused_too(tmp_path: Path) -> None:
    class Hubbed(Chain):
        """A class of its own with the methods of a hub's mixin."""

        @classmethod
        def from_pretrained(cls, path: Path) -> None: ...

        def save_pretrained(self, path: Path) -> None:
            path.mkdir()

    result = compress(seeded(Hubbed), loader(), budget=Budget(macs=0.8), config=LIGHT)
    with pytest.raises(ArtifactError, match=REFUSED):
        result.model.save_pretrained(tmp_path / "stock")  # type: ignore[operator]
    assert not hasattr(result.model, "push_to_hub")
    result.model._hf_peft_config_loaded = True  # adapters of transformers' own, which are written alone
    result.model.save_pretrained(tmp_path / "adapters")  # type: ignore[operator]
    assert (tmp_path / "adapters").exists()


@pytest.mark.parametrize("build", [llama, bert])
def test_training_and_generating_go_on(build: Callable[[], nn.Module]) -> None:
    compressed = model_of(build)
    compressed.gradient_checkpointing_enable()
    compressed.train()
    compressed(**texts()[0]).logits.float().sum().backward()
    assert all(p.grad is not None for p in compressed.parameters())
    compressed.gradient_checkpointing_disable()
    compressed.eval().resize_token_embeddings(60, mean_resizing=False)
    assert compressed(input_ids=torch.full((2, 4), 59)).logits.isfinite().all()


class AdapterLayer(nn.Module):
    """A linear layer with an adapter, in the shape of PEFT's."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora = nn.Linear(base_layer.in_features, base_layer.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora(x)  # type: ignore[no-any-return]


AdapterLayer.__module__ = "peft.tuners.lora.layer"
ADVICE = r"it holds adapters of PEFT, .* call merge_and_unload\(\) before"


def with_adapters(model: nn.Module, *paths: str) -> nn.Module:
    for path in paths:
        model.set_submodule(path, AdapterLayer(model.get_submodule(path)))  # type: ignore[arg-type]
    return model


def test_blocks_with_adapters_are_refused_with_the_advice() -> None:
    every = with_adapters(seeded(Chain), *(f"blocks.{k}.up" for k in range(4)))
    with pytest.raises(NoChainError, match=ADVICE):
        compress(every, loader(), budget=Budget(macs=0.8), config=LIGHT)
    one = supports(with_adapters(seeded(Chain), "blocks.0.down"), rows(4))
    assert one.chains[0].paths == ("blocks.1", "blocks.2", "blocks.3")
    assert "blocks.0 (Block): it holds adapters of PEFT" in str(one)


def test_adapters_outside_of_the_blocks_are_no_obstacle() -> None:
    model = with_adapters(seeded(Chain), "head")
    result = compress(model, loader(), budget=Budget(macs=0.8), config=LIGHT)
    assert isinstance(result.model.get_submodule("head"), AdapterLayer)


def test_an_adapter_in_a_thinned_block_is_not_left_out_in_silence() -> None:
    assert "for 1 read, others not computed" in str(result_of(bert).plan)
    compressed = with_adapters(model_of(bert), "bert.encoder.layer.3.attention.self.query")
    with pytest.raises(ModelError, match="attention.self.query of a thinned block has an adapter"):
        logits(compressed)
    whole = model_of(llama)
    before = logits(whole)
    after = logits(with_adapters(whole, "model.layers.0.self_attn.q_proj"))
    assert not torch.equal(before, after)


# --- the real library


@pytest.mark.slow
@pytest.mark.parametrize("build", [llama, bert])
def test_peft_merges_and_disables(build: Callable[[], nn.Module]) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    targets = ["q_proj", "v_proj"] if build is llama else ["query", "value"]
    how = {"target_modules": targets, "r": 2, "init_lora_weights": False}
    tuned = peft.get_peft_model(build(), peft.LoraConfig(**how)).eval()
    with pytest.raises(NoChainError, match=ADVICE):
        compress(tuned, texts(), budget=Budget(macs=0.85), config=SPANS)
    merged = tuned.merge_and_unload()
    assert compress(merged, texts(), budget=Budget(macs=0.85), config=SPANS).plan.replacements

    early = peft.get_peft_model(build(), peft.LoraConfig(**how, layers_to_transform=[0])).eval()
    result = compress(early, texts(), budget=Budget(macs=0.85), config=SPANS)
    compressed: Any = result.model
    assert all(".0" not in b.path[-2:] for r in result.plan.replacements for b in r.blocks)
    wanted = logits(compressed)
    with compressed.disable_adapter():
        assert not torch.equal(logits(compressed), wanted)
    torch.testing.assert_close(logits(compressed), wanted)
    whole = compressed.merge_and_unload()
    torch.testing.assert_close(logits(whole), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ArtifactError, match=REFUSED):
        whole.save_pretrained("stock")


@pytest.mark.slow
def test_adapters_on_a_compressed_network(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    compressed = model_of(llama)
    bare = copy.deepcopy(compressed)
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    tuned = peft.get_peft_model(compressed, config).eval()
    tuned.save_pretrained(tmp_path / "adapters")
    wanted = logits(tuned)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(bare), tmp_path / "adapters").eval()
    torch.testing.assert_close(logits(again), wanted)
    torch.testing.assert_close(logits(again.merge_and_unload()), wanted, rtol=1e-4, atol=1e-4)
