"""How are safetensors files read back? `state.json` first, then the tensors' bytes to where they belong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, islice
from operator import gt, itemgetter
from pathlib import Path
from typing import Any

import torch

from ..errors import DamagedError, FormatVersionError
from ..manifest import FileEntry
from ..staging import is_dense, is_special
from ..state.shards import has_sharded, is_sharded
from ..state.snapshot import StoredPart, StoredTensor, Tree
from ..transfer import Segment
from . import FileSource
from .mapping import MappedFiles
from .rank_files import read_part
from .safetensors_layout import bytes_of, checked_count
from .state_file import STATE_NAME, load_torch, read_json, read_objects, revive
from .targets import Landing, fresh, put, refuse_unsound

SPECIAL_NAME = "tensors.pt"  # tensors that are more than dense numbers


class SafetensorsState:
    """A checkpoint opened: trees with stored tensors, whose `location` is (file, begin, end)."""

    def __init__(self, source: FileSource) -> None:
        self._source = source
        body = read_json(source, STATE_NAME, {"entries": dict, "tensors": list, "notes": dict})
        try:
            tensors = _stored_tensors(body.pop("tensors"), source.files)  # which frees them
            self.entries: Mapping[str, Tree] = {entry: revive(tree, tensors) for entry, tree in body["entries"].items()}
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as exc:
            raise DamagedError(f"{STATE_NAME} does not parse: {exc!r}") from exc
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
        """See `StoredState.fetch`. Reads all files at once, each in the order of its bytes; blocks."""
        lacking = [one for one, target in wanted.items() if target is None and one.location[0] != SPECIAL_NAME]
        targets: dict[StoredTensor, Any] = {**wanted, **fresh(lacking, device)}
        special: list[StoredTensor] = []
        landing = Landing()
        segments: dict[str, list[Segment]] = defaultdict(list)
        any_sharded = has_sharded(targets.values())
        for stored, target in targets.items():
            name, begin, end = stored.location
            if name == SPECIAL_NAME:
                special.append(stored)
                continue
            if any_sharded and target is not None and is_sharded(target):
                segments[name] += landing.parts(stored, target, begin)
                continue
            sink = addresses.get(stored) or landing.sink(stored, target)
            if begin < end:
                segments[name].append((begin, end, sink))
        landing.begin()
        for name, of_file in segments.items():
            of_file.sort(key=itemgetter(0))
            if any(map(gt, map(itemgetter(1), of_file), map(itemgetter(0), islice(of_file, 1, None)))):
                raise DamagedError(f"{STATE_NAME}: two tensors lie in the same bytes of {name}")
        self._source.scatter(segments)
        landing.end()
        loaded = load_torch(self._source, SPECIAL_NAME) if special else None
        for stored in special:
            tensor = loaded.get(stored.location[1]) if isinstance(loaded, dict) else None
            if not isinstance(tensor, torch.Tensor) or not is_special(tensor):
                raise DamagedError(f"{SPECIAL_NAME} has no tensor {stored.location[1]!r}")
            refuse_unsound(tensor, SPECIAL_NAME)
            targets[stored] = put(tensor, wanted[stored], device)
        return targets

    def map(
        self, folder: Path, wanted: Iterable[StoredTensor], device: str | torch.device = "cpu"
    ) -> dict[StoredTensor, torch.Tensor]:
        """The wanted tensors in mappings of the checkpoint's files below its local folder: see `MappedFiles`.
        No digest is checked. Special ones are fetched."""
        files = MappedFiles(folder, self._source.files)
        special: dict[StoredTensor, None] = {}
        mapped: dict[StoredTensor, torch.Tensor] = {}
        for stored in wanted:
            if stored.location[0] == SPECIAL_NAME:
                special[stored] = None
            else:
                mapped[stored] = files.tensor(stored)
        return mapped | self.fetch(special, device)


def _stored_tensors(rows: Sequence[Any], files: Mapping[str, FileEntry]) -> list[StoredTensor]:
    """The tensors of the table. Raises `FormatVersionError`, and `DamagedError` or another error for
    rows that can't be true."""
    sizes = chain.from_iterable(map(itemgetter(3), rows))
    if not set(map(type, sizes)) <= {int}:  # as keys, below, 1, True and 1.0 are the same
        raise DamagedError(f"{STATE_NAME}: a tensor has a size that is no whole number")
    kinds: dict[tuple[Any, ...], tuple[tuple[int, ...], torch.dtype, int]] = {}
    file_sizes = {name: file.size for name, file in files.items() if name != SPECIAL_NAME}
    tensors: list[StoredTensor] = []
    for name, key, dtype_name, shape, begin, end, more in rows:
        file_size = file_sizes.get(name)
        if file_size is None:
            if name not in files:
                raise DamagedError(f"{STATE_NAME}: tensor {key!r} is in {name!r}, which the checkpoint does not have")
            tensors.append(_special(key, dtype_name, shape, more))
            continue
        kind = (dtype_name, *shape)
        known = kinds.get(kind)
        if known is None:
            dtype = dtype_named(dtype_name, key)
            known = kinds[kind] = kind[1:], dtype, bytes_of(dtype, shape)
        shape, dtype, size = known
        if type(begin) is not int or type(end) is not int:
            raise DamagedError(f"{STATE_NAME}: tensor {key!r} has a place that is no whole number")
        if begin < 8 or end - begin != size or end > file_size:
            raise DamagedError(
                f"{STATE_NAME}: tensor {key!r} of {size:,} bytes can't lie in bytes {begin:,} to {end:,} of {name} "
                f"({file_size:,} bytes)"
            )
        stored = StoredTensor(shape, dtype, (name, begin, end))
        if more != {}:
            _add_flags(stored, more)
            if (strides := more.get("stride")) is not None:
                stored.stride = stride = tuple(map(checked_count, strides))
                if len(stride) != len(shape) or not is_dense(shape, stride):
                    raise DamagedError(f"{STATE_NAME}: tensor {key!r} of shape {shape} can't have the strides {stride}")
        tensors.append(stored)
    return tensors


def _special(key: Any, dtype_name: str, shape: Sequence[Any], more: Mapping[str, Any]) -> StoredTensor:
    """A tensor of the pickle, from its row in the table."""
    if not isinstance(key, str):
        raise DamagedError(f"{STATE_NAME}: a tensor in {SPECIAL_NAME} has the name {key!r}")
    dtype = dtype_named(dtype_name, key, in_pickle=True)
    bytes_of(dtype, shape)
    stored = StoredTensor(tuple(shape), dtype, (SPECIAL_NAME, key, 0))
    _add_flags(stored, more)
    return stored


def _add_flags(stored: StoredTensor, more: Mapping[str, Any]) -> None:
    stored.requires_grad, stored.is_parameter = more.get("requires_grad") is True, more.get("parameter") is True


def dtype_named(name: str, key: str, *, in_pickle: bool = False) -> torch.dtype:
    """That of a tensor; a quantized one is more than its numbers, and so always in the pickle."""
    dtype = vars(torch).get(name)  # getattr would import modules
    if not isinstance(dtype, torch.dtype) or (name.startswith(("qint", "quint")) and not in_pickle):
        raise FormatVersionError(
            f"{STATE_NAME}: tensor {key!r} has dtype {name!r}, which torch {torch.__version__} does not have; "
            "install a newer torch to read it"
        )
    return dtype
