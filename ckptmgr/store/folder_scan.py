"""What is in a folder of a disk? Its files and folders, of which there may be ten thousand; never a link."""

from __future__ import annotations

import os
from contextlib import suppress

from . import Entry
from .arguments import are_names, is_key
from .leftovers import is_temp


def scan(folder: str, prefix: str, recursive: bool) -> list[Entry]:
    """Entries whose keys begin with `prefix`, in any order; none where the folder is not there. With `recursive`
    the files of all folders below it, too, and no folder."""
    found: list[Entry] = []
    left = [(folder, prefix)]  # a folder can be deeper than Python calls
    while left:
        folder, prefix = left.pop()
        folders, others = _children(folder)
        for child in others:
            if child.is_file(follow_symlinks=False) and is_key(child.name) and not is_temp(child.name):
                with suppress(FileNotFoundError):  # deleted since
                    about = child.stat(follow_symlinks=False)
                    found.append(Entry(prefix + child.name, about.st_size, about.st_mtime))
        if recursive:
            left += [(os.path.join(folder, name), f"{prefix}{name}/") for name in folders]
        else:
            found += [Entry(prefix + name, is_folder=True) for name in folders]
    return found


def folders_in(folder: str) -> list[str]:
    """The names of the folders in a folder, in any order; none where it is not there."""
    return _children(folder)[0]


def _children(folder: str) -> tuple[list[str], list[os.DirEntry[str]]]:
    """The names of the folders that could be ours, and whatever else is there."""
    others: list[os.DirEntry[str]] = []
    try:
        children = os.scandir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return [], others
    with children:  # of which ten thousand may be folders: hence one expression, where `append` answers None
        folders = [
            child.name
            for child in children
            if child.is_dir(follow_symlinks=False) or others.append(child)  # type: ignore[func-returns-value]
        ]
    if not are_names(folders):
        folders = [name for name in folders if is_key(name)]  # the others are nothing of ours
    return folders, others


def folders_below(path: str) -> list[tuple[str, list[str]]]:
    """A folder and those in it, however deep, each before those in it, with what else is in each. Follows no link."""
    found, left = [], [path]
    while left:
        folder, files = left.pop(), list[str]()
        with suppress(OSError), os.scandir(folder) as children:
            for child in children:
                (left if child.is_dir(follow_symlinks=False) else files).append(child.path)
        found.append((folder, files))
    return found
