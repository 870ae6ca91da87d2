"""How does stored state get into an optimizer that it belongs to? Read into the state it has, where that can be."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch.optim import Optimizer

from .filling import Fitting, Source
from .shards import has_sharded, is_sharded
from .snapshot import StoredTensor, Tree
from .trees import elements, items

# A parameter, the number of its group, and the state stored for it.
Pair: TypeAlias = tuple[torch.Tensor, int, Mapping[Any, Tree]]


def loader(
    fitting: Fitting,
    where: str,
    optimizer: Optimizer,
    tree: Tree,
    orders: Sequence[Sequence[int]],
    pairs: list[Pair],
    count: int,
) -> Callable[[Source], None]:
    """What fills the optimizer. `orders` says which of a stored group's parameters stands where in the
    optimizer's own group; `pairs` are in that order; `count` is how many states are stored."""
    settings = (items(tree) or {})["param_groups"]
    offers, is_all = _offers(optimizer, settings, pairs, count) if _is_plain(optimizer) else ([], False)
    fitting.in_place.offer(offers)
    if has_sharded(parameter for parameter, _, _ in pairs):
        fitting.in_place.make(_patterns(optimizer, pairs))
    fitting.in_place.keep([parameter for parameter, _, _ in pairs])
    dtypes = fitting.dtypes

    def fill(source: Source) -> None:
        targets = source.in_place.targets
        has_followers = any(dtypes.get(id(one), one.dtype) != one.dtype for one, _, _ in pairs)
        if is_all and not has_followers and all(targets.get(leaf) is target for leaf, target in offers):
            _load_settings(optimizer, source.decode(settings, f"{where}.param_groups"), orders)
            return
        live = {leaf: target for leaf, target in offers if targets.get(leaf) is target}
        state = source.decode(tree, where, live)
        _sort(state["param_groups"], orders)
        if _is_plain(optimizer):
            _number(state)
        optimizer.load_state_dict(state)
        _put_back_dtypes(optimizer, state, dtypes)

    return fill


def _is_plain(optimizer: Optimizer) -> bool:
    """Whether `load_state_dict` is torch's own and nobody hooked into it: then a tensor that needs no
    cast is taken as it is, and the parameters' numbers are mere names."""
    kind, own = type(optimizer), optimizer.__dict__
    return (
        kind.load_state_dict is Optimizer.load_state_dict
        and kind._process_value_according_to_param_policy is Optimizer._process_value_according_to_param_policy
        and "load_state_dict" not in own
        and own.get("_optimizer_load_state_dict_pre_hooks") == {}
        and own.get("_optimizer_load_state_dict_post_hooks") == {}
    )


def _offers(
    optimizer: Optimizer, settings: Tree, pairs: list[Pair], count: int
) -> tuple[list[tuple[StoredTensor, torch.Tensor]], bool]:
    """Stored tensors with those of the optimizer's own state that are just like what loading would make
    of them; and whether there is nothing else, here, there or for loading to do."""
    offers: list[tuple[StoredTensor, torch.Tensor]] = []
    # Where `load_state_dict` puts the steps of a group: with its parameters, or leaves them on the host.
    groups = [items(group) or {} for group in elements(settings) or []]
    with_parameters = [bool(group.get("capturable") or group.get("fused")) for group in groups]
    states = optimizer.state
    is_all = type(optimizer).__setstate__.__module__.startswith("torch.optim.")
    found = 0
    for parameter, group, stored in pairs:
        own = states.get(parameter)
        if type(own) is not dict:
            is_all = is_all and own is None and not stored
            continue
        found += 1
        is_all = is_all and len(own) == len(stored)
        home = parameter.device
        is_host = home.type == "cpu"
        for key, leaf in stored.items():
            target = own.get(key)
            stays = is_host or (key == "step" and not with_parameters[group])
            if (
                isinstance(target, torch.Tensor)
                and (type(target) is torch.Tensor or is_sharded(target))
                and type(leaf) is StoredTensor
                and target.shape == leaf.shape
                and (target.is_cpu if stays else target.device == home)
                and not (target.requires_grad or leaf.requires_grad or leaf.is_parameter)
            ):
                offers.append((leaf, target))
            else:
                is_all = False
    return offers, is_all and found == len(states) == count


