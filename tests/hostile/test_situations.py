"""Situations from public reports: what a loader means, what a batch is, what an output says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rba_compress import (
    ArtifactError,
    Budget,
    LoaderError,
    ModelError,
    Result,
    api,
    compress,
    heal,
    load,
    profile,
    supports,
)
from rba_compress.core.batch import as_batch
from rba_compress.core.loader_form import batch_of, form_of
from rba_compress.profiling.cost import cost
from tests.hostile.cases import Case, table
from tests.networks import BRIEF, LIGHT, Block, Chain, images, loader, rows, seeded

BERT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 60,
    "num_labels": 4,
    "initializer_range": 0.3,
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def classes(n: int, high: int = 3) -> Tensor:
    return torch.randint(0, high, (n,), generator=torch.Generator().manual_seed(1))


def text(n: int = 40, length: int = 9) -> tuple[Tensor, Tensor]:
    """Token ids and a mask of varying length."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 60, (n, length), generator=generator)
    lengths = torch.randint(3, length, (n, 1), generator=generator)
    return ids, (torch.arange(length)[None] < lengths).long()


def bert(**changes: Any) -> nn.Module:
    config = transformers.BertConfig(**BERT | changes)
    return seeded(transformers.BertForSequenceClassification, config)


# --- A: items of a tuple -----------------------------------------------------------------------


class Masked(Chain):
    """Takes a mask by position, by keyword, or neither."""

    def forward(self, x: Tensor, mask: Tensor | None = None, *, flag: bool = False) -> Tensor:
        x = super().forward(x if mask is None else x * mask)
        return -x if flag else x


class Pair(Chain):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + t[:, None])


class Keyword(Chain):
    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return super().forward(x if mask is None else x * mask)


class Conditional(Chain):
    """Reads `label`, which is required."""

    def forward(self, x: Tensor, label: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + label[:, None])


class Optional(Chain):
    """Reads `label`, which may be left out."""

    def forward(self, x: Tensor, label: Tensor | None = None) -> Tensor:
        return super().forward(x if label is None else x + label[:, None])


