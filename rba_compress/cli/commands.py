"""Subcommands of `rba-compress`: their options, and their work.

A command prints its progress for people, and returns the one value that `--json` prints, with the same
facts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from pydantic import JsonValue
from torch import nn

from rba_compress.api import Result, compress, heal, measure_front, reopen
from rba_compress.artifacts.architecture import Architecture
from rba_compress.artifacts.artifact import REPORT, load, read_manifest, read_report
from rba_compress.artifacts.gguf_export import GgufType, export_gguf
from rba_compress.artifacts.onnx_export import export_onnx, export_pt2
from rba_compress.artifacts.pareto_front import write_front
from rba_compress.artifacts.verification import checks
from rba_compress.artifacts.weights import load_weights
from rba_compress.cli.catalogue import network
from rba_compress.cli.coverage import tried
from rba_compress.cli.demo import free_directory, run_demo
from rba_compress.cli.images import ImageFiles, image_loader
from rba_compress.cli.texts import PREFIX, TextModel, documents, perplexity, stretch
from rba_compress.core.batch import Batch
from rba_compress.core.config import Budget, Config, Effort, Healing
from rba_compress.core.distributed import current, own_device
from rba_compress.core.errors import ArtifactError, LoaderError, ModelError, WeightsError
from rba_compress.core.io import require_intact, require_vacant, written_whole
from rba_compress.core.loader import read
from rba_compress.core.map_spec import Kind
from rba_compress.planning.search import search
from rba_compress.profiling.chain_statistics import ChainProfile
from rba_compress.profiling.latency import benchmark
from rba_compress.profiling.profiler import Profile as Profiled
from rba_compress.profiling.profiler import profile
from rba_compress.reporting.comparison import measured
from rba_compress.reporting.plots import plot_similarity
from rba_compress.reporting.report import PAGE
from rba_compress.reporting.report import Report as Measured

Say = Callable[[str], None]
"""Function that prints a line for people, or nothing with `--json`."""


@dataclass(kw_only=True)
class Command:
    json: bool = False
    """Print one JSON value and nothing else."""
    debug: bool = False
    """Print the traceback of an error."""

    def run(self, say: Say) -> JsonValue:
        """Run the command and return the value that `--json` prints."""
        raise NotImplementedError


@dataclass(kw_only=True)
class Demo(Command):
    """Compress the embedded digits ViT, save it and load it again; needs no data and no network."""

    out: Path = Path("demo")
    """Directory to write; a number is appended if it exists."""

    def run(self, say: Say) -> JsonValue:
        out = free_directory(self.out)
        return _told(run_demo(out, say=say), out)


@dataclass(kw_only=True)
class _Data(Command):
    weights: Path | None = None
    """Safetensors file with the weights of the original network, a timm model."""
    images: Path | None = None
    """Folder of images, <class>/<image>, for a timm model."""
    out: Path
    """Directory to write; must not exist, or be empty."""
    split: Path | None = None
    """Text file with the images to calibrate on, one path a line; by default all."""
    test_split: Path | None = None
    """Text file with the images to report on; by default calibration images that are held out."""
    text: Path | None = None
    """Text file, for a model hf:DIR: one text for a causal model, a document a line for others."""
    test_text: Path | None = None
    """Text file to report on; by default parts of the text that are held out."""
    length: int = 512
    """Tokens of a sequence, or of a document at most."""
    batch_size: int = 16
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    def read(self, original: nn.Module, *, labelled: str = "") -> _Read:
        """Return the loaders of a network's images.

        Args:
            labelled: the name of the option that needs labels.

        Raises:
            LoaderError: there are no images, or no labels where they are needed.
        """
        if self.images is None:
            raise LoaderError("a timm model is compressed on --images, a folder <class>/<image>")
        tests = None if self.test_split is None else ImageFiles(self.images, self.test_split, original)
        files = ImageFiles(self.images, self.split, original, without=tests.paths if tests else ())
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
        """Return the network with its weights, on the device.

        Raises:
            RBAError: one of its subclasses, with what is wrong.
        """
        if self.weights is None:
            raise WeightsError(f"{architecture.name} needs --weights, a file of safetensors")
        original = architecture.build()
        load_weights(original, self.weights)
        _to_device(original, own_device(self.device))
        return original

    def require_unset(self, name: str, kind: str, *options: str) -> None:
        """Raise LoaderError where options are given that the model's kind does not have."""
        given = [f"--{each.replace('_', '-')}" for each in options if getattr(self, each) is not None]
        if given:
            raise LoaderError(f"{name} is {kind}: leave out {', '.join(given)}")

    def texts(self, name: str, *others: str) -> tuple[TextModel, _Read]:
        """Return a model hf:DIR on the device, and the loaders of its text.

        Args:
            others: further options that such a model does not have.

        Raises:
            ModelError: as `TextModel.read`.
            LoaderError: there is no text, it is too short, or options for images are given.
        """
        images = ("weights", "images", "split", "test_split")
        self.require_unset(name, "read with a text", *images, *others)
        model = TextModel.read(_directory(name))
        _to_device(model.network, own_device(self.device))
        if self.text is None:
            raise LoaderError(f"a model {PREFIX}DIR is compressed on --text FILE")
        how = {"length": self.length, "batch_size": self.batch_size}
        loader = model.loader(self.text, **how)
        if self.test_text is None:
            return model, _Read(loader, None, "held out of the text", model)
        tests = model.loader(self.test_text, **how)
        return model, _Read(loader, tests, f"test text {self.test_text.name}", model)


