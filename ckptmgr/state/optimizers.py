"""Does an optimizer's stored state belong to this optimizer, parameter by parameter?

`Optimizer.load_state_dict` goes by position and checks only how many parameters a group has; here
names are compared where they are known, and put into the target's order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from .codec import decode, join
from .filling import Fitting, Source, another_class
from .names import one_to_one, unwrapped
from .optimizer_loading import Pair, loader
from .snapshot import StoredTensor, Tree
from .trees import elements, items

# State that has the parameter's shape in every optimizer of torch that has it, though not in every other.
_SHAPED = {
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "exp_inf",
    "momentum_buffer",
    "square_avg",
    "grad_avg",
    "acc_delta",
}
# Settings of a group that came and went with versions of torch, or are filled in when lacking.
_LATER = {"foreach", "fused", "capturable", "differentiable", "maximize", "decoupled_weight_decay"}


def fit_optimizer(
    fitting: Fitting, where: str, optimizer: Optimizer, tree: Tree, note: Mapping[str, Any]
) -> Callable[[Source], None] | None:
    """What fills the optimizer, or None when the state does not fit; the reasons are noted."""
    top = items(tree)
    groups = _groups(top)
    if top is None or groups is None:  # a state_dict of the optimizer's own making
        return lambda source: optimizer.load_state_dict(source.decode(tree, where))
    problems = _other_kind(optimizer, groups, note)
    sizes, own_sizes = [len(ids) for ids, _ in groups], [len(group["params"]) for group in optimizer.param_groups]
    names = [[fitting.names.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]
    saved_names = _saved_names(note, sizes)
    orders = [list(range(size)) for size in sizes]
    if saved_names is not None and all(name is not None for group in names for name in group):
        if saved_names != names:
            orders, others = _orders(fitting, saved_names, optimizer)
            problems += others
    elif sizes != own_sizes:
        problems.append(f"{where} has groups of {sizes} parameters in the checkpoint and of {own_sizes} in the object")
    if not problems:
        states = items(top["state"]) or {}
        pairs = _pairs(optimizer, states, groups, orders)
        problems = _misshapen(fitting, optimizer, pairs)
        if isinstance(optimizer, torch.optim.LBFGS) and states and orders[0] != sorted(orders[0]):
            # What it has is one vector over all of them, and stands with the first.
            then = [name for _, name in sorted(zip(orders[0], names[0], strict=True))]
            problems.append(f"has one state for all its parameters together: build it with them in order, {_few(then)}")
    if problems:
        fitting.differences.add("mismatched", where, [p if p.startswith(where) else f"{where} {p}" for p in problems])
        return None
    return loader(fitting, where, optimizer, tree, orders, pairs, len(states))


def _groups(top: Mapping[Any, Tree] | None) -> list[tuple[list[Any], Mapping[Any, Tree]]] | None:
    """For each stored group the ids of its parameters and its settings."""
    listed = None if top is None or "state" not in top else elements(top.get("param_groups"))
    if listed is None:
        return None
    groups: list[tuple[list[Any], Mapping[Any, Tree]]] = []
    for one in listed:
        group = items(one)
        ids = None if group is None else elements(group.get("params"))
        if group is None or ids is None:
            return None
        groups.append((decode(ids), group))
    return groups


def _other_kind(
    optimizer: Optimizer, groups: list[tuple[list[Any], Mapping[Any, Tree]]], note: Mapping[str, Any]
) -> list[str]:
    other = another_class(optimizer, note)
    # Of the defaults those that its groups have: one may have got more since its groups were made.
    settings = {key for key in optimizer.defaults if all(key in group for group in optimizer.param_groups)}
    lacking = sorted({key for _, group in groups for key in settings - group.keys() - _LATER})
    # A wrapper of one's own may come and go; torch's own optimizers do not read each other's state.
    if other and (
        lacking or (type(optimizer).__module__.startswith("torch.") and str(note["class"]).startswith("torch."))
    ):
        return [other]
    if lacking:
        return [f"lacks the settings {', '.join(lacking)} in the checkpoint: it was another kind of optimizer"]
    return []


def _saved_names(note: Mapping[str, Any], sizes: list[int]) -> list[list[str]] | None:
    """The names noted when it was saved, or None unless all are known and each stands once in its group."""
    named = note.get("params")
    if not isinstance(named, list) or [len(group) for group in named] != sizes:
        return None
    if any(not isinstance(name, str) for group in named for name in group):
        return None
    return named if all(len(set(group)) == len(group) for group in named) else None


def _orders(fitting: Fitting, saved: list[list[str]], optimizer: Optimizer) -> tuple[list[list[int]], list[str]]:
    """For each group which of the saved parameters each of its own is; or else what keeps them from being the same."""
    homes = _homes(fitting, saved, optimizer)
    if problems := _other_parameters(fitting, saved, optimizer, homes):
        return [], problems
    return [[homes[id(parameter)][1] for parameter in group["params"]] for group in optimizer.param_groups], []


def _homes(fitting: Fitting, saved: list[list[str]], optimizer: Optimizer) -> dict[int, tuple[int, int]]:
    """Where each of the optimizer's parameters, by its id, was when it was saved: its group, and its place there.
    Those that were not there are not in it."""
    own = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    places = {name: (number, place) for number, group in enumerate(saved) for place, name in enumerate(group)}
    homes = {one: places[name] for one in own if (name := fitting.names[one]) in places}
    if len(homes) < len(own):
        for then, now in _ways(fitting, places):
            taken = set(homes.values())
            left = {place: then(name) for name, place in places.items() if place not in taken}
            free = {one: now(one) for one in own if one not in homes}
            if not (left and free):
                break
            homes |= one_to_one(free, left)
    return homes


def _ways(
    fitting: Fitting, saved: Iterable[str]
) -> Iterator[tuple[Callable[[str], Iterable[str]], Callable[[int], Iterable[str]]]]:
    """What else to call a saved parameter, by its name, and one that is here, by its id, to see that they are the
    same where their first names differ: by all the names of modules here, then by those in the checkpoint too, and
    without what could be a wrapper's prefix."""
    every = fitting.names.every()
    yield lambda name: [name], every.__getitem__
    tied = _tied_names(fitting.entries, saved)
    yield lambda name: map(unwrapped, tied[name]), lambda one: map(unwrapped, every[one])


