"""Where does a save run while training goes on? One worker thread, one save in flight."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

from . import priority
from .errors import CheckpointError, FencedError
from .manifest import CheckpointInfo

_log = logging.getLogger("ckptmgr.save")


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A save that ended without a checkpoint and without an error, and why."""

    why: str


class Pending:
    """A save that has not committed yet, or how it ended.

    `step` is its step; `url` the checkpoint's once committed, else None; `error` what it failed
    with, else None; `skipped` why there is no checkpoint although nothing failed (`on_full: skip`), else
    None; `in_background` says whether training goes on meanwhile. An error is raised
    once: by `wait`, or else by the manager's next call.
    """

    def __init__(self, step: int, root: str, future: Future[Ended], *, in_background: bool) -> None:
        self.step, self.in_background = step, in_background
        self._root = root
        self._future = future
        self._is_reported = False

    def done(self) -> bool:
        """Whether it has ended, well or not. Never blocks."""
        return self._future.done()

    def wait(self, timeout: float | None = None) -> None:
        """Block until it is committed and durable, or left out (`skipped`); `timeout` in seconds.

        Raises what the save failed with (`SaveFailedError`, `FencedError`, `AlreadyExistsError`),
        or `TimeoutError` while it is still running.
        """
        self.settle(timeout)
        if error := self.take_error():
            raise error

    def settle(self, timeout: float | None = None) -> None:
        """Block until it has ended, well or not. Raises `TimeoutError`."""
        try:
            self._future.exception(timeout)
        except TimeoutError as exc:
            raise TimeoutError(f"step {self.step} is still being saved to {self._root} after {timeout} s") from exc

    @property
    def url(self) -> str | None:
        ended = self._ended
        return f"{self._root}/{ended.name}" if isinstance(ended, CheckpointInfo) else None

    @property
    def skipped(self) -> str | None:
        ended = self._ended
        return ended.why if isinstance(ended, LeftOut) else None

    @property
    def _ended(self) -> Ended | None:
        return self._future.result() if self.done() and self._future.exception() is None else None

    @property
    def error(self) -> CheckpointError | None:
        error = self._future.exception() if self.done() else None
        return error if isinstance(error, CheckpointError) else None

    @property
    def is_untold(self) -> bool:
        """Whether it has failed, and the error was not raised yet."""
        return self.done() and not self._is_reported and self._future.exception() is not None

    def take_error(self) -> BaseException | None:
        """What it failed with, the first time it is asked."""
        if not self.done() or self._is_reported:
            return None
        error = self._future.exception()
        self._is_reported = error is not None
        return error

    def __repr__(self) -> str:
        if not self.done():
            return f"<Pending step {self.step}: saving>"
        return f"<Pending step {self.step}: {self.error or self.url or self.skipped}>"


Ended: TypeAlias = CheckpointInfo | LeftOut


class Worker:
    """Runs saves one at a time, in a thread of low priority or at once, and tells of their failures once each.

    Up to `tolerate` failures in a row become warnings. At interpreter exit the save in flight is
    completed, as with any `ThreadPoolExecutor`.
    """

    def __init__(self, *, tolerate: int = 0) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._tolerate = tolerate
        self._failures = 0  # in a row
        self._last: Pending | None = None
        self._good: Pending | None = None  # the last one that is known to have ended well
        self._pid = os.getpid()

    @property
    def pending(self) -> Pending | None:
        """The last save."""
        self._look_for_fork()
        return self._last

    def _look_for_fork(self) -> None:
        if self._pid != os.getpid():  # the thread stayed with the parent, and so did the save in flight
            self._pool = self._last = None
            self._pid = os.getpid()

    def submit(
        self,
        step: int,
        root: str,
        save: Callable[[], Ended],
        after: Callable[[], None],
        *,
        in_background: bool,
    ) -> Pending:
        """Start a save, or make it now; `after` is called when it has ended, in the thread where it ran."""
        self._look_for_fork()
        future = self._queued(step, root, save) if in_background else None
        if future is None:
            future = _made(save)
            self._last = Pending(step, root, future, in_background=False)
        future.add_done_callback(lambda _: after())
        assert self._last is not None
        return self._last

    def _queued(self, step: int, root: str, save: Callable[[], Ended]) -> Future[Ended] | None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "ckptmgr-save", priority.lower)
        try:
            future = self._pool.submit(save)
            self._last = Pending(step, root, future, in_background=True)
        except RuntimeError:  # the interpreter is on its way out and starts no thread: now or never
            return None
        except BaseException:
            # Interrupted, and perhaps queued all the same: nobody would know of that save, and the next
            # one would overwrite what it writes from.
            self._pool.shutdown()
            self._pool = None
            raise
        return future

    @property
    def is_busy(self) -> bool:
        """Whether a save is in flight."""
        return self.pending is not None and not self.pending.done()

    @property
    def has_failed(self) -> bool:
        """Whether the last save has ended badly and nobody was told."""
        return self.pending is not None and self.pending.is_untold

    def is_saving(self, step: int) -> bool:
        return self.is_busy and self.pending is not None and self.pending.step == step

    def wait(self, timeout: float | None = None) -> None:
        """Block until no save is in flight. Raises what the last one failed with, or `TimeoutError`."""
        if self.pending is not None:
            self.pending.settle(timeout)
        self.raise_failure()

    def raise_failure(self) -> None:
        """What the last save failed with, once; tolerated failures are warnings. A writer that was
        fenced off is never tolerated: it would train on for nothing."""
        pending = self.pending
        if pending is None or not pending.done():
            return
        error = pending.take_error()
        if error is not None:
            self.tolerate(pending.step, error)
        elif not pending.error and pending is not self._good:
            self._failures, self._good = 0, pending

    def tolerate(self, step: int, error: BaseException) -> None:
        """Count a failure, and warn of it; raises it where there were too many in a row."""
        self._failures += 1
        if isinstance(error, FencedError) or self._failures > self._tolerate:
            raise error
        _log.warning(
            "save.failed.tolerated step=%d count=%d of %d cause=%s", step, self._failures, self._tolerate, error
        )

    def close(self) -> None:
        """Wait for the save in flight and end the thread."""
        self._look_for_fork()
        if self._pool is not None:
            self._pool.shutdown()


def _made(save: Callable[[], Ended]) -> Future[Ended]:
    """A save made at once."""
    future: Future[Ended] = Future()
    try:
        future.set_result(save())
    except Exception as exc:  # noqa: BLE001 - carried to the caller by the Pending, like a thread's
        future.set_exception(exc.with_traceback(None))  # whose frames would hold what the caller saves
    return future
