"""Limits of a budget, and the distance of a network from them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rba_compress.core.config import Budget, Config
from rba_compress.core.cost import Cost, kept
from rba_compress.core.errors import BudgetError
from rba_compress.core.plan import Plan
from rba_compress.planning.evaluator import Evaluation
from rba_compress.planning.plan_cost import network_cost
from rba_compress.planning.state import SearchState
from rba_compress.profiling.profiler import Profile
from rba_compress.units.span import SPAN

SAME_LATENCY = 0.02
"""Difference of two latency shares below which they count as equal: timings vary."""


class Limits:
    """Absolute limits of a budget for one network.

    Raises:
        BudgetError: even with every block skipped the limits are not met.
    """

    def __init__(self, profile: Profile, budget: Budget) -> None:
        self.profile, self.budget = profile, budget
        self.costs = budget.limits(profile.original.macs, profile.original.params)
        """Limits by name: of macs, params and the share of latency, where they are limited."""
        self._require_reachable()

    @property
    def floor(self) -> Cost:
        """Cost with every block skipped, and those that cannot be skipped as narrow as they may be."""
        skips = [SPAN.choice(c.chain, 0, len(c.chain)) for c in self.profile.chains]
        floor = network_cost(self.profile, Plan(replacements=tuple(skips)))
        for chain in self.profile.fixed:
            for width in chain.blocks[0].widths:
                floor -= width.saving(width.channels * 3 // 4, chain.positions)
        return floor

    def _require_reachable(self) -> None:
        """Require that the limits of cost can be met.

        Raises:
            BudgetError: even with every block skipped the limits are not met.
        """
        floor = self.floor
        missed = [name for name, limit in self.costs.items() if getattr(floor, name) > limit]
        if missed:
            whole = self.profile.original
            wanted = ", ".join(f"{name} <= {self.costs[name]:,.0f}" for name in missed)
            raise BudgetError(
                f"no plan reaches {wanted} (of {whole.macs:,} macs, {whole.params:,} params): the "
                f"cheapest reachable is {floor.macs:,} macs ({kept(floor.macs, whole.macs):.3f}) and "
                f"{floor.params:,} params ({kept(floor.params, whole.params):.3f})"
                + (". An int is absolute: 1.0 keeps all" if 1 in self.costs.values() else "")
            )

    def require_measurable(self, original: Evaluation) -> None:
        """Require that the limits of quality can be measured.

        Raises:
            BudgetError: a limit is on class scores, labels or a metric, which there are none of.
        """
        asked = self.budget
        if original.agreement is None and (asked.agreement, asked.accuracy_drop) != (None, None):
            raise BudgetError(
                f"agreement and accuracy are of class scores; {self.profile.model} gives none: "
                "limit the divergence"
            )
        if original.accuracy_drop is None and asked.accuracy_drop is not None:
            raise BudgetError(
                "accuracy_drop needs labels: let every batch of the loader be (input, labels)"
            )
        for name in asked.metric_drop or {}:
            if name not in original.metric_drops:
                known = ", ".join(map(repr, original.metric_drops)) or "none"
                raise BudgetError(
                    f"metric_drop limits {name!r}, and the metrics are {known}: pass "
                    f"metrics={{{name!r}: function}} to compress, or to profile"
                )

    def unreached(self, best: SearchState, after: SearchState | None, config: Config) -> str:
        """Return the message of a budget that no plan was found for.

        Args:
            best: the last state within the limits of quality.
            after: the next one, which breaks them; None where there was no step.
            config: the settings, with the units and the kinds of maps that were tried.
        """
        original = self.profile.original
        missed = ", ".join(
            f"{name} <= {self.costs[name]:{'.3f' if name == 'latency' else ',.0f'}}"
            for name in self.lacking(best.cost)
        )
        reached = (
            f"{best.cost.macs:,} macs ({kept(best.cost.macs, original.macs):.3f}), "
            f"{best.cost.params:,} params ({kept(best.cost.params, original.params):.3f})"
            + (f", {best.cost.latency:.3f} of the latency" if "latency" in self.costs else "")
            + f" at divergence {best.mean:.4g}"
        )
        if after is not None:
            within = ", ".join(self.broken(after))
            return (
                f"no plan was found that reaches {missed} within {within}: the best within it "
                f"has {reached}; the next step, {after.cost.macs:,} macs, breaks it"
            )
        return (
            f"no plan of the units {', '.join(config.units)} and the maps {', '.join(config.maps)} "
            f"brings the network to {missed}: the best reachable has {reached}; allow other units or "
            "cheaper maps"
        )

    def broken(self, state: SearchState) -> list[str]:
        """Return the limits of quality that do not hold, in words."""
        seen = state.evaluation
        return self.budget.broken(seen.mean, seen.agreement, seen.accuracy_drop, seen.metric_drops)

    def lacking(self, cost: Cost) -> list[str]:
        """Return the names of the limited costs that are above their limits."""
        return [name for name, limit in self.costs.items() if getattr(cost, name) > limit]

    @property
    def _shares(self) -> dict[str, float]:
        """Limits as shares of the original's costs."""
        return {name: limit / getattr(self._whole, name) for name, limit in self.costs.items()}

    @property
    def _whole(self) -> Cost:
        return self.profile.original.model_copy(update={"latency": 1.0})

    @property
    def goal_size(self) -> float:
        """Size at which all limits of cost are met; 0 without any."""
        return min(self._shares.values(), default=0.0)

    def tighten(self, estimated: float, measured: float) -> None:
        """Lower the limit of the estimated latency to where a measured one suggests that it is met."""
        limit = self.costs["latency"]
        share = max((1 - measured) / max(1 - estimated, 1e-9), 0.1)
        lower = max(min(1 - (1 - limit) / share, estimated - SAME_LATENCY / 2), 0.0)
        self.costs = self.costs | {"latency": lower}

    def size(self, cost: Cost) -> float:
        """Return the share of the original's cost that is left, as `sizes`."""
        return float(self.sizes(self.vector(cost)[None])[0])

    def saved(self, cost: Cost, saving: Cost) -> float:
        """Return by how much a saving reduces the size of a network of that cost."""
        return self.size(cost) - self.size(cost - saving)

    def sizes(self, costs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the shares of the original's cost that are left, on one scale for all limits.

        For one limit the share of that cost; for several ones that of the limit that is furthest from
        being met, so that the smallest limited share is reached where all limits are met.

        Args:
            costs: MACs, parameters and shares of latency, (n, 3).
        """
        columns: NDArray[np.float64] = (costs / self.vector(self._whole).clip(1e-9)).T
        kept: dict[str, NDArray[np.float64]] = dict(zip(_COSTS, columns, strict=True))
        shares = self._shares or {"macs": 0.0}
        depth = 1 - min(shares.values())
        if depth <= 0:
            return kept["macs"]
        asked = [(kept[name] - limit) / max(1 - limit, 1e-9) for name, limit in shares.items()]
        left: NDArray[np.float64] = 1 - depth * (1 - np.max(asked, axis=0))
        return left

    @staticmethod
    def vector(cost: Cost) -> NDArray[np.float64]:
        """Return MACs, parameters and share of latency, (3,)."""
        return np.array([getattr(cost, name) for name in _COSTS], dtype=np.float64)


_COSTS = ("macs", "params", "latency")
