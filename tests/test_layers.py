from __future__ import annotations

import ast
from pathlib import Path

import rba_compress

# Each module imports only from those above it.
LAYERS = [
    "errors",
    "formats",
    "markup",
    "ranks",
    "offload",
    "weight_types",
    "moments",
    "maps",
    "similarity",
    "schema",
    "settings",
    "signatures",
    "plan",
    "files",
    "batches",
    "outputs",
    "augmentation",
    "attention",
    "demand",
    "narrowing",
    "recorder",
    "loader_form",
    "thinning",
    "surgery",
    "streams",
    "analysis",
    "measure",
    "independence",
    "chains",
    "criterion",
    "chain_profile",
    "calibration",
    "shift",
    "fitting",
    "judge",
    "drafts",
    "fitter",
    "planner",
    "healing",
    "changed",
    "details",
    "report",
    "plots",
    "weights",
    "architecture",
    "tree_comparison",
    "constructor",
    "catalogue",
    "probe",
    "fold",
    "hub",
    "artifact",
    "front",
    "certificate",
    "onnx_export",
    "coverage",
    "verification",
    "api",
    "images",
    "digits",
    "demo",
    "commands",
    "latent_commands",
    "cli",
]


def imported(path: Path) -> list[str]:
    """The modules of this package that a file imports from."""
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
    modules = [node.module or "" for node in nodes]
    return [name.partition(".")[2] for name in modules if name.startswith("rba_compress")]


def test_each_module_imports_only_from_those_above_it() -> None:
    root = Path(rba_compress.__file__).parent
    modules = {p.stem for p in root.glob("*.py")} - {"__init__", "__main__"}
    assert modules == set(LAYERS)
    for path in (root / f"{name}.py" for name in LAYERS):
        above = LAYERS[: LAYERS.index(path.stem)]
        for name in imported(path):
            assert name in above or (path.stem == "latent_commands" and name in LATENT), (
                f"{path.stem} imports {name}"
            )


LATENT = [
    "errors",
    "moments",
    "maps",
    "similarity",
    "recorder",
    "latent.anchors",
    "latent.relative",
    "latent.stitching",
    "latent.bootstrapping",
    "latent.aggregation",
    "latent.networks",
    "latent.stitching_trial",
    "latent.anchor_trial",
    "latent.aggregation_trial",
    "latent.pictures",
]
"""What spaces of several networks need; the rest of the package does not know of them."""


def test_the_latent_subpackage_stands_on_moments_and_maps_alone() -> None:
    root = Path(rba_compress.__file__).parent / "latent"
    modules = {f"latent.{p.stem}" for p in root.glob("*.py")} - {"latent.__init__"}
    assert modules == {name for name in LATENT if name.startswith("latent.")}
    for module in modules:
        for name in imported(root / f"{module.split('.')[1]}.py"):
            assert name in LATENT[: LATENT.index(module)], f"{module} imports {name}"
