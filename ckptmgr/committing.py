"""How do written files become a checkpoint of this run? A draft, what the manifest says, what comes after."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial

import torch

from . import __version__
from .config import CheckpointConfig
from .draft import Draft
from .errors import (
    AlreadyExistsError,
    ConfigError,
    CoordinationError,
    FencedError,
    SaveFailedError,
)
from .formats import FileSink
from .manifest import CheckpointInfo, Manifest
from .repository import Repository
from .request import Request
from .run import Run
from .sharing import Sharing

_log = logging.getLogger("ckptmgr.save")


class Committer:
    """Commits the saves of one run. What writes to the run is called on rank 0."""

    def __init__(self, run: Run, config: CheckpointConfig) -> None:
        self._run, self._verify, self._fingerprint = run, config.verify.on_save, config.fingerprint()
        share = config.share_unchanged
        self._sharing = Sharing(run.repository.store, partial(_mark_damaged, run.repository)) if share else None

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
            time=datetime.now(UTC),
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
        return self._run.repository.begin(request.step, request.epoch, self._run.name or "")

    def join(self, name: str, nonce: str) -> Draft:
        """On other ranks: the draft that rank 0 began."""
        return self._run.repository.join(name, nonce)

    def sink(self, draft: Draft) -> FileSink:
        """The draft, but that what lies in the checkpoint before is not written again."""
        repository = self._run.repository
        return draft if self._sharing is None else self._sharing.sink(draft, lambda: repository.records()[1])

    def commit(self, draft: Draft, about: Manifest, request: Request) -> CheckpointInfo:
        """Make the draft a checkpoint."""
        return draft.commit(about, self._verify, self._run.check, pin=request.pin)

    def committed(self, info: CheckpointInfo, request: Request) -> None:
        """After a commit, in its order: what may be shared next, the pointer, the keep rules."""
        if self._sharing is not None:
            self._sharing.offer(info)
        self._run.committed(info, replaces=request.overwrite)

    @contextmanager
    def failing(self, request: Request, draft: Draft | None = None) -> Iterator[None]:
        """Abort the draft when the block raises, and say which save failed. Where the ranks have lost each other
        one may still be writing to it: a later sweep takes it."""
        try:
            yield
        except BaseException as exc:
            if draft is not None and not isinstance(exc, CoordinationError):
                draft.abort()
            if isinstance(exc, (FencedError, AlreadyExistsError, ConfigError, CoordinationError, SaveFailedError)):
                raise
            if not isinstance(exc, Exception):
                raise
            raise SaveFailedError(
                f"step {request.step} was not saved to {self._run.url}: {exc}; the checkpoints before it are untouched"
            ) from exc


def _mark_damaged(repository: Repository, info: CheckpointInfo, reason: str) -> None:
    if repository.is_there(info):  # what was deleted meanwhile is not damaged
        repository.mark_damaged(info, reason)
