"""What must any store hold of its folders? How they are listed, deleted and renamed."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ..errors import AlreadyExistsError, NotFoundError, StoreError
from ..store import Entry, Store
from .object_contract import pattern


class ListingContract:
    """The part of `StoreContract` about folders. `many` is more objects than one page of a listing holds."""

    many = 1005

    def test_a_listing_shows_one_level_or_all(self, store: Store) -> None:
        for key in ("latest", "a/one", "a/b/two", "c/three"):
            store.put(key, b"12345")
        assert _shape(store.list()) == [("a", 0, True), ("c", 0, True), ("latest", 5, False)]
        assert _shape(store.list("a")) == [("a/b", 0, True), ("a/one", 5, False)]
        assert _shape(store.list("a", recursive=True)) == [("a/b/two", 5, False), ("a/one", 5, False)]
        assert [e.key for e in store.list(recursive=True)] == ["a/b/two", "a/one", "c/three", "latest"]

    def test_the_names_of_folders_are_those_of_the_listing(self, store: Store) -> None:
        for key in ("latest", "a-1/one", "a/one", "a/b/two", "a/c/deep/three", ".dots/four"):
            store.put(key, b"12345")
        for folder in ("", "a", "a/c", "a/b", "missing", "latest"):
            assert store.folders(folder) == [entry.name for entry in store.list(folder) if entry.is_folder]
        assert (store.folders(), store.folders("a")) == ([".dots", "a", "a-1"], ["b", "c"])

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

    def test_stat_tells_a_folder_by_its_slash(self, store: Store) -> None:
        store.put("folder/deep/key", b"12345")
        store.put("file", b"1")
        assert store.stat("folder/") == Entry("folder", is_folder=True)
        assert store.stat("folder/deep/") == Entry("folder/deep", is_folder=True)
        assert [store.stat(key) for key in ("fold/", "folder/deep/key/", "file/", "missing/")] == [None] * 4
        store.delete(["folder/"])
        assert store.stat("folder/") is None

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
        writer.write(pattern(100))
        store.delete(["a/"])
        writer.abort()
        assert [e.key for e in store.list(recursive=True)] == ["ab"]

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


def _shape(entries: list[Entry]) -> list[tuple[str, int, bool]]:
    return [(entry.key, entry.size, entry.is_folder) for entry in entries]
