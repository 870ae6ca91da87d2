"""How does code behave on a store that dies or is slow? `CrashingStore`, `SlowStore`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

from ..store import Store
from .store_around import StoreAround

__all__ = ["Crash", "CrashingStore", "SlowStore"]

_CHANGES = {"put", "copy", "write", "write_at", "commit", "delete", "rename"}


class Crash(BaseException):
    """The process died here, as `kill -9` would have it: no handler of errors may see it as one."""


class CrashingStore(StoreAround):
    """Another store, until the `after`-th effect; there, and at every call after it, `Crash` is raised.

    Effects are `put`, `copy`, `writer`, `write`, `write_at`, `commit`, `delete` (each key is one) and `rename`. The one
    that crashes is not carried out (`when="before"`) or is, but nobody hears of it (`when="after"`).
    `count` is the number of effects so far and `log` names them: (method, key). With `after=None`
    it only counts, so that a test can then crash at each.
    """

    def __init__(self, store: Store, after: int | None = None, when: Literal["before", "after"] = "before") -> None:
        self.store, self.after, self.when = store, after, when
        self.log: list[tuple[str, str]] = []
        self._dead = False
        self._lock = threading.RLock()

    @property
    def count(self) -> int:
        return len(self.log)

    def turn(self, method: str, key: str) -> AbstractContextManager[None]:
        if method in _CHANGES or method == "writer":
            return _Effect(self, method, key)
        self.check()
        return nullcontext()

    def delete(self, keys: Iterable[str]) -> None:
        self.check()  # there may be no keys
        super().delete(keys)

    def check(self) -> None:
        """Raises `Crash` when the crash has been."""
        if self._dead:
            raise Crash("a dead process does nothing more")


class _Effect(AbstractContextManager[None]):
    """A block that is one effect: counted, and crashed when it is its turn."""

    def __init__(self, store: CrashingStore, method: str, key: str) -> None:
        self._store, self._method, self._key = store, method, key
        self._last = False

    def __enter__(self) -> None:
        with self._store._lock:
            self._store.check()
            self._store.log.append((self._method, self._key))
            self._last = self._store.count == self._store.after
            self._store._dead = self._last
        if self._last and self._store.when == "before":
            raise Crash(f"before {self._method} {self._key}")

    def __exit__(self, *raised: object) -> None:
        if self._last:
            raise Crash(f"after {self._method} {self._key}")


class SlowStore(StoreAround):
    """Another store whose effects wait: `delay_s` seconds each, and until `gate` is set where one is given.

    A test holds a save in the background by a gate that it sets when it has seen enough; no sleep is needed.
    """

    def __init__(self, store: Store, delay_s: float = 0.0, gate: threading.Event | None = None) -> None:
        self.store, self.delay_s, self.gate = store, delay_s, gate
        self.waiting = threading.Event()  # set once an effect waits at the gate

    def turn(self, method: str, key: str) -> AbstractContextManager[None]:
        if method in _CHANGES:
            self.wait()
        return nullcontext()

    def wait(self) -> None:
        if self.delay_s:
            time.sleep(self.delay_s)
        if self.gate is not None:
            self.waiting.set()
            self.gate.wait()
