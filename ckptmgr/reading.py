"""How does a reader get a checkpoint that the writer beside it may delete at any moment?

A reader takes no lock, and as long as all goes well it writes nothing. What is gone with its manifest was
deleted while it was read: no damage, and the newest one is tried instead. From the second time on the
reader pins what it reads, so that a writer that deletes faster than it reads keeps still; in a root that
takes no pin it goes on trying. A reader that is killed leaves a pin that ends by itself.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TypeVar

from .errors import DamagedError, DeletedMeanwhileError, NotFoundError, StoreError
from .manifest import CheckpointInfo
from .repository import Repository

TRIES = 20
_TTL = timedelta(hours=6)  # of a pin that a reader puts

_log = logging.getLogger("ckptmgr.reading")

T = TypeVar("T")


def again(read: Callable[[int], T]) -> T:
    """What `read` answers, which is told the turn, from 0 on. It is asked again when a checkpoint was deleted while
    it was read; raises `DeletedMeanwhileError` when they go faster than they can be read."""
    for turn in range(TRIES - 1):
        try:
            return read(turn)
        except DeletedMeanwhileError as exc:
            _log.info("reading.again turn=%d cause=%s", turn, exc)
    return read(TRIES - 1)


@contextmanager
def pinned(repository: Repository, info: CheckpointInfo, turn: int) -> Iterator[None]:
    """A block in which a checkpoint stays, from the second `turn` on, if the root takes a pin. Raises
    `DeletedMeanwhileError` when it is gone already."""
    if not turn or info.manifest is None:
        yield
        return
    pin = None
    try:
        pin = repository.put_pin(info, f"reading-{secrets.token_hex(4)}", datetime.now(UTC) + _TTL)
    except NotFoundError as exc:
        raise DeletedMeanwhileError(str(exc)) from exc
    except StoreError as exc:
        _log.info("reading.pin.refused step=%d cause=%s (read without)", info.step, exc)
    try:
        yield
    finally:
        if pin is not None:
            try:
                repository.let_go(pin)
            except StoreError as exc:
                _log.warning("reading.pin.kept step=%d until=%s cause=%s", info.step, pin.expires, exc)


def check_there(repository: Repository, info: CheckpointInfo, cause: DamagedError | None = None) -> None:
    """Raises `DeletedMeanwhileError` when what looks like damage is that a checkpoint was deleted."""
    if info.manifest is not None and not repository.is_there(info):
        raise DeletedMeanwhileError(
            f"step {info.step} ({repository.store.url}/{info.name}) was deleted while it was read: by the keep rules "
            "of its writer, or by a person; pin what is to stay"
        ) from cause


def read_first(
    repository: Repository,
    candidates: Callable[[], Iterable[CheckpointInfo]],
    read: Callable[[CheckpointInfo], T],
    skip: Callable[[CheckpointInfo, DamagedError], None],
) -> T | None:
    """What `read` makes of the first of the candidates that is not damaged; `skip` hears of each that is. They are
    asked for again when one was deleted while it was read. None without candidates; raises the first damage
    when none is left, and `NotFoundError` when they go faster than they can be read."""
    return again(lambda turn: _first(repository, candidates(), read, skip, turn))


def _first(
    repository: Repository,
    candidates: Iterable[CheckpointInfo],
    read: Callable[[CheckpointInfo], T],
    skip: Callable[[CheckpointInfo, DamagedError], None],
    turn: int,
) -> T | None:
    failure: DamagedError | None = None
    for info in candidates:
        try:
            with pinned(repository, info, turn):
                return read(info)
        except DamagedError as exc:
            check_there(repository, info, exc)
            failure = failure or exc
            skip(info, exc)
    if failure is not None:
        raise failure
    return None
