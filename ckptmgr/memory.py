"""Where do bytes lie in this machine's memory? Buffers on page boundaries, in huge pages where the system has them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

from .errors import StoreError

HUGE_PAGE = 2 << 20  # bytes

_WIPE_ON_FORK = 18  # MADV_WIPEONFORK of Linux. Not DONTFORK: the child would unmap what it has put there since
_ADVICE = [mmap.MADV_HUGEPAGE, _WIPE_ON_FORK] if sys.platform == "linux" and hasattr(mmap, "MADV_HUGEPAGE") else []
_CGROUP = Path("/sys/fs/cgroup")


def buffer(size: int) -> memoryview:
    """Fresh memory of `size` bytes that begins at a page boundary; freed when nothing refers to it.

    In huge pages where the system offers them: a page fault per 2 MiB in the place of 512 of them
    makes the first use four times as fast. A forked child does not share it: else every page written
    after the fork would be copied first; it finds zeros there. Raises `MemoryError`.
    """
    try:
        area = mmap.mmap(-1, max(size, 1), **({} if sys.platform == "win32" else {"flags": _PRIVATE}))
    except (OSError, ValueError) as exc:
        raise MemoryError(f"no {size:,} bytes of memory") from exc
    for advice in _ADVICE if size >= HUGE_PAGE else ():
        with contextlib.suppress(OSError):  # a kernel that does not know it; it only makes things faster
            area.madvise(advice)
    return memoryview(area)[:size]


def use_huge_pages(begin: int, size: int) -> None:
    """Ask for huge pages in the `size` bytes from an address on, which nobody has used yet, for the
    reason given at `buffer`. Does nothing where the system has none."""
    inner = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
    if _madvise is not None and (size := begin + size - inner) > 0:
        _madvise(inner, size, mmap.MADV_HUGEPAGE)  # it only makes things faster, so a refusal is no error


_madvise = None
if hasattr(mmap, "MADV_HUGEPAGE"):
    _madvise = getattr(ctypes.CDLL(None), "madvise", None)
if _madvise is not None:
    _madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

_PRIVATE = getattr(mmap, "MAP_PRIVATE", 0) | getattr(mmap, "MAP_ANONYMOUS", 0)


def address(view: memoryview) -> int:
    """Where a writable, contiguous view begins. The caller keeps the view alive meanwhile."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) if view.nbytes else 0


def view(begin: int, size: int) -> memoryview:
    """The `size` bytes from an address on. The caller keeps their owner alive meanwhile."""
    return _view(begin, size, _WRITABLE) if size else memoryview(b"")


# A ctypes array of each size would be a class of its own, which takes ten times as long to make.
_view = ctypes.pythonapi.PyMemoryView_FromMemory
_view.restype, _view.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int)
_WRITABLE = 0x200  # PyBUF_WRITE


@contextlib.contextmanager
def enough(what: str) -> Iterator[None]:
    """A block that does `what` and takes memory as a checkpoint says. Raises `StoreError` (ENOMEM) for want of it."""
    try:
        yield
    except (MemoryError, RuntimeError) as exc:
        if isinstance(exc, RuntimeError) and "can't allocate memory" not in str(exc):  # as torch says it
            raise
        text = f"not enough memory to {what}: {exc}; load fewer entries, or load with mmap=True"
        raise StoreError(text.replace(": ;", ";"), errno.ENOMEM) from exc


def available() -> int | None:
    """How many bytes this process can still take without swapping or being killed, where the system
    says: what is free, and what its control group leaves."""
    found = [limit for limit in (_free(), _left_in_group()) if limit is not None]
    return min(found, default=None)


def _free() -> int | None:
    with contextlib.suppress(OSError, ValueError, StopIteration, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) << 10
    return None


def _left_in_group() -> int | None:
    """What version 2 of the kernel's control groups leaves; a container sees its own as the root."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        own = Path("/proc/self/cgroup").read_text().rpartition("0::")[2].split("\n")[0].lstrip("/")
        folder, left = _CGROUP / own, []
        while True:
            with contextlib.suppress(OSError, ValueError):
                limit = (folder / "memory.max").read_text().strip()
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
                if limit != "max":
                    left.append(max(0, int(limit) - used))
            if folder == _CGROUP:
                return min(left, default=None)
            folder = folder.parent
    return None
