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
            sink = addresses[stored] if stored in addresses else landing.sink(stored, target)
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
    shapes, begins, ends = ([row[i] for row in rows] for i in (3, 4, 5))
    if not {*map(type, begins), *map(type, ends), *map(type, chain.from_iterable(shapes))} <= {int}:
        raise DamagedError(f"{STATE_NAME}: a tensor has a size or place that is no whole number")
    kinds: dict[tuple[str, tuple[int, ...], bool], tuple[tuple[int, ...], torch.dtype, int]] = {}
    file_sizes = {name: file.size for name, file in files.items()}
    tensors: list[StoredTensor] = []
    for name, key, dtype_name, shape, begin, end, more in rows:
        in_pickle = name == SPECIAL_NAME
        kind = (dtype_name, tuple(shape), in_pickle)
        if kind not in kinds:
            dtype = dtype_named(dtype_name, key, in_pickle=in_pickle)
            kinds[kind] = kind[1], dtype, bytes_of(dtype, shape)
        shape, dtype, size = kinds[kind]
        if name not in file_sizes:
            raise DamagedError(f"{STATE_NAME}: tensor {key!r} is in {name!r}, which the checkpoint does not have")
        if in_pickle and isinstance(key, str):
            stored = StoredTensor(shape, dtype, (name, key, 0))
        elif begin >= 8 and end - begin == size and end <= file_sizes[name]:
            stored = StoredTensor(shape, dtype, (name, begin, end))
        else:
            raise DamagedError(
                f"{STATE_NAME}: tensor {key!r} of {size:,} bytes can't lie in bytes {begin:,} to {end:,} of {name} "
                f"({file_sizes[name]:,} bytes)"
            )
        if more != {}:
            stored.requires_grad, stored.is_parameter = more.get("requires_grad") is True, more.get("parameter") is True
            if not in_pickle and (strides := more.get("stride")) is not None:
                stored.stride = stride = tuple(map(checked_count, strides))
                if len(stride) != len(shape) or not is_dense(shape, stride):
                    raise DamagedError(f"{STATE_NAME}: tensor {key!r} of shape {shape} can't have the strides {stride}")
        tensors.append(stored)
    return tensors


def dtype_named(name: str, key: str, *, in_pickle: bool = False) -> torch.dtype:
    """That of a tensor; a quantized one is more than its numbers, and so always in the pickle."""
    dtype = vars(torch).get(name)  # getattr would import modules
    if not isinstance(dtype, torch.dtype) or (name.startswith(("qint", "quint")) and not in_pickle):
        raise FormatVersionError(
            f"{STATE_NAME}: tensor {key!r} has dtype {name!r}, which torch {torch.__version__} does not have; "
            "install a newer torch to read it"
        )
    return dtype
