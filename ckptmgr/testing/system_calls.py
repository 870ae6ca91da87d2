"""Which calls of the system change a folder, and what if one fails, falls short or is the last? `SystemCalls`."""

from __future__ import annotations

import functools
import io
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from ..store import direct_io
from .open_files import OpenFiles, is_there
from .raw_reader import RawReader

__all__ = ["Call", "SystemCalls"]

_CHANGES = (
    "open", "write", "pwrite", "writev", "pwritev", "truncate", "ftruncate", "fsync", "fdatasync", "close",
    "dup", "dup2", "sendfile", "copy_file_range", "posix_fallocate",
    "rename", "replace", "link", "symlink", "unlink", "remove", "mkdir", "rmdir",
)  # fmt: skip
_READS = ("read", "pread", "readv", "preadv", "listdir", "scandir", "stat", "lstat", "fdopen")


class Call(NamedTuple):
    """One call that changes the disk below the root, or makes a change durable."""

    number: int
    """From 1, in the order in which the calls were asked for."""
    name: str
    """`create open_write write truncate allocate sync sync_folder close rename link symlink unlink
    mkdir rmdir`; with `reads=True` also `open_read read list stat`."""
    path: str
    """Below the root, with "/" between the names; "." is the root itself."""
    target: str = ""
    """The new name in a `rename` or `link`, "" where it is outside of the root; what a `symlink` says."""
    offset: int = 0
    size: int = 0
    """In bytes: of a `write` or `read`, or of the file after a `truncate` or `allocate`."""
    data: bytes | None = None
    """What a `write` wrote, with `keep_data=True`."""


