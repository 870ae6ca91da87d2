"""How do the ranks of a job run in one process? As threads, each with a `ThreadRanks` for its coordinator."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from ..coordinator.channel import Fate, Pulse, StoreChannel
from ..coordinator.wire import Wire
from .thread_circle import ThreadCircle, _Table

__all__ = ["ThreadRanks"]

T = TypeVar("T")


class ThreadRanks:
    """A `Coordinator` whose ranks are in this process, with channels as in a real job, over a store in memory.

    `log` says how this rank has voted and what it has read, in order: ("cast", wanted), ("read", wanted by any).
    Nothing of it blocks as long as each rank has been called before what it does is waited for, so that a test
    may also call them one after the other, in one thread.
    """

    def __init__(self, job: _Job, rank: int) -> None:
        self._job = job
        self.rank, self.world_size = rank, job.world_size
        self.log: list[tuple[str, int]] = []
        self._wires = [Wire(job.store, job.timeout_s) for _ in range(3)]
        self._fate = Fate(self._wires[0])
        self._pulse = Pulse(self._wires[0], rank, job.world_size, job.timeout_s)
        self._ballots = 0
        self.prompt = self._channel("prompt", self._wires[1], is_patient=False)
        self.patient = self._channel("patient", self._wires[2], is_patient=True)

    @classmethod
    def make(cls, world_size: int, timeout_s: float = 10.0) -> list[ThreadRanks]:
        """So many ranks that know each other. Close each of them."""
        job = _Job(world_size, timeout_s)
        return [cls(job, rank) for rank in range(world_size)]

    @classmethod
    def run(
        cls,
        world_size: int,
        work: Callable[[ThreadRanks], T],
        timeout_s: float = 10.0,
        *,
        absent: Sequence[int] = (),
    ) -> list[T | BaseException | None]:
        """Do `work` on every rank at once; what each answered or raised, by rank. The `absent` ones are dead."""
        made = cls.make(world_size, timeout_s)
        results: list[Any] = [None] * world_size

        def one(ranks: ThreadRanks) -> None:
            try:
                results[ranks.rank] = work(ranks)
            except BaseException as exc:  # noqa: BLE001 - it is this rank's result
                results[ranks.rank] = exc

        for rank in absent:
            made[rank].close()
        present = [ranks for ranks in made if ranks.rank not in absent]
        threads = [threading.Thread(target=one, args=(ranks,), name=f"rank-{ranks.rank}") for ranks in present]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for ranks in present:
            ranks.close()
        return results

    @property
    def problem(self) -> str | None:
        return self._fate.problem

    def ballot(self) -> ThreadBallot:
        self._ballots += 1
        return ThreadBallot(self._job, self._ballots, self.rank, self._fate, self.log)

    def circle(self, mode: str) -> ThreadCircle:
        """All ranks, whatever the mode: they are of one node."""
        return ThreadCircle(self._job.table, self.rank)

    def close(self) -> None:
        self._pulse.stop()
        for wire in self._wires:
            wire.close()

    def _channel(self, name: str, wire: Wire, *, is_patient: bool) -> StoreChannel:
        job = self._job
        return StoreChannel(
            name, wire, self._pulse, self._fate, self.rank, job.world_size, job.timeout_s, is_patient=is_patient
        )


class ThreadBallot:
    """A `Ballot` of the ranks of this process."""

    def __init__(self, job: _Job, number: int, rank: int, fate: Fate, log: list[tuple[str, int]]) -> None:
        self._job, self._number, self._rank, self._fate, self._log = job, number, rank, fate, log
        self._cast = 0
        self.is_open = False

    def cast(self, wanted: int) -> None:
        self._fate.check()
        self._cast += 1
        self.is_open = True
        self._log.append(("cast", wanted))
        with self._job.voted:
            self._job.votes.setdefault((self._number, self._cast), {})[self._rank] = wanted
            self._job.voted.notify_all()

    def result(self) -> int:
        self._fate.check()
        if not self.is_open:
            return 0
        self.is_open = False
        votes = self._job.votes[self._number, self._cast]
        with self._job.voted:
            if not self._job.voted.wait_for(lambda: len(votes) == self._job.world_size, self._job.timeout_s):
                missing = sorted(set(range(self._job.world_size)) - votes.keys())
                problem = f"the ranks did not agree within {self._job.timeout_s:g} s; without a vote: {missing}"
                raise self._fate.end(problem)
            agreed = 0
            for wanted in votes.values():
                agreed |= wanted
        self._log.append(("read", agreed))
        return agreed


class _Job:
    """What the ranks share."""

    def __init__(self, world_size: int, timeout_s: float) -> None:
        from torch.distributed import HashStore  # type: ignore[attr-defined]

        self.world_size, self.timeout_s = world_size, timeout_s
        self.store = HashStore()
        self.store.set_timeout(timedelta(seconds=timeout_s))
        self.table = _Table(world_size, timeout_s)
        self.voted = threading.Condition()
        self.votes: dict[tuple[int, int], dict[int, int]] = {}
