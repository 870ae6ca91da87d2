"""Which run lives in this root, and may this process write to it?

Holds the writer's lock and the run's identity between the manager and the repository: who goes on
from which checkpoint, which steps are taken, what the keep rules apply to.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import takewhile

from .config import CheckpointConfig
from .errors import AlreadyExistsError, CheckpointError, ConfigError, DamagedError, NotFoundError
from .listing import Listing
from .lock import WriterLock, acquire, last_writer
from .manifest import CheckpointInfo, NameTemplate, Pin
from .repository import Repository
from .retention import Best, Plan, plan
from .rotation import Rotation
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
        self.steps: set[int] = set()  # those committed and sound, from the one that training goes on from
        self.is_begun = False
        self._config, self._takeover, self._read_only = config, takeover, read_only
        self._lock: WriterLock | None = None
        self._has_committed = False  # since it holds the lock
        keep, rules = config.keep, config.keep_rules()
        self._can_let_go = bool(rules) or keep.max_bytes is not None
        self._rotation = Rotation(rules, min_good=keep.min_good, max_bytes=keep.max_bytes)
        # What is there, by folder, and the records at the last plan: nobody else writes. None: to be read.
        self._known: dict[str, CheckpointInfo] | None = None
        self._records: tuple[list[Pin], dict[tuple[str, str], str]] | None = None

    # Reading

    def listing(self) -> Listing:
        """What is in the root now, to be read as far as it is asked for."""
        if self._lock is None:
            return self.repository.listing()
        return self.repository.listing(self.attempt if self._has_committed else self.attempt - 1)

    def newest_first(self, listing: Listing | None = None) -> Iterator[CheckpointInfo]:
        """The run's checkpoints one after the other, with no more read than that takes. Without a name
        yet, the run of the newest one. Raises `AlreadyExistsError` when the root holds another run."""
        return self._ours((listing or self.listing()).newest_first())

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
            store = self.repository.store
            floor = last_writer(store)
            if not floor:
                attempts = (info.manifest.attempt for info in self.repository.infos() if info.manifest is not None)
                floor = max(attempts, default=0)
            ttl_s = self._config.lease_ttl.total_seconds()
            self._lock = acquire(store, floor=floor, takeover=self._takeover, ttl_s=ttl_s)
            self._has_committed, self._known = False, None
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
        self._begin_new([])

    def _begin_new(self, left: Iterable[CheckpointInfo]) -> None:
        self._known = {info.name: info for info in left}
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
        self._begin_new(info for info in infos if info.manifest is None)

    def go_on_from(self, info: CheckpointInfo, listing: Listing, damaged: Collection[str] = ()) -> None:
        """Continue the run from a sound checkpoint of a listing. The newer ones are archived, but those that
        are known to be damaged, or are among `damaged` folders."""
        assert info.manifest is not None
        self.hold()
        self.name, self.parent, self.is_begun, self.steps = info.manifest.run, info.step, True, {info.step}
        # The keep rules judge all. Without any, those below this one need not be looked into.
        infos = self.infos(listing) if self._can_let_go else self.newest_first(listing)
        above = takewhile(lambda other: other.order > info.order, infos)
        newer = [other for other in above if other.damaged is None and other.name not in damaged]
        self._archive(newer)
        if newer:
            self.repository.point(info.name)
        self._known = None
        if self._can_let_go:
            gone = {other.name for other in newer}
            self._known = {other.name: other for other in infos if other.name not in gone}

    def _archive(self, newest_first: Sequence[CheckpointInfo]) -> None:
        """Newest first: a crash on the way leaves an unbroken branch."""
        for info in newest_first:
            self.repository.archive(info)

    # Writing

    def known(self) -> list[CheckpointInfo]:
        """The run's checkpoints with their pins and known damage as they are now, newest first. What this
        writer knows is not read again."""
        return self._with(*self.repository.records()) if self.is_begun else self.infos()

    def _with(self, pins: list[Pin], marks: dict[tuple[str, str], str]) -> list[CheckpointInfo]:
        if self._known is None:
            self._known = {info.name: info for info in self.infos()}
        by_name: dict[tuple[str, str], list[Pin]] = {}
        for pin in pins:
            by_name.setdefault((pin.name, pin.nonce), []).append(pin)
        for info in self._known.values():
            if info.manifest is not None:
                key = (info.name, info.manifest.nonce)
                held, damaged = tuple(by_name.get(key, ())), marks.get(key)
                if (held, damaged) != (info.pins, info.damaged):
                    self._known[info.name] = replace(info, pins=held, damaged=damaged)
        return sorted(self._known.values(), key=lambda info: info.order, reverse=True)

    def committed(self, info: CheckpointInfo, *, replaces: bool) -> None:
        """After a commit, in its order: the pointer, what it replaces, the keep rules. A failure here
        leaves more than was wanted, never less: a warning."""
        self.parent = info.step
        self.steps.add(info.step)
        self._has_committed = True
        if self._known is not None:
            self._known[info.name] = info
        try:
            self.repository.point(info.name)
            if replaces:
                now = datetime.now(UTC)
                for old in self.known():
                    is_pinned = any(pin.holds(now) for pin in old.pins)
                    if old.step == info.step and old.name != info.name and not is_pinned:
                        self.drop(old)
            self.rotate(info)
        except CheckpointError as exc:
            self._known = None
            _log.warning("retention.failed step=%d url=%s cause=%s", info.step, self.url, exc)

    def retain(self) -> Plan:
        """Become the writer, and carry out what the keep rules say of what is in the root now."""
        self.hold()
        self._known = None
        made = self._judge()
        self._carry_out(made)
        return made

    def rotate(self, added: CheckpointInfo | None = None) -> None:
        """Carry out what the keep rules say of what this writer knows; `added` was committed since they were asked."""
        if not self._can_let_go:
            return
        made = None
        if added is not None and self._known is not None and self._records == self.repository.records():
            made = self._rotation.plan_after(added, datetime.now(UTC))
        made = made or self._judge()
        if added is not None and made.drop:
            others = (info for info in made.must if info.name != added.name)
            if not all(map(self.repository.is_there, others)):
                self._known = None  # somebody deleted what was to stay
                made = self._judge()
        self._carry_out(made)

    def _judge(self) -> Plan:
        self._records = self.repository.records()
        # Of one whose manifest can't be read only a person can tell what it was.
        judged = [info for info in self._with(*self._records) if info.manifest is not None]
        return self._rotation.plan(judged, datetime.now(UTC))

    def _carry_out(self, made: Plan) -> None:
        if made.drop:
            self.check()
        for verdict in made.drop:
            _log.info("retention.drop step=%d why=%s", verdict.info.step, "; ".join(verdict.reasons))
        self._drop([verdict.info for verdict in made.drop])

    def drop(self, *infos: CheckpointInfo) -> None:
        """Delete checkpoints, and move the pointer when it named one of them."""
        self._records = None  # the next plan is one of all
        self._drop(infos)

    def _drop(self, infos: Sequence[CheckpointInfo]) -> None:
        if not infos:
            return
        known, self._known = self._known, None  # a failure on the way leaves who knows what
        for info in infos:
            self.repository.drop(info)
            self.steps.discard(info.step)
            if known is not None:
                known.pop(info.name, None)
        self._known = known
        if self.repository.pointer() in {info.name for info in infos}:
            newest = next((other for other in self.newest_first() if other.damaged is None), None)
            self.repository.point(None if newest is None else newest.name)

    # What people ask for

    def delete(self, step: int | str) -> None:
        """Delete one checkpoint. Raises `ConfigError` when it is pinned, or one of several of that step."""
        self.hold()
        infos = self.infos()
        info = self.find(step, infos)
        if len(meant := self.repository.find_all(step, infos)) > 1:
            names = ", ".join(one.name for one in meant)
            raise ConfigError(f"{step} in {self.url} is several checkpoints: {names}; delete one by its name")
        if any(pin.holds(datetime.now(UTC)) for pin in info.pins):
            raise ConfigError(f"step {info.step} in {self.url} is pinned; unpin({info.step}) first")
        self.drop(info)

    def rewind(self, step: int | str) -> CheckpointInfo:
        """Archive what is newer than this one and go on from it. Raises `DamagedError`, with nothing changed."""
        self.hold()
        listing = self.listing()
        info = self.find(step, self.infos(listing))
        if info.damaged is not None or info.manifest is None:
            raise DamagedError(f"step {info.step} in {self.url} is damaged: {info.damaged}; rewind to another")
        self.repository.open(info)
        self.go_on_from(info, listing)
        return info

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None