class Features(nn.Module):
    """Takes one dict by position and writes into that dict, as sentence-transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Chain()

    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        features["embedding"] = self.inner(features["x"]) * features["scale"][:, None]
        return features


X, LENGTHS = rows(10), torch.arange(10)
FORMS = [
    Case("a tensor", lambda: (Chain, X), message="inputs x"),
    Case("an input and labels", lambda: (Chain, (X, LENGTHS % 3)), message="inputs x; labels item 1"),
    Case("labels as a list", lambda: (Chain, (X, [0, 1] * 5)), message="inputs x; labels item 1"),
    Case("a path beside labels", lambda: (Chain, (X, LENGTHS % 3, "p")),
         message="inputs x; labels item 1; ignored item 2"),
    Case("a mask and labels", lambda: (Masked, (X, (X > 0).long(), LENGTHS % 3)),
         message="inputs x, mask; labels item 2"),
    Case("a mask alone", lambda: (Masked, (X, (X > 0).float())), message="inputs x, mask"),
    Case("two required inputs", lambda: (Pair, (X, LENGTHS)), message="inputs x, t"),
    Case("two required inputs and labels", lambda: (Pair, (X, LENGTHS, LENGTHS % 3)),
         message="inputs x, t; labels item 2"),
    Case("targets of the output's shape", lambda: (Chain, (X, rows(10)[:, :3])),
         message="inputs x; labels item 1"),
    Case("targets where a mask may be", lambda: (Masked, (X, rows(10)[:, :3])),
         message="inputs x; labels item 1"),
    Case("what no parameter takes", lambda: (Chain, (X, rows(10)[:, :2], LENGTHS % 3)),
         message="inputs x; labels item 2; ignored item 1"),
    Case("a dict", lambda: (Masked, {"x": X, "mask": X, "labels": LENGTHS % 3}),
         message="inputs x, mask; labels 'labels'"),
    Case("a dict with a required label", lambda: (Conditional, {"x": X, "label": LENGTHS}),
         message="inputs x, label"),
    Case("a dict with a label that is read", lambda: (Optional, {"x": X, "label": LENGTHS}),
         message="inputs x, label"),
    Case("a dict by position", lambda: (Features, {"x": X, "scale": X[:, 0], "label": LENGTHS % 3}),
         message="inputs x, scale; labels 'label'"),
    Case("a mask where labels of tokens are", lambda: (Masked, (X, (9 * X).long())), LoaderError,
         r"item 1 of a batch, \(10, 4\), is neither labels nor an argument.*it would be 'mask'\)"
         r": yield a dict"),
    Case("a mask that is a keyword", lambda: (Keyword, (X, (X > 0).long(), LENGTHS % 3)), LoaderError,
         r"item 1 of a batch.*Keyword.forward.*yield a dict of its keywords, \(x, mask\)"),
    Case("two integer vectors", lambda: (Chain, (X, LENGTHS, LENGTHS % 3)), LoaderError,
         r"items \[1, 2\] of a batch are integer vectors.*yield \(input, labels\)"),
    Case("a mask where a cache comes first", lambda: (gpt2, (*text(10), LENGTHS % 3)), LoaderError,
         "GPT2.*forward runs with.*yield a dict of its keywords, .*attention_mask"),
]  # fmt: skip


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=60, num_labels=3,
                                     pad_token_id=0)  # fmt: skip
    return seeded(transformers.GPT2ForSequenceClassification, config)


@table(FORMS)
def test_the_form_of_a_batch_is_told_or_refused(case: Case) -> None:
    build, item = case.make()
    model = seeded(build)
    if case.error is None:
        form = form_of(model)(item)
        assert str(form) == case.message
        batch = as_batch(item, form)
        with torch.no_grad():
            batch.run(model)
    else:
        with pytest.raises(case.error, match=case.message):
            supports(model, item)


def test_a_mask_in_a_tuple_reaches_the_model() -> None:
    ids, mask = text()
    model, labels = bert(), classes(40, 4)
    by_position = DataLoader(TensorDataset(ids, mask, labels), 10)
    named = [
        {"input_ids": i, "attention_mask": m, "labels": y}
        for i, m, y in zip(*(t.split(10) for t in (ids, mask, labels)), strict=True)
    ]
    budget = Budget(macs=0.85)
    first, second = (compress(model, d, budget=budget, config=LIGHT) for d in (by_position, named))
    assert str(first.plan) == str(second.plan)
    assert first.report.fidelity == second.report.fidelity
    assert first.report.fidelity.accuracy_original is not None
    assert first.report.table().startswith("inputs input_ids, attention_mask; labels item 2")
    assert second.report.notes[0] == "inputs input_ids, attention_mask; labels 'labels'"
    with torch.no_grad():
        other = first.model(ids[:4], attention_mask=mask[:4]).logits
        assert not torch.equal(
            other, first.model(ids[:4], attention_mask=torch.ones_like(mask[:4])).logits
        )
    assert "BertLayer" in repr(first.model)
    assert getattr(model, "config").problem_type is None  # noqa: B009


def test_a_dict_by_position_is_compressed_saved_and_read_back(tmp_path: Any) -> None:
    model = seeded(Features)
    data = [{"x": part, "scale": part[:, 0] + 2} for part in loader()]
    result = compress(model, data, budget=Budget(macs=0.8), config=LIGHT)
    assert result.plan.replacements
    result.save(tmp_path / "saved")
    again = load(tmp_path / "saved", original=model)
    with torch.no_grad():
        a, b = (m({**data[0]})["embedding"] for m in (result.model, again))
    assert torch.equal(a, b)
    assert [*data[0]] == ["x", "scale"]


# --- B: rows that depend on each other ---------------------------------------------------------


class Sequences(nn.Module):
    """Encoder layers on (T, N, d), or an LSTM before a chain on (T, N, d)."""

    def __init__(self, recurrent: bool = False) -> None:
        super().__init__()
        self.first = nn.LSTM(32, 32) if recurrent else None
        layer = Block if recurrent else (lambda width: nn.TransformerEncoderLayer(width, 4, 64))
        self.blocks = nn.ModuleList(layer(32) for _ in range(4))
        self.head = nn.Linear(32, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.first is None else self.first(x)[0]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Centred(Chain):
    """Subtracts the mean of its batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Contrastive(Chain):
    """Compares every sample with every other."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        y = super().forward(x)
        return {"embedding": y, "similarity": y @ y.T}


class Graph(Chain):
    """Nodes (nodes, 4) and the edges between them."""

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:  # type: ignore[override]
        x = self.stem(x)
        x = x + torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Normalised(Chain):
    """Normalises by its batch in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.norm(x))


