"""What did a resume restore, and from where? Reading a checkpoint back into live objects."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .coordinator import Channel, Circle, Solo, has_neighbours
from .errors import ConfigError, DamagedError, NotFoundError, StateMismatchError
from .formats import FileSource, open_format
from .formats.rank_files import OwnState
from .formats.safetensors_state import SafetensorsState
from .manifest import CheckpointInfo, Manifest
from .memory import available, enough
from .reading import check_there
from .repository import Repository
from .request import refuse_text
from .shared_source import SharedSource
from .state import RestorePlan, RngReport, derive_rng, is_per_rank, match, materialize, restore_rng, unclaimed
from .state.collector import uncollected
from .state.restore import Objects, grown, of_objects
from .state.snapshot import StoredPart, Tree

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("ckptmgr.resume")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Skipped:
    """A checkpoint that resume passed over, and why."""

    step: int
    url: str
    reason: str


@dataclass(frozen=True, slots=True)
class PerRankReport:
    """What became of what differs from rank to rank.

    `policy` is "own" where there are as many ranks as when the checkpoint was saved, and each has its own back;
    else it is what `on_world_change` says. `not_restored` are the entries that were left as they are.
    """

    policy: str = "own"
    saved_world_size: int = 1
    world_size: int = 1
    not_restored: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Resumed:
    """What `resume` restored; falsy on a fresh run, where `step` and `epoch` are 0.

    `values` holds the checkpoint's entries that no target claimed, tensors included; `skipped` the
    newer checkpoints that were damaged; `missing`, `unexpected` and `mismatched` (in shape or kind)
    the keys that did not fit (with strict=False), as "entry.key"; `casts` the tensors whose dtype
    is another now; `rng` which random generators go on where they were; `per_rank` whether this rank has
    back what it had of its own.
    """

    step: int = 0
    epoch: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    skipped: tuple[Skipped, ...] = ()
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    casts: tuple[str, ...] = ()
    rng: RngReport = field(default_factory=RngReport)
    url: str | None = None
    per_rank: PerRankReport = field(default_factory=PerRankReport)

    def __bool__(self) -> bool:
        return self.url is not None


@dataclass(frozen=True, slots=True)
class _Opened:
    """A checkpoint as one rank finds it. `part` is that rank's own, and rank 0's where `report` is of
    another number of ranks."""

    manifest: Manifest
    stored: OwnState
    part: StoredPart | None
    report: PerRankReport

    @property
    def own(self) -> list[str]:
        """The names of the entries that differ from rank to rank."""
        return [] if self.part is None else list(self.part.entries)

    def restore_rng(self, step: int, rank: int) -> RngReport:
        """Put the random generators where they were, or where the policy says."""
        report = self.report
        if self.part is None or self.part.rng is None:
            return RngReport()
        if report.policy == "own":
            return restore_rng(self.part.rng)
        if report.policy == "derive":
            return derive_rng(self.part.rng, step, rank)
        reason = f"saved by {_ranks(report.saved_world_size)}, restored by {_ranks(report.world_size)}"
        return RngReport(skipped=tuple(f"{name}: {reason}" for name in self.part.rng))


@dataclass(frozen=True, slots=True)
class Matched:
    """A checkpoint that fits what is to be restored, and the `values` of its other entries. No target
    has been touched. `forgotten` are those of the values that were saved from objects, to be told of."""

    info: CheckpointInfo
    url: str
    values: Mapping[str, Any]
    forgotten: Sequence[str]
    _opened: _Opened
    _plan: RestorePlan
    _restore: Callable[[], RngReport]

    def apply(self, skipped: tuple[Skipped, ...] = ()) -> Resumed:
        """Fill the targets; random generators last. Blocks. Raises `DamagedError` when damage is found
        on the way, with targets possibly half filled, and `StateMismatchError` as `RestorePlan.apply`."""
        plan, manifest = self._plan, self._opened.manifest
        rng = self._restore()
        if self.forgotten:  # such an object begins anew, and nothing else would tell of it
            _log.warning(
                "resume.entry.unclaimed step=%d entries=%s: resume() was given no object for these, so what was saved "
                "is only in .values, and put back into nothing; give the objects by name, or skip=%s if that is meant",
                self.info.step, ",".join(self.forgotten), self.forgotten,
            )  # fmt: skip
        return Resumed(
            self.info.step,
            manifest.epoch or 0,
            manifest.metrics,
            self.values,
            skipped,
            plan.missing,
            plan.unexpected,
            plan.mismatched,
            plan.casts,
            rng,
            self.url,
            self._opened.report,
        )


class Reader:
    """Opens checkpoints of a repository as states, for one rank of `world_size`; `on_world_change` is as
    in the config. Methods block and raise `DamagedError`, `StateMismatchError`, `StoreError`. On the way
    to a restored state each error of a rank is one of all, by `channel`; those of a `circle` read together."""

    def __init__(
        self,
        repository: Repository,
        level: str,
        trust_pickle: bool,
        rank: int = 0,
        world_size: int = 1,
        on_world_change: str = "derive",
        channel: Channel | None = None,
        circle: Circle | None = None,
    ) -> None:
        self._channel: Channel = channel or Solo()
        self._repository, self._level, self._trust_pickle = repository, level, trust_pickle
        self._rank, self._world_size, self._on_world_change = rank, world_size, on_world_change
        self._circle = circle

    def restore_first(
        self,
        candidates: Iterable[CheckpointInfo],
        targets: Mapping[str, Any],
        strict: bool,
        skip: Sequence[str],
        map_location: str | torch.device,
        mark: Callable[[CheckpointInfo, str], None],
    ) -> tuple[CheckpointInfo, Resumed] | None:
        """Restore the first of the candidates that is not damaged; `mark` hears of each that is.
        None without candidates; `DamagedError` listing all when none is left, and `DeletedMeanwhileError` when one
        was deleted while it was read."""
        skipped: list[Skipped] = []
        for info in candidates:
            try:
                with uncollected():  # until the many objects of a large state are gone: it would look at each of them
                    return info, self.open_and_match(info, targets, strict, skip, map_location).apply(tuple(skipped))
            except DamagedError as exc:
                self._channel.first("look again", partial(check_there, self._repository, info, exc))
                url = f"{self._repository.store.url}/{info.name}"
                _log.warning("resume.skip.damaged step=%d url=%s cause=%s", info.step, url, exc)
                mark(info, str(exc))
                skipped.append(Skipped(info.step, url, str(exc)))
        if not skipped:
            return None
        listed = "\n".join(f"  step {one.step}: {one.reason}" for one in skipped)
        raise DamagedError(
            f"{self._repository.store.url} holds checkpoints but what was asked for can't be loaded, and the objects "
            f"passed in may be partly overwritten:\n{listed}\nPut a sound copy in place, name another with "
            "resume(step=...), or pass fresh=True to archive them and start over"
        )

    def open_and_match(
        self,
        info: CheckpointInfo,
        targets: Mapping[str, Any],
        strict: bool,
        skip: Sequence[str],
        map_location: str | torch.device,
    ) -> Matched:
        """Compare a checkpoint with the targets and read what no target claims; touches no target. Everything
        that does not fit is raised now; damage may be found when it is applied."""
        self._channel.first("look", lambda: self._look(info))  # once for all ranks
        opened = self._together("open", lambda: self._open(info))
        lost = self._lost(info, opened, targets)
        if lost:
            opened = replace(opened, report=replace(opened.report, not_restored=tuple(sorted(lost - {*skip}))))
        self._tell(info, opened.report)
        stored = opened.stored
        claimed = {name: target for name, target in targets.items() if name not in lost}
        kept = [name for name in skip if name not in lost]
        objects = self._objects(stored)
        plan = self._together("match", lambda: match(claimed, stored, strict=strict, skip=kept, objects=objects))
        rest = [name for name in unclaimed(stored, targets) if name not in skip]
        # Values first: should they be damaged or need trust, no target has been touched.
        values = self._together(
            "read values", lambda: materialize(stored, rest, stored.fetch, objects=objects, device=map_location)
        )

        def restore() -> RngReport:
            plan.apply(stored.fetch, objects=objects, map_location=map_location)
            return RngReport() if "rng" in skip else opened.restore_rng(info.step, self._rank)

        url = f"{self._repository.store.url}/{info.name}"
        # Once for all ranks; and without any target all is meant to be in the values.
        forgotten = of_objects(stored, values) if targets and not self._rank else []
        return Matched(info, url, values, forgotten, opened, plan, partial(self._together, "restore", restore))

    def _together(self, what: str, make: Callable[[], T]) -> T:
        """What this rank makes, when all ranks have made theirs. What one of them raises is raised on all."""
        made: list[T] = []

        def attempt() -> None:
            with enough(f"{what} of {self._repository.store.url}"):
                made.append(make())

        self._channel.exchange(what, attempt, lambda _: None)
        return made[0]

    def _lost(self, info: CheckpointInfo, opened: _Opened, targets: Mapping[str, Any]) -> set[str]:
        """The entries that were another number of ranks' own, and nobody's now. Raises `StateMismatchError`
        where that is not to be."""
        report = opened.report
        if report.policy == "own":
            return set()
        if report.policy == "exact":
            raise StateMismatchError(
                f"step {info.step} of {self._repository.store.url} was saved by {_ranks(report.saved_world_size)} and "
                f"is restored by {_ranks(report.world_size)}, and on_world_change is exact: start as many as then, or "
                "set on_world_change to derive or drop"
            )
        # What an earlier version saved of a loader is among the shared entries.
        shared = {name for name, target in targets.items() if is_per_rank(target) and name in opened.stored.entries}
        return {*opened.own, *shared}

    def _tell(self, info: CheckpointInfo, report: PerRankReport) -> None:
        """Say once for all ranks what a changed number of them means."""
        if self._rank == 0 and report.policy != "own":
            _log.warning(
                "resume.world_changed step=%d saved_by=%d now=%d on_world_change=%s: random generators are %s%s",
                info.step, report.saved_world_size, report.world_size, report.policy,
                "seeded anew on every rank" if report.policy == "derive" else "left as they are",
                f"; not restored: {', '.join(report.not_restored)}" if report.not_restored else "",
            )  # fmt: skip

    def load(
        self, info: CheckpointInfo, only: Sequence[str] | None, map_location: str | torch.device, mmap: bool = False
    ) -> dict[str, Any]:
        """Entries as nested data. Raises `NotFoundError` for an entry that isn't there, and `ConfigError`
        for a checkpoint that can't be mapped."""
        refuse_text(only, "only")
        with self._loading(info):
            folder = self._mappable(info, map_location) if mmap else None
            stored = self._entries(info, only)
            names = list(stored.entries) if only is None else list(only)
            objects = self._objects(stored)
            if folder is None:
                return materialize(stored, names, stored.fetch, objects=objects, device=map_location)
            assert isinstance(stored.shared, SafetensorsState)
            mapped = partial(stored.fetch_through, partial(stored.shared.map, folder))
            return materialize(stored, names, mapped, objects=objects)

    def load_parts(
        self, info: CheckpointInfo, entry: str, choose: Callable[[Tree], Mapping[str, Tree]]
    ) -> dict[str, Any]:
        """The values of those parts of an entry's tree that `choose` takes, under the names that it gives them.
        Nothing else is read, or has to be trusted. Raises `NotFoundError` for an entry that isn't there."""
        with self._loading(info):
            stored = self._entries(info, [entry])
            return grown(choose(stored.entries[entry]), stored.fetch, self._objects(stored))

    @contextmanager
    def _loading(self, info: CheckpointInfo) -> Iterator[None]:
        with uncollected(), enough(f"load {self._repository.store.url}/{info.name}"):
            yield

    def _entries(self, info: CheckpointInfo, names: Sequence[str] | None) -> OwnState:
        """A checkpoint that has these entries."""
        self._look(info)
        opened = self._open(info)
        stored = opened.stored
        if unknown := [name for name in names or () if name not in stored.entries]:
            foreign = [name for name in unknown if name in opened.own]
            count = _ranks(opened.report.saved_world_size)
            raise NotFoundError(
                f"{self._repository.store.url}/{info.name} has no entry {', '.join(unknown)}; "
                f"it has {', '.join(stored.entries)}"
                + (f". What {count} had of {', '.join(foreign)} loads only where there are as many" if foreign else "")
            )
        return stored

    def _objects(self, stored: OwnState) -> Objects | None:
        return stored.objects if self._trust_pickle else None

    def _mappable(self, info: CheckpointInfo, map_location: str | torch.device) -> Path:
        """The checkpoint's folder. Raises `ConfigError` when its tensors can't be mappings of its files."""
        root, problem = self._repository.store.path, None
        if root is None:
            problem = "is not on a disk of this machine"
        elif info.manifest is not None and info.manifest.format != "safetensors":
            problem = f"is of format {info.manifest.format}, and only safetensors can be mapped"
        elif str(map_location) != "cpu":
            problem = f"would be mapped into host memory, not to {map_location}"
        if root is None or problem is not None:
            raise ConfigError(f"mmap=True: {self._repository.store.url}/{info.name} {problem}; load it without mmap")
        return root / info.name

    def _look(self, info: CheckpointInfo) -> None:
        """Raises `DamagedError` where that can be seen without reading tensors, or at once for level `full`."""
        if info.damaged is not None and info.manifest is not None:
            raise DamagedError(info.damaged)
        self._repository.open(info, self._level)

    def _open(self, info: CheckpointInfo) -> _Opened:
        manifest = info.manifest
        assert manifest is not None
        circle = None if manifest.format == "dcp" else self._circle  # of that each rank reads what it holds
        by_many = circle is None and self._reads_with_neighbours(manifest)
        source: FileSource = self._repository.source(info, self._level, by_many=by_many)
        if circle is not None:
            source = SharedSource(source, circle)
        # What is on disk decides how it is read, not today's config.
        shared = open_format(manifest.format).open(source)
        is_own = manifest.world_size == self._world_size
        rank = self._rank if is_own else 0
        part = shared.part(rank)
        if part is None and manifest.world_size > 1:
            raise DamagedError(f"it was saved by {_ranks(manifest.world_size)}, and what rank {rank} had is not there")
        policy = "own" if is_own else self._on_world_change
        report = PerRankReport(policy, manifest.world_size, self._world_size)
        return _Opened(manifest, OwnState(shared, part if is_own else None), part, report)

    def _reads_with_neighbours(self, manifest: Manifest) -> bool:
        """Whether others on this machine read the same bytes now, and its memory has room to hand them on."""
        own_files = manifest.format == "dcp" and manifest.world_size == self._world_size  # each rank reads its own
        if own_files or not has_neighbours():
            return False
        free = available()
        return free is None or manifest.size <= free // 2


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def warn_if_unhealthy(info: CheckpointInfo, infos: Iterable[CheckpointInfo]) -> None:
    """Say so when what was restored holds non-finite values, and where the last that doesn't is."""
    if info.manifest is not None and not info.manifest.healthy:
        sound = (other for other in infos if other.order < info.order and other.damaged is None)
        healthy = next((other for other in sound if other.manifest and other.manifest.healthy), None)
        way_out = f"; resume(step={healthy.step}) goes back to the last healthy one" if healthy else ""
        _log.warning("resume.unhealthy step=%d: it was saved with non-finite values%s", info.step, way_out)
