"""In which order do things happen? `CheckpointManager`: order, and nothing else."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .background import Pending
from .catalog import Catalog
from .config import CheckpointConfig, load_config
from .coordinator import find_coordinator
from .errors import AlreadyExistsError, CheckpointError, ConfigError, FencedError
from .manifest import CheckpointInfo
from .records import checked_tag
from .request_file import RequestFile
from .resumption import Resumed, warn_if_unhealthy
from .retention import Plan
from .run import Run
from .saving import Request, Saver, as_floats, as_mapping
from .schedule import Schedule
from .signals import SignalWatch
from .store import Store, open_store
from .triggers import Decision, Moment
from .weights import WarmStarted, warm_start

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("ckptmgr.manager")

State = Mapping[str, Any] | Callable[[], Mapping[str, Any]]


class CheckpointManager(Catalog):
    """Saves, keeps and restores the checkpoints of one training run.

    `config` is a YAML file, a root URL or path, a mapping or a `CheckpointConfig`; keyword
    `overrides` are its fields, nested as mappings (`save={"every_steps": 100}`). `triggers` are
    callables that take a `Moment` and say whether a save is due. `fresh` archives what the root
    holds and starts over; `takeover` takes the root from another writer; `read_only` never writes.
    `store` serves in place of the one for the root; `clock` counts seconds, for tests.

    All methods are called from one thread, but for `request_save`. This version coordinates one
    process. Nothing is written, and no lock taken, before the first `resume` or save. Raises
    `ConfigError`. A context manager: leaving it closes it.
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
        self.config = load_config(config, **overrides)
        if store is None:
            store = open_store(self.config.root, self.config.storage.options, fsync=self.config.fsync)
        super().__init__(Run(store, self.config, takeover=takeover, read_only=read_only), self.config)
        self._saver = Saver(self._run, self.config, find_coordinator())
        self._fresh, self._read_only = fresh, read_only
        self._signals = SignalWatch(() if read_only else self.config.save.on_signals)
        self._schedule = Schedule(self.config.trigger(triggers), self._signals, clock)
        self._signals.on_signal = self._schedule.alert
        self._signals.install()
        self._request_file: RequestFile | None = None
        if self.config.save.on_file is not None and not read_only:
            self._request_file = RequestFile(store, self.config.save.on_file, self._schedule.request)
            self._request_file.start()
        self._pending: Pending | None = None
        self._failures = 0  # consecutive ones
        self._last_call: tuple[State, int, int | None, Mapping[str, Any] | None] | None = None
        self._is_closed = False

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
        you like, or is a callable that returns such a mapping and is called only when due. `step`
        and `epoch` count completed ones. Every rank calls it. When due it blocks until the state is
        copied (with `background`) or durable, and until an earlier save is done (`when_busy: wait`).

        Returns the save's `Pending`, or None when nothing was due. Raises once what an earlier
        background save failed with (`SaveFailedError`, `FencedError`), unless `on_error: warn`.
        """
        self._last_call = (state, step, epoch, metrics)
        if self._schedule.is_quiet(step, epoch):
            return None
        self._raise_failure()
        values = as_floats(metrics)
        decision = self._schedule.decide(step, epoch, values)
        if not decision:
            self._schedule.calm()
            return None
        if self._is_safe(step) and not self.config.overwrite:
            self._schedule.saved(step, epoch)  # this very step is there, or on its way
            return None
        if self.config.when_busy == "skip" and self._pending is not None and not self._pending.done():
            _log.info("save.skip.busy step=%d in_flight=%d", step, self._pending.step)
            return None
        return self._save(state, Request(step, epoch, values, decision.reason or "", overwrite=self.config.overwrite))

    def should_save(self, step: int, *, epoch: int | None = None, metrics: Mapping[str, Any] | None = None) -> Decision:
        """Whether `maybe_save` would save now, and why. Changes nothing; never blocks."""
        return self._schedule.decide(step, epoch, as_floats(metrics))

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
        checkpoints that nobody resumed from.
        """
        self._raise_failure()
        replaces = self.config.overwrite if overwrite is None else overwrite
        names = tuple(map(checked_tag, tags))
        return self._save(state, Request(step, epoch, as_floats(metrics), "save()", names, pin, replaces))

    @property
    def should_stop(self) -> bool:
        """Whether a terminating signal such as SIGTERM came: leave the loop and `close`. Never blocks."""
        return self._signals.stop

    def request_save(self, reason: str = "requested") -> None:
        """Make the next `maybe_save` save. From any thread; never blocks."""
        self._schedule.request(reason)

    def poll(self) -> bool:
        """For loops that do not save, such as evaluation: answers `should_stop`. Never blocks.
        Raises what a background save failed with."""
        self._raise_failure()
        return self.should_stop

    def wait(self, timeout: float | None = None) -> None:
        """Block until no save is in flight; `timeout` in seconds. Raises what it failed with, once,
        or `TimeoutError`."""
        if self._pending is not None:
            self._pending.settle(timeout)
        self._raise_failure()

    def close(self, timeout: float | None = None) -> None:
        """Make the last save if `save.on_close` asks for one, wait for it, and let go of the root.

        May be repeated. Raises what the last save failed with, or `TimeoutError` after `timeout` seconds.
        """
        if self._is_closed:
            return
        try:
            if self.config.save.on_close and self._last_call is not None and not self._read_only:
                state, step, epoch, metrics = self._last_call
                if not self._is_safe(step):
                    self._raise_failure()
                    self._save(state, Request(step, epoch, as_floats(metrics), "close()"))
            self.wait(timeout)
        finally:
            if self._pending is None or self._pending.done():  # after a TimeoutError it stays open
                self._let_go()

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """After an exception there is no last save: the state may be half a step ahead."""
        if error is None:
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
        if self._request_file is not None:
            self._request_file.stop()
        self._signals.uninstall()
        self._saver.close()
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
        ("rng" too) are left alone. `step` (a number, "best" or a tag) goes back to that checkpoint
        and archives the newer ones. `map_location` is where values without a target go. Random
        generators come last.

        Returns a `Resumed`, falsy when the root holds no checkpoint. Raises `DamagedError` when there
        are some but none can be loaded, `NotFoundError` for a step that isn't there,
        `FencedError` when another process writes here, `StoreError` when the store fails.
        """
        self.wait()
        targets = {"model": model, "optimizer": optimizer, **others}
        targets = {name: target for name, target in targets.items() if target is not None}
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
        if not self._read_only:
            if self._fresh:
                self._run.begin_fresh()
                self._fresh = False
                return Resumed()
            self._run.hold()
        infos = self._run.infos()
        candidates = infos if step is None else [self._run.find(step, infos)]
        found = self._reader.restore_first(candidates, targets, strict, skip, map_location, self._mark)
        if found is None:
            if not self._read_only:
                self._run.begin()
            return Resumed()
        info, resumed = found
        if not self._read_only:
            damaged = {one.url for one in resumed.skipped}
            self._run.go_on_from(info, [o for o in infos if f"{self._run.url}/{o.name}" not in damaged])
            self._run.retain()
        self._schedule.saved(info.step, resumed.epoch)
        warn_if_unhealthy(info, infos)
        return resumed

    def _mark(self, info: CheckpointInfo, reason: str) -> None:
        """A reader leaves no mark."""
        if not self._read_only and info.damaged is None:
            self._run.repository.mark_damaged(info, reason)

    def warm_start(self, url: str | Path, model: torch.nn.Module, **choices: Any) -> WarmStarted:
        """Copy weights of another run or file into a model, through this manager's storage options:
        `ckptmgr.warm_start`, which see for the `choices`. Not a resume: call it when `resume` was falsy."""
        return warm_start(url, model, options=self.config.storage.options, **choices)

    # What people change

    def delete(self, step: int | str) -> None:
        """Delete one checkpoint, whatever the keep rules say. Raises `ConfigError` when it is pinned."""
        self.wait()
        self._run.hold()
        info = self.info(step)
        if any(pin.holds(datetime.now(UTC)) for pin in info.pins):
            raise ConfigError(f"step {info.step} in {self._run.url} is pinned; unpin({info.step}) first")
        self._run.drop(info)

    def prune(self, *, dry_run: bool = False) -> Plan:
        """What the keep rules say of each checkpoint, carried out unless `dry_run`. Blocks."""
        if dry_run:
            return self._run.plan()
        self.wait()
        self._run.hold()
        return self._run.retain()

    def rewind(self, step: int | str) -> None:
        """Archive every checkpoint newer than this one and go on from it; call `resume` to load it.
        The archived data stays until `ckptmgr prune --archived`."""
        self.wait()
        self._run.hold()
        infos = self._run.infos()
        info = self._run.find(step, infos)
        self._run.go_on_from(info, infos)
        self._schedule.saved(info.step, info.manifest.epoch if info.manifest else None)

    # One save

    def _save(self, state: State, request: Request) -> Pending:
        if self._is_closed:
            raise ConfigError(f"the manager of {self._run.url} is closed; step {request.step} was not saved")
        self.wait()
        if self._fresh:
            self._run.begin_fresh()
            self._fresh = False
        self._run.begin()
        if request.step in self._run.steps and not request.overwrite:
            raise AlreadyExistsError(
                f"step {request.step} is in {self._run.url} already; pass overwrite=True to replace it, "
                "or save another step"
            )
        self._schedule.saved(request.step, request.epoch)
        self._pending = self._saver.start(as_mapping(state), request, self._schedule.alert)
        if not self.config.background:
            self._raise_failure()
        return self._pending

    def _is_safe(self, step: int) -> bool:
        """Whether a step is committed, or on its way there."""
        if self._pending is not None and self._pending.step == step and self._pending.error is None:
            return True
        return step in self._run.steps

    def _raise_failure(self) -> None:
        """What the last save failed with, once; under `on_error: warn` only when the budget is spent."""
        pending = self._pending
        if pending is None or not pending.done():
            return
        error = pending.take_error()
        if error is None:
            self._failures = self._failures if pending.error else 0
            return
        self._failures += 1
        tolerated = self.config.on_error == "warn" and not isinstance(error, FencedError)
        if not tolerated or self._failures > self.config.max_failures:
            raise error
        _log.warning(
            "save.failed.tolerated step=%d count=%d of %d cause=%s",
            pending.step, self._failures, self.config.max_failures, error,
        )  # fmt: skip
