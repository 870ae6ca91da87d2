"""How does a snapshot become files that `torch.load` reads? Format `torch`: one file per entry.

`torch.load("optimizer.pt", weights_only=True)` gives the entry's state dict; ckptmgr is not needed.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import DamagedError, StoreError
from ..memory import available
from ..staging import Held, Region, is_dense, is_special, refuse_hidden
from ..state.codec import from_torch_safe, to_torch_safe
from ..state.snapshot import FlatSnapshot, Snapshot, StoredPart, StoredState, StoredTensor, Tree, map_leaves
from . import FileSink, FileSource, refuse_sharded, write_live
from .json_texts import JsonTexts
from .rank_files import rank_bodies, read_part
from .state_file import STATE_NAME, file_stems, load_torch, read_json, read_objects, save_torch, state_bodies
from .targets import put, refuse_misfit, refuse_unsound

_ALIGNMENT = 64  # bytes, as torch aligns


class TorchFormat:
    """One `<entry>.pt` per entry, and `state.json` for what such a file can't say.

    Tensors tied within an entry are tied by torch; those tied across entries stand in each entry's
    file and in the `ties` of `state.json`. A view of a larger storage is saved without the rest of it.
    """

    name = "torch"

    def __init__(self) -> None:
        self._last: _TorchPlan | None = None

    def plan(self, flat: FlatSnapshot) -> _TorchPlan:
        """See `Format.plan`. Raises `StateMismatchError` for a meta tensor, and `ConfigError` for a sharded one."""
        if self._last is None or self._last.shape is not flat.shape:
            refuse_sharded(flat, self.name)
            self._last = _TorchPlan(flat)
        return self._last

    def write(self, snapshot: Snapshot, sink: FileSink) -> None:
        write_live(self, snapshot, sink)

    def open(self, source: FileSource) -> StoredState:
        """Load every entry into host memory. Raises `DamagedError` and `FormatVersionError`."""
        return _TorchState(source)


class _TorchPlan:
    """All dense tensors in one region, each as `torch.save` will find it."""

    def __init__(self, flat: FlatSnapshot) -> None:
        self.shape, self._count = flat.shape, len(flat.tensors)
        for entry, tree in flat.entries.items():
            _refuse_hidden(flat, entry, tree)
        numbers = [number for number, tensor in enumerate(flat.tensors) if not is_special(tensor)]
        ends = list(
            itertools.accumulate(-(-flat.tensors[number].nbytes // _ALIGNMENT) * _ALIGNMENT for number in numbers)
        )
        self.regions = {"": Region(ends[-1] if ends else 0, numbers, [0, *ends][: len(numbers)], keeps_strides=True)}
        self._texts = JsonTexts()

    def write(self, flat: FlatSnapshot, held: Held, sink: FileSink) -> None:
        """See `Plan.write`."""
        held.wait()
        tensors = [held.tensor(number) for number in range(self._count)]
        stems = file_stems(flat.entries)
        files, ties = {}, _Ties()
        for entry, tree in flat.entries.items():
            files[entry] = f"{stems[entry]}.pt"
            plain = to_torch_safe(ties.take(entry, tree, tensors))
            with sink.create(files[entry]) as file:
                save_torch(plain, file)
        body = {"files": files, "ties": ties.rows}
        sink.write({**state_bodies(self._texts, TorchFormat.name, flat, body), **rank_bodies(flat.ranks)})


def _refuse_hidden(flat: FlatSnapshot, entry: str, tree: Tree) -> None:
    def look(leaf: Any, path: tuple[str, ...]) -> Any:
        if isinstance(leaf, dict):
            refuse_hidden(flat.tensors[leaf["$tensor"]], (entry, *path))
        return leaf

    map_leaves(tree, look)


class _Ties:
    """Finds tensors that stand in several entries, but not in those with sets of tensors.

    A row is (entry, index, entry, index): the second is the first. The index counts the places of
    tensors in an entry's tree.
    """

    def __init__(self) -> None:
        self.rows: list[tuple[str, int, str, int]] = []
        self._first: dict[int, tuple[str, int]] = {}

    def take(self, entry: str, tree: Tree, tensors: Sequence[torch.Tensor]) -> Tree:
        """The entry's tree with its tensors in it."""
        seen: set[int] = set()
        index = itertools.count()
        is_ordered = not _has_set(tree)

        def placed(leaf: Any, path: tuple[str, ...]) -> Any:
            if not isinstance(leaf, dict):
                return leaf
            here, number = next(index), leaf["$tensor"]
            if number not in seen:
                seen.add(number)
                if is_ordered and (first := self._first.setdefault(number, (entry, here)))[0] != entry:
                    self.rows.append((*first, entry, here))
            return tensors[number]

        return map_leaves(tree, placed)


