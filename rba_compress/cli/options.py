"""Options of the subcommands of `rba-compress`: nothing here loads torch, so that help and usage errors
come at once.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

from rba_compress.cli.latent_demos.trials import AggregationTrial, AnchorTrial, Trial
from rba_compress.core.config import Budget, Config, Effort, GgufType, Healing
from rba_compress.core.errors import ConfigError, LoaderError, ModelError, WeightsError
from rba_compress.core.io import require_vacant
from rba_compress.core.map_spec import Kind

PREFIX = "hf:"
"""Beginning of the name of a model that transformers reads: a directory, or a name of its hub."""


@dataclass(kw_only=True)
class Command:
    """Base of all commands: options that each has."""

    json: bool = False
    """Print one JSON value and nothing else."""
    debug: bool = False
    """Print the traceback of an error."""

    def check(self) -> None:
        """Check what can be told from the options alone, before torch is loaded.

        Raises:
            RBAError: one of its subclasses, with what is wrong.
        """


@dataclass(kw_only=True)
class Demo(Command):
    """Compress the embedded digits ViT, save it and load it again; needs no data and no network."""

    out: Path = Path("demo")
    """Directory to write; a number is appended if it exists."""


@dataclass(kw_only=True)
class Source(Command):
    """Options of commands that read images or a text."""

    weights: Path | None = None
    """Safetensors file with the weights of the original network, a timm model."""
    images: Path | None = None
    """Folder of images, <class>/<image>, for a timm model or an image model hf:DIR."""
    split: Path | None = None
    """Text file with the images to read, one path a line; by default all."""
    text: Path | None = None
    """Text file, for a model hf:DIR: one text for a causal model, a document a line for others."""
    length: int = 512
    """Tokens of a sequence, or of a document at most."""
    batch_size: int = 16
    device: str = "auto"
    """Device of torch, by default a GPU if there is one."""

    def check(self) -> None:
        """Require that the files exist."""
        kinds = {
            "weights": "a readable safetensors file",
            "images": "a folder of images",
            "split": "a file of image paths",
            "test_split": "a file of image paths",
            "text": "a text file in UTF-8",
            "test_text": "a text file in UTF-8",
        }
        for name, kind in kinds.items():
            path = getattr(self, name, None)
            if path is not None and not path.exists():
                error = WeightsError if name == "weights" else LoaderError
                raise error(f"{path} is not {kind}: there is no such path")
        if self.batch_size < 1 or self.length < 2:
            raise LoaderError(
                f"a batch of {self.batch_size} images or sequences of {self.length} tokens: 1 and 2 "
                "are the least"
            )

    def require_unset(self, name: str, kind: str, *options: str) -> None:
        """Raise LoaderError where options are given that the model's kind does not have."""
        given = [each for each in options if getattr(self, each, None) is not None]
        if given:
            names = ", ".join(f"--{each.replace('_', '-')}" for each in given)
            raise LoaderError(f"{name} is {kind}: leave out {names}")

    def require_source(self, name: str, *others: str) -> None:
        """Require what a model is read with: a text or images for hf:DIR, images for a network of timm.

        Args:
            others: further options that a model that is read with a text does not have.

        Raises:
            LoaderError: it is missing, or options of the other kind are given.
        """
        if name.startswith(PREFIX):
            images = ("images", "split", "test_split")
            kind, unknown = "read with a text", ("weights", *images, *others)
            if self.text is None and self.images is not None:
                kind, unknown = "read with images", ("weights", "num_classes", "test_text")
            self.require_unset(name, kind, *unknown)
            if self.text is None and self.images is None:
                raise LoaderError(
                    f"a model {PREFIX}DIR is compressed on --text FILE, or --images FOLDER"
                )
            return
        self.require_unset(name, "read with images", "text", "test_text")
        if self.weights is None:
            raise WeightsError(f"{name} needs --weights, a file of safetensors")
        if self.images is None:
            raise LoaderError("a timm model is compressed on --images, a folder <class>/<image>")


