"""Many ranks get what each wants of a checkpoint that one of them reads, once, or all of them the same error."""

from __future__ import annotations

import errno
import json
import multiprocessing
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
import xxhash
from servers import Bucket

from ckptmgr import manifest, shared_source
from ckptmgr.coordinator import Circle
from ckptmgr.errors import CoordinationError, DamagedError, NotFoundError, RankError, StoreError
from ckptmgr.formats import FileSource, open_format
from ckptmgr.manifest import FileEntry, Manifest, pieces
from ckptmgr.memory import address
from ckptmgr.shared_source import SharedSource
from ckptmgr.source import Source
from ckptmgr.state.snapshot import Snapshot
from ckptmgr.store import Store, open_store
from ckptmgr.store.local import LocalStore
from ckptmgr.testing import Crash, MemoryFiles, MemoryStore, ThreadCircle
from ckptmgr.testing.format_contract import fetch_all
from ckptmgr.transfer import Segment

if TYPE_CHECKING:
    from servers.proxy import Proxy

PIECE = 32 << 10
FOLDER = "step-1"


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything happens as with real sizes, 2,048 times smaller."""
    monkeypatch.setattr(manifest, "PIECE_SIZE", PIECE)
    monkeypatch.setattr(shared_source, "PIECE_SIZE", PIECE)


@pytest.fixture(autouse=True)
def no_thread_left() -> Any:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(("ckptmgr-sh", "rank-"))] == []


FILES = {
    "large": random.Random(1).randbytes(5 * PIECE + 12345),
    "middle": random.Random(2).randbytes(PIECE),
    "small": random.Random(3).randbytes(777),
    "empty": b"",
    "more": random.Random(4).randbytes(PIECE + 1),
} | {f"ranks/rank-{rank}.json": json.dumps({"rank": rank}).encode() for rank in range(4)}


def stored(store: Store, files: Mapping[str, bytes] = FILES) -> Manifest:
    """A checkpoint of these files, in the store."""
    entries = []
    for name, data in files.items():
        store.put(f"{FOLDER}/{name}", data)
        cut = [xxhash.xxh3_128_digest(data[begin:end]) for begin, end in pieces(len(data))]
        entries.append(FileEntry.of(name, len(data), cut))
    return Manifest(1, "run", 1, "nonce", datetime(2026, 1, 1, tzinfo=UTC), "safetensors", tuple(entries))


def plain(files: Mapping[str, bytes] = FILES) -> Source:
    store = MemoryStore()
    return Source(store, FOLDER, stored(store, files))


class Unreadable:
    """What ranks that don't read have of a checkpoint: only its manifest."""

    def __init__(self, files: Mapping[str, FileEntry]) -> None:
        self.files = files

    def read(self, name: str) -> bytes:
        raise AssertionError("only the reader reads")

    open = scatter = read


class Reading:
    """Another source, whose `scatter` does something first."""

    def __init__(self, source: FileSource, first: Callable[[Mapping[str, Sequence[Segment]]], object]) -> None:
        self.files = source.files
        self._source, self._first = source, first
        self.read, self.open = source.read, source.open

    def scatter(self, segments: Mapping[str, Sequence[Segment]]) -> None:
        self._first(segments)
        self._source.scatter(segments)


class Around:
    """Another circle, but for what it does to its calls."""

    def __init__(self, circle: Circle) -> None:
        self.is_reader, self.size, self.union = circle.is_reader, circle.size, circle.union
        self._circle = circle

    def broadcast(self, data: memoryview) -> None:
        self._circle.broadcast(data)


def on_ranks(size: int, inner: FileSource, work: Callable[[SharedSource, ThreadCircle], Any]) -> list[Any]:
    """What each rank answers or raises."""

    def rank(circle: ThreadCircle) -> Any:
        return work(SharedSource(inner if circle.is_reader else Unreadable(inner.files), circle), circle)

    return ThreadCircle.run(size, rank)


