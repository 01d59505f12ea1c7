"""GGUF files of compressed language models, compared with PyTorch in llama.cpp itself.

A network whose layers are all alike is written in its own architecture. Layers of widths of their own,
or with a linear layer in place of attention, have a place in `deci`, the architecture of DeciLM and
Nemotron (Bercovich et al. 2024, arXiv 2411.19146): there a layer with heads and no key heads is one
matrix behind the norm, and every layer has its own number of heads and of hidden channels.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rba_compress.artifacts.artifact import load, read_manifest
from rba_compress.core.config import GgufType
from rba_compress.core.errors import ExportError
from rba_compress.core.inference import evaluating
from rba_compress.core.io import sha256, write_text, written_beside
from rba_compress.core.plan import Plan
from rba_compress.core.registry import gguf_units
from rba_compress.core.schema import Frozen

TOLERANCES: dict[GgufType, float] = {"f32": 5e-3, "f16": 0.05, "q8_0": 0.5}
"""Largest difference of a log-probability among the likeliest tokens."""
LIKELIEST = 8
"""Tokens whose log-probabilities are compared at each position."""
GREEDY = 64
"""Tokens that are generated to compare the continuations."""
FAMILIES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""Architecture of llama.cpp, by the model type of transformers."""
PAIRED = ("llama",)
"""Architectures that rotate neighbouring channels, where transformers rotates halves."""


class GgufCertificate(Frozen):
    """Measurements of a GGUF file in llama.cpp, beside PyTorch."""

    file: str
    sha256: str
    bytes: int
    type: GgufType
    architecture: str
    texts: int
    """Texts, behind each of which the log-probabilities of the likeliest tokens were compared."""
    max_gap: float
    """Largest difference of one."""
    mean_gap: float
    greedy: int
    """Tokens generated from the first text."""
    greedy_equal: int
    """Number of them, from the first one on, that are PyTorch's."""
    tokens_per_second: float
    """Generated in llama.cpp, one after the other."""
    tokens_per_second_pytorch: float


@dataclass(frozen=True)
class _Written:
    file: Path
    kind: GgufType
    architecture: str


@dataclass(frozen=True)
class _Layer:
    """Sizes of a layer that is kept, and its number in the network."""

    index: int
    heads: int
    key_heads: int
    """0 for a linear layer in place of attention."""
    hidden: int


