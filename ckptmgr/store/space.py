"""How much more may this user write here? What the file system says of it, for any path, also one that is not there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Space:
    """What is left: `free` bytes in blocks of `block` bytes, and `files` more files (None where there is no such
    limit). A quota may leave less."""

    free: int
    block: int
    files: int | None = None

    def needed(self, sizes: Iterable[int]) -> int:
        """The bytes that files of these sizes take up, in whole blocks."""
        return sum(-(-size // self.block) * self.block for size in sizes)

    def has(self, needed: int) -> bool:
        """Whether a file of so many bytes can be written."""
        return self.free >= needed and self.files != 0


def space_left(path: Path) -> Space | None:
    """What is left on the file system of a path, or of where it would be. None where it does not say."""
    if not hasattr(os, "statvfs"):  # Windows
        return None
    for place in (path, *path.parents):
        try:
            found = os.statvfs(place)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return None
        if not found.f_blocks or not found.f_frsize:  # a file system that counts nothing
            return None
        # The blocks that are set aside for root are root's to write.
        blocks = found.f_bavail if os.geteuid() else found.f_bfree
        return Space(blocks * found.f_frsize, found.f_frsize, found.f_favail if found.f_files else None)
    return None
