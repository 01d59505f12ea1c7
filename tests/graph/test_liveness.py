from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn.functional import scaled_dot_product_attention

from rba_compress.core.batch import as_batch
from rba_compress.graph.few_query_attention import attend
from rba_compress.graph.liveness import ALL, Need, liveness, packet_of
from rba_compress.graph.slice_propagation import narrow
from rba_compress.graph.tracer import record

aten = torch.ops.aten


def traced(function: Callable[..., Any], *tensors: Tensor) -> fx.Graph:
    """A function of tensors as an aten graph with shapes."""

    class Module(nn.Module):
        def forward(self, *given: Tensor) -> Any:
            return function(*given)

    exported = torch.export.export(Module(), tensors, strict=False)
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        node.meta["shape"] = tuple(value.shape) if isinstance(value, Tensor) else None
    output = next(n for n in exported.graph.nodes if n.op == "output")
    (output.args,) = (output.args[0],)
    return exported.graph


def run(graph: fx.Graph, *tensors: Tensor) -> Any:
    return fx.GraphModule(nn.Module(), graph)(*tensors)


def operations(graph: fx.Graph) -> list[str]:
    return [
        str(getattr(packet_of(n), "__name__", n.target)).removeprefix("aten.")
        for n in graph.nodes
        if n.op == "call_function"
    ]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_a_selection_moves_up_through_a_norm_and_a_linear_layer() -> None:
    x, w = normal(2, 9, 4), normal(6, 4)
    graph = traced(lambda x, w: torch.layer_norm(x, [4]).matmul(w.T).relu()[:, 0], x, w)
    compressed = narrow(graph)
    sizes = {packet_of(n): n for n in compressed.nodes if n.op == "call_function"}
    # By hand: slice the input first; everything behind it is done for one position.
    assert operations(compressed)[0] == "slice"
    assert sizes[aten.slice].args[1:] == (1, 0, 1)
    assert operations(compressed).count("slice") == 1
    torch.testing.assert_close(run(compressed, x, w), run(graph, x, w), rtol=0, atol=1e-12)


def test_a_fused_projection_is_split_and_only_its_queries_are_narrowed() -> None:
    """Keys and values are computed where more positions are read than a head has channels."""

    def attention(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        qkv = torch.nn.functional.linear(x, w, b).reshape(2, 9, 3, 2, 2).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 9, 4)[:, :3]

    x, w, b = normal(2, 9, 4), normal(12, 4), normal(12)
    graph = traced(attention, x, w, b)
    compressed = narrow(graph)
    linears = [n for n in compressed.nodes if packet_of(n) is aten.linear]
    rows = [n.args[1].args[1:] for n in linears]
    assert rows == [(0, 0, 4), (0, 4, 8), (0, 8, 12)]
    assert packet_of(linears[0].args[0]) is aten.slice
    assert [n.args[0].op for n in linears[1:]] == ["placeholder"] * 2
    torch.testing.assert_close(run(compressed, x, w, b), run(graph, x, w, b), rtol=0, atol=1e-12)


def test_one_query_projects_itself_instead_of_the_keys_and_values() -> None:
    def attention(x: Tensor, w: Tensor, b: Tensor, mask: Tensor) -> Tensor:
        qkv = torch.nn.functional.linear(x, w, b).reshape(2, 9, 3, 2, 2).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return mixed.transpose(1, 2).reshape(2, 9, 4)[:, 0]

    x, w, b, mask = normal(2, 9, 4), normal(12, 4), normal(12), normal(1, 1, 9, 9)
    graph = traced(attention, x, w, b, mask)
    compressed = narrow(graph)
    assert "attend" in operations(compressed)
    assert operations(compressed).count("linear") == 1
    torch.testing.assert_close(
        run(compressed, x, w, b, mask), run(graph, x, w, b, mask), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("kind", ["none", "additive", "boolean", "keys"])
def test_attend_is_attention(kind: str) -> None:
    n, heads, queries, positions, d, width = 2, 3, 2, 7, 4, 5
    x, q = normal(n, positions, width, seed=1), normal(n, heads, queries, d, seed=2)
    wk, wv, b = (normal(heads * d, *s, seed=i) for i, s in enumerate([(width,), (width,), ()], 3))
    mask = {
        "additive": normal(n, 1, queries, positions, seed=6),
        "boolean": normal(n, 1, 1, positions, seed=6) > -0.5,
    }.get(kind)
    keys = (x @ wk.T).reshape(n, positions, heads, d).transpose(1, 2)
    values = (x @ wv.T + b).reshape(n, positions, heads, d).transpose(1, 2)
    expected = scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=0.3)
    given_keys = keys if kind == "keys" else (x, wk)
    found = attend(q, given_keys, (x, wv, b), mask, 0.3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(attend(q, given_keys, values, mask, 0.3), expected)


def test_rotated_keys_stay_and_values_do_not() -> None:
    """The class token's query and key are not rotated, the others are, as in EVA-02."""

    def attention(x: Tensor, w: Tensor, turn: Tensor) -> Tensor:
        qkv = (x @ w.T).reshape(2, 9, 3, 2, 2).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = (torch.cat([t[:, :, :1], t[:, :, 1:] * turn], 2).type_as(v) for t in (q, k))
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 9, 4)[:, 0]

    x, w, turn = normal(2, 9, 4), normal(12, 4), normal(8, 2)
    graph = traced(attention, x, w, turn)
    compressed = narrow(graph)
    torch.testing.assert_close(run(compressed, x, w, turn), run(graph, x, w, turn), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("function", "reader"),
    [
        (lambda x: torch.layer_norm(x, [4]).mean(1), "aten.mean"),
        (lambda x: (x[:, 0], x), "output"),
        (lambda x: torch.flip(x, [1])[:, 0], "aten.flip"),
        (lambda x: torch.cat([x[:, 0], x[:, 1:].amax(1)], -1), "aten.amax"),
        (lambda x: torch.layer_norm(x, [9, 4])[:, 0], "aten.layer_norm"),
        (lambda x: x[:, -1], "aten.select"),
    ],
)
def test_what_reads_every_position_is_named(function: Callable[..., Any], reader: str) -> None:
    graph = traced(function, normal(2, 9, 4))
    x = next(iter(graph.nodes))
    found = liveness(graph)
    assert found.needs[x] == ALL
    assert reader in found.reader(x, 1)


