"""How do a checkpoint's bytes come back fast, each to its place? The digests are checked on the way.

A piece that holds wanted bytes is read whole, as its digest covers all of it. Bytes that the system
has in memory are read straight into the place of a large segment; others come through a buffer, which
a disk fills without the system's help.
"""

from __future__ import annotations

import os
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import sub
from typing import cast

import xxhash

from .errors import DamagedError, NotFoundError
from .manifest import FileEntry, pieces
from .memory import address, buffer, view
from .moves import move, move_small, spread
from .store import BLOCK, Reader
from .transfer import SMALL, Crew, Segment

_LOCAL = 3  # threads; a disk is kept busy while one of them copies and hashes
_CACHED = 2, 8  # threads at least and at most, and one for each processor: there is no disk to keep busy
_REMOTE = 8  # threads
_REQUEST = 8 << 20  # bytes asked of a network at a time
_LARGE = 256 << 10  # bytes; a segment from here on is worth a read of its own, and a copy that lets others run
_STEP = 2 << 20  # bytes read from a disk or the system's memory at a time: they are hashed in the processor's cache
_ALIKE = 16 << 20  # bytes, cached all or not at all as far as is asked: to ask for every step costs more than it saves


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is wanted of one file: these segments, or with None only to know that it is what was written.

    `url` is the file's, for messages."""

    entry: FileEntry
    url: str
    open: Callable[[], Reader]
    segments: Sequence[Segment] | None


def scatter(wanted: Sequence[Wanted], *, digests: bool, is_remote: bool) -> None:
    """Read segments of files to where they go. Without `digests` nothing else is read, and nothing checked.

    Raises `DamagedError` for the first damage seen, when targets may be half filled."""

    def refuse(task: _Task, damage: DamagedError) -> None:
        raise damage

    _read([_File(each, digests, is_remote) for each in wanted], is_remote, refuse)


def damages(wanted: Sequence[Wanted], *, is_remote: bool) -> dict[str, DamagedError]:
    """Read files whole; the first damage of each that has any, by its name in the manifest."""
    found: dict[str, tuple[int, DamagedError]] = {}

    def note(task: _Task, damage: DamagedError) -> None:
        name = task.file.entry.name
        if name not in found or task.begin < found[name][0]:
            found[name] = (task.begin, damage)

    _read([_File(each, True, is_remote) for each in wanted], is_remote, note)
    return {name: damage for name, (_, damage) in found.items()}


def _read(files: list[_File], is_remote: bool, on_damage: Callable[[_Task, DamagedError], None]) -> None:
    tasks = [task for file in files for task in file.tasks]
    sizes = [task.end - task.begin for task in tasks]
    crew = Crew()
    queue = iter(tasks)

    def work() -> None:
        hand = _Hand(crew, min(_REQUEST if is_remote else _STEP, max(sizes)))
        while True:
            with crew.changed:
                task = next(queue, None)
            if task is None:
                return
            try:
                hand.do(task)
            except DamagedError as exc:
                with crew.changed:
                    on_damage(task, exc)
            with crew.changed:
                task.file.end(task)
                crew.changed.notify_all()

    try:
        if tasks:
            crew.run(work, min(len(tasks), _REMOTE if is_remote else _hands(tasks[0]) if sum(sizes) >= SMALL else 1))
    finally:
        for file in files:
            file.close()


def _hands(first: _Task) -> int:
    """How many threads are best, going by where the first bytes are."""
    try:
        if not first.file.is_direct(first.begin, min(first.begin + _ALIKE, first.end)):
            return _LOCAL
    except DamagedError:  # missing, as the crew will find
        return _LOCAL
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    fewest, most = _CACHED
    return min(max(processors, fewest), most)


class _Run:
    """Bytes that are read together: a piece with its digest, or without digests a range that is wanted."""

    def __init__(self, begin: int, end: int, expected: bytes | None) -> None:
        self.begin, self.end, self.expected = begin, end, expected
        self.hash = xxhash.xxh3_128()
        self.held = end  # where the file ended instead, when it ended too early

    def update(self, *parts: memoryview) -> None:
        """These come next."""
        if self.expected is not None:
            for part in parts:
                self.hash.update(part)

    @property
    def is_good(self) -> bool:
        return self.held == self.end and self.expected in (None, self.hash.digest())


