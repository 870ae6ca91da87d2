"""Is there room for a copy of the state, and where? What a save writes from while training goes on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from .arena import Arena, Staged
from .config import CheckpointConfig
from .errors import SaveFailedError
from .overlap import NextSteps
from .program import staged_size
from .staging import Held, Region
from .state.snapshot import FlatSnapshot, names_of

_log = logging.getLogger("ckptmgr.save")


class Copier:
    """Copies states into one arena, when the config says `background` and there is room. Used from one thread."""

    def __init__(self, config: CheckpointConfig) -> None:
        self._is_wanted, self._limit = config.background, config.max_staging
        self._arena = Arena(config.max_staging)
        self._steps = NextSteps() if config.overlap else None
        self._is_told = False  # that the state does not fit into memory a second time

    def copy(self, regions: Mapping[str, Region], flat: FlatSnapshot, objects: Mapping[str, Any]) -> Staged | None:
        """The tensors copied, or, with `overlap`, those that training changes before the next step of the optimizers
        among the objects; None when they are to be written from where they are, while training waits."""
        if not self._is_wanted:
            return None
        size = staged_size(regions)
        if self._arena.has_room(size):
            with suppress(MemoryError):
                return self._held(regions, flat, objects)
        if not self._is_told:
            self._is_told = True
            why = (
                "more than is free"
                if self._limit is None
                else f"more than is free or than max_staging, {self._limit:,}"
            )
            _log.warning(
                "save.synchronous: training waits for the whole save, as a copy of the state takes %s bytes, %s",
                f"{size:,}", why,
            )  # fmt: skip
        return None

    def _held(self, regions: Mapping[str, Region], flat: FlatSnapshot, objects: Mapping[str, Any]) -> Staged:
        if self._steps is None:
            return self._arena.hold(regions, flat)
        self._steps.let_go()  # an earlier save may have failed before its copy was done
        staged = self._arena.hold(regions, flat, self._steps.tensors(objects))
        self._steps.hold_back(staged.rest)
        return staged

    def make_room(self, size: int) -> Future[None]:
        """Make the memory for a copy of `size` bytes, in the background, where it is going to be used."""
        wanted = size if self._is_wanted and self._arena.has_room(size) else 0
        try:
            return self._arena.prepare(wanted)
        except MemoryError:  # the first save tries again, and tells of it
            return self._arena.prepare(0)

    def close(self) -> None:
        """Give the memory back. No save may be in flight."""
        if self._steps is not None:
            self._steps.close()
        self._arena.release()


def refuse_changed(held: Held, flat: FlatSnapshot) -> None:
    """Raises `SaveFailedError` when somebody changed what was being copied. To be called when all is written."""
    if changed := held.changed():
        few = ", ".join(names_of(flat, changed)[:5])
        raise SaveFailedError(
            f"the copy is not of one moment: {few} changed before the optimizer's next step, which overlap: true does "
            "not allow; set overlap: false"
        )
