"""Which file below a root stands behind a path or the number of an open one? `OpenFiles`, for `SystemCalls`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

_ALWAYS_APPENDS = sys.platform == "linux"  # also with a pwrite, whatever offset it names


class OpenFile(NamedTuple):
    """A file or folder below the root that is open."""

    path: str
    found: os.stat_result
    can_write: bool
    appends: bool


class OpenFiles:
    """The files below `root` by their numbers. Told of each that is opened, copied, closed and renamed."""

    def __init__(self, root: str | Path) -> None:
        self._root = os.path.abspath(root)  # noqa: PTH100
        self._roots = {self._root, os.path.realpath(root)}
        self._files: dict[int, OpenFile] = {}

    def below(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The path below the root, or None for one elsewhere."""
        if isinstance(path, int):
            file = self.known(path)
            return file and file.path
        text = os.fsdecode(path)
        if dir_fd is not None and not os.path.isabs(text):  # noqa: PTH117
            folder = self.known(dir_fd)
            if folder is None:
                return None
            text = os.path.join(self._root, folder.path, text)  # noqa: PTH118
        text = os.path.abspath(text)  # noqa: PTH100
        for root in self._roots:
            if text == root:
                return "."
            if text.startswith(root + os.sep):
                return text[len(root) + 1 :].replace(os.sep, "/")
        return None

    def known(self, fd: int) -> OpenFile | None:
        """The file below the root that is open under `fd`. A number may have become another file's unseen."""
        file = self._files.get(fd)
        if file is not None:
            try:
                if os.path.samestat(os.fstat(fd), file.found):
                    return file
            except OSError:
                pass
            self._files.pop(fd, None)
        return None

    def place(self, fd: int, offset: int | None) -> int:
        """Where a write goes: at `offset`, with None where the last one ended; at the end of one opened to append."""
        file = self.known(fd)
        if file is not None and file.appends and (offset is None or _ALWAYS_APPENDS):
            return os.fstat(fd).st_size
        return os.lseek(fd, 0, os.SEEK_CUR) if offset is None else offset

    def opened(self, fd: int, path: str | None, flags: int) -> None:
        """This number is that of a file just opened; of one elsewhere with `path=None`."""
        self._files.pop(fd, None)
        if path is not None:
            can_write = bool(flags & (os.O_WRONLY | os.O_RDWR))
            self._files[fd] = OpenFile(path, os.fstat(fd), can_write, bool(flags & os.O_APPEND))

    def copied(self, fd: int, copy: int) -> None:
        self._files.pop(copy, None)
        if (file := self.known(fd)) is not None:
            self._files[copy] = file

    def closed(self, fd: int) -> None:
        self._files.pop(fd, None)

    def renamed(self, old: str, new: str) -> None:
        for fd, file in list(self._files.items()):
            if file.path == old or file.path.startswith(f"{old}/"):
                self._files[fd] = file._replace(path=new + file.path[len(old) :])

    def clear(self) -> None:
        self._files.clear()


def is_there(path: Any, dir_fd: int | None) -> bool:
    try:
        os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
    except OSError:
        return False
    return True
