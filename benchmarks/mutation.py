"""Count the small faults, put into a module one at a time, that its tests notice.

    pip install mutmut
    python -m benchmarks.mutation linalg.moments linalg.maps units.splice planning.stages=100

Faults are those of mutmut: another number, operator or constant, an argument gone or None, an
assignment of None. Annotations, docstrings, decorators, what is raised and the case of strings stay as
they are. The first failure of a module's tests ends them, in a fork of one process that holds all heavy
imports. `planning.stages=100` takes a sample of 100, the same for the same `--seed`. Survivors are
printed as they are found, then a table.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.abc
import importlib.util
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import hypothesis
import libcst as cst
import pytest
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

PACKAGE = Path(__file__).parent.parent / "rba_compress"
NUMBERS = [
    "tests/planning/test_fit_statistics.py::test_pair_moments_add_up_and_are_weighted",
    "tests/planning/test_fit_statistics.py::test_a_correction_is_ridge_regression_of_the_gap",
    *("tests/hostile/test_numbers.py", "-k", "not (another_scale or nearly)"),
]
REWRITE = [
    *("tests/graph/test_rewrite.py", "tests/units/test_block_variants.py", "-k"),
    "not (exact or combination or module-)",
]
SEARCH = [
    *("tests/planning/test_budget.py", "tests/planning/test_search.py", "-k"),
    "not (agreement or quality or decision or logged or padding or decoder or profile_sees"
    " or worse_than or fewer_streams or taken_first)",
]
TESTS = {
    "linalg.moments": [
        "tests/linalg/test_moments.py",
        "tests/linalg/test_maps.py",
        "tests/linalg/test_similarity.py",
        *NUMBERS,
    ],
    "linalg.maps": ["tests/linalg/test_maps.py", *NUMBERS],
    "graph.rewrite": REWRITE,
    "units.splice": ["tests/units/test_token_merge.py", "tests/core/test_offload.py", *REWRITE],
    "planning.limits": SEARCH,
    "planning.plan_cost": [*SEARCH[:2], "tests/units/test_block_variants.py", *SEARCH[2:]],
    "planning.refinement": SEARCH,
    "planning.search": SEARCH,
    "planning.stages": ["tests/planning/test_stages.py", *SEARCH],
    "planning.descent": ["tests/planning/test_stages.py", *SEARCH],
    "planning.solver": ["tests/planning/test_solver.py"],
    "linalg.sketch": ["tests/linalg/test_sketch.py"],
    "profiling.quadratic_form": ["tests/profiling/test_quadratic_form.py"],
}
"""The quick ones: a fault that is not noticed is seen by all of them."""

OPTIONS = [
    *("-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=-m 'not slow and not catalogue'"),
    *("-p", "no:unraisableexception"),  # which collects garbage for as long as the tests run
    *("-W", "ignore::pytest.PytestAssertRewriteWarning"),  # imported before the fork
]


def source_of(module: str) -> Path:
    """Return the file of a module of the package, such as linalg.maps."""
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


class Faults(cst.CSTVisitor):  # type: ignore[misc]
    """Nodes of a module that may be changed, with their replacements and lines."""

    METADATA_DEPENDENCIES = (PositionProvider,)

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, cst.CSTNode, cst.CSTNode]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        left_alone = (cst.Annotation, cst.Raise, cst.Decorator, cst.Import, cst.ImportFrom)
        if isinstance(node, left_alone) or (
            isinstance(node, cst.Expr)
            and isinstance(node.value, cst.BaseString | cst.ConcatenatedString)
        ):
            return False
        for kind, operator in mutation_operators:
            changed = operator(node) if isinstance(node, kind) else ()
            for other in list(changed)[: 1 if isinstance(node, cst.BaseString) else None]:
                self.found.append((self.get_metadata(PositionProvider, node).start.line, node, other))
        return True


def faults(module: str, count: int | None, seed: int) -> list[tuple[str, str]]:
    """Faulty versions of a module, all or a sample: the line with its change, and the source."""
    wrapper = MetadataWrapper(cst.parse_module(source_of(module).read_text()))
    visitor, tree = Faults(), wrapper.module
    wrapper.visit(visitor)
    found = visitor.found
    if count is not None and count < len(found):
        chance = random.Random(seed)  # nosec B311 # repeatable, no secret
        picked = sorted(chance.sample(range(len(found)), count))
        found = [found[k] for k in picked]
    made: dict[str, str] = {}
    for line, node, other in found:
        code = tree.deep_replace(node, other).code
        old, new = (" ".join(tree.code_for_node(n).split()) for n in (node, other))
        with contextlib.suppress(SyntaxError):
            compile(code, module, "exec", dont_inherit=True)
            made.setdefault(code, f"{line}: {old}  ->  {new}")
    return [(said, code) for code, said in made.items()]


class Faulty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from a source that is given."""

    def __init__(self, name: str, code: str) -> None:
        self.name, self.code = name, code

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        return importlib.util.spec_from_loader(name, self) if name == self.name else None

    def exec_module(self, module: ModuleType) -> None:
        file = str(source_of(module.__name__.removeprefix("rba_compress.")))
        module.__file__ = file
        code = compile(self.code, file, "exec", dont_inherit=True)
        exec(code, module.__dict__)  # nosec B102 # of this package's own source, changed here


