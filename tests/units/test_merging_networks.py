"""Networks that merge positions, each from its plan to a file of ONNX, and networks that cannot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from rba_compress import Budget, Config, compress, export_onnx, load, save, supports
from rba_compress.units.token_merge import TOKEN_MERGE
from tests.networks import images, seeded

TIMM: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "depth": 3,
    "embed_dim": 32,
    "num_heads": 2,
    "num_classes": 5,
}
HF: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


class Tower(nn.Module):
    """One output of a network of transformers."""

    def __init__(self, network: nn.Module, output: str) -> None:
        super().__init__()
        self.network, self.output = network, output

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.network(x)[self.output]
        return found


class Encoder(nn.Module):
    """torch's own encoder, and a head on the mean of its positions."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.encoder(x).mean(1))
        return found


class Padded(Encoder):
    """The same encoder, whose last three positions are padding."""

    def __init__(self) -> None:
        super().__init__(True)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.arange(x.shape[1]).expand(x.shape[:2]) >= x.shape[1] - 3
        found: Tensor = self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])
        return found


def of_timm(name: str, **more: Any) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, **TIMM | more)


def registered() -> nn.Module:
    """DINOv2 with registers that differ, as trained ones do: of equal costs, rounding picks a pair."""
    model: Any = of_timm("vit_small_patch14_reg4_dinov2", init_values=0.1)()
    nn.init.normal_(model.reg_token)
    return model


def clip() -> nn.Module:
    config = transformers.CLIPVisionConfig(**HF, projection_dim=16)
    return transformers.CLIPVisionModelWithProjection(config)


def siglip() -> nn.Module:
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**HF))


def spectrograms() -> nn.Module:
    sizes = {k: v for k, v in HF.items() if k not in ("image_size", "patch_size")}
    config = transformers.ASTConfig(**sizes, max_length=64, num_mel_bins=32, num_labels=5)
    return transformers.ASTForAudioClassification(config)


def classifier() -> nn.Module:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**HF, num_labels=5))


MERGING: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "vit": (of_timm("vit_tiny_patch16_224"), images),
    "deit": (of_timm("deit_tiny_patch16_224"), images),
    "deit, distilled": (of_timm("deit_tiny_distilled_patch16_224"), images),
    "deit3": (of_timm("deit3_small_patch16_224"), images),
    "dinov2, registers": (registered, images),
    "vit, mean of positions": (
        of_timm("vit_tiny_patch16_224", global_pool="avg", class_token=False),
        images,
    ),
    "siglip, timm": (of_timm("vit_base_patch16_siglip_224"), images),
    "clip, timm": (of_timm("vit_base_patch16_clip_224"), images),
    "flexivit": (of_timm("flexivit_small"), images),
    "clip": (lambda: Tower(clip(), "image_embeds"), images),
    "siglip": (lambda: Tower(siglip(), "pooler_output"), images),
    "vit, transformers": (lambda: Tower(classifier(), "logits"), images),
    "audio spectrograms": (
        lambda: Tower(spectrograms(), "logits"),
        lambda n: images(n, 64)[:, 0, :, :32],
    ),
    "nn.TransformerEncoder": (lambda: Encoder(True), lambda n: images(n)[:, 0, :17]),
    "nn.TransformerEncoder, norms behind": (lambda: Encoder(False), lambda n: images(n)[:, 0, :17]),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers and torch, at export
@pytest.mark.parametrize("name", MERGING)
def test_a_network_merges_from_end_to_end(name: str, tmp_path: Path) -> None:
    build, data = MERGING[name]
    model, x = seeded(build), data(40)
    how = Config(units=("token_merge",), effort="quick")
    found = compress(model, list(x.split(10)), budget=Budget(macs=0.65), config=how)
    merges = [r for r in found.plan.replacements if r.unit == "token_merge"]
    assert merges
    assert found.report.compressed.macs <= 0.65 * found.report.original.macs
    save(found, tmp_path / "merged", delta=True)
    assert torch.equal(load(tmp_path / "merged", original=model)(x[:3]), found.model(x[:3]))
    certificate = export_onnx(found.model, tmp_path / "merged.onnx", x[:2])
    assert max(parity.max_rel for parity in certificate.parity) < 1e-3


REFUSING: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], str]] = {
    "beit": (
        of_timm("beit_base_patch16_224", global_pool="token"),
        images,
        "its attention has a mask of its own",
    ),
    "relative places": (
        of_timm("vit_relpos_small_patch16_224"),
        images,
        "its attention has a mask of its own",
    ),
    "rotary keys": (
        of_timm("eva02_tiny_patch14_224"),
        images,
        "reads other tensors beside its stream, such as rotary embeddings",
    ),
    "padded positions": (
        Padded,
        lambda n: images(n)[:, 0, :17],
        "its attention has a mask of its own",
    ),
    "outputs per position": (
        of_timm("vit_tiny_patch16_224", global_pool=""),
        images,
        "hands out positions",
    ),
    "clip with its positions": (clip, images, "hands out positions"),
    "windows": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size=32,
            patch_size=2,
            window_size=4,
            embed_dim=16,
            depths=(1, 2),
            num_heads=(2, 2),
            num_classes=5,
        ),
        images,
        "reads them by their places",
    ),
    "mixing by a matrix": (
        lambda: timm.create_model("mixer_s16_224", img_size=64, num_classes=5),
        lambda n: images(n, 64),
        "it takes no other number of positions",
    ),
    "convolutions between positions": (
        of_timm("xcit_nano_12_p16_224"),
        images,
        "it takes no other number of positions",
    ),
    "a language model": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=32, n_layer=4, n_head=2, vocab_size=50, n_positions=32)
        ),
        lambda n: torch.randint(0, 50, (n, 12), generator=torch.Generator().manual_seed(0)),
        "hands out positions",
    ),
}


@pytest.mark.filterwarnings("ignore")  # of transformers
@pytest.mark.parametrize("name", REFUSING)
def test_a_network_that_cannot_merge_says_why(name: str) -> None:
    build, data, reason = REFUSING[name]
    found = supports(seeded(build), data(4))
    chain = found.chains[0]
    assert not TOKEN_MERGE.sites(chain, None)
    assert reason in chain.unmerged
    assert f"no positions can be merged: {chain.unmerged}" in str(found)