@dataclass(frozen=True, slots=True)
class _Task:
    """A run, or the `number`-th chunk of a file whose chunks take turns."""

    file: _File
    number: int
    run: _Run
    begin: int
    end: int


class _Segments:
    """Segments in order, without overlap."""

    def __init__(self, rows: Sequence[Segment]) -> None:
        self._rows, self._begins = rows, [row[0] for row in rows]

    def within(self, begin: int, end: int) -> Sequence[Segment]:
        """Those that have bytes in [begin, end)."""
        first = bisect_right(self._begins, begin) - 1
        if first < 0 or self._rows[first][1] <= begin:
            first += 1
        return self._rows[first : bisect_left(self._begins, end)]


class _File:
    """A file on its way in."""

    def __init__(self, wanted: Wanted, digests: bool, is_remote: bool) -> None:
        self.entry, self.is_remote = wanted.entry, is_remote
        self.step = _REQUEST if is_remote else _STEP
        self._url, self._open = wanted.url, wanted.open
        self._reader: Reader | None = None
        self._lock = threading.Lock()
        rows = [row for row in wanted.segments or () if row[0] < row[1]]
        if rows and rows[-1][1] > self.entry.size:
            raise DamagedError(
                f"{self._url} holds {self.entry.size:,} bytes, not the {rows[-1][1]:,} that are to be read"
            )
        large = {row[0] for row in rows if row[1] - row[0] >= _LARGE and isinstance(row[2], int)}
        self.large = _Segments([row for row in rows if row[0] in large] if large else [])
        self.small = _Segments([row for row in rows if row[0] not in large] if large else rows)
        # A callable takes its bytes in order; and a network needs more requests at a time than a file may have pieces.
        self.takes_turns = bool(rows) and (is_remote or not {type(row[2]) for row in rows} <= {int})
        self.turn = 0
        runs = self._pieces(wanted.segments is None) if digests else self._ranges(rows)
        self.tasks = (
            self._chunks(runs) if self.takes_turns else [_Task(self, 0, run, run.begin, run.end) for run in runs]
        )
        self._left = len(self.tasks)

    def _pieces(self, is_whole: bool) -> list[_Run]:
        return [
            _Run(begin, end, expected)
            for (begin, end), expected in zip(pieces(self.entry.size), self.entry.digests, strict=True)
            if is_whole or self.small.within(begin, end) or self.large.within(begin, end)
        ]

    def _ranges(self, rows: list[Segment]) -> list[_Run]:
        """Whole blocks that hold the segments; what lies close together is one range."""
        ranges: list[tuple[int, int]] = []
        for begin, end, _ in rows:
            begin, end = begin // BLOCK * BLOCK, min(-(-end // BLOCK) * BLOCK, self.entry.size)
            if ranges and begin - ranges[-1][1] < _LARGE:
                ranges[-1] = (ranges[-1][0], end)
            else:
                ranges.append((begin, end))
        return [_Run(first + begin, first + end, None) for first, last in ranges for begin, end in pieces(last - first)]

    def _chunks(self, runs: list[_Run]) -> list[_Task]:
        cut = [
            (run, begin, min(begin + self.step, run.end))
            for run in runs
            for begin in range(run.begin, run.end, self.step)
        ]
        return [_Task(self, number, run, begin, end) for number, (run, begin, end) in enumerate(cut)]

    def is_direct(self, begin: int, end: int) -> bool:
        """Whether these bytes are best read straight into their places."""
        return not self.takes_turns and self._opened().is_cached(begin, end)

    def read(self, begin: int, buffers: list[memoryview]) -> int:
        try:
            return self._opened().read_into(begin, buffers)
        except NotFoundError as exc:
            raise self._missing() from exc

    def _opened(self) -> Reader:
        with self._lock:
            if self._reader is None:
                try:
                    self._reader = self._open()
                except NotFoundError as exc:
                    raise self._missing() from exc
            return self._reader

    def _missing(self) -> DamagedError:
        return DamagedError(f"{self._url} is missing")

    def end(self, task: _Task) -> None:
        """The task is done: the next one has its turn, after the last one the file is closed."""
        self.turn = task.number + 1
        self._left -= 1
        if not self._left:
            self.close()

    def close(self) -> None:
        self.tasks = []  # they hold the file, which would wait with all its segments for the garbage collector
        if self._reader is not None:
            self._reader.close()

    def damage(self, run: _Run) -> DamagedError:
        what = "is not what was written"
        if run.held < run.end:
            what = f"holds {run.held:,} of {self.entry.size:,} bytes"
        return DamagedError(f"{self._url} {what} (bytes {run.begin:,} to {run.end:,})")


