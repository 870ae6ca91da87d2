"""What happens when a writer is frozen between two calls, and goes on after others have acted? `PausingStore`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..store import Entry, Reader, Store, Writer

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["PausingStore"]


class PausingStore:
    """Another store, before whose `at`-th call `meanwhile` is called, once.

    Every call counts, of readers and writers too, but for their `close`, `abort` and what costs nothing. What
    `meanwhile` does is done while the caller stands still: it may let another writer take over on `store`, or
    stop this process by a signal. `count` is the number of calls so far and `log` names them: (method, key).
    With `at=None` it only counts, so that a test can then freeze at each.
    """

    def __init__(self, store: Store, at: int | None = None, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.store, self.at, self.meanwhile = store, at, meanwhile
        self.log: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        return len(self.log)

    @property
    def url(self) -> str:
        return self.store.url

    @property
    def path(self) -> Path | None:
        return self.store.path

    @property
    def can_rename(self) -> bool:
        return self.store.can_rename

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        self.pause("get", key)
        return self.store.get(key, start, end)

    def put(self, key: str, data: Buffer, *, create: bool = False) -> None:
        self.pause("put", key)
        self.store.put(key, data, create=create)

    def reader(self, key: str) -> Reader:
        self.pause("reader", key)
        return _PausingReader(self, key, self.store.reader(key))

    def writer(self, key: str, size: int | None = None) -> Writer:
        self.pause("writer", key)
        return _PausingWriter(self, key, self.store.writer(key, size))

    def copy(self, source: str, target: str) -> bool:
        self.pause("copy", target)
        return self.store.copy(source, target)

    def list(self, folder: str = "", *, recursive: bool = False) -> list[Entry]:
        self.pause("list", folder)
        return self.store.list(folder, recursive=recursive)

    def stat(self, key: str) -> Entry | None:
        self.pause("stat", key)
        return self.store.stat(key)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.pause("delete", key)
            self.store.delete([key])

    def rename(self, source: str, target: str) -> None:
        self.pause("rename", source)
        self.store.rename(source, target)

    def pause(self, method: str, key: str) -> None:
        """Count a call, and stand still when it is its turn."""
        with self._lock:
            self.log.append((method, key))
            is_turn = self.count == self.at
        if is_turn:
            self.meanwhile()


class _PausingReader:
    def __init__(self, store: PausingStore, key: str, reader: Reader) -> None:
        self._store, self._key, self._reader = store, key, reader

    def is_cached(self, start: int, end: int) -> bool:
        return self._reader.is_cached(start, end)

    def read_into(self, start: int, buffers: Sequence[Buffer]) -> int:
        self._store.pause("read_into", self._key)
        return self._reader.read_into(start, buffers)

    def close(self) -> None:
        self._reader.close()


class _PausingWriter:
    def __init__(self, store: PausingStore, key: str, writer: Writer) -> None:
        self._store, self._key, self._writer = store, key, writer

    @property
    def is_positional(self) -> bool:
        return self._writer.is_positional

    def write(self, data: Buffer) -> None:
        self._store.pause("write", self._key)
        self._writer.write(data)

    def write_at(self, offset: int, data: Buffer) -> None:
        self._store.pause("write_at", self._key)
        self._writer.write_at(offset, data)

    def commit(self) -> None:
        self._store.pause("commit", self._key)
        self._writer.commit()

    def abort(self) -> None:
        self._writer.abort()
