"""How does a sharded checkpoint come back, whatever the ranks are now? Each reads the bytes of its own parts."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ..errors import DamagedError
from ..formats import FileSink, FileSource, write_live
from ..formats.boxes import in_order
from ..formats.rank_files import read_part
from ..formats.safetensors_layout import checked_count
from ..formats.safetensors_state import SPECIAL_NAME, dtype_named
from ..formats.state_file import STATE_NAME, Whole, load_torch, read_json, read_objects, revive
from ..formats.targets import Landing, fresh, put, refuse_misfit, refuse_unsound
from ..staging import Held, is_dense, is_special
from ..state.shards import boxes, local
from ..state.snapshot import FlatSnapshot, Snapshot, StoredPart, StoredTensor, Tree
from ..transfer import Segment
from .index import SHARDS_NAME, Index, Stored, read_index
from .plan import FORMAT, finish, global_plan, local_plan


class ShardedFormat:
    """Format `dcp`: every rank writes its part of the state, and reads back whatever part it has by then.

    Here is what one process does alone; several exchange the plans in between (`plan`).
    """

    name = FORMAT

    def __init__(self, split_size_bytes: int | None = None) -> None:
        self._split_size = split_size_bytes
        self._last: _Alone | None = None

    def plan(self, flat: FlatSnapshot) -> _Alone:
        """See `Format.plan`: the state of a single process. Raises `StateMismatchError` for a meta tensor, and for
        sharded ones of which other ranks have parts."""
        if self._last is None or self._last.shape is not flat.shape:
            self._last = _Alone(flat, self._split_size)
        return self._last

    def write(self, snapshot: Snapshot, sink: FileSink) -> None:
        write_live(self, snapshot, sink)

    def open(self, source: FileSource) -> ShardedState:
        """Read `state.json` and `shards.json`; no tensor is read. Raises `DamagedError` and
        `FormatVersionError`."""
        return ShardedState(source)


class _Alone:
    """The plan of one process that has the whole state."""

    def __init__(self, flat: FlatSnapshot, split_size: int | None) -> None:
        self.shape = flat.shape
        self._index, (self._own,) = global_plan([local_plan(flat)], split_size)
        self.regions = self._own.regions

    def write(self, flat: FlatSnapshot, held: Held, sink: FileSink) -> None:
        """See `Plan.write`."""
        rows = self._own.write(flat, held, sink)
        sink.write({name: Whole(data) for name, data in finish(self._index, [rows]).items()})


class ShardedState:
    """A checkpoint opened: trees with stored tensors, whose `location` is a name in `shards.json`."""

    def __init__(self, source: FileSource) -> None:
        self._source = source
        if STATE_NAME not in source.files and SHARDS_NAME in source.files:
            raise DamagedError(
                f"checkpoint has no {STATE_NAME}; if it was saved with StoreWriter and dcp.save, which keep none, load "
                "it with dcp.load(state_dict, storage_reader=StoreReader(url))"
            )
        body = read_json(source, STATE_NAME, {"entries": dict, "tensors": list, "notes": dict})
        self._index = read_index(source)
        try:
            tensors = [_tensor(row, self._index, source) for row in body.pop("tensors")]
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
        """See `StoredState.fetch`; of a sharded target the part that is on this rank is read. No rank waits
        for another. Raises `DamagedError` also for a target that the stored parts do not cover."""
        lacking = [one for one, target in wanted.items() if target is None and _name(one) is not None]
        targets: dict[StoredTensor, Any] = {**wanted, **fresh(lacking, device)}
        landing = Landing()
        segments: dict[str, list[Segment]] = defaultdict(list)
        special = []
        for stored, target in targets.items():
            name = _name(stored)
            if name is None:
                special.append(stored)
                continue
            refuse_misfit(stored, target)
            for file, one in segments_of(landing, name, self._index.tensors[name], target):
                segments[file].append(one)
        landing.begin()
        self._source.scatter({file: in_order(of_file) for file, of_file in segments.items()})
        landing.end()
        loaded = load_torch(self._source, SPECIAL_NAME) if special else None
        for stored in special:
            tensor = loaded.get(stored.location[1]) if isinstance(loaded, dict) else None
            if not isinstance(tensor, torch.Tensor) or not is_special(tensor):
                raise DamagedError(f"{SPECIAL_NAME} has no tensor {stored.location[1]!r}")
            refuse_unsound(tensor, SPECIAL_NAME)
            targets[stored] = put(tensor, wanted[stored], device)
        return targets


def segments_of(landing: Landing, name: str, stored: Stored, target: torch.Tensor) -> Iterable[tuple[str, Segment]]:
    """Where the bytes of a target, or of the part of it that is on this rank, are, and how they get there.

    Raises `DamagedError` naming the tensor when they are not all there.
    """
    here = local(target)
    parts = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in boxes(target)]
    found: list[tuple[str, Segment]] = []
    covered = 0
    for item in create_read_items_for_chunk_list(name, stored.metadata, parts):
        volume = math.prod(item.lengths)
        if not volume:
            continue
        covered += volume
        assert item.storage_index.index is not None
        chunk = stored.chunks[item.storage_index.index]
        found.append((chunk.file, segment(landing, chunk.begin, chunk.sizes, item.storage_offsets, _box(here, item))))
    if covered != here.numel():
        raise DamagedError(
            f"{name}: the checkpoint has {covered:,} of the {here.numel():,} elements that belong here; it is not whole"
        )
    return found


def segment(
    landing: Landing, begin: int, sizes: Sequence[int], offsets: Sequence[int], target: torch.Tensor
) -> Segment:
    """What fills the target, a box at these offsets of a chunk whose bytes begin there."""
    first, last, sink = landing.box(target, sizes, offsets)
    return begin + first, begin + last, sink


def _box(here: torch.Tensor, item: Any) -> torch.Tensor:
    for dim, (offset, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
        here = here.narrow(dim, offset, length)
    return here


def _name(stored: StoredTensor) -> str | None:
    """The tensor's name in the index, or None for a special one."""
    return stored.location if isinstance(stored.location, str) else None


def _tensor(row: Sequence[Any], index: Index, source: FileSource) -> StoredTensor:
    name, more = row
    flags = more.get("requires_grad") is True, more.get("parameter") is True
    if more.get("special") is True:
        if SPECIAL_NAME not in source.files:
            raise DamagedError(f"{STATE_NAME}: the checkpoint does not have {SPECIAL_NAME}")
        shape = tuple(map(checked_count, more["shape"]))
        return StoredTensor(shape, dtype_named(more["dtype"], name, in_pickle=True), (SPECIAL_NAME, name), None, *flags)
    known = index.tensors.get(name)
    if known is None:
        raise DamagedError(f"{STATE_NAME}: tensor {name!r} is not in {SHARDS_NAME}")
    stride = None
    if (strides := more.get("stride")) is not None:
        stride = tuple(map(checked_count, strides))
        if len(stride) != len(known.shape) or not is_dense(known.shape, stride):
            raise DamagedError(f"{STATE_NAME}: tensor {name!r} of shape {known.shape} can't have the strides {stride}")
    return StoredTensor(known.shape, known.dtype, name, stride, *flags)
