"""A process that dies at any call to the store loses nothing that was committed, and leaves no litter for good."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import pytest

from ckptmgr.manifest import Manifest
from ckptmgr.repository import Repository
from ckptmgr.retention import Last, plan
from ckptmgr.store import Store
from ckptmgr.store.local import LocalStore
from ckptmgr.testing import Crash, CrashingStore, MemoryStore

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def save(repository: Repository, step: int, attempt: int = 1, *, pin: bool = False) -> None:
    draft = repository.begin(step, None, "run")
    for name in ("model.bin", "optimizer.bin"):
        with draft.create(name) as file:
            file.write(b"%s of %d" % (name.encode(), step))
    about = Manifest(step=step, run="run", attempt=attempt, nonce="", time=NOW, format="raw", files=())
    info = draft.commit(about, pin=pin)
    repository.pointer.move(info.name)


def scenario(repository: Repository, committed: Callable[[int], None]) -> None:
    """Saves with rotation, a replaced step, a deletion, a rewind, and a save on the new branch."""
    for step in (1, 2, 3, 4):
        save(repository, step)
        committed(step)
        for verdict in plan(repository.infos(), (Last(3),), now=NOW).drop:
            repository.drop(verdict.info)
    save(repository, 4, attempt=2)
    committed(4)
    repository.drop(repository.find("step-00000004"))
    repository.pin(repository.find(3), "paper")
    repository.mark_damaged(repository.find(2), "for the test")
    repository.pin(repository.find(4), "gone-with-it")
    committed(3)  # from here on 4 may be gone
    repository.archive(repository.find(4))
    save(repository, 4, attempt=3)
    committed(4)
    for aside in repository.archived():
        repository.drop_archived(aside)
    save(repository, 5, attempt=3, pin=True)
    committed(5)


def fresh_store(kind: str, root: Path) -> Store:
    if kind == "local":
        return LocalStore(root, fsync=False)
    return MemoryStore(can_rename=kind == "rename")


def check(store: Store, newest: int | None) -> None:
    """What must hold when the next process opens the root."""
    repository = Repository(store)
    repository.sweep()
    infos = repository.infos()
    for info in infos:
        assert repository.verify(info) == []
        assert repository.open(info).read("model.bin") == b"model.bin of %d" % info.step
    if newest is not None:
        assert infos
        assert infos[0].step >= newest
        assert info.step != 5 or info.pins
    held = [pin for info in infos for pin in info.pins]
    assert len(store.list(".ckptmgr/pins")) == len(held)
    expected = {f"{info.name}/manifest.json" for info in infos}
    for info in [*infos, *repository.archived()]:
        assert info.manifest is not None
        expected |= {f"{info.name}/{file.name}" for file in info.manifest.files}
    data = {entry.key for entry in store.list(recursive=True) if not entry.key.startswith(".ckptmgr")}
    assert data - {"latest"} == expected
    left = {entry.key.split("/")[1] for entry in store.list(".ckptmgr", recursive=True)}
    assert left <= {"pins", "damaged", "archive"}
    save(repository, 100, attempt=9)
    assert repository.infos()[0].step == 100
    assert repository.pointer.read() == repository.infos()[0].name


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["rename", "manifest", "local"])
def test_a_crash_at_every_store_call_loses_nothing_committed(
    kind: str, when: Literal["before", "after"], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    counting = CrashingStore(fresh_store(kind, tmp_path / "count"))
    scenario(Repository(counting), lambda step: None)
    assert counting.count > 50
    for point in range(1, counting.count + 1):
        store = fresh_store(kind, tmp_path / str(point))
        newest: list[int] = []
        with pytest.raises(Crash):
            scenario(Repository(CrashingStore(store, point, when)), newest.append)
        check(store, newest[-1] if newest else None)
    record_property("crash_points", counting.count)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["rename", "manifest"])
def test_a_crash_while_sweeping_after_a_crash_loses_nothing_either(
    kind: str, when: Literal["before", "after"], tmp_path: Path
) -> None:
    counting = CrashingStore(fresh_store(kind, tmp_path / "count"))
    scenario(Repository(counting), lambda step: None)
    for point in range(1, counting.count + 1):
        second = 0
        while True:
            second += 1
            store = fresh_store(kind, tmp_path / f"{point}-{second}")
            newest: list[int] = []
            with pytest.raises(Crash):
                scenario(Repository(CrashingStore(store, point, when)), newest.append)
            sweeping = CrashingStore(store, second, when)
            try:
                Repository(sweeping).sweep()
            except Crash:
                check(store, newest[-1] if newest else None)
            else:
                break
