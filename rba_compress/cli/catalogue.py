"""Networks by name, with random weights and small inputs, one of each architecture family.

Any architecture of timm has a name here; those that are listed, one of each family, get small inputs.
For transformers, torchvision and torch.nn there are small configurations of common architectures.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rba_compress.artifacts.architecture import Architecture
from rba_compress.core.errors import ModelError

TIMM = """
    bat_resnext26ts beit_base_patch16_224 botnet26t_256 caformer_s18 cait_xxs24_224 coat_tiny
    coatnet_pico_rw_224 convformer_s18 convit_tiny convmixer_768_32 convnext_atto
    convnextv2_atto cpubone_nano crossvit_tiny_240 csatv2 cspdarknet53 cspnext_s cspresnet50
    darknet53 davit_tiny deit_tiny_distilled_patch16_224 densenet121 dla46x_c dpn48b
    eca_nfnet_l0 eca_vovnet39b ecaresnet26t edgenext_xx_small efficientformer_l1
    efficientformerv2_s0 efficientnet_b0 efficientnetv2_rw_t efficientvim_m1 efficientvit_b0
    efficientvit_m0 ese_vovnet19b_slim_dw eva02_tiny_patch14_224 fasternet_t0 fastvit_t8
    fbnetc_100 fbnetv3_b flexivit_small focalnet_tiny_srf gcresnet33ts gcvit_xxtiny gernet_s
    ghostnet_050 ghostnetv3_050 gmixer_12_224 gmlp_ti16_224 halo2botnet50ts_256
    hardcorenas_b hgnet_tiny hgnetv2_b0 hiera_tiny_224 hrnet_w18_small iformer_t
    inception_next_atto inception_v3 lcnet_035 lcnetv2_small levit_128s
    lowformer_b0 mambaout_femto maxvit_pico_rw_256 maxxvit_rmlp_nano_rw_256
    maxxvitv2_nano_rw_256 mixer_s16_224 mixnet_s mnasnet_small mobilenet_edgetpu_100
    mobilenetv2_035 mobilenetv3_large_075 mobileone_s1 mobilevit_xxs mobilevitv2_050 mvitv2_tiny
    naflexvit_base_patch16_parfac_gap nest_tiny nextvit_small nf_regnet_b0 pit_ti_224
    poolformer_s12 pvt_v2_b0 rdnet_tiny regnetv_040 regnetx_002 regnety_002 regnetz_b16
    repghostnet_050 repvgg_a0 repvit_m1 res2next50 resmlp_12_224 resnest26d resnet18 resnet26
    resnet32ts resnetaa34d resnetblur18 resnetrs50 resnetv2_18 resnext50_32x4d rexnet_100
    sam2_hiera_tiny samvit_base_patch16_224 sebotnet33ts_256 selecsls42 semnasnet_050
    sequencer2d_s seresnet18 seresnet33ts shvit_s1 skresnet18 spnasnet_100 starnet_s050
    swiftformer_xs swin_tiny_patch4_window7_224 swinv2_cr_tiny_224 swinv2_tiny_window8_256
    tiny_vit_5m_224 tinynet_e tnt_s_legacy_patch16_224 tresnet_m twins_svt_small vgg11
    visformer_tiny vit_srelpos_small_patch16_224 vit_tiny_patch16_224 vit_tiny_r_s16_p8_224
    vitamin_small_224 volo_d1_224 xception41p xcit_nano_12_p8_224
