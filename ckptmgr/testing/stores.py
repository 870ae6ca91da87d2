"""How does code behave on a store that dies or is slow? `CrashingStore`, `SlowStore`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..store import Entry, Reader, Store, Writer

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Crash", "CrashingStore", "SlowStore"]


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

    Effects are `put`, `copy`, `writer`, `write`, `write_at`, `commit`, `delete` (each key is one) and `rename`. The one
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

    def reader(self, key: str) -> Reader:
        self.check()
        return _CrashingReader(self, self.store.reader(key))

    def writer(self, key: str, size: int | None = None) -> Writer:
        with self.effect("writer", key):
            return _CrashingWriter(self, key, self.store.writer(key, size))

    def copy(self, source: str, target: str) -> bool:
        with self.effect("copy", target):
            return self.store.copy(source, target)

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


class _CrashingReader:
    def __init__(self, store: CrashingStore, reader: Reader) -> None:
        self._store, self._reader = store, reader

    def is_cached(self, start: int, end: int) -> bool:
        self._store.check()
        return self._reader.is_cached(start, end)

    def read_into(self, start: int, buffers: Sequence[Buffer]) -> int:
        self._store.check()
        return self._reader.read_into(start, buffers)

    def close(self) -> None:
        self._reader.close()


class _CrashingWriter:
    def __init__(self, store: CrashingStore, key: str, writer: Writer) -> None:
        self._store, self._key, self._writer = store, key, writer

    @property
    def is_positional(self) -> bool:
        return self._writer.is_positional

    def write(self, data: Buffer) -> None:
        with self._store.effect("write", self._key):
            self._writer.write(data)

    def write_at(self, offset: int, data: Buffer) -> None:
        with self._store.effect("write_at", self._key):
            self._writer.write_at(offset, data)

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

    def reader(self, key: str) -> Reader:
        return self.store.reader(key)

    def writer(self, key: str, size: int | None = None) -> Writer:
        return _SlowWriter(self, self.store.writer(key, size))

    def copy(self, source: str, target: str) -> bool:
        self.wait()
        return self.store.copy(source, target)

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

    @property
    def is_positional(self) -> bool:
        return self._writer.is_positional

    def write(self, data: Buffer) -> None:
        self._store.wait()
        self._writer.write(data)

    def write_at(self, offset: int, data: Buffer) -> None:
        self._store.wait()
        self._writer.write_at(offset, data)

    def commit(self) -> None:
        self._store.wait()
        self._writer.commit()

    def abort(self) -> None:
        self._writer.abort()
