"""How does code behave on a store that keeps its promises and forgets everything? `MemoryStore`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AlreadyExistsError, NotFoundError, StoreError
from ..store import Entry, Reader, Writer
from ..store.arguments import as_bytes, checked_folder, checked_key
from ..store.placement import Placement, check_size
from ..store.range_reader import RangeReader

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["MemoryStore"]


class MemoryStore:
    """A `Store` in this process's memory, which keeps every promise of one but durability.

    `objects` maps each key to its bytes and the second it was written. A pickled copy holds the
    objects of its moment and then goes its own way.
    """

    def __init__(self, url: str = "memory-store:", *, can_rename: bool = True) -> None:
        self.url = url
        self.path: Path | None = None
        self.can_rename = can_rename
        self.objects: dict[str, tuple[bytes, float]] = {}
        self._lock = threading.RLock()

    def __repr__(self) -> str:
        return f"MemoryStore({self.url!r}, can_rename={self.can_rename})"

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            return {**self.__dict__, "objects": dict(self.objects), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        found = self.objects.get(checked_key(key))
        if found is None:
            raise NotFoundError(f"{self.url}/{key} does not exist")
        return found[0][start:end]

    def put(self, key: str, data: Buffer, *, create: bool = False) -> None:
        body = bytes(as_bytes(data))
        with self._lock:
            if create and checked_key(key) in self.objects:
                raise AlreadyExistsError(f"{self.url}/{key} exists already and was left as it is")
            self.objects[checked_key(key)] = (body, time.time())

    def reader(self, key: str, *, by_many: bool = False) -> Reader:
        return RangeReader(self, checked_key(key), in_memory=True)

    def writer(self, key: str, size: int | None = None) -> Writer:
        return _MemoryWriter(self, checked_key(key), size)

    def copy(self, source: str, target: str) -> bool:
        with self._lock:
            found = self.objects.get(checked_key(source))
            if found is None:
                raise NotFoundError(f"{self.url}/{source} does not exist")
            if checked_key(target) in self.objects:
                raise AlreadyExistsError(f"{self.url}/{target} exists already and was left as it is")
            self.objects[target] = (found[0], time.time())
        return True

    def folders(self, folder: str = "") -> list[str]:
        return [entry.name for entry in self.list(folder) if entry.is_folder]

    def list(self, folder: str = "", *, recursive: bool = False) -> list[Entry]:
        start = f"{checked_folder(folder)}/" if folder else ""
        entries: dict[str, Entry] = {}
        with self._lock:
            for key, (data, modified) in self.objects.items():
                if key.startswith(start):
                    name, below, _ = key[len(start) :].partition("/")
                    entry = Entry(key, len(data), modified)
                    if below and not recursive:
                        entry = Entry(start + name, is_folder=True)
                    entries[entry.key] = entry
        return sorted(entries.values(), key=lambda entry: entry.key)

    def stat(self, key: str) -> Entry | None:
        name = checked_key(key.removesuffix("/"))
        if key.endswith("/"):
            with self._lock:
                return Entry(name, is_folder=True) if any(k.startswith(key) for k in self.objects) else None
        found = self.objects.get(name)
        return None if found is None else Entry(name, len(found[0]), found[1])

    def delete(self, keys: Iterable[str]) -> None:
        with self._lock:
            for key in keys:
                checked_key(key.removesuffix("/"))
                gone = [k for k in self.objects if k.startswith(key)] if key.endswith("/") else [key]
                for each in gone:
                    self.objects.pop(each, None)

    def rename(self, source: str, target: str) -> None:
        old, new = f"{checked_key(source)}/", f"{checked_key(target)}/"
        if not self.can_rename:
            raise StoreError(f"folders can't be renamed at {self.url}")
        with self._lock:
            if any(key.startswith(new) or key == target for key in self.objects):
                raise AlreadyExistsError(f"{self.url}/{target} exists already; {source} was not renamed")
            if not (moving := [key for key in self.objects if key.startswith(old)]):
                raise NotFoundError(f"{self.url}/{source} is not there to be renamed to {target}")
            for key in moving:
                self.objects[new + key[len(old) :]] = self.objects.pop(key)


class _MemoryWriter:
    def __init__(self, store: MemoryStore, key: str, size: int | None) -> None:
        self._store, self._key, self._size = store, key, size
        self._name = f"{store.url}/{key}"
        self._placement = None if size is None else Placement(size, self._name)
        self._data: bytearray | None = bytearray()

    @property
    def is_positional(self) -> bool:
        return self._placement is not None

    def write(self, data: Buffer) -> None:
        whole = self._open()
        if self._placement:
            raise StoreError(f"pieces of {self._name} were placed: place the others, too, or begin a new one")
        whole += as_bytes(data)

    def write_at(self, offset: int, data: Buffer) -> None:
        whole, view = self._open(), as_bytes(data)
        if self._placement is None or self._size is None:
            raise StoreError(f"{self._name} was begun without its size: nothing can be placed in it")
        self._placement.check(offset, view.nbytes)
        with self._store._lock:
            if whole and not self._placement:
                raise StoreError(f"{self._name} is being written in order: nothing can be placed in it")
            whole += bytes(self._size - len(whole))
            whole[offset : offset + view.nbytes] = view
            self._placement.add(offset, view.nbytes)

    def commit(self) -> None:
        whole = self._open()
        if self._placement:
            self._placement.check_whole()
        else:
            check_size(len(whole), self._size, self._name)
        self._store.put(self._key, whole)
        self._data = None

    def abort(self) -> None:
        self._data = None

    def _open(self) -> bytearray:
        if self._data is None:
            raise StoreError(f"the writer of {self._name} has ended; begin a new one")
        return self._data
