"""Networks that accelerate has dispatched: their tensors on any device, and copies of the module tree.

Accelerate's hooks (`module._hf_hook`) bring a module's inputs to its device, load its weights from
memory or disk when it runs, and leave meta tensors behind. A search needs weights at other times, too:
it names them in a recording, re-solves layers, and runs blocks from graphs. So it works on a network
without hooks (`undispatched`), in which each offloaded weight is an `Offloaded` tensor: an operation
that reads the weight loads it, and frees it afterwards.
"""

from __future__ import annotations

import copy
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from rba_compress.core.errors import ModelError

_ADDED = ("to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron")
"""Methods that accelerate wraps on an instance to warn; on a copy they would move the original."""


class Offloaded(Tensor):
    """Tensor stored elsewhere: `load` brings it to its device for each operation that reads it.

    Views of an offloaded tensor are offloaded, too, so that a view keeps no data in memory.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    load: Callable[[], Tensor]
    like: Tensor
    """Tensor of the same geometry on the meta device."""

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Offloaded({tuple(self.shape)}, {self.dtype}, for {self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return memo.setdefault(id(self), _as(self, self.detach()))  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch.inference_mode(False):  # inference mode makes no views of such a tensor
            if func.is_view and isinstance(args[0], Offloaded):
                like = func(args[0].like, *args[1:], **kwargs)
                if isinstance(like, Tensor):
                    load = partial(_view, args[0], func, args[1:], kwargs)
                    return _offloaded(load, like, args[0].device)
            args, kwargs = pytree.tree_map(loaded, (args, kwargs))
        return func(*args, **kwargs)


def _offloaded(load: Callable[[], Tensor], like: Tensor, device: torch.device) -> Offloaded:
    made: Offloaded = Tensor._make_wrapper_subclass(
        Offloaded,
        like.shape,
        strides=like.stride(),
        storage_offset=like.storage_offset(),
        dtype=like.dtype,
        device=device,
    )
    made.load, made.like = load, like
    return made


def _view(source: Offloaded, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    found: Tensor = func(source.load(), *args, **kwargs)
    return found


def _fetch(weights: Mapping[str, Tensor], name: str, like: Tensor, device: torch.device) -> Tensor:
    return weights[name].detach().to(device, like.dtype)


def loaded(value: Any) -> Any:
    """Return the loaded tensor of an `Offloaded` one; any other value as it is."""
    return value.load() if isinstance(value, Offloaded) else value


def _as(old: Tensor, new: Tensor) -> Tensor:
    """Return `new` as a parameter where `old` is a parameter."""
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new, requires_grad=old.requires_grad)
    return new


def _hooks(module: nn.Module) -> list[Any]:
    """Return accelerate's hooks that move a module's inputs, and its weights where they are offloaded.

    Raises:
        ModelError: a GraphModule has such a hook, which its copies would lack; or the module has a hook
            of another kind, too, whose effect is not known.
    """
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        return []
    parts = getattr(hook, "hooks", (hook,))
    found = [part for part in parts if hasattr(part, "weights_map")]
    if found and isinstance(module, fx.GraphModule):
        raise ModelError(
            "accelerate has dispatched a GraphModule: pass the plain module, or dispatch the result"
        )
    if found and len(found) < len(parts):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise ModelError(
            f"a {type(module).__name__} that accelerate has dispatched has other hooks, too ({kinds}): "
            "remove those that do not dispatch it"
        )
    return found


def dispatched(model: nn.Module) -> bool:
    """Return True if hooks of accelerate move the inputs and weights of a network."""
    return any(_hooks(module) for module in modules_of(model))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers; shared ones under each of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def execution_device(model: nn.Module, tensor: Tensor, path: str = "") -> torch.device:
    """Return the device on which a tensor of the module at `path` is when the module runs."""
    if not tensor.is_meta:
        return tensor.device
    around = [model.get_submodule(part) for part in reversed(above(path))]
    for module in (*model.get_submodule(path).modules(), *around):
        for hook in _hooks(module):
            if hook.execution_device is not None:
                return torch.empty(0, device=hook.execution_device).device  # with its index
    return tensor.device


def device_of(model: nn.Module) -> torch.device:
    """Return the device on which a network runs: that of its first parameter when it is read."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else execution_device(model, first)


