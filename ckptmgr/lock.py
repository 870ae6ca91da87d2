"""Who may write to this root? One writer at a time, numbered by attempt.

On local disks an `flock` on `.ckptmgr/lock`, which the kernel frees when the process dies. Elsewhere
a lease: the claim `.ckptmgr/lease/<attempt>.json` is created once by exactly one writer, and the
highest claim holds; the heartbeat `<attempt>.beat` is written only by its owner, so no compare and
swap is needed. Neither is what keeps data safe: unique names are, and the attempt in each manifest.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from .errors import AlreadyExistsError, CheckpointError, FencedError, NotFoundError, StoreError
from .records import FOLDER, is_refused
from .store import Store
from .store.disk import sync_file, sync_folder

try:
    import fcntl
except ImportError:  # Windows: the lease serves there too
    fcntl = None  # type: ignore[assignment]

_JOIN_S = 10.0
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS}

_log = logging.getLogger("ckptmgr.lock")


class WriterLock(Protocol):
    """The right to write, until released or lost."""

    @property
    def attempt(self) -> int:
        """The number of this writer; higher than that of any before it."""

    def check(self) -> None:
        """Raises `FencedError` when another writer has taken over. May ask the store."""

    def release(self) -> None:
        """Let the next writer in at once. May be repeated."""


def acquire(store: Store, *, floor: int = 0, takeover: bool = False, ttl_s: float = 60.0) -> WriterLock:
    """Become the root's writer, with an attempt above `floor`.

    Raises `FencedError`, naming the holder, when there is one; `takeover` takes its place instead:
    whatever it commits from then on counts for nothing. A lease held from another host blocks
    until its owner shows that it lives (a third of `ttl_s` seconds) or `ttl_s` seconds are over: a job
    restarted elsewhere after a preemption goes on by itself.
    """
    if store.path is not None and fcntl is not None:
        try:
            return FileLock(store.path, floor=floor, takeover=takeover)
        except OSError as exc:
            if exc.errno not in _UNSUPPORTED:
                raise _refused(store.path / FOLDER / "lock", exc) from exc
            _log.info("lock.flock.unsupported path=%s, using a lease", store.path)
    return Lease(store, floor=floor, takeover=takeover, ttl_s=ttl_s)


def last_writer(store: Store) -> int:
    """The highest attempt that any writer of this root has claimed, or 0 where that is not recorded. A
    claim is durable before anything is committed under its number."""
    claimed = max(_claims(store), default=0)
    if store.path is None:
        return claimed
    try:
        return max(claimed, _attempt_of(_parse(store.get(f"{FOLDER}/lock"))))
    except NotFoundError:
        return claimed
    except StoreError as exc:
        if not is_refused(store, exc):
            raise
        return 0  # it may be read by its owner alone


def _claims(store: Store) -> list[int]:
    names = (entry.name for entry in store.list(f"{FOLDER}/lease"))
    return [int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdigit()]


def _refused(path: Path, exc: OSError) -> StoreError:
    return StoreError(
        f"cannot write to {path}: {exc.strerror}; check the folder's owner and mode, or set read_only", exc.errno
    )


def _me() -> dict[str, Any]:
    """This process, as another one on any host can recognise it."""
    return {"host": socket.gethostname(), "space": _process_space(), "pid": os.getpid(), "since": _now().isoformat()}


def _process_space() -> str:
    """Equal for two processes exactly when they can see each other's pids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _is_alive(owner: dict[str, Any]) -> bool | None:
    """Whether the process lives; None for one that can't be seen from here."""
    if owner.get("space") != _process_space() or not isinstance(pid := owner.get("pid"), int):
        return None
    if pid == os.getpid():
        return any(lease.token == owner.get("token") for lease in _leases)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def _now() -> datetime:
    return datetime.now(UTC)


_leases: weakref.WeakSet[Lease] = weakref.WeakSet()  # those of this process that nobody dropped


def _held(where: str, owner: dict[str, Any]) -> FencedError:
    me = " (this very process: close() the other manager first)" if owner.get("pid") == os.getpid() else ""
    return FencedError(
        f"{where} is being written by process {owner.get('pid', '?')} on {owner.get('host', '?')} since "
        f"{owner.get('since', '?')}{me}. "
        "Stop it, use another root, open with read_only=True, or pass takeover=True if it is gone"
    )


def _parse(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


class FileLock:
    """An exclusive `flock`. A take-over puts a new file in the old one's place."""

    def __init__(self, root: Path, *, floor: int, takeover: bool) -> None:
        assert fcntl is not None
        self._path = root / FOLDER / "lock"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as exc:
                owner = _parse(os.pread(fd, 4096, 0))
                os.close(fd)
                if exc.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                if not takeover:
                    raise _held(str(root), owner) from None
                floor = max(floor, _attempt_of(owner))
                self._path.unlink(missing_ok=True)
                takeover = False  # the new file is ours, or belongs to someone faster
                continue
            if self._is_current(fd):
                break
            os.close(fd)  # replaced between open and flock
        # Closed when dropped, too: in a notebook nobody closes the manager of the cell run before.
        self._close = weakref.finalize(self, os.close, fd)
        self._fd = fd
        self.attempt = max(floor, _attempt_of(_parse(os.pread(fd, 4096, 0)))) + 1
        data = json.dumps({**_me(), "attempt": self.attempt}).encode()
        os.ftruncate(fd, 0)
        os.pwrite(fd, data, 0)
        # Readers take the number for the highest there is: a checkpoint must never outlive it.
        sync_file(fd)
        sync_folder(self._path.parent)
        _close_in_children(self)

    def _is_current(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), self._path.stat())
        except FileNotFoundError:
            return False

    def check(self) -> None:
        if not self._close.alive or not self._is_current(self._fd):
            try:
                owner = _parse(self._path.read_bytes())
            except OSError:
                owner = {}
            raise _held(str(self._path.parent.parent), owner)

    def release(self) -> None:
        if self._close.alive:
            assert fcntl is not None
            fcntl.flock(self._fd, fcntl.LOCK_UN)  # for a child forked this instant, too
            self.forget()

    def forget(self) -> None:
        """Close this process's handle; another process that shares it keeps the lock."""
        self._close()


