"""How is one save made? From live objects to a committed checkpoint."""

from __future__ import annotations

import logging
import math
import operator
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import torch

from . import __version__
from .arena import Arena, Staged, staged_size
from .background import Pending, Worker
from .config import CheckpointConfig
from .coordinator import Coordinator
from .errors import AlreadyExistsError, ConfigError, FencedError, SaveFailedError
from .formats import Plan, open_format
from .manifest import CheckpointInfo, Manifest
from .repository import Repository
from .run import Run
from .sharing import Sharing
from .staging import Held, Live
from .state import Recorder, non_finite
from .state.snapshot import FlatSnapshot

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
        self._recorder, self._arena = Recorder(), Arena(config.max_staging)
        self._sharing = (
            Sharing(run.repository.store, partial(_mark_damaged, run.repository)) if config.share_unchanged else None
        )
        self._is_told = False  # that the state does not fit into memory a second time
        self._fingerprint = config.fingerprint()

    def start(self, objects: Mapping[str, Any], request: Request, worker: Worker, after: Callable[[], None]) -> Pending:
        """Capture and copy the state, then have the worker write it. Blocks until training may change
        the state again; until the checkpoint is durable without `background`, or when the copy does not fit
        into memory. `after` is called when it has ended."""
        began = time.monotonic()
        flat = self._recorder.capture(objects, only=self._config.only)
        healthy = self._is_healthy(flat, request)
        plan = self._format.plan(flat)
        copy = self._copy(plan, flat)
        held: Held = copy or Live(plan.regions, flat)
        if copy is not None:
            flat = replace(flat, tensors=())  # the copy is what is written: nothing holds on to what training drops
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
            nonlocal plan, flat, held
            try:
                info = self._write(plan, flat, held, about, request)
            except Exception as exc:
                # The caller hears of it at its next call; a script that makes none has this line.
                _log.error("save.failed step=%d url=%s cause=%s", request.step, self._run.url, exc)
                _forget_state(exc)
                raise
            finally:
                del plan, flat, held  # whoever holds the error holds this frame, but not the state
            size = info.manifest.size if info.manifest else 0
            _log.info(
                "save.commit.done step=%d url=%s/%s bytes=%d stall_s=%.3f durable_s=%.3f reason=%s",
                info.step, self._run.url, info.name, size, stall, time.monotonic() - began, request.reason,
            )  # fmt: skip
            return info

        return worker.submit(request.step, self._run.url, save, after, in_background=copy is not None)

    def prepare(self, objects: Mapping[str, Any]) -> None:
        """Plan the files of a state like this one, and make the memory for its copy. Blocks."""
        plan = self._format.plan(self._recorder.capture(objects, only=self._config.only))
        self.make_room(staged_size(plan.regions)).result()

    def make_room(self, size: int) -> Future[None]:
        """Make the memory for a copy of `size` bytes, in the background, where it is going to be used."""
        wanted = size if self._config.background and self._arena.has_room(size) else 0
        try:
            return self._arena.prepare(wanted)
        except MemoryError:  # the first save tries again, and tells of it
            return self._arena.prepare(0)

    def goes_on_from(self, info: CheckpointInfo) -> None:
        """The next save may share files with this checkpoint."""
        if self._sharing is not None:
            self._sharing.found(info)

    def close(self) -> None:
        """Give the memory back. No save may be in flight."""
        self._arena.release()

    def _copy(self, plan: Plan, flat: FlatSnapshot) -> Staged | None:
        """The tensors copied into the arena; None when they are to be written from where they are."""
        if not self._config.background:
            return None
        size = staged_size(plan.regions)
        if self._arena.has_room(size):
            with suppress(MemoryError):
                return self._arena.hold(plan.regions, flat)
        if not self._is_told:
            self._is_told = True
            limit = self._config.max_staging
            why = "more than is free" if limit is None else f"more than is free or than max_staging, {limit:,}"
            _log.warning(
                "save.synchronous: training waits for the whole save, as a copy of the state takes %s bytes, %s",
                f"{size:,}", why,
            )  # fmt: skip
        return None

    def _is_healthy(self, flat: FlatSnapshot, request: Request) -> bool:
        odd = [f"metric {name}" for name, value in request.metrics.items() if not math.isfinite(value)]
        if self._config.check_finite:
            odd += non_finite(flat)
        if odd:
            more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
            _log.warning("save.unhealthy step=%d not finite: %s%s", request.step, ", ".join(odd[:5]), more)
        return not odd

    def _write(self, plan: Plan, flat: FlatSnapshot, held: Held, about: Manifest, request: Request) -> CheckpointInfo:
        repository = self._run.repository
        try:
            draft = repository.begin(request.step, request.epoch, about.run)
            try:
                sharing = self._sharing
                sink = draft if sharing is None else sharing.sink(draft, lambda: repository.records()[1])
                plan.write(flat, held, sink)
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
        if self._sharing is not None:
            self._sharing.offer(info)
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


def _mark_damaged(repository: Repository, info: CheckpointInfo, reason: str) -> None:
    if repository.is_there(info):  # what was deleted meanwhile is not damaged
        repository.mark_damaged(info, reason)


def _forget_state(error: BaseException | None) -> None:
    """Take an error's way off it: its frames, and those that called them, hold the state for as long as
    anyone holds the error."""
    _log.debug("save.failed.traceback", exc_info=error)
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def expected_bytes(objects: Mapping[str, Any]) -> int:
    """About how many bytes the tensors of modules and optimizers will have once training has begun."""
    total = 0
    for value in objects.values():
        if isinstance(value, torch.nn.Module):
            total += sum(tensor.nbytes for tensor in (*value.parameters(), *value.buffers()) if not _is_lazy(tensor))
        elif isinstance(value, torch.optim.Optimizer):
            for group in value.param_groups:
                # Adam and its kin keep two or three numbers per parameter, momentum one.
                count = 2 + bool(group.get("amsgrad")) if "betas" in group else int(bool(group.get("momentum")))
                total += count * sum(p.nbytes for p in group["params"] if p.requires_grad and not _is_lazy(p))
    return total + total // 128 + (1 << 20) if total else 0  # with headers, step counts and page ends


def _is_lazy(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or torch.nn.parameter.is_lazy(tensor)
