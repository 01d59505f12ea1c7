"""Images of a folder as a loader, preprocessed for a timm model."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from rba_compress.cli.texts import read_network
from rba_compress.core.errors import LoaderError

Transform = Callable[[Any], Tensor]
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


class ImageFiles(Dataset[tuple[Tensor, Tensor] | Tensor]):
    """Images in `root/<class>/<image>`; labels are the indices of the sorted class folders, and there
    are none (`labelled`) if the model has another number of classes.

    Args:
        root: the folder; labels count all of its class folders, whatever `split` names.
        split: a text file with one path relative to `root` a line; None takes every image.
        model: a timm model, whose own size, crop, mean and standard deviation are applied.
        transform: what is applied instead, for other models.
        without: images that must not be among the images; left out if there is no `split`.

    Raises:
        LoaderError: there is no image, or `split` names one that is not there or is in `without`.
    """

    def __init__(
        self,
        root: Path,
        split: Path | None,
        model: nn.Module,
        *,
        without: Sequence[Path] = (),
        transform: Transform | None = None,
    ) -> None:
        if not root.is_dir():
            raise LoaderError(f"{root} is not a folder of images")
        if split is None:
            self.paths = sorted(p for p in root.glob("*/*") if p.suffix.lower() in SUFFIXES)
        elif not split.is_file():
            raise LoaderError(f"{split} is not a file of image paths")
        else:
            self.paths = [_named(root, line) for line in _lines(split)]
        if split is None:
            left_out = set(without)
            self.paths = [path for path in self.paths if path not in left_out]
        shared = sorted(set(self.paths).intersection(without))
        if shared:
            raise LoaderError(
                f"{len(shared)} images are in {split} and in the test split, such as {shared[0]}: what "
                "is reported on must not be calibrated on"
            )
        absent = [path for path in self.paths if not path.is_file()]
        if absent:
            raise LoaderError(
                f"{split} names {len(absent)} images that {root} lacks: {str(absent[0])!r}. It has one "
                "path relative to that folder a line, <class>/<image>, and nothing else"
            )
        if not self.paths:
            raise LoaderError(f"no images in {split or root}: expected {root}/<class>/<image>")
        outside = [
            p for p in self.paths if not p.is_relative_to(root) or ".." in p.relative_to(root).parts
        ]
        if outside:
            raise LoaderError(f"{split} names {outside[0]}, which lies outside of {root}")
        shallow = [path for path in self.paths if len(path.relative_to(root).parts) < 2]
        if shallow:
            raise LoaderError(f"{shallow[0]} lies in no class folder: expected {root}/<class>/<image>")
        self.root = root
        classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
        config = getattr(model, "config", None)
        known = getattr(config, "label2id", None) or {}
        self.labels = {name: index for index, name in enumerate(classes)}
        if all(name in known for name in classes):
            self.labels = {name: int(known[name]) for name in classes}
        count = getattr(model, "num_classes", getattr(config, "num_labels", None))
        self.labelled = len(classes) == count or (bool(classes) and all(n in known for n in classes))
        self.transform = transform or _of_timm(model)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | Tensor:
        from PIL import Image

        path = self.paths[index]
        try:
            with Image.open(path) as image:
                pixels: Tensor = self.transform(image.convert("RGB"))
        except OSError as error:
            raise LoaderError(f"{path} is not a readable image: {error}") from error
        if not self.labelled:
            return pixels
        return pixels, torch.tensor(self.labels[path.relative_to(self.root).parts[0]])


def _of_timm(model: nn.Module) -> Transform:
    from timm.data import create_transform, resolve_model_data_config

    made: Transform = create_transform(**resolve_model_data_config(model), is_training=False)
    return made


@dataclass(frozen=True)
class ImageModel:
    """Network of transformers with its image processor."""

    network: nn.Module
    processor: Any

    @classmethod
    def read(cls, name: str) -> ImageModel:
        """Read a directory or a name of a hub.

        Raises:
            ModelError: as `read_network`.
            LoaderError: its image processor is missing.
        """
        import transformers

        network = read_network(name)
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(  # nosec B615 # the user's
                name, trust_remote_code=False
            )
        except (OSError, ValueError, ImportError) as error:
            raise LoaderError(f"{name} has no image processor that can be read: {error}") from error
        return cls(network, processor)

    def transform(self, image: Any) -> Tensor:
        """Return the pixels of an image as the network takes them, (3, height, width)."""
        pixels: Tensor = self.processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels

    def save(self, directory: Path) -> None:
        """Write what transformers reads beside a network: the processor."""
        self.processor.save_pretrained(directory)


def _lines(split: Path) -> list[str]:
    """Return the non-empty lines of a text file, without spaces and byte-order marks around them.

    Raises:
        LoaderError: the file is not UTF-8.
    """
    try:
        text = split.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise LoaderError(
            f"{split} is not a text file of image paths in UTF-8: {error}. Save it as UTF-8"
        ) from error
    if "\0" in text:
        raise LoaderError(f"{split} is not a text file of image paths in UTF-8: it holds a NUL byte")
    # Byte-order marks stand in the middle of a file if files were joined.
    lines = (line.strip("\ufeff \t\r") for line in text.split("\n"))
    return [line for line in lines if line]


def _named(root: Path, line: str) -> Path:
    """Return the image that a line names: below `root` or absolute, quoted or not, with the separators
    of any system.
    """
    bare = line.strip("'\"")
    ways = (line, bare, bare.replace("\\", "/"))
    given = Path(os.path.normpath(next((way for way in ways if (root / way).is_file()), line)))
    own = Path(os.path.normpath(root.absolute()))
    return root / (given.relative_to(own) if given.is_relative_to(own) else given)


def image_loader(files: ImageFiles, *, batch_size: int) -> DataLoader[tuple[Tensor, Tensor] | Tensor]:
    """Return the files in batches, in the order of their split.

    Raises:
        LoaderError: `batch_size` is not positive.
    """
    if batch_size < 1:
        raise LoaderError(f"a batch of {batch_size} images: the batch size is 1 or more")
    return DataLoader(files, batch_size=batch_size)
