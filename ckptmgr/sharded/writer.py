"""How does `dcp.save` write to any store, all or nothing? DCP plans and gathers; this moves the bytes and commits."""

from __future__ import annotations

import io
import logging
import re
import secrets
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from .. import __version__
from ..draft import create_manifest, readable
from ..errors import AlreadyExistsError, CheckpointError, ConfigError, SaveFailedError, StateMismatchError, StoreError
from ..folder_names import guessed_step
from ..formats.state_file import Whole
from ..manifest import FileEntry, Manifest
from ..source import Source
from ..staging import Live, is_special
from ..state.pickled import PickleWarning
from ..state.shards import local
from ..state.snapshot import FlatSnapshot
from ..transfer import Body, write_files
from .blobs import Blob, tensor_blob
from .index import index_bodies
from .layout import SPLIT_SIZE, Piece, Row, lay_out
from .place import Place
from .plain import plainly
from .plan import FORMAT

_FILES = MetadataIndex("")  # stands for no item: with it a rank sends its files' entries
_NONCE = re.compile(r"[0-9a-f]{16}")
_SHARED = 64 << 10  # bytes; a smaller plain tensor that several ranks have is that of the lowest of them

_log = logging.getLogger("ckptmgr.sharded")


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What rank 0 tells every rank of the save."""

    nonce: str
    rank: int


class StoreWriter(StorageWriter):
    """Saves with `dcp.save` or `dcp.async_save` to a folder of its own at any URL, by every rank at once:

        dcp.save(state_dict, storage_writer=StoreWriter("s3://bucket/run/step-100", options={...}))

    `options` go to the fsspec filesystem; a file larger than `split_size_bytes` is split between tensors. The
    checkpoint is there when `manifest.json` is, which is created last, once everything planned was written;
    whatever fails before leaves none. Values that several ranks have under one name are those of the lowest
    of these ranks. A checkpoint that is there is never overwritten: `AlreadyExistsError`. What fails on one rank
    is raised on all; put the call into `plain_errors()` to have it as an error of this library.

    The data lies in `data_url`, in DCP's own layout too: on a local disk `FileSystemReader(writer.data_url)` reads it.
    Make a writer on every rank before each save; none of its methods is for others than DCP.
    """

    def __init__(
        self,
        url: str | Path,
        *,
        options: dict[str, Any] | None = None,
        split_size_bytes: int = SPLIT_SIZE,
        fsync: bool = True,
    ) -> None:
        super().__init__()
        self._options, self._split_size, self._fsync = options, split_size_bytes, fsync
        self._place = Place.of(url, options, fsync=fsync)
        self._ranks = _world_size()
        self._nonce = ""
        self._planned: list[tuple[str, tuple[int, ...] | None]] = []

    @property
    def checkpoint_id(self) -> str:
        return self._place.url

    @property
    def data_url(self) -> str:
        """The folder with the data. Known once a save was planned: after `dcp.save`."""
        return f"{self._place.url}/{self._nonce}"

    def reset(self, checkpoint_id: Any = None) -> None:
        """Another save begins; with `checkpoint_id` at another URL, with the same options."""
        if checkpoint_id:
            self._place = Place.of(checkpoint_id, self._options, fsync=self._fsync)
        self._nonce, self._planned = "", []

    def storage_meta(self) -> StorageMeta | None:
        return StorageMeta(checkpoint_id=self.checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):
            raise ConfigError(
                "use_collectives=False saves every rank's part as if it were the whole, which no other number of ranks "
                "can load; leave it out"
            )
        if self._ranks > 1 and _world_size() == 1:
            raise SaveFailedError(
                f"{self._place.url}: the process group of the {self._ranks} ranks is gone, so this rank alone would "
                "save its part as the whole; wait for the save before destroy_process_group()"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        # Which of these the planner leaves to which rank is as good as chance: rank 0 puts it right.
        return replace(plan, storage_data=[item.index for item in plan.items if _is_shared(item)])

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        if not all(getattr(plan, "usable", True) for plan in plans):
            raise ConfigError(
                "enable_plan_caching=True makes the planner give back plans of an earlier save, to which no file of "
                "this one belongs; leave it out"
            )
        with plainly(f"{self._place.url} was not begun", SaveFailedError):
            self._refuse_existing()
        plans = _by_lowest(plans)
        nonce = secrets.token_hex(8)
        self._planned = [(item.index.fqn, _offsets(item)) for plan in plans for item in plan.items]
        return [replace(plan, storage_data=_Attempt(nonce, rank)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        attempt = cast(_Attempt, plan.storage_data)
        self._nonce = attempt.nonce
        with plainly(f"{self._place.url} was not saved", SaveFailedError):
            pieces, tensors = self._pieces(plan.items, planner)
            regions, rows = lay_out(pieces, attempt.rank, self._split_size)
            held = Live(regions, FlatSnapshot({}, tensors, {}, None, {}, object()))
            held.wait()
            entries = self._write(held.parts)
        results = [
            WriteResult(item.index, row.length, cast(Any, row)) for item, row in zip(plan.items, rows, strict=True)
        ]
        future: Future[list[WriteResult]] = Future()
        future.set_result([*results, WriteResult(_FILES, 0, cast(Any, entries))])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit, on rank 0, if all that was planned was written."""
        rows, entries = [], []
        for one in (result for own in results for result in own):
            if one.index == _FILES:
                entries += cast(Any, one.storage_data)
            else:
                rows.append(cast(Row, one.storage_data))
        with plainly(f"{self._place.url} was not saved", SaveFailedError):
            paths = _plain_paths(metadata.planner_data)
            bodies = index_bodies(metadata, self._planned, rows, paths)
            entries += self._write({name: Whole(data) for name, data in bodies.items()})
            self._commit(entries, len(results))
        self._sweep()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, str | Path)

    def _refuse_existing(self) -> None:
        if self._place.store.stat(self._place.manifest_key) is not None:
            raise AlreadyExistsError(
                "there is a checkpoint already, which is never overwritten; save to another URL, or delete that one "
                "first"
            )

    def _pieces(self, items: Sequence[WriteItem], planner: SavePlanner) -> tuple[list[Piece], list[torch.Tensor]]:
        pieces: list[Piece] = []
        tensors: list[torch.Tensor] = []
        for item in items:
            fqn, data = item.index.fqn, planner.resolve_data(item)
            if item.type == WriteItemType.BYTE_IO:
                value = cast(io.BytesIO, data).getvalue()
                _warn_of_pickle(fqn, value)
                pieces.append(Piece(fqn, None, Blob(value, 0, b""), None))
                continue
            tensor = local(cast(torch.Tensor, data).detach())
            _refuse_odd(item, tensor)
            pieces.append(Piece(fqn, _offsets(item), tensor_blob(tensor.dtype, tuple(tensor.shape)), len(tensors)))
            tensors.append(tensor)
        return pieces, tensors

    def _write(self, bodies: Mapping[str, Body]) -> list[FileEntry]:
        """Files of this save. Of those that can't all be written none is left."""
        place, names = self._place, [f"{self._nonce}/{name}" for name in bodies]
        try:
            entries = write_files(
                dict(zip(names, bodies.values(), strict=True)),
                lambda name, size: place.store.writer(place.key(name), size),
            )
        except BaseException:
            with suppress(CheckpointError):
                place.store.delete([place.key(name) for name in names])
            raise
        return list(entries.values())

    def _commit(self, entries: Sequence[FileEntry], ranks: int) -> None:
        self._refuse_existing()  # another save was faster, and has removed what this one wrote
        place = self._place
        manifest = Manifest(
            step=guessed_step(place.name),
            run="",
            attempt=1,
            nonce=self._nonce,
            time=datetime.now(UTC),
            format=FORMAT,
            files=tuple(entries),
            world_size=ranks,
            versions={"ckptmgr": __version__, "torch": str(torch.__version__)},
        )
        data = readable(manifest)
        if problems := Source(place.store, place.name, manifest).problems("size"):
            raise StoreError(f"the store does not hold what was written: {'; '.join(map(str, problems))}")
        create_manifest(place.store, place.name, place.manifest_key, data)

    def _sweep(self) -> None:
        """Remove what failed saves left here: none of them can become this checkpoint any more."""
        place = self._place
        try:
            found = place.store.list(place.name)
            dead = [
                one.key for one in found if one.is_folder and _NONCE.fullmatch(one.name) and one.name != self._nonce
            ]
            place.store.delete([f"{key}/" for key in dead])
        except CheckpointError as exc:
            _log.warning("sharded.sweep.failed url=%s cause=%s", place.url, exc)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _offsets(item: WriteItem) -> tuple[int, ...] | None:
    return None if item.tensor_data is None else tuple(item.tensor_data.chunk.offsets)


