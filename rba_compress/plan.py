"""Decisions without tensors: what a user asks for (`Budget`, `Config`) and what is done (`Plan`).

All of them are frozen and read and write JSON (`model_dump_json`, `model_validate_json`).
"""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationInfo,
    field_validator,
    model_validator,
)

from rba_compress.errors import BudgetError
from rba_compress.maps import Diagnostics, Kind, MapSpec

Share = Annotated[float, Field(ge=0, le=1)]

Path = tuple[str | int, ...]
"""Where a tensor sits in a call: ("args", 0), ("kwargs", "mask"), ("args", 0, 1), ..."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Budget(_Frozen):
    """What the slim network may cost, and how far it may fall; several limits hold together.

    Costs: a float up to 1 is the share to keep, an int is absolute. With limits of quality alone the
    search goes on for as long as they hold, and returns the cheapest network that it found.

    Raises:
        BudgetError: no limit is given, or one that means nothing.
    """

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
        if limit is not None and (limit <= 0 or (isinstance(limit, float) and limit > 1)):
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


class Config(_Frozen):
    """How to search; every field has a measured or stated default."""

    maps: tuple[Kind, ...] = ("identity", "shrunk", "folded")
    """Map kinds to try; identity is always tried."""
    shrinks: tuple[Share, ...] = Field((0.4, 0.7, 1.0), min_length=1)
    """The dial a of shrunk maps (1 - a) I + a T and of folded corrections."""
    fold_damping: float = Field(0.01, ge=0)
    """Ridge of folded corrections, relative to the Gram matrix's mean diagonal."""
    refit: bool = True
    """Re-solve kept layers behind a replaced span where held-out divergence falls."""
    refit_dampings: tuple[float, ...] = Field((0.3, 1.0, 10.0), min_length=1)
    """Ridge of refits, relative to the Gram matrix's mean diagonal."""
    refit_steps: tuple[float, ...] = Field((0.5, 1.0), min_length=1)
    """Shares of a refit's correction to try."""
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
    divergence: Literal["auto", "kl", "nse"] = "auto"
    """KL of the class probabilities, or normalised squared error; auto asks the graph which it is."""
    seed: int = 0
    """Deals the samples to fit, choose and confirm."""

    def specs(self, width: int) -> list[MapSpec]:
        """Every map to try, the identity first."""
        found = []
        for kind in dict.fromkeys(("identity", *self.maps)):
            damped = kind in ("affine", "shrunk", "low_rank")
            damping = self.fold_damping if kind == "folded" else self.damping if damped else 0.0
            rank = min(self.rank or max(1, width // 4), width) if kind == "low_rank" else None
            dial = self.shrinks if kind in ("shrunk", "folded") else (None,)
            found += [MapSpec(kind=kind, damping=damping, rank=rank, shrink=a) for a in dial]
        return found


class Signature(_Frozen):
    """How a block is called: where the stream comes in, and what it gives back.

    `output` is a template: "stream" is the stream, a list a path of the call's inputs, None nothing,
    {"value": v} a constant, and {"tuple": [...]}, {"list": [...]}, {"dict": {...}} the containers.
    """

    stream: Path = ("args", 0)
    output: JsonValue = "stream"

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


def _at(args: tuple[Any, ...], kwargs: dict[str, Any], path: Sequence[Any]) -> Any:
    value: Any = args if path[0] == "args" else kwargs
    for key in path[1:]:
        value = value[key]
    return value


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


class Branch(_Frozen):
    """The last linear layer of a residual branch: its output, times `scale`, is added to the stream."""

    path: str
    scale: str | None = None
    """A parameter (d,), the layer scale."""


class Block(_Frozen):
    """A replaceable block: its module path, and how it is wired."""

    path: str
    type: str
    signature: Signature | None = None
    """In a plain module: how it is called."""
    nodes: tuple[str, str] | None = None
    """In a GraphModule: the fx nodes of the stream before and after it."""
    branches: tuple[Branch, ...] = ()
    """Its residual branches in order; empty where they cannot be told apart."""


class Chain(_Frozen):
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


class Replacement(_Frozen):
    """The span `start:stop` of a chain, replaced by one map."""

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
    diagnostics: Diagnostics | None = None

    @property
    def key(self) -> str:
        """Prefix of its tensors in a state dict of the slim model."""
        return f"{self.blocks[0].path}.map."

    def __str__(self) -> str:
        return f"{self.chain}[{self.start}:{self.stop}] -> {self.map}"


class Refit(_Frozen):
    """A kept linear layer with a new weight and bias, solved towards the original stream."""

    chain: str
    block: int
    path: str
    damping: float
    step: float
    """Share of the correction that was taken; of the last, where the layer was re-solved again."""
    folded: bool = False
    """Whether it stands in for the span right behind its block."""

    @property
    def key(self) -> str:
        """Prefix of its tensors in a state dict."""
        return f"{self.path}."

    def __str__(self) -> str:
        return f"{self.path} refitted ({self.damping:g}, {self.step:g})"


class Refusal(_Frozen):
    """A candidate that is not replaced, and why."""

    paths: tuple[str, ...]
    type: str
    reason: str

    def __str__(self) -> str:
        shown = ", ".join(self.paths[:3]) + (
            f" and {len(self.paths) - 3} more" if self.paths[3:] else ""
        )
        return f"{shown} ({self.type}): {self.reason}"


class Candidate(_Frozen):
    """One change that the search judged on all samples that it chooses on."""

    step: int
    """Decisions before it. To settle or swap a span, others were judged with that span undone."""
    chain: str
    start: int
    stop: int
    map: MapSpec
    divergence: float
    """Of the output, with the change."""
    macs: int
    params: int


class Step(_Frozen):
    """One decision of the search, and what it came to."""

    action: str
    """take, settle, swap or refit; or stop, before a step that breaks a limit of quality."""
    change: str
    divergence: float
    """Of the output behind it."""
    margin: float
    """How far the divergence would be above at the price of the next best span, or without the change;
    where the search stopped, how far the step that was not taken raised it."""
    macs: int
    params: int


class Plan(_Frozen):
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
    divergence: Literal["kl", "nse"] = "nse"
    """The divergence that was minimised."""
    forward_passes: float = 0.0
    """Samples that the search sent through a whole network's worth of blocks, over the loader's."""

    def __str__(self) -> str:
        in_order = sorted(self.replacements, key=lambda r: (r.chain, r.start))
        text = "; ".join(map(str, in_order)) or "nothing replaced"
        kept = sum(not refit.folded for refit in self.refits)
        return text + (f"; kept layers re-solved: {kept}" if kept else "")