def _has_set(tree: Tree) -> bool:
    """Whether tensors stand in a set, which torch gives back in another order."""
    if isinstance(tree, dict):
        return any(
            (key in ("$set", "$frozenset") and _has_tensor(item)) or _has_set(item) for key, item in tree.items()
        )
    return isinstance(tree, list) and any(map(_has_set, tree))


def _has_tensor(tree: Tree) -> bool:
    found: list[Any] = []
    map_leaves(tree, lambda leaf, _: found.append(leaf) if isinstance(leaf, dict) else None)
    return bool(found)


def _tensors(tree: Tree) -> list[torch.Tensor]:
    """The tensors of a tree, as often as they stand in it."""
    found: list[torch.Tensor] = []

    def collect(leaf: Any, _: tuple[str, ...]) -> None:
        if isinstance(leaf, torch.Tensor):
            found.append(leaf)

    map_leaves(tree, collect)
    return found


class _TorchState:
    """A checkpoint in host memory: a stored tensor's `location` is the tensor that was loaded."""

    def __init__(self, source: FileSource) -> None:
        self._source = source
        body = read_json(source, STATE_NAME, {"files": dict, "ties": list, "notes": dict})
        trees = {entry: _load_tree(source, str(name)) for entry, name in body["files"].items()}
        found = {entry: _tensors(tree) for entry, tree in trees.items()}
        stored = {id(tensor): _stored(tensor) for tensors in found.values() for tensor in tensors}
        try:
            for first, first_index, entry, index in body["ties"]:
                stored[id(found[entry][index])] = stored[id(found[first][first_index])]
        except (ValueError, KeyError, TypeError, IndexError) as exc:
            raise DamagedError(f"{STATE_NAME}: its ties do not fit the files: {exc!r}") from exc
        self.entries: Mapping[str, Tree] = {
            entry: map_leaves(tree, lambda leaf, _: stored[id(leaf)] if isinstance(leaf, torch.Tensor) else leaf)
            for entry, tree in trees.items()
        }
        self.notes: Mapping[str, dict[str, Any]] = body["notes"]

    def part(self, rank: int) -> StoredPart | None:
        return read_part(self._source, rank)

    def objects(self) -> dict[str, Any]:
        return read_objects(self._source)

    def fetch(
        self,
        wanted: Mapping[StoredTensor, torch.Tensor | None],
        device: str | torch.device = "cpu",
        addresses: Mapping[StoredTensor, int] = {},
    ) -> dict[StoredTensor, torch.Tensor]:
        """See `StoredState.fetch`. The files were read by `open`; this copies."""
        for stored, target in wanted.items():
            if target is not None and not is_special(stored.location):
                refuse_misfit(stored, target)
        return {stored: put(stored.location, target, device) for stored, target in wanted.items()}


def _load_tree(source: FileSource, name: str) -> Tree:
    plain = load_torch(source, name)
    try:
        tree = from_torch_safe(plain, source.files[name].size)
    except DamagedError as exc:
        raise DamagedError(f"{name}: {exc}") from exc
    for tensor in _tensors(tree):
        refuse_unsound(tensor, name)
    # Windows of one storage, or one number expanded, take more memory than there are bytes. Forged: more than there is.
    dense = {id(tensor): tensor for tensor in _tensors(tree) if not is_special(tensor)}
    needed, free = sum(tensor.nbytes for tensor in dense.values()), available()
    if free is not None and needed > max(free, source.files[name].size):
        raise StoreError(
            f"not enough memory to load {name}: its tensors take {needed:,} bytes, and {free:,} are free; load fewer "
            "entries, or on a larger machine",
            errno.ENOMEM,
        )
    return tree


def _stored(tensor: torch.Tensor) -> StoredTensor:
    special = is_special(tensor)
    plain = special or tensor.is_contiguous() or not is_dense(tensor.shape, tensor.stride())
    return StoredTensor(
        (tensor.size(0),) if tensor.is_nested else tuple(tensor.shape),
        tensor.dtype,
        tensor,
        None if plain else tensor.stride(),
        tensor.requires_grad,
        isinstance(tensor, torch.nn.Parameter),
    )
