"""The command `rba-compress`.

Exit codes: 0 done; 2 bad usage or input; 3 the budget cannot be reached; 4 a check of what was written
failed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from pydantic import ValidationError
from torch import nn
from torch.utils.data import DataLoader

from rba_compress.api import compare, compress, measure_front
from rba_compress.artifact import Architecture, load_weights, require_vacant
from rba_compress.batches import Batch, read
from rba_compress.calibration import profile
from rba_compress.chains import supports
from rba_compress.demo import free_directory, run_demo
from rba_compress.errors import ArtifactError, BudgetError, ModelError, RBAError
from rba_compress.front import write_front
from rba_compress.images import image_loader
from rba_compress.maps import Kind
from rba_compress.plan import Budget, Config
from rba_compress.planner import search
from rba_compress.report import plot_similarity


@dataclass
class Demo:
    """Compress the embedded digits ViT, save it and load it again; needs no data and no network."""

    out: Path = Path("demo")
    """Directory to write; a number is appended where it exists."""

    def run(self) -> None:
        run_demo(free_directory(self.out))


@dataclass
class _Job:
    model: str
    """Name of a timm architecture."""
    weights: Path
    """Its weights, a safetensors file."""
    images: Path
    """A folder of images, <class>/<image>."""
    out: Path
    """Directory to write; must not exist, or be empty."""
    split: Path | None = None
    """Text file with the images to calibrate on, one path a line; by default all."""
    test_split: Path | None = None
    """Text file with the images to report on; by default calibration images that are held out."""
    num_classes: int | None = None
    """Classes of a fine-tuned model."""
    macs: float | None = None
    """Share of MACs to keep; 0.75 where no limit is given."""
    params: float | None = None
    """Share of parameters to keep."""
    latency: float | None = None
    """Share of the latency of one batch to keep, as measured here; above 1, milliseconds."""
    divergence: float | None = None
    """The highest divergence of the output."""
    agreement: float | None = None
    """The lowest share of equal predictions."""
    accuracy_drop: float | None = None
    """The most that accuracy may fall; 0.01 is one point. Folders are the classes."""
    maps: tuple[Kind, ...] = Config().maps
    """Maps to try beside the identity."""
    shrinks: tuple[float, ...] = Config().shrinks
    """The dial a of the shrunk map (1 - a) I + a T, and of folded corrections."""
    refit: bool = True
    """Re-solve kept layers behind a replaced span where that helps."""
    batch_size: int = 16
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    seed: int = 0
    """Deals the images to fit, choose and confirm."""

    def prepare(self) -> tuple[Architecture, nn.Module]:
        """The dense model, once all that can be checked before is checked."""
        require_vacant(self.out)
        arguments = {} if self.num_classes is None else {"num_classes": self.num_classes}
        architecture = Architecture(name=self.model, arguments=dict(arguments))
        dense = architecture.build()
        load_weights(dense, self.weights)
        _to_device(dense, self.device)
        return architecture, dense

    @property
    def budget(self) -> Budget | None:
        given = {name: getattr(self, name) for name in Budget.model_fields}
        return Budget(**given) if any(v is not None for v in given.values()) else None

    @property
    def config(self) -> Config:
        return Config(maps=self.maps, shrinks=self.shrinks, refit=self.refit, seed=self.seed)

    def loader(self, dense: nn.Module, split: Path | None) -> DataLoader[Any]:
        return image_loader(self.images, split, dense, batch_size=self.batch_size)

    def tests(self, dense: nn.Module, held_out: Iterable[Batch]) -> tuple[list[Batch], str]:
        """The samples to report on, and what they are."""
        if self.test_split is None:
            return list(held_out), "held out of the loader"
        batches = list(read(self.loader(dense, self.test_split)))
        return batches, f"test split {self.test_split.name}"


@dataclass
class Compress(_Job):
    """Compress a timm model on your images and save the slim model."""

    def run(self) -> None:
        architecture, dense = self.prepare()
        result = compress(dense, self.loader(dense, self.split), budget=self.budget, config=self.config)
        report = result.report
        if self.test_split is not None:
            batches, name = self.tests(dense, ())
            report = compare(dense, result.model, batches, result.profile, result.plan, samples=name)
        result.with_report(report).save(self.out, architecture=architecture)
        for profiled in result.profile.chains:
            name = profiled.chain.name.replace(".", "_")
            plot_similarity(profiled).savefig(self.out / f"similarity_{name}.png", dpi=120)
        print(report.table())
        print(f"saved to {self.out}")


@dataclass
class Search(_Job):
    """Search a timm model on your images and save what was found as a delta of its weights."""

    front: bool = False
    """Save the network of every step, with their measures as JSON, CSV and PNG."""

    def run(self) -> None:
        _, dense = self.prepare()
        loader = self.loader(dense, self.split)
        seen = profile(dense, loader, config=self.config)
        found = search(dense, seen, loader, budget=self.budget)
        kept = found if self.front else replace(found, points=found.points[-1:])
        batches, name = self.tests(dense, seen.split(loader).part("confirm"))
        points = measure_front(dense, seen, kept, batches, samples=name)
        write_front(points, dense, seen, self.out)
        for point in points:
            print(f"{point.report.table()}\n")
        print(f"saved to {self.out}; load({str(self.out / 'point-01')!r}, base=model) gives the first")


@dataclass
class Supports:
    """Print the replaceable blocks of a timm architecture, and why others are refused."""

    name: tyro.conf.Positional[str]
    """Name of a timm architecture; it gets random weights."""

    def run(self) -> None:
        model = Architecture(name=self.name).build()
        size = model.pretrained_cfg["input_size"]  # type: ignore[index]
        generator = torch.Generator().manual_seed(0)
        print(supports(model, torch.randn(4, *size, generator=generator)))


def _to_device(model: nn.Module, name: str) -> None:
    try:
        model.to(name)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"the device {name!r} cannot be used: {error}") from error


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Compress, tyro.conf.subcommand("compress")]
    | Annotated[Search, tyro.conf.subcommand("search")]
    | Annotated[Supports, tyro.conf.subcommand("supports")]
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    command = tyro.cli(Command, args=arguments, prog="rba-compress", description=__doc__)
    try:
        command.run()
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        print(f"rba-compress: {where}: {first['msg']}", file=sys.stderr)
        return 2
    except RBAError as error:
        print(f"rba-compress: {error}", file=sys.stderr)
        codes = {BudgetError: 3, ArtifactError: 4}
        return codes.get(type(error), 2)
    except KeyboardInterrupt:
        print("rba-compress: interrupted; no artefact is half-written", file=sys.stderr)
        return 130
    return 0