@dataclass
class _Read:
    loader: Iterable[Any]
    tests: Iterable[Any] | None
    samples: str
    """Description of the samples that are reported on."""
    texts: TextModel | None = None

    def reported_on(self, seen: Profiled) -> Iterable[Batch]:
        """Return the batches that are reported on: the test data, or what was held out."""
        return (
            seen.split(self.loader).part("test") if self.tests is None else read(self.tests, seen.form)
        )

    def reported(self, result: Result, original: nn.Module) -> Result:
        """Return the result with a report on the test images, if there are any."""
        if self.tests is None:
            return result
        seen = result.profile
        batches = self.reported_on(seen)
        report = measured(original, result.model, batches, seen, result.plan, samples=self.samples)
        return result.with_report(report)

    def delivered(
        self, result: Result, original: nn.Module, out: Path, say: Say
    ) -> dict[str, JsonValue]:
        """Write what transformers reads beside a network that was saved; say and return the perplexity
        of a causal model, before and after, on what is reported on.
        """
        if self.texts is None:
            return {}
        if current().leads:
            self.texts.save(out)
        if not self.texts.causal:
            return {}
        batches = list(self.reported_on(result.profile))
        before, after = (perplexity(model, batches) for model in (original, result.model))
        say(f"perplexity {before:.2f} before, {after:.2f} after")
        return {"perplexity": [before, after]}


