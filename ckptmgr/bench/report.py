"""What do the figures say? Medians, bests, ratios to torch.save and to what is possible, and advice in words."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .tasks import Contender, Outcome, Task

REFERENCE = ("torch.save", "synchronous")
IDEAL = "ideal"

# What a figure is compared with: the limit of the machine in a background or a synchronous save, and the
# figure of torch.save.
_LIMITS = {
    "first_stall": ("copy", "write"),
    "stall": ("copy", "write"),
    "first_durable": ("write", "write"),
    "durable": ("write", "write"),
    "cold": ("read", "read"),
    "warm": ("cached", "cached"),
    "lost": (IDEAL, IDEAL),
}
_REFERENCES = {"first_stall": "durable", "stall": "durable", "first_durable": "durable", "lost": "durable"}
_TEN_MINUTES_S = 600
_BUDGET = 0.01  # of the training time, for saving
_OFTEN = 1.3  # times slower than later ones: a first save worth preparing


@dataclass(frozen=True)
class Figures:
    """Every measurement of one contender, or of the limits: seconds, or bytes where the name says so."""

    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    failure: str | None = None
    wrong: str | None = None

    def median(self, name: str) -> float | None:
        found = self.samples.get(name)
        return statistics.median(found) if found else None

    def best(self, name: str) -> float | None:
        return min(self.samples.get(name, ()), default=None)


@dataclass(frozen=True)
class Report:
    """What was measured where, and what came of it."""

    url: str
    size: int
    tensors: int | None
    repeats: int
    device: str
    limits: Figures
    contenders: Mapping[Contender, Figures]

    @classmethod
    def of(
        cls,
        url: str,
        size: int,
        tensors: int | None,
        repeats: int,
        device: str,
        outcomes: Iterable[tuple[Task, Outcome]],
    ) -> Report:
        """The outcomes of all processes, brought together by contender."""
        found: dict[Contender | None, list[Outcome]] = {}
        for task, outcome in outcomes:
            found.setdefault(task.contender, []).append(outcome)
        joined = {contender: _joined(outcomes) for contender, outcomes in found.items()}
        limits = joined.pop(None, Figures())
        ideal = next((contender for contender in joined if contender and contender.peer == IDEAL), None)
        if ideal is not None:
            found_ideal = joined.pop(ideal)
            limits = Figures(
                {**limits.samples, IDEAL: found_ideal.samples.get("lost", [])}, limits.failure or found_ideal.failure
            )
        return cls(
            url, size, tensors, repeats, device, limits, {one: figures for one, figures in joined.items() if one}
        )

    def seconds(self, peer: str, mode: str, name: str) -> float | None:
        """The median of one figure, or None where it was not measured."""
        figures = next((f for one, f in self.contenders.items() if (one.peer, one.mode) == (peer, mode)), Figures())
        return figures.median(name)

    def to_limit(self, contender: Contender, name: str) -> float | None:
        """The figure over what this machine could do at best."""
        if name not in _LIMITS:
            return None
        limit = self.limits.median(_LIMITS[name][0 if contender.is_background else 1])
        size = self.contenders[contender].median("bytes")
        if limit is not None and size is not None and name != "lost":
            limit *= size / self.size  # the state comes near the size asked for, and the limits are of just that
        return _ratio(self.contenders[contender].median(name), limit)

    def to_reference(self, contender: Contender, name: str) -> float | None:
        """The figure over torch.save's: for a save, over what that takes until it is on the disk."""
        if name not in _LIMITS:
            return None
        return _ratio(self.contenders[contender].median(name), self.seconds(*REFERENCE, _REFERENCES.get(name, name)))

    def throughput(self, contender: Contender) -> float | None:
        """Bytes a second, from the beginning of a save to its end."""
        figures = self.contenders[contender]
        return _ratio(figures.median("bytes"), figures.median("durable"))

    @property
    def wrong(self) -> dict[Contender, str]:
        """Who gave back other values than it was given, and which."""
        return {one: figures.wrong for one, figures in self.contenders.items() if figures.wrong}

    def record(self) -> dict[str, Any]:
        """Everything, for JSON; seconds and bytes."""
        return {
            "url": self.url,
            "size": self.size,
            "tensors": self.tensors,
            "repeats": self.repeats,
            "device": self.device,
            "limits": {name: _summary(self.limits, name) for name in self.limits.samples},
            "limits_failure": self.limits.failure,
            "contenders": [
                {
                    "peer": contender.peer,
                    "mode": contender.mode,
                    "failure": figures.failure,
                    "wrong": figures.wrong,
                    "bytes_per_second": self.throughput(contender),
                    "figures": {
                        name: _summary(figures, name)
                        | {"to_torch_save": self.to_reference(contender, name)}
                        | {"to_limit": self.to_limit(contender, name)}
                        for name in figures.samples
                    },
                }
                for contender, figures in self.contenders.items()
            ],
            "advice": self.advice(),
        }

    def advice(self) -> list[str]:
        """What to do, in sentences; nothing where ckptmgr was not measured."""
        figures = {one.mode: f for one, f in self.contenders.items() if one.peer == "ckptmgr" and not f.failure}
        stall, durable, lost = (_of(figures, "background", name) for name in ("stall", "durable", "lost"))
        synchronous = _of(figures, "synchronous", "durable")
        if stall is None or durable is None:
            return []
        if synchronous is not None and synchronous <= max(stall, lost or 0):
            return [
                f"Save synchronously (background: false): a save takes {time_text(synchronous)}, and in the background "
                f"it costs no less and holds a copy of the state.",
                _cadence(synchronous, synchronous),
            ]
        found = ["Save in the background, which is the default."]
        if synchronous is not None:
            found = [
                f"Save in the background, which is the default: training waits {time_text(stall)} for a save, and "
                f"{time_text(synchronous)} with background: false."
            ]
        found.append(_cadence(max(stall, lost or 0), durable))
        found.append(
            f"A save is durable after {time_text(durable)}. Only a loop that saves more often than that ever waits "
            f"for the save before; when_busy: skip leaves such saves out."
        )
        first = _of(figures, "background", "first_stall")
        if first is not None and first > _OFTEN * stall:
            found.append(
                f"The first save waits {time_text(first)}, as it makes the memory for the copy: prepare(state) before "
                f"the loop, or resume(), takes most of that out of it."
            )
        held = _of(figures, "background", "save_bytes")
        if held is not None:
            spared = _of(figures, "synchronous", "save_bytes")
            less = "" if spared is None else f"; background: false needs {size_text(spared)}"
            found.append(f"Saving in the background holds {size_text(held)} of memory{less}.")
        return found


