"""Settings that a user gives: `Budget`, `Config`, `Healing`; errors name an invalid setting."""

from __future__ import annotations

import difflib
import hashlib
import math
import numbers
import re
import sys
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler

from rba_compress.core.errors import BudgetError, ConfigError, RBAError, did_you_mean
from rba_compress.core.map_spec import Kind, MapSpec
from rba_compress.core.registry import SearchedUnit, gguf_units, searched_units, stock_units
from rba_compress.core.schema import Frozen, Share

Trained = Literal["maps", "norms", "adapters", "all"]
"""Parameters of a compressed network that are trained: see `Healing.train`."""

Augmentation = Literal["flip", "crop", "mix", "cut"]

Effort = Literal["quick", "default", "thorough"]

GgufType = Literal["f32", "f16", "q8_0"]
"""Type of the matrices of a GGUF file."""

RATES: dict[Trained, tuple[float, ...]] = {
    "maps": (5e-5, 1.5e-4, 5e-4),
    "norms": (5e-5, 1.5e-4, 5e-4),
    "adapters": (5e-5, 1.5e-4, 5e-4),
    "all": (1e-5, 3e-5, 1e-4, 3e-4),
}
"""Learning rates to choose from, by `Healing.train`; the best one depends on the samples, too."""


class Asked(Frozen):
    """Base of a user's settings: an unknown or invalid setting raises an error that names it."""

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
            why = first["msg"].removeprefix("Value error, ")
            if first["type"] == "literal_error":
                why = did_you_mean(first["input"], re.findall("'(.*?)'", first["ctx"]["expected"]))
            raise cls.error(f"{kind}: {what} will not do: {why}") from None

    @classmethod
    def of(cls, given: Self | None) -> Self | None:
        """Return an argument unchanged if it is None or of this class.

        Raises:
            RBAError: the argument is something else.
        """
        if given is None or isinstance(given, cls):
            return given
        name = cls.__name__
        raise cls.error(f"the {name.lower()} is a {type(given).__name__}: pass a rba_compress.{name}")


class Budget(Asked):
    """Limits on the cost of the compressed network and on its loss of quality; all of them must hold.

    Costs: a float up to 1 is the share to keep, an int is absolute. With limits of quality alone the
    search continues for as long as they hold, and returns the cheapest network that it found.

    Raises:
        BudgetError: no limit is given, or one that means nothing.
    """

    error = BudgetError

    macs: float | int | None = None
    """Multiply-accumulates of one sample."""
    params: float | int | None = None
    """Parameters, shared ones once."""
    latency: float | int | None = None
    """Latency of the loader's first batch on the model's device, as a paired ratio to the original
    network's; above 1 in milliseconds. Timings vary from run to run, and so may plans."""
    divergence: float | None = None
    """The highest mean divergence of the output on the validation samples."""
    agreement: float | None = None
    """The lowest share of equal argmax on the validation samples."""
    accuracy_drop: float | None = None
    """The largest drop of accuracy on the validation samples, 0.01 for one point; needs labels."""
    metric_drop: dict[str, float] | None = None
    """The largest drop of metrics of the task on the validation samples, by the names that `metrics` of
    `compress` gives them."""

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

    @field_validator("metric_drop", mode="before")
    @classmethod
    def _of_each(cls, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, dict) or not value:
            raise BudgetError(f"metric_drop={value!r} is no limit: give {{'mIoU': 0.01}}")
        limits = {name: _number(limit, "a number such as 0.01") for name, limit in value.items()}
        for name, limit in limits.items():
            if limit is None or not 0 <= limit < math.inf:
                raise BudgetError(f"metric_drop of {name!r} is {limit!r}: give a number such as 0.01")
        return limits

    @model_validator(mode="after")
    def _something_is_asked(self) -> Self:
        if all(getattr(self, name) is None for name in type(self).model_fields):
            raise BudgetError("a budget needs a limit, such as Budget(macs=0.75)")
        return self

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """Return the limits that are given."""
        return [(name, value) for name, value in super().__repr_args__() if value is not None]

    def limits(self, macs: int, params: int) -> dict[str, float]:
        """Return the absolute limits of macs and params, for an original network of that cost."""
        original = {"macs": macs, "params": params}
        limits = {}
        for name, whole in original.items():
            value = getattr(self, name)
            if value is not None:
                limits[name] = value * whole if isinstance(value, float) else value
        return limits

    def broken(
        self,
        divergence: float,
        agreement: float | None,
        accuracy_drop: float | None,
        metric_drops: Mapping[str, float] = MappingProxyType({}),
    ) -> list[str]:
        """Return the limits of quality that do not hold, in words."""
        found = []
        if self.divergence is not None and not divergence <= self.divergence:
            found.append(f"divergence <= {self.divergence:g} (it is {divergence:.4g})")
        if self.agreement is not None and agreement is not None and agreement < self.agreement:
            found.append(f"agreement >= {self.agreement:g} (it is {agreement:.4g})")
        # Accuracies are shares of counts, and 0.29 - 0.28 is above 0.01 in floats.
        allowed = None if self.accuracy_drop is None else self.accuracy_drop + 1e-9
        if allowed is not None and accuracy_drop is not None and accuracy_drop > allowed:
            found.append(f"accuracy_drop <= {self.accuracy_drop:g} (it is {accuracy_drop:.4g})")
        for name, limit in (self.metric_drop or {}).items():
            drop = metric_drops.get(name)
            if drop is not None and not drop <= limit + 1e-9:
                found.append(f"drop of {name} <= {limit:g} (it is {drop:.4g})")
        return found


