"""Collectives of several processes: each reads its share of the loader, and all decide the same.

Where `torch.distributed` runs more than one process (`accelerate launch`, `torchrun`), `profile`,
`search` and `compress` are called on every rank with the same model and the same, whole loader. The
statistics behind a decision are summed or gathered first, so every rank takes the same decision.

All communication uses gloo on the CPU. A pass over the data ends in one sum, whose speed hardly
matters, and gloo notices at once when the connection to a peer breaks.
"""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from rba_compress.core.errors import RankError

_PATIENCE = timedelta(hours=6)
"""Timeout of collectives, long enough for live peers with longer shares to read."""


@dataclass(frozen=True)
class Ranks:
    """Processes that work together, seen from one rank; by default a single process."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """True on the rank that writes, prints and measures times."""
        return self.rank == 0

    def total(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks of tensors of one shape."""
        if self.count == 1:
            return tensor
        summed = tensor.detach().to("cpu", copy=True)
        with self.answered():
            dist.all_reduce(summed, group=_group())
        return summed.to(tensor.device)

    def sum(self, number: float) -> float:
        """Return the sum over all ranks of a number; exact for integers up to 2^53."""
        return float(self.total(torch.tensor(float(number), dtype=torch.float64)))

    def gathered(self, rows: Tensor) -> list[Tensor]:
        """Return the tensors (n, ...) of all ranks, in rank order; n may differ, and be 0."""
        if self.count == 1:
            return [rows]
        counts = torch.zeros(self.count, dtype=torch.long)
        counts[self.rank] = len(rows)
        lengths = self.total(counts).tolist()
        padded = torch.zeros(max(lengths), *rows.shape[1:], dtype=rows.dtype)
        padded[: len(rows)] = rows.detach().cpu()
        found = [torch.empty_like(padded) for _ in lengths]
        with self.answered():
            dist.all_gather(found, padded, group=_group())
        return [part[:n].to(rows.device) for part, n in zip(found, lengths, strict=True)]

    def broadcast(self, make: Callable[[], Any]) -> Any:
        """Broadcast a JSON value of the leading rank, such as a time, which differs between ranks."""
        if self.count == 1:
            return make()
        return self.collected(make() if self.leads else None)[0]

    def collected(self, value: Any) -> list[Any]:
        """Return the JSON values of all ranks, in rank order."""
        if self.count == 1:
            return [value]
        text = torch.tensor([*json.dumps(value).encode()], dtype=torch.uint8)
        return [json.loads(bytes(part)) for part in self.gathered(text)]

    def require_equal(self, what: str, digest: int) -> None:
        """Check that all ranks have the same digest of something that they must share.

        Raises:
            RankError: the digests differ.
        """
        found = torch.cat(self.gathered(torch.tensor([digest]))).tolist()
        other = next((r for r, value in enumerate(found) if value != found[0]), None)
        if other is not None:
            raise RankError(
                f"rank {other} has another {what} than rank 0: give every process the same model, "
                "settings and whole loader, not one that was sharded already"
            )

    @contextmanager
    def answered(self) -> Iterator[None]:
        """Raise a `RankError` where a collective operation in the context fails."""
        try:
            yield
        except RuntimeError as error:
            if self.count == 1 or isinstance(error, torch.OutOfMemoryError):
                raise
            raise RankError(
                f"one of the {self.count} processes ended or does not answer: its own error says why; "
                f"start all of them again ({error})"
            ) from error

    def bar(self, *args: Any, **kwargs: Any) -> Any:
        """Return a progress bar, which only the leading rank shows, on a terminal."""
        return tqdm(*args, disable=None if self.leads else True, **kwargs)


ALONE = Ranks()


def current() -> Ranks:
    """Return the ranks of `torch.distributed`, or `ALONE`; all ranks must make the first call."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    if dist.get_world_size() == 1:
        return ALONE
    _group()
    return Ranks(dist.get_rank(), dist.get_world_size())


_GROUPS: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""Gloo group of each world, kept no longer than the world: the group's threads end with its last
reference, and a group that outlives the interpreter aborts the process."""


def _group() -> Any:
    world = dist.group.WORLD
    if world not in _GROUPS:
        _GROUPS[world] = dist.new_group(backend="gloo", timeout=_PATIENCE)
    return _GROUPS[world]


def own_device(name: str) -> str:
    """Return the GPU of this process where `name` is "cuda"; any other name is returned unchanged."""
    local = os.environ.get("LOCAL_RANK")
    return f"cuda:{local}" if name == "cuda" and local is not None else name


@contextmanager
def launched() -> Iterator[Ranks]:
    """Join the process group of a launcher, where there is one, and leave it at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # Without `cpu`, accelerate treats processes without GPUs as single processes.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.cuda.is_available()
    state = PartialState(cpu=cpu)
    try:
        yield current()
    finally:
        state.destroy_process_group()
