"""How are many bytes read from a file? Out of the page cache where they are in it, past it where they are not.

But bytes that several processes of a machine read at a time, as the ranks of a job do, go through the page
cache: past it each of them would have them from the disk.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import BLOCK
from .arguments import as_bytes
from .direct_io import LARGE, is_aligned, is_refusal, open_direct, read_at
from .disk import InUse, edge
from .page_cache import ask_for, is_resident

if TYPE_CHECKING:
    from typing_extensions import Buffer


class LocalReader:
    """A `Reader` of the file that is open under `fd`, which it closes. Also closed when dropped. For `by_many`
    see `Store.reader`."""

    def __init__(self, fd: int, path: str, *, by_many: bool = False) -> None:
        self._fd, self._path, self._by_many = fd, path, by_many
        self._size = os.fstat(fd).st_size
        self._direct = open_direct(path, fd) if self._size >= LARGE and not by_many else None
        self._goes_direct = self._direct is not None
        self._lock = threading.Lock()
        closing = weakref.finalize(self, _close, fd, self._direct)
        self._in_use = InUse(closing, f"the reader of {path} is closed; open a new one")

    def is_cached(self, start: int, end: int) -> bool:
        """True, too, where the page cache is the only way, and more memory would only be a detour."""
        with self._in_use, edge("read", self._path):
            if self._by_many:
                ask_for(self._fd, start, end)
            return not self._goes_direct or self._is_resident(start, end)

    def read_into(self, start: int, buffers: Sequence[Buffer]) -> int:
        views = [memoryview(buffer) for buffer in buffers]
        with self._in_use, edge("read", self._path):
            done = self._read_direct(start, as_bytes(views[0])) if len(views) == 1 else 0
            if done:
                views = [as_bytes(views[0])[done:]]
            return done + read_at(self._fd, start + done, views, self._lock)

    def close(self) -> None:
        self._in_use.end()

    def _is_resident(self, start: int, end: int) -> bool:
        end = min(end, self._size)
        return start >= end or is_resident(self._fd, start, end)

    def _read_direct(self, start: int, view: memoryview) -> int:
        """How many bytes came past the page cache: all, the first ones, or none where it is not the way."""
        if not self._goes_direct or self._direct is None:
            return 0
        whole = view.nbytes // BLOCK * BLOCK  # what is left over at the file's end is no way for it
        if start % BLOCK or not whole or not is_aligned(view) or self._is_resident(start, start + whole):
            return 0
        try:
            return os.preadv(self._direct, [view[:whole]], start)
        except OSError as exc:
            if not is_refusal(exc):
                raise
            self._goes_direct = False
            return 0


def _close(fd: int, direct: int | None) -> None:
    for each in (fd, direct):
        if each is not None:
            os.close(each)
