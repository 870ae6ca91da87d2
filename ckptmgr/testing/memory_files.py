"""Where do a format's files go in a test? Into memory, digests checked as in a real checkpoint."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from ..errors import AlreadyExistsError, DamagedError
from ..manifest import FileEntry, checked_name, digest

if TYPE_CHECKING:
    from typing_extensions import Buffer


class MemoryFile:
    """A `SinkFile` in memory."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: Buffer) -> int:
        view = memoryview(data).cast("B")
        self.data += view
        return len(view)


class MemoryFiles:
    """A `FileSink` and `FileSource` in one: what was created can be read back, and damaged.

    `data` are the bytes by name. Changing them is damage; call `seal` after it to have digests and
    sizes that fit, as someone would who forges a checkpoint. `opened` lists the files opened.
    """

    def __init__(self) -> None:
        self.data: dict[str, bytes] = {}
        self.files: dict[str, FileEntry] = {}
        self.opened: list[str] = []

    @contextmanager
    def create(self, name: str) -> Iterator[MemoryFile]:
        if checked_name(name) in self.data:
            raise AlreadyExistsError(f"there already is a file {name!r}")
        file = MemoryFile()
        yield file
        self.data[name] = bytes(file.data)
        self.seal()

    def seal(self) -> None:
        self.files = {name: FileEntry(name, len(data), digest(data)) for name, data in self.data.items()}

    def read(self, name: str) -> bytes:
        with self.open(name) as file:
            return file.read()

    def open(self, name: str) -> BinaryIO:
        if name not in self.files:
            raise DamagedError(f"the manifest lists no file {name!r}")
        self.opened.append(name)
        data = self.data.get(name, b"")
        if digest(data) != self.files[name].digest:
            raise DamagedError(f"{name} is not what was written")
        return io.BytesIO(data)
