"""Which files of a save lie in the checkpoint before it already? Those are not written again.

A file whose bytes are those of a file there, by digest, becomes a hard link to it, or a copy that the
object store makes by itself. Each checkpoint is complete as before, and deleting one harms no other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace

import xxhash

from .draft import Draft, DraftFile
from .errors import CheckpointError, DamagedError
from .manifest import CheckpointInfo, FileEntry
from .memory import buffer
from .source import Source
from .store import Store
from .transfer import Body, digests

_SMALLEST = 1 << 20  # bytes; a smaller file is written as fast as it is compared
_SPOTS, _SPOT = 64, 4096  # of each file, looked at before all of it is
_TRUSTED_S = 3600.0  # a file is read once more before it is shared, when that was last done longer ago

_log = logging.getLogger("ckptmgr.save")


@dataclass(slots=True)
class _Known:
    """A file of the checkpoint before. `sample` says something of its bytes, when known; `checked` is
    when all of them were last seen to be sound."""

    info: CheckpointInfo
    entry: FileEntry
    sample: bytes | None
    checked: float | None


class Sharing:
    """What the next save of a run may share with the last checkpoint. Used from one thread at a time."""

    def __init__(
        self,
        store: Store,
        on_damage: Callable[[CheckpointInfo, str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._on_damage, self._clock = store, on_damage, clock
        self._known: list[_Known] = []
        # Of the files of the save in flight: a sample, and when the bytes in the store were last seen to be sound.
        self._looked_at: dict[str, tuple[bytes, float]] = {}
        self._is_possible = True  # as long as the store does not say otherwise

    def found(self, info: CheckpointInfo) -> None:
        """A checkpoint is the last one now, whoever wrote it: its files are read before they are shared."""
        self._looked_at = {}
        self.offer(info)

    def offer(self, info: CheckpointInfo) -> None:
        """The save that went through the last `sink` is the last checkpoint now."""
        self._known = []
        for file in info.manifest.files if info.manifest else ():
            if file.size >= _SMALLEST:
                name = file.name.removeprefix(f"{info.manifest.nonce}/") if info.manifest else file.name
                sample, checked = self._looked_at.get(name, (None, None))
                self._known.append(_Known(info, file, sample, checked))
        self._looked_at = {}

    def sink(self, draft: Draft, damaged: Callable[[], Collection[tuple[str, str]]] = tuple) -> SharingSink:
        """The draft, but that files which are there already are not written. `damaged` gives the folders and
        nonces of checkpoints that are known to be so: nothing is shared with those."""
        self._looked_at = {}
        if self._known:
            odd = damaged()
            self._known = [
                k for k in self._known if k.info.manifest and (k.info.name, k.info.manifest.nonce) not in odd
            ]
        return SharingSink(draft, self)

    def find(self, name: str, body: Body) -> tuple[str, FileEntry] | None:
        """The key of a sound file with the very bytes of the body, and its entry. May read the whole body,
        and that file."""
        if body.size < _SMALLEST or not self._is_possible:
            return None
        sample = _sample(body)
        self._looked_at[name] = sample, self._clock()
        likely = [one for one in self._known if one.entry.size == body.size and one.sample in (None, sample)]
        if not likely:
            return None
        digest, _ = digests(body)
        for one in likely:
            if one.entry.digest == digest and (checked := self._sound_since(one)) is not None:
                self._looked_at[name] = sample, checked
                return f"{one.info.name}/{one.entry.name}", replace(one.entry, name=name, shared=True)
        return None

    def refused(self) -> None:
        """The store can't share files."""
        self._is_possible = False

    def _sound_since(self, known: _Known) -> float | None:
        """When all bytes of the file were last seen to be sound, now if need be; None for a damaged one."""
        now = self._clock()
        if known.checked is None or now - known.checked > _TRUSTED_S:
            assert known.info.manifest is not None
            try:
                Source(self._store, known.info.name, known.info.manifest).check(known.entry)
            except DamagedError as exc:
                _log.warning("save.share.damaged step=%d file=%s cause=%s", known.info.step, known.entry.name, exc)
                self._known.remove(known)
                self._on_damage(known.info, str(exc))
                return None
            known.checked = now
        return known.checked


class SharingSink:
    """A `formats.FileSink` over a draft."""

    def __init__(self, draft: Draft, sharing: Sharing) -> None:
        self._draft, self._sharing = draft, sharing

    def create(self, name: str) -> AbstractContextManager[DraftFile]:
        return self._draft.create(name)

    def write(self, bodies: Mapping[str, Body]) -> None:
        self._draft.write({name: body for name, body in bodies.items() if not self._is_shared(name, body)})

    def _is_shared(self, name: str, body: Body) -> bool:
        try:
            found = self._sharing.find(name, body)
            if found is None or self._draft.link(name, *found):
                return found is not None
        except CheckpointError as exc:  # such as: the other checkpoint was deleted meanwhile, or can't be read
            _log.info("save.share.failed file=%s cause=%s (it is written)", name, exc)
            return False
        _log.info("save.share.refused file=%s: the store can't share files; all are written", name)
        self._sharing.refused()
        return False


def _sample(body: Body) -> bytes:
    """A digest of a few spots: different for different bytes nearly always, the same for the same ones."""
    scratch, sample = buffer(_SPOT), xxhash.xxh3_128()
    for spot in range(_SPOTS):
        begin = spot * (body.size - _SPOT) // (_SPOTS - 1)
        sample.update(body.part(begin, begin + _SPOT, scratch))
    return sample.digest()
