"""Has somebody asked for a save by making a file? Found, taken away, and passed on exactly once."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable
from pathlib import Path

import pytest

from ckptmgr.errors import NotFoundError, StoreError
from ckptmgr.request_file import RequestFile
from ckptmgr.store import Entry, Store, open_store
from ckptmgr.testing import MemoryStore


@pytest.fixture(params=["folder", "objects"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(tmp_path) if request.param == "folder" else MemoryStore()


class BrokenStore(MemoryStore):
    """A store that refuses what `refused` names."""

    refused: tuple[str, ...] = ()

    def stat(self, key: str) -> Entry | None:
        if "stat" in self.refused:
            raise StoreError("no route to the store")
        return super().stat(key)

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        if "get" in self.refused:
            raise NotFoundError(f"{key} does not exist")
        return super().get(key, start, end)

    def delete(self, keys: Iterable[str]) -> None:
        if "delete" in self.refused:
            raise StoreError("permission denied")
        super().delete(keys)


def test_a_file_is_taken_away_and_passed_on_exactly_once(store: Store) -> None:
    reasons: list[str] = []
    file = RequestFile(store, "SAVE_NOW", reasons.append)
    assert (file.look(), reasons) == (False, [])
    store.put("SAVE_NOW", b"")
    assert (file.look(), file.look()) == (True, False)
    assert (reasons, store.stat("SAVE_NOW")) == (["SAVE_NOW"], None)


def test_a_file_that_comes_again_is_a_new_request(store: Store) -> None:
    reasons: list[str] = []
    file = RequestFile(store, "SAVE_NOW", reasons.append)
    for _ in range(2):
        store.put("SAVE_NOW", b"")
        file.look()
    assert reasons == ["SAVE_NOW", "SAVE_NOW"]


def test_the_file_is_gone_before_the_request_is_passed_on(store: Store) -> None:
    left: list[Entry | None] = []
    file = RequestFile(store, "SAVE_NOW", lambda reason: left.append(store.stat("SAVE_NOW")))
    store.put("SAVE_NOW", b"now")
    file.look()
    assert left == [None]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"before the power cut\nsecond line\n", "SAVE_NOW: before the power cut"),
        (b"  \n", "SAVE_NOW"),
        (b"\x1b[31mred\xff\tx\r\n", "SAVE_NOW: [31mred\N{REPLACEMENT CHARACTER} x"),
        (b"x" * 10_000, "SAVE_NOW: " + "x" * 200),
        ("ä".encode() * 10_000, "SAVE_NOW: " + "ä" * 200),
    ],
)
def test_the_reason_has_the_first_line_short_and_printable(store: Store, content: bytes, reason: str) -> None:
    reasons: list[str] = []
    store.put("SAVE_NOW", content)
    RequestFile(store, "SAVE_NOW", reasons.append).look()
    assert reasons == [reason]


def test_a_thread_finds_the_file_and_stops_when_told(store: Store) -> None:
    found = threading.Event()
    reasons: list[str] = []
    file = RequestFile(store, "SAVE_NOW", lambda reason: (reasons.append(reason), found.set())[0], every_s=0.001)
    file.start()
    file.start()
    store.put("SAVE_NOW", b"now")
    assert found.wait(30)
    file.stop()
    store.put("SAVE_NOW", b"later")
    assert "ckptmgr-request-file" not in [thread.name for thread in threading.enumerate()]
    assert reasons[0].startswith("SAVE_NOW")
    assert store.stat("SAVE_NOW") is not None


def test_stopping_before_starting_and_from_the_callback_is_fine(store: Store) -> None:
    RequestFile(store, "SAVE_NOW", lambda reason: None).stop()
    done = threading.Event()

    def stop(reason: str) -> None:
        file.stop()
        done.set()

    file = RequestFile(store, "SAVE_NOW", stop, every_s=0.001)
    store.put("SAVE_NOW", b"")
    file.start()
    assert done.wait(30)
    file.stop()


def test_a_local_folder_is_looked_at_each_second_and_a_remote_one_each_ten(tmp_path: Path) -> None:
    stores: list[Store] = [open_store(tmp_path), MemoryStore()]
    assert [RequestFile(store, "x", print)._every_s for store in stores] == [1.0, 10.0]


def test_a_store_that_fails_is_logged_once_until_it_works_again(caplog: pytest.LogCaptureFixture) -> None:
    store = BrokenStore("memory-store:x")
    file = RequestFile(store, "SAVE_NOW", lambda reason: None)
    with caplog.at_level(logging.WARNING, "ckptmgr.request_file"):
        for refused in (("stat",), ("stat",), (), ("stat",)):
            store.refused = refused
            assert file.look() is False
    line = "request_file.look.failed url=memory-store:x key=SAVE_NOW cause=no route to the store"
    assert caplog.messages == [line, line]


def test_a_file_that_cannot_be_removed_is_no_request(caplog: pytest.LogCaptureFixture) -> None:
    store, reasons = BrokenStore(), list[str]()
    store.put("SAVE_NOW", b"")
    store.refused = ("delete",)
    file = RequestFile(store, "SAVE_NOW", reasons.append)
    assert (file.look(), reasons) == (False, [])
    store.refused = ()
    assert (file.look(), reasons) == (True, ["SAVE_NOW"])


def test_a_file_taken_back_while_looking_is_no_request() -> None:
    store, reasons = BrokenStore(), list[str]()
    store.put("SAVE_NOW", b"now")
    store.refused = ("get",)
    assert (RequestFile(store, "SAVE_NOW", reasons.append).look(), reasons) == (False, [])


def test_two_threads_that_look_at_once_take_it_once() -> None:
    inside, go_on = threading.Event(), threading.Event()

    class SlowStat(MemoryStore):
        def stat(self, key: str) -> Entry | None:
            inside.set()
            go_on.wait(30)
            return super().stat(key)

    store, reasons = SlowStat(), list[str]()
    store.put("SAVE_NOW", b"")
    file = RequestFile(store, "SAVE_NOW", reasons.append)
    other = threading.Thread(target=file.look)
    other.start()
    assert inside.wait(30)
    assert file.look() is False
    go_on.set()
    other.join()
    assert reasons == ["SAVE_NOW"]


def test_a_dropped_one_ends_its_thread_and_leaves_the_file_to_its_successor(store: Store) -> None:
    class Owner:
        def __init__(self) -> None:
            self.reasons: list[str] = []
            self.file = RequestFile(store, "SAVE_NOW", self.reasons.append, every_s=0.001)

    first = Owner()
    first.file.start()
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "ckptmgr-request-file")
    dropped, second = weakref.ref(first.file), Owner()
    del first
    thread.join(30)
    assert (thread.is_alive(), dropped()) == (False, None)
    store.put("SAVE_NOW", b"")
    assert (second.file.look(), second.reasons) == (True, ["SAVE_NOW"])
