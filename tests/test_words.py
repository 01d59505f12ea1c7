"""The house's rules on docstrings and on the size of functions (CONTRIBUTING)."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rba_compress

PATHS = sorted(Path(rba_compress.__file__).parent.rglob("*.py"))
NO_OPENING = {"Of", "As", "What", "Whether", "How", "One", "Why", "Where", "Which", "That"}
"""First words of a phrase that is no sentence and names nothing."""
LINES, PARAMETERS = 60, 7
LONG = {
    "rba_compress/api.py:compress",
    "artifacts/artifact.py:write_artifact",
    "artifacts/onnx_export.py:export_onnx",
    "latent/bootstrapping.py:bootstrap_anchors",
}
"""Functions that take more parameters, or lines: each says why in a comment that starts with Long."""


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield every docstring: of the module, classes, functions, and of values that one follows."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        for before, part in zip([None, *body], body, strict=False):
            value = part.value if isinstance(part, ast.Expr) else None
            if not (isinstance(value, ast.Constant) and isinstance(value.value, str)):
                continue
            if isinstance(before, ast.Assign | ast.AnnAssign) or (before is None and documented):
                yield part.lineno, value.value


@pytest.mark.parametrize("path", PATHS, ids=[p.stem for p in PATHS])
def test_docstrings_begin_with_a_verb_or_a_noun(path: Path) -> None:
    for line, text in docstrings(ast.parse(path.read_text())):
        assert text.split()[0].strip("`,:") not in NO_OPENING, f"{path}:{line}: {text.splitlines()[0]}"


@pytest.mark.parametrize("path", PATHS, ids=[p.stem for p in PATHS])
def test_functions_are_short(path: Path) -> None:
    text = path.read_text()
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef):
            continue
        arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        count = len([a for a in arguments if a not in ("self", "cls")])
        doc = ast.get_docstring(node, clean=False)
        length = (node.end_lineno or 0) - node.lineno + 1 - (doc.count("\n") + 1 if doc else 0)
        name = f"{path.parent.name}/{path.name}:{node.name}"
        if length <= LINES and count <= PARAMETERS:
            assert name not in LONG, f"{name} is short: take it off the list"
            continue
        assert name in LONG, f"{name} has {length} lines and {count} parameters"
        inside = "\n".join(lines[node.lineno - 2 : node.end_lineno])
        assert "# Long" in inside, f"{name} does not say why it is long"