class Wish:
    """Parts of files that somebody wants, by address or by callable, and what has come of them."""

    def __init__(self, spans: Mapping[str, Sequence[tuple[int, int]]], by_address: Callable[[], bool]) -> None:
        self.came: dict[tuple[str, int, int], bytearray] = {}
        self.segments: dict[str, list[Segment]] = {}
        for name, of_file in spans.items():
            self.segments[name] = []
            for begin, end in of_file:
                data = self.came[name, begin, end] = bytearray(end - begin if by_address() else 0)
                self.segments[name].append((begin, end, address(memoryview(data)) if data else self._take(data)))

    def _take(self, data: bytearray) -> Callable[[int, memoryview], None]:
        def take(offset: int, part: memoryview) -> None:
            assert offset == len(data)  # in order, without a gap
            data.extend(part)

        return take

    @property
    def is_met(self) -> bool:
        return all(data == FILES[name][begin:end] for (name, begin, end), data in self.came.items())


def some_wish(seed: int) -> Wish:
    lots = random.Random(seed)
    spans = {}
    for name in lots.sample(sorted(FILES), lots.randint(0, len(FILES))):
        cuts = sorted(lots.choices(range(len(FILES[name]) + 1), k=2 * lots.randint(0, 5)))
        spans[name] = list(zip(cuts[::2], cuts[1::2], strict=True))
    return Wish(spans, lambda: lots.random() < 0.5)


def everything() -> Wish:
    return Wish({name: [(0, len(data))] for name, data in FILES.items()}, lambda: True)


# What comes


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_rank_gets_what_it_wants_and_only_the_reader_reads(size: int) -> None:
    for seed in range(0, 100, size):
        wishes = [some_wish(seed + rank) for rank in range(size)]

        def work(source: SharedSource, circle: ThreadCircle, wishes: list[Wish] = wishes) -> bool:
            source.scatter(wishes[circle.rank].segments)
            return wishes[circle.rank].is_met

        assert on_ranks(size, plain(), work) == [True] * size


def test_a_rank_may_want_a_file_that_nobody_else_wants() -> None:
    def work(source: SharedSource, circle: ThreadCircle) -> bytes:
        name = f"ranks/rank-{circle.rank}.json"
        wish = Wish({name: [(0, source.files[name].size)]}, lambda: True)
        source.scatter(wish.segments)
        return bytes(wish.came[name, 0, source.files[name].size])

    assert on_ranks(4, plain(), work) == [FILES[f"ranks/rank-{rank}.json"] for rank in range(4)]


def test_what_nobody_wants_does_not_travel() -> None:
    """Of a piece what lies between the first and the last byte that anybody wants."""

    def work(source: SharedSource, circle: ThreadCircle) -> list[tuple[str, int]]:
        wanted = [(PIECE + 10, PIECE + 20)] if circle.rank else [(PIECE + 100, PIECE + 150), (4 * PIECE - 1, 4 * PIECE)]
        source.scatter(Wish({"large": wanted}, lambda: False).segments)
        return circle.log

    expected = [("union", 1), ("broadcast", 16), ("broadcast", 140 + 1), ("union", 1)]
    assert on_ranks(2, plain(), work) == [expected] * 2


def test_a_state_of_any_size_passes_through_two_buffers_of_a_piece() -> None:
    given: list[tuple[int, int]] = []  # the address and size of each frame

    def note(segments: Mapping[str, Sequence[Segment]]) -> None:
        rows = [row for of_file in segments.values() for row in of_file]
        given.append((rows[0][2], sum(end - begin for begin, end, _ in rows)))

    wishes = [everything() for _ in range(2)]
    work = lambda source, circle: source.scatter(wishes[circle.rank].segments)  # noqa: E731
    assert on_ranks(2, Reading(plain(), note), work) == [None, None]
    assert sum(size for _, size in given) == sum(map(len, FILES.values()))
    assert [len({place for place, _ in given}), max(size for _, size in given)] == [2, PIECE]
    assert len(given) < len(FILES) + 6  # small files travel together


