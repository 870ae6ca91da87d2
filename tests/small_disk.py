"""What does a disk do that is full at so many bytes? `SmallDisk` answers the calls of the system as it would."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from ckptmgr.testing import Call, SystemCalls

BLOCK = 4096


class SmallDisk:
    """While entered, what lies below `root` can take up no more than `capacity` bytes, in whole blocks. With a `quota`
    the file system says that it is almost empty, and only the write fails; `set_aside` are bytes that it counts as
    free and gives to nobody."""

    def __init__(self, root: Path, capacity: int, *, quota: bool = False, set_aside: int = 0) -> None:
        self._root, self.capacity, self._quota, self._set_aside = root, capacity, quota, set_aside
        self.calls = SystemCalls(root, self._before)
        self._statvfs = os.statvfs
        self.asked = 0  # how often somebody asked what is free

    @property
    def used(self) -> int:
        """In bytes. A file of several names counts once."""
        sizes = {}
        for path in self._root.rglob("*"):
            try:
                found = path.lstat()
            except FileNotFoundError:
                continue
            if path.is_file():
                sizes[found.st_ino] = -(-found.st_size // BLOCK) * BLOCK
        return sum(sizes.values())

    @property
    def free(self) -> int:
        return max(0, self.capacity - self.used)

    def __enter__(self) -> SmallDisk:
        os.statvfs = self._asked
        self.calls.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.calls.__exit__(kind, error, trace)
        os.statvfs = self._statvfs

    def _asked(self, path: Any) -> os.statvfs_result:
        found = self._statvfs(path)
        if not Path(path).absolute().is_relative_to(self._root):
            return found
        self.asked += 1
        free = (1 << 40 if self._quota else self.free + self._set_aside) // BLOCK
        return os.statvfs_result((BLOCK, BLOCK, 1 << 30, free, free, 1 << 20, 1 << 20, 1 << 20, 0, 255))

    def _before(self, call: Call) -> None:
        if call.name not in ("write", "allocate"):
            return
        path = self._root / call.path
        held = path.stat().st_size if path.is_file() else 0
        end = call.offset + call.size if call.name == "write" else call.size
        if end > held and self.used + (-(-end // BLOCK) + held // -BLOCK) * BLOCK > self.capacity:
            code = errno.EDQUOT if self._quota else errno.ENOSPC
            raise OSError(code, os.strerror(code), str(path))
