"""A save writes over the blocks of the checkpoint that went last, and never over what anyone can still see."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptmgr import CheckpointManager
from ckptmgr.errors import StoreFullError
from ckptmgr.litter import litter
from ckptmgr.room import check_room
from ckptmgr.store import spares as spares_module
from ckptmgr.store.local import LocalStore
from ckptmgr.store.mounts import mount_type_at
from ckptmgr.store.removal import wait_for_space
from ckptmgr.store.spares import FOLDER, make_space

pytestmark = pytest.mark.skipif(
    mount_type_at(Path(os.environ.get("TMPDIR", "/tmp"))) not in spares_module._IN_PLACE
    or not spares_module._HAS_LEASES,
    reason="no file system here whose files are written over in place",
)

MIB = 1 << 20


def state(step: int, mib: float = 2) -> dict[str, Any]:
    return {"model": {"w": torch.full((int(mib * MIB) // 4,), float(step))}}


def manager(root: Path, **settings: Any) -> CheckpointManager:
    settings = {"background": False, "keep": {"last": 1}, "save": {"on_signals": []}, **settings}
    return CheckpointManager(root, **settings)


def weights(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}/model.safetensors"


def inode(root: Path, step: int) -> int:
    return weights(root, step).stat().st_ino


def spares(root: Path) -> list[Path]:
    folder = root / FOLDER
    return sorted(folder.iterdir()) if folder.exists() else []


def check(mgr: CheckpointManager, step: int, mib: float = 2) -> None:
    """The newest is this one, every byte of it."""
    assert mgr.verify("latest") == []
    assert torch.equal(mgr.load(step)["model"]["w"], state(step, mib)["model"]["w"])


@pytest.mark.parametrize("background", [False, True])
def test_a_save_takes_over_the_file_of_the_checkpoint_that_went_last(tmp_path: Path, background: bool) -> None:
    with manager(tmp_path, background=background) as mgr:
        files = []
        for step in (1, 2, 3, 4):
            mgr.save(state(step), step).wait()
            files.append(inode(tmp_path, step))
            check(mgr, step)
        assert files == [files[0], files[1], files[0], files[1]]
        assert len(spares(tmp_path)) == 1
    assert not (tmp_path / FOLDER).exists()


@pytest.mark.parametrize(("mib", "is_close"), [(2.2, True), (1.8, True), (3, False), (1.2, False)])
def test_a_file_of_about_the_size_is_taken_over_and_has_its_own_size_and_bytes(
    tmp_path: Path, mib: float, is_close: bool
) -> None:
    with manager(tmp_path) as mgr:
        mgr.save(state(1), 1)
        mgr.save(state(2), 2)
        (spare,) = spares(tmp_path)
        number = spare.stat().st_ino
        mgr.save(state(3, mib), 3)
        assert (inode(tmp_path, 3) == number) is is_close
        check(mgr, 3, mib)


@contextmanager
def opened_by_a_map(path: Path) -> Iterator[Callable[[], bytes]]:
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    with mapped:
        yield lambda: mapped[:]


@contextmanager
def opened_by_another_process(path: Path) -> Iterator[Callable[[], bytes]]:
    code = "import sys; f = open(sys.argv[1], 'rb'); print(flush=True); input(); sys.stdout.buffer.write(f.read())"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout
        process.stdout.readline()

        def read() -> bytes:
            return process.communicate(b"\n")[0]

        yield read


@contextmanager
def with_another_name(path: Path) -> Iterator[Callable[[], bytes]]:
    other = path.parents[1] / "other"
    os.link(path, other)
    yield other.read_bytes


@pytest.mark.parametrize("seen", [opened_by_a_map, opened_by_another_process, with_another_name])
@pytest.mark.parametrize("when", ["before it goes", "while it is spare"])
def test_what_anyone_can_still_see_keeps_its_bytes(tmp_path: Path, seen: Any, when: str) -> None:
    with manager(tmp_path) as mgr:
        mgr.save(state(1), 1)
        before = weights(tmp_path, 1).read_bytes()
        if when == "before it goes":
            with seen(weights(tmp_path, 1)) as read:
                mgr.save(state(2), 2)
                mgr.save(state(3), 3)
                assert read() == before
        else:
            mgr.save(state(2), 2)
            (spare,) = spares(tmp_path)
            with seen(spare) as read:
                mgr.save(state(3), 3)
                assert read() == before
        check(mgr, 3)


def test_what_load_has_mapped_keeps_its_bytes(tmp_path: Path) -> None:
    with manager(tmp_path) as mgr:
        mgr.save(state(1), 1)
        mapped = mgr.load(mmap=True)["model"]["w"]
        for step in (2, 3, 4):
            mgr.save(state(step), step)
        assert torch.equal(mapped, state(1)["model"]["w"])


@pytest.mark.parametrize("change", [lambda path: path.chmod(0o600), lambda path: os.setxattr(path, "user.sum", b"1")])
def test_a_new_file_has_nothing_of_the_old_one(tmp_path: Path, change: Callable[[Path], object]) -> None:
    with manager(tmp_path) as mgr:
        mgr.save(state(1), 1)
        mode = weights(tmp_path, 1).stat().st_mode
        change(weights(tmp_path, 1))
        for step in (2, 3):
            mgr.save(state(step), step)
        assert weights(tmp_path, 3).stat().st_mode == mode
        assert os.listxattr(weights(tmp_path, 3)) == []
        check(mgr, 3)


@pytest.mark.parametrize(
    "settings",
    [{"fsync": False}, {"keep": {"last": 1, "max_bytes": "1GB"}}, {"commit": "manifest"}, {"reuse_blocks": False}],
)
def test_nothing_is_kept_where_it_could_come_back_has_no_room_or_no_use_or_is_not_wanted(
    tmp_path: Path, settings: Any
) -> None:
    with manager(tmp_path, **settings) as mgr:
        for step in (1, 2, 3):
            mgr.save(state(step), step)
            assert spares(tmp_path) == []


def test_what_a_person_deletes_is_gone(tmp_path: Path) -> None:
    with manager(tmp_path, keep={"last": None}) as mgr:
        for step in (1, 2, 3):
            mgr.save(state(step), step)
        mgr.delete(1)
        assert spares(tmp_path) == []


def test_a_spare_that_nobody_took_over_goes_after_the_next_save(tmp_path: Path) -> None:
    with manager(tmp_path) as mgr:
        mgr.save(state(1), 1)
        mgr.save(state(2), 2)
        (first,) = spares(tmp_path)
        mgr.save(state(3, 8), 3)  # much larger
        assert first not in spares(tmp_path)
        mgr.save(state(4, 8), 4)
        assert [path.stat().st_size > 7 * MIB for path in spares(tmp_path)] == [True]


class Space:
    """So much is free, and what spares have besides once they are gone."""

    files, block = None, 4096

    def __init__(self, root: Path, free: int) -> None:
        self.free = free if spares(root) else free + 2 * MIB

    def needed(self, sizes: Any) -> int:
        return sum(sizes)

    def has(self, needed: int) -> bool:
        return self.free >= needed


@pytest.mark.parametrize(
    ("sizes", "stays"), [([2 * MIB, MIB // 2], True), ([2 * MIB, 2 * MIB], False), ([1000] * 3000, False)]
)
def test_room_is_also_what_spares_take_up_for_files_like_them_and_they_go_when_that_is_not_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sizes: list[int], stays: bool
) -> None:
    with manager(tmp_path) as mgr:
        mgr.save(state(1), 1)
        mgr.save(state(2), 2)
        monkeypatch.setattr("ckptmgr.room.space_left", lambda path: Space(tmp_path, MIB))
        store = mgr._run.repository.store
        if sum(sizes) <= 3 * MIB:
            assert check_room(store, "a save", sizes) == sum(sizes)
        else:
            with pytest.raises(StoreFullError):
                check_room(store, "a save", sizes)
        assert bool(spares(tmp_path)) is stays
        assert make_space() is stays
        assert spares(tmp_path) == []


def test_where_nobody_can_tell_who_has_a_file_open_none_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lease(fd: int) -> bool:
        raise OSError(errno.EINVAL, "no leases here")

    monkeypatch.setattr(spares_module, "is_alone", lease)
    with manager(tmp_path) as mgr:
        for step in (1, 2, 3):
            mgr.save(state(step), step)
        assert spares(tmp_path) == []
        check(mgr, 3)


def test_none_is_kept_while_this_machine_exports_folders_over_nfs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports = tmp_path / "exports"
    exports.write_text("# what is exported\n/srv *(rw)\n")
    monkeypatch.setattr(spares_module, "_EXPORTS", (exports, tmp_path / "none"))
    with manager(tmp_path / "root") as mgr:
        for step in (1, 2):
            mgr.save(state(step), step)
        assert spares(tmp_path / "root") == []


@pytest.mark.parametrize("where", ["is_alone", "open_to_write", "remove"])
def test_an_interrupt_leaves_no_file_and_no_descriptor_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupt(*args: Any, **how: Any) -> None:
        raise KeyboardInterrupt

    before = len(list(Path("/proc/self/fd").iterdir()))
    with manager(tmp_path) as mgr:
        mgr.save(state(1), 1)
        mgr.save(state(2), 2)
        with monkeypatch.context() as patch:
            patch.setattr(spares_module, where, interrupt)
            with suppress(KeyboardInterrupt):
                mgr.save(state(3), 3)
        mgr.save(state(4), 4)
        check(mgr, 4)
    wait_for_space()
    assert spares(tmp_path) == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_failed_saves_leave_no_more_than_one_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with manager(tmp_path, keep={"last": 2}) as mgr:
        mgr.save(state(1), 1)
        mgr.save(state(2), 2)
        with monkeypatch.context() as patch:
            patch.setattr("ckptmgr.store.local_writer.write_at", lambda *args: 1 / 0)
            for step in (3, 4):
                with pytest.raises(Exception, match="zero"):
                    mgr.save(state(step), step)
        mgr.pin(1)
        mgr.save(state(5), 5)
        mgr.unpin(1)
        mgr.save(state(6), 6)  # two go
        assert len(spares(tmp_path)) == 1


def test_somebody_who_is_about_to_open_a_file_counts_as_one_who_has(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    fd = os.open(path, os.O_WRONLY)
    assert spares_module.is_alone(fd)
    with path.open("rb"):
        assert not spares_module.is_alone(fd)
    assert spares_module.is_alone(fd)
    os.close(fd)


def test_spares_of_a_process_that_was_killed_go_with_the_next_writer(tmp_path: Path) -> None:
    code = """if True:
        import os, signal, sys, torch, ckptmgr
        mgr = ckptmgr.CheckpointManager(sys.argv[1], background=False, keep={"last": 1})
        for step in (1, 2):
            mgr.save({"model": {"w": torch.full((1 << 19,), float(step))}}, step)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -signal.SIGKILL
    assert len(spares(tmp_path)) == 1
    with manager(tmp_path) as mgr:
        (found,) = litter(mgr._run.repository, print)
        assert (found.kind, found.key, found.bytes > MIB) == ("deletion", FOLDER, True)
        mgr.resume()
        assert not (tmp_path / FOLDER).exists()
        check(mgr, 2)


