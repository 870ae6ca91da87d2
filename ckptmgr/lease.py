"""How does a writer hold a root where no kernel keeps a lock? By a claim, and a heartbeat.

The claim `.ckptmgr/lease/<attempt>.json` is created once, and the highest one holds; where the store
creates unconditionally, of two of the same number the one whose token stands in it. The heartbeat
`<attempt>.beat` is written only by its owner, so no compare and swap is needed.

Silence is measured by the store's clock. That of a local folder is this host's, which may jump, and a store
that tells no times leaves the clocks of two hosts, which may differ: there a silent owner is watched
for longer than a heartbeat takes before its place is taken, whatever the clocks say.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import threading
import time
import weakref
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from .errors import AlreadyExistsError, CheckpointError, FencedError, NotFoundError
from .owner import held, is_alive, is_me, me, parse
from .store import Store
from .store.haste import in_haste
from .untrusted import MAX_RECORD_SIZE

_FOLDER = ".ckptmgr/lease"
_CLAIM = re.compile(r"([0-9]{1,18})\.json")
_JOIN_S = 10.0
_BEATS = 3  # in a ttl
_LOOKS = 12  # in a ttl, while it is not clear whether the owner lives

_log = logging.getLogger("ckptmgr.lock")


def claims(store: Store) -> list[int]:
    """The attempts that somebody has claimed."""
    return [attempt for attempt in map(_claimed, _names(store)) if attempt is not None]


def _names(store: Store) -> list[str]:
    return [entry.name for entry in store.list(_FOLDER)]


def _claimed(name: str) -> int | None:
    match = _CLAIM.fullmatch(name)
    return int(match[1]) if match else None


def _now() -> datetime:
    return datetime.now(UTC)


class Lease:
    """A claim with a heartbeat every third of `ttl_s`, from a thread of its own."""

    def __init__(
        self,
        store: Store,
        *,
        floor: int,
        takeover: bool,
        ttl_s: float,
        announce: Callable[[int], None] = lambda attempt: None,
        now: Callable[[], datetime] = _now,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store, self._ttl_s, self._now, self._pause = store, ttl_s, now, pause
        self.token = secrets.token_hex(8)
        self._stop = threading.Event()
        self._pid = os.getpid()
        earlier = claims(store)
        if earlier and self._may_go_on(max(earlier), takeover):
            announce(max(earlier))
        self.attempt = max([floor, *earlier]) + 1
        self._claim(max(earlier, default=0))
        _leases.add(self)
        beat = (weakref.ref(self), self._stop, ttl_s / _BEATS)
        self._thread = threading.Thread(target=_keep, args=beat, name="ckptmgr-lease", daemon=True)
        self._thread.start()

    def _claim(self, last: int) -> None:
        """Claim the root by the number that this one has, when `last` was the highest that anyone had claimed."""
        self._beat(released=False)  # before the claim, so that no claim is ever without a heartbeat
        claim = {**me(), "attempt": self.attempt, "token": self.token}
        try:
            self._store.put(self._key(self.attempt), json.dumps(claim).encode(), create=True)
        except AlreadyExistsError as exc:
            owner = self._owner(self.attempt)
            if owner.get("token") != self.token:  # else the answer to our own was lost
                raise held(self._store.url, owner) from exc
        # What was seen at the beginning may be long ago: a process can be frozen between any two steps.
        self.check()
        if between := [attempt for attempt in claims(self._store) if last < attempt < self.attempt]:
            # It was faster, though by a lower number.
            self._store.delete([self._key(self.attempt), self._key(self.attempt, "beat")])
            raise held(self._store.url, self._owner(max(between)))
        self._clear()

    def rise(self, floor: int) -> None:
        """See `WriterLock`."""
        self.check()
        before, self.attempt = self.attempt, max(floor, self.attempt) + 1
        try:
            self._claim(before)
        except BaseException:
            self.attempt = before
            raise

    def _key(self, attempt: int, kind: str = "json") -> str:
        return f"{_FOLDER}/{attempt:010d}.{kind}"

    def _owner(self, attempt: int) -> dict[str, Any]:
        try:
            return parse(self._store.get(self._key(attempt), 0, MAX_RECORD_SIZE))
        except NotFoundError:
            return {}

    def _clear(self) -> None:
        """Remove the claims, heartbeats and probes of earlier ones."""
        mine = f"{self.attempt:010d}"
        try:
            old = [name for name in _names(self._store) if name < mine or name.startswith("clock-")]
            self._store.delete([f"{_FOLDER}/{name}" for name in old])
        except CheckpointError as exc:
            _log.warning("lease.claims.kept url=%s cause=%s (the highest counts)", self._store.url, exc)

    def _may_go_on(self, attempt: int, takeover: bool) -> bool:
        """Wait until the owner of a claim has released it, died on this host, or fallen silent; whether it may
        still be alive all the same. Raises `FencedError` when it shows that it is, unless `takeover`."""
        first: Any = None
        watched_s = 0.0
        while True:
            owner = self._owner(attempt)
            try:
                beat = parse(self._store.get(self._key(attempt, "beat"), 0, MAX_RECORD_SIZE))
            except NotFoundError:
                return True  # just taken over; the create decides
            alive = _lives(owner)
            if beat.get("released") or alive is False:
                return False
            if takeover:
                return True
            if first is not None and beat != first:
                raise held(self._store.url, owner)
            silence_s, is_sure = self._silence_s(attempt, beat)
            is_silent = silence_s > self._ttl_s
            if watched_s >= self._ttl_s or (is_silent and (is_sure or watched_s > self._ttl_s / _BEATS)):
                return True
            if alive and not is_silent:
                raise held(self._store.url, owner)
            if first is None:
                _log.warning(
                    "lease.wait url=%s holder=%s:%s until it shows a sign of life, %g s at most",
                    self._store.url, owner.get("host"), owner.get("pid"), self._ttl_s,
                )  # fmt: skip
            first = beat
            self._pause(self._ttl_s / _LOOKS)
            watched_s += self._ttl_s / _LOOKS

    def _silence_s(self, attempt: int, beat: dict[str, Any]) -> tuple[float, bool]:
        """Seconds since the last heartbeat, and whether the clock that says so is one that does not jump."""
        probe = f"{_FOLDER}/clock-{secrets.token_hex(8)}"
        self._store.put(probe, b"")
        try:
            now, last = self._store.stat(probe), self._store.stat(self._key(attempt, "beat"))
        finally:
            self._store.delete([probe])
        if now is not None and last is not None and now.modified is not None and last.modified is not None:
            return now.modified - last.modified, self._store.path is None
        try:
            return (self._now() - datetime.fromisoformat(beat["time"])).total_seconds(), False
        except (KeyError, ValueError, TypeError):
            return 0.0, False

    def _beat(self, *, released: bool) -> None:
        beat = {"time": self._now().isoformat(), "released": released, "sign": secrets.token_hex(4)}
        self._store.put(self._key(self.attempt, "beat"), json.dumps(beat).encode())

    def beat(self) -> None:
        """Show a sign of life; that the store does not take it is a warning."""
        try:
            with in_haste(self._ttl_s / _BEATS):  # the next one comes in time, whatever happens to this
                self._beat(released=False)
        except CheckpointError as exc:
            _log.warning("lease.beat.failed url=%s cause=%s", self._store.url, exc)

    def check(self) -> None:
        """Raises `FencedError` when the claim is not the highest, or not this one's. Asks the store."""
        if self._pid != os.getpid():
            raise FencedError(
                f"{self._store.url} is written by the process that this one was forked from, not by this one"
            )
        newest, owner = self._holder()
        if owner.get("token") != self.token:
            newest, owner = self._holder()  # whoever took over may have removed this claim between the two looks
        if newest > self.attempt or owner.get("token") != self.token:
            self._stop.set()  # no more signs of life
            raise held(self._store.url, owner)
        if self._stop.is_set():
            raise FencedError(f"the lease on {self._store.url} was released; open a new manager to write")

    def _holder(self) -> tuple[int, dict[str, Any]]:
        newest = max(claims(self._store), default=self.attempt)
        return newest, self._owner(newest)

    def release(self) -> None:
        """Let the next writer in at once. May be repeated."""
        if self._stop.is_set() or self._pid != os.getpid():  # a forked child has none to release
            return
        self._stop.set()
        self._thread.join(_JOIN_S)  # a store that does not answer must not keep us here
        try:
            with in_haste(self._ttl_s / _BEATS):
                self._beat(released=True)
        except CheckpointError as exc:
            _log.warning("lease.release.failed url=%s cause=%s (it runs out by itself)", self._store.url, exc)


_leases: weakref.WeakSet[Lease] = weakref.WeakSet()  # those of this process that nobody dropped


def _lives(owner: dict[str, Any]) -> bool | None:
    if is_me(owner):
        # One whose release did not reach the store has ended all the same.
        return any(lease.token == owner.get("token") and not lease._stop.is_set() for lease in list(_leases))
    return is_alive(owner)


def _keep(lease_ref: weakref.ref[Lease], stop: threading.Event, every_s: float) -> None:
    """Beats until the lease is released, or dropped: the thread itself does not keep it alive."""
    due = time.monotonic() + every_s
    while not stop.wait(max(0.0, due - time.monotonic())):
        due = max(due + every_s, time.monotonic())  # however long the one before has taken
        lease = lease_ref()
        if lease is None:
            return
        lease.beat()
        del lease
