"""All ranks make the same calls and learn the same outcome, or all learn who is missing; nobody waits for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from ckptmgr.coordinator import Solo
from ckptmgr.coordinator.channel import Fate, Pulse, StoreChannel
from ckptmgr.coordinator.wire import Wire
from ckptmgr.errors import (
    CheckpointError,
    ConfigError,
    CoordinationError,
    DamagedError,
    NotFoundError,
    RankError,
    StoreError,
)

TIMEOUT_S = 1.0


class UnpicklableError(Exception):
    """An error that can't be made again from its pickle."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")
        self.lock = threading.Lock()


class Job:
    """Ranks of one process, each a thread with a channel of its own over one store."""

    def __init__(self, world_size: int, *, is_patient: bool = False, alive: Sequence[int] | None = None) -> None:
        self.store = dist.HashStore()
        self.store.set_timeout(timedelta(seconds=5))
        self.pulses: list[Pulse] = []
        self.channels: list[StoreChannel] = []
        for rank in range(world_size):
            wire = Wire(self.store, 5)
            pulse = Pulse(wire, rank, world_size, TIMEOUT_S)
            if alive is not None and rank not in alive:
                pulse.stop()
            self.pulses.append(pulse)
            channel = StoreChannel("c", wire, pulse, Fate(wire), rank, world_size, TIMEOUT_S, is_patient=is_patient)
            self.channels.append(channel)

    def run(self, call: Callable[[StoreChannel, int], Any], ranks: Sequence[int] | None = None) -> list[Any]:
        """What each rank's call answers, or the error that it raises."""
        answers: list[Any] = [None] * len(self.channels)

        def one(rank: int) -> None:
            try:
                answers[rank] = call(self.channels[rank], rank)
            except BaseException as exc:  # noqa: BLE001 - it is what is asked for
                answers[rank] = exc

        ranks = range(len(self.channels)) if ranks is None else ranks
        threads = [threading.Thread(target=one, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive(), "a rank hangs"
        for pulse in self.pulses:
            pulse.stop()
        return answers


def failing(error: BaseException) -> Callable[[], Any]:
    def fail() -> Any:
        raise error

    return fail


def same(errors: Sequence[BaseException]) -> tuple[type, str]:
    """The class and text that all of them have."""
    (found,) = {(type(error), str(error)) for error in errors}
    return found


def test_every_rank_gets_what_rank_0_decides_on_all_parts() -> None:
    assert Job(4).run(lambda c, rank: c.exchange("add", lambda: rank, sum)) == [6, 6, 6, 6]


def test_parts_arrive_by_rank() -> None:
    assert Job(3).run(lambda c, rank: c.exchange("list", lambda: f"r{rank}", list)) == [["r0", "r1", "r2"]] * 3


def test_a_part_may_be_larger_than_the_store_takes_at_once() -> None:
    answers = Job(2).run(lambda c, rank: c.exchange("large", lambda: bytes([rank]) * (9 << 20), lambda parts: parts[1]))
    assert answers == [b"\1" * (9 << 20)] * 2


def test_only_rank_0_makes_what_all_get() -> None:
    made: list[int] = []
    answers = Job(3).run(lambda c, rank: c.first("make", lambda: made.append(rank) or "made"))
    assert (answers, made) == (["made"] * 3, [0])


def test_calls_follow_one_another_and_leave_nothing_in_the_store() -> None:
    job = Job(3)

    def calls(channel: StoreChannel, rank: int) -> int:
        return sum(channel.exchange("add", lambda: rank, sum) + channel.first("one", lambda: 1) for _ in range(20))

    assert job.run(calls) == [80, 80, 80]
    assert job.store.num_keys() < 20  # signs of life, and the turns that rank 0 has not seen read


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("kind", [ConfigError, NotFoundError, DamagedError])
def test_an_error_of_one_rank_is_the_same_on_all(rank: int, kind: type[CheckpointError]) -> None:
    def call(channel: StoreChannel, own: int) -> Any:
        return channel.exchange("part", failing(kind("broken")) if own == rank else lambda: own, sum)

    assert same(Job(3).run(call)) == (kind, f"rank {rank}: broken")


def test_what_rank_0_decides_wrongly_is_an_error_on_all() -> None:
    error = StoreError("disk full", 28)
    errors = Job(3).run(lambda c, rank: c.exchange("part", lambda: rank, lambda parts: failing(error)()))
    assert same(errors) == (StoreError, "rank 0: disk full")
    assert [one.errno for one in errors] == [28, 28, 28]


def test_an_error_that_no_pickle_carries_reaches_all_by_its_text() -> None:
    def call(channel: StoreChannel, rank: int) -> Any:
        return channel.exchange("part", failing(UnpicklableError("this", "that")) if rank == 1 else lambda: rank, sum)

    errors = Job(3).run(call)
    assert same(errors) == (RankError, "rank 1: UnpicklableError: this and that")
    assert isinstance(errors[1].__cause__, UnpicklableError)


def test_a_part_or_an_answer_that_no_pickle_carries_is_an_error_on_all() -> None:
    for call in (
        lambda c, rank: c.exchange("part", threading.Lock if rank else lambda: 1, len),
        lambda c, rank: c.exchange("part", lambda: 1, lambda _: threading.Lock()),
        lambda c, rank: c.first("part", threading.Lock),
    ):
        kind, text = same(Job(2).run(call))
        assert kind is RankError
        assert "pickle" in text


def test_the_ranks_stay_in_step_after_an_error() -> None:
    def call(channel: StoreChannel, rank: int) -> Any:
        with pytest.raises(ConfigError):
            channel.exchange("part", failing(ConfigError("odd")) if rank == 1 else lambda: rank, sum)
        with pytest.raises(NotFoundError):
            channel.first("make", failing(NotFoundError("nothing")))
        return channel.exchange("again", lambda: rank, sum)

    assert Job(3).run(call) == [3, 3, 3]


def test_an_interrupt_stays_one_on_its_rank_and_is_told_to_the_others() -> None:
    def call(channel: StoreChannel, rank: int) -> Any:
        return channel.exchange("part", failing(KeyboardInterrupt()) if rank == 1 else lambda: rank, sum)

    errors = Job(3).run(call)
    assert isinstance(errors[1], KeyboardInterrupt)
    assert same([errors[0], errors[2]]) == (RankError, "rank 1: KeyboardInterrupt: ")


@pytest.mark.parametrize("is_patient", [False, True])
@pytest.mark.parametrize("missing", [0, 1, 3])
def test_a_dead_rank_is_named_by_all_others_in_time(missing: int, is_patient: bool) -> None:
    others = [rank for rank in range(4) if rank != missing]
    job = Job(4, is_patient=is_patient, alive=others)
    errors = job.run(lambda c, rank: c.exchange("part", lambda: rank, sum), others)
    kind, text = same([errors[rank] for rank in others])
    assert kind is CoordinationError
    assert f"rank {missing} (no sign of life)" in text


def test_a_rank_that_lives_but_does_not_come_is_named_so() -> None:
    errors = Job(3).run(lambda c, rank: c.exchange("part", lambda: rank, sum), [0, 2])
    assert "rank 1 (alive) did not come within 1 s" in same([errors[0], errors[2]])[1]


def test_after_that_nothing_is_asked_any_more() -> None:
    job = Job(2, alive=[0])

    def calls(channel: StoreChannel, rank: int) -> Any:
        with pytest.raises(CoordinationError, match="rank 1"):
            channel.exchange("part", lambda: rank, sum)
        with pytest.raises(CoordinationError, match="not asked any more"):
            channel.exchange("part", lambda: pytest.fail("was asked"), sum)
        with pytest.raises(CoordinationError, match="not asked any more"):
            channel.first("part", lambda: pytest.fail("was asked"))
        return "done"

    assert job.run(calls, [0])[0] == "done"


def test_different_calls_are_told_apart() -> None:
    errors = Job(3).run(lambda c, rank: c.exchange("resume" if rank == 1 else "save", lambda: rank, sum))
    kind, text = same(errors)
    assert (kind, "rank 1 called resume" in text) == (CoordinationError, True)


def test_what_takes_rank_0_long_is_waited_for_as_long_as_it_lives() -> None:
    ended = threading.Event()

    def slow(parts: Sequence[int]) -> int:
        ended.wait(3 * TIMEOUT_S)
        return sum(parts)

    assert Job(2).run(lambda c, rank: c.exchange("part", lambda: rank, slow)) == [1, 1]


def test_a_patient_channel_waits_for_what_takes_another_rank_long() -> None:
    ended = threading.Event()

    def call(channel: StoreChannel, rank: int) -> Any:
        return channel.exchange("part", lambda: ended.wait(2.5 * TIMEOUT_S if rank else 0) or rank, list)

    assert Job(2, is_patient=True).run(call) == [[0, 1], [0, 1]]


def test_a_store_that_does_not_answer_is_an_error_in_time() -> None:
    class Stopped:
        def set(self, key: str, value: bytes) -> None:
            threading.Event().wait()

    with pytest.raises(CoordinationError, match=r"not answered for 0\.2 s"):
        Wire(Stopped(), 0.2).put("key", b"")


def test_a_store_that_is_gone_is_an_error() -> None:
    class Gone:
        def check(self, keys: list[str]) -> bool:
            raise dist.DistNetworkError("Connection reset by peer")

    with pytest.raises(CoordinationError, match="Connection reset by peer"):
        Wire(Gone(), 5).has(["key"])


def test_alone_a_rank_asks_itself() -> None:
    solo = Solo()
    assert solo.prompt.exchange("part", lambda: 2, sum) == 2
    assert solo.patient.first("make", lambda: 3) == 3
    with pytest.raises(KeyError):
        solo.first("make", failing(KeyError("its own error")))
    assert (solo.ballot(), solo.circle("rank0"), solo.problem) == (None, None, None)
