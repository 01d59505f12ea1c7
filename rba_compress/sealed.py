"""JSON files that carry the SHA-256 of their own text, so that no byte of them changes unnoticed.

The digest stands in the field `seal`; it is taken of the text with 64 zeros in its place.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

BLANK = "0" * 64
_SEAL = re.compile(rb'"seal": "([0-9a-f]{64})"')


def sealed(text: str) -> bytes:
    """JSON text whose first `seal` is `BLANK`, with its digest there, as UTF-8."""
    content = text.encode()
    return content.replace(BLANK.encode(), hashlib.sha256(content).hexdigest().encode(), 1)


def seal_of(content: bytes) -> str | None:
    """The digest that a file carries; None where it has none."""
    found = _SEAL.search(content)
    return found[1].decode() if found else None


def is_intact(content: bytes) -> bool:
    """Whether a file carries a digest, and that of its own text."""
    digest = seal_of(content)
    if digest is None:
        return False
    return hashlib.sha256(content.replace(digest.encode(), BLANK.encode(), 1)).hexdigest() == digest


def sha256(path: Path) -> str:
    """Of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
