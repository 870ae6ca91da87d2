"""Does a stored state belong to this module, name by name, and how is the module filled from it?"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .filling import FIRST, Filling, Fitting, PickledTensor, Source, is_left_out
from .names import clean_names, modules, pair
from .snapshot import StoredTensor, Tree
from .trees import items


def fit_module(fitting: Fitting, where: str, module: nn.Module, tree: Tree, note: Mapping[str, Any]) -> None:
    """Compare a module with its tree: differences are noted, and what fits is planned."""
    stored = items(tree)
    if stored is None:
        fitting.differences.add("mismatched", where, [f"{where} is no state dict in the checkpoint"])
        return
    try:
        live = module.state_dict(keep_vars=True)
    except TypeError:  # a state_dict of the user's own making may take no argument
        live = module.state_dict()
    clean = clean_names(module, live)
    pairs = pair(clean.values(), [name for name in stored if isinstance(name, str)])
    used = set(pairs.values())
    fitting.differences.add("missing", where, [name for name in clean.values() if name not in pairs])
    fitting.differences.add("unexpected", where, [str(name) for name in stored if name not in used])
    parts: list[tuple[str, Any, Tree, str]] = []
    offers: list[tuple[StoredTensor, torch.Tensor]] = []
    for raw, name in clean.items():
        if name not in pairs:
            continue
        target, part, path = live[raw], stored[pairs[name]], f"{where}.{name}"
        if isinstance(target, torch.Tensor) and not raw.endswith("_extra_state"):
            if problem := misfit(target, part):
                fitting.differences.add("mismatched", where, [f"{path} {problem}"])
                continue
            if is_pickled(part):
                fitting.compare_later(target, part, where, path)
            else:
                fitting.dtypes[id(target)] = part.dtype
                if not nn.parameter.is_lazy(target):
                    offers.append((part, target))
                    if target.dtype != part.dtype:
                        fitting.differences.casts.append(f"{path}: {part.dtype} -> {target.dtype}")
        parts.append((raw, target, part, path))
    if takes_in_place(module):
        fitting.in_place.offer(offers)
    else:
        fitting.in_place.make(offers)

    # What fills must not hold `fitting`, which holds it: the objects of a large state would wait for the collector.
    differences, left_out = fitting.differences, fitting.left_out

    def fill(source: Source) -> None:
        complete = not differences.has(where)
        if complete and len(offers) == len(parts) and copies_only(module):
            # The same as below, whose time grows with the square of a module's children.
            source.copy(offers)
            return
        state: OrderedDict[str, Any] = OrderedDict()
        for raw, target, part, path in parts:
            if is_left_out(part, left_out):
                continue
            # The parameter itself where it has been read into: copying it onto itself costs nothing.
            state[raw] = target if source.in_place.has(part, target) else source.decode(part, path)
        if isinstance(versions := note.get("versions"), Mapping):
            state._metadata = {raw[:-1]: {"version": versions.get(own, 1)} for raw, own, _ in modules(module)}  # type: ignore[attr-defined]
        module.load_state_dict(state) if complete else module.load_state_dict(state, strict=False)

    fitting.fillings.append(Filling(FIRST, where, [(part, path) for _, _, part, path in parts], fill))


def misfit(target: torch.Tensor, tree: Tree) -> str | None:
    """Why a tensor can't be filled from a tree, or None when it can, or when only loading what was pickled can tell."""
    if isinstance(tree, StoredTensor):
        return _misfit(target, tree.shape)
    if isinstance(tree, dict) and "$meta" in tree:
        return _META
    return _misfit(target, None) if is_pickled(tree) else _NO_TENSOR


def is_pickled(tree: Tree) -> bool:
    """Whether a tree stands for what was pickled, such as a tensor of a class that is not torch's."""
    return isinstance(tree, dict) and "$object" in tree


def compare_pickled(fitting: Fitting, values: Mapping[str, Any]) -> None:
    """Compare tensors with what was pickled for them, now that it is loaded: differences are noted."""
    for one in fitting.pickled:
        value = values[one.key]
        if problem := _pickled_misfit(one.target, value):
            _leave_out(fitting, one, problem)
            continue
        fitting.dtypes[id(one.target)] = value.dtype
        if not nn.parameter.is_lazy(one.target) and one.target.dtype != value.dtype:
            fitting.differences.casts.append(f"{one.path}: {value.dtype} -> {one.target.dtype}")
    fitting.pickled.clear()


