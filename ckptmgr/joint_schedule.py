"""Is a save due at this call, on every rank? Several ranks decide together, without waiting for each other.

Steps and epochs are the same everywhere, so what depends on them alone is not discussed. For the rest
(clock, predicates, signals, requests) every rank votes at the end of one call and reads the result in the
next: the votes travel while training goes on, and all see the same answer at the same step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from .coordinator import NONE, SAVE, STOP, TROUBLE, Coordinator
from .schedule import Schedule
from .triggers import AnyOf, AtSteps, Decision, Every, EveryEpochs, EverySteps, OnRequest, OnSignals

_STEADY = (EverySteps, EveryEpochs, AtSteps)
_ANYWHERE = (OnSignals, OnRequest)  # these count on whatever rank they come; the others are asked on rank 0

_ERROR = 8  # a trigger raised on rank 0
_BITS = 8  # above them rank 0 says in how many calls the next vote is
_VOTES_EVERY_S = 0.02
_MOST_CALLS = 50  # from one vote to the next: steps may grow longer
_FEWEST_CALLS = 5  # that tell how long a call takes


class JointSchedule(Schedule):
    """A `Schedule` for a rank of several. All ranks make the same calls with the same steps and epochs.

    Blocks, where a call says so, for ranks that are behind; raises `CoordinationError`.
    """

    def __init__(self, before: Schedule, ranks: Coordinator, *, takes_requests: bool = True) -> None:
        rule, signals, clock = before._rule, before._signals, before._clock
        steady = AnyOf(tuple(trigger for trigger in rule.triggers if isinstance(trigger, _STEADY)))
        local = [trigger for trigger in rule.triggers if not isinstance(trigger, _STEADY)]
        self._local = AnyOf(tuple(one for one in local if not ranks.rank or isinstance(one, _ANYWHERE)))
        # What a predicate says may be true at one call only.
        self._has_predicate = any(not isinstance(one, (*_ANYWHERE, Every)) for one in self._local.triggers)
        super().__init__(steady, signals, clock)
        self._requests, self.quiet, self.alert = before._requests, before.quiet, before.alert
        self.last_step, self._last_epoch = before.last_step, before._last_epoch
        self._look_ahead()
        # Steps and epochs alone are no reason to talk at every call.
        is_open = takes_requests or any(not isinstance(trigger, OnRequest) for trigger in local)
        self._ranks, self._ballot = ranks, ranks.ballot() if is_open else None
        self._calls, self._next_vote = 0, math.inf if self._ballot is None else 1
        self._agreed, self._is_told_to_stop = NONE, False
        self._is_answered = False  # the vote under way asks for a save that has been made since
        self._why: str | None = None  # this rank voted for a save
        self._next_why: str | None = None  # it is going to vote for one
        self._error: Exception | None = None  # of a trigger, until all hear of it
        self._began, self._began_at, self._interval = clock(), 0, 1  # to tell how long a call takes

    def is_quiet(self, step: int, epoch: int | None) -> bool:
        self._calls += 1
        return (
            self._calls < self._next_vote
            and not self._has_predicate
            and self.last_step <= step < self._quiet_step
            and (epoch is None or epoch < self.quiet.epoch)
        )

    def calm(self) -> None:
        """No call is covered by `quiet`: each of them is counted."""

    def listen(self) -> bool:
        """Read the result of the last vote, if this is the call for it; whether any rank knows of a save that
        failed. Blocks."""
        self._agreed = NONE
        if self._calls < self._next_vote or self._ballot is None:
            return False
        agreed = self._ballot.result()
        self._next_vote = self._calls + max(1, agreed >> _BITS)
        self._agreed = agreed & ((1 << _BITS) - 1)
        if self._is_answered:
            self._agreed &= ~SAVE
        self._is_answered = False
        if agreed & STOP and not self._is_told_to_stop:
            self._agreed |= SAVE  # even if the signal was answered by an earlier step: the loop ends with this one
            self._is_told_to_stop = True
            self._signals.stopped_at = self._signals.stopped_at or time.monotonic()
        if agreed & _ERROR:
            error, self._error = self._error, None
            self._ranks.prompt.exchange("maybe_save", lambda: _raise(error), lambda parts: None)
        return bool(agreed & TROUBLE)

    def decide(self, step: int, epoch: int | None, metrics: Mapping[str, float]) -> Decision:
        """What all ranks decide at this call, after `listen`."""
        reason = self._rule.due(self._moment(step, epoch, metrics))
        if reason is None and self._agreed & SAVE:
            reason = self._why or "another rank asked for it"
        return Decision(reason)

    def saved(self, step: int, epoch: int | None, heard: tuple[int, int] | None = None) -> None:
        super().saved(step, epoch, heard)
        self._is_answered = self._ballot is not None and self._ballot.is_open
        self._next_why = None

    def end(self) -> None:
        self._next_vote = 0

    def vote(self, step: int, epoch: int | None, metrics: Mapping[str, float], *, trouble: bool) -> None:
        """Say what this rank wants, if this is the call for it. Does not block."""
        if self._ballot is None or (self._ballot.is_open and not self._has_predicate):
            return
        try:
            due = self._local.due(self._moment(step, epoch, metrics))
            self._next_why = self._next_why or due
        except Exception as exc:  # noqa: BLE001 - of the user's own predicate; raised on all ranks at a later call
            self._error = self._error or exc
        if self._ballot.is_open:
            return
        self._why, self._next_why = self._next_why, None
        wanted = (SAVE if self._why else NONE) | (_ERROR if self._error else NONE)
        wanted |= (STOP if self._signals.stop else NONE) | (TROUBLE if trouble else NONE)
        if not self._ranks.rank:
            wanted |= self._calls_to_next() << _BITS
        self._ballot.cast(wanted)

    @property
    def should_stop(self) -> bool:
        return self._is_told_to_stop

    def agree_is_asked(self) -> bool:
        """Whether any rank had a signal or request at the last vote that no save has answered: what came later
        one rank alone knows. Blocks."""
        if self._ballot is None or not self._ballot.is_open:
            return False
        return bool(self._ballot.result() & SAVE) and not self._is_answered

    def _look_ahead(self) -> None:
        super()._look_ahead()
        self.alert()

    def _calls_to_next(self) -> int:
        """So many that a loop of short steps does not vote at each of them."""
        now, calls = self._clock(), self._calls - self._began_at
        taken = now - self._began
        if calls >= _FEWEST_CALLS and taken > 0:
            self._began, self._began_at = now, self._calls
            self._interval = max(1, min(_MOST_CALLS, math.floor(_VOTES_EVERY_S * calls / taken)))
        return self._interval


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
