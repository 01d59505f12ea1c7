"""Call signatures of blocks: templates of arguments and output, kept in plans, that mark the stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from pydantic import JsonValue, model_validator
from torch import Tensor

from rba_compress.core.schema import Dtype, Frozen, Path


class Input(Frozen):
    """A tensor among the arguments of a block."""

    path: Path
    shape: tuple[int, ...]
    """Shape in the recorded call, of two samples."""
    dtype: Dtype

    def zeros(self, parameter: Tensor, *, like: Input) -> Tensor:
        """Return zeros of this shape on a parameter's device.

        The dtype is that of `parameter` where this input has the floating-point dtype of `like`.
        """
        dtype = getattr(torch, self.dtype)
        if dtype.is_floating_point and self.dtype == like.dtype:
            dtype = parameter.dtype
        return torch.zeros(self.shape, dtype=dtype, device=parameter.device)


class Signature(Frozen):
    """Call signature of a block: where the stream comes in, and what the block returns.

    `output` is a template: "stream" is the stream, a list a path of the call's inputs, None nothing,
    {"value": v} a constant, and {"tuple": [...]}, {"list": [...]}, {"dict": {...}} the containers.
    """

    stream: Path = ("args", 0)
    output: JsonValue = "stream"
    arguments: JsonValue = None
    """A template of {"args": ..., "kwargs": ...}, in which ["args", i] is `inputs[i]`."""
    inputs: tuple[Input, ...] = ()
    """Every tensor of a call; empty where the call cannot be expressed as a template."""

    @model_validator(mode="after")
    def _can_be_followed(self) -> Self:
        if len(self.stream) < 2 or self.stream[0] not in ("args", "kwargs"):
            raise ValueError(f"the stream {self.stream} is no place among a call's arguments")
        _require_template(self.output, ("args", "kwargs"))
        if self.arguments is None:
            return self
        _require_template(self.arguments, ("args",))
        given = self.arguments.get("dict") if isinstance(self.arguments, dict) else None
        kinds = (
            {name: [*v][:1] for name, v in given.items() if isinstance(v, dict)}
            if isinstance(given, dict)
            else {}
        )
        if kinds != {"args": ["tuple"], "kwargs": ["dict"]}:
            raise ValueError("its arguments are no args and kwargs")
        if self.inputs and self.stream not in [given.path for given in self.inputs]:
            raise ValueError(f"the stream {self.stream} is none of its inputs")
        return self

    def stream_in(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the stream among the inputs of a call."""
        return _at(args, kwargs, self.stream)

    def stream_out(self, output: Any) -> Any:
        """Return the stream in the output of a call."""
        for key in stream_path(self.output) or ():
            output = output[key]
        return output

    def rebuild(self, stream: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the output of a call whose stream is `stream`; side inputs are passed through."""
        return _fill(self.output, stream, args, kwargs)

    @property
    def stream_index(self) -> int:
        """Index of the stream among the inputs."""
        return next(i for i, given in enumerate(self.inputs) if given.path == self.stream)

    def call(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a call with these inputs."""
        filled = _fill(self.arguments, None, tuple(tensors), {})
        return tuple(filled["args"]), filled["kwargs"]

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Return the inputs of a call."""
        return [_at(args, kwargs, given.path) for given in self.inputs]

    def mismatch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Return the first difference of a call from the recorded one, in words; None if there is none.

        Tensors match tensors of any shape and value.
        """
        assert isinstance(self.arguments, dict)
        return _differs(self.arguments, {"args": args, "kwargs": kwargs}, "")


def _differs(template: JsonValue, given: Any, place: str) -> str | None:
    if isinstance(template, list):
        return None if hasattr(given, "shape") else f"{place} is {given!r} where it was a tensor"
    if isinstance(template, dict):
        ((kind, content),) = template.items()
        if kind == "value":
            same = type(content) is type(given) and content == given
            return None if same else f"{place} is {given!r} where it was {content!r}"
        if kind == "dict":
            assert isinstance(content, dict)
            if not isinstance(given, dict):
                return f"{place} is a {type(given).__name__} where it was a dict"
            keys = [*content, *(key for key in given if key not in content)]
            pairs = [(key, content.get(key), given.get(key)) for key in keys]
        else:
            assert isinstance(content, list)
            if not isinstance(given, (tuple, list)):
                return f"{place} is a {type(given).__name__} where it was a {kind}"
            longer = max(len(content), len(given))
            pairs = [
                (i, *(v[i] if i < len(v) else None for v in (content, given)))  # type: ignore[misc]
                for i in range(longer)
            ]
        found = (_differs(a, b, f"{place}[{key!r}]" if place else str(key)) for key, a, b in pairs)
        return next((flaw for flaw in found if flaw is not None), None)
    return None if given is None else f"{place} is a {type(given).__name__} where it was None"


def _at(args: tuple[Any, ...], kwargs: dict[str, Any], path: Sequence[Any]) -> Any:
    value: Any = args if path[0] == "args" else kwargs
    for key in path[1:]:
        value = value[key]
    return value


def _require_template(template: JsonValue, places: Sequence[str], depth: int = 0) -> None:
    """Check that a value is a template that `_fill` can follow.

    Raises:
        ValueError: the value is no such template.
    """
    if template is None or template == "stream":
        return
    if isinstance(template, list) and len(template) > 1 and template[0] in places:
        if all(type(key) in (str, int) for key in template):
            return
    elif isinstance(template, dict) and len(template) == 1 and depth < _DEEPEST:
        ((kind, content),) = template.items()
        if kind == "value":
            return
        if kind == "dict" and isinstance(content, dict):
            for item in content.values():
                _require_template(item, places, depth + 1)
            return
        if kind in ("tuple", "list") and isinstance(content, list):
            for item in content:
                _require_template(item, places, depth + 1)
            return
    raise ValueError(f"{str(template)[:80]} is no part of a template")


_DEEPEST = 32


def stream_path(template: JsonValue) -> Path | None:
    """Return the place of the stream in an output's template; None where it is not there."""
    if template == "stream":
        return ()
    if isinstance(template, dict):
        ((kind, content),) = template.items()
        if kind == "value":
            return None
        items = content.items() if kind == "dict" else enumerate(content)  # type: ignore[union-attr, arg-type]
        for key, item in items:
            below = stream_path(item)
            if below is not None:
                return (key, *below)
    return None


def _fill(template: JsonValue, stream: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if template == "stream":
        return stream
    if isinstance(template, list):
        return _at(args, kwargs, template)
    if isinstance(template, dict):
        ((kind, content),) = template.items()
        if kind == "value":
            return content
        if isinstance(content, dict):
            return {key: _fill(item, stream, args, kwargs) for key, item in content.items()}
        assert isinstance(content, list)
        filled = [_fill(item, stream, args, kwargs) for item in content]
        return tuple(filled) if kind == "tuple" else filled
    return None
