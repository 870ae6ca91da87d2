"""How do many ranks read a checkpoint at the price of one? One of them reads and checks, and broadcasts.

Bytes travel in frames of at most `PIECE_SIZE`; while one is broadcast, the reader reads the next. An
error of any rank ends the call on all of them, so that nothing is loaded on some ranks only.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from tempfile import SpooledTemporaryFile, gettempdir
from typing import TYPE_CHECKING, BinaryIO, TypeAlias, cast

import xxhash

from . import errors
from .coordinator.outcome import Failure
from .errors import CheckpointError, CoordinationError, DamagedError, StoreError
from .manifest import PIECE_SIZE
from .memory import address, buffer
from .moves import move, move_small
from .transfer import Segment

if TYPE_CHECKING:
    from .coordinator import Circle
    from .formats import FileSource

_LARGE = 256 << 10  # bytes; from here on a copy lets other threads run
_BEAT_S = 1.0  # seconds; a reader that waits for its store is heard of so often

# What the reader says before each frame, if not how long the text of its error is.
_READY, _WAIT = 0, -1

_Span: TypeAlias = tuple[str, int, int]  # the bytes [begin, end) of a file


class SharedSource:
    """A `FileSource` of which every rank of a circle makes the same calls in the same order, each of them
    blocking; only what `scatter` is asked for may differ from rank to rank. A rank alone needs none: it uses `inner`.

    `inner` is asked for `files` on every rank, which must be the same, and for bytes on the reader only.
    An error of the reader's is raised on all ranks with the same class and text. One that a rank has with
    its own memory, disk or sinks is raised there when all bytes have come, and of the same class and text
    on the others; what is not of this library is a `RankError` there. Raises `CoordinationError` when the
    ranks lose each other. Holds memory for two frames on the reader, and for one elsewhere, as long as it lives.
    """

    def __init__(self, inner: FileSource, circle: Circle) -> None:
        self.files = inner.files
        self._inner, self._circle = inner, circle
        size = min(PIECE_SIZE, sum(file.size for file in self.files.values()))
        self._buffers = [buffer(size) for _ in range(2 if circle.is_reader else 1)]
        self._header = memoryview(bytearray(16))

    def read(self, name: str) -> bytes:
        """A small file whole, in memory. Raises `DamagedError`."""
        parts: list[bytes] = []
        size = self._size(name)
        error = self._carry([(name, 0, size)], {name: [(0, size, lambda _, data: parts.append(bytes(data)))]})
        if error is not None:
            raise error
        return b"".join(parts)

    def open(self, name: str) -> BinaryIO:
        """A seekable file that each rank has to itself: in memory, or on its own disk when it is larger than
        `PIECE_SIZE`. Every byte has been fetched at return. Raises `DamagedError`, and `StoreError` when
        a rank's disk is full."""
        size = self._size(name)
        file = SpooledTemporaryFile(max_size=PIECE_SIZE)  # noqa: SIM115 - the caller closes it

        def keep(_: int, data: memoryview) -> None:
            try:
                file.write(data)
                file.flush()  # or a full disk would show when this rank has left the others
            except OSError as exc:
                message = f"can't keep a copy of {name} ({size:,} bytes) in {gettempdir()}: {exc.strerror}; set TMPDIR"
                raise StoreError(message, exc.errno) from exc

        try:
            self._agree([], self._carry([(name, 0, size)], {name: [(0, size, keep)]}))
            file.seek(0)
        except BaseException:
            with suppress(OSError):  # it tries once more to write what the disk has no room for
                file.close()
            raise
        return cast(BinaryIO, file)

    def scatter(self, segments: Mapping[str, Sequence[Segment]]) -> None:
        """See `FileSource.scatter`. What any rank wants travels to all, and each takes its own."""
        own: list[_Span] = []
        error = None
        try:
            own = self._wanted(segments)
        except Exception as exc:  # noqa: BLE001 - raised once the other ranks know
            error = exc
        order = {name: number for number, name in enumerate(self.files)}
        spans = sorted(self._agree(own, error), key=lambda span: (order[span[0]], span[1]))
        self._agree([], self._carry(spans, segments))

    def _size(self, name: str) -> int:
        if name not in self.files:
            raise DamagedError(f"the checkpoint's manifest lists no file {name!r}")
        return self.files[name].size

    def _wanted(self, segments: Mapping[str, Sequence[Segment]]) -> list[_Span]:
        """What this rank wants of each piece, from its first byte to its last. Raises `DamagedError`."""
        for name, rows in segments.items():
            size = self._size(name)
            if (last := max((end for _, end, _ in rows), default=0)) > size:
                raise DamagedError(f"{name} holds {size:,} bytes, not the {last:,} that are to be read")
        return _within_pieces((name, begin, end) for name, rows in segments.items() for begin, end, _ in rows)

    def _agree(self, spans: list[_Span], error: Exception | None) -> list[_Span]:
        """What all ranks want. Raises on every rank when one brings an error."""
        told = self._circle.union([(spans, None if error is None else Failure.of(error, 0))])
        if error is not None:
            raise error
        for [(_, failure)] in told:
            if failure is not None:
                raise _error(failure.kind, failure.text, failure.errno)
        return [span for [(of_rank, _)] in told for span in of_rank]

    def _carry(self, spans: list[_Span], segments: Mapping[str, Sequence[Segment]]) -> Exception | None:
        """Bring spans, in order, to every rank; the error of this rank's own sinks. Raises the reader's error."""
        hands = {name: _Hand(rows) for name, rows in segments.items()}
        error: Exception | None = None
        with closing(self._arrivals(_frames(spans))) as arrivals:
            for frame, data in arrivals:
                try:
                    for part in frame if error is None else ():
                        if part.name in hands:
                            hands[part.name].take(part, data)
                except Exception as exc:  # noqa: BLE001 - raised at the call's end: the others count on this rank
                    error = exc
        return error

    def _arrivals(self, frames: list[list[_Part]]) -> Generator[tuple[list[_Part], memoryview], None, None]:
        """Each frame with a buffer that holds it now, on every rank. Raises the reader's error."""
        if not self._circle.is_reader:
            for frame in frames:
                self._hear(frame)
                yield frame, self._exchanged(frame, self._buffers[0])
            return
        with ThreadPoolExecutor(1, "ckptmgr-shared") as pool:
            reading = [self._begin(pool, frame, self._buffers[0]) for frame in frames[:1]]
            for number, frame in enumerate(frames):
                self._await(reading.pop(), frame)
                if number + 1 < len(frames):
                    reading.append(self._begin(pool, frames[number + 1], self._buffers[(number + 1) % 2]))
                self._say(_READY, frame)
                yield frame, self._exchanged(frame, self._buffers[number % 2])

    def _exchanged(self, frame: list[_Part], data: memoryview) -> memoryview:
        """The frame's bytes, which the reader has in its buffer and the others get in theirs."""
        self._circle.broadcast(data[: frame[-1].at + frame[-1].end - frame[-1].begin])
        return data

    def _begin(self, pool: ThreadPoolExecutor, frame: list[_Part], data: memoryview) -> Future[None]:
        """Start to read a frame into a buffer."""
        try:
            return pool.submit(self._fill, frame, data)
        except RuntimeError as exc:  # no thread to be had: an error of the reader's like any other
            failed: Future[None] = Future()
            failed.set_exception(exc)
            return failed

    def _fill(self, frame: list[_Part], data: memoryview) -> None:
        base = address(data)
        segments: dict[str, list[Segment]] = defaultdict(list)
        for part in frame:
            segments[part.name].append((part.begin, part.end, base + part.at))
        self._inner.scatter(segments)

    def _await(self, reading: Future[None], frame: list[_Part]) -> None:
        """Wait for what is being read, with signs of life to the others. Raises its error once they know it."""
        while True:
            try:
                error = reading.exception(_BEAT_S)
                break
            except TimeoutError:
                self._say(_WAIT, frame)
        if error is None:
            return
        if isinstance(error, Exception):
            failure = Failure.of(error, 0)
            text = bytearray(json.dumps((failure.kind, failure.text, failure.errno)).encode())
            self._say(len(text), frame)
            self._circle.broadcast(memoryview(text))
        raise error

    def _say(self, word: int, frame: list[_Part]) -> None:
        self._header[:] = word.to_bytes(8, "little", signed=True) + _fingerprint(frame)
        self._circle.broadcast(self._header)

    def _hear(self, frame: list[_Part]) -> None:
        """Wait until the reader has the frame. Raises the reader's error."""
        word = _WAIT
        while word == _WAIT:
            self._circle.broadcast(self._header)
            if self._header[8:] != _fingerprint(frame):  # else these bytes would be taken for others
                raise CoordinationError(
                    f"the ranks that read together make different calls: this one reads {frame[0].name}, "
                    "and the reader something else"
                )
            word = int.from_bytes(self._header[:8], "little", signed=True)
        if word != _READY:
            text = bytearray(word)
            self._circle.broadcast(memoryview(text))
            raise _error(*json.loads(text))


