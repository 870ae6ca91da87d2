"""What happens when a writer is frozen between two calls, and goes on after others have acted? `PausingStore`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from ..store import Store
from .store_around import StoreAround

__all__ = ["PausingStore"]

_UNCOUNTED = {"is_cached", "abort"}


class PausingStore(StoreAround):
    """Another store, before whose `at`-th call `meanwhile` is called, once.

    Every call counts, of readers and writers too, but for their `close`, `abort` and what costs nothing. What
    `meanwhile` does is done while the caller stands still: it may let another writer take over on `store`, or
    stop this process by a signal. `count` is the number of calls so far and `log` names them: (method, key).
    With `at=None` it only counts, so that a test can then freeze at each.
    """

    def __init__(self, store: Store, at: int | None = None, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.store, self.at, self.meanwhile = store, at, meanwhile
        self.log: list[tuple[str, str]] = []
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        return len(self.log)

    def turn(self, method: str, key: str) -> AbstractContextManager[None]:
        if method not in _UNCOUNTED:
            self.pause(method, key)
        return nullcontext()

    def pause(self, method: str, key: str) -> None:
        """Count a call, and stand still when it is its turn."""
        with self._lock:
            self.log.append((method, key))
            is_turn = self.count == self.at
        if is_turn:
            self.meanwhile()
