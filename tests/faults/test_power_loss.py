"""After a power cut, whatever the disk made of it, the run goes on from the last step that was reported saved."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from faults.recorded_runs import (
    RUNS,
    RecordedRun,
    branches,
    decisive,
    first_saves,
    only_the_last,
    pins_and_deletions,
    record,
    record_killed,
    replaced_steps,
)

from ckptmgr.committing import Committer
from ckptmgr.draft import Draft
from ckptmgr.pointer import Pointer
from ckptmgr.repository import Repository
from ckptmgr.run import Run
from ckptmgr.store import local, spares
from ckptmgr.store.disk import TempFile
from ckptmgr.store.local import LocalStore
from ckptmgr.testing import DiskState, PowerLoss, SystemCalls

if TYPE_CHECKING:
    from faults.conftest import Profile

Tally = Callable[[str, int], None]

WAYS: dict[str, dict[str, Any]] = {
    "rename": {},
    "manifest": {"commit": "manifest"},
    "background": {"background": True},
    "torch": {"format": "torch"},
    "dcp": {"format": "dcp"},
}


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """Where states are made: in memory, where there is such a place."""
    shm = Path("/dev/shm")
    return shm / f"ckptmgr-{os.getpid()}-{tmp_path.name}" if os.access(shm, os.W_OK) else tmp_path / "state"


def check(run: RecordedRun, scratch: Path, profile: Profile, tally: Tally, quick: int, full: int | None = None) -> None:
    how = {"subsets": 6, "most": full} if profile.is_full else {"subsets": 2, "most": quick}
    problems = list(run.losses(scratch, **how))
    assert [problem for problem in problems if problem] == []
    tally("states of the disk after a power cut", len(problems))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", RUNS)
@pytest.mark.parametrize("way", WAYS)
def test_no_power_cut_loses_a_reported_step(
    way: str, what: str, tmp_path: Path, scratch: Path, profile: Profile, tally: Tally
) -> None:
    check(
        record(tmp_path / "disk", RUNS[what], **WAYS[way]),
        scratch,
        profile,
        tally,
        quick=8,
        full=None if way in ("rename", "manifest") else 100,
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", [only_the_last, replaced_steps, pins_and_deletions, branches])
@pytest.mark.parametrize("way", ["rename", "manifest"])
def test_no_power_cut_after_a_kill_loses_a_reported_step(
    way: str, what: Callable[[RecordedRun], None], tmp_path: Path, scratch: Path, profile: Profile, tally: Tally
) -> None:
    """What the dead process left in the page cache, the next one must not take for durable."""
    whole = record(tmp_path / "whole", what, **WAYS[way])
    points = decisive(whole)
    if profile.is_full:
        points = sorted({*points, *range(3, len(whole.calls.log), 23)})
    for call in profile.sample(points, quick=2):
        run = record_killed(tmp_path / str(call), what, call, **WAYS[way])
        check(run, scratch, profile, tally, quick=8, full=30)


# Blocks that a save takes over from the checkpoint that went


@pytest.fixture
def small_spares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spares, "_SMALLEST", 1)


def taken_over(run: RecordedRun) -> int:
    """How many files were, with those of manifests."""
    return sum(call.name == "rename" and f"{spares.FOLDER}/" in call.path for call in run.calls.log)


@pytest.mark.usefixtures("small_spares")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("what", [first_saves, only_the_last, replaced_steps])
def test_no_power_cut_loses_a_reported_step_to_one_that_takes_over_blocks(
    what: Callable[[RecordedRun], None], tmp_path: Path, scratch: Path, profile: Profile, tally: Tally
) -> None:
    run = record(tmp_path / "disk", what)
    if not taken_over(run):
        pytest.skip("no file system here whose files are written over in place")
    check(run, scratch, profile, tally, quick=16)


@pytest.mark.usefixtures("small_spares")
@pytest.mark.timeout(600)
def test_no_power_cut_after_a_kill_loses_one_either(
    tmp_path: Path, scratch: Path, profile: Profile, tally: Tally
) -> None:
    whole = record(tmp_path / "whole", only_the_last)
    points = [place for place, call in enumerate(whole.calls.log, 1) if f"{spares.FOLDER}/" in call.path]
    for call in profile.sample(points, quick=3):
        check(record_killed(tmp_path / str(call), only_the_last, call), scratch, profile, tally, quick=8, full=30)


# Planted bugs: each of them the same check finds

Plant = Callable[[pytest.MonkeyPatch], object]


def no_fsync(patch: pytest.MonkeyPatch) -> None:
    init = LocalStore.__init__
    patch.setattr(LocalStore, "__init__", lambda self, path, fsync=True: init(self, path, False))


def no_fsync_of_files(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TempFile, "sync", lambda self: None)


def no_fsync_after_the_rename(patch: pytest.MonkeyPatch) -> None:
    """Nor a pointer, whose own fsync of the root would hide it."""

    def rename(self: LocalStore, source: str, target: str) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(LocalStore, "_sync", lambda self, folder: None)
            true_rename(self, source, target)

    true_rename = LocalStore.rename
    patch.setattr(LocalStore, "rename", rename)
    patch.setattr(Pointer, "move", lambda self, name: None)


def no_fsync_of_the_draft(patch: pytest.MonkeyPatch) -> None:
    def sync_folder(folder: str) -> None:
        if "drafts" not in Path(folder).parts[:-1]:
            true_sync(folder)

    true_sync = local.sync_folder
    patch.setattr(local, "sync_folder", sync_folder)


def no_fsync_of_new_folders(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("ckptmgr.lock.make_folders", lambda folder: folder.mkdir(parents=True, exist_ok=True))


def rename_before_fsync(patch: pytest.MonkeyPatch) -> None:
    def rename(self: LocalStore, source: str, target: str) -> None:
        true_rename(self, source, target)
        for path in sorted(Path(self.url, target).rglob("*")):
            if path.is_file():
                fd = os.open(path, os.O_RDWR)
                os.fsync(fd)
                os.close(fd)

    true_rename = LocalStore.rename
    patch.setattr(LocalStore, "rename", rename)
    patch.setattr(TempFile, "sync", lambda self: None)


def prune_before_commit(patch: pytest.MonkeyPatch) -> None:
    def commit(self: Committer, draft: Draft, *args: Any) -> Any:
        for info in self._run.known()[1:]:
            self._run.drop(info)
        return true_commit(self, draft, *args)

    true_commit = Committer.commit
    patch.setattr(Committer, "commit", commit)


def pointer_believed(patch: pytest.MonkeyPatch) -> None:
    """It is written before the commit, and whoever reads takes its word."""

    def commit(self: Committer, draft: Draft, *args: Any) -> Any:
        self._run.repository.pointer.move(draft.name)
        return true_commit(self, draft, *args)

    def newest_first(self: Run, listing: Any = None) -> Any:
        return (info for info in all_newest_first(self, listing) if info.name == self.repository.pointer.read())

    true_commit, all_newest_first = Committer.commit, Run.newest_first
    patch.setattr(Committer, "commit", commit)
    patch.setattr(Run, "newest_first", newest_first)


def data_before_the_manifest_goes(patch: pytest.MonkeyPatch) -> None:
    def drop(self: Repository, info: Any, may_go: Any = None) -> bool:
        self.store.delete([f"{info.name}/{file.name}" for file in info.manifest.files])
        self.store.delete([f"{info.name}/manifest.json"])
        return True

    patch.setattr(Repository, "drop", drop)


@pytest.mark.parametrize(
    ("plant", "way"),
    [
        (no_fsync, "rename"),
        (no_fsync, "manifest"),
        (no_fsync_of_files, "rename"),
        (no_fsync_of_files, "manifest"),
        (no_fsync_after_the_rename, "rename"),
        (no_fsync_of_the_draft, "rename"),
        (no_fsync_of_new_folders, "rename"),
        (rename_before_fsync, "rename"),
        (prune_before_commit, "rename"),
        (pointer_believed, "rename"),
        (data_before_the_manifest_goes, "manifest"),
    ],
)
def test_a_planted_bug_is_found(
    plant: Plant, way: str, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, tally: Tally
) -> None:
    plant(monkeypatch)
    run = record(tmp_path / "disk", first_saves, **WAYS[way])
    if plant is not pointer_believed:
        monkeypatch.undo()
    assert any(run.losses(scratch, in_any_order=True, subsets=0))
    tally("planted bugs found", 1)


# What people write instead


def save_and_replace(folder: Path, step: int, *, fsync: bool) -> None:
    """`torch.save` to another name and `os.replace`."""
    buffer = io.BytesIO()
    torch.save({"step": step, "x": torch.ones(2000) * step}, buffer)
    temp = folder / "checkpoint.pt.tmp"
    fd = os.open(temp, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.write(fd, buffer.getbuffer())
    if fsync:
        os.fsync(fd)
    os.close(fd)
    temp.replace(folder / "checkpoint.pt")


def usual_losses(folder: Path, *, fsync: bool) -> tuple[int, int]:
    """In how many states of how many the last reported step is lost."""
    folder.mkdir()
    reported = []
    with SystemCalls(folder, keep_data=True) as calls:
        for step in (1, 2, 3):
            save_and_replace(folder, step, fsync=fsync)
            reported.append(len(calls.log))
    states = list(PowerLoss(calls.log).states(promises=reported))
    return sum(_loaded(state) < sum(at <= state.calls for at in reported) for state in states), len(states)


def _loaded(state: DiskState) -> int:
    try:
        return int(torch.load(io.BytesIO(state.files["checkpoint.pt"]))["step"])
    except Exception:  # noqa: BLE001 - torch has many words for a torn file
        return 0


@pytest.mark.parametrize(("fsync", "least"), [(False, 0.5), (True, 0.1)])
def test_the_usual_recipe_does_not_survive(fsync: bool, least: float, tmp_path: Path) -> None:
    lost, states = usual_losses(tmp_path / "disk", fsync=fsync)
    assert lost > least * states
