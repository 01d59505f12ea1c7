"""Errors that this package raises on purpose; a message says what is wrong and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """Return the end of a message on an unknown name: all known ones, and the nearest of them."""
    names = [*known]
    return f"there are {', '.join(map(repr, names))}{near(name, names)}"


def near(name: object, known: Iterable[str]) -> str:
    """Return the question for the known name that is nearest to an unknown one, if one is near."""
    found = difflib.get_close_matches(str(name), [*known], 1)
    return f"; did you mean {found[0]!r}?" if found else ""


class RBAError(Exception):
    """Base class of all errors of rba_compress; the user's objects are unchanged when one is raised."""


class LoaderError(RBAError):
    """The calibration loader cannot be used: empty, one-shot, or batches of changing kind."""


class ModelError(RBAError):
    """The model cannot be analysed: not a plain module, or its forward pass fails."""


class NoChainError(ModelError):
    """The model has no replaceable blocks; the message lists what was refused and why."""


class ActivationError(RBAError):
    """Activations hold NaN or infinity; the message names the first block that makes them."""


class BudgetError(RBAError):
    """The budget is contradictory, or below what any allowed plan reaches."""


class ConfigError(RBAError):
    """A setting does not exist, or its value means nothing."""


class FidelityError(RBAError):
    """The compressed network's output is not finite, or too far from the original's with no budget."""


class MemoryLimitError(RBAError):
    """Memory ran out; the message says how much was wanted, and for what."""


class PlanError(RBAError):
    """A plan does not fit the model, or the tensors beside it do not fit the plan."""


class WeightsError(RBAError):
    """A weight file does not fit the architecture."""


class ArtifactError(RBAError):
    """A directory cannot be written, or holds no artefact that this version reads."""


class ExportError(RBAError):
    """A network cannot be exported, or the file does not compute what the network does."""


class RankError(RBAError):
    """A process of the group ended, does not answer, or works on something else."""


class SpaceError(RBAError):
    """Latent spaces or their anchors cannot be used, or cannot be used together."""
