"""Bytes move in pieces by several threads: whole, in order, checked, in bounded memory, and nothing is left over."""

from __future__ import annotations

import _thread
import gc
import itertools
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import xxhash

from ckptmgr import manifest, scatter, transfer
from ckptmgr.errors import DamagedError, StoreError
from ckptmgr.manifest import FileEntry
from ckptmgr.memory import address, buffer
from ckptmgr.scatter import Wanted, damages
from ckptmgr.store import Reader, Store
from ckptmgr.store.local import LocalStore
from ckptmgr.testing import MemoryStore
from ckptmgr.transfer import Crew, Segment, digests, write_files

PIECE, CHUNK, BLOCK = 32 << 10, 8 << 10, 4 << 10
SIZES = [0, 1, BLOCK, CHUNK + 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 5 * PIECE + 12345]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything happens as with real sizes, 2,048 times smaller."""
    monkeypatch.setattr(manifest, "PIECE_SIZE", PIECE)
    for module, name, value in (
        (transfer, "CHUNK", CHUNK),
        (transfer, "SMALL", 2 * CHUNK),
        (scatter, "SMALL", 2 * CHUNK),
        (scatter, "_REQUEST", CHUNK),
        (scatter, "_STEP", CHUNK),
        (scatter, "_LARGE", 5000),
    ):
        monkeypatch.setattr(module, name, value)


@pytest.fixture(autouse=True)
def no_thread_left() -> Any:
    yield
    # Those of servers and other stores come and go meanwhile.
    assert [thread.name for thread in threading.enumerate() if thread.name == "ckptmgr-transfer"] == []


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return LocalStore(tmp_path / "store", fsync=False) if request.param == "local" else MemoryStore()


class Lying:
    """A body whose bytes lie in memory already."""

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._data = memoryview(bytearray(data))

    def part(self, begin: int, end: int, scratch: memoryview) -> memoryview:
        assert end - begin <= min(CHUNK, len(scratch))
        return self._data[begin:end]


class Gathered(Lying):
    """A body that is gathered into the scratch."""

    def part(self, begin: int, end: int, scratch: memoryview) -> memoryview:
        scratch[: end - begin] = super().part(begin, end, scratch)
        assert address(scratch) % BLOCK == 0
        return scratch[: end - begin]


class Mixed(Gathered):
    """Gathered, but for its last bytes, which lie in memory."""

    def part(self, begin: int, end: int, scratch: memoryview) -> memoryview:
        if end < self.size:
            return super().part(begin, end, scratch)
        return Lying.part(self, begin, end, scratch)


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(f"{seed} {size}").randbytes(size)


def entry_of(name: str, data: bytes) -> FileEntry:
    """Worked out the plain way."""
    cut = [data[at : at + PIECE] for at in range(0, len(data), PIECE)] or [b""]
    each = [xxhash.xxh3_128(piece) for piece in cut]
    if len(each) == 1:
        return FileEntry(name, len(data), each[0].hexdigest())
    whole = xxhash.xxh3_128_hexdigest(b"".join(one.digest() for one in each))
    return FileEntry(name, len(data), whole, tuple(one.hexdigest() for one in each))


# Writing


@pytest.mark.parametrize("kind", [Lying, Gathered, Mixed])
def test_files_arrive_whole_with_the_digests_of_their_pieces(store: Store, kind: type[Lying]) -> None:
    data = {f"f{size}": noise(size) for size in SIZES}
    entries = write_files({name: kind(body) for name, body in data.items()}, store.writer)
    assert {name: store.get(name) for name in data} == data
    assert entries == {name: entry_of(name, body) for name, body in data.items()}


@pytest.mark.parametrize("size", SIZES)
def test_the_digests_of_a_body_are_those_of_its_file(size: int) -> None:
    expected = entry_of("", noise(size))
    assert digests(Gathered(noise(size))) == (expected.digest, expected.pieces)


class Recorder:
    """A writer into a list of events, with or without places."""

    def __init__(self, events: list[tuple[Any, ...]], name: str, is_positional: bool) -> None:
        self.events, self.name, self.is_positional = events, name, is_positional
        events.append(("open", name))

    def write(self, data: memoryview) -> None:
        self.events.append(("write", self.name, bytes(data)))

    def write_at(self, offset: int, data: memoryview) -> None:
        self.events.append(("write_at", self.name, offset, bytes(data)))

    def commit(self) -> None:
        self.events.append(("commit", self.name))

    def abort(self) -> None:
        self.events.append(("abort", self.name))


def test_a_store_that_takes_bytes_in_order_gets_one_file_after_the_other() -> None:
    events: list[tuple[Any, ...]] = []
    data = {name: noise(3 * PIECE + 7, seed) for seed, name in enumerate("abcd")}
    write_files({name: Lying(body) for name, body in data.items()}, lambda name, size: Recorder(events, name, False))
    moved = [event for event in events if event[0] != "open"]
    order = list(dict.fromkeys(event[1] for event in moved))
    assert [event[1] for event in moved] == sorted((event[1] for event in moved), key=order.index)
    for name in data:
        own = [event for event in moved if event[1] == name]
        assert b"".join(event[2] for event in own[:-1]) == data[name]
        assert own[-1] == ("commit", name)


def test_a_second_file_waits_until_the_first_is_complete_where_bytes_go_in_order() -> None:
    events: list[tuple[Any, ...]] = []
    second = {"opened": threading.Event(), "written": threading.Event()}

    class Waiting(Recorder):
        def write(self, data: memoryview) -> None:
            if self.name == "b":
                second["written"].set()
            elif not second["opened"].is_set():
                second["opened"].wait()
                assert not second["written"].wait(0.02)
            super().write(data)

    def open_writer(name: str, size: int) -> Waiting:
        if name == "b":
            second["opened"].set()
        return Waiting(events, name, False)

    write_files({name: Lying(noise(2 * PIECE)) for name in "ab"}, open_writer)
    assert second["written"].is_set()


def test_while_three_chunks_are_written_a_fourth_is_made_ready() -> None:
    """One thread gathers beside those that write, so that they do not all gather at a time while the disk waits."""
    fourth = {"gathered": threading.Event(), "written": threading.Event()}
    gathered, begun, three = itertools.count(1), itertools.count(1), threading.Barrier(3, timeout=10)

    class Counted(Gathered):
        def part(self, begin: int, end: int, scratch: memoryview) -> memoryview:
            if next(gathered) == 4:
                fourth["gathered"].set()
            return super().part(begin, end, scratch)

    class Slow(Recorder):
        def write_at(self, offset: int, data: memoryview) -> None:
            if next(begun) < 4:
                assert fourth["gathered"].wait(30)
                assert three.wait() or not fourth["written"].wait(0.02)
                three.wait()
            else:
                fourth["written"].set()

    write_files({f"f{number}": Counted(noise(CHUNK)) for number in range(8)}, lambda name, _: Slow([], name, True))
    assert fourth["written"].is_set()


def test_a_place_begins_at_a_multiple_of_the_chunk_and_every_byte_is_written_once() -> None:
    events: list[tuple[Any, ...]] = []
    data = noise(5 * PIECE + 12345)
    write_files({"a": Lying(data)}, lambda name, size: Recorder(events, name, True))
    places = sorted((event[2], event[3]) for event in events if event[0] == "write_at")
    assert [offset for offset, _ in places] == list(range(0, len(data), CHUNK))
    assert b"".join(part for _, part in places) == data
    assert events[-1] == ("commit", "a")


def test_a_little_is_written_by_the_caller_alone_and_committed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """But no more files are open at a time than a process can have."""
    monkeypatch.setattr(transfer, "_TOGETHER", 2)
    events: list[tuple[Any, ...]] = []
    threads = set()

    def open_writer(name: str, size: int) -> Recorder:
        threads.add(threading.current_thread())
        return Recorder(events, name, True)

    write_files({name: Lying(noise(5)) for name in "abc"}, open_writer)
    assert [event[:2] for event in events] == [
        *(("open", "a"), ("write_at", "a"), ("open", "b"), ("write_at", "b"), ("commit", "a"), ("commit", "b")),
        *(("open", "c"), ("write_at", "c"), ("commit", "c")),
    ]
    assert threads == {threading.current_thread()}


def test_small_files_that_were_not_committed_are_given_up_when_one_can_not_be() -> None:
    events: list[tuple[Any, ...]] = []

    class Broken(Recorder):
        def commit(self) -> None:
            super().commit()
            if self.name == "b":
                raise OSError("no commit")

    with pytest.raises(OSError, match="no commit"):
        write_files({name: Lying(noise(5)) for name in "abc"}, lambda name, _: Broken(events, name, True))
    ends = [event for event in events if event[0] in ("commit", "abort")]
    assert ends == [("commit", "a"), ("commit", "b"), ("abort", "b"), ("abort", "c")]


class Failing(Lying):
    """Fails when the byte at `at` is asked for."""

    def __init__(self, data: bytes, at: int, error: BaseException) -> None:
        super().__init__(data)
        self._at, self._error = at, error

    def part(self, begin: int, end: int, scratch: memoryview) -> memoryview:
        if begin <= self._at < end:
            raise self._error
        return super().part(begin, end, scratch)


@pytest.mark.parametrize("at", [0, PIECE, 4 * PIECE + 3 * CHUNK])
@pytest.mark.parametrize("error", [StoreError("no"), KeyboardInterrupt(), MemoryError()], ids=repr)
def test_an_error_anywhere_is_raised_and_leaves_nothing_of_an_unfinished_file(
    store: Store, at: int, error: BaseException, tmp_path: Path
) -> None:
    data = noise(5 * PIECE)
    with pytest.raises(type(error)) as caught:
        write_files({"a": Lying(noise(3)), "b": Failing(data, at, error), "c": Lying(data)}, store.writer)
    assert caught.value is error
    assert "b" not in {entry.key for entry in store.list()}
    assert all(path.name in "ac" for path in tmp_path.glob("store/*"))


@pytest.mark.parametrize("method", ["write_at", "commit", "open"])
def test_what_was_opened_and_not_committed_is_aborted_once(method: str) -> None:
    events: list[tuple[Any, ...]] = []

    class Full(Recorder):
        def write_at(self, offset: int, data: memoryview) -> None:
            self.fail("write_at")
            super().write_at(offset, data)

        def commit(self) -> None:
            self.fail("commit")
            super().commit()

        def fail(self, here: str) -> None:
            if (here, self.name) == (method, "b"):
                raise StoreError("no space", 28)

    def open_writer(name: str, size: int) -> Full:
        if (method, name) == ("open", "b"):
            raise StoreError("no space", 28)
        return Full(events, name, True)

    with pytest.raises(StoreError, match="no space"):
        write_files({name: Lying(noise(2 * PIECE)) for name in "abc"}, open_writer)
    done = {do: [event[1] for event in events if event[0] == do] for do in ("open", "commit", "abort")}
    assert sorted(done["open"]) == sorted(done["commit"] + done["abort"])
    assert "b" not in done["commit"]


@pytest.mark.parametrize("kind", [Lying, Gathered])
def test_a_body_that_gives_too_little_is_not_written(store: Store, kind: type[Lying]) -> None:
    class Short(kind):  # type: ignore[misc, valid-type]
        def part(self, begin: int, end: int, scratch: memoryview) -> memoryview:
            return super().part(begin, end, scratch)[:-1]  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match="the body of a gave"):
        write_files({"a": Short(noise(PIECE))}, store.writer)
    assert store.list() == []


# The crew


def test_the_first_error_of_any_thread_is_raised_and_the_others_stop() -> None:
    crew, begun = Crew(), threading.Barrier(3)

    def work() -> None:
        begun.wait()
        if threading.current_thread() is threading.main_thread():
            crew.wait_for(lambda: False)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        crew.run(work, 3)


def test_an_interrupt_of_the_waiting_caller_stops_the_others_first() -> None:
    crew, stopped = Crew(), []

    def work() -> None:
        if threading.current_thread() is threading.main_thread():
            return
        _thread.interrupt_main()
        try:
            crew.wait_for(lambda: False)
        finally:
            stopped.append(True)

    with pytest.raises(KeyboardInterrupt):
        crew.run(work, 2)
    assert stopped == [True]


def test_an_interrupt_before_a_thread_has_begun_is_raised_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start)
    monkeypatch.setattr(transfer, "_START_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        Crew().run(lambda: None, 2)


def test_where_no_thread_can_be_had_the_caller_does_it_alone(monkeypatch: pytest.MonkeyPatch, store: Store) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    write_files({"a": Lying(noise(4 * PIECE))}, store.writer)
    assert store.get("a") == noise(4 * PIECE)


# Reading


class Watched:
    """A reader that says what it was asked for, and of which a test decides what is cached and what comes."""

    def __init__(self, reader: Reader, is_cached: bool, change: Callable[[int, bytes], bytes]) -> None:
        self.reader, self._is_cached, self.change = reader, is_cached, change
        self.ranges: list[tuple[int, int]] = []
        self.is_closed = False

    def is_cached(self, start: int, end: int) -> bool:
        return self._is_cached

    def read_into(self, start: int, buffers: Sequence[Any]) -> int:
        size = sum(memoryview(each).nbytes for each in buffers)
        self.ranges.append((start, start + size))
        whole = bytearray(size)
        count = self.reader.read_into(start, [whole])
        changed = memoryview(self.change(start, bytes(whole[:count])))
        done = 0
        for each in buffers:
            part = changed[done : done + memoryview(each).nbytes]
            memoryview(each)[: len(part)] = part
            done += len(part)
        return done

    def close(self) -> None:
        self.is_closed = True
        self.reader.close()


class Place:
    """A file, how it is read, and the reader that was opened for it."""

    def __init__(self, data: bytes, is_remote: bool = False, is_cached: bool = False) -> None:
        self.data, self.is_remote, self.is_cached = data, is_remote, is_cached
        self.store = MemoryStore()
        self.entry = write_files({"a.bin": Lying(data)}, self.store.writer)["a.bin"]
        self.change: Callable[[int, bytes], bytes] = lambda start, found: found
        self.readers: list[Watched] = []

    def open(self) -> Watched:
        self.readers.append(
            Watched(self.store.reader("a.bin"), self.is_cached, lambda start, found: self.change(start, found))
        )
        return self.readers[-1]

    def wanted(self, segments: Sequence[Segment] | None) -> Wanted:
        return Wanted(self.entry, "store:/a.bin", self.open, segments)

    def read(self, targets: Targets | Sequence[Segment], digests: bool = True) -> None:
        segments = targets.segments if isinstance(targets, Targets) else targets
        try:
            scatter.scatter([self.wanted(segments)], digests=digests, is_remote=self.is_remote)
        finally:
            assert all(reader.is_closed for reader in self.readers)

    def flip(self, at: int) -> None:
        changed = bytearray(self.data)
        changed[at] ^= 1
        self.store.put("a.bin", changed)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        return sorted(each for reader in self.readers for each in reader.ranges)


@pytest.fixture(params=["cold", "cached", "remote"])
def place(request: pytest.FixtureRequest) -> Place:
    return Place(noise(5 * PIECE + 12345), request.param == "remote", request.param == "cached")


class Targets:
    """Segments of a file with memory to go to, and callables that take the bytes."""

    def __init__(self, bounds: Sequence[tuple[int, int]], callables: float = 0.0) -> None:
        self.bounds = bounds
        self.memory = buffer(sum(end - begin for begin, end in bounds))
        self.parts: dict[int, list[tuple[int, bytes, threading.Thread]]] = {}
        self.segments: list[Segment] = []
        at = 0
        draw = random.Random(0)
        for begin, end in bounds:
            if draw.random() < callables:
                self.segments.append((begin, end, self._taker(begin, at)))
            else:
                self.segments.append((begin, end, address(self.memory) + at))
            at += end - begin

    def _taker(self, begin: int, at: int) -> Callable[[int, memoryview], None]:
        own = self.parts[begin] = []

        def take(offset: int, data: memoryview) -> None:
            own.append((offset, bytes(data), threading.current_thread()))
            self.memory[at + offset : at + offset + len(data)] = data

        return take

    def hold(self, data: bytes) -> bool:
        return bytes(self.memory) == b"".join(data[begin:end] for begin, end in self.bounds)


def cuts(size: int, seed: int) -> list[tuple[int, int]]:
    """Segments of all sizes, none at all too, with and without gaps."""
    draw = random.Random(seed)
    bounds, at = [], draw.choice([0, 1, 5000])
    while at < size:
        end = min(at + draw.choice([0, 1, 100, 4999, 5000, CHUNK, CHUNK + 1, PIECE, 2 * PIECE + 3]), size)
        bounds.append((at, end))
        at = end + draw.choice([0, 0, 0, 1, 300, 20_000])
    return bounds


@pytest.mark.parametrize("digests", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("callables", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_every_segment_gets_its_bytes(place: Place, digests: bool, callables: float, seed: int) -> None:
    targets = Targets(cuts(len(place.data), seed), callables)
    place.read(targets, digests)
    assert targets.hold(place.data)


@pytest.mark.parametrize("seed", range(3))
def test_many_small_segments_get_their_bytes(place: Place, seed: int) -> None:
    """They go together, but for those that one read begins with and the next one ends, or that have a gap between."""
    draw = random.Random(seed)
    bounds, at = [], draw.randrange(700)
    while at < len(place.data):
        end = min(at + draw.randrange(400), len(place.data))
        bounds.append((at, end))
        at = end + (draw.random() < seed * 0.002) * draw.randrange(900)
    targets = Targets(bounds)
    place.read(targets)
    assert targets.hold(place.data)


def test_a_callable_gets_its_bytes_in_order_and_once(place: Place) -> None:
    targets = Targets([(3, 2 * PIECE + 5), (2 * PIECE + 5, 5 * PIECE + 12345)], callables=1.0)
    place.read(targets)
    for begin, end in targets.bounds:
        reached = 0
        for offset, data, _ in targets.parts[begin]:
            assert offset == reached
            reached += len(data)
        assert reached == end - begin


def test_a_callable_waits_for_bytes_that_come_late(place: Place) -> None:
    """The first chunk comes after another thread has read a later one."""
    later = threading.Event()

    def change(start: int, found: bytes) -> bytes:
        if start >= CHUNK:
            later.set()
        later.wait()
        return found

    place.change = change
    targets = Targets([(0, len(place.data))], callables=1.0)
    place.read(targets)
    offsets = [offset for offset, _, _ in targets.parts[0]]
    assert offsets == sorted(offsets)


def test_many_files_are_read_at_once() -> None:
    places = [Place(noise(size, 7), is_cached=bool(size % 2)) for size in SIZES]
    targets = [Targets([(0, len(place.data))]) for place in places]
    pairs = list(zip(places, targets, strict=True))
    scatter.scatter([place.wanted(target.segments) for place, target in pairs], digests=True, is_remote=False)
    assert [target.hold(place.data) for place, target in pairs] == [True] * len(SIZES)


def test_a_piece_without_wanted_bytes_is_not_read_and_one_with_some_is_read_whole(place: Place) -> None:
    place.read(Targets([(PIECE + 5, PIECE + 6), (3 * PIECE - 1, 3 * PIECE + 1), (4 * PIECE, 4 * PIECE)]))
    covered = [at for begin, end in place.ranges for at in range(begin, end, BLOCK)]
    assert covered == list(range(PIECE, 4 * PIECE, BLOCK))


def test_unchecked_only_the_blocks_of_what_is_wanted_are_read(place: Place) -> None:
    place.read(Targets([(PIECE + 5, PIECE + 6), (PIECE + 300, PIECE + 400), (4 * PIECE - 1, 4 * PIECE + 1)]), False)
    covered = [at for begin, end in place.ranges for at in range(begin, end, BLOCK)]
    assert covered == [PIECE, 4 * PIECE - BLOCK, 4 * PIECE]


def test_one_flipped_bit_in_any_chunk_is_found_and_named(place: Place) -> None:
    targets = Targets([(0, len(place.data))])
    for at in range(5, len(place.data), CHUNK):
        place.flip(at)
        begin = at // PIECE * PIECE
        end = min(begin + PIECE, len(place.data))
        with pytest.raises(DamagedError) as caught:
            place.read(targets)
        assert str(caught.value) == f"store:/a.bin is not what was written (bytes {begin:,} to {end:,})"


def test_damage_beside_the_wanted_bytes_but_in_their_piece_is_found_too(place: Place) -> None:
    place.flip(2 * PIECE - 1)
    place.read(Targets([(2 * PIECE, 3 * PIECE)]))
    with pytest.raises(DamagedError, match="bytes 32,768 to 65,536"):
        place.read(Targets([(PIECE, PIECE + 1)]))
    place.read(Targets([(PIECE, PIECE + 1)]), digests=False)


@pytest.mark.parametrize("digests", [True, False])
@pytest.mark.parametrize("held", [0, 2 * PIECE + 1, 5 * PIECE + 12344])
def test_a_file_that_ends_too_early_is_damage(place: Place, held: int, digests: bool) -> None:
    place.store.put("a.bin", place.data[:held])
    with pytest.raises(DamagedError, match=rf"store:/a\.bin holds [\d,]+ of {len(place.data):,} bytes \(bytes "):
        place.read(Targets([(0, len(place.data))]), digests)


def test_a_missing_file_is_damage(place: Place) -> None:
    place.store.delete(["a.bin"])
    with pytest.raises(DamagedError, match=r"^store:/a\.bin is missing$"):
        place.read(Targets([(0, 10)]))
    assert [str(damage) for damage in damages([place.wanted(None)], is_remote=place.is_remote).values()] == [
        "store:/a.bin is missing"
    ]


def test_bytes_beyond_the_files_end_can_not_be_asked_for(place: Place) -> None:
    with pytest.raises(DamagedError, match=r"a\.bin holds 176,185 bytes, not the 176,186"):
        place.read(Targets([(0, len(place.data) + 1)]))


@pytest.mark.parametrize("callables", [0.0, 1.0])
@pytest.mark.parametrize("cut", [False, True], ids=["garbled", "cut"])
def test_what_a_network_garbles_once_is_read_once_more(callables: float, cut: bool) -> None:
    place, left = Place(noise(5 * PIECE), is_remote=True), [2 * PIECE + CHUNK]

    def change(start: int, found: bytes) -> bytes:
        if start in left:
            left.remove(start)
            return found[:100] if cut else bytes(len(found))
        return found

    place.change = change
    targets = Targets(cuts(len(place.data), 1), callables)
    place.read(targets)
    assert left == []
    assert targets.hold(place.data)


def test_a_disk_is_asked_once(place: Place) -> None:
    if not place.is_remote:
        place.flip(0)
        with pytest.raises(DamagedError):
            place.read(Targets([(0, 1)]))
        assert len(place.ranges) == len(set(place.ranges))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()], ids=repr)
def test_an_error_of_a_callable_is_raised_and_all_is_closed(place: Place, error: BaseException) -> None:
    def take(offset: int, data: memoryview) -> None:
        if offset > PIECE:
            raise error

    with pytest.raises(type(error)):
        place.read([(0, 4 * PIECE, take), (4 * PIECE, 5 * PIECE, take)])


def test_an_error_of_the_store_is_raised_as_it_is(place: Place) -> None:
    def change(start: int, found: bytes) -> bytes:
        if start >= 2 * PIECE:
            raise StoreError("unplugged")
        return found

    place.change = change
    with pytest.raises(StoreError, match="unplugged"):
        place.read(Targets([(0, len(place.data))]))


def test_files_read_whole_tell_the_first_damage_of_each(place: Place) -> None:
    """The damaged do not keep the others from being read."""
    whole, empty = Place(noise(3 * PIECE, 5)), Place(b"")
    changed = bytearray(place.data)
    changed[2 * PIECE] ^= 1
    changed[4 * PIECE] ^= 1
    place.store.put("a.bin", changed)
    entries = [FileEntry(name, *_rest(each.entry)) for name, each in zip("xyz", (place, whole, empty), strict=True)]
    wanted = [
        Wanted(entry, f"store:/{entry.name}", each.open, None)
        for entry, each in zip(entries, (place, whole, empty), strict=True)
    ]
    found = damages(wanted, is_remote=place.is_remote)
    assert {name: str(damage) for name, damage in found.items()} == {
        "x": "store:/x is not what was written (bytes 65,536 to 98,304)"
    }
    assert whole.ranges[-1][1] == 3 * PIECE


def _rest(entry: FileEntry) -> tuple[int, str, tuple[str, ...]]:
    return entry.size, entry.digest, entry.pieces


# Memory


@pytest.mark.parametrize("is_remote", [False, True])
def test_nothing_of_what_was_read_waits_for_the_garbage_collector(is_remote: bool) -> None:
    """Of a large state that would be hundreds of thousands of segments."""
    place = Place(noise(PIECE * 3), is_remote=is_remote)
    held = bytearray(PIECE * 3)
    gc.collect()
    before = set(map(id, gc.get_objects()))
    gc.disable()
    try:
        scatter.scatter([place.wanted([(0, len(held), address(memoryview(held)))])], digests=True, is_remote=is_remote)
        kinds = scatter._File, scatter._Segments, scatter._Task
        assert [one for one in gc.get_objects() if type(one) in kinds and id(one) not in before] == []
    finally:
        gc.enable()


_MEASURED = """
import resource, sys
from ckptmgr.memory import buffer
from ckptmgr.scatter import Wanted, damages, scatter
from ckptmgr.store.local import LocalStore
from ckptmgr.transfer import write_files

