"""What must any store hold of its objects? That bytes come back as they were, and that writes are all or nothing."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from ..errors import AlreadyExistsError, CheckpointError, ConfigError, NotFoundError, StoreError
from ..store import Store

_LARGE = 9 << 20  # bytes; more than one of the smallest parts that object stores take
_ODD_KEYS = [
    "plain",
    "deep/er/still.json",
    ".hidden/.file",
    "with space",
    "a+b=c@d%20~e-f_g",
    "ünïcode/名前",
    "query?x=1#part",
    "[glob]*{a}",
    "quote'\"&<>",
    "x" * 200,
]


class ObjectContract:
    """The part of `StoreContract` about reading and writing one object.

    `conditional_create` is False for a store without conditional writes, which can't choose one winner.
    """

    conditional_create = True

    @pytest.mark.parametrize("size", [0, 1, 1000, _LARGE])
    def test_put_then_get_gives_the_same_bytes(self, store: Store, size: int) -> None:
        data = pattern(size)
        store.put("folder/key", data)
        assert store.get("folder/key") == data

    @pytest.mark.parametrize("size", [0, 1, _LARGE, 2 * _LARGE])
    def test_written_and_committed_gives_the_same_bytes(self, store: Store, size: int) -> None:
        data = pattern(size)
        writer = store.writer("folder/key")
        writer.write(data[:7])
        writer.write(memoryview(data)[7:])
        writer.write(b"")
        writer.commit()
        assert store.get("folder/key") == data
        assert store.stat("folder/key") is not None

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_any_buffer_can_be_put_and_written(self, store: Store, kind: Callable[[bytes], bytes]) -> None:
        store.put("put", kind(b"abc"))
        writer = store.writer("written")
        writer.write(kind(b"abc"))
        writer.commit()
        assert [store.get("put"), store.get("written")] == [b"abc", b"abc"]

    def test_a_buffer_of_wider_items_is_taken_as_its_bytes(self, store: Store) -> None:
        numbers = memoryview(bytes(range(16))).cast("I", (2, 2))
        store.put("key", numbers)
        assert store.get("key") == bytes(range(16))

    def test_a_writer_copies_what_it_is_given(self, store: Store) -> None:
        """The caller may use its buffer again at once."""
        buffer = bytearray(b"first")
        writer = store.writer("key")
        writer.write(buffer)
        buffer[:] = b"other"
        writer.commit()
        assert store.get("key") == b"first"

    @pytest.mark.parametrize("key", _ODD_KEYS)
    def test_odd_keys_are_keys_like_any_other(self, store: Store, key: str) -> None:
        store.put(key, b"1")
        assert store.get(key) == b"1"
        assert [entry.key for entry in store.list(recursive=True)] == [key]
        assert store.stat(key) is not None
        store.delete([key])
        assert store.stat(key) is None

    @pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", "./a", "a\\b", "a\0b", "c:a", "a\nb"])
    def test_a_key_that_could_lead_elsewhere_is_refused(self, store: Store, key: str) -> None:
        calls: list[Callable[[str], object]] = [
            store.get,
            store.reader,
            store.writer,
            lambda k: store.put(k, b""),
            lambda k: store.rename(k, "x"),
            lambda k: store.copy(k, "x"),
            lambda k: store.copy("x", k),
        ]
        store.put("x", b"")
        for call in calls:
            with pytest.raises((ConfigError, StoreError)):
                call(key)
        if key != "a/":  # a folder, of which there are these
            with pytest.raises(ConfigError):
                store.stat(key)
            with pytest.raises(ConfigError):
                store.delete([key])

    @pytest.mark.parametrize(
        ("start", "end", "expected"),
        [
            (0, None, b"0123456789"),
            (0, 4, b"0123"),
            (3, 7, b"3456"),
            (3, None, b"3456789"),
            (3, 99, b"3456789"),
            (9, 10, b"9"),
            (4, 4, b""),
            (10, None, b""),
            (10, 20, b""),
            (50, 60, b""),
            (0, 0, b""),
        ],
    )
    def test_a_range_is_cut_at_the_end(self, store: Store, start: int, end: int | None, expected: bytes) -> None:
        store.put("key", b"0123456789")
        assert store.get("key", start, end) == expected

    def test_every_range_of_an_empty_object_is_empty(self, store: Store) -> None:
        store.put("key", b"")
        assert [store.get("key"), store.get("key", 0, 5), store.get("key", 3), store.get("key", 0, 0)] == [b""] * 4

    @pytest.mark.parametrize(("start", "end"), [(0, None), (0, 5), (5, 5)])
    def test_what_is_missing_is_not_found(self, store: Store, start: int, end: int | None) -> None:
        store.put("folder/key", b"1")
        for key in ("missing", "folder/missing", "folder", "folder/key/below"):
            with pytest.raises(NotFoundError) if key != "folder" else pytest.raises(CheckpointError):
                store.get(key, start, end)

    # Writes are all or nothing

    def test_put_replaces_the_whole_object(self, store: Store) -> None:
        store.put("key", b"a longer one")
        store.put("key", b"short")
        assert store.get("key") == b"short"

    def test_readers_see_the_old_object_or_the_new_one(self, store: Store) -> None:
        versions = [bytes([n]) * 100_000 for n in range(4)]
        store.put("key", versions[0])
        seen: list[bytes] = []
        done = threading.Event()

        def read() -> None:
            while not done.is_set():
                seen.append(store.get("key"))

        with ThreadPoolExecutor(1) as pool:
            reader = pool.submit(read)
            try:
                for data in versions:
                    store.put("key", data)
            finally:
                done.set()
            reader.result()
        assert set(seen) <= set(versions)

    def test_create_refuses_a_key_that_is_taken_and_changes_nothing(self, store: Store) -> None:
        store.put("key", b"first", create=True)
        with pytest.raises(AlreadyExistsError):
            store.put("key", b"second", create=True)
        assert store.get("key") == b"first"

    def test_of_eight_creates_one_wins(self, store: Store) -> None:
        def create(data: bytes) -> bytes | None:
            start.wait()
            try:
                store.put("key", data, create=True)
            except AlreadyExistsError:
                return None
            return data

        start = threading.Barrier(8)
        with ThreadPoolExecutor(8) as pool:
            winners = [data for data in pool.map(create, [b"writer %d" % n for n in range(8)]) if data is not None]
        assert store.get("key") in winners
        if self.conditional_create:
            assert len(winners) == 1

    def test_nothing_is_visible_before_the_commit(self, store: Store) -> None:
        writer = store.writer("folder/key")
        writer.write(pattern(1000))
        assert store.stat("folder/key") is None
        assert store.list(recursive=True) == []
        with pytest.raises(NotFoundError):
            store.get("folder/key")
        writer.commit()
        assert [entry.key for entry in store.list(recursive=True)] == ["folder/key"]

    @pytest.mark.parametrize("size", [0, 1000, 2 * _LARGE])
    def test_nothing_is_visible_after_an_abort(self, store: Store, size: int) -> None:
        writer = store.writer("folder/key")
        writer.write(pattern(size))
        writer.abort()
        writer.abort()
        gc.collect()
        assert store.list(recursive=True) == []

    @pytest.mark.parametrize("size", [1000, 2 * _LARGE])
    def test_nothing_is_visible_of_a_writer_that_was_dropped(self, store: Store, size: int) -> None:
        writer = store.writer("folder/key")
        writer.write(pattern(size))
        del writer
        gc.collect()
        assert store.list(recursive=True) == []

    def test_an_abort_leaves_the_old_object(self, store: Store) -> None:
        store.put("key", b"old")
        writer = store.writer("key")
        writer.write(b"new")
        assert store.get("key") == b"old"
        writer.abort()
        assert store.get("key") == b"old"

    def test_a_commit_replaces_the_old_object(self, store: Store) -> None:
        store.put("key", b"old")
        writer = store.writer("key")
        writer.write(b"new")
        writer.commit()
        assert store.get("key") == b"new"

    def test_an_ended_writer_takes_nothing_more(self, store: Store) -> None:
        for end in ("commit", "abort"):
            writer = store.writer("key")
            writer.write(b"whole")
            getattr(writer, end)()
            with pytest.raises(StoreError):
                writer.write(b"more")
            with pytest.raises(StoreError):
                writer.commit()
        assert store.get("key") == b"whole"

    def test_an_abort_after_the_commit_takes_nothing_back(self, store: Store) -> None:
        writer = store.writer("key")
        writer.write(b"whole")
        writer.commit()
        writer.abort()
        assert store.get("key") == b"whole"


def pattern(size: int) -> bytes:
    """So many bytes of which no two neighbours are alike, line ends among them."""
    return (b"0123456789abcdef\r\n" * (size // 18 + 1))[:size]
