"""Which checkpoints were in a root at one moment? A listing, whose manifests are read as far as is asked.

The newest is found without reading all: from the highest step in a folder's name downwards, one that
the last writer wrote is newer than whatever lies below it, as every other there is of that attempt and
a lower step, or of an earlier attempt. Where the manifests read say something else, all are read.
"""

from __future__ import annotations

import logging
from bisect import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

from .errors import DamagedError, FormatVersionError, NotFoundError, StoreError
from .manifest import MANIFEST_NAME, CheckpointInfo, Manifest, NameTemplate, Pin, guessed_step
from .records import is_refused
from .store import Store

_AT_ONCE = 16  # objects looked into at a time in a remote store

_log = logging.getLogger("ckptmgr.repository")

_In = TypeVar("_In")
_Out = TypeVar("_Out")


class Listing:
    """The checkpoints in `folders`, with their pins and with the marks of damage, by folder and nonce.

    `last_attempt` answers the attempt of the last writer, above which no checkpoint has one, or 0 where
    nobody knows. Methods block and raise `StoreError`, and `FormatVersionError` when they come to a
    checkpoint that a newer ckptmgr wrote.
    """

    def __init__(
        self,
        store: Store,
        templates: Sequence[NameTemplate],
        folders: Sequence[str],
        pins: Iterable[Pin],
        marks: Mapping[tuple[str, str], str],
        last_attempt: Callable[[], int],
    ) -> None:
        self._store, self._templates = store, templates
        self._pins, self._marks = tuple(pins), marks
        self._last_attempt = cache(last_attempt)  # asked for only when it matters
        self._folders, self._steps = folders, templates[0].steps(folders)
        for names in templates[1:] if -1 in self._steps else ():
            others = names.steps(folders)
            self._steps = [other if step < 0 else step for step, other in zip(self._steps, others, strict=True)]
        # Places in the list of folders. Those whose names tell no step come first: they may hold anything.
        places = sorted(range(len(folders)), key=self._steps.__getitem__)
        start = bisect(places, -1, key=self._steps.__getitem__)
        self._unnamed, self._unread = places[:start], places[start:]
        self._read: list[CheckpointInfo] = []
        self._is_odd = False  # whether some name tells another step than the manifest

    def infos(self) -> list[CheckpointInfo]:
        """Every checkpoint, newest first."""
        self._look_into(len(self._unread))
        return self._ordered()

    def newest_first(self) -> Iterator[CheckpointInfo]:
        """The same, one after the other, with no more read than it takes to be sure of each."""
        told: set[str] = set()
        count = 0
        while True:
            self._look_into(count)
            is_all = not self._unread
            for info in self._certain():
                if info.name not in told:
                    told.add(info.name)
                    yield info
            if is_all:
                return
            count = 2 * count or 1

    def _certain(self) -> list[CheckpointInfo]:
        """Of those read the ones that are newer than all others, newest first."""
        if not self._unread:
            return self._ordered()
        last = self._last_attempt() or -1
        if self._is_odd or any(info.order[0] > last for info in self._read):
            return self.infos()
        # One that can't be read counts as of the attempt below it, which is known from here on upwards.
        below = self._steps[self._unread[-1]]
        sure = [info.step for info in self._read if info.step > below and info.manifest and info.order[0] == last]
        return [info for info in self._ordered() if sure and info.order[0] == last and info.step >= min(sure)]

    def _look_into(self, count: int) -> None:
        """Read those without a step in their names, and `count` more from the highest steps downwards."""
        start = max(0, len(self._unread) - count)
        places = self._unnamed + self._unread[start:]
        self._unnamed, self._unread = [], self._unread[:start]
        names = [self._folders[place] for place in places]
        infos = each(self._store, lambda name: read_checkpoint(self._store, name, self._templates), names)
        for place, info in zip(places, infos, strict=True):
            if info is not None:
                self._is_odd = self._is_odd or self._steps[place] not in (-1, info.step)
                self._read.append(info)

    def _ordered(self) -> list[CheckpointInfo]:
        infos, attempt = [], 0
        for info in sorted(self._read, key=lambda info: (info.step, info.manifest is None, info.name)):
            # One that can't be read counts as written by whoever wrote the step before it.
            attempt = info.manifest.attempt if info.manifest else attempt
            nonce = info.manifest.nonce if info.manifest else ""
            damaged = info.damaged or self._marks.get((info.name, nonce))
            # Whichever one it was: one that can't be read has no nonce to tell.
            held = tuple(pin for pin in self._pins if pin.name == info.name and (pin.nonce == nonce or not nonce))
            guess = attempt if info.manifest is None else 0
            infos.append(CheckpointInfo(info.name, info.step, info.manifest, damaged, held, guess))
        return sorted(infos, key=lambda info: info.order, reverse=True)


def read_checkpoint(store: Store, name: str, templates: Sequence[NameTemplate]) -> CheckpointInfo | None:
    """The checkpoint in a folder as its manifest tells, or None where there is none of ours."""
    # Someone else's manifest.json in someone else's folder is no checkpoint, and no obstacle either.
    step = next((step for names in templates if (step := names.step(name)) is not None), None)
    try:
        data = store.get(f"{name}/{MANIFEST_NAME}")
    except NotFoundError:
        return None  # a draft, or nothing of ours
    except StoreError as exc:
        if step is not None or not is_refused(store, exc):
            raise
        _log.debug("folder.skip.refused url=%s/%s cause=%s", store.url, name, exc)
        return None
    if step is None and b'"format_version"' in data and b'"nonce"' in data:
        step = guessed_step(name)  # ours, from when `name` was another
    try:
        manifest = Manifest.from_json(data)
    except FormatVersionError as exc:
        if step is None:
            return None
        raise FormatVersionError(f"{store.url}/{name}: {exc}") from exc
    except DamagedError as exc:
        return None if step is None else CheckpointInfo(name, step, None, str(exc))
    return CheckpointInfo(name, manifest.step, manifest)


def each(store: Store, look: Callable[[_In], _Out], things: Sequence[_In]) -> list[_Out]:
    """What `look` answers for each, in order; several at a time where each takes a request."""
    if store.path is not None or len(things) < 2:
        return [look(thing) for thing in things]
    with ThreadPoolExecutor(_AT_ONCE, "ckptmgr-list") as pool:
        return list(pool.map(look, things))
