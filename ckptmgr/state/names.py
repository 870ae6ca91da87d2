"""What are a module's tensors called, whatever the module is wrapped in?

DDP, `torch.compile` and the like put a prefix in front of names. Here it is taken off where such a
wrapper really stands, so a user's own submodule called "module" keeps its name.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter, methodcaller
from typing import Any, TypeVar

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
    if all(map(str.__eq__, prefixes.keys(), prefixes.values())):  # no wrapper anywhere
        return {key: key for key in keys}
    names = {key: _clean(key, prefixes) for key in keys}
    if len(set(names.values())) < len(names):  # a state_dict of the user's own making
        return {key: key for key in keys}
    return names


def _clean(key: str, prefixes: Mapping[str, str]) -> str:
    end = key.rfind(".") + 1
    while key[:end] not in prefixes:  # the module itself has the prefix ""
        end = key.rfind(".", 0, end - 1) + 1
    return prefixes[key[:end]] + key[end:]


class ParameterNames(dict[int, str]):
    """The first name of every parameter of named modules, such as "model.layers.0.weight", by its id."""

    def __init__(self, found: list[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self._found = found
        for one, name in self._walk():
            self.setdefault(one, name)

    def every(self) -> dict[int, list[str]]:
        """All names of every parameter, by its id: one that several modules share has several."""
        names: dict[int, list[str]] = {}
        for one, name in self._walk():
            names.setdefault(one, []).append(name)
        return names

    def _walk(self) -> Iterator[tuple[int, str]]:
        for entry, module in self._found:
            for _, clean, part in modules(module):
                for name, parameter in part._parameters.items():
                    if parameter is not None:
                        yield id(parameter), f"{entry}.{clean}{name}"


def parameter_names(objects: Iterable[tuple[str, nn.Module]]) -> ParameterNames:
    """The names of the parameters of named modules."""
    return ParameterNames(list(objects))


@dataclass(frozen=True, slots=True)
class Outline:
    """A module seen at a glance. Two modules with equal `facts` have the same names for their parameters
    and for the keys of their state dicts, the same versions, and gradients for the same parameters."""

    facts: list[Any]
    parameters: list[nn.Parameter | None]


def outline(module: nn.Module) -> Outline:
    """The outline of a module, found level by level without a call per submodule or parameter."""
    facts: list[Any] = []
    parameters: list[nn.Parameter | None] = []
    level: list[Any] = [module]
    around: set[int] = set()
    while level:
        facts.append(list(map(type, level)))
        level = [part for part in level if part is not None]
        children, own = list(map(_CHILDREN, level)), list(map(_OWN, level))
        inner = [id(part) for part, below in zip(level, children, strict=True) if below]
        if not around.isdisjoint(inner) or not set(map(type, chain(children, own))) <= {dict, OrderedDict}:
            return _outline_by_walking(module)
        around.update(inner)
        facts += (list(map(tuple, children)), list(map(tuple, own)), list(map(_VERSION, level)))
        parameters += chain.from_iterable(map(_VALUES, own))
        level = list(chain.from_iterable(map(_VALUES, children)))
    return Outline([*facts, _gradients(parameters)], parameters)


_CHILDREN, _OWN, _VERSION = attrgetter("_modules"), attrgetter("_parameters"), attrgetter("_version")
_VALUES = methodcaller("values")


def _outline_by_walking(module: nn.Module) -> Outline:
    """The same where a submodule stands on several levels, or keeps its children in its own way."""
    facts: list[Any] = []
    parameters: list[nn.Parameter | None] = []
    for raw, clean, part in modules(module):
        own = dict(part._parameters.items())
        facts.append((raw, clean, type(part), part._version, tuple(own)))
        parameters += own.values()
    return Outline([*facts, _gradients(parameters)], parameters)


def _gradients(parameters: Iterable[nn.Parameter | None]) -> list[bool | None]:
    return [None if parameter is None else parameter.requires_grad for parameter in parameters]


@dataclass(slots=True)
class Known:
    """What `Names` found out, for the next time. Holds neither modules nor tensors.

    An id is compared only as part of a list of ids of things that were alive together: equal lists mean
    that the same places held the same thing, whatever thing that was.
    """

    facts: list[tuple[str, list[Any]]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    states: dict[str, _State] = field(default_factory=dict)
    groups: dict[str, tuple[list[list[int]], list[list[str | None]]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _State:
    """What a module's state dict is saved with: clean names for its keys, and the versions of submodules."""

    facts: list[Any]
    keys: tuple[Any, ...]
    names: tuple[Any, ...]
    versions: dict[str, Any]


