"""Which run lives in this root, and may this process write to it?

Holds the writer's lock and the run's identity between the manager and the repository: who goes on
from which checkpoint, which steps are taken, what the keep rules apply to.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime

from .config import CheckpointConfig
from .errors import AlreadyExistsError, CheckpointError, ConfigError, NotFoundError
from .lock import WriterLock, acquire
from .manifest import CheckpointInfo, NameTemplate
from .repository import Repository
from .retention import Best, Plan, plan
from .store import Store

_log = logging.getLogger("ckptmgr.run")


class Run:
    """One run in one root. Methods block on the store and raise `StoreError`; `hold` and whatever
    writes raise `FencedError` when another process is the writer."""

    def __init__(self, store: Store, config: CheckpointConfig, *, takeover: bool, read_only: bool) -> None:
        self.repository = Repository(
            store, names=NameTemplate(config.name), pointer=config.latest, commit=config.commit
        )
        self.url = store.url
        self.name = config.run  # None until found or made up
        self.parent: int | None = None  # the step that training goes on from
        self.steps: set[int] = set()  # those committed and sound
        self.is_begun = False
        self._config, self._takeover, self._read_only = config, takeover, read_only
        self._lock: WriterLock | None = None

    # Reading

    def infos(self) -> list[CheckpointInfo]:
        """The run's checkpoints, newest first. Without a name yet, the run of the newest one."""
        infos = self.repository.infos()
        runs = [info.manifest.run for info in infos if info.manifest is not None]
        name = self.name or next(iter(runs), None)
        ours = [info for info in infos if info.manifest is None or info.manifest.run == name]
        if runs and name not in runs and not self.is_begun:
            raise AlreadyExistsError(
                f"{self.url} holds run {runs[0]!r} (newest step {infos[0].step}), and the config says run {name!r}: "
                f"set run: {runs[0]}, use another root, or pass fresh=True to archive what is there"
            )
        return ours

    def find(self, step: int | str, infos: Sequence[CheckpointInfo]) -> CheckpointInfo:
        """One of `infos` by number, "latest", "best" or tag. Raises `NotFoundError`."""
        if step != "best":
            return self.repository.find(step, infos)
        best = self.best(infos)
        if best is None:
            raise NotFoundError(f"no checkpoint in {self.url} has a finite value of the metric of keep.best")
        return best

    def best(self, infos: Sequence[CheckpointInfo]) -> CheckpointInfo | None:
        """The best by the first `keep.best`. Raises `ConfigError` when there is none in the config."""
        rule = next((rule for rule in self._config.keep_rules() if isinstance(rule, Best)), None)
        if rule is None:
            raise ConfigError('"best" needs a metric: set keep.best, such as keep: {best: {metric: loss, mode: min}}')
        sound = [info for info in infos if info.damaged is None]
        return next((info for info, _ in replace(rule, count=1).keeps(sound, datetime.now(UTC))), None)

    def plan(self) -> Plan:
        """What the keep rules say of this run's checkpoints. One whose manifest can't be read is not
        judged: only a person can tell what it was."""
        keep = self._config.keep
        known = [info for info in self.infos() if info.manifest is not None]
        return plan(
            known,
            self._config.keep_rules(),
            now=datetime.now(UTC),
            min_good=keep.min_good,
            max_bytes=keep.max_bytes,
        )

    # Becoming the writer

    def hold(self) -> None:
        """Become the writer, if not yet, and clear away what dead ones left."""
        if self._read_only:
            raise ConfigError(f"the manager of {self.url} was opened with read_only=True and does not write")
        if self._lock is None:
            attempts = [info.manifest.attempt for info in self.repository.infos() if info.manifest is not None]
            self._lock = acquire(
                self.repository.store,
                floor=max(attempts, default=0),
                takeover=self._takeover,
                ttl_s=self._config.lease_ttl.total_seconds(),
            )
            self.repository.sweep()
        else:
            self.check()

    @property
    def attempt(self) -> int:
        assert self._lock is not None
        return self._lock.attempt

    def check(self) -> None:
        """Raises `FencedError` when another writer has taken over."""
        if self._lock is not None:
            self._lock.check()

    def begin(self) -> None:
        """Start a new run in a root that holds no checkpoint."""
        if self.is_begun:
            return
        self.hold()
        if infos := self.repository.infos():
            raise AlreadyExistsError(
                f"{self.url} holds {len(infos)} checkpoint(s), the newest of step {infos[0].step}, and nobody resumed "
                "from them: call resume() first, use another root, or pass fresh=True to archive them and start over"
            )
        self._begin_new()

    def _begin_new(self) -> None:
        self.name = self.name or f"run-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        self.is_begun, self.parent, self.steps = True, None, set()

    def begin_fresh(self) -> None:
        """Archive whatever the root holds and start a new run."""
        self.hold()
        self.name = self._config.run
        infos = self.repository.infos()
        self._archive(infos)
        if infos:
            self.repository.point(None)
        self._begin_new()

    def go_on_from(self, info: CheckpointInfo, infos: Sequence[CheckpointInfo]) -> None:
        """Continue the run from a sound checkpoint; those of `infos` that are newer and sound are archived."""
        assert info.manifest is not None
        self.hold()
        newer = [other for other in infos if other.order > info.order and other.damaged is None]
        self._archive(newer)
        if newer:
            self.repository.point(info.name)
        self.name, self.parent, self.is_begun = info.manifest.run, info.step, True
        # A step of an older attempt that lies ahead was committed by a writer that had been fenced off.
        older = (other for other in infos if other.order <= info.order and other.step <= info.step)
        self.steps = {other.step for other in older if other.damaged is None}

    def _archive(self, newest_first: Sequence[CheckpointInfo]) -> None:
        """Newest first: a crash on the way leaves an unbroken branch."""
        for info in newest_first:
            self.repository.archive(info)

    # Writing

    def committed(self, info: CheckpointInfo, *, replaces: bool) -> None:
        """After a commit, in its order: the pointer, what it replaces, the keep rules. A failure here
        leaves more than was wanted, never less: a warning."""
        self.parent = info.step
        self.steps.add(info.step)
        try:
            self.repository.point(info.name)
            if replaces:
                now = datetime.now(UTC)
                for old in self.infos():
                    is_pinned = any(pin.holds(now) for pin in old.pins)
                    if old.step == info.step and old.name != info.name and not is_pinned:
                        self.repository.drop(old)
            self.retain()
        except CheckpointError as exc:
            _log.warning("retention.failed step=%d url=%s cause=%s", info.step, self.url, exc)

    def retain(self) -> Plan:
        """Carry out the plan."""
        self.check()
        made = self.plan()
        for verdict in made.drop:
            _log.info("retention.drop step=%d why=%s", verdict.info.step, "; ".join(verdict.reasons))
        self.drop(*(verdict.info for verdict in made.drop))
        return made

    def drop(self, *infos: CheckpointInfo) -> None:
        """Delete checkpoints, and move the pointer when it named one of them."""
        for info in infos:
            self.repository.drop(info)
            self.steps.discard(info.step)
        if infos and self.repository.pointer() in {info.name for info in infos}:
            newest = next((other for other in self.infos() if other.damaged is None), None)
            self.repository.point(None if newest is None else newest.name)

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None
