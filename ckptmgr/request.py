"""What did the caller ask for, and is that something that can be?"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .errors import ConfigError

State = Mapping[str, Any] | Callable[[], Mapping[str, Any]]

_RESERVED = {"step", "strict", "skip", "map_location", "rng"}


@dataclass(frozen=True, slots=True)
class Request:
    """What the caller said of one save. In a `hurry` there is no time for a copy: training waits. One that `may_skip`
    is left out under `on_full: skip` when there is no room."""

    step: int
    epoch: int | None
    metrics: Mapping[str, float]
    reason: str = ""
    tags: tuple[str, ...] = ()
    pin: bool = False
    overwrite: bool = False
    hurry: bool = False
    may_skip: bool = False


def as_floats(metrics: Mapping[str, Any] | None) -> Mapping[str, float]:
    """Metrics as plain numbers (0-d tensors and numpy scalars too). Raises `ConfigError` naming one that isn't."""
    values = {}
    for name, value in (metrics or {}).items():
        try:
            values[str(name)] = float(value.detach() if isinstance(value, torch.Tensor) else value)
        except (TypeError, ValueError, OverflowError, RuntimeError) as exc:
            raise ConfigError(f"metric {name!r} is {value!r:.100}, not a number: {exc}") from exc
    return values


def as_mapping(state: State) -> Mapping[str, Any]:
    """The state itself, from the callable if it is one. Raises `ConfigError` for anything else."""
    is_factory = callable(state) and not hasattr(state, "state_dict")
    objects = state() if is_factory and not isinstance(state, Mapping) else state
    if not isinstance(objects, Mapping) or not objects:
        raise ConfigError(
            f"state must be a mapping of entry names to objects, such as {{'model': model}}, or a callable that "
            f"returns one; got {type(objects).__name__}"
        )
    if taken := [name for name in objects if name in _RESERVED]:
        raise ConfigError(f"an entry can't be named {', '.join(taken)}: resume() takes that as an argument; rename it")
    return objects


def refuse_text(names: object, argument: str) -> None:
    """Raises `ConfigError` for a text in the place of a list of texts: its letters would be taken for names."""
    if isinstance(names, str):
        raise ConfigError(f"{argument}={names!r} is one text; give a list: [{names!r}]")


def as_count(value: Any, name: str) -> int:
    """A step or an epoch. Raises `ConfigError` for what does not count completed ones: 1.5, -1, True."""
    try:
        count = operator.index(value)
    except TypeError:
        count = -1
    if isinstance(value, bool) or count < 0:
        raise ConfigError(f"{name}={value!r}: {name} counts completed {name}s, a whole number of at least 0")
    return count


def expected_bytes(objects: Mapping[str, Any]) -> int:
    """About how many bytes the tensors of modules and optimizers will have once training has begun."""
    total = 0
    for value in objects.values():
        if isinstance(value, torch.nn.Module):
            total += sum(tensor.nbytes for tensor in (*value.parameters(), *value.buffers()) if not _is_lazy(tensor))
        elif isinstance(value, torch.optim.Optimizer):
            for group in value.param_groups:
                # Adam and its kin keep two or three numbers per parameter, momentum one.
                count = 2 + bool(group.get("amsgrad")) if "betas" in group else int(bool(group.get("momentum")))
                total += count * sum(p.nbytes for p in group["params"] if p.requires_grad and not _is_lazy(p))
    return total + total // 128 + (1 << 20) if total else 0  # with headers, step counts and page ends


def _is_lazy(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or torch.nn.parameter.is_lazy(tensor)
