"""Are these the bytes that were written? Reading a checkpoint's files, digests checked on the way.

Every byte handed out was covered by a digest of the manifest first, unless the level says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from .errors import DamagedError
from .manifest import MANIFEST_NAME, PIECE_SIZE, FileEntry, Manifest, pieces
from .memory import address, buffer
from .moves import move
from .ranged import RangedFile
from .records import each
from .scatter import Wanted, damages, scatter
from .store import Store
from .transfer import Segment


@dataclass(frozen=True, slots=True)
class Problem:
    """Something about one file that is not as the manifest says."""

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


class Source:
    """The files of one checkpoint, under the names that its format gave them.

    `level` is `off` (trust everything), `size` (sizes were compared) or `fast` (digests of the
    bytes being read). `by_many` says that other processes of this machine read the same files now. Safe
    from any thread; a file that it opened, from one at a time.
    """

    def __init__(
        self, store: Store, folder: str, manifest: Manifest, level: str = "fast", *, by_many: bool = False
    ) -> None:
        self._store = store
        self._folder = folder
        self._manifest = manifest
        self._by_many = by_many
        self._digests = level in ("fast", "full")
        self._is_remote = store.path is None
        # In manifest mode data lies one level down, under the attempt's nonce.
        self.files: Mapping[str, FileEntry] = {f.name.removeprefix(f"{manifest.nonce}/"): f for f in manifest.files}

    @property
    def where(self) -> str:
        return f"{self._store.url}/{self._folder}"

    def problems(self, level: str) -> list[Problem]:
        """What is wrong, file by file: sizes for `size`, every byte for `fast` and `full`; blocks."""
        if level == "off":
            return []
        sizes = self._sizes()
        found, whole = {}, []
        for name, file in self.files.items():
            size = sizes.get(self._key(file))
            if size is None:
                found[name] = Problem(name, "missing")
            elif size != file.size:
                found[name] = Problem(name, f"has {size:,} bytes, not the {file.size:,} of the manifest")
            elif level != "size":
                whole.append(file)
        damaged = self._damages(whole)
        found |= {name: Problem(name, str(damaged[f.name])) for name, f in self.files.items() if f.name in damaged}
        return [found[name] for name in self.files if name in found]

    def _sizes(self) -> dict[str, int]:
        """The bytes of each file that is there, by key."""
        sizes = {entry.key: entry.size for entry in self._store.list(self._folder, recursive=True)}
        if self._is_remote:  # where a listing may lag behind what was written: only the object itself can condemn it
            doubted = [key for file in self.files.values() if sizes.get(key := self._key(file)) != file.size]
            for key, entry in zip(doubted, each(self._store, self._store.stat, doubted), strict=True):
                if entry is not None:
                    sizes[key] = entry.size
                else:
                    sizes.pop(key, None)
        return sizes

    def checks(self) -> Iterator[None]:
        """Read every file, one piece of one file at each step. Raises `DamagedError` naming the first that is not
        what was written."""
        if problems := self.problems("size"):
            raise DamagedError(f"{self.where}: {'; '.join(map(str, problems))}")
        for name, file in self.files.items():
            for begin, end in pieces(file.size):
                self._scatter({name: [(begin, end, _nowhere)]}, digests=True)
                yield

    def check(self, file: FileEntry) -> None:
        """Read a file of the manifest whole. Raises `DamagedError` when it is not what was written."""
        for damage in self._damages([file]).values():
            raise damage

    def _damages(self, files: Iterable[FileEntry]) -> dict[str, DamagedError]:
        return damages([self._wanted(file, None) for file in files], is_remote=self._is_remote)

    def _wanted(self, file: FileEntry, segments: Sequence[Segment] | None) -> Wanted:
        key = self._key(file)
        return Wanted(
            file, f"{self.where}/{file.name}", lambda: self._store.reader(key, by_many=self._by_many), segments
        )

    def scatter(self, segments: Mapping[str, Sequence[Segment]]) -> None:
        """Read segments of files to where they go; see `formats.FileSource`. Raises `DamagedError`."""
        self._scatter(segments, digests=self._digests)

    def _scatter(self, segments: Mapping[str, Sequence[Segment]], *, digests: bool) -> None:
        wanted = [self._wanted(self._file(name), each) for name, each in segments.items()]
        scatter(wanted, digests=digests, is_remote=self._is_remote)

    def read(self, name: str) -> bytes:
        """A file whole, in memory. Raises `DamagedError`."""
        data = bytearray(self._file(name).size)
        self.scatter({name: [(0, len(data), address(memoryview(data)))]})
        return bytes(data)

    def open(self, name: str) -> BinaryIO:
        """A seekable file; blocks to fetch a piece at a time. Raises `DamagedError`."""
        return cast(BinaryIO, _CheckedFile(self, name, self._file(name).size))

    def _key(self, file: FileEntry) -> str:
        return f"{self._folder}/{file.name}"

    def _file(self, name: str) -> FileEntry:
        file = self.files.get(name)
        if file is None:
            raise DamagedError(f"{self.where}/{MANIFEST_NAME} lists no file {name!r}")
        return file


def _nowhere(offset: int, data: memoryview) -> None:
    """Bytes that are read only to be checked."""


class _CheckedFile(RangedFile):
    """A file that holds the piece that was read last in memory."""

    def __init__(self, source: Source, name: str, size: int) -> None:
        super().__init__(size)
        self._source, self._name = source, name
        self._held: memoryview | None = None
        self._index = -1  # of the piece that is held

    def readinto(self, data: Any) -> int:
        """Fills the buffer up to the file's end."""
        view = memoryview(data).cast("B")[: max(0, self._size - self._position)]
        done = 0
        while done < len(view):
            index, inside = divmod(self._position, PIECE_SIZE)
            rest = view[done:]
            whole = len(rest) if self._position + len(rest) == self._size else len(rest) // PIECE_SIZE * PIECE_SIZE
            if inside == 0 and whole:  # straight to its place
                self._read(self._position, rest[:whole])
                count = whole
            else:
                part = self._piece(index)[inside : inside + len(rest)]
                move(address(rest), address(part), len(part))
                count = len(part)
            done += count
            self._position += count
        return done

    def _piece(self, index: int) -> memoryview:
        begin = index * PIECE_SIZE
        size = min(PIECE_SIZE, self._size - begin)
        if self._held is None:
            self._held = buffer(min(PIECE_SIZE, self._size))
        if index != self._index:
            self._index = -1
            self._read(begin, self._held[:size])
            self._index = index
        return self._held[:size]

    def _read(self, begin: int, view: memoryview) -> None:
        self._source.scatter({self._name: [(begin, begin + len(view), address(view))]})
