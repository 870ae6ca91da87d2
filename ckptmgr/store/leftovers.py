"""What is an unfinished file called, and how long may it stay when the process that wrote it is gone?"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_TEMP = re.compile(r"\.ckptmgr-[0-9a-f]{16}(\.[ab])?\.tmp")
_DEAD_S = 3600.0  # an unfinished small file is written in less


def temp_name(part: str = "") -> str:
    """A name that nothing else has, and that no listing shows."""
    return f".ckptmgr-{secrets.token_hex(8)}{part}.tmp"


def is_temp(name: str) -> bool:
    return name.startswith(".ckptmgr-") and name.endswith(".tmp")


def remove_leftovers(root: Path, records: str) -> int:
    """Remove unfinished files that nobody has touched for an hour by the file system's own clock, from the root, the
    folder of `records` in it and those in that; how many. Those of a checkpoint go with its draft. Never raises: the
    next call tries again."""
    found = list(_temps(root, root / records))
    if not found:
        return 0
    probe, count = root / records / temp_name(), 0
    with suppress(OSError):
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        for path in found:
            with suppress(OSError):
                if now - path.lstat().st_mtime > _DEAD_S:
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                    count += 1
    return count


def remove_unfinished(folder: Path) -> None:
    """Remove the unfinished files of a folder in which nobody writes. Never raises."""
    with suppress(OSError), os.scandir(folder) as entries:
        for path in [Path(entry.path) for entry in entries if _TEMP.fullmatch(entry.name)]:
            with suppress(OSError):
                path.unlink()


def _temps(root: Path, records: Path) -> Iterator[Path]:
    with suppress(OSError):
        folders = [
            root,
            records,
            *(Path(entry) for entry in os.scandir(records) if entry.is_dir(follow_symlinks=False)),
        ]
        for folder in folders:
            with os.scandir(folder) as entries:
                yield from (Path(entry.path) for entry in entries if _TEMP.fullmatch(entry.name))