@dataclass(kw_only=True)
class _Job(_Data):
    model: str
    """Name of a timm architecture, or hf:DIR for a model of transformers in a directory or a hub."""
    num_classes: int | None = None
    """Number of classes of a fine-tuned model."""
    macs: float | None = None
    """Share of MACs to keep; 0.75 if no limit is given."""
    params: float | None = None
    """Share of parameters to keep."""
    latency: float | None = None
    """Share of the latency of one batch to keep, as measured here; above 1, milliseconds."""
    divergence: float | None = None
    """Highest divergence of the output."""
    agreement: float | None = None
    """Lowest share of equal predictions."""
    accuracy_drop: float | None = None
    """Largest loss of accuracy; 0.01 is one point. Folders are the classes."""
    maps: tuple[Kind, ...] = Config().maps
    """Kinds of maps to try beside the identity."""
    shrinks: tuple[float, ...] = Config().shrinks
    """Values of a to try in the shrunk map (1 - a) I + a T, and in folded corrections."""
    refit: bool = True
    """Re-solve kept layers behind a replaced span if that helps."""
    window: int | None = None
    """The longest span of blocks that is replaced at once; bounds memory and time of deep networks."""
    keep_features: bool = False
    """Compute every position, also those that the output does not read."""
    effort: Effort = "default"
    """Work that the search does: quick tries fewer options on fewer images, thorough more on more."""
    deploy: Literal["any", "gguf"] = "any"
    """Runtime: with gguf, search only for what llama.cpp can run."""
    stock: bool = False
    """Search for a stock network of fewer, narrower blocks, which timm loads without this package."""
    seed: int = 0
    """Seed that deals the images to fit, validation and test samples."""
    checkpoint: Path | None = None
    """File that is written twice a minute; if it exists, the command goes on from it."""

    def prepare(self) -> _Ready:
        """Check all that can be checked beforehand, and return everything that the work needs.

        Raises:
            RBAError: one of its subclasses, with what is wrong.
        """
        require_vacant(self.out)
        given = {name: getattr(self, name, None) for name in Budget.model_fields}
        budget = Budget(**given) if any(v is not None for v in given.values()) else None
        own = (
            "maps",
            "shrinks",
            "refit",
            "window",
            "keep_features",
            "effort",
            "stock",
            "deploy",
            "seed",
        )
        config = Config(**{name: getattr(self, name) for name in own})
        if self.model.startswith(PREFIX):
            texts, data = self.texts(self.model, "num_classes", "accuracy_drop")
            if texts.causal:
                sequences = sum(len(batch["input_ids"]) for batch in data.loader)
                config = config.model_copy(update={"stretch": stretch(sequences)})
            return _Ready(None, texts.network, budget, config, data)
        self.require_unset(self.model, "read with images", "text", "test_text")
        arguments = {} if self.num_classes is None else {"num_classes": self.num_classes}
        architecture = Architecture(name=self.model, arguments=dict(arguments))
        original = self.original(architecture)
        labelled = "" if self.accuracy_drop is None else "accuracy_drop"
        return _Ready(architecture, original, budget, config, self.read(original, labelled=labelled))


@dataclass
class _Ready:
    architecture: Architecture | None
    original: nn.Module
    budget: Budget | None
    config: Config
    data: _Read


@dataclass(kw_only=True)
class Compress(_Job):
    """Compress a model on your images or text and save the compressed model."""

    hub: bool = False
    """Also write config.json and a model card, for a model hub."""
    html: bool = False
    """Also write report.html, which shows the images that changed most."""

    def run(self, say: Say) -> JsonValue:
        job = self.prepare()
        result = compress(
            job.original,
            job.data.loader,
            budget=job.budget,
            config=job.config,
            checkpoint=self.checkpoint,
        )
        result = job.data.reported(result, job.original)
        result.save(self.out, architecture=job.architecture, fold=self.stock, hub=self.hub)
        if current().leads:
            _plot(result.profile.chains, self.out)
            if self.html:
                result.report.to_html(self.out / PAGE)
        say(result.report.table())
        told = _told(result.report, self.out) | job.data.delivered(result, job.original, self.out, say)
        say(f"saved to {self.out}")
        return told


