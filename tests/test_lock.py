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
from ckptmgr.errors import AlreadyExistsError, FencedError, StoreError, StoreFullError
from ckptmgr.lock import FileLock, Lease, acquire, last_writer
from ckptmgr.owner import is_alive, sealed
from ckptmgr.store.local import LocalStore
from ckptmgr.testing import Call, MemoryStore, PausingStore, SystemCalls


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


def test_a_writer_rises_above_a_number_and_holds_the_root_all_the_while(store: Any) -> None:
    lock = acquire(store, floor=2)
    lock.rise(6)
    lock.check()
    assert (lock.attempt, last_writer(store)) == (7, 7)
    lock.rise(3)
    assert lock.attempt == 8
    with pytest.raises(FencedError):
        acquire(store)
    second = acquire(store, takeover=True)
    assert second.attempt == 9
    with pytest.raises(FencedError):
        lock.rise(20)
    second.check()
    lock.release()
    second.release()


@pytest.mark.parametrize("rises", [False, True])
def test_of_two_writers_that_claim_different_numbers_at_once_the_first_holds_the_root(rises: bool) -> None:
    memory = MemoryStore()
    first: list[Lease] = []

    class Late(PausingStore):
        """Lets another one in before the claim of a number above its own."""

        def pause(self, method: str, key: str) -> None:
            if (method, key) == ("put", ".ckptmgr/lease/0000000009.json"):
                first.append(Lease(memory, floor=0, takeover=True, ttl_s=60))

    store = Late(memory)
    second = Lease(store, floor=0, takeover=False, ttl_s=60) if rises else None
    with pytest.raises(FencedError):
        second.rise(8) if second else Lease(store, floor=8, takeover=False, ttl_s=60)
    assert first[0].attempt == (2 if rises else 1)
    first[0].check()
    if second:
        with pytest.raises(FencedError):
            second.check()


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
    assert [name for name, _ in synced][-2:] == ["lock", ".ckptmgr"]
    assert json.loads(synced[-2][1])["attempt"] == 7


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


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_keeps_the_number_of_the_writer_before_and_says_that_it_is_full(code: int, tmp_path: Path) -> None:
    acquire(LocalStore(tmp_path), floor=6).release()

    def full(call: Call) -> None:
        if call.name == "write":
            raise OSError(code, os.strerror(code))

    with SystemCalls(tmp_path, full), pytest.raises(StoreFullError, match=r"lock \([0-9,]+ bytes free\)") as caught:
        acquire(LocalStore(tmp_path))
    assert caught.value.errno == code
    assert "owner" not in str(caught.value)
    assert last_writer(LocalStore(tmp_path)) == 7


def test_a_lock_is_never_without_a_number_while_it_is_written(tmp_path: Path) -> None:
    """Over a longer record too, and where the system takes less than it is given."""
    path = tmp_path / ".ckptmgr" / "lock"
    path.parent.mkdir()
    path.write_bytes(sealed({"host": "h" * 900, "attempt": 7}))
    seen = []

    def look(call: Call) -> None:
        if call.path.endswith("lock"):
            seen.append((call.name, last_writer(LocalStore(tmp_path))))

    with SystemCalls(tmp_path, after=look):
        acquire(LocalStore(tmp_path)).release()
    assert {number for _, number in seen} <= {7, 8}
    assert ("write", 8) in seen
    parts = []

    def short(call: Call) -> int | None:
        if call.name == "write":
            parts.append(call.size)
        return call.size // 2 if len(parts) == 1 else None

    with SystemCalls(tmp_path, short):
        acquire(LocalStore(tmp_path)).release()
    assert len(parts) == 2
    assert last_writer(LocalStore(tmp_path)) == 9


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
    answers = iter([False, True, True, True])
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
    pauses: list[float] = []
    later = now + timedelta(seconds=61)
    second = Lease(store, floor=0, takeover=False, ttl_s=60, now=lambda: later, pause=pauses.append)
    assert (second.attempt, pauses) == (2, [5.0] * 5)  # longer than between two heartbeats
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


def test_one_handler_for_forks_serves_all_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[object] = []
    monkeypatch.setattr(os, "register_at_fork", lambda **callbacks: registered.append(callbacks))
    for _ in range(3):
        acquire(LocalStore(tmp_path, fsync=False)).release()
    assert registered == []


def test_of_two_that_take_over_at_once_each_has_a_number_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = FileLock(tmp_path, floor=0, takeover=False)
    real, faster = FileLock._put_out, list[FileLock]()

    def put_out(self: FileLock) -> int:
        if not faster:
            faster.append(None)  # type: ignore[arg-type]
            faster[0] = FileLock(tmp_path, floor=0, takeover=True)
        return real(self)

    monkeypatch.setattr(FileLock, "_put_out", put_out)
    slower = FileLock(tmp_path, floor=0, takeover=True)
    assert (old.attempt, faster[0].attempt, slower.attempt) == (1, 2, 3)
    slower.check()
    for fenced in (old, faster[0]):
        with pytest.raises(FencedError):
            fenced.check()
    slower.release()


def test_a_process_that_nobody_has_waited_for_is_dead() -> None:
    store = MemoryStore()
    lock = acquire(store)
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read()  # until it has ended
    claim = ".ckptmgr/lease/0000000001.json"
    owner = {**json.loads(store.get(claim)), "pid": process.pid, "born": None}
    while is_alive(owner):
        threading.Event().wait(0.01)
    store.put(claim, json.dumps(owner).encode())
    acquire(store).release()
    process.stdout.close()
    process.wait()
    lock.release()


def test_a_pid_that_is_another_process_by_now_is_dead() -> None:
    store = MemoryStore()
    acquire(store).release()
    claim = ".ckptmgr/lease/0000000001.json"
    store.put(".ckptmgr/lease/0000000001.beat", b'{"released": false}')
    store.put(claim, json.dumps({**json.loads(store.get(claim)), "pid": os.getppid(), "born": "1"}).encode())
    if not Path("/proc/self/stat").exists():
        pytest.skip("no /proc says when a process was born")
    acquire(store).release()


def test_a_writer_that_was_frozen_while_it_claimed_is_refused_before_it_touches_anything() -> None:
    store = MemoryStore(can_rename=False)
    acquire(store).release()

    def others() -> None:
        acquire(store).release()
        acquire(store).release()

    frozen = PausingStore(store)
    acquire(frozen).release()
    for at in range(1, frozen.count + 1):
        pausing = PausingStore(store, at, others)
        try:
            lock = acquire(pausing)
            lock.check()
        except FencedError:
            continue
        assert lock.attempt == last_writer(store)
        lock.release()


def test_the_claim_of_an_object_store_whose_answer_was_lost_is_ones_own() -> None:
    class Lossy(MemoryStore):
        def put(self, key: str, data: Any, *, create: bool = False) -> None:
            super().put(key, data, create=create)
            if create:
                raise AlreadyExistsError(key)  # to the second request

    lock = acquire(Lossy())
    lock.check()
    lock.release()
