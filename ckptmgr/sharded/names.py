"""What is each tensor of a state called, on every rank alike?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..state.codec import to_torch_safe
from ..state.snapshot import FlatSnapshot, Tree, map_leaves

Path = tuple[str, ...]
# Where optimizers stand in an entry, and the names of their parameters by their numbers in its state dict.
_Parameters = dict[Path, list[str | None]]


def tensor_paths(flat: FlatSnapshot) -> list[Path]:
    """Where each tensor, by number, stands first: the entry, then keys and positions. An optimizer's state is
    under the names of its parameters, whose numbers say nothing to another rank."""
    paths: dict[int, Path] = {}
    for entry, tree in flat.entries.items():
        optimizers = _optimizers(flat.notes.get(entry, {}))

        def look(leaf: Any, path: Path, entry: str = entry, optimizers: _Parameters = optimizers) -> None:
            if isinstance(leaf, dict):
                paths.setdefault(leaf["$tensor"], (entry, *_by_name(path, optimizers)))

        map_leaves(tree, look)
    return [paths[number] for number in range(len(flat.tensors))]


def joined(paths: Sequence[Path]) -> list[str]:
    """A name for each path, such as "model.layers.0.weight"; no two are the same."""
    names: dict[str, None] = {}
    for path in paths:
        base = name = ".".join(path)
        count = 1
        while name in names:
            count += 1
            name = f"{base}~{count}"
        names[name] = None
    return list(names)


def plain_values(flat: FlatSnapshot) -> dict[Path, Any]:
    """What is not a tensor, in the largest parts that hold none, as `torch.load(weights_only=True)` reads it."""
    found: dict[Path, Any] = {}

    def look(tree: Tree, path: Path) -> None:
        if isinstance(tree, dict) and not any(key.startswith("$") for key in tree):
            for key, item in tree.items():
                look(item, (*path, key))
        elif not _has_tensor(tree):
            found[path] = to_torch_safe(tree)

    for entry, tree in flat.entries.items():
        look(tree, (entry,))
    return found


def _has_tensor(tree: Tree) -> bool:
    if isinstance(tree, dict):
        return "$tensor" in tree or any(map(_has_tensor, tree.values()))
    return isinstance(tree, list) and any(map(_has_tensor, tree))


def _optimizers(note: Mapping[str, Any]) -> _Parameters:
    """The parameters of the optimizers in an entry."""
    notes = {"": note, **note.get("parts", {})}
    return {
        tuple(re.findall(r"[^.\[\]]+", where)): [name for group in own["params"] for name in group]
        for where, own in notes.items()
        if "params" in own
    }


def _by_name(path: Path, optimizers: _Parameters) -> Path:
    """The path with a parameter's name in the place of its number."""
    for where, names in optimizers.items():
        at = len(where)
        state, number = (*path[at : at + 2], "", "")[:2]
        if path[:at] == where and state == "state" and number.isdecimal() and int(number) < len(names):
            name = names[int(number)]
            if name is not None:
                return (*path[: at + 1], name, *path[at + 2 :])
    return path
