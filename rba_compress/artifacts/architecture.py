"""Architectures that build a network without its weights: a timm name, or a Hugging Face config."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, JsonValue, model_validator
from torch import fx, nn

from rba_compress.core.errors import WeightsError
from rba_compress.core.plan import Replacement
from rba_compress.core.schema import Frozen

_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
"""Names that configs of transformers have for the number of layers."""
_HEADS = ("num_attention_heads", "num_key_value_heads")
"""Names that configs of transformers have for the numbers of heads."""
_BACKENDS = ("attn_implementation", "experts_implementation")
"""Keywords of a transformers model that its config keeps but does not write."""


class Architecture(Frozen):
    """A timm or transformers architecture, from which the original network is built anew."""

    library: Literal["timm", "transformers"] = "timm"
    name: str
    """Name for `timm.create_model`, or a model class of transformers."""
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    """Keywords of `timm.create_model`, or the fields of the config, `model_type` among them."""

    @model_validator(mode="after")
    def _fetches_nothing(self) -> Self:
        # Names such as hf-hub:..., weights and kernels of a hub are downloaded by these libraries.
        if not re.fullmatch(r"[\w.-]+", self.name, re.ASCII):
            raise ValueError(f"{self.name!r} is no name of an architecture of {self.library}")
        flaw = next(fetching(self.arguments), None)
        if flaw is not None:
            raise ValueError(
                f"the argument {flaw} fetches or loads something: an architecture does not"
            )
        return self

    def build(self) -> nn.Module:
        """Return the network with random weights, in eval mode.

        Raises:
            WeightsError: the library has no such model, or it refuses the arguments.
        """
        construct = {"timm": self._timm, "transformers": self._transformers}[self.library]
        try:
            with torch.random.fork_rng(devices=[]):  # without changing the user's random state
                return construct().eval()
        except Exception as error:  # whatever a library raises at arguments that it does not take
            raise WeightsError(
                f"{self.library} cannot build {self.name!r} with {self.arguments}: {error}"
            ) from error

    def _timm(self) -> nn.Module:
        import timm

        model: nn.Module = timm.create_model(self.name, pretrained=False, **self.arguments)
        return model

    def _transformers(self) -> nn.Module:
        import transformers

        found: Any = getattr(transformers, self.name)
        if transformers.PreTrainedModel not in getattr(found, "__mro__", ()):
            raise TypeError("it is no model class of transformers")
        fields = dict(self.arguments)
        given = [p.name for p in self.flags() if isinstance(fields.get(p.name), bool)]
        flags = {name: fields.pop(name) for name in given}
        backends = {name: fields.pop(name) for name in _BACKENDS if name in fields}
        generation = fields.pop("generation_config", None)
        model: nn.Module = found._from_config(
            transformers.AutoConfig.for_model(**fields), **backends, **flags
        )
        if isinstance(generation, dict):
            known: Any = transformers.GenerationConfig(**generation)
            model.generation_config = known
        return model

    def flags(self) -> list[inspect.Parameter]:
        """Return the bool parameters of a transformers class, which its config does not hold."""
        import transformers

        kind: Any = getattr(transformers, self.name)
        parameters = inspect.signature(kind.__init__).parameters.values()
        return [p for p in parameters if isinstance(p.default, bool)]

    def with_blocks(self, kept: Mapping[str, tuple[int, Sequence[int]]]) -> list[Architecture]:
        """Return candidates for the architecture with fewer blocks; the caller must check them.

        Args:
            kept: the length of each list of blocks, in the network's order, and the indices to keep.
        """
        counts = [len(indices) for _, indices in kept.values()]
        if self.library == "timm":
            changes: list[dict[str, JsonValue]] = [{n: list(counts)} for n in ("depths", "layers")]
            if len(counts) == 1:
                changes.insert(0, {"depth": counts[0]})
            return [self._with(**change) for change in changes]
        if len(kept) != 1:
            return []
        ((length, indices),) = kept.values()
        fields: dict[str, JsonValue] = {}
        for name, value in self.arguments.items():
            if isinstance(value, list) and len(value) == length:  # such as the kinds of the layers
                fields[name] = [value[i] for i in indices]
        found = [name for name in _DEPTHS if self.arguments.get(name) == length]
        return [self._with(**fields, **{name: counts[0]}) for name in found]

    def with_width(self, new: Replacement, channels: int) -> list[Architecture]:
        """Return candidates for the architecture with narrower blocks; the caller must check them.

        Args:
            new: the decision for one of the blocks.
            channels: the number of channels that the original's blocks have.
        """
        known = [(n, v) for n, v in self.arguments.items() if type(v) is int and v % channels == 0]
        found = [self._with(**{name: new.kept}) for name, value in known if value == channels and value]
        # Heads and their groups together.
        heads = {
            name: value // channels * new.kept for name, value in known if name in _HEADS and value
        }
        if heads:
            found.append(self._with(**heads))
        if self.library == "timm":
            ratio = new.kept / new.width
            while int(new.width * ratio) < new.kept:  # the library rounds down
                ratio = math.nextafter(ratio, math.inf)
            found.append(self._with(mlp_ratio=ratio))
        return found

    def _with(self, **changes: JsonValue) -> Architecture:
        return self.model_copy(update={"arguments": {**self.arguments, **changes}})


_FETCHING = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
_FETCHING |= {"trust_remote_code", "auto_map", "quantization_config"}


def fetching(value: JsonValue) -> Iterator[str]:
    """Yield the keys below a value with which timm or transformers fetch or load something."""
    if isinstance(value, dict):
        for key, item in value.items():
            kernel = key.endswith("implementation") and any({*t} & {*"/:@"} for t in _texts(item))
            if key in _FETCHING or kernel:
                yield f"{key}={str(item)[:60]!r}"
            yield from fetching(item)
    elif isinstance(value, list):
        for item in value:
            yield from fetching(item)


def _texts(value: JsonValue) -> Iterator[str]:
    """Yield the strings of a value, and of the values of a mapping."""
    if isinstance(value, dict):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def architecture_of(model: nn.Module) -> Architecture | None:
    """Return the architecture that a network states; None if it is neither timm's nor transformers'."""
    if isinstance(model, fx.GraphModule):
        return None
    return _timm_architecture(model) or _transformers_architecture(model)


def _timm_architecture(model: nn.Module) -> Architecture | None:
    config = getattr(model, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, Mapping) else None
    if not isinstance(name, str):
        return None
    assert isinstance(config, Mapping)
    arguments: dict[str, JsonValue] = {}
    if config.get("tag"):
        name = f"{name}.{config['tag']}"
    if isinstance(getattr(model, "num_classes", None), int):
        arguments["num_classes"] = int(model.num_classes)  # type: ignore[arg-type]
    stem = getattr(model, "patch_embed", None)
    size = getattr(stem, "img_size", None)
    if isinstance(size, tuple) and tuple(size) != tuple(config.get("input_size", ()))[1:]:
        arguments["img_size"] = list(size)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = getattr(model, "in_chans", getattr(first, "in_channels", None))
    if isinstance(channels, int) and channels != config.get("input_size", (3,))[0]:
        arguments["in_chans"] = channels
    if type(model).__module__ == "timm.models._features":
        arguments |= {"features_only": True, "out_indices": list(model.feature_info.out_indices)}  # type: ignore[union-attr, arg-type]
    return Architecture(name=name, arguments=arguments)


def _transformers_architecture(model: nn.Module) -> Architecture | None:
    config: Any = getattr(model, "config", None)
    if not type(model).__module__.startswith("transformers.") or not hasattr(config, "to_json_string"):
        return None
    fields = _fields(config)
    routed = getattr(model, "_can_set_experts_implementation", lambda: False)()
    for name in _BACKENDS if routed else _BACKENDS[:1]:
        backend = {name: _backend(config, f"_{name}")}
        if backend[name] is not None and not any(fetching(backend)):
            fields |= backend
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        own = _generation(generation)
        if own != _generation(type(generation).from_model_config(config)) and not any(fetching(own)):
            fields["generation_config"] = own
    return Architecture(library="transformers", name=type(model).__name__, arguments=fields)


def _fields(config: Any) -> dict[str, JsonValue]:
    """Return the fields of a config as JSON: None only where its class would put in a default."""
    from transformers import AutoConfig

    fields = json.loads(config.to_json_string(use_diff=False))
    fields = {k: v for k, v in fields.items() if k not in {"transformers_version", *_FETCHING}}
    known = {k: v for k, v in fields.items() if v is not None}
    try:
        again = AutoConfig.for_model(**known).to_dict()
    except Exception:  # noqa: BLE001  a config of a class that is not transformers' own
        return known
    return known | {k: None for k, v in fields.items() if v is None and again.get(k) is not None}


def _generation(config: Any) -> dict[str, JsonValue]:
    fields = json.loads(config.to_json_string(use_diff=True))
    return {k: v for k, v in fields.items() if k != "transformers_version" and not k.startswith("_")}


def _backend(config: Any, name: str) -> JsonValue:
    """Return the name of a backend; if parts of a config have others, the names by part."""
    own = getattr(config, name, None)
    parts = {k: getattr(config, k, None) for k in getattr(config, "sub_configs", {})}
    known = {k: _backend(part, name) for k, part in parts.items() if part is not None}
    others = {k: v for k, v in known.items() if v is not None and v != own}
    return {"": own, **others} if others else own


def siblings(model: nn.Module, path: str) -> list[str]:
    """Return the paths of the lists of blocks in one series with the list at `path`, itself among them.

    Their names differ in numbers alone: `layer1`, `layer2`, or `stages.0.blocks`, `stages.1.blocks`.
    """
    alike = re.compile(re.sub(r"\d+", r"\\d+", re.escape(path)))
    return [name for name, _ in model.named_modules() if alike.fullmatch(name)]
