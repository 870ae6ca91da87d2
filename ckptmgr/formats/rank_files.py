"""Where is what differs from rank to rank? In one small file per rank, alike in every format."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from typing import Any

import torch

from ..errors import DamagedError
from ..state.codec import from_json
from ..state.snapshot import RankPart, StoredPart, StoredState, StoredTensor, Tree
from . import FileSource
from .state_file import MAX_JSON_SIZE, Whole, parse_json, parse_objects, revive
from .targets import put, refuse_misfit

# 1: only the generators; Python's as 625 numbers. 2: entries, notes and tensors of the rank besides.
RANK_VERSION = 2


def rank_name(rank: int) -> str:
    return f"ranks/rank-{rank:05}.json"


def _objects_name(rank: int) -> str:
    return f"ranks/rank-{rank:05}.pt"


def rank_bodies(ranks: Mapping[int, RankPart]) -> dict[str, Whole]:
    """The files of the ranks' parts."""
    bodies = {}
    for rank, part in ranks.items():
        body: dict[str, Any] = {"format_version": RANK_VERSION, "rng": part.rng}
        if part.entries:
            body |= {"entries": part.entries, "notes": part.notes, "tensors": part.tensors}
        bodies[rank_name(rank)] = Whole(f"{json.dumps(body, separators=(',', ':'), allow_nan=False)}\n".encode())
        if part.objects is not None:
            bodies[_objects_name(rank)] = Whole(part.objects)
    return bodies


def read_part(source: FileSource, rank: int) -> StoredPart | None:
    """What a rank saved for itself, or None when it saved nothing. Raises `DamagedError`."""
    name, objects_name = rank_name(rank), _objects_name(rank)
    sizes = {one: source.files[one].size for one in (name, objects_name) if one in source.files}
    if sizes.get(name, 0) > MAX_JSON_SIZE:
        del sizes[name]
    buffers = {one: bytearray(size) for one, size in sizes.items()}
    # One call on every rank, whatever it finds: a source may read for several ranks at once.
    source.scatter({one: [(0, sizes[one], _into(data))] for one, data in buffers.items() if data})
    if name not in source.files:
        return None
    if name not in buffers:
        raise DamagedError(f"{name} is {source.files[name].size:,} bytes, more than any {name}")
    body = parse_json(buffers[name], name, {}, RANK_VERSION)
    try:
        tensors = list(map(from_json, body.get("tensors", [])))
        stored = list(map(_stored, tensors))
        entries = {entry: revive(tree, stored, name) for entry, tree in body.get("entries", {}).items()}
        rng, notes = from_json(body["rng"]), dict(body.get("notes", {}))
    except (DamagedError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as exc:
        raise DamagedError(f"{name} does not parse: {exc!r}") from exc
    pickled = buffers.get(objects_name)
    objects = dict[str, Any] if pickled is None else partial(_unpickled, pickled, objects_name)
    return StoredPart(rng, entries, notes, dict(zip(stored, tensors, strict=True)), objects)


def _into(buffer: bytearray) -> Callable[[int, memoryview], None]:
    def take(begin: int, data: memoryview) -> None:
        buffer[begin : begin + len(data)] = data

    return take


def _unpickled(data: bytearray, name: str) -> dict[str, Any]:
    return parse_objects(io.BytesIO(data), name)


def _stored(tensor: torch.Tensor) -> StoredTensor:
    is_parameter = isinstance(tensor, torch.nn.Parameter)
    return StoredTensor(tuple(tensor.shape), tensor.dtype, None, None, tensor.requires_grad, is_parameter)


class OwnState:
    """A checkpoint as one rank finds it: what all ranks share and, beside it, what is its own."""

    def __init__(self, shared: StoredState, own: StoredPart | None) -> None:
        self.shared, self._own = shared, own
        self.entries: Mapping[str, Tree] = {**shared.entries, **(own.entries if own else {})}
        self.notes: Mapping[str, dict[str, Any]] = {**shared.notes, **(own.notes if own else {})}

    def part(self, rank: int) -> StoredPart | None:
        return self.shared.part(rank)

    def objects(self) -> Mapping[str, Any]:
        """See `StoredState.objects`."""
        return _Objects(self._own.objects() if self._own else {}, self.shared.objects)

    def fetch(
        self,
        wanted: Mapping[StoredTensor, torch.Tensor | None],
        device: str | torch.device = "cpu",
        addresses: Mapping[StoredTensor, int] = {},
    ) -> dict[StoredTensor, torch.Tensor]:
        """See `StoredState.fetch`."""
        return self.fetch_through(partial(self.shared.fetch, addresses=addresses), wanted, device)

    def fetch_through(
        self,
        fetch: Callable[..., dict[StoredTensor, torch.Tensor]],
        wanted: Mapping[StoredTensor, torch.Tensor | None],
        device: str | torch.device = "cpu",
    ) -> dict[StoredTensor, torch.Tensor]:
        """The same with another way to the tensors that are shared."""
        own = self._own.tensors if self._own else {}
        if not own:
            return fetch(wanted, device)
        here = {one: target for one, target in wanted.items() if one in own}
        for one, target in here.items():
            if target is not None:
                refuse_misfit(one, target)
        found = fetch({one: target for one, target in wanted.items() if one not in own}, device)
        return found | {one: put(own[one], target, device) for one, target in here.items()}


class _Objects(Mapping[str, Any]):
    """What was pickled, by path. What is shared is read when one is asked for that is not the rank's own:
    then all ranks ask."""

    def __init__(self, own: Mapping[str, Any], shared: Callable[[], Mapping[str, Any]]) -> None:
        self._own, self._read_shared = own, shared

    @cached_property
    def _shared(self) -> Mapping[str, Any]:
        return self._read_shared()

    def __getitem__(self, path: str) -> Any:
        return self._own[path] if path in self._own else self._shared[path]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._shared, **self._own})

    def __len__(self) -> int:
        return len({**self._shared, **self._own})
