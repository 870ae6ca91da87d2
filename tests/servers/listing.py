"""Which names stand on one page of a bucket's listing?"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["Page", "page"]


@dataclass(slots=True)
class Page:
    """Names and common prefixes, both sorted; `last` is where the next page goes on, or None at the end."""

    names: list[str] = field(default_factory=list)
    prefixes: list[str] = field(default_factory=list)
    last: str | None = None


def page(names: Iterable[str], prefix: str, delimiter: str, after: str, limit: int) -> Page:
    """At most `limit` entries that follow `after`, with names folded behind the first delimiter after the prefix."""
    result, mark = Page(), ""
    for name in sorted(names):
        if not name.startswith(prefix):
            continue
        cut = name.find(delimiter, len(prefix)) if delimiter else -1
        entry = name if cut < 0 else name[: cut + len(delimiter)]
        if entry <= after or entry == mark:
            continue
        if len(result.names) + len(result.prefixes) == limit:
            result.last = mark
            break
        mark = entry
        (result.names if cut < 0 else result.prefixes).append(entry)
    return result
