"""The fast path never hides a save that is due."""

from __future__ import annotations

import itertools
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr import schedule as schedule_module
from ckptmgr.schedule import Schedule
from ckptmgr.signals import SignalWatch
from ckptmgr.triggers import AnyOf, AtSteps, Every, EveryEpochs, EverySteps, OnRequest, OnSignals, Trigger, When


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


RULES: list[Trigger] = [EverySteps(7), EveryEpochs(2), Every(timedelta(seconds=30)), AtSteps((3, 11, 12)), OnRequest()]


@given(
    rules=st.lists(st.sampled_from(RULES), min_size=1, unique=True),
    calls=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 1), st.floats(0, 20), st.booleans()), max_size=40),
)
def test_a_quiet_call_is_one_at_which_no_trigger_speaks(
    rules: list[Trigger], calls: list[tuple[int, int, float, bool]]
) -> None:
    clock = Clock()
    schedule = Schedule(AnyOf(tuple(rules)), SignalWatch(()), clock)
    step = epoch = 0
    for steps, epochs, seconds, requested in calls:
        step, epoch, clock.now = step + steps, epoch + epochs, clock.now + seconds
        if requested:
            schedule.request("please")
        decision = schedule.decide(step, epoch, {})
        assert not (decision and schedule.is_quiet(step, epoch))
        if decision:
            schedule.saved(step, epoch)
        else:
            schedule.calm()


def test_between_saves_step_rules_are_quiet_until_the_next_multiple() -> None:
    schedule = Schedule(AnyOf((EverySteps(100),)), SignalWatch(()), Clock())
    assert [step for step in range(1, 302) if not schedule.is_quiet(step, None)] == list(range(100, 302))
    schedule.saved(100, None)
    assert [step for step in range(101, 302) if not schedule.is_quiet(step, None)] == list(range(200, 302))


def test_a_due_save_stays_due_until_it_is_made() -> None:
    schedule = Schedule(AnyOf((EverySteps(10),)), SignalWatch(()), Clock())
    assert [bool(schedule.decide(step, None, {})) for step in (9, 10, 11, 12)] == [False, True, True, True]
    schedule.saved(12, None)
    assert not schedule.decide(13, None, {})


def test_a_request_and_an_alert_break_the_silence_once() -> None:
    schedule = Schedule(AnyOf((EverySteps(100), OnRequest())), SignalWatch(()), Clock())
    schedule.request("eval wants weights")
    assert not schedule.is_quiet(1, None)
    assert schedule.decide(1, None, {}).reason == "request: eval wants weights"
    schedule.calm()
    assert not schedule.is_quiet(1, None)  # still wanted
    schedule.saved(1, None)
    assert schedule.is_quiet(2, None)
    schedule.alert()
    assert not schedule.is_quiet(2, None)
    schedule.calm()
    assert schedule.is_quiet(3, None)


@pytest.mark.parametrize("act", ["calm", "saved", "decide"])
def test_a_request_that_comes_at_any_line_of_the_schedule_is_answered_or_noticed_at_the_next_call(act: str) -> None:
    lines = 0
    for line in itertools.count(1):
        schedule = Schedule(AnyOf((EverySteps(100), OnRequest())), SignalWatch(()), Clock())
        schedule.alert()
        steps: dict[str, Callable[[], object]] = {
            "calm": schedule.calm,
            "saved": lambda: schedule.saved(7, None),  # noqa: B023 - called before the next turn
            "decide": lambda: schedule.decide(7, None, {}),  # noqa: B023
        }
        seen = 0

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal seen
            if event == "line" and frame.f_code.co_filename == schedule_module.__file__:
                seen += 1
                if seen == line:  # noqa: B023
                    sys.settrace(None)
                    schedule.request("now")  # noqa: B023
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            steps[act]()
        finally:
            sys.settrace(before)
        if seen < line:
            break
        lines += 1
        assert not (schedule.is_asked and schedule.is_quiet(8, None))
    assert lines > 2


def test_the_clock_is_looked_at_only_where_a_rule_asks_for_the_time() -> None:
    class Counting(Clock):
        asked = 0

        def __call__(self) -> float:
            self.asked += 1
            return self.now

    looks = []
    for rules in ((EverySteps(100), EveryEpochs(5)), (EverySteps(100), Every(timedelta(hours=1)))):
        clock = Counting()
        schedule = Schedule(AnyOf(rules), SignalWatch(()), clock)
        clock.asked = 0
        assert all(schedule.is_quiet(step, 0) for step in range(1, 50))
        looks.append(clock.asked)
    assert looks == [0, 49]


def test_a_signal_makes_a_save_due_and_is_taken_by_it() -> None:
    watch = SignalWatch(["SIGUSR1"])
    schedule = Schedule(AnyOf((OnSignals(("SIGUSR1",)),)), watch, Clock())
    watch.on_signal = schedule.alert
    watch.install()
    try:
        assert schedule.is_quiet(1, None)
        signal.raise_signal(signal.SIGUSR1)
        assert not schedule.is_quiet(1, None)
        assert schedule.decide(1, None, {})
        schedule.saved(1, None)
        assert schedule.is_quiet(2, None)
    finally:
        watch.uninstall()


def test_a_predicate_is_asked_at_every_call() -> None:
    schedule = Schedule(AnyOf((When(lambda moment: moment.step == 5),)), SignalWatch(()), Clock())
    assert [bool(schedule.decide(step, None, {})) for step in (4, 5, 6)] == [False, True, False]
    assert not schedule.is_quiet(4, None)
