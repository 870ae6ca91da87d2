"""How are files made ready for a measurement: flushed, forgotten, cached? And how fast can the disk move them?"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..store import BLOCK
from ..store.disk import sync_file, sync_folder
from ..store.mounts import mount_type_at
from ..transfer import CHUNK

_THREADS = 2  # enough to keep a disk busy, and what any machine has
_DIRECT = getattr(os, "O_DIRECT", 0)
_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}


def flush(folder: Path) -> None:
    """Make everything below a folder durable, the folder's own name included."""
    for path in _files(folder):
        with _opened(path, os.O_RDONLY) as fd:
            sync_file(fd)
    for inner in [*filter(Path.is_dir, folder.rglob("*")), folder, folder.parent]:
        sync_folder(inner)


def forget(folder: Path) -> bool:
    """Have the system drop what it caches of the files below a folder; whether it could."""
    if not hasattr(os, "posix_fadvise") or is_in_memory(folder):
        return False
    for path in _files(folder):
        with _opened(path, os.O_RDONLY) as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def fill_cache(folder: Path) -> None:
    """Read every file below a folder once."""
    scratch = bytearray(CHUNK)
    for path in _files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(scratch):
                pass


def is_in_memory(folder: Path) -> bool:
    """Whether the files of a folder lie in memory and on no disk."""
    return mount_type_at(folder) in _IN_MEMORY


def write_whole(path: Path, data: memoryview) -> float:
    """The seconds that it takes to make `data` a durable new file, past the cache where the system allows."""
    with ThreadPoolExecutor(_THREADS) as pool, _opened(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, _DIRECT) as fd:
        began = time.perf_counter()
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, len(data))
        _in_pieces(pool, len(data), lambda begin, end: os.pwrite(fd, data[begin:end], begin))
        os.fsync(fd)
        sync_folder(path.parent)
        return time.perf_counter() - began


def read_whole(path: Path, target: memoryview, *, cached: bool) -> float:
    """The seconds that it takes to read a file into `target`, past the cache unless `cached`."""
    with ThreadPoolExecutor(_THREADS) as pool, _opened(path, os.O_RDONLY, 0 if cached else _DIRECT) as fd:
        began = time.perf_counter()
        _in_pieces(pool, len(target), lambda begin, end: os.preadv(fd, [target[begin:end]], begin))
        return time.perf_counter() - began


def _in_pieces(pool: ThreadPoolExecutor, size: int, move: Callable[[int, int], int]) -> None:
    def moved(begin: int) -> None:
        end = min(begin + CHUNK, size)
        while begin < end:
            if not (count := move(begin, end)):
                raise OSError(f"the file ends at byte {begin:,}")
            begin += count

    list(pool.map(moved, range(0, size, CHUNK)))


def _files(folder: Path) -> Iterator[Path]:
    return filter(Path.is_file, folder.rglob("*"))


@contextlib.contextmanager
def _opened(path: Path, flags: int, wish: int = 0) -> Iterator[int]:
    """A descriptor, with the wished flag where the file system takes it."""
    try:
        fd = os.open(path, flags | wish)
    except OSError:
        if not wish:
            raise
        with contextlib.suppress(OSError):  # made before the flag was refused
            if flags & os.O_CREAT:
                path.unlink()
        fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def whole_blocks(size: int) -> int:
    """A size rounded up to what is read and written past the cache."""
    return -(-size // BLOCK) * BLOCK