@dataclass(kw_only=True)
class Heal(_Data):
    """Train a saved compressed model towards its original, on your images or text without labels."""

    directory: tyro.conf.Positional[Path]
    """Directory that `compress` or `save` wrote."""
    model: str | None = None
    """The original, hf:DIR, of a model of transformers."""
    healing: tyro.conf.OmitArgPrefixes[Healing] = field(default_factory=Healing)
    checkpoint: Path | None = None
    """File that is written twice a minute; if it exists, training resumes from it."""
    hub: bool = False
    """Also write config.json and a model card, for a model hub."""

    def run(self, say: Say) -> JsonValue:
        require_vacant(self.out)
        architecture = read_manifest(self.directory).architecture
        if self.model is not None:
            texts, data = self.texts(self.model)
            original = texts.network
        elif architecture is None or architecture.library == "transformers":
            raise ArtifactError(
                f"{self.directory} does not hold its original: pass --model {PREFIX}DIR, or heal it in "
                "Python, with rba_compress.heal"
            )
        else:
            self.require_unset(architecture.name, "read with images", "text", "test_text")
            original = self.original(architecture)
            data = self.read(original, labelled="labels" if self.healing.labels else "")
        compressed = reopen(self.directory, data.loader, original=original)
        healed = heal(
            compressed, data.loader, original=original, healing=self.healing, checkpoint=self.checkpoint
        )
        notes = healed.report.warnings
        healed = data.reported(healed, original)
        healed.save(self.out, architecture=architecture, hub=self.hub)
        say("\n".join([healed.report.table(), *notes]))
        told = _told(healed.report, self.out) | data.delivered(healed, original, self.out, say)
        say(f"saved to {self.out}")
        return told


@dataclass(kw_only=True)
class Profile(_Job):
    """Profile a model on your images or text and save the profile, with a picture of each chain."""

    def run(self, say: Say) -> JsonValue:
        job = self.prepare()
        seen = profile(job.original, job.data.loader, config=job.config, checkpoint=self.checkpoint)
        if current().leads:
            with written_whole(self.out.absolute()) as folder:
                seen.save(folder / "profile.safetensors")
                _plot(seen.chains, folder)
        say("\n".join([str(seen), *seen.warnings, f"saved to {self.out}"]))
        return {
            "out": str(self.out),
            "samples": seen.samples,
            "chains": [
                {
                    "name": p.chain.name,
                    "blocks": len(p.chain),
                    "block_redundancy": [*p.block_redundancy],
                }
                for p in seen.chains
            ],
            "warnings": [*seen.warnings],
        }


@dataclass(kw_only=True)
class Search(_Job):
    """Search a model on your images or text and save the networks found as deltas of its weights."""

    front: bool = False
    """Save the front of all networks that were evaluated, not only the last one."""

    def run(self, say: Say) -> JsonValue:
        job = self.prepare()
        data = job.data
        first = self.checkpoint and Path(f"{self.checkpoint}.profile")
        seen = profile(job.original, data.loader, config=job.config, checkpoint=first)
        found = search(job.original, seen, data.loader, budget=job.budget, checkpoint=self.checkpoint)
        kept = found if self.front else replace(found, points=found.points[-1:])
        if not kept.points:
            say("nothing was replaced: the network meets its budget, or no step keeps within it")
            return {"out": None, "front": []}
        batches = list(data.reported_on(seen))
        points = measure_front(job.original, seen, kept, batches, samples=data.samples)
        if current().leads:
            write_front(points, job.original, seen, self.out)
        for point in points:
            say(f"{point.report.table()}\n")
        say(
            f"saved to {self.out}; load({str(self.out / 'point-01')!r}, original=model) gives the first"
        )
        return {"out": str(self.out), "front": [p.report.summary.model_dump() for p in points]}


@dataclass(kw_only=True)
class Supports(Command):
    """Print the replaceable blocks of a network and why others are refused, then try every step: one
    block is replaced, saved, read back and exported.
    """

    name: tyro.conf.Positional[str]
    """Any architecture of timm, or one such as transformers/bert, torchvision/resnet18 or nn/encoder;
    the network gets random weights."""
    onnx: bool = True
    """Export the network, which takes most of the time."""

    def run(self, say: Say) -> JsonValue:
        support, row = tried(network(self.name), onnx=self.onnx)
        say(f"{support}\n{row}")
        return {
            **row.model_dump(mode="json"),
            "found": [{"name": chain.name, "blocks": len(chain)} for chain in support.chains],
            "refusals": [refusal.model_dump(mode="json") for refusal in support.refusals],
        }


