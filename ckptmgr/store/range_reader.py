"""How is an object read where only ranges can be had, as new bytes? Each read is one range, copied to its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import StoreError
from .arguments import as_bytes

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from . import Store


class RangeReader:
    """A `Reader` over `Store.get`; `in_memory` is whether that gets its bytes from host memory."""

    def __init__(self, store: Store, key: str, *, in_memory: bool = False) -> None:
        self._store, self._key, self._in_memory = store, key, in_memory
        self._is_closed = False

    def is_cached(self, start: int, end: int) -> bool:
        self._check_open()
        return self._in_memory

    def read_into(self, start: int, buffers: Sequence[Buffer]) -> int:
        self._check_open()
        views = [view for view in map(as_bytes, buffers) if view]
        data = memoryview(self._store.get(self._key, start, start + sum(view.nbytes for view in views)))
        done = 0
        for view in views:
            part = data[done : done + view.nbytes]
            view[: part.nbytes] = part
            done += part.nbytes
        return done

    def close(self) -> None:
        self._is_closed = True

    def _check_open(self) -> None:
        if self._is_closed:
            raise StoreError(f"the reader of {self._store.url}/{self._key} is closed; open a new one")
