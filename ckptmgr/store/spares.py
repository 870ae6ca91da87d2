"""Whose blocks does the next large file take over? Those of a file that was just deleted.

To write over a file takes about half the time of writing a new one, whose blocks have to be found first and noted
as written afterwards. So a file that goes stays a while as a *spare*, under a name of its own in a folder where nobody
looks, until one of about its size is written, or the space is wanted.

What anyone may still see is never written over. A spare has one name, which nobody else knows; and the kernel gives a
write lease only on a file that nobody else has open or mapped, so that whoever reads what was deleted keeps what it
began to read (fcntl(2), F_SETLEASE). Only on file systems of this machine that write in place, and not while it
exports any over NFS: of a file that a client of NFS 3 reads, the kernel does not know that it is open.
"""

from __future__ import annotations

import os
import secrets
import signal
import stat
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from .direct_io import LARGE
from .disk import open_to_write
from .mounts import mount_type_at
from .removal import remove, wait_for_space

try:
    import fcntl
except ImportError:  # Windows
    _HAS_LEASES = False
else:
    _HAS_LEASES = hasattr(fcntl, "F_SETLEASE") and hasattr(fcntl, "F_SETSIG")

FOLDER = ".ckptmgr/spares"  # of a root: the writer's, gone when it closes

_IN_PLACE = {"ext4", "xfs"}
_EXPORTS = (Path("/proc/fs/nfsd/exports"), Path("/var/lib/nfs/etab"))
_SMALLEST = LARGE
_CLOSE = 8  # a file takes over one that is larger or smaller by no more than this part of it
_MOST = 1024  # files of one save


class _Look(NamedTuple):
    """All about a new file but its bytes: one that takes over another's is to look like it."""

    uid: int
    gid: int
    mode: int
    attributes: tuple[tuple[str, bytes], ...]


class _Spare(NamedTuple):
    path: str
    size: int


class Spares:
    """The spares of one root, for one process that writes there. Safe from any thread; where nothing can be spared,
    or that is not wanted, nothing is."""

    def __init__(self, root: Path, *, is_wanted: bool) -> None:
        self._root, self.folder = root, os.path.join(root, *FOLDER.split("/"))
        self._lock = threading.Lock()
        self._spares: list[_Spare] = []
        self._draft = ""  # the folder that was written to last
        self._written: list[int] = []  # sizes of its files
        self._wanted: list[int] = []  # of those, what has no spare yet
        self._keeper: int | None = None  # the thread that is `keeping`
        self._made: list[str] = []  # the folder, while this process has spares in it
        self._look: _Look | None = None
        self._is_possible: bool | None = None if is_wanted and _HAS_LEASES else False  # None: not asked yet
        self._pid = os.getpid()
        with _guard:
            _all.add(self)
        weakref.finalize(self, _remove, self._spares, self._made, self._pid)

    def wrote(self, fd: int, size: int, draft: str, *, is_new: bool) -> None:
        """A file of this size is being written to a draft: the next deletion may leave a spare for the next one like
        it."""
        if size >= _SMALLEST and self._works():
            with self._lock, suppress(OSError):
                if is_new:
                    self._look = _look(fd)
                if draft != self._draft:  # that of an earlier save, which may have failed
                    self._draft, self._written = draft, []
                if len(self._written) < _MOST:
                    self._written.append(size)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """A block in which this thread's deletions leave spares for files like those of the last draft. What nobody has
        taken over by then goes."""
        self.drop()
        if not self._works():
            yield
            return
        with self._lock:
            self._wanted, self._written = self._written, []
            self._keeper = threading.get_ident()
        try:
            yield
        finally:
            with self._lock:
                self._wanted, self._keeper = [], None

    def keep(self, path: str) -> bool:
        """Instead of deleting a file, make it a spare, if one of its size is wanted: whether it was."""
        if self._keeper != threading.get_ident() or os.getpid() != self._pid:
            return False
        with self._lock, suppress(OSError):
            found = os.lstat(path)
            wanted = _closest(self._wanted, found.st_size)
            if wanted is None or not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
                return False
            with suppress(FileExistsError):
                os.mkdir(self.folder)
            if os.path.islink(self.folder):
                return False
            self._made[:] = [self.folder]
            spare = _Spare(os.path.join(self.folder, secrets.token_hex(8)), found.st_size)
            os.rename(path, spare.path)
            self._spares.append(spare)
            self._wanted.remove(wanted)
            return True
        return False

    def take(self, target: str, size: int) -> int | None:
        """Make a spare the new file `target` of about this size: its descriptor, for writing; its old bytes and length
        are still there. None when there is none that can be had."""
        while self._spares and os.getpid() == self._pid:
            with self._lock:
                closest = _closest([spare.size for spare in self._spares], size)
                if closest is None or os.path.lexists(target):  # a rename would go over it without a word
                    return None
                spare = next(spare for spare in self._spares if spare.size == closest)
                fd = self._moved(spare, target)
                self._spares.remove(spare)
                if fd is not None:
                    return fd
        return None

    def _moved(self, spare: _Spare, target: str) -> int | None:
        """A descriptor of a spare that nobody else can see, and that is the target now. It is deleted when somebody
        can."""
        with suppress(OSError):
            fd = open_to_write(spare.path)
            try:
                if os.fstat(fd).st_nlink == 1 and _look(fd) == self._look and self._is_alone(fd):
                    os.rename(spare.path, target)
                    return fd
            except BaseException as exc:
                os.close(fd)
                if not isinstance(exc, OSError):
                    raise
            else:
                os.close(fd)
            remove(spare.path, tree=False)
        return None

    def taken_over(self, sizes: Iterable[int]) -> int:
        """How many bytes files of these sizes would take over."""
        left, total = [spare.size for spare in list(self._spares)], 0
        for size in sizes:
            if (closest := _closest(left, size)) is not None:
                left.remove(closest)
                total += min(closest, size)
        return total

    def drop(self) -> bool:
        """Give their space back, a little later; whether there was any."""
        if os.getpid() != self._pid:  # they are the parent's, and so may the lock be
            return False
        with self._lock:
            had = bool(self._spares)
            _remove(self._spares, self._made, self._pid)
        return had

    def _is_alone(self, fd: int) -> bool:
        try:
            return is_alone(fd)
        except OSError:  # nobody can tell here: none are kept any more
            self._is_possible = False
            return False

    def _works(self) -> bool:
        if self._is_possible is None:
            self._is_possible = mount_type_at(self._root) in _IN_PLACE and not any(map(_says_something, _EXPORTS))
        return self._is_possible and os.getpid() == self._pid


