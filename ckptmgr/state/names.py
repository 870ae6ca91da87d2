"""What are a module's tensors called, whatever the module is wrapped in?

DDP, `torch.compile` and the like put a prefix in front of names. Here it is taken off where such a
wrapper really stands, so a user's own submodule called "module" keeps its name.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping

from torch import nn
from torch.nn.parallel import DistributedDataParallel

_HIDDEN = "_checkpoint_wrapped_module"  # activation checkpointing: not in the names of state_dict() either
_PREFIXES = ("module", "_orig_mod", _HIDDEN)


def modules(module: nn.Module, raw: str = "", clean: str = "") -> Iterator[tuple[str, str, nn.Module]]:
    """Every submodule, shared ones as often as they stand there: its prefix in `state_dict()`, the
    same without wrappers, and the submodule. A prefix is empty or ends with a dot."""
    yield raw, clean, module
    for name, child in module._modules.items():
        if child is None:
            continue
        own = f"{name}."
        hidden = name == _HIDDEN
        yield from modules(
            child, raw if hidden else raw + own, clean if hidden or _wraps(module, name) else clean + own
        )


def _wraps(module: nn.Module, name: str) -> bool:
    """Whether the child with this name is what the module wraps."""
    if name == "module":
        return isinstance(module, DistributedDataParallel | nn.DataParallel)
    dynamo = sys.modules.get("torch._dynamo.eval_frame")  # slow to import, and there if anything is compiled
    return name == "_orig_mod" and dynamo is not None and isinstance(module, dynamo.OptimizedModule)


def clean_names(module: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """The name without wrappers of each key of the module's state dict. All names are distinct."""
    keys = list(keys)
    prefixes = {raw: clean for raw, clean, _ in modules(module)}
    names = {key: _clean(key, prefixes) for key in keys}
    if len(set(names.values())) < len(names):  # a state_dict of the user's own making
        return {key: key for key in keys}
    return names


def _clean(key: str, prefixes: Mapping[str, str]) -> str:
    end = key.rfind(".") + 1
    while key[:end] not in prefixes:  # the module itself has the prefix ""
        end = key.rfind(".", 0, end - 1) + 1
    return prefixes[key[:end]] + key[end:]


def parameter_names(objects: Iterable[tuple[str, nn.Module]]) -> dict[int, str]:
    """The first name of every parameter of named modules, such as "model.layers.0.weight", by its id."""
    names: dict[int, str] = {}
    for entry, module in objects:
        for _, clean, part in modules(module):
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    names.setdefault(id(parameter), f"{entry}.{clean}{name}")
    return names


def unwrapped(name: str) -> str:
    """A name without anything that could be a wrapper's prefix."""
    return ".".join(part for part in name.split(".") if part not in _PREFIXES)


def pair(wanted: Iterable[str], stored: Iterable[str]) -> dict[str, str]:
    """The stored name for each wanted name: the same, or the only one that differs by nothing but
    prefixes of wrappers, as in a plain state dict that was saved with them."""
    wanted, stored = list(wanted), set(stored)
    found = {name: name for name in wanted if name in stored}
    lacking = _by_unwrapped(name for name in wanted if name not in found)
    free = _by_unwrapped(stored - found.keys())
    for bare, names in lacking.items():
        if len(names) == 1 and len(free.get(bare, ())) == 1:
            found[names[0]] = free[bare][0]
    return found


def _by_unwrapped(names: Iterable[str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name in names:
        grouped.setdefault(unwrapped(name), []).append(name)
    return grouped
