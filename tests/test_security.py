"""Nothing of this package runs what a file says."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rba_compress

ROOT = Path(rba_compress.__file__).parents[1]
IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.export.load", "torch.jit.load"}
CALLS |= {"torch.package.PackageImporter", "importlib.import_module", "pd.read_pickle", "os.system"}
ALLOWED = {
    ("certificate.py", "torch.export.load"): "opens the file that was written a moment before",
}


def flaws(code: str) -> Iterator[str]:
    """Yield everything in a module that could run code that comes with data."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.partition(".")[0] in IMPORTS)
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in IMPORTS:
            yield str(node.module)
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in CALLS:
            yield name
        if name == "np.load" and options.get("allow_pickle") != "False":
            yield "np.load with pickles"
        if options.get("trust_remote_code", "False") != "False":
            yield "trust_remote_code"
        if options.get("shell", "False") != "False":
            yield "a shell"


def test_no_module_runs_what_a_file_says() -> None:
    modules = [p for room in ("rba_compress", "export") for p in (ROOT / room).rglob("*.py")]
    assert len(modules) > 60
    found = {(path.name, flaw) for path in modules for flaw in flaws(path.read_text())}
    assert found == set(ALLOWED)


@pytest.mark.parametrize(
    ("code", "flaw"),
    [
        ("import pickle", "pickle"),
        ("from yaml import load", "yaml"),
        ("x = eval(text)", "eval"),
        ("torch.load(path)", "torch.load"),
        ("np.load(path)", "np.load with pickles"),
        ("np.load(path, allow_pickle=True)", "np.load with pickles"),
        ("build(name, trust_remote_code=True)", "trust_remote_code"),
        ("subprocess.run(line, shell=True)", "a shell"),
    ],
)
def test_each_flaw_would_be_seen(code: str, flaw: str) -> None:
    assert list(flaws(code)) == [flaw]
    assert not list(flaws("model.eval(); np.load(path, allow_pickle=False); re.compile(text)"))
