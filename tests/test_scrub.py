"""With `verify.scrub` checkpoints that nobody loads are read back in turn, and training never waits for it."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from ckptmgr import CheckpointManager, StoreError
from ckptmgr.cli import main
from ckptmgr.manifest import CheckpointInfo
from ckptmgr.records import Records
from ckptmgr.repository import Repository
from ckptmgr.scrub import Scrubber
from ckptmgr.store import Reader
from ckptmgr.store.local import LocalStore
from ckptmgr.testing import MemoryStore

VERIFIED = ".ckptmgr/verified.json"


def state(step: int) -> dict[str, Any]:
    return {"model": {"weight": torch.full((64,), float(step))}, "count": step}


def scrubbed() -> None:
    """Wait for what was begun to be read back."""
    for thread in threading.enumerate():
        if thread.name == "ckptmgr-scrub":
            thread.join()


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.now += timedelta(hours=1)
        return self.now


class GatedStore(MemoryStore):
    """Waits before it reads from a file once the gate is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.asked = threading.Event(), threading.Event()
        self.gate.set()
        self.read: list[str] = []

    def reader(self, key: str, *, by_many: bool = False) -> Reader:
        self.asked.set()
        self.gate.wait()
        self.read.append(key)
        return super().reader(key, by_many=by_many)


@pytest.fixture
def store() -> GatedStore:
    return GatedStore()


def opened(store: MemoryStore | None, root: Path | str = "root", **settings: Any) -> CheckpointManager:
    settings = {"keep": {"last": 5}, "verify": {"scrub": True}, "save": {"on_signals": []}, **settings}
    return CheckpointManager(str(root), store=store, **settings)


def saved(store: MemoryStore, count: int) -> list[CheckpointInfo]:
    """Checkpoints of the steps 1 to `count`, newest first."""
    with opened(store, verify={}) as mgr:
        for step in range(1, count + 1):
            mgr.save(state(step), step)
    return Repository(store).infos()


def damage(store: MemoryStore, name: str) -> None:
    key = f"{name}/model.safetensors"
    data, modified = store.objects[key]
    store.objects[key] = (data[:-1] + b"?", modified)


def verified(store: MemoryStore) -> list[str]:
    """The folders that were read back, the one first that was last."""
    times = Records(store).verified()
    return [name for name, _ in sorted(times, key=lambda key: times[key], reverse=True)]


def test_each_save_has_an_older_one_read_back_the_one_verified_longest_ago(store: GatedStore) -> None:
    with opened(store) as mgr:
        for step in range(1, 6):
            mgr.save(state(step), step)
            mgr.wait()
            scrubbed()
            if step == 4:
                assert verified(store) == ["step-00000003", "step-00000002", "step-00000001"]
    assert verified(store) == ["step-00000004", "step-00000003", "step-00000002", "step-00000001"]
    with opened(store) as mgr:
        mgr.resume()
        mgr.save(state(6), 6)  # 1 goes
        mgr.wait()
        scrubbed()
        assert verified(store) == ["step-00000005", "step-00000004", "step-00000003", "step-00000002"]
        mgr.save(state(7), 7)
        mgr.wait()
        scrubbed()
    assert verified(store) == ["step-00000006", "step-00000005", "step-00000004", "step-00000003"]


def test_when_all_were_read_back_the_first_has_its_turn_again(store: GatedStore) -> None:
    infos = saved(store, 3)
    scrubber = Scrubber(Repository(store), Clock())
    turns = []
    for _ in range(5):
        scrubber.start(infos)
        scrubber.wait()
        turns.append(verified(store)[0])
    assert [int(turn[-1]) for turn in turns] == [1, 2, 3, 1, 2]


def test_nothing_is_read_back_unless_it_is_asked_for(store: GatedStore) -> None:
    saved(store, 3)
    assert (store.read, VERIFIED in store.objects) == ([], False)


def test_damage_is_marked_with_a_warning_that_names_the_file_and_does_not_count_for_keep(
    store: GatedStore, caplog: pytest.LogCaptureFixture
) -> None:
    with opened(store, keep={"last": 2}) as mgr:
        mgr.save(state(1), 1)
        mgr.save(state(2), 2)
        mgr.wait()
        scrubbed()
        damage(store, "step-00000002")
        mgr.save(state(3), 3)
        mgr.wait()
        scrubbed()
        assert [line for line in caplog.messages if "scrub.damaged" in line and "model.safetensors" in line] != []
        assert mgr.all_steps() == [3]
        mgr.save(state(4), 4)
        mgr.wait()
        scrubbed()
        assert mgr.all_steps() == [3, 4]
        assert mgr.info(4).damaged is None
    infos = {info.step: info.damaged for info in Repository(store).infos()}
    assert "step-00000002" not in [info.name for info in Repository(store).infos()] or infos[2] is not None


def test_the_last_good_one_stays_when_a_newer_one_turns_out_to_be_damaged(store: GatedStore) -> None:
    """What was verified last is not what is damaged first: 2 is, which is newer than 1."""
    with opened(store, keep={"last": 2}) as mgr:
        for step in (1, 2):
            mgr.save(state(step), step)
        mgr.wait()
        scrubbed()
        damage(store, "step-00000002")
        Scrubber(Repository(store))._read_one([mgr.info(2)])
        mgr.save(state(3), 3)
        mgr.wait()
        assert mgr.all_steps() == [1, 3]


