"""How is one save made? From live objects to a committed checkpoint, by all ranks together."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .background import Ended, LeftOut, Pending, Worker
from .committing import Committer
from .config import CheckpointConfig
from .coordinator import Coordinator
from .copying import Copier
from .errors import ConfigError, SaveFailedError, StoreFullError
from .formats import open_format
from .manifest import CheckpointInfo
from .program import staged_size
from .request import Request, State, as_mapping
from .run import Run
from .state import Recorder, holds_sharded, non_finite
from .state.collector import uncollected
from .state.shards import local
from .state.snapshot import FlatSnapshot
from .whole_save import WholeSave

if TYPE_CHECKING:
    from .sharded_save import ShardedSave, ShardPlans

_log = logging.getLogger("ckptmgr.save")


class Saver:
    """Makes saves of one run, in the background when the config says so."""

    def __init__(self, run: Run, config: CheckpointConfig) -> None:
        self._run, self._config = run, config
        self._format = open_format(config.format, split_size_bytes=config.split_size)
        self._plans: ShardPlans | None = None
        self._recorder, self._copier = Recorder(), Copier(config)
        self._committer = Committer(run, config)
        self._durable_s = 0.0  # that the last save took in all

    def start(
        self,
        state: State,
        request: Request,
        ranks: Coordinator,
        check: Callable[[], None],
        worker: Worker,
        after: Callable[[], None],
    ) -> Pending:
        """Capture and copy the state, then have the worker write it. Every rank calls it. Blocks until training
        may change the state again; until the checkpoint is durable without `background`, or when the copy does
        not fit into memory. Rank 0 calls `check` before anything is captured; `after` is called when it has ended."""
        self._committer.hurry()
        began = time.monotonic()
        save: WholeSave | ShardedSave | None = None

        def mine() -> tuple[bool, Any]:
            nonlocal save
            objects = as_mapping(state)  # first: what it calls may be collective, and so no rank's to leave out
            if not ranks.rank:
                check()
            is_sharded = self._is_sharded(objects, ranks)
            save = self._sharded(request) if is_sharded else self._whole(request)
            return is_sharded, save.capture(objects, self._config.only, ranks)

        def decide(parts: Sequence[tuple[bool, Any]]) -> Any:
            assert save is not None
            if odd := [rank for rank, (is_sharded, _) in enumerate(parts) if is_sharded != parts[0][0]]:
                raise ConfigError(
                    f"the state holds sharded tensors (DTensor) on some ranks, but on rank {odd[0]} it does not as on "
                    "rank 0: give every rank the same objects"
                )
            return save.decide([part for _, part in parts])

        with uncollected():
            answer = ranks.prompt.exchange(f"save of step {request.step}", mine, decide)
        assert save is not None
        is_background = save.take(answer, ranks)
        stall = time.monotonic() - began

        def write() -> Ended:
            nonlocal save
            assert save is not None
            try:
                info = save.write(ranks)
            except Exception as exc:
                if (left_out := self._left_out(request, exc)) is not None:
                    if not ranks.rank:
                        _log.warning("save.skip.full step=%d url=%s cause=%s", request.step, self._run.url, exc)
                    return left_out
                # The caller hears of it at its next call; a script that makes none has this line.
                _log.error("save.failed step=%d url=%s cause=%s", request.step, self._run.url, exc)
                _forget_state(exc)
                raise
            finally:
                save = None  # whoever holds the error holds this frame, but not the state
            self._durable_s = time.monotonic() - began
            if not ranks.rank:
                size = info.manifest.size if info.manifest else 0
                _log.info(
                    "save.commit.done step=%d url=%s/%s bytes=%d stall_s=%.3f durable_s=%.3f reason=%s",
                    info.step, self._run.url, info.name, size, stall, self._durable_s, request.reason,
                )  # fmt: skip
            return info

        return worker.submit(request.step, self._run.url, write, after, in_background=is_background)

    def _left_out(self, request: Request, error: Exception) -> LeftOut | None:
        """What a save without room ends as, if it is not to fail."""
        may_skip = request.may_skip and self._config.on_full == "skip"
        is_full = isinstance(error, SaveFailedError) and isinstance(error.__cause__, StoreFullError)
        return LeftOut(str(error)) if may_skip and is_full else None

    def _is_sharded(self, objects: Mapping[str, Any], ranks: Coordinator) -> bool:
        """Whether every rank writes its part: of sharded tensors, and of any with format `dcp`."""
        return holds_sharded(objects) or (self._config.format == "dcp" and ranks.world_size > 1)

    def _whole(self, request: Request) -> WholeSave:
        return WholeSave(request, self._format, self._recorder, self._copier, self._committer, self._odd)

    def _sharded(self, request: Request) -> ShardedSave:
        from .sharded_save import ShardedSave, ShardPlans  # here, as it takes long to import

        if self._plans is None:
            self._plans = ShardPlans(self._config.split_size)
        return ShardedSave(request, self._plans, self._recorder, self._copier, self._committer, self._odd)

    def _odd(self, flat: FlatSnapshot) -> Sequence[str]:
        """The names of tensors that are not finite, where the config asks for it."""
        return non_finite(flat) if self._config.check_finite else ()

    def prepare(self, objects: Mapping[str, Any], ranks: Coordinator) -> None:
        """Plan the files of a state like this one, and make the memory for its copy. Blocks."""
        with uncollected():
            if self._is_sharded(objects, ranks):
                flat = self._recorder.capture(objects, only=self._config.only, rank=ranks.rank)
                size = local_bytes(flat)
            elif not ranks.rank:
                size = staged_size(self._format.plan(self._recorder.capture(objects, only=self._config.only)).regions)
            else:
                return
        self._copier.make_room(size).result()

    def expect(self, size: int, objects: Mapping[str, Any], ranks: Coordinator) -> None:
        """Begin to make the memory for copies of a state of `size` bytes. Of a sharded one every rank
        copies its part; of any other rank 0 alone copies it."""
        if holds_sharded(objects):
            self._copier.make_room(size // ranks.world_size + (1 << 20))
        elif not ranks.rank:
            self._copier.make_room(size)

    def fits(self, stopping_s: float | None) -> bool:
        """Whether a save like the last one ends in the time that is left, so long after the process was told to
        stop; if not, a warning says so."""
        grace = self._config.save.grace
        if grace is None or stopping_s is None:
            return True
        left = grace.total_seconds() - stopping_s
        if self._durable_s <= left:
            return True
        _log.warning(
            "save.hurry: the last save took %.1f s, and of save.grace %.1f s are left: training waits while this one "
            "is written, without a copy", self._durable_s, left,
        )  # fmt: skip
        return False

    def goes_on_from(self, info: CheckpointInfo) -> None:
        """The next save may share files with this checkpoint."""
        self._committer.goes_on_from(info)

    def rest(self) -> None:
        """Read no checkpoint back any more, until the next save. Blocks."""
        self._committer.rest()

    def close(self) -> None:
        """Give the memory back. No save may be in flight."""
        self.rest()
        self._copier.close()


def local_bytes(flat: FlatSnapshot) -> int:
    """About how much room a copy of what is on this rank takes."""
    return sum(local(tensor).nbytes + 2048 for tensor in flat.tensors) + (1 << 20)


def _forget_state(error: BaseException | None) -> None:
    """Take an error's way off it: its frames, and those that called them, hold the state for as long as
    anyone holds the error."""
    _log.debug("save.failed.traceback", exc_info=error)
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
