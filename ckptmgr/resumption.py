"""What did a resume restore, and from where? Reading a checkpoint back into live objects."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, DamagedError, NotFoundError
from .formats import open_format
from .formats.safetensors_state import SafetensorsState
from .manifest import CheckpointInfo, Manifest
from .repository import Repository
from .state import RngReport, match, materialize, restore_rng, unclaimed
from .state.collector import uncollected
from .state.snapshot import StoredState

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("ckptmgr.resume")


@dataclass(frozen=True, slots=True)
class Skipped:
    """A checkpoint that resume passed over, and why."""

    step: int
    url: str
    reason: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """What `resume` restored; falsy on a fresh run, where `step` and `epoch` are 0.

    `values` holds the checkpoint's entries that no target claimed, tensors included; `skipped` the
    newer checkpoints that were damaged; `missing`, `unexpected` and `mismatched` (in shape or kind)
    the keys that did not fit (with strict=False), as "entry.key"; `casts` the tensors whose dtype
    is another now; `rng` which random generators go on where they were.
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

    def __bool__(self) -> bool:
        return self.url is not None


class Reader:
    """Opens checkpoints of a repository as states. Methods block and raise `DamagedError`,
    `StateMismatchError`, `StoreError`."""

    def __init__(self, repository: Repository, level: str, trust_pickle: bool) -> None:
        self._repository, self._level, self._trust_pickle = repository, level, trust_pickle

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
        None without candidates; `DamagedError` listing all when none is left."""
        skipped: list[Skipped] = []
        for info in candidates:
            try:
                with uncollected():
                    return info, self._restore(info, targets, strict, skip, map_location, tuple(skipped))
            except DamagedError as exc:
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

    def _restore(
        self,
        info: CheckpointInfo,
        targets: Mapping[str, Any],
        strict: bool,
        skip: Sequence[str],
        map_location: str | torch.device,
        skipped: tuple[Skipped, ...],
    ) -> Resumed:
        """Fill the targets; random generators last. Everything that does not fit is raised before
        anything is touched; damage may be found after."""
        manifest, stored = self._open(info)
        objects = stored.objects if self._trust_pickle else None
        plan = match(targets, stored, strict=strict, skip=skip)
        rest = [name for name in unclaimed(stored, targets) if name not in skip]
        # Values first: should they be damaged or need trust, no target has been touched.
        values = materialize(stored, rest, stored.fetch, objects=objects, device=map_location)
        plan.apply(stored.fetch, objects=objects, map_location=map_location)
        rng = restore_rng(stored.rng) if stored.rng is not None and "rng" not in skip else RngReport()
        return Resumed(
            info.step,
            manifest.epoch or 0,
            manifest.metrics,
            values,
            skipped,
            plan.missing,
            plan.unexpected,
            plan.mismatched,
            plan.casts,
            rng,
            f"{self._repository.store.url}/{info.name}",
        )

    def load(
        self, info: CheckpointInfo, only: Sequence[str] | None, map_location: str | torch.device, mmap: bool = False
    ) -> dict[str, Any]:
        """Entries as nested data. Raises `NotFoundError` for an entry that isn't there, and `ConfigError`
        for a checkpoint that can't be mapped."""
        with uncollected():
            return self._load(info, only, map_location, mmap)

    def _load(
        self, info: CheckpointInfo, only: Sequence[str] | None, map_location: str | torch.device, mmap: bool
    ) -> dict[str, Any]:
        folder = self._mappable(info, map_location) if mmap else None
        _, stored = self._open(info)
        names = list(stored.entries) if only is None else list(only)
        if unknown := [name for name in names if name not in stored.entries]:
            raise NotFoundError(
                f"{self._repository.store.url}/{info.name} has no entry {', '.join(unknown)}; "
                f"it has {', '.join(stored.entries)}"
            )
        objects = stored.objects if self._trust_pickle else None
        if folder is None:
            return materialize(stored, names, stored.fetch, objects=objects, device=map_location)
        assert isinstance(stored, SafetensorsState)
        return materialize(stored, names, partial(stored.map, folder), objects=objects)

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

    def _open(self, info: CheckpointInfo) -> tuple[Manifest, StoredState]:
        if info.damaged is not None or info.manifest is None:
            raise DamagedError(info.damaged or "its manifest can't be read")
        source = self._repository.open(info, self._level)
        # What is on disk decides how it is read, not today's config.
        return info.manifest, open_format(info.manifest.format).open(source)


def warn_if_unhealthy(info: CheckpointInfo, infos: Iterable[CheckpointInfo]) -> None:
    """Say so when what was restored holds non-finite values, and where the last that doesn't is."""
    if info.manifest is not None and not info.manifest.healthy:
        sound = (other for other in infos if other.order < info.order and other.damaged is None)
        healthy = next((other for other in sound if other.manifest and other.manifest.healthy), None)
        way_out = f"; resume(step={healthy.step}) goes back to the last healthy one" if healthy else ""
        _log.warning("resume.unhealthy step=%d: it was saved with non-finite values%s", info.step, way_out)
