"""What of a state has no plain form? It is pickled, and its owner is told."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .ranks import PerRank, mark_within
from .snapshot import Tree


class PickleWarning(UserWarning):
    """A value has no plain form, or none at all: it is pickled, or not saved. Names the value."""


class Pickled:
    """Collects what has no plain form, and pickles it."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._nodes: dict[str, dict[str, str]] = {}

    def add(self, value: Any, path: str) -> Tree:
        if isinstance(value, PerRank):
            raise mark_within(path)
        key, count = path, 1
        while key in self._values:
            count += 1
            key = f"{path}#{count}"
        self._values[key] = value
        node = self._nodes[key] = {"$object": key}
        return node

    def dump(self) -> bytes | None:
        """The `torch.save` file of all that pickles, or None. The nodes of the rest become `$unsaved`."""
        for key, value in list(self._values.items()):
            try:
                _pickle(value)
            except Exception as exc:  # noqa: BLE001 - pickling runs the value's own code, which may raise anything
                del self._values[key]
                node = self._nodes[key]
                node.clear()
                node["$unsaved"] = class_name(value)
                warnings.warn(
                    f"{key} is a {class_name(value)}, which can't be pickled ({exc}): it is NOT saved",
                    PickleWarning,
                    stacklevel=3,
                )
            else:
                warnings.warn(
                    f"{key} is a {class_name(value)}, which has no plain form: it is pickled, and loading it needs "
                    "trust_pickle=True; plain data or an object with state_dict() would not",
                    PickleWarning,
                    stacklevel=3,
                )
        return _pickle(self._values) if self._values else None


def warn_of_bare(states: Mapping[str, Any]) -> None:
    """Name the tensors on the meta device, by path: there is nothing of them to save."""
    paths = [path for name, state in states.items() for path in _bare(name, state)]
    if paths:  # else of a module whose state leaves them out
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        warnings.warn(
            f"{', '.join(paths[:3])}{more}: on the meta device, where tensors have no values: they are NOT saved; give "
            "them memory first (to_empty, then load), or bring offloaded ones back",
            PickleWarning,
            stacklevel=3,
        )


def _bare(path: str, state: Any) -> Iterator[str]:
    if isinstance(state, torch.Tensor):
        if state.is_meta:
            yield path
    elif isinstance(state, Mapping | list | tuple):
        for step, item in state.items() if isinstance(state, Mapping) else enumerate(state):
            yield from _bare(f"{path}.{step}", item)


def _pickle(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def class_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
