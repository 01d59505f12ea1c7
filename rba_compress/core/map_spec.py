"""Specification of a map and diagnostics of its fit, without tensors."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Kind = Literal["identity", "scale", "linear", "affine", "low_rank", "orthogonal", "shrunk", "folded"]


class MapSpec(BaseModel):
    """Kind of a map and its settings, without tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    kind: Kind
    damping: float = Field(0.0, ge=0)
    """Ridge, relative to the mean diagonal of the Gram matrix."""
    rank: int | None = Field(None, gt=0)
    """Rank of a low_rank map; None for other kinds."""
    shrink: float | None = Field(None, ge=0, le=1)
    """Coefficient a of a shrunk map (1 - a) I + a T, or share of a folded map's correction; None for
    other kinds."""

    @model_validator(mode="after")
    def _settings_fit_the_kind(self) -> Self:
        for setting, kinds in (("rank", ("low_rank",)), ("shrink", ("shrunk", "folded"))):
            if (getattr(self, setting) is not None) != (self.kind in kinds):
                raise ValueError(f"`{setting}` is set for the map {kinds[0]!r} and none but {kinds}")
        return self

    def __str__(self) -> str:
        setting = self.rank if self.kind == "low_rank" else self.shrink
        return self.kind if setting is None else f"{self.kind}({setting:g})"


class Diagnostics(BaseModel):
    """Quality and conditioning of a fit; a bad fit is reported, never raised."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    residual: float
    """E ||y - W x - b||^2 over the rows that were fitted."""
    r2: float
    """1 - residual / E ||y - E y||^2."""
    effective_rank: float
    """exp of the entropy of the normalised eigenvalues of cov(x); Roy and Vetterli 2007."""
    condition: float
    """Largest over smallest eigenvalue of the Gram matrix that was solved, damping included; inf beyond
    1e12, where float64 does not tell the smallest from zero.
    """
    damping: float
    """The ridge that was added to that Gram matrix, absolute."""
    rows: float
    """Rows (or their weight) behind the fit; with fewer than the width, damping determines the fit."""

    def rounded(self) -> Self:
        """Return the diagnostics with six digits each, the same on every number of threads."""
        six = {name: float(f"{value:.6g}") for name, value in self if name != "rows"}
        return self.model_copy(update=six)
