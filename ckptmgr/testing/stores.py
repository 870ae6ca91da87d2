"""How does code behave on a store that forgets, dies or is slow? `MemoryStore`, `CrashingStore`, `SlowStore`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import AlreadyExistsError, NotFoundError, StoreError
from ..store import Entry, Store, Writer
from ..store.arguments import as_bytes, checked_folder, checked_key

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Crash", "CrashingStore", "MemoryStore", "SlowStore"]


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

    def writer(self, key: str) -> Writer:
        return _MemoryWriter(self, checked_key(key))

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
        found = self.objects.get(checked_key(key))
        return None if found is None else Entry(key, len(found[0]), found[1])

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
    def __init__(self, store: MemoryStore, key: str) -> None:
        self._store, self._key = store, key
        self._pieces: list[bytes] | None = []

    def write(self, data: Buffer) -> None:
        self._open().append(bytes(as_bytes(data)))

    def commit(self) -> None:
        self._store.put(self._key, b"".join(self._open()))
        self._pieces = None

    def abort(self) -> None:
        self._pieces = None

    def _open(self) -> list[bytes]:
        if self._pieces is None:
            raise StoreError(f"the writer of {self._store.url}/{self._key} has ended; begin a new one")
        return self._pieces


class Crash(BaseException):
    """The process died here, as `kill -9` would have it: no handler of errors may see it as one."""


class _Around:
    """A store that is another one, but for what it does to its calls."""

    store: Store

    @property
    def url(self) -> str:
        return self.store.url

    @property
    def path(self) -> Path | None:
        return self.store.path

    @property
    def can_rename(self) -> bool:
        return self.store.can_rename


class CrashingStore(_Around):
    """Another store, until the `after`-th effect; there, and at every call after it, `Crash` is raised.

    Effects are `put`, `writer`, `write`, `commit`, `delete` (each key is one) and `rename`. The one
    that crashes is not carried out (`when="before"`) or is, but nobody hears of it (`when="after"`).
    `count` is the number of effects so far and `log` names them: (method, key). With `after=None`
    it only counts, so that a test can then crash at each.
    """

    def __init__(self, store: Store, after: int | None = None, when: Literal["before", "after"] = "before") -> None:
        self.store, self.after, self.when = store, after, when
        self.log: list[tuple[str, str]] = []
        self._dead = False
        self._lock = threading.RLock()

    @property
    def count(self) -> int:
        return len(self.log)

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        self.check()
        return self.store.get(key, start, end)

    def put(self, key: str, data: Buffer, *, create: bool = False) -> None:
        with self.effect("put", key):
            self.store.put(key, data, create=create)

    def writer(self, key: str) -> Writer:
        with self.effect("writer", key):
            return _CrashingWriter(self, key, self.store.writer(key))

    def list(self, folder: str = "", *, recursive: bool = False) -> list[Entry]:
        self.check()
        return self.store.list(folder, recursive=recursive)

    def stat(self, key: str) -> Entry | None:
        self.check()
        return self.store.stat(key)

    def delete(self, keys: Iterable[str]) -> None:
        self.check()
        for key in keys:
            with self.effect("delete", key):
                self.store.delete([key])

    def rename(self, source: str, target: str) -> None:
        with self.effect("rename", source):
            self.store.rename(source, target)

    def check(self) -> None:
        """Raises `Crash` when the crash has been."""
        if self._dead:
            raise Crash("a dead process does nothing more")

    def effect(self, method: str, key: str) -> _Effect:
        """A block that is one effect: counted, and crashed when it is its turn."""
        return _Effect(self, method, key)


class _Effect:
    def __init__(self, store: CrashingStore, method: str, key: str) -> None:
        self._store, self._method, self._key = store, method, key
        self._last = False

    def __enter__(self) -> None:
        with self._store._lock:
            self._store.check()
            self._store.log.append((self._method, self._key))
            self._last = self._store.count == self._store.after
            self._store._dead = self._last
        if self._last and self._store.when == "before":
            raise Crash(f"before {self._method} {self._key}")

    def __exit__(self, *raised: object) -> None:
        if self._last:
            raise Crash(f"after {self._method} {self._key}")


class _CrashingWriter:
    def __init__(self, store: CrashingStore, key: str, writer: Writer) -> None:
        self._store, self._key, self._writer = store, key, writer

    def write(self, data: Buffer) -> None:
        with self._store.effect("write", self._key):
            self._writer.write(data)

    def commit(self) -> None:
        with self._store.effect("commit", self._key):
            self._writer.commit()

    def abort(self) -> None:
        self._store.check()
        self._writer.abort()


class SlowStore(_Around):
    """Another store whose effects wait: `delay_s` seconds each, and until `gate` is set where one is given.

    A test holds a save in the background by a gate that it sets when it has seen enough; no sleep is needed.
    """

    def __init__(self, store: Store, delay_s: float = 0.0, gate: threading.Event | None = None) -> None:
        self.store, self.delay_s, self.gate = store, delay_s, gate
        self.waiting = threading.Event()  # set once an effect waits at the gate

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        return self.store.get(key, start, end)

    def put(self, key: str, data: Buffer, *, create: bool = False) -> None:
        self.wait()
        self.store.put(key, data, create=create)

    def writer(self, key: str) -> Writer:
        return _SlowWriter(self, self.store.writer(key))

    def list(self, folder: str = "", *, recursive: bool = False) -> list[Entry]:
        return self.store.list(folder, recursive=recursive)

    def stat(self, key: str) -> Entry | None:
        return self.store.stat(key)

    def delete(self, keys: Iterable[str]) -> None:
        self.wait()
        self.store.delete(keys)

    def rename(self, source: str, target: str) -> None:
        self.wait()
        self.store.rename(source, target)

    def wait(self) -> None:
        if self.delay_s:
            time.sleep(self.delay_s)
        if self.gate is not None:
            self.waiting.set()
            self.gate.wait()


class _SlowWriter:
    def __init__(self, store: SlowStore, writer: Writer) -> None:
        self._store, self._writer = store, writer

    def write(self, data: Buffer) -> None:
        self._store.wait()
        self._writer.write(data)

    def commit(self) -> None:
        self._store.wait()
        self._writer.commit()

    def abort(self) -> None:
        self._writer.abort()
