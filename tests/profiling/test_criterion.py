"""Outputs of every kind: their divergences, and backbones that read between the blocks."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from rba_compress import ActivationError, Budget, Config, compress, supports
from rba_compress.core.batch import Batch, as_batch
from rba_compress.core.outputs import float_outputs
from rba_compress.core.plan import ComparedOutput
from rba_compress.graph.tracer import record
from rba_compress.profiling.criterion import criterion_of
from rba_compress.profiling.fidelity import Criterion, OutputScales, divergence, real_tokens
from rba_compress.profiling.profiler import profile
from tests.networks import LIGHT, Chain, images, loader, rows, seeded


class Embedding(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(super().forward(x), dim=-1)


class Maps(Chain):
    """Head of a segmenter: (N, 3) -> feature maps (N, 5, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x))[:, None].expand(-1, 5, -1)


class Pair(Chain):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = super().forward(x)
        return logits, logits.exp()


class Named(Chain):
    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        logits = super().forward(x)
        return {"boxes": logits.tanh(), "logits": logits}


@pytest.mark.parametrize(
    ("build", "kind"),
    [(Chain, "kl"), (Named, "kl"), (Embedding, "cosine"), (Maps, "nse"), (Pair, "nse")],
)
def test_the_output_chooses_its_divergence(build: type[nn.Module], kind: str) -> None:
    model, batch = seeded(build), as_batch(rows(2))
    assert criterion_of(model, record(model, batch), Config())[0].kind == kind
    result = compress(seeded(build), loader(), budget=Budget(macs=0.8), config=LIGHT)
    assert result.plan.divergence == kind
    assert result.report.fidelity.kind == kind


@pytest.mark.parametrize(
    ("build", "kind"),
    [
        ((transformers.BertForTokenClassification, transformers.BertConfig), "kl"),
        ((transformers.BertModel, transformers.BertConfig), "nse"),
        ((transformers.LlamaForCausalLM, transformers.LlamaConfig), "kl"),
    ],
    ids=["token logits", "hidden states and a pooled one", "next tokens"],
)
def test_outputs_of_transformers(build: Any, kind: str) -> None:
    config = build[1](hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64,
                      vocab_size=50, num_key_value_heads=2)  # fmt: skip
    model = seeded(build[0], config)
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = as_batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    criterion, _, _ = criterion_of(model, record(model, batch), Config())
    assert criterion.kind == kind
    with torch.no_grad():
        found = criterion.kept(batch.run(model))
    # No key or value of a cache is among them.
    assert len(found) == (2 if kind == "nse" else 1)


def test_divergences_of_several_outputs_are_summed_up_and_lists_count() -> None:
    a, b = rows(3), rows(3, seed=1)
    first, second = divergence("nse", a, b), divergence("nse", b, a)
    batch = Batch((a,), {}, None)
    how = Criterion("nse")
    torch.testing.assert_close(how(how.kept([a, b]), how.kept([b, a]), batch), first + second)
    cache = ((a, b), (a, b))
    output = {"maps": [a, b], "loss": torch.tensor(1.0), "past_key_values": cache, "last": a}
    assert [*float_outputs(output)] == ["maps.0", "maps.1", "last"]
    assert [*float_outputs((a, cache))] == ["0"]


def test_squared_errors_are_shares_of_the_variance() -> None:
    outputs = 3 + 0.1 * torch.randn(60, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    outputs[..., 1] += 7
    batches = [(part, Batch((part,), {}, None)) for part in outputs.split(20)]
    scales = OutputScales(Criterion("nse", None, (ComparedOutput(name="output", divergence="nse"),)))
    for part, batch in batches:
        scales.update(part, batch)
    criterion = scales.merged()
    x = outputs.numpy().reshape(-1, 4)
    variance = ((x - x.mean(0)) ** 2).mean()
    assert criterion.outputs[0].scale == pytest.approx(variance)
    moved = outputs + 0.3
    found = criterion(criterion.kept(outputs), criterion.kept(moved), Batch((outputs,), {}, None))
    assert found.tolist() == pytest.approx([0.09 / variance] * 60)


@pytest.mark.parametrize("shape", [(7,), (7, 1), (7, 5), (7, 3, 5)], ids=str)
def test_the_bernoulli_divergence_equals_torchs_own(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (3 * torch.randn(shape, generator=generator) for _ in range(2))
    own = [torch.distributions.Bernoulli(logits=t.double()) for t in (p, q)]
    expected = torch.distributions.kl_divergence(*own).reshape(7, *shape[1:2], -1)
    expected = expected.sum(-1).reshape(7, -1)
    expected = expected.mean(1) if len(shape) > 2 else expected.sum(1)
    torch.testing.assert_close(divergence("bernoulli", p, q), expected)
    given = divergence("bernoulli", p.sigmoid(), q.sigmoid(), probabilities=True)
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-6)
    if p[0].numel() > 1:  # a shift that all scores share
        assert divergence("bernoulli", p, p + 5).min() > 0.5 > divergence("kl", p, p + 5).max()


def test_probabilities_are_no_scores() -> None:
    p, q = rows(6), rows(6, seed=1)
    given = divergence("kl", p.softmax(-1), q.softmax(-1), probabilities=True)
    torch.testing.assert_close(given, divergence("kl", p, q), rtol=1e-5, atol=1e-7)


def test_padding_is_not_compared() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = Batch((), {"attention_mask": mask}, None)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 3, 4, generator=generator) for _ in range(2))
    for kind in ("kl", "nse", "cosine"):
        found = Criterion(kind)({"output": a}, {"output": b}, batch)
        for n, length in enumerate((2, 1)):
            alone = divergence(kind, a[n : n + 1, :length], b[n : n + 1, :length])
            torch.testing.assert_close(found[n : n + 1], alone)
    assert real_tokens(batch, a[:, 0]) is None


