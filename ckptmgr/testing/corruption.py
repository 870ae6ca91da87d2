"""Which ways are there to damage a file at rest? `corruptions` names them, so that a reader can be tried on each.

    for corruption in corruptions(path, seed=1, others=[old_path], outside=tmp_path):
        corruption.apply()
        ...  # what does the reader make of it?

Each is for a fresh copy of the same files: what one has done, the next does not expect.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

__all__ = ["Corruption", "corruptions"]

_SECTOR = 512  # bytes; what a disk loses at a time, at least
_PAGE = 4096  # bytes; what a system loses at a time


@dataclass(frozen=True)
class Corruption:
    """One way to damage one file. `kind` is the sort of damage, `name` says exactly which.

    Damage of content is done in place: every hard link to the file has it.
    """

    path: Path
    kind: str
    name: str
    _act: Callable[[Path], object] = field(repr=False, compare=False)

    def apply(self) -> None:
        """Damage the file. Blocks; raises `OSError`."""
        self._act(self.path)

    def __str__(self) -> str:
        return f"{self.path.name}: {self.name}"


def corruptions(
    path: str | Path, seed: int = 0, *, others: Sequence[Path] = (), outside: Path | None = None, flips: int = 8
) -> Iterator[Corruption]:
    """Ways to damage the file at `path`, the same ones for the same file and seed; nothing is done yet.

    Single bits flipped where files are most sensitive and at `flips` places of the seed's choice, ranges zeroed or
    filled with garbage, other sizes, blocks in another's place; no file, or something else in its place. `others` are
    files to trade places or contents with, such as those of the same name in older checkpoints. `outside` is an
    existing folder beyond the reader's reach, which gets the copies that symbolic links lead to.
    """
    path = Path(path)
    data = path.read_bytes()
    dice = random.Random(f"{seed} {path.name} {len(data)}")  # noqa: S311 - the same damage every time
    make = partial(Corruption, path)
    for place, at in _places(path, data, dice, flips):
        bit = dice.randrange(8)
        yield make("flip", f"bit {bit} of byte {at:,} flipped ({place})", partial(_flip, at=at, bit=bit))
    for at, size in _ranges(len(data)):
        for kind, part in (("zero", bytes(size)), ("garbage", dice.randbytes(size))):
            if data[at : at + size] != part:
                yield make(kind, f"bytes {at:,} to {at + size:,} are {kind}", partial(_overwrite, at=at, part=part))
    for size in sorted({0, 1, len(data) // 2, len(data) // _PAGE * _PAGE, len(data) - 1} - {len(data), -1}):
        yield make("truncate", f"truncated to {size:,} bytes", partial(os.truncate, length=size))
    for more in (b"\0", dice.randbytes(_PAGE)):
        yield make("extend", f"extended by {len(more):,} bytes", partial(_overwrite, at=len(data), part=more))
    for size in sorted({min(size, len(data) // 2) for size in (1, _SECTOR, _PAGE)} - {0}):
        if data[:size] != data[-size:]:
            yield make("blocks", f"the first and the last {size:,} bytes swapped", partial(_swap_blocks, size=size))
    if path.suffix == ".json":
        yield from _json_damages(make, data)
    for other in others:
        where = f"{other.parent.name}/{other.name}"
        if other.read_bytes() != data:
            yield make("stale", f"the content of {where}", partial(_stale, other=other))
            yield make("swap", f"swapped with {where}", partial(_swap, other=other))
    yield make("delete", "deleted", os.unlink)
    yield make("folder", "an empty folder in its place", partial(_folder, is_filled=False))
    yield make("folder", "a folder in its place, with the file in it", partial(_folder, is_filled=True))
    yield make("link", "a symbolic link to nothing", partial(_link, target=Path("nowhere")))
    if outside is not None:
        yield make("link", "a symbolic link to a copy of it outside", partial(_link, target=outside / _flat(path)))
    if hasattr(os, "mkfifo"):
        yield make("fifo", "a FIFO in its place", _fifo)
    if hasattr(os, "geteuid") and os.geteuid():
        yield make("unreadable", "no permission to read it", partial(os.chmod, mode=0))


def _places(path: Path, data: bytes, dice: random.Random, flips: int) -> Iterable[tuple[str, int]]:
    """Where a flipped bit is most likely to be overlooked, each place once."""
    if not data:
        return ()
    last = len(data) - 1
    places = {0: "first byte", last: "last byte"}
    if path.suffix == ".safetensors" and len(data) > 8:
        begin = min(8 + int.from_bytes(data[:8], "little"), last)
        places |= {
            7: "length of the header",
            9: "header",
            begin - 1: "end of the header",
            begin: "first of the tensors",
        }
    if path.suffix == ".pt" and (padding := data.find(b"ZZ")) > 0:
        places[padding] = "padding between records"
    for at in (dice.randrange(len(data)) for _ in range(flips)):
        places.setdefault(at, "anywhere")
    return ((place, at) for at, place in places.items())


def _ranges(size: int) -> Iterator[tuple[int, int]]:
    """Where and how many bytes: sectors and pages at their own boundaries, and all."""
    found = {(0, min(_SECTOR, size)), (0, size)}
    if size > _SECTOR:
        found.add(((size - 1) // _SECTOR * _SECTOR, size - (size - 1) // _SECTOR * _SECTOR))
    if size > 2 * _PAGE:
        found.add((size // 2 // _PAGE * _PAGE, _PAGE))
    yield from sorted((at, length) for at, length in found if length)


def _json_damages(make: Callable[..., Corruption], data: bytes) -> Iterator[Corruption]:
    """What a careless editor or a merge does to JSON."""
    begin = data.find(b"{")
    key = data[begin + 1 :].lstrip().split(b":", 1)[0].strip() if begin >= 0 else b""
    if key.startswith(b'"'):
        again = data[: begin + 1] + key + b": 1," + data[begin + 1 :]
        yield make("json", f"the key {key.decode()} twice, first with 1", partial(_replace, data=again))
        end = data.rfind(b"}")
        again = data[:end] + b"," + key + b": 1" + data[end:]
        yield make("json", f"the key {key.decode()} twice, last with 1", partial(_replace, data=again))
    yield make("json", "a byte order mark before it", partial(_replace, data=b"\xef\xbb\xbf" + data))
    yield make("json", "white space before and after it", partial(_replace, data=b" \n" + data + b"\n \n"))
    yield make("json", "an empty object", partial(_replace, data=b"{}"))
    yield make("json", "null", partial(_replace, data=b"null"))


def _flip(path: Path, *, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


def _overwrite(path: Path, *, at: int, part: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(part)


def _replace(path: Path, *, data: bytes) -> None:
    with path.open("r+b") as file:
        file.truncate()
        file.write(data)


def _swap_blocks(path: Path, *, size: int) -> None:
    data = path.read_bytes()
    _overwrite(path, at=0, part=data[-size:])
    _overwrite(path, at=len(data) - size, part=data[:size])


def _stale(path: Path, *, other: Path) -> None:
    _replace(path, data=other.read_bytes())


def _swap(path: Path, *, other: Path) -> None:
    mine, its = path.read_bytes(), other.read_bytes()
    _replace(path, data=its)
    _replace(other, data=mine)


def _folder(path: Path, *, is_filled: bool) -> None:
    aside = path.with_name(f"{path.name}.aside")
    path.rename(aside)
    path.mkdir()
    if is_filled:
        aside.rename(path / path.name)
    else:
        aside.unlink()


def _link(path: Path, *, target: Path) -> None:
    if target.is_absolute():
        shutil.copyfile(path, target)
    path.unlink()
    path.symlink_to(target)


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _flat(path: Path) -> str:
    return f"{path.parent.name}-{path.name}"
