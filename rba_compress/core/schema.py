"""Base of every schema of this package: frozen values that read and write JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Share = Annotated[float, Field(ge=0, le=1)]

Path = tuple[str | int, ...]
"""Place of a tensor in a call: ("args", 0), ("kwargs", "mask"), ("args", 0, 1), ..."""


def _dtype(name: str) -> str:
    import torch  # slow to load, and settings are read without it

    if not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(f"{name!r} is no dtype of torch")
    return name


Dtype = Annotated[str, AfterValidator(_dtype)]
"""Name of a dtype of torch, such as float32."""

ModulePath = Annotated[str, Field(min_length=1)]
"""Path of a module below the model itself."""


def nested(path: str, other: str) -> bool:
    """Return True if two module paths are equal, or one is inside of the other."""
    return path == other or path.startswith(f"{other}.") or other.startswith(f"{path}.")


class Frozen(BaseModel):
    """A value that reads and writes JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    former: ClassVar[Mapping[str, str]] = {}
    """Present names of fields, by their names in earlier schemas."""

    @model_validator(mode="before")
    @classmethod
    def _of_today(cls, data: Any) -> Any:
        if not cls.former or not isinstance(data, dict):
            return data
        return {cls.former.get(name, name): value for name, value in data.items()}
