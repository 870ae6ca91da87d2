"""How do bytes reach a disk so that a power cut can't take them back? And what does the disk say when it can't?"""

from __future__ import annotations

import errno
import os
import stat
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CheckpointError, StoreError, StoreFullError
from .space import space_left

try:
    import fcntl
except ImportError:  # Windows
    _FULL_SYNC = None
else:
    _FULL_SYNC = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: fsync alone stops at the drive's own cache

_COMMON = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
_CREATE = os.O_CREAT | os.O_EXCL | os.O_WRONLY | _COMMON
_READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | _COMMON  # a planted FIFO must not block us
_NO_FOLDER_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}


def sync_file(fd: int) -> None:
    """Wait until a file's bytes are on the disk. A failure is final: the kernel forgets what it
    could not write, so a second fsync of the same file would report a success that never was."""
    if _FULL_SYNC is not None:
        try:
            fcntl.fcntl(fd, _FULL_SYNC)
            return
        except OSError as exc:
            if exc.errno not in _NO_FOLDER_SYNC:
                raise
    os.fsync(fd)


def begin_to_sync(fd: int) -> None:
    """Have the system begin to write to the disk what it holds of a file, without waiting: several files that are
    begun together take less time to sync one by one. Changes nothing where the system can't."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # what was not written yet, Linux begins to write


def sync_folder(folder: str | Path) -> None:
    """Wait until a folder's entries are on the disk, where the file system knows how to."""
    if os.name == "nt":  # Windows opens no folders; NTFS journals its entries
        return
    try:
        fd = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0))
    except PermissionError:  # one that we may write to but not read, such as a shared scratch folder
        return
    try:
        os.fsync(fd)
    except OSError as exc:
        if exc.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(fd)


def make_folders(folder: Path) -> None:
    """Make a folder with those above it that are missing, each entry durable. So is that of the topmost one
    there: whoever made it may not have got round to it yet."""
    missing = []
    while not folder.is_dir() and folder.parent != folder:
        missing.append(folder)
        folder = folder.parent
    sync_folder(folder.parent)
    for each in reversed(missing):
        with suppress(FileExistsError):
            each.mkdir()
        sync_folder(each.parent)


def create_file(path: str) -> int:
    """A descriptor of a file that did not exist before. Follows no link."""
    return os.open(path, _CREATE, 0o666)


def open_to_write(path: str) -> int:
    """A descriptor of a file that is there, for writing over it. Follows no link."""
    return os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0) | _COMMON)


def open_file(path: str | Path) -> int:
    """A descriptor of a regular file, for reading. Follows no link; refuses anything else."""
    fd = os.open(path, _READ)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return fd


def claim(temp: str, target: str) -> None:
    """Give a file its final name unless that name is taken; of several claimants one wins.

    Raises `FileExistsError`."""
    try:
        os.link(temp, target)
    except FileExistsError:
        # NFS asks again after a lost answer, and then finds the link that it made itself.
        if os.lstat(temp).st_nlink != 2:
            raise
    except OSError as exc:
        if exc.errno not in NO_LINKS:
            raise
        os.close(create_file(target))  # no links here: an empty file of that name is the claim
        try:
            os.replace(temp, target)
        except OSError:
            os.unlink(target)
            raise


class TempFile:
    """A file under a name that nobody looks at, until it is moved to its own: the same, where nobody looks at that
    yet. A new one, unless it is given with its descriptor. Gone when dropped."""

    def __init__(self, path: str, fd: int | None = None) -> None:
        self.path, self.is_new = path, fd is None
        self._open = _Open(create_file(path) if fd is None else fd)
        self._discard = weakref.finalize(self, _discard, self._open, path, os.getpid())

    @property
    def fd(self) -> int:
        return self._open.fd

    def write(self, data: memoryview) -> None:
        while data:  # the system may take less than it is given
            data = data[os.write(self.fd, data) :]

    def sync(self) -> None:
        sync_file(self.fd)

    def close(self) -> None:
        """Close the file. Network file systems may report only here that it was not written."""
        self._open.close()

    def move(self, target: str) -> None:
        """Close the file and give it its own name, if it has not had that from the beginning: nothing is left
        to discard. Raises `FileNotFoundError` when it is gone."""
        if self.path != target:
            self.close()
            os.replace(self.path, target)
        elif os.fstat(self.fd).st_nlink:
            self.close()
        else:
            raise FileNotFoundError(errno.ENOENT, "deleted while it was written", target)
        self._discard.detach()

    def discard(self) -> None:
        """Close the file and remove it unless it was moved. May be repeated; never raises."""
        self._discard()


