"""Which checkpoints stay? Plans for small listings, and what holds for every listing."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.errors import ConfigError
from ckptmgr.manifest import CheckpointInfo, FileEntry, Manifest, Pin
from ckptmgr.retention import Best, KeepEverySteps, KeepRule, Last, NewerThan, Plan, plan

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)


def info(
    step: int,
    *,
    attempt: int = 1,
    hours_ago: float = 1.0,
    size: int = 10,
    healthy: bool = True,
    damaged: str | None = None,
    pins: tuple[Pin, ...] = (),
    **metrics: float,
) -> CheckpointInfo:
    manifest = Manifest(
        step=step,
        run="run",
        attempt=attempt,
        nonce="n",
        time=NOW - timedelta(hours=hours_ago),
        format="safetensors",
        files=(FileEntry("model.safetensors", size, "d"),),
        metrics=metrics,
        healthy=healthy,
    )
    name = f"step-{step}" if attempt == 1 else f"step-{step}.{attempt}"
    return CheckpointInfo(name, step, manifest, damaged, pins)


def pinned(step: int, tag: str | None = None, expires: datetime | None = None, **more: object) -> CheckpointInfo:
    return info(step, pins=(Pin(f"step-{step}", "", step, tag, expires),), **more)  # type: ignore[arg-type]


def kept(*infos: CheckpointInfo, rules: tuple[KeepRule, ...], **more: int) -> list[str]:
    return [verdict.info.name for verdict in plan(infos, rules, now=NOW, **more).keep]


def test_a_plan_reads_as_what_stays_and_what_goes_and_why_newest_first() -> None:
    made = plan([info(s, size=s) for s in (10, 20, 30, 40)], (Last(2), KeepEverySteps(15)), now=NOW)
    assert str(made) == (
        "keep step-40: newest; last: 1 of 2\n"
        "keep step-30: last: 2 of 2; every_steps: first from 30\n"
        "keep step-20: every_steps: first from 15\n"
        "drop step-10: no rule keeps it"
    )
    assert repr(made.drop) == "(<step-10: no rule keeps it>,)"
    assert made.freed == 10


def test_without_rules_everything_stays_damaged_superseded_or_not() -> None:
    infos = [info(1), info(1, attempt=2), info(2, damaged="size"), info(3, healthy=False)]
    assert plan(infos, (), now=NOW).drop == ()


def test_an_empty_listing_has_an_empty_plan() -> None:
    assert plan([], (Last(1),), now=NOW) == Plan((), ())


def test_last_counts_steps_as_numbers_and_not_as_text() -> None:
    assert kept(info(9), info(100), info(20), rules=(Last(2),)) == ["step-100", "step-20"]


def test_a_later_attempt_is_newer_than_a_higher_step_of_an_earlier_one() -> None:
    assert kept(info(500), info(300, attempt=2), info(400), rules=(Last(1),)) == ["step-300.2"]


def test_an_unhealthy_newest_stays_and_takes_nobodys_place() -> None:
    made = plan([info(1), info(2), info(3, healthy=False)], (Last(2),), now=NOW)
    assert [v.info.step for v in made.keep] == [3, 2, 1]
    assert made.keep[0].reasons == ("newest",)


def test_an_unhealthy_one_that_is_not_the_newest_goes() -> None:
    made = plan([info(1), info(2, healthy=False), info(3)], (Last(3),), now=NOW)
    assert [str(v) for v in made.drop] == ["step-2: unhealthy"]


def test_every_steps_keeps_the_first_healthy_one_from_each_multiple_and_step_zero() -> None:
    infos = [info(0), info(50), info(100, healthy=False), info(130), info(160), info(201), info(250)]
    assert kept(*infos, rules=(KeepEverySteps(100),)) == ["step-250", "step-201", "step-130", "step-0"]


def test_every_steps_keeps_an_unhealthy_one_where_there_is_no_other() -> None:
    infos = [info(110, healthy=False), info(120, healthy=False), info(230)]
    assert kept(*infos, rules=(KeepEverySteps(100),)) == ["step-230", "step-110"]


def test_best_of_zero_is_best_and_nan_infinite_or_missing_never_is() -> None:
    infos = [info(1, loss=0.0), info(2, loss=math.nan), info(3, loss=-math.inf), info(4), info(5, loss=0.5), info(6)]
    made = plan(infos, (Best("loss", "min", 2),), now=NOW)
    assert {v.info.step: v.reasons[-1] for v in made.keep if v.info.step != 6} == {
        1: "best: 1 of 2 by min loss (0)",
        5: "best: 2 of 2 by min loss (0.5)",
    }


def test_best_by_max_prefers_the_larger_and_of_equals_the_earlier() -> None:
    infos = [info(1, acc=0.9), info(2, acc=0.9), info(3, acc=0.1), info(4)]
    assert kept(*infos, rules=(Best("acc", "max"),)) == ["step-4", "step-1"]


def test_an_unhealthy_one_is_never_best() -> None:
    assert kept(info(1, loss=0.5), info(2, loss=0.1, healthy=False), info(3), rules=(Best("loss", "min"),)) == [
        "step-3",
        "step-1",
    ]


def test_the_best_stays_beside_the_newest_so_resuming_stays_possible() -> None:
    assert kept(info(1, loss=0.1), info(2, loss=9), info(3, loss=8), rules=(Best("loss", "min"),)) == [
        "step-3",
        "step-1",
    ]


def test_newer_than_keeps_the_young_healthy_or_not_and_those_from_the_future() -> None:
    infos = [info(1, hours_ago=24), info(2, hours_ago=23.9, healthy=False), info(3, hours_ago=-5), info(4)]
    assert kept(*infos, rules=(NewerThan(timedelta(hours=24)),)) == ["step-4", "step-3", "step-2"]


def test_a_pin_keeps_until_it_expires() -> None:
    infos = [pinned(1, "paper"), pinned(2), pinned(3, expires=NOW), pinned(4, expires=NOW + timedelta(1)), info(5)]
    made = plan(infos, (Last(1),), now=NOW)
    assert {v.info.step: v.reasons[-1] for v in made.keep if v.info.step != 5} == {
        4: "pinned",
        2: "pinned",
        1: "pinned: paper",
    }


def test_min_good_stays_whatever_the_rules_say() -> None:
    infos = [info(s, hours_ago=100) for s in (1, 2, 3, 4)]
    assert kept(*infos, rules=(NewerThan(timedelta(hours=1)),), min_good=3) == ["step-4", "step-3", "step-2"]
    made = plan(infos, (Last(1),), now=NOW, min_good=2)
    assert [str(v) for v in made.keep] == ["step-4: newest; last: 1 of 1", "step-3: min_good: 2"]


def test_min_good_prefers_healthy_ones() -> None:
    infos = [info(1), info(2), info(3, healthy=False), info(4, healthy=False)]
    assert kept(*infos, rules=(Best("loss", "min"),), min_good=2) == ["step-4", "step-2", "step-1"]


def test_a_damaged_one_never_counts_and_stays_as_evidence_until_enough_newer_good_ones_exist() -> None:
    bad = info(10, damaged="digest mismatch")
    before = plan([info(9), bad, info(11)], (Last(2),), now=NOW)
    assert [str(v) for v in before.keep] == [
        "step-11: newest; last: 1 of 2",
        "step-10: damaged: evidence until 2 newer good ones exist",
        "step-9: last: 2 of 2",
    ]
    after = plan([info(9), bad, info(11), info(12)], (Last(2),), now=NOW)
    assert [str(v) for v in after.drop] == ["step-10: damaged: 2 newer good ones exist", "step-9: no rule keeps it"]


def test_a_damaged_newest_is_not_the_newest() -> None:
    made = plan([info(1), info(2, damaged="torn")], (Last(1),), now=NOW)
    assert [v.reasons[0] for v in made.keep] == ["damaged: evidence until 1 newer good ones exist", "newest"]


def test_one_whose_manifest_is_unreadable_is_damaged_and_a_pin_keeps_it() -> None:
    lost = CheckpointInfo("step-1", 1, None, None, (Pin("step-1", "", 1),))
    made = plan([lost, info(2), info(3)], (Last(1),), now=NOW)
    assert [str(v) for v in made.keep][1:] == ["step-1: pinned"]


def test_a_later_attempt_supersedes_the_same_step() -> None:
    made = plan([info(5), info(5, attempt=3), info(4)], (Last(3),), now=NOW)
    assert [str(v) for v in made.drop] == ["step-5: superseded by attempt 3"]
    assert [v.info.name for v in made.keep] == ["step-5.3", "step-4"]


def test_an_unhealthy_attempt_does_not_supersede_a_healthy_one() -> None:
    assert kept(info(5), info(5, attempt=2, healthy=False), rules=(Last(3),)) == ["step-5.2", "step-5"]


def test_an_unhealthy_one_does_not_take_the_place_in_min_good_of_a_superseded_healthy_one() -> None:
    infos = [info(2), info(2, attempt=2), info(3, attempt=2, healthy=False)]
    made = plan(infos, (Last(1),), now=NOW, min_good=2)
    assert [verdict.info.name for verdict in made.keep] == ["step-3.2", "step-2.2", "step-2"]


def test_a_pinned_one_stays_though_superseded() -> None:
    assert kept(pinned(5), info(5, attempt=2), info(6, attempt=2), rules=(Last(1),)) == ["step-6.2", "step-5"]


def test_a_pinned_one_is_measured_by_the_rules_though_superseded_so_a_second_plan_agrees() -> None:
    infos = [info(3, loss=0.5), pinned(5, loss=0.0), info(5, attempt=2, loss=9.0), info(9, attempt=2)]
    first = plan(infos, (Best("loss", "min"),), now=NOW)
    assert [v.info.name for v in first.keep] == ["step-9.2", "step-5"]
    assert plan([v.info for v in first.keep], (Best("loss", "min"),), now=NOW).drop == ()


def test_max_bytes_drops_the_oldest_first_and_the_best_after_the_others() -> None:
    infos = [info(1, loss=0.1), info(2), info(3), info(4)]
    made = plan(infos, (Last(4), Best("loss", "min")), now=NOW, max_bytes=20)
    assert [v.info.step for v in made.keep] == [4, 1]
    assert [str(v) for v in made.drop] == ["step-3: max_bytes", "step-2: max_bytes"]
    assert (made.freed, made.over_bytes) == (20, 0)


def test_max_bytes_drops_evidence_and_the_unhealthy_before_anything_good() -> None:
    infos = [info(1), info(2, healthy=False), info(3, damaged="torn"), info(4)]
    made = plan(infos, (Last(2), NewerThan(timedelta(days=1))), now=NOW, max_bytes=20)
    assert [v.info.step for v in made.keep] == [4, 1]


def test_max_bytes_works_without_keep_rules() -> None:
    assert kept(info(1), info(2), info(3), rules=(), max_bytes=25) == ["step-3", "step-2"]


def test_a_cap_that_cannot_be_met_spares_what_must_stay_and_says_so() -> None:
    made = plan([pinned(1), info(2), info(3), info(4)], (Last(4),), now=NOW, min_good=2, max_bytes=5)
    assert [v.info.step for v in made.keep] == [4, 3, 1]
    assert made.over_bytes == 25
    assert str(made).endswith("still 25 bytes over max_bytes: the rest must stay")


def test_a_cap_that_is_just_met_drops_nothing() -> None:
    assert plan([info(1), info(2)], (), now=NOW, max_bytes=20).drop == ()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Last(0), "last: 0"),
        (lambda: KeepEverySteps(-1), "every_steps: -1"),
        (lambda: Best("loss", "min", 0), "best.count: 0"),
        (lambda: Best("loss", "lowest"), "give min or max"),  # type: ignore[arg-type]
        (lambda: NewerThan(timedelta(0)), "newer_than"),
        (lambda: plan([], (), now=NOW, min_good=0), "min_good: 0"),
        (lambda: plan([], (), now=NOW, min_good=True), "min_good: True"),
    ],
)
def test_a_count_below_one_is_refused(make: object, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make()  # type: ignore[operator]


_infos = st.lists(
    st.builds(
        lambda step, attempt, hours, size, healthy, bad, pin, loss: info(
            step,
            attempt=attempt,
            hours_ago=hours,
            size=size,
            healthy=healthy,
            damaged=bad,
            pins=pin,
            **({} if loss is None else {"loss": loss}),
        ),
        st.integers(0, 30),
        st.integers(1, 3),
        st.floats(-5, 50),
        st.integers(0, 20),
        st.booleans() | st.just(True),
        st.none() | st.just("torn"),
        st.just(()) | st.just((Pin("step-0", "", 0),)) | st.just((Pin("step-0", "", 0, None, NOW),)),
        st.none() | st.sampled_from([0.0, 0.5, 1.0, math.nan]),
    ),
    max_size=12,
    unique_by=lambda made: made.name,
)
_rules = st.lists(
    st.one_of(
        st.builds(Last, st.integers(1, 5)),
        st.builds(KeepEverySteps, st.integers(1, 15)),
        st.builds(Best, st.just("loss"), st.sampled_from(["min", "max"]), st.integers(1, 3)),
        st.builds(NewerThan, st.timedeltas(timedelta(hours=1), timedelta(hours=40))),
    ),
    max_size=3,
).map(tuple)
_min_good = st.integers(1, 4)
_caps = st.none() | st.integers(1, 100)


def names(made: Plan) -> set[str]:
    return {verdict.info.name for verdict in made.keep}


@given(_infos, _rules, _min_good, _caps)
def test_newest_pinned_and_min_good_stay_under_any_rules_and_cap(
    infos: list[CheckpointInfo], rules: tuple[KeepRule, ...], min_good: int, cap: int | None
) -> None:
    made = plan(infos, rules, now=NOW, min_good=min_good, max_bytes=cap)
    good = sorted((i for i in infos if i.damaged is None), key=lambda i: i.order)
    assert {i.name for i in good[-1:]} <= names(made)
    assert {i.name for i in infos if any(pin.holds(NOW) for pin in i.pins)} <= names(made)
    assert sum(v.info.damaged is None for v in made.keep) >= min(min_good, len(good))
    assert sorted(v.info.name for v in (*made.keep, *made.drop)) == sorted(i.name for i in infos)
    assert all(v.reasons for v in (*made.keep, *made.drop))


@given(_infos, _rules, _min_good, _caps)
def test_a_cap_is_kept_or_the_plan_says_by_how_much_not(
    infos: list[CheckpointInfo], rules: tuple[KeepRule, ...], min_good: int, cap: int | None
) -> None:
    made = plan(infos, rules, now=NOW, min_good=min_good, max_bytes=cap)
    size = sum(v.info.manifest.size for v in made.keep if v.info.manifest)
    assert made.over_bytes == (0 if cap is None else max(0, size - cap))


@given(_infos, _rules, _min_good)
def test_planning_again_on_what_stays_drops_nothing_more(
    infos: list[CheckpointInfo], rules: tuple[KeepRule, ...], min_good: int
) -> None:
    made = plan(infos, rules, now=NOW, min_good=min_good)
    assert plan([v.info for v in made.keep], rules, now=NOW, min_good=min_good).drop == ()


@given(_infos, _rules, _min_good, st.randoms())
def test_the_order_of_the_listing_does_not_matter(
    infos: list[CheckpointInfo], rules: tuple[KeepRule, ...], min_good: int, random: object
) -> None:
    shuffled = list(infos)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert plan(shuffled, rules, now=NOW, min_good=min_good) == plan(infos, rules, now=NOW, min_good=min_good)


@given(_infos, _rules, _min_good, st.integers(0, 40), st.integers(1, 4))
def test_an_unhealthy_newcomer_never_costs_a_healthy_one_its_place(
    infos: list[CheckpointInfo], rules: tuple[KeepRule, ...], min_good: int, step: int, attempt: int
) -> None:
    newcomer = info(step, attempt=attempt, healthy=False, loss=0.0)
    others = [i for i in infos if i.name != newcomer.name]
    before = plan(others, rules, now=NOW, min_good=min_good)
    after = plan([*others, newcomer], rules, now=NOW, min_good=min_good)
    healthy = {
        v.info.name for v in before.keep if v.info.damaged is None and v.info.manifest and v.info.manifest.healthy
    }
    assert healthy <= names(after)
