"""A save without room fails with its numbers, makes room, or is left out, as `on_full` says; nothing else is lost."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks, values
from small_disk import BLOCK, SmallDisk
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ckptmgr import CheckpointManager, SaveFailedError, StoreError, StoreFullError
from ckptmgr.coordinator.outcome import Failure
from ckptmgr.manifest import CheckpointInfo, FileEntry, Manifest
from ckptmgr.pins import pin_key
from ckptmgr.room import freed
from ckptmgr.store.local import LocalStore
from ckptmgr.store.space import space_left
from ckptmgr.testing import Call, SystemCalls

SIZE = 100 * BLOCK  # of the tensor in a state
ONE = SIZE + 12 * BLOCK  # more than what a checkpoint and the records beside it take up


def state(step: int) -> dict[str, Any]:
    return {"w": torch.full((SIZE // 4,), float(step)), "seen": step}


def manager(root: Path, **more: Any) -> CheckpointManager:
    return CheckpointManager(str(root), **{"background": False, "keep": {"last": None}, "run": "r", **more})


@contextmanager
def filled(
    root: Path, steps: int, room: int, *, quota: bool = False, set_aside: int = 0, **more: Any
) -> Iterator[tuple[Any, SmallDisk]]:
    """A manager of a root that holds so many steps, on a disk that has room for so many bytes more."""
    with manager(root, **more) as mgr:
        for step in range(1, steps + 1):
            mgr.save(state(step), step).wait()
        disk = SmallDisk(root, 0, quota=quota, set_aside=set_aside)
        disk.capacity = disk.used + room
        with disk:
            yield mgr, disk


def loaded(root: Path) -> dict[int, float]:
    """The steps in a root, each with what its tensor holds."""
    reader = manager(root, read_only=True)
    return {step: reader.load(step)["w"].mean().item() for step in reader.all_steps()}


def exactly(*steps: int) -> dict[int, float]:
    return {step: float(step) for step in steps}


def drafts(root: Path) -> list[Path]:
    return list((root / ".ckptmgr" / "drafts").glob("*"))


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("format_name", ["safetensors", "torch", "dcp"])
def test_a_save_that_does_not_fit_is_refused_with_its_numbers_before_the_first_byte(
    format_name: str, background: bool, tmp_path: Path
) -> None:
    with filled(tmp_path, 2, SIZE // 2, background=background, format=format_name) as (mgr, disk):
        free = disk.free
        with pytest.raises(SaveFailedError) as caught:
            mgr.save(state(3), 3).wait()
        made = [
            call for call in disk.calls.log if call.name in ("create", "write", "mkdir") and ".tmp" not in call.path
        ]
        assert made == []
        cause = caught.value.__cause__
        assert isinstance(cause, StoreFullError)
        assert (cause.errno, cause.free) == (errno.ENOSPC, free)
        assert cause.needed is not None
        assert SIZE <= cause.needed < SIZE + 10 * BLOCK
        for words in ("step 3", f"{tmp_path}", f"{cause.needed:,} bytes needed", f"{free:,} bytes free", "on_full"):
            assert words in str(caught.value)
        assert "checkpoints before it are untouched" in str(caught.value)
        assert drafts(tmp_path) == []
        assert loaded(tmp_path) == exactly(1, 2)
        disk.capacity += ONE
        mgr.save(state(3), 3).wait()
    assert loaded(tmp_path) == exactly(1, 2, 3)


def test_the_look_at_the_disk_is_one_statvfs(tmp_path: Path) -> None:
    with filled(tmp_path, 1, 2 * ONE) as (mgr, disk):
        mgr.save(state(2), 2)
        assert disk.asked == 1


def test_a_save_fits_to_the_block(tmp_path: Path) -> None:
    """What is refused by one block fits with it."""
    with filled(tmp_path, 1, SIZE // 2) as (mgr, disk):
        with pytest.raises(SaveFailedError) as caught:
            mgr.save(state(2), 2)
        cause = caught.value.__cause__
        assert isinstance(cause, StoreFullError)
        assert cause.needed is not None
        assert cause.needed % BLOCK == 0
        disk.capacity = disk.used + cause.needed - BLOCK
        with pytest.raises(SaveFailedError):
            mgr.save(state(2), 2)
        disk.capacity = disk.used + cause.needed + 2 * BLOCK  # the manifest and the pointer
        mgr.save(state(2), 2)


def test_what_lies_in_the_checkpoint_before_needs_no_room(tmp_path: Path) -> None:
    """A frozen base of more than all that is free is linked."""
    base = torch.nn.Parameter(torch.ones(1 << 19), requires_grad=False)

    def both(step: int) -> dict[str, Any]:
        return {"base": torch.nn.ParameterDict({"w": base}), "w": torch.full((8,), float(step))}

    with manager(tmp_path) as mgr:
        mgr.save(both(1), 1)
        disk = SmallDisk(tmp_path, 0)
        disk.capacity = disk.used + 12 * BLOCK
        with disk:
            mgr.save(both(2), 2)
    assert loaded(tmp_path) == exactly(1, 2)


def test_where_nobody_knows_what_is_free_the_write_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with manager(tmp_path) as mgr:
        monkeypatch.delattr(os, "statvfs")
        mgr.save(state(1), 1)
    assert loaded(tmp_path) == exactly(1)
    assert space_left(tmp_path) is None


def test_a_file_system_that_counts_nothing_is_not_taken_for_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs

    def nothing(path: Any) -> Any:
        return type(real(path))((BLOCK, BLOCK, 0, 0, 0, 0, 0, 0, 0, 255))

    monkeypatch.setattr(os, "statvfs", nothing)
    with manager(tmp_path) as mgr:
        mgr.save(state(1), 1)
    assert loaded(tmp_path) == exactly(1)


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("quota", [False, True])
def test_prune_deletes_the_oldest_until_the_save_fits_and_names_each(
    background: bool, quota: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where a quota shows only in the middle of the write, the draft goes first, and the save is made once more."""
    with filled(tmp_path, 4, SIZE // 2, quota=quota, background=background, on_full="prune") as (mgr, disk):
        mgr.pin(1)
        before = [path.name for path in tmp_path.iterdir()]
        with caplog.at_level(logging.WARNING, "ckptmgr"):
            mgr.save(state(5), 5).wait()
        told = [one.getMessage() for one in caplog.records if "save.full.drop" in one.getMessage()]
        assert "step-00000002" in before
        assert [one.split()[1] for one in told] == ["step=2"]
        assert all(word in told[0] for word in ("on_full: prune", "bytes needed", "step-00000002"))
        assert disk.used <= disk.capacity
        assert drafts(tmp_path) == []
    assert loaded(tmp_path) == exactly(1, 3, 4, 5)


def test_prune_goes_on_until_it_fits(tmp_path: Path) -> None:
    with filled(tmp_path, 4, 0, on_full="prune", keep={"last": None, "min_good": 1}) as (mgr, _):
        mgr.save({"w": torch.full((2 * SIZE // 4,), 5.0), "seen": 5}, 5)
    assert loaded(tmp_path) == exactly(3, 4, 5)


@pytest.mark.parametrize("keep", [{"last": None, "min_good": 2}, {"last": None}])
def test_prune_never_goes_below_min_good_nor_for_nothing(keep: dict[str, Any], tmp_path: Path) -> None:
    """When all that may go would not be enough, nothing goes, and the error says so."""
    large = {"w": torch.ones(4 * SIZE // 4), "seen": 9}
    with filled(tmp_path, 3, BLOCK, on_full="prune", keep=keep) as (mgr, _):
        with pytest.raises(SaveFailedError, match=r"on_full: prune has deleted nothing: .*keep\.min_good") as caught:
            mgr.save(large, 9)
        assert isinstance(caught.value.__cause__, StoreFullError)
        assert (caught.value.__cause__.needed or 0) > 4 * SIZE
        assert loaded(tmp_path) == exactly(1, 2, 3)
        assert drafts(tmp_path) == []


def test_prune_that_was_not_enough_says_what_it_deleted(tmp_path: Path) -> None:
    with filled(tmp_path, 3, SIZE // 2, on_full="prune", quota=True) as (mgr, disk):
        disk.capacity -= 3 * SIZE  # somebody else fills the disk, too
        with pytest.raises(
            SaveFailedError, match=r"quota is used up.*on_full: prune has deleted step 1, 2, which was not"
        ):
            mgr.save(state(4), 4)
        assert loaded(tmp_path) == exactly(3)
        disk.capacity += 4 * ONE
        mgr.save(state(5), 5)
    assert loaded(tmp_path) == exactly(3, 5)


def test_prune_goes_on_when_what_it_deleted_was_not_enough(tmp_path: Path) -> None:
    """What a quota leaves nobody tells: after each failure one more goes."""
    with filled(tmp_path, 4, SIZE // 2, on_full="prune", quota=True) as (mgr, disk):
        disk.capacity -= SIZE
        mgr.save(state(5), 5)
    assert loaded(tmp_path) == exactly(3, 4, 5)


@pytest.mark.parametrize("commit", ["rename", "manifest"])
def test_prune_frees_something_where_a_full_disk_says_that_there_is_room(commit: str, tmp_path: Path) -> None:
    """ext4 counts blocks as free that not even root is given."""
    with filled(tmp_path, 3, SIZE // 2, on_full="prune", set_aside=1 << 24, commit=commit) as (mgr, _):
        mgr.save(state(4), 4)
    assert loaded(tmp_path) == exactly(2, 3, 4)


def test_prune_deletes_nothing_where_there_is_room_by_the_time_it_looks(tmp_path: Path) -> None:
    failed = []

    def once(call: Call) -> None:
        if call.name == "allocate" and not failed:
            failed.append(call)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with manager(tmp_path, on_full="prune") as mgr:
        mgr.save(state(1), 1)
        mgr.save(state(2), 2)
        with SystemCalls(tmp_path, once):
            mgr.save({"w": torch.full((1 << 19,), 3.0)}, 3)
    assert len(failed) == 1
    assert loaded(tmp_path) == exactly(1, 2, 3)


@pytest.mark.parametrize("refused", ["mkdir", "create", "write"])
@pytest.mark.parametrize("commit", ["rename", "manifest"])
def test_prune_frees_something_where_the_first_thing_to_fail_has_no_size(
    commit: str, refused: str, tmp_path: Path
) -> None:
    """The first save of a process: what it tries the file system with, its folder, its record."""
    with manager(tmp_path, commit=commit) as mgr:
        for step in (1, 2, 3):
            mgr.save(state(step), step)

    def no_room(call: Call) -> None:
        is_exempt = call.path in (".ckptmgr", ".ckptmgr/lock", ".ckptmgr/trash")  # there, or from what is set aside
        if call.name == refused and not is_exempt and any((tmp_path / "step-00000001").rglob("*.*")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with manager(tmp_path, commit=commit, on_full="prune") as mgr:
        assert mgr.resume().step == 3
        with SystemCalls(tmp_path, no_room):
            mgr.save(state(4), 4)
    assert loaded(tmp_path) == exactly(2, 3, 4)


def test_prune_takes_another_one_when_the_first_is_pinned_at_that_moment(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nonce = ""

    def pin(call: Call) -> None:
        if call.name == "create" and call.path.startswith(".ckptmgr/trash/") and not list(pins.glob("*")):
            pins.mkdir(exist_ok=True)
            (pins / f"step-00000001.{nonce}.json").write_text('{"step": 1, "expires": null}')

    pins = tmp_path / ".ckptmgr" / "pins"
    with filled(tmp_path, 3, SIZE // 2, on_full="prune") as (mgr, _):
        nonce = mgr.info(1).manifest.nonce
        with caplog.at_level(logging.WARNING, "ckptmgr"), SystemCalls(tmp_path, pin):
            mgr.save(state(4), 4)
    told = [one.getMessage().split()[1] for one in caplog.records if "save.full.drop" in one.getMessage()]
    assert told == ["step=2"]
    assert loaded(tmp_path) == exactly(1, 3, 4)


def test_a_pin_that_has_ended_does_not_keep_what_makes_room(tmp_path: Path) -> None:
    """On a disk so full that the record of a deletion is but a second name of the manifest, as old as that."""

    def no_tombstone(call: Call) -> None:
        if call.name == "write" and call.path.startswith(".ckptmgr/trash/"):
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with filled(tmp_path, 3, SIZE // 2, on_full="prune", quota=True) as (mgr, _):
        info = mgr.info(1)
        now = datetime.now(UTC)
        key = tmp_path / pin_key(info.name, info.manifest.nonce)
        key.parent.mkdir(exist_ok=True)
        ended = (now - timedelta(minutes=30)).isoformat()
        key.write_text(json.dumps({"step": 1, "expires": ended, "ttl_s": 3600.0}))
        for path, hours in ((key, 1.5), (tmp_path / info.name / "manifest.json", 2.0)):
            os.utime(path, (now.timestamp() - hours * 3600,) * 2)
        with SystemCalls(tmp_path, no_tombstone):
            mgr.save(state(4), 4)
    assert loaded(tmp_path) == exactly(2, 3, 4)


def test_what_can_be_spared_goes_in_the_order_of_a_cap_on_bytes(tmp_path: Path) -> None:
    """Unhealthy ones first, the best last, never the newest good one."""
    keep = {"last": None, "best": {"metric": "loss", "mode": "min"}}
    with manager(tmp_path, keep={**keep, "newer_than": "1h"}, check_finite=True, on_full="prune") as mgr:
        for step, loss in ((1, 0.1), (2, 0.5), (3, float("nan")), (4, 0.6), (5, 0.7)):
            mgr.save(state(step), step, metrics={"loss": loss})
        assert [info.step for info in mgr._run.spare()] == [3, 2, 4, 1]


def test_skip_leaves_a_due_save_out_with_one_warning_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with filled(tmp_path, 1, SIZE // 2, on_full="skip", save={"every_steps": 1}) as (mgr, disk):
        with caplog.at_level(logging.WARNING, "ckptmgr"):
            pending = mgr.maybe_save(state(2), 2)
        pending.wait()
        assert (pending.done(), pending.url, pending.error) == (True, None, None)
        assert "bytes needed" in pending.skipped
        assert "skip" not in str(pending.error)
        assert repr(pending) == f"<Pending step 2: {pending.skipped}>"
        (told,) = [one.getMessage() for one in caplog.records]
        assert told.startswith("save.skip.full step=2")
        assert "bytes free" in told
        assert drafts(tmp_path) == []
        disk.capacity += ONE
        again = mgr.maybe_save(state(3), 3)
        again.wait()
        assert (again.skipped, again.url) == (None, f"{tmp_path}/step-00000003")
    assert loaded(tmp_path) == exactly(1, 3)


def test_skip_in_the_background_is_not_raised_later(tmp_path: Path) -> None:
    with filled(tmp_path, 1, SIZE // 2, on_full="skip", save={"every_steps": 1}, background=True) as (mgr, _):
        pending = mgr.maybe_save(state(2), 2)
        mgr.wait()
        assert pending.skipped is not None
        mgr.maybe_save(state(3), 3)
        mgr.wait()
    assert loaded(tmp_path) == exactly(1)


def test_a_save_that_was_asked_for_is_never_skipped(tmp_path: Path) -> None:
    """`save()` promises a checkpoint, and the last one of `close()` has no next time."""
    with filled(tmp_path, 1, SIZE // 2, on_full="skip", save={"on_close": True}) as (mgr, _):
        with pytest.raises(SaveFailedError, match="no space left"):
            mgr.save(state(2), 2)
        mgr.maybe_save(state(3), 3)
        with pytest.raises(SaveFailedError, match="step 3 was not saved"):
            mgr.close()
    assert loaded(tmp_path) == exactly(1)


@pytest.mark.parametrize("background", [False, True])
def test_on_error_warn_trains_on_counts_and_saves_again_when_there_is_room(background: bool, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "on_error": "warn",
        "max_failures": 2,
        "save": {"every_steps": 1},
        "background": background,
    }
    with filled(tmp_path, 1, SIZE // 2, **settings) as (mgr, disk):
        for step in (2, 3):
            mgr.maybe_save(state(step), step)
            mgr.wait()
        disk.capacity += ONE
        mgr.maybe_save(state(4), 4)
        mgr.wait()
        for step in (5, 6):
            mgr.maybe_save(state(step), step)
            mgr.wait()
        with pytest.raises(SaveFailedError, match="step 7 was not saved"):  # noqa: PT012 - at once, or when waited for
            mgr.maybe_save(state(7), 7)
            mgr.wait()
        disk.capacity += ONE
        mgr.maybe_save(state(8), 8)
    assert loaded(tmp_path) == exactly(1, 4, 8)


def test_a_full_disk_keeps_its_numbers_on_its_way_to_other_ranks() -> None:
    error = StoreFullError("no space left", errno.EDQUOT, needed=12, free=3)
    told = Failure.of(error, 1).error()
    assert isinstance(told, StoreFullError)
    assert (str(told), told.errno, told.needed, told.free) == ("rank 1: no space left", errno.EDQUOT, 12, 3)
    assert isinstance(told, StoreError)


def info(step: int, *files: FileEntry) -> CheckpointInfo:
    now = datetime.now(UTC)
    manifest = Manifest(step=step, run="r", attempt=1, nonce="0" * 16, time=now, format="safetensors", files=files)
    return CheckpointInfo(f"step-{step:08d}", step, manifest)


def test_a_file_that_is_linked_frees_its_bytes_with_its_last_name() -> None:
    base, link = FileEntry("base", 100, "a"), FileEntry("base", 100, "a", shared=True)
    own = [FileEntry("model", 10, "b"), FileEntry("model", 10, "c")]
    one, two = info(1, base, own[0]), info(2, link, own[1])
    assert freed([one], [two]) == 10
    assert freed([one, two], []) == 120
    assert freed([info(1, own[0]), info(2, own[0])], []) == 20


def test_a_file_larger_than_the_limit_is_told_apart_from_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"\(8,192 bytes needed\): no file may be so large here.*split_size") as caught:
        _too_large(tmp_path)
    assert not isinstance(caught.value, StoreFullError)
    assert caught.value.errno == errno.EFBIG


def _too_large(root: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        LocalStore(root).put("key", bytes(8192))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Many ranks


CASES = [("sharded", on_full, quota) for on_full in ("raise", "prune", "skip") for quota in (False, True)]
CASES += [("whole", "prune", True), ("whole", "skip", False)]


def _ranks_on_a_full_disk(root: str) -> list[Any]:
    """What this rank hears of step 3 in each case, and what is there then."""
    told = []
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for kind, on_full, quota in CASES:
        place = Path(root, f"{kind}-{on_full}-{quota}")
        told.append([place.name, *_one_case(place, mesh if kind == "sharded" else None, on_full, quota)])
    return told


def _one_case(root: Path, mesh: Any, on_full: str, quota: bool) -> list[Any]:
    def whole(step: int) -> dict[str, Any]:
        tensor = torch.full((256, SIZE // 1024), float(step))
        return {"w": tensor if mesh is None else distribute_tensor(tensor, mesh, [Shard(0)])}

    heard = ""
    with manager(root, on_full=on_full, save={"every_steps": 1}, ranks={"timeout": "20s"}) as mgr:
        mgr.resume(w=whole(0)["w"])
        for step in (1, 2):
            mgr.maybe_save(whole(step), step)
        dist.barrier()
        disk = SmallDisk(root, 0, quota=quota)
        disk.capacity = disk.used + SIZE // 2
        dist.barrier()
        with disk:
            try:
                pending = mgr.maybe_save(whole(3), 3)
                heard = "skipped" if pending is not None and pending.skipped else "saved"
            except SaveFailedError as exc:
                heard = type(exc.__cause__).__name__
                heard += " with numbers" if getattr(exc.__cause__, "needed", None) else ""
            dist.barrier()
        mgr.maybe_save(whole(4), 4)
        steps = mgr.all_steps()
        found = [mgr.load(step)["w"].mean().item() for step in steps]
        assert found == list(map(float, steps))
    return [heard, steps, len(drafts(root))]


@pytest.mark.timeout(120)
def test_all_ranks_hear_the_same_of_a_full_disk_and_make_room_once(tmp_path: Path) -> None:
    """The room that all ranks need together is looked at ahead; a quota shows when any of them writes."""
    first, second = values(run_ranks(_ranks_on_a_full_disk, 2, args=(str(tmp_path),), timeout_s=100))
    ends = {
        "raise": ["StoreFullError with numbers", [1, 2, 4], 0],
        "prune": ["saved", [2, 3, 4], 0],
        "skip": ["skipped", [1, 2, 4], 0],
    }
    expected = [[f"{kind}-{on_full}-{quota}", *ends[on_full]] for kind, on_full, quota in CASES]
    assert first == expected
    assert second == expected