def test_two_readers_join_their_needs() -> None:
    graph = traced(lambda x: x[:, 0] + x[:, 1], normal(2, 9, 4))
    assert liveness(graph).needs[next(iter(graph.nodes))] == Need(1, 2)


class Written(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        table = torch.zeros(*x.shape, 2)
        table[..., 0] = x
        return torch.softmax(table, 1)[..., :1]


def test_a_selection_of_what_was_written_through_a_view() -> None:
    graph = record(nn.Sequential(Written()), as_batch(torch.ones(2, 9, 4))).graph
    assert liveness(graph).needs[next(iter(graph.nodes))] == ALL


def test_a_slice_that_takes_everything_is_gone() -> None:
    graph = traced(lambda x: aten.slice.Tensor(x.exp(), 0, 0, sys.maxsize)[:, 0], normal(2, 9, 4))
    assert operations(graph).count("slice") >= 1
    compressed = narrow(graph)
    assert [n.args[1:] for n in compressed.nodes if packet_of(n) is aten.slice] == [(1, 0, 1)]
    torch.testing.assert_close(
        run(compressed, normal(2, 9, 4)), run(graph, normal(2, 9, 4)), rtol=0, atol=0
    )


def test_what_nothing_reads_is_gone() -> None:
    graph = traced(lambda x, y: torch.cat([x, y.exp()], 1)[:, :2], normal(2, 3, 4), normal(2, 6, 4))
    assert operations(narrow(graph)) == ["slice", "cat"]


STEPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "norm": lambda x, w: torch.layer_norm(x, [4]),
    "activation": lambda x, w: torch.nn.functional.gelu(x) - x,
    "scale": lambda x, w: x * w[1] + 0.5,
    "linear": lambda x, w: torch.nn.functional.linear(x, w, w[0]),
    "heads": lambda x, w: x.reshape(2, 9, 2, 2).transpose(1, 2).transpose(1, 2).reshape(2, 9, 4),
    "softmax": lambda x, w: torch.softmax(x, -1),
    "matmul": lambda x, w: x @ (x.transpose(1, 2) @ x),
    "attention": lambda x, w: scaled_dot_product_attention(x, x.tanh(), x),
    "residual": lambda x, w: x + torch.sigmoid(x).mean(-1, keepdim=True),
    "chunks": lambda x, w: torch.cat([p.sin() for p in x.chunk(2, -1)], -1),
    "stack": lambda x, w: torch.stack([x, -x], -1).sum(-1) + x,
    "prefix": lambda x, w: torch.cat([x[:, :2] * 2, x[:, 2:]], 1),
    "mixing": lambda x, w: x + x.mean(1, keepdim=True),
    "expand": lambda x, w: x + x[:, :1].expand(2, 9, 4),
    "unbind": lambda x, w: torch.stack(x.reshape(2, 9, 2, 2).unbind(2), 2).reshape(2, 9, 4),
}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6), st.integers(1, 4))
def test_narrowing_never_changes_the_output(steps: list[str], reads: int) -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        for step in steps:
            x = STEPS[step](x, w)
        return x[:, :reads]

    x, w = normal(2, 9, 4), normal(4, 4, seed=5)
    graph = traced(function, x, w)
    torch.testing.assert_close(run(narrow(graph), x, w), run(graph, x, w), rtol=1e-12, atol=1e-12)
