"""Is a checkpoint believed where a listing does not show yet what was written? What was is asked of the objects."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from ckptmgr import CheckpointManager
from ckptmgr.errors import StoreError
from ckptmgr.manifest import CheckpointInfo, Manifest
from ckptmgr.repository import Repository
from ckptmgr.store import Entry
from ckptmgr.testing import MemoryStore

_DATA = re.compile(r"step-\d+/[0-9a-f]+/.")
_FILES = {"a.bin": b"aa", "b.bin": b"bb", "ranks/c.bin": b"cc"}


class _Lagging(MemoryStore):
    """A store whose listings tell of data only what `stale` makes of it; all else, and each object, is as it is.

    `asked` has every key whose object was looked at."""

    def __init__(self) -> None:
        super().__init__(can_rename=False)
        self.stale: Callable[[Entry], Entry | None] = lambda entry: entry
        self.look: Callable[[], object] = lambda: None
        self.asked: list[str] = []

    def list(self, folder: str = "", *, recursive: bool = False) -> list[Entry]:
        told = (self.stale(e) if _DATA.match(e.key) else e for e in super().list(folder, recursive=recursive))
        return [entry for entry in told if entry is not None]

    def stat(self, key: str) -> Entry | None:
        if _DATA.match(key):
            self.look()
            self.asked.append(key.rpartition("/")[2])
        return super().stat(key)


def _hidden(entry: Entry) -> None:
    return None


def _old(entry: Entry) -> Entry:
    return entry._replace(size=1)


@pytest.fixture
def store() -> _Lagging:
    return _Lagging()


def _commit(store: _Lagging) -> CheckpointInfo:
    draft = Repository(store).begin(3, None, "run")
    for name, data in _FILES.items():
        with draft.create(name) as file:
            file.write(data)
    now = datetime(2030, 1, 1, tzinfo=UTC)
    return draft.commit(Manifest(step=3, run="run", attempt=1, nonce="", time=now, format="raw", files=()))


def _key(info: CheckpointInfo, name: str) -> str:
    assert info.manifest is not None
    return f"{info.name}/{info.manifest.nonce}/{name}"


@pytest.mark.parametrize("stale", [_hidden, _old])
def test_a_save_is_whole_though_the_listing_does_not_show_it_yet(
    store: _Lagging, stale: Callable[[Entry], Entry | None]
) -> None:
    store.stale = stale
    info = _commit(store)
    assert Repository(store).infos() == [info]


@pytest.mark.parametrize("level", ["size", "fast", "full"])
@pytest.mark.parametrize("stale", [_hidden, _old])
def test_a_checkpoint_is_good_though_the_listing_does_not_show_it_yet(
    store: _Lagging, stale: Callable[[Entry], Entry | None], level: str
) -> None:
    info = _commit(store)
    store.stale = stale
    assert Repository(store).verify(info, level) == []
    assert Repository(store).open(info, level).read("a.bin") == b"aa"


@pytest.mark.parametrize("stale", [_hidden, _old])
def test_what_is_not_as_written_is_told_as_the_store_holds_it(
    store: _Lagging, stale: Callable[[Entry], Entry | None]
) -> None:
    info = _commit(store)
    store.stale = stale
    store.put(_key(info, "a.bin"), b"longer")
    store.look = lambda: store.delete([_key(info, "ranks/c.bin")])  # after the listing
    assert [str(problem) for problem in Repository(store).verify(info)] == [
        "a.bin: has 6 bytes, not the 2 of the manifest",
        "ranks/c.bin: missing",
    ]


def test_bytes_that_are_not_listed_yet_are_checked_like_all_others(store: _Lagging) -> None:
    info = _commit(store)
    store.stale = _hidden
    store.put(_key(info, "b.bin"), b"b?")
    assert [problem.file for problem in Repository(store).verify(info, "full")] == ["b.bin"]


def test_only_of_what_the_listing_does_not_show_the_objects_are_looked_at(store: _Lagging) -> None:
    info = _commit(store)
    assert (Repository(store).verify(info), store.asked) == ([], [])
    store.stale = lambda entry: None if entry.name == "b.bin" else entry
    assert (Repository(store).verify(info), store.asked) == ([], ["b.bin"])


def test_objects_that_the_listing_does_not_show_are_looked_at_several_at_a_time(store: _Lagging) -> None:
    info = _commit(store)
    store.stale = _hidden
    together = threading.Barrier(len(_FILES))
    store.look = lambda: together.wait(60)
    assert Repository(store).verify(info, "size") == []


def test_an_object_that_can_not_be_looked_at_is_no_damage(store: _Lagging) -> None:
    def fail() -> None:
        raise StoreError("the store is down")

    info = _commit(store)
    store.stale, store.look = _hidden, fail
    with pytest.raises(StoreError, match="the store is down"):
        Repository(store).verify(info)


def test_a_run_resumes_from_its_newest_checkpoint_though_the_listing_does_not_show_it_yet(store: _Lagging) -> None:
    with CheckpointManager("memory-store:", store=store, background=False) as mgr:
        for step in (1, 2):
            mgr.save({"x": step}, step)
    store.stale = lambda entry: None if entry.key.startswith("step-00000002") else entry
    with CheckpointManager("memory-store:", store=store, background=False) as mgr:
        start = mgr.resume()
        assert (start.step, start.values, start.skipped) == (2, {"x": 2}, ())
    store.stale = lambda entry: entry
    with CheckpointManager("memory-store:", store=store, read_only=True) as mgr:
        assert mgr.all_steps() == [1, 2]
