"""Constructor arguments inferred from a network: an architecture that rebuilds it, settings and all.

Libraries do not keep every argument that a network was built with. Candidates are read off the module
tree: arguments that the library kept, attributes of an argument's name, and the values that a network
built without the argument lacks. A candidate is accepted if fewer settings differ with it.
"""

from __future__ import annotations

import inspect
import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from inspect import Parameter
from typing import Any

import torch
from pydantic import JsonValue
from torch import nn

from rba_compress.artifacts.architecture import Architecture, fetching
from rba_compress.artifacts.tree_comparison import CLASS, LENGTH, Settings, differing, settings
from rba_compress.core.errors import WeightsError
from rba_compress.core.plan import Plan

_BUILDS = 150
"""Largest number of networks to build, on the meta device, in search of arguments."""
_SCALARS, _LISTS = 6, 16
"""Largest numbers of values to try for one argument."""
_PROBE = 0.5
"""Trial value of an argument, from which other values are scaled."""


def completed(architecture: Architecture, model: nn.Module, plan: Plan) -> Architecture:
    """Return the architecture with the arguments that leave the fewest settings of a network different.

    Args:
        architecture: the architecture that the network states.
        model: the network, rewritten by `plan`.
        plan: the plan; its replaced blocks are compared where a part of them is left.
    """
    search, parameters = _Search(model, plan), _parameters(architecture)
    kept = {k: v for k, v in _kept_arguments(model).items() if k not in architecture.arguments}
    guesses = [{}, kept, search.named(architecture, parameters)]
    starts = sorted((_extended(architecture, guess) for guess in guesses), key=search.cost)
    best = starts[0]
    for start in starts:
        best = min(best, search.descend(start, parameters), key=search.cost)
        if not search.cost(best):
            break
    best = search.around(best, parameters)
    for name in [n for n in best.arguments if n not in architecture.arguments]:
        best = min(_without(best, name), best, key=search.cost)
    return best


class _Search:
    """Greedy search for the arguments of a network that leave the fewest settings different."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self.wanted = settings(model)
        # Behind a merge of positions, blocks that stay are run by a graph, too.
        outer = [new for new in plan.replacements if not new.inner or new.runs_by_graph]
        rewritten = (block for new in outer for block in (*new.blocks, *new.behind))
        self.gone = {block.path for block in rewritten}
        self.narrowed = {
            f"{r.key}{name}".rpartition(".")[0] for r in plan.replacements for name in r.narrowed
        }
        self.built: dict[str, Settings | None] = {}

    def cost(self, architecture: Architecture) -> float:
        return math.inf if self._settings(architecture) is None else len(self._left(architecture))

    def named(self, base: Architecture, parameters: Iterable[Parameter]) -> dict[str, JsonValue]:
        """Return the differing settings that have the name of a parameter."""
        values = {n: self.wanted[p, n] for p, n in self._left(base) if (p, n) in self.wanted}
        known = {p.name: values[p.name] for p in parameters if p.name in values}
        return {n: v for n, v in known.items() if isinstance(v, bool | int | float | str)}

    def descend(self, best: Architecture, parameters: list[Parameter]) -> Architecture:
        """Take every argument that lowers the cost, until none does."""
        before = None
        while self.cost(best) and best != before:
            before = best
            for parameter in parameters:
                for trial in self._trials(best, parameter):
                    best = min(best, trial, key=self.cost)
        return best

    def around(self, best: Architecture, parameters: list[Parameter]) -> Architecture:
        """Search on from arguments that mend one setting but change others, which further ones mend."""
        for parameter in parameters if self.cost(best) else ():
            for trial in self._trials(best, parameter):
                mended = set(self._left(best)) - set(self._left(trial))
                if mended and self.cost(trial) < math.inf:
                    further = self.descend(trial, parameters)
                    if self.cost(further) < self.cost(best):
                        return further
        return best

    def _settings(self, architecture: Architecture) -> Settings | None:
        """Return the settings of a rebuilt network; None if it cannot be built, or too many were."""
        key = json.dumps(architecture.arguments, sort_keys=True)
        if key not in self.built:
            network = _skeleton(architecture) if len(self.built) < _BUILDS else None
            self.built[key] = None if network is None else settings(network)
        return self.built[key]

    def _left(self, architecture: Architecture) -> list[tuple[str, str]]:
        """Return the keys of differing settings; in replaced blocks, of those that both still have."""
        given = self._settings(architecture) or {}

        def counts(path: str, name: str) -> bool:
            both = (path, name) in self.wanted and (path, name) in given
            if path in self.narrowed:
                return name == CLASS
            if path in self.gone:
                return name == CLASS and not both
            return both or not any(path.startswith(f"{block}.") for block in self.gone)

        return [key for key in differing(self.wanted, given) if counts(*key)]

    def _trials(self, base: Architecture, parameter: Parameter) -> Iterator[Architecture]:
        for value in self._candidates(base, parameter):
            yield _extended(base, {parameter.name: value})

    def _candidates(self, base: Architecture, parameter: Parameter) -> Iterator[JsonValue]:
        """Yield values that an argument may have had, the likeliest first."""
        left = [key for key in self._left(base) if key in self.wanted]
        values = [(name, self.wanted[path, name]) for path, name in left]
        default = parameter.default
        kinds = f"{parameter.annotation} {type(default).__name__} {parameter.name}"
        yield from _most([v for name, v in values if name == parameter.name], _SCALARS)
        if re.search(r"\bbool\b", kinds):
            yield not default
            if not self._moved(base, parameter.name, not default):
                yield bool(default)
        if re.search(r"\bint\b", kinds):
            yield from _most([v for name, v in values if name == LENGTH], _SCALARS)
            numbers = [n for _, v in values for n in (v if isinstance(v, tuple) else (v,))]
            yield from _most([n for n in numbers if type(n) is int], _SCALARS)
        moved = self._moved(base, parameter.name, _PROBE) if re.search(r"\bfloat\b", kinds) else {}
        if not moved.keys().isdisjoint(left):
            yield from _most([_PROBE * ratio for ratio in self._ratios(moved)], _SCALARS)
            yield from _most([v for _, v in values if isinstance(v, float)], _SCALARS)
            yield _PROBE
        if re.search(r"\bstr\b|Literal", kinds):
            yield from _most([v for n, v in values if n != CLASS and isinstance(v, str)], _SCALARS)
        if re.search(r"(act|norm)_layer", kinds):
            yield from _most([_layer_name(v) for n, v in values if n == CLASS], _SCALARS)
        if re.search(r"\b(list|tuple|sequence)\b", kinds, re.IGNORECASE):
            yield from _most(self._by_stage(left), _LISTS)
        if default is not None and re.search(r"Optional|None", kinds):
            yield None

    def _moved(self, base: Architecture, name: str, value: JsonValue) -> Settings:
        """Return the settings that an argument changes."""
        before, after = self._settings(base), self._settings(_extended(base, {name: value}))
        if before is None or after is None:
            return {}
        return {key: after.get(key) for key in differing(before, after)}

    def _ratios(self, moved: Settings) -> Iterator[float]:
        """Yield the ratios of the network's settings to those that follow a probe."""
        for key, value in moved.items():
            wanted = self.wanted.get(key)
            if type(value) in (int, float) and type(wanted) in (int, float) and value:
                yield float(f"{wanted / value:.6g}")

    def _by_stage(self, left: Iterable[tuple[str, str]]) -> list[list[JsonValue]]:
        """Return the numbers of a network's stages, one a stage: depths, widths, heads."""
        first = [(re.sub(r"\d+", "*", path, count=1), name) for path, name in left]
        groups: dict[tuple[str, str], list[Any]] = {key: [] for key in first if "*" in key[0]}
        for (path, name), value in self.wanted.items():
            group = groups.get((re.sub(r"\d+", "*", path, count=1), name))
            if group is not None:
                group.append(value[0] if isinstance(value, tuple) and len({*value}) == 1 else value)
        return [g for g in groups.values() if len(g) > 1 and all(type(n) is int for n in g)]