EDGES = torch.tensor([[0, 1, 2, 3, 9], [1, 2, 3, 0, 8]])


@pytest.mark.parametrize(
    ("build", "item"),
    [
        (Sequences, drawn(20, 8, 32)),
        (lambda: Sequences(recurrent=True), drawn(20, 8, 32)),
        (Centred, rows(10)),
        (Contrastive, rows(10)),
        (Graph, {"x": rows(10), "edges": EDGES}),
    ],
    ids=["time first", "an LSTM", "centred", "contrastive", "a graph"],
)
def test_rows_that_depend_on_each_other_are_refused(build: Callable[[], nn.Module], item: Any) -> None:
    said = "rows of a batch depend on each other.*batch_first=False.*|forward pass of Graph fails"
    with pytest.raises(ModelError, match=said):
        compress(seeded(build), [item] * 9, budget=Budget(macs=0.8))


def test_batch_statistics_of_training_are_no_such_case() -> None:
    model = seeded(Normalised).train()
    assert supports(model, rows(10)).chains


# --- C: the meaning of outputs -----------------------------------------------------------------


def test_every_float_output_is_judged() -> None:
    config = transformers.YolosConfig(
        hidden_size=48, num_hidden_layers=5, num_attention_heads=4, intermediate_size=96,
        image_size=[32, 48], patch_size=8, num_detection_tokens=10, num_labels=4,
        use_mid_position_embeddings=False, initializer_range=0.15,
    )  # fmt: skip
    model: Any = seeded(transformers.YolosForObjectDetection, config)
    data = [{"pixel_values": drawn(8, 3, 32, 48, seed=k)} for k in range(6)]
    result = compress(model, data, budget=Budget(divergence=0.7), config=LIGHT)
    assert result.plan.replacements
    with torch.no_grad():
        p, q = model(**data[0]).pred_boxes, result.model(**data[0]).pred_boxes
    assert float((p - q).square().sum() / (p - p.mean((0, 1))).square().sum()) < 0.7
    fidelity = result.report.fidelity
    assert [*fidelity.outputs] == ["logits", "pred_boxes", "last_hidden_state"]
    assert fidelity.divergence == pytest.approx(sum(fidelity.outputs.values()))
    assert [o.divergence for o in result.plan.outputs] == ["kl", "nse", "nse"]
    assert "outputs compared" in result.report.table()


