"""Which bytes of a file does the system hold in memory already, and which will it soon? Asked without reading any."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from contextlib import suppress

from .. import memory

_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
# Asked without giving way to other Python threads: to get the turn back takes ten times as long as the answer.
_ASK = ctypes.PyDLL(None).syscall if sys.platform == "linux" else None
_CACHESTAT = 451  # the number of this system call on every architecture that matters
_SAMPLE = 64  # pages
_OVERLAY = 0x794C7630  # what fstatfs(2) calls an overlay
_STATFS = 256  # bytes; more than the answer takes anywhere


class _Range(ctypes.Structure):
    _fields_ = (("start", ctypes.c_uint64), ("length", ctypes.c_uint64))


def is_resident(fd: int, start: int, end: int) -> bool:
    """Whether these bytes of a file are in the page cache, as far as a few pages from their middle can tell: to
    look at all of them takes a tenth of the time that it takes to copy them. True where nobody knows."""
    if _LIBC is None or _ASK is None:
        return True
    spare = max(0, end - start - _SAMPLE * mmap.PAGESIZE) // 2
    start, end = start + spare, end - spare
    asked, answer = _Range(start, end - start), (ctypes.c_uint64 * 5)()
    is_unknown = _ASK(
        ctypes.c_long(_CACHESTAT), ctypes.c_int(fd), ctypes.byref(asked), ctypes.byref(answer), ctypes.c_uint(0)
    )
    pages = -(-end // mmap.PAGESIZE) - start // mmap.PAGESIZE
    if not is_unknown and (answer[0] or not _is_overlay(fd)):
        return int(answer[0]) >= pages * 15 // 16
    # A kernel before 6.5, or an overlay, which holds nothing itself: the file below it does. mincore
    # knows that, but tells the truth to the owner of the file only, and costs several times as much.
    if os.fstat(fd).st_uid != os.geteuid():
        return bool(is_unknown)
    begin = start - start % mmap.ALLOCATIONGRANULARITY
    length = end - begin
    # Private and writable only because Python gives out the address of nothing else. No page is touched.
    with mmap.mmap(fd, length, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE, offset=begin) as area:
        sample = (ctypes.c_ubyte * -(-length // mmap.PAGESIZE))()
        place = ctypes.c_void_p(memory.address(memoryview(area)))
        return bool(_LIBC.mincore(place, ctypes.c_size_t(length), sample)) or 0 not in sample


def ask_for(fd: int, start: int, end: int) -> None:
    """Have the system bring these bytes of a file into the page cache: in larger pieces, and more of them at a time,
    than for who reads them in order. Does not wait for them. Does nothing where the system knows no such thing."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # it only makes things faster
            os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_WILLNEED)


def _is_overlay(fd: int) -> bool:
    assert _LIBC is not None
    answer = (ctypes.c_ubyte * _STATFS)()
    if _LIBC.fstatfs(ctypes.c_int(fd), answer):
        return True  # who knows
    return int.from_bytes(bytes(answer[: ctypes.sizeof(ctypes.c_long)]), sys.byteorder) == _OVERLAY
