"""What is in a stored tree, seen without decoding it?"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from .codec import decode, join
from .plain_tags import is_plain
from .snapshot import StoredTensor, Tree


def items(tree: Tree) -> dict[Hashable, Tree] | None:
    """The keys of a dict's tree with the trees of their values, or None for what is no dict.

    Raises `DamagedError` for keys that do not decode.
    """
    if not isinstance(tree, dict):
        return None
    if tree.keys() == {"$ordered"}:
        return items(tree["$ordered"])
    if tree.keys() == {"$defaultdict", "factory"}:
        return items(tree["$defaultdict"])
    if tree.keys() == {"$dict"}:
        keys = decode({"$dict": [[key, i] for i, (key, _) in enumerate(tree["$dict"])]})
        return {key: tree["$dict"][i][1] for key, i in keys.items()}
    for key in tree:
        if key[:1] == "$":
            return None
    return dict(tree)


def elements(tree: Tree) -> list[Tree] | None:
    """The trees of a list's or a tuple's items, or None for what is neither."""
    if isinstance(tree, dict) and tree.keys() == {"$tuple"}:
        tree = tree["$tuple"]
    return tree if isinstance(tree, list) else None


@dataclass
class Needs:
    """What decoding some trees takes: tensors, each once; what was pickled; what was never saved."""

    tensors: dict[StoredTensor, None] = field(default_factory=dict)
    objects: list[str] = field(default_factory=list)
    unsaved: list[str] = field(default_factory=list)

    def add(self, tree: Tree, path: str) -> None:
        """Count in a tree; `path` is its name."""
        if isinstance(tree, StoredTensor):
            self.tensors[tree] = None
        elif isinstance(tree, list):
            for i, item in enumerate(tree):
                if type(item) is StoredTensor:
                    self.tensors[item] = None
                elif not is_plain(item):
                    self.add(item, f"{path}[{i}]")
        elif isinstance(tree, dict):
            if "$object" in tree:
                self.objects.append(str(tree["$object"]))
            elif "$unsaved" in tree:
                self.unsaved.append(path)
            for key, item in tree.items():
                if type(item) is StoredTensor:
                    self.tensors[item] = None
                elif not is_plain(item):
                    self.add(item, path if key[:1] == "$" else join(path, [key]))
