"""Make pretrained networks smaller without training them.

    rba-compress demo
    rba-compress compress --model deit_tiny_patch16_224 --weights deit.safetensors --images imagenet/ \\
        --macs 0.8 --html --out compressed/
    rba-compress verify compressed/

`rba-compress COMMAND --help` lists the options of a command. Exit codes: 0 done, 1 an internal error, 2
bad usage or input, 3 the budget cannot be reached, 4 a directory or a check of one failed, 130
interrupted.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Annotated

import tyro
from pydantic import ValidationError
from tqdm.contrib.logging import logging_redirect_tqdm

from rba_compress.cli.options import (
    Bench,
    Compress,
    Demo,
    Evaluate,
    Export,
    Generate,
    Heal,
    LatentAggregate,
    LatentAnchors,
    LatentStitch,
    Profile,
    Report,
    Search,
    Supports,
    Verify,
)
from rba_compress.core.errors import ArtifactError, BudgetError, ExportError, FidelityError, RBAError

Latent = (
    Annotated[LatentStitch, tyro.conf.subcommand("stitch")]
    | Annotated[LatentAnchors, tyro.conf.subcommand("anchors")]
    | Annotated[LatentAggregate, tyro.conf.subcommand("aggregate")]
)

Command = (
    Annotated[Demo, tyro.conf.subcommand("demo")]
    | Annotated[Supports, tyro.conf.subcommand("supports")]
    | Annotated[Profile, tyro.conf.subcommand("profile")]
    | Annotated[Search, tyro.conf.subcommand("search")]
    | Annotated[Compress, tyro.conf.subcommand("compress")]
    | Annotated[Heal, tyro.conf.subcommand("heal")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Report, tyro.conf.subcommand("report")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[
        Latent,
        tyro.conf.subcommand(
            "latent", description="What networks trained apart have in common, on digits."
        ),
    ]
)


@contextmanager
def _progress_lines() -> Iterator[None]:
    """Print what the package logs to stderr, above a bar that is there."""
    logger = logging.getLogger("rba_compress")
    handler, level = logging.StreamHandler(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with logging_redirect_tqdm([logger]):
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


CODES = {BudgetError: 3, FidelityError: 3, ArtifactError: 4, ExportError: 4}


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    command = tyro.cli(Command, args=arguments, prog="rba-compress", description=__doc__)

    def failed(code: int, message: str) -> int:
        if command.debug:
            traceback.print_exc()
        print(f"rba-compress: {message}", file=sys.stderr)
        return code

    def say(line: str) -> None:
        if not command.json:
            print(line)

    try:
        command.check()
        from rba_compress.cli import latent_commands  # after the check, for torch is slow to load
        from rba_compress.core.distributed import launched

        # Of several processes the first one alone prints.
        with (
            launched() as ranks,
            nullcontext() if ranks.leads else redirect_stdout(None),
            nullcontext() if command.json else _progress_lines(),
        ):
            value = latent_commands.run(command, say)
            if command.json:
                print(json.dumps(value))
    except ValidationError as error:
        first = error.errors()[0]
        return failed(2, f"{'.'.join(map(str, first['loc']))}: {first['msg']}")
    except RBAError as error:
        return failed(CODES.get(type(error), 2), str(error))
    except KeyboardInterrupt:
        checkpoint = getattr(command, "checkpoint", None)
        again = f"the same command goes on from {checkpoint}" if checkpoint else "run it again"
        if hasattr(command, "checkpoint") and not checkpoint:
            again += ", with --checkpoint FILE to go on from where it stops"
        return failed(130, f"interrupted; no artefact is half-written: {again}")
    except Exception as error:  # noqa: BLE001  whatever it is, a user is told what to do
        note = "" if command.debug else "; --debug shows where"
        return failed(1, f"an internal error; please report it: {type(error).__name__}: {error}{note}")
    return 0
