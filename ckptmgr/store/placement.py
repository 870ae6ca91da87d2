"""Which bytes of an object have been placed, when they come in any order? All of them, or it is not whole."""

from __future__ import annotations

from ..errors import StoreError
from . import BLOCK


class Placement:
    """The places of one object of `size` bytes; `what` names it in messages."""

    def __init__(self, size: int, what: str) -> None:
        self._size, self._what = size, what
        self._places: dict[int, int] = {}  # the end of each by its begin; one store into a dict is safe from any thread

    def __bool__(self) -> bool:
        return bool(self._places)

    def check(self, offset: int, count: int) -> None:
        """Raises `StoreError` for a place that `Writer.write_at` does not take."""
        end = offset + count
        if offset % BLOCK or offset < 0 or end > self._size or (count % BLOCK and end != self._size):
            raise StoreError(
                f"{count:,} bytes at {offset:,} can't be placed in {self._what} of {self._size:,} bytes: begin at a "
                f"multiple of {BLOCK:,}, place a multiple of it but at the end, and nothing behind the end"
            )

    def add(self, offset: int, count: int) -> None:
        """The bytes at this place are written."""
        self._places[offset] = max(offset + count, self._places.get(offset, 0))

    def check_whole(self) -> None:
        """Raises `StoreError` while a byte is missing."""
        whole = 0
        for begin in sorted(self._places):
            if begin > whole:
                break
            whole = max(whole, self._places[begin])
        check_size(whole, self._size, self._what)


def check_size(count: int, size: int | None, what: str) -> None:
    """Raises `StoreError` for an object that was begun with another size, where that was given."""
    if size is not None and count != size:
        raise StoreError(
            f"{what} was begun as {size:,} bytes, but {count:,} were written from its begin on: "
            "nothing of it was kept, write it again"
        )
