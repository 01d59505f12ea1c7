"""Models of transformers from a directory, and text files as loaders for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rba_compress.artifacts.artifact import load
from rba_compress.core.batch import Batch
from rba_compress.core.errors import LoaderError, ModelError
from rba_compress.core.inference import evaluating

FEWEST = 8
"""Words that a line must have more of, to be a text to continue."""


@dataclass(frozen=True)
class TextModel:
    """Network of transformers with its tokenizer."""

    network: nn.Module
    tokenizer: Any

    @classmethod
    def read(cls, name: str) -> TextModel:
        """Read a directory or a name of a hub.

        Raises:
            ModelError: as `read_network`.
            LoaderError: its tokenizer is missing, or has more tokens than the model.
        """
        return cls._with_tokenizer(read_network(name), name)

    @classmethod
    def compressed(cls, directory: Path) -> TextModel:
        """Read what `compress` wrote, the network and the tokenizer.

        Raises:
            ArtifactError: as `load`.
            LoaderError: as `read`.
        """
        return cls._with_tokenizer(load(directory), str(directory))

    @classmethod
    def _with_tokenizer(cls, network: Any, name: str) -> TextModel:
        import transformers

        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(  # nosec B615
                name, trust_remote_code=False
            )
        except (OSError, ValueError, ImportError) as error:
            raise LoaderError(f"{name} has no tokenizer that can be read: {error}") from error
        known = network.get_input_embeddings().num_embeddings
        if len(tokenizer) > known:
            raise LoaderError(
                f"the tokenizer of {name} has {len(tokenizer)} tokens, the model {known}: it is "
                "that of another model"
            )
        return cls(network, tokenizer)

    @property
    def causal(self) -> bool:
        """True where the network predicts each next token."""
        return "CausalLM" in type(self.network).__name__ or self.network.can_generate()  # type: ignore[operator]

    def save(self, directory: Path) -> None:
        """Write what transformers reads beside a network: tokenizer, chat template, generation."""
        self.tokenizer.save_pretrained(directory)
        if self.causal:
            self.network.generation_config.save_pretrained(directory)  # type: ignore[operator, union-attr]

    def generated(self, prompt: str, *, tokens: int) -> str:
        """Return a prompt and its continuation by the likeliest tokens.

        Raises:
            ModelError: the model does not generate, or the prompt has no token.
        """
        if not self.causal:
            raise ModelError(f"a {type(self.network).__name__} does not continue a prompt")
        network: Any = self.network
        given = self.tokenizer(prompt, return_tensors="pt").to(network.device)
        if not given["input_ids"].numel():
            raise ModelError(f"the prompt {prompt!r} has no token")
        with evaluating(network):
            found = network.generate(**given, max_new_tokens=tokens, do_sample=False)
        return str(self.tokenizer.decode(found[0], skip_special_tokens=True))

    def loader(self, path: Path, *, length: int, batch_size: int) -> list[dict[str, Any]]:
        """Return the batches of a text file.

        For a causal model the whole text is cut into sequences of `length` tokens, and the rest left
        out. For any other each line is a document, padded to the longest of its batch.

        Raises:
            LoaderError: the file cannot be read, or is too short, as `length` or `batch_size` are.
        """
        if length < 2 or batch_size < 1:
            raise LoaderError(
                f"sequences of {length} tokens in batches of {batch_size}: 2 and 1 are the least"
            )
        text = _text(path)
        if not self.causal:
            lines = [line for line in text.splitlines() if line.strip()]
            if not lines:
                raise LoaderError(f"{path} holds no text")
            parts = (lines[k : k + batch_size] for k in range(0, len(lines), batch_size))
            how = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
            return [dict(self.tokenizer(part, **how)) for part in parts]
        ids = self.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]
        rows = ids[: len(ids) // length * length].view(-1, length)
        if len(rows) < 2:
            raise LoaderError(
                f"{path} has {len(ids)} tokens, and sequences of {length} are asked for: give a longer "
                "text, or a smaller --length"
            )
        return [{"input_ids": part, "use_cache": False} for part in rows.split(batch_size)]


def read_network(name: str) -> nn.Module:
    """Read a network of transformers from a directory or a hub; code that comes with it is not run.

    Raises:
        ModelError: there is no such model, or it is an encoder-decoder.
    """
    import transformers

    safe = {"trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(name, **safe)  # nosec B615 # the user's
        kinds = [getattr(transformers, each, None) for each in config.architectures or ()]
        if config.is_encoder_decoder:
            raise ModelError(f"{name} is an encoder-decoder: compress it in Python, by its loader")
        if not kinds or kinds[0] is None:
            raise ModelError(f"{name} is a {config.architectures}, which transformers lacks")
        network: nn.Module = kinds[0].from_pretrained(name, **safe).eval()  # nosec B615
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"transformers cannot read {name}: {error}") from error
    return network


def documents(path: Path, most: int) -> list[str]:
    """Return the first lines of a text file that hold more than a few words.

    Raises:
        LoaderError: it is none in UTF-8, or holds no such line.
    """
    found = [line.strip() for line in _text(path).splitlines() if len(line.split()) > FEWEST][:most]
    if not found:
        raise LoaderError(f"{path} has no line of more than {FEWEST} words")
    return found


def stretch(sequences: int) -> int:
    """Return the number of sequences that are dealt together: about an article, in forty stretches."""
    return min(max(sequences // 40, 1), 8)


def perplexity(model: nn.Module, batches: Sequence[Batch]) -> float:
    """Return exp of the mean negative log-likelihood of each token after the first of its sequence."""
    total, tokens = 0.0, 0
    with evaluating(model):
        for batch in batches:
            ids: Tensor = batch.kwargs["input_ids"]
            logits = batch.run(model).logits[:, :-1].flatten(0, 1).float()
            ids = ids[:, 1:].flatten().to(logits.device)
            total += float(nn.functional.cross_entropy(logits, ids, reduction="sum"))
            tokens += len(ids)
    return float(torch.tensor(total / max(tokens, 1), dtype=torch.float64).exp())


def _text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        LoaderError: it is none in UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoaderError(f"{path} is not a text file in UTF-8: {error}") from error