def above(path: str) -> list[str]:
    """Return the paths of the modules around a path, the outermost first."""
    parts = path.split(".") if path else []
    return [".".join(parts[:k]) for k in range(len(parts))]


def undispatched(model: nn.Module, path: str = "") -> nn.Module:
    """Return the module at `path` without accelerate's hooks, in a new tree over the same tensors.

    All tensors are on one device; offloaded ones, and those of other devices, become `Offloaded`. If no
    hook is on the module, inside or around it, the module itself is returned.

    Raises:
        ModelError: a meta tensor is loaded by no hook, or a GraphModule has a hook.
    """
    module = model.get_submodule(path)
    around = (model.get_submodule(part) for part in above(path))
    if not any(map(_hooks, (*modules_of(module), *around))):
        return module
    first = next((tensor for _, tensor in _tensors(module)), torch.empty(0))
    device = execution_device(model, first, path)
    sources: dict[str, tuple[Mapping[str, Tensor], str]] = {}
    tied: list[Tensor] = []
    for at, held in model.named_modules():
        for hook in _hooks(held):
            loads = _loads(held, hook)
            sources |= {f"{at}.{name}".lstrip("."): (hook.weights_map, name) for name in loads}
            tied += [loads[name] for name in hook.tied_params_names if name in loads]
    memo: dict[int, Any] = {}
    for name, tensor in _tensors(module):
        load: Callable[[], Tensor] = partial(tensor.detach().to, device)
        if tensor.is_meta:
            source = sources.get(f"{path}.{name}".lstrip("."))
            if source is None:
                raise ModelError(
                    f"the tensor {name} of the {type(model).__name__} is on the meta device, and no "
                    "hook of accelerate loads it: load the weights before they are dispatched"
                )
            load = partial(_fetch, *source, tensor, device)
        elif tensor.device == device:
            continue
        like = tensor.detach().to("meta")
        memo[id(tensor)] = _as(tensor, _offloaded(load, like, device))
    _tie(memo, [tensor for _, tensor in _tensors(module)], tied)
    return _unhooked(copy_tree(module, memo))


def _tie(memo: dict[int, Any], tensors: Sequence[Tensor], tied: Sequence[Tensor]) -> None:
    """Tie weights again: replace equal tied weights by one tensor.

    Offloaded tied weights are separate meta tensors; accelerate knows that they were tied, but not to
    which weight.
    """
    names = {id(tensor) for tensor in tied}
    known = [tensor for tensor in tensors if id(tensor) not in memo]
    for tensor in (t for t in tensors if id(t) in names):
        new = memo[id(tensor)]
        alike = (old for old in known if (old.shape, old.dtype) == (new.shape, new.dtype))
        same = next((old for old in alike if torch.equal(loaded(old), loaded(new))), None)
        memo[id(tensor)] = new if same is None else same
        known += [new] if same is None else []


def _loads(module: nn.Module, hook: Any) -> dict[str, Tensor]:
    """Return the tensors that a hook of a module loads: meta tensors of its own, or of all below it."""
    whole = hook.place_submodules
    named = dict(_tensors(module)) if hook.offload else {}
    return {n: tensor for n, tensor in named.items() if tensor.is_meta and (whole or "." not in n)}


def _unhooked(model: nn.Module) -> nn.Module:
    """Remove those hooks from the modules of `model` in place, and return `model`."""
    for module in modules_of(model):
        if _hooks(module):
            old: Any = module._old_forward
            if getattr(old, "__func__", None) is type(module).forward:
                del module.forward
            else:
                module.forward = old
            del module._hf_hook, module._old_forward
    return model


def in_memory(model: nn.Module, path: str = "", *, device: str | None = None) -> nn.Module:
    """Return the module at `path` without hooks, its `Offloaded` tensors loaded as tensors of its own.

    A module that has neither is returned itself.

    Args:
        device: where all its tensors go; by default where they are loaded.
    """
    module = undispatched(model, path)
    named = list(_tensors(module))
    if module is model.get_submodule(path) and not any(isinstance(t, Offloaded) for _, t in named):
        return module
    memo: dict[int, Any] = {}
    for _, tensor in named:
        own = tensor.load().clone() if isinstance(tensor, Offloaded) else tensor.detach()
        memo.setdefault(id(tensor), _as(tensor, own.to(device or own.device)))
    return copy_tree(module, memo)