SIZE = 160 << 20

class Gathered:
    size = SIZE
    def part(self, begin, end, scratch):
        scratch[: end - begin] = bytes(1 << 19)[: end - begin] if end - begin <= 1 << 19 else bytes(end - begin)
        return scratch[: end - begin]

def high():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

store = LocalStore(sys.argv[1], fsync=False)
write_files({"warm": type("Small", (Gathered,), {"size": 4096})()}, store.writer)
marks = [high()]
entry = write_files({"a": Gathered()}, store.writer)["a"]
marks.append(high())
wanted = lambda segments: [Wanted(entry, "a", lambda: store.reader("a"), segments)]
forget = lambda offset, data: None
scatter(wanted([(0, SIZE // 2, forget), (SIZE // 2, SIZE, forget)]), digests=True, is_remote=False)
assert damages(wanted(None), is_remote=False) == {}
marks.append(high())
print(*(b - a for a, b in zip(marks, marks[1:])))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the high-water mark has another unit")
def test_a_large_file_is_written_and_read_in_little_memory(tmp_path: Path) -> None:
    """160 MiB pass through at most 24 MiB, beside what the process has anyway."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(tmp_path)],
        capture_output=True,
        text=True,
        env=_with_package(),
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(int, done.stdout.split())) <= 24 << 20


def _with_package() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
