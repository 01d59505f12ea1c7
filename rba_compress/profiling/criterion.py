"""Choice of the divergence: what each output of a network means, and how its change is measured.

The main output is `logits`, or the first floating-point one. Its meaning is taken from the first source
that tells it: a setting, the problem type of a transformers configuration, the labels of the loader,
the graph. Other outputs are compared by their squared error. Losses, caches and outputs that no input
reaches are not compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from rba_compress.core.config import Config
from rba_compress.core.errors import ModelError
from rba_compress.core.outputs import is_compared, output_name
from rba_compress.core.plan import ComparedOutput, Divergence
from rba_compress.core.schema import Path
from rba_compress.graph.liveness import packet_of
from rba_compress.graph.tracer import Recording
from rba_compress.profiling.fidelity import Criterion, Function, Metric, require_labels

_aten = torch.ops.aten
_PASSED = {
    _aten.view,
    _aten._unsafe_view,
    _aten.squeeze,
    _aten._to_copy,
    _aten.alias,
    _aten.add,
    _aten.div,
    _aten.mul,
    _aten._log_softmax,
}
_SCALED = {_aten.div, _aten.mul}
_PRODUCTS = {_aten.addmm, _aten.mm, _aten.linear, _aten.convolution}
_LINKS: dict[Any, Divergence] = {_aten._softmax: "kl", _aten.sigmoid: "bernoulli"}
_PROBLEMS: dict[str, Divergence] = {
    "single_label_classification": "kl",
    "multi_label_classification": "bernoulli",
    "regression": "nse",
}
NAMES: dict[Divergence, str] = {
    "kl": "KL of the softmax",
    "bernoulli": "Bernoulli KL of each label",
    "nse": "squared error over variance",
    "cosine": "one minus the cosine",
    "given": "a function",
}


def require_criterion(
    model: nn.Module,
    recording: Recording,
    config: Config,
    labels: Tensor | None,
    *,
    function: Function | None,
    metrics: Mapping[str, Metric] | None,
) -> tuple[Criterion, tuple[str, ...]]:
    """Return the criterion with the metrics, and the notes, as `criterion_of`.

    Raises:
        ModelError: as `criterion_of`.
        LoaderError: a label is none of the classes.
    """
    criterion, notes, classes = criterion_of(model, recording, config, labels, function)
    if criterion.kind == "kl":
        require_labels(labels, classes)
    return replace(criterion, metrics=dict(metrics or {})), notes


def criterion_of(
    model: nn.Module,
    recording: Recording,
    config: Config,
    labels: Tensor | None = None,
    function: Function | None = None,
) -> tuple[Criterion, tuple[str, ...], int]:
    """Choose the divergence of every output.

    Args:
        labels: those of the first batch.
        function: a user-defined divergence, in place of all others.

    Returns:
        The criterion; notes on it for the reader, one a line; and the length of the main output's last
        axis, which is the number of classes where the output holds scores.

    Raises:
        ModelError: no output is a floating-point tensor with one row per sample.
    """
    named = _float_outputs(recording)
    path, main = _main(model, recording, named)
    if function is not None:
        return Criterion("given", function), (), main.meta["shape"][-1]
    several = path[-1:] != ("logits",) and len(named) > 1
    kind, probabilities, assumed = _main_kind(
        model, path, main, several=several, config=config, labels=labels
    )
    outputs = [ComparedOutput(name=output_name(path), divergence=kind, probabilities=probabilities)]
    apart: list[str] = []
    reached = _reached(recording.graph)
    for other, node in named.items():
        shape = node.meta["shape"]
        if other == path or node not in reached or not shape:
            continue
        if shape[0] % recording.samples:
            apart.append(f"{output_name(other)} {shape}")
            continue
        rest: Divergence = "cosine" if config.divergence == "cosine" else "nse"
        outputs.append(ComparedOutput(name=output_name(other), divergence=rest))
    notes = [assumed] if assumed else []
    if len(outputs) > 1:
        each = ", ".join(f"{o.name} ({NAMES[o.divergence]})" for o in outputs)
        notes.append(f"outputs compared, their divergences summed: {each}")
    if apart:
        notes.append(f"outputs not compared, for they have no row a sample: {', '.join(apart)}")
    return Criterion(kind, None, tuple(outputs)), tuple(notes), main.meta["shape"][-1]


def _float_outputs(recording: Recording) -> dict[Path, fx.Node]:
    """Return the floating-point outputs by path, the main one first, as `outputs.float_outputs`."""
    floats = {p: n for p, n in recording.outputs.items() if n.meta["dtype"].is_floating_point}
    chosen = {path: node for path, node in floats.items() if is_compared(path)} or floats
    chosen = {path: node for path, node in chosen.items() if node.meta["shape"]} or chosen
    return {p: chosen[p] for p in sorted(chosen, key=lambda path: path[-1:] != ("logits",))}


def _main(model: nn.Module, recording: Recording, named: dict[Path, fx.Node]) -> tuple[Path, fx.Node]:
    kind = type(model).__name__
    if not named:
        dtypes = ", ".join(str(n.meta["dtype"]) for n in recording.outputs.values()) or "no tensor"
        raise ModelError(
            f"the output of {kind} holds no floating-point tensor ({dtypes}): there is nothing to "
            "measure a compressed network by"
        )
    path, node = next(iter(named.items()))
    shape = node.meta["shape"]
    if shape[:1] != (recording.samples,):
        raise ModelError(
            f"{kind} gives an output of shape {shape} for {recording.samples} samples: what is lost is "
            "measured sample by sample. Let its output have one row a sample"
        )
    return path, node


def _main_kind(
    model: nn.Module,
    path: Path,
    node: fx.Node,
    *,
    several: bool,
    config: Config,
    labels: Tensor | None,
) -> tuple[Divergence, bool, str]:
    """Return the main output's divergence, whether it holds probabilities, and what was assumed."""
    link, scores = _link(node)
    if config.divergence != "auto":
        return config.divergence, link == config.divergence, ""
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    if path[-1:] == ("logits",) and problem in _PROBLEMS:
        return _PROBLEMS[problem], False, ""
    shape = node.meta["shape"]
    known = None if labels is None else _kind_of_labels(labels, shape)
    if known is not None:
        return known, link == known, ""
    kind = "nse" if several else _kind_of_graph(shape, path, link, scores)
    if kind not in ("kl", "bernoulli") or labels is not None or len(shape) > 2:
        return kind, link == kind, ""
    what = "class scores" if kind == "kl" else "probabilities of several labels"
    others = [name for name in ("kl", "bernoulli", "nse", "cosine") if name != kind]
    return kind, link == kind, (
        f"the output {output_name(path)} (N, {shape[-1]}) is taken for {what} and compared by the "
        f"{NAMES[kind]}; Config(divergence=...) takes another: {', '.join(others)}"
    )  # fmt: skip


