"""Claim: whatever stands in an artefact, it is loaded or refused by name.

A small artefact is mutated: values, keys and structure of plan.json, sealed anew as someone hostile
would seal it; its bytes; bytes and header of model.safetensors under a hash that fits. Each input is
read as `load` reads it. Anything but a network or an `RBAError` is a flaw, printed once with the input
that made it; the exit code says whether there was one.

    python -m benchmarks.fuzz --inputs 1000000 --seed 0
"""

from __future__ import annotations

import copy
import json
import random
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from rba_compress import Budget, Config, RBAError, compress
from rba_compress.artifacts.artifact import MANIFEST, WEIGHTS, Manifest, read_manifest, rebuilt
from rba_compress.core.io import BLANK, parsed, sealed

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 8, 7.5, -0.0, 1e308, 10**30, -(10**30), "", "a", "stream",
    "args", "kwargs", "value", "tuple", "list", "dict", "..", "/etc/passwd", "blocks.0", "blocks.0.up",
    "head", "blocks", "__class__", "training", "forward", "float32", "load", "nan", "\0", "ü" * 50,
    "0" * 64, [], {}, [[]], [None], {"value": 1}, {"tuple": ["stream"]}, ["args", 0], ["kwargs", "x"],
    "identity", "affine", "folded", "low_rank", "shrunk", "span", "whole", "read_out", "mlp_free",
]  # fmt: skip


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.down(torch.relu(self.up(x)))
        return x + change


class Network(nn.Module):
    """(N, 4) -> (N, 3), through three residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        scores: Tensor = self.head(x)
        return scores


@dataclass
class Fuzz:
    inputs: int = 1_000_000
    seed: int = 0
    seconds: float = 3600.0
    """Stop after so long."""


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) below a JSON value."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        held = waiting.pop()
        pairs = held.items() if isinstance(held, dict) else enumerate(held)
        for key, item in pairs:
            found.append((held, key))
            if isinstance(item, (dict, list)):
                waiting.append(item)
    return found


def mutated(text: str | bytes, chance: random.Random) -> Any:
    """A JSON value with one to four changes."""
    value = json.loads(text)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        held, key = chance.choice(places(value))
        match chance.randrange(7):
            case 0 | 1 | 2:
                held[key] = copy.deepcopy(chance.choice(NASTY))
            case 3 if isinstance(held, dict):
                held[str(chance.choice(NASTY))] = held.pop(key)
            case 3 | 4:
                del held[key]
            case 5:  # something that stands elsewhere
                other, place = chance.choice(places(value) or [(held, key)])
                if key in held if isinstance(held, dict) else key < len(held):
                    held[key] = copy.deepcopy(other[place])
            case _:
                if isinstance(held, list):
                    held.insert(key, copy.deepcopy(chance.choice([*held, *NASTY])))
                else:
                    held[str(chance.choice(NASTY))] = copy.deepcopy(chance.choice(NASTY))
        if not places(value):
            break
    return value


def scrambled(content: bytes, chance: random.Random) -> bytes:
    """Bytes flipped, cut, repeated or put in."""
    found = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(found) + 1)
        match chance.randrange(5):
            case 0 | 1 if at < len(found):
                found[at] ^= 1 << chance.randrange(8)
            case 2:
                del found[at:]
            case 3:
                found[at:at] = found[at : at + chance.randrange(40)]
            case _:
                found[at:at] = chance.randbytes(chance.randrange(8))
    return bytes(found)


def reheaded(content: bytes, chance: random.Random) -> bytes:
    """A safetensors file with another header in front of its data."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.dumps(mutated(content[8 : 8 + length], chance)).encode()
    size = chance.choice((len(header), len(header), chance.getrandbits(63), chance.randrange(99)))
    return struct.pack("<Q", size) + header + content[8 + length :]


class Target:
    """Artefact in a directory; each input replaces a part."""

    def __init__(self, root: Path) -> None:
        self.root, self.model = root, Network().eval()
        config = Config(maps=("folded", "affine"), shrinks=(0.6,), refit_dampings=(1.0,))
        data = [torch.randn(10, 4, generator=torch.Generator().manual_seed(k)) for k in range(4)]
        compress(self.model, data, budget=Budget(macs=0.8), config=config).save(root)
        plan = json.loads((root / MANIFEST).read_text())
        # The log of the search is decisions in words and numbers: a few of them do.
        for log in ("candidates", "refusals", "steps"):
            plan["plan"][log] = plan["plan"][log][:1]
        plan["seal"] = BLANK
        self.text, self.weights = json.dumps(plan), (root / WEIGHTS).read_bytes()
        (root / MANIFEST).write_bytes(sealed(self.text))
        self.intact = read_manifest(root)

    def input(self, kind: str, chance: random.Random) -> bytes:
        """Return an input that is not what was saved."""
        match kind:
            case "structure":
                return sealed(json.dumps(mutated(self.text, chance)))
            case "text":  # under a seal that fits
                return sealed(scrambled(self.text.encode(), chance).decode(errors="replace"))
            case "bytes":
                return scrambled(self.text.encode(), chance)
            case "header":
                return reheaded(self.weights, chance)
        return scrambled(self.weights, chance)

    def read(self, kind: str, content: bytes) -> None:
        """Read an input as `load` does, save for the weights' hash, which an attacker would renew."""
        manifest, path = self.intact, self.root / WEIGHTS
        try:
            if kind in ("structure", "text"):
                manifest = parsed(self.root / MANIFEST, Manifest, content)
            elif kind == "bytes":
                (self.root / MANIFEST).write_bytes(content)
                manifest = read_manifest(self.root)
            else:
                path.write_bytes(content)
            rebuilt(self.root, manifest, original=self.model)
        finally:
            if kind in ("weights", "header"):
                path.write_bytes(self.weights)


KINDS = {"structure": 60, "text": 13, "bytes": 12, "weights": 8, "header": 7}
"""And how many in a hundred."""


def main(job: Fuzz) -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chance = random.Random(job.seed)  # nosec B311 # repeatable, no secret
    outcomes, flaws = Counter[str](), dict[str, str]()
    with tempfile.TemporaryDirectory() as folder:
        target, start = Target(Path(folder) / "slim"), time.monotonic()
        for _ in tqdm(range(job.inputs), mininterval=10):
            kind = chance.choices([*KINDS], [*KINDS.values()])[0]
            content = target.input(kind, chance)
            try:
                target.read(kind, content)
                outcomes["loaded"] += 1
            except RBAError as error:
                outcomes[type(error).__name__] += 1
            except Exception as error:  # noqa: BLE001  this is what is looked for
                where = traceback.extract_tb(error.__traceback__)[-1]
                name = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
                outcomes["flaws"] += 1
                if name not in flaws:
                    flaws[name] = f"{name}: {error}\n{content[:4000]!r}\n{traceback.format_exc()}"
                    print(flaws[name], flush=True)
            if time.monotonic() - start > job.seconds:
                break
    print(
        json.dumps({"inputs": outcomes.total(), "seconds": round(time.monotonic() - start), **outcomes})
    )
    print(f"{len(flaws)} flaws: {', '.join(flaws) or 'none'}")
    return bool(flaws)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Fuzz, description=__doc__)))