class Heads(Chain):
    """Scores, a regression of one number a sample, a loss, and outputs that no input reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("anchors", torch.randn(7, 4))

    def forward(self, x: Tensor) -> dict[str, Any]:  # type: ignore[override]
        y = super().forward(x)
        return {
            "logits": y,
            "extra": {"age": 30 + y[:, 0], "frames": y.repeat_interleave(2, 0)},
            "loss": y.mean(),
            "aux_loss": y[:, 1],
            "temperature": torch.tensor(2.0),
            "anchors": self.anchors,
            "summary": y.mean(0),
            "past_key_values": ((y, y), (y, y)),
        }


def test_losses_caches_and_constants_are_not_judged() -> None:
    seen = profile(seeded(Heads), loader())
    assert [o.name for o in seen.criterion.outputs] == ["logits", "extra.age", "extra.frames"]
    assert seen.notes[-1] == "outputs not compared, for they have no row a sample: summary (3,)"


class Single(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 1)


TARGETS = (drawn(40, 3) > 0).float()
KINDS: list[tuple[str, Callable[[], nn.Module], Any, str]] = [
    ("multi-hot", Chain, TARGETS, "bernoulli"),
    ("multi-hot integers", Chain, TARGETS.long(), "bernoulli"),
    ("real", Chain, drawn(40, 3), "nse"),
    ("one-hot", Chain, torch.eye(3)[classes(40)], "kl"),
    ("classes", Chain, classes(40), "kl"),
    ("one score, binary", Single, classes(40, 2), "bernoulli"),
    ("one score, binary, (N, 1)", Single, classes(40, 2).float()[:, None], "bernoulli"),
    ("one number", Single, drawn(40), "nse"),
    ("one number, no labels", Single, None, "nse"),
]


@pytest.mark.parametrize(("build", "labels", "kind"), [k[1:] for k in KINDS], ids=[k[0] for k in KINDS])
def test_labels_decide_what_an_output_is(build: Any, labels: Tensor | None, kind: str) -> None:
    data: list[Any] = loader()
    if labels is not None:
        data = list(zip(data, labels.split(10), strict=True))
    result = compress(seeded(build), data, budget=Budget(divergence=0.2), config=LIGHT)
    assert result.plan.divergence == kind
    fidelity = result.report.fidelity
    assert (fidelity.agreement is not None) == (kind != "nse")
    assert (fidelity.accuracy_original is not None) == (kind != "nse" and labels is not None)
    assert not any("is taken for" in note for note in result.report.notes)


def test_a_bare_tensor_is_taken_for_scores_and_the_report_says_so() -> None:
    result = compress(seeded(Chain), loader(), budget=Budget(macs=0.8), config=LIGHT)
    assert result.report.table().splitlines()[1] == (
        "the output output (N, 3) is taken for class scores and compared by the KL of the softmax; "
        "Config(divergence=...) takes another: bernoulli, nse, cosine"
    )
    how = LIGHT.model_copy(update={"divergence": "bernoulli"})
    result = compress(seeded(Chain), loader(), budget=Budget(agreement=0.8), config=how)
    assert result.plan.divergence == "bernoulli"
    assert "Bernoulli KL" in result.report.table()
    assert result.report.fidelity.agreement is not None
    with torch.no_grad():
        pairs = [(m(rows(40)) > 0) for m in (seeded(Chain), result.model)]
    assert float((pairs[0] == pairs[1]).float().mean()) > 0.7


@pytest.mark.parametrize(
    ("problem", "kind"),
    [
        ("multi_label_classification", "bernoulli"),
        ("regression", "nse"),
        ("single_label_classification", "kl"),
    ],
)
def test_a_problem_type_is_obeyed(problem: str, kind: str) -> None:
    ids, mask = text(20)
    data = [{"input_ids": ids[k : k + 5], "attention_mask": mask[k : k + 5]} for k in range(0, 20, 5)]
    model = bert(problem_type=problem)
    assert profile(model, data, config=LIGHT).criterion.kind == kind
    labels = {"bernoulli": TARGETS[:20, :1].expand(-1, 4), "nse": drawn(20, 4), "kl": classes(20, 4)}
    labelled = [b | {"labels": labels[kind][5 * k : 5 * k + 5]} for k, b in enumerate(data)]
    seen = profile(model, labelled, config=LIGHT)
    assert seen.criterion.kind == kind
    assert seen.form.labels == "labels"


def test_healing_and_a_saved_result_keep_the_criterion(tmp_path: Any) -> None:
    data = list(zip(loader(), TARGETS.split(10), strict=True))
    model = seeded(Chain)
    result = compress(model, data, budget=Budget(macs=0.8), config=LIGHT)
    result.save(tmp_path / "saved")
    again = api.reopen(tmp_path / "saved", data, original=model)
    assert again.profile.criterion == result.profile.criterion
    assert heal(result, data, original=model, healing=BRIEF).report.fidelity.kind == "bernoulli"
    result.profile.save(tmp_path / "profile.safetensors")
    read = type(result.profile).load(tmp_path / "profile.safetensors")
    assert (read.criterion, read.form, read.notes) == (
        result.profile.criterion,
        result.profile.form,
        result.profile.notes,
    )


# --- D: streams with several rows a sample -----------------------------------------------------


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.3 * self.down(self.up(x).relu())


class Video(nn.Module):
    """Frames on their own, then over time. (N, T, P, 32) -> (N, 5)"""

    def __init__(self, spatial: int = 4, temporal: int = 4) -> None:
        super().__init__()
        self.space = nn.Sequential(*(Wide() for _ in range(spatial)))
        self.time = nn.Sequential(*(Wide() for _ in range(temporal)))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.space(x.flatten(0, 1)).mean(1).unflatten(0, x.shape[:2])
        return self.head(self.time(y).mean(1))


class Packed(nn.Module):
    """Patches of all images in one row, (1, N * P, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Wide() for _ in range(4)))
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(x.flatten(0, 1)[None])
        return self.head(y[0].unflatten(0, x.shape[:2]).mean(1))