@dataclass(kw_only=True)
class Verify(Command):
    """Check an artefact's hashes, reload and parity; exit with code 4 at the first check that fails."""

    directory: tyro.conf.Positional[Path]
    """Directory that `compress` or `save` wrote, with or without exported files."""

    def run(self, say: Say) -> JsonValue:
        held: list[JsonValue] = []
        for line in checks(self.directory):
            say(line)
            held.append(line)
        return {"directory": str(self.directory), "held": held}


@dataclass(kw_only=True)
class Export(Command):
    """Write a saved compressed model as ONNX (or .pt2) with a certificate that it computes the same."""

    directory: tyro.conf.Positional[Path]
    """Directory that `compress` or `save` wrote."""
    inputs: Path
    """Real inputs to compare on: a folder <class>/<image>, a .npy file of the network's inputs, or a
    .txt file for a model of transformers."""
    to: Literal["onnx", "pt2", "gguf"] | None = None
    """Format, by default that of the file's name: ONNX, a program of torch.export, or llama.cpp's."""
    out: Path | None = None
    """File to write; by default model.onnx, .pt2 or .gguf in the directory."""
    type: GgufType = "f16"
    """Type of the matrices of a GGUF file."""
    samples: int = 32
    """Number of inputs to take."""
    length: int = 128
    """Tokens of each sequence of a text."""

    def run(self, say: Say) -> JsonValue:
        named = self.out.suffix.removeprefix(".") if self.out is not None else ""
        to = self.to or (named if named in ("pt2", "gguf") else "onnx")
        out = self.out or self.directory / f"model.{to}"
        if to == "gguf":
            return self._gguf(out, say)
        export = export_pt2 if to == "pt2" else export_onnx
        certificate = export(self.directory, out, self._example())
        agreement = [p.argmax_agreement for p in certificate.parity if p.argmax_agreement is not None]
        worst, latency = max(p.max_rel for p in certificate.parity), certificate.latency
        say(
            f"{out}: {certificate.compressed.bytes:,} bytes, {worst:.1e} from PyTorch at the most"
            + (f", latency {latency.ratio:.3f} of the original network's" if latency else "")
        )
        return {
            "file": str(out),
            "bytes": certificate.compressed.bytes,
            "max_rel": worst,
            "argmax_agreement": min(agreement, default=None),
            "latency_ratio": latency.ratio if latency else None,
        }

    def _gguf(self, out: Path, say: Say) -> JsonValue:
        if self.inputs.suffix != ".txt":
            raise LoaderError(f"a GGUF file is compared on a text: {self.inputs} is no .txt file")
        found = export_gguf(self.directory, out, documents(self.inputs, self.samples), type=self.type)
        say(
            f"{out}: {found.bytes:,} bytes, {found.type}, architecture {found.architecture}; "
            f"log-probabilities {found.max_gap:.1e} from PyTorch at the most, {found.greedy_equal} of "
            f"{found.greedy} generated tokens equal, {found.tokens_per_second:.0f} tokens a second "
            f"({found.tokens_per_second_pytorch:.0f} in PyTorch)"
        )
        return found.model_dump(mode="json")

    def _example(self) -> Any:
        """Return the first samples of the inputs.

        Raises:
            LoaderError: the inputs cannot be read.
        """
        if self.inputs.suffix == ".npy":
            try:
                return torch.from_numpy(np.load(self.inputs, allow_pickle=False)[: self.samples])
            except (OSError, ValueError) as error:
                raise LoaderError(f"{self.inputs} is not a readable .npy file: {error}") from error
        if self.inputs.suffix == ".txt":
            model = TextModel.compressed(self.directory)
            return model.loader(self.inputs, length=self.length, batch_size=self.samples)[0]
        files = ImageFiles(self.inputs, None, load(self.directory))
        items = (files[k] for k in range(min(self.samples, len(files))))
        return torch.stack([item[0] if isinstance(item, tuple) else item for item in items])


