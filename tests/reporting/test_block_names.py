"""Blocks are printed by their module paths, whatever their place in a chain."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from rba_compress import Budget, Config, compress, plot_similarity, plot_span_errors, supports
from rba_compress.core.plan import boundary_names, listed
from rba_compress.reporting.report import page
from rba_compress.units.registry import unit_of
from tests.networks import Block, Chain, seeded

LIGHT = Config(units=("span",), maps=("shrunk",), shrinks=(1.0,), refit=False)


class LateChain(Chain):
    """Chain whose first block is called twice, so that no found chain holds that block."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.blocks[0](x) + self.blocks[0](x)
        for block in list(self.blocks)[1:]:
            x = block(x)
        return self.head(x)


class Attributes(Chain):
    def __init__(self) -> None:
        super().__init__(0)
        self.left, self.right = nn.ModuleDict({"a": Block()}), nn.ModuleDict({"b": Block()})

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.right["b"](self.left["a"](self.stem(x))))


def resnet() -> nn.Module:
    return seeded(ResNet, BasicBlock, [1, 3, 1, 1], num_classes=5).eval()


def swin() -> nn.Module:
    how: dict[str, Any] = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16}
    name = "swin_tiny_patch4_window7_224"
    return seeded(timm.create_model, name, depths=(2, 3), num_heads=(2, 2), **how).eval()


@pytest.mark.parametrize(
    ("build", "example", "paths"),
    [
        (resnet, (2, 3, 32, 32), ["layer2.1", "layer2.2"]),
        (lambda: seeded(LateChain), (3, 4), ["blocks.1", "blocks.2", "blocks.3"]),
        (lambda: seeded(Attributes), (3, 4), ["left.a", "right.b"]),
        (swin, (2, 3, 32, 32), ["layers.1.blocks.0", "layers.1.blocks.1", "layers.1.blocks.2"]),
    ],
    ids=["torchvision", "first block refused", "attributes", "stages"],
)
def test_a_change_names_the_modules_that_it_replaces(
    build: Callable[[], nn.Module], example: tuple[int, ...], paths: list[str]
) -> None:
    model = build()
    support = supports(model, torch.randn(example))
    chain = support.chains[-1]
    assert list(chain.paths) == paths
    assert str(unit_of("span").choice(chain, 0, 2)) == f"{paths[0]}, {paths[1]} -> identity"
    assert str(unit_of("mlp_free").choice(chain, 1, 2)) == f"{paths[1]} MLP -> identity"
    assert ", ".join(paths) in str(support)
    for path in re.findall(r"[\w.]+(?= MLP|,| ->)", str(unit_of("span").choice(chain, 0, len(chain)))):
        model.get_submodule(path)


def test_a_long_span_has_both_ends() -> None:
    paths = [f"blocks.{k}" for k in range(3, 8)]
    assert listed(paths) == "blocks.3 to blocks.7"
    assert listed(paths[:3]) == "blocks.3, blocks.4, blocks.5"


def test_boundaries_are_named_after_the_blocks_before_them() -> None:
    assert boundary_names(["layer4.1", "layer4.2"]) == ["in", "1", "2"]
    assert boundary_names(["layers.0.blocks.1", "layers.1.blocks.0"]) == [
        "in",
        "0.blocks.1",
        "1.blocks.0",
    ]
    assert boundary_names(["blocks.7"]) == ["in", "7"]
    assert boundary_names([]) == ["in"]


def test_plan_page_and_figures_show_the_same_names() -> None:
    model, loader = seeded(LateChain), [torch.randn(10, 4) for _ in range(4)]
    result = compress(model, loader, budget=Budget(macs=0.9), config=LIGHT)
    ours = re.compile(r"^blocks\.[123]\b")
    assert ours.match(str(result.plan))
    assert all(ours.match(step.change) for step in result.plan.steps)
    text = page(result.report)
    assert '"names": ["in", "1", "2", "3"]' in text
    assert "<b>1</b>" in text
    assert "<b>0</b>" not in text
    assert not re.search(r"blocks\[\d", text)
    (chain,) = result.profile.chains
    axis = plot_similarity(chain).axes[0]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["in", "1", "2", "3"]
    axis = plot_span_errors(chain).axes[0]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["1", "2", "3", ""]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["", "1", "2", "3"]