class _Open:
    """A descriptor that is closed once, whoever asks for it and however often."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


def _discard(file: _Open, path: str, pid: int) -> None:
    # Nothing of it is visible, whatever fails here: a leftover goes when its folder is deleted.
    with suppress(OSError):
        file.close()
    if os.getpid() == pid:  # a forked child drops its copy of the object; the file is its parent's
        with suppress(OSError):
            os.unlink(path)


class InUse:
    """Something that many threads use, closed when it has ended and the last of them is done with it.

    The number of a descriptor that was closed can at once be that of another file: no thread may
    be about to use it then. Entering raises `StoreError` with the text `ended` after the end.
    """

    def __init__(self, close: Callable[[], object], ended: str) -> None:
        self._close, self._ended = close, ended
        self._lock = threading.Lock()
        self._users, self._has_ended = 0, False

    def __enter__(self) -> None:
        with self._lock:
            if self._has_ended:
                raise StoreError(self._ended)
            self._users += 1

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._users -= 1
            is_last = self._has_ended and not self._users
        if is_last:
            self._close()

    def end(self) -> None:
        """May be repeated."""
        with self._lock:
            is_last = not self._has_ended and not self._users
            self._has_ended = True
        if is_last:
            self._close()


@contextmanager
def edge(doing: str, path: str | Path, need: int | None = None) -> Iterator[None]:
    """A block whose errors of the system come out in our words."""
    try:
        yield
    except CheckpointError:
        raise
    except OSError as exc:
        raise explain(exc, doing, path, need) from exc


def explain(exc: OSError, doing: str, path: str | Path, need: int | None = None) -> StoreError:
    """The same trouble in the words of its remedy; `need` is in bytes, where known."""
    match exc.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return full(f"{doing} {path}", path, need, exc.errno)
        case errno.EFBIG:
            size = f" ({need:,} bytes needed)" if need is not None else ""
            text = (
                f"can't {doing} {path}{size}: no file may be so large here; raise the limit (ulimit -f) or set a "
                "smaller split_size"
            )
        case errno.EACCES | errno.EPERM:
            text = f"no permission to {doing} {path}: change its owner or mode, or use another root"
        case errno.EROFS:
            text = f"can't {doing} {path}: the file system is read-only; mount it writable or use another root"
        case errno.ELOOP:
            text = f"can't {doing} {path}: a symbolic link is not followed below the root; put its target in its place"
        case errno.EISDIR | errno.ENOTDIR | errno.EEXIST | errno.ENOTEMPTY:
            text = f"can't {doing} {path}: {exc.strerror}; a file or a folder is in its place, move it away"
        case _:
            text = f"can't {doing} {path}: {exc.strerror or exc}; check the disk or its mount, then try again"
    return StoreError(text, exc.errno)


def full(what: str, path: str | Path, need: int | None, code: int = errno.ENOSPC) -> StoreFullError:
    """The error for want of room to do `what` at a path; `need` is in bytes, where known."""
    space = space_left(Path(path))
    free = None if space is None else space.free
    sizes = [f"{need:,} bytes needed"] if need is not None else []
    sizes += [f"{free:,} bytes free"] if free is not None else []
    remedy = "free some space or keep fewer checkpoints"
    match code:
        case errno.EDQUOT:
            trouble = "the disk quota is used up"
        case _ if space is not None and space.files == 0 and space.free >= (need or 0):
            trouble = "the file system has no room for more files (inodes)"
            remedy = "delete some or keep fewer checkpoints"
        case _:
            trouble = "no space left"
    told = f" ({', '.join(sizes)})" if sizes else ""
    return StoreFullError(f"{trouble} to {what}{told}: {remedy}", code, needed=need, free=free)
