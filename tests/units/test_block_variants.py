from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, fx, nn

from rba_compress import Config, ModelError, Plan, PlanError, splice, supports
from rba_compress.core.batch import as_batch
from rba_compress.core.inference import evaluating
from rba_compress.core.map_spec import MapSpec
from rba_compress.core.outputs import main_output
from rba_compress.core.plan import Chain as FoundChain
from rba_compress.core.plan import Replacement
from rba_compress.planning.plan_cost import chain_cost
from rba_compress.planning.state import Solution, with_read_outs
from rba_compress.profiling.cost import cost
from rba_compress.units.block_variants import Thinned, Traces
from rba_compress.units.registry import unit_of
from tests.graph.test_rewrite import tensors_for
from tests.networks import images, seeded

SMALL = {"img_size": 32, "depth": 3}
UNITS = ("read_out", "attention_free", "mlp_free", "read_out_mlp")


def vit(name: str = "deit_tiny_patch16_224", **kwargs: Any) -> nn.Module:
    """A small ViT whose weights are far from 0: layer scales and biases of 1e-5 would hide an error."""
    model = seeded(timm.create_model, name, **{**SMALL, **kwargs})
    generator = torch.Generator().manual_seed(1)
    for key, parameter in model.named_parameters():
        if parameter.ndim == 1 or "gamma" in key or "bias" in key:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def hugging_face(kind: str) -> tuple[nn.Module, Any]:
    import transformers as hf

    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    if kind == "ViT":
        config: Any = hf.ViTConfig(**sizes, image_size=32, patch_size=8)
        return seeded(hf.ViTForImageClassification, config), images(4)
    config = hf.BertConfig(**sizes, vocab_size=50)
    mask = torch.ones(4, 9, dtype=torch.long)
    mask[1, 5:] = 0
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (4, 9), generator=generator)
    return seeded(hf.BertForSequenceClassification, config), {
        "input_ids": ids,
        "attention_mask": mask,
    }


NETWORKS: dict[str, Any] = {
    "ViT": lambda: (vit("vit_tiny_patch16_224"), images(4)),
    "DeiT distilled": lambda: (vit("deit_tiny_distilled_patch16_224"), images(4)),
    "DeiT3": lambda: (vit("deit3_small_patch16_224"), images(4)),
    "BEiT": lambda: (vit("beit_base_patch16_224", global_pool="token"), images(4)),
    "EVA02": lambda: (
        vit("eva02_tiny_patch14_224", global_pool="token", img_size=28),
        images(4, size=28),
    ),
    "ViT with registers": lambda: (
        vit("vit_medium_patch16_reg4_gap_256", global_pool="token", class_token=True),
        images(4),
    ),
    "DINOv2": lambda: (
        vit("vit_small_patch14_dinov2", num_classes=10, img_size=28),
        images(4, size=28),
    ),
    "HF ViT": lambda: hugging_face("ViT"),
    "HF BERT": lambda: hugging_face("BERT"),
}
READS = {"DeiT distilled": 2}


def exact(chains: tuple[FoundChain, ...]) -> Plan:
    """The exact pass alone."""
    return with_read_outs(Solution(Plan(), {}), chains).plan


def outputs(model: nn.Module, example: Any) -> Tensor:
    batch = as_batch(example).to(model)
    with evaluating(model):
        return main_output(batch.run(model))


FAST = ("ViT",)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in NETWORKS]
)
def test_an_exact_read_out_is_exact(name: str) -> None:
    """Outputs agree to 1e-5 in float32 and 1e-12 in float64, at a share of the block's cost."""
    model, example = NETWORKS[name]()
    (chain,) = supports(model, example).chains
    assert chain.reads == READS.get(name, 1)
    plan = exact((chain,))
    (replacement,) = plan.replacements
    assert replacement.exact
    assert replacement.start == len(chain) - 1
    compressed = splice(model, plan, {})
    original = outputs(model, example)
    torch.testing.assert_close(outputs(compressed, example), original, rtol=1e-5, atol=1e-5)
    double = splice(copy.deepcopy(model).double(), plan, {})
    expected = outputs(copy.deepcopy(model).double(), example)
    torch.testing.assert_close(outputs(double, example), expected, rtol=1e-12, atol=1e-12)
    batch = as_batch(example)
    saved = cost(model, batch).macs - cost(compressed, batch).macs
    assert saved == chain_cost(chain, ()).macs - chain_cost(chain, plan.replacements).macs
    assert saved > 0.5 * chain.macs[-1]


