"""A rotation lets go of exactly those that a plan of all would, after every save of a long run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr import rotation
from ckptmgr.manifest import CheckpointInfo, FileEntry, Manifest, Pin
from ckptmgr.retention import Best, KeepEverySteps, KeepRule, Last, NewerThan, plan
from ckptmgr.rotation import Rotation

NOW = datetime(2030, 1, 1, tzinfo=UTC)
AHEAD = 4  # in place of rotation.AHEAD: short runs show what long ones do


def saved(step: int, minute: int, *, attempt: int = 1, **fields: object) -> CheckpointInfo:
    files = (FileEntry("a.bin", 10 + step % 3, "d"),)
    about = Manifest(
        step=step, run="run", attempt=attempt, nonce="n", time=NOW + timedelta(minutes=minute),
        format="raw", files=files, **fields,  # type: ignore[arg-type]
    )  # fmt: skip
    return CheckpointInfo(f"step-{step}" if attempt == 1 else f"step-{step}.{attempt}", step, about)


RULES = st.lists(
    st.one_of(
        st.integers(1, 12).map(Last),
        st.integers(2, 9).map(KeepEverySteps),
        st.builds(Best, st.just("loss"), st.sampled_from(["min", "max"]), st.integers(1, 3)),
        st.integers(1, 60).map(lambda minutes: NewerThan(timedelta(minutes=minutes))),
    ),
    max_size=3,
)
SAVES = st.lists(
    st.tuples(st.integers(1, 4), st.integers(0, 9), st.sampled_from([True] * 5 + [False]), st.integers(0, 9)),
    min_size=1,
    max_size=40,
)


@given(
    rules=RULES,
    saves=SAVES,
    before=st.integers(0, 25),
    min_good=st.integers(1, 3),
    max_bytes=st.sampled_from([None, None, 60, 200]),
    odd=st.sampled_from(["", "", "", "pin", "damage", "twice"]),
)
def test_what_goes_is_what_a_plan_of_all_lets_go(
    rules: list[KeepRule],
    saves: list[tuple[int, int, bool, int]],
    before: int,
    min_good: int,
    max_bytes: int | None,
    odd: str,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rotation, "AHEAD", AHEAD)
        there = [saved(step, -5 * (before - step), metrics={"loss": (step * 7) % 5}) for step in range(before)]
        if there:
            first = there[0]
            match odd:
                case "pin":
                    expires = NOW + timedelta(minutes=30)
                    pins = (Pin(first.name, "n", first.step, None, expires),)
                    there[0] = CheckpointInfo(first.name, first.step, first.manifest, pins=pins)
                case "damage":
                    there[0] = CheckpointInfo(first.name, first.step, first.manifest, "torn")
                case "twice":
                    there.append(saved(first.step, 0, attempt=2))
        turns = Rotation(rules, min_good=min_good, max_bytes=max_bytes)
        step, minute = before, 0
        for steps, loss, healthy, minutes in saves:
            step, minute = step + steps, minute + minutes
            now = NOW + timedelta(minutes=minute)
            info = saved(step, minute, attempt=3, healthy=healthy, metrics={"loss": loss})
            there.append(info)
            expected = plan(there, rules, now=now, min_good=min_good, max_bytes=max_bytes)
            made = turns.plan_after(info, now) or turns.plan(there, now)
            assert names(made.drop) == names(expected.drop)
            assert {one.name for one in made.must} == {one.name for one in expected.must}
            there = [verdict.info for verdict in expected.keep]


def names(verdicts: Sequence[object]) -> list[str]:
    return [verdict.info.name for verdict in verdicts]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "rules",
    [
        [],
        [Last(3), KeepEverySteps(2)],
        [Last(5000)],
        [Last(1000)],
        [NewerThan(timedelta(minutes=1000))],
        [NewerThan(timedelta(minutes=999)), Best("loss", "min", 3), Last(500), KeepEverySteps(7)],
    ],
)
def test_of_thousands_a_save_has_only_few_judged(rules: list[KeepRule]) -> None:
    there = [saved(step, step, metrics={"loss": 1 / step}) for step in range(1, 1001)]
    turns = Rotation(rules)
    there = [verdict.info for verdict in turns.plan(there, NOW + timedelta(minutes=1000)).keep]
    judged = []
    for step in range(1001, 1001 + rotation.AHEAD):
        now = NOW + timedelta(minutes=step)
        info = saved(step, step, metrics={"loss": 1 / step})
        there.append(info)
        made = turns.plan_after(info, now)
        if made is None:  # of the age that a rule names a part has passed
            made = turns.plan(there, now)
        else:
            judged.append(len(made.keep) + len(made.drop))
        assert names(made.drop) == names(plan(there, rules, now=now).drop)
        gone = {verdict.info.name for verdict in made.drop}
        there = [one for one in there if one.name not in gone]
    assert len(judged) > 0.7 * rotation.AHEAD
    assert max(judged) <= 4 * rotation.AHEAD


def test_those_left_out_are_judged_again_before_their_turn_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "AHEAD", 3)
    turns = Rotation([Last(8)])
    there = [saved(step, step) for step in range(1, 9)]
    turns.plan(there, NOW)
    for step in range(9, 40):
        there.append(saved(step, step))
        made = turns.plan_after(there[-1], NOW) or turns.plan(there, NOW)
        assert names(made.drop) == [f"step-{step - 8}"]
        del there[0]


def test_a_pin_that_runs_out_lets_go() -> None:
    turns = Rotation([Last(1)])
    pins = (Pin("step-1", "n", 1, None, NOW + timedelta(minutes=5)),)
    held = CheckpointInfo("step-1", 1, saved(1, 1).manifest, pins=pins)
    turns.plan([held, saved(2, 2)], NOW)
    first = turns.plan_after(saved(3, 3), NOW + timedelta(minutes=3))
    later = turns.plan_after(saved(6, 6), NOW + timedelta(minutes=6))
    assert first is not None
    assert later is not None
    assert [names(first.drop), names(later.drop)] == [["step-2"], ["step-3", "step-1"]]


def test_an_age_beyond_the_end_of_all_dates_keeps_everything() -> None:
    late = CheckpointInfo("step-1", 1, replace(saved(1, 1).manifest, time=datetime(8999, 1, 1, tzinfo=UTC)))
    for rule in (NewerThan(timedelta.max), NewerThan(timedelta(days=400_000))):
        turns = Rotation([rule])
        assert turns.plan([late, saved(2, 2)], NOW).drop == ()
        made = turns.plan_after(saved(3, 3, attempt=2), NOW)
        assert made is not None
        assert made.drop == ()


def test_an_unhealthy_one_goes_once_there_are_healthy_ones_enough() -> None:
    turns = Rotation([Best("loss", "min")], min_good=2)
    turns.plan([saved(1, 1, healthy=False), saved(2, 2, healthy=False), saved(3, 3)], NOW)
    made = turns.plan_after(saved(4, 4), NOW)
    assert made is not None
    assert names(made.drop) == ["step-2"]


def test_a_step_that_is_there_already_or_is_lower_has_all_judged() -> None:
    turns = Rotation([Last(2)])
    turns.plan([saved(step, step) for step in (1, 2, 3)], NOW)
    assert turns.plan_after(saved(3, 4, attempt=2), NOW) is None


def test_before_a_plan_of_all_there_is_none_of_one_more() -> None:
    turns = Rotation([Last(2)])
    assert turns.plan_after(saved(1, 1), NOW) is None
    assert turns.plan([], NOW).keep == ()
    assert turns.plan_after(saved(1, 1), NOW) is None


def test_a_rule_of_an_unknown_kind_has_all_judged() -> None:
    class Odd:
        def keeps(self, infos, now):  # type: ignore[no-untyped-def]
            return ((info, "odd") for info in infos if info.step % 2)

    turns = Rotation([Odd()])
    turns.plan([saved(step, step) for step in range(1, 101)], NOW)
    made = turns.plan_after(saved(101, 101), NOW)
    assert made is not None
    assert len(made.keep) + len(made.drop) == 52  # with the newest of before