class Names:
    """The names within some modules, each with its path. `known` is for the next time."""

    def __init__(self, found: list[tuple[str, nn.Module]], before: Known) -> None:
        self._found, self._before = found, before
        facts_before = dict(before.facts)
        self._outlines: dict[int, Outline] = {}
        for path, module in found:
            one = outline(module)
            is_known = facts_before.get(path) == one.facts  # the same object is compared in no time from here on
            self._outlines[id(module)] = Outline(facts_before[path], one.parameters) if is_known else one
        outlines = [(path, self._outlines[id(module)]) for path, module in found]
        facts = [(path, one.facts) for path, one in outlines]
        ids = list(map(id, chain.from_iterable(one.parameters for _, one in outlines)))
        self.known = Known(facts, ids)
        self._is_same = facts == before.facts and ids == before.ids
        self._parameters: dict[int, str] | None = None

    def of_state(self, path: str, module: nn.Module, keys: Iterable[str]) -> _State:
        """The names of a state dict's keys."""
        facts, keys = (self._outlines.get(id(module)) or outline(module)).facts, tuple(keys)
        state = self._before.states.get(path)
        if state is None or state.keys != keys or state.facts != facts:
            names = clean_names(module, keys)
            versions = {clean: part._version for _, clean, part in modules(module) if part._version != 1}
            state = _State(facts, keys, tuple(names[key] for key in keys), versions)
        self.known.states[path] = state
        return state

    def of_groups(self, path: str, groups: list[list[nn.Parameter]]) -> list[list[str | None]]:
        """The names of an optimizer's parameters, group by group; None for one that no module has."""
        ids = [list(map(id, group)) for group in groups]
        before = self._before.groups.get(path)
        if before is not None and self._is_same and before[0] == ids:
            named = before[1]
        else:
            if self._parameters is None:
                self._parameters = parameter_names(self._found)
            named = [list(map(self._parameters.get, group)) for group in ids]
        self.known.groups[path] = (ids, named)
        return named

    def of_modules(self, found: list[tuple[str, nn.Module]]) -> tuple[list[Any], list[nn.Parameter]]:
        """All that the names in these modules depend on, and their parameters."""
        outlines = [(path, self._outlines[id(module)]) for path, module in found]
        parameters = [p for _, one in outlines for p in one.parameters if p is not None]
        return [(path, one.facts) for path, one in outlines], parameters


def unwrapped(name: str) -> str:
    """A name without anything that could be a wrapper's prefix."""
    return ".".join(part for part in name.split(".") if part not in _PREFIXES)


def pair(wanted: Iterable[str], stored: Iterable[str]) -> dict[str, str]:
    """The stored name for each wanted name: the same, or the only one that differs by nothing but
    prefixes of wrappers, as in a plain state dict that was saved with them."""
    wanted, stored = list(wanted), set(stored)
    found = {name: name for name in wanted if name in stored}
    lacking = {name: [unwrapped(name)] for name in wanted if name not in found}
    return found | one_to_one(lacking, {name: [unwrapped(name)] for name in stored - found.keys()})


One = TypeVar("One", bound=Hashable)
Other = TypeVar("Other", bound=Hashable)


def one_to_one(ones: Mapping[One, Iterable[str]], others: Mapping[Other, Iterable[str]]) -> dict[One, Other]:
    """Which of the ones is which of the others, by their names: those that have a name in common that
    nothing else has."""
    here, there = _by_name(ones), _by_name(others)
    found: dict[One, Other] = {}
    taken: set[Other] = set()
    for name, some in here.items():
        if len(some) == len(there.get(name, ())) == 1 and some[0] not in found and there[name][0] not in taken:
            found[some[0]] = there[name][0]
            taken.add(there[name][0])
    return found


def _by_name(named: Mapping[One, Iterable[str]]) -> dict[str, list[One]]:
    grouped: dict[str, list[One]] = {}
    for one, names in named.items():
        for name in dict.fromkeys(names):
            grouped.setdefault(name, []).append(one)
    return grouped
