"""How do written files become a checkpoint of this run? A draft, what the manifest says, what comes after."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from . import __version__
from .config import CheckpointConfig
from .coordinator import Coordinator
from .draft import Draft
from .errors import (
    AlreadyExistsError,
    CheckpointError,
    ConfigError,
    CoordinationError,
    FencedError,
    SaveFailedError,
    StoreFullError,
)
from .formats import FileSink
from .manifest import CheckpointInfo, Manifest
from .repository import Repository
from .request import Request
from .room import Shortage
from .run import Run
from .scrub import Scrubber
from .sharing import Sharing
from .store.spares import make_space

_log = logging.getLogger("ckptmgr.save")


class Committer:
    """Commits the saves of one run. What writes to the run is called on rank 0."""

    def __init__(self, run: Run, config: CheckpointConfig) -> None:
        self._run, self._verify, self._fingerprint = run, config.verify.on_save, config.fingerprint()
        share = config.share_unchanged
        self._sharing = Sharing(run.repository.store, partial(_mark_damaged, run.repository)) if share else None
        self._scrubber = Scrubber(run.repository) if config.verify.scrub else None
        self._on_full = config.on_full
        self._draft: Draft | None = None  # the last one that was begun

    def goes_on_from(self, info: CheckpointInfo) -> None:
        """The next save may share files with this checkpoint."""
        if self._sharing is not None:
            self._sharing.found(info)

    def manifest(self, request: Request, format_name: str, world_size: int, odd: Sequence[str]) -> Manifest:
        """What the manifest will say, but for the files and what names the draft. `odd`: what is not finite."""
        odd = [*(f"metric {name}" for name, value in request.metrics.items() if not math.isfinite(value)), *odd]
        if odd:
            more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
            _log.warning("save.unhealthy step=%d not finite: %s%s", request.step, ", ".join(odd[:5]), more)
        return Manifest(
            step=request.step,
            run=self._run.name or "",
            attempt=self._run.attempt,
            nonce="",  # the draft's, at commit
            time=self._run.clock.stamp(request.step),
            format=format_name,
            files=(),
            epoch=request.epoch,
            metrics=request.metrics,
            parent=self._run.parent,
            world_size=world_size,
            tags=request.tags,
            healthy=not odd,
            versions={
                "ckptmgr": __version__,
                "torch": str(torch.__version__),
                "python": ".".join(map(str, sys.version_info[:3])),
            },
            config=self._fingerprint,
        )

    def begin(self, request: Request) -> Draft:
        """A draft for the save."""
        self.rest()
        self._draft = None
        self._draft = self._run.repository.begin(request.step, request.epoch, self._run.name or "")
        return self._draft

    def join(self, name: str, nonce: str) -> Draft:
        """On other ranks: the draft that rank 0 began."""
        return self._run.repository.join(name, nonce)

    def sink(self, draft: Draft) -> FileSink:
        """The draft, but that what lies in the checkpoint before is not written again."""
        repository = self._run.repository
        return draft if self._sharing is None else self._sharing.sink(draft, lambda: repository.records()[1])

    def commit(self, draft: Draft, about: Manifest, request: Request) -> CheckpointInfo:
        """Make the draft a checkpoint. Raises `FencedError` also when another writer took over while it became one."""
        repository = self._run.repository
        point = partial(repository.pointer.begin, draft.name)
        try:
            info = draft.commit(about, self._verify, self._run.check, pin=request.pin, beside=point)
            self._run.check_quietly()  # it is there, whatever the store says now
        except BaseException:
            repository.pointer.forget()
            raise
        return info

    def committed(self, info: CheckpointInfo, request: Request) -> None:
        """After a commit, in its order: what may be shared next, the pointer, the keep rules, another one read back."""
        if self._sharing is not None:
            self._sharing.offer(info)
        self._run.committed(info, replaces=request.overwrite)
        if self._scrubber is not None:
            try:
                self._scrubber.start([other for other in self._run.known() if other.name != info.name])
            except CheckpointError as exc:
                _log.warning("scrub.failed url=%s cause=%s", self._run.url, exc)

    def hurry(self) -> None:
        """A save is on its way: nothing is read back beside it. Does not block."""
        if self._scrubber is not None:
            self._scrubber.give_way()

    def rest(self) -> None:
        """The same, and from the return on: else what is deleted while it is read could be taken for damage. Blocks."""
        if self._scrubber is not None:
            self._scrubber.stop()

    @contextmanager
    def aborting(self, draft: Draft | None) -> Iterator[None]:
        """Abort the draft when the block raises. Where the ranks have lost each other one may still be writing to
        it: a later sweep takes it."""
        try:
            yield
        except BaseException as exc:
            if draft is not None and not isinstance(exc, CoordinationError):
                draft.abort()
            raise

    @contextmanager
    def failing(self, request: Request) -> Iterator[None]:
        """Say which save failed when the block raises."""
        try:
            yield
        except (FencedError, CoordinationError):
            raise
        except (AlreadyExistsError, ConfigError, SaveFailedError):
            self._run.check_quietly()
            raise
        except Exception as exc:
            self._run.check_quietly()
            is_full = isinstance(exc, StoreFullError) and self._on_full == "raise"
            way = ", or set on_full to prune or skip" if is_full else ""
            raise SaveFailedError(
                f"step {request.step} was not saved to {self._run.url}: {exc}{way}; the checkpoints before it are "
                "untouched"
            ) from exc

    def in_room(self, request: Request, ranks: Coordinator, attempt: Callable[[], CheckpointInfo]) -> CheckpointInfo:
        """What `attempt` answers. When it finds no room, and the config says `on_full: prune`, checkpoints that can
        be spared are deleted and it is called again, as long as there are some. Every rank calls it. Blocks."""
        with self.failing(request):
            shortage = Shortage(self._run.repository.store)
            make_room = partial(self._make_room, shortage)
            while True:
                try:
                    return attempt()
                except StoreFullError as exc:
                    if self._on_full != "prune":
                        make_space()  # what this save could not take over is there for the next
                        raise
                    shortage.met(exc, self._draft.needed if self._draft else 0)
                ranks.patient.first(f"room for step {request.step}", make_room)

    def _make_room(self, shortage: Shortage) -> None:
        """Delete checkpoints until there is room. Raises `StoreFullError` when there won't be any."""
        left, spare = self._run.known(), self._run.spare()
        if shortage.is_over(left):
            return
        if shortage.is_hopeless(spare, left):
            raise shortage.error()
        for info in spare:
            if not self._run.drop(info):
                continue  # pinned meanwhile
            _log.warning(
                "save.full.drop step=%d url=%s/%s bytes=%d (on_full: prune) cause=%s",
                info.step, self._run.url, info.name, info.manifest.size if info.manifest else 0, shortage.cause,
            )  # fmt: skip
            left = [other for other in left if other.name != info.name]
            shortage.gone.append(info)
            if shortage.is_over(left):
                return
        if not shortage.gone:
            raise shortage.error()


def _mark_damaged(repository: Repository, info: CheckpointInfo, reason: str) -> None:
    if repository.is_there(info):  # what was deleted meanwhile is not damaged
        repository.mark_damaged(info, reason)
