"""How does `dcp.load` read what `StoreWriter` wrote? Every byte checked, every element there, no pickle believed."""

from __future__ import annotations

import io
import logging
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from ..errors import CheckpointError, DamagedError, StateMismatchError
from ..formats.boxes import in_order
from ..formats.targets import Landing
from ..memory import address
from ..source import Source
from ..state.shards import boxes, local
from ..transfer import Segment
from .index import Index, read_index
from .place import Place
from .plain import plainly
from .state import segment

_log = logging.getLogger("ckptmgr.sharded")


class StoreReader(StorageReader):
    """Loads with `dcp.load` what `StoreWriter` saved, on any number of ranks:

        dcp.load(state_dict, storage_reader=StoreReader("s3://bucket/run/step-100", options={...}))

    Reads only what `StoreWriter` wrote, not other DCP folders. Digests are checked, and that every element of every
    tensor was read: `DamagedError`. A tensor of another dtype than the stored one is a `StateMismatchError`, or is
    cast with `casts=True`. Values that were pickled are not loaded unless `trust_pickle=True`. What fails on one
    rank is raised on all; put the call into `plain_errors()` to have it as an error of this library.
    """

    def __init__(
        self,
        url: str | Path,
        *,
        options: dict[str, Any] | None = None,
        casts: bool = False,
        trust_pickle: bool = False,
    ) -> None:
        super().__init__()
        self._options, self._casts, self._trusts = options, casts, trust_pickle
        self._place = Place.of(url, options)
        self._source: Source | None = None
        self._index = Index({})
        self._error: CheckpointError | None = None

    @property
    def checkpoint_id(self) -> str:
        return self._place.url

    @property
    def data_url(self) -> str:
        """The folder with the data, which on a local disk DCP's own `FileSystemReader` reads. Blocks. Raises
        `NotFoundError`."""
        _, manifest = self._place.open()
        return f"{self._place.url}/{manifest.nonce}"

    def reset(self, checkpoint_id: Any = None) -> None:
        """Another load begins; with `checkpoint_id` from another URL, with the same options."""
        if checkpoint_id:
            self._place = Place.of(checkpoint_id, self._options)

    def read_metadata(self) -> Metadata:
        # An error is raised by the next step: DCP would lose its class here.
        self._source, self._index, self._error = None, Index({}), None
        try:
            with plainly("the checkpoint can't be opened", DamagedError):
                self._source, _ = self._place.open()
                self._index = read_index(self._source)
        except CheckpointError as exc:
            self._error = exc
        return self._index.metadata()

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if self._error is not None:
            raise self._error

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        read = {item.storage_index.fqn for plan in plans for item in plan.items}
        if left := [fqn for fqn in (*self._index.tensors, *self._index.values) if fqn not in read]:
            more = f" and {len(left) - 10} more" if len(left) > 10 else ""
            _log.warning("sharded.load.left url=%s names=%s%s", self._place.url, ", ".join(left[:10]), more)
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        with plainly(f"{self._place.url} was not loaded", DamagedError):
            self._read(plan.items, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, str | Path)

    def _read(self, items: Sequence[ReadItem], planner: LoadPlanner) -> None:
        assert self._source is not None
        _refuse_uncovered(items, planner, self._index)
        landing = Landing()
        segments: dict[str, list[Segment]] = defaultdict(list)
        tensors: list[tuple[ReadItem, torch.Tensor, torch.Tensor]] = []
        values: list[tuple[ReadItem, bytearray]] = []
        for item in items:
            if item.type == LoadItemType.BYTE_IO:
                file, begin, length = self._index.values[item.storage_index.fqn]
                data = bytearray(length)
                values.append((item, data))
                segments[file].append((begin, begin + length, address(memoryview(data))))
            elif math.prod(item.lengths):
                target = local(planner.resolve_tensor(item).detach())
                taken = self._as_stored(item, target)
                stored = self._index.tensors[item.storage_index.fqn]
                assert item.storage_index.index is not None
                chunk = stored.chunks[item.storage_index.index]
                one = segment(landing, chunk.begin, chunk.sizes, item.storage_offsets, taken)
                segments[chunk.file].append(one)
                tensors.append((item, target, taken))
        landing.begin()
        self._source.scatter({file: in_order(of_file) for file, of_file in segments.items()})
        landing.end()
        for item, target, taken in tensors:
            if taken is not target:
                target.copy_(taken)
            planner.commit_tensor(item, target)
        for item, data in values:
            planner.load_bytes(item, io.BytesIO(self._checked(item.storage_index.fqn, bytes(data))))

    def _as_stored(self, item: ReadItem, target: torch.Tensor) -> torch.Tensor:
        """The target, or memory of the stored dtype that is cast into it. Raises `StateMismatchError`."""
        fqn = item.storage_index.fqn
        dtype = self._index.tensors[fqn].dtype
        if target.dtype == dtype:
            return target
        if not self._casts:
            raise StateMismatchError(
                f"{fqn} is {dtype} in the checkpoint and {target.dtype} here; pass StoreReader(casts=True) to have "
                "such tensors cast"
            )
        return torch.empty(target.shape, dtype=dtype, device=target.device)

    def _checked(self, fqn: str, data: bytes) -> bytes:
        """A value as the planner may unpickle it: written anew from what was loaded without running any code."""
        if self._trusts:
            return data
        try:
            value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as exc:  # torch raises nearly anything for a pickle that it does not trust
            raise StateMismatchError(
                f"{fqn} was pickled, and loading it runs code from the checkpoint: pass StoreReader(trust_pickle=True) "
                "if you trust where it comes from, or leave it out of the state dict"
            ) from exc
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue()


def _refuse_uncovered(items: Sequence[ReadItem], planner: LoadPlanner, index: Index) -> None:
    """Raises `DamagedError` naming a tensor of which not every element that belongs here is going to be read."""
    volumes: dict[str, int] = defaultdict(int)
    for item in items:
        volumes[item.dest_index.fqn] += math.prod(item.lengths)
    state = getattr(planner, "state_dict", None)  # of DCP's own planner and its kin
    for fqn, target in state.items() if isinstance(state, Mapping) else ():
        if fqn in index.tensors and isinstance(target, torch.Tensor) and type(target).__name__ != "ShardedTensor":
            wanted = sum(math.prod(sizes) for _, sizes in boxes(target))
            if volumes[fqn] != wanted:
                raise DamagedError(f"{fqn}: {volumes[fqn]:,} of the {wanted:,} elements that belong here would be read")