@pytest.mark.slow
def test_cait_reads_the_class_token_alone_as_it_is() -> None:
    """CaiT's class attention reads every patch token, and its last blocks carry one token."""
    model = seeded(timm.create_model, "cait_xxs24_224", depth=3, img_size=32)
    patches, tokens = supports(model, images(4)).chains
    assert (patches.reads, tokens.reads) == (0, 0)
    assert "blocks_token_only.0" in patches.unread
    assert "one position" in tokens.unread
    plan = exact((patches, tokens))
    assert plan.replacements == ()
    assert torch.equal(outputs(splice(model, plan, {}), images(4)), outputs(model, images(4)))


def test_a_head_that_reads_everything_is_refused_with_its_reason() -> None:
    found = supports(vit(global_pool="avg"), images(4))
    assert found.chains[0].reads == 0
    assert "aten.mean reads all of it" in str(found)
    assert exact(found.chains).replacements == ()


def test_features_that_are_handed_out_are_read() -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vit = vit()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            features = self.vit.forward_features(x)
            return {"logits": self.vit.head(features[:, 0]), "features": features}

    (chain,) = supports(Features(), images(4)).chains
    assert chain.reads == 0
    assert "output" in chain.unread


def test_behind_an_exact_read_out_there_is_nothing_stale() -> None:
    """Features hold no patch tokens, as their shape shows."""
    model = vit()
    compressed: Any = splice(model, exact(supports(model, images(4)).chains), {})
    assert compressed.forward_features(images(2)).shape == (2, 1, 192)
    assert type(compressed) is type(model)


def by_hand(model: nn.Module, unit: str, x: Tensor, value: nn.Module) -> Tensor:
    """A timm ViT whose block 1 is thinned, with its own modules."""
    net: Any = model
    tokens = net._pos_embed(net.patch_embed(x))
    for index, block in enumerate(net.blocks):
        before = tokens
        middle = tokens + block.ls1(block.attn(block.norm1(tokens)))
        after = middle + block.ls2(block.mlp(block.norm2(middle)))
        if index == 1 and unit == "attention_free":
            middle = value(before)
            after = middle + block.ls2(block.mlp(block.norm2(middle)))
        elif index == 1 and unit == "mlp_free":
            after = value(middle)
        elif index == 1:
            rest = before if unit == "read_out" else middle
            after = torch.cat([after[:, :1], value(rest[:, 1:])], 1)
        tokens = after
    return net.forward_head(net.norm(tokens))


def thinned_plan(chain: FoundChain, unit: str, b: int = 1) -> Plan:
    new = unit_of(unit).choice(chain, b, b + 1)
    spec = MapSpec(kind="shrunk", shrink=0.7)
    return Plan(replacements=(new.model_copy(update={"map": spec}),))


FIRST = ("traced", "mlp_free")
"""Of the forms as a graph, the one in the default run."""
GRAPHS: dict[str, Any] = {
    "module": lambda model, _: model,
    "traced": lambda model, _: fx.symbolic_trace(model),
    "exported": lambda model, x: torch.export.export(
        model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False
    ).module(),
}


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("form", ["module", "traced", pytest.param("exported", marks=pytest.mark.slow)])
def test_a_thinned_block_is_what_it_says(unit: str, form: str) -> None:
    model = vit()
    x = images(4)
    whole = GRAPHS[form](model, x)
    (chain,) = supports(whole, x).chains
    plan = thinned_plan(chain, unit)
    tensors = tensors_for(plan)
    compressed = splice(whole, plan, tensors)
    value = nn.Linear(192, 192)
    state = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items()}
    value.load_state_dict(state)
    with torch.no_grad():
        expected = by_hand(model, unit, x, value)
    torch.testing.assert_close(outputs(compressed, x), expected, rtol=1e-4, atol=1e-4)
    saved = cost(whole, as_batch(x)).macs - cost(compressed, as_batch(x)).macs
    assert saved == chain_cost(chain, ()).macs - chain_cost(chain, plan.replacements).macs
    original = sum(p.numel() for p in whole.parameters())
    left = sum(p.numel() for p in compressed.parameters())
    gone = chain_cost(chain, ()).params - chain_cost(chain, plan.replacements).params
    assert original - left == gone
    kept = {key for key in compressed.state_dict() if ".map." not in key}
    assert kept <= set(whole.state_dict())


