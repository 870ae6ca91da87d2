"""Does a stored state belong to this module, name by name, and how is the module filled from it?"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .filling import FIRST, Filling, Fitting, Source
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
    complete = not fitting.differences.has(where)

    def fill(source: Source) -> None:
        if complete and len(offers) == len(parts) and copies_only(module):
            # The same as below, whose time grows with the square of a module's children.
            source.copy(offers)
            return
        state: OrderedDict[str, Any] = OrderedDict()
        for raw, target, part, path in parts:
            # The parameter itself where it has been read into: copying it onto itself costs nothing.
            state[raw] = target if source.in_place.has(part, target) else source.decode(part, path)
        if isinstance(versions := note.get("versions"), Mapping):
            state._metadata = {raw[:-1]: {"version": versions.get(own, 1)} for raw, own, _ in modules(module)}  # type: ignore[attr-defined]
        module.load_state_dict(state) if complete else module.load_state_dict(state, strict=False)

    fitting.fillings.append(Filling(FIRST, where, [(part, path) for _, _, part, path in parts], fill))


def misfit(target: torch.Tensor, tree: Tree) -> str | None:
    """Why a tensor can't be filled from a tree, or None when it can."""
    if not isinstance(tree, StoredTensor):
        if isinstance(tree, dict) and "$meta" in tree:
            return "was on the meta device when it was saved, and has no values"
        return "is not a tensor in the checkpoint"
    if nn.parameter.is_lazy(target):
        return None
    if target.is_meta:
        return "is on the meta device here and can't be filled; give it memory first (to_empty)"
    if target.shape != tree.shape:
        return f"has shape {tuple(tree.shape)} in the checkpoint and {tuple(target.shape)} in the object"
    return None


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
