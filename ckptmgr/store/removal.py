"""How does a large file go without anyone waiting for it? Its name at once, its blocks in a thread of their own.

A file system frees the blocks of a file when the last descriptor of it is closed, which takes a
tenth of a second per GiB and more. Whoever deletes a checkpoint waits only for the name.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

from .disk import open_file

_LARGE = 4 << 20  # bytes

_freeing: set[threading.Thread] = set()


def remove_file(path: Path) -> None:
    """Remove a file's name; of a large one the space is free a little later, at the latest when the
    process ends. A missing file is no error. Raises `OSError`."""
    try:
        fd = open_file(path) if os.name == "posix" and path.lstat().st_size >= _LARGE else None
    except OSError:  # gone, or one that may be deleted but not read
        fd = None
    if fd is None:
        path.unlink(missing_ok=True)
        return
    try:
        path.unlink(missing_ok=True)
        # A file with another name loses no blocks, and NFS gives one that is open another name.
        is_last = os.fstat(fd).st_nlink == 0
    except BaseException:
        os.close(fd)
        raise
    thread = threading.Thread(target=_free, args=(fd,), name="ckptmgr-free", daemon=True)
    if is_last:
        _freeing.add(thread)
        with suppress(RuntimeError):  # no more threads to be had
            thread.start()
            return
        _freeing.discard(thread)
    os.close(fd)


def wait_for_space() -> bool:
    """Block until the space of what was removed is free; whether there was any to wait for."""
    threads = list(_freeing)
    for thread in threads:
        thread.join()
    return bool(threads)


def _free(fd: int) -> None:
    try:
        os.close(fd)
    finally:
        _freeing.discard(threading.current_thread())


if hasattr(os, "register_at_fork"):
    # A forked child, such as a data loader's worker, would hold the files open, and their space, while it lives.
    os.register_at_fork(before=wait_for_space)