def make_space() -> bool:
    """Have all space back that was deleted: that of spares, and of what is on its way out. Blocks; whether there was
    any."""
    with _guard:
        everyones = list(_all)
    had = [spares.drop() for spares in everyones]
    return wait_for_space() or any(had)


def _closest(sizes: list[int], size: int) -> int | None:
    """The one of these sizes that is closest, if it is close."""
    if size < _SMALLEST or not sizes:
        return None
    closest = min(sizes, key=lambda one: abs(one - size))
    return closest if abs(closest - size) <= size // _CLOSE else None


def _look(fd: int) -> _Look:
    found = os.fstat(fd)
    attributes = tuple((name, os.getxattr(fd, name)) for name in sorted(os.listxattr(fd)))
    return _Look(found.st_uid, found.st_gid, found.st_mode, attributes)


def _says_something(path: Path) -> bool:
    try:
        return any(line.strip() and not line.startswith("#") for line in path.read_text(errors="replace").splitlines())
    except OSError:
        return False


def is_alone(fd: int) -> bool:
    """Whether nobody else has a file open, or mapped, that is open for writing here. Raises `OSError` where the system
    does not say."""
    # Whoever opens it at this very moment has the kernel tell us by a signal: by one that is ignored.
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except BlockingIOError:
        return False
    is_kept = fcntl.fcntl(fd, fcntl.F_GETLEASE) == fcntl.F_WRLCK  # else somebody is waiting for its end, to open it
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return is_kept


def _remove(spares: list[_Spare], made: list[str], pid: int) -> None:
    """All that lies in the folder, if this process has made it: what an interrupt came in between of is in no list."""
    if os.getpid() != pid:
        return
    spares.clear()
    with suppress(OSError):
        while made:
            if not os.path.islink(folder := made.pop()):
                remove(folder, tree=True)


_guard = threading.Lock()
_all: weakref.WeakSet[Spares] = weakref.WeakSet()


def _in_a_forked_child() -> None:
    """A thread of the parent may have held it."""
    global _guard
    _guard = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_forked_child)
