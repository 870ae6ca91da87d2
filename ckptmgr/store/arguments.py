"""What may a caller hand to a store? Keys that stay below its root, and buffers as plain bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import Buffer

# What some system reads as a separator, a drive, a stream or the end of the name, or can't encode.
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\\:\ud800-\udfff]")
_NO_NAMES = frozenset(("", ".", ".."))
_PLAIN = bytes(range(0x20, 0x7F)).translate(None, b"\\:")  # none of them is forbidden


def is_key(key: str) -> bool:
    """Whether this is a relative path that can lead nowhere but below the root, on any system."""
    return are_names(key.split("/"))


def are_names(names: Sequence[str]) -> bool:
    """Whether each of these, which a folder holds, is a key by itself: asked in one look."""
    text = "/".join(names)
    # Nearly all are of plain letters, which is seen in a third of the time: there may be ten thousand.
    is_plain = text.isascii() and not text.encode().translate(None, _PLAIN)
    return (is_plain or not _FORBIDDEN.search(text)) and _NO_NAMES.isdisjoint(names)


def checked_key(key: str) -> str:
    """The key itself. Raises `ConfigError` for one that could lead out of the root."""
    if not is_key(key):
        raise ConfigError(
            f"{key!r} is not a key: use a relative path with '/' between its parts, "
            "without empty parts, '.', '..', '\\', ':' and control characters"
        )
    return key


def checked_folder(folder: str) -> str:
    """The folder itself, where "" is the root. Raises `ConfigError` as `checked_key` does."""
    return checked_key(folder) if folder else folder


def as_bytes(data: Buffer) -> memoryview:
    """A flat view of any contiguous buffer, without a copy."""
    view = memoryview(data)
    return view.cast("B") if view.nbytes else memoryview(b"")  # an empty view of several dimensions can't be cast
