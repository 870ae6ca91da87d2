"""Are the checkpoints that nobody loads still what was written? After each save one of them is read back.

That happens in a thread of its own, of low priority, a piece at a time. It gives way to the next save, after which it
goes on where it was, so that in time every checkpoint has its turn, however large.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime

from . import priority
from .errors import CheckpointError, DamagedError
from .manifest import CheckpointInfo
from .records import Records
from .repository import Repository

_NEVER = datetime.min.replace(tzinfo=UTC)

_log = logging.getLogger("ckptmgr.scrub")


class Scrubber:
    """Reads back the checkpoints of one repository, the one first that was verified longest ago. Its methods are
    called by the root's writer, one at a time."""

    def __init__(self, repository: Repository, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._repository, self._records, self._now = repository, Records(repository.store), now
        self._verified: dict[tuple[str, str], datetime] | None = None  # None: not read yet
        self._tried: dict[tuple[str, str], datetime] = {}  # what could not be read to its end
        self._reading: tuple[CheckpointInfo, Iterator[None]] | None = None  # as far as it came
        self._thread: threading.Thread | None = None
        self._is_unwanted = threading.Event()

    def start(self, infos: Sequence[CheckpointInfo]) -> None:
        """Begin to read back one of these, unless there is none or one is being read. Does not block."""
        if self._thread is not None and self._thread.is_alive():
            return
        self._is_unwanted.clear()
        # A daemon: whoever leaves without closing is not kept waiting.
        self._thread = threading.Thread(target=self._run, args=(list(infos),), name="ckptmgr-scrub", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no more threads to be had, or the interpreter is on its way out
            self._thread = None

    def give_way(self) -> None:
        """Have it stop after the piece that is being read. Does not block."""
        self._is_unwanted.set()

    def stop(self) -> None:
        """The same, and wait for that: from then on it reads and marks nothing. May be repeated."""
        self.give_way()
        self.wait()

    def wait(self) -> None:
        """Block until what was begun has ended."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, infos: Sequence[CheckpointInfo]) -> None:
        priority.lower()
        try:
            self._read_one([info for info in infos if info.damaged is None and info.manifest is not None])
        except CheckpointError as exc:  # which says nothing of the checkpoint
            _log.warning("scrub.failed url=%s cause=%s", self._repository.store.url, exc)

    def _read_one(self, infos: Sequence[CheckpointInfo]) -> None:
        """Read the next one to its end, unless it is to give way."""
        if self._verified is None:
            self._verified = self._records.verified()
        info = min(infos, key=self._turn, default=None)
        if info is None:
            return
        if self._reading is None or _key(self._reading[0]) != _key(info):
            self._reading = info, self._repository.source(info).checks()
        key, (_, checks) = _key(info), self._reading
        try:
            while not self._is_unwanted.is_set():
                if next(checks, self) is self:
                    break
            else:
                return
        except DamagedError as exc:
            self._reading = None
            self._damaged(info, exc, infos)
            return
        except CheckpointError:
            self._reading = None
            self._tried[key] = self._now()  # the others have their turn first
            raise
        self._reading = None
        self._verified[key] = self._now()
        self._note(infos)
        _log.info("scrub.done step=%d url=%s/%s", info.step, self._repository.store.url, info.name)

    def _turn(self, info: CheckpointInfo) -> tuple[datetime, tuple[int, int, float]]:
        assert self._verified is not None
        key = _key(info)
        return max(self._verified.get(key, _NEVER), self._tried.get(key, _NEVER)), info.order

    def _damaged(self, info: CheckpointInfo, damage: DamagedError, infos: Sequence[CheckpointInfo]) -> None:
        """Remember damage, unless it is none: a checkpoint may be deleted while it is read. What shares files with
        this one is next."""
        if self._is_unwanted.is_set() or not self._repository.is_there(info):
            return
        url = f"{self._repository.store.url}/{info.name}"
        _log.warning("scrub.damaged step=%d url=%s cause=%s", info.step, url, damage)
        self._repository.mark_damaged(info, str(damage))
        assert self._verified is not None
        for other in infos:
            if _have_one_in_common(info, other):
                self._verified.pop(_key(other), None)
        self._note([other for other in infos if other.name != info.name])

    def _note(self, infos: Sequence[CheckpointInfo]) -> None:
        """Write down what was verified when, of those that are still there."""
        assert self._verified is not None
        there = set(map(_key, infos))
        self._verified = {key: when for key, when in self._verified.items() if key in there}
        self._tried = {key: when for key, when in self._tried.items() if key in there}
        self._records.put_verified(self._verified)


def _key(info: CheckpointInfo) -> tuple[str, str]:
    return info.name, info.manifest.nonce if info.manifest else ""


def _have_one_in_common(one: CheckpointInfo, other: CheckpointInfo) -> bool:
    """Whether a file of one was not written but shared with the other, or both shared it with a third."""
    files = [info.manifest.files if info.manifest else () for info in (one, other)]
    common = {file.digest for file in files[0]} & {file.digest for file in files[1]}
    return any(file.shared and file.digest in common for each in files for file in each)