def hold(model: nn.Module, path: str) -> None:
    """Load the tensors of the module at `path` into memory for good: no hook loads them from then on.

    Tensors of an enclosing module that a hook loads as a whole are loaded, too.
    """
    for at in (*above(path), path):
        module = model.get_submodule(at)
        hooks = [h for h in _hooks(module) if h.offload and (at == path or h.place_submodules)]
        names = {name for hook in hooks for name in _loads(module, hook)}
        found = dict(_tensors(undispatched(model, at))) if names else {}
        for name in names:
            parent, _, last = name.rpartition(".")
            own = _as(found[name], loaded(found[name]).clone())
            setattr(module.get_submodule(parent), last, own)
        for hook in hooks:
            hook.offload = False


def take_place(new: nn.Module, old: nn.Module) -> None:
    """Give a module that replaces a dispatched one the hook that moves its inputs."""
    hooks = _hooks(old)
    if hooks:
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        kept = ("execution_device", "io_same_device", "skip_keys")
        hook = AlignDevicesHook(**{name: getattr(hooks[-1], name) for name in kept})
        add_hook_to_module(new, hook)


# --- copies


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Return each module of a tree once; `nn.Module.modules` takes several times as long."""
    found: dict[nn.Module, None] = {}
    rest = [model]
    while rest:
        module = rest.pop()
        if module not in found:
            found[module] = None
            rest += [child for child in module._modules.values() if child is not None]
    return list(found)


def copy_tree(model: nn.Module, tensors: dict[int, Any] | None = None) -> nn.Module:
    """Copy a module tree over the same tensors, faster than `copy.deepcopy`: a search makes hundreds.

    Args:
        tensors: replacements of parameters and buffers, by their ids; all others are shared.
    """
    modules = modules_of(model)
    memo: dict[int, Any] = {}
    for module in modules:
        memo.update((id(t), t) for t in (*module._parameters.values(), *module._buffers.values()))
    memo |= {**(tensors or {}), **_maps(modules)}
    kinds = {type(module) for module in modules}
    if any(hasattr(k, "__deepcopy__") or k.__getstate__ != nn.Module.__getstate__ for k in kinds):
        return _freed(copy.deepcopy(model, memo))
    for module in modules:
        memo[id(module)] = type(module).__new__(type(module))
    # Module trees first: other attributes of a module may refer to them.
    for module in modules:
        state = memo[id(module)].__dict__
        state.update(module.__dict__)
        for name in _HELD:
            items = module.__dict__[name]
            state[name] = {key: None if v is None else memo[id(v)] for key, v in items.items()}
    for module in modules:
        state = memo[id(module)].__dict__
        for name, value in module.__dict__.items():
            kind = type(value)
            # Most attributes are shared; deepcopy is slow to find that out.
            if kind in _ATOMS or name in _HELD:
                continue
            if kind in _EMPTY and not value:
                state[name] = kind()
            elif not (kind is tuple and all(type(v) in _ATOMS for v in value)):
                state[name] = copy.deepcopy(value, memo)
    return _freed(memo[id(model)])


_ATOMS = {type(None), bool, int, float, str, type, types.FunctionType, types.BuiltinFunctionType}
_EMPTY = {dict, OrderedDict, set}
_HELD = ("_parameters", "_buffers", "_modules")


def deep_copy(model: nn.Module) -> nn.Module:
    """Return a deep copy; offloaded weights stay where they are, for the hooks of both."""
    return _freed(copy.deepcopy(model, _maps(model.modules())))


def _maps(modules: Iterable[nn.Module]) -> dict[int, Any]:
    """Return the mappings from which hooks load weights, by id."""
    found = (hook.weights_map for module in modules for hook in _hooks(module))
    return {id(weights): weights for weights in found if weights is not None}


def _freed(model: nn.Module) -> nn.Module:
    """Remove wrapped methods of the original from a copy in place, and return the copy."""
    for module in modules_of(model):
        for name in _ADDED if "hf_device_map" in module.__dict__ else ():
            module.__dict__.pop(name, None)
    return model
