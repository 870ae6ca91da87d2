"""What must any store hold? One suite of tests, to be subclassed with a `store` fixture.

    class TestMyStore(StoreContract):
        @pytest.fixture
        def store(self) -> Store:
            return MyStore(...)            # empty, and everything below its root may be deleted

It needs pytest.
"""

from __future__ import annotations

import gc
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from ..errors import NotFoundError
from ..store import Store
from .listing_contract import ListingContract
from .object_contract import ObjectContract, pattern
from .piece_contract import PieceContract


class StoreContract(ObjectContract, PieceContract, ListingContract):
    """Each test is one promise of the `Store` protocol.

    `shares` is False for a store whose objects a second instance or process does not see; the other
    attributes are those of the parts.
    """

    shares = True

    @pytest.fixture
    def store(self) -> Store:
        raise NotImplementedError("give the contract a store")

    def test_a_second_instance_is_seen_at_once(self, store: Store) -> None:
        """No listing, stat or read is answered from a cache."""
        if not self.shares:
            return
        other = pickle.loads(pickle.dumps(store))  # noqa: S301 - our own bytes
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
            writer.write(pattern(10_000))
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
        gc.freeze()  # the child's collection is to look at the writer, not to copy all of the parent's memory
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
        gc.unfreeze()
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        if self.shares:
            assert store.get("child") == b"written"
        writer.write(b" done")
        writer.commit()
        assert store.get("open") == b"half done"

    def test_it_says_what_it_is(self, store: Store) -> None:
        assert store.url
        assert store.url in repr(store)
        assert (store.path is None) or str(store.path) == store.url
        with pytest.raises(NotFoundError, match="a/missing"):
            store.get("a/missing")
