"""Does a stored tree fit a target, and how is the target filled from it?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from ..errors import ConfigError
from .codec import join
from .filling import FIRST, LOADER, OPTIMIZER, OTHER, SCHEDULER, Filling, Fitting, Source, another_class, is_left_out
from .models import fit_module, is_pickled, misfit
from .optimizers import fit_optimizer
from .plain_tags import is_unsaved
from .ranks import sampler_epoch
from .snapshot import Tree
from .trees import elements, items


def is_target(value: Any) -> bool:
    """Whether a value can be filled in place."""
    if type(value) is tuple:
        return bool(value) and all(map(is_target, value))
    return isinstance(value, torch.Tensor | dict | list) or has_load(value)


def refuse_unfillable(where: str, target: Any) -> None:
    """Raises `ConfigError` for a target that can't be filled in place, or that holds what can't."""
    if not is_target(target):
        raise ConfigError(
            f"{where} is a {type(target).__qualname__}, which can't be filled in place; leave it out and take it "
            "from the values that come back"
        )
    if has_load(target) or not isinstance(target, dict | list | tuple):
        return
    for key, part in target.items() if isinstance(target, dict) else enumerate(target):
        if holds_objects(part):
            path = join(where, [_step(key)])
            _refuse_mixed(path, part)
            refuse_unfillable(path, part)


def _refuse_mixed(where: str, part: Any) -> None:
    if not is_target(part):
        raise ConfigError(f"{where} is a tuple of objects and plain values, which can't be replaced there; use a list")


def holds_objects(value: Any) -> bool:
    """Whether a value is or contains something that is filled, not replaced."""
    if type(value) in (list, tuple) or isinstance(value, dict):
        return any(map(holds_objects, value.values() if isinstance(value, dict) else value)) or has_load(value)
    return isinstance(value, torch.Tensor) or has_load(value)


def has_load(value: Any) -> bool:
    return not isinstance(value, type) and callable(getattr(value, "load_state_dict", None))


def fit(fitting: Fitting, where: str, target: Any, tree: Tree, note: Mapping[str, Any], within: str = "") -> None:
    """Compare a target with its tree: differences are noted, and what fits is planned.

    `note` is on the whole entry; `within` says where in the entry the target stands.
    """
    own = note if not within else note.get("parts", {}).get(within, {})
    if is_unsaved(tree):
        fitting.differences.unsaved.append(where)
    elif isinstance(target, nn.Module):
        fit_module(fitting, where, target, tree, own)
    elif isinstance(target, torch.Tensor):
        _fit_tensor(fitting, where, target, tree)
    elif has_load(target):
        _fit_object(fitting, where, target, tree, own)
    elif isinstance(target, dict):
        _fit_dict(fitting, where, target, tree, note, within)
    else:
        _fit_sequence(fitting, where, target, tree, note, within)


def _fit_tensor(fitting: Fitting, where: str, target: torch.Tensor, tree: Tree) -> None:
    if problem := misfit(target, tree):
        fitting.differences.add("mismatched", where, [f"{where} {problem}"])
        return
    if is_pickled(tree):
        fitting.compare_later(target, tree, where, where)
    elif not nn.parameter.is_lazy(target):
        if target.dtype != tree.dtype:
            fitting.differences.casts.append(f"{where}: {tree.dtype} -> {target.dtype}")
        fitting.in_place.offer([(tree, target)])
    left_out = fitting.left_out

    def fill(source: Source) -> None:
        if not is_pickled(tree):
            source.copy([(tree, target)])
        elif not is_left_out(tree, left_out):
            target.copy_(source.decode(tree, where))

    fitting.fillings.append(Filling(FIRST, where, [(tree, where)], fill))


def _fit_object(fitting: Fitting, where: str, target: Any, tree: Tree, note: Mapping[str, Any]) -> None:
    if isinstance(target, Optimizer):
        filler = fit_optimizer(fitting, where, target, tree, note)
        if filler is not None:
            fitting.fillings.append(Filling(OPTIMIZER, where, [(tree, where)], filler))
        return
    problem = None
    if isinstance(target, LRScheduler):
        problem = another_class(target, note)
    elif isinstance(target, torch.amp.GradScaler) and target.is_enabled() != bool(items(tree)):
        now, then = ("enabled", "disabled") if target.is_enabled() else ("disabled", "enabled")
        problem = f"was {then} when it was saved and is {now} here; build GradScaler(enabled=...) as it was, or skip it"
    if problem:
        fitting.differences.add("mismatched", where, [f"{where} {problem}"])
        return
    order = SCHEDULER if isinstance(target, LRScheduler) else LOADER if isinstance(target, DataLoader) else OTHER

    def fill(source: Source) -> None:
        if (
            order == LOADER
            and isinstance(epoch := note.get("sampler_epoch"), int)
            and sampler_epoch(target) is not None
        ):
            target.sampler.set_epoch(epoch)  # before it begins to iterate, below
        target.load_state_dict(source.decode(tree, where))
        if order == LOADER:
            # A loader draws from the global generator when it begins to iterate; asked for its state
            # it begins now, before the generators are put back, and not at the loop's first batch.
            target.state_dict()

    fitting.fillings.append(Filling(order, where, [(tree, where)], fill))


def _step(key: Any) -> Any:
    return key if isinstance(key, str | int) else [key]


def _is_filled(target: Any, tree: Tree, where: str) -> bool:
    """Whether a part of a container is filled in place; otherwise it is replaced."""
    if holds_objects(target):
        _refuse_mixed(where, target)
        return True
    return (isinstance(target, dict) and items(tree) is not None) or (
        isinstance(target, list) and elements(tree) is not None
    )


def _fit_dict(
    fitting: Fitting, where: str, target: dict[Any, Any], tree: Tree, note: Mapping[str, Any], within: str
) -> None:
    stored = items(tree)
    if stored is None:
        fitting.differences.add("mismatched", where, [f"{where} is no dict in the checkpoint"])
        return
    lacking = [key for key in target if key not in stored]
    has_objects = holds_objects(target)
    if has_objects:
        fitting.differences.add("missing", where, [join("", [_step(key)]) for key in lacking])
    plain: list[tuple[Any, Tree, str]] = []
    for key, part in stored.items():
        path = join(where, [_step(key)])
        if key in target and _is_filled(target[key], part, path):
            fit(fitting, path, target[key], part, note, join(within, [_step(key)]))
        elif is_unsaved(part):
            fitting.differences.unsaved.append(path)
        else:
            plain.append((key, part, path))

    def fill(source: Source) -> None:
        for key in () if has_objects else lacking:  # plain data: the dict becomes what it was
            del target[key]
        for key, part, path in plain:
            target[key] = source.place(part, path)

    fitting.fillings.append(Filling(FIRST, where, [(part, path) for _, part, path in plain], fill))


def _fit_sequence(fitting: Fitting, where: str, target: Any, tree: Tree, note: Mapping[str, Any], within: str) -> None:
    stored = elements(tree)
    if stored is None:
        fitting.differences.add("mismatched", where, [f"{where} is no list in the checkpoint"])
        return
    paths = [join(where, [i]) for i in range(len(stored))]
    if not holds_objects(target):  # plain data: the list becomes what it was

        def refill(source: Source) -> None:
            target[:] = [source.place(part, path) for part, path in zip(stored, paths, strict=True)]

        fitting.fillings.append(Filling(FIRST, where, list(zip(stored, paths, strict=True)), refill))
        return
    if len(stored) != len(target):
        problem = f"{where} has {len(stored)} items in the checkpoint and {len(target)} in the object"
        fitting.differences.add("mismatched", where, [problem])
        return
    plain: list[tuple[int, Tree, str]] = []
    for i, part in enumerate(stored):
        if _is_filled(target[i], part, paths[i]):
            fit(fitting, paths[i], target[i], part, note, join(within, [i]))
        else:
            plain.append((i, part, paths[i]))

    def fill(source: Source) -> None:
        for i, part, path in plain:
            target[i] = source.place(part, path)

    fitting.fillings.append(Filling(FIRST, where, [(part, path) for _, part, path in plain], fill))
