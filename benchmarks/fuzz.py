"""Claim: whatever stands in an artefact, it is loaded or refused by name.

A small artefact is mutated: values, keys and structure of plan.json, sealed anew as someone hostile would
seal it; its bytes; bytes and header of model.safetensors under a hash that fits. Each input is read as
`load` reads it. Anything but a network or an `RBAError` is a flaw, printed once with the input that made
it; the exit code says whether there was one.

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
from rba_compress.artifact import MANIFEST, REPORT, WEIGHTS, Manifest, read_manifest, rebuilt
from rba_compress.files import BLANK, parsed, sealed, sha256

NASTY: list[Any] = [
    None, True, False, 0, -1, 1, 2, 3, 8, 7.5, -0.0, 1e308, 10**30, -(10**30), "", "a", "stream", "args",
    "kwargs", "value", "tuple", "list", "dict", "..", "/etc/passwd", "blocks.0", "blocks.0.up", "head",
    "blocks", "__class__", "training", "forward", "float32", "load", "nan", "\0", "ü" * 50, "0" * 64, [],
    {}, [[]], [None], {"value": 1}, {"tuple": ["stream"]}, ["args", 0], ["kwargs", "x"], "identity", "affine",
    "folded", "low_rank", "shrunk", "span", "whole", "read_out", "attention_free", "mlp_free",
]  # fmt: skip


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Network(nn.Module):
    """(N, 4) -> (N, 3), through three residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


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


def main(job: Fuzz) -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chance, model = random.Random(job.seed), Network().eval()
    data = [torch.randn(10, 4) for _ in range(4)]
    config = Config(maps=("folded", "affine"), shrinks=(0.6,), refit_dampings=(1.0,), swaps=0)
    found = compress(model, data, budget=Budget(macs=0.8), config=config)
    outcomes: Counter[str] = Counter()
    flaws: dict[str, str] = {}
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        root = Path(folder) / "slim"
        found.save(root)
        (root / REPORT).unlink()
        plan, weights = json.loads((root / MANIFEST).read_text()), (root / WEIGHTS).read_bytes()
        # The log of the search is decisions in words and numbers: a few of them do.
        for log in ("candidates", "refusals", "steps"):
            plan["plan"][log] = plan["plan"][log][:1]
        plan["sha256"].pop(REPORT)
        plan["seal"] = BLANK
        text, start = json.dumps(plan), time.monotonic()
        (root / MANIFEST).write_bytes(sealed(text))
        intact = read_manifest(root)
        for _ in tqdm(range(job.inputs), mininterval=10):
            kind = chance.choices(("structure", "bytes", "weights", "header"), (60, 25, 8, 7))[0]
            content: bytes = b""
            try:
                if kind in ("weights", "header"):
                    content = (scrambled if kind == "weights" else reheaded)(weights, chance)
                    (root / WEIGHTS).write_bytes(content)
                    assert sha256(root / WEIGHTS)
                    rebuilt(root, intact, model=model)
                else:
                    if kind == "structure":
                        content = sealed(json.dumps(mutated(text, chance)))
                        manifest = parsed(root / MANIFEST, Manifest, content)
                    else:
                        content = scrambled(text.encode(), chance)
                        if chance.random() < 0.5:  # under a seal that fits
                            content = sealed(content.decode(errors="replace"))
                        (root / MANIFEST).write_bytes(content)
                        manifest = read_manifest(root)
                    rebuilt(root, manifest, model=model)
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
            finally:
                if kind in ("weights", "header"):
                    (root / WEIGHTS).write_bytes(weights)
            if time.monotonic() - start > job.seconds:
                break
    print(
        json.dumps({"inputs": outcomes.total(), "seconds": round(time.monotonic() - start), **outcomes})
    )
    print(f"{len(flaws)} flaws: {', '.join(flaws) or 'none'}")
    return bool(flaws)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Fuzz, description=__doc__)))
