"""What may a disk hold after a power cut? Every legal state, made from a trace of system calls: `PowerLoss`.

The rules are the weakest that a file system of POSIX may keep, not those of one that is in use:

- A file's bytes and its size are durable once an fsync of that file has returned. Of what was written
  since any part may be there, by sectors, in any order; the file may have its new size and zeros for
  its new bytes, or be truncated before or after what was written around that.
- A name that was made, linked or removed is so for good once its folder was fsynced, a renamed one once the
  folder was that it is in now. Of what was done to names since any part may have happened, in any order,
  but a rename has or has not as a whole. The fsync of a file says nothing of its name, nor that of a folder of its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from .system_calls import Call

__all__ = ["DiskState", "PowerLoss"]

SECTOR, PAGE = 512, 4096  # bytes; a disk writes the one in one go, a system the other
_ROOT = 0  # the number of the root's inode


@dataclass(frozen=True)
class DiskState:
    """What a folder holds: the bytes of each file, and the folders below it, by path with "/" between the names.

    `calls` is how many calls were made before the power went, and `lost` names what of them is not there.
    """

    files: Mapping[str, bytes] = field(default_factory=dict)
    folders: frozenset[str] = frozenset()
    calls: int = 0
    lost: tuple[str, ...] = ()

    @classmethod
    def of(cls, folder: Path) -> DiskState:
        """What a real folder holds now; nothing when it does not exist."""
        below = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
        files = {name: path.read_bytes() for name, path in below.items() if path.is_file()}
        return cls(files, frozenset(name for name, path in below.items() if path.is_dir()))

    def write_to(self, folder: Path) -> None:
        """Make a folder that holds this. Raises `FileExistsError` when it is there."""
        folder.mkdir(parents=True)
        for name in sorted(self.folders):
            (folder / name).mkdir()
        for name, data in self.files.items():
            (folder / name).write_bytes(data)

    def has_same_content(self, other: DiskState) -> bool:
        return self.files == other.files and self.folders == other.folders

    def __str__(self) -> str:
        lost = "; ".join(self.lost) or "nothing"
        return f"after {self.calls} calls, lost: {lost}"


@dataclass(frozen=True)
class _Part:
    """The smallest change that is on the disk or is not: names, or bytes of one file (`put`), or its size."""

    words: str
    names: tuple[tuple[int, str, int | None], ...] = ()  # (folder, name, what it names from now on)
    file: int | None = None
    size: int | None = None  # the least that it has, or with `is_cut` exactly what it has
    is_cut: bool = False
    offset: int = 0
    data: bytes = b""
    needs: int = 0  # the parts that must be there, too

    def change(self, content: bytearray, size: int) -> int:
        """Do it to a file's blocks; the file's size from now on."""
        if self.size is None:
            content.extend(bytes(max(0, self.offset + len(self.data) - len(content))))
            content[self.offset : self.offset + len(self.data)] = self.data
            return size
        if self.is_cut:
            del content[self.size :]
            return self.size
        return max(size, self.size)


class PowerLoss:
    """What a folder may hold when the power goes before, between or after these calls.

        before = DiskState.of(folder)
        with SystemCalls(folder, keep_data=True) as calls:
            save(model, folder)
            saved = len(calls.log)                       # from here on the save must not be lost
        for state in PowerLoss(calls.log, before).states(promises=[saved]):
            state.write_to(scratch := tmp_path / str(uuid4()))
            check(scratch, must_be_there=state.calls >= saved)

    `calls` are those of a `SystemCalls(folder, keep_data=True)`, `before` is what the folder held, durably, when it
    was entered. Raises `ValueError` for calls that don't fit together, and for a `symlink`: it has only files and
    folders.
    """

    def __init__(self, calls: Sequence[Call], before: DiskState | None = None) -> None:
        self._parts: list[_Part] = []
        self._tree: dict[int, dict[str, int]] = {_ROOT: {}}  # by folder: what its names mean, as the program sees it
        self._sizes: dict[int, int] = {}  # of files
        self._gone: dict[str, int] = {}  # removed names that something may still be open under
        self._content: dict[int, bytes] = {}  # from before
        self._waiting: dict[int, list[int]] = {}  # by file or folder: the parts that its fsync makes durable
        self._renamed: dict[tuple[int, str], int] = {}  # the renames that gave names, as parts
        self._bits: dict[int, int] = {}  # by file: its parts
        self._built: dict[tuple[int, int], bytes] = {}
        self._chained: list[int] = []  # the parts that need others
        self._load(before or DiskState())
        self._start = {folder: dict(names) for folder, names in self._tree.items()}
        self._moments = [(0, 0)]  # after each call: the parts there can be, and those that must be there
        durable = 0
        for call in calls:
            first = len(self._parts)
            durable |= self._replay(call)
            for place in range(first, len(self._parts)):
                part = self._parts[place]
                self._waiting.setdefault(part.names[-1][0] if part.file is None else part.file, []).append(place)
            self._moments.append(((1 << len(self._parts)) - 1, durable))

    def after_all(self) -> DiskState:
        """What the program itself sees after the last call. Where the real folder is not `has_same_content`, a change
        went past `SystemCalls` (which says what it does not see)."""
        return self._build(len(self._moments) - 1, self._moments[-1][0])

    def states(
        self, *, promises: Iterable[int] = (), subsets: int = 4, seed: int = 0, most: int | None = None
    ) -> Iterator[DiskState]:
        """Different states, those of earlier moments first; the same for the same `seed`.

        Of what is not durable at a moment: nothing, all, each part alone, all but each, the first few,
        the bytes of each file lost or zeros, and `subsets` random choices. A state that is possible
        before and after one of the `promises` (numbers of calls) is given for both. `most` is how many
        to try at most, evenly spread.
        """
        chosen = self._choices(sorted(promises), subsets, random.Random(seed))  # noqa: S311 - nothing secret
        if most is not None and len(chosen) > most:
            chosen = [chosen[place * len(chosen) // most] for place in range(most)]
        told: dict[int, set[int]] = {}
        for period, calls, there in chosen:
            state = self._build(calls, there)
            content = hash((frozenset(state.files.items()), state.folders))
            if content not in told.setdefault(period, set()):
                told[period].add(content)
                yield state

    def _choices(self, promises: Sequence[int], subsets: int, lots: random.Random) -> list[tuple[int, int, int]]:
        """(Promises made, calls made, parts there), each first and last only once."""
        chosen: dict[tuple[int, int], int] = {}
        for calls, (made, durable) in enumerate(self._moments):
            period = sum(promise <= calls for promise in promises)
            for there in self._subsets(made, durable, subsets, lots):
                chosen.setdefault((period, self._closed(there)), calls)
        return [(period, calls, there) for (period, there), calls in chosen.items()]

    def _subsets(self, made: int, durable: int, subsets: int, lots: random.Random) -> Iterator[int]:
        yield made
        yield durable
        places = [place for place in range(made.bit_length()) if (made & ~durable) >> place & 1]
        first = durable
        for place in places:
            first |= 1 << place
            yield first
            yield durable | 1 << place
            yield made & ~(1 << place)
        names = sum(1 << place for place in places if self._parts[place].file is None)
        yield durable | names
        yield made & ~names
        for file in {self._parts[place].file for place in places} - {None}:
            of_file = [place for place in places if self._parts[place].file == file]
            yield made & ~sum(1 << place for place in of_file)
            yield made & ~sum(1 << place for place in of_file if self._parts[place].size is None)  # zeros
        for _ in range(subsets if len(places) > 1 else 0):
            yield durable | sum(1 << place for place in places if lots.random() < 0.5)

    def _closed(self, there: int) -> int:
        """With the renames before the renames."""
        for place in reversed(self._chained):
            if there >> place & 1:
                there |= self._parts[place].needs
        return there

    # From calls to parts

    def _replay(self, call: Call) -> int:
        """Take note of a call; what it makes durable."""
        match call.name:
            case "create":
                self._sizes[number := self._new()] = 0
                self._name(call, (*self._place(call.path), number))
            case "mkdir":
                self._tree[number := self._new()] = {}
                self._name(call, (*self._place(call.path), number))
            case "link":
                self._name(call, (*self._place(call.target), self._find(call.path)))
            case "unlink" | "rmdir":
                self._gone[call.path] = self._find(call.path)
                self._name(call, (*self._place(call.path), None))
            case "rename":
                self._rename(call)
            case "write":
                self._write(call)
            case "truncate" | "allocate":
                file, is_cut = self._find(call.path), call.name == "truncate"
                self._sizes[file] = call.size if is_cut else max(self._sizes[file], call.size)
                self._add(_Part(self._words(call), file=file, size=call.size, is_cut=is_cut))
            case "symlink":
                raise ValueError(
                    f"call {call.number} makes the symlink {call.path!r}: only files and folders are known"
                )
            case "sync" | "sync_folder":
                return sum(1 << place for place in self._waiting.pop(self._find(call.path), ()))
        return 0

    def _rename(self, call: Call) -> None:
        moved, source = self._find(call.path), self._place(call.path)
        if not call.target:  # out of the folder
            self._name(call, (*source, None))
            return
        target = self._place(call.target)
        if self._tree[target[0]].get(target[1]) != moved:  # else both are one file, and nothing happens
            needs = 1 << self._renamed[source] if source in self._renamed else 0
            self._name(call, (*source, None), (*target, moved), needs=needs)
            self._renamed[target] = len(self._parts) - 1

    def _write(self, call: Call) -> None:
        if call.data is None:
            raise ValueError(f"call {call.number} has no data: record with SystemCalls(folder, keep_data=True)")
        file, end = self._find(call.path), call.offset + len(call.data)
        if end > self._sizes[file]:
            self._sizes[file] = end
            self._add(_Part(f"{self._words(call)}: the size", file=file, size=end))
        for begin, stop in _torn(call.offset, end):
            words = f"{self._words(call)}: bytes {begin} to {stop}"
            data = call.data[begin - call.offset : stop - call.offset]
            self._add(_Part(words, file=file, offset=begin, data=data))

    def _name(self, call: Call, *names: tuple[int, str, int | None], needs: int = 0) -> None:
        for folder, name, number in names:
            self._renamed.pop((folder, name), None)
            if number is None:
                self._tree[folder].pop(name, None)
            else:
                self._tree[folder][name] = number
        self._add(_Part(self._words(call), names=names, needs=needs))

    def _add(self, part: _Part) -> None:
        if part.file is not None:
            self._bits[part.file] = self._bits.get(part.file, 0) | 1 << len(self._parts)
        if part.needs:
            self._chained.append(len(self._parts))
        self._parts.append(part)

    def _words(self, call: Call) -> str:
        return f"{len(self._moments)} {call.name} {call.path}{f' -> {call.target}' if call.target else ''}"

    def _new(self) -> int:
        return len(self._tree) + len(self._sizes)

    def _place(self, path: str) -> tuple[int, str]:
        """The folder and the last name of a path."""
        folder, _, name = path.rpartition("/")
        return self._find(folder or "."), name

    def _find(self, path: str) -> int:
        number = _ROOT
        try:
            for name in path.split("/") if path != "." else ():
                number = self._tree[number][name]
        except KeyError:
            if path in self._gone:
                return self._gone[path]
            raise ValueError(f"{path!r} is not there: pass what the folder held before the first call") from None
        return number

    def _load(self, before: DiskState) -> None:
        for name in sorted(before.folders):
            folder, last = self._place(name)
            self._tree[folder][last] = number = self._new()
            self._tree[number] = {}
        for name, data in before.files.items():
            folder, last = self._place(name)
            self._tree[folder][last] = number = self._new()
            self._sizes[number], self._content[number] = len(data), data

    # From parts to states

    def _build(self, calls: int, there: int) -> DiskState:
        tree = {folder: dict(names) for folder, names in self._start.items()}
        for place, part in enumerate(self._parts):
            if part.names and there >> place & 1:
                for folder, name, number in part.names:
                    names = tree.setdefault(folder, {})
                    if number is None:
                        names.pop(name, None)
                    else:
                        names[name] = number
        files: dict[str, bytes] = {}
        folders = set()
        left = [("", _ROOT)]
        while left:
            prefix, folder = left.pop()
            for name, number in tree.get(folder, {}).items():
                if number in self._sizes:
                    files[prefix + name] = self._bytes(number, there)
                else:
                    folders.add(prefix + name)
                    left.append((f"{prefix}{name}/", number))
        made, _ = self._moments[calls]
        lost = (part.words for place, part in enumerate(self._parts) if (made & ~there) >> place & 1)
        return DiskState(files, frozenset(folders), calls, tuple(lost))

    def _bytes(self, file: int, there: int) -> bytes:
        there &= self._bits.get(file, 0)
        if (file, there) not in self._built:
            content = bytearray(self._content.get(file, b""))
            size = len(content)
            for place in range(there.bit_length()):
                if there >> place & 1:
                    size = self._parts[place].change(content, size)
            content.extend(bytes(max(0, size - len(content))))
            self._built[file, there] = bytes(content[:size])
        return self._built[file, there]


def _torn(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """A write in up to four pieces that reach the disk each by itself: its first and its last sector, and the
    pages between them in two halves."""
    middle = (begin + end) // 2
    cuts = {begin - begin % SECTOR + SECTOR, middle - middle % PAGE, (end - 1) - (end - 1) % SECTOR}
    places = [begin, *sorted(cut for cut in cuts if begin < cut < end), end]
    return pairwise(places)
