"""Levels: networks of one front that share their weights, as a directory and as one module.

levels.json      a `LevelTable`: a row for each level; it carries its own hash
level-00         the original network, as `write_artifact` writes it
level-01, ...    the compressed networks, the cheapest last, each a delta of the original
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rba_compress.artifacts.architecture import Architecture
from rba_compress.artifacts.artifact import WEIGHTS, fitted_tensors, intact, write_artifact
from rba_compress.artifacts.artifact import load as load_network
from rba_compress.artifacts.pareto_front import Point
from rba_compress.artifacts.weights import read_state
from rba_compress.core.errors import ArtifactError, PlanError, WeightsError
from rba_compress.core.io import Sealed, read_sealed, require_vacant, sealed, written_whole
from rba_compress.core.plan import Plan
from rba_compress.core.schema import Frozen
from rba_compress.profiling.profiler import Profile, fingerprint
from rba_compress.reporting.report_data import Summary
from rba_compress.units.splice import splice_shared

SCHEMA = 1
TABLE = "levels.json"


class Level(Frozen):
    """Row of the table: one network."""

    directory: str
    plan: str
    summary: Summary | None
    """Measured cost, divergence and latency; None for the original, with which they are compared."""


class LevelTable(Sealed):
    """Content of levels.json."""

    schema_version: int = SCHEMA
    model: str
    """Class of the original network."""
    levels: tuple[Level, ...]


class Levels(nn.Module):
    """Networks that share their weights, of which one runs: a dial between cost and quality.

    `set_level` may be called from any thread: a call of the module runs on the level that was set when
    it began. What the networks offer beside a call, such as `forward_features`, is that of the level
    that is set.

    Args:
        networks: the original network, then its compressed forms, the cheapest last.
        table: a row for each of them.
    """

    def __init__(self, networks: Sequence[nn.Module], table: Sequence[Level]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.table = tuple(table)
        self._level = 0

    @property
    def level(self) -> int:
        """Level that is set; 0 is the original network."""
        return self._level

    def set_level(self, level: int) -> None:
        """Set the level of all calls that begin from now on.

        Raises:
            PlanError: there is no such level.
        """
        if isinstance(level, bool) or level not in range(len(self.networks)):
            raise PlanError(f"there is no level {level!r}: levels are 0 to {len(self.networks) - 1}")
        self._level = int(level)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.networks[self._level](*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "networks" not in self._modules:
                raise
            return getattr(self.networks[self._level], name)


def write_levels(
    points: Sequence[Point],
    original: nn.Module,
    seen: Profile,
    directory: str | Path,
    *,
    architecture: Architecture | None = None,
) -> None:
    """Write an original network and compressed forms of it to a new directory, all of it or nothing.

    Args:
        points: networks of one search, in any order.
        original: the network that was searched.
        seen: its profile.
        directory: must not exist, or be empty.
        architecture: as in `write_artifact`.

    Raises:
        ArtifactError: there is no point, or the directory is taken or cannot be written.
        PlanError: the points are of another network.
        WeightsError: as `write_artifact`.
    """
    target = Path(directory).absolute()
    if not points:
        raise ArtifactError("there are no levels to save: a front has points where a search took steps")
    if fingerprint(original) != seen.weights:
        raise PlanError(f"the levels were made from another {seen.model}: pass its own original")
    require_vacant(target)
    order = sorted(points, key=lambda point: -point.report.compressed.macs)
    with written_whole(target) as temporary:
        rows = [Level(directory="level-00", plan=str(Plan()), summary=None)]
        write_artifact(
            original,
            Plan(),
            temporary / rows[0].directory,
            example=seen.example,
            original_weights=seen.weights,
            architecture=architecture,
        )
        for k, point in enumerate(order, start=1):
            summary = point.report.summary
            rows.append(Level(directory=f"level-{k:02}", plan=str(point.plan), summary=summary))
            write_artifact(
                splice_shared(original, point.plan, point.tensors, seen.traces),
                point.plan,
                temporary / rows[-1].directory,
                example=seen.example,
                original_weights=seen.weights,
                report=point.report,
                delta=True,
            )
        content = LevelTable(model=seen.model, levels=tuple(rows)).model_dump_json(indent=2)
        (temporary / TABLE).write_bytes(sealed(content + "\n"))


def read_table(root: Path) -> LevelTable:
    """Return the table of a directory of levels.

    Raises:
        ArtifactError: it is missing, of a newer schema, not a table, or not as it was written.
    """
    table = read_sealed(root / TABLE, LevelTable, newest=SCHEMA)
    names = [f"level-{k:02}" for k in range(len(table.levels))]
    if not names or [level.directory for level in table.levels] != names:
        raise ArtifactError(f"{root / TABLE} names other directories than {', '.join(names)}")
    return table


@torch.inference_mode(False)
def load(directory: str | Path, *, original: nn.Module | None = None) -> nn.Module:
    """Return the compressed network of an artefact, in eval mode on the CPU, bit-equal to that saved.

    Args:
        directory: a directory that `save` wrote. Of one with levels, `Levels` is returned: a module
            with `set_level`, whose networks share their weights.
        original: the network that was compressed; not changed. It is needed if the artefact does not
            know how to build the network (see `save`); any network of its architecture will do. It is
            also needed for a delta, which holds the fitted tensors alone and requires the original
            weights.

    Raises:
        ArtifactError: there is no artefact, it is of a newer schema, or a file is missing or not as it
            was written.
        WeightsError: the weights do not fit `original` or are not safetensors, or a delta was made from
            other weights.
        PlanError: `original` does not have the blocks that the plan replaces.
    """
    root = Path(directory)
    if not (root / TABLE).is_file():
        return load_network(root, original=original)
    table = read_table(root)
    first, *others = (root / level.directory for level in table.levels)
    networks = [load_network(first, original=original)]
    weights = fingerprint(networks[0])
    for part in others:
        manifest = intact(part)
        if manifest.original_weights != weights:
            raise WeightsError(f"{part} was made from another {table.model} than {first}")
        tensors = fitted_tensors(manifest.plan, read_state(part / WEIGHTS))
        networks.append(splice_shared(networks[0], manifest.plan, tensors).eval())
    return Levels(networks, table.levels)