def test_what_shares_a_file_with_a_damaged_one_is_read_next(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, fsync=False)
    weights = torch.randn(1 << 19)
    with opened(None, tmp_path, verify={}, fsync=False) as mgr:
        for step in (1, 2, 3, 4):  # of which 3 and 4 share a file
            mgr.save({"moving": torch.ones(2) * step, "frozen": weights + min(step, 3)}, step)
            mgr.wait()
    infos, clock = Repository(store).infos(), Clock()
    scrubber = Scrubber(Repository(store), clock)
    for _ in range(4):
        scrubber.start(infos)
        scrubber.wait()
    shared = next(file for file in (tmp_path / "step-00000003").rglob("*.safetensors") if file.stat().st_nlink == 2)
    with shared.open("r+b") as file:
        file.seek(5000)
        file.write(b"damage")
    marked = []
    for _ in range(4):
        scrubber.start(Repository(store).infos())
        scrubber.wait()
        marked.append(sorted(info.step for info in Repository(store).infos() if info.damaged is not None))
    assert marked == [[], [], [3], [3, 4]]
    times = Records(store).verified()
    assert sorted(name for name, _ in times) == ["step-00000001", "step-00000002"]


def test_a_save_that_is_due_does_not_wait_for_what_is_being_read_back(store: GatedStore) -> None:
    """The call returns while the store still keeps the reading waiting; what was read so far is not read again."""
    saved(store, 2)
    with opened(store, when_busy="skip", share_unchanged=False) as mgr:
        mgr.resume()
        store.read.clear()
        store.asked.clear()
        store.gate.clear()
        mgr.save(state(3), 3)
        mgr.wait()
        assert store.asked.wait(60)
        assert not mgr._worker.is_busy
        pending = mgr.save(state(4), 4)  # returns although the reading has not
        assert not pending.done()
        store.gate.set()
        pending.wait()
        scrubbed()
    assert [key for key in store.read if store.read.count(key) > 1] == []
    assert verified(store) == ["step-00000001"]


@pytest.mark.parametrize("call", ["close", "delete", "resume", "prune"])
def test_what_needs_the_root_to_itself_stops_it_first(store: GatedStore, call: str) -> None:
    saved(store, 2)
    mgr = opened(store)
    mgr.resume()
    store.asked.clear()
    store.gate.clear()
    mgr.save(state(3), 3)
    mgr.wait()
    assert store.asked.wait(60)
    threading.Timer(0, store.gate.set).start()
    if call == "delete":
        mgr.delete(1)
    else:
        getattr(mgr, call)()
    assert [thread.name for thread in threading.enumerate() if thread.name == "ckptmgr-scrub"] == []
    assert list(Records(store).damaged()) == []
    mgr.close()


def test_a_store_that_fails_says_nothing_of_a_checkpoint(store: GatedStore, caplog: pytest.LogCaptureFixture) -> None:
    infos = saved(store, 2)

    class Failing(GatedStore):
        def reader(self, key: str, *, by_many: bool = False) -> Reader:
            if key.startswith("step-00000001"):
                raise StoreError("the network is down")
            return super().reader(key, by_many=by_many)

    broken = Failing()
    broken.objects = store.objects
    scrubber = Scrubber(Repository(broken), Clock())
    for _ in range(2):
        scrubber.start(infos)
        scrubber.wait()
    assert [line for line in caplog.messages if "scrub.failed" in line and "network is down" in line] != []
    assert list(Records(store).damaged()) == []
    assert verified(store) == ["step-00000002"]  # the others have their turn


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_not_damaged(store: GatedStore) -> None:
    infos = saved(store, 2)
    Repository(store).drop(infos[1])
    scrubber = Scrubber(Repository(store))
    scrubber.start(infos[1:])
    scrubber.wait()
    assert list(Records(store).damaged()) == []


@pytest.mark.parametrize("record", [b"", b"null", b"[1]", b'{"x": 1}', b'{"x.y": "no date"}', b"\xff", b"[" * 99999])
def test_a_record_of_what_was_verified_that_can_not_be_read_is_as_none(store: GatedStore, record: bytes) -> None:
    infos = saved(store, 2)
    store.put(VERIFIED, record)
    scrubber = Scrubber(Repository(store))
    scrubber.start(infos)
    scrubber.wait()
    assert verified(store) == ["step-00000001"]


def test_the_command_line_says_when_a_checkpoint_was_last_verified(tmp_path: Path) -> None:
    def told(*arguments: str) -> str:
        result = CliRunner().invoke(main, [arguments[0], str(tmp_path), *arguments[1:]])
        assert result.exit_code == 0, result.output
        return result.output

    with opened(None, tmp_path, fsync=False) as mgr:
        mgr.save(state(1), 1)
        mgr.wait()
        assert "verified" not in told("ls") + told("show", "1")
        assert json.loads(told("show", "1", "--json"))["verified"] is None
        mgr.save(state(2), 2)
        mgr.wait()
        scrubbed()
    assert "verified" in told("ls").splitlines()[0]
    assert [line for line in told("show", "1").splitlines() if line.startswith("verified ")] != []
    assert [bool(one["verified"]) for one in json.loads(told("ls", "--json"))["checkpoints"]] == [False, True]
    when = datetime.fromisoformat(json.loads(told("show", "1", "--json"))["verified"])
    assert when.tzinfo is not None


@pytest.fixture(autouse=True)
def _nothing_is_left_running(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.WARNING, "ckptmgr")
    yield
    scrubbed()
