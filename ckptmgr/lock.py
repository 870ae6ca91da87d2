"""Who may write to this root? One writer at a time, numbered by attempt.

On local disks an `flock` on `.ckptmgr/lock`, which the kernel frees when the process dies; elsewhere a
lease (`lease`). Neither is what keeps data safe: unique names are, the attempt in each manifest, and that
a writer first records what it is about to do, then looks whether it still holds the root, and then does it.
One that was frozen in between, and goes on after its place was taken, can so do nothing but what the
next one found recorded when it came: see `Repository.sweep`.
"""

from __future__ import annotations

import errno
import logging
import os
import secrets
import stat
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from .errors import NotFoundError, StoreError
from .lease import Lease, claims
from .owner import attempt_of, held, me, parse, sealed
from .records import FOLDER, is_refused
from .store import Store
from .store.disk import explain, make_folders, open_file, sync_file, sync_folder

try:
    import fcntl
except ImportError:  # Windows: the lease serves there too
    fcntl = None  # type: ignore[assignment]

__all__ = ["FileLock", "Lease", "WriterLock", "acquire", "last_writer"]

_MOST = 4096  # bytes that are read of a lock
_OPEN = os.O_RDWR | os.O_CREAT
_OPEN |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}

_log = logging.getLogger("ckptmgr.lock")


class WriterLock(Protocol):
    """The right to write, until released or lost."""

    @property
    def attempt(self) -> int:
        """The number of this writer; higher than that of any before it."""

    def rise(self, floor: int) -> None:
        """Go on under a higher number, above `floor`. Raises `FencedError` as `check` does, and `StoreError`."""

    def check(self) -> None:
        """Raises `FencedError` when another writer has taken over. May ask the store."""

    def release(self) -> None:
        """Let the next writer in at once. May be repeated."""


def acquire(
    store: Store,
    *,
    floor: int = 0,
    takeover: bool = False,
    ttl_s: float = 60.0,
    announce: Callable[[int], None] = lambda attempt: None,
) -> WriterLock:
    """Become the root's writer, with an attempt above `floor`.

    Raises `FencedError`, naming the holder, when there is one; `takeover` takes its place instead:
    whatever it commits from then on counts for nothing. A lease held from another host blocks
    until its owner shows that it lives (a third of `ttl_s` seconds) or `ttl_s` seconds are over: a job
    restarted elsewhere after a preemption goes on by itself. One of a process that has died on this host
    is free at once. `announce` is called before the place of a writer is taken that may still be alive, frozen or cut
    off, with its attempt.
    """
    if store.path is not None and fcntl is not None:
        try:
            return FileLock(store.path, floor=floor, takeover=takeover, announce=announce)
        except OSError as exc:
            if exc.errno not in _UNSUPPORTED:
                raise _refused(store.path / FOLDER / "lock", exc) from exc
            _log.info("lock.flock.unsupported path=%s, using a lease", store.path)
    return Lease(store, floor=floor, takeover=takeover, ttl_s=ttl_s, announce=announce)


def last_writer(store: Store) -> int:
    """The highest attempt that any writer of this root has claimed, or 0 where that is not recorded. A
    claim is durable before anything is committed under its number."""
    claimed = max(claims(store), default=0)
    if store.path is None:
        return claimed
    try:
        return max(claimed, attempt_of(parse(store.get(f"{FOLDER}/lock", 0, _MOST))))
    except NotFoundError:
        return claimed
    except StoreError as exc:
        if not is_refused(store, exc):
            raise
        return 0  # it may be read by its owner alone


def _refused(path: Path, exc: OSError) -> StoreError:
    if exc.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
        return explain(exc, "write to", path)
    return StoreError(
        f"cannot write to {path}: {exc.strerror}; check the folder's owner and mode, or set read_only", exc.errno
    )