def _kind_of_labels(labels: Tensor, shape: tuple[int, ...]) -> Divergence | None:
    """Return the divergence that labels imply; None for integer classes, which fit any scores."""
    classes = shape[-1] if len(shape) > 1 else 1
    one = labels.numel() == len(labels)
    binary = bool(((labels == 0) | (labels == 1)).all())
    if one and classes == 1:
        return "bernoulli" if binary else "nse"
    if labels.ndim < 2 or labels.shape[1:] != shape[1:]:
        return None
    sums = labels.double().sum(-1)
    if bool((labels >= 0).all()) and bool((sums - 1).abs().max() < 1e-4):
        return "kl"  # one-hot, or mixed classes
    return "bernoulli" if binary else "nse"


def _link(node: fx.Node) -> tuple[Divergence | None, bool]:
    """Return the kind of probabilities that an output holds, if any, and whether its scores come from a
    matrix product or convolution.

    Sums, means of heads and a log-softmax behind the product are passed over. Scores divided by a
    temperature are therefore still scores; a vector divided by its own norm, a direction, is not.
    """
    link: Divergence | None = None
    while packet_of(node) in _PASSED or (packet_of(node) in _LINKS and link is None):
        source, *others = node.args
        tensors = [n for n in others if isinstance(n, fx.Node)]
        scaled = packet_of(node) in _SCALED and any(math.prod(n.meta["shape"]) > 1 for n in tensors)
        if scaled or not isinstance(source, fx.Node):
            break
        link = link or _LINKS.get(packet_of(node))
        node = source
    return link, packet_of(node) in _PRODUCTS


def _kind_of_graph(
    shape: tuple[int, ...], path: Path, link: Divergence | None, scores: bool
) -> Divergence:
    """Return `kl` for (N, classes) from a linear layer, and for (N, T, classes) called `logits`;
    `bernoulli` behind a sigmoid; `cosine` for any other (N, d), an embedding; `nse` for all the rest.
    """
    if len(shape) <= 2 and link == "bernoulli" and scores:
        return "bernoulli"
    wanted = (2, 3) if path[-1:] == ("logits",) else (2,)
    if len(shape) not in wanted or shape[-1] < 2:
        return "nse"
    if scores:
        return link or "kl"
    return "cosine" if len(shape) == 2 else "nse"


def _reached(graph: fx.Graph) -> set[fx.Node]:
    """Return the nodes that depend on some input: a learned anchor or temperature is not among them."""
    reached: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in reached for n in node.all_input_nodes):
            reached.add(node)
    return reached
