"""All ranks decide the same at the same call, whoever wanted it, and nothing that was wanted is lost or done twice."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptmgr.errors import CoordinationError, RankError
from ckptmgr.joint_schedule import JointSchedule
from ckptmgr.schedule import Schedule
from ckptmgr.signals import SignalWatch
from ckptmgr.testing import ThreadRanks
from ckptmgr.triggers import AnyOf, Every, EveryEpochs, EverySteps, Moment, OnRequest, OnSignals, Trigger, When

SIGNALS = ("SIGTERM", "SIGUSR1")


class Clock:
    """A rank's own: begins anywhere, and runs at a rate of its own."""

    def __init__(self, offset: float = 0.0, rate: float = 1.0) -> None:
        self.now, self.rate = offset, rate

    def __call__(self) -> float:
        return self.now

    def go_on(self, seconds: float) -> None:
        self.now += seconds * self.rate


class Rank:
    """One rank's loop, as the manager runs it: what it does at each call."""

    def __init__(self, ranks: ThreadRanks, rules: Sequence[Trigger], clock: Clock) -> None:
        self.ranks, self.clock = ranks, clock
        self.signals = SignalWatch(SIGNALS)
        rule = AnyOf((*rules, OnRequest(), OnSignals(SIGNALS)))
        self.schedule = JointSchedule(Schedule(rule, self.signals, clock), ranks)
        self.reasons: dict[int, str] = {}  # of saves, by step
        self.votes: list[tuple[int, int]] = []  # how many were cast and read, at each call
        self.troubles: list[int] = []

    def call(
        self,
        step: int,
        epoch: int | None = None,
        metrics: Mapping[str, float] | None = None,
        *,
        seconds: float = 0.1,
        trouble: bool = False,
    ) -> None:
        self.clock.go_on(seconds)
        if not self.schedule.is_quiet(step, epoch):
            if self.schedule.listen():
                self.troubles.append(step)
            decision = self.schedule.decide(step, epoch, metrics or {})
            if decision:
                self.reasons[step] = decision.reason or ""
                self.schedule.saved(step, epoch)
            self.schedule.vote(step, epoch, metrics or {}, trouble=trouble)
        kinds = [kind for kind, _ in self.ranks.log]
        self.votes.append((kinds.count("cast"), kinds.count("read")))

    @property
    def saved(self) -> list[int]:
        return list(self.reasons)


@contextmanager
def job(
    world_size: int, rules: Callable[[int], Sequence[Trigger]], clocks: Sequence[Clock] = ()
) -> Iterator[list[Rank]]:
    """Ranks to be called one after the other: each has voted when the next call reads."""
    made = ThreadRanks.make(world_size)
    try:
        yield [Rank(one, rules(one.rank), clocks[one.rank] if clocks else Clock()) for one in made]
    finally:
        for one in made:
            one.close()


