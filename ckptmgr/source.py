"""Are these the bytes that were written? Reading a checkpoint's files, digests checked on the way.

Every byte handed out was covered by a digest of the manifest first, unless the level says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import xxhash

from .errors import DamagedError, NotFoundError
from .manifest import MANIFEST_NAME, PIECE_SIZE, FileEntry, Manifest, digest
from .ranged import RangedFile
from .store import Store


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
    bytes being read). Safe to use from one thread at a time.
    """

    def __init__(self, store: Store, folder: str, manifest: Manifest, level: str = "fast") -> None:
        self._store = store
        self._folder = folder
        self._manifest = manifest
        self._digests = level in ("fast", "full")
        # In manifest mode data lies one level down, under the attempt's nonce.
        self.files: Mapping[str, FileEntry] = {f.name.removeprefix(f"{manifest.nonce}/"): f for f in manifest.files}

    @property
    def where(self) -> str:
        return f"{self._store.url}/{self._folder}"

    def problems(self, level: str) -> list[Problem]:
        """What is wrong, file by file: sizes for `size`, every byte for `fast` and `full`; blocks."""
        if level == "off":
            return []
        sizes = {entry.key: entry.size for entry in self._store.list(self._folder, recursive=True)}
        found = []
        for name, file in self.files.items():
            size = sizes.get(f"{self._folder}/{file.name}")
            if size is None:
                found.append(Problem(name, "missing"))
            elif size != file.size:
                found.append(Problem(name, f"has {size:,} bytes, not the {file.size:,} of the manifest"))
            elif level != "size":
                try:
                    self._check_whole(file)
                except DamagedError as exc:
                    found.append(Problem(name, str(exc)))
        return found

    def _check_whole(self, file: FileEntry) -> None:
        """Every piece against its digest, and all of them against the file's."""
        whole = xxhash.xxh3_128()
        for index in range(max(1, -(-file.size // PIECE_SIZE))):
            whole.update(self.piece(file, index))
        if whole.hexdigest() != file.digest:
            raise DamagedError(f"{self.where}/{file.name}: its digest is not the one in the manifest")

    def piece(self, file: FileEntry, index: int) -> bytes:
        """The index-th `PIECE_SIZE` bytes of a file, checked."""
        start = index * PIECE_SIZE
        size = min(PIECE_SIZE, file.size - start)
        key = f"{self._folder}/{file.name}"
        expected = file.pieces[index] if index < len(file.pieces) else file.digest
        # A network can garble a body that the store holds intact: look twice before calling it damage.
        for _ in range(1 if self._store.path is not None else 2):
            try:
                data = self._store.get(key, start, start + size)
            except NotFoundError as exc:
                raise DamagedError(f"{self.where}/{file.name} is missing") from exc
            if len(data) == size and (not self._digests or digest(data) == expected):
                return data
        what = f"holds {start + len(data):,} of {file.size:,} bytes" if len(data) != size else "is not what was written"
        raise DamagedError(f"{self.where}/{file.name} {what} (bytes {start:,} to {start + size:,})")

    def read(self, name: str) -> bytes:
        """A file whole, in memory. Raises `DamagedError`."""
        with self.open(name) as file:
            return file.read()

    def open(self, name: str) -> BinaryIO:
        """A seekable file; blocks to fetch a piece at a time. Raises `DamagedError`."""
        file = self.files.get(name)
        if file is None:
            raise DamagedError(f"{self.where}/{MANIFEST_NAME} lists no file {name!r}")
        return cast(BinaryIO, _CheckedFile(self, file))


class _CheckedFile(RangedFile):
    """A file that holds its last two pieces in memory (torch.load reads end and front)."""

    def __init__(self, source: Source, file: FileEntry) -> None:
        super().__init__(file.size)
        self._source, self._file = source, file
        self._pieces: dict[int, bytes] = {}

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer up to the file's end."""
        view = memoryview(buffer).cast("B")
        done = 0
        while done < len(view) and self._position < self._size:
            index, inside = divmod(self._position, PIECE_SIZE)
            part = memoryview(self._piece(index))[inside : inside + len(view) - done]
            view[done : done + len(part)] = part
            done += len(part)
            self._position += len(part)
        return done

    def _piece(self, index: int) -> bytes:
        if index not in self._pieces:
            while len(self._pieces) > 1:
                self._pieces.pop(next(iter(self._pieces)))
            self._pieces[index] = self._source.piece(self._file, index)
        return self._pieces[index]
