"""Subcommands of `rba-compress`: what each does with its options.

A command prints its progress for people, and returns the one value that `--json` prints, with the same
facts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import JsonValue
from torch import nn

from rba_compress.api import Result, compress, heal, measure_front, reopen
from rba_compress.artifacts.architecture import Architecture
from rba_compress.artifacts.artifact import REPORT, load, read_manifest, read_report
from rba_compress.artifacts.gguf_export import export_gguf
from rba_compress.artifacts.onnx_export import export_onnx, export_pt2
from rba_compress.artifacts.pareto_front import write_front
from rba_compress.artifacts.verification import checks
from rba_compress.artifacts.weights import load_weights
from rba_compress.cli.catalogue import network
from rba_compress.cli.coverage import tried
from rba_compress.cli.demo import free_directory, run_demo
from rba_compress.cli.images import ImageFiles, ImageModel, image_loader
from rba_compress.cli.options import (
    PREFIX,
    Bench,
    Command,
    Compress,
    Demo,
    Evaluate,
    Export,
    Generate,
    Heal,
    Job,
    Profile,
    Report,
    Search,
    Source,
    Supports,
    Verify,
    hub_name,
)
from rba_compress.cli.texts import TextModel, documents, perplexity, stretch
from rba_compress.core.batch import Batch
from rba_compress.core.config import Budget, Config
from rba_compress.core.distributed import current, own_device
from rba_compress.core.errors import ArtifactError, LoaderError, ModelError
from rba_compress.core.io import require_intact, written_whole
from rba_compress.core.loader import read
from rba_compress.planning.search import search
from rba_compress.profiling.chain_statistics import ChainProfile
from rba_compress.profiling.latency import benchmark
from rba_compress.profiling.profiler import Profile as Profiled
from rba_compress.profiling.profiler import profile
from rba_compress.reporting.comparison import compare, measured
from rba_compress.reporting.plots import plot_similarity
from rba_compress.reporting.report import PAGE
from rba_compress.reporting.report import Report as Measured

Say = Callable[[str], None]
"""Function that prints a line for people, or nothing with `--json`."""


@singledispatch
def run(options: Command, say: Say) -> JsonValue:
    """Run the command of some options and return the value that `--json` prints."""
    raise NotImplementedError(type(options).__name__)


def _images(
    options: Source, original: nn.Module, *, labelled: str = "", model: ImageModel | None = None
) -> _Read:
    """Return the loaders of a network's images.

    Args:
        labelled: the name of the option that needs labels.
        model: the model of transformers that the network is of.

    Raises:
        LoaderError: there are no labels where they are needed.
    """
    assert options.images is not None
    transform = None if model is None else model.transform
    test_split, tests = getattr(options, "test_split", None), None
    if test_split is not None:
        tests = ImageFiles(options.images, test_split, original, transform=transform)
    without = tests.paths if tests else ()
    files = ImageFiles(options.images, options.split, original, without=without, transform=transform)
    if labelled and not files.labelled:
        raise LoaderError(
            f"{options.images} has {len(files.labels)} class folders, the model other classes: "
            f"{labelled} needs a folder for each class, in their order"
        )
    return _Read(
        image_loader(files, batch_size=options.batch_size),
        None if tests is None else image_loader(tests, batch_size=options.batch_size),
        "held out of the loader" if test_split is None else f"test split {test_split.name}",
        model,
    )


def _original(options: Source, architecture: Architecture) -> nn.Module:
    """Return the network with its weights, on the device.

    Raises:
        RBAError: one of its subclasses, with what is wrong.
    """
    assert options.weights is not None
    original = architecture.build()
    load_weights(original, options.weights)
    _to_device(original, _device(options.device))
    return original


def _hub(options: Source, name: str, *, labelled: str = "") -> tuple[nn.Module, _Read]:
    """Return the network of a model hf:DIR on the device, and the loaders of its text or images.

    Args:
        labelled: as in `_images`.

    Raises:
        ModelError: as `read_network`.
        LoaderError: the text is too short, or what the model is read with is missing.
    """
    if options.text is None:
        images = ImageModel.read(hub_name(name))
        _to_device(images.network, _device(options.device))
        return images.network, _images(options, images.network, labelled=labelled, model=images)
    model = TextModel.read(hub_name(name))
    _to_device(model.network, _device(options.device))
    how = {"length": options.length, "batch_size": options.batch_size}
    loader, test_text = model.loader(options.text, **how), getattr(options, "test_text", None)
    if test_text is None:
        return model.network, _Read(loader, None, "held out of the text", model)
    tests = model.loader(test_text, **how)
    return model.network, _Read(loader, tests, f"test text {test_text.name}", model)


@dataclass
class _Read:
    loader: Iterable[Any]
    tests: Iterable[Any] | None
    samples: str
    """Description of the samples that are reported on."""
    model: TextModel | ImageModel | None = None
    """Model of transformers."""

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
        if self.model is not None and current().leads:
            self.model.save(out)
        return self.perplexity(original, result.model, self.reported_on(result.profile), say)

    def perplexity(
        self, original: nn.Module, compressed: nn.Module, batches: Iterable[Batch], say: Say
    ) -> dict[str, JsonValue]:
        """Say and return the perplexity of a causal model before and after; nothing for others."""
        if not isinstance(self.model, TextModel) or not self.model.causal:
            return {}
        held = list(batches)
        before, after = (perplexity(model, held) for model in (original, compressed))
        say(f"perplexity {before:.2f} before, {after:.2f} after")
        return {"perplexity": [before, after]}


@dataclass
class _Ready:
    architecture: Architecture | None
    original: nn.Module
    budget: Budget | None
    config: Config
    data: _Read


def _prepared(options: Job) -> _Ready:
    """Return everything that the work needs.

    Raises:
        RBAError: one of its subclasses, with what is wrong.
    """
    budget, config = options.budget(), options.config()
    labelled = "" if options.accuracy_drop is None else "accuracy_drop"
    if options.model.startswith(PREFIX):
        original, data = _hub(options, options.model, labelled=labelled)
        if isinstance(data.model, TextModel) and data.model.causal:
            sequences = sum(len(batch["input_ids"]) for batch in data.loader)
            config = config.model_copy(update={"stretch": stretch(sequences)})
        return _Ready(None, original, budget, config, data)
    arguments = {} if options.num_classes is None else {"num_classes": options.num_classes}
    architecture = Architecture(name=options.model, arguments=dict(arguments))
    original = _original(options, architecture)
    return _Ready(architecture, original, budget, config, _images(options, original, labelled=labelled))


@run.register
def _demo(options: Demo, say: Say) -> JsonValue:
    out = free_directory(options.out)
    return _told(run_demo(out, say=say), out)


@run.register
def _compress(options: Compress, say: Say) -> JsonValue:
    job = _prepared(options)
    result = compress(
        job.original,
        job.data.loader,
        budget=job.budget,
        config=job.config,
        spans=options.by_hand(),
        checkpoint=options.checkpoint,
    )
    result = job.data.reported(result, job.original)
    result.save(options.out, architecture=job.architecture, fold=options.stock, hub=options.hub)
    if current().leads:
        _plot(result.profile.chains, options.out)
        if options.html:
            result.report.to_html(options.out / PAGE)
    say(result.report.table())
    told = _told(result.report, options.out) | job.data.delivered(
        result, job.original, options.out, say
    )
    say(f"saved to {options.out}")
    return told


def _saved(
    options: Heal | Evaluate | Export, *, labelled: str = ""
) -> tuple[Architecture | None, nn.Module, _Read]:
    """Return the architecture of a saved model, its original on the device, and the loaders.

    Args:
        labelled: as in `_images`.

    Raises:
        ArtifactError: the directory does not say how to build the original, and no option does.
        RBAError: as `_hub` and `_images`.
    """
    architecture = read_manifest(options.directory).architecture
    if options.model is not None:
        options.require_source(options.model)
        return architecture, *_hub(options, options.model, labelled=labelled)
    if architecture is None or architecture.library != "timm":
        raise ArtifactError(
            f"{options.directory} does not hold its original: pass --model {PREFIX}DIR, or go on in "
            "Python, with rba_compress.heal and rba_compress.compare"
        )
    options.require_source(architecture.name)
    original = _original(options, architecture)
    return architecture, original, _images(options, original, labelled=labelled)


@run.register
def _heal(options: Heal, say: Say) -> JsonValue:
    architecture, original, data = _saved(options, labelled="labels" if options.healing.labels else "")
    compressed = reopen(options.directory, data.loader, original=original)
    healed = heal(
        compressed,
        data.loader,
        original=original,
        healing=options.healing,
        checkpoint=options.checkpoint,
    )
    notes = healed.report.warnings
    healed = data.reported(healed, original)
    healed.save(options.out, architecture=architecture, hub=options.hub)
    say("\n".join([healed.report.table(), *notes]))
    told = _told(healed.report, options.out) | data.delivered(healed, original, options.out, say)
    say(f"saved to {options.out}")
    return told


@run.register
def _evaluate(options: Evaluate, say: Say) -> JsonValue:
    architecture, original, data = _saved(options)
    compressed = load(options.directory, original=None if architecture else original)
    _to_device(compressed, _device(options.device))
    report = compare(original, compressed, data.loader)
    said = report.model_copy(update={"samples": str(options.text or options.images)})
    say(said.table())
    found = data.perplexity(original, compressed, read(data.loader), say)
    return _told(said, options.directory) | found


@run.register
def _profile(options: Profile, say: Say) -> JsonValue:
    job = _prepared(options)
    seen = profile(job.original, job.data.loader, config=job.config, checkpoint=options.checkpoint)
    if current().leads:
        with written_whole(options.out.absolute()) as folder:
            seen.save(folder / "profile.safetensors")
            _plot(seen.chains, folder)
    say("\n".join([str(seen), *seen.warnings, f"saved to {options.out}"]))
    return {
        "out": str(options.out),
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


@run.register
def _search(options: Search, say: Say) -> JsonValue:
    job = _prepared(options)
    data = job.data
    own = options.checkpoint and Path(f"{options.checkpoint}.profile")
    seen = profile(job.original, data.loader, config=job.config, checkpoint=own)
    found = search(job.original, seen, data.loader, budget=job.budget, checkpoint=options.checkpoint)
    kept = found if options.front else replace(found, points=found.points[-1:])
    if not kept.points:
        say("nothing was replaced: the network meets its budget, or no step keeps within it")
        return {"out": None, "front": []}
    batches = list(data.reported_on(seen))
    points = measure_front(job.original, seen, kept, batches, samples=data.samples)
    if current().leads:
        write_front(points, job.original, seen, options.out)
    for point in points:
        say(f"{point.report.table()}\n")
    first = str(options.out / "point-01")
    say(f"saved to {options.out}; load({first!r}, original=model) gives the first")
    return {"out": str(options.out), "front": [p.report.summary.model_dump() for p in points]}


@run.register
def _supports(options: Supports, say: Say) -> JsonValue:
    support, row = tried(network(options.name), onnx=options.onnx)
    say(f"{support}\n{row}")
    return {
        **row.model_dump(mode="json"),
        "found": [{"name": chain.name, "blocks": len(chain)} for chain in support.chains],
        "refusals": [refusal.model_dump(mode="json") for refusal in support.refusals],
    }


@run.register
def _verify(options: Verify, say: Say) -> JsonValue:
    held: list[JsonValue] = []
    for line in checks(options.directory):
        say(line)
        held.append(line)
    return {"directory": str(options.directory), "held": held}


@run.register
def _export(options: Export, say: Say) -> JsonValue:
    if options.int8:
        return _int8(options, say)
    named = options.out.suffix.removeprefix(".") if options.out is not None else ""
    to = options.to or (named if named in ("pt2", "gguf") else "onnx")
    out = options.out or options.directory / f"model.{to}"
    if to == "gguf":
        return _gguf(options, out, say)
    export = export_pt2 if to == "pt2" else export_onnx
    certificate = export(options.directory, out, _example(options))
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


def _int8(options: Export, say: Say) -> JsonValue:
    out = options.out or options.directory / "model.int8.onnx"
    if options.weights is not None or options.model is not None:
        _, original, data = _saved(options)
        loader = data.loader
    elif options.text is not None:
        original, text = None, TextModel.compressed(options.directory)
        loader = text.loader(options.text, length=options.length, batch_size=options.batch_size)
    else:
        assert options.images is not None
        original = None
        files = ImageFiles(options.images, options.split, load(options.directory))
        loader = image_loader(files, batch_size=options.batch_size)
    found = export_onnx(
        options.directory, out, loader, original=original, quantize="int8", bound=options.bound
    )
    say(str(found))
    return {"file": str(out), **found.model_dump(mode="json", include={"compressed", "quantized"})}


def _gguf(options: Export, out: Path, say: Say) -> JsonValue:
    assert options.inputs is not None
    if options.inputs.suffix != ".txt":
        raise LoaderError(f"a GGUF file is compared on a text: {options.inputs} is no .txt file")
    found = export_gguf(
        options.directory, out, documents(options.inputs, options.samples), type=options.type
    )
    say(
        f"{out}: {found.bytes:,} bytes, {found.type}, architecture {found.architecture}; "
        f"log-probabilities {found.max_gap:.1e} from PyTorch at the most, {found.greedy_equal} of "
        f"{found.greedy} generated tokens equal, {found.tokens_per_second:.0f} tokens a second "
        f"({found.tokens_per_second_pytorch:.0f} in PyTorch)"
    )
    return found.model_dump(mode="json")


def _example(options: Export) -> Any:
    """Return the first samples of the inputs.

    Raises:
        LoaderError: the inputs cannot be read.
    """
    assert options.inputs is not None
    if options.inputs.suffix == ".npy":
        try:
            return torch.from_numpy(np.load(options.inputs, allow_pickle=False)[: options.samples])
        except (OSError, ValueError) as error:
            raise LoaderError(f"{options.inputs} is not a readable .npy file: {error}") from error
    if options.inputs.suffix == ".txt":
        model = TextModel.compressed(options.directory)
        return model.loader(options.inputs, length=options.length, batch_size=options.samples)[0]
    files = ImageFiles(options.inputs, None, load(options.directory))
    items = (files[k] for k in range(min(options.samples, len(files))))
    return torch.stack([item[0] if isinstance(item, tuple) else item for item in items])


@run.register
def _report(options: Report, say: Say) -> JsonValue:
    out = options.out or options.directory / PAGE
    digest, found = (
        read_manifest(options.directory).sha256.get(REPORT),
        read_report(options.directory),
    )
    if digest is not None:
        require_intact(options.directory, REPORT, digest)
    if found is None:
        raise ArtifactError(f"{options.directory} has no {REPORT}: save a result, not a network alone")
    found.to_html(out)
    say(f"{found.table()}\nwritten to {out}")
    return _told(found, out)


@run.register
def _bench(options: Bench, say: Say) -> JsonValue:
    manifest = read_manifest(options.directory)
    if manifest.architecture is None or manifest.probe is None:
        raise ArtifactError(
            f"{options.directory} does not know how to build its original, or what that takes: time "
            "both in Python, with rba_compress.benchmark"
        )
    original, compressed = manifest.architecture.build(), load(options.directory)
    for built in (original, compressed):
        _to_device(built, _device(options.device))
        if options.compile:
            built.compile()
    rows: dict[str, JsonValue] = {}
    for size in options.batch_sizes:
        if size < 1:
            raise LoaderError(f"a batch of {size} samples")
        timed = benchmark(original, compressed, manifest.probe.draw(size), seconds=options.seconds)
        rows[str(size)] = timed.model_dump(mode="json")
        say(
            f"batch {size}: {timed.original_ms:.2f} ms before, {timed.compressed_ms:.2f} after, "
            f"ratio {timed.ratio:.3f}, quartiles {timed.ratio_low:.3f} to {timed.ratio_high:.3f} "
            f"of {timed.pairs} pairs on {timed.device}"
        )
    return rows


@run.register
def _generate(options: Generate, say: Say) -> JsonValue:
    original = TextModel.read(hub_name(options.model))
    found: dict[str, JsonValue] = {}
    for name, model in (
        ("original", original),
        ("compressed", TextModel.compressed(options.directory)),
    ):
        _to_device(model.network, _device(options.device))
        found[name] = model.generated(options.prompt, tokens=options.tokens)
        say(f"{name}: {found[name]}")
    return found


def _device(name: str) -> str:
    """Return the device that an option names, of this process."""
    return own_device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


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