class Interleaved(Video):
    """Frames of all samples at one time in a row."""

    def __init__(self) -> None:
        super().__init__(4, 0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.space(x.transpose(0, 1).flatten(0, 1)).mean(1)
        return self.head(y.unflatten(0, (-1, len(x))).mean(0))


class TimeFirst(nn.Module):
    """Ids (N, T) whose stream is (T, N, d), as in models of batch_first=False."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(60, 32)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(32, 2, 64) for _ in range(4))
        self.head = nn.Linear(32, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x, away = self.table(input_ids).transpose(0, 1), attention_mask == 0
        for block in self.blocks:
            x = block(x, src_key_padding_mask=away)
        return self.head(x.transpose(0, 1).masked_fill(away[..., None], 0).sum(1))


class Frames(nn.Module):
    """Attention within frames, of which a head reads the class token."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.TransformerEncoderLayer(32, 2, 64, batch_first=True) for _ in range(4))
        self.blocks = nn.ModuleList(layers)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = x.flatten(0, 1)
        for block in self.blocks:
            y = block(y)
        return self.head(y[:, 0].unflatten(0, x.shape[:2]).mean(1))


VIDEOS = [drawn(4, 6, 9, 32, seed=k) for k in range(8)]


@pytest.mark.parametrize(
    "build", [Video, lambda: Video(temporal=0), lambda: Video(spatial=0)], ids=["both", "space", "time"]
)
def test_frames_are_no_samples(build: Callable[[], nn.Module]) -> None:
    model = seeded(build)
    result = compress(model, VIDEOS, budget=Budget(macs=0.85), config=LIGHT)
    assert not [w for w in result.report.warnings if "could not" in w]
    assert result.reference is not None
    assert len(result.reference.held) == 16  # half of 32 samples, whatever their frames
    assert result.reference.shift(result.model, as_batch(torch.cat(VIDEOS[:3]))).samples == 12
    with pytest.warns(UserWarning, match="outside of the calibration data"):
        assert result.check(3 + torch.cat(VIDEOS[:3])).shifted


def test_a_stream_may_count_samples_second() -> None:
    model = seeded(TimeFirst)
    ids, mask = text(40)
    plans = []
    for junk in (0, 7):  # what stands at padding counts nowhere
        given = ids.masked_fill(mask == 0, junk)
        data = DataLoader(TensorDataset(given, mask), 8)
        result = compress(model, data, budget=Budget(macs=0.85), config=LIGHT)
        assert [(c.chain.sample_axis, c.chain.rows) for c in result.profile.chains] == [(1, 1)]
        assert result.profile.chains[0].moments.n == float(sum(m.sum() for m in fitted(result, data)))
        plans.append(result.plan)
    assert str(plans[0]) == str(plans[1])
    assert result.reference is not None
    assert len(result.reference.held) == 20


def fitted(result: Result, data: Any) -> list[Tensor]:
    return [b.kwargs["attention_mask"] for b in result.profile.split(data).part("fit")]


@pytest.mark.slow
def test_costs_of_thinned_frames_are_the_measured_ones() -> None:
    result = compress(seeded(Frames), VIDEOS, budget=Budget(macs=0.8))
    assert any(r.unit != "span" for r in result.plan.replacements)
    assert result.plan.steps[-1].macs == pytest.approx(
        cost(result.model, as_batch(VIDEOS[0])).macs, rel=1e-3
    )


@pytest.mark.parametrize("build", [Packed, Interleaved])
def test_rows_that_belong_to_no_sample_alone(build: type[nn.Module]) -> None:
    """Patches of several images in one row; frames that are not one behind the other."""
    data = [v[:, 0] for v in VIDEOS] if build is Packed else VIDEOS
    result = compress(seeded(build), data, budget=Budget(macs=0.8), config=LIGHT)
    assert result.plan.replacements
    assert result.reference is None
    with pytest.raises(ArtifactError, match="no rows of their own"):
        result.check(data[0])


@pytest.mark.parametrize(
    "step", ["measure_front", "measured", "paper_span", "_reference", "architecture_of"]
)
def test_a_step_after_the_search_loses_none_of_its_work(step: str, monkeypatch: Any) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no luck")

    model = seeded(Chain)
    whole = compress(model, loader(), budget=Budget(macs=0.8), config=LIGHT)
    monkeypatch.setattr(api, step, broken)
    result: Result = compress(model, loader(), budget=Budget(macs=0.8), config=LIGHT)
    assert str(result.plan) == str(whole.plan)
    assert torch.equal(result.model(rows(4)), whole.model(rows(4)))
    assert [w for w in result.report.warnings if "could not be computed: RuntimeError: no luck" in w]
    assert result.report.compressed == whole.report.compressed
    assert result.report.table()


# --- F: torch's fast path ----------------------------------------------------------------------


class Padded(nn.Module):
    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 6, enable_nested_tensor=not norm_first)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor, pad: Tensor) -> Tensor:
        y = self.encoder(x, src_key_padding_mask=pad)
        return self.head(y.masked_fill(pad[..., None], 0).sum(1))


