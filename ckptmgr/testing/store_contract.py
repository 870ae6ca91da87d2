"""What must any store hold? One suite of tests, to be subclassed with a `store` fixture.

    class TestMyStore(StoreContract):
        @pytest.fixture
        def store(self) -> Store:
            return MyStore(...)            # empty, and everything below its root may be deleted

It needs pytest. A store whose copies share nothing, such as one in memory, overrides `again`.
"""

from __future__ import annotations

import gc
import os
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from ..errors import AlreadyExistsError, CheckpointError, ConfigError, NotFoundError, StoreError
from ..store import Entry, Store

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


class StoreContract:
    """Each test is one promise of the `Store` protocol.

    `conditional_create` is False for a store without conditional writes, which can't choose one
    winner; `shares` is False for one whose objects are not seen by a second instance or process;
    `many` is more objects than one page of a listing holds.
    """

    conditional_create = True
    shares = True
    many = 1005

    @pytest.fixture
    def store(self) -> Store:
        raise NotImplementedError("give the contract a store")

    def again(self, store: Store) -> Store:
        """A second instance at the same root, as another process would have it."""
        copy: Store = pickle.loads(pickle.dumps(store))  # noqa: S301 - our own bytes
        return copy

    # Objects

    @pytest.mark.parametrize("size", [0, 1, 1000, _LARGE])
    def test_put_then_get_gives_the_same_bytes(self, store: Store, size: int) -> None:
        data = _pattern(size)
        store.put("folder/key", data)
        assert store.get("folder/key") == data

    @pytest.mark.parametrize("size", [0, 1, _LARGE, 2 * _LARGE])
    def test_written_and_committed_gives_the_same_bytes(self, store: Store, size: int) -> None:
        data = _pattern(size)
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
        for call in (store.get, store.stat, store.writer, lambda k: store.put(k, b""), lambda k: store.rename(k, "x")):
            with pytest.raises((ConfigError, StoreError)):
                call(key)
        if key != "a/":
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
        writer.write(_pattern(1000))
        assert store.stat("folder/key") is None
        assert store.list(recursive=True) == []
        with pytest.raises(NotFoundError):
            store.get("folder/key")
        writer.commit()
        assert [entry.key for entry in store.list(recursive=True)] == ["folder/key"]

    @pytest.mark.parametrize("size", [0, 1000, 2 * _LARGE])
    def test_nothing_is_visible_after_an_abort(self, store: Store, size: int) -> None:
        writer = store.writer("folder/key")
        writer.write(_pattern(size))
        writer.abort()
        writer.abort()
        gc.collect()
        assert store.list(recursive=True) == []

    @pytest.mark.parametrize("size", [1000, 2 * _LARGE])
    def test_nothing_is_visible_of_a_writer_that_was_dropped(self, store: Store, size: int) -> None:
        writer = store.writer("folder/key")
        writer.write(_pattern(size))
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

    # Listings

    def test_a_listing_shows_one_level_or_all(self, store: Store) -> None:
        for key in ("latest", "a/one", "a/b/two", "c/three"):
            store.put(key, b"12345")
        assert _shape(store.list()) == [("a", 0, True), ("c", 0, True), ("latest", 5, False)]
        assert _shape(store.list("a")) == [("a/b", 0, True), ("a/one", 5, False)]
        assert _shape(store.list("a", recursive=True)) == [("a/b/two", 5, False), ("a/one", 5, False)]
        assert [e.key for e in store.list(recursive=True)] == ["a/b/two", "a/one", "c/three", "latest"]

    def test_a_folder_is_matched_whole(self, store: Store) -> None:
        for key in ("step-1/a", "step-10/a", "step-1.bak"):
            store.put(key, b"1")
        assert [e.key for e in store.list("step-1")] == ["step-1/a"]
        assert [e.key for e in store.list("step-1", recursive=True)] == ["step-1/a"]
        assert [e.key for e in store.list()] == ["step-1", "step-1.bak", "step-10"]
        store.delete(["step-1/"])
        assert [e.key for e in store.list(recursive=True)] == ["step-1.bak", "step-10/a"]

    def test_a_folder_that_is_not_there_is_empty(self, store: Store) -> None:
        assert [store.list(), store.list("missing"), store.list("missing/deep", recursive=True)] == [[], [], []]
        store.put("file", b"1")
        assert store.list("file") == []

    def test_a_listing_and_a_stat_say_the_same(self, store: Store) -> None:
        before = time.time()
        store.put("folder/key", b"12345")
        (listed,) = store.list("folder")
        assert store.stat("folder/key") == listed
        assert (listed.key, listed.name, listed.size, listed.is_folder) == ("folder/key", "key", 5, False)
        # The clock is the store's: of this machine here, in whole seconds on some.
        assert listed.modified is not None
        assert abs(listed.modified - before) < 3600

    def test_stat_is_none_for_what_is_no_file(self, store: Store) -> None:
        store.put("folder/key", b"1")
        assert [store.stat("missing"), store.stat("folder"), store.stat("folder/missing")] == [None, None, None]

    def test_more_than_a_page_is_listed(self, store: Store) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: store.put(f"many/{n:04}", b""), range(self.many)))
        assert len(store.list("many")) == len(store.list(recursive=True)) == self.many
        store.delete(["many/"])
        assert store.list(recursive=True) == []

    # Deletion

    def test_deleted_files_and_emptied_folders_are_gone(self, store: Store) -> None:
        for key in ("a/b/one", "a/b/two", "c/three"):
            store.put(key, b"1")
        store.delete(["a/b/one", "a/b/two"])
        assert [e.key for e in store.list(recursive=True)] == ["c/three"]
        # Some servers show a folder for a while after its last object has gone, but never a file in it.
        assert [e for e in store.list("a") if not e.is_folder] == []
        with pytest.raises(NotFoundError):
            store.get("a/b/one")

    def test_deleting_what_is_missing_is_no_error(self, store: Store) -> None:
        store.delete([])
        store.delete(["missing", "missing/deep", "folder/"])
        store.put("folder/key", b"1")
        store.delete(["folder/missing", "folder"])
        assert store.get("folder/key") == b"1"

    def test_a_folder_is_deleted_with_everything_below_it(self, store: Store) -> None:
        for key in ("a/one", "a/b/two", "a/b/c/three", "ab"):
            store.put(key, b"1")
        writer = store.writer("a/unfinished")
        writer.write(_pattern(100))
        store.delete(["a/"])
        writer.abort()
        assert [e.key for e in store.list(recursive=True)] == ["ab"]

    # Several at once

    def test_a_second_instance_is_seen_at_once(self, store: Store) -> None:
        """No listing, stat or read is answered from a cache."""
        if not self.shares:
            return
        other = self.again(store)
        assert (store.list(), store.stat("a/key"), other.stat("a/key")) == ([], None, None)
        other.put("a/key", b"one")
        assert store.get("a/key") == b"one"
        assert [e.key for e in store.list("a")] == ["a/key"]
        other.put("a/key", b"three")
        other.put("a/other", b"")
        assert store.get("a/key") == b"three"
        assert [(e.key, e.size) for e in store.list(recursive=True)] == [("a/key", 5), ("a/other", 0)]
        found = store.stat("a/key")
        assert found is not None
        assert found.size == 5
        other.delete(["a/key", "a/other"])
        assert (store.list("a", recursive=True), store.stat("a/key")) == ([], None)

    def test_a_pickled_store_is_the_same_store(self, store: Store) -> None:
        store.put("key", b"1")
        copy = pickle.loads(pickle.dumps(store))  # noqa: S301 - our own bytes
        assert (copy.url, copy.path, repr(copy)) == (store.url, store.path, repr(store))
        assert copy.get("key") == b"1"

    def test_sixteen_threads_share_a_store(self, store: Store) -> None:
        def work(n: int) -> bytes:
            store.put(f"threads/{n}", b"%d" % n)
            writer = store.writer(f"threads/large-{n}")
            writer.write(_pattern(10_000))
            writer.commit()
            store.list("threads")
            return store.get(f"threads/{n}")

        with ThreadPoolExecutor(16) as pool:
            assert list(pool.map(work, range(16))) == [b"%d" % n for n in range(16)]
        assert len(store.list("threads")) == 32

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_a_forked_child_uses_the_store_of_its_parent(self, store: Store) -> None:
        store.put("parent", b"before")
        writer = store.writer("open")
        writer.write(b"half")
        child = os.fork()
        if child == 0:  # pragma: no cover - in another process
            signal = 1
            try:
                assert store.get("parent") == b"before"
                store.put("child", b"written")
                del writer
                gc.collect()
                signal = 0
            finally:
                os._exit(signal)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        if self.shares:
            assert store.get("child") == b"written"
        writer.write(b" done")
        writer.commit()
        assert store.get("open") == b"half done"

    # Renames

    def test_a_folder_is_renamed_whole(self, store: Store) -> None:
        if not store.can_rename:
            store.put("draft/a", b"1")
            with pytest.raises(StoreError):
                store.rename("draft", "step-1")
            assert [e.key for e in store.list(recursive=True)] == ["draft/a"]
            return
        for key in ("drafts/x/a", "drafts/x/b/c"):
            store.put(key, key.encode())
        store.rename("drafts/x", "done/step-1")
        assert [e.key for e in store.list(recursive=True)] == ["done/step-1/a", "done/step-1/b/c"]
        assert store.get("done/step-1/b/c") == b"drafts/x/b/c"
        store.put("drafts/x/a", b"again")
        assert store.get("drafts/x/a") == b"again"

    def test_a_rename_goes_over_nothing(self, store: Store) -> None:
        if not store.can_rename:
            return
        store.put("draft/a", b"new")
        store.put("taken/a", b"old")
        store.put("file", b"old")
        for target in ("taken", "file"):
            with pytest.raises(AlreadyExistsError):
                store.rename("draft", target)
        with pytest.raises(NotFoundError):
            store.rename("missing", "step-1")
        assert [store.get("draft/a"), store.get("taken/a"), store.get("file")] == [b"new", b"old", b"old"]

    # Words

    def test_it_says_what_it_is(self, store: Store) -> None:
        assert store.url
        assert store.url in repr(store)
        assert (store.path is None) or str(store.path) == store.url
        with pytest.raises(NotFoundError, match="a/missing"):
            store.get("a/missing")


def _pattern(size: int) -> bytes:
    return (b"0123456789abcdef\r\n" * (size // 18 + 1))[:size]


def _shape(entries: list[Entry]) -> list[tuple[str, int, bool]]:
    return [(entry.key, entry.size, entry.is_folder) for entry in entries]
