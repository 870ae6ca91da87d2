"""Can a folder be renamed in one step here? Asked of the mount table and of the folder itself."""

from __future__ import annotations

import errno
from pathlib import Path

from .leftovers import temp_name

_MOUNTS = Path("/proc/self/mountinfo")
_NO_ANSWER = {errno.ENOSPC, errno.EDQUOT, errno.EIO}
_NO_WRITER = {errno.EACCES, errno.EPERM, errno.EROFS}


def can_rename_folders(root: Path) -> bool:
    """Whether a rename moves a whole folder atomically below `root`, which need not exist yet.

    FUSE mounts are refused whatever they answer: a mounted bucket renames by copying. Raises `OSError` where it can't
    be tried: a disk that is full or failing, or nothing may be written."""
    folder = next((p for p in (root, *root.parents) if p.is_dir()), None)
    return folder is not None and not _is_fuse(mount_type_at(folder)) and _probe(folder)


def _is_fuse(kind: str) -> bool:
    # fuseblk is a local disk behind a driver in user space (NTFS, exFAT).
    return kind == "fuse" or kind.startswith("fuse.")


def mount_type_at(folder: Path) -> str:
    """The type of the file system that a folder is on, or is going to be; "" where nobody says."""
    try:
        lines = _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return ""
    return mount_type(lines, folder.resolve())


def mount_type(lines: list[str], folder: Path) -> str:
    """The file system type that `/proc/self/mountinfo` names for a folder ("" where it names none)."""
    depth, kind = -1, ""
    for line in lines:
        left, _, right = line.partition(" - ")
        fields, types = left.split(" "), right.split(" ")
        if len(fields) < 5:
            continue
        point = Path(_unescaped(fields[4]))
        # Of two mounts on one point the later hides the earlier.
        if folder.is_relative_to(point) and len(point.parts) >= depth:
            depth, kind = len(point.parts), types[0]
    return kind


def _unescaped(field: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        field = field.replace(code, char)
    return field


def _probe(folder: Path) -> bool:
    source, target = folder / temp_name(".a"), folder / temp_name(".b")
    try:
        source.mkdir()
        (source / "file").touch()
        source.rename(target)
        return (target / "file").is_file() and not source.exists()
    except OSError as exc:
        if exc.errno in _NO_ANSWER or (exc.errno in _NO_WRITER and not source.exists()):
            raise
        return False
    finally:
        for place in (source, target):
            for remove in ((place / "file").unlink, place.rmdir):
                try:
                    remove()
                except OSError:  # was never made, or can't be removed where it could be made
                    continue