@dataclass(kw_only=True)
class Report(Command):
    """Write the report of a saved compressed model as one HTML page."""

    directory: tyro.conf.Positional[Path]
    """Directory that `compress` or `save` wrote."""
    out: Path | None = None
    """Page to write; by default report.html in the directory."""

    def run(self, say: Say) -> JsonValue:
        out = self.out or self.directory / PAGE
        digest, found = (
            read_manifest(self.directory).sha256.get(REPORT),
            read_report(self.directory),
        )
        if digest is not None:
            require_intact(self.directory, REPORT, digest)
        if found is None:
            raise ArtifactError(f"{self.directory} has no {REPORT}: save a result, not a network alone")
        found.to_html(out)
        say(f"{found.table()}\nwritten to {out}")
        return _told(found, out)


@dataclass(kw_only=True)
class Bench(Command):
    """Time a saved compressed model and its original in pairs, on random inputs like the real ones."""

    directory: tyro.conf.Positional[Path]
    """Directory that `compress` or `save` wrote."""
    batch_sizes: tuple[int, ...] = (1, 32)
    seconds: float = 5.0
    """Seconds of timing for each batch size."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    compile: bool = False
    """Time both through torch.compile."""

    def run(self, say: Say) -> JsonValue:
        manifest = read_manifest(self.directory)
        if manifest.architecture is None or manifest.probe is None:
            raise ArtifactError(
                f"{self.directory} does not know how to build its original, or what that takes: time "
                "both in Python, with rba_compress.benchmark"
            )
        original, compressed = manifest.architecture.build(), load(self.directory)
        for built in (original, compressed):
            _to_device(built, self.device)
            if self.compile:
                built.compile()
        rows: dict[str, JsonValue] = {}
        for size in self.batch_sizes:
            if size < 1:
                raise LoaderError(f"a batch of {size} samples")
            timed = benchmark(original, compressed, manifest.probe.draw(size), seconds=self.seconds)
            rows[str(size)] = timed.model_dump(mode="json")
            say(
                f"batch {size}: {timed.original_ms:.2f} ms before, {timed.compressed_ms:.2f} after, "
                f"ratio {timed.ratio:.3f}, quartiles {timed.ratio_low:.3f} to {timed.ratio_high:.3f} "
                f"of {timed.pairs} pairs on {timed.device}"
            )
        return rows


@dataclass(kw_only=True)
class Generate(Command):
    """Continue a prompt with a language model and with the compressed one."""

    directory: tyro.conf.Positional[Path]
    """Directory that `compress` wrote."""
    model: str
    """The original, hf:DIR."""
    prompt: str
    """Text to continue."""
    tokens: int = 64
    """Tokens to generate at most, each the likeliest one."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"

    def run(self, say: Say) -> JsonValue:
        original = TextModel.read(_directory(self.model))
        found: dict[str, JsonValue] = {}
        for name, model in (
            ("original", original),
            ("compressed", TextModel.compressed(self.directory)),
        ):
            _to_device(model.network, self.device)
            found[name] = model.generated(self.prompt, tokens=self.tokens)
            say(f"{name}: {found[name]}")
        return found


def _directory(model: str) -> str:
    """Return the directory or the hub's name of hf:DIR.

    Raises:
        ModelError: it is something else.
    """
    if not model.startswith(PREFIX):
        raise ModelError(f"--model {model}: an original of transformers is given as {PREFIX}DIR")
    return model.removeprefix(PREFIX)


def _told(report: Measured, out: Path) -> dict[str, JsonValue]:
    """Return the JSON value on a network that was made."""
    told: dict[str, JsonValue] = {"out": str(out), **report.summary.model_dump(mode="json")}
    return told | {"notes": [*report.notes], "warnings": [*report.warnings]}


def _plot(chains: Sequence[ChainProfile], folder: Path) -> None:
    for profiled in chains:
        name = profiled.chain.name.replace(".", "_")
        plot_similarity(profiled).savefig(folder / f"similarity_{name}.png", dpi=120)


def _to_device(model: nn.Module, name: str) -> None:
    try:
        model.to(name)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"the device {name!r} cannot be used: {error}") from error
