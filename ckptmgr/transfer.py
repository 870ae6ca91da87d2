"""How do a checkpoint's bytes move fast? Large pieces, a few threads, digests on the way.

A file is cut into pieces of `PIECE_SIZE`, each with a digest of its own. A thread takes a piece and
moves it in chunks of a few MiB, hashed while they are in the processor's cache, so that memory stays
bounded and no Python runs per byte. This file writes; `scatter` reads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Protocol, TypeAlias

import xxhash

from .manifest import FileEntry, pieces
from .memory import buffer
from .store import Writer

if TYPE_CHECKING:
    from typing_extensions import Buffer

CHUNK = 4 << 20  # bytes moved at a time; they stay in the processor's cache from one use to the next
_WRITES = 3  # at a time; they keep a disk busy
_HANDS = _WRITES + 1  # threads, of which one has the next chunk ready. Else all would write, and all gather, together
SMALL = 8 << 20  # bytes; so few are moved before a thread has begun
_TOGETHER = 16  # small files that are open at a time
_START_S = 1.0  # seconds; a thread has begun by then


class Body(Protocol):
    """A file before it is written: its size is known, and any part of it can be had, from any thread."""

    @property
    def size(self) -> int:
        """In bytes."""

    def part(self, begin: int, end: int, scratch: memoryview) -> memoryview:
        """The bytes [begin, end), at most `CHUNK`: a view of where they lie already, or the first bytes of
        `scratch` (at least as many, page-aligned) filled with them. Valid until `scratch` is used again."""


# Where the bytes [begin, end) of a file go: an address in host memory that takes them all, or a
# callable that is given parts of them, as (offset from begin, bytes), in order, from one thread at a time.
# A network may garble bytes that have gone there already: then they come once more, from an earlier offset on.
Sink: TypeAlias = int | Callable[[int, memoryview], None]
Segment: TypeAlias = tuple[int, int, Sink]


class Stopped(BaseException):
    """Another thread of the crew failed, so this one gives up too. Never leaves the crew."""


class Crew:
    """Threads that do one thing together. When one of them fails, all stop soon, and the first error is raised."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._error: BaseException | None = None

    def run(self, work: Callable[[], None], hands: int) -> None:
        """Do `work` in so many threads at once, of which the caller's is one; at return no other is left.

        They inherit the caller's priority, where the system knows one for each thread."""
        threads: list[tuple[threading.Thread, threading.Event]] = []
        try:
            for _ in range(hands - 1):
                end = threading.Event()
                thread = threading.Thread(target=self._guarded, args=(work, end), name="ckptmgr-transfer")
                threads.append((thread, end))
                try:
                    thread.start()
                except RuntimeError:  # no more threads to be had: fewer will do
                    threads.pop()
                    break
            self._guarded(work, threading.Event())
        except BaseException as exc:  # noqa: BLE001 - raised below, once all have stopped
            self._fail(exc)
        for thread, end in threads:
            self._await(thread, end)
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None  # it holds this frame, which holds it

    def check(self) -> None:
        """Raises `Stopped` once any thread has failed."""
        if self._error is not None:
            raise Stopped

    def wait_for(self, is_so: Callable[[], bool]) -> None:
        """Block until the others have made it so; they notify `changed`. Raises `Stopped`."""
        with self.changed:
            self.changed.wait_for(lambda: self._error is not None or is_so())
        self.check()

    def _await(self, thread: threading.Thread, end: threading.Event) -> None:
        """Not by join alone: when a signal interrupts that, Python 3.11 takes the thread for ended."""
        while not end.is_set():
            try:
                if not end.wait(None if thread.ident else _START_S) and thread.ident is None:
                    return  # a signal came just before it was started
            except BaseException as exc:  # noqa: BLE001 - raised in `run`, once all have stopped
                self._fail(exc)
        thread.join()

    def _guarded(self, work: Callable[[], None], end: threading.Event) -> None:
        try:
            work()
        except Stopped:
            pass
        except BaseException as exc:  # noqa: BLE001 - raised in the caller's thread, once all have stopped
            self._fail(exc)
        finally:
            end.set()

    def _fail(self, error: BaseException) -> None:
        with self.changed:
            if self._error is None:
                self._error = error
            self.changed.notify_all()


def commit_all(writers: Sequence[Writer]) -> None:
    """Commit them, one after the other. When one fails, those that are left are aborted, and its error is raised."""
    left = [*writers]
    try:
        while left:
            left[0].commit()
            del left[0]
    finally:
        for writer in left:
            writer.abort()


