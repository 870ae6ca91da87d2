"""Who can't wait as long for a store as its deadline says? Whoever has something else to do by then."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple


class Haste(NamedTuple):
    """`within_s` bounds a request, its retries included; `is_once` leaves these out."""

    within_s: float = float("inf")
    is_once: bool = False


_NONE = Haste()
_haste: ContextVar[Haste] = ContextVar("ckptmgr-haste", default=_NONE)


@contextmanager
def in_haste(within_s: float, *, is_once: bool = False) -> Iterator[None]:
    """Requests of this thread take no longer than this, each, to a store behind a network."""
    token = _haste.set(Haste(within_s, is_once))
    try:
        yield
    finally:
        _haste.reset(token)


def haste() -> Haste:
    """That of this thread now."""
    return _haste.get()
