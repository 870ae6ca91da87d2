"""What does a captured state look like? Plain trees whose only live leaves are tensors.

A *tree* is what JSON can hold (None, bool, int, finite float, str, list, dict with string keys)
plus `torch.Tensor` leaves. Everything else is a *tagged* dict with one or more keys that begin with "$"
(see `codec`): `{"$tuple": [...]}`, `{"$dict": [[key, value], ...]}`. The same tree is written by
every format; a stored tree is equal to it but for `StoredTensor` leaves in the tensors' places.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch

Tree: TypeAlias = Any


@dataclass(frozen=True, slots=True, eq=False)
class RankPart:
    """What one rank saves for itself: its random generators, and its own entries with notes and objects as
    in `Snapshot`. All of it is JSON, to be gathered on the rank that writes: tensors are inline (see
    `codec.to_json`), and `{"$tensor": i}` in the entries stands for `tensors[i]`.
    """

    rng: Tree = None
    entries: dict[str, Tree] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: tuple[Tree, ...] = ()
    objects: bytes | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A state captured on this rank, one tree per entry.

    `notes` holds what an entry's tree cannot say about itself, by entry name: for an optimizer
    `{"params": [[name, ...], ...]}`, the parameter names of each of its groups.
    `objects` is a `torch.save` file of what neither JSON nor a tensor file can hold (leaves
    `{"$object": path}`), keyed by path, or None. `ranks` are the parts of their own that ranks have.
    """

    entries: dict[str, Tree]
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    objects: bytes | None = None
    ranks: Mapping[int, RankPart] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class FlatSnapshot:
    """A snapshot with its tensors apart: its trees are JSON, `{"$tensor": i}` stands for `tensors[i]`.

    Tied tensors are one. `shape` is the very same object (`is`) in two snapshots of which nothing
    but values differs, as far as tensors go: as many, at the same paths, and each of the same dtype, shape, strides,
    device and flags. A part of a tree that did not change is the very same object too. So what was
    planned for one snapshot serves the next. `still` are the tensors that are not expected to change from save to
    save: parameters that take no gradient. `pointers` are the tensors' addresses, where they are
    known already. `ranks` are the parts of ranks, by rank: after a capture this rank's own.
    """

    entries: dict[str, Tree]
    tensors: Sequence[torch.Tensor]
    notes: dict[str, dict[str, Any]]
    objects: bytes | None
    ranks: Mapping[int, RankPart]
    shape: object
    still: frozenset[int] = frozenset()
    pointers: Sequence[int] | None = None

    @property
    def has_sharded(self) -> bool:
        """Whether a tensor is sharded over ranks: then only format `dcp` writes it."""
        from .shards import has_sharded

        return has_sharded(self.tensors)


def flatten(snapshot: Snapshot, still: Collection[torch.Tensor] = ()) -> FlatSnapshot:
    """The snapshot with its tensors apart, numbered in the order of its trees; the same object has one number."""
    tensors: list[torch.Tensor] = []
    numbers: dict[int, int] = {}

    def numbered(leaf: Any, path: tuple[str, ...]) -> Any:
        if isinstance(leaf, str | int | float | bool | dict | None):
            return leaf
        number = numbers.setdefault(id(leaf), len(tensors))
        if number == len(tensors):
            tensors.append(leaf)
        return {"$tensor": number}

    entries = {name: map_leaves(tree, numbered) for name, tree in snapshot.entries.items()}
    quiet = frozenset(number for tensor in still if (number := numbers.get(id(tensor))) is not None)
    return FlatSnapshot(entries, tensors, snapshot.notes, snapshot.objects, snapshot.ranks, object(), quiet)


def map_leaves(tree: Tree, change: Callable[[Any, tuple[str, ...]], Any], path: tuple[str, ...] = ()) -> Tree:
    """The tree with `change(leaf, path)` in the place of every leaf.

    A leaf is what is neither dict nor list, or the `{"$tensor": ...}` that stands for a tensor in a
    file. A path names dict keys and list positions; the marks of tagged dicts ("$...") do not show
    in it, and the pairs of a `$dict` show as their keys.
    """
    if isinstance(tree, dict) and tree.keys() != {"$tensor"}:
        if isinstance(pairs := tree.get("$dict"), list) and all(isinstance(p, list) and len(p) == 2 for p in pairs):
            walked = [
                [map_leaves(key, change, (*path, "key")), map_leaves(value, change, (*path, _label(key)))]
                for key, value in pairs
            ]
            return {key: walked if key == "$dict" else map_leaves(value, change, path) for key, value in tree.items()}
        return {
            key: map_leaves(value, change, path if key.startswith("$") else (*path, key)) for key, value in tree.items()
        }
    if isinstance(tree, list):
        return [map_leaves(item, change, (*path, str(i))) for i, item in enumerate(tree)]
    return change(tree, path)


def names_of(flat: FlatSnapshot, numbers: Collection[int]) -> list[str]:
    """The names of the tensors with these numbers, all of each."""
    found: list[str] = []

    def look(leaf: Any, path: tuple[str, ...]) -> None:
        if isinstance(leaf, dict) and leaf["$tensor"] in numbers:
            found.append(".".join(path))

    for entry, tree in flat.entries.items() if numbers else ():
        map_leaves(tree, look, (entry,))
    return found


def _label(key: Tree) -> str:
    """How a `$dict` key that may itself be a tree shows in a path."""
    if isinstance(key, list | dict):
        parts: list[str] = []
        map_leaves(key, lambda leaf, _: parts.append(str(leaf)))
        return "_".join(parts)
    return str(key)


@dataclass(slots=True, eq=False)  # not frozen, which would take twice the time for each of 100,000
class StoredTensor:
    """A tensor in a checkpoint whose bytes have not been read. Compared by identity: tied weights
    are one `StoredTensor` in several places of the tree. Never changed.

    `location` belongs to the format that made it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    location: Any
    stride: tuple[int, ...] | None = None  # where not contiguous but dense, else None
    requires_grad: bool = False
    is_parameter: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class StoredPart:
    """What a rank saved for itself, read: `tensors` are the stored ones in the entries' trees with their values.
    `objects` is as in `StoredState`."""

    rng: Tree
    entries: Mapping[str, Tree]
    notes: Mapping[str, dict[str, Any]]
    tensors: Mapping[StoredTensor, torch.Tensor]
    objects: Callable[[], dict[str, Any]]


class StoredState(Protocol):
    """A checkpoint opened by its format: everything known but the tensors' bytes."""

    @property
    def entries(self) -> Mapping[str, Tree]:
        """One stored tree per entry."""

    @property
    def notes(self) -> Mapping[str, dict[str, Any]]: ...

    def part(self, rank: int) -> StoredPart | None:
        """What a rank saved for itself, read now, or None when it saved nothing. Raises `DamagedError`."""

    def fetch(
        self,
        wanted: Mapping[StoredTensor, torch.Tensor | None],
        device: str | torch.device = "cpu",
        addresses: Mapping[StoredTensor, int] = {},
    ) -> dict[StoredTensor, torch.Tensor]:
        """Read the wanted tensors, each into the memory of the tensor given for it (same shape and
        dtype, any device and strides), or into a fresh one on `device` where None is given. `addresses` are of
        those whose memory is known to take their bytes as they are. Raises `DamagedError`."""

    def objects(self) -> Mapping[str, Any]:
        """What was pickled, by path. Runs code from the checkpoint: call only when trusted."""
