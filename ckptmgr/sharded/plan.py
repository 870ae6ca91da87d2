"""Which rank writes which part of a state? Worked out by DCP's planner, with every part written once.

In four steps, between which the ranks' answers are exchanged: `local_plan` on every rank, `global_plan` on
rank 0, `RankPlan.write` on every rank, `finish` on rank 0. None of them communicates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from ..errors import ConfigError, StateMismatchError
from ..formats import FileSink
from ..formats.json_texts import JsonTexts
from ..formats.rank_files import rank_bodies
from ..formats.safetensors_state import SPECIAL_NAME
from ..formats.state_file import Whole, save_torch, state_bodies
from ..staging import Held, Region, is_dense, is_special, refuse_hidden
from ..state.shards import is_sharded, local
from ..state.snapshot import FlatSnapshot
from .blobs import ALIGNMENT, tensor_blob, value_blob
from .index import index_bodies
from .layout import SPLIT_SIZE, Piece, Row, lay_out
from .names import joined, plain_values, tensor_paths

FORMAT = "dcp"
VALUES_NAME = "values.distcp"
# Plain tensors below this size are written by rank 0: they are where ranks differ, as in the running
# statistics of a normalization, and should all be of the same one.
_SPREAD = 64 << 10  # bytes


@dataclass(frozen=True, slots=True)
class LocalPlan:
    """What one rank has. Can be pickled.

    `tensors` are its tensors by number, as (name, dtype, shape of the whole); `paths` say where each stands.
    `table` is what `state.json` says of them, of rank 0.
    """

    rank: int
    world_size: int
    tensors: list[tuple[str, torch.dtype, tuple[int, ...]]]
    items: SavePlan
    paths: list[tuple[str, ...]]
    table: list[list[Any]]


@dataclass(frozen=True, slots=True)
class GlobalIndex:
    """What is to be written by all ranks, for `finish`."""

    metadata: Metadata
    items: list[list[tuple[str, tuple[int, ...]]]]  # by rank
    paths: dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Item:
    """A chunk that a rank writes: where it is in the whole, and the number of its tensor on that rank."""

    fqn: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    number: int


def resolved(flat: FlatSnapshot) -> FlatSnapshot:
    """The snapshot with the parts that are on this rank in the place of sharded tensors: what a `RankPlan`'s
    regions are about. Of the same shape, in the sense of `FlatSnapshot`."""
    return replace(flat, tensors=list(map(local, flat.tensors)), pointers=None) if flat.has_sharded else flat


def local_plan(flat: FlatSnapshot, rank: int = 0, world_size: int = 1) -> LocalPlan:
    """What this rank has, to be sent to rank 0. On every rank; moves nothing.

    Raises `StateMismatchError` for a meta tensor and for one that is not yet summed over ranks (`Partial`).
    """
    paths = tensor_paths(flat)
    names = joined(paths)
    chosen: dict[str, Any] = {}
    for name, path, tensor in zip(names, paths, flat.tensors, strict=True):
        refuse_hidden(tensor, path)
        sharded: Any = tensor
        if is_sharded(tensor) and any(one.is_partial() for one in sharded.placements):
            raise StateMismatchError(
                f"{name} is a sum that is not summed over the ranks yet (Partial); redistribute it before it is saved"
            )
        if not is_special(tensor) and (rank == 0 or is_sharded(tensor) or tensor.nbytes >= _SPREAD):
            chosen[name] = tensor.detach()
    planner = _planner()
    planner.set_up_planner(chosen, is_coordinator=rank == 0)
    plan = planner.create_local_plan()
    tensors = [(name, one.dtype, _whole_shape(one)) for name, one in zip(names, flat.tensors, strict=True)]
    table = [_row(number, name, flat.tensors[number]) for number, name in enumerate(names)] if rank == 0 else []
    return LocalPlan(rank, world_size, tensors, plan, paths, table)


def _planner() -> DefaultSavePlanner:
    return DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=False)


def _whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return (tensor.size(0),) if tensor.is_nested else tuple(tensor.shape)


def _row(number: int, name: str, tensor: torch.Tensor) -> list[Any]:
    """What `state.json` says of a tensor: the name in `shards.json`, or what takes its place, and its flags."""
    more: dict[str, Any] = {}
    if tensor.requires_grad:
        more["requires_grad"] = True
    if isinstance(tensor, torch.nn.Parameter):
        more["parameter"] = True
    if is_special(tensor):
        dtype = str(tensor.dtype).removeprefix("torch.")
        return [str(number), more | {"special": True, "dtype": dtype, "shape": _whole_shape(tensor)}]
    if not is_sharded(tensor) and not tensor.is_contiguous() and is_dense(tensor.shape, tensor.stride()):
        more["stride"] = tensor.stride()
    return [name, more]


def global_plan(plans: Sequence[LocalPlan], split_size_bytes: int | None = None) -> tuple[GlobalIndex, list[RankPlan]]:
    """Who writes what, from the plans of all ranks in their order. On rank 0; every rank is sent its own.

    Raises `StateMismatchError` naming the tensors where ranks do not have the same state, or not all of it.
    """
    if [plan.rank for plan in plans] != list(range(plans[0].world_size)):
        raise ConfigError(
            f"plans of ranks {[plan.rank for plan in plans]} do not make the {plans[0].world_size} ranks of this save"
        )
    first = plans[0]
    whole = {name: shape for name, _, shape in first.tensors}
    for plan in plans[1:]:
        _compare(first, plan)
    given = [replace(plan.items, items=[i for i in plan.items.items if _counts(i, whole)]) for plan in plans]
    try:
        final, metadata = _planner().create_global_plan(given)
    except (ValueError, AssertionError) as exc:
        raise StateMismatchError(
            f"the ranks' parts of the state do not make a whole: {exc}. Shard the same state in the same way on "
            "all ranks"
        ) from exc
    for name, one in metadata.state_dict_metadata.items():
        assert isinstance(one, TensorStorageMetadata)
        volume = sum(math.prod(chunk.sizes) for chunk in one.chunks)
        if volume != math.prod(one.size):
            raise StateMismatchError(
                f"{name}: the ranks have {volume:,} of its {math.prod(one.size):,} elements; every rank of its mesh "
                "must take part in the save"
            )
    dense = [name for name, more in first.table if "special" not in more]
    if lacking := [name for name in dense if name not in metadata.state_dict_metadata]:
        raise StateMismatchError(
            f"no rank of this save has any part of {_few(lacking)}; every rank of its mesh must take part in the save"
        )
    split = split_size_bytes or SPLIT_SIZE
    ranks = [
        RankPlan(plan.rank, _items(own.items, plan), plan.table, split) for plan, own in zip(plans, final, strict=True)
    ]
    items = [[(item.fqn, item.offsets) for item in rank.items] for rank in ranks]
    paths = {name: path for (name, _, _), path in zip(first.tensors, first.paths, strict=True)}
    return GlobalIndex(metadata, items, paths), ranks


def _counts(item: WriteItem, whole: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a chunk has elements, or belongs to a tensor that has none."""
    data = item.tensor_data
    return data is None or 0 not in data.chunk.sizes or 0 in whole[item.index.fqn]


