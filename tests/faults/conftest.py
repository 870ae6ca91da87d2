"""How much does a test of faults try, and who counts it?

A test that takes `profile` runs twice: `quick` with a sample of its points, always, and `full` with all of
them, by `pytest -m faults`. What it tells `tally` stands at the end of pytest's report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest

T = TypeVar("T")


class Profile:
    """Which of all points a run tries."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_full = name == "full"

    def sample(self, points: Sequence[T], quick: int) -> list[T]:
        """All of them in the full profile, else `quick` of them, evenly spread, the first and the last among them."""
        if self.is_full or len(points) <= quick:
            return list(points)
        if quick < 2:
            return list(points[:quick])
        return [points[round(place * (len(points) - 1) / (quick - 1))] for place in range(quick)]


@pytest.fixture(params=["quick", pytest.param("full", marks=pytest.mark.faults)])
def profile(request: pytest.FixtureRequest) -> Profile:
    return Profile(request.param)


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Callable[[str, int], None]:
    """`tally("crash points", 12)`: so many were tried and survived."""

    def count(what: str, number: int = 1) -> None:
        record_property("faults", [what, number])  # which tests/conftest.py adds up

    return count