def test_a_forked_child_neither_uses_nor_removes_them(tmp_path: Path) -> None:
    with manager(tmp_path) as mgr:
        for step in (1, 2):
            mgr.save(state(step), step)
        store = mgr._run.repository.store
        assert isinstance(store, LocalStore)
        with store.spares._lock:  # as a thread that saves has it
            pid = os.fork()
        if not pid:
            store.spares.drop()
            make_space()
            os._exit(0 if store.spares.take(str(tmp_path / "x"), 2 * MIB) is None else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        number = spares(tmp_path)[0].stat().st_ino
        mgr.save(state(3), 3)
        assert inode(tmp_path, 3) == number


def test_whoever_only_reads_leaves_them_alone(tmp_path: Path) -> None:
    with manager(tmp_path) as mgr:
        for step in (1, 2):
            mgr.save(state(step), step)
        before = spares(tmp_path)
        with CheckpointManager(tmp_path, read_only=True) as reader:
            assert reader.load(2)
        store = LocalStore(tmp_path)
        assert not store.spares.drop()
        del store
        gc.collect()
        assert len(before) == 1
        assert spares(tmp_path) == before


def test_a_spare_that_somebody_removed_is_no_obstacle(tmp_path: Path) -> None:
    with manager(tmp_path) as mgr:
        for step in (1, 2, 3):
            mgr.save(state(step), step)
            for path in spares(tmp_path):
                path.unlink()
        check(mgr, 3)


def test_a_planted_link_leads_nothing_out_of_the_root(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    outside.mkdir()
    with manager(root) as mgr:
        mgr.save(state(1), 1)
        (root / FOLDER).symlink_to(outside)
        mgr.save(state(2), 2)
        assert list(outside.iterdir()) == []
        mgr.save(state(3), 3)
        check(mgr, 3)


def test_a_save_that_fails_leaves_nothing_of_the_spare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with manager(tmp_path) as mgr:
        for step in (1, 2):
            mgr.save(state(step), step)

        def fail(*args: Any) -> None:
            raise OSError(5, "planted")

        with monkeypatch.context() as patch:
            patch.setattr("ckptmgr.store.local_writer.write_at", fail)
            with pytest.raises(Exception, match="planted"):
                mgr.save(state(3), 3)
        assert spares(tmp_path) == []
        check(mgr, 2)
        mgr.save(state(4), 4)
        check(mgr, 4)