def outcome(module: str, code: str, tests: Sequence[str], limit: float) -> tuple[str, float]:
    """Return the tests' verdict on one version of a module, and the seconds they took."""
    began, child = time.monotonic(), os.fork()
    if child == 0:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        try:
            sys.meta_path.insert(0, Faulty(f"rba_compress.{module}", code))
            status = int(pytest.main([*OPTIONS, *tests]))
        except BaseException:  # noqa: BLE001
            status = 1
        os._exit(status)
    while time.monotonic() - began < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            name = "survived" if os.waitstatus_to_exitcode(status) == 0 else "killed"
            return name, time.monotonic() - began
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "killed", time.monotonic() - began


def preload(tests: Sequence[str]) -> None:
    """Import what tests import, and forget what is ours."""
    for test in ("tests/conftest.py", *(test for test in tests if test.startswith("tests/"))):
        importlib.import_module(test.partition("::")[0].removesuffix(".py").replace("/", "."))
    ours = ("rba_compress", "tests", "benchmarks")
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[name]
    gc.collect()
    gc.freeze()
    # Found again in a fault's own run, and once is enough.
    calm = hypothesis.settings(
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate], database=None, max_examples=30
    )
    hypothesis.settings.register_profile("mutation", calm, derandomize=True)
    hypothesis.settings.load_profile("mutation")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("modules", nargs="+", help="such as moments, or moments=100 for a sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tests", nargs="+", help="in place of the usual tests")
    asked = parser.parse_args()
    rows = []
    for name, _, count in (given.partition("=") for given in asked.modules):
        tests = asked.tests or TESTS[name]
        preload(tests)
        source = source_of(name).read_text()
        said, seconds = outcome(name, source, tests, 600)
        if said != "survived":
            raise SystemExit(f"the tests of {name} fail as it is")
        found = faults(name, int(count) if count else None, asked.seed)
        print(f"{name}: {len(found)} faults, tests take {seconds:.1f} s", flush=True)
        survived = 0
        for fault, code in found:
            if outcome(name, code, tests, 10 + 4 * seconds)[0] == "survived":
                survived += 1
                print(f"{name} {fault}", flush=True)
        rows.append((name, len(found), len(found) - survived, survived))
    print("| module | faults | killed | survived | score |\n| --- | --- | --- | --- | --- |")
    for name, total, killed, survived in rows:
        print(f"| {name} | {total} | {killed} | {survived} | {killed / max(total, 1):.3f} |")


if __name__ == "__main__":
    main()