class OwnAttention(Chain):
    """nn.MultiheadAttention in a custom block."""

    class Mixed(nn.Module):
        def __init__(self, width: int = 8) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
            self.norm = nn.LayerNorm(width)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return x + self.attention(y, y, y, need_weights=False)[0]

    def __init__(self) -> None:
        super().__init__(4, 8, OwnAttention.Mixed)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(1)


def padded(k: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(k)
    lengths = torch.randint(4, 18, (8, 1), generator=generator)
    return {"x": drawn(8, 20, 32, seed=k), "pad": torch.arange(20)[None] >= lengths}


@pytest.mark.slow
@pytest.mark.parametrize("norm_first", [False, True])
def test_padding_on_torchs_fast_path(norm_first: bool) -> None:
    model, data = seeded(Padded, norm_first), [padded(k) for k in range(6)]
    assert len(supports(model, data[0]).chains[0]) == 5
    assert torch.backends.mha.get_fastpath_enabled()
    compressed = compress(model, data, budget=Budget(macs=0.8), config=LIGHT).model
    outputs = []
    try:
        for fast in (True, False):
            torch.backends.mha.set_fastpath_enabled(fast)
            with torch.no_grad():
                outputs.append(compressed(**data[0]))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_attention_of_ones_own_is_seen_operation_by_operation() -> None:
    model, x = seeded(OwnAttention), drawn(4, 7, 4)
    assert len(supports(model, x).chains[0]) == 4
    whole = cost(model, batch_of(model, x)).macs
    # Four projections of 8 x 8 and two products of scores, for 7 positions in each of 4 blocks.
    assert whole == 7 * 4 * 8 + 4 * (7 * 4 * 64 + 2 * 7 * 7 * 8) + 7 * 8 * 3


def test_an_unknown_model_is_no_worse_off() -> None:
    """A batch whose model does not run is told by its recording."""
    with pytest.raises(ModelError, match="forward pass of Chain fails"):
        supports(seeded(Chain), (images(4), classes(4)))
