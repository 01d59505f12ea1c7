"""What a user asks for: `Budget`, `Config`, `Healing`; a wrong setting is told by name."""

from __future__ import annotations

import difflib
import math
import numbers
import sys
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler

from rba_compress.core.errors import BudgetError, ConfigError, RBAError
from rba_compress.core.map_spec import Kind, MapSpec
from rba_compress.core.registry import SearchedUnit, searched_units
from rba_compress.core.schema import Frozen, Share

Trained = Literal["maps", "norms", "adapters", "all"]
"""What of a compressed network is trained: see `Healing.train`."""

Augmentation = Literal["flip", "crop", "mix", "cut"]

RATES: dict[Trained, tuple[float, ...]] = {
    "maps": (5e-5, 1.5e-4, 5e-4),
    "norms": (5e-5, 1.5e-4, 5e-4),
    "adapters": (5e-5, 1.5e-4, 5e-4),
    "all": (1e-5, 3e-5, 1e-4, 3e-4),
}
"""Learning rates to choose from, by what is trained: which one suits depends on the samples, too."""


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
    """What the compressed network may cost, and how far it may fall; several limits hold together.

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
    """Of the loader's first batch on the model's device, as a paired ratio to the original network's;
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
        """The absolute limits of macs and params, for an original network of that cost."""
        original = {"macs": macs, "params": params}
        limits = {}
        for name, whole in original.items():
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
    units: tuple[SearchedUnit, ...] = Field(default_factory=searched_units)
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
    divergence: Literal["auto", "kl", "bernoulli", "nse", "cosine"] = "auto"
    """KL of the class probabilities; of a Bernoulli variable for each label (sigmoid heads); normalised
    squared error; or one minus the cosine. By default the labels, the problem type of a transformers
    configuration, and the graph decide: class scores, feature maps or an embedding."""
    seed: int = 0
    """Deals the samples to fit, validation and test."""

    @model_validator(mode="before")
    @classmethod
    def _foldable_alone(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("foldable"):
            return data | {"maps": ("identity", "folded"), "units": ("span",), "keep_features": True}
        return data

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


class Healing(Asked):
    """How a compressed network is trained towards its original."""

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
