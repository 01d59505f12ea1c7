from __future__ import annotations

from collections import OrderedDict

import pytest
import timm
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rba_compress import ModelError
from rba_compress.core.batch import as_batch
from rba_compress.graph.tracer import record
from tests.networks import Chain, images, rows, seeded


def test_the_recorded_graph_of_a_small_network() -> None:
    recording = record(seeded(Chain, depth=1), as_batch(rows(2)))
    inside = [n for n in recording.graph.nodes if any(c.path == "blocks.0" for c in n.meta["calls"])]
    operations = [str(n.target).removeprefix("aten.") for n in inside]
    assert operations == [
        "t.default", "addmm.default", "relu.default", "t.default", "addmm.default", "add.Tensor",
    ]  # fmt: skip
    (block,) = (c for c in recording.calls if c.path == "blocks.0")
    (entry,), (stream,) = block.inputs.values(), block.outputs.values()
    assert list(block.inputs) == [("args", 0)]
    assert inside[-1] is stream
    assert entry in inside[-1].all_input_nodes
    assert recording.macs == 4 * 8 + 2 * 8 * 16 + 8 * 3
    assert recording.macs_of("blocks.0") == 2 * 8 * 16


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        view = y[:, :1]
        y += x
        view.mul_(3)
        return torch.relu(y)


def test_writes_through_views_keep_the_data_flow() -> None:
    model = nn.Sequential(InPlace())
    recording = record(model, as_batch(rows(2)))
    (relu,) = (n for n in recording.graph.nodes if "relu" in n.name)
    (written,) = relu.all_input_nodes
    assert "mul_" in str(written.target)  # not the addition, which the view's write followed


class Named(OrderedDict[str, Tensor]):
    """Output of transformers, registered without keys as in versions before 5."""


pytree.register_pytree_node(
    Named, lambda x: (list(x.values()), list(x)), lambda x, k: Named(zip(k, x, strict=True))
)


class Naming(nn.Module):
    def forward(self, x: Tensor) -> tuple[Named, Tensor]:
        return Named(doubled=2 * x, same=x), x + 1


def test_outputs_registered_without_keys_have_paths() -> None:
    (call,) = record(nn.Sequential(Naming()), as_batch(rows(2))).calls
    assert list(call.outputs) == [(0, "doubled"), (0, "same"), (1,)]


def test_macs_of_a_vit_block_equal_a_hand_count() -> None:
    model = timm.create_model("deit_tiny_patch16_224", num_classes=10)
    tokens, d = 197, 192
    attention = tokens * d * 3 * d + 2 * tokens * tokens * d + tokens * d * d
    mlp = 2 * tokens * d * 4 * d
    batch = as_batch(images(2, 224))
    recording = record(model, batch)
    assert recording.macs_of("blocks.5") == attention + mlp
    assert recording.macs == 12 * (attention + mlp) + 196 * 3 * 16 * 16 * d + d * 10
    traced = fx.symbolic_trace(model.eval())
    assert record(traced, batch).macs == recording.macs


def test_the_model_is_as_it_was() -> None:
    model = seeded(Chain)
    model.blocks[1].train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    record(model, as_batch(rows(2)))
    assert model.blocks[1].training
    assert not model.training
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_failing_forward_pass_says_what_was_passed() -> None:
    with pytest.raises(ModelError, match=r"Chain fails on a batch of 2 samples \(input 0 \(2, 3\)\)"):
        record(seeded(Chain), as_batch(torch.zeros(2, 3)))
    traced = fx.symbolic_trace(seeded(Chain))
    with pytest.raises(ModelError, match="the graph's input 'x' is not in the batch"):
        record(traced, as_batch({"y": rows(2)}))
