"""One writer per root: who is refused, who may take over, and what a dead process leaves."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from ckptmgr import lock as lock_module
from ckptmgr.errors import FencedError, StoreError
from ckptmgr.lock import FileLock, Lease, acquire, last_writer
from ckptmgr.store.local import LocalStore
from ckptmgr.testing import MemoryStore


@pytest.fixture(params=["flock", "lease"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    return LocalStore(tmp_path) if request.param == "flock" else MemoryStore()


def test_a_second_writer_is_refused_by_name_and_let_in_after_the_release(store: Any) -> None:
    first = acquire(store)
    with pytest.raises(FencedError, match=rf"written by process {os.getpid()} on .*takeover=True"):
        acquire(store)
    first.check()
    first.release()
    first.release()
    second = acquire(store)
    assert second.attempt == first.attempt + 1
    second.release()


def test_attempts_rise_above_every_earlier_one(store: Any) -> None:
    lock = acquire(store, floor=7)
    assert lock.attempt == 8
    lock.release()
    again = acquire(store, floor=3)
    assert again.attempt == 9
    again.release()


def test_the_last_writers_number_can_be_read_while_it_writes_and_after_it_has_left(store: Any) -> None:
    assert last_writer(store) == 0
    lock = acquire(store, floor=4)
    assert last_writer(store) == 5
    lock.release()
    assert last_writer(store) == 5
    again = acquire(store, takeover=True)
    assert last_writer(store) == again.attempt
    again.release()


def test_of_a_root_that_had_both_kinds_of_writers_the_higher_number_counts(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, fsync=False)
    FileLock(tmp_path, floor=6, takeover=False).release()
    assert last_writer(store) == 7
    Lease(store, floor=8, takeover=False, ttl_s=60).release()
    assert last_writer(store) == 9
    (tmp_path / ".ckptmgr/lock").write_bytes(b"torn")
    assert last_writer(store) == 9


def test_a_number_is_on_the_disk_before_the_lock_is_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    real = os.fsync

    def fsync(fd: int) -> None:
        path = Path(f"/proc/self/fd/{fd}").readlink()
        synced.append((path.name, path.read_bytes() if path.is_file() else b""))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    FileLock(tmp_path, floor=6, takeover=False).release()
    assert [name for name, _ in synced] == ["lock", ".ckptmgr"]
    assert json.loads(synced[0][1])["attempt"] == 7


def test_a_takeover_fences_the_old_writer(store: Any) -> None:
    old = acquire(store)
    new = acquire(store, takeover=True)
    assert new.attempt > old.attempt
    new.check()
    with pytest.raises(FencedError):
        old.check()
    old.release()
    new.check()
    new.release()


def test_a_lock_that_was_dropped_unreleased_does_not_keep_this_process_out(store: Any) -> None:
    lock = acquire(store)
    del lock  # a notebook's cell that is run again
    again = acquire(store)
    assert again.attempt == 2
    again.release()


def test_a_released_lock_no_longer_checks(store: Any) -> None:
    lock = acquire(store)
    lock.release()
    with pytest.raises(FencedError):
        lock.check()


def hold_in_another_process(root: Path) -> subprocess.Popen[str]:
    code = (
        "import sys; from ckptmgr.lock import acquire; from ckptmgr.store.local import LocalStore\n"
        "lock = acquire(LocalStore(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_killed_writer_frees_a_local_root_at_once(tmp_path: Path) -> None:
    with hold_in_another_process(tmp_path) as process:
        with pytest.raises(FencedError, match=f"process {process.pid} on"):
            acquire(LocalStore(tmp_path))
        process.send_signal(signal.SIGKILL)
        process.wait()
    acquire(LocalStore(tmp_path)).release()


def test_a_forked_child_that_outlives_the_writer_does_not_hold_the_root(tmp_path: Path) -> None:
    lock = acquire(LocalStore(tmp_path))
    assert isinstance(lock, FileLock)
    (waiting, go), (ready, tell) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go)
        os.write(tell, b"x")
        os.read(waiting, 1)  # until the parent closes its end
        os._exit(0)
    os.read(ready, 1)
    lock.forget()  # what the kernel does to a killed process
    acquire(LocalStore(tmp_path)).release()
    for end in (waiting, go, ready, tell):
        os.close(end)
    assert os.waitpid(child, 0)[1] == 0


def test_an_unwritable_root_is_a_store_error_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(lock_module.os, "open", refuse)
    with pytest.raises(StoreError, match=r"cannot write to .*read_only"):
        acquire(LocalStore(tmp_path))


def test_a_file_system_without_flock_gets_a_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock_module.fcntl, "flock", unsupported)
    lock = acquire(LocalStore(tmp_path))
    assert isinstance(lock, Lease)
    with pytest.raises(FencedError):
        acquire(LocalStore(tmp_path))
    lock.release()


def test_the_lock_is_never_taken_on_a_replaced_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([False, True, True])
    monkeypatch.setattr(FileLock, "_is_current", lambda self, fd: next(answers))
    lock = FileLock(tmp_path, floor=0, takeover=False)
    lock.check()
    lock.release()


def age_heartbeat(store: MemoryStore, seconds: float) -> None:
    for key, (data, modified) in store.objects.items():
        if key.endswith(".beat"):
            store.objects[key] = (data, modified - seconds)


def move_holder_elsewhere(store: MemoryStore) -> None:
    """Makes the holder of the lease a process of another host, which nobody here can see."""
    claim = ".ckptmgr/lease/0000000001.json"
    store.put(claim, json.dumps({**json.loads(store.get(claim)), "space": "elsewhere", "host": "spot-7"}).encode())


def test_a_job_restarted_elsewhere_waits_until_the_old_lease_runs_out(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    old = Lease(store, floor=0, takeover=False, ttl_s=3600)
    move_holder_elsewhere(store)
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        age_heartbeat(store, seconds)

    new = Lease(store, floor=0, takeover=False, ttl_s=60, pause=pause)
    assert new.attempt == 2
    assert (len(pauses), sum(pauses)) == (12, 60)
    assert caplog.text.count("lease.wait") == 1
    assert "spot-7" in caplog.text
    with pytest.raises(FencedError):
        old.check()
    old.release()
    new.release()


def test_a_second_writer_elsewhere_is_refused_as_soon_as_the_holder_shows_a_sign_of_life() -> None:
    store = MemoryStore()
    holder = Lease(store, floor=0, takeover=False, ttl_s=3600)
    move_holder_elsewhere(store)
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 4:
            holder.beat()

    with pytest.raises(FencedError, match="on spot-7 since"):
        Lease(store, floor=0, takeover=False, ttl_s=60, pause=pause)
    assert pauses == [5.0] * 4
    holder.release()


def test_the_lease_of_a_dead_process_on_this_host_is_free_at_once() -> None:
    store = MemoryStore()
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    acquire(store).release()
    claim = ".ckptmgr/lease/0000000001.json"
    owner = json.loads(store.get(claim))
    store.put(".ckptmgr/lease/0000000001.beat", b'{"released": false}')
    store.put(claim, json.dumps({**owner, "pid": process.pid}).encode())
    acquire(store).release()


def test_a_process_of_another_user_counts_as_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(pid: int, number: int) -> None:
        raise PermissionError

    store = MemoryStore()
    lock = acquire(store)
    monkeypatch.setattr(lock_module.os, "kill", forbidden)
    with pytest.raises(FencedError):
        acquire(store)
    lock.release()


def test_one_of_many_wins_a_free_lease() -> None:
    store = MemoryStore()
    won: list[Lease] = []
    refused: list[FencedError] = []
    start = threading.Barrier(8)

    def race() -> None:
        start.wait()
        try:
            won.append(Lease(store, floor=0, takeover=False, ttl_s=60))
        except FencedError as exc:
            refused.append(exc)

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(refused)) == (1, 7)
    won[0].check()
    won[0].release()


class _Timeless(MemoryStore):
    """A store that does not say when anything was written."""

    def stat(self, key: str) -> Any:
        entry = super().stat(key)
        return None if entry is None else type(entry)(entry.key, entry.size)


def test_without_the_clock_of_the_store_the_heartbeat_says_its_own_time() -> None:
    store = _Timeless()
    now = datetime(2030, 1, 1, tzinfo=UTC)
    first = Lease(store, floor=0, takeover=False, ttl_s=60, now=lambda: now)
    with pytest.raises(FencedError):
        Lease(store, floor=0, takeover=False, ttl_s=60, now=lambda: now + timedelta(seconds=59))
    second = Lease(store, floor=0, takeover=False, ttl_s=60, now=lambda: now + timedelta(seconds=61))
    assert second.attempt == 2
    store.put(".ckptmgr/lease/0000000002.beat", b"not json")
    with pytest.raises(FencedError):
        Lease(store, floor=0, takeover=False, ttl_s=60, now=lambda: now + timedelta(days=9))
    first.release()
    second.release()


def test_the_heartbeat_goes_on_by_itself_and_survives_a_failing_store(caplog: pytest.LogCaptureFixture) -> None:
    class Flaky(MemoryStore):
        beats = 0
        enough = threading.Event()

        def put(self, key: str, data: Any, *, create: bool = False) -> None:
            if key.endswith(".beat"):
                self.beats += 1
                if self.beats >= 4:
                    self.enough.set()
                if self.beats in (2, 3):
                    raise StoreError("no network")
            super().put(key, data, create=create)

    store = Flaky()
    lease = Lease(store, floor=0, takeover=False, ttl_s=0.003)
    assert store.enough.wait(60)
    lease.release()
    assert "lease.beat.failed" in caplog.text


def test_a_release_that_cannot_be_written_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    class Full(MemoryStore):
        def put(self, key: str, data: Any, *, create: bool = False) -> None:
            if b'"released": true' in bytes(data):
                raise StoreError("no space")
            super().put(key, data, create=create)

    Lease(Full(), floor=0, takeover=False, ttl_s=60).release()
    assert "lease.release.failed" in caplog.text
