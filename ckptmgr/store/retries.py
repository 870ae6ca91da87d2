"""When is a request to a store asked again? Here and nowhere else: the client libraries' own retries are off.

A request has one deadline, its retries included. They come after an exponential back-off with full
jitter, not before the store said, and no faster for all threads together than a budget allows, so that
an outage is not made worse by those who wait for its end.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple, TypeVar

from tenacity import RetryCallState, Retrying, wait_random_exponential

from .haste import haste

_T = TypeVar("_T")

_BACK_OFF = wait_random_exponential(multiplier=0.2, max=20)  # seconds
_AT_ONCE, _PER_SECOND = 20, 2.0  # retries of a whole store: so many from the budget, then as it fills
_WHILE_DOWN = 0.1  # of the deadline until the last try, while the store did not answer within the last one
_OF_WHAT_IS_LEFT = 0.5  # for one try, so that another can follow one that hangs
_LEAST_S = 0.01  # for one try
_OF_A_STRANGER = 6  # tries, about six seconds; a name that nobody knows does not heal

_log = logging.getLogger("ckptmgr.store")


class Outlook(NamedTuple):
    """What an error says of asking again. `wait_s` is what the store asked for; `is_reached` is whether
    there was a server at all."""

    may_pass: bool
    wait_s: float = 0.0
    is_reached: bool = True


@dataclass(frozen=True, slots=True)
class Patience:
    """How long one request may take, its retries included, and how time passes meanwhile."""

    deadline_s: float = 600.0
    sleep: Callable[[float], object] | None = None  # else a wait that `Retries.give_up` ends
    clock: Callable[[], float] = time.monotonic

    @property
    def silence_s(self) -> float:
        """How long a connection may say nothing before it is given up."""
        return min(60.0, self.deadline_s / 4)


class Retries:
    """Asks a store, and asks again. One for each store and process; safe from any thread."""

    def __init__(self, patience: Patience, outlook: Callable[[Exception], Outlook]) -> None:
        self._patience, self._outlook = patience, outlook
        self._lock = threading.Lock()
        self._tokens, self._filled = float(_AT_ONCE), patience.clock()
        self._is_known = self._is_down = False
        self._given_up_until = float("-inf")
        self._waited_on: list[threading.Event] = []  # one for each thread that waits for its next try

    @property
    def silence_s(self) -> float:
        return self._patience.silence_s

    def give_up(self) -> None:
        """For the length of the deadline nothing is asked again, and a store that is down is not asked at all."""
        self._given_up_until = self._patience.clock() + self._patience.deadline_s
        with self._lock:  # after the line above: who comes later sees that one
            waited_on = [*self._waited_on]
        for event in waited_on:
            event.set()

    def __call__(
        self, request: Callable[[float], _T], what: str = "", mend: Callable[[_T], object] | None = None
    ) -> _T:
        """The answer to `request`, which is called with the seconds that one try may take. Raises the error of
        the last try as it is, with a note that tells `what` it was, the number of tries and the seconds.

        `mend` gets an answer that took more than one try: an earlier one may have been done as well.
        """
        clock, hurry, tried = self._patience.clock, haste(), 0
        deadline = min(self._patience.deadline_s, hurry.within_s)
        waits = min(deadline, self._patience.deadline_s * _WHILE_DOWN) if self._is_down else deadline
        begin = clock()
        last: Exception | None = TimeoutError("the store did not answer before") if self._is_down else None
        seen: RetryCallState | None = None

        def is_given_up() -> bool:
            return self._has_given_up or (hurry.unwanted is not None and hurry.unwanted.is_set())

        def ask() -> _T:
            nonlocal tried
            if last is not None and is_given_up():
                raise last
            tried += 1
            answer = request(max(_LEAST_S, (begin + deadline - clock()) * _OF_WHAT_IS_LEFT))
            self._is_known, self._is_down = True, False
            return answer

        def has_hope(state: RetryCallState) -> bool:
            nonlocal last, seen
            assert state.outcome is not None
            exc, seen = state.outcome.exception(), state
            last = exc if isinstance(exc, Exception) else None
            return last is not None and self._outlook(last).may_pass

        def is_over(state: RetryCallState) -> bool:
            is_late = clock() - begin + state.upcoming_sleep >= waits
            is_enough = hurry.is_once or (self._is_stranger(_error(state)) and state.attempt_number >= _OF_A_STRANGER)
            if self._has_given_up or (is_late and deadline == self._patience.deadline_s):
                self._is_down = True
            if is_late or is_enough or is_given_up():
                self._give_back()
                return True
            return False

        def fail(state: RetryCallState) -> _T:
            _error(state).add_note(f"{_NOTE}{f'{what}, ' if what else ''}{tried} tries in {clock() - begin:.1f} s")
            raise _error(state)

        def log(state: RetryCallState) -> None:
            kind = type(_error(state)).__name__
            wait = state.upcoming_sleep
            _log.info("request.retry what=%s tries=%d wait_s=%.2f cause=%s", what, state.attempt_number, wait, kind)

        try:
            answer = Retrying(
                sleep=lambda seconds: self._sleep(seconds, hurry.unwanted or threading.Event()),
                stop=is_over,
                wait=self._wait,
                retry=has_hope,
                before_sleep=log,
                retry_error_callback=fail,
            )(ask)
        finally:
            # An error that its own traceback leads to would keep all callers' objects until the collector comes round.
            last = None
            if seen is not None:
                seen.outcome = None
        if mend is not None and tried > 1:
            mend(answer)
        return answer

    @property
    def _has_given_up(self) -> bool:
        return self._patience.clock() < self._given_up_until

    def _sleep(self, seconds: float, end: threading.Event) -> None:
        if self._patience.sleep is not None:
            self._patience.sleep(seconds)
            return
        with self._lock:
            self._waited_on.append(end)
        try:
            if not self._has_given_up:
                end.wait(seconds)
        finally:
            with self._lock:
                self._waited_on.remove(end)

    def _wait(self, state: RetryCallState) -> float:
        return max(_BACK_OFF(state), self._outlook(_error(state)).wait_s, self._until_allowed())

    def _until_allowed(self) -> float:
        """Take one retry out of the budget; the seconds until it is there."""
        with self._lock:
            now = self._patience.clock()
            self._tokens = min(float(_AT_ONCE), self._tokens + (now - self._filled) * _PER_SECOND) - 1
            self._filled = now
            return max(0.0, -self._tokens / _PER_SECOND)

    def _give_back(self) -> None:
        """The retry that was taken is not made."""
        with self._lock:
            self._tokens += 1

    def _is_stranger(self, exc: Exception) -> bool:
        """Whether the store was never reached, by this error or before it."""
        self._is_known = self._is_known or self._outlook(exc).is_reached
        return not self._is_known


_NOTE = "store request: "


def tries(exc: BaseException) -> str:
    """What was noted of a request that failed, for messages."""
    notes = [note.removeprefix(_NOTE) for note in getattr(exc, "__notes__", ()) if note.startswith(_NOTE)]
    return "; ".join(notes)


def of_status(status: int, wait: str | None = None) -> Outlook:
    """The outlook of an HTTP answer, with its Retry-After: seconds or a date."""
    may_pass = status in (408, 429) or (status >= 500 and status != 501)
    return Outlook(may_pass, _seconds(wait) if may_pass and wait else 0.0)


def _seconds(wait: str) -> float:
    try:
        return max(0.0, float(wait))
    except ValueError:
        pass
    try:
        return max(0.0, (parsedate_to_datetime(wait) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def _error(state: RetryCallState) -> Exception:
    assert state.outcome is not None
    exc = state.outcome.exception()
    assert isinstance(exc, Exception)
    return exc


def range_length(content_range: str) -> int:
    """The bytes that a Content-Range header announces."""
    first, _, last = content_range.removeprefix("bytes ").partition("/")[0].partition("-")
    return int(last) - int(first) + 1
