"""Registry of units by name: plans and settings look units up here, `units/` registers them."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any, ClassVar, Protocol, TypeVar

from pydantic import AfterValidator

from rba_compress.core.errors import near


class PlannedUnit(Protocol):
    """The part of a unit's contract that plans need; the whole contract is in `units.base`."""

    name: ClassVar[str]
    searched: ClassVar[bool]
    """True where a search may choose the unit."""
    removes: ClassVar[bool]
    """True where nothing is left of the blocks."""
    inner: ClassVar[bool]
    """True where a block keeps its form, and its layers get fewer channels."""
    of_heads: ClassVar[bool]
    """True where heads of attention are narrowed, or taken out."""
    replaces: ClassVar[bool]
    """True where a block keeps its form, and a layer is put in place of what other units narrow."""
    fitted: ClassVar[bool]
    """True where the unit holds fitted tensors."""
    stock: ClassVar[bool]
    """True where stock networks may come out of it."""
    gguf: ClassVar[bool]
    """True where llama.cpp has an architecture that says it."""

    def require(self, replacement: Any) -> None:
        """Check that a replacement is one of this unit.

        Args:
            replacement: a `core.plan.Replacement`, which knows units by name alone.

        Raises:
            ValueError: the replacement is none of this unit's.
        """

    def describe(self, replacement: Any) -> str:
        """Return the replacement as one line of text."""


UNITS: dict[str, PlannedUnit] = {}
"""Units in the order in which they were registered."""

_U = TypeVar("_U", bound=PlannedUnit)


def register(unit: _U) -> _U:
    """Add a unit, which a plan may name from then on.

    Raises:
        ValueError: another one has its name.
    """
    if unit.name in UNITS:
        raise ValueError(f"there is a unit {unit.name!r} already")
    UNITS[unit.name] = unit
    return unit


def registered() -> dict[str, PlannedUnit]:
    """Return all units; the folder that registers them is loaded where nothing has loaded it yet."""
    if not UNITS:
        import_module("rba_compress.units.registry")
    return UNITS


def searched_units() -> tuple[str, ...]:
    """Return the names of all units that a search may choose."""
    return tuple(name for name, unit in registered().items() if unit.searched)


def stock_units() -> tuple[str, ...]:
    """Return the names of the units from which stock networks may come."""
    return tuple(name for name, unit in registered().items() if unit.searched and unit.stock)


def gguf_units() -> tuple[str, ...]:
    """Return the names of the units that have a place in a GGUF file."""
    return tuple(name for name, unit in registered().items() if unit.searched and unit.gguf)


def _known(name: str) -> str:
    if name not in registered():
        raise ValueError(f"there is no unit {name!r}: known are {', '.join(UNITS)}{near(name, UNITS)}")
    return name


def _searched(name: str) -> str:
    if name not in searched_units():
        known = searched_units()
        raise ValueError(f"{name!r} is none of the units {', '.join(known)}{near(name, known)}")
    return name


UnitName = Annotated[str, AfterValidator(_known)]
"""Name of a registered unit."""
SearchedUnit = Annotated[str, AfterValidator(_searched)]
"""Name of a unit that a search may choose."""
