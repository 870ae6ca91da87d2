"""A manager that dies at any call to the store loses no committed step, and the next one goes on bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from ckptmgr import CheckpointManager
from ckptmgr.store import Store
from ckptmgr.store.local import LocalStore
from ckptmgr.testing import Crash, CrashingStore, MemoryStore

STEPS = 5


def value(step: int) -> torch.Tensor:
    return torch.arange(5.0) * step


def open_manager(store: Store, **overrides: Any) -> CheckpointManager:
    settings: dict[str, Any] = {
        "background": False, "run": "crash", "save": {"every_steps": 1}, "keep": {"last": 2, "every_steps": 3},
        "lease_ttl": "1h",
    }  # fmt: skip
    return CheckpointManager("root", store=store, **{**settings, **overrides})


def train(store: Store, committed: list[int]) -> None:
    mgr = open_manager(store)
    try:
        start = mgr.resume()
        for step in range(start.step + 1, STEPS + 1):
            pending = mgr.maybe_save({"x": value(step), "n": step}, step)
            assert pending is not None
            committed.append(step)
        committed.append(-1)  # from here on the last step may be gone
        mgr.rewind(STEPS - 1)
        mgr.maybe_save({"x": value(STEPS), "n": STEPS}, STEPS)
    finally:
        # What the kernel does for a dead process: its lock is free, its thread gone. A crash has no other cleanup.
        lock = mgr._run._lock
        if lock is not None and hasattr(lock, "forget"):
            lock.forget()
        elif lock is not None:
            lock._stop.set()  # type: ignore[attr-defined]
        mgr._signals.uninstall()


def fresh_store(kind: str, root: Path) -> Store:
    return LocalStore(root, fsync=False) if kind == "local" else MemoryStore(can_rename=kind == "rename")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["local", "rename", "manifest"])
def test_a_crash_at_every_store_call(kind: str, when: Literal["before", "after"], tmp_path: Path) -> None:
    counting = CrashingStore(fresh_store(kind, tmp_path / "count"))
    train(counting, [])
    for point in range(1, counting.count + 1):
        store = fresh_store(kind, tmp_path / str(point))
        committed: list[int] = []
        with pytest.raises(Crash):
            train(CrashingStore(store, point, when), committed)
        with open_manager(store, takeover=True) as mgr:
            start = mgr.resume()
            newest = STEPS - 1 if -1 in committed else max(committed, default=0)
            assert start.step >= newest
            assert start.skipped == ()
            if start:
                assert start.values["n"] == start.step
                assert torch.equal(start.values["x"], value(start.step))
            for step in mgr.all_steps():
                assert torch.equal(mgr.load(step)["x"], value(step))
            mgr.save({"x": value(100), "n": 100}, 100)
            assert mgr.latest_step() == 100
        folders = {entry.key.split("/")[0] for entry in store.list(recursive=True) if entry.key.startswith("step-")}
        repository = mgr._run.repository
        expected = {info.name for info in repository.infos()} | {aside.name for aside in repository.archived()}
        assert folders == expected
        left = {entry.key.split("/")[1] for entry in store.list(".ckptmgr", recursive=True)}
        assert left <= {"lock", "lease", "archive"}
