"""How is one save made? From live objects to a committed checkpoint."""

from __future__ import annotations

import logging
import math
import operator
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from . import __version__
from .background import Pending, Worker
from .config import CheckpointConfig
from .coordinator import Coordinator
from .errors import AlreadyExistsError, ConfigError, FencedError, SaveFailedError
from .formats import open_format
from .manifest import CheckpointInfo, Manifest
from .run import Run
from .staging import stage
from .state import capture, non_finite
from .state.snapshot import Snapshot

_log = logging.getLogger("ckptmgr.save")

_RESERVED = {"step", "strict", "skip", "map_location", "rng"}


@dataclass(frozen=True, slots=True)
class Request:
    """What the caller said of one save."""

    step: int
    epoch: int | None
    metrics: Mapping[str, float]
    reason: str = ""
    tags: tuple[str, ...] = ()
    pin: bool = False
    overwrite: bool = False


class Saver:
    """Makes saves of one run, in the background when the config says so."""

    def __init__(self, run: Run, config: CheckpointConfig, ranks: Coordinator) -> None:
        self._run, self._config, self._ranks = run, config, ranks
        self._format = open_format(config.format, split_size_bytes=config.split_size)
        self._fingerprint = config.fingerprint()

    def start(self, objects: Mapping[str, Any], request: Request, worker: Worker, after: Callable[[], None]) -> Pending:
        """Capture and copy the state, then have the worker write it. Blocks until training may change
        the state again; without `background` until the checkpoint is durable. `after` is called when it has ended."""
        began = time.monotonic()
        snapshot = capture(objects, only=self._config.only)
        healthy = self._is_healthy(snapshot, request)
        if self._config.background:
            snapshot = stage(snapshot)
        about = Manifest(
            step=request.step,
            run=self._run.name or "",
            attempt=self._run.attempt,
            nonce="",  # the draft's, at commit
            time=datetime.now(UTC),
            format=self._format.name,
            files=(),
            epoch=request.epoch,
            metrics=request.metrics,
            parent=self._run.parent,
            world_size=self._ranks.world_size,
            tags=request.tags,
            healthy=healthy,
            versions={
                "ckptmgr": __version__,
                "torch": str(torch.__version__),
                "python": ".".join(map(str, sys.version_info[:3])),
            },
            config=self._fingerprint,
        )
        stall = time.monotonic() - began

        def save() -> CheckpointInfo:
            try:
                info = self._write(snapshot, about, request)
            except Exception as exc:
                # The caller hears of it at its next call; a script that makes none has this line.
                _log.error("save.failed step=%d url=%s cause=%s", request.step, self._run.url, exc)
                raise
            size = info.manifest.size if info.manifest else 0
            _log.info(
                "save.commit.done step=%d url=%s/%s bytes=%d stall_s=%.3f durable_s=%.3f reason=%s",
                info.step, self._run.url, info.name, size, stall, time.monotonic() - began, request.reason,
            )  # fmt: skip
            return info

        return worker.submit(request.step, self._run.url, save, after)

    def _is_healthy(self, snapshot: Snapshot, request: Request) -> bool:
        odd = [f"metric {name}" for name, value in request.metrics.items() if not math.isfinite(value)]
        if self._config.check_finite:
            odd += non_finite(snapshot)
        if odd:
            more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
            _log.warning("save.unhealthy step=%d not finite: %s%s", request.step, ", ".join(odd[:5]), more)
        return not odd

    def _write(self, snapshot: Snapshot, about: Manifest, request: Request) -> CheckpointInfo:
        repository = self._run.repository
        try:
            draft = repository.begin(request.step, request.epoch, about.run)
            try:
                self._format.write(snapshot, draft)
                info = draft.commit(about, self._config.verify.on_save, self._run.check, pin=request.pin)
            except BaseException:
                draft.abort()
                raise
        except (FencedError, AlreadyExistsError, ConfigError):
            raise
        except Exception as exc:
            raise SaveFailedError(
                f"step {request.step} was not saved to {self._run.url}: {exc}; the checkpoints before it are untouched"
            ) from exc
        self._run.committed(info, replaces=request.overwrite)
        return info


def as_floats(metrics: Mapping[str, Any] | None) -> Mapping[str, float]:
    """Metrics as plain numbers (0-d tensors and numpy scalars too). Raises `ConfigError` naming one that isn't."""
    values = {}
    for name, value in (metrics or {}).items():
        try:
            values[str(name)] = float(value.detach() if isinstance(value, torch.Tensor) else value)
        except (TypeError, ValueError, OverflowError, RuntimeError) as exc:
            raise ConfigError(f"metric {name!r} is {value!r:.100}, not a number: {exc}") from exc
    return values


def as_mapping(state: Mapping[str, Any] | Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """The state itself, from the callable if it is one. Raises `ConfigError` for anything else."""
    is_factory = callable(state) and not hasattr(state, "state_dict")
    objects = state() if is_factory and not isinstance(state, Mapping) else state
    if not isinstance(objects, Mapping) or not objects:
        raise ConfigError(
            f"state must be a mapping of entry names to objects, such as {{'model': model}}, or a callable that "
            f"returns one; got {type(objects).__name__}"
        )
    if taken := [name for name in objects if name in _RESERVED]:
        raise ConfigError(f"an entry can't be named {', '.join(taken)}: resume() takes that as an argument; rename it")
    return objects


def as_count(value: Any, name: str) -> int:
    """A step or an epoch. Raises `ConfigError` for what does not count completed ones: 1.5, -1, True."""
    try:
        count = operator.index(value)
    except TypeError:
        count = -1
    if isinstance(value, bool) or count < 0:
        raise ConfigError(f"{name}={value!r}: {name} counts completed {name}s, a whole number of at least 0")
    return count
