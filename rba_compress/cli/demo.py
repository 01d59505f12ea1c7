"""Demo from end to end: compress the embedded digits ViT, save it, load it, compare."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from rba_compress.api import compress
from rba_compress.artifacts.architecture import Architecture
from rba_compress.artifacts.onnx_export import export_onnx
from rba_compress.cli.digits import ARCHITECTURE, ARGUMENTS, batches, digits_data, digits_model
from rba_compress.core.config import Budget, Config
from rba_compress.core.errors import ArtifactError
from rba_compress.core.loader import read
from rba_compress.core.registry import registered
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


DIGITS = 400
"""Training digits that the demo calibrates on."""


def run_demo(out: Path, *, kept: float = 0.75, say: Callable[[str], None] = print) -> Report:
    """Compress the digits ViT to `kept` of its MACs, and report on held-out digits.

    Writes `out/compressed/` with `model.onnx`, `out/report.html` and `out/similarity.png`.

    Args:
        say: called with each line of progress.

    Raises:
        ArtifactError: the model loaded in a fresh process gives other outputs.
    """
    original = digits_model()
    (images, labels), test = digits_data()
    say(
        f"1/4 A vision transformer of 12 blocks, for digits of 8 x 8 pixels. On {DIGITS} of its "
        f"training digits a search looks for what can go: {100 * kept:.0f} % of the "
        "multiply-accumulates are to stay."
    )
    calibration = batches((images[:DIGITS], labels[:DIGITS]))
    # In blocks as small as these, narrower attention saves no time.
    units = tuple(name for name, unit in registered().items() if unit.searched and not unit.of_heads)
    config = Config(effort="quick", units=units)
    result = compress(original, calibration, budget=Budget(macs=kept), config=config)
    say(f"2/4 Found. Both networks now run on {len(test[1])} other digits.\n")
    report = measured(
        original,
        result.model,
        read(batches(test)),
        result.profile,
        result.plan,
        samples="held-out digits, never calibrated on",
        seconds=1.0,
    )
    say(f"{report.table()}\n")
    say("3/4 The network is saved, and loaded in a fresh process to compare its outputs bit for bit.")
    result = result.with_report(report)
    result.save(
        out / "compressed", architecture=Architecture(name=ARCHITECTURE, arguments=dict(ARGUMENTS))
    )
    plot_similarity(result.profile.chains[0]).savefig(out / "similarity.png", dpi=120)
    result.report.to_html(out / PAGE)
    with _reloaded(out / "compressed", test[0], result.model):
        say("4/4 Meanwhile it is exported to ONNX, and compared with PyTorch in ONNX Runtime.")
        certificate = export_onnx(result.model, out / "compressed" / "model.onnx", test[0][:32])
    worst = max(parity.max_rel for parity in certificate.parity)
    say(
        f"\nthe report                  {out / PAGE}\n"
        f"block-to-block similarity   {out / 'similarity.png'}\n"
        f"the compressed model        {out / 'compressed'}\n"
        "loaded in a fresh process   outputs equal, bit for bit\n"
        f"in ONNX Runtime             {worst:.0e} apart at the most\n\n"
        "What you can do with it:\n"
        f'  python -c "from rba_compress import load; print(load({str(out / "compressed")!r}))"\n'
        f"  rba-compress bench {out / 'compressed'}\n"
        f"  rba-compress report {out / 'compressed'}"
    )
    return result.report


@contextmanager
def _reloaded(directory: Path, inputs: torch.Tensor, model: torch.nn.Module) -> Iterator[None]:
    """Load the model in a fresh process during the `with` block, and compare its outputs after it."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "x.safetensors", Path(folder) / "y.safetensors"
        save_file({"x": inputs}, asked)
        command = [sys.executable, "-c", _RELOAD, directory, asked, answered]
        fresh = subprocess.Popen([str(part) for part in command])  # nosec B603 # paths, and no shell
        try:
            with torch.no_grad():
                expected = model(inputs)
            yield
            failed = fresh.wait() != 0
        finally:
            fresh.kill()
        if failed or not torch.equal(expected, load_file(answered)["y"]):
            raise ArtifactError(f"{directory}, loaded in a fresh process, fails or gives other outputs")


def free_directory(wanted: Path) -> Path:
    """Return `wanted`, or the first of `wanted-2`, `wanted-3`, ... that does not exist yet."""
    number, path = 2, wanted
    while path.exists():
        path = wanted.with_name(f"{wanted.name}-{number}")
        number += 1
    return path
