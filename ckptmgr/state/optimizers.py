"""Does an optimizer's stored state belong to this optimizer, parameter by parameter?

`Optimizer.load_state_dict` goes by position and checks only how many parameters a group has; here
names are compared where they are known, and put into the target's order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from .codec import decode
from .filling import Fitting, Source, another_class
from .optimizer_loading import Pair, loader
from .snapshot import StoredTensor, Tree
from .trees import elements, items

# State that has the parameter's shape in every optimizer of torch that has it.
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
        problems += _other_names(saved_names, names)
        if not problems:
            places = [{name: place for place, name in enumerate(saved)} for saved in saved_names]
            orders = [[there[str(name)] for name in own] for there, own in zip(places, names, strict=True)]
    elif sizes != own_sizes:
        problems.append(f"{where} has groups of {sizes} parameters in the checkpoint and of {own_sizes} in the object")
    if not problems:
        states = items(top["state"]) or {}
        pairs = _pairs(optimizer, states, groups, orders)
        problems = _misshapen(fitting, optimizer, pairs)
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
    lacking = sorted({key for _, group in groups for key in optimizer.defaults.keys() - group.keys() - _LATER})
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


def _other_names(saved: list[list[str]], own: list[list[str | None]]) -> list[str]:
    problems = []
    if len(saved) != len(own):
        problems.append(f"has {len(saved)} parameter groups in the checkpoint and {len(own)} in the object")
    homes = {name: i for i, group in enumerate(saved) for name in group}
    own_homes = {name: i for i, group in enumerate(own) for name in group}
    for there, here, words in (
        (homes, own_homes, "has state in the checkpoint for parameters that it does not have here"),
        (own_homes, homes, "has parameters here that it did not have in the checkpoint"),
    ):
        if names := [name for name in there if name not in here]:
            problems.append(f"{words}: {_few(names)}")
    if moved := [f"{n} (group {g} then, {own_homes[n]} now)" for n, g in homes.items() if own_homes.get(n, g) != g]:
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
    for parameter, number, stored in pairs:
        if torch.nn.parameter.is_lazy(parameter):
            continue
        shape = parameter.shape
        for key, leaf in stored.items():
            if key in _SHAPED and isinstance(leaf, StoredTensor) and leaf.shape != shape:
                name = fitting.names.get(id(parameter)) or _position(optimizer, number, parameter)
                problems.append(f"has {key} of shape {leaf.shape} in the checkpoint for {name} of shape {tuple(shape)}")
    return problems


def _position(optimizer: Optimizer, number: int, parameter: torch.Tensor) -> str:
    position = next(i for i, one in enumerate(optimizer.param_groups[number]["params"]) if one is parameter)
    return f"parameter {position} of group {number}"
