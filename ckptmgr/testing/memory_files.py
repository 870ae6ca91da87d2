"""Where do a format's files go in a test? Into memory, digests checked as in a real checkpoint."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO

from ..errors import AlreadyExistsError, DamagedError
from ..manifest import FileEntry, checked_name, digest
from ..memory import buffer, view
from ..transfer import CHUNK, Body, Segment

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
    `chunk` is how many bytes are moved at a time.
    """

    def __init__(self, chunk: int = CHUNK) -> None:
        self.chunk = chunk
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

    def write(self, bodies: Mapping[str, Body]) -> None:
        scratch = buffer(CHUNK)
        for name, body in bodies.items():
            with self.create(name) as file:
                for begin in range(0, body.size, self.chunk):
                    file.write(body.part(begin, min(begin + self.chunk, body.size), scratch))

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

    def scatter(self, segments: Mapping[str, Sequence[Segment]]) -> None:
        for name, of_file in segments.items():
            with self.open(name) as file:
                reached = 0
                for begin, end, sink in of_file:
                    assert reached <= begin < end <= self.files[name].size, f"{name}: {begin} to {end}"
                    reached = end
                    file.seek(begin)
                    if isinstance(sink, int):
                        view(sink, end - begin)[:] = file.read(end - begin)
                        continue
                    for at in range(0, end - begin, self.chunk):
                        sink(at, memoryview(file.read(min(self.chunk, end - begin - at))))
