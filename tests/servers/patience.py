"""How do tests wait for a store's retries? Not at all: time is skipped, and still counts against the deadline."""

from __future__ import annotations

import time

from ckptmgr.store.retries import Patience

__all__ = ["SkippedTime", "impatient"]


class SkippedTime:
    """A clock that goes on by itself, and jumps where somebody would sleep."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)

    def __call__(self) -> float:
        return time.monotonic() + sum(self.waits)


def impatient(deadline_s: float) -> Patience:
    """The deadline, without the waiting."""
    clock = SkippedTime()
    return Patience(deadline_s, clock.sleep, clock)
