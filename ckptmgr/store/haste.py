"""Who can't wait as long for a store as its deadline says? Whoever has something else to do by then, and
whoever finds out that nobody wants the answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Haste(NamedTuple):
    """`within_s` bounds a request, its retries included; `is_once` leaves these out, and `unwanted` ends
    them when it is set."""

    within_s: float = float("inf")
    is_once: bool = False
    unwanted: threading.Event | None = None


_NONE = Haste()
_haste: ContextVar[Haste] = ContextVar("ckptmgr-haste", default=_NONE)


@contextmanager
def in_haste(
    within_s: float = float("inf"), *, is_once: bool = False, unwanted: threading.Event | None = None
) -> Iterator[None]:
    """Requests of this thread take no longer than this, each, to a store behind a network; see `Haste`."""
    token = _haste.set(Haste(within_s, is_once, unwanted))
    try:
        yield
    finally:
        _haste.reset(token)


def haste() -> Haste:
    """That of this thread now."""
    return _haste.get()