""".split()  # noqa: SIM905  one name a line would be five screens

_SIDE = 64
_SIDES = {
    "bat_resnext26ts": 256,
    "efficientformer_l1": 224,
    "eva02_tiny_patch14_224": 56,
    "halo2botnet50ts_256": 128,
    "inception_v3": 96,
    "tiny_vit_5m_224": 224,
}

_TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
}
_DECODER = _TEXT | {"num_key_value_heads": 2, "max_position_embeddings": 64}
_VISION = {k: v for k, v in _TEXT.items() if k != "vocab_size"} | {"image_size": 32, "patch_size": 8}
_STAGES = {"depths": [2, 2, 3, 2], "image_size": 64}
_SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "vocab_size": 100,
}

_TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # model type: what it reads, class, other fields of its config
    "albert": ("text", "AlbertModel", {**_TEXT, "embedding_size": 16}),
    "bert": ("text", "BertModel", _TEXT),
    "deberta-v2": ("text", "DebertaV2Model", _TEXT),
    "distilbert": (
        "text",
        "DistilBertModel",
        {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64},
    ),
    "electra": ("text", "ElectraModel", {**_TEXT, "embedding_size": 32}),
    "modernbert": (
        "text",
        "ModernBertModel",
        {**_TEXT, **dict.fromkeys(
            ("pad_token_id", "eos_token_id", "bos_token_id", "cls_token_id", "sep_token_id"), 0
        )},
    ),
    "mpnet": ("text", "MPNetModel", _TEXT),
    "roberta": ("text", "RobertaModel", _TEXT),
    "bloom": (
        "text",
        "BloomForCausalLM",
        {"hidden_size": 32, "n_layer": 4, "n_head": 4, "vocab_size": 100},
    ),
    "gemma2": ("text", "Gemma2ForCausalLM", {**_DECODER, "head_dim": 8}),
    "gpt2": (
        "text",
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 4, "n_head": 4, "vocab_size": 100,
         **{f"{name}_token_id": 0 for name in ("bos", "eos")}},
    ),
    "gpt_neox": ("text", "GPTNeoXForCausalLM", _TEXT),
    "llama": ("text", "LlamaForCausalLM", _DECODER),
    "mamba": (
        "text",
        "MambaForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 4, "vocab_size": 100},
    ),
    "mistral": ("text", "MistralForCausalLM", _DECODER),
    "mixtral": (
        "text",
        "MixtralForCausalLM",
        {**_DECODER, "num_local_experts": 4},
    ),
    "opt": (
        "text",
        "OPTForCausalLM",
        {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
         "ffn_dim": 64, "word_embed_proj_dim": 32, "vocab_size": 100},
    ),
    "phi": ("text", "PhiForCausalLM", _DECODER),
    "qwen2": ("text", "Qwen2ForCausalLM", _DECODER),
    "qwen3": ("text", "Qwen3ForCausalLM", {**_DECODER, "head_dim": 8}),
    "bart": ("text to text", "BartModel", _SEQ2SEQ),
    "t5": (
        "text to text",
        "T5Model",
        {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 3,
         "vocab_size": 100},
    ),
    "beit": ("images", "BeitModel", _VISION),
    "convnext": (
        "images",
        "ConvNextModel",
        {"hidden_sizes": [8, 16, 24, 32], **_STAGES},
    ),
    "deit": ("images", "DeiTModel", _VISION),
    "dinov2": ("images", "Dinov2Model", _VISION),
    "resnet": (
        "images",
        "ResNetModel",
        {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64],
         "depths": [3, 3, 3, 3]},
    ),
    "segformer": (
        "images",
        "SegformerModel",
        {"hidden_sizes": [8, 16, 24, 32], "depths": [2, 2, 2, 2],
         "num_attention_heads": [1, 2, 2, 4]},
    ),
    "siglip": ("images", "SiglipVisionModel", {"model_type": "siglip_vision_model", **_VISION}),
    "swin": (
        "images",
        "SwinModel",
        {"embed_dim": 12, "num_heads": [1, 2, 3, 6], "window_size": 2,
         **_STAGES},
    ),
    "vit": ("images", "ViTModel", _VISION),
    "wav2vec2": (
        "sound",
        "Wav2Vec2Model",
        {**_TEXT, "conv_dim": [16, 16, 16], "conv_kernel": [10, 3, 3],
         "conv_stride": [5, 2, 2], "num_conv_pos_embedding_groups": 4},
    ),
    "whisper": (
        "spectrograms",
        "WhisperModel",
        {**_SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 32,
         **{f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "decoder_start")}},
    ),
}  # fmt: skip

_TORCHVISION = (
    "convnext_tiny",
    "densenet121",
    "efficientnet_b0",
    "maxvit_t",
    "mobilenet_v2",
    "regnet_y_400mf",
    "resnet18",
    "shufflenet_v2_x0_5",
    "swin_t",
    "vgg11_bn",
    "vit_b_16",
)
_FIXED = ("maxvit_t", "vit_b_16")
"""Networks of torchvision that take images of 224 pixels alone."""


@dataclass(frozen=True)
class Network:
    """Network that can be built by its name, and inputs for it."""

    name: str
    construct: Callable[[], nn.Module]
    inputs: Callable[[nn.Module, int, torch.Generator], Any]

    def build(self) -> nn.Module:
        """Build the network in eval mode, with the same random weights each time, none left at zero.

        Raises:
            WeightsError, ModelError: a library that it needs is absent, or cannot build it.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            try:
                model = self.construct().eval()
            except ImportError as error:
                raise ModelError(
                    f"{self.name} needs a package that is not installed: {error}"
                ) from error
            with torch.no_grad():
                for parameter in model.parameters():
                    # Layers that start at zero would hide errors in the layers behind them.
                    if parameter.is_floating_point() and bool(
                        (parameter == parameter.flatten()[0]).all()
                    ):
                        parameter.add_(torch.randn_like(parameter), alpha=0.02)
        return model

    def example(self, model: nn.Module, samples: int = 6, *, seed: int = 0) -> Any:
        """Return a batch of random inputs, in a form that a loader may yield."""
        return self.inputs(model, samples, torch.Generator().manual_seed(seed))


