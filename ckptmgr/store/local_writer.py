"""How does a large file come into a folder? Its pieces in any order, and published when it is whole."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from .. import memory
from ..errors import StoreError
from . import BLOCK
from .arguments import as_bytes
from .direct_io import LARGE, is_aligned, is_refusal, preallocate, set_direct, write_at
from .disk import InUse, TempFile, begin_to_sync, edge
from .placement import Placement, check_size

if TYPE_CHECKING:
    from typing_extensions import Buffer

_BOUNCE = memory.HUGE_PAGE  # bytes


class LocalWriter:
    """A `Writer` of a file that is whole, and durable if it `is_synced`, after `publish(temp, target)`. Gone when
    dropped unended.

    Pieces of a large file go past the page cache where the file system lets them. Once it has
    refused one, the rest goes the plain way, with the same result.
    """

    def __init__(
        self,
        temp: TempFile,
        target: str,
        size: int | None,
        publish: Callable[[TempFile, str], None],
        *,
        is_synced: bool,
    ) -> None:
        self._temp, self._target, self._size, self._publish = temp, target, size, publish
        self._is_synced = is_synced
        self._in_use = InUse(temp.discard, f"the writer of {target} has ended; begin a new one")
        self._lock = threading.Lock()
        self._count = 0  # bytes that came in order
        self._placement = None if size is None else Placement(size, target)
        self._is_direct: bool | None = None  # until the first piece
        self._bounces: list[memoryview] = []
        try:
            if size is not None and size >= LARGE:
                preallocate(temp.fd, size + -size % BLOCK)
        except OSError:
            temp.discard()
            raise

    @property
    def is_positional(self) -> bool:
        return self._placement is not None

    def write(self, data: Buffer) -> None:
        view = as_bytes(data)
        with self._in_use, edge("write", self._target, self._size or self._count + view.nbytes):
            if self._placement:
                raise StoreError(f"pieces of {self._target} were placed: place the others, too, or begin a new one")
            self._temp.write(view)
            self._count += view.nbytes
            self._begin_to_sync(self._count)

    def write_at(self, offset: int, data: Buffer) -> None:
        view = as_bytes(data)
        with self._in_use, edge("write", self._target, self._size):
            if self._placement is None or self._count:
                why = "was begun without its size" if self._placement is None else "is being written in order"
                raise StoreError(f"{self._target} {why}: nothing can be placed in it")
            self._placement.check(offset, view.nbytes)
            if self._goes_direct():
                self._write_direct(offset, view)
            else:
                write_at(self._temp.fd, offset, view, self._lock)
            self._placement.add(offset, view.nbytes)
            self._begin_to_sync(view.nbytes)

    def commit(self) -> None:
        with self._in_use, edge("write", self._target, self._size or self._count):
            try:
                if self._placement:
                    self._placement.check_whole()
                else:
                    check_size(self._count, self._size, self._target)
                self._trim()
                self._publish(self._temp, self._target)
            finally:
                self.abort()

    def abort(self) -> None:
        self._in_use.end()

    def _begin_to_sync(self, written: int) -> None:
        """If the whole file is written: by one call, or in order."""
        if self._is_synced and written == self._size:
            begin_to_sync(self._temp.fd)

    def _goes_direct(self) -> bool:
        with self._lock:
            if self._is_direct is None:
                self._is_direct = (self._size or 0) >= LARGE and set_direct(self._temp.fd, True)
            return self._is_direct

    def _write_direct(self, offset: int, view: memoryview) -> None:
        """What is aligned goes as it is; the rest, and the last bytes of the file, from a block of ours."""
        whole = view.nbytes - view.nbytes % BLOCK if is_aligned(view) else 0
        self._try_direct(offset, view[:whole])
        if whole == view.nbytes:
            return
        bounce = self._bounces.pop() if self._bounces else memory.buffer(_BOUNCE)
        for begin in range(whole, view.nbytes, _BOUNCE):
            piece = view[begin : begin + _BOUNCE]
            bounce[: piece.nbytes] = piece
            # What is more than the piece, whatever it is, lies behind the end of the file, and is cut off.
            self._try_direct(offset + begin, bounce[: piece.nbytes + -piece.nbytes % BLOCK])
        self._bounces.append(bounce)

    def _try_direct(self, offset: int, view: memoryview) -> None:
        try:
            write_at(self._temp.fd, offset, view, self._lock)
        except OSError as exc:
            if not is_refusal(exc):
                raise
            with self._lock:
                self._is_direct = False
                set_direct(self._temp.fd, False)
            write_at(self._temp.fd, offset, view, self._lock)

    def _trim(self) -> None:
        """Cut off what was allocated or written behind the end."""
        size = self._count if self._size is None else self._size
        if os.fstat(self._temp.fd).st_size > size:
            os.ftruncate(self._temp.fd, size)
        check_size(os.fstat(self._temp.fd).st_size, size, self._target)
