"""A small language model with a tokenizer that llama.cpp knows, and texts for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from tests.networks import seeded
from tests.test_language import SIZES

TEXTS = [
    "the quick brown fox jumps over the lazy dog, twice; and then it sleeps.",
    "a model reads 1234 numbers and\n\nsome lines of text",
    "What is left of a network whose layers are narrower than they were?",
]
LARGE = SIZES | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 384,
    "max_position_embeddings": 256,
}


def byte_tokenizer() -> Any:
    """A byte-level BPE, trained on three sentences."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<s>", "</s>"],
        show_progress=False,
    )
    made.train_from_iterator(TEXTS * 4, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def causal(kind: str = "Llama", **changes: Any) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(**LARGE | changes)
    return seeded(getattr(transformers, f"{kind}ForCausalLM"), config)


def sentences(seed: int = 0, count: int = 120) -> str:
    """Sentences of the words of `TEXTS`, a line each."""
    words = " ".join(TEXTS).split()
    generator = np.random.default_rng(seed)
    return "\n".join(" ".join(generator.choice(words, 12)) for _ in range(count))


def write_model(path: Path) -> None:
    """Write a small language model and its tokenizer as transformers reads them."""
    causal(initializer_range=0.1).save_pretrained(path)  # type: ignore[operator]
    byte_tokenizer().save_pretrained(path)
