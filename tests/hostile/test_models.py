"""Hostile models: each is rewritten correctly, or refused with its reason, and left as it was."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from rba_compress import (
    Budget,
    Config,
    ModelError,
    NoChainError,
    Plan,
    compress,
    splice,
    supports,
)
from rba_compress.core.batch import as_batch
from rba_compress.core.errors import ActivationError
from rba_compress.profiling.cost import cost
from tests.hostile.cases import Case, table
from tests.networks import LIGHT, Block, Chain, loader, rows, seeded


def chain(change: Callable[[Any], Any] | None = None, **kwargs: Any) -> Callable[[], nn.Module]:
    """A `Chain` after a change."""

    def make() -> nn.Module:
        model = seeded(Chain, **kwargs)
        if change is not None:
            with torch.random.fork_rng():
                torch.manual_seed(1)
                change(model)
        return model

    return make


def each_linear(change: Callable[[nn.Module], Any]) -> Callable[[Any], None]:
    def apply(model: Any) -> None:
        for block in model.blocks:
            for layer in (block.up, block.down):
                change(layer)

    return apply


def forward(code: Callable[[Any, Tensor], Any], **kwargs: Any) -> Callable[[], nn.Module]:
    """A `Chain` with another forward pass."""
    return lambda: seeded(type("Net", (Chain,), {"forward": code}), **kwargs)


def block(code: Callable[[Any, Tensor], Any], **kwargs: Any) -> Callable[[], nn.Module]:
    """A `Chain` of blocks with another forward pass."""
    return lambda: seeded(Chain, block=type("Odd", (Block,), {"forward": code}), **kwargs)


def branch(self: Any, x: Tensor) -> Tensor:
    found: Tensor = self.down(torch.relu(self.up(x)))
    return found


def through(self: Any, x: Tensor) -> Tensor:
    for inner in self.blocks:
        x = inner(x)
    return x


# --- models with a class of their own


class Keyed(Chain):
    def __init__(self, depth: int = 4) -> None:
        super().__init__(0)
        keys = ["a", "ü", "<script>", "of two words"]
        self.blocks = nn.ModuleDict({key: Block() for key in keys[:depth]})

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for inner in self.blocks.values():
            x = inner(x)
        return self.head(x)


class Attributes(Chain):
    def __init__(self) -> None:
        super().__init__(0)
        self.one, self.two, self.three = Block(), Block(), Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.three(self.two(self.one(self.stem(x)))))


class Unregistered(Chain):
    def __init__(self) -> None:
        super().__init__(0)
        self.hidden = [Block(), Block()]

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for inner in self.hidden:
            x = inner(x)
        return self.head(x)


class Narrow(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.line = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.line(x))


class InTurn(Chain):
    """Chain of blocks that alternate between two widths."""

    def __init__(self) -> None:
        super().__init__(0)
        self.blocks = nn.ModuleList([Narrow(8, 16), Narrow(16, 8), Narrow(8, 16), Narrow(16, 8)])


class Growing(Chain):
    """Two stages of two widths, two residual blocks each."""

    def __init__(self) -> None:
        super().__init__(0)
        self.blocks = nn.ModuleList([Block(8), Block(8), nn.Linear(8, 6), Block(6), Block(6)])
        self.head = nn.Linear(6, 3)


class Normed(Block):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(torch.relu(self.up(self.norm(x)))))


class Untracked(Normed):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.norm = nn.BatchNorm1d(width, track_running_stats=False)


@dataclass
class Output:
    stream: Tensor


class Ringing(Block):
    """Block that returns a dict."""

    def forward(self, x: Tensor) -> dict[str, Any]:  # type: ignore[override]
        return {"stream": super().forward(x), "kind": "block"}


class Counting(Chain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class Weightless(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(x)


class Scaled(nn.Module):
    """Network without products of matrices: it has parameters, and no multiply-accumulates."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Scaling(), Scaling(), Scaling()])

    def forward(self, x: Tensor) -> Tensor:
        return through(self, x).cumsum(-1)


class Scaling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(x)


