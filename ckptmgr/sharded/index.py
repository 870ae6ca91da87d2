"""Where are the chunks of every tensor? `shards.json`: what DCP's `.metadata` says, without a pickle.

`.metadata` is written too, for readers of DCP's own; nothing of ours reads it.
"""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ..errors import DamagedError, SaveFailedError
from ..formats import FileSource
from ..formats.safetensors_layout import bytes_of, checked_count
from ..formats.safetensors_state import dtype_named
from ..formats.state_file import VERSION, read_json
from .layout import Row

SHARDS_NAME = "shards.json"
METADATA_NAME = ".metadata"
_SHOWN = 10
_MOST_TOGETHER = 1000  # chunks that no cut tells apart: no mesh makes as many


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a tensor: its bytes, those of its contiguous form, are in a file from `begin` on."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a checkpoint."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[Chunk]

    @property
    def metadata(self) -> TensorStorageMetadata:
        """What DCP's planners want to know of it."""
        chunks = [ChunkStorageMetadata(torch.Size(one.offsets), torch.Size(one.sizes)) for one in self.chunks]
        return TensorStorageMetadata(TensorProperties(self.dtype), torch.Size(self.shape), chunks)


@dataclass(frozen=True, slots=True)
class Index:
    """All that is in a checkpoint. `values` are files of `torch.save` within files, as (file, begin, length);
    `paths` say where in a nested state dict a name stands."""

    tensors: dict[str, Stored]
    values: dict[str, tuple[str, int, int]] = field(default_factory=dict)
    paths: dict[str, list[str | int]] = field(default_factory=dict)

    def metadata(self) -> Metadata:
        """What DCP's planners want to know."""
        known: dict[str, Any] = {fqn: one.metadata for fqn, one in self.tensors.items()}
        known |= {fqn: BytesStorageMetadata() for fqn in self.values}
        return Metadata(known, {fqn: tuple(path) for fqn, path in self.paths.items()} or None)

    def covers_all(self) -> list[str]:
        """The tensors whose chunks are not as many elements as they have: there should be none."""
        return [
            fqn
            for fqn, one in self.tensors.items()
            if sum(math.prod(chunk.sizes) for chunk in one.chunks) != math.prod(one.shape)
        ]


def index_bodies(
    metadata: Metadata,
    planned: Iterable[tuple[str, tuple[int, ...] | None]],
    rows: Sequence[Row],
    paths: Mapping[str, Sequence[str | int]],
) -> dict[str, bytes]:
    """The files that say where everything is, once all of it is written. `planned` are the items that were to
    be, as (fqn, offsets), and `rows` those that were.

    Raises `SaveFailedError` that names what is missing, what nobody planned, and tensors that are not whole.
    """
    places: dict[tuple[str, tuple[int, ...] | None], Row] = {}
    twice = []
    for row in rows:
        if (row.fqn, row.offsets) in places:
            twice.append((row.fqn, row.offsets))
        places[row.fqn, row.offsets] = row
    wanted = set(planned)
    missing = [one for one in wanted if one not in places]
    surplus = [one for one in places if one not in wanted]
    for what, items in (("were not written", missing), ("were not planned", surplus), ("were written twice", twice)):
        if items:
            raise SaveFailedError(f"the save is not whole: {len(items)} items {what}: {_named(items)}")
    index = _index(metadata, places, paths)
    if partial := index.covers_all():
        raise SaveFailedError(
            f"the save is not whole: the ranks that took part do not have all parts of {_named(partial)}; every rank "
            "of the tensors' mesh must take part"
        )
    return {SHARDS_NAME: _to_json(index), METADATA_NAME: _to_pickle(metadata, index, rows)}


def _named(items: Iterable[Any]) -> str:
    listed = sorted(str(item) if isinstance(item, str) else _item(*item) for item in items)
    return ", ".join(listed[:_SHOWN]) + (f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else "")


def _item(fqn: str, offsets: tuple[int, ...] | None) -> str:
    return f"{fqn} at {list(offsets)}" if offsets else fqn


def _index(
    metadata: Metadata,
    places: Mapping[tuple[str, tuple[int, ...] | None], Row],
    paths: Mapping[str, Sequence[str | int]],
) -> Index:
    index = Index({}, {}, {fqn: list(path) for fqn, path in paths.items()})
    for fqn, one in metadata.state_dict_metadata.items():
        if isinstance(one, TensorStorageMetadata):
            chunks = []
            for chunk in one.chunks:
                row = places[fqn, tuple(chunk.offsets)]
                chunks.append(Chunk(tuple(chunk.offsets), tuple(chunk.sizes), row.file, row.begin))
            index.tensors[fqn] = Stored(tuple(one.size), one.properties.dtype, chunks)
        else:
            row = places[fqn, None]
            index.values[fqn] = (row.file, row.offset, row.length)
    return index


