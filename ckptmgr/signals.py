"""Which signals has this process received? `SignalWatch` notes them and lets the loop finish its step."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

_log = logging.getLogger("ckptmgr.signals")

_TERMINATING = {"SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"}


class SignalWatch:
    """Notes signals by name. `stop` becomes true with the first SIGTERM, SIGINT, SIGHUP or SIGQUIT.

    A second one of these has the effect it would have had without us, so that whoever can't wait
    ends the process at once. In a forked child every signal has. `on_signal` is called inside the
    handler at each signal: it may set a flag, and nothing else.
    """

    def __init__(self, names: Sequence[str], on_signal: Callable[[], None] | None = None) -> None:
        self.stop = False
        self.on_signal = on_signal
        self._names = tuple(names)
        self._seen: deque[str] = deque()
        self._previous: dict[int, Any] = {}
        self._pid = 0
        self._is_watching = False

    def install(self) -> None:
        """Begin to watch. Python allows that in the main thread only: elsewhere a warning, and nothing is watched."""
        if not self._names or not _is_main_thread("install"):
            return
        self._pid, self._is_watching = os.getpid(), True
        for name in self._names:
            number = signal.Signals[name]
            if number not in self._previous:  # else ours is in place, perhaps below another that passes signals on
                self._previous[number] = signal.getsignal(number)
                signal.signal(number, self._handle)

    def uninstall(self) -> None:
        """Put back what was there. Where another handler was put over ours it stays, and ours passes signals on."""
        if not self._previous or not _is_main_thread("uninstall"):
            return
        self._is_watching = False
        for number in list(self._previous):
            if signal.getsignal(number) == self._handle:
                self._restore(number)

    @property
    def pending(self) -> tuple[str, ...]:
        """The names of signals seen and not yet taken, each once, in order."""
        return tuple(dict.fromkeys(self._seen)) if self._seen else ()

    def take(self) -> tuple[str, ...]:
        """The pending names, which are then no longer pending."""
        taken = []
        while self._seen:  # one at a time: a signal may arrive between any two instructions
            taken.append(self._seen.popleft())
        return tuple(dict.fromkeys(taken))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous.get(number)
        name = signal.Signals(number).name
        if os.getpid() != self._pid or (self._is_watching and self.stop and name in _TERMINATING):
            if signal.getsignal(number) == self._handle:
                self._restore(number)
                os.kill(os.getpid(), number)
                return
        elif self._is_watching:
            self._seen.append(name)
            self.stop = self.stop or name in _TERMINATING
            if self.on_signal is not None:
                self.on_signal()
        # Python's own SIGINT handler would raise KeyboardInterrupt in the middle of the step.
        if callable(previous) and previous is not signal.default_int_handler:
            previous(number, frame)

    def _restore(self, number: int) -> None:
        previous = self._previous.pop(number)
        # None is a handler that was not installed from Python and can't be put back from it.
        signal.signal(number, signal.SIG_DFL if previous is None else previous)


def _is_main_thread(action: str) -> bool:
    if threading.current_thread() is threading.main_thread():
        return True
    _log.warning("signals.%s.skipped reason=only the main thread may change signal handlers", action)
    return False
