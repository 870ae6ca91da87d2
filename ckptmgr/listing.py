"""Which checkpoints were in a root at one moment? A listing, whose manifests are read as far as is asked.

The newest is found without reading all: from the highest step in a folder's name downwards, one that
the last writer wrote is newer than whatever lies below it, as every other there is of that attempt and
a lower step, or of an earlier attempt. Where the manifests read say something else, all are read.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache

from .errors import DamagedError, FormatVersionError, NotFoundError, StoreError
from .folder_names import NameTemplate, guessed_step
from .manifest import MANIFEST_NAME, MAX_MANIFEST_SIZE, CheckpointInfo, Manifest, Pin
from .records import Records, begin_of, each, is_no_file, is_refused
from .store import Store

_DATA = re.compile(r"(?:(?P<nonce>[0-9a-f]{16})/)?state\.json")  # which every format has
_OURS = re.compile(rb'\s*\{\s*"format_version"\s*:\s*\d+\s*,\s*"format"\s*:')  # as it begins
_LOOKS = 20  # at a root whose folders come and go

_log = logging.getLogger("ckptmgr.repository")


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
        self._named = cache(lambda: {name for name, _ in _asides(store)})
        self._folders, self._digits = folders, templates[0].steps(folders)
        for names in templates[1:] if "" in self._digits else ():
            others = names.steps(folders)
            self._digits = [step or other for step, other in zip(self._digits, others, strict=True)]
        # Places in the list of folders. Those whose names tell no step come first: they may hold anything. Texts of
        # one length sort as the numbers that they are, which takes longer to make of ten thousand.
        are_even = len(set(map(len, self._digits))) < 2
        places = sorted(range(len(folders)), key=self._digits.__getitem__ if are_even else self._step)
        start = self._digits.count("")
        self._unnamed, self._unread = places[:start], places[start:]
        self._read: list[CheckpointInfo] = []
        self._odd: dict[str, int] = {}  # the steps in names that tell another one than the manifest

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

    def is_past(self) -> bool:
        """Whether there were folders, and no checkpoint is in any of them."""
        count = 1
        while not self._read and (self._unnamed or self._unread):
            self._look_into(count)
            count *= 2
        return bool(self._folders) and not self._read

    def is_same(self, other: Listing) -> bool:
        """Whether the other one is of the same folders."""
        return [*self._folders] == [*other._folders]

    def _step(self, place: int) -> int:
        """The step in a folder's name, or -1."""
        return int(self._digits[place] or -1)

    def _certain(self) -> list[CheckpointInfo]:
        """Of those read the ones that are newer than all others, newest first."""
        if not self._unread:
            return self._ordered()
        last = self._last_attempt() or -1
        if self._odd or any(info.order[0] > last for info in self._read):
            return self.infos()
        # One that can't be read counts as of the attempt below it, which is known from here on upwards.
        below = self._step(self._unread[-1])
        sure = [info.step for info in self._read if info.step > below and info.manifest and info.order[0] == last]
        return [info for info in self._ordered() if sure and info.order[0] == last and info.step >= min(sure)]

    def _look_into(self, count: int) -> None:
        """Read those without a step in their names, and `count` more from the highest steps downwards."""
        start = max(0, len(self._unread) - count)
        places = self._unnamed + self._unread[start:]
        self._unnamed, self._unread = [], self._unread[:start]
        names = [self._folders[place] for place in places]
        infos = each(self._store, lambda name: read_checkpoint(self._store, name, self._templates), names)
        found = [*zip(places, names, infos, strict=True)]
        lost = self._lost([name for place, name, info in found if info is None and self._digits[place]])
        for place, name, info in found:
            if name in lost:
                info = CheckpointInfo(name, self._step(place), None, f"{MANIFEST_NAME} is missing")
            if info is not None:
                if self._step(place) not in (-1, info.step):
                    self._odd[info.name] = self._step(place)
                self._read.append(info)

    def _lost(self, names: Sequence[str]) -> set[str]:
        """Which of these folders hold the data of a checkpoint whose manifest nobody has taken away on purpose."""
        # There may be thousands that a rewind has archived: what a record names is not looked into.
        data = self._data([name for name in names if name not in self._named()]) if names else {}
        if not data:
            return set()
        asides = _asides(self._store)
        unexplained = {name for name, keys in data.items() if any((name, nonce) not in asides for nonce in keys)}
        # By a record left between two looks, what was looked at is no checkpoint yet, or on its way out.
        again = self._data([*unexplained])
        both = ((name, nonce, key) for name in again for nonce, key in again[name].items() if nonce in data[name])
        keys = [key for name, nonce, key in both if (name, nonce) not in asides]
        ours = each(self._store, self._is_ours, keys)
        return {key.partition("/")[0] for key, is_ours in zip(keys, ours, strict=True) if is_ours}

    def _data(self, names: Sequence[str]) -> dict[str, dict[str, str]]:
        """The keys of the data in folders without a manifest, by folder and nonce; of data without one it is empty."""
        found = zip(names, each(self._store, self._data_in, names), strict=True)
        return {name: keys for name, keys in found if keys}

    def _data_in(self, name: str) -> dict[str, str]:
        keys = {entry.key.removeprefix(f"{name}/"): entry.key for entry in self._store.list(name, recursive=True)}
        if MANIFEST_NAME in keys:
            return {}
        return {match["nonce"] or "": key for short, key in keys.items() if (match := _DATA.fullmatch(short))}

    def _is_ours(self, key: str) -> bool:
        """Whether what has the name of our data is that: other people have files of this name, too."""
        return _OURS.match(begin_of(self._store, key, 100) or b"") is not None

    def _honest(self, info: CheckpointInfo) -> CheckpointInfo:
        """The checkpoint, but without a manifest that is another's."""
        if info.manifest is None or info.name not in self._odd:
            return info
        others = (other for other in self._read if other.manifest and other.name not in self._odd)
        own = next((other for other in others if other.manifest and other.manifest.nonce == info.manifest.nonce), None)
        if own is None:
            return info
        return CheckpointInfo(info.name, self._odd[info.name], None, f"its {MANIFEST_NAME} is that of {own.name}")

    def _ordered(self) -> list[CheckpointInfo]:
        infos, attempt = [], 0
        honest = map(self._honest, self._read)
        for info in sorted(honest, key=lambda info: (info.step, info.manifest is None, info.name)):
            # One that can't be read counts as written by whoever wrote the step before it.
            attempt = info.manifest.attempt if info.manifest else attempt
            nonce = info.manifest.nonce if info.manifest else ""
            damaged = info.damaged or self._marks.get((info.name, nonce))
            # Whichever one it was: one that can't be read has no nonce to tell.
            held = tuple(pin for pin in self._pins if pin.name == info.name and (pin.nonce == nonce or not nonce))
            guess = attempt if info.manifest is None else 0
            infos.append(CheckpointInfo(info.name, info.step, info.manifest, damaged, held, guess))
        return sorted(infos, key=lambda info: info.order, reverse=True)


