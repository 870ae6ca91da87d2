"""What goes after one more save? `Rotation` plans as `plan` does, but judges only those whose turn can come.

In a long run the rules keep thousands of checkpoints, and another save decides about a few. After a
plan of all, those that every rule is sure of for the next saves are left out of the next plans, and
`Last` counts by so many fewer. Pure: no I/O, no clock, no environment, no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime

from .manifest import CheckpointInfo
from .retention import Best, KeepEverySteps, KeepRule, Last, NewerThan, Plan, plan

AHEAD = 128  # saves for which those left out are sure to stay


@dataclass(frozen=True, slots=True)
class _Watched:
    """Those that the next plans are about: how many more saves, until when, and what is known of the others."""

    infos: tuple[CheckpointInfo, ...]
    rules: tuple[KeepRule, ...]
    saves: int
    until: datetime
    others_bytes: int
    newest: tuple[int, int, float]
    highest_step: int


class Rotation:
    """The plans of one writer, who carries each out before asking for the next."""

    def __init__(self, rules: Sequence[KeepRule], *, min_good: int = 1, max_bytes: int | None = None) -> None:
        self._rules, self._min_good, self._max_bytes = tuple(rules), min_good, max_bytes
        self._watched: _Watched | None = None

    def plan(self, infos: Iterable[CheckpointInfo], now: datetime) -> Plan:
        """What the rules say of all."""
        made = plan(infos, self._rules, now=now, min_good=self._min_good, max_bytes=self._max_bytes)
        self._watched = _watch([verdict.info for verdict in made.keep], self._rules, self._min_good, now)
        return made

    def plan_after(self, info: CheckpointInfo, now: datetime) -> Plan | None:
        """What goes now that there is one more, as `plan` of all would say; of those that stay not all are
        named. None when all have to be judged. Pins and damage must be the same as at the last plan."""
        watched = self._watched
        self._watched = None
        if (
            watched is None
            or not watched.saves
            or now >= watched.until
            or info.order <= watched.newest
            or info.step <= watched.highest_step
        ):
            return None
        made = plan((*watched.infos, info), watched.rules, now=now, min_good=self._min_good)
        kept = tuple(verdict.info for verdict in made.keep)
        if self._max_bytes is not None and watched.others_bytes + _bytes(kept) > self._max_bytes:
            return None
        self._watched = _Watched(
            kept, watched.rules, watched.saves - 1, watched.until, watched.others_bytes, info.order, info.step
        )
        return made


def _watch(
    infos: Sequence[CheckpointInfo], rules: tuple[KeepRule, ...], min_good: int, now: datetime
) -> _Watched | None:
    """What to watch of those that stay, newest first."""
    if not infos:
        return None
    spans = (rule.age / AHEAD for rule in rules if isinstance(rule, NewerThan))
    until = now + min([_NEVER - now, *spans])
    highest_step = max(info.step for info in infos)
    if any(info.damaged for info in infos) or len({info.step for info in infos}) < len(infos):
        # They go, or hold others' places, for reasons that are not looked into here.
        return _Watched(tuple(infos), rules, AHEAD, until, 0, infos[0].order, highest_step)
    healthy = [info for info in infos if info.manifest and info.manifest.healthy]
    watched = {info.name for info in (infos[0], *healthy[:min_good])}
    watched |= {info.name for info in infos if info.pins or not info.manifest or not info.manifest.healthy}
    before = -1
    while before < len(watched):  # what one rule watches may have another watch more
        before = len(watched)
        for rule in rules:
            watched |= {info.name for info in _watched_by(rule, infos, healthy, watched, now, until)}
    return _Watched(
        tuple(info for info in infos if info.name in watched),
        tuple(_without_others(rule, healthy, watched) for rule in rules),
        AHEAD,
        until,
        _bytes(info for info in infos if info.name not in watched),
        infos[0].order,
        highest_step,
    )


def _watched_by(
    rule: KeepRule,
    infos: Sequence[CheckpointInfo],
    healthy: Sequence[CheckpointInfo],
    watched: Set[str],
    now: datetime,
    until: datetime,
) -> Iterable[CheckpointInfo]:
    """Those that the rule may let go of before the next plan of all, or needs to judge those `watched`."""
    match rule:
        case Last(n):
            return healthy[max(0, n - AHEAD) : n]
        case KeepEverySteps(n):
            places = {info.step // n for info in infos if info.name in watched}
            return (info for info, _ in rule.keeps(infos, now) if info.step // n in places)
        case NewerThan(age, time_of):
            kept = (info for info, _ in rule.keeps(infos, now))
            return (info for info in kept if info.manifest and until - time_of(info.manifest.time) >= age)
        case Best():
            return (info for info, _ in rule.keeps(infos, now))
    return infos


def _without_others(rule: KeepRule, healthy: Sequence[CheckpointInfo], watched: Set[str]) -> KeepRule:
    """The rule for those watched alone. Those it does not see must not be of the last `AHEAD` places of `Last`."""
    if isinstance(rule, Last):
        return Last(rule.n - sum(info.name not in watched for info in healthy[: rule.n]))
    return rule


def _bytes(infos: Iterable[CheckpointInfo]) -> int:
    return sum(info.manifest.size for info in infos if info.manifest)


_NEVER = datetime.max.replace(tzinfo=UTC)
