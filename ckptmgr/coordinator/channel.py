"""Do all ranks make the same call, and what became of it? Turns over a `Wire`, each with one outcome for all.

Every rank puts its part under a key of its own; rank 0 waits for all of them, decides, and puts the verdict.
So whoever waits can see by itself which ranks have not come. Nobody waits longer than the timeout for one
that has not come, or shows no sign of life.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from ..errors import CoordinationError
from .outcome import Failure, Message, Outcome, attempt
from .wire import Wire

T = TypeVar("T")
R = TypeVar("R")

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.0002, 0.02  # between looks at what others have put
_LOOKS_S = 0.5  # between looks at signs of life
_MARGIN_S = 0.5  # that rank 0's verdict may take to come, and to be read
_QUICK_S = 0.5  # for the store to say more of a problem that is known: it may be what does not answer
_BEATS = 2.5  # periods without a sign of life mean that there is none


_ENDED = "ended"  # the key under which a rank says that they are out of step, and why


class Pulse:
    """Signs of life: a counter per rank that a thread of each process raises, until stopped or killed."""

    def __init__(self, wire: Wire, rank: int, world_size: int, timeout_s: float) -> None:
        self._wire, self._rank, self._world_size = wire, rank, world_size
        self._quick = wire.within(_QUICK_S)
        # Thousands of ranks must not keep the store busy with nothing but this.
        self.period_s = min(max(0.5, world_size / 500), timeout_s / 10)
        self._ended = threading.Event()
        self._beat()
        threading.Thread(target=self._go_on, name="ckptmgr-pulse", daemon=True).start()

    def of(self, rank: int) -> int:
        """A number that changes as long as the rank lives."""
        return self._wire.add(f"alive/{rank}", 0)

    def without(self, ranks: Sequence[int]) -> list[int]:
        """Those of the ranks that show no sign of life. Blocks for a few periods."""
        before = self._signs(ranks)
        self._ended.wait(_BEATS * self.period_s)
        after = self._signs(ranks)
        return [rank for rank in ranks if after[rank] == before[rank]]

    def _signs(self, ranks: Sequence[int]) -> dict[int, int]:
        return {rank: self._quick.add(f"alive/{rank}", 0) for rank in ranks}

    def stop(self) -> None:
        self._ended.set()

    def _beat(self) -> None:
        self._wire.add(f"alive/{self._rank}", 1)

    def _go_on(self) -> None:
        while not self._ended.wait(self.period_s):
            with suppress(CoordinationError):  # whoever asks something hears of it; the store may come back
                self._beat()


class Fate:
    """Whether the ranks are still in step; once one of them knows that they are not, all are told, and
    are asked nothing any more."""

    def __init__(self, wire: Wire) -> None:
        self._wire, self._quick = wire, wire.within(_QUICK_S)
        self.problem: str | None = None

    def check(self) -> None:
        """Raises `CoordinationError` when this rank knows of a problem."""
        if self.problem is not None:
            raise CoordinationError(f"{self.problem} (so the ranks are not asked any more; restart the job to go on)")

    def ask(self) -> None:
        """Raises `CoordinationError` when any rank knows of one."""
        if self._wire.has([_ENDED]):
            raise self.end(self._wire.get(_ENDED).decode())

    def end(self, problem: str) -> CoordinationError:
        """The error to raise."""
        if self.problem is None:
            self.problem = problem
            with suppress(CoordinationError):  # without the store the others find out by themselves
                if not self._quick.has([_ENDED]):
                    self._quick.put(_ENDED, problem.encode())
        return CoordinationError(problem)


class StoreChannel:
    """See `Channel`. `is_patient`: a rank that has not come yet is waited for as long as it lives."""

    def __init__(
        self,
        name: str,
        wire: Wire,
        pulse: Pulse,
        fate: Fate,
        rank: int,
        world_size: int,
        timeout_s: float,
        *,
        is_patient: bool,
    ) -> None:
        self._name, self._wire, self._pulse, self._fate = name, wire, pulse, fate
        self._rank, self._world_size, self._timeout_s = rank, world_size, timeout_s
        self._is_patient = is_patient
        self._count = 0
        self._read: list[tuple[str, list[str]]] = []  # turns that others may still have to read, with their keys

    def exchange(self, what: str, mine: Callable[[], T], decide: Callable[[Sequence[T]], R]) -> R:
        """See `Channel.exchange`."""
        turn = self._begin()
        part = attempt(mine, self._rank)
        return self._conclude(turn, what, part, decide)  # type: ignore[no-any-return]

    def first(self, what: str, make: Callable[[], R]) -> R:
        """See `Channel.first`."""
        turn = self._begin()
        verdict = Outcome() if self._rank else attempt(make, self._rank)
        with self._to_the_end(what, verdict):
            if self._rank:
                verdict = self._await_verdict(turn, what, is_gathered=False)
            else:
                verdict = self._tell(turn, what, verdict, [])
        return verdict.get()  # type: ignore[no-any-return]

    def _begin(self) -> str:
        self._fate.check()
        self._count += 1
        if not self._rank:
            self._forget()
        return f"{self._name}/{self._count}"

    @contextmanager
    def _to_the_end(self, what: str, own: Outcome) -> Iterator[None]:
        """Whoever leaves a turn on the way is out of step, and says so: else the others would wait for as long
        as it lives."""
        try:
            yield
        except CoordinationError as exc:
            raise self._fate.end(str(exc)) from (own.cause or exc)
        except BaseException as exc:  # an interrupt, or a part that can't be unpickled here
            self._fate.end(f"{what}: rank {self._rank} left it half-way: {type(exc).__name__}: {exc}")
            raise

    def _conclude(self, turn: str, what: str, part: Outcome, decide: Callable[[Sequence[Any]], Any]) -> Any:
        own = f"{turn}/{self._rank}"
        with self._to_the_end(what, part):
            self._wire.put(own, part.to_bytes(what, self._rank))
            if self._rank:
                verdict = self._await_verdict(turn, what, is_gathered=True)
            else:
                verdict = self._judge(turn, what, part, decide)
        failure = verdict.failure
        if failure is not None and failure.rank == self._rank and part.cause is not None:
            verdict = Outcome(failure=failure, cause=part.cause)
        elif isinstance(part.cause, BaseException) and not isinstance(part.cause, Exception):
            raise part.cause
        return verdict.get()

    def _judge(self, turn: str, what: str, own: Outcome, decide: Callable[[Sequence[Any]], Any]) -> Outcome:
        """On rank 0: the verdict, which has been told."""
        keys = [f"{turn}/{rank}" for rank in range(self._world_size)]
        watch = _Watch(self._pulse, self._timeout_s)
        missing = self._wait_for_all(keys, watch)
        if missing:
            problem = f"{what}: {watch.names(missing)} did not come within {self._timeout_s:g} s"
            failure = Failure(CoordinationError.__name__, problem, 0, ends=True)
            self._tell(turn, what, Outcome(failure=failure), keys)
            self._let_read(turn, self._world_size - 1 - len(missing))
            raise CoordinationError(problem)
        self._wire.put(f"{turn}/gathered", b"")
        parts = [Message(what, own.value, own.failure)]
        parts += [Message.from_bytes(self._wire.get(key)) for key in keys[1:]]
        odd = [f"rank {rank} called {part.what}" for rank, part in enumerate(parts) if part.what != what]
        failures = [part.failure for part in parts if part.failure is not None]
        if odd:
            problem = f"rank 0 called {what}, but {', '.join(odd[:5])}: every rank must make the same calls"
            verdict = Outcome(failure=Failure(CoordinationError.__name__, problem, 0, ends=True))
        elif failures:
            verdict = Outcome(failure=failures[0])
        else:
            verdict = attempt(lambda: decide([part.value for part in parts]), 0)
        verdict = self._tell(turn, what, verdict, [*keys, f"{turn}/gathered"])
        if odd:
            raise CoordinationError(problem)
        return verdict

    def _wait_for_all(self, keys: Sequence[str], watch: _Watch) -> list[int]:
        """The ranks that have not come in time."""
        absent = list(range(self._world_size))
        for _ in _pauses(self._world_size):
            if self._wire.has(keys):
                return []
            if watch.is_due():
                self._fate.ask()
                absent = [rank for rank in absent if not self._wire.has([keys[rank]])]
                late = [rank for rank in absent if watch.is_late(rank, self._is_patient)]
                if late:
                    return late
        raise AssertionError

    def _await_verdict(self, turn: str, what: str, *, is_gathered: bool) -> Outcome:
        """On the other ranks: what rank 0 tells. `is_gathered`: it waits for all ranks first."""
        watch = _Watch(self._pulse, self._timeout_s)
        has_come = has_all = not is_gathered
        for _ in _pauses(self._world_size):
            if self._wire.has([f"{turn}/verdict"]):
                break
            if not watch.is_due():
                continue
            self._fate.ask()
            if not has_come and self._wire.has([f"{turn}/0"]):
                has_come = True
                watch.begin(_MARGIN_S)  # from now on it waits for the others
            if has_come and not has_all and self._wire.has([f"{turn}/gathered"]):
                has_all = True
                watch.begin(0)
            # It waits for others no longer than we do; its own work may take as long as it lives.
            if watch.is_late(0, has_all or self._is_patient):
                keys = [f"{turn}/{rank}" for rank in range(self._world_size)] if is_gathered else []
                missing = [rank for rank, key in enumerate(keys) if not self._wire.has([key])] or [0]
                done = "was not heard of" if has_come else "did not come"
                raise self._fate.end(f"{what}: {watch.names(missing)} {done} within {self._timeout_s:g} s")
        told = Message.from_bytes(self._wire.get(f"{turn}/verdict"))
        self._wire.add(f"{turn}/read", 1)
        if told.failure is not None and told.failure.ends:
            raise self._fate.end(told.failure.text)
        if told.what != what:
            raise self._fate.end(
                f"rank 0 called {told.what}, but rank {self._rank} called {what}: every rank must make the same calls"
            )
        return Outcome(told.value, told.failure)

    def _tell(self, turn: str, what: str, verdict: Outcome, keys: Sequence[str]) -> Outcome:
        """Put the verdict; what can't be pickled becomes a failure for this rank, too."""
        data = verdict.to_bytes(what, self._rank)
        self._wire.put(f"{turn}/verdict", data)
        self._read.append((turn, [*keys, f"{turn}/verdict"]))
        if verdict.failure is None and (failure := Message.from_bytes(data).failure) is not None:
            return Outcome(failure=failure)
        return verdict

    def _forget(self) -> None:
        """Remove the keys of turns that all have read."""
        while self._read and self._wire.add(f"{self._read[0][0]}/read", 0) == self._world_size - 1:
            turn, keys = self._read.pop(0)
            for key in keys:
                self._wire.delete(key)
            self._wire.drop(f"{turn}/read")

    def linger(self, limit_s: float) -> None:
        """On rank 0, which may be the store's host: wait until all have read what they were told. Blocks, for no
        longer than the limit in seconds."""
        until = time.monotonic() + limit_s
        with suppress(CoordinationError):
            for _ in _pauses():
                self._forget()
                if not self._read or self._fate.problem is not None or time.monotonic() > until:
                    return

    def _let_read(self, turn: str, count: int) -> None:
        """Give so many ranks a moment to read the verdict: the store may be this process's, which is about to end."""
        until = time.monotonic() + _MARGIN_S
        with suppress(CoordinationError):
            for _ in _pauses():
                if self._wire.add(f"{turn}/read", 0) >= count or time.monotonic() > until:
                    return


