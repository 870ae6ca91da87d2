"""What reads bytes that others may have written? Every entry point, as a function of bytes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

from ckptmgr import lease, owner
from ckptmgr.errors import CheckpointError, DamagedError
from ckptmgr.formats import open_format
from ckptmgr.formats.rank_files import read_part
from ckptmgr.formats.safetensors_layout import parse_header
from ckptmgr.formats.safetensors_single import SafetensorsReader
from ckptmgr.manifest import Manifest
from ckptmgr.pins import Pins
from ckptmgr.records import Records
from ckptmgr.repository import Repository
from ckptmgr.sharded.index import read_index
from ckptmgr.state.codec import decode, from_json
from ckptmgr.state.restore import materialize
from ckptmgr.testing import MemoryStore
from ckptmgr.testing.memory_files import MemoryFiles


def _files(name: str, data: bytes) -> MemoryFiles:
    """A checkpoint that holds this file and one of numbers."""
    files = MemoryFiles()
    files.data = {name: data, "m.safetensors": bytes(64)}
    files.seal()
    return files


def manifest(data: bytes) -> None:
    found = Manifest.from_json(data)
    assert Manifest.from_json(found.to_json()) == found


def _state(format: str) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        stored = open_format(format).open(_files("state.json", data))
        materialize(stored, list(stored.entries), stored.fetch, objects=None)

    read.__name__ = f"state of {format}"
    return read


def rank(data: bytes) -> None:
    read_part(_files("ranks/rank-00000.json", data), 0)


def shards(data: bytes) -> None:
    index = read_index(_files("shards.json", data))
    assert index.covers_all() == []


def header(data: bytes) -> None:
    found = parse_header(data, 8 + len(data) + 16)
    assert sum(one.end - one.begin for one in found.tensors.values()) == 16


def safetensors(data: bytes) -> None:
    SafetensorsReader(io.BytesIO(data), len(data), "x", "cpu").get_tensors()


def tree(data: bytes) -> None:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return
    try:
        decode(from_json(found))
    except RecursionError as exc:
        raise DamagedError("too deep") from exc  # as who calls it says


def _record(key: str) -> Callable[[bytes], None]:
    def read(data: bytes) -> None:
        store = MemoryStore()
        store.put(key, data)
        Pins(store).read()
        Records(store).damaged()
        Records(store).asides("trash")
        lease.claims(store)
        repository = Repository(store)
        repository.pointer.read()
        repository.sweep()
        repository.infos()

    read.__name__ = key
    return read


def claim(data: bytes) -> None:
    found = owner.parse(data)
    assert owner.attempt_of(found) >= 0
    owner.is_alive(found)
    str(owner.held("here", found))


def record_name(data: bytes) -> None:
    name = data.decode("utf-8", "surrogateescape").replace("/", "")
    for folder in ("trash", "pins", "damaged", "drafts", "lease", "archive"):
        store = MemoryStore()
        try:
            store.put(f".ckptmgr/{folder}/{name}", b"{}")
        except CheckpointError:
            return
        Repository(store).sweep()
        Repository(store).infos()
        lease.claims(store)


PARSERS: list[Callable[[bytes], Any]] = [
    manifest,
    _state("safetensors"),
    _state("torch"),
    _state("dcp"),
    rank,
    shards,
    header,
    safetensors,
    tree,
    claim,
    record_name,
    _record(".ckptmgr/pins/step-00000001.abc.json"),
    _record(".ckptmgr/trash/step-00000001.abc.json"),
    _record(".ckptmgr/damaged/step-00000001.abc.json"),
    _record("step-00000001/manifest.json"),
    _record("latest"),
]


def only_ours(parse: Callable[[bytes], Any], data: bytes) -> bool:
    """Whether it parses. Any error that is not of this library comes out."""
    try:
        parse(data)
    except CheckpointError:
        return False
    return True