class _Hand:
    """One thread's part of the work, with a buffer of its own."""

    def __init__(self, crew: Crew, size: int) -> None:
        self._crew = crew
        self._scratch = buffer(size)
        self._base = address(self._scratch)

    def do(self, task: _Task) -> None:
        """Read, check and hand out. Raises `DamagedError`."""
        file, run = task.file, task.run
        for first in range(task.begin, task.end, _ALIKE):
            last = min(first + _ALIKE, task.end)
            is_direct = file.is_direct(first, last)
            for begin in range(first, last, file.step):
                self._move(task, run, begin, min(begin + file.step, last), is_direct)
        self._wait_for_turn(task)
        if task.end < run.end or run.is_good:
            return
        if file.is_remote:  # a network can garble what the store holds intact: look twice before calling it damage
            run = _Run(run.begin, run.end, run.expected)
            for begin in range(run.begin, run.end, file.step):
                self._move(task, run, begin, min(begin + file.step, run.end), is_direct=False)
        if not run.is_good:
            raise file.damage(run)

    def _move(self, task: _Task, run: _Run, begin: int, end: int, is_direct: bool) -> None:
        """Read bytes of a run, hash them, and hand them out."""
        file = task.file
        large = file.large.within(begin, end)
        buffers = self._places(large, begin, end) if is_direct else [self._scratch[: end - begin]]
        self._crew.check()
        count = file.read(begin, buffers)
        self._wait_for_turn(task)
        if count < end - begin:
            run.held = min(run.held, begin + count)
            return
        run.update(*buffers)
        small = file.small.within(begin, end)
        if file.takes_turns or not self._spread(small, begin, end):
            self._hand_out(small, begin, end, move_small)
        if not is_direct:
            self._hand_out(large, begin, end, move)

    def _places(self, large: Sequence[Segment], begin: int, end: int) -> list[memoryview]:
        """Memory for the bytes [begin, end): of the large segments where they belong, of others the scratch."""
        places, done = [], begin
        for low, high, sink in large:
            at, stop = max(low, begin), min(high, end)
            if done < at:
                places.append(self._scratch[done - begin : at - begin])
            places.append(view(cast(int, sink) + at - low, stop - at))
            done = stop
        if done < end:
            places.append(self._scratch[done - begin : end - begin])
        return places

    def _spread(self, rows: Sequence[Segment], begin: int, end: int) -> bool:
        """Copy the bytes [begin, end) from the scratch to where these segments go, if they have no gaps."""
        if not rows:
            return True
        lows, highs, sinks = map(list, zip(*rows, strict=True))
        if lows[1:] != highs[:-1]:
            return False
        if lows[0] < begin:
            lows[0], sinks[0] = begin, sinks[0] + begin - lows[0]
        highs[-1] = min(highs[-1], end)
        spread(self._base + lows[0] - begin, sinks, list(map(sub, highs, lows)))
        return True

    def _hand_out(self, rows: Sequence[Segment], begin: int, end: int, copy: Callable[[int, int, int], None]) -> None:
        """Copy the bytes [begin, end) from the scratch to where these segments go."""
        base, scratch = self._base - begin, self._scratch
        for low, high, sink in rows:
            at = low if low > begin else begin
            stop = high if high < end else end
            if isinstance(sink, int):
                copy(sink + at - low, base + at, stop - at)
            else:
                sink(at - low, scratch[at - begin : stop - begin])

    def _wait_for_turn(self, task: _Task) -> None:
        if task.file.takes_turns and task.file.turn != task.number:
            self._crew.wait_for(lambda: task.file.turn == task.number)
