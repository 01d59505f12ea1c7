"""Settings of a network that neither weights nor outputs on one batch reveal: kept, or named."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import nn

from rba_compress import Architecture, Budget, Config, Plan, WeightsError, compress, load
from rba_compress.artifacts.artifact import Manifest, write_artifact
from rba_compress.artifacts.tree_comparison import differences, differing, settings
from rba_compress.core.batch import as_batch
from tests.networks import images, seeded

IMAGES = images(2)
IDS = {"input_ids": torch.randint(3, 100, (2, 12)), "attention_mask": torch.ones(2, 12).long()}
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
PIXELS = {k: v for k, v in SIZES.items() if k not in ("vocab_size", "max_position_embeddings")}
PIXELS |= {"image_size": 32, "patch_size": 8}


def vit(**arguments: Any) -> nn.Module:
    sizes = {"img_size": 32, "num_classes": 7, "depth": 2}
    return seeded(timm.create_model, "vit_tiny_patch16_224", **{**sizes, **arguments})


def of(name: str, **arguments: Any) -> Callable[[], nn.Module]:
    return partial(seeded, timm.create_model, name, **arguments)


def hugging(kind: str, config: str, **fields: Any) -> Callable[[], nn.Module]:
    return lambda: seeded(getattr(transformers, kind), getattr(transformers, config)(**fields))


def changed(build: Callable[[], nn.Module], change: Callable[[Any], Any]) -> Callable[[], nn.Module]:
    def construct() -> nn.Module:
        model = build()
        change(model)
        return model

    return construct


def text_and_images() -> nn.Module:
    sizes = {"text_config": dict(SIZES), "vision_config": dict(PIXELS), "projection_dim": 16}
    config = transformers.CLIPConfig(**sizes)
    config.vision_config._attn_implementation = "eager"
    return seeded(transformers.CLIPModel, config)


def write(model: nn.Module, folder: Path, batch: Any, **options: Any) -> Manifest:
    """An artefact of a network in which nothing is replaced."""
    return write_artifact(
        model, Plan(), folder, example=as_batch(batch), original_weights="", **options
    )


TIMM: dict[str, Callable[[], nn.Module]] = {
    "input sizes": partial(vit, dynamic_img_size=True),
    "padding": partial(vit, dynamic_img_size=True, dynamic_img_pad=True),
    "depth alone": of("vit_tiny_patch16_224", img_size=32, depth=3),
    "widths": partial(vit, embed_dim=100, num_heads=5, mlp_ratio=2.5),
    "patches": partial(vit, patch_size=8, in_chans=3),
    "flags": partial(vit, qkv_bias=False, qk_norm=True, init_values=1e-4, reg_tokens=2),
    "no class token": partial(vit, class_token=False, global_pool="avg", fc_norm=False),
    "norms": partial(vit, pre_norm=True, final_norm=False, norm_layer="rmsnorm"),
    "activation": partial(vit, act_layer="quick_gelu"),
    "drop rates": partial(vit, drop_path_rate=0.1, attn_drop_rate=0.2, proj_drop_rate=0.05),
    "a head put in": changed(vit, lambda m: m.reset_classifier(5, "avg")),
    "no head": changed(vit, lambda m: m.reset_classifier(0)),
    "a rate set by hand": changed(vit, lambda m: setattr(m.head_drop, "p", 0.3)),
    "convnext": of("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), drop_path_rate=0.2),
    "resnet": of("resnet18", layers=[1, 2, 1, 1], drop_rate=0.2, act_layer="silu"),
    "swin": of("swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=24,
               depths=(1, 1, 2, 1), num_heads=(2, 2, 4, 4)),
    "mixer": of("mixer_s16_224", img_size=32, mlp_ratio=(0.5, 1.0), drop_path_rate=0.2),
    "features": of("resnet18", features_only=True, out_indices=(1, 3)),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow if n in ("swin", "a head put in") else ()) for n in TIMM],
)
def test_what_a_timm_network_was_built_with_is_kept(name: str, tmp_path: Path) -> None:
    model = TIMM[name]()
    write(model, tmp_path / "compressed", IMAGES)
    assert not differing(settings(model), settings(load(tmp_path / "compressed")))


READ_OFF = ("input sizes", "widths", "drop rates", "resnet")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow if n in ("widths", "drop rates", "input sizes") else ())
        for n in READ_OFF
    ],
)
def test_arguments_are_read_off_where_timm_keeps_none(name: str, tmp_path: Path) -> None:
    model = TIMM[name]()
    for note in ("_model_args", "_traits", "pretrained_model_args"):  # from timm 1.0.31 on
        vars(model).pop(note, None)
    write(model, tmp_path / "compressed", IMAGES)
    assert not differing(settings(model), settings(load(tmp_path / "compressed")))


TRANSFORMERS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "no pooler": (
        lambda: seeded(
            transformers.BertModel, transformers.BertConfig(**SIZES), add_pooling_layer=False
        ),
        IDS,
    ),
    "mask token": (
        lambda: seeded(transformers.ViTModel, transformers.ViTConfig(**PIXELS), use_mask_token=True),
        {"pixel_values": IMAGES},
    ),
    "a field that is None": (
        hugging("MistralForCausalLM", "MistralConfig", **SIZES, **TOKENS, num_key_value_heads=2,
                sliding_window=None),
        IDS,
    ),
    "generation": (
        changed(
            hugging("LlamaForCausalLM", "LlamaConfig", **SIZES, **TOKENS),
            lambda m: m.generation_config.update(do_sample=True, temperature=0.7, eos_token_id=[2, 5]),
        ),
        IDS,
    ),
    "a field set later": (
        changed(
            hugging("LlamaForCausalLM", "LlamaConfig", **SIZES, **TOKENS),
            lambda m: setattr(m.config, "use_cache", False),
        ),
        IDS,
    ),
    "attention of a part": (text_and_images, {**IDS, "pixel_values": IMAGES}),
    "dropout": (hugging("BertModel", "BertConfig", **SIZES, hidden_dropout_prob=0.3), IDS),
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_what_a_network_of_transformers_was_built_with_is_kept(name: str, tmp_path: Path) -> None:
    build, batch = TRANSFORMERS[name]
    model = build()
    write(model, tmp_path / "compressed", batch)
    assert not differing(settings(model), settings(load(tmp_path / "compressed")))


@pytest.mark.slow
def test_a_compressed_network_takes_other_sizes_after_loading(tmp_path: Path) -> None:
    model = vit(dynamic_img_size=True, depth=3, drop_path_rate=0.1)
    config = Config(stock=True, shrinks=(0.6,), refit=False)
    found = compress(model, list(images(12).split(4)), budget=Budget(macs=0.8), config=config)
    assert found.plan.replacements
    x = torch.randn(1, 3, 48, 80)
    for fold in (False, True):
        found.save(tmp_path / str(fold), fold=fold)
        torch.testing.assert_close(load(tmp_path / str(fold))(x), found.model(x))


@pytest.mark.slow
def test_a_setting_that_a_folded_network_loses_is_named(tmp_path: Path) -> None:
    model = changed(vit, lambda m: setattr(m.blocks[0].attn.attn_drop, "p", 0.3))()
    with pytest.warns(UserWarning, match=r"folded network is .*attn_drop\.p: 0\.3, 0\.0 when rebuilt"):
        write(model, tmp_path / "compressed", IMAGES, fold=True)


class OwnNorm(nn.LayerNorm):
    """A class that no name of timm builds."""


LOST: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "a layer of one's own": (
        partial(vit, norm_layer=partial(OwnNorm, eps=1e-3)), IMAGES, r"norm1\.class: .*OwnNorm, ",
    ),
    "one rate of many": (
        changed(vit, lambda m: setattr(m.blocks[1].attn.attn_drop, "p", 0.3)),
        IMAGES,
        r"blocks\.1\.attn\.attn_drop\.p: 0\.3, 0\.0 when rebuilt",
    ),
    "an attribute": (changed(vit, lambda m: setattr(m, "scale", 3)), IMAGES, r"scale: 3, absent"),
    "a method put in": (
        changed(vit, lambda m: setattr(m, "pool", m.pool)),
        IMAGES,
        r"pool: timm.*VisionTransformer\.pool, absent",
    ),
    "a dropout": (
        changed(
            hugging("BertModel", "BertConfig", **SIZES),
            lambda m: setattr(m.encoder.layer[0].output.dropout, "p", 0.3),
        ),
        IDS,
        r"layer\.0\.output\.dropout\.p: 0\.3, 0\.1 when rebuilt",
    ),
    "a field that came too late": (
        changed(
            hugging("BertModel", "BertConfig", **SIZES),
            lambda m: setattr(m.config, "hidden_dropout_prob", 0.5),
        ),
        IDS,
        r"embeddings\.dropout\.p: 0\.1, 0\.5 when rebuilt",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n, marks=pytest.mark.slow if n not in ("another buffer", "a layer of one's own") else ()
        )
        for n in LOST
    ],
)
def test_what_no_argument_builds_is_named(name: str, tmp_path: Path) -> None:
    build, batch, message = LOST[name]
    with pytest.warns(UserWarning, match=message):
        manifest = write(build(), tmp_path / "compressed", batch)
    assert manifest.architecture is None


def test_an_architecture_that_is_passed_in_is_compared_as_well(tmp_path: Path) -> None:
    model = vit(dynamic_img_size=True)
    plain = {"img_size": 32, "num_classes": 7, "depth": 2}
    given = Architecture(name="vit_tiny_patch16_224", arguments=plain)
    with pytest.raises(WeightsError, match=r"dynamic_img_size: True, False when rebuilt"):
        write(model, tmp_path / "compressed", IMAGES, architecture=given)
    arguments = {**plain, "dynamic_img_size": True}
    given = Architecture(name="vit_tiny_patch16_224", arguments=arguments)
    assert write(model, tmp_path / "compressed", IMAGES, architecture=given).architecture == given


def test_what_does_not_change_what_is_computed_is_not_compared(tmp_path: Path) -> None:
    model: Any = vit()
    model.set_grad_checkpointing()
    model.requires_grad_(False)
    model.pretrained_cfg["url"] = "elsewhere"
    model.handle = model.norm.register_forward_hook(lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert write(model, tmp_path / "timm", IMAGES).architecture
        text: Any = hugging("LlamaForCausalLM", "LlamaConfig", **SIZES)()
        text.config.pad_token_id = 2
        assert write(text, tmp_path / "transformers", IDS).architecture


def test_objects_met_at_other_depths_are_the_same_setting() -> None:
    """A value that many modules hold is read where first met, here below and above the limit."""

    class Held:
        def __init__(self, inner: Any) -> None:
            self.inner = inner

    shared, apart = (nn.Linear(2, 2) for _ in range(2)), (nn.Linear(2, 2) for _ in range(2))
    trees = [nn.Sequential(*layers) for layers in (shared, apart)]
    deep: list[Any] = [[[[[[("args", 0)]]]]]]
    one = Held(deep)
    trees[0][0].nested, trees[0][1].plain = [[[one]]], one  # type: ignore[assignment]
    trees[1][0].nested, trees[1][1].plain = [[[Held(deep)]]], Held(deep)  # type: ignore[assignment]
    assert differences(settings(trees[0]), settings(trees[1])) == ""
    trees[1][1].plain = Held([1])  # type: ignore[assignment]
    assert "1.plain" in differences(settings(trees[0]), settings(trees[1]))
