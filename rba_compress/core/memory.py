"""Memory limits, and errors that say what was wanted where memory ran out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from rba_compress.core.errors import MemoryLimitError


def out_of_memory(error: BaseException) -> bool:
    """Return True if an error says that memory ran out, on any device."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


@contextmanager
def within_memory(wanted: str) -> Iterator[None]:
    """Name what was wanted where memory runs out in the context.

    Raises:
        MemoryLimitError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise MemoryLimitError(f"memory ran out: {wanted} ({error})") from error


def device_bytes(device: torch.device) -> int:
    """Return the memory of a device in bytes; for the host, the part that this process may use."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for limit in _CONTAINER_LIMITS:  # files that say "max" where there is no limit
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            found.append(int(text))
    with suppress(ImportError):  # not on every system
        import resource

        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        found += [soft] if soft != resource.RLIM_INFINITY else []
    return min(found)


_CONTAINER_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
