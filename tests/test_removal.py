"""A large file goes without anyone waiting for its blocks."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from ckptmgr import CheckpointManager
from ckptmgr.store import removal
from ckptmgr.store.local import LocalStore
from ckptmgr.store.removal import names_first, wait_for_space
from ckptmgr.testing import Call, SystemCalls

lists_files = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no list of open files here")
LARGE = b"x" * (5 << 20)


@lists_files
def test_a_large_file_is_gone_at_once_and_its_space_before_anyone_forks(tmp_path: Path) -> None:
    """A forked child would keep the blocks for as long as it lives."""
    store = LocalStore(tmp_path)
    for _ in range(5):
        store.put("run/large", LARGE)
        store.delete(["run/large"])
        assert store.stat("run/large") is None
        child = os.fork()
        if child == 0:
            links = list(Path("/proc/self/fd").iterdir())
            os._exit(sum("large" in str(link.readlink()) for link in links if link.is_symlink()))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_of_a_file_with_two_names_the_other_stays_whole(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a/large", LARGE)
    assert store.copy("a/large", "b/large")
    store.delete(["a/large"])
    wait_for_space()
    assert store.get("b/large") == LARGE


def test_whoever_has_a_deleted_file_open_reads_on(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("large", LARGE)
    reader = store.reader("large")
    store.delete(["large"])
    wait_for_space()
    out = bytearray(len(LARGE))
    assert (reader.read_into(0, [out]), bytes(out)) == (len(LARGE), LARGE)
    reader.close()


def _held(folder: Path) -> int:
    """How many deleted files of a folder this process has open."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # another thread has closed it
            name = os.readlink(link)  # noqa: PTH115
            count += name.startswith(str(folder)) and name.endswith("(deleted)")
    return count


@lists_files
def test_no_blocks_are_freed_while_a_save_still_changes_names(tmp_path: Path) -> None:
    """A journal would have the save wait for them: half as long again as it takes to write as much."""
    held: list[tuple[Call, int]] = []
    with CheckpointManager(tmp_path, background=False, keep={"last": 1}, reuse_blocks=False) as manager:
        manager.save({"weights": torch.zeros(2 << 20)}, 1)
        with SystemCalls(tmp_path, after=lambda call: held.append((call, _held(tmp_path / "step-00000001")))):
            manager.save({"weights": torch.ones(2 << 20)}, 2)
        names = [call.path for call, _ in held]
        gone = names.index("step-00000001/weights.safetensors")
        assert len(names) > gone + 5
        assert [(call, count) for call, count in held[gone:] if count != 1] == []
        wait_for_space()
        assert _held(tmp_path) == 0


@lists_files
def test_of_many_large_files_only_some_are_held_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal, "_MOST", 3)
    store = LocalStore(tmp_path)
    for number in range(8):
        store.put(f"run/{number}", LARGE)
    most = 0

    def look(call: Call) -> None:
        nonlocal most
        most = max(most, len(removal._waiting))

    with SystemCalls(tmp_path, after=look):
        store.delete([f"run/{number}" for number in range(8)])
    wait_for_space()
    assert 0 < most < 3
    assert _held(tmp_path) == 0


@lists_files
def test_a_save_without_room_gets_what_is_held_back(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("run/large", LARGE)
    with names_first():
        store.delete(["run/large"])
        assert _held(tmp_path) == 1
        assert wait_for_space()
        assert _held(tmp_path) == 0
    assert not wait_for_space()


def test_a_save_without_room_tries_again_however_fast_the_space_became_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = threading.Thread.start

    def start(self: threading.Thread) -> None:
        begin(self)
        self.join()

    monkeypatch.setattr(threading.Thread, "start", start)
    store = LocalStore(tmp_path)
    store.put("run/large", LARGE)
    with names_first():
        store.delete(["run/large"])
        assert wait_for_space()
        assert not wait_for_space()


@lists_files
def test_space_is_free_again_without_a_thread_to_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    store = LocalStore(tmp_path)
    store.put("run/large", LARGE)
    store.delete(["run/large"])
    assert _held(tmp_path) == 0
    assert not wait_for_space()