def test_the_next_frame_is_read_while_one_is_broadcast() -> None:
    begun = [threading.Event() for _ in range(4)]

    def note(segments: Mapping[str, Sequence[Segment]]) -> None:
        [(begin, _, _)] = segments["large"]
        begun[begin // PIECE].set()

    class Watching(Around):
        """A circle whose broadcast of a frame goes on once the next one is being read."""

        frames = 0

        def broadcast(self, data: memoryview) -> None:
            if data.nbytes == PIECE:
                self.frames += 1
                assert self.frames == len(begun) or begun[self.frames].wait(10)
            super().broadcast(data)

    def rank(circle: ThreadCircle) -> bool:
        wish = Wish({"large": [(0, 4 * PIECE)]}, lambda: True)
        inner = Reading(plain(), note)
        SharedSource(inner, Watching(circle) if circle.is_reader else circle).scatter(wish.segments)
        return wish.is_met

    assert ThreadCircle.run(2, rank) == [True, True]


def test_a_small_file_is_read_by_one_broadcast_and_its_header() -> None:
    def work(source: SharedSource, circle: ThreadCircle) -> tuple[bytes, list[tuple[str, int]]]:
        return source.read("small"), circle.log

    assert on_ranks(3, plain(), work) == [(FILES["small"], [("broadcast", 16), ("broadcast", 777)])] * 3


@pytest.mark.parametrize("name", ["large", "empty", "more"])
def test_read_and_open_give_a_whole_file_of_any_size(name: str) -> None:
    def work(source: SharedSource, circle: ThreadCircle) -> bool:
        with source.open(name) as file:
            return source.read(name) == file.read() == FILES[name]

    assert on_ranks(2, plain(), work) == [True, True]


def test_ranks_read_an_opened_file_in_any_order_of_their_own() -> None:
    def work(source: SharedSource, circle: ThreadCircle) -> tuple[bytes, int, bytes]:
        with source.open("large") as file:
            file.seek(-circle.rank - 5, 2)
            tail = file.read()
            file.seek(circle.rank * PIECE)
            data = bytearray(10)
            return tail, file.readinto(data), bytes(data)

    expected = [(FILES["large"][-k - 5 :], 10, FILES["large"][k * PIECE : k * PIECE + 10]) for k in range(3)]
    assert on_ranks(3, plain(), work) == expected


@pytest.mark.parametrize("name", ["safetensors", "torch"])
def test_every_format_is_read_through_it(name: str) -> None:
    files = MemoryFiles()
    weights = torch.arange(30_000.0)
    sparse = torch.eye(3).to_sparse()
    snapshot = Snapshot({"model": {"w": weights, "sparse": sparse}, "step": 7})
    open_format(name).write(snapshot, files)

    def work(source: SharedSource, circle: ThreadCircle) -> bool:
        state = open_format(name).open(source)
        back: Any = fetch_all(state)
        same = torch.equal(back["model"]["w"], weights) and torch.equal(
            back["model"]["sparse"].to_dense(), torch.eye(3)
        )
        return same and back["step"] == 7

    assert on_ranks(2, files, work) == [True, True]


# What goes wrong


def damaged(source: Source, name: str, at: int) -> str:
    """Flip a byte, and answer what is said of it when one rank reads alone."""
    key = f"{FOLDER}/{name}"
    data = bytearray(source._store.get(key))
    data[at] ^= 1
    source._store.put(key, data)
    with pytest.raises(DamagedError) as caught:
        source.read(name)
    return str(caught.value)


def outcomes(results: Sequence[Any]) -> list[tuple[type, str]]:
    return [(type(each), str(each)) for each in results]


@pytest.mark.parametrize("call", ["scatter", "read", "open"])
def test_damage_is_the_same_error_on_all_ranks_as_for_one(call: str) -> None:
    source = plain()
    text = damaged(source, "large", 3 * PIECE + 5)

    def work(shared: SharedSource, circle: ThreadCircle) -> Any:
        if call == "scatter":  # the ranks that want nothing of it fail, too
            name, end = ("large", 5 * PIECE) if circle.rank == 1 else ("small", 10)
            return shared.scatter(Wish({name: [(0, end)]}, lambda: False).segments)
        return getattr(shared, call)("large")

    results = on_ranks(3, source, work)
    assert outcomes(results) == [(DamagedError, text)] * 3


@pytest.mark.parametrize(
    "error",
    [
        DamagedError("not what was written"),
        StoreError("no room\nat all", errno.ENOSPC),
        NotFoundError("gone: ü \udcff"),
    ],
)
def test_an_error_of_the_reader_has_its_class_and_text_everywhere(error: Exception) -> None:
    wish = everything()

    def fail(segments: Mapping[str, Sequence[Segment]]) -> None:
        raise error

    def work(source: SharedSource, circle: ThreadCircle) -> None:
        source.scatter(wish.segments if circle.rank == 1 else {})

    results = on_ranks(3, Reading(plain(), fail), work)
    assert outcomes(results) == [(type(error), str(error))] * 3
    assert [result.errno for result in results if isinstance(error, StoreError)] == [errno.ENOSPC] * (
        3 if isinstance(error, StoreError) else 0
    )


def test_a_foreign_error_of_the_reader_is_a_rank_error_elsewhere() -> None:
    def fail(segments: Mapping[str, Sequence[Segment]]) -> None:
        raise MemoryError("no bytes left")

    results = on_ranks(2, Reading(plain(), fail), lambda source, circle: source.read("small"))
    assert outcomes(results) == [(MemoryError, "no bytes left"), (RankError, "MemoryError: no bytes left")]


def test_no_thread_to_read_with_is_an_error_on_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def submit(*args: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(shared_source.ThreadPoolExecutor, "submit", submit)
    results = on_ranks(2, plain(), lambda source, circle: source.read("small"))
    assert [type(result) for result in results] == [RuntimeError, RankError]


@pytest.mark.parametrize("broken", [0, 2])
def test_a_rank_whose_sink_fails_stays_to_the_end(broken: int) -> None:
    """The others get all their bytes; then all raise, the rank itself its own error, and go on together."""
    wishes = [everything() for _ in range(3)]
    seen: list[int] = []

    def refuse(offset: int, data: memoryview) -> None:
        seen.append(offset)
        raise ValueError("no such device")

    def work(source: SharedSource, circle: ThreadCircle) -> tuple[type, str, bytes]:
        own = {"large": [(0, 5 * PIECE, refuse)]} if circle.rank == broken else wishes[circle.rank].segments
        with pytest.raises((ValueError, RankError)) as caught:
            source.scatter(own)
        return caught.type, str(caught.value), source.read("small")

    expected: list[Any] = [(RankError, "ValueError: no such device", FILES["small"])] * 3
    expected[broken] = (ValueError, "no such device", FILES["small"])
    assert on_ranks(3, plain(), work) == expected
    assert [wish.is_met for rank, wish in enumerate(wishes) if rank != broken] == [True, True]
    assert seen == [0]


def test_a_sink_that_fails_does_not_hide_the_readers_error() -> None:
    source = plain()
    text = damaged(source, "large", 4 * PIECE)

    def work(shared: SharedSource, circle: ThreadCircle) -> None:
        shared.scatter({"large": [(0, 5 * PIECE, lambda offset, data: 1 // 0)]})

    assert outcomes(on_ranks(2, source, work)) == [(DamagedError, text)] * 2


@pytest.mark.parametrize(
    ("segments", "text"),
    [
        ({"nothing": [(0, 1, 0)]}, "the checkpoint's manifest lists no file 'nothing'"),
        ({"small": [(0, 778, 0)]}, "small holds 777 bytes, not the 778 that are to be read"),
        ({"small": [(0, 1 << 80, 0)]}, f"small holds 777 bytes, not the {1 << 80:,} that are to be read"),
    ],
)
def test_what_one_rank_can_not_have_is_an_error_on_all_before_a_byte_is_read(segments: Any, text: str) -> None:
    wish = everything()

    def work(source: SharedSource, circle: ThreadCircle) -> None:
        source.scatter(segments if circle.rank == 1 else wish.segments if circle.rank == 0 else {})

    assert outcomes(on_ranks(3, Unreadable(plain().files), work)) == [(DamagedError, text)] * 3


@pytest.mark.parametrize("call", ["read", "open"])
def test_a_file_that_is_not_in_the_manifest_is_damage(call: str) -> None:
    results = on_ranks(2, plain(), lambda source, circle: getattr(source, call)("nothing"))
    assert outcomes(results) == [(DamagedError, "the checkpoint's manifest lists no file 'nothing'")] * 2


@pytest.mark.parametrize("name", ["large", "small"])
def test_a_full_disk_below_an_opened_file_is_the_same_error_on_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def temporary(max_size: int) -> Any:
        is_full = threading.current_thread().name == "rank-1"
        return Path("/dev/full").open("wb") if is_full else SpooledTemporaryFile(max_size)

    monkeypatch.setattr(shared_source, "SpooledTemporaryFile", temporary)

    def work(source: SharedSource, circle: ThreadCircle) -> tuple[type, int | None, str, bytes]:
        with pytest.raises(StoreError) as caught:
            source.open(name)
        return caught.type, caught.value.errno, str(caught.value), source.read("more")

    results = on_ranks(3, plain(), work)
    assert len({*results}) == 1
    assert results[0][:2] == (StoreError, errno.ENOSPC)
    assert results[0][2].startswith(f"can't keep a copy of {name} ({len(FILES[name]):,} bytes) in ")
    assert results[0][2].endswith("No space left on device; set TMPDIR")


def test_a_rank_without_memory_for_a_small_file_raises_alone_and_stays_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(data: memoryview) -> bytes:
        if threading.current_thread().name == "rank-1":
            raise MemoryError("no bytes left")
        return bytes(data)

    monkeypatch.setattr(shared_source, "bytes", copy, raising=False)

    def work(source: SharedSource, circle: ThreadCircle) -> tuple[Any, bool]:
        try:
            got: Any = source.read("small")
        except MemoryError as exc:
            got = str(exc)
        with source.open("more") as file:
            return got, file.read() == FILES["more"]

    assert on_ranks(3, plain(), work) == [(FILES["small"], True), ("no bytes left", True), (FILES["small"], True)]


def test_a_reader_that_dies_leaves_the_others_with_a_coordination_error() -> None:
    def die(segments: Mapping[str, Sequence[Segment]]) -> None:
        raise Crash("killed")

    results = on_ranks(3, Reading(plain(), die), lambda source, circle: source.read("small"))
    lost = (CoordinationError, "the ranks lost each other: rank 0 has ended")
    assert outcomes(results) == [(Crash, "killed"), lost, lost]


def test_a_rank_that_is_missing_is_a_coordination_error_for_the_others() -> None:
    """While the next frame is being read, which ends before the call does."""

    def work(source: SharedSource, circle: ThreadCircle) -> None:
        if circle.rank == 2:
            circle.union([([], None)])  # takes part so far
            raise Crash("killed")
        source.scatter({"large": [(0, 5 * PIECE, lambda offset, data: None)]})

    results = on_ranks(3, plain(), work)
    assert [type(result) for result in results] == [CoordinationError, CoordinationError, Crash]


def test_a_slow_reader_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for a store as long as the reader lives, not in one collective that times out."""
    monkeypatch.setattr(shared_source, "_BEAT_S", 0.001)
    heard = threading.Semaphore(0)

    class Counting(Around):
        def broadcast(self, data: memoryview) -> None:
            super().broadcast(data)
            heard.release()

    def wait(segments: Mapping[str, Sequence[Segment]]) -> None:
        for _ in range(5):
            assert heard.acquire(timeout=10)

    inner = Reading(plain(), wait)

    def rank(circle: ThreadCircle) -> bytes:
        if circle.is_reader:
            return SharedSource(inner, circle).read("small")
        return SharedSource(Unreadable(inner.files), Counting(circle)).read("small")

    assert ThreadCircle.run(2, rank) == [FILES["small"]] * 2


def test_ranks_that_read_different_files_are_told_before_one_takes_the_bytes_of_another() -> None:
    """Which would fit where the files are of one size."""
    results = on_ranks(2, plain(), lambda source, circle: source.read(f"ranks/rank-{circle.rank}.json"))
    assert [type(result) for result in results] == [CoordinationError] * 2
    assert str(results[1]).startswith("the ranks that read together make different calls: this one reads ranks/rank-1")


# The circle of threads


def test_threads_that_make_different_calls_are_told() -> None:
    def rank(circle: ThreadCircle) -> None:
        circle.broadcast(memoryview(bytearray(1 + circle.rank)))

    text = "the ranks lost each other: their calls differ: {0: ('broadcast', 1), 1: ('broadcast', 2)}"
    assert outcomes(ThreadCircle.run(2, rank)) == [(CoordinationError, text)] * 2


def test_a_thread_that_does_not_come_in_time_is_named() -> None:
    gate = threading.Event()

    def rank(circle: ThreadCircle) -> None:
        if circle.rank == 1:
            assert gate.wait(10)
        try:
            circle.union([circle.rank])
        finally:
            gate.set()

    text = "the ranks lost each other: rank 1 did not answer within 0.01 s"
    assert outcomes(ThreadCircle.run(2, rank, timeout_s=0.01)) == [(CoordinationError, text)] * 2


# Real stores and real ranks


def test_four_ranks_ask_a_remote_store_for_what_one_would(s3_proxy: tuple[Bucket, Proxy]) -> None:
    """The same requests, range by range, and as many bytes."""
    bucket, proxy = s3_proxy
    files = stored(open_store(bucket.url, bucket.options))
    asked: list[tuple[str, str | None, int]] = []
    answer = proxy.answer

    def noting(request: Any) -> Any:
        reply = answer(request)
        asked.append((str(request), request.headers.get("Range"), len(reply.body)))
        return reply

    proxy.answer = noting  # type: ignore[method-assign]
    alone = everything()
    Source(open_store(bucket.url, bucket.options), FOLDER, files).scatter(alone.segments)
    assert alone.is_met
    of_one = sorted(asked, key=str)
    asked.clear()
    wishes = [everything() for _ in range(4)]

    def rank(circle: ThreadCircle) -> bool:
        inner = Source(open_store(bucket.url, bucket.options), FOLDER, files)
        SharedSource(inner, circle).scatter(wishes[circle.rank].segments)
        return wishes[circle.rank].is_met

    assert ThreadCircle.run(4, rank) == [True] * 4
    assert sorted(asked, key=str) == of_one
    assert sum(size for _, _, size in asked) == sum(map(len, FILES.values()))


class GlooCircle:
    """All ranks of the job; rank 0 reads."""

    def __init__(self) -> None:
        self.is_reader, self.size = dist.get_rank() == 0, dist.get_world_size()

    def broadcast(self, data: memoryview) -> None:
        dist.broadcast(torch.frombuffer(data, dtype=torch.uint8), 0)

    def union(self, items: list[Any]) -> list[list[Any]]:
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, items)
        return found


def gloo_rank(rank: int, folder: Path, files: Manifest) -> None:
    """One process: everything, then its own file, then a file that is damaged; says how it went in a file."""
    manifest.PIECE_SIZE = shared_source.PIECE_SIZE = PIECE
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=4, timeout=timedelta(seconds=30)
    )
    circle: Circle = GlooCircle()
    inner: FileSource = Source(LocalStore(folder / "store"), FOLDER, files)
    source = SharedSource(inner if circle.is_reader else Unreadable(inner.files), circle)
    wishes = [some_wish(rank), everything(), some_wish(rank + 4)]
    for wish in wishes:
        source.scatter(wish.segments)
    said: list[Any] = [wish.is_met for wish in wishes]
    with source.open("more") as file:
        said.append(source.read("large") + file.read() == FILES["large"] + FILES["more"])
    dist.barrier()
    if rank == 0:
        damaged(inner, "large", 2 * PIECE)  # type: ignore[arg-type]
    try:
        source.scatter(wishes[1].segments)
    except DamagedError as exc:
        said.append(str(exc))
    said.append(source.read("small") == FILES["small"])
    (folder / f"{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


def test_four_processes_read_together_over_gloo(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store", fsync=False)
    files = stored(store)
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=gloo_rank, args=(rank, tmp_path, files)) for rank in range(4)]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(60)
        assert [process.exitcode for process in ranks] == [0] * 4
    finally:
        for process in ranks:
            process.kill()
            process.join()
            process.close()
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    with pytest.raises(DamagedError) as caught:
        Source(store, FOLDER, files).read("large")
    assert said == [[True, True, True, True, str(caught.value), True]] * 4
