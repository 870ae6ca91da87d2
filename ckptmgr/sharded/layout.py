"""Where does each item lie in the files that one rank writes? Worked out before a byte is written.

A file is one blob after the other, each at a multiple of `ALIGNMENT`, with zeros in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..staging import Region
from .blobs import ALIGNMENT, Blob

SPLIT_SIZE = 4 << 30  # bytes


class Row(NamedTuple):
    """One item in its file: the blob [offset, offset + length), in it the tensor's bytes from `begin` on.
    `offsets` is the chunk's place in its tensor, or None for a value that is no tensor, whose place in the state
    is `path`."""

    fqn: str
    offsets: tuple[int, ...] | None
    file: str
    offset: int
    length: int
    begin: int
    path: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """One item before it has a place; `number` is that of its tensor, None for a value that is no tensor."""

    fqn: str
    offsets: tuple[int, ...] | None
    blob: Blob
    number: int | None


def file_name(rank: int, count: int) -> str:
    return f"__{rank}_{count}.distcp"


def lay_out(pieces: Sequence[Piece], rank: int, split_size: int = SPLIT_SIZE) -> tuple[dict[str, Region], list[Row]]:
    """The files with these items, each of at most `split_size` bytes or of one item, and the place of each."""
    regions: dict[str, Region] = {}
    rows: list[Row] = []
    file = _File()
    for piece in pieces:
        if file.texts and file.end + piece.blob.length > split_size:
            regions[file_name(rank, len(regions))] = file.region()
            file = _File()
        offset = file.add(piece)
        name = file_name(rank, len(regions))
        begin = offset + len(piece.blob.prefix)
        rows.append(Row(piece.fqn, piece.offsets, name, offset, piece.blob.length, begin))
    if pieces:
        regions[file_name(rank, len(regions))] = file.region()
    return regions, rows


class _File:
    """A file that grows."""

    def __init__(self) -> None:
        self.end = 0
        self.texts: list[tuple[int, bytes]] = []
        self._numbers: list[int] = []
        self._begins: list[int] = []

    def add(self, piece: Piece) -> int:
        """Place an item at the end; answers where."""
        blob = piece.blob
        gap = -self.end % ALIGNMENT
        offset = self.end + gap
        self.texts.append((self.end, bytes(gap) + blob.prefix))
        begin = offset + len(blob.prefix)
        if piece.number is not None:
            self._numbers.append(piece.number)
            self._begins.append(begin)
        if blob.suffix:
            self.texts.append((begin + blob.size, blob.suffix))
        self.end = offset + blob.length
        return offset

    def region(self) -> Region:
        return Region(self.end, self._numbers, self._begins, texts=self.texts)