@dataclass(kw_only=True)
class Data(Source):
    """Options of commands that write a directory."""

    out: Path
    """Directory to write; must not exist, or be empty."""
    test_split: Path | None = None
    """Text file with the images to report on; by default some that are held out."""
    test_text: Path | None = None
    """Text file to report on; by default parts of the text that are held out."""

    def check(self) -> None:
        """Require that the directory is vacant, and that the files exist."""
        require_vacant(self.out)
        super().check()


@dataclass(kw_only=True)
class Job(Data):
    """Options of commands that profile a network."""

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
    maps: tuple[Kind, ...] | None = None
    """Kinds of maps to try beside the identity; by default shrunk and folded ones."""
    shrinks: tuple[float, ...] | None = None
    """Values of a to try in the shrunk map (1 - a) I + a T, and in folded corrections; by default 0.4,
    0.7 and 1."""
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

    def check(self) -> None:
        """Check budget, settings, files and the combination of options."""
        self.budget()
        self.require_source(self.model, "num_classes", "accuracy_drop")
        super().check()

    def budget(self) -> Budget | None:
        """Return the budget that is asked for, if any.

        Raises:
            BudgetError: a limit means nothing.
        """
        given = {name: getattr(self, name, None) for name in Budget.model_fields}
        return Budget(**given) if any(v is not None for v in given.values()) else None

    def config(self) -> Config:
        """Return the settings of the search.

        Raises:
            ConfigError: a setting means nothing.
        """
        names = (
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
        given = {name: getattr(self, name) for name in names}
        return Config(**{name: value for name, value in given.items() if value is not None})


@dataclass(kw_only=True)
class Compress(Job):
    """Compress a model on your images or text and save the compressed model."""

    spans: tuple[str, ...] = ()
    """Blocks to replace by hand, without a search: START:STOP as in Python, such as 3:6, or
    CHAIN=START:STOP where there are several chains."""
    hub: bool = False
    """Also write config.json and a model card, for a model hub."""
    html: bool = False
    """Also write report.html, which shows the images that changed most."""

    def check(self) -> None:
        """Check what every job needs, and the spans."""
        super().check()
        if self.by_hand() is not None and self.budget() is not None:
            raise ConfigError("--spans are replaced without a search: leave out the limits")

    def by_hand(self) -> dict[str, list[tuple[int, int]]] | None:
        """Return the spans to replace by hand, by chain.

        Raises:
            ConfigError: one is written in another form.
        """
        found: dict[str, list[tuple[int, int]]] = {}
        for text in self.spans:
            named = re.fullmatch(r"(?:(.+)=)?(\d+):(\d+)", text)
            if named is None:
                raise ConfigError(f"--spans {text}: write START:STOP, or CHAIN=START:STOP")
            found.setdefault(named[1] or "", []).append((int(named[2]), int(named[3])))
        return found or None


def require_original(model: str | None, text: Path | None) -> None:
    """Require the original beside a saved model that is read with a text.

    Raises:
        ModelError: it is missing, or is no model of transformers.
    """
    if model is None and text is not None:
        raise ModelError(f"a text is read with the original's tokenizer: pass --model {PREFIX}DIR")
    if model is not None:
        hub_name(model)


def hub_name(model: str) -> str:
    """Return the directory or the hub's name of hf:DIR.

    Raises:
        ModelError: it is something else.
    """
    if not model.startswith(PREFIX):
        raise ModelError(f"--model {model}: an original of transformers is given as {PREFIX}DIR")
    return model.removeprefix(PREFIX)


@dataclass(kw_only=True)
class Heal(Data):
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

    def check(self) -> None:
        """Require the original of transformers where there is one, and what `Data` requires."""
        require_original(self.model, self.text)
        super().check()


@dataclass(kw_only=True)
class Evaluate(Source):
    """Measure a saved compressed model beside its original, on your images or text."""

    directory: tyro.conf.Positional[Path]
    """Directory that `compress` or `save` wrote."""
    model: str | None = None
    """The original, hf:DIR, of a model of transformers."""

    def check(self) -> None:
        """Require data and the name of an original of transformers, and that the files exist."""
        require_original(self.model, self.text)
        if self.images is None and self.text is None:
            raise LoaderError("give --images FOLDER, or --text FILE for a model of transformers")
        if self.model is not None:
            self.require_source(self.model)
        super().check()


@dataclass(kw_only=True)
class Profile(Job):
    """Profile a model on your images or text and save the profile, with a picture of each chain."""


@dataclass(kw_only=True)
class Search(Job):
    """Search a model on your images or text and save the networks found as deltas of its weights."""

    front: bool = False
    """Save the front of all networks that were evaluated, not only the last one."""


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


@dataclass(kw_only=True)
class Verify(Command):
    """Check an artefact's hashes, reload and parity; exit with code 4 at the first check that fails."""

    directory: tyro.conf.Positional[Path]
    """Directory that `compress` or `save` wrote, with or without exported files."""


@dataclass(kw_only=True)
class Export(Source):
    """Write a saved compressed model as ONNX, .pt2 or GGUF, with a certificate of what it computes."""

    directory: tyro.conf.Positional[Path]
    """Directory that `compress` or `save` wrote."""
    inputs: Path | None = None
    """Real inputs to compare on: a folder <class>/<image>, a .npy file of the network's inputs, or a
    .txt file for a model of transformers."""
    int8: bool = False
    """Write ONNX in int8, calibrated on --images, or --text for a model of transformers; with the
    original (--weights, or --model) the file is compared and timed against it."""
    bound: float | None = None
    """Largest mean divergence of the int8 file from the model in float, by default 0.02 for class
    scores; the operations that cost most of it stay in float."""
    model: str | None = None
    """The original, hf:DIR, of a model of transformers."""
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

    def check(self) -> None:
        """Require inputs to compare on, or samples to calibrate int8 on, and that the files exist."""
        super().check()
        if not self.int8:
            if self.inputs is None:
                raise LoaderError("give --inputs: real inputs to compare on, a folder or a file")
            return
        if self.to in ("pt2", "gguf") or (self.out is not None and self.out.suffix != ".onnx"):
            raise ConfigError("--int8 writes ONNX: leave out --to, and name a file .onnx")
        if self.images is None and self.text is None:
            raise LoaderError("--int8 needs samples: --images FOLDER, or --text FILE")


@dataclass(kw_only=True)
class Report(Command):
    """Write the report of a saved compressed model as one HTML page."""

    directory: tyro.conf.Positional[Path]
    """Directory that `compress` or `save` wrote."""
    out: Path | None = None
    """Page to write; by default report.html in the directory."""


@dataclass(kw_only=True)
class Bench(Command):
    """Time a saved compressed model and its original in pairs, on random inputs like the real ones."""

    directory: tyro.conf.Positional[Path]
    """Directory that `compress` or `save` wrote."""
    batch_sizes: tuple[int, ...] = (1, 32)
    seconds: float = 5.0
    """Seconds of timing for each batch size."""
    device: str = "auto"
    """Device of torch, by default a GPU if there is one."""
    compile: bool = False
    """Time both through torch.compile."""


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
    device: str = "auto"
    """Device of torch, by default a GPU if there is one."""


@dataclass(kw_only=True)
class LatentStitch(Command):
    """Stitch the encoders of small networks to each other's heads, through every bridge."""

    out: Path = Path("latent-stitch")
    """Directory to write; a number is appended if it exists."""
    trial: tyro.conf.OmitArgPrefixes[Trial] = field(default_factory=lambda: Trial(seeds=(0, 1)))


@dataclass(kw_only=True)
class LatentAnchors(Command):
    """Find parallel anchors of a perceptron and a convolutional network from a few known pairs."""

    out: Path = Path("latent-anchors")
    """Directory to write; a number is appended if it exists."""
    trial: tyro.conf.OmitArgPrefixes[AnchorTrial] = field(
        default_factory=lambda: AnchorTrial(repetitions=2, samples=600, anchors=200)
    )


@dataclass(kw_only=True)
class LatentAggregate(Command):
    """Merge the spaces of networks that each learned a part of a task into one."""

    out: Path = Path("latent-aggregate")
    """Directory to write; a number is appended if it exists."""
    trial: tyro.conf.OmitArgPrefixes[AggregationTrial] = field(
        default_factory=lambda: AggregationTrial(seeds=(0,))
    )
