"""How much does a test of faults try, and who counts it?

A test that takes `profile` runs twice: `quick` with a sample of its points, always, and `full` with all of
them, by `pytest -m faults`. What it tells `tally` stands at the end of pytest's report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest

T = TypeVar("T")
_KEY = "faults"


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
        record_property(_KEY, [what, number])

    return count


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counts = Counter[str]()
    for report in terminalreporter.stats.get("passed", ()):
        for key, value in getattr(report, "user_properties", ()):
            if key == _KEY and report.when == "call":
                counts[value[0]] += value[1]
    if counts:
        terminalreporter.section("faults tried and survived")
        for what, number in sorted(counts.items()):
            terminalreporter.line(f"{number:>7,} {what}")
