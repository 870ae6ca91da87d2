"""Unchanged bytes are not written twice, and never taken from a file that is not sound."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from torch import nn

from ckptmgr import CheckpointManager
from ckptmgr.errors import StoreError
from ckptmgr.formats.state_file import Whole
from ckptmgr.manifest import CheckpointInfo, Manifest
from ckptmgr.repository import Repository
from ckptmgr.sharing import Sharing
from ckptmgr.store import Reader, Store, open_store
from ckptmgr.testing import MemoryStore

MIB = 1 << 20
FROZEN = os.urandom(2 * MIB)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Saves:
    """Saves of two files, one after the other, with what was found damaged on the way."""

    def __init__(self, store: Store) -> None:
        self.store, self.clock = store, Clock()
        self.repository = Repository(store)
        self.damaged: list[str] = []
        self.sharing = self.fresh()

    def fresh(self) -> Sharing:
        """As in a new process."""
        self.sharing = Sharing(self.store, lambda info, _: self.damaged.append(info.name), self.clock)
        return self.sharing

    def save(self, step: int, frozen: bytes = FROZEN) -> CheckpointInfo:
        draft = self.repository.begin(step, None, "run")
        bodies = {"frozen.bin": Whole(frozen), "moving.bin": Whole(os.urandom(MIB))}
        self.sharing.sink(draft, lambda: self.repository.records()[1]).write(bodies)
        now = datetime.now(UTC)
        about = Manifest(step=step, run="run", attempt=1, nonce="", time=now, format="safetensors", files=())
        info = draft.commit(about)
        self.sharing.offer(info)
        return info


def shared(info: CheckpointInfo) -> list[str]:
    assert info.manifest is not None
    return [file.name.rsplit("/", 1)[-1] for file in info.manifest.files if file.shared]


@pytest.fixture(params=["disk", "memory"])
def saves(request: pytest.FixtureRequest, tmp_path: Path) -> Saves:
    return Saves(open_store(tmp_path) if request.param == "disk" else MemoryStore())


def test_an_unchanged_file_is_shared_from_the_second_save_on(saves: Saves) -> None:
    """Each checkpoint is complete by itself: all verify in full, also when the one before is deleted."""
    infos = [saves.save(step) for step in (1, 2, 3)]
    assert [shared(info) for info in infos] == [[], ["frozen.bin"], ["frozen.bin"]]
    assert [info.manifest.written < 2 * MIB for info in infos if info.manifest] == [False, True, True]
    saves.repository.drop(infos[0])
    saves.repository.drop(infos[1])
    assert saves.repository.verify(infos[2]) == []


def test_on_a_disk_it_is_the_same_file_and_bytes_are_there_once(tmp_path: Path) -> None:
    saves = Saves(open_store(tmp_path))
    infos = [saves.save(step) for step in (1, 2)]
    assert len({(tmp_path / info.name / "frozen.bin").stat().st_ino for info in infos}) == 1
    assert len({(tmp_path / info.name / "moving.bin").stat().st_ino for info in infos}) == 2


@pytest.mark.parametrize("at", [0, MIB + 12345, 2 * MIB - 1])
def test_one_changed_byte_anywhere_has_the_file_written(saves: Saves, at: int) -> None:
    saves.save(1)
    changed = bytearray(FROZEN)
    changed[at] ^= 1
    assert shared(saves.save(2, bytes(changed))) == []
    assert shared(saves.save(3, bytes(changed))) == ["frozen.bin"]


def test_after_a_restart_a_file_is_read_before_it_is_shared(tmp_path: Path) -> None:
    """Sound ones are shared; one that rotted meanwhile is found, told of, and written anew."""
    saves = Saves(open_store(tmp_path))
    info = saves.save(1)
    saves.fresh().found(info)
    info = saves.save(2)
    assert shared(info) == ["frozen.bin"]
    rot(tmp_path / info.name / "frozen.bin")
    saves.fresh().found(info)
    newest = saves.save(3)
    assert shared(newest) == []
    assert saves.damaged == [info.name]
    assert saves.repository.verify(newest) == []


def test_a_file_that_was_not_looked_at_for_an_hour_is_read_before_it_is_shared(tmp_path: Path) -> None:
    saves = Saves(open_store(tmp_path))
    info = saves.save(1)
    saves.clock.now += 3000
    info = saves.save(2)
    assert shared(info) == ["frozen.bin"]
    rot(tmp_path / info.name / "frozen.bin")
    saves.clock.now += 3000
    assert shared(saves.save(3)) == []


def test_nothing_is_shared_with_a_checkpoint_that_is_marked_as_damaged(saves: Saves) -> None:
    """Whoever found it so, and however short a time ago its file was written."""
    saves.repository.mark_damaged(saves.save(1), "rotten")
    assert shared(saves.save(2)) == []
    assert shared(saves.save(3)) == ["frozen.bin"]


def test_what_a_save_that_failed_looked_at_says_nothing_of_what_is_found_later(tmp_path: Path) -> None:
    saves = Saves(open_store(tmp_path))
    info = saves.save(1)
    draft = saves.repository.begin(2, None, "run")
    saves.sharing.sink(draft).write({"frozen.bin": Whole(FROZEN)})
    draft.abort()
    rot(tmp_path / info.name / "frozen.bin")
    saves.sharing.found(info)
    assert shared(saves.save(3)) == []


def test_trouble_in_reading_the_old_file_does_not_fail_the_new_save(tmp_path: Path) -> None:
    class Failing(MemoryStore):
        fails = False

        def reader(self, key: str, *, by_many: bool = False) -> Reader:
            if self.fails:
                raise StoreError("the network is down", 5)
            return super().reader(key, by_many=by_many)

    store = Failing()
    saves = Saves(store)
    saves.fresh().found(saves.save(1))
    store.fails = True
    info = saves.save(2)
    store.fails = False
    assert (shared(info), saves.repository.verify(info)) == ([], [])


def test_a_file_that_was_deleted_meanwhile_is_written(saves: Saves) -> None:
    saves.repository.drop(saves.save(1))
    info = saves.save(2)
    assert (shared(info), saves.repository.verify(info)) == ([], [])


def test_a_store_that_can_not_share_is_asked_once(tmp_path: Path) -> None:
    class NoLinks(MemoryStore):
        asked = 0

        def copy(self, source: str, target: str) -> bool:
            self.asked += 1
            return False

    store = NoLinks()
    saves = Saves(store)
    assert [shared(saves.save(step)) for step in (1, 2, 3)] == [[], [], []]
    assert store.asked == 1


def rot(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(1000)
        file.write(b"rotten")


def fine_tuned() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model of which 90 % is frozen."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(10)))
    model[:9].requires_grad_(False)  # type: ignore[index]
    return model, torch.optim.SGD(model[9].parameters(), lr=0.1)


def test_of_a_mostly_frozen_model_only_the_rest_is_written_again(tmp_path: Path) -> None:
    """At most 11 % of the bytes, and what is resumed from is the whole model."""
    model, optimizer = fine_tuned()
    with CheckpointManager(tmp_path, keep={"last": None}) as mgr:
        for step in (1, 2):
            with torch.no_grad():
                model[9].weight.add_(1)  # type: ignore[union-attr, operator]
            mgr.save({"model": model, "optimizer": optimizer}, step).wait()
        manifests = [mgr.info(step).manifest for step in (1, 2)]
    assert [round(m.written / m.size, 2) <= 0.11 for m in manifests if m] == [False, True]
    again, its_optimizer = fine_tuned()
    with CheckpointManager(tmp_path) as mgr:
        assert mgr.resume(again, its_optimizer).step == 2
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


def test_sharing_can_be_switched_off(tmp_path: Path) -> None:
    model, optimizer = fine_tuned()
    with CheckpointManager(tmp_path, share_unchanged=False) as mgr:
        for step in (1, 2):
            mgr.save({"model": model, "optimizer": optimizer}, step).wait()
        assert shared(mgr.info(2)) == []
