"""The command `rba-compress`.

Exit codes: 0 done; 2 bad usage or input; 3 the budget cannot be reached; 4 a check of what was written
failed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from pydantic import ValidationError
from torch import nn
from torch.utils.data import DataLoader

from rba_compress.api import Result, compare, compress, heal, measure_front, reopen
from rba_compress.architecture import Architecture
from rba_compress.artifact import read_manifest
from rba_compress.batches import read
from rba_compress.calibration import profile
from rba_compress.catalogue import network
from rba_compress.chain_profile import ChainProfile
from rba_compress.coverage import tried
from rba_compress.demo import free_directory, run_demo
from rba_compress.errors import ArtifactError, BudgetError, LoaderError, ModelError, RBAError
from rba_compress.files import require_vacant, written_whole
from rba_compress.front import write_front
from rba_compress.images import ImageFiles, image_loader
from rba_compress.maps import Kind
from rba_compress.plan import Budget, Config, Healing
from rba_compress.planner import search
from rba_compress.ranks import current, launched, own_device
from rba_compress.report import plot_similarity
from rba_compress.verification import checks
from rba_compress.weights import load_weights


@dataclass
class Demo:
    """Compress the embedded digits ViT, save it and load it again; needs no data and no network."""

    out: Path = Path("demo")
    """Directory to write; a number is appended where it exists."""

    def run(self) -> None:
        run_demo(free_directory(self.out))


@dataclass(kw_only=True)
class _Images:
    weights: Path
    """The weights of the original network, a safetensors file."""
    images: Path
    """A folder of images, <class>/<image>."""
    out: Path
    """Directory to write; must not exist, or be empty."""
    split: Path | None = None
    """Text file with the images to calibrate on, one path a line; by default all."""
    test_split: Path | None = None
    """Text file with the images to report on; by default calibration images that are held out."""
    batch_size: int = 16
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    def read(self, dense: nn.Module, *, labelled: str = "") -> _Read:
        """The loaders of a network's images.

        Args:
            labelled: what needs labels.

        Raises:
            LoaderError: there are no images, or no labels where they are needed.
        """
        tests = None if self.test_split is None else ImageFiles(self.images, self.test_split, dense)
        files = ImageFiles(self.images, self.split, dense, without=tests.paths if tests else ())
        if labelled and not files.labelled:
            raise LoaderError(
                f"{self.images} has {len(files.labels)} class folders, the model other classes: "
                f"{labelled} needs a folder for each class, in their order"
            )
        return _Read(
            image_loader(files, batch_size=self.batch_size),
            None if tests is None else image_loader(tests, batch_size=self.batch_size),
            "held out of the loader"
            if self.test_split is None
            else f"test split {self.test_split.name}",
        )

    def original(self, architecture: Architecture) -> nn.Module:
        """The network with its weights, on the device.

        Raises:
            RBAError: one of its subclasses, with what is wrong.
        """
        dense = architecture.build()
        load_weights(dense, self.weights)
        _to_device(dense, own_device(self.device))
        return dense


@dataclass
class _Read:
    loader: DataLoader[Any]
    tests: DataLoader[Any] | None
    samples: str
    """What is reported on."""

    def reported(self, result: Result, dense: nn.Module) -> Result:
        """The result with a report on the test images, where there are any."""
        if self.tests is None:
            return result
        seen, batches = result.profile, read(self.tests)
        report = compare(dense, result.model, batches, seen, result.plan, samples=self.samples)
        return result.with_report(report)


@dataclass(kw_only=True)
class _Job(_Images):
    model: str
    """Name of a timm architecture."""
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
    keep_features: bool = False
    """Compute every position, also those that the output does not read."""
    foldable: bool = False
    """Search for a stock network with fewer blocks, which timm loads without this package."""
    seed: int = 0
    """Deals the images to fit, choose and confirm."""

    def prepare(self) -> _Ready:
        """Everything that the work needs, once all that can be checked before it is checked.

        Raises:
            RBAError: one of its subclasses, with what is wrong.
        """
        require_vacant(self.out)
        given = {name: getattr(self, name) for name in Budget.model_fields}
        budget = Budget(**given) if any(v is not None for v in given.values()) else None
        own = ("maps", "shrinks", "refit", "keep_features", "foldable", "seed")
        config = Config(**{name: getattr(self, name) for name in own})
        arguments = {} if self.num_classes is None else {"num_classes": self.num_classes}
        architecture = Architecture(name=self.model, arguments=dict(arguments))
        dense = self.original(architecture)
        labelled = "" if self.accuracy_drop is None else "accuracy_drop"
        return _Ready(architecture, dense, budget, config, self.read(dense, labelled=labelled))


@dataclass
class _Ready:
    architecture: Architecture
    dense: nn.Module
    budget: Budget | None
    config: Config
    data: _Read


@dataclass(kw_only=True)
class Compress(_Job):
    """Compress a timm model on your images and save the slim model."""

    hub: bool = False
    """Write config.json and a model card beside it, for a model hub."""

    def run(self) -> None:
        job = self.prepare()
        result = compress(job.dense, job.data.loader, budget=job.budget, config=job.config)
        result = job.data.reported(result, job.dense)
        result.save(self.out, architecture=job.architecture, fold=self.foldable, hub=self.hub)
        if current().leads:
            _plot(result.profile.chains, self.out)
        print(result.report.table())
        print(f"saved to {self.out}")


@dataclass(kw_only=True)
class Heal(_Images):
    """Train a slim model that was saved towards its original, on your images without labels."""

    directory: tyro.conf.Positional[Path]
    """What `compress` or `save` wrote."""
    healing: tyro.conf.OmitArgPrefixes[Healing] = field(default_factory=Healing)
    checkpoint: Path | None = None
    """Written twice a minute; where it is there, the training goes on from it."""
    hub: bool = False
    """Write config.json and a model card beside it, for a model hub."""

    def run(self) -> None:
        require_vacant(self.out)
        architecture = read_manifest(self.directory).architecture
        if architecture is None:
            raise ArtifactError(
                f"{self.directory} does not know how to build its original: heal it in Python, with "
                "rba_compress.heal"
            )
        dense = self.original(architecture)
        data = self.read(dense, labelled="labels" if self.healing.labels else "")
        slim = reopen(self.directory, data.loader, original=dense)
        healed = heal(
            slim, data.loader, original=dense, healing=self.healing, checkpoint=self.checkpoint
        )
        notes = healed.report.warnings
        healed = data.reported(healed, dense)
        healed.save(self.out, architecture=architecture, hub=self.hub)
        print(healed.report.table(), *notes, f"saved to {self.out}", sep="\n")


@dataclass(kw_only=True)
class Profile(_Job):
    """Profile a timm model on your images and save what was seen, with a picture of each chain."""

    checkpoint: Path | None = None
    """Written twice a minute; where it is there, the profile goes on from it."""

    def run(self) -> None:
        job = self.prepare()
        seen = profile(job.dense, job.data.loader, config=job.config, checkpoint=self.checkpoint)
        if current().leads:
            with written_whole(self.out.absolute()) as folder:
                seen.save(folder / "profile.safetensors")
                _plot(seen.chains, folder)
        print(seen, *seen.warnings, f"saved to {self.out}", sep="\n")


@dataclass(kw_only=True)
class Search(_Job):
    """Search a timm model on your images and save what was found as deltas of its weights."""

    front: bool = False
    """Save the network of every step, not of the last alone."""

    def run(self) -> None:
        job = self.prepare()
        data = job.data
        seen = profile(job.dense, data.loader, config=job.config)
        found = search(job.dense, seen, data.loader, budget=job.budget)
        kept = found if self.front else replace(found, points=found.points[-1:])
        if not kept.points:
            print("nothing was replaced: the network meets its budget, or no step keeps within it")
            return
        batches = seen.split(data.loader).part("confirm") if data.tests is None else read(data.tests)
        points = measure_front(job.dense, seen, kept, list(batches), samples=data.samples)
        if current().leads:
            write_front(points, job.dense, seen, self.out)
        for point in points:
            print(f"{point.report.table()}\n")
        print(f"saved to {self.out}; load({str(self.out / 'point-01')!r}, base=model) gives the first")


@dataclass
class Supports:
    """Print the replaceable blocks of a network, why others are refused, and what comes of it: one
    block replaced, saved, read back and exported.
    """

    name: tyro.conf.Positional[str]
    """Any architecture of timm, or transformers/bert, torchvision/resnet18, nn/encoder and the like; it
    gets random weights."""
    onnx: bool = True
    """Export it, which takes most of the time."""

    def run(self) -> None:
        support, row = tried(network(self.name), onnx=self.onnx)
        print(f"{support}\n{row}")


@dataclass
class Verify:
    """Check every file of an artefact again: hashes, reload, parity; exits 4 on the first lie."""

    directory: tyro.conf.Positional[Path]
    """What `compress` or `save` wrote, with or without exported files."""

    def run(self) -> None:
        for line in checks(self.directory):
            print(line)


def _plot(chains: Sequence[ChainProfile], folder: Path) -> None:
    for profiled in chains:
        name = profiled.chain.name.replace(".", "_")
        plot_similarity(profiled).savefig(folder / f"similarity_{name}.png", dpi=120)


def _to_device(model: nn.Module, name: str) -> None:
    try:
        model.to(name)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"the device {name!r} cannot be used: {error}") from error


Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Compress, tyro.conf.subcommand("compress")]
    | Annotated[Heal, tyro.conf.subcommand("heal")]
    | Annotated[Profile, tyro.conf.subcommand("profile")]
    | Annotated[Search, tyro.conf.subcommand("search")]
    | Annotated[Supports, tyro.conf.subcommand("supports")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    command = tyro.cli(Command, args=arguments, prog="rba-compress", description=__doc__)
    try:
        # Of several processes the first one alone prints.
        with launched() as ranks, nullcontext() if ranks.leads else redirect_stdout(None):
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
