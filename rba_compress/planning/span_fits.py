"""Maps over spans, fitted on the original streams; the paper's choice is one of them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from rba_compress.core.map_spec import MapSpec
from rba_compress.core.plan import Plan, Replacement
from rba_compress.planning.plan_cost import plan_saving
from rba_compress.planning.state import Solution, keyed
from rba_compress.profiling.chain_statistics import ChainProfile
from rba_compress.profiling.profiler import Profile
from rba_compress.units.span import SPAN


def fit_span(
    profiled: ChainProfile, start: int, stop: int, spec: MapSpec
) -> tuple[Replacement, dict[str, Tensor]]:
    """Fit one map over the span `start:stop` of a profiled chain, on the original streams.

    Returns:
        The decision, and its tensors by their key in the compressed model's state dict.
    """
    new = SPAN.choice(profiled.chain, start, stop, spec)
    fitted, tensors = SPAN.fit(new, profiled.moments.pair(start, stop, spectrum=True))
    return fitted, keyed(fitted, tensors)


def fit_spans(profiled: ChainProfile, spans: Iterable[tuple[int, int]], spec: MapSpec) -> Solution:
    """Fit one map in place of each span of a profiled chain, each on the original streams."""
    fits = [fit_span(profiled, start, stop, spec) for start, stop in spans]
    tensors = {key: tensor for _, fitted in fits for key, tensor in fitted.items()}
    return Solution(Plan(replacements=tuple(replacement for replacement, _ in fits)), tensors)


def paper_span(profile: Profile, macs: int) -> Solution | None:
    """Return the paper's choice at a cost: one plain linear map over one span (arXiv 2410.04941).

    Among the shortest spans that bring the network to `macs`, or else among those that save most, the
    span whose ends are most similar by the paper's measure, -mean ||h_stop - h_start||^2 on read-out
    rows. None if no span saves anything.
    """
    spec, sites = MapSpec(kind="linear"), []
    for profiled in profile.chains:
        chain, alike = profiled.chain, profiled.similarity("redundancy")
        for start, stop in chain.spans(profile.window):
            mapped = SPAN.choice(chain, start, stop, spec)
            left = profile.original.macs - plan_saving([chain], [mapped]).macs
            order = max(left - macs, 0), stop - start, -float(alike[start, stop])
            if left < profile.original.macs:
                sites.append((order, profiled, (start, stop)))
    if not sites:
        return None
    _, profiled, span = min(sites, key=lambda site: site[0])
    return fit_spans(profiled, [span], spec)
