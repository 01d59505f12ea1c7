"""Atomic, checksummed files: each is written whole or not at all, and verified when it is read.

JSON carries the SHA-256 of its own text in the field `seal`, computed with 64 zeros in its place.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from rba_compress.core.errors import ArtifactError, ExportError, RBAError
from rba_compress.core.file_formats import other_format
from rba_compress.core.schema import Frozen

if TYPE_CHECKING:
    from torch import Tensor

BLANK = "0" * 64
LARGEST = 1 << 28
"""Size in bytes above which a JSON file is not read."""
T = TypeVar("T", bound="Sealed")
R = TypeVar("R", bound=Frozen)
_SEAL = re.compile(rb'"seal": "([0-9a-f]{64})"')


class Sealed(Frozen):
    """A JSON file that carries its own hash."""

    schema_version: int
    seal: str | None = BLANK
    """SHA-256 of the file; None in files of older schemas, which had no seal."""


def sealed(text: str) -> bytes:
    """Return JSON text as UTF-8, with its digest in place of the first `seal`, which is `BLANK`."""
    content = text.encode()
    return content.replace(BLANK.encode(), hashlib.sha256(content).hexdigest().encode(), 1)


def read_sealed(path: Path, kind: type[T], *, newest: int, sealed_since: int = 1) -> T:
    """Read a sealed JSON file as a value.

    Args:
        path: of the file.
        kind: the value's class.
        newest: the schema that this version writes; it reads older ones.
        sealed_since: the first schema that has a seal.

    Raises:
        ArtifactError: the file is missing, of a newer schema or another kind, or not what was written.
    """
    content = read_json(path)
    schema = _schema(content)
    if schema > newest:
        raise ArtifactError(
            f"{path} has schema {schema}, this version reads up to {newest}: upgrade rba_compress"
        )
    value = parsed(path, kind, content)
    require_seal(path, content, there=value.schema_version >= sealed_since)
    return value


def require_seal(path: Path, content: bytes, *, there: bool) -> None:
    """Check the seal of a JSON file.

    Args:
        there: True if the file must have a seal.

    Raises:
        ArtifactError: the seal does not fit, or is missing.
    """
    found = _SEAL.search(content)
    intact = not there
    if found is not None:
        blank = content.replace(found[1], BLANK.encode(), 1)
        intact = hashlib.sha256(blank).hexdigest() == found[1].decode()
    if not intact:
        raise ArtifactError(f"{path} is not what was saved (its seal does not fit): get it anew")


def read_json(path: Path) -> bytes:
    """Return the bytes of a file that should be JSON.

    Raises:
        ArtifactError: the file cannot be read, or is larger than any that this package writes.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST:
            raise ArtifactError(
                f"{path} has {size:,} bytes, more than any that was saved ({LARGEST:,})"
            )
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} is unreadable: {error}") from error


def parsed(path: Path, kind: type[R], content: bytes | str) -> R:
    """Parse JSON as a value.

    Raises:
        ArtifactError: the JSON is not a value of that kind.
    """
    try:
        return kind.model_validate_json(content)
    except (ValidationError, RBAError) as error:
        name = kind.__name__.lower()
        raise ArtifactError(f"{path} is not a {name} that this version reads: {error}") from error


def _schema(content: bytes) -> int:
    """Return the schema version in a JSON text, whatever else it holds; 0 where there is none."""
    try:
        schema = json.loads(content)["schema_version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return 0
    return schema if isinstance(schema, int) else 0


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 over the names, dtypes, shapes and bytes of tensors, taken one by one."""
    import torch  # slow to load

    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(flat.numpy().data)
    return digest.hexdigest()


def below(prefix: str, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names start with `prefix`, by the rest of their names."""
    return {n.removeprefix(prefix): tensor for n, tensor in named.items() if n.startswith(prefix)}


def write_text(path: Path, text: str) -> None:
    """Write a text file, replacing an older one.

    Raises:
        ArtifactError: the file cannot be written; an older one is unchanged.
    """
    try:
        with sibling(path) as folder:
            (folder / path.name).write_text(text, encoding="utf-8")
            flush(folder / path.name)
            (folder / path.name).replace(path)
            flush(path.parent)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error}") from error


def write_tensors(path: Path, record: Frozen, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file with a JSON record in its header, replacing an older one.

    Raises:
        ArtifactError: the file cannot be written; an older one is unchanged.
    """
    from safetensors.torch import save_file  # loads torch

    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"record": record.model_dump_json(), "sha256": tensor_digest(sorted(data.items()))}
    try:
        with sibling(path) as folder:
            save_file(data, folder / path.name, metadata=header)
            flush(folder / path.name)
            (folder / path.name).replace(path)
            flush(path.parent)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot write {path}: {error}") from error


def read_tensors(path: Path, kind: type[R]) -> tuple[R, dict[str, Tensor]]:
    """Read a file of `write_tensors`.

    Raises:
        ArtifactError: the file is missing, not of that kind, or not what was written.
    """
    name = kind.__name__.lower()
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = other_format(path) or error
        raise ArtifactError(f"{path} is not a {name} that this version reads: {reason}") from error
    record = parsed(path, kind, header.get("record", ""))
    if tensor_digest(sorted(tensors.items())) != header.get("sha256"):
        raise ArtifactError(f"{path} is not what was saved (its SHA-256 differs): get it anew")
    return record, tensors


def require_intact(root: Path, name: str, digest: str) -> None:
    """Check that a file exists and has the given SHA-256.

    Raises:
        ArtifactError: the file is missing, or its SHA-256 is another.
    """
    path = root / name
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: the artefact is incomplete")
    if sha256(path) != digest:
        raise ArtifactError(f"{path} is not what was saved (its SHA-256 differs): get it anew")


def require_vacant(target: Path) -> None:
    """Check that a path is missing or an empty directory.

    Raises:
        ArtifactError: the path is a file, or a directory that is not empty.
    """
    if target.is_dir():
        if any(target.iterdir()):
            raise ArtifactError(f"{target} is not empty: name a new directory, or empty it first")
    elif target.exists() or target.is_symlink():
        raise ArtifactError(f"{target} is a file: name a new directory")


@contextmanager
def sibling(target: Path) -> Iterator[Path]:
    """Make a temporary directory beside `target`, which may be renamed to it; remove what is left."""
    folder = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.tmp"
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Make a temporary sibling of `target` to write into; rename it to `target` at the end, or remove
    it after an error.

    Raises:
        ArtifactError: something cannot be written.
    """
    try:
        with sibling(target) as folder:
            yield folder
            for path in (*folder.rglob("*"), folder):
                flush(path)
            folder.rename(target)
            flush(target.parent)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot write {target}: {error}") from error


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """Make a temporary sibling directory; its files are moved beside `target` at the end, `target`
    itself last.

    Raises:
        ExportError: something cannot be written.
    """
    try:
        with sibling(target) as folder:
            yield folder
            # The file comes last, so that where the file is, its certificate is.
            for path in sorted(folder.iterdir(), key=lambda path: path.name == target.name):
                flush(path)
                path.replace(target.parent / path.name)
            flush(target.parent)
    except OSError as error:
        raise ExportError(f"cannot write {target}: {error}") from error


def flush(path: Path) -> None:
    """Flush a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
