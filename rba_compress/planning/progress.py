"""Progress of a search: its bar, its log lines, and the checkpoint from which it resumes."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any, Literal, Self

from rba_compress.core.config import StoredConfig
from rba_compress.core.errors import ArtifactError
from rba_compress.core.io import read_tensors, write_tensors
from rba_compress.core.schema import Frozen
from rba_compress.planning.context import SearchContext
from rba_compress.planning.state import SearchState
from rba_compress.profiling.profiler import EVERY
from rba_compress.profiling.search_record import SavedRecord

LOGGER = logging.getLogger("rba_compress")
REFINEMENT = 5.0
"""Forward passes that the refinement of the result is expected to take."""
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"


class SearchCheckpoint(Frozen):
    """The JSON header of an unfinished search."""

    schema_version: Literal[1] = 1
    weights: str
    loader: tuple[int, ...]
    config: StoredConfig
    rank: tuple[int, int]
    """Rank of the process, and the number of ranks."""
    samples: float = 0.0
    """Number of samples that the search had run before the stage that is under way."""
    before: int = 0
    """Number of networks that the record held before this search."""
    record: SavedRecord = SavedRecord()


class SearchProgress:
    """Progress of one search: a context manager, which shows the bar and removes the checkpoint at the
    end. Work is counted in forward passes over all samples.

    Args:
        context: the context of the search, whose record is filled from the checkpoint.
        checkpoint: the file to resume from and to write to; each rank has its own.

    Raises:
        ArtifactError: the checkpoint is of another search.
    """

    def __init__(self, context: SearchContext, checkpoint: str | Path | None) -> None:
        self._context, ranks = context, context.ranks
        own = f"{checkpoint}.{ranks.rank}" if ranks.count > 1 else checkpoint
        self._path = None if own is None else Path(own)
        self._header = SearchCheckpoint(
            weights=context.profile.weights,
            loader=context.profile.order,
            config=context.config,
            rank=(ranks.rank, ranks.count),
            before=len(context.record.networks),
        )
        self.before = self._header.before
        self._resumed: float | None = None
        if self._path is not None and self._path.exists():
            self._resume(self._path)
        self._begun = self._written = self._logged = time.monotonic()
        self._first = self._start = self._begin = self._passes
        self._stage = self._options = self._stages_left = 0
        self._each = self._shown = 0.0
        self._label = "search"

    def __enter__(self) -> Self:
        self._bar: Any = self._context.ranks.bar(total=100, desc="search", unit="%", bar_format=_BAR)
        self._context.ran = self._ran
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._context.ran = _nothing
        if kind is None:
            self._show(1.0)
            if self._path is not None:
                self._path.unlink(missing_ok=True)
        self._bar.close()

    @property
    def _passes(self) -> float:
        return self._context.samples / self._context.held

    def stage(self, state: SearchState, expected: float) -> None:
        """Say that a stage starts from a network.

        Args:
            expected: the forward passes that it is expected to take.
        """
        self._continue()
        limits, now = self._context.limits, self._passes
        # The longest of the stages so far says more than an estimate.
        self._each = max(self._each, now - self._begin) if self._stage else expected
        size, goal = limits.size(state.cost), limits.goal_size if limits.costs else 0.5
        step = self._context.spent.stage
        self._stages_left = max(math.ceil((size - goal) / step - 1e-9) - 1, 0)
        self._start, self._begin, self._options = now, now, 0
        self._stage += 1
        self._label = f"search, stage {self._stage} of about {self._stage + self._stages_left}"
        left = (self._stages_left + 1) * self._each + REFINEMENT
        if self._stage == 1:
            LOGGER.info(
                "the search takes about %.0f forward passes over %d samples", left, self._context.held
            )
        elif self._stage == 2:
            seconds = (time.monotonic() - self._begun) / max(now - self._first, 1e-9) * left
            LOGGER.info("about %s left", _duration(seconds))

    def refine(self) -> None:
        """Say that a network is refined: the start of the next stage, or the result."""
        self._continue()
        self._label, self._start = "search, refinement", self._passes

    def _ran(self) -> None:
        """Show that something was run; write the checkpoint where it is due."""
        self._options += 1
        stage = max(self._each - (self._passes - self._begin), 0.1 * self._each)
        left = self._stages_left * self._each + stage + REFINEMENT
        done = self._passes - self._first
        self._show(done / (done + left))
        now = time.monotonic()
        if self._path is not None and now - self._written >= EVERY:
            self.write()
        if self._bar.disable and now - self._logged >= EVERY and self._context.ranks.leads:
            self._logged = now
            seconds = (now - self._begun) * left / max(done, 1e-9)
            LOGGER.info(
                "%s: %d runs, %.0f %%, about %s left",
                self._label,
                self._options,
                100 * self._shown,
                _duration(seconds),
            )

    def _show(self, share: float) -> None:
        """Move the bar, which never runs backwards."""
        self._shown = max(self._shown, share)
        self._bar.set_description(f"{self._label}, {self._options} runs", refresh=False)
        self._bar.update(100 * self._shown - self._bar.n)

    def write(self) -> None:
        """Write the checkpoint: what was evaluated before the stage under way, and its runs so far."""
        if self._path is None:
            return
        record, tensors = self._context.record.state()
        samples = self._start * self._context.held
        now = {"samples": samples, "before": self.before, "record": record}
        header = self._header.model_copy(update=now)
        write_tensors(self._path, header, tensors)
        self._written = time.monotonic()

    def _resume(self, path: Path) -> None:
        """Load the checkpoint into the record.

        Raises:
            ArtifactError: the checkpoint is of another search.
        """
        header, tensors = read_tensors(path, SearchCheckpoint)
        fresh = {"samples": 0.0, "before": self.before, "record": SavedRecord()}
        if header.model_copy(update=fresh) != self._header:
            raise ArtifactError(
                f"{path} is the checkpoint of another search (of other weights, data, settings or "
                "number of processes): name another file, or remove it"
            )
        context = self._context
        context.record.restore(header.record, tensors)
        context.skipped, context.prices = set(context.record.skipped), dict(context.record.prices)
        self._resumed, self.before = header.samples, header.before

    def _continue(self) -> None:
        """Count the samples of the interrupted search in place of those that led back to its state."""
        if self._resumed is not None:
            context = self._context
            context.evaluator.samples = self._resumed - context.fitter.samples
            self._first, self._resumed = self._passes, None


def _nothing() -> None:
    """Do nothing; the hook of a context whose progress nobody shows."""


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
