"""Which entries of a state differ from rank to rank? Those marked `per_rank`, and data loaders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader

from ..errors import ConfigError


class PerRank:
    """An entry that every rank saves for itself. See `per_rank`."""

    __slots__ = ("_value",)

    def __init__(self, value: Any) -> None:
        self._value = value

    @property
    def value(self) -> Any:
        return self._value

    def __repr__(self) -> str:
        return f"per_rank({self._value!r})"


def per_rank(value: Any) -> PerRank:
    """Marks an entry whose state differs from rank to rank: each rank's own is saved, and given back to the same rank.

    `{"model": model, "sampler": per_rank(sampler), "position": per_rank(17)}`. As a target of `resume` an object may
    stand there marked or not. Data loaders with `state_dict()` and the random generators need no mark. Meant
    for little: rank 0 gathers what all ranks have. Only whole entries can be marked: a mark within one
    is a `ConfigError` when it is saved or restored.
    """
    return PerRank(value)


def unmarked(objects: Mapping[str, Any]) -> dict[str, Any]:
    """The entries without their marks."""
    return {name: value.value if isinstance(value, PerRank) else value for name, value in objects.items()}


def is_per_rank(value: Any) -> bool:
    """Whether an entry differs from rank to rank: it is marked, or is a data loader that knows where it stands,
    or a dict, list or tuple of nothing but such loaders."""
    if type(value) in (dict, list, tuple):
        items = value.values() if isinstance(value, dict) else value
        return bool(value) and all(map(_is_loader, items))
    return isinstance(value, PerRank) or _is_loader(value)


def _is_loader(value: Any) -> bool:
    return isinstance(value, DataLoader) and callable(getattr(value, "state_dict", None))


def sampler_epoch(loader: DataLoader[Any]) -> int | None:
    """The epoch whose order a loader's sampler gives (`set_epoch`), which its state does not say; None where there
    is no such number."""
    epoch = getattr(loader.sampler, "epoch", None)
    return epoch if isinstance(epoch, int) and callable(getattr(loader.sampler, "set_epoch", None)) else None


def refuse_marks_within(name: str, value: Any) -> None:
    """Raises `ConfigError` for a mark within the plain containers of an entry."""
    inside, seen = [value], set[int]()
    while inside:
        one = inside.pop()
        if isinstance(one, PerRank):
            raise mark_within(name)
        if type(one) in (dict, list, tuple) and id(one) not in seen:
            seen.add(id(one))
            inside += one.values() if isinstance(one, dict) else one


def mark_within(path: str) -> ConfigError:
    return ConfigError(f"{path}: per_rank marks a whole entry and can't stand within one; give it an entry of its own")
