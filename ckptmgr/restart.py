"""From which checkpoint does a run go on? Rank 0 looks and takes the root; all ranks restore the same one."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from .config import CheckpointConfig
from .coordinator import Coordinator
from .errors import CheckpointError, ConfigError
from .listing import Listing
from .manifest import CheckpointInfo
from .reading import again, pinned
from .request import refuse_text
from .resumption import Reader, Resumed, warn_if_unhealthy
from .run import Run
from .state.restore import fillable
from .untrusted import FOLDER_NAME

if TYPE_CHECKING:
    import torch

_log = logging.getLogger("ckptmgr.resume")


class Restart:
    """One start of a run, on a rank. `fresh` archives what is there; `read_only` takes nothing."""

    def __init__(self, run: Run, config: CheckpointConfig, ranks: Coordinator, *, read_only: bool, fresh: bool) -> None:
        self._run, self._config, self._ranks = run, config, ranks
        self._read_only, self._fresh = read_only, fresh
        self._listing: Listing | None = None  # on rank 0, unless it is a fresh start

    def resume(
        self,
        targets: Mapping[str, Any],
        step: int | str | None,
        strict: bool,
        skip: Sequence[str],
        map_location: str | torch.device,
    ) -> tuple[CheckpointInfo | None, Resumed]:
        """Restore the newest good checkpoint, or that of a step, and take the run up there. Every rank calls
        it; blocks, and raises what `CheckpointManager.resume` does."""
        ranks = self._ranks

        def asked() -> tuple[Any, ...]:
            refuse_text(skip, "skip")
            fillable(targets, skip)  # a first start has nothing to fill from, and the next one comes after a crash
            return sorted(targets), step, strict, sorted(skip)

        if ranks.prompt.exchange("resume", asked, self._open):
            return None, Resumed()
        found = self._restore(targets, step, strict, skip, map_location)
        ranks.patient.first("take up", lambda: self._take_up(found, step))
        return found or (None, Resumed())

    def _restore(
        self,
        targets: Mapping[str, Any],
        step: int | str | None,
        strict: bool,
        skip: Sequence[str],
        map_location: str | torch.device,
    ) -> tuple[CheckpointInfo, Resumed] | None:
        """Restore the first candidate that is sound. A writer beside a reader may delete what it reads: then it
        looks again, and pins what it reads from then on."""

        def restore(turn: int) -> tuple[CheckpointInfo, Resumed] | None:
            if turn:
                self._ranks.patient.first("look again", self._look)
            with ExitStack() as pins:
                candidates = self._candidates(step, lambda info: pins.enter_context(self._pinned(info, turn)))
                return self._reader().restore_first(candidates, targets, strict, skip, map_location, self._mark)

        return again(restore)

    def _pinned(self, info: CheckpointInfo, turn: int) -> AbstractContextManager[None]:
        """Whoever holds the root need not pin."""
        return pinned(self._run.repository, info, turn if self._read_only else 0)

    def _look(self) -> None:
        """On rank 0. Raises `FencedError` where a writer finds out so that it is none any more."""
        self._run.check()
        self._listing = self._run.listing()

    def _open(self, asked: Sequence[Any]) -> bool:
        """On rank 0: become the writer, and look what is there; whether it is a fresh start."""
        if odd := [rank for rank, one in enumerate(asked) if one != asked[0]]:
            raise ConfigError(
                f"resume() was called with {asked[0]} on rank 0 and with {asked[odd[0]]} on rank {odd[0]} (entries, "
                "step, strict, skip): every rank must ask for the same"
            )
        if self._fresh:
            self._run.begin_fresh()
            return True
        if not self._read_only:
            self._run.hold()
        self._look()
        return False

    def _reader(self) -> Reader:
        """On a local disk every rank reads; over a network one does, for all."""
        config, ranks, repository = self._config, self._ranks, self._run.repository
        mode = ("rank0" if repository.store.path is None else "all") if config.read == "auto" else config.read
        return Reader(
            repository,
            config.verify.on_resume,
            config.trust_pickle,
            ranks.rank,
            ranks.world_size,
            config.on_world_change,
            ranks.patient,
            None if mode == "all" else ranks.circle(mode),
        )

    def _candidates(self, step: int | str | None, hold: Callable[[CheckpointInfo], object]) -> Iterator[CheckpointInfo]:
        """What is to be tried, one after the other, as rank 0 finds them and gets hold of them."""
        run = self._run
        tried: Iterator[CheckpointInfo] = iter(())

        def begin() -> CheckpointInfo | None:
            nonlocal tried
            assert self._listing is not None
            if step is None:
                tried = run.newest_first(self._listing)
            else:
                tried = iter([run.find(step, run.infos(self._listing))])
            return another()

        def another() -> CheckpointInfo | None:
            info = next(tried, None)
            if info is not None:
                hold(info)
            return info

        info = self._ranks.patient.first("look for checkpoints", begin)
        while info is not None:
            yield info
            info = self._ranks.patient.first("look for another checkpoint", another)

    def _take_up(self, found: tuple[CheckpointInfo, Resumed] | None, step: int | str | None) -> None:
        """On rank 0: the run goes on from what was restored, or begins."""
        run, listing = self._run, self._listing
        assert listing is not None
        is_newest = step in (None, "latest")
        if is_newest:
            self._warn_if_newer_is_gone(None if found is None else found[0])
        if found is None:
            if not self._read_only:
                run.begin(listing)
            return
        info, resumed = found
        if not self._read_only:
            run.go_on_from(info, listing, {one.url.removeprefix(f"{run.url}/") for one in resumed.skipped})
            run.rotate()
            if not is_newest:
                self._warn_if_rewound(info, step)
        warn_if_unhealthy(info, run.newest_first(listing))

    def _warn_if_newer_is_gone(self, found: CheckpointInfo | None) -> None:
        """Say so when the pointer names a checkpoint that somebody deleted: nothing else would tell of it."""
        repository = self._run.repository
        named = repository.pointer.read()
        if not named or not re.fullmatch(FOLDER_NAME, named) or (found is not None and found.name == named):
            return
        with suppress(CheckpointError):  # the pointer is a hint, and what can't be read is there
            if repository.read(named) is None:
                now = "nothing is left to go on from" if found is None else f"going on from {found.name}"
                _log.warning(
                    "resume.newest_gone url=%s/%s: the newest checkpoint was deleted; %s", self._run.url, named, now
                )

    def _warn_if_rewound(self, info: CheckpointInfo, step: int | str | None) -> None:
        """Say how many were archived: a step that stays in a script does it again at every start."""
        run, listing = self._run, self._listing
        assert listing is not None
        above = takewhile(lambda other: other.order > info.order, run.newest_first(listing))
        if newer := [other.step for other in above if other.damaged is None]:
            _log.warning(
                "resume.rewind.archived step=%d archived=%d newest=%d url=%s: resume(step=%r) put what is newer aside, "
                "and does so again at every start: take step= out now, to go on from the newest; manager.rewind(%d) "
                "goes back once",
                info.step, len(newer), newer[0], run.url, step, info.step,
            )  # fmt: skip

    def _mark(self, info: CheckpointInfo, reason: str) -> None:
        """A reader leaves no mark; a store that takes none must not hide the sound ones."""
        if self._read_only or info.damaged is not None or self._ranks.rank:
            return
        try:
            self._run.repository.mark_damaged(info, reason)
        except CheckpointError as exc:  # the others are not told: they wait for rank 0 to look for another one
            _log.warning("damage.mark.failed step=%d url=%s cause=%s", info.step, self._run.url, exc)
