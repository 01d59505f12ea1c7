from __future__ import annotations

import ast
from pathlib import Path

import rba_compress

ROOT = Path(rba_compress.__file__).parent
# Each room imports only from those above it, and from itself without a circle.
ROOMS = [
    "core",
    "linalg",
    "graph",
    "units",
    "profiling",
    "planning",
    "healing",
    "reporting",
    "artifacts",
    "api",
    "latent",
    "cli",
]
LATENT = {"core", "linalg", "latent"}
"""What spaces of several networks stand on; no room but the command knows of them."""


def imported(path: Path) -> list[str]:
    """Return the modules of this package that a file imports from, such as core.plan."""
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
    modules = [node.module or "" for node in nodes]
    return [name.partition(".")[2] for name in modules if name.startswith("rba_compress.")]


def room(module: str) -> str:
    return module.partition(".")[0]


def modules() -> dict[str, Path]:
    """Return every module but the package's own two, by name."""
    paths = [p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.stem == "api"]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in paths}


def test_every_module_lies_in_a_room() -> None:
    assert {p.name for p in ROOT.glob("*.py")} == {"__init__.py", "__main__.py", "api.py"}
    assert {room(name) for name in modules()} == set(ROOMS)


def test_each_room_imports_only_from_those_above_it() -> None:
    for name, path in modules().items():
        above = ROOMS[: ROOMS.index(room(name)) + 1]
        for other in imported(path):
            assert room(other) in above, f"{name} imports {other}"


def test_no_module_imports_itself_in_a_circle() -> None:
    below = {name: {*imported(path)} for name, path in modules().items()}
    order: list[str] = []

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in order:
            for other in sorted(below.get(name, ())):
                visit(other, (*trail, name))
            order.append(name)

    for name in below:
        visit(name, ())


def test_latent_stands_on_closed_forms_alone() -> None:
    for name, path in modules().items():
        if room(name) == "latent":
            assert {room(other) for other in imported(path)} <= LATENT, name
        elif room(name) != "cli":
            assert "latent" not in {room(other) for other in imported(path)}, name


def test_the_index_of_a_room_names_its_modules() -> None:
    for name in {room(module) for module in modules()} - {"api", "latent"}:
        text = ast.get_docstring(ast.parse((ROOT / name / "__init__.py").read_text())) or ""
        inside = {p.stem for p in (ROOT / name).iterdir() if p.suffix == ".py"} - {"__init__"}
        assert not [each for each in inside if each not in text], name


def test_tests_lie_in_folders_of_the_same_names() -> None:
    tests = Path(__file__).parent
    folders = {p.name for p in tests.iterdir() if p.is_dir()} - {"__pycache__", "hostile"}
    assert folders <= set(ROOMS)