def _tied_names(entries: Mapping[str, Tree], names: Iterable[str]) -> dict[str, list[str]]:
    """For each name all that the tensor stored under it is called, such as by the entries that share it."""
    leaves: dict[str, StoredTensor] = {}
    called: dict[StoredTensor, list[str]] = {}
    for entry, tree in entries.items():
        for name, leaf in _stored(tree, entry):
            leaves.setdefault(name, leaf)
            called.setdefault(leaf, []).append(name)
    return {name: called[leaves[name]] if name in leaves else [name] for name in names}


def _stored(tree: Tree, path: str) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors in a tree, named as the parameters of a module that stands there."""
    inner = items(tree)
    for key, part in enumerate(elements(tree) or ()) if inner is None else inner.items():
        if type(part) is StoredTensor:
            yield f"{path}.{key}", part
        elif type(part) in (dict, list):
            yield from _stored(part, join(path, [key if isinstance(key, str | int) else [key]]))


def _other_parameters(
    fitting: Fitting, saved: list[list[str]], optimizer: Optimizer, homes: Mapping[int, tuple[int, int]]
) -> list[str]:
    """What keeps the optimizer's parameters from being those that were saved."""
    problems = []
    groups = [list(map(id, group["params"])) for group in optimizer.param_groups]
    if len(saved) != len(groups):
        problems.append(f"has {len(saved)} parameter groups in the checkpoint and {len(groups)} in the object")
    there = set(homes.values())
    gone = [
        name for number, group in enumerate(saved) for place, name in enumerate(group) if (number, place) not in there
    ]
    if gone:
        problems.append(f"has state in the checkpoint for parameters that it does not have here: {_few(gone)}")
    if new := [fitting.names[one] for group in groups for one in group if one not in homes]:
        problems.append(f"has parameters here that it did not have in the checkpoint: {_few(new)}")
    moved = [
        f"{fitting.names[one]} (group {homes[one][0]} then, {number} now)"
        for number, group in enumerate(groups)
        for one in group
        if one in homes and homes[one][0] != number
    ]
    if moved:
        problems.append(f"has parameters in other groups than in the checkpoint: {_few(moved)}")
    return problems


def _few(names: Sequence[str | None]) -> str:
    return ", ".join(map(str, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _pairs(
    optimizer: Optimizer,
    states: Mapping[Any, Tree],
    groups: list[tuple[list[Any], Mapping[Any, Tree]]],
    orders: list[list[int]],
) -> list[Pair]:
    """Each parameter with the state stored for it."""
    return [
        (parameter, number, items(states.get(ids[index])) or {})
        for number, ((ids, _), order, own) in enumerate(zip(groups, orders, optimizer.param_groups, strict=True))
        for index, parameter in zip(order, own["params"], strict=True)
    ]


def _misshapen(fitting: Fitting, optimizer: Optimizer, pairs: list[Pair]) -> list[str]:
    """State whose shape is not that of the parameter it would go to."""
    problems = []
    is_torchs = _steps_as_torch(optimizer)
    for parameter, number, stored in pairs:
        if torch.nn.parameter.is_lazy(parameter):
            continue
        shape = parameter.shape
        for key, leaf in stored.items():
            if key not in _SHAPED or not isinstance(leaf, StoredTensor) or leaf.shape == shape:
                continue
            own = None if is_torchs else optimizer.state.get(parameter)
            before = own.get(key) if isinstance(own, dict) else None
            if is_torchs or (isinstance(before, torch.Tensor) and before.shape != leaf.shape):
                name = fitting.names.get(id(parameter)) or _position(optimizer, number, parameter)
                problems.append(f"has {key} of shape {leaf.shape} in the checkpoint for {name} of shape {tuple(shape)}")
    return problems


def _steps_as_torch(optimizer: Optimizer) -> bool:
    """Whether the optimizer's steps are those of one of torch. Any other may keep its state in shapes of its own."""
    module = getattr(type(optimizer).step, "__module__", "")
    return module.startswith("torch.optim.") and module != Optimizer.__module__


def _position(optimizer: Optimizer, number: int, parameter: torch.Tensor) -> str:
    position = next(i for i, one in enumerate(optimizer.param_groups[number]["params"]) if one is parameter)
    return f"parameter {position} of group {number}"