class FileLock:
    """An exclusive `flock`. A take-over puts a new file in the old one's place."""

    def __init__(
        self, root: Path, *, floor: int, takeover: bool, announce: Callable[[int], None] = lambda attempt: None
    ) -> None:
        assert fcntl is not None
        self._root, self._path = root, root / FOLDER / "lock"
        make_folders(self._path.parent)
        is_new = False
        while True:
            fd = _open(self._path)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as exc:
                owner = parse(os.pread(fd, _MOST, 0))
                os.close(fd)
                if exc.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                if not takeover:
                    raise held(str(root), owner) from None
                announce(attempt_of(owner))
                floor = max(floor, attempt_of(owner), self._put_out())
                takeover = False  # the new file is ours, or belongs to someone faster
                continue
            try:
                if self._is_current(fd):
                    if is_new or os.fstat(fd).st_nlink < 2:
                        break
                    # It has another name elsewhere, where nothing may change.
                    floor, is_new = max(floor, self._put_out()), True
            except BaseException:
                _close(fd)
                raise
            os.close(fd)  # replaced between open and flock
        # Closed when dropped, too: in a notebook nobody closes the manager of the cell run before.
        self._close = weakref.finalize(self, _close, fd)
        self._fd = fd
        try:
            self._claim(floor)
        except BaseException:
            self.forget()  # now: whoever keeps the error keeps this object
            raise
        _held_here.add(self)

    def _claim(self, floor: int) -> None:
        """Number this writer, durably."""
        fd = self._fd
        old = os.pread(fd, _MOST, 0)
        self.attempt = max(floor, attempt_of(parse(old))) + 1
        # Over the old one in one go, never shorter: on a full disk, or at a kill, one of the two is there, whole.
        data = sealed({**me(), "attempt": self.attempt}).ljust(len(old))
        written = 0
        while written < len(data):
            written += os.pwrite(fd, data[written:], written)
        os.ftruncate(fd, len(data))
        # Readers take the number for the highest there is: a checkpoint must never outlive it.
        sync_file(fd)
        sync_folder(self._path.parent)
        self.check()  # whoever put this file out before the number stood in it does not know of the number

    def rise(self, floor: int) -> None:
        """See `WriterLock`."""
        self.check()
        self._claim(floor)

    def _put_out(self) -> int:
        """Take away whatever lock file is there; the number of its owner. Of two processes that take over at
        once each finds out so what the other had."""
        aside = self._path.with_name(f"lock.{secrets.token_hex(4)}")
        try:
            self._path.rename(aside)
            owner = _read(aside)
            aside.unlink()
        except FileNotFoundError:
            return 0
        return attempt_of(owner)

    def _is_current(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), self._path.lstat())
        except FileNotFoundError:
            return False

    def check(self) -> None:
        """Raises `FencedError` when the file was put out, or let go of, and `StoreError` when that can't be told."""
        try:
            is_ours = self._close.alive and self._is_current(self._fd)
        except OSError as exc:
            raise _refused(self._path, exc) from exc
        if not is_ours:
            try:
                owner = _read(self._path)
            except OSError:
                owner = {}
            raise held(str(self._root), owner)

    def release(self) -> None:
        """Let the next writer in at once. May be repeated."""
        if self._close.alive:
            assert fcntl is not None
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # for a child forked this instant, too
            self.forget()

    def forget(self) -> None:
        """Close this process's handle; another process that shares it keeps the lock."""
        self._close()


def _open(path: Path) -> int:
    """The lock file, made where there is none. Raises `OSError` for anything else in its place, which may lead
    elsewhere: what the lock says is written into it."""
    if path.parent.is_symlink():
        raise OSError(errno.ELOOP, "its folder is a symbolic link", str(path))
    fd = os.open(path, _OPEN, 0o666)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.ENXIO, "it is no plain file", str(path))
    return fd


def _read(path: Path) -> dict[str, Any]:
    fd = open_file(path)
    try:
        return parse(os.read(fd, _MOST))
    finally:
        os.close(fd)


def _close(fd: int) -> None:
    with suppress(OSError):  # nothing hangs on it: it is closed all the same, and what was written was fsynced
        os.close(fd)


_held_here: weakref.WeakSet[FileLock] = weakref.WeakSet()


def _forget_all() -> None:
    """A forked child (a data loader's worker) shares the flock: without this, one that outlives a
    killed trainer would keep the root locked."""
    for lock in list(_held_here):
        lock.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)  # once for all: there is no way to take one back