def _patterns(optimizer: Optimizer, pairs: list[Pair]) -> Iterator[tuple[StoredTensor, torch.Tensor]]:
    """Stored tensors with what they are to be sharded like: the optimizer's own state, or else the parameter."""
    for parameter, _, stored in pairs:
        own = optimizer.state.get(parameter)
        for key, leaf in stored.items():
            if type(leaf) is StoredTensor:
                before = own.get(key) if isinstance(own, dict) else None
                yield leaf, before if isinstance(before, torch.Tensor) and is_sharded(before) else parameter


def _load_settings(optimizer: Optimizer, groups: list[dict[str, Any]], orders: Sequence[Sequence[int]]) -> None:
    """Load everything but the state, which has been read into its place."""
    _sort(groups, orders)
    for group in groups:  # their numbers, of which `load_state_dict` would copy each
        group["params"] = range(len(group["params"]))
    state = optimizer.state
    optimizer.load_state_dict({"state": {}, "param_groups": groups})
    optimizer.state = state


def _sort(groups: list[dict[str, Any]], orders: Sequence[Sequence[int]]) -> None:
    """Bring stored groups into the order of the optimizer's parameters."""
    for group, order in zip(groups, orders, strict=True):
        for key in ("params", "param_names"):
            if key in group:
                group[key] = [group[key][i] for i in order]


def _number(state: dict[str, Any]) -> None:
    """Number the parameters from zero on: a range says at once whether it has a number, for which
    `load_state_dict` would search a list once per tensor."""
    ids = [index for group in state["param_groups"] for index in group["params"]]
    numbers = {index: number for number, index in enumerate(ids)}
    if len(numbers) < len(ids) or any(isinstance(key, int) and key not in numbers for key in state["state"]):
        return
    state["state"] = {numbers.get(key, key): value for key, value in state["state"].items()}
    begin = 0
    for group in state["param_groups"]:
        end = begin + len(group["params"])
        group["params"] = range(begin, end)
        begin = end


def _put_back_dtypes(optimizer: Optimizer, saved: Mapping[str, Any], dtypes: Mapping[int, torch.dtype]) -> None:
    """Undo that `load_state_dict` casts state to the parameter's dtype, bit for bit.

    Where the parameter itself changed its dtype since, and the state had the parameter's, the cast is
    what was meant."""
    for group, own in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        for index, parameter in zip(group["params"], own["params"], strict=True):
            state = optimizer.state.get(parameter)
            given = saved["state"].get(index)
            if not isinstance(state, dict) or not isinstance(given, dict):
                continue
            for key, value in state.items():
                if key in given and key != "step" and value is not given[key]:
                    then = dtypes.get(id(parameter))
                    state[key] = _restored(value, given[key], None if then == parameter.dtype else then)


def _restored(loaded: Any, given: Any, follows: torch.dtype | None) -> Any:
    if isinstance(loaded, torch.Tensor) and isinstance(given, torch.Tensor):
        is_known = type(loaded) is torch.Tensor or is_sharded(loaded)
        if not is_known or loaded.dtype == given.dtype or given.dtype == follows:
            return loaded
        return given.to(loaded.device)
    if isinstance(loaded, dict) and isinstance(given, dict):
        return {key: _restored(item, given[key], follows) if key in given else item for key, item in loaded.items()}
    if type(loaded) in (list, tuple) and type(given) is type(loaded) and len(given) == len(loaded):
        return type(loaded)(_restored(a, b, follows) for a, b in zip(loaded, given, strict=True))
    return loaded
