"""Which run lives in this root, and may this process write to it?

Holds the writer's lock and the run's identity between the manager and the repository: who goes on
from which checkpoint, which steps are taken, what the keep rules apply to.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from datetime import UTC, datetime
from itertools import takewhile

from .clock import SafeClock
from .config import CheckpointConfig
from .errors import (
    AlreadyExistsError,
    CheckpointError,
    ConfigError,
    DamagedError,
    FencedError,
    NotFoundError,
    StoreError,
)
from .folder_names import NameTemplate
from .ledger import Ledger
from .listing import Listing, current
from .lock import WriterLock, acquire, last_writer
from .manifest import CheckpointInfo
from .repository import Repository
from .retention import Best, NewerThan, Plan
from .store import Store, drop_spares, keeping_spares
from .store.removal import names_first

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
        self.steps: set[int] = set()  # those committed and sound, from the one that training goes on from
        self.is_begun = False
        self.clock = SafeClock()
        self._config, self._takeover, self._read_only = config, takeover, read_only
        self._lock: WriterLock | None = None
        self._has_committed = False  # since it holds the lock
        self._rules = [
            replace(rule, time_of=self.clock.time_of) if isinstance(rule, NewerThan) else rule
            for rule in config.keep_rules()
        ]
        self._ledger = Ledger(self.repository, self._rules, config.keep, self.clock, self.infos)
        self._is_root = False  # whether it is known to be no checkpoint itself

    # Reading

    def listing(self) -> Listing:
        """What is in the root now, to be read as far as it is asked for."""
        if self._lock is None:
            return current(self.repository.listing)
        self.repository.expel()
        return self.repository.listing(self.attempt if self._has_committed else self.attempt - 1)

    def newest_first(self, listing: Listing | None = None) -> Iterator[CheckpointInfo]:
        """The run's checkpoints one after the other, with no more read than that takes. Without a name
        yet, the run of the newest one. Raises `AlreadyExistsError` when the root holds another run, and `ConfigError`
        when it is a checkpoint itself."""
        return self._any(self._ours((listing or self.listing()).newest_first()))

    def infos(self, listing: Listing | None = None) -> list[CheckpointInfo]:
        """All of them, newest first; what `newest_first` says goes for it too."""
        return list(self._ours((listing or self.listing()).infos()))

    def _ours(self, infos: Iterable[CheckpointInfo]) -> Iterator[CheckpointInfo]:
        name, newest, has_any = self.name, None, self.is_begun
        for info in infos:
            if info.manifest is not None:
                newest = newest or info
                name = name or info.manifest.run
                has_any = has_any or info.manifest.run == name
            if info.manifest is None or info.manifest.run == name:
                yield info
        if newest is not None and newest.manifest is not None and not has_any:
            run = newest.manifest.run
            raise AlreadyExistsError(
                f"{self.url} holds run {run!r} (newest step {newest.step}), and the config says run {name!r}: "
                f"set run: {run}, use another root, or pass fresh=True to archive what is there"
            )

    def _any(self, infos: Iterator[CheckpointInfo]) -> Iterator[CheckpointInfo]:
        """These; where there are none the root may be none."""
        first = next(infos, None)
        if first is None:
            self._check_root()
            return
        yield first
        yield from infos

    def _check_root(self) -> None:
        """For where no checkpoint was found. Raises `ConfigError` when the root is one itself."""
        if not self._is_root and self.repository.is_itself_one():
            raise ConfigError(
                f"{self.url} is no root of a run: it is a checkpoint itself; give the folder above it, where "
                "resume(step=...) and load(step) find this one, or a new root, and this URL to warm_start() for the "
                "weights alone"
            )
        self._is_root = True

    def find(self, step: int | str, infos: Sequence[CheckpointInfo]) -> CheckpointInfo:
        """One of `infos` by number, "latest", "best" or tag. Raises `NotFoundError`."""
        if not infos:
            self._check_root()
        if step != "best":
            return self.repository.find(step, infos)
        best = self.best(infos)
        if best is None:
            raise NotFoundError(f"no checkpoint in {self.url} has a finite value of the metric of keep.best")
        return best

    def best(self, infos: Sequence[CheckpointInfo]) -> CheckpointInfo | None:
        """The best by the first `keep.best`. Raises `ConfigError` when there is none in the config."""
        rule = next((rule for rule in self._rules if isinstance(rule, Best)), None)
        if rule is None:
            raise ConfigError('"best" needs a metric: set keep.best, such as keep: {best: {metric: loss, mode: min}}')
        sound = [info for info in infos if info.damaged is None]
        return next((info for info, _ in replace(rule, count=1).keeps(sound, datetime.now(UTC))), None)

    def plan(self, *, marks: bool = False) -> Plan:
        """What the keep rules say of this run's checkpoints, where the sizes of what is to stay were compared with its
        manifest. One whose manifest can't be read is not judged: only a person can tell what it was. With `marks`, for
        the writer, what was found damaged is remembered."""
        return self._ledger.judge_seen(self.infos(), marks=marks)

    def has_sound(self, infos: Iterable[CheckpointInfo], *, marks: bool = False) -> bool:
        """Whether one of these is sound, by the sizes of its files, too; `marks` is as with `plan`."""
        return self._ledger.has_sound(infos, marks=marks)

    # Becoming the writer

    def hold(self) -> None:
        """Become the writer, if not yet, and clear away what dead ones left."""
        if self._read_only:
            raise ConfigError(f"the manager of {self.url} was opened with read_only=True and does not write")
        if self._lock is None:
            store = self.repository.store
            if self._config.commit == "rename":
                _ = self.repository.renames  # which may not be possible
            floor = last_writer(store)
            if not floor:
                infos = self.repository.infos()
                if not infos:
                    self._check_root()  # before the lock writes into it
                floor = max((info.manifest.attempt for info in infos if info.manifest is not None), default=0)
            ttl_s = self._config.lease_ttl.total_seconds()
            announce = self.repository.announce
            self._lock = acquire(store, floor=floor, takeover=self._takeover, ttl_s=ttl_s, announce=announce)
            self._has_committed = False
            self._ledger.forget()
            try:
                self.repository.sweep(self.check, attempt=self.attempt)
            except BaseException:
                self.release()
                raise
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

    def check_quietly(self) -> None:
        """The same, where it is no news that the store does not answer."""
        with suppress(StoreError):
            self.check()

    def begin(self, listing: Listing | None = None) -> None:
        """Start a new run in a root that holds no checkpoint, as a listing made by the writer may tell."""
        if self.is_begun:
            return
        self.hold()
        if infos := (listing or self.listing()).infos():
            raise AlreadyExistsError(
                f"{self.url} holds {len(infos)} checkpoint(s), the newest of step {infos[0].step}, and nobody resumed "
                "from them: call resume() first, use another root, or pass fresh=True to archive them and start over"
            )
        self._check_root()
        self._begin_new([])

    def _begin_new(self, left: Iterable[CheckpointInfo]) -> None:
        self._ledger.put(left)
        self.name = self.name or f"run-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
        self.is_begun, self.parent, self.steps = True, None, set()

    def begin_fresh(self) -> None:
        """Archive whatever the root holds and start a new run."""
        self.hold()
        self.name = self._config.run
        infos = self.repository.infos()
        self._archive(infos)
        if infos:
            self.repository.pointer.move(None)
        else:
            self._check_root()
        self._begin_new(info for info in infos if info.manifest is None)

    def go_on_from(self, info: CheckpointInfo, listing: Listing, damaged: Collection[str] = ()) -> None:
        """Continue the run from a sound checkpoint of a listing. The newer ones are archived, but those that
        are known to be damaged, or are among `damaged` folders."""
        assert info.manifest is not None
        self.hold()
        self.name, self.parent, self.is_begun, self.steps = info.manifest.run, info.step, True, {info.step}
        # The keep rules judge all. Without any, those below this one need not be looked into.
        infos = self.infos(listing) if self._ledger.can_let_go else self.newest_first(listing)
        self._rise_above([info, *infos] if isinstance(infos, list) else [info])
        above = takewhile(lambda other: other.order > info.order, infos)
        newer = [other for other in above if other.damaged is None and other.name not in damaged]
        self._archive(newer)
        if newer:
            self.repository.pointer.move(info.name)
        self._ledger.forget()
        if self._ledger.can_let_go:
            gone = {other.name for other in newer}
            self._ledger.put(other for other in infos if other.name not in gone)

    def _rise_above(self, infos: Iterable[CheckpointInfo]) -> None:
        """Have a higher number than any of these. One that was copied here may come from a root whose writers had come
        further: all that is written under a lower number would count as older, and be the first to go."""
        top = max(info.manifest.attempt for info in infos if info.manifest is not None)
        if top >= self.attempt:
            assert self._lock is not None
            self._lock.rise(top)
            self.repository.sweep(self.check, attempt=self.attempt)
            _log.info(
                "run.attempt.rise url=%s attempt=%d: checkpoints of attempt %d are there", self.url, self.attempt, top
            )

    def _archive(self, newest_first: Sequence[CheckpointInfo]) -> None:
        """Newest first: a crash on the way leaves an unbroken branch."""
        for info in newest_first:
            self.repository.archive(info, self.check)

    # Writing

    def known(self) -> list[CheckpointInfo]:
        """The run's checkpoints with their pins and known damage as they are now, newest first. What this
        writer knows is not read again."""
        return self._ledger.infos() if self.is_begun else self.infos()

    def committed(self, info: CheckpointInfo, *, replaces: bool) -> None:
        """After a commit, in its order: the pointer, what it replaces, the keep rules. A failure here
        leaves more than was wanted, never less: a warning. Raises `FencedError` when another writer has taken over."""
        self.parent = info.step
        self.steps.add(info.step)
        self._has_committed = True
        self._ledger.add(info)
        try:
            # A cap on what is there leaves no room for what is only kept for the next save.
            is_reused = self._config.reuse_blocks and self._config.keep.max_bytes is None
            with names_first(), keeping_spares(self.repository.store) if is_reused else nullcontext():
                self._make_way(info, replaces=replaces)
        except FencedError:
            raise
        except Exception as exc:  # noqa: BLE001 - whatever it is, the save is there and must not be told to have failed
            self._ledger.forget()
            cause = exc if isinstance(exc, CheckpointError) else repr(exc)
            _log.warning("retention.failed step=%d url=%s cause=%s", info.step, self.url, cause)
        finally:
            self.repository.pointer.forget()

    def _make_way(self, info: CheckpointInfo, *, replaces: bool) -> None:
        self.repository.expel()
        self.repository.pointer.move(info.name)
        if replaces:
            now = datetime.now(UTC)
            for old in self.known():
                is_pinned = any(pin.holds(now) for pin in old.pins)
                # Of one whose manifest can't be read only a person can tell whose it is.
                if old.step == info.step and old.name != info.name and old.manifest and not is_pinned:
                    self.drop(old)
        self.rotate(info)

    def retain(self) -> Plan:
        """Become the writer, and carry out what the keep rules say of what is in the root now, as `plan` does."""
        self.hold()
        self._ledger.forget()
        self._ledger.forget_plan()
        made = self._ledger.judge_seen(self._ledger.infos(), marks=True)
        self._carry_out(made)
        return made

    def rotate(self, added: CheckpointInfo | None = None) -> None:
        """Carry out what the keep rules say of what this writer knows; `added` was committed since they were asked."""
        if self._ledger.can_let_go:
            self._carry_out(self._ledger.plan() if added is None else self._ledger.plan_after(added))

    def spare(self) -> list[CheckpointInfo]:
        """Those that can go when there is no room, the least worth first: all but the newest good one, `min_good` good
        ones and the pinned."""
        self.check()
        made = self._ledger.sure(self._ledger.plan())
        return [*(verdict.info for verdict in reversed(made.drop)), *made.spare]

    def _carry_out(self, made: Plan) -> None:
        for verdict in made.drop:
            _log.info("retention.drop step=%d why=%s", verdict.info.step, "; ".join(verdict.reasons))
        self._drop([verdict.info for verdict in made.drop])

    def drop(self, *infos: CheckpointInfo) -> list[CheckpointInfo]:
        """Delete checkpoints, and move the pointer when it named one of them; those that were pinned meanwhile
        stay. Answers which ones went."""
        self._ledger.forget_plan()
        return self._drop(infos)

    def drop_asked_for(self, *infos: CheckpointInfo) -> list[CheckpointInfo]:
        """The same for what a person named: one whose manifest can't be read goes too, with its whole folder."""
        self._ledger.forget_plan()
        return self._drop(infos, with_folder=True)

    def _drop(self, infos: Sequence[CheckpointInfo], *, with_folder: bool = False) -> list[CheckpointInfo]:
        if not infos:
            return []
        gone = []
        try:
            for info in infos:
                has_none = with_folder and info.manifest is None
                drop = self.repository.drop_folder if has_none else self.repository.drop
                if not drop(info, self._may_go):
                    _log.info("checkpoint.drop.pinned step=%d url=%s/%s", info.step, self.url, info.name)
                    self._ledger.forget_plan()
                    continue
                gone.append(info)
                self.steps.discard(info.step)
                self._ledger.remove(info)
        except BaseException:
            self._ledger.forget()  # who knows how far it came
            raise
        if self.repository.pointer.read() in {info.name for info in gone}:
            newest = next((other for other in self.newest_first() if other.damaged is None), None)
            self.repository.pointer.move(None if newest is None else newest.name)
        return gone

    def _may_go(self, info: CheckpointInfo) -> bool:
        """Asked when a checkpoint is about to go, and everyone can see that. Raises `FencedError`."""
        self.check()
        return not self.repository.is_held(info)

    # What people ask for

    def delete(self, step: int | str) -> None:
        """Delete one checkpoint. Raises `ConfigError` when it is pinned, or one of several of that step."""
        with self._holding():
            infos = self.infos()
            info = self.find(step, infos)
            if len(meant := self.repository.find_all(step, infos)) > 1:
                names = ", ".join(one.name for one in meant)
                raise ConfigError(f"{step} in {self.url} is several checkpoints: {names}; delete one by its name")
            if any(pin.holds(datetime.now(UTC)) for pin in info.pins) or not self.drop_asked_for(info):
                raise ConfigError(f"step {info.step} in {self.url} is pinned; unpin({info.step}) first")

    def rewind(self, step: int | str) -> CheckpointInfo:
        """Archive what is newer than this one and go on from it. Raises `DamagedError`, with nothing changed."""
        with self._holding():
            listing = self.listing()
            info = self.find(step, self.infos(listing))
            if info.damaged is not None or info.manifest is None:
                raise DamagedError(f"step {info.step} in {self.url} is damaged: {info.damaged}; rewind to another")
            self.repository.open(info)
            self.go_on_from(info, listing)
            return info

    @contextmanager
    def _holding(self) -> Iterator[None]:
        """A block of the writer's: what goes wrong in it may be that another one has taken over, and then says so."""
        self.hold()
        try:
            yield
        except CheckpointError:
            self.check_quietly()
            raise

    def release(self) -> None:
        self.repository.pointer.forget()
        drop_spares(self.repository.store)
        if self._lock is not None:
            self._lock.release()
            self._lock = None
