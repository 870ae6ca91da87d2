"""How does a file look whose bytes are fetched range by range? Read-only and seekable."""

from __future__ import annotations

import io


class RangedFile(io.RawIOBase):
    """The position and its moves; whoever derives says in `readinto` where bytes come from."""

    def __init__(self, size: int) -> None:
        self._size, self._position = size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = (0, self._position, self._size)[whence] + offset
        if position < 0:
            raise ValueError(f"seek to {position}, before the file's start")
        self._position = position
        return position
