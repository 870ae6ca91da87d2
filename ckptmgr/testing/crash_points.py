"""What does SIGKILL leave behind, at each call that changes the disk? `CrashPoints` kills real processes there."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, TypeVar

from .system_calls import Call, SystemCalls

__all__ = ["CrashPoints", "JobError"]

R = TypeVar("R")
T = TypeVar("T")


class JobError(RuntimeError):
    """The job itself raised; the text is its traceback."""


class _Task(NamedTuple):
    job: Callable[[Any], Any]
    root: Any
    watches: bool
    number: int = 0
    when: str = "before"


class CrashPoints:
    """Runs jobs in processes of their own and ends one with SIGKILL where you say. For Linux and macOS.

    A job is a function of a module that takes the root: what a process of yours does there. `record` runs it to
    its end and tells each call that changes something below the root (`SystemCalls`); `kill` runs it anew, on a fresh
    root, up to one of them. What it left is then yours to look at: `run` calls any function in one more process.

        from ckptmgr import CheckpointManager
        from ckptmgr.testing import CrashPoints

        def job(root):
            with CheckpointManager(root, background=False) as manager:
                start = manager.resume()
                manager.save({"n": start.step + 1}, start.step + 1)

        def after(root):
            with CheckpointManager(root) as manager:
                start = manager.resume()
                assert not start or start.values["n"] == start.step

        if __name__ == "__main__":
            import tempfile

            with CrashPoints() as points:
                for call in points.record(job, tempfile.mkdtemp()):
                    for when in ("before", "after"):
                        root = tempfile.mkdtemp()
                        assert points.kill(job, root, call.number, when)
                        points.run(after, root)

    Each process is a fork of one that has imported the job's module, so that it begins at once: some milliseconds. A
    job with threads may come to its calls in another order each time. Jobs run one at a time. A job that takes
    longer than `timeout_s` is ended, and `TimeoutError` raised.
    """

    def __init__(self, timeout_s: float = 60.0) -> None:
        self._timeout_s = timeout_s
        context = multiprocessing.get_context("spawn")
        self._channel, theirs = context.Pipe()
        self._server = context.Process(target=_serve, args=(theirs,), name="ckptmgr-crash-points", daemon=True)
        self._server.start()
        theirs.close()

    def __enter__(self) -> CrashPoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the process that the others are forks of. May be repeated."""
        self._channel.close()
        self._server.join()

    def record(self, job: Callable[[Path], object], root: str | Path) -> list[Call]:
        """Run the job to its end; the calls it made, in their order. Raises `JobError`."""
        calls = self._finish(self._start(_Task(job, Path(root), watches=True)))
        assert calls is not None
        return list(calls[1])

    def kill(
        self,
        job: Callable[[Path], object],
        root: str | Path,
        number: int,
        when: Literal["before", "after"] = "before",
    ) -> bool:
        """Run the job until it is about to make the call of this number (`Call.number`), or has made it, and kill
        it; whether it came that far. Raises `JobError` where it raised before."""
        task = _Task(job, Path(root), watches=True, number=number, when=when)
        return self._finish(self._start(task)) is None

    def run(self, job: Callable[[R], T], root: R, started: Callable[[int], object] | None = None) -> T:
        """Call a function in a process of its own with whatever says where the root is; its answer. Both are pickled.

        `started` is told the process's number, for one that is to be killed by other means, such as a hook of
        `FaultProxy`: `ProcessLookupError` is raised then. Raises `JobError`.
        """
        pid = self._start(_Task(job, root, watches=False))
        if started is not None:
            started(pid)
        answer = self._finish(pid)
        if answer is None:
            raise ProcessLookupError(f"process {pid} was killed")
        return answer[0]  # type: ignore[no-any-return]

    def _start(self, task: _Task) -> int:
        self._channel.send(task)
        return int(self._receive())

    def _finish(self, pid: int) -> tuple[Any, list[Call]] | None:
        """What came of it: its answer and its calls, or None when it was killed."""
        if not self._channel.poll(self._timeout_s):
            os.kill(pid, signal.SIGKILL)
            self._receive()
            raise TimeoutError(f"process {pid} did not end within {self._timeout_s:g} s")
        status, data = self._receive()
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            return None
        if not data:
            raise JobError(f"process {pid} ended with status {status} and without a word")
        error, answer, calls = pickle.loads(data)  # noqa: S301 - of our own process
        if error is not None:
            raise JobError(error)
        return answer, calls

    def _receive(self) -> Any:
        try:
            answer = self._channel.recv()
        except EOFError:
            raise JobError("the process that the others are forks of is gone") from None
        if isinstance(answer, str):
            raise JobError(answer)
        return answer


def _serve(channel: Connection) -> None:
    """The process that the others are forks of. It must have no threads: they are not forked."""
    while True:
        try:
            task = channel.recv()  # imports the job's module, once and for all
        except EOFError:
            return
        except Exception:  # noqa: BLE001 - whatever importing the job's module raises, its owner is to read
            channel.send(traceback.format_exc())
            continue
        gc.freeze()  # so that no collection in a fork copies the pages of all that was imported
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            _work(task, writing)
        os.close(writing)
        channel.send(pid)
        with os.fdopen(reading, "rb") as file:
            data = file.read()
        channel.send((os.waitpid(pid, 0)[1], data))


def _work(task: _Task, writing: int) -> None:
    """The process itself. Never returns."""
    answer, calls = None, list[Call]()

    def stop(call: Call) -> None:
        if call.number == task.number:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        if task.watches:
            before, after = (stop, None) if task.when == "before" else (None, stop)
            with SystemCalls(task.root, before, after) as watched:
                task.job(task.root)
            calls = watched.log
        else:
            answer = task.job(task.root)
        data = pickle.dumps((None, answer, calls))
    except BaseException:  # noqa: BLE001 - the one who waits is told whatever it was
        data = pickle.dumps((traceback.format_exc(), None, []))
    sys.stdout.flush()
    sys.stderr.flush()
    with os.fdopen(writing, "wb") as file:
        file.write(data)
    os._exit(0)