class SystemCalls:
    """While entered, every call of any thread that changes something below `root` goes by here.

    `before(call)` sees it first. It may raise an `OSError`, which the caller gets while nothing is
    done; return a number of bytes, of which a `write` then takes no more; or end the process. `after(call)` sees
    it when it was made, and may raise an `OSError` which the caller gets although it was. What the two
    do themselves is not seen. `log` has the calls that were made, in the order in which they were; the
    `size` of a write is what it took.

    What is seen: these functions of `os`, whoever calls them (`pathlib`, `os.makedirs`, `os.renames`,
    `shutil.rmtree`), and this library's own fallocate: `open write writev pwrite pwritev sendfile
    copy_file_range truncate ftruncate posix_fallocate fsync fdatasync close dup dup2 rename replace link
    symlink unlink remove mkdir rmdir`; by path, by `dir_fd`, and by the number of a file that one of them opened
    since. A copy into a file is a `write`, at its end where it is open to append.

    What is not: a file opened by `open(...)`, `os.fdopen` or C code, so `Path.write_bytes` and `shutil.copyfile`,
    too, and whatever is done with its number; memory maps; files without a name (`O_TMPFILE`); numbers copied by
    `fcntl` or sent by another process; the flags of a `pwritev`, `splice`, `mknod`, `mkfifo`, and `os.sync` and
    `O_SYNC`, which make more durable than is logged; modes, owners, times and attributes.
    `DiskState.of(root)` differs from `PowerLoss(calls.log).after_all()` where a change went by unseen.

    A `close` is one of a file that was open for writing; one that `before` refuses closes the file
    all the same, as Linux does. The close that is part of a `dup2` is not logged.

        with SystemCalls(root) as calls:
            manager.save(state, step=1)
        print([(call.name, call.path) for call in calls.log])
    """

    def __init__(
        self,
        root: str | Path,
        before: Callable[[Call], int | None] | None = None,
        after: Callable[[Call], None] | None = None,
        *,
        keep_data: bool = False,
        reads: bool = False,
    ) -> None:
        self.log: list[Call] = []
        self._before, self._after, self._keep_data = before, after, keep_data
        self._names = tuple(name for name in _CHANGES + _READS * reads if hasattr(os, name))
        self._reads = reads
        self._files = OpenFiles(root)
        self._count = 0
        self._is_on = False
        self._counting, self._acting = threading.Lock(), threading.RLock()
        self._own = threading.local()
        self._os: dict[str, Any] = {}
        self._allocate = direct_io.allocate

    def __enter__(self) -> SystemCalls:
        self._os = {name: getattr(os, name) for name in self._names}
        self._is_on = True
        for name, original in self._os.items():
            setattr(os, name, self._around(original, getattr(self, f"_{name}", None) or self._read_of(name)))
        self._allocate = direct_io.allocate
        direct_io.allocate = self._around(self._allocate, self._fallocate)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        direct_io.allocate = self._allocate
        for name, original in self._os.items():
            setattr(os, name, original)
        self._is_on = False  # for who has one of our functions still
        self._files.clear()

    def _around(self, original: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self._is_on or getattr(self._own, "is_busy", False):
                return original(*args, **kwargs)
            return ours(original, *args, **kwargs)

        return call

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """What this thread does in here is ours, and not looked at."""
        before = getattr(self._own, "is_busy", False)
        self._own.is_busy = True
        try:
            yield
        finally:
            self._own.is_busy = before

    def _make(
        self, act: Callable[[Any], Any], name: str, path: str, place: Callable[[], int] = lambda: 0, **more: Any
    ) -> Any:
        """Ask, act, log and tell."""
        with self._quiet():
            with self._counting:
                self._count += 1
                call = Call(self._count, name, path, offset=place(), **more)
            allowed = self._before(call) if self._before else None
            with self._acting:  # so that the log's order is the one in which it happened
                call = call._replace(offset=place())  # others may have appended since
                result = act(allowed)
                if name in ("write", "read"):
                    size = result if isinstance(result, int) else len(result)
                    call = call._replace(size=size, data=call.data and call.data[:size])
                self.log.append(call)
            if self._after:
                self._after(call)
            return result

    # What changes something

    def _open(self, original: Any, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        below = self._files.below(path, dir_fd)
        can_write = bool(flags & (os.O_WRONLY | os.O_RDWR))

        def act() -> int:
            fd: int = original(path, flags, mode, dir_fd=dir_fd)
            self._files.opened(fd, below, flags)
            return fd

        if below is None:
            return act()
        with self._quiet():
            makes = bool(flags & os.O_CREAT) and not is_there(path, dir_fd)
        if not (can_write or makes or flags & os.O_TRUNC or self._reads):
            return act()
        name = "create" if makes else "truncate" if flags & os.O_TRUNC else "open_write" if can_write else "open_read"
        opened = -1

        def remember(_: int | None) -> int:
            nonlocal opened
            opened = act()
            return opened

        try:
            return int(self._make(remember, name, below))
        except BaseException:
            if opened >= 0:  # nobody will get to know it
                self._os["close"](opened)
            raise

    def _close(self, original: Any, fd: int) -> None:
        file = self._files.known(fd)
        if file is None or not file.can_write:
            self._files.closed(fd)
            return original(fd)  # type: ignore[no-any-return]
        is_done = False

        def act(_: int | None = None) -> None:
            nonlocal is_done
            is_done = True
            self._files.closed(fd)
            original(fd)

        try:
            self._make(act, "close", file.path)
        finally:
            if not is_done:
                act()

    def _dup(self, original: Any, fd: int) -> int:
        copy: int = original(fd)
        self._files.copied(fd, copy)
        return copy

    def _dup2(self, original: Any, fd: int, fd2: int, inheritable: bool = True) -> int:
        copy: int = original(fd, fd2, inheritable)
        if fd != copy:
            self._files.copied(fd, copy)
        return copy

    def _write(self, original: Any, fd: int, data: Any) -> int:
        return self._some(fd, [data], None, lambda some: original(fd, some[0]))

    def _writev(self, original: Any, fd: int, buffers: Any) -> int:
        return self._some(fd, buffers, None, lambda some: original(fd, some))

    def _pwrite(self, original: Any, fd: int, data: Any, offset: int) -> int:
        return self._some(fd, [data], offset, lambda some: original(fd, some[0], offset))

    def _pwritev(self, original: Any, fd: int, buffers: Any, offset: int, flags: int = 0) -> int:
        return self._some(fd, buffers, offset, lambda some: original(fd, some, offset, flags))

    def _some(self, fd: int, buffers: Any, offset: int | None, write: Callable[[Any], int]) -> int:
        if self._files.known(fd) is None:
            return write(buffers)
        views = [memoryview(buffer).cast("B") for buffer in buffers if memoryview(buffer).nbytes]
        size = sum(view.nbytes for view in views)

        def act(allowed: int | None) -> int:
            if allowed is None or allowed >= size:
                return write(buffers)
            return write([views[0][:allowed] if len(views) == 1 else memoryview(b"".join(views)[:allowed])])

        return self._put(act, fd, offset, size, lambda: b"".join(views))

    def _sendfile(self, original: Any, out_fd: int, in_fd: int, offset: int | None, count: int, *more: Any) -> int:
        return self._copy(out_fd, in_fd, offset, None, count, lambda size: original(out_fd, in_fd, offset, size, *more))

    def _copy_file_range(
        self,
        original: Any,
        src: int,
        dst: int,
        count: int,
        offset_src: int | None = None,
        offset_dst: int | None = None,
    ) -> int:
        return self._copy(
            dst, src, offset_src, offset_dst, count, lambda size: original(src, dst, size, offset_src, offset_dst)
        )

    def _copy(
        self, fd: int, source: int, start: int | None, offset: int | None, count: int, copy: Callable[[int], int]
    ) -> int:
        """A write of what another file holds from `start` on."""
        if self._files.known(fd) is None:
            return copy(count)
        begin = os.lseek(source, 0, os.SEEK_CUR) if start is None else start
        size = max(0, min(count, os.fstat(source).st_size - begin))
        with self._quiet():
            data = os.pread(source, size, begin) if self._keep_data else b""
        return self._put(lambda most: copy(size if most is None else min(most, size)), fd, offset, size, lambda: data)

    def _put(
        self, act: Callable[[int | None], int], fd: int, offset: int | None, size: int, data: Callable[[], bytes]
    ) -> int:
        kept = data() if self._keep_data else None
        place = functools.partial(self._files.place, fd, offset)
        return int(self._make(act, "write", self._files.below(fd) or "", place, size=size, data=kept))

    def _ftruncate(self, original: Any, fd: int, length: int) -> None:
        self._if_below(lambda: original(fd, length), "truncate", self._files.below(fd), size=length)

    def _truncate(self, original: Any, path: Any, length: int) -> None:
        self._if_below(lambda: original(path, length), "truncate", self._files.below(path), size=length)

    def _fallocate(self, original: Any, fd: int, size: int) -> None:
        self._if_below(lambda: original(fd, size), "allocate", self._files.below(fd), size=size)

    def _posix_fallocate(self, original: Any, fd: int, offset: int, size: int) -> None:
        self._if_below(lambda: original(fd, offset, size), "allocate", self._files.below(fd), size=offset + size)

    def _fsync(self, original: Any, fd: Any) -> None:
        file = self._files.known(fd if isinstance(fd, int) else fd.fileno())
        name = "sync_folder" if file and stat.S_ISDIR(file.found.st_mode) else "sync"
        self._if_below(lambda: original(fd), name, file and file.path)

    _fdatasync = _fsync

    def _rename(
        self, original: Any, src: Any, dst: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None
    ) -> None:
        old, new = self._files.below(src, src_dir_fd), self._files.below(dst, dst_dir_fd)

        def act() -> None:
            original(src, dst, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            if old and new:
                self._files.renamed(old, new)

        self._if_below(act, "rename", (old or "") if old or new else None, target=new or "")

    _replace = _rename

    def _link(self, original: Any, src: Any, dst: Any, **how: Any) -> None:
        old, new = self._files.below(src, how.get("src_dir_fd")), self._files.below(dst, how.get("dst_dir_fd"))
        act = functools.partial(original, src, dst, **how)
        self._if_below(act, "link", None if new is None else old or "", target=new or "")

    def _symlink(self, original: Any, src: Any, dst: Any, *args: Any, dir_fd: int | None = None, **how: Any) -> None:
        act = functools.partial(original, src, dst, *args, dir_fd=dir_fd, **how)
        self._if_below(act, "symlink", self._files.below(dst, dir_fd), target=os.fsdecode(src))

    def _unlink(self, original: Any, path: Any, *, dir_fd: int | None = None) -> None:
        self._if_below(lambda: original(path, dir_fd=dir_fd), "unlink", self._files.below(path, dir_fd))

    _remove = _unlink

    def _mkdir(self, original: Any, path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
        self._if_below(lambda: original(path, mode, dir_fd=dir_fd), "mkdir", self._files.below(path, dir_fd))

    def _rmdir(self, original: Any, path: Any, *, dir_fd: int | None = None) -> None:
        self._if_below(lambda: original(path, dir_fd=dir_fd), "rmdir", self._files.below(path, dir_fd))

    def _if_below(self, act: Callable[[], Any], name: str, below: str | None, **more: Any) -> Any:
        return act() if below is None else self._make(lambda _: act(), name, below, **more)

    # What only looks

    def _read_of(self, name: str) -> Callable[..., Any]:
        event = "list" if name in ("listdir", "scandir") else "stat" if name in ("stat", "lstat") else "read"

        def look(original: Any, path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            below = self._files.below(path, kwargs.get("dir_fd"))
            return self._if_below(lambda: original(path, *args, **kwargs), event, below)

        return look

    def _fdopen(self, original: Any, fd: int, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """A file object reads past `os`: one that reads bytes gets our own, which doesn't."""
        if mode != "rb" or args or kwargs or self._files.known(fd) is None:
            return original(fd, mode, *args, **kwargs)
        return io.BufferedReader(RawReader(fd))
