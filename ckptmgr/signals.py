"""Which signals has this process received? `SignalWatch` notes them and lets the loop finish its step."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

_log = logging.getLogger("ckptmgr.signals")

_TERMINATING = {"SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"}


class SignalWatch:
    """Notes signals by name. `stop` becomes true with the first SIGTERM, SIGINT, SIGHUP or SIGQUIT.

    A second one of these has the effect it would have had without us, so that whoever can't wait
    ends the process at once. In a forked child every signal has, and once the watch is uninstalled
    or dropped. `on_signal` is called inside the handler at each signal: it may set a flag, and
    nothing else.
    """

    def __init__(self, names: Sequence[str], on_signal: Callable[[], None] | None = None) -> None:
        self.stop = False
        self.stopped_at: float | None = None  # when `stop` became true, by time.monotonic
        self.on_signal = on_signal
        self._names = tuple(names)
        self._seen: deque[str] = deque()
        self._handlers: dict[int, _Handler] = {}  # those that pass signals to us
        self._pid = 0

    def install(self) -> None:
        """Begin to watch. Python allows that in the main thread only: elsewhere a warning, and nothing is watched."""
        if not self._names or not _is_main_thread("install"):
            return
        self._pid = os.getpid()
        for name in self._names:
            number = signal.Signals[name]
            if number not in self._handlers:
                handler = self._handlers[number] = _Handler(self, number)
                signal.signal(number, handler)

    def uninstall(self) -> None:
        """Put back what was there. Where another handler was put over ours it stays, and ours passes signals on."""
        if not self._handlers or not _is_main_thread("uninstall"):
            return
        handlers, self._handlers = self._handlers, {}
        for handler in handlers.values():
            if handler.is_on_top:
                handler.put_back()

    @property
    def pending(self) -> tuple[str, ...]:
        """The names of signals seen and not yet taken, each once, in order."""
        return tuple(dict.fromkeys(self._seen)) if self._seen else ()

    @property
    def count(self) -> int:
        """How many signals are pending, equal ones counted."""
        return len(self._seen)

    def take(self, count: int | None = None) -> tuple[str, ...]:
        """The names of the first so many pending ones (None: of all), which are then no longer pending."""
        taken = []
        for _ in range(
            len(self._seen) if count is None else count
        ):  # one at a time: a signal may arrive between any two instructions
            taken.append(self._seen.popleft())
        return tuple(dict.fromkeys(taken))

    def is_served_by(self, handler: _Handler) -> bool:
        return self._pid == os.getpid() and self._handlers.get(handler.number) is handler

    def note(self, name: str) -> bool:
        """Called by a handler alone. False for a signal that is to have its effect."""
        if self.stop and name in _TERMINATING:
            return False
        self._seen.append(name)
        if name in _TERMINATING and not self.stop:
            self.stop, self.stopped_at = True, time.monotonic()
        if self.on_signal is not None:
            self.on_signal()
        return True

    def forget(self, handler: _Handler) -> None:
        """Watch no more what this handler watches."""
        self._handlers.pop(handler.number, None)


class _Handler:
    """What is installed for one signal. It holds its watch only weakly: a watch that was dropped without
    a word, as in a notebook cell that is run again, watches no more."""

    def __init__(self, watch: SignalWatch, number: int) -> None:
        self.number = number
        self._watch = weakref.ref(watch)
        self._previous: Any = signal.getsignal(number)

    @property
    def is_on_top(self) -> bool:
        return signal.getsignal(self.number) is self

    def put_back(self) -> Any:
        """Put what is below in our place, and answer what that is."""
        below = self._below()
        # None is a handler that was not installed from Python and can't be put back from it.
        signal.signal(self.number, signal.SIG_DFL if below is None else below)
        return below

    def __call__(self, number: int, frame: FrameType | None) -> None:
        watch = self._watcher()
        is_noted = watch is not None and watch.note(signal.Signals(number).name)
        if is_noted or not self.is_on_top:
            below = self._below()
            if watch is not None and below is signal.default_int_handler:
                return  # it would raise KeyboardInterrupt in the middle of the step
        else:
            if watch is not None:
                watch.forget(self)
            below = self.put_back()
            if not callable(below):
                os.kill(os.getpid(), number)
        if callable(below):
            below(number, frame)

    def _watcher(self) -> SignalWatch | None:
        """The watch, as long as it watches."""
        watch = self._watch()
        return watch if watch is not None and watch.is_served_by(self) else None

    def _below(self) -> Any:
        """What was there before, past those of ours that have nobody to pass signals to."""
        below = self._previous
        while isinstance(below, _Handler) and below._watcher() is None:
            below = below._previous
        return below


def _is_main_thread(action: str) -> bool:
    if threading.current_thread() is threading.main_thread():
        return True
    _log.warning("signals.%s.skipped reason=only the main thread may change signal handlers", action)
    return False
