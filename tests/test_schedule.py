"""The fast path never hides a save that is due."""

from __future__ import annotations

import signal
from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

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
