"""When is a save due? A moment goes in, a reason or None comes out.

Pure: no clock, rank, store or log in here; time comes in the Moment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


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