def test_cosine_equals_numpy() -> None:
    a, b = rows(4), rows(4, seed=1)
    x, y = a.double().numpy(), b.double().numpy()
    expected = 1 - (x * y).sum(1) / ((x**2).sum(1) * (y**2).sum(1)) ** 0.5
    torch.testing.assert_close(divergence("cosine", a, b), torch.from_numpy(expected))


def test_a_function_of_ones_own_is_minimised_and_reported() -> None:
    def first_class(original: Tensor, compressed: Tensor, batch: Batch) -> Tensor:
        assert len(batch) == len(original)
        return (original[:, 0] - compressed[:, 0]).square()

    model = seeded(Chain)
    result = compress(model, loader(), budget=Budget(macs=0.8), config=LIGHT, divergence=first_class)
    assert result.plan.divergence == "given"
    held = list(result.profile.split(loader()).part("test"))
    with torch.no_grad():
        each = [first_class(b.run(model), b.run(result.model), b) for b in held]
    assert result.report.fidelity.divergence == pytest.approx(float(torch.cat(each).mean()), rel=1e-5)
    assert "divergence" in result.report.table()


def test_a_function_that_gives_no_number_a_sample_is_named() -> None:
    with pytest.raises(ActivationError, match=r"gave \(\) for \d+ samples: return a tensor \(N,\)"):
        compress(seeded(Chain), loader(), config=LIGHT, divergence=lambda a, b, _: (a - b).mean())
    with pytest.raises(ActivationError, match="gave float for"):
        compress(seeded(Chain), loader(), config=LIGHT, divergence=lambda *_: 0.5)  # type: ignore[arg-type, return-value]


def test_backbones_keep_what_they_read_between_the_blocks() -> None:
    arguments: dict[str, Any] = {"img_size": 32, "depth": 6, "embed_dim": 48, "num_heads": 3}
    model = seeded(
        timm.create_model, "vit_tiny_patch16_224", features_only=True, out_indices=(2, 5), **arguments
    )
    chains = supports(model, images(4)).chains
    # A map that is handed out parts the chain: none of its spans passes over it.
    assert [[b.path[-1] for b in c.blocks] for c in chains] == [["0", "1", "2"], ["3", "4", "5"]]
    result = compress(model, list(images(20).split(5)), budget=Budget(macs=0.85), config=LIGHT)
    original, compressed = (m(images(2)) for m in (model, result.model))
    assert [t.shape for t in original] == [t.shape for t in compressed]
    assert result.plan.divergence == "nse"


def test_feature_maps_of_a_pyramid() -> None:
    model = seeded(timm.create_model, "resnet18", features_only=True)
    chains = supports(model, images(4)).chains
    assert [(c.name, len(c)) for c in chains] == [
        ("layer1", 2), ("layer2", 1), ("layer3", 1), ("layer4", 1)
    ]  # fmt: skip
    seen = profile(model, list(images(10).split(5)), config=LIGHT)
    assert seen.criterion.kind == "nse"


class Intermediates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, depth=4, embed_dim=48, num_heads=3
        )

    def forward(self, x: Tensor) -> Any:
        return self.vit.forward_intermediates(x, indices=[0, 1, 2, 3], intermediates_only=True)


def test_a_network_that_hands_out_every_block_is_refused_by_name() -> None:
    found = supports(seeded(Intermediates), images(4))
    assert not found.chains
    assert "vit.blocks.0" in str(found)
    assert "not read by one next module" in str(found)