def write_files(
    bodies: Mapping[str, Body],
    open_writer: Callable[[str, int], Writer],
    commit: Callable[[Sequence[Writer]], None] = commit_all,
) -> dict[str, FileEntry]:
    """Write whole files by name; at return they are complete and durable. Answers their entries.

    `open_writer` is given a name and a size in bytes. When anything fails, every file that is not
    complete is aborted, and the first error is raised. Small files are given to `commit`, some at a time, to be
    committed together; one that puts it off has files that are complete and durable only then.
    """
    writing = threading.Semaphore(_WRITES)
    files = [_File(name, body, writing) for name, body in bodies.items()]
    try:
        if sum(file.body.size for file in files) >= SMALL:
            _write_many(files, open_writer)
        else:
            _write_few(files, open_writer, commit)
    finally:
        for file in files:
            file.abort()
    return {file.name: file.entry() for file in files}


def _write_few(
    files: list[_File], open_writer: Callable[[str, int], Writer], commit: Callable[[Sequence[Writer]], None]
) -> None:
    """Few bytes, in this thread. Files are committed together: a disk takes several in less time than one by one."""
    crew, scratch = Crew(), buffer(min(CHUNK, max((file.body.size for file in files), default=0)))
    for first in range(0, len(files), _TOGETHER):
        group = files[first : first + _TOGETHER]
        for file in group:
            file.open(open_writer)
            file.write(range(file.count), scratch, crew)
        commit([file.take() for file in group])


def _write_many(files: list[_File], open_writer: Callable[[str, int], Writer]) -> None:
    """Many bytes, in several threads, each file committed by whoever wrote its last piece."""
    crew = Crew()
    tasks = _tasks(files, open_writer)
    in_order = threading.Lock()

    def work() -> None:
        scratch = buffer(CHUNK)
        while True:
            with crew.changed:
                task = next(tasks, None)
            if task is None:
                return
            file, indices = task
            with nullcontext() if file.is_positional else in_order:
                if file.write(indices, scratch, crew):
                    file.commit()

    crew.run(work, _HANDS)


def digests(body: Body) -> tuple[str, tuple[str, ...]]:
    """The digest that a file of this body would have, and those of its pieces as in a `FileEntry`. Blocks."""
    entry = write_files({"": body}, lambda name, size: _Nowhere())[""]
    return entry.digest, entry.pieces


class _Nowhere:
    """A writer that forgets."""

    is_positional = True

    def write(self, data: Buffer) -> None: ...

    def write_at(self, offset: int, data: Buffer) -> None: ...

    def commit(self) -> None: ...

    def abort(self) -> None: ...


def _tasks(files: list[_File], open_writer: Callable[[str, int], Writer]) -> Iterator[tuple[_File, range]]:
    """Pieces to write, each file opened when its turn comes."""
    for file in files:
        file.open(open_writer)
        if file.is_positional:
            yield from ((file, range(index, index + 1)) for index in range(file.count))
        else:
            yield file, range(file.count)


class _File:
    """A file on its way out; each chunk is written in a turn of `writing`, which the files share."""

    def __init__(self, name: str, body: Body, writing: threading.Semaphore) -> None:
        self.name, self.body = name, body
        self.writer: Writer | None = None
        self.is_positional = False
        self._writing = writing
        self._pieces = pieces(body.size)
        self._digests = [b""] * len(self._pieces)
        self._left = len(self._pieces)

    @property
    def count(self) -> int:
        return len(self._pieces)

    def open(self, open_writer: Callable[[str, int], Writer]) -> None:
        self.writer = open_writer(self.name, self.body.size)
        self.is_positional = self.writer.is_positional

    def write(self, indices: range, scratch: memoryview, crew: Crew) -> bool:
        """Write these pieces, and say whether they were the last ones: then the file is to be committed."""
        writer = self.writer
        assert writer is not None
        for index in indices:
            self._digests[index] = self._write_piece(writer, *self._pieces[index], scratch, crew)
        with crew.changed:
            self._left -= len(indices)
            return not self._left

    def commit(self) -> None:
        commit_all([self.take()])

    def take(self) -> Writer:
        """The writer, for the caller to end."""
        writer, self.writer = self.writer, None
        assert writer is not None
        return writer

    def _write_piece(self, writer: Writer, start: int, stop: int, scratch: memoryview, crew: Crew) -> bytes:
        piece_digest = xxhash.xxh3_128()
        for begin in range(start, stop, CHUNK):
            crew.check()
            end = min(begin + CHUNK, stop)
            data = self._part(begin, end, scratch)
            piece_digest.update(data)
            with self._writing:
                if self.is_positional:
                    writer.write_at(begin, data)
                else:
                    writer.write(data)
        return piece_digest.digest()

    def _part(self, begin: int, end: int, scratch: memoryview) -> memoryview:
        data = self.body.part(begin, end, scratch)
        if data.nbytes != end - begin:
            raise ValueError(f"the body of {self.name} gave {data.nbytes:,} bytes for [{begin:,}, {end:,})")
        return data

    def abort(self) -> None:
        """Give up what was not committed."""
        if self.writer is not None:
            self.writer.abort()

    def entry(self) -> FileEntry:
        return FileEntry.of(self.name, self.body.size, self._digests)