def names() -> list[str]:
    """Return the names of listed networks: timm's, `transformers/...`, `torchvision/...`, `nn/...`."""
    return [
        *TIMM,
        *(f"transformers/{name}" for name in _TRANSFORMERS),
        *(f"torchvision/{name}" for name in _TORCHVISION),
        *(f"nn/{name}" for name in _NN),
    ]


def network(name: str) -> Network:
    """Return a listed network, or any other architecture of timm at its own input size.

    Raises:
        ModelError: there is no network of that name; the message lists similar names.
    """
    library, _, rest = name.partition("/")
    if library == "transformers" and rest in _TRANSFORMERS:
        reads, kind, fields = _TRANSFORMERS[rest]
        known = {"model_type": rest, **fields}
        architecture = Architecture(library="transformers", name=kind, arguments=known)
        return Network(name, architecture.build, _INPUTS[reads])
    if library == "torchvision" and rest in _TORCHVISION:
        side = 224 if rest in _FIXED else _SIDE
        return Network(name, lambda: _torchvision(rest), lambda _, n, g: _pixels(n, side, g))
    if library == "nn" and rest in _NN:
        construct, inputs = _NN[rest]
        return Network(name, construct, inputs)
    if not rest:
        return _timm(name)
    raise _unknown(name)


def _unknown(name: str, more: list[str] | None = None) -> ModelError:
    alike = difflib.get_close_matches(name, [*names(), *(more or [])], n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(alike)}?" if alike else "timm.list_models() has timm's"
    return ModelError(
        f"there is no network {name!r}: {hint} Others are transformers/NAME, torchvision/NAME and "
        f"nn/NAME: {', '.join(names()[len(TIMM) :])}"
    )


def _timm(name: str) -> Network:
    import timm

    if not timm.is_model(name):
        raise _unknown(name, timm.list_models())
    config = timm.get_pretrained_cfg(name)
    channels, own = (config.input_size[0], config.input_size[-1]) if config else (3, 224)
    side = _SIDES.get(name, _SIDE) if name in TIMM else own
    fixed = bool(config and config.fixed_input_size) and side != own and name != "crossvit_tiny_240"
    architecture = Architecture(name=name, arguments={"img_size": side} if fixed else {})

    def inputs(_: nn.Module, n: int, generator: torch.Generator) -> Tensor:
        return torch.randn(n, channels, side, side, generator=generator)

    return Network(name, architecture.build, inputs)


def _torchvision(name: str) -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.get_model(name)
    return model


def _pixels(n: int, side: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 3, side, side, generator=generator)


def _ids(n: int, length: int, generator: torch.Generator) -> Tensor:
    return torch.randint(3, 100, (n, length), generator=generator)


def _text(_: nn.Module, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Return sentences of two lengths, the shorter ones padded."""
    ids = _ids(n, 16, generator)
    mask = torch.ones_like(ids)
    mask[::2, 12:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _pair(_: nn.Module, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": _ids(n, 16, generator), "decoder_input_ids": _ids(n, 8, generator)}


def _images(model: nn.Module, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    side: Any = getattr(model.config, "image_size", _SIDE)
    return {"pixel_values": _pixels(n, side, generator)}


def _sound(_: nn.Module, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"input_values": torch.randn(n, 2000, generator=generator)}


def _spectrograms(_: nn.Module, n: int, generator: torch.Generator) -> dict[str, Tensor]:
    features = torch.randn(n, 16, 64, generator=generator)
    return {"input_features": features, "decoder_input_ids": _ids(n, 8, generator)}


_INPUTS: dict[str, Callable[[nn.Module, int, torch.Generator], Any]] = {
    "text": _text,
    "text to text": _pair,
    "images": _images,
    "sound": _sound,
    "spectrograms": _spectrograms,
}


class _Residual(nn.Module):
    """Residual block x + MLP(LN(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.down(torch.relu(self.up(self.norm(x))))
        return x + residual


class _Memory(nn.Module):
    """Decoder that reads a sequence and a memory of half its length."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, x: Tensor) -> Any:
        return self.decoder(x, x[:, ::2])


_LAYER: dict[str, Any] = {"d_model": 32, "nhead": 4, "dim_feedforward": 64, "batch_first": True}


def _tokens(_: nn.Module, n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, 10, 32, generator=generator)


_NN: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, int, torch.Generator], Any]]] = {
    "encoder": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**_LAYER), 4),
        _tokens,
    ),
    "decoder": (
        lambda: _Memory(nn.TransformerDecoder(nn.TransformerDecoderLayer(**_LAYER), 4)),
        _tokens,
    ),
    "transformer": (
        lambda: _Memory(nn.Transformer(32, 4, 3, 3, dim_feedforward=64, batch_first=True)),
        _tokens,
    ),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(32, 16), *(_Residual(16) for _ in range(4)), nn.Linear(16, 4)),
        _tokens,
    ),
}
