"""How do files go without anyone waiting for it? Names at once, the blocks of large ones in a thread of their own.

A file system frees the blocks of a file when the last descriptor of it is closed, which takes a
tenth of a second per GiB and more. Whoever deletes a checkpoint waits only for the names, all of which
go before the first block: a journal has the one wait for the other.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from .disk import open_file
from .folder_scan import folders_below

_LARGE = 4 << 20  # bytes
_MOST = 64  # descriptors that are held back

_waiting: list[int] = []  # of files without a name
_holds: set[object] = set()
_freeing: set[threading.Thread] = set()


def remove(path: str, *, tree: bool) -> None:
    """Remove a file, or with `tree` a folder with everything below it, where there is one."""
    try:
        is_folder = stat.S_ISDIR(os.lstat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return
    if is_folder != tree:
        return
    if not tree:
        _remove_file(path)
        return
    for folder, files in reversed(folders_below(path)):
        for file in files:
            _remove_file(file)
        try:
            os.rmdir(folder)
        except OSError:
            # NFS keeps what another process has open under such a name until it is closed.
            with os.scandir(folder) as children:
                if not all(child.name.startswith(".nfs") or child.is_dir() for child in children):
                    raise


def _remove_file(path: str) -> None:
    """Remove a file's name; of a large one the space is free a little later, at the latest when the
    process ends. A missing file is no error. Raises `OSError`."""
    try:
        fd = open_file(path) if os.name == "posix" and os.lstat(path).st_size >= _LARGE else None
    except OSError:  # gone, or one that may be deleted but not read
        fd = None
    try:
        with suppress(FileNotFoundError):
            os.unlink(path)
        if fd is None:
            return
        # A file with another name loses no blocks, and NFS gives one that is open another name.
        is_last = os.fstat(fd).st_nlink == 0
    except BaseException:
        if fd is not None:
            os.close(fd)
        raise
    if not is_last:
        os.close(fd)
        return
    _waiting.append(fd)
    if not _holds or len(_waiting) >= _MOST:
        _begin()


@contextmanager
def names_first() -> Iterator[None]:
    """A block that changes names: no file is freed before it ends."""
    hold = object()
    _holds.add(hold)
    try:
        yield
    finally:
        _holds.discard(hold)
        if not _holds:
            _begin()


def wait_for_space() -> bool:
    """Block until the space of what was removed is free; whether there was any to wait for."""
    has_begun = _begin()  # and may have ended before the next line
    threads = list(_freeing)
    for thread in threads:
        thread.join()
    return has_begun or bool(threads)


def _begin() -> bool:
    """Free what waits, in a thread; whether there was any. Several threads may call this."""
    fds = []
    with suppress(IndexError):
        while True:
            fds.append(_waiting.pop())
    if not fds:
        return False
    thread = threading.Thread(target=_free, args=(fds,), name="ckptmgr-free", daemon=True)
    _freeing.add(thread)
    try:
        thread.start()
    except RuntimeError:  # no more threads to be had
        _freeing.discard(thread)
        _close(fds)
    return True


def _free(fds: list[int]) -> None:
    try:
        _close(fds)
    finally:
        _freeing.discard(threading.current_thread())


def _close(fds: list[int]) -> None:
    for fd in fds:
        with suppress(OSError):  # the name is gone, and that is what was asked for
            os.close(fd)


if hasattr(os, "register_at_fork"):
    # A forked child, such as a data loader's worker, would hold the files open, and their space, while it lives.
    os.register_at_fork(before=wait_for_space)
