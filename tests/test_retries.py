"""Is a request asked again when that can help, and only then, and no longer than its deadline?"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from servers import Bucket
from servers.patience import SkippedTime, impatient

from ckptmgr.errors import StoreError
from ckptmgr.store.haste import in_haste
from ckptmgr.store.remote import FsspecStore
from ckptmgr.store.retries import Outlook, Patience, Retries, of_status, tries
from ckptmgr.testing import FaultProxy, HttpFault


class _Failing:
    """A request that fails so many times before it answers."""

    def __init__(self, *errors: Exception | None) -> None:
        self.errors, self.limits = list(errors), list[float]()

    def __call__(self, limit: float) -> str:
        self.limits.append(limit)
        error = self.errors.pop(0) if len(self.errors) > 1 else self.errors[0]
        if error is not None:
            raise error
        return "answer"


class _StrangeError(Exception):
    """Nobody was reached."""


def _outlook(exc: Exception) -> Outlook:
    match exc:
        case _StrangeError():
            return Outlook(True, is_reached=False)
        case TimeoutError():
            return Outlook(True, exc.args[0] if isinstance(exc.args[0], int) else 0.0)
        case ConnectionError():
            return Outlook(True)
    return Outlook(False)


def _retries(deadline_s: float = 600) -> tuple[Retries, SkippedTime]:
    time = SkippedTime()
    return Retries(Patience(deadline_s, time.sleep, time), _outlook), time


def test_what_may_pass_is_asked_again_until_it_does() -> None:
    retries, time = _retries()
    assert retries(_Failing(ConnectionError(), ConnectionError(), None)) == "answer"
    assert len(time.waits) == 2


def test_what_cannot_pass_is_raised_at_once_as_it_is() -> None:
    retries, time = _retries()
    error = ValueError("wrong")
    with pytest.raises(ValueError, match="wrong") as caught:
        retries(_Failing(error))
    assert (caught.value, time.waits, tries(caught.value)) == (error, [], "")


def test_no_wait_begins_that_would_end_after_the_deadline() -> None:
    retries, time = _retries(100)
    with pytest.raises(ConnectionError) as caught:
        retries(_Failing(ConnectionError()), "part 3")
    assert 60 < sum(time.waits) < 100
    assert tries(caught.value).startswith(f"part 3, {len(time.waits) + 1} tries in ")


def test_waits_grow_to_a_limit_and_are_drawn_by_lot() -> None:
    retries, time = _retries(10_000)
    with pytest.raises(ConnectionError):
        retries(_Failing(ConnectionError()))
    assert all(wait <= 0.2 * 2**number for number, wait in enumerate(time.waits[:8]))
    assert max(time.waits) <= 20
    assert len(set(time.waits)) == len(time.waits)


def test_the_store_says_how_long_to_wait() -> None:
    retries, time = _retries()
    retries(_Failing(TimeoutError(45), None))
    assert time.waits == [45]


def test_a_try_may_take_half_of_what_is_left() -> None:
    retries, _ = _retries(100)
    request = _Failing(TimeoutError(60), None)
    retries(request)
    assert [round(limit) for limit in request.limits] == [50, 20]


def test_a_store_that_was_never_reached_fails_soon_and_one_that_was_is_waited_for() -> None:
    retries, time = _retries(600)
    with pytest.raises(_StrangeError):
        retries(_Failing(_StrangeError()))
    assert len(time.waits) == 5
    retries(_Failing(None))
    with pytest.raises(_StrangeError):
        retries(_Failing(_StrangeError()))
    assert sum(time.waits) > 300


def test_while_a_store_is_down_nobody_waits_for_it_as_long_again() -> None:
    retries, time = _retries(100)
    for least, most in ((60, 100), (0, 10), (0, 10)):
        before = sum(time.waits)
        with pytest.raises(ConnectionError):
            retries(_Failing(ConnectionError()))
        assert least < sum(time.waits) - before < most
    retries(_Failing(None))
    before = sum(time.waits)
    with pytest.raises(ConnectionError):
        retries(_Failing(ConnectionError()))
    assert sum(time.waits) - before > 60


def test_an_outage_is_not_multiplied_by_those_who_meet_it() -> None:
    """All threads together retry twenty times at once, and then twice a second."""
    now, lock_free = [0.0], list[float]()
    retries = Retries(Patience(60, lock_free.append, lambda: now[0]), _outlook)
    for _ in range(100):
        retries(_Failing(ConnectionError(), None))
    assert max(lock_free[:20]) <= 0.2
    assert [round(wait, 1) for wait in lock_free[-3:]] == [39.0, 39.5, 40.0]


def test_retries_are_safe_from_many_threads() -> None:
    retries, _ = _retries()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: retries(_Failing(ConnectionError(), None)), range(64)))
    assert answers == ["answer"] * 64


@pytest.mark.parametrize(
    ("status", "expected"),
    [(200, False), (301, False), (400, False), (401, False), (403, False), (404, False), (408, True), (409, False),
     (412, False), (416, False), (429, True), (500, True), (501, False), (502, True), (503, True), (504, True)],
)  # fmt: skip
def test_which_answers_may_pass(status: int, expected: bool) -> None:
    assert of_status(status).may_pass == expected


@pytest.mark.parametrize(
    ("spoken", "expected"), [("7", 7), ("0.5", 0.5), ("-1", 0), ("Fri, 01 Jan 2021 00:00:00 GMT", 0), ("soon", 0)]
)
def test_retry_after_is_seconds_or_a_date(spoken: str, expected: float) -> None:
    assert of_status(503, spoken).wait_s == expected


def test_an_interrupt_is_not_waited_out() -> None:
    def interrupted(limit: float) -> None:
        raise KeyboardInterrupt

    retries, time = _retries()
    with pytest.raises(KeyboardInterrupt):
        retries(interrupted)
    assert time.waits == []


def test_a_slow_store_that_answers_again_after_an_outage_is_not_down_for_ever() -> None:
    retries, _ = _retries(600)
    retries(_Failing(None))
    with pytest.raises(ConnectionError):
        retries(_Failing(ConnectionError()))

    def slow(limit: float) -> str:
        if limit < 200:
            raise TimeoutError(0)
        return "answer"

    assert retries(slow) == "answer"


def test_a_retry_that_is_not_made_costs_nothing_of_the_budget() -> None:
    now, waits = [0.0], list[float]()
    retries = Retries(Patience(60, waits.append, lambda: now[0]), _outlook)
    for _ in range(100):
        with pytest.raises(TimeoutError):
            retries(_Failing(TimeoutError(3600)))
    retries(_Failing(ConnectionError(), None))
    assert len(waits) == 1
    assert waits[0] <= 0.2


def test_one_in_haste_waits_no_longer_than_it_says_and_does_not_call_the_store_down() -> None:
    retries, time = _retries(600)
    request = _Failing(ConnectionError())
    with in_haste(10), pytest.raises(ConnectionError):
        retries(request)
    assert request.limits[0] <= 5
    assert sum(time.waits) < 10
    with in_haste(10, is_once=True), pytest.raises(ConnectionError):
        retries(once := _Failing(ConnectionError()))
    assert len(once.limits) == 1
    before = sum(time.waits)
    with pytest.raises(ConnectionError):
        retries(_Failing(ConnectionError()))
    assert sum(time.waits) - before > 60


def test_what_took_two_tries_is_mended_and_nothing_else() -> None:
    retries, _ = _retries()
    mended = list[str]()
    retries(_Failing(None), mend=mended.append)
    assert mended == []
    retries(_Failing(ConnectionError(), None), mend=mended.append)
    assert mended == ["answer"]


def test_when_the_store_is_given_up_those_who_wait_fail_and_a_store_that_is_down_is_not_asked() -> None:
    retries = Retries(Patience(600), _outlook)
    asked = threading.Event()

    def failing(limit: float) -> None:
        asked.set()
        raise TimeoutError(500)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(retries, failing)
        assert asked.wait(60)
        retries.give_up()
        with pytest.raises(TimeoutError, match="500"):
            future.result(60)
    with pytest.raises(TimeoutError, match="did not answer"):
        retries(request := _Failing(None))
    assert request.limits == []


def test_what_nobody_wants_any_more_is_not_asked_again_and_the_store_is_not_called_down() -> None:
    retries = Retries(Patience(600), _outlook)
    asked, unwanted = threading.Event(), threading.Event()

    def failing(limit: float) -> None:
        asked.set()
        raise TimeoutError(500)

    def ask() -> None:
        with in_haste(unwanted=unwanted):
            retries(failing)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(ask)
        assert asked.wait(60)
        unwanted.set()
        with pytest.raises(TimeoutError, match="500"):
            future.result(60)
    with in_haste(unwanted=unwanted), pytest.raises(TimeoutError):
        retries(request := _Failing(TimeoutError(500), None))
    assert len(request.limits) == 1
    assert retries(_Failing(None)) == "answer"


def test_a_store_that_was_given_up_is_asked_as_ever_after_its_deadline() -> None:
    retries, time = _retries(100)
    retries.give_up()
    with pytest.raises(ConnectionError):
        retries(_Failing(ConnectionError(), None))
    time.sleep(100)
    assert retries(_Failing(ConnectionError(), None)) == "answer"


# Against real clients

_NOWHERE = "http://127.0.0.1:9"  # the port that is for discarding


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("s3://bucket/runs", {"endpoint_url": _NOWHERE, "key": "k", "secret": "s"}),
        ("s3://bucket/runs", {"endpoint_url": "http://no-such-host.invalid", "key": "k", "secret": "s"}),
        ("gs://bucket/runs", {"endpoint_url": _NOWHERE, "token": "anon"}),
        ("oss://bucket/runs", {"endpoint": _NOWHERE, "key": "k", "secret": "s"}),
    ],
)
def test_a_mistyped_endpoint_is_told_after_six_tries(url: str, options: dict[str, str]) -> None:
    with pytest.raises(StoreError, match=r"could not list .* \(6 tries in"):
        FsspecStore(url, options, impatient(600)).list()


def test_each_request_is_sent_once_for_each_try(
    s3_proxy: Any, gcs: Any, gcs_server: Any, oss: Any, oss_server: Any
) -> None:
    """No library repeats below us: its tries would multiply with ours."""
    for bucket, server in (s3_proxy, (gcs, gcs_server), (oss, oss_server)):
        time = SkippedTime()
        store = FsspecStore(bucket.url, bucket.options, Patience(20, time.sleep, time))
        server.faults.append(HttpFault("", status=503, count=3))
        store.put("key", b"1")
        assert [len(server.log), len(time.waits)] == [4, 3]


def test_what_was_tried_is_told_without_credentials(s3_moto: Bucket) -> None:
    with FaultProxy(s3_moto.options["endpoint_url"]) as proxy:
        options = {**s3_moto.options, "endpoint_url": proxy.url}
        store = FsspecStore(f"{s3_moto.url}/runs", options, impatient(10))
        writer = store.writer("large")
        proxy.faults.append(HttpFault("partNumber=1", status=500, count=1000))
        writer.write(bytes(17 << 20))
        with pytest.raises(StoreError, match=r"could not write .*/runs/large: .*\(part 1, \d+ tries in") as caught:
            writer.commit()
        writer.abort()
        assert "testsecret" not in str(caught.value)
        assert "Signature" not in str(caught.value)
