"""What time is it, where a wrong answer deletes checkpoints? The earlier of what two clocks say.

The wall clock can be set while a run trains: by hand, by a host that finds out the time late, by a
virtual machine that wakes up. Of a checkpoint's age only as much is believed as has also passed by a clock
that nobody sets, so that one that jumps ahead lets nothing go that would have stayed; one that goes back keeps
more for a while. What was stamped here after a jump is as old as that other clock says, whatever the stamp. Both
start with the process: what was wrong before can't be told here.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

_JUMP = timedelta(minutes=10)  # a smaller difference is none: clocks are never quite even

_log = logging.getLogger("ckptmgr.clock")


def _wall() -> datetime:
    return datetime.now(UTC)


def _passed_s() -> float:
    """Seconds by a clock that nobody sets; where there is one that goes on while the host sleeps, by that."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class SafeClock:
    """The time since it was made, and stamps in the order in which they are asked for."""

    def __init__(self, wall: Callable[[], datetime] = _wall, passed_s: Callable[[], float] = _passed_s) -> None:
        self._wall, self._passed_s = wall, passed_s
        self._start, self._began_s = wall(), passed_s()
        self._last_step, self._last_stamp = -1, datetime.min.replace(tzinfo=UTC)
        self._odd: dict[datetime, float] = {}  # the stamps of a clock that was set, and when they were made
        self._is_told = False

    def now(self) -> datetime:
        """The time to judge ages by: never later than it is by either clock."""
        wall, even = self._wall(), self._even(self._passed_s())
        if not self._is_told and abs(wall - even) > _JUMP:
            self._is_told = True
            _log.warning(
                "clock.jump wall=%s expected=%s: it was set, or the host slept; no checkpoint goes because of that",
                wall.isoformat(), even.isoformat(),
            )  # fmt: skip
        return min(wall, even)

    def stamp(self, step: int) -> datetime:
        """The time to be written into a checkpoint of a step: the wall clock's, but of two saves of one step the
        second is the later one whatever that says."""
        stamp = self._wall()
        if step <= self._last_step and stamp <= self._last_stamp:
            stamp = self._last_stamp + timedelta(microseconds=1)
        self._last_step, self._last_stamp = max(step, self._last_step), max(stamp, self._last_stamp)
        if abs(stamp - self._even(passed_s := self._passed_s())) > _JUMP:
            self._odd[stamp] = passed_s
        return stamp

    def time_of(self, stamp: datetime) -> datetime:
        """When a checkpoint with this stamp was saved, to be compared with `now`."""
        if stamp not in self._odd:
            return stamp
        return self.now() - timedelta(seconds=self._passed_s() - self._odd[stamp])

    def _even(self, passed_s: float) -> datetime:
        return self._start + timedelta(seconds=passed_s - self._began_s)