def _to_json(index: Index) -> bytes:
    body = {
        "format_version": VERSION,
        "tensors": {
            fqn: {
                "shape": one.shape,
                "dtype": str(one.dtype).removeprefix("torch."),
                "chunks": [[chunk.offsets, chunk.sizes, chunk.file, chunk.begin] for chunk in one.chunks],
            }
            for fqn, one in index.tensors.items()
        },
        "values": index.values,
        "paths": index.paths,
    }
    return f"{json.dumps(body, separators=(',', ':'), allow_nan=False)}\n".encode()


def _to_pickle(metadata: Metadata, index: Index, rows: Sequence[Row]) -> bytes:
    places = {MetadataIndex(row.fqn, row.offsets): _StorageInfo(row.file, row.offset, row.length) for row in rows}
    paths = {fqn: tuple(path) for fqn, path in index.paths.items()}
    return pickle.dumps(Metadata(metadata.state_dict_metadata, paths or None, places))


def read_index(source: FileSource) -> Index:
    """The index of a checkpoint. Raises `DamagedError` for one that can't be true, and `FormatVersionError`."""
    body = read_json(source, SHARDS_NAME, {"tensors": dict, "values": dict, "paths": dict})
    sizes = {name: file.size for name, file in source.files.items()}
    try:
        tensors = {fqn: _stored(fqn, row, sizes) for fqn, row in body["tensors"].items()}
        values = {fqn: _value(fqn, row, sizes) for fqn, row in body["values"].items()}
        paths = {fqn: [*path] for fqn, path in body["paths"].items()}
    except (ValueError, TypeError, LookupError, AttributeError) as exc:
        raise DamagedError(f"{SHARDS_NAME} does not parse: {exc!r}") from exc
    index = Index(tensors, values, paths)
    if partial := index.covers_all():
        raise DamagedError(f"{SHARDS_NAME}: the chunks are not the whole of {_named(partial)}")
    return index


def _stored(fqn: str, row: Mapping[str, Any], sizes: Mapping[str, int]) -> Stored:
    shape, dtype = tuple(map(checked_count, row["shape"])), dtype_named(row["dtype"], fqn)
    chunks = []
    for offsets, lengths, file, begin in row["chunks"]:
        chunk = Chunk(tuple(map(checked_count, offsets)), tuple(map(checked_count, lengths)), file, begin)
        ends = [offset + length for offset, length in zip(chunk.offsets, chunk.sizes, strict=True)]
        is_inside = all(end <= length for end, length in zip(ends, shape, strict=True))
        end = checked_count(begin) + bytes_of(dtype, chunk.sizes)
        if not is_inside or end > sizes.get(file, -1):
            raise DamagedError(
                f"{SHARDS_NAME}: a chunk of {fqn!r} at {offsets} of {lengths} can't be in a tensor of {list(shape)}, "
                f"nor in bytes {begin:,} to {end:,} of {file!r} ({sizes.get(file, 0):,} bytes)"
            )
        chunks.append(chunk)
    if _overlap(chunks):  # then some elements would be in no chunk, and be left as they are
        raise DamagedError(f"{SHARDS_NAME}: chunks of {fqn!r} overlap")
    return Stored(shape, dtype, chunks)


def _overlap(boxes: Sequence[Chunk]) -> bool:
    """Whether two of the boxes have elements in common. They are told apart along one dimension after the other, as
    a mesh cuts them; what can't be cut so is compared each with each."""
    left = [[box for box in boxes if 0 not in box.sizes]]
    while left:
        together = left.pop()
        if len(together) < 2:
            continue
        parts = next((parts for dim in range(len(together[0].sizes)) if len(parts := _cut(together, dim)) > 1), None)
        if parts is not None:
            left += parts
        elif len(together) > _MOST_TOGETHER or any(_meet(one, other) for one, other in combinations(together, 2)):
            return True
    return False


def _cut(boxes: Sequence[Chunk], dim: int) -> list[list[Chunk]]:
    """The boxes in groups that have nothing in common along a dimension."""
    groups: list[list[Chunk]] = []
    reached = -1
    for box in sorted(boxes, key=lambda box: box.offsets[dim]):
        if box.offsets[dim] >= reached:
            groups.append([])
        groups[-1].append(box)
        reached = max(reached, box.offsets[dim] + box.sizes[dim])
    return groups


def _meet(one: Chunk, other: Chunk) -> bool:
    return all(
        max(a, b) < min(a + c, b + d)
        for a, c, b, d in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    )


def _value(fqn: str, row: Sequence[Any], sizes: Mapping[str, int]) -> tuple[str, int, int]:
    file, begin, length = row
    if checked_count(begin) + checked_count(length) > sizes.get(file, -1):
        raise DamagedError(f"{SHARDS_NAME}: the value {fqn!r} can't be in {file!r}")
    return file, begin, length