@dataclass(frozen=True, slots=True)
class _Part:
    """A span in a frame's buffer, from `at` on."""

    name: str
    begin: int
    end: int
    at: int


def _within_pieces(spans: Iterable[_Span]) -> list[_Span]:
    """For each piece that has some of these bytes one span that holds them all; a file's spans begin in order."""
    found: dict[tuple[str, int], _Span] = {}
    for name, begin, end in spans:
        at = begin
        while at < end:
            stop = min(end, (at // PIECE_SIZE + 1) * PIECE_SIZE)
            _, low, high = found.get((name, at // PIECE_SIZE), (name, at, stop))
            found[name, at // PIECE_SIZE] = name, low, max(high, stop)
            at = stop
    return list(found.values())


def _frames(spans: Iterable[_Span]) -> list[list[_Part]]:
    """Spans cut at the ends of pieces, as many together as fit into a buffer, in order."""
    frames: list[list[_Part]] = []
    filled = PIECE_SIZE
    for name, begin, end in _within_pieces(spans):
        if filled + end - begin > PIECE_SIZE:
            frames.append([])
            filled = 0
        frames[-1].append(_Part(name, begin, end, filled))
        filled += end - begin
    return frames


def _fingerprint(frame: list[_Part]) -> bytes:
    return xxhash.xxh3_64_digest(repr(frame).encode())


class _Hand:
    """Takes a file's parts, in order, to where this rank's segments of it go."""

    def __init__(self, rows: Sequence[Segment]) -> None:
        self._rows = rows
        self._next = 0  # the first row that still lacks bytes

    def take(self, part: _Part, data: memoryview) -> None:
        base = address(data) + part.at - part.begin
        while self._next < len(self._rows):
            low, high, sink = self._rows[self._next]
            begin, end = max(low, part.begin), min(high, part.end)
            if begin < end:
                if isinstance(sink, int):
                    copy = move if end - begin >= _LARGE else move_small
                    copy(sink + begin - low, base + begin, end - begin)
                else:
                    sink(begin - low, data[begin + part.at - part.begin : end + part.at - part.begin])
            if high > part.end:
                return
            self._next += 1


def _error(kind: str, text: str, errno: int | None) -> CheckpointError:
    """Another rank's error, on this one."""
    of_kind: type[CheckpointError] = getattr(errors, kind)
    return of_kind(text, errno) if issubclass(of_kind, StoreError) else of_kind(text)