def _compare(first: LocalPlan, other: LocalPlan) -> None:
    """Raises `StateMismatchError` when two ranks do not have the same tensors."""
    here = {name: (dtype, shape) for name, dtype, shape in first.tensors}
    there = {name: (dtype, shape) for name, dtype, shape in other.tensors}
    problems = []
    for own, theirs, rank, other_rank in ((here, there, first.rank, other.rank), (there, here, other.rank, first.rank)):
        if names := [name for name in own if name not in theirs]:
            problems.append(f"rank {rank} has {_few(names)}, which rank {other_rank} does not have")
    if names := [name for name, kind in here.items() if there.get(name, kind) != kind]:
        problems.append(
            "; ".join(
                f"{name} is {_kind(*here[name])} on rank {first.rank} and {_kind(*there[name])} on rank {other.rank}"
                for name in names[:10]
            )
        )
    if problems:
        raise StateMismatchError(
            f"the ranks do not have the same state: {'; '.join(problems)}. Give all ranks the same objects under the "
            "same names; what differs from rank to rank on purpose belongs under per_rank"
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _kind(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{dtype} {shape}"


def _items(items: Sequence[WriteItem], plan: LocalPlan) -> list[Item]:
    numbers = {name: number for number, (name, _, _) in enumerate(plan.tensors)}
    found = []
    for item in items:
        assert item.tensor_data is not None
        chunk, dtype = item.tensor_data.chunk, item.tensor_data.properties.dtype
        fqn = item.index.fqn
        found.append(Item(fqn, tuple(chunk.offsets), tuple(chunk.sizes), dtype, numbers[fqn]))
    return found


@dataclass(frozen=True)
class RankPlan:
    """The files of one rank. Can be pickled; laid out where it is used. Serves every snapshot of one shape."""

    rank: int
    items: list[Item]
    table: list[list[Any]]
    split_size: int

    @property
    def regions(self) -> Mapping[str, Region]:
        """Where tensors of the `resolved` snapshot lie in this rank's files."""
        return self._files[0]

    @property
    def rows(self) -> list[Row]:
        """The place of each item in these files."""
        return self._files[1]

    def write(self, flat: FlatSnapshot, held: Held, sink: FileSink) -> list[Row]:
        """Write this rank's files; `held` has the tensors of the `resolved` snapshot. Rank 0 writes what are no
        dense tensors besides, and the parts of all ranks in `flat.ranks`. Answers where every item went.
        Blocks; raises what the sink raises."""
        held.wait()
        bodies: dict[str, Any] = dict(held.parts)
        rows = self.rows
        if self.rank == 0:
            specials = [number for number, row in enumerate(self.table) if row[1].get("special")]
            if specials:
                with sink.create(SPECIAL_NAME) as file:
                    save_torch({str(number): held.tensor(number).detach() for number in specials}, file)
            body = {"entries": flat.entries, "tensors": self.table}
            bodies |= state_bodies(self._texts, FORMAT, flat, body) | rank_bodies(flat.ranks)
            data, own = _values(flat, {name for name, _ in self.table})
            if own:
                bodies[VALUES_NAME] = Whole(data)
                rows = rows + own
        sink.write(bodies)
        return rows

    @cached_property
    def _files(self) -> tuple[dict[str, Region], list[Row]]:
        pieces = [Piece(one.fqn, one.offsets, tensor_blob(one.dtype, one.sizes), one.number) for one in self.items]
        return lay_out(pieces, self.rank, self.split_size)

    @cached_property
    def _texts(self) -> JsonTexts:
        return JsonTexts()

    def __getstate__(self) -> dict[str, Any]:
        return {"rank": self.rank, "items": self.items, "table": self.table, "split_size": self.split_size}


def _values(flat: FlatSnapshot, taken: set[str]) -> tuple[bytes, list[Row]]:
    """What is not a tensor, as a file for readers of DCP's own, and the place of each value in it. Ours have
    `state.json`, so a name that a tensor has too is left out."""
    data, rows = bytearray(), []
    values = plain_values(flat)
    for name, (path, value) in zip(joined(list(values)), values.items(), strict=True):
        if name not in taken:
            blob = value_blob(value)
            data += bytes(-len(data) % ALIGNMENT)
            rows.append(Row(name, None, VALUES_NAME, len(data), len(blob), len(data), path))
            data += blob
    return bytes(data), rows


def finish(index: GlobalIndex, rows: Sequence[Sequence[Row]]) -> dict[str, bytes]:
    """The files that say where everything is, from what `RankPlan.write` answered on every rank. On rank 0.

    Raises `SaveFailedError` naming every item that was planned and not written, or the other way round.
    """
    values = [row for own in rows[:1] for row in own if row.offsets is None]
    known = dict(index.metadata.state_dict_metadata) | {row.fqn: BytesStorageMetadata() for row in values}
    planned: list[tuple[str, tuple[int, ...] | None]] = [item for own in index.items for item in own]
    planned += [(row.fqn, None) for row in values]
    paths = index.paths | {row.fqn: row.path for row in values}
    return index_bodies(Metadata(known), planned, [row for own in rows for row in own], paths)
