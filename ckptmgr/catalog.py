"""What is in a root? The questions that need no lock, for the manager and for readers beside it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from .config import CheckpointConfig
from .errors import ConfigError, DamagedError, NotFoundError
from .manifest import CheckpointInfo
from .quantities import parse_duration
from .reading import again, check_there, pinned, read_first
from .resumption import Reader
from .run import Run
from .source import Problem

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("ckptmgr.catalog")


class Catalog:
    """One run's checkpoints as the store has them now, never from memory."""

    def __init__(self, run: Run, config: CheckpointConfig) -> None:
        self._run = run
        self._reader = Reader(run.repository, config.verify.on_resume, config.trust_pickle)

    def all_steps(self) -> list[int]:
        """Steps of all checkpoints not known damaged, ascending; from the store."""
        return sorted({info.step for info in self._run.infos() if info.damaged is None})

    def latest_step(self) -> int | None:
        """Step of the newest checkpoint not known damaged, or None; from the store."""
        newest = self._newest()
        return None if newest is None else newest.step

    def best_step(self) -> int | None:
        """Step of the best checkpoint by the first `keep.best`, or None; from the store. Raises
        `ConfigError` when the config names no metric."""
        best = self._run.best(self._run.infos())
        return None if best is None else best.step

    def info(self, step: int | str = "latest") -> CheckpointInfo:
        """What the store says of a checkpoint. Raises `NotFoundError`."""
        newest = self._newest() if step == "latest" else None
        return self._run.find(step, self._run.infos()) if newest is None else newest

    def _newest(self) -> CheckpointInfo | None:
        return next((info for info in self._run.newest_first() if info.damaged is None), None)

    def verify(self, step: int | str = "latest", level: str = "full") -> list[Problem]:
        """What is wrong with a checkpoint's files: `size` compares sizes, `full` reads every byte. Blocks.
        One that is deleted meanwhile is not damaged, and looked for again: a number is then a `NotFoundError`."""
        repository = self._run.repository

        def look(turn: int) -> list[Problem]:
            info = self.info(step)
            with pinned(repository, info, turn):
                problems = repository.verify(info, level)
            if problems:
                check_there(repository, info)
            return problems

        return again(look)

    def load(
        self,
        step: int | str = "latest",
        *,
        only: Sequence[str] | None = None,
        map_location: str | torch.device = "cpu",
        mmap: bool = False,
    ) -> dict[str, Any]:
        """The state of a checkpoint as nested data, without targets; for inference and inspection.

        `step` is a number, "latest", "best" (by the first `keep.best`), or a tag; `only` names the
        entries wanted. Blocks; needs no lock and changes nothing. For "latest", damaged ones are
        passed over with a warning. Raises `NotFoundError`, `DamagedError`, `StateMismatchError`.

        A writer may delete checkpoints all the while: of one that goes while it is read no part is returned, and it
        counts as deleted, not as damaged. It is then looked for again (for "latest" and "best" that is a newer one; a
        number is a `NotFoundError`), and pinned for as long as it is read where the root can be written to.

        With `mmap` the tensors are private mappings of the checkpoint's files: nothing is read before
        it is touched, processes share what they only read, and what is written stays out of the file.
        They stay usable when the checkpoint is deleted, but on Windows, which refuses to delete it.
        Sizes are compared, digests only with `verify.on_resume: full`. Raises `ConfigError` for what
        can't be mapped: a remote root, another format than safetensors, another `map_location`.
        """

        def skip(info: CheckpointInfo, exc: DamagedError) -> None:
            _log.warning("load.skip.damaged step=%d url=%s/%s cause=%s", info.step, self._run.url, info.name, exc)

        state = read_first(
            self._run.repository,
            lambda: self._run.newest_first() if step == "latest" else [self.info(step)],
            lambda info: self._reader.load(info, only, map_location, mmap),
            skip,
        )
        if state is None:
            raise NotFoundError(f"no checkpoint in {self._run.url}; steps there: none")
        return state

    def pin(self, step: int | str, tag: str | None = None, ttl: timedelta | str | float | None = None) -> None:
        """Keep a checkpoint from every keep rule, for ever or for `ttl` ("7d", or seconds). Needs no
        lock; a reader may pin what it reads. At return it holds against any writer, whose clock may be another;
        one that was being deleted at this moment is a `NotFoundError`. Raises `ConfigError`, `DamagedError`."""
        try:
            expires = None if ttl is None else datetime.now(UTC) + parse_duration(ttl)
        except ValueError as exc:
            raise ConfigError(f"ttl={ttl!r}: {exc}, or none to pin for ever") from exc
        self._run.repository.pin(self.info(step), tag, expires)

    def unpin(self, step: int | str, tag: str | None = None) -> int:
        """Remove the pins that a step, folder or tag means (of a pin's own tag that one alone), or of these the one
        with `tag`, also where the checkpoint itself is gone; answers how many there were."""
        return self._run.repository.unpin(self.info(step).name if step == "best" else step, tag)