def export_gguf(
    directory: str | Path,
    path: str | Path,
    texts: Sequence[str],
    *,
    type: GgufType = "f16",  # noqa: A002  the word that GGUF has for it
) -> GgufCertificate:
    """Write a compressed language model as GGUF, with a certificate beside it, or neither.

    Args:
        directory: an artefact that `load` reads alone, with the tokenizer's files in it, as
            `rba-compress compress --model hf:DIR` writes it.
        path: the file to write, which must not exist; beside it comes `<name>.certificate.json`.
        texts: real texts, on which llama.cpp is compared with PyTorch.
        type: the type of the matrices; vectors stay in float32.

    Raises:
        ExportError: the plan or the tokenizer has no place in the format; the packages `gguf` and
            `xllamacpp` are missing; or llama.cpp computes something else. Nothing is left at `path`.
        ArtifactError, WeightsError: the directory holds no artefact that loads.
    """
    root, target = Path(directory), Path(path).absolute()
    certificate = target.with_name(f"{target.name}.certificate.json")
    for taken in (target, certificate):
        if taken.exists() or taken.is_symlink():
            raise ExportError(f"{taken} exists: name a new file, or remove it first")
    if type not in TOLERANCES:
        raise ExportError(f"no GGUF file is written in {type!r}: take {', '.join(TOLERANCES)}")
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ExportError("there is no text to compare llama.cpp with PyTorch on")
    try:
        import gguf
        import xllamacpp  # type: ignore[import-untyped] # noqa: F401
    except ImportError as error:
        raise ExportError(f"{error}: pip install 'rba-compress[gguf]'") from error
    network: Any = load(root).float()
    plan = read_manifest(root).plan
    layers = _layers(network, plan)
    architecture = _architecture(network, layers)
    vocabulary = _Vocabulary.read(root, network.config.vocab_size)
    with written_beside(target) as folder:
        file = folder / target.name
        writer = gguf.GGUFWriter(file, architecture)
        _describe(writer, network.config, architecture, layers, type)
        vocabulary.write(writer, root)
        for name, tensor in _tensors(network, architecture, layers):
            _add(writer, name, tensor, type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        found = _compared(network, vocabulary, _Written(file, type, architecture), texts)
        write_text(folder / certificate.name, found.model_dump_json(indent=2) + "\n")
    return found


def _layers(network: Any, plan: Plan) -> list[_Layer]:
    """Return the layers that are kept, in order.

    Raises:
        ExportError: the network is of another family, or the plan cannot be said.
    """
    config = getattr(network, "config", None)
    kind = getattr(config, "model_type", type(network).__name__)
    if config is None or kind not in FAMILIES or "CausalLM" not in type(network).__name__:
        raise ExportError(f"a {kind} is not written as GGUF: {', '.join(FAMILIES)} are")
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    for setting, fits in (
        (f"rope_type={rotary.get('rope_type')!r}", rotary.get("rope_type", "default") == "default"),
        (f"hidden_act={config.hidden_act!r}", config.hidden_act == "silu"),
        (f"sliding_window={window}", window is None or window >= config.max_position_embeddings),
    ):
        if not fits:
            raise ExportError(f"a {kind} of {setting} is not written as GGUF")
    for new in plan.in_order:
        if new.unit not in gguf_units() or new.map.kind not in ("identity", "folded"):
            raise ExportError(f"{new} has no place in a GGUF file: search with Config(deploy='gguf')")
    state, found, head = network.state_dict(), [], _head(config)

    def heads(k: int, name: str) -> int:
        weight = state.get(f"model.layers.{k}.self_attn.{name}.weight")
        return 0 if weight is None else weight.shape[0] // head

    for k in range(len(network.model.layers)):
        gate = state.get(f"model.layers.{k}.mlp.gate_proj.weight")
        if gate is not None:
            # A linear layer in place of attention is a layer with heads and no key heads.
            own = heads(k, "q_proj") or config.num_attention_heads
            found.append(_Layer(k, own, heads(k, "k_proj"), gate.shape[0]))
    return found


def _head(config: Any) -> int:
    """Return the channels of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _architecture(network: Any, layers: Sequence[_Layer]) -> str:
    """Return the architecture of llama.cpp that says the layers.

    Raises:
        ExportError: there is none.
    """
    own = FAMILIES[network.config.model_type]
    if (
        len({(layer.heads, layer.key_heads, layer.hidden) for layer in layers}) == 1
        and layers[0].key_heads
    ):
        return own
    more = [
        n for n in network.state_dict() if ".layers." in n and (n.endswith(".bias") or "_norm." in n)
    ]
    if own != "llama" or more:
        raise ExportError(
            f"a {network.config.model_type} of layers of several widths is not written as GGUF: search "
            "with Config(stock=True)"
        )
    return "deci"


def _describe(
    writer: Any, config: Any, architecture: str, layers: Sequence[_Layer], kind: GgufType
) -> None:
    """Write the sizes of the network: a number for all layers, or in `deci` one for each."""
    import gguf

    def alike(values: list[int]) -> Any:
        return values if architecture == "deci" else values[0]

    rotary = getattr(config, "rope_parameters", None) or {}
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[kinds[kind]])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layers))
    writer.add_feed_forward_length(alike([layer.hidden for layer in layers]))
    writer.add_head_count(alike([layer.heads for layer in layers]))
    writer.add_head_count_kv(alike([layer.key_heads for layer in layers]))
    writer.add_key_length(_head(config))
    writer.add_value_length(_head(config))
    writer.add_rope_dimension_count(_head(config))
    theta: Any = rotary.get("rope_theta") or getattr(config, "rope_theta", 10_000.0)
    writer.add_rope_freq_base(float(theta))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.q_proj.bias": "attn_q.bias",
    "self_attn.k_proj.bias": "attn_k.bias",
    "self_attn.v_proj.bias": "attn_v.bias",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_norm.weight": "attn_q_norm.weight",
    "self_attn.k_norm.weight": "attn_k_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
"""Names of a layer's tensors in llama.cpp, by those in transformers."""


def _tensors(network: Any, architecture: str, layers: Sequence[_Layer]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the network by their names in llama.cpp.

    Raises:
        ExportError: one has no name there.
    """
    state: Mapping[str, Tensor] = network.state_dict()
    yield "token_embd.weight", state["model.embed_tokens.weight"]
    yield "output_norm.weight", state["model.norm.weight"]
    if not network.config.tie_word_embeddings:
        yield "output.weight", state["lm_head.weight"]
    for new, layer in enumerate(layers):
        at = f"model.layers.{layer.index}."
        for name in (name.removeprefix(at) for name in state if name.startswith(at)):
            if name not in NAMES:
                raise ExportError(f"{at}{name} has no name in llama.cpp's {architecture}")
            tensor = state[at + name]
            turned = name.startswith(("self_attn.q_proj", "self_attn.k_proj"))
            if turned and FAMILIES[network.config.model_type] in PAIRED:
                head = _head(network.config)
                # Rows i and i + d/2 of a head are rotated together, in llama.cpp rows 2i and 2i + 1.
                halves = tensor.unflatten(0, (-1, 2, head // 2))
                tensor = halves.transpose(1, 2).reshape(tensor.shape)
            yield f"blk.{new}.{NAMES[name]}", tensor


def _add(writer: Any, name: str, tensor: Tensor, kind: GgufType) -> None:
    import gguf

    array = tensor.detach().cpu().contiguous().numpy()
    if array.ndim == 1 or kind == "f32":
        writer.add_tensor(name, array.astype(np.float32))
    elif kind == "q8_0" and array.shape[-1] % 32 == 0:  # its blocks hold 32 numbers
        quantised = gguf.quants.quantize(array, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    else:
        writer.add_tensor(name, array.astype(np.float16))


@dataclass(frozen=True)
class _Vocabulary:
    """Byte-level BPE vocabulary of a tokenizer of transformers."""

    tokenizer: Any
    size: int
    splits: str
    """Name that llama.cpp has for the way a text is split before its merges."""

    @classmethod
    def read(cls, root: Path, size: int) -> _Vocabulary:
        """Read the tokenizer's files.

        Raises:
            ExportError: there is none, or one that is not written as GGUF.
        """
        import transformers

        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(  # nosec B615 # the user's own
                str(root), trust_remote_code=False
            )
            described = json.loads(tokenizer.backend_tokenizer.to_str())
        except (OSError, ValueError, AttributeError) as error:
            raise ExportError(f"{root} has no tokenizer that is written as GGUF: {error}") from error
        splits = _splits(described.get("pre_tokenizer") or {})
        if described["model"]["type"] != "BPE" or splits is None or described.get("normalizer"):
            raise ExportError(
                f"the tokenizer of {root} is no byte-level BPE that llama.cpp has a name for"
            )
        if len(tokenizer) > size:
            raise ExportError(f"the tokenizer has {len(tokenizer)} tokens, the network {size}")
        return cls(tokenizer, size, splits)

    def prompt(self, text: str, length: int) -> tuple[Tensor, str]:
        """Return the first tokens of a text, (1, at most `length`), and their text."""
        ids: Tensor = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=length)[
            "input_ids"
        ]
        return ids, str(self.tokenizer.decode(ids[0], skip_special_tokens=True))

    def unprinted(self) -> list[int]:
        """Return the tokens that are no text alone: special ones, and parts of characters, which
        llama.cpp's server does not list.
        """
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        alone = [self.tokenizer.decode([k]) for k in range(len(self.tokenizer))]
        parts = {k for k, text in enumerate(alone) if not text or "\ufffd" in text}
        return sorted(special | parts | {*range(len(alone), self.size)})

    def write(self, writer: Any, root: Path) -> None:
        """Write tokens, merges, special tokens and the chat template."""
        import gguf

        kinds = gguf.TokenType
        added = {k: token.special for k, token in self.tokenizer.added_tokens_decoder.items()}
        names = {k: token for token, k in self.tokenizer.get_vocab().items()}
        tokens, types = [], []
        for k in range(self.size):
            tokens.append(names.get(k, f"[PAD{k}]"))
            own = kinds.CONTROL if added.get(k) else kinds.USER_DEFINED if k in added else kinds.NORMAL
            types.append(own if k in names else kinds.UNUSED)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.splits)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        gguf.SpecialVocab(root, load_merges=True, n_vocab=self.size).add_to_gguf(writer, quiet=True)
        writer.add_add_bos_token(self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id])


def _splits(described: Mapping[str, Any]) -> str | None:
    """Return the name that llama.cpp has for a tokenizer's split of a text; None where it has none."""
    parts = described.get("pretokenizers", [described])
    kinds = [part.get("type") for part in parts]
    if kinds[-1:] != ["ByteLevel"] or parts[-1].get("add_prefix_space"):
        return None
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        pattern = str(parts[0].get("pattern"))
        return "llama-bpe" if "{1,3}" in pattern else "qwen2" if "p{N}|" in pattern else None
    return None


def _compared(
    network: Any, vocabulary: _Vocabulary, written: _Written, texts: Sequence[str]
) -> GgufCertificate:
    """Run the file in llama.cpp and the network in PyTorch on the same texts.

    Raises:
        ExportError: llama.cpp cannot run the file, or computes something else.
    """
    file, kind = written.file, written.kind
    never = vocabulary.unprinted()
    runner = _Runner(file, never, length=network.config.max_position_embeddings)
    gaps: list[float] = []
    with evaluating(network):
        for text in texts:
            ids, prompt = vocabulary.prompt(text, runner.length // 2)
            theirs, tokens = runner.continued(prompt, 1)
            if tokens != ids.shape[1]:
                raise ExportError(
                    f"llama.cpp reads {tokens} tokens where the tokenizer has {ids.shape[1]}, in "
                    f"{prompt[:60]!r}"
                )
            ours = network(ids, use_cache=False).logits[0, -1].double().log_softmax(-1)
            gaps += [abs(value - float(ours[k])) for k, value in theirs[0].likeliest.items()]
        worst = max(gaps)
        if not worst <= TOLERANCES[kind]:
            raise ExportError(
                f"llama.cpp is {worst:.2g} from PyTorch in the log-probability of a token, in {kind}: "
                f"{TOLERANCES[kind]} is allowed"
            )
        first, prompt = vocabulary.prompt(texts[0], runner.length // 2)
        tokens = min(GREEDY, runner.length - first.shape[1])
        started = time.perf_counter()
        how = {"attention_mask": torch.ones_like(first), "suppress_tokens": never}
        whole = network.generate(first, max_new_tokens=tokens, do_sample=False, **how)[0]
        ours_seconds = time.perf_counter() - started
    wanted = whole[first.shape[1] :].tolist()
    started = time.perf_counter()
    found = [step.token for step in runner.continued(prompt, len(wanted))[0]]
    seconds = time.perf_counter() - started
    equal = next((k for k, (a, b) in enumerate(zip(found, wanted, strict=False)) if a != b), len(found))
    return GgufCertificate(
        file=file.name,
        sha256=sha256(file),
        bytes=file.stat().st_size,
        type=kind,
        architecture=written.architecture,
        texts=len(texts),
        max_gap=worst,
        mean_gap=float(np.mean(gaps)),
        greedy=len(wanted),
        greedy_equal=equal,
        tokens_per_second=len(found) / seconds,
        tokens_per_second_pytorch=len(wanted) / ours_seconds,
    )


@dataclass(frozen=True)
class _Step:
    """Token that llama.cpp generated, and the log-probabilities of the likeliest ones."""

    token: int
    likeliest: dict[int, float]


class _Runner:
    """llama.cpp with one file.

    Args:
        never: tokens that are not generated; their log-probabilities are compared nevertheless.
        length: tokens of a text at most.
    """

    def __init__(self, file: Path, never: Sequence[int], *, length: int) -> None:
        import xllamacpp

        self._never = never
        self.length = min(length, 2048)
        how = xllamacpp.CommonParams()
        how.model.path = str(file)
        how.n_ctx, how.n_parallel, how.warmup = self.length, 1, False
        how.cpuparams.n_threads = how.cpuparams_batch.n_threads = torch.get_num_threads()
        how.cache_type_k = how.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        how.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        try:
            self._server = xllamacpp.Server(how)
        except RuntimeError as error:
            raise ExportError(f"llama.cpp cannot read the file: {error}") from error

    def continued(self, prompt: str, tokens: int) -> tuple[list[_Step], int]:
        """Return the likeliest continuation of a prompt, and the number of the prompt's tokens."""
        asked = {"prompt": prompt, "n_predict": tokens, "temperature": 0.0, "n_probs": LIKELIEST}
        bias = [[k, False] for k in self._never]
        found = self._server.handle_completions(asked | {"cache_prompt": False, "logit_bias": bias})
        if "choices" not in found or not found["choices"][0].get("logprobs"):
            raise ExportError(f"llama.cpp cannot run the file: {found}")
        steps = found["choices"][0]["logprobs"]["content"]
        return [
            _Step(step["id"], {each["id"]: each["logprob"] for each in step["top_logprobs"]})
            for step in steps
        ], found["usage"]["prompt_tokens"]
