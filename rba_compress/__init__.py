"""Make pretrained networks smaller without training them.

`compress(model, loader)` finds spans of blocks whose representations hardly change, replaces each by
one map fitted in closed form, and returns a network of the same class with a report of its cost and
its loss. See README.md.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rba_compress.api import Result, compress, heal, save
    from rba_compress.artifacts.architecture import Architecture
    from rba_compress.artifacts.certificate import Certificate
    from rba_compress.artifacts.gguf_export import export_gguf
    from rba_compress.artifacts.levels import Levels, load
    from rba_compress.artifacts.onnx_export import export_onnx, export_onnx_levels, export_pt2
    from rba_compress.artifacts.verification import verify
    from rba_compress.core.config import Budget, Config, Healing
    from rba_compress.core.errors import (
        ActivationError,
        ArtifactError,
        BudgetError,
        ConfigError,
        ExportError,
        FidelityError,
        LoaderError,
        MemoryLimitError,
        ModelError,
        NoChainError,
        PlanError,
        RankError,
        RBAError,
        SpaceError,
        WeightsError,
    )
    from rba_compress.core.plan import Plan
    from rba_compress.graph.discovery import Support
    from rba_compress.planning.search import search
    from rba_compress.profiling.drift import Shift
    from rba_compress.profiling.latency import benchmark
    from rba_compress.profiling.profiler import Profile, profile
    from rba_compress.reporting.comparison import compare
    from rba_compress.reporting.plots import plot_pareto, plot_similarity, plot_span_errors
    from rba_compress.reporting.report import Report
    from rba_compress.units.offers import supports
    from rba_compress.units.splice import splice

__version__ = "0.1.0"

__all__ = [
    "ActivationError",
    "Architecture",
    "ArtifactError",
    "Budget",
    "BudgetError",
    "Certificate",
    "Config",
    "ConfigError",
    "ExportError",
    "FidelityError",
    "Healing",
    "Levels",
    "LoaderError",
    "MemoryLimitError",
    "ModelError",
    "NoChainError",
    "Plan",
    "PlanError",
    "Profile",
    "RBAError",
    "RankError",
    "Report",
    "Result",
    "Shift",
    "SpaceError",
    "Support",
    "WeightsError",
    "benchmark",
    "compare",
    "compress",
    "export_gguf",
    "export_onnx",
    "export_onnx_levels",
    "export_pt2",
    "heal",
    "load",
    "plot_pareto",
    "plot_similarity",
    "plot_span_errors",
    "profile",
    "save",
    "search",
    "splice",
    "supports",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Load a public name where it is first used: torch is slow to load, and help needs none of it."""
    if name not in _HOMES:
        if not name.startswith("_") and find_spec(f"rba_compress.{name}"):
            return import_module(f"rba_compress.{name}")
        raise AttributeError(f"module 'rba_compress' has no attribute {name!r}")
    found = getattr(import_module(f"rba_compress.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return [*globals(), *__all__]


_HOMES = {
    "ActivationError": "core.errors",
    "Architecture": "artifacts.architecture",
    "ArtifactError": "core.errors",
    "Budget": "core.config",
    "BudgetError": "core.errors",
    "Certificate": "artifacts.certificate",
    "Config": "core.config",
    "ConfigError": "core.errors",
    "ExportError": "core.errors",
    "FidelityError": "core.errors",
    "Healing": "core.config",
    "Levels": "artifacts.levels",
    "LoaderError": "core.errors",
    "MemoryLimitError": "core.errors",
    "ModelError": "core.errors",
    "NoChainError": "core.errors",
    "Plan": "core.plan",
    "PlanError": "core.errors",
    "Profile": "profiling.profiler",
    "RBAError": "core.errors",
    "RankError": "core.errors",
    "Report": "reporting.report",
    "Result": "api",
    "Shift": "profiling.drift",
    "SpaceError": "core.errors",
    "Support": "graph.discovery",
    "WeightsError": "core.errors",
    "benchmark": "profiling.latency",
    "compare": "reporting.comparison",
    "compress": "api",
    "export_gguf": "artifacts.gguf_export",
    "export_onnx": "artifacts.onnx_export",
    "export_onnx_levels": "artifacts.onnx_export",
    "export_pt2": "artifacts.onnx_export",
    "heal": "api",
    "load": "artifacts.levels",
    "plot_pareto": "reporting.plots",
    "plot_similarity": "reporting.plots",
    "plot_span_errors": "reporting.plots",
    "profile": "profiling.profiler",
    "save": "api",
    "search": "planning.search",
    "splice": "units.splice",
    "supports": "units.offers",
    "verify": "artifacts.verification",
}
"""Module of each public name."""