def current(look: Callable[[], Listing]) -> Listing:
    """What `look` answers; again when all that it names was deleted meanwhile, and others have come."""
    listing = look()
    for _ in range(_LOOKS):  # and no more: somebody else's folders may come and go for ever
        if not listing.is_past():
            break
        later = look()
        if later.is_same(listing) and later.is_past():  # the same folders may hold one by now
            break
        listing = later
    return listing


def read_checkpoint(store: Store, name: str, templates: Sequence[NameTemplate]) -> CheckpointInfo | None:
    """The checkpoint in a folder as its manifest tells, or None where there is none of ours."""
    # Someone else's manifest.json in someone else's folder is no checkpoint, and no obstacle either.
    step = next((step for names in templates if (step := names.step(name)) is not None), None)
    try:
        data = store.get(f"{name}/{MANIFEST_NAME}", 0, MAX_MANIFEST_SIZE + 1)
    except NotFoundError:
        return None  # a draft, or nothing of ours
    except StoreError as exc:
        if step is not None and is_no_file(store, exc):
            return CheckpointInfo(name, step, None, str(exc))
        if step is not None or not is_refused(store, exc):
            raise
        _log.debug("folder.skip.refused url=%s/%s cause=%s", store.url, name, exc)
        return None
    if step is None and b'"format_version"' in data and b'"nonce"' in data:
        step = guessed_step(name)  # ours, from when `name` was another
    try:
        manifest = _parsed(store, f"{name}/{MANIFEST_NAME}", data)
    except NotFoundError:
        return None
    except FormatVersionError as exc:
        if step is None:
            return None
        raise FormatVersionError(f"{store.url}/{name}: {exc}") from exc
    except DamagedError as exc:
        return None if step is None else CheckpointInfo(name, step, None, str(exc))
    return CheckpointInfo(name, manifest.step, manifest)


def _parsed(store: Store, key: str, data: bytes) -> Manifest:
    try:
        return Manifest.from_json(data)
    except DamagedError:
        if store.path is not None:
            raise
        # A network can garble what the store holds intact: look twice before calling it damage.
        return Manifest.from_json(store.get(key, 0, MAX_MANIFEST_SIZE + 1))


def is_committed(store: Store, name: str, nonce: str) -> bool:
    """Whether a save is a checkpoint. Raises `DamagedError` or `FormatVersionError` where its folder's manifest can't
    tell."""
    key = f"{name}/{MANIFEST_NAME}"
    try:
        if store.stat(key) is None:  # as most that are asked about
            return False
        return _parsed(store, key, store.get(key, 0, MAX_MANIFEST_SIZE + 1)).nonce == nonce
    except NotFoundError:
        return False


def _asides(store: Store) -> set[tuple[str, str]]:
    """What has no manifest for a good reason, by folder and nonce, and by folder alone."""
    records = Records(store)
    found = {(draft.name, draft.nonce) for draft in records.drafts()}
    found |= {(one.name, one.nonce) for kind in ("archive", "trash") for one in records.aside_keys(kind)}
    return {*found, *((name, "") for name, _ in found)}
