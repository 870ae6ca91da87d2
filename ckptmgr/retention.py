"""Which checkpoints stay? `plan` answers with a reason for each; whoever asked carries it out.

Pure: no I/O, no clock, no environment, no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal, Protocol

from .errors import ConfigError
from .manifest import CheckpointInfo, Manifest


class KeepRule(Protocol):
    """Says which checkpoints it wants to stay."""

    def keeps(self, infos: Sequence[CheckpointInfo], now: datetime) -> Iterator[tuple[CheckpointInfo, str]]:
        """Those to keep out of `infos` (undamaged, newest first), each with the reason."""


@dataclass(frozen=True, slots=True)
class Last:
    """The `n` newest healthy ones."""

    n: int

    def __post_init__(self) -> None:
        _check_count("last", self.n)

    def keeps(self, infos: Sequence[CheckpointInfo], now: datetime) -> Iterator[tuple[CheckpointInfo, str]]:
        for place, info in enumerate(list(filter(_is_healthy, infos))[: self.n], start=1):
            yield info, f"last: {place} of {self.n}"


@dataclass(frozen=True, slots=True)
class KeepEverySteps:
    """The first one at or after each multiple of `n` steps, and step 0; the first healthy one where there is any."""

    n: int

    def __post_init__(self) -> None:
        _check_count("every_steps", self.n)

    def keeps(self, infos: Sequence[CheckpointInfo], now: datetime) -> Iterator[tuple[CheckpointInfo, str]]:
        first: dict[int, CheckpointInfo] = {}
        for info in sorted(infos, key=lambda info: (not _is_healthy(info), info.step)):
            if info.step >= self.n or info.step == 0:
                first.setdefault(info.step // self.n, info)
        for multiple, info in first.items():
            yield info, f"every_steps: first from {multiple * self.n}"


@dataclass(frozen=True, slots=True)
class Best:
    """The `count` healthy ones with the smallest or largest value of a metric; of equals the earlier step."""

    metric: str
    mode: Literal["min", "max"]
    count: int = 1

    def __post_init__(self) -> None:
        _check_count("best.count", self.count)
        if self.mode not in ("min", "max"):
            raise ConfigError(f"best.mode: {self.mode!r} is not a mode; give min or max")

    def keeps(self, infos: Sequence[CheckpointInfo], now: datetime) -> Iterator[tuple[CheckpointInfo, str]]:
        sign = 1 if self.mode == "min" else -1
        valued = [(_manifest(info).metrics.get(self.metric, math.nan), info) for info in infos if _is_healthy(info)]
        finite = [(value, info) for value, info in valued if math.isfinite(value)]
        ranked = sorted(finite, key=lambda pair: (sign * pair[0], pair[1].step))
        for place, (value, info) in enumerate(ranked[: self.count], start=1):
            yield info, f"best: {place} of {self.count} by {self.mode} {self.metric} ({value:g})"


def _as_stamped(stamp: datetime) -> datetime:
    return stamp


@dataclass(frozen=True, slots=True)
class NewerThan:
    """Those saved less than `age` ago, healthy or not. `time_of` says when one with a stamp was saved, where the clock
    that stamped it was set."""

    age: timedelta
    time_of: Callable[[datetime], datetime] = field(default=_as_stamped, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.age <= timedelta(0):
            raise ConfigError(f"newer_than: {self.age!s} is not an age; give more than 0")

    def keeps(self, infos: Sequence[CheckpointInfo], now: datetime) -> Iterator[tuple[CheckpointInfo, str]]:
        for info in infos:
            if now - self.time_of(_manifest(info).time) < self.age:
                yield info, f"newer_than: {self.age!s}"


@dataclass(frozen=True, slots=True, repr=False)
class Verdict:
    """One checkpoint and why it stays or goes."""

    info: CheckpointInfo
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.info.name}: {'; '.join(self.reasons)}"

    def __repr__(self) -> str:
        return f"<{self}>"


@dataclass(frozen=True, slots=True)
class Plan:
    """What stays and what goes, newest first. `over_bytes` is by how much what stays exceeds the cap;
    `must` are those that have to be there before any other goes; `spare` are those of `keep` that could go, too, were
    there no room, the least worth first."""

    keep: tuple[Verdict, ...]
    drop: tuple[Verdict, ...]
    over_bytes: int = 0
    must: tuple[CheckpointInfo, ...] = ()
    spare: tuple[CheckpointInfo, ...] = ()

    @property
    def freed(self) -> int:
        """Bytes that carrying it out frees, as far as manifests tell."""
        return sum(_size(verdict.info) for verdict in self.drop)

    def __str__(self) -> str:
        lines = [f"keep {verdict}" for verdict in self.keep] + [f"drop {verdict}" for verdict in self.drop]
        if self.over_bytes:
            lines.append(f"still {self.over_bytes} bytes over max_bytes: the rest must stay")
        return "\n".join(lines)


def plan(
    infos: Iterable[CheckpointInfo],
    rules: Sequence[KeepRule],
    *,
    now: datetime,
    min_good: int = 1,
    max_bytes: int | None = None,
) -> Plan:
    """Which of one run's checkpoints stay: those that any rule keeps, the pinned, the newest good one, and at
    least `min_good` good ones. Without rules all stay. `max_bytes` then drops what it must and may."""
    _check_count("min_good", min_good)
    ordered = sorted(infos, key=_age, reverse=True)
    pinned = {info.name: why for info in ordered if info.pins and (why := _pin(info, now))}
    good = [info for info in ordered if not _is_damaged(info)]
    superseded = _superseded(good)
    rivals = [info for info in good if info.name not in superseded or info.name in pinned]
    must = _must_stay(good, rivals, min_good)
    evidence = max([min_good, *(rule.n for rule in rules if isinstance(rule, Last))])

    reasons: dict[str, list[str]] = {info.name: [] for info in ordered}
    for info in good[:1]:
        reasons[info.name].append("newest")
    for rule in rules:
        for info, why in rule.keeps(rivals, now):
            reasons[info.name].append(why)
    for name, why in pinned.items():
        reasons[name].append(why)
    newer_good = 0
    for info in ordered:
        if not _is_damaged(info):
            newer_good += 1
        elif newer_good < evidence:
            reasons[info.name].append(f"damaged: evidence until {evidence} newer good ones exist")
        if not reasons[info.name] and info.name in must:
            reasons[info.name].append(f"min_good: {min_good}")
        if not reasons[info.name] and not rules:
            reasons[info.name].append("no keep rule")

    best = {info.name for rule in rules if isinstance(rule, Best) for info, _ in rule.keeps(rivals, now)}
    weak = {info.name for info in ordered if _is_damaged(info) or not _is_healthy(info) or info.name in superseded}
    kept = [info for info in ordered if reasons[info.name]]

    def turn(info: CheckpointInfo) -> tuple[object, ...]:
        return info.name not in weak, info.name in best, _age(info)

    gone, over = _over_cap(kept, turn, must | pinned.keys(), max_bytes)

    def lost(info: CheckpointInfo) -> str:
        if info.name in gone:
            return "max_bytes"
        if _is_damaged(info):
            return f"damaged: {evidence} newer good ones exist"
        if by := superseded.get(info.name):
            return f"superseded by attempt {_manifest(by).attempt}"
        return "no rule keeps it" if _is_healthy(info) else "unhealthy"

    keeps = {info.name for info in ordered if reasons[info.name] and info.name not in gone}
    free = keeps - must - pinned.keys()
    return Plan(
        keep=tuple(Verdict(info, tuple(reasons[info.name])) for info in ordered if info.name in keeps),
        drop=tuple(Verdict(info, (lost(info),)) for info in ordered if info.name not in keeps),
        over_bytes=over,
        must=tuple(info for info in ordered if info.name in must),
        spare=tuple(sorted((info for info in ordered if info.name in free), key=turn)),
    )


def _must_stay(good: Sequence[CheckpointInfo], rivals: Sequence[CheckpointInfo], min_good: int) -> set[str]:
    """The newest good one, and the `min_good` newest: healthy ones first, among
    them superseded ones only where others lack."""
    rival_names = {info.name for info in rivals}
    # The sort is stable: newest first among equals.
    preferred = sorted(good, key=lambda info: (not _is_healthy(info), info.name not in rival_names))
    return {info.name for info in (*good[:1], *preferred[:min_good])}


def _over_cap(
    infos: Sequence[CheckpointInfo], turn: Callable[[CheckpointInfo], Any], spared: Set[str], max_bytes: int | None
) -> tuple[set[str], int]:
    """Which of `infos` go, those of the lowest `turn` first, and how many bytes too many are left after that."""
    gone: set[str] = set()
    over = 0 if max_bytes is None else sum(map(_size, infos)) - max_bytes
    for info in sorted(infos, key=turn) if over > 0 else ():
        if over > 0 and info.name not in spared:
            gone.add(info.name)
            over -= _size(info)
    return gone, max(over, 0)


def _superseded(newest_first: Iterable[CheckpointInfo]) -> dict[str, CheckpointInfo]:
    """By name the newest later one of the same step; an unhealthy one does not supersede a healthy one."""
    later: dict[int, list[CheckpointInfo]] = {}
    found = {}
    for info in newest_first:
        others = later.setdefault(info.step, [])
        by = next((other for other in others if _is_healthy(other) or not _is_healthy(info)), None)
        if by is not None:
            found[info.name] = by
        others.append(info)
    return found


def _pin(info: CheckpointInfo, now: datetime) -> str | None:
    holding = [pin for pin in info.pins if pin.holds(now)]
    tags = ", ".join(pin.tag for pin in holding if pin.tag is not None)
    return (f"pinned: {tags}" if tags else "pinned") if holding else None


def _age(info: CheckpointInfo) -> tuple[tuple[int, int, float], str]:
    return info.order, info.name


def _is_damaged(info: CheckpointInfo) -> bool:
    return info.damaged is not None or info.manifest is None


def _is_healthy(info: CheckpointInfo) -> bool:
    return info.manifest is not None and info.manifest.healthy


def _manifest(info: CheckpointInfo) -> Manifest:
    assert info.manifest is not None, "only undamaged checkpoints are looked into"
    return info.manifest


def _size(info: CheckpointInfo) -> int:
    return info.manifest.size if info.manifest else 0


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}: {value!r} is not a count; give a whole number of at least 1")
