"""How does each call of a store, and of its readers and writers, go by one place? `StoreAround`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from ..store import Entry, Reader, Store, Writer

if TYPE_CHECKING:
    from typing_extensions import Buffer


class StoreAround:
    """A store that is another one, but that each call is made within `turn(method, key)`: those of readers and
    writers, too, each key of a `delete` by itself, and all but properties and the `close` of a reader."""

    store: Store

    def turn(self, method: str, key: str) -> AbstractContextManager[None]:
        """The block in which a call is made."""
        raise NotImplementedError

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
        with self.turn("get", key):
            return self.store.get(key, start, end)

    def put(self, key: str, data: Buffer, *, create: bool = False) -> None:
        with self.turn("put", key):
            self.store.put(key, data, create=create)

    def reader(self, key: str, *, by_many: bool = False) -> Reader:
        with self.turn("reader", key):
            return _ReaderAround(self, key, self.store.reader(key, by_many=by_many))

    def writer(self, key: str, size: int | None = None) -> Writer:
        with self.turn("writer", key):
            return _WriterAround(self, key, self.store.writer(key, size))

    def copy(self, source: str, target: str) -> bool:
        with self.turn("copy", target):
            return self.store.copy(source, target)

    def folders(self, folder: str = "") -> list[str]:
        with self.turn("folders", folder):
            return self.store.folders(folder)

    def list(self, folder: str = "", *, recursive: bool = False) -> list[Entry]:
        with self.turn("list", folder):
            return self.store.list(folder, recursive=recursive)

    def stat(self, key: str) -> Entry | None:
        with self.turn("stat", key):
            return self.store.stat(key)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            with self.turn("delete", key):
                self.store.delete([key])

    def rename(self, source: str, target: str) -> None:
        with self.turn("rename", source):
            self.store.rename(source, target)


class _ReaderAround:
    def __init__(self, store: StoreAround, key: str, reader: Reader) -> None:
        self._store, self._key, self._reader = store, key, reader

    def is_cached(self, start: int, end: int) -> bool:
        with self._store.turn("is_cached", self._key):
            return self._reader.is_cached(start, end)

    def read_into(self, start: int, buffers: Sequence[Buffer]) -> int:
        with self._store.turn("read_into", self._key):
            return self._reader.read_into(start, buffers)

    def close(self) -> None:
        self._reader.close()


class _WriterAround:
    def __init__(self, store: StoreAround, key: str, writer: Writer) -> None:
        self._store, self._key, self._writer = store, key, writer

    @property
    def is_positional(self) -> bool:
        return self._writer.is_positional

    def write(self, data: Buffer) -> None:
        with self._store.turn("write", self._key):
            self._writer.write(data)

    def write_at(self, offset: int, data: Buffer) -> None:
        with self._store.turn("write_at", self._key):
            self._writer.write_at(offset, data)

    def commit(self) -> None:
        with self._store.turn("commit", self._key):
            self._writer.commit()

    def abort(self) -> None:
        with self._store.turn("abort", self._key):
            self._writer.abort()