def saves(ranks: Sequence[Rank]) -> list[int]:
    """The steps saved, the same by all."""
    assert [rank.saved for rank in ranks] == [ranks[0].saved] * len(ranks)
    return ranks[0].saved


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_all_ranks_vote_read_and_save_at_the_same_calls_and_answer_whatever_was_asked(data: st.DataObject) -> None:
    """With skewed clocks, and signals and requests on any rank at any time."""
    clocks = [
        Clock(data.draw(st.floats(-1e6, 1e6)), data.draw(st.sampled_from([0.5, 0.97, 1.0, 3.0]))) for _ in range(3)
    ]
    rules = [EverySteps(data.draw(st.integers(2, 9))), EveryEpochs(1), Every(timedelta(seconds=0.05)), When(odd)]
    chosen = data.draw(st.lists(st.sampled_from(rules), unique=True))
    seconds = data.draw(st.sampled_from([0.001, 0.007, 0.1]))
    asked = data.draw(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 2), st.booleans()), max_size=4))
    with job(3, lambda rank: chosen, clocks) as ranks:
        for step in range(1, 131):
            for at, rank, by_signal in asked:
                if at == step and by_signal:
                    ranks[rank].signals.note("SIGUSR1")
                elif at == step:
                    ranks[rank].schedule.request("please")
            for rank in ranks:
                rank.call(step, step // 10, seconds=seconds)
            assert len({rank.votes[-1] for rank in ranks}) == 1
            assert len({rank.schedule._next_vote for rank in ranks}) == 1
        saves(ranks)
        assert [rank.schedule.is_asked for rank in ranks] == [False] * 3
        for at, _, _ in asked:
            assert [step for step in ranks[0].saved if at <= step <= at + 2 * 40 + 2]
        if not chosen and not asked:
            assert ranks[0].saved == []


def odd(moment: Moment) -> bool:
    return moment.step % 17 == 3


def test_steps_and_epochs_are_decided_at_their_own_call_by_each_rank_for_itself() -> None:
    """Also by one whose others have not come yet."""
    rules = [EverySteps(5), EveryEpochs(2)]
    with job(4, lambda rank: rules) as ranks:
        for step in range(1, 13):
            for rank in ranks:
                rank.call(step, step // 3)
        assert saves(ranks) == [5, 6, 10, 12]
    with job(2, lambda rank: rules) as (first, _):
        assert first.schedule.decide(5, 0, {}).reason == "every_steps: 5 crossed at 5"


def test_the_clock_of_rank_0_alone_counts_and_its_answer_comes_one_vote_later() -> None:
    clocks = [Clock(0, 1), Clock(500, 100), Clock(-3, 0)]
    with job(3, lambda rank: [Every(timedelta(seconds=0.45))], clocks) as ranks:
        for step in range(1, 17):
            for rank in ranks:
                rank.call(step)
        assert saves(ranks) == [6, 12]  # 0.45 s have passed at the fifth step after each save


def test_a_predicate_is_asked_on_rank_0_alone_with_what_rank_0_was_told() -> None:
    asked: list[tuple[int, float]] = []

    def is_low(moment: Moment) -> bool:
        asked.append((moment.step, moment.metrics["loss"]))
        return moment.metrics["loss"] < 0

    with job(2, lambda rank: [When(is_low)]) as ranks:
        for step in range(1, 6):
            ranks[0].call(step, metrics={"loss": 3 - step})
            ranks[1].call(step)
        assert saves(ranks) == [5]
    assert asked == [(step, 3 - step) for step in range(1, 6)]


def test_a_predicate_sees_every_moment_however_short_the_steps_are() -> None:
    """Its yes is kept until the next vote; a save in between has answered it."""
    asked: list[int] = []

    def at_some_steps(moment: Moment) -> bool:
        asked.append(moment.step)
        return moment.step in (45, 97)

    with job(3, lambda rank: [When(at_some_steps), EverySteps(100)]) as ranks:
        for step in range(1, 150):
            for rank in ranks:
                rank.call(step, seconds=0.001)
        first, *others = saves(ranks)
        assert 45 < first <= 45 + 2 * 20
        assert others == [100]
        assert ranks[0].reasons[first].startswith("when: ")
    assert asked == list(range(1, 150))


@pytest.mark.parametrize("wanting", [0, 2])
def test_the_rank_that_asked_knows_why_and_the_others_that_one_did(wanting: int) -> None:
    with job(3, lambda rank: []) as ranks:
        for step in range(1, 6):
            if step == 2:
                ranks[wanting].schedule.request("please")
            for rank in ranks:
                rank.call(step)
        assert saves(ranks) == [3]
        assert ranks[wanting].reasons[3] == "request: please"
        assert {rank.reasons[3] for rank in ranks if rank is not ranks[wanting]} == {"another rank asked for it"}


def test_a_save_made_while_the_vote_for_one_is_under_way_answers_it() -> None:
    """Steps of 5 ms, so that a vote is read four calls after it was cast: the clock's has been cast
    when a multiple of steps comes, and is read afterwards."""
    with job(2, lambda rank: [EverySteps(50), Every(timedelta(milliseconds=235))]) as ranks:
        for step in range(1, 94):
            for rank in ranks:
                rank.call(step, seconds=0.005)
        cast = [wanted for kind, wanted in ranks[0].ranks.log if kind == "cast" and wanted & 1]
        assert len(cast) == 1  # or this test has lost its point
        assert saves(ranks) == [50]


ANY_STEP_OF_A_ROUND = pytest.mark.parametrize("asked_at", range(43, 51))  # of votes before step 50


@ANY_STEP_OF_A_ROUND
def test_a_request_that_a_step_trigger_has_answered_is_not_answered_again(asked_at: int) -> None:
    with job(3, lambda rank: [EverySteps(50)]) as ranks:
        for step in range(1, 100):
            if step == asked_at:
                ranks[2].schedule.request("please")
            for rank in ranks:
                rank.call(step, seconds=0.005)
        assert [step for step in saves(ranks) if step >= 50] == [50]


@ANY_STEP_OF_A_ROUND
def test_who_is_told_to_stop_leaves_with_that_very_step_saved(asked_at: int) -> None:
    """Even when a step trigger has saved since the signal came."""
    with job(3, lambda rank: [EverySteps(50)]) as ranks:
        for step in range(1, 100):
            if step == asked_at:
                ranks[1].signals.note("SIGTERM")
            for rank in ranks:
                rank.call(step, seconds=0.005)
            if ranks[0].schedule.should_stop:
                break
        assert [rank.schedule.should_stop for rank in ranks] == [True] * 3
        assert saves(ranks)[-1] == step


def test_all_ranks_are_told_to_stop_at_the_same_call() -> None:
    with job(4, lambda rank: []) as ranks:
        told = []
        for step in range(1, 10):
            if step == 4:
                ranks[3].signals.note("SIGTERM")
            for rank in ranks:
                rank.call(step)
            told.append([rank.schedule.should_stop for rank in ranks])
        assert told == [[False] * 4] * 4 + [[True] * 4] * 5
        assert saves(ranks) == [5]


@pytest.mark.parametrize(("seconds", "calls"), [(0.1, 1), (0.007, 2), (0.001, 20), (1e-6, 50)])
def test_short_steps_have_more_calls_from_one_vote_to_the_next_the_same_on_all_ranks(
    seconds: float, calls: int
) -> None:
    clocks = [Clock(), Clock(7, 100.0), Clock(9, 0.01)]
    with job(3, lambda rank: [], clocks) as ranks:
        cast = []
        for step in range(1, 5 * calls + 5):
            for rank in ranks:
                rank.call(step, seconds=seconds)
            if len({rank.votes[-1] for rank in ranks}) != 1:
                pytest.fail(f"the ranks did not vote at the same calls: step {step}")
            if step > 1 and ranks[0].votes[-1] != ranks[0].votes[-2]:
                cast.append(step)
        between = [later - earlier for earlier, later in itertools.pairwise(cast)]
        assert max(between) <= calls
        assert between[-1] in (calls, calls - 1)  # rounded down


def test_between_votes_a_call_is_quiet() -> None:
    with job(2, lambda rank: [EverySteps(10**6)]) as ranks:
        step = 0
        while not step or ranks[0].schedule._next_vote - ranks[0].schedule._calls < 18:
            step += 1
            for rank in ranks:
                rank.call(step, seconds=0.001)
        quiet = 0
        for step in range(step + 1, step + 21):  # noqa: B020 - it goes on
            for rank in ranks:
                rank.clock.go_on(0.001)
                before = rank.schedule._calls
                quiet += rank.schedule.is_quiet(step, None)
                assert rank.schedule._calls == before + 1
        assert quiet >= 2 * 15


def test_trouble_on_one_rank_is_heard_by_all_at_the_same_call() -> None:
    with job(3, lambda rank: []) as ranks:
        for step in range(1, 6):
            for rank in ranks:
                rank.call(step, trouble=step == 3 and rank is ranks[2])
        assert [rank.troubles for rank in ranks] == [[4]] * 3


def test_what_a_predicate_raises_on_rank_0_is_raised_on_all_at_the_next_vote_and_they_go_on() -> None:
    def breaks(moment: Moment) -> bool:
        if moment.step == 3:
            raise ZeroDivisionError("no such number")
        return moment.step == 6

    def work(ranks: ThreadRanks) -> Any:
        rank = Rank(ranks, [When(breaks)], Clock())
        errors = []
        for step in range(1, 12):
            try:
                rank.call(step)
            except RankError as exc:
                errors.append((step, str(exc)))
        return errors, rank.saved

    expected = ([(4, "rank 0: ZeroDivisionError: no such number")], [7])
    assert ThreadRanks.run(3, work) == [expected] * 3


@pytest.mark.parametrize(("asked_at", "expected"), [(None, False), (1, True), (2, False)])
def test_at_the_end_all_ranks_know_whether_any_was_asked_for_a_save_by_the_last_call(
    asked_at: int | None, expected: bool
) -> None:
    """What came later, one rank alone knows."""

    def work(ranks: ThreadRanks) -> bool:
        rank = Rank(ranks, [], Clock())
        for step in (1, 2):
            if ranks.rank == 2 and step == asked_at:
                rank.schedule.request("at the last moment")
            if step == 1:
                rank.call(step)
        return rank.schedule.agree_is_asked()

    assert ThreadRanks.run(3, work) == [expected] * 3


def test_a_rank_that_does_not_vote_is_named_and_no_vote_is_cast_after_that() -> None:
    def work(ranks: ThreadRanks) -> Any:
        rank = Rank(ranks, [], Clock())
        rank.call(1)
        texts = []
        for step in (2, 3):
            with pytest.raises(CoordinationError) as caught:
                rank.call(step)
            texts.append(str(caught.value))
        return texts, ranks.problem, rank.votes

    first, second, absent = ThreadRanks.run(3, work, timeout_s=0.3, absent=[2])
    text = "the ranks did not agree within 0.3 s; without a vote: [2]"
    again = f"{text} (so the ranks are not asked any more; restart the job to go on)"
    assert [first, second, absent] == [([text, again], text, [(1, 0)])] * 2 + [None]


def test_a_signal_that_does_not_end_the_process_stops_nobody() -> None:
    with job(2, lambda rank: []) as ranks:
        for step in range(1, 6):
            if step == 2:
                ranks[1].signals.note(signal.Signals.SIGUSR1.name)
            for rank in ranks:
                rank.call(step)
        assert saves(ranks) == [3]
        assert [rank.schedule.should_stop for rank in ranks] == [False, False]


def test_threads_read_together_like_ranks() -> None:
    """The circle of `ThreadRanks`: what rank 0 brings reaches all."""

    def work(ranks: ThreadRanks) -> Any:
        circle = ranks.circle("rank0")
        data = bytearray(b"whole") if circle.is_reader else bytearray(5)
        circle.broadcast(memoryview(data))
        return bytes(data), circle.union([ranks.rank])

    assert ThreadRanks.run(2, work) == [(b"whole", [[0], [1]])] * 2
