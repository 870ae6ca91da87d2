"""When is a save due? Each trigger's answers, and that its horizon never hides one."""

from __future__ import annotations

import math
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.errors import ConfigError
from ckptmgr.triggers import (
    AnyOf,
    AtSteps,
    Decision,
    Every,
    EveryEpochs,
    EverySteps,
    Horizon,
    Moment,
    OnRequest,
    OnSignals,
    Trigger,
    When,
    as_trigger,
)


def test_a_decision_is_true_exactly_when_it_has_a_reason() -> None:
    assert (bool(Decision("every_steps")), bool(Decision())) == (True, False)


def test_every_steps_is_due_at_the_multiple_itself() -> None:
    trigger = EverySteps(500)
    assert trigger.due(Moment(499)) is None
    assert trigger.due(Moment(500)) == "every_steps: 500 crossed at 500"


def test_every_steps_misses_nothing_in_a_loop_that_skips_the_multiple() -> None:
    assert EverySteps(500).due(Moment(1003, last_step=996)) == "every_steps: 500 crossed at 1003"


def test_every_steps_is_due_once_for_several_multiples_jumped_over() -> None:
    assert EverySteps(10).due(Moment(55, last_step=9)) is not None
    assert EverySteps(10).due(Moment(56, last_step=55)) is None


def test_every_steps_goes_on_from_the_restored_step_and_not_from_zero() -> None:
    trigger = EverySteps(500)
    assert trigger.due(Moment(1204, last_step=1203)) is None
    assert trigger.due(Moment(1500, last_step=1203)) is not None


def test_a_loop_that_went_back_is_not_due_by_any_rule_on_steps() -> None:
    moment = Moment(3, last_step=1000, epoch=1, last_epoch=4)
    assert [t.due(moment) for t in (EverySteps(2), AtSteps((1, 2, 3)), EveryEpochs(1))] == [None, None, None]


def test_every_epochs_crosses_as_steps_do() -> None:
    trigger = EveryEpochs(2)
    assert trigger.due(Moment(10, epoch=1)) is None
    assert trigger.due(Moment(30, epoch=3)) == "every_epochs: 2 crossed at 3"
    assert trigger.due(Moment(40, epoch=3, last_epoch=3)) is None


def test_every_epochs_is_silent_where_no_epoch_is_given() -> None:
    assert EveryEpochs(1).due(Moment(10)) is None


def test_every_is_due_when_exactly_its_time_has_passed() -> None:
    trigger = Every(timedelta(minutes=30))
    assert trigger.due(Moment(5, elapsed=1799.9, last_step=4)) is None
    assert trigger.due(Moment(5, elapsed=1800.0, last_step=4)) == "every: 0:30:00 passed since step 4"


def test_at_steps_is_due_at_each_step_or_at_the_first_call_after_it() -> None:
    trigger = AtSteps((100, 1))
    assert trigger.due(Moment(1)) == "at_steps: 1 crossed at 1"
    assert trigger.due(Moment(2, last_step=1)) is None
    assert trigger.due(Moment(104, last_step=1)) == "at_steps: 100 crossed at 104"
    assert trigger.due(Moment(104)) == "at_steps: 1, 100 crossed at 104"
    assert trigger.due(Moment(105, last_step=100)) is None


def test_when_asks_the_predicate_with_the_whole_moment_and_names_it() -> None:
    def loss_is_low(moment: Moment) -> bool:
        return moment.metrics["loss"] < 0.1

    assert When(loss_is_low, "mytrain:loss_is_low").due(Moment(1, metrics={"loss": 0.0})) == "when: mytrain:loss_is_low"
    assert When(loss_is_low).due(Moment(1, metrics={"loss": 0.2})) is None


def test_when_without_a_name_takes_the_functions_or_the_class_of_the_callable() -> None:
    class Rule:
        def __call__(self, moment: Moment) -> bool:
            return True

    reason = When(Rule()).due(Moment(1))
    assert reason is not None
    assert reason.endswith("Rule")
    assert When(bool).due(Moment(1)) == "when: bool"


def test_what_a_predicate_raises_reaches_the_caller_as_it_is() -> None:
    with pytest.raises(KeyError, match="val_loss"):
        AnyOf((When(lambda moment: moment.metrics["val_loss"] < 1),)).due(Moment(1))


def test_on_signals_is_due_for_its_own_signals_only_and_says_each_once() -> None:
    trigger = OnSignals(("SIGTERM", "SIGUSR1"))
    assert trigger.due(Moment(1, signals=("SIGHUP",))) is None
    assert trigger.due(Moment(1, signals=("SIGUSR1", "SIGHUP", "SIGUSR1"))) == "on_signals: SIGUSR1"