def _close_in_children(lock: FileLock) -> None:
    """A forked child (a data loader's worker) shares the flock: without this, one that outlives a
    killed trainer would keep the root locked."""
    held = weakref.ref(lock)

    def close() -> None:
        if (lock := held()) is not None:
            lock.forget()

    os.register_at_fork(after_in_child=close)


def _attempt_of(owner: dict[str, Any]) -> int:
    attempt = owner.get("attempt")
    return attempt if isinstance(attempt, int) else 0


class Lease:
    """A claim with a heartbeat every third of `ttl_s`, from a thread of its own."""

    def __init__(
        self,
        store: Store,
        *,
        floor: int,
        takeover: bool,
        ttl_s: float,
        now: Callable[[], datetime] = _now,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store, self._ttl_s, self._now, self._pause = store, ttl_s, now, pause
        claims = _claims(store)
        if claims and not takeover and (owner := self._living_owner(max(claims))) is not None:
            raise _held(store.url, owner)
        self.attempt = max([floor, *claims]) + 1
        self.token = secrets.token_hex(8)
        self._beat(released=False)  # before the claim, so that no claim is ever without a heartbeat
        try:
            claim = {**_me(), "attempt": self.attempt, "token": self.token}
            store.put(self._key(self.attempt), json.dumps(claim).encode(), create=True)
        except AlreadyExistsError as exc:
            raise _held(store.url, _parse(store.get(self._key(self.attempt)))) from exc
        try:
            store.delete([key for old in claims for key in (self._key(old), self._key(old, "beat"))])
        except CheckpointError as exc:
            _log.warning("lease.claims.kept url=%s cause=%s (the highest counts)", store.url, exc)
        self._stop = threading.Event()
        _leases.add(self)
        beat = (weakref.ref(self), self._stop, ttl_s / 3)
        self._thread = threading.Thread(target=_keep, args=beat, name="ckptmgr-lease", daemon=True)
        self._thread.start()

    def _key(self, attempt: int, kind: str = "json") -> str:
        return f"{FOLDER}/lease/{attempt:010d}.{kind}"

    def _living_owner(self, attempt: int) -> dict[str, Any] | None:
        """The owner of a claim, or None when it released it, died on this host, or fell silent.
        Blocks while that can't be told."""
        first: Any = None
        while True:
            try:
                owner = _parse(self._store.get(self._key(attempt)))
                beat = _parse(self._store.get(self._key(attempt, "beat")))
            except NotFoundError:
                return None  # just taken over; the create decides
            alive = _is_alive(owner)
            if beat.get("released") or alive is False or self._silence_s(attempt, beat) > self._ttl_s:
                return None
            if alive or (first is not None and beat != first):
                return owner
            if first is None:
                _log.warning(
                    "lease.wait url=%s holder=%s:%s until it shows a sign of life, %g s at most",
                    self._store.url, owner.get("host"), owner.get("pid"), self._ttl_s,
                )  # fmt: skip
            first = beat
            self._pause(self._ttl_s / 12)

    def _silence_s(self, attempt: int, beat: dict[str, Any]) -> float:
        """Seconds since the last heartbeat, by the store's clock: hosts' clocks may disagree."""
        probe = f"{FOLDER}/lease/clock-{secrets.token_hex(8)}"
        self._store.put(probe, b"")
        try:
            now, last = self._store.stat(probe), self._store.stat(self._key(attempt, "beat"))
        finally:
            self._store.delete([probe])
        if now is not None and last is not None and now.modified is not None and last.modified is not None:
            return now.modified - last.modified
        try:
            return (self._now() - datetime.fromisoformat(beat["time"])).total_seconds()
        except (KeyError, ValueError, TypeError):
            return 0.0

    def _beat(self, *, released: bool) -> None:
        beat = {"time": self._now().isoformat(), "released": released}
        self._store.put(self._key(self.attempt, "beat"), json.dumps(beat).encode())

    def beat(self) -> None:
        """Show a sign of life; that the store does not take it is a warning."""
        try:
            self._beat(released=False)
        except CheckpointError as exc:
            _log.warning("lease.beat.failed url=%s cause=%s", self._store.url, exc)

    def check(self) -> None:
        newer = [attempt for attempt in _claims(self._store) if attempt > self.attempt]
        if newer:
            raise _held(self._store.url, _parse(self._store.get(self._key(max(newer)))))
        if self._stop.is_set():
            raise FencedError(f"the lease on {self._store.url} was released; open a new manager to write")

    def release(self) -> None:
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(_JOIN_S)  # a store that does not answer must not keep us here
        try:
            self._beat(released=True)
        except CheckpointError as exc:
            _log.warning("lease.release.failed url=%s cause=%s (it runs out by itself)", self._store.url, exc)


def _keep(held: weakref.ref[Lease], stop: threading.Event, every_s: float) -> None:
    """Beats until the lease is released, or dropped: the thread itself does not keep it alive."""
    while not stop.wait(every_s):
        lease = held()
        if lease is None:
            return
        lease.beat()
        del lease