def leave_pickled(fitting: Fitting) -> None:
    """Note of the tensors that what was pickled for them is not to be loaded."""
    for one in fitting.pickled:
        _leave_out(fitting, one, "was pickled, and loading it needs trust_pickle=True")
    fitting.pickled.clear()


def _leave_out(fitting: Fitting, one: PickledTensor, problem: str) -> None:
    fitting.differences.add("mismatched", one.where, [f"{one.path} {problem}"])
    fitting.left_out.add(one.key)


_NO_TENSOR = "is not a tensor in the checkpoint"
_META = "was on the meta device when it was saved, and has no values"


def _misfit(target: torch.Tensor, shape: tuple[int, ...] | None) -> str | None:
    """Why a tensor can't be filled with one of this shape, if that is known."""
    if target.is_meta:  # a lazy one may be, too
        return "is on the meta device here and can't be filled; give it memory first (to_empty)"
    if nn.parameter.is_lazy(target):
        return None
    if target.is_nested:  # it has no shape to compare
        return "is a nested tensor here and can't be filled in place; load() gives what was saved"
    if shape is not None and target.shape != shape:
        return f"has shape {tuple(shape)} in the checkpoint and {tuple(target.shape)} in the object"
    return None


def _pickled_misfit(target: torch.Tensor, value: Any) -> str | None:
    if not isinstance(value, torch.Tensor):
        return _NO_TENSOR
    if value.is_meta:
        return _META
    problem = _misfit(target, None if value.is_nested else value.shape)
    if problem or nn.parameter.is_lazy(target) or _kind(target) == _kind(value):
        return problem
    return f"is a {_words(value)} in the checkpoint and a {_words(target)} in the object"


def _kind(tensor: torch.Tensor) -> tuple[Any, ...]:
    """What has to be the same of two tensors for one to be copied into the other. A class that takes torch's calls
    itself, and has memory of its own making, copies what is of its kind; any other is numbers in memory."""
    has_own = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    dtype = tensor.dtype if has_own or tensor.is_quantized else None  # else it may be cast
    return type(tensor) if has_own else None, tensor.layout, tensor.is_nested, dtype


def _words(tensor: torch.Tensor) -> str:
    return f"{'nested ' if tensor.is_nested else ''}{type(tensor).__qualname__} ({tensor.layout}, {tensor.dtype})"


# What a module may have of its own to make its state, or to take one.
_METHODS = {"state_dict", "load_state_dict", "_save_to_state_dict", "_load_from_state_dict", "set_extra_state"}
_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


def takes_in_place(module: nn.Module) -> bool:
    """Whether a module may be given its own parameters, filled already, to load: nobody else's code looks at
    what it is given, or changes parameters before they are copied."""
    return _loads_as_torch(module, {"load_state_dict", "_load_from_state_dict", "set_extra_state"}, _HOOKS[2:3])


def copies_only(module: nn.Module) -> bool:
    """Whether loading a whole state is nothing but copying each tensor: the module and all its parts
    load as torch's own do, and nobody hooked into it."""
    return not torch.__future__.get_swap_module_params_on_conversion() and _loads_as_torch(module, _METHODS, _HOOKS)


def _is_harmless(hooks: Any) -> bool:
    """Whether the only hooks are those of FSDP that see to it that parameters are sharded, as they are once the
    module has given its state."""
    return isinstance(hooks, dict) and all(
        getattr(getattr(hook, "hook", hook), "__module__", "").startswith("torch.distributed.fsdp.")
        for hook in hooks.values()
    )


def _loads_as_torch(module: nn.Module, methods: set[str], hooks: tuple[str, ...]) -> bool:
    """Whether the module and all its parts have these methods from torch, and none of these hooks."""
    plain: dict[type, bool] = {}
    for part in module.modules():
        kind, own = type(part), part.__dict__
        if kind not in plain:
            plain[kind] = all(getattr(kind, name).__module__.startswith("torch.nn.modules.") for name in methods)
        if (
            not plain[kind]
            or not methods.isdisjoint(own)
            or not all(own.get(name) == {} or _is_harmless(own.get(name)) for name in hooks)
        ):
            return False
    return True