@pytest.mark.parametrize("form", ["traced", pytest.param("exported", marks=pytest.mark.slow)])
def test_an_exact_read_out_of_a_graph(form: str) -> None:
    model, x = vit(), images(4)
    whole = GRAPHS[form](model, x)
    chains = supports(whole, x).chains
    compressed = splice(whole, exact(chains), {})
    assert isinstance(compressed, fx.GraphModule)
    torch.testing.assert_close(outputs(compressed, x), outputs(model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_every_combination_behind_an_exact_read_out_costs_what_is_counted() -> None:
    """A map and a block without attention run for the read positions alone behind an exact read-out."""
    model, x = vit(depth=4), images(4)
    (chain,) = supports(model, x).chains
    spec, traces = MapSpec(kind="affine"), Traces()
    parts: list[list[Replacement]] = [
        [unit_of("span").choice(chain, 3, 4)],
        [unit_of("attention_free").choice(chain, 3, 4)],
        [unit_of("mlp_free").choice(chain, 3, 4)],
        [unit_of("read_out_mlp").choice(chain, 3, 4)],
        [unit_of("attention_free").choice(chain, 2, 3), unit_of("span").choice(chain, 3, 4)],
        [unit_of("read_out").choice(chain, 1, 2), unit_of("attention_free").choice(chain, 3, 4)],
        [unit_of("attention_free").choice(chain, b, b + 1) for b in range(4)],
    ]
    for part in parts:
        given = tuple(r.model_copy(update={"map": spec}) for r in part)
        full = Solution(Plan(replacements=given), tensors_for(Plan(replacements=given)))
        handed = with_read_outs(full, (chain,))
        compressed, wide = (splice(model, s.plan, s.tensors, traces=traces) for s in (handed, full))
        torch.testing.assert_close(outputs(compressed, x), outputs(wide, x), rtol=1e-5, atol=1e-5)
        saved = cost(model, as_batch(x)).macs - cost(compressed, as_batch(x)).macs
        counted = chain_cost(chain, ()).macs - chain_cost(chain, handed.plan.replacements).macs
        assert saved == counted, [str(r) for r in handed.plan.replacements]


def test_other_batch_sizes_other_modes_and_precisions() -> None:
    model, x = vit(), images(4)
    (chain,) = supports(model, x).chains
    plan = thinned_plan(chain, "read_out")
    compressed = splice(model, plan, tensors_for(plan))
    assert outputs(compressed, images(1)).shape == (1, 1000)
    torch.testing.assert_close(
        outputs(compressed, x)[:1], outputs(compressed, x[:1]), rtol=1e-4, atol=1e-4
    )
    half = copy.deepcopy(compressed).bfloat16()
    assert outputs(half, x).dtype == torch.bfloat16
    compressed.train()
    compressed(x).sum().backward()
    weight = compressed.get_submodule("blocks.1.map").weight
    assert weight.grad is not None


@pytest.mark.slow
def test_a_call_that_was_never_seen_is_refused() -> None:
    """A mask where there was none before must not be dropped in silence."""
    model, example = hugging_face("BERT")
    (chain,) = supports(model, example).chains
    compressed: Any = splice(model, exact((chain,)), {})
    block = compressed.bert.encoder.layer[2]
    assert isinstance(block, Thinned)
    stream = torch.zeros(2, 9, 32)
    with pytest.raises(ModelError, match="another way than on calibration data"):
        block(stream, torch.zeros(2, 1, 9, 9), stream)


@pytest.mark.slow
def test_masks_of_ones_and_others_are_both_run() -> None:
    """Hugging Face drops a mask of ones on the way, so a block is called in two ways."""
    model, example = hugging_face("BERT")
    (chain,) = supports(model, example).chains
    compressed = splice(model, exact((chain,)), {})
    for mask in (torch.ones(4, 9, dtype=torch.long), example["attention_mask"]):
        given = {**example, "attention_mask": mask}
        torch.testing.assert_close(
            outputs(compressed, given), outputs(model, given), rtol=1e-5, atol=1e-5
        )
    longer = {"input_ids": torch.arange(24).reshape(2, 12), "attention_mask": torch.ones(2, 12).long()}
    torch.testing.assert_close(
        outputs(compressed, longer), outputs(model, longer), rtol=1e-5, atol=1e-5
    )


def test_a_plan_of_a_block_that_cannot_be_thinned_is_refused() -> None:
    model, x = seeded(timm.create_model, "convnext_atto", depths=(2, 2, 2, 2)), images(4)
    chain = supports(model, x).chains[0]
    assert chain.blocks[0].units == ()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PlanError, match="cannot be told apart"):
        splice(model, thinned_plan(chain, "mlp_free"), tensors_for(thinned_plan(chain, "mlp_free")))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_config_of_units() -> None:
    config, chain = Config(), FoundChain(name="", blocks=(), width=4, ndim=3, axis=-1, positions=17)
    inner = [spec for spec in config.specs(4) if spec.kind != "folded"]
    assert unit_of("read_out").levels(config, chain) == inner
    assert unit_of("span").levels(config, chain) == config.specs(4)
    assert unit_of("token_merge").levels(config, chain) == [1, 2, 3, 4, 6]
