"""Who else takes part in a save? The ranks of a job, behind one small protocol.

"No process group" is an object, `Solo`, not an `if`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

__all__ = [
    "NONE",
    "SAVE",
    "STOP",
    "TROUBLE",
    "Ballot",
    "Channel",
    "Circle",
    "Coordinator",
    "Solo",
    "find_coordinator",
    "has_neighbours",
]

T = TypeVar("T")
R = TypeVar("R")

# What a rank can want all ranks to do, as bits of one int.
NONE, SAVE, STOP, TROUBLE = 0, 1, 2, 4


class Channel(Protocol):
    """Calls that all ranks make in the same order. Each blocks, and has the same outcome on every rank.

    An error on one rank is raised on all of them, one of this library's under its own class, any other as
    `RankError`; its text names the rank. Raises `CoordinationError` naming the ranks that do not answer.
    """

    def exchange(self, what: str, mine: Callable[[], T], decide: Callable[[Sequence[T]], R]) -> R:
        """Every rank makes its part, rank 0 decides on all of them (by rank), every rank gets its answer."""

    def first(self, what: str, make: Callable[[], R]) -> R:
        """Rank 0 makes it, every rank gets it. `make` is not called elsewhere."""


class Ballot(Protocol):
    """A vote at each call, known to all at the next one: it travels while training goes on."""

    @property
    def is_open(self) -> bool:
        """Whether a vote was cast whose result nobody has read."""

    def cast(self, wanted: int) -> None:
        """Say what this rank wants, as bits. Every rank votes at the same calls. Does not block."""

    def result(self) -> int:
        """What any rank wanted at the last vote; none before the first. Blocks until all have voted.
        Raises `CoordinationError`."""


class Circle(Protocol):
    """Ranks that read together: all of a job, or those of one node. They make the same calls in the same order.
    Each blocks, and raises `CoordinationError`."""

    is_reader: bool  # exactly one of them is
    size: int

    def broadcast(self, data: memoryview) -> None:
        """The reader's bytes into everybody's memory, of which each rank brings as many."""

    def union(self, items: list[T]) -> list[list[T]]:
        """What each rank brings, known to all: a few small things that can be pickled."""


class Coordinator(Protocol):
    """The ranks that make the same calls. On `prompt` every rank answers within the timeout; on `patient`
    a rank may take as long as it is alive, as it waits for a store."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def prompt(self) -> Channel: ...

    @property
    def patient(self) -> Channel: ...

    @property
    def problem(self) -> str | None:
        """Why the ranks can't be asked any more, or None."""

    def ballot(self) -> Ballot | None:
        """A vote among all ranks, or None where there is nobody to ask. Every rank calls it. Blocks."""

    def circle(self, mode: str) -> Circle | None:
        """The ranks that one of them reads for, `rank0` (all) or `per_node`; None for a rank alone.
        Every rank calls it. Blocks."""

    def close(self) -> None:
        """Let go of what was made for this. Blocks for some seconds at most."""


class Solo:
    """One process, which is rank 0 of 1."""

    rank = 0
    world_size = 1
    problem = None

    @property
    def prompt(self) -> Solo:
        return self

    @property
    def patient(self) -> Solo:
        return self

    def exchange(self, what: str, mine: Callable[[], T], decide: Callable[[Sequence[T]], R]) -> R:
        return decide([mine()])

    def first(self, what: str, make: Callable[[], R]) -> R:
        return make()

    def ballot(self) -> None:
        return None

    def circle(self, mode: str) -> None:
        return None

    def close(self) -> None:
        return None


def find_coordinator(name: str, timeout_s: float) -> Coordinator:
    """The coordinator for this process. In a job of several ranks every one of them calls it, with the same
    `name`; it blocks until all have, and raises `CoordinationError` naming those that have not."""
    if not _has_ranks():
        return Solo()
    from .process_group import ProcessGroup

    return ProcessGroup(name, timeout_s)


def has_neighbours() -> bool:
    """Whether other ranks of the job run on this machine, or may, where its launcher does not say. Asks nobody."""
    return _has_ranks() and os.environ.get("LOCAL_WORLD_SIZE") != "1"


def _has_ranks() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    return bool(torch.distributed.get_world_size() > 1)
