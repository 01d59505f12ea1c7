"""Decisions without tensors: what a user asks for (`Budget`, `Config`) and what is done (`Plan`).

All of them are frozen and read and write JSON (`model_dump_json`, `model_validate_json`).
"""

from __future__ import annotations

import difflib
import math
import numbers
import sys
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.functional_validators import (
    ModelWrapValidatorHandler,
)  # not of pydantic itself before 2.11
from torch import Tensor

from rba_compress.errors import BudgetError, ConfigError, RBAError
from rba_compress.maps import Diagnostics, Kind, MapSpec
from rba_compress.markup import html_table

Share = Annotated[float, Field(ge=0, le=1)]

Path = tuple[str | int, ...]
"""Where a tensor sits in a call: ("args", 0), ("kwargs", "mask"), ("args", 0, 1), ..."""


Unit = Literal["span", "whole", "read_out", "attention_free", "mlp_free", "read_out_mlp"]
"""What is done to a block: see `rba_compress.thinning`; a span of blocks is replaced by one map."""


Trained = Literal["maps", "norms", "adapters", "all"]
"""What of a slim network is trained: see `Healing.train`."""

Augmentation = Literal["flip", "crop", "mix", "cut"]

RATES: dict[Trained, tuple[float, ...]] = {
    "maps": (5e-5, 1.5e-4, 5e-4),
    "norms": (5e-5, 1.5e-4, 5e-4),
    "adapters": (5e-5, 1.5e-4, 5e-4),
    "all": (1e-5, 3e-5, 1e-4, 3e-4),
}
"""Learning rates to choose from, by what is trained: which one suits depends on the samples, too."""


def _dtype(name: str) -> str:
    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(f"{name!r} is no dtype of torch")
    return name


Dtype = Annotated[str, AfterValidator(_dtype)]
"""As torch calls it: float32."""

ModulePath = Annotated[str, Field(min_length=1)]
"""Of a module below the model itself."""


def nested(path: str, other: str) -> bool:
    """Whether one module path is the other, or inside of it."""
    return path == other or path.startswith(f"{other}.") or other.startswith(f"{path}.")