class _Watch:
    """Since when is somebody waited for?"""

    def __init__(self, pulse: Pulse, timeout_s: float) -> None:
        self._pulse, self._timeout_s = pulse, timeout_s
        self._looked = time.monotonic()
        self._signs: dict[int, tuple[int, float]] = {}
        self.begin(0)

    def begin(self, margin_s: float) -> None:
        self._began = time.monotonic()
        self._limit_s = self._timeout_s + margin_s

    def is_due(self) -> bool:
        """Whether it is time to look at signs of life again."""
        now, before = time.monotonic(), self._looked
        if now - before < min(_LOOKS_S, self._timeout_s / 10):
            return False
        self._looked = now
        if now - before > self._timeout_s / 2:  # this process was stopped meanwhile, and so perhaps were all
            self._began = now
            self._signs.clear()
        return True

    def is_late(self, rank: int, is_patient: bool) -> bool:
        """Whether a rank was waited for long enough: from the beginning or, with patience, its last sign of life."""
        now, seen = time.monotonic(), self._seen(rank)
        return now - (max(self._began, seen) if is_patient else self._began) > self._limit_s

    def names(self, ranks: Sequence[int]) -> str:
        """The ranks in words, and whether they live. Blocks where that is not known yet."""
        if unknown := [rank for rank in ranks if rank not in self._signs]:
            for rank in unknown:
                self._seen(rank)
            time.sleep(_BEATS * self._pulse.period_s)
        now = time.monotonic()
        silent = {rank for rank in ranks if now - self._seen(rank) > _BEATS * self._pulse.period_s}
        named = [f"{rank} (no sign of life)" if rank in silent else f"{rank} (alive)" for rank in ranks[:8]]
        more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
        return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(named)}{more}"

    def _seen(self, rank: int) -> float:
        """When a new sign of life was seen."""
        sign = self._pulse.of(rank)
        if sign != self._signs.get(rank, (None, 0.0))[0]:
            self._signs[rank] = (sign, time.monotonic())
        return self._signs[rank][1]


def _pauses(world_size: int = 1) -> Iterator[None]:
    """Wait longer and longer between one look and the next, up to a limit that keeps many ranks from
    asking the store more than it can answer."""
    pause, longest = _FIRST_PAUSE_S, _LONGEST_PAUSE_S * max(1.0, world_size / 64)
    while True:
        yield None
        time.sleep(pause)
        pause = min(pause * 1.5, longest)
