"""What is in a stored tree, seen without decoding it?"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from .codec import FOREIGN_TAGS, decode, join
from .plain_tags import is_plain
from .snapshot import StoredTensor, Tree


def items(tree: Tree) -> dict[Hashable, Tree] | None:
    """The keys of a dict's tree with the trees of their values, or None for what is no dict.

    Raises `DamagedError` for keys that do not decode.
    """
    if not isinstance(tree, dict):
        return None
    for key in tree:
        if key[:1] == "$":
            return _tagged_items(tree)
    return dict(tree)


def _tagged_items(tree: dict[str, Tree]) -> dict[Hashable, Tree] | None:
    if tree.keys() == {"$ordered"}:
        return items(tree["$ordered"])
    if tree.keys() == {"$defaultdict", "factory"}:
        return items(tree["$defaultdict"])
    if tree.keys() == {"$dict"}:
        if {type(pair[0]) if type(pair) is list and len(pair) == 2 else None for pair in tree["$dict"]} == {int}:
            plain = dict(tree["$dict"])
            if len(plain) == len(tree["$dict"]):
                return plain
        keys = decode({"$dict": [[key, i] for i, (key, _) in enumerate(tree["$dict"])]})
        return {key: tree["$dict"][i][1] for key, i in keys.items()}
    return None


def elements(tree: Tree) -> list[Tree] | None:
    """The trees of a list's or a tuple's items, or None for what is neither."""
    if isinstance(tree, dict) and tree.keys() == {"$tuple"}:
        tree = tree["$tuple"]
    return tree if isinstance(tree, list) else None


@dataclass
class Needs:
    """What decoding some trees takes: tensors, each once; what was pickled; what was never saved. `foreign`
    are the trees, with their names, that need what this process may not have."""

    tensors: dict[StoredTensor, None] = field(default_factory=dict)
    objects: list[str] = field(default_factory=list)
    unsaved: list[str] = field(default_factory=list)
    foreign: list[tuple[Tree, str]] = field(default_factory=list)
    _has_foreign: bool = False

    def add(self, tree: Tree, path: str) -> None:
        """Count in a tree; `path` is its name."""
        self._has_foreign = False
        if isinstance(tree, StoredTensor):
            self.tensors[tree] = None
        elif isinstance(tree, list | dict) and not self._add_plain(tree):
            self._add_odd(tree, path)
        if self._has_foreign:
            self.foreign.append((tree, path))

    def _add_plain(self, tree: list[Tree] | dict[str, Tree]) -> bool:
        """Count in tensors, or say that there is something besides that needs to be named."""
        if isinstance(tree, dict):
            if "$object" in tree or "$unsaved" in tree:
                return False
            self._has_foreign = self._has_foreign or next(iter(tree), "") in FOREIGN_TAGS
        for item in tree.values() if isinstance(tree, dict) else tree:
            kind = type(item)
            if kind is StoredTensor:
                self.tensors[item] = None
            elif (kind is dict or kind is list) and not self._add_plain(item):
                return False
        return True

    def _add_odd(self, tree: Tree, path: str) -> None:
        if isinstance(tree, StoredTensor):
            self.tensors[tree] = None
        elif isinstance(tree, list):
            for i, item in enumerate(tree):
                self._add_odd(item, join(path, [i]))
        elif isinstance(tree, dict):
            if "$object" in tree:
                self.objects.append(str(tree["$object"]))
            elif "$unsaved" in tree:
                self.unsaved.append(path)
            self._has_foreign = self._has_foreign or next(iter(tree), "") in FOREIGN_TAGS
            for key, item in tree.items():
                if not is_plain(item):
                    self._add_odd(item, path if key[:1] == "$" else join(path, [key]))
