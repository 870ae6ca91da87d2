"""How do large pieces reach and leave a file past the page cache, where the system lets them? And if not, how then?"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress

from .. import memory
from . import BLOCK
from .arguments import as_bytes

try:
    import fcntl
except ImportError:  # Windows
    _HAS_FCNTL = False
else:
    _HAS_FCNTL = True

LARGE = 1 << 20  # bytes; a smaller file gains nothing

_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_FALLOCATE = getattr(_LIBC, "fallocate64", None) or getattr(_LIBC, "fallocate", None)
_MOST_BUFFERS = 1024  # in one call; the same on every system
_REFUSED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def preallocate(fd: int, size: int) -> None:
    """Give a new file its blocks and its size at once, where the file system can without writing
    them. Raises `OSError` when there is no room for it; any other refusal changes nothing."""
    if _FALLOCATE is None:
        return
    try:
        allocate(fd, size)
    except OSError as exc:
        if exc.errno in _NO_ROOM:
            raise


def allocate(fd: int, size: int) -> None:
    """fallocate(2), which `os` has only in a form that writes the blocks where it has to. Raises `OSError`."""
    assert _FALLOCATE is not None
    while _FALLOCATE(ctypes.c_int(fd), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(size)):
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


def set_direct(fd: int, wanted: bool) -> bool:
    """Whether what is written to this descriptor from now on goes past the page cache, as wanted."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag or not _HAS_FCNTL:
        return not wanted
    try:
        others = fcntl.fcntl(fd, fcntl.F_GETFL) & ~flag
        fcntl.fcntl(fd, fcntl.F_SETFL, others | flag if wanted else others)
    except OSError:
        return False
    return True


def open_direct(path: str, fd: int) -> int | None:
    """A second descriptor of the file that is open under `fd`, which reads past the page cache, or
    None where the file system takes none, or has another file there by now."""
    flag = getattr(os, "O_DIRECT", 0)
    if not flag:
        return None
    with suppress(OSError):
        direct = os.open(path, os.O_RDONLY | flag | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if os.path.samestat(os.fstat(direct), os.fstat(fd)):
            return direct
        os.close(direct)
    return None


def is_refusal(exc: OSError) -> bool:
    """Whether a direct read or write was not taken for being one: the same may well go the plain way."""
    return exc.errno in _REFUSED


def is_aligned(view: memoryview) -> bool:
    """Whether a flat view can be the memory of a direct read or write. One that is read-only can't be asked."""
    return not view.readonly and memory.address(view) % BLOCK == 0


def write_at(fd: int, offset: int, view: memoryview, one_at_a_time: threading.Lock) -> None:
    """Write a flat view whole at its place. The lock is needed only where a place can't be named in one call."""
    while view:  # the system may take less than it is given
        if hasattr(os, "pwrite"):
            count = os.pwrite(fd, view, offset)
        else:  # Windows
            with one_at_a_time:
                os.lseek(fd, offset, os.SEEK_SET)
                count = os.write(fd, view)
        view, offset = view[count:], offset + count


def read_at(fd: int, start: int, views: Sequence[memoryview], one_at_a_time: threading.Lock) -> int:
    """Fill the views one after the other; the number of bytes, less than there is room only at the file's end."""
    left, done, first = [view for view in views if view.nbytes], 0, 0
    while first < len(left):
        group = left[first : first + _MOST_BUFFERS]
        if hasattr(os, "preadv"):
            count = os.preadv(fd, group, start + done)
        else:  # Windows
            with one_at_a_time, open(fd, "rb", buffering=0, closefd=False) as file:
                file.seek(start + done)
                count = file.readinto(group[0]) or 0
        if not count:
            break
        done += count
        while first < len(left) and count >= left[first].nbytes:
            count -= left[first].nbytes
            first += 1
        if count:  # the system may give less than it is asked for
            left[first] = as_bytes(left[first])[count:]
    return done