class Frozen(BaseModel):
    """A value that reads and writes JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Asked(Frozen):
    """What a user asks for: a setting that does not exist, or means nothing, is told by name."""

    error: ClassVar[type[RBAError]] = ConfigError

    @model_validator(mode="wrap")
    @classmethod
    def _by_name(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            first, kind = error.errors()[0], cls.__name__
            name = ".".join(map(str, first["loc"]))
            if first["type"] == "extra_forbidden":
                near = difflib.get_close_matches(name, cls.model_fields, 1, 0) or [*cls.model_fields]
                raise cls.error(f"a {kind} has no {name!r}: did you mean {near[0]!r}?") from None
            what = f"{name}={first['input']!r}" if name else f"{first['input']!r}"
            raise cls.error(f"{kind}: {what} will not do: {first['msg']}") from None

    @classmethod
    def of(cls, given: Self | None) -> Self | None:
        """What a function was given for one, as it is.

        Raises:
            RBAError: it is something else.
        """
        if given is None or isinstance(given, cls):
            return given
        name = cls.__name__
        raise cls.error(f"the {name.lower()} is a {type(given).__name__}: pass a rba_compress.{name}")


class Budget(Asked):
    """What the slim network may cost, and how far it may fall; several limits hold together.

    Costs: a float up to 1 is the share to keep, an int is absolute. With limits of quality alone the
    search goes on for as long as they hold, and returns the cheapest network that it found.

    Raises:
        BudgetError: no limit is given, or one that means nothing.
    """

    error = BudgetError

    macs: float | int | None = None
    """Multiply-accumulates of one sample."""
    params: float | int | None = None
    """Parameters, shared ones once."""
    latency: float | int | None = None
    """Of the loader's first batch on the model's device, as a paired ratio to the dense network's;
    above 1 in milliseconds. Timings vary from run to run, and so may plans."""
    divergence: float | None = None
    """The highest mean divergence of the output, on the samples that the search chooses on."""
    agreement: float | None = None
    """The lowest share of equal argmax, on the same samples."""
    accuracy_drop: float | None = None
    """The most that accuracy may fall, 0.01 for one point, on the same samples; needs labels."""

    @field_validator("macs", "params", mode="before")
    @classmethod
    def _share_or_count(cls, value: Any) -> Any:
        limit = _number(value, "a share (float up to 1) or a count (int)")
        top = 1 if isinstance(limit, float) else math.inf
        if limit is not None and not 0 < limit <= top:
            raise BudgetError(f"{value!r} is neither a share in (0, 1] nor a positive count (int)")
        return limit

    @field_validator("latency", mode="before")
    @classmethod
    def _share_or_milliseconds(cls, value: Any) -> Any:
        limit = _number(value, "a share (float up to 1) or milliseconds")
        if limit is not None and not 0 < limit < math.inf:
            raise BudgetError(f"{value!r} is no latency: give a share in (0, 1] or milliseconds")
        return limit

    @field_validator("divergence", "agreement", "accuracy_drop", mode="before")
    @classmethod
    def _quality(cls, value: Any, info: ValidationInfo) -> Any:
        limit = _number(value, "a number such as 0.05")
        top = sys.float_info.max if info.field_name == "divergence" else 1
        if limit is not None and not 0 <= limit <= top:
            raise BudgetError(f"{info.field_name}={value!r} is not between 0 and {top:g}")
        return None if limit is None else float(limit)

    @model_validator(mode="after")
    def _something_is_asked(self) -> Self:
        if all(getattr(self, name) is None for name in type(self).model_fields):
            raise BudgetError("a budget needs a limit, such as Budget(macs=0.75)")
        return self

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """The limits that are given."""
        return [(name, value) for name, value in super().__repr_args__() if value is not None]

    def limits(self, macs: int, params: int) -> dict[str, float]:
        """The absolute limits of macs and params, for a dense network of that cost."""
        dense = {"macs": macs, "params": params}
        limits = {}
        for name, whole in dense.items():
            value = getattr(self, name)
            if value is not None:
                limits[name] = value * whole if isinstance(value, float) else value
        return limits

    def broken(
        self, divergence: float, agreement: float | None, accuracy_drop: float | None
    ) -> list[str]:
        """Which limits of quality do not hold, in words."""
        found = []
        if self.divergence is not None and not divergence <= self.divergence:
            found.append(f"divergence <= {self.divergence:g} (it is {divergence:.4g})")
        if self.agreement is not None and agreement is not None and agreement < self.agreement:
            found.append(f"agreement >= {self.agreement:g} (it is {agreement:.4g})")
        # Shares of counts: 0.29 - 0.28 is above 0.01 in floats.
        allowed = None if self.accuracy_drop is None else self.accuracy_drop + 1e-9
        if allowed is not None and accuracy_drop is not None and accuracy_drop > allowed:
            found.append(f"accuracy_drop <= {self.accuracy_drop:g} (it is {accuracy_drop:.4g})")
        return found


def _number(value: Any, wanted: str) -> float | int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise BudgetError(f"{value!r} is no limit: give {wanted}")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


class Config(Asked):
    """How to search; every field has a measured or stated default."""

    maps: tuple[Kind, ...] = ("identity", "shrunk", "folded")
    """Map kinds to try; identity is always tried."""
    units: tuple[Unit, ...] = ("span", "read_out", "attention_free", "mlp_free", "read_out_mlp")
    """What to try: maps over spans of blocks, and thinner blocks where the network offers them."""
    keep_features: bool = False
    """Compute every position of every stream, also those that the output does not read."""
    foldable: bool = False
    """Search for what `save(fold=True)` can write as a stock network with fewer blocks: identities and
    folded maps over spans, every position computed; takes the place of maps, units, keep_features."""
    shrinks: tuple[Share, ...] = Field((0.4, 0.7, 1.0), min_length=1)
    """The dial a of shrunk maps (1 - a) I + a T and of folded corrections."""
    fold_damping: float = Field(0.01, ge=0)
    """Ridge of folded corrections, relative to the Gram matrix's mean diagonal."""
    refit: bool = True
    """Re-solve kept layers behind a replaced span where held-out divergence falls."""
    statistics: bool = True
    """Re-estimate BatchNorm statistics behind a replaced span where held-out divergence falls."""
    refit_dampings: tuple[float, ...] = Field((0.3, 1.0, 10.0), min_length=1)
    """Ridge of refits, relative to the Gram matrix's mean diagonal."""
    refit_steps: tuple[float, ...] = Field((0.5, 1.0), min_length=1)
    """Shares of a refit's correction, and of the way to new statistics, to try."""
    tolerance: float = Field(0.005, ge=0)
    """A refit or swap is taken if it lowers the held-out divergence by this share, and by more than one
    standard error of the difference."""
    swaps: int = Field(1, ge=0)
    """Rounds in which each span is undone and chosen again."""
    class_weight: float | None = Field(None, gt=0)
    """How often a class token's row counts in a fit; None counts it as much as all other rows."""
    rank: int | None = Field(None, gt=0)
    """Rank of low_rank maps; None is a quarter of the width."""
    damping: float = Field(1e-4, ge=0)
    """Ridge of affine and shrunk maps, relative to the Gram matrix's mean diagonal."""
    window: int | None = Field(None, gt=0)
    """The longest span that is profiled; bounds the memory of wide, deep networks."""
    memory: int | None = Field(None, gt=0)
    """Bytes that the moments of a profile may take, and as many the streams that a search keeps; by
    default half of the device's memory."""
    stride: int = Field(4, gt=0)
    """Of the positions that no head reads, one in so many is profiled, and counts for all, once there
    were sixteen rows a channel; 1 profiles every one."""
    divergence: Literal["auto", "kl", "nse", "cosine"] = "auto"
    """KL of the class probabilities, normalised squared error, or one minus the cosine; auto asks the
    graph which it is: class scores, feature maps or an embedding."""
    seed: int = 0
    """Deals the samples to fit, choose and confirm."""

    @model_validator(mode="before")
    @classmethod
    def _foldable_alone(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("foldable"):
            return data | {"maps": ("identity", "folded"), "units": ("span",), "keep_features": True}
        return data

    def specs(self, width: int, unit: Unit = "span") -> list[MapSpec]:
        """Every map to try, the identity first; none is folded into a block that is thinned."""
        found = []
        for kind in dict.fromkeys(("identity", *self.maps)):
            if kind == "folded" and unit != "span":
                continue
            damped = kind in ("affine", "shrunk", "low_rank")
            damping = self.fold_damping if kind == "folded" else self.damping if damped else 0.0
            rank = min(self.rank or max(1, width // 4), width) if kind == "low_rank" else None
            dial = self.shrinks if kind in ("shrunk", "folded") else (None,)
            found += [MapSpec(kind=kind, damping=damping, rank=rank, shrink=a) for a in dial]
        return found


class Input(Frozen):
    """A tensor that a block is called with."""

    path: Path
    shape: tuple[int, ...]
    """As it was seen, with two samples."""
    dtype: Dtype

    def zeros(self, parameter: Tensor, *, like: Input) -> Tensor:
        """Such a tensor on a parameter's device; where its dtype is that of `like`, in its dtype."""
        dtype = getattr(torch, self.dtype)
        if dtype.is_floating_point and self.dtype == like.dtype:
            dtype = parameter.dtype
        return torch.zeros(self.shape, dtype=dtype, device=parameter.device)


class Signature(Frozen):
    """How a block is called: where the stream comes in, and what it gives back.

    `output` is a template: "stream" is the stream, a list a path of the call's inputs, None nothing,
    {"value": v} a constant, and {"tuple": [...]}, {"list": [...]}, {"dict": {...}} the containers.
    """

    stream: Path = ("args", 0)
    output: JsonValue = "stream"
    arguments: JsonValue = None
    """A template of {"args": ..., "kwargs": ...}, in which ["args", i] is `inputs[i]`."""
    inputs: tuple[Input, ...] = ()
    """Every tensor of a call; empty where a call cannot be written down."""

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
        """The stream among the inputs of a call."""
        return _at(args, kwargs, self.stream)

    def stream_out(self, output: Any) -> Any:
        """The stream in the output of a call."""
        for key in _stream_path(self.output) or ():
            output = output[key]
        return output

    def rebuild(self, stream: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of a call whose stream is `stream`, side inputs passed by."""
        return _fill(self.output, stream, args, kwargs)

    @property
    def stream_index(self) -> int:
        """Which of the inputs is the stream."""
        return next(i for i, given in enumerate(self.inputs) if given.path == self.stream)

    def call(self, tensors: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call with these inputs."""
        filled = _fill(self.arguments, None, tuple(tensors), {})
        return tuple(filled["args"]), filled["kwargs"]

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The inputs of a call."""
        return [_at(args, kwargs, given.path) for given in self.inputs]

    def mismatch(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """What of a call is not as it was when it was seen, but for the tensors' values; or None."""
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
    """
    Raises:
        ValueError: `_fill` could not follow it.
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


def _stream_path(template: JsonValue) -> Path | None:
    if template == "stream":
        return ()
    if isinstance(template, dict):
        ((kind, content),) = template.items()
        if kind == "value":
            return None
        items = content.items() if kind == "dict" else enumerate(content)  # type: ignore[union-attr, arg-type]
        for key, item in items:
            below = _stream_path(item)
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


class Branch(Frozen):
    """The last linear layer of a residual branch: its output, times `scale`, is added to the stream."""

    path: ModulePath
    scale: str | None = None
    """A parameter (d,), the layer scale."""
    norm: str | None = None
    """A LayerNorm that the sum goes through, where it stands behind the sum."""


class UnitCost(Frozen):
    """What is left to pay of a block that is thinned, its map aside."""

    unit: Unit
    narrow: bool
    """Whether for the read positions alone."""
    macs: int
    params: int


class Block(Frozen):
    """A replaceable block: its module path, and how it is wired."""

    path: ModulePath
    type: str
    signature: Signature = Signature()
    """How it is called; in a GraphModule, as a module that takes the stream and `sides`."""
    variants: tuple[Signature, ...] = ()
    """Other ways in which it is called, with a mask or without say."""
    nodes: tuple[str, str] | None = None
    """In a GraphModule: the fx nodes of the stream before and after it."""
    sides: tuple[str, ...] = ()
    """In a GraphModule: the other fx nodes outside of it that it reads."""
    branches: tuple[Branch, ...] = ()
    """Its residual branches in order; empty where they cannot be told apart."""
    units: tuple[UnitCost, ...] = ()
    """What it can be thinned to."""

    @field_validator("signature", mode="before")
    @classmethod
    def _schema_1(cls, value: Any) -> Any:
        """Plans of schema 1 had none in a GraphModule."""
        return Signature() if value is None else value

    def cost(self, unit: Unit, *, narrow: bool = False) -> UnitCost | None:
        """Of a unit; None where the block does not offer it."""
        return next((u for u in self.units if (u.unit, u.narrow) == (unit, narrow)), None)


class Chain(Frozen):
    """Blocks in sequence: each one's stream input is the one before's output, read by nobody else."""

    name: str
    blocks: tuple[Block, ...]
    width: int
    """Channels of the stream."""
    ndim: int
    """Dimensions of the stream."""
    axis: int
    """Its channel axis."""
    positions: int
    """Positions of the stream in one sample: tokens, or pixels."""
    class_tokens: tuple[int, ...] = ()
    """Token positions that are selected one by one after the chain; empty where there are none."""
    reads: int = 0
    """Behind the chain the first so many positions are read, and no others; 0 where others are."""
    unread: str = ""
    """Why no position is left uncomputed."""
    macs: tuple[int, ...] = ()
    """Multiply-accumulates of each block, for one sample."""
    params: tuple[int, ...] = ()
    """Parameters of each block."""

    def __len__(self) -> int:
        return len(self.blocks)

    def spans(self, window: int | None = None) -> list[tuple[int, int]]:
        """Every span (start, stop) of at most `window` blocks."""
        longest = len(self) if window is None else window
        return [
            (start, stop)
            for start in range(len(self))
            for stop in range(start + 1, min(start + longest, len(self)) + 1)
        ]


class Replacement(Frozen):
    """The span `start:stop` of a chain replaced by one map, or a block of it thinned."""

    chain: str
    start: int
    stop: int
    blocks: tuple[Block, ...]
    """The blocks of the span, in order."""
    map: MapSpec
    width: int
    """Channels of the stream."""
    ndim: int
    """Dimensions of the stream."""
    axis: int
    """Its channel axis."""
    unit: Unit = "span"
    reads: int = 0
    """In a read-out: how many positions are computed in full, the first ones."""
    exact: bool = False
    """Whether the others are not computed at all, for nothing reads them; the map is unused then."""
    diagnostics: Diagnostics | None = None

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if not 0 <= self.start < self.stop or len(self.blocks) != self.stop - self.start:
            raise ValueError(f"{len(self.blocks)} blocks are no span {self.start}:{self.stop}")
        if self.unit != "span" and len(self.blocks) != 1:
            raise ValueError(f"{self.unit} is of one block, not of {len(self.blocks)}")
        last = self.axis in (-1, self.ndim - 1)
        known = last or (self.axis, self.ndim) in _CHANNELS_SECOND
        if not (0 < self.width <= _WIDEST and 0 < self.ndim <= 8 and known):
            raise ValueError(f"no map is of {self.width} channels on axis {self.axis} of {self.ndim}")
        if self.map.rank is not None and self.map.rank > self.width:
            raise ValueError(f"a map of rank {self.map.rank} for {self.width} channels")
        return self

    @property
    def key(self) -> str:
        """Prefix of its tensors in a state dict of the slim model."""
        return f"{self.blocks[0].path}.map."

    @property
    def source(self) -> float:
        """The boundary that its map reads; half a boundary lies between the sublayers of a block."""
        return self.start + 0.5 * (self.unit in ("mlp_free", "read_out_mlp"))

    @property
    def target(self) -> float:
        """The boundary that its map is fitted to."""
        return self.stop - 0.5 * (self.unit == "attention_free")

    @property
    def between(self) -> bool:
        """Whether its map starts or ends between the sublayers of a block."""
        return bool(self.source % 1 or self.target % 1)

    def __str__(self) -> str:
        block = f"{self.chain}[{self.start}]"
        match self.unit:
            case "attention_free":
                return f"{block} attention -> {self.map}"
            case "mlp_free":
                only = f" ({self.reads} read)" if self.exact else ""
                return f"{block} MLP -> {self.map}{only}"
            case "read_out":
                others = "not computed" if self.exact else f"-> {self.map}"
                return f"{block} for {self.reads} read, others {others}"
            case "read_out_mlp":
                return f"{block} MLP for {self.reads} read, others -> {self.map}"
        return f"{self.chain}[{self.start}:{self.stop}] -> {self.map}"


_WIDEST = 1 << 24
_CHANNELS_SECOND = {(1, 3), (1, 4), (1, 5)}
"""Axis and dimensions of the streams that 1x1 convolutions are for."""


class Refit(Frozen):
    """A kept linear layer with a new weight and bias, solved towards the original stream; or a
    BatchNorm with running statistics of what reaches it by now."""

    chain: str = ""
    """Of a linear layer, as is its block."""
    block: int = -1
    path: ModulePath
    damping: float = 0.0
    step: float
    """Share of the correction that was taken; of the last, where the layer was re-solved again."""
    folded: bool = False
    """Whether it stands in for the span right behind its block."""
    statistics: bool = False
    """Whether it is a BatchNorm."""

    @property
    def key(self) -> str:
        """Prefix of its tensors in a state dict."""
        return f"{self.path}."

    def __str__(self) -> str:
        if self.statistics:
            return f"{self.path} re-estimated ({self.step:g})"
        return f"{self.path} refitted ({self.damping:g}, {self.step:g})"


class Refusal(Frozen):
    """A candidate that is not replaced, and why."""

    paths: tuple[str, ...]
    type: str
    reason: str

    def __str__(self) -> str:
        shown = ", ".join(self.paths[:3]) + (
            f" and {len(self.paths) - 3} more" if self.paths[3:] else ""
        )
        return f"{shown} ({self.type}): {self.reason}"


class Candidate(Frozen):
    """One change that the search judged on all samples that it chooses on."""

    step: int
    """Decisions before it. To settle or swap a span, others were judged with that span undone."""
    chain: str
    start: int
    stop: int
    unit: Unit = "span"
    map: MapSpec
    divergence: float
    """Of the output, with the change."""
    macs: int
    params: int


class Step(Frozen):
    """One decision of the search, and what it came to."""

    action: str
    """take, settle, swap, refit or statistics; or stop, before a step that breaks a limit of
    quality."""
    change: str
    divergence: float
    """Of the output behind it."""
    margin: float
    """How far the divergence would be above at the price of the next best span, or without the change;
    where the search stopped, how far the step that was not taken raised it. Where it is nothing beside
    the divergence, the choice was a tie: see `rba_compress.planner`."""
    macs: int
    params: int


class Healing(Asked):
    """How a slim network is trained towards its original."""

    train: Trained = "all"
    """The maps alone; them and norms and biases; all of these and a low-rank adapter on every linear
    layer and convolution, merged at the end; or everything."""
    rate: float | None = Field(None, gt=0)
    """The peak of the learning rate; None is the best of `RATES` on held-out samples, after a short
    training with each."""
    epochs: int = Field(10, gt=0)
    """Rounds through the samples to train on, at the most."""
    batch: int = Field(16, gt=0)
    """Samples of a step, of all processes together."""
    warmup: Share = 0.1
    """Of the steps, in which the rate rises; then it falls as a cosine."""
    rank: int = Field(8, gt=0)
    """Of adapters."""
    augment: tuple[Augmentation, ...] = ("flip", "crop")
    """What is done to images before both networks see them: a mirror image, a part of at least a third
    of the area, mixed with another by its values, or by a rectangle."""
    features: float = Field(0.0, ge=0)
    """The weight of the normalised squared error of the streams behind the last blocks."""
    labels: Share = 0.0
    """The weight of the cross-entropy with the loader's labels; what is left is the original's."""
    smoothing: float = Field(0.1, ge=0, lt=1)
    """Of labels."""
    patience: int = Field(5, gt=0)
    """Epochs in a row without a new best on held-out samples, after which it ends."""
    bf16: bool = False
    """Multiply in bfloat16; the teacher and what is measured stay as they are."""
    seed: int = 0
    """Of the order, the augmentation and the adapters."""


class Healed(Frozen):
    """That a network was trained after it was spliced: how, on what, and what came of it."""

    healing: Healing
    data: str
    """SHA-256 of the samples that it was trained on."""
    samples: int
    rate: float | None = None
    """The peak of the learning rate, as it was chosen."""
    steps: int
    """Optimiser steps to the state that was kept."""
    before: float
    """The objective on held-out samples, of what went in."""
    after: float
    keys: tuple[str, ...] = ()
    """Parameters that were trained, now or in an earlier training."""


class Plan(Frozen):
    """What is replaced by what, and why the rest was not. Holds no tensors."""

    replacements: tuple[Replacement, ...] = ()
    refits: tuple[Refit, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    steps: tuple[Step, ...] = ()
    """The decisions, in order."""
    candidates: tuple[Candidate, ...] = ()
    """Every finalist that was judged for them."""
    budget: Budget | None = None
    config: Config = Config()
    divergence: Literal["kl", "nse", "cosine", "given"] = "nse"
    """The divergence that was minimised."""
    forward_passes: float = 0.0
    """Samples that the search sent through a whole network's worth of blocks, over the loader's."""
    healed: Healed | None = None

    @property
    def in_order(self) -> list[Replacement]:
        """The replacements as they lie in the network, chain by chain."""
        return sorted(self.replacements, key=lambda r: (r.chain, r.start))

    def __repr__(self) -> str:
        return f"Plan({self})"

    def _repr_html_(self) -> str:
        fits = ((str(r), r.diagnostics) for r in self.in_order)
        done = [
            (text, "" if d is None else f"R² {d.r2:.4f}, rank {d.effective_rank:.1f}")
            for text, d in fits
        ]
        left = [(", ".join(refusal.paths[:3]), refusal.reason) for refusal in self.refusals]
        return html_table(str(self), ("what", "how well, or why not"), [*done, *left])

    def __str__(self) -> str:
        text = "; ".join(map(str, self.in_order)) or "nothing replaced"
        normed = sum(refit.statistics for refit in self.refits)
        kept = sum(not refit.folded for refit in self.refits) - normed
        text += f"; kept layers re-solved: {kept}" if kept else ""
        text += f"; BatchNorms re-estimated: {normed}" if normed else ""
        text += f"; healed in {self.healed.steps} steps" if self.healed else ""
        return text + ("; every position is computed" if self.config.keep_features else "")