def _is_shared(item: WriteItem) -> bool:
    """Whether ranks that have this have a value each, which may differ: it is no tensor, or a small plain one."""
    if item.type == WriteItemType.SHARD:
        return False
    size = item.tensor_storage_size()
    return size is None or size < _SHARED


def _by_lowest(plans: Sequence[SavePlan]) -> list[SavePlan]:
    """The plans with every shared item at the lowest rank that has it."""
    lowest: dict[MetadataIndex, int] = {}
    for rank, plan in enumerate(plans):
        for index in plan.storage_data or ():
            lowest.setdefault(index, rank)
    items: list[list[WriteItem]] = [[] for _ in plans]
    for rank, plan in enumerate(plans):
        for item in plan.items:
            items[lowest.get(item.index, rank)].append(item)
    return [replace(plan, items=own) for plan, own in zip(plans, items, strict=True)]


def _warn_of_pickle(fqn: str, data: bytes) -> None:
    if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)):
        warnings.warn(
            f"{fqn} is saved as a pickle of {', '.join(unsafe)}, and loading it runs code: it needs "
            "StoreReader(trust_pickle=True). Plain data and tensors would not",
            PickleWarning,
            stacklevel=4,
        )


def _refuse_odd(item: WriteItem, tensor: torch.Tensor) -> None:
    assert item.tensor_data is not None
    fqn, chunk, dtype = item.index.fqn, item.tensor_data.chunk, item.tensor_data.properties.dtype
    if is_special(tensor) or tensor.is_meta:
        what = "has no values" if tensor.is_meta else f"is {tensor.layout}, quantized or nested"
        raise StateMismatchError(f"{fqn} {what}; a sharded checkpoint holds dense tensors only")
    if tuple(tensor.shape) != tuple(chunk.sizes) or tensor.dtype != dtype:
        raise StateMismatchError(
            f"{fqn} was planned as {dtype} {tuple(chunk.sizes)} and is {tensor.dtype} {tuple(tensor.shape)} now"
        )


def _plain_paths(paths: Any) -> dict[str, tuple[str | int, ...]]:
    """The planner's paths of names within the state dict, those of keys and positions."""
    if not isinstance(paths, Mapping):
        return {}
    return {
        str(fqn): tuple(path)
        for fqn, path in paths.items()
        if isinstance(path, tuple) and all(type(part) in (str, int) for part in path)
    }