def _cadence(cost: float, durable: float) -> str:
    share = cost / _TEN_MINUTES_S
    least = max(cost / _BUDGET, durable)
    return (
        f"A save costs {time_text(cost)} of training time: every 10 min that is {100 * share:.2g} %, and saving "
        f"every {time_text(least)} or less often keeps it under {100 * _BUDGET:.0f} %."
    )


def time_text(seconds: float) -> str:
    """A time for people, in the unit that suits it."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.{0 if abs(seconds) >= 0.00995 else 1}f} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"


def size_text(size: float) -> str:
    """Bytes for people."""
    return f"{size / (1 << 20):,.0f} MiB"


def _joined(outcomes: Sequence[Outcome]) -> Figures:
    samples: dict[str, list[float]] = {}
    for outcome in outcomes:
        for name, values in outcome.figures.items():
            samples.setdefault(name, []).extend(values)
    failure = next((outcome.failure for outcome in outcomes if outcome.failure), None)
    return Figures(samples, failure, next((outcome.wrong for outcome in outcomes if outcome.wrong), None))


def _summary(figures: Figures, name: str) -> dict[str, Any]:
    return {"median": figures.median(name), "best": figures.best(name), "samples": list(figures.samples[name])}


def _of(figures: Mapping[str, Figures], mode: str, name: str) -> float | None:
    return figures[mode].median(name) if mode in figures else None


def _ratio(value: float | None, base: float | None) -> float | None:
    # A cost may come out below nothing where a machine is busy with other things.
    return value / base if value is not None and base is not None and base > 0 else None