class Uncopied(Chain):
    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("holds a socket")


class Pairs(nn.Module):
    """A stream of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 8)
        self.blocks = nn.ModuleList([Turning(), Turning(), Turning()])
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(through(self, torch.fft.fft(self.stem(x))).abs())


class Turning(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(8, 8, dtype=torch.complex64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.line(x)


class Counted(nn.Module):
    """A stream of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Shifted(), Shifted()])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(through(self, (10 * x).long()).float())


class Shifted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table(x[:, 0] % 9).long()


class Lazy(Block):
    def __init__(self, width: int = 8) -> None:
        super().__init__(width)
        self.up = nn.LazyLinear(16)


class Doubling(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def doubled_output(module: nn.Module, given: Any, output: Tensor) -> Tensor:
    return 2 * output


def shifted_input(module: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
    return (given[0] + 1,)


def quiet(change: Callable[[], Any]) -> Any:
    """Make a change that newer releases of torch call outdated, without their warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return change()


def one_for_all(model: Any) -> None:
    model.blocks = nn.ModuleList([model.blocks[0]] * 4)


def shared_layer(model: Any) -> None:
    model.blocks[3].up = model.blocks[0].up


def tied_head(model: Any) -> None:
    model.other_head = nn.Linear(8, 3)
    model.other_head.weight = model.head.weight


def nan_weight(model: Any) -> None:
    model.blocks[2].up.weight.data[0, 0] = torch.nan


def huge_weight(model: Any) -> None:
    for inner in model.blocks:
        inner.down.weight.data.fill_(1e20)
        inner.up.weight.data.fill_(1e20)


def zero_weights(model: Any) -> None:
    for inner in model.blocks:
        inner.down.weight.data.zero_()
        inner.down.bias.data.zero_()


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    return nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    )


def _with(model: Any, change: Callable[[Any], Any]) -> Any:
    change(model)
    return model


def _mixed(self: Any, x: Tensor) -> Any:
    return self.head(through(self, self.stem(x).bfloat16()).float())


def _autocast(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return branch(self, x).float()


def _checkpointed(self: Any, x: Tensor) -> Any:
    for inner in self.blocks:
        x = checkpoint(inner, x, use_reentrant=False)  # type: ignore[assignment]
    return self.head(x)


BOLD = Config(maps=("folded", "shrunk"), shrinks=(0.6,), refit_dampings=(1.0,))
"""A quick search that changes kept layers, too."""

HOOKS = [
    ("a hook that changes a block's output", lambda m: m.blocks[1].register_forward_hook(doubled_output)),
    ("a hook that changes a block's input", lambda m: m.blocks[1].register_forward_pre_hook(shifted_input)),
    ("a hook that changes a layer's output", lambda m: m.blocks[1].up.register_forward_hook(doubled_output)),
    ("a hook that changes the model's output", lambda m: m.register_forward_hook(doubled_output)),
    ("a hook that changes the model's input", lambda m: m.register_forward_pre_hook(shifted_input)),
    ("a hook on gradients", lambda m: m.blocks[1].register_full_backward_hook(lambda *_: None)),
]  # fmt: skip

RIGHT = [
    Case("two blocks", chain(depth=2), blocks=2),
    *[Case(name, chain(change), blocks=4 - ("block's input" in name)) for name, change in HOOKS],
    Case("weight norm", chain(each_linear(parametrizations.weight_norm))),
    Case("spectral norm", chain(each_linear(parametrizations.spectral_norm))),
    Case("orthogonal weights", chain(each_linear(parametrizations.orthogonal))),
    Case(
        "a parametrisation of one's own",
        chain(each_linear(lambda m: parametrize.register_parametrization(m, "weight", Doubling()))),
    ),
    Case("pruned weights", chain(each_linear(lambda m: prune.l1_unstructured(m, "weight", 0.5)))),
    Case("weight norm as it was", chain(each_linear(lambda m: quiet(lambda: nn.utils.weight_norm(m))))),
    Case("blocks in a ModuleDict", lambda: seeded(Keyed)),
    Case("blocks as attributes", lambda: seeded(Attributes), blocks=3),
    Case("blocks in nested containers", chain(lambda m: setattr(m, "blocks", nn.Sequential(
        OrderedDict(a=nn.Sequential(Block(), Block()), b=nn.Sequential(Block(), Block())))))),
    Case("two widths in two stages", lambda: seeded(Growing)),
    Case("BatchNorm and dropout in train mode", lambda: seeded(Chain, block=Normed).train()),
    Case("a layer for training alone", block(
        lambda self, x: x + (branch(self, x) * torch.rand(()) if self.training else branch(self, x)))),
    Case("a residual added in place to the branch", block(lambda self, x: branch(self, x).add_(x))),
    Case("a block that returns a tuple", forward(
        lambda self, x: self.head(self.blocks[1](self.blocks[0](self.stem(x))[0])[0]), depth=2,
        block=type("Two", (Block,), {"forward": lambda self, x: (x + branch(self, x), None)})), blocks=2),
    Case("a block that returns a dict", forward(
        lambda self, x: self.head(self.blocks[1](self.blocks[0](self.stem(x))["stream"])["stream"]),
        depth=2, block=Ringing), blocks=2),
    Case("float64", chain(lambda m: m.double())),
    Case("bfloat16", chain(lambda m: m.bfloat16())),
    Case("float16", chain(lambda m: m.half())),
    Case("bfloat16 blocks in a float32 network", lambda: _with(
        forward(_mixed)(), lambda m: m.blocks.bfloat16())),
    Case("autocast inside", block(lambda self, x: x + _autocast(self, x))),
    Case("checkpointed blocks", forward(lambda self, x: _checkpointed(self, self.stem(x)))),
    Case("blocks that share a layer", chain(shared_layer), blocks=2),
    Case("a forward pass in inference mode", forward(torch.inference_mode()(Chain.forward))),
    Case("a forward pass under no_grad", forward(torch.no_grad()(Chain.forward))),
    Case("frozen weights", chain(lambda m: m.requires_grad_(False))),
    Case("tied heads", chain(tied_head)),
    Case("blocks that do nothing", chain(zero_weights)),
    Case("blocks without a product", lambda: seeded(Scaled), blocks=3),
    Case("weights that are no contiguous memory", chain(
        each_linear(lambda m: setattr(m, "weight", nn.Parameter(m.weight.data.T.contiguous().T))))),
    Case("a GraphModule", lambda: fx.symbolic_trace(seeded(Chain))),
    Case("an exported program's module", lambda: torch.export.export(
        seeded(Chain), (rows(10),), dynamic_shapes=({0: torch.export.Dim("n")},)).module()),
    Case("a compiled network", lambda: torch.compile(seeded(Chain), backend="eager")),
    Case("DataParallel", lambda: nn.DataParallel(seeded(Chain))),
    Case("layers of torch's own encoder", lambda: seeded(encoder), blocks=2),
    Case("one output a sample", chain(lambda m: setattr(m, "head", nn.Linear(8, 1)))),
    Case("an output in a dict", forward(lambda self, x: {"logits": Chain.forward(self, x), "n": 3})),
    Case("an output in a tuple", forward(lambda self, x: (Chain.forward(self, x), [x, None]))),
    Case("a block whose layer is called map", chain(
        lambda m: [setattr(b, "map", nn.Identity()) for b in m.blocks])),
]  # fmt: skip


@table(RIGHT)
def test_a_model_is_rewritten_correctly(case: Case) -> None:
    model = case.make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    data = loader()
    assert sum(map(len, supports(model, data[0]).chains)) == case.blocks
    limit = "macs" if cost(model, as_batch(data[0])).macs else "params"
    result = compress(model, data, budget=Budget(**{limit: 0.95}), config=BOLD)
    assert result.plan.replacements
    compressed, original = (
        getattr(made, limit) for made in (result.report.compressed, result.report.original)
    )
    assert compressed <= 0.95 * original
    assert result.report.table()
    assert cost(result.model, as_batch(data[0])) == result.report.compressed
    # What is replaced by nothing is the network itself.
    inner = model.module if isinstance(model, nn.DataParallel) else model
    inner = getattr(inner, "_orig_mod", inner)
    with torch.no_grad():
        wanted, found = (
            _leaves(_evaluated(m)(data[0].to(_dtype(inner))))
            for m in (inner, splice(model, Plan(), {}))
        )
        slim_output = _leaves(result.model(data[0].to(_dtype(inner))))
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert [t.shape for t in slim_output] == [t.shape for t in wanted]
    assert all(bool(t.isfinite().all()) for t in slim_output)
    # It is as it was.
    assert [module.training for module in model.modules()] == modes
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


class Odd(Chain):
    """Chain whose forward pass returns what a given function answers."""

    def __init__(self, answer: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(self, x)


def odd(answer: Callable[[Any, Tensor], Any]) -> Callable[[], nn.Module]:
    return lambda: seeded(Odd, answer)


def _raise(*_: Any) -> Any:
    raise ValueError("seventeen channels are wanted")


def _twice(self: Any, x: Tensor) -> Any:
    return self.head(through(self, through(self, self.stem(x))))


def _branching(self: Any, x: Tensor) -> Any:
    blocks = self.blocks if x.abs().max() < 2.4 else self.blocks[:2]
    x = self.stem(x)
    for inner in blocks:
        x = inner(x)
    return self.head(x)


def _scripted() -> nn.Module:
    return quiet(lambda: torch.jit.script(seeded(Chain)))


def _traced() -> nn.Module:
    return quiet(lambda: torch.jit.trace(seeded(Chain), rows(2)))


def _compiled() -> nn.Module:
    model = seeded(Chain)
    model.compile(backend="eager")
    return model


REFUSED = [
    Case("no block", chain(depth=0), NoChainError, "nothing of a Chain can be replaced"),
    Case("one block", chain(depth=1), NoChainError, r"blocks.0 \(Block\): its output is not read by one next"),
    Case("the same block four times", chain(one_for_all), NoChainError, "called 4 times"),
    Case("a block that is called in a loop", forward(_twice), NoChainError, "called 2 times"),
    Case("blocks that are not registered", lambda: seeded(Unregistered), NoChainError, "nothing of a"),
    Case("blocks without a residual", block(branch), NoChainError, "no addition inside it has two operands"),
    Case("a residual in place", block(lambda self, x: x.add_(branch(self, x))), NoChainError,
         "changes its input in place"),
    Case("blocks of two widths in turn", lambda: seeded(InTurn), NoChainError, "nothing of a InTurn"),
    Case("other branches for other data", forward(_branching), ModelError,
         "control flow differs|block blocks.2 did not run on a batch of . samples.*takes other ways"),
    Case("BatchNorm without statistics", lambda: seeded(Chain, block=Untracked), ModelError,
         "rows of a batch depend on each other.*norm of batch statistics in eval mode"),
    Case("noise in eval mode", forward(lambda self, x: Chain.forward(self, x + torch.rand(1))),
         NoChainError, "is it random in eval mode"),
    Case("dropout in eval mode", block(
        lambda self, x: x + nn.functional.dropout(branch(self, x), training=True)), NoChainError, "random"),
    Case("a stream of complex numbers", lambda: seeded(Pairs), NoChainError, "its stream is of complex64"),
    Case("a stream of integers", lambda: seeded(Counted), NoChainError, "its stream is of int64"),
    Case("a forward pass that counts", lambda: seeded(Counting), ModelError,
         r"writes into its state dict in eval mode \('calls'\).*in training alone"),
    Case("lazy layers", lambda: quiet(lambda: seeded(Chain, block=Lazy)), ModelError, "a lazy parameter.*run the model on a batch first"),
    Case("weights on the meta device", chain(lambda m: m.to("meta")), ModelError, "meta device.*load the weights first"),
    Case("one block on the meta device", chain(lambda m: m.blocks[1].to("meta")), ModelError, "meta device"),
    Case("a scripted module", _scripted, ModelError, "ScriptModule.*pass the original"),
    Case("a traced module", _traced, ModelError, "ScriptModule.*pass the original"),
    Case("an exported program", lambda: torch.export.export(seeded(Chain), (rows(2),)), ModelError,
         r"ExportedProgram: pass its .module\(\)"),
    Case("a network that compile() changed", _compiled, ModelError, "compiled in place"),
    Case("dynamic quantisation", lambda: quiet(lambda: torch.ao.quantization.quantize_dynamic(
        seeded(Chain), {nn.Linear})), NoChainError, "quantised: compress the network before"),
    Case("a class", lambda: Chain, ModelError, "the model is a type: pass an nn.Module"),
    Case("a function", lambda: (lambda x: x), ModelError, "the model is a function"),
    Case("nothing", lambda: None, ModelError, "the model is a NoneType"),
    Case("a state dict", lambda: seeded(Chain).state_dict(), ModelError, "the model is a OrderedDict"),
    Case("a name", lambda: "resnet50", ModelError, "the model is a str"),
    Case("a forward pass that raises", odd(_raise), ModelError, "seventeen channels are wanted.*Pass batches"),
    Case("a forward pass that wants more", forward(lambda self, x, y: x), ModelError, "argument: 'y'"),
    Case("an output that is nothing", odd(lambda *_: None), ModelError, "holds no floating-point tensor .no tensor."),
    Case("an output that is a number", odd(lambda *_: 3), ModelError, "holds no floating-point tensor .no tensor."),
    Case("an output of integers", odd(lambda m, x: Chain.forward(m, x).argmax(-1)), ModelError,
         "holds no floating-point"),
    Case("an output of one number for all", odd(lambda m, x: Chain.forward(m, x).mean()), ModelError,
         r"shape \(\) for 2 samples"),
    Case("an output whose samples come second", odd(lambda m, x: Chain.forward(m, x).T), ModelError,
         r"shape \(3, 2\) for 2 samples"),
    Case("an output that is complex", odd(lambda m, x: torch.fft.fft(Chain.forward(m, x))), ModelError,
         "holds no floating-point"),
    Case("a model that cannot be copied", lambda: seeded(Uncopied), ModelError, "holds a socket.*deepcopy"),
    Case("a weight that is NaN", chain(nan_weight), ActivationError, "output of blocks.2 holds NaN"),
    Case("weights that overflow", chain(huge_weight), ActivationError, r"output of blocks.\d holds NaN or inf"),
    Case("weights that overflow in float16", chain(lambda m: m.half().blocks[0].down.weight.data.fill_(3e4)),
         ActivationError, "in float16, run"),
    Case("weights that overflow in bfloat16", chain(
        lambda m: m.bfloat16().blocks[1].down.bias.data.fill_(3.3e38)), ActivationError, "blocks.2 holds"),
    Case("an output that is NaN", odd(lambda m, x: Chain.forward(m, x) * torch.nan), ActivationError,
         "output holds NaN or infinity"),
]  # fmt: skip


@table(REFUSED)
def test_a_model_is_refused_by_name(case: Case) -> None:
    model = case.make()
    before = {}
    if isinstance(model, nn.Module):
        before = {
            n: t.clone()
            for n, t in model.state_dict().items()
            if isinstance(t, Tensor) and not nn.parameter.is_lazy(t)
        }
    assert case.error is not None
    with pytest.raises(case.error, match=f"(?s){case.message}"):
        compress(model, loader(), budget=Budget(macs=0.8), config=LIGHT)
    if before and not isinstance(model, torch.jit.ScriptModule):
        after = model.state_dict()
        assert all(
            t.is_meta or torch.equal(torch.nan_to_num(after[n]), torch.nan_to_num(t))
            for n, t in before.items()
        )


@pytest.mark.slow
def test_two_hundred_blocks() -> None:
    model = seeded(Chain, depth=200)
    (found,) = supports(model, rows(4)).chains
    assert len(found) == 200


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _evaluated(model: nn.Module) -> nn.Module:
    found = copy.deepcopy(model)
    for module in found.modules():
        module.training = False
    return found


def _leaves(output: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor)]