def _number(value: Any, wanted: str) -> float | int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise BudgetError(f"{value!r} is no limit: give {wanted}")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


class Config(Asked):
    """Settings of a search; every field has a measured or stated default."""

    maps: tuple[Kind, ...] = ("identity", "shrunk", "folded")
    """Map kinds to try; identity is always tried."""
    units: tuple[SearchedUnit, ...] = Field(default_factory=searched_units)
    """Units to try: maps over spans of blocks, and thinned blocks where the network offers them."""
    keep_features: bool = False
    """Compute every position of every stream, also those that the output does not read."""
    effort: Effort = "default"
    """Work that the search does: samples to screen on, levels to try, plans to evaluate, refits."""
    stock: bool = False
    """Search only for what `save(fold=True)` can write as a stock network, which loads without this
    package: fewer blocks and, in a network of one chain, one hidden width and one number of heads for
    all blocks. Maps are identities or folded, every position is computed; overrides maps and
    keep_features, and leaves out units that no stock network has."""
    deploy: Literal["any", "gguf"] = "any"
    """Runtime: with "gguf" the search takes only what `export_gguf` can write for llama.cpp. Overrides
    maps and keep_features, and leaves out units, as `stock` does."""
    shrinks: tuple[Share, ...] = Field((0.4, 0.7, 1.0), min_length=1)
    """Coefficients a of shrunk maps (1 - a) I + a T, and of folded corrections, to try."""
    fold_damping: float = Field(0.01, ge=0)
    """Ridge of folded corrections, relative to the Gram matrix's mean diagonal."""
    refit: bool = True
    """Re-solve kept layers behind a replaced span where the divergence on validation samples falls."""
    statistics: bool = True
    """Re-estimate BatchNorm statistics behind a replaced span where that divergence falls."""
    refit_dampings: tuple[float, ...] = Field((0.3, 1.0, 10.0), min_length=1)
    """Ridge of refits, relative to the Gram matrix's mean diagonal."""
    refit_steps: tuple[float, ...] = Field((0.5, 1.0), min_length=1)
    """Step sizes to try: shares of a refit's correction, and of the change to new statistics."""
    tolerance: float = Field(0.005, ge=0)
    """Smallest relative decrease of the divergence on validation samples for which a refit is taken;
    the decrease must also exceed one standard error of the difference."""
    class_weight: float | None = Field(None, gt=0)
    """Weight of a class token's row in a fit; None weights it as much as all other rows together."""
    rank: int | None = Field(None, gt=0)
    """Rank of low_rank maps; None is a quarter of the width."""
    damping: float = Field(1e-4, ge=0)
    """Ridge of affine and shrunk maps, relative to the Gram matrix's mean diagonal."""
    window: int | None = Field(None, gt=0)
    """The longest span that is profiled, in blocks; bounds the memory for wide, deep networks."""
    memory: int | None = Field(None, gt=0)
    """Limit in bytes for the moments of a profile, and the same limit for the streams that a search
    keeps; by default half of the device's memory."""
    stride: int = Field(4, gt=0)
    """Sampling stride over the positions that no head reads: after sixteen rows a channel, one position
    in `stride` is profiled and weighted for all of them; 1 profiles every position."""
    divergence: Literal["auto", "kl", "bernoulli", "nse", "cosine"] = "auto"
    """Divergence of the output: KL of the class probabilities; KL of a Bernoulli variable a label
    (sigmoid heads); normalised squared error; or one minus the cosine. By default the labels, the
    problem type of a transformers configuration, and the graph decide: class scores, feature maps or an
    embedding."""
    multiple: int = Field(8, gt=0)
    """Number of which the widths inside narrowed blocks are multiples: others run slower for less."""
    seed: int = 0
    """Seed of the split into fit, validation and test samples."""
    stretch: int = Field(1, gt=0)
    """Consecutive samples that are dealt to one of these parts together. Sequences cut from a text are
    like their neighbours: with 8 or so, samples are held out with their articles."""

    @model_validator(mode="before")
    @classmethod
    def _what_can_be_said(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not (data.get("stock") or data.get("deploy") == "gguf"):
            return data
        asked, known = data.get("units"), stock_units() if data.get("stock") else gguf_units()
        if isinstance(asked, list | tuple):
            others = [name for name in searched_units() if name not in known]
            if not (kept := tuple(name for name in asked if name not in others)):
                what = "a stock network" if data.get("stock") else "a GGUF file"
                raise ValueError(f"no unit of {list(asked)} gives {what}: {list(known)} do")
        else:
            kept = known
        return data | {"maps": ("identity", "folded"), "units": kept, "keep_features": True}

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """Return the settings that differ from their defaults."""
        own = Config.model_fields
        return [
            (n, v)
            for n, v in super().__repr_args__()
            if v != own[str(n)].get_default(call_default_factory=True)
        ]

    def specs(self, width: int) -> list[MapSpec]:
        """Return every map to try, the identity first."""
        found = []
        for kind in dict.fromkeys(("identity", *self.maps)):
            damped = kind in ("affine", "shrunk", "low_rank")
            damping = self.fold_damping if kind == "folded" else self.damping if damped else 0.0
            rank = min(self.rank or max(1, width // 4), width) if kind == "low_rank" else None
            dial = self.shrinks if kind in ("shrunk", "folded") else (None,)
            found += [MapSpec(kind=kind, damping=damping, rank=rank, shrink=a) for a in dial]
        return found


def _without_former(value: Any) -> Any:
    """Return stored settings by their present names, without those that only earlier schemas had."""
    if not isinstance(value, dict):
        return value
    return {"stock" if k == "foldable" else k: v for k, v in value.items() if k != "swaps"}


StoredConfig = Annotated[Config, BeforeValidator(_without_former)]
"""Settings as a file holds them."""


class Healing(Asked):
    """Settings for training a compressed network towards its original."""

    train: Trained = "all"
    """Parameters to train: the maps alone; maps, norms and biases; all of these and a low-rank adapter
    on every linear layer and convolution, merged at the end; or all parameters."""
    rate: float | None = Field(None, gt=0)
    """Peak learning rate; None takes the best of `RATES` on held-out samples, after a short training
    with each."""
    epochs: int = Field(10, gt=0)
    """Largest number of epochs over the training samples."""
    batch: int = Field(16, gt=0)
    """Samples of an optimiser step, of all processes together."""
    warmup: Share = 0.1
    """Share of the steps in which the learning rate rises; then the rate falls as a cosine."""
    rank: int = Field(8, gt=0)
    """Rank of the adapters."""
    augment: tuple[Augmentation, ...] = ("flip", "crop")
    """Augmentations of images, the same for both networks: a mirror image, a crop of at least a third
    of the area, a mixture with another image by values (mix) or by a rectangle (cut)."""
    features: float = Field(0.0, ge=0)
    """Weight of the normalised squared error of the streams behind the last blocks."""
    labels: Share = 0.0
    """Weight of the cross-entropy with the loader's labels; the rest weights the original's outputs."""
    smoothing: float = Field(0.1, ge=0, lt=1)
    """Label smoothing of that cross-entropy."""
    patience: int = Field(5, gt=0)
    """Number of consecutive epochs without a new best on held-out samples after which training ends."""
    bf16: bool = False
    """Multiply in bfloat16; the teacher and the evaluation keep their precision."""
    seed: int = 0
    """Seed of the sample order, the augmentation and the adapters."""


def mixed_seed(*numbers: int) -> int:
    """Return a seed made of integers of any size."""
    hashed = hashlib.blake2b(repr(numbers).encode(), digest_size=7)
    return int.from_bytes(hashed.digest(), "big")
