"""In which order do things happen? `CheckpointManager`: order, and nothing else."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from .background import Pending, Worker
from .catalog import Catalog
from .config import CheckpointConfig, load_config
from .coordinator import Coordinator
from .errors import (
    AlreadyExistsError,
    CheckpointError,
    ConfigError,
    CoordinationError,
    SaveFailedError,
    StoreError,
)
from .job import Job
from .joint_schedule import JointSchedule
from .manifest import digest
from .pins import check_free
from .records import checked_tag
from .request import Request, State, as_count, as_floats, as_mapping, expected_bytes
from .request_file import RequestFile
from .restart import Restart
from .resumption import Resumed
from .retention import Plan
from .run import Run
from .saving import Saver
from .schedule import Schedule
from .signals import SignalWatch
from .store import Store, give_up, open_store
from .triggers import AnyOf, Decision, Moment, doubts
from .weights import WarmStarted, warm_start

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("ckptmgr.manager")

T = TypeVar("T")


class CheckpointManager(Catalog):
    """Saves, keeps and restores the checkpoints of one training run.

    `config` is a YAML file, a root URL or path, a mapping or a `CheckpointConfig`; keyword
    `overrides` are its fields, nested as mappings (`save={"every_steps": 100}`). `triggers` are
    callables that take a `Moment` and say whether a save is due. `fresh` archives what the root
    holds and starts over; `takeover` takes the root from another writer; `read_only` writes nothing
    but pins.
    `store` serves in place of the one for the root; `clock` counts seconds, for tests.

    All methods are called from one thread, but for `request_save`. Nothing is written, and no lock
    taken, before the first `resume` or save. Raises `ConfigError`. A context manager: leaving it
    closes it.

    In a job of several ranks (`torch.distributed` is initialized by the first call) every rank makes
    its own manager and the same calls of `resume`, `maybe_save`, `save`, `prepare`, `delete`, `prune`,
    `rewind` and `close`; those of `Catalog` any rank makes alone. Rank 0 writes, but for sharded state,
    of which each rank writes its part. What fails on one rank is raised on all, naming it (`RankError`
    for what is not of this library); `CoordinationError` names ranks that are missing.
    """

    def __init__(
        self,
        config: CheckpointConfig | Mapping[str, Any] | str | Path | None = None,
        /,
        *,
        triggers: Sequence[Callable[[Moment], object]] = (),
        fresh: bool = False,
        takeover: bool = False,
        read_only: bool = False,
        store: Store | None = None,
        clock: Callable[[], float] = time.monotonic,
        **overrides: Any,
    ) -> None:
        if fresh and read_only:
            raise ConfigError("fresh=True archives what is there, and read_only=True writes nothing: choose one")
        self.config = load_config(config, **overrides)
        if store is None:
            storage = self.config.storage
            deadline_s = storage.deadline.total_seconds()
            store = open_store(self.config.root, storage.options, fsync=self.config.fsync, deadline_s=deadline_s)
        super().__init__(Run(store, self.config, takeover=takeover, read_only=read_only), self.config)
        self._saver = Saver(self._run, self.config)
        self._job = Job(digest(store.url.encode())[:16], self.config.ranks.timeout.total_seconds())
        tolerate = self.config.max_failures if self.config.on_error == "warn" else 0
        self._worker = Worker(tolerate=tolerate)
        self._fresh, self._read_only = fresh, read_only
        self._signals = SignalWatch(() if read_only else self.config.save.on_signals)
        rule = self.config.trigger(triggers)
        self._doubtful: AnyOf | None = rule  # until the first `maybe_save`
        self._schedule = Schedule(rule, self._signals, clock)
        self._quiet = self._schedule.quiet
        self._quiet.alert()  # the first call has to find the other ranks
        self._signals.on_signal = self._quiet.alert
        self._signals.install()
        self._request_file: RequestFile | None = None
        if self.config.save.on_file is not None and not read_only:
            self._request_file = RequestFile(store, self.config.save.on_file, self._schedule.request)
        self._last_call: tuple[State, int, int | None, Mapping[str, Any] | None] | None = None
        self._epoch: int | None = None  # the last that was given or restored
        self._is_begun = self._is_closed = False

    # In the loop

    def maybe_save(
        self,
        state: State,
        step: int,
        *,
        epoch: int | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> Pending | None:
        """Save if a trigger says so; at most one save per call.

        `state` maps entry names to objects with `state_dict()`, tensors and plain values, nested as
        you like, or is a callable that returns such a mapping and is called only when due. `step` and `epoch`
        count completed ones; what is saved without `epoch` has the last one given or restored. Every rank calls it.
        When due it blocks until the state is copied (with `background`; with `overlap`, all that is not left to
        the next `optimizer.step()` to wait for) or durable, and until an earlier save is done (`when_busy: wait`).

        Returns the save's `Pending`, or None when nothing was due. Raises once what an earlier
        background save failed with (`SaveFailedError`, `FencedError`), unless `on_error: warn`.
        """
        self._last_call = (state, step, epoch, metrics)
        if epoch is not None:
            self._epoch = epoch
        quiet = self._quiet
        # What `is_quiet` asks, here: most calls end at this line, and to call it takes as long again.
        if quiet.first <= step < quiet.end and (
            quiet.is_by_step
            or ((epoch is None or epoch < quiet.epoch) and (quiet.until is None or quiet.clock() < quiet.until))
        ):
            return None
        if self._schedule.is_quiet(step, epoch):
            return None
        if self._is_closed:
            self._settle()  # which says so
        ranks = self._join()
        self._job.check()
        self._doubt(epoch, ranks)
        self._schedule.calm()  # before the look at failures: one that comes later alerts again
        if self._schedule.listen():
            self._worker.wait()
        elif ranks.world_size == 1:  # else all ranks are told at the same call
            self._worker.raise_failure()
        try:
            request = self._request(step, epoch, metrics, overwrite=self.config.overwrite)
        except ConfigError:
            self._last_call = None  # nothing to make a last save of
            raise
        decision = self._schedule.decide(request.step, request.epoch, request.metrics)
        request = replace(request, reason=decision.reason or "", may_skip=True)
        pending = None
        try:
            pending = self._save_if_free(state, request) if decision else None
        except (SaveFailedError, StoreError) as exc:  # before there was anything to write
            self._worker.tolerate(request.step, exc)
        self._schedule.vote(request.step, request.epoch, request.metrics, trouble=self._worker.has_failed)
        return pending

    def _doubt(self, epoch: int | None, ranks: Coordinator) -> None:
        """At the first call, warn of a rule that may never make a save."""
        rule, self._doubtful = self._doubtful, None
        is_meant = self.config.save.on_close or self.config.save.on_file is not None
        for doubt in doubts(rule, epoch) if rule is not None and not (ranks.rank or is_meant) else ():
            _log.warning("save.doubt url=%s %s", self._run.url, doubt)

    def _save_if_free(self, state: State, request: Request) -> Pending | None:
        """Save what is due, unless it is there already or nobody is to wait for the save before it."""
        what = f"a save that is due, step {request.step}"
        answer = self._job.for_save().prompt.exchange(what, lambda: None, lambda _: self._judge(request))
        if answer == "there":
            self._note_saved(request)  # this very step is there, or on its way
            return None
        if answer == "busy":
            _log.info("save.skip.busy step=%d", request.step)
            return None
        return self._save(state, replace(request, hurry=answer == "hurry"))

    def _judge(self, request: Request) -> str:
        """On rank 0."""
        if self._is_safe(request.step) and not request.overwrite:
            return "there"
        if self._worker.is_busy and self.config.when_busy == "skip" and not self.should_stop:
            return "busy"
        return "free" if self._saver.fits(self._schedule.stopping_s) else "hurry"

    def should_save(self, step: int, *, epoch: int | None = None, metrics: Mapping[str, Any] | None = None) -> Decision:
        """Whether `maybe_save` would save now, and why. Changes nothing; never blocks."""
        request = self._request(step, epoch, metrics, overwrite=self.config.overwrite)
        return self._schedule.decide(request.step, request.epoch, request.metrics)

    def save(
        self,
        state: State,
        step: int,
        *,
        epoch: int | None = None,
        metrics: Mapping[str, Any] | None = None,
        tags: Sequence[str] = (),
        pin: bool = False,
        overwrite: bool | None = None,
    ) -> Pending:
        """Save now, whatever the triggers say. Arguments and blocking as for `maybe_save`.

        `tags` name it for `load` and the command line; `pin` keeps it from every keep rule;
        `overwrite` replaces a checkpoint of the same step, after the new one is durable (default:
        the config's). Raises `AlreadyExistsError` when the step is there, or when the root holds
        checkpoints that nobody resumed from. `on_full: skip` does not go for it: without room it fails.
        """
        if isinstance(tags, str):
            raise ConfigError(f"tags={tags!r} is one text; give a list of tags: [{tags!r}]")
        replaces = self.config.overwrite if overwrite is None else overwrite
        request = self._request(step, epoch, metrics, overwrite=replaces)
        request = replace(request, reason="save()", tags=tuple(map(checked_tag, tags)), pin=pin)
        if self._join().world_size == 1:
            self._worker.raise_failure()
        return self._save(state, request)

    @property
    def should_stop(self) -> bool:
        """Whether a terminating signal such as SIGTERM came, on any rank: leave the loop and `close`. Never
        blocks. Every rank has the same answer between two calls of `maybe_save`."""
        return self._schedule.should_stop

    def prepare(self, state: State) -> None:
        """Do ahead what the first save of a state like this one would have to do: take the root, plan the
        files and, with `background`, make the memory for the copy. Blocks; saves nothing. Every rank calls it
        right before the loop, when the optimizer has its state; `resume` takes the root and makes the memory by
        itself. Raises what keeps the root from being taken, such as another writer."""
        self._settle()
        ranks = self._join()
        if not (self._is_begun or self._read_only):
            ranks.prompt.exchange("prepare", lambda: None, lambda _: self._run.hold())
        self._saver.prepare(as_mapping(state), ranks)

    def request_save(self, reason: str = "requested") -> None:
        """Make the next `maybe_save` save. From any thread; never blocks. Of several ranks any may ask, unless
        they save by steps and epochs alone (`on_signals: []` too), where nobody listens at every call."""
        self._schedule.request(reason)

    def poll(self) -> bool:
        """For loops that do not save, such as evaluation: answers `should_stop`. Never blocks.
        Raises what a background save failed with."""
        if self._job.is_alone:
            self._worker.raise_failure()  # of several ranks all are told at the same `maybe_save`
        return self.should_stop

    def wait(self, timeout: float | None = None) -> None:
        """Block until no save is in flight; `timeout` in seconds. Raises what it failed with, once,
        or `TimeoutError`."""
        self._worker.wait(timeout)

    def close(self, timeout: float | None = None) -> None:
        """Make the last save if `save.on_close` asks for one, or a signal or request that none has
        answered; wait for it, and let go of the root. Every rank calls it; of several ranks, a signal or
        request counts that came before their last `maybe_save`.

        May be repeated. Raises what the last save failed with (also under `on_error: warn`), or
        `TimeoutError` after `timeout` seconds, when it stays open: then the save in flight goes on while a
        store behind a network answers, but no request is tried again for the length of `storage.deadline`, so
        that the process can end soon after.
        """
        if self._is_closed:
            return
        earlier: CheckpointError | None = None
        try:
            try:
                is_lost = self._job.is_lost  # of which the caller knows
                is_asked = self._schedule.is_asked if is_lost else self._schedule.agree_is_asked()
            except CoordinationError as exc:
                is_asked, earlier = self._schedule.is_asked, exc
            try:
                self.wait(timeout)
            except CheckpointError as exc:
                earlier = earlier or exc
            is_asked = (is_asked or self.config.save.on_close) and not self._job.is_left_out
            call = None if self._read_only else self._last_call
            if is_asked and call is not None and call[1] >= self._schedule.last_step:  # else `save` has come further
                self._save_if_free(call[0], replace(self._request(*call[1:]), reason="close()"))
            self.wait(timeout)
        except TimeoutError:
            give_up(self._run.repository.store)
            raise
        finally:
            if not self._worker.is_busy:
                self._let_go()
        if earlier is not None:
            raise earlier
        if (last := self._worker.pending) is not None and last.error is not None and self.config.on_error == "warn":
            raise last.error

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an exception there is no last save: the state may be half a step ahead."""
        if error is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            self.close()
            return
        try:
            self.wait()
        except CheckpointError as exc:
            error.add_note(f"ckptmgr: besides, {exc}")
        finally:
            self._let_go()

    def _let_go(self) -> None:
        self._is_closed = True
        self._last_call = None
        self._schedule.end()  # the next call is told, not let pass
        try:
            if self._request_file is not None:
                self._request_file.stop()
            self._signals.uninstall()
            self._worker.close()
            self._saver.close()
            self._job.close()
        finally:
            # Interrupted here, the save goes on, and so does its hold on the root until the process ends.
            if not self._worker.is_busy:
                self._run.release()

    # At start-up

    def resume(
        self,
        model: Any = None,
        optimizer: Any = None,
        /,
        *,
        step: int | str | None = None,
        strict: bool = True,
        skip: Sequence[str] = (),
        map_location: str | torch.device = "cpu",
        **others: Any,
    ) -> Resumed:
        """Fill `model`, `optimizer` and `others` (by entry name) from the newest good checkpoint.

        Blocks; every rank calls it. Damaged checkpoints are passed over, marked, and reported in
        `.skipped`. Everything that does not fit is raised at once as `StateMismatchError` before
        anything is touched; `strict=False` loads what fits and reports the rest; entries in `skip`
        ("rng" too) are left alone. What was saved from an object and is given none is in `.values`, and a
        warning names it unless it is skipped. `step` (a number, "best" or a tag) goes back to that
        checkpoint and archives the newer ones, with a warning: at the next start it does so again.
        `map_location` is where values without a target go. Random generators come last.

        Returns a `Resumed`, falsy when the root holds no checkpoint. Raises `DamagedError` when there
        are some but none can be loaded, `NotFoundError` for a step that isn't there,
        `FencedError` when another process writes here, `StoreError` when the store fails, and `ConfigError`,
        on an empty root, too, for a target that can't be filled in place.
        """
        self._settle()
        first = {name: given for name, given in (("model", model), ("optimizer", optimizer)) if given is not None}
        others = {name: given for name, given in others.items() if given is not None}
        if twice := [name for name, given in first.items() if others.get(name, given) is not given]:
            raise ConfigError(f"resume was given two objects as {' and as '.join(twice)}: give one of each name")
        targets = first | others  # in the caller's order
        try:
            return self._resume(targets, step, strict, skip, map_location)
        except BaseException:
            if not self._run.is_begun:
                self._run.release()  # so that a corrected call, by another manager too, finds the root free
            raise

    def _resume(
        self,
        targets: Mapping[str, Any],
        step: int | str | None,
        strict: bool,
        skip: Sequence[str],
        map_location: str | torch.device,
    ) -> Resumed:
        self._last_call = None  # it spoke of a state that is about to be replaced
        self._saver.rest()
        ranks = self._join()
        self._job.check()
        restart = Restart(self._run, self.config, ranks, read_only=self._read_only, fresh=self._fresh)
        info, resumed = restart.resume(targets, step, strict, skip, map_location)
        self._fresh, self._is_begun = False, not self._read_only
        self._epoch = info.manifest.epoch if info and info.manifest else None
        if info is None or info.manifest is None:
            self._schedule.restored(0, 0)  # also where a run has begun here, and nothing of it is left
            size = expected_bytes(targets)
        else:
            self._saver.goes_on_from(info)
            self._schedule.restored(info.step, resumed.epoch)
            size = info.manifest.size
        if not self._read_only:
            self._saver.expect(size, targets, ranks)  # last: it takes the memory's speed
        return resumed

    def warm_start(self, url: str | Path, model: torch.nn.Module, **choices: Any) -> WarmStarted:
        """Copy weights of another run or file into a model: `ckptmgr.warm_start`, which see for the
        `choices`, with this manager's storage options unless they hold `options`. Not a resume: call
        it when `resume` was falsy."""
        return warm_start(url, model, **{"options": self.config.storage.options, **choices})

    # What people change

    def delete(self, step: int | str) -> None:
        """Delete one checkpoint, whatever the keep rules say. Every rank calls it. Raises `ConfigError` when it
        is pinned, or when there are several of that step: name the folder then."""
        self._on_rank_0("delete", lambda: self._run.delete(step))

    def prune(self, *, dry_run: bool = False) -> Plan:
        """What the keep rules say of each checkpoint, carried out unless `dry_run`. Blocks. Every rank calls
        it, unless `dry_run`."""
        if dry_run:
            return self._run.plan()
        return self._on_rank_0("prune", self._run.retain)

    def rewind(self, step: int | str) -> None:
        """Archive every checkpoint newer than this one and go on from it; call `resume` to load it.
        The archived data stays until `ckptmgr prune --archived`. Every rank calls it. Raises
        `DamagedError`, with nothing changed, when this one can't be gone on from."""
        info = self._on_rank_0("rewind", lambda: self._run.rewind(step))
        self._last_call = None
        self._epoch = info.manifest.epoch if info.manifest else None
        self._schedule.restored(info.step, self._epoch)

    def _on_rank_0(self, what: str, make: Callable[[], T]) -> T:
        """What rank 0 makes of the root while no save is in flight. Blocks."""
        self._settle()
        self._saver.rest()
        ranks = self._join()
        self._job.check()
        return ranks.prompt.exchange(what, lambda: None, lambda _: make())

    # One save

    def _request(
        self, step: int, epoch: int | None, metrics: Mapping[str, Any] | None, overwrite: bool = False
    ) -> Request:
        """What a call said, checked."""
        step, epoch = as_count(step, "step"), None if epoch is None else as_count(epoch, "epoch")
        if step < self._schedule.last_step and not overwrite:
            raise ConfigError(
                f"step went back from {self._schedule.last_step} to {step} in {self._run.url}: begin the loop at "
                f"resume().step + 1, or go back on purpose with resume(step={step})"
            )
        return Request(step, epoch, as_floats(metrics), overwrite=overwrite)

    def _save(self, state: State, request: Request) -> Pending:
        if request.epoch is not None:
            self._epoch = request.epoch
        elif self._epoch is not None:  # as many are complete as before
            request = replace(request, epoch=as_count(self._epoch, "epoch"))
        self._settle()
        self._join()
        ranks = self._job.for_save()
        if not self._is_begun:
            ranks.prompt.exchange("the first save", lambda: None, lambda _: self._begin())
            self._is_begun = True
        heard = self._schedule.heard()  # what comes while the state is copied or written is for the next save
        check = partial(self._check_new, request)
        pending = self._saver.start(state, request, ranks, check, self._worker, self._quiet.alert)
        self._note_saved(request, heard)
        if not pending.in_background:
            self._worker.wait()
        return pending

    def _begin(self) -> None:
        """On rank 0: become the writer of a run."""
        if self._fresh:
            self._run.begin_fresh()
            self._fresh = False
        self._run.begin()

    def _check_new(self, request: Request) -> None:
        """On rank 0: whether a save can become what its request says, before anything is captured."""
        if request.step in self._run.steps and not request.overwrite:
            raise AlreadyExistsError(
                f"step {request.step} is in {self._run.url} already; pass overwrite=True to replace it, "
                "or save another step"
            )
        others = [info for info in self._run.known() if info.step != request.step] if request.tags else []
        for tag in request.tags:
            check_free(tag, others, self._run.url)
        self._run.repository.names.format(request.step, request.epoch, self._run.name or "")  # now, not in the thread

    def _join(self) -> Coordinator:
        """The ranks of this job; the first call finds them, so every rank has to make it. Blocks."""
        is_known, ranks = self._job.is_known, self._job.ranks()
        if not is_known:
            has_file = self._request_file is not None
            if ranks.world_size > 1:
                self._schedule = JointSchedule(self._schedule, ranks, takes_requests=has_file)
            if self._request_file is not None and not ranks.rank:
                self._request_file.start()
        return ranks

    def _note_saved(self, request: Request, heard: tuple[int, int] | None = None) -> None:
        self._schedule.saved(request.step, request.epoch, heard)
        if self._worker.pending is not None and self._worker.pending.done():
            self._quiet.alert()  # it may have alerted before `saved` took that back

    def _settle(self) -> None:
        """Wait for the save in flight, before what needs the root to itself."""
        if self._is_closed:
            raise ConfigError(f"the manager of {self._run.url} is closed; open a new one")
        self.wait()

    def _is_safe(self, step: int) -> bool:
        """Whether a step is committed, or on its way there."""
        return self._worker.is_saving(step) or step in self._run.steps
