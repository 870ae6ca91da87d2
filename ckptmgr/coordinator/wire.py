"""How do small values get from rank to rank? Through the job's own store, without ever hanging.

A client of `torch.distributed`'s store waits without limit for a host that was stopped. Here a thread of
its own asks, and whoever waits for the answer gives up in time.
"""

from __future__ import annotations

import copy
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from ..errors import CoordinationError

T = TypeVar("T")

_LARGEST = 4 << 20  # bytes of one value; TCPStore takes 8 MiB


class Wire:
    """A prefix of the job's store. Methods raise `CoordinationError` when it does not answer in time."""

    def __init__(self, store: Any, timeout_s: float) -> None:
        self._store, self._timeout_s = store, timeout_s
        self._asked: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(self._asked,), name="ckptmgr-wire", daemon=True).start()

    def within(self, limit_s: float) -> Wire:
        """The same wire, whose calls give up sooner."""
        quick = copy.copy(self)
        quick._timeout_s = min(limit_s, self._timeout_s)
        return quick

    def put(self, key: str, data: bytes) -> None:
        """Set a key that nobody has set; whoever sees it finds all of it."""
        parts = [data[at : at + _LARGEST] for at in range(0, len(data), _LARGEST)]
        for number, part in enumerate(parts[1:], 1):
            self._ask(self._store.set, f"{key}.{number}", part)
        head = f"{len(parts)}:".encode() + (parts[0] if parts else b"")
        self._ask(self._store.set, key, head)

    def get(self, key: str) -> bytes:
        """The value of a key that is there."""
        count, _, data = self._ask(self._store.get, key).partition(b":")
        rest = (self._ask(self._store.get, f"{key}.{number}") for number in range(1, int(count)))
        return bytes(data + b"".join(rest))

    def has(self, keys: Sequence[str]) -> bool:
        """Whether all of them are there."""
        return bool(self._ask(self._store.check, list(keys)))

    def add(self, key: str, number: int) -> int:
        """Add to a counter, and answer what it is then."""
        return int(self._ask(self._store.add, key, number))

    def delete(self, key: str) -> None:
        """Forget a key and its further parts."""
        count, _, _ = self._ask(self._store.get, key).partition(b":")
        for number in range(1, int(count)):
            self._ask(self._store.delete_key, f"{key}.{number}")
        self._ask(self._store.delete_key, key)

    def drop(self, counter: str) -> None:
        """Forget a counter."""
        self._ask(self._store.delete_key, counter)

    def close(self) -> None:
        """End the thread, once it has done what it was asked."""
        self._asked.put(None)

    def _ask(self, call: Callable[..., T], *arguments: Any) -> T:
        future: Future[T] = Future()
        self._asked.put((future, lambda: call(*arguments)))
        try:
            return future.result(self._timeout_s)
        except TimeoutError as exc:
            raise CoordinationError(
                f"the store of this job has not answered for {self._timeout_s:g} s: its host, rank 0 or the launcher, "
                "has stopped or can't be reached"
            ) from exc
        except RuntimeError as exc:  # what torch.distributed raises
            raise CoordinationError(
                f"the store of this job is gone, and with it its host, rank 0 or the launcher: {_first_line(exc)}"
            ) from exc


def _serve(asked: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]) -> None:
    while (item := asked.get()) is not None:
        future, call = item
        try:
            future.set_result(call())
        except BaseException as exc:  # noqa: BLE001 - raised where the answer is waited for
            future.set_exception(exc)
        del item, future, call


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
