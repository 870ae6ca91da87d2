"""What is asked of one measuring process, and what does it answer? Records that travel as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Place:
    """A folder that belongs to the benchmark alone: a path or an fsspec URL, with storage options."""

    url: str
    options: Mapping[str, Any] = field(default_factory=dict)
    is_local: bool = True

    @property
    def path(self) -> Path | None:
        return Path(self.url) if self.is_local else None

    def below(self, name: str) -> Place:
        return Place(f"{self.url}/{name}", self.options, self.is_local)


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that saves. `factory` is the import path, `module:Class`, of a `Peer`; `mode` is what it
    is made with: `synchronous`, `background`, or `prepared` (in the background, with memory made ready)."""

    peer: str
    mode: str
    factory: str

    @property
    def name(self) -> str:
        return f"{self.peer} {self.mode}"

    @property
    def is_background(self) -> bool:
        return self.mode != "synchronous"


@dataclass(frozen=True, slots=True)
class Task:
    """What one fresh process measures: `limits`, or of a contender any of `times`, `memory` and `lost`."""

    measures: tuple[str, ...]
    place: Place
    size: int  # bytes of the state, roughly
    tensors: int | None = None  # None: shapes of a transformer
    device: str = "cpu"
    contender: Contender | None = None
    saves: int = 3  # the first and later ones

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Task:
        contender = found["contender"]
        known = {
            "measures": tuple(found["measures"]),
            "place": Place(**found["place"]),
            "contender": None if contender is None else Contender(**contender),
        }
        return cls(**{**found, **known})


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a task: figures by name (seconds, or bytes where the name says so), each measured
    several times; else the `failure`. `wrong` says what came back from storage other than it went there."""

    figures: Mapping[str, list[float]] = field(default_factory=dict)
    failure: str | None = None
    wrong: str | None = None
