"""Every block of code in the guide and in the README, run as a user would, on small networks."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import rba_compress
from rba_compress.cli.main import main
from tests.networks import seeded

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SMALLER = {"vit_small_patch16_224": "test_vit"}
SLOW: dict[str, tuple[str, ...]] = {
    "ecosystem": ("torchao", "peft", "lightning"),
    "language-models": ("transformers", "xllamacpp"),
    "latent": (),
    "onnx-runtime": (),
    "budgets": (),
    "by-hand": (),
    "heal": (),
    "scaling": (),
    "stock": (),
    "quick-start": (),
    "report": (),
}
"""Pages that take long, and the packages that they need."""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with images and the weights of a fine-tuned model."""
    generator = torch.Generator().manual_seed(0)
    for index in range(24):
        path = tmp_path / "images" / f"class{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 256, (40, 40, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    model = seeded(timm.create_model, "test_vit", num_classes=2)
    save_file(model.state_dict(), tmp_path / "mine.safetensors")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pages() -> list[object]:
    found = sorted(path.stem for path in DOCS.glob("*.md"))
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in found]


@pytest.mark.parametrize("name", pages())
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
def test_every_block_of_a_page_runs(name: str, work: Path) -> None:
    for package in SLOW.get(name, ()):
        pytest.importorskip(package)
    if name == "language-models":
        texts = pytest.importorskip("tests.texts")
        texts.write_model(work / "llm")
        for seed, part in enumerate(("calibration", "test")):
            (work / f"{part}.txt").write_text(texts.sentences(seed))
    text = (DOCS / f"{name}.md").read_text()
    for long, short in SMALLER.items():
        text = text.replace(long, short)
    known: dict[str, object] = {"__name__": "__main__"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for kind, code in BLOCK.findall(text):
            assert kind in ("python", "sh", "text"), f"{name}: a block of {kind}"
            if kind == "python":
                exec(compile(code, f"{name}.md", "exec"), known)
            if kind == "sh":
                for line in code.replace("\\\n", " ").splitlines():
                    program, *arguments = shlex.split(line)
                    assert program == "rba-compress"
                    assert main(arguments) == 0, line


def test_links_lead_somewhere() -> None:
    for path in (
        *DOCS.glob("*.md"),
        DOCS.parent / "README.md",
        DOCS.parent / "benchmarks" / "README.md",
    ):
        for target in re.findall(r"\]\(([^)#\s]+)", BLOCK.sub("", path.read_text())):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_every_public_name_is_documented() -> None:
    for name in rba_compress.__all__:
        value = getattr(rba_compress, name)
        assert (value.__doc__ or "").strip(), f"{name} has no docstring"


NOTEBOOK = (
    "from rba_compress import *\nfrom tests.networks import Chain, loader, seeded",
    "result = compress(seeded(Chain, 6), loader(200, 50), budget=Budget(macs=0.8))\nresult",
    "result.report",
    "result.plan",
    "result.profile",
    "%matplotlib inline\nplot_pareto(result.report.details.front)",
)


@pytest.mark.slow
def test_a_notebook_shows_tables_and_figures() -> None:
    client = pytest.importorskip("nbclient").NotebookClient
    nbformat = pytest.importorskip("nbformat")
    cells = [nbformat.v4.new_code_cell(code) for code in NOTEBOOK]
    ran = client(nbformat.v4.new_notebook(cells=cells), timeout=120, kernel_name="python3").execute()

    def shown(index: int, kind: str) -> str:
        outputs = ran.cells[index].outputs
        return next(o.data[kind] for o in reversed(outputs) if kind in o.get("data", {}))

    assert all("<table" in shown(index, "text/html") for index in (1, 2, 3, 4))
    assert shown(5, "image/png")


def test_the_notebook_was_executed_and_opens_with_a_picture() -> None:
    cells = json.loads((DOCS / "first-steps.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in output.get("data", {}) for output in code[0]["outputs"])
    assert not [o for cell in code for o in cell["outputs"] if o["output_type"] == "error"]


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    client = pytest.importorskip("nbclient").NotebookClient
    nbformat = pytest.importorskip("nbformat")
    book = nbformat.read(DOCS / "first-steps.ipynb", as_version=4)
    how = {"metadata": {"path": str(tmp_path)}}
    client(book, timeout=600, kernel_name="python3", resources=how).execute()


def test_pages_of_the_site_are_in_its_navigation() -> None:
    named = set(re.findall(r"[\w-]+\.(?:md|ipynb)", (DOCS.parent / "mkdocs.yml").read_text()))
    assert named == {path.name for path in DOCS.iterdir() if path.suffix in (".md", ".ipynb")}


def test_the_readme_is_short() -> None:
    lines = (DOCS.parent / "README.md").read_text().splitlines()
    assert len(lines) <= 200
    first = "\n".join(lines[:48])
    for part in (
        "arxiv.org",
        "tradeoff.png",
        "pip install",
        "download.pytorch.org/whl/cpu",
        "[hf]",
        "seconds",
    ):
        assert part in first
