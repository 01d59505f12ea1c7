"""The command `rba-compress`.

Exit codes: 0 done; 2 bad usage or input; 3 the budget cannot be reached; 4 a check of what was written
failed.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from pydantic import ValidationError
from torch import nn

from rba_compress.api import compare, compress
from rba_compress.artifact import Architecture, load_weights, require_vacant
from rba_compress.batches import read
from rba_compress.chains import supports
from rba_compress.demo import free_directory, run_demo
from rba_compress.errors import ArtifactError, BudgetError, ModelError, RBAError
from rba_compress.images import image_loader
from rba_compress.maps import Kind
from rba_compress.plan import Budget, Config
from rba_compress.report import plot_similarity


@dataclass
class Demo:
    """Compress the embedded digits ViT, save it and load it again; needs no data and no network."""

    out: Path = Path("demo")
    """Directory to write; a number is appended where it exists."""

    def run(self) -> None:
        run_demo(free_directory(self.out))


@dataclass
class Compress:
    """Compress a timm model on your images and save the slim model."""

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
    """Share of MACs to keep; 0.75 where neither limit is given."""
    params: float | None = None
    """Share of parameters to keep."""
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

    def run(self) -> None:
        require_vacant(self.out)
        arguments = {} if self.num_classes is None else {"num_classes": self.num_classes}
        architecture = Architecture(name=self.model, arguments=dict(arguments))
        dense = architecture.build()
        load_weights(dense, self.weights)
        _to_device(dense, self.device)
        budget = Budget(
            macs=0.75 if self.macs is None and self.params is None else self.macs,
            params=self.params,
        )
        config = Config(maps=self.maps, shrinks=self.shrinks, refit=self.refit, seed=self.seed)
        loader = image_loader(self.images, self.split, dense, batch_size=self.batch_size)
        tests = None
        if self.test_split is not None:
            tests = image_loader(self.images, self.test_split, dense, batch_size=self.batch_size)
        result = compress(dense, loader, budget=budget, config=config)
        report = result.report
        if tests is not None and self.test_split is not None:
            report = compare(
                dense,
                result.model,
                read(tests),
                result.profile,
                result.plan,
                samples=f"test split {self.test_split.name}",
            )
        result.with_report(report).save(self.out, architecture=architecture)
        for profiled in result.profile.chains:
            name = profiled.chain.name.replace(".", "_")
            plot_similarity(profiled).savefig(self.out / f"similarity_{name}.png", dpi=120)
        print(report.table())
        print(f"saved to {self.out}")


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
