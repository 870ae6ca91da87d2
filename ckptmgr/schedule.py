"""Is a save due at this call? The triggers, with everything they are told.

Keeps what a Moment is made of (the last save, the clock, signals, requests) and a horizon below
which no trigger can speak, so that a call that is not due costs a few comparisons.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from .signals import SignalWatch
from .triggers import AnyOf, Decision, Horizon, Moment


class Quiet:
    """Which calls need no look at anything: those at steps from `first` to before `end`, and unless steps alone count
    (`is_by_step`), in epochs before `epoch` and as long as `clock` has not come to `until` (None: whatever the time).
    It knows nobody, so that whoever holds it keeps no schedule, and no manager, alive."""

    __slots__ = ("clock", "end", "epoch", "first", "is_by_step", "until")

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.first, self.is_by_step = 0, True
        self.end = self.epoch = -math.inf
        self.until: float | None = None

    def alert(self) -> None:
        """No call is quiet any more. Safe in a signal handler and from any thread."""
        self.end = -math.inf


class Schedule:
    """When the next save is due. `clock` counts seconds and never goes backwards. Calling `alert` has
    the triggers asked at the next call whatever the horizon says."""

    def __init__(self, rule: AnyOf, signals: SignalWatch, clock: Callable[[], float]) -> None:
        self._rule, self._signals, self._clock = rule, signals, clock
        self._requests: list[str] = []
        self.quiet = Quiet(clock)
        self.alert = self.quiet.alert
        self.last_step, self._last_epoch, self._last_time = 0, 0, clock()
        self._look_ahead()

    def request(self, reason: str) -> None:
        """Make a save due at the next call. Safe from any thread."""
        self._requests.append(reason)
        self.alert()

    def is_quiet(self, step: int, epoch: int | None) -> bool:
        """Whether no save can be due and nothing else needs attention: the loop's fast path."""
        quiet = self.quiet
        return quiet.first <= step < quiet.end and (
            quiet.is_by_step
            or ((epoch is None or epoch < quiet.epoch) and (quiet.until is None or quiet.clock() < quiet.until))
        )

    def decide(self, step: int, epoch: int | None, metrics: Mapping[str, float]) -> Decision:
        """Ask the triggers. Changes nothing: a save that is due stays due until `saved`."""
        return Decision(self._rule.due(self._moment(step, epoch, metrics)))

    def listen(self) -> bool:
        """Whether another rank knows of a save that failed: there is no other."""
        return False

    def vote(self, step: int, epoch: int | None, metrics: Mapping[str, float], *, trouble: bool) -> None:
        """Tell other ranks what this one wants: there are none."""

    @property
    def should_stop(self) -> bool:
        """Whether a terminating signal came."""
        return self._signals.stop

    @property
    def stopping_s(self) -> float | None:
        """How long ago it came to this process, or None."""
        return None if self._signals.stopped_at is None else time.monotonic() - self._signals.stopped_at

    def calm(self) -> None:
        """Back to the fast path. Whoever calls it looks afterwards at whatever may have alerted."""
        self.quiet.end = self._quiet_step  # first: what comes in between takes it back again
        if self.is_asked:
            self.alert()

    @property
    def is_asked(self) -> bool:
        """Whether a signal or a request has come that no save has answered yet."""
        return bool(self._requests or self._signals.pending)

    def agree_is_asked(self) -> bool:
        """The same, of any rank."""
        return self.is_asked

    def heard(self) -> tuple[int, int]:
        """How many requests and signals have come that no save has answered: a save begun now answers those."""
        return len(self._requests), self._signals.count

    def saved(self, step: int, epoch: int | None, heard: tuple[int, int] | None = None) -> None:
        """A save of this step was begun: clocks and multiples go on from here. It answers what had been `heard` when
        the state was captured; None: all that has come until now."""
        requests, signals = heard or self.heard()
        self._go_on_from(step, epoch)  # first, as above
        self._signals.take(signals)
        del self._requests[:requests]
        if self.is_asked:
            self.alert()

    def restored(self, step: int, epoch: int | None) -> None:
        """The state of this step is there again: clocks and multiples go on from here. It answers nothing: what was
        asked for meanwhile is still due."""
        self._go_on_from(step, epoch)
        if self.is_asked:
            self.alert()

    def end(self) -> None:
        """No call is quiet any more."""
        self.alert()

    def _go_on_from(self, step: int, epoch: int | None) -> None:
        self.last_step, self._last_time = step, self._clock()
        self._last_epoch = self._last_epoch if epoch is None else epoch
        self._look_ahead()

    def _moment(self, step: int, epoch: int | None, metrics: Mapping[str, float]) -> Moment:
        return Moment(
            step,
            epoch,
            metrics,
            self._clock() - self._last_time,
            self.last_step,
            self._last_epoch,
            self._signals.pending,
            tuple(self._requests),
        )

    def _look_ahead(self) -> None:
        now = Moment(self.last_step, self._last_epoch, last_step=self.last_step, last_epoch=self._last_epoch)
        horizon: Horizon = self._rule.horizon(now)
        # Without a rule that asks for the time, the clock need not be looked at; often steps alone count.
        quiet = self.quiet
        quiet.until = None if horizon.elapsed == math.inf else self._last_time + horizon.elapsed
        quiet.is_by_step = quiet.until is None and horizon.epoch == math.inf
        quiet.first, quiet.epoch, self._quiet_step = self.last_step, horizon.epoch, horizon.step
        quiet.end = self._quiet_step
