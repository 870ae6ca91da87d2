"""How do ranks that read together run in one process? As threads, each with a `ThreadCircle`."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ..errors import CoordinationError

__all__ = ["ThreadCircle"]

T = TypeVar("T")


class ThreadCircle:
    """A `Circle` whose ranks are threads of this process; rank 0 reads.

    Unlike a network it sees at once when ranks make different calls, or when one has ended while the others
    wait for it: all of them get a `CoordinationError`. `log` names this rank's calls so far: (method, bytes or items).
    """

    def __init__(self, table: _Table, rank: int) -> None:
        self._table = table
        self.rank, self.size, self.is_reader = rank, table.size, rank == 0
        self.log: list[tuple[str, int]] = []

    @classmethod
    def run(cls, size: int, work: Callable[[ThreadCircle], T], timeout_s: float = 10.0) -> list[T | BaseException]:
        """Do `work` on so many ranks at once; what each answered or raised, by rank."""
        table = _Table(size, timeout_s)
        results: list[Any] = [None] * size

        def rank(circle: ThreadCircle) -> None:
            try:
                results[circle.rank] = work(circle)
            except BaseException as exc:  # noqa: BLE001 - it is this rank's result
                results[circle.rank] = exc
            finally:
                table.leave(circle.rank)

        threads = [threading.Thread(target=rank, args=(cls(table, k),), name=f"rank-{k}") for k in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def broadcast(self, data: memoryview) -> None:
        self.log.append(("broadcast", data.nbytes))
        offered = self._table.meet(self.rank, ("broadcast", data.nbytes), data)
        if not self.is_reader:
            data[:] = offered[0]
        # Until all have copied, the reader's memory stays as it is.
        self._table.meet(self.rank, ("broadcast ends", data.nbytes), None)

    def union(self, items: list[T]) -> list[list[T]]:
        self.log.append(("union", len(items)))
        brought = self._table.meet(self.rank, ("union", 0), pickle.dumps(items))
        return [pickle.loads(of_rank) for of_rank in brought]  # noqa: S301 - made by these threads


class _Table:
    """Where the threads meet. Once they have missed each other it stays broken."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.size, self._timeout_s = size, timeout_s
        self._changed = threading.Condition()
        self._brought: dict[int, tuple[Any, Any]] = {}
        self._last: Sequence[Any] = ()
        self._meetings = 0
        self._gone: set[int] = set()
        self._broken: str | None = None

    def meet(self, rank: int, call: tuple[str, int], item: Any) -> Sequence[Any]:
        """What each rank brought to this meeting, by rank. Raises `CoordinationError`."""
        with self._changed:
            number = self._meetings
            self._brought[rank] = (call, item)
            if len(self._brought) == self.size and self._broken is None:
                self._begin()
            self._look()
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._meetings > number or self._broken, self._timeout_s):
                self._broken = f"rank {self._missing()} did not answer within {self._timeout_s:g} s"
                self._changed.notify_all()
            if self._meetings == number:
                raise CoordinationError(f"the ranks lost each other: {self._broken}")
            return self._last

    def leave(self, rank: int) -> None:
        """This rank makes no more calls."""
        with self._changed:
            self._gone.add(rank)
            self._look()
            self._changed.notify_all()

    def _begin(self) -> None:
        """All have come."""
        if len({call for call, _ in self._brought.values()}) > 1:
            self._broken = f"their calls differ: { {rank: call for rank, (call, _) in sorted(self._brought.items())} }"
        else:
            self._last = [self._brought[rank][1] for rank in range(self.size)]
            self._brought = {}
            self._meetings += 1

    def _look(self) -> None:
        """See whether those who wait do so in vain."""
        if self._brought and self._broken is None and (ended := self._gone - self._brought.keys()):
            self._broken = f"rank {min(ended)} has ended"

    def _missing(self) -> int:
        return min(set(range(self.size)) - self._brought.keys())