def test_on_request_repeats_the_reasons_given() -> None:
    assert OnRequest().due(Moment(1)) is None
    assert OnRequest().due(Moment(1, requests=("SAVE_NOW", "end of phase"))) == "request: SAVE_NOW, end of phase"


def test_any_of_says_every_reason() -> None:
    rule = AnyOf((EverySteps(5), EveryEpochs(1), AtSteps((10,))))
    assert rule.due(Moment(10, last_step=9)) == "every_steps: 5 crossed at 10; at_steps: 10 crossed at 10"
    assert rule.due(Moment(11, last_step=10)) is None


def test_any_of_asks_a_predicate_even_when_another_rule_is_due() -> None:
    seen = []
    rule = AnyOf((EverySteps(1), When(lambda moment: seen.append(moment.step))))
    rule.due(Moment(1))
    rule.due(Moment(2, last_step=1))
    assert seen == [1, 2]


def test_nothing_is_never_due_and_silent_for_ever() -> None:
    assert (AnyOf(()).due(Moment(10**9)), AnyOf(()).horizon(Moment(0))) == (None, Horizon())


def test_a_plain_callable_becomes_a_trigger_and_a_trigger_stays_itself() -> None:
    trigger = EverySteps(3)
    assert as_trigger(trigger) is trigger
    assert as_trigger(bool) == When(bool)


@pytest.mark.parametrize("rule", [5, "every", None])
def test_what_is_neither_trigger_nor_callable_is_refused(rule: object) -> None:
    with pytest.raises(ConfigError, match="neither a trigger nor a callable"):
        as_trigger(rule)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, -1, 1.5, True, "5"])
def test_a_count_below_one_is_refused_with_what_is_allowed(count: object) -> None:
    for make in (EverySteps, EveryEpochs, lambda n: AtSteps((n,))):
        with pytest.raises(ConfigError, match="whole number of at least 1"):
            make(count)  # type: ignore[operator]


def test_no_time_to_wait_is_refused() -> None:
    with pytest.raises(ConfigError, match="every: 0:00:00"):
        Every(timedelta(0))


def test_a_predicate_leaves_no_silence_and_a_waiting_signal_or_request_neither() -> None:
    def is_silent(trigger: Trigger, moment: Moment) -> bool:
        h = AnyOf((EverySteps(100), trigger)).horizon(moment)
        return h.step > 1 and h.epoch > 0 and h.elapsed > 0.0

    assert is_silent(When(bool), Moment(1)) is False
    assert [is_silent(OnSignals(("SIGTERM",)), Moment(1, signals=s)) for s in ((), ("SIGTERM",))] == [True, False]
    assert [is_silent(OnRequest(), Moment(1, requests=r)) for r in ((), ("now",))] == [True, False]


_counts = st.integers(1, 50)
_timed = st.one_of(
    st.builds(EverySteps, _counts),
    st.builds(EveryEpochs, _counts),
    st.builds(AtSteps, st.lists(_counts).map(tuple)),
    st.builds(Every, st.timedeltas(timedelta(seconds=1), timedelta(seconds=50))),
)


@given(
    rule=st.builds(AnyOf, st.lists(_timed, max_size=4).map(tuple)),
    last=st.tuples(st.integers(0, 60), st.integers(0, 60)),
    now=st.tuples(st.integers(0, 120), st.none() | st.integers(0, 120), st.floats(0, 100)),
)
def test_below_the_horizon_nothing_is_due(
    rule: AnyOf, last: tuple[int, int], now: tuple[int, int | None, float]
) -> None:
    h = rule.horizon(Moment(last[0], last[1], last_step=last[0], last_epoch=last[1]))
    moment = Moment(now[0], now[1], elapsed=now[2], last_step=last[0], last_epoch=last[1])
    if moment.step < h.step and (moment.epoch is None or moment.epoch < h.epoch) and moment.elapsed < h.elapsed:
        assert rule.due(moment) is None


@given(rule=_timed, last=st.integers(0, 60))
def test_at_the_horizon_it_is_due_so_the_horizon_is_the_farthest_there_is(rule: Trigger, last: int) -> None:
    h = rule.horizon(Moment(last, last, last_step=last, last_epoch=last))
    for kind in ("step", "epoch", "elapsed"):
        if math.isfinite(bound := getattr(h, kind)):
            at = {"step": last, "epoch": last, "last_step": last, "last_epoch": last, kind: bound}
            assert rule.due(Moment(**at)) is not None
