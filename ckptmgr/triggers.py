"""When is a save due? A moment goes in, a reason or None comes out.

Pure: no clock, rank, store or log in here; time comes in the Moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol, runtime_checkable

from .errors import ConfigError


@dataclass(frozen=True, slots=True)
class Moment:
    """What is known at one call.

    `step` and `epoch` count completed ones. `last_step` and `last_epoch` are those of the last
    save tried (or of the restored checkpoint; 0 on a fresh run). `elapsed` is in seconds since
    then. `signals` are the names of signals seen since then, `requests` the reasons given to
    `request_save` or found in the request file.
    """

    step: int
    epoch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    elapsed: float = 0.0
    last_step: int = 0
    last_epoch: int = 0
    signals: tuple[str, ...] = ()
    requests: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Decision:
    """Whether a save is due, and why: truthy when due."""

    reason: str | None = None

    def __bool__(self) -> bool:
        return self.reason is not None


@dataclass(frozen=True, slots=True)
class Horizon:
    """Until when a trigger is sure to stay silent: below this step, at this epoch, before this
    many seconds since the last save. Lets the loop's call answer with three comparisons."""

    step: float = math.inf
    epoch: float = math.inf
    elapsed: float = math.inf


@runtime_checkable
class Trigger(Protocol):
    """A rule that says when a save is due."""

    def due(self, moment: Moment) -> str | None:
        """Why a save is due now, or None. Pure: the same moment has the same answer."""

    def horizon(self, moment: Moment) -> Horizon:
        """How long this rule is sure to stay silent, as long as nothing but step, epoch and elapsed
        change; a new signal or request needs a fresh question."""


_ALWAYS_ASK = Horizon(step=-math.inf, epoch=-math.inf, elapsed=-math.inf)


@dataclass(frozen=True, slots=True)
class EverySteps:
    """Due at the first call at or after each multiple of `n` steps."""

    n: int

    def __post_init__(self) -> None:
        _check_count("every_steps", self.n)

    def due(self, moment: Moment) -> str | None:
        if moment.step // self.n <= moment.last_step // self.n:
            return None
        return f"every_steps: {self.n} crossed at {moment.step}"

    def horizon(self, moment: Moment) -> Horizon:
        return Horizon(step=(moment.last_step // self.n + 1) * self.n)


@dataclass(frozen=True, slots=True)
class EveryEpochs:
    """Due at the first call at or after each multiple of `n` epochs; silent where no epoch is given."""

    n: int

    def __post_init__(self) -> None:
        _check_count("every_epochs", self.n)

    def due(self, moment: Moment) -> str | None:
        if moment.epoch is None or moment.epoch // self.n <= moment.last_epoch // self.n:
            return None
        return f"every_epochs: {self.n} crossed at {moment.epoch}"

    def horizon(self, moment: Moment) -> Horizon:
        return Horizon(epoch=(moment.last_epoch // self.n + 1) * self.n)


@dataclass(frozen=True, slots=True)
class Every:
    """Due when `interval` has passed since the last save."""

    interval: timedelta

    def __post_init__(self) -> None:
        if self.interval <= timedelta(0):
            raise ConfigError(f"every: {self.interval!s} is not a time to wait; give more than 0")

    def due(self, moment: Moment) -> str | None:
        if moment.elapsed < self.interval.total_seconds():
            return None
        return f"every: {self.interval!s} passed since step {moment.last_step}"

    def horizon(self, moment: Moment) -> Horizon:
        return Horizon(elapsed=self.interval.total_seconds())


@dataclass(frozen=True, slots=True)
class AtSteps:
    """Due at the first call at or after each of these steps."""

    steps: tuple[int, ...]

    def __post_init__(self) -> None:
        for step in self.steps:
            _check_count("at_steps", step)

    def due(self, moment: Moment) -> str | None:
        crossed = sorted(step for step in self.steps if moment.last_step < step <= moment.step)
        return f"at_steps: {', '.join(map(str, crossed))} crossed at {moment.step}" if crossed else None

    def horizon(self, moment: Moment) -> Horizon:
        return Horizon(step=min((step for step in self.steps if step > moment.last_step), default=math.inf))


@dataclass(frozen=True, slots=True)
class When:
    """Due when `predicate` says so; it is asked at every call. What it raises goes to the caller as it is."""

    predicate: Callable[[Moment], object]
    name: str = ""

    def due(self, moment: Moment) -> str | None:
        name = self.name or getattr(self.predicate, "__qualname__", type(self.predicate).__qualname__)
        return f"when: {name}" if self.predicate(moment) else None

    def horizon(self, moment: Moment) -> Horizon:
        return _ALWAYS_ASK


@dataclass(frozen=True, slots=True)
class OnSignals:
    """Due when the process has received one of these signals since the last save."""

    names: tuple[str, ...]

    def due(self, moment: Moment) -> str | None:
        seen = [name for name in dict.fromkeys(moment.signals) if name in self.names]
        return f"on_signals: {', '.join(seen)}" if seen else None

    def horizon(self, moment: Moment) -> Horizon:
        return _ALWAYS_ASK if self.due(moment) else Horizon()


@dataclass(frozen=True, slots=True)
class OnRequest:
    """Due when a save was asked for, by `request_save` or by the request file."""

    def due(self, moment: Moment) -> str | None:
        return f"request: {', '.join(moment.requests)}" if moment.requests else None

    def horizon(self, moment: Moment) -> Horizon:
        return _ALWAYS_ASK if moment.requests else Horizon()


@dataclass(frozen=True, slots=True)
class AnyOf:
    """Due when any of `triggers` is; says every reason. All are asked, so a predicate sees each moment."""

    triggers: tuple[Trigger, ...]

    def due(self, moment: Moment) -> str | None:
        reasons = [trigger.due(moment) for trigger in self.triggers]
        return "; ".join(reason for reason in reasons if reason is not None) or None

    def horizon(self, moment: Moment) -> Horizon:
        horizons = [trigger.horizon(moment) for trigger in self.triggers]
        return Horizon(
            step=min((h.step for h in horizons), default=math.inf),
            epoch=min((h.epoch for h in horizons), default=math.inf),
            elapsed=min((h.elapsed for h in horizons), default=math.inf),
        )


def doubts(rule: AnyOf, epoch: int | None) -> list[str]:
    """Why no save, or fewer than were meant, may come of a rule, as far as the first call tells: it gave this epoch."""
    found = []
    if all(isinstance(trigger, OnSignals | OnRequest) for trigger in rule.triggers):
        found.append("a signal or a request alone makes maybe_save save: set save.every_steps, every_epochs or every")
    if epoch is None and any(isinstance(trigger, EveryEpochs) for trigger in rule.triggers):
        found.append("save.every_epochs counts by epoch=, which maybe_save was not given")
    return found


def as_trigger(rule: Trigger | Callable[[Moment], object]) -> Trigger:
    """A trigger as it is, or a plain `callable(Moment) -> bool` as one. Raises `ConfigError` for anything else."""
    # A class is not an instance of the protocol, though it carries the methods' names.
    if isinstance(rule, Trigger) and not isinstance(rule, type):
        return rule
    if callable(rule):
        return When(rule)
    raise ConfigError(f"triggers: {rule!r} is neither a trigger nor a callable(Moment) -> bool")


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}: {value!r} is not a count; give a whole number of at least 1")
