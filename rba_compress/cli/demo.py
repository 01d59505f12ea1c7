"""Demo from end to end: compress the embedded digits ViT, save it, load it, compare."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rba_compress.api import compress
from rba_compress.artifacts.architecture import Architecture
from rba_compress.cli.digits import ARCHITECTURE, ARGUMENTS, batches, digits_data, digits_model
from rba_compress.core.config import Budget
from rba_compress.core.errors import ArtifactError
from rba_compress.core.loader import read
from rba_compress.reporting.comparison import measured
from rba_compress.reporting.plots import plot_similarity
from rba_compress.reporting.report import PAGE, Report

_RELOAD = """
import sys
from safetensors.torch import load_file, save_file
from rba_compress import load
directory, inputs, outputs = sys.argv[1:]
save_file({"y": load(directory)(load_file(inputs)["x"]).detach()}, outputs)
"""


def run_demo(out: Path, *, kept: float = 0.8, say: Callable[[str], None] = print) -> Report:
    """Compress the digits ViT to `kept` of its MACs and parameters, and report on held-out digits.

    Writes `out/compressed/`, `out/report.html` and `out/similarity.png`.

    Args:
        say: called with each line of progress.

    Raises:
        ArtifactError: the model loaded in a fresh process gives other outputs.
    """
    original = digits_model()
    train, test = digits_data()
    say("A 12-block vision transformer on 8 x 8 digits; calibrated on its training digits.\n")
    result = compress(original, batches(train), budget=Budget(macs=kept, params=kept))
    report = measured(
        original,
        result.model,
        read(batches(test)),
        result.profile,
        result.plan,
        samples="held-out digits, never calibrated on",
    )
    say(report.table())
    result = result.with_report(report)
    result.save(
        out / "compressed", architecture=Architecture(name=ARCHITECTURE, arguments=dict(ARGUMENTS))
    )
    plot_similarity(result.profile.chains[0]).savefig(out / "similarity.png", dpi=120)
    result.report.to_html(out / PAGE)
    _reload(out / "compressed", test[0], result.model)
    say(
        f"\nthe report                  {out / PAGE}\n"
        f"block-to-block similarity   {out / 'similarity.png'}\n"
        f"the compressed model              {out / 'compressed'}\n"
        "loaded in a fresh process   outputs equal, bit for bit"
    )
    return result.report


def _reload(directory: Path, inputs: torch.Tensor, model: torch.nn.Module) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "x.safetensors", Path(folder) / "y.safetensors"
        save_file({"x": inputs}, asked)
        command = [sys.executable, "-c", _RELOAD, directory, asked, answered]
        subprocess.run([str(part) for part in command], check=True)  # nosec B603 # paths, and no shell
        with torch.no_grad():
            expected = model(inputs)
        if not torch.equal(expected, load_file(answered)["y"]):
            raise ArtifactError(f"{directory}, loaded in a fresh process, gives other outputs")


def free_directory(wanted: Path) -> Path:
    """Return `wanted`, or the first of `wanted-2`, `wanted-3`, ... that does not exist yet."""
    number, path = 2, wanted
    while path.exists():
        path = wanted.with_name(f"{wanted.name}-{number}")
        number += 1
    return path