def _most(values: Iterable[Any], count: int) -> Iterator[JsonValue]:
    """Yield the most frequent values, of those that JSON can hold."""
    texts: Counter[str] = Counter()
    for value in values:
        try:
            texts[json.dumps(value)] += 1
        except (TypeError, ValueError):
            continue
    for text, _ in texts.most_common(count):
        yield json.loads(text)


def _layer_name(qualified: str) -> str:
    """Return a layer's name for timm's factories: `quick_gelu` for `timm.layers.QuickGELU`."""
    name = re.sub(r"([RS])([ei])LU", r"\1\2lu", qualified.rpartition(".")[2])
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=Tanh)", "_", name).lower()


def _skeleton(architecture: Architecture) -> nn.Module | None:
    """Return a network of an architecture, if possible without storage; None if it cannot be built."""
    for device in ("meta", "cpu"):
        try:
            with warnings.catch_warnings(), torch.device(device):
                warnings.simplefilter("ignore")
                return architecture.build()
        except WeightsError:
            continue
    return None


def _kept_arguments(model: nn.Module) -> dict[str, JsonValue]:
    """Return the arguments that timm keeps on a network, from version 1.0.31 on."""
    kept: Any = getattr(model, "_model_args", {})
    arguments = {}
    for name, value in kept.items() if isinstance(kept, Mapping) else ():
        for plain in _most([value], 1):
            arguments[str(name)] = plain
    return {} if any(fetching(arguments)) else arguments


def _parameters(architecture: Architecture) -> list[Parameter]:
    """Return the parameters of the class that an architecture builds."""
    if architecture.library == "transformers":
        return list(architecture.flags())
    bare = _skeleton(architecture.model_copy(update={"arguments": {}}))
    parameters: dict[str, Parameter] = {}
    for kind in type(bare).__mro__:
        own = inspect.signature(kind).parameters if "__init__" in vars(kind) else {}
        parameters = {**own, **parameters}
        if own and not any(p.kind is p.VAR_KEYWORD for p in own.values()):
            break
    dropped = {"self", "device", "dtype", "num_classes", "weight_init", "fix_init"}
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return [p for n, p in parameters.items() if n not in dropped and p.kind in named]


def _extended(architecture: Architecture, arguments: Mapping[str, JsonValue]) -> Architecture:
    return architecture.model_copy(update={"arguments": {**architecture.arguments, **arguments}})


def _without(architecture: Architecture, name: str) -> Architecture:
    rest = {k: v for k, v in architecture.arguments.items() if k != name}
    return architecture.model_copy(update={"arguments": rest})
