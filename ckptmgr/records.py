"""What is written beside the checkpoints, never into them? The records below `.ckptmgr/`.

`damaged/` remembers what failed to load, `verified.json` what was read back and when, `archive/` holds the
manifests of a branch that was rewound, `trash/` those of checkpoints whose data is being deleted. Pins
(`pins`), drafts (`draft`) and the writer's lock (`lock`) live there too. One record that can't be read
stops nothing.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple, TypeVar

from .errors import (
    AlreadyExistsError,
    ConfigError,
    DamagedError,
    FormatVersionError,
    NotFoundError,
    StoreError,
    StoreFullError,
)
from .folder_names import MAX_LENGTH
from .manifest import MANIFEST_NAME, MAX_MANIFEST_SIZE, Manifest
from .store import DRAFTS, Entry, Store
from .untrusted import FOLDER_NAME, MAX_RECORD_SIZE, parse

FOLDER = ".ckptmgr"
_VERIFIED = f"{FOLDER}/verified.json"
_NAME = re.compile(FOLDER_NAME)
# A nonce has no "-": the last part can't be both a nonce and an attempt.
_BY = re.compile(r"\.by-([0-9]{1,18})\.json$")
_ASIDE = re.compile(rf"(?P<name>{FOLDER_NAME})\.(?P<nonce>[0-9A-Za-z]+)(?:{_BY.pattern}|\.json)")
_DRAFT = re.compile(rf"(?P<name>{FOLDER_NAME})\.(?P<nonce>[0-9a-f]{{16}})(?:\.(?P<note>fenced|closed))?")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
RESERVED_TAGS = ("latest", "best")
# What `LocalStore` says of a folder, a link or a socket in a file's place.
_NO_FILE = {errno.EISDIR, errno.ENOTDIR, errno.EINVAL, errno.ELOOP, errno.ENXIO}
_REFUSED = {errno.EACCES, errno.EPERM, *_NO_FILE}
_AT_ONCE = 16  # objects looked into at a time in a remote store

_log = logging.getLogger("ckptmgr.records")

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@dataclass(frozen=True, slots=True)
class Aside:
    """A checkpoint's manifest under another name: it is about to go, or is none any more and its data still there.
    `attempt` is that of the writer who put it there; 0 where its key does not say."""

    key: str
    name: str
    manifest: Manifest
    attempt: int = 0


class AsideKey(NamedTuple):
    """What the key of one says; nothing was read."""

    key: str
    name: str
    nonce: str
    attempt: int


class DraftKey(NamedTuple):
    """A draft, where `note` is empty, or what is noted for good: that one was `fenced`, removed while somebody may
    still have been writing to it, or that a folder is `closed`, as somebody may still delete from it."""

    entry: Entry
    name: str
    nonce: str
    note: str


class Records:
    """Reads and writes the records of one root."""

    def __init__(self, store: Store) -> None:
        self._store = store

    # Damage

    def damaged(self) -> dict[tuple[str, str], str]:
        """What is known to be damaged, by folder and nonce, with the reason."""
        entries = self._store.list(f"{FOLDER}/damaged")
        marks = {}
        for entry, reason in zip(entries, each(self._store, self._reason, entries), strict=True):
            if reason is not None:
                name, _, nonce = entry.name.removesuffix(".json").rpartition(".")
                marks[name, nonce] = reason
        return marks

    def _reason(self, mark: Entry) -> str | None:
        try:
            return str(parse(self._store.get(mark.key, 0, MAX_RECORD_SIZE))["reason"])
        except NotFoundError:
            return None
        except StoreError as exc:
            if not is_refused(self._store, exc):
                raise
        except (ValueError, KeyError, TypeError):
            pass
        return "marked as damaged"

    def mark_damaged(self, name: str, nonce: str, reason: str, now: datetime) -> None:
        body = {"reason": reason, "time": now.isoformat()}
        self._store.put(f"{FOLDER}/damaged/{name}.{nonce}.json", json.dumps(body).encode())

    def unmark_damaged(self, name: str, nonce: str) -> None:
        self._store.delete([f"{FOLDER}/damaged/{name}.{nonce}.json"])

    # Soundness

    def verified(self) -> dict[tuple[str, str], datetime]:
        """When all bytes of a checkpoint were last seen to be sound, by folder and nonce. Of a record that can't be
        read nothing is known."""
        try:
            times = parse(self._store.get(_VERIFIED, 0, MAX_MANIFEST_SIZE))
            found = {}
            for key, text in times.items():
                name, _, nonce = key.rpartition(".")
                found[name, nonce] = datetime.fromisoformat(text).astimezone(UTC)
        except NotFoundError:
            return {}
        except StoreError as exc:
            if not is_refused(self._store, exc):
                raise
            return {}
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            return {}
        return found

    def put_verified(self, times: Mapping[tuple[str, str], datetime]) -> None:
        body = {f"{name}.{nonce}": when.isoformat() for (name, nonce), when in times.items()}
        self._store.put(_VERIFIED, json.dumps(body, indent=1).encode())

    def forget(self, name: str, nonce: str, *keys: str) -> None:
        """Remove what is recorded of a checkpoint whose data is gone; of it there are these `keys` besides."""
        self._store.delete([f"{FOLDER}/damaged/{name}.{nonce}.json", *keys])

    # Manifests put aside

    def aside_key(self, kind: str, name: str, nonce: str, attempt: int) -> str:
        """Where a writer puts a manifest: each has a place of its own, to take away again what it put."""
        return f"{FOLDER}/{kind}/{name}.{nonce}{f'.by-{attempt}' if attempt else ''}.json"

    def put_aside(self, kind: str, name: str, manifest: Manifest, attempt: int = 0) -> Aside:
        """Keep a manifest under `archive` or `trash`; the checkpoint's own is still there."""
        key = self.aside_key(kind, name, manifest.nonce, attempt)
        try:
            self._store.put(key, manifest.to_json())
        except StoreFullError:
            # What is to make room needs some itself, but for a second name of a file that is there.
            is_linked = False
            with suppress(AlreadyExistsError):
                is_linked = self._store.copy(f"{name}/{MANIFEST_NAME}", key)
            if not is_linked:
                raise
        return Aside(key, name, manifest, attempt)

    def is_going(self, name: str, nonce: str) -> bool:
        """Whether a checkpoint is about to be deleted, or its deletion was interrupted."""
        return any((one.name, one.nonce) == (name, nonce) for one in self.aside_keys("trash"))

    def going_since(self, name: str, nonce: str, attempt: int) -> float | None:
        """When a writer recorded that, by the store's clock; None where nobody says."""
        entry = self._store.stat(self.aside_key("trash", name, nonce, attempt))
        return None if entry is None else entry.modified

    def asides(self, kind: str) -> list[Aside]:
        """What was put aside. What can't be read is left where it is, with a warning."""
        found = (self.read_aside(entry.key) for entry in self._store.list(f"{FOLDER}/{kind}"))
        return [aside for aside in found if aside is not None]

    def aside_keys(self, kind: str) -> list[AsideKey]:
        """The same, without a look into it. There may be thousands under `archive`."""
        found = ((_ASIDE.fullmatch(entry.name), entry.key) for entry in self._store.list(f"{FOLDER}/{kind}"))
        return [AsideKey(key, m["name"], m["nonce"], int(m[3] or 0)) for m, key in found if m]

    def read_aside(self, key: str) -> Aside | None:
        """One of them; None where it is gone, or can't be read."""
        own = key.split("/", 2)[-1]
        try:
            manifest = Manifest.from_json(self._store.get(key, 0, MAX_MANIFEST_SIZE + 1))
            by = _BY.search(own)
            rest = own[: by.start()] if by else own.removesuffix(".json")
            name = rest.removesuffix(f".{manifest.nonce}")
            if name == rest:
                raise DamagedError(f"its manifest has another nonce, {manifest.nonce}")
            if not _NAME.fullmatch(name):  # what is named here is going to be deleted
                raise DamagedError(f"it names the folder {name!r:.200}, which is none of a checkpoint")
            return Aside(key, name, manifest, int(by[1]) if by else 0)
        except NotFoundError:
            return None
        except StoreError as exc:
            if not is_refused(self._store, exc):
                raise
            cause: Exception = exc
        except (DamagedError, FormatVersionError) as exc:
            cause = exc
        _log.warning("record.read.failed key=%s/%s cause=%s (left as it is)", self._store.url, key, cause)
        return None

    # Drafts

    def drafts(self) -> list[DraftKey]:
        """What is recorded of saves that are no checkpoints yet, and of those that must never be one."""
        found = ((_DRAFT.fullmatch(entry.name), entry) for entry in self._store.list(DRAFTS))
        return [DraftKey(entry, m["name"], m["nonce"], m["note"] or "") for m, entry in found if m]


def checked_tag(tag: str) -> str:
    """A tag that can stand in a file name and is not mistaken for a step or a pointer."""
    if not _TAG.fullmatch(tag) or tag.isdecimal() or tag in RESERVED_TAGS:
        raise ConfigError(
            f"tag {tag!r} is not usable: letters, digits, _ and -, not only digits, none of {', '.join(RESERVED_TAGS)}"
        )
    if len(tag) > MAX_LENGTH:
        raise ConfigError(f"tag {tag!r:.60} has {len(tag)} characters, more than {MAX_LENGTH}: use a shorter one")
    return tag


def each(store: Store, look: Callable[[_In], _Out], things: Sequence[_In]) -> list[_Out]:
    """What `look` answers for each, in order; several at a time where each takes a request."""
    if store.path is not None or len(things) < 2:
        return [look(thing) for thing in things]
    with ThreadPoolExecutor(_AT_ONCE, "ckptmgr-records") as pool:
        return list(pool.map(look, things))


def begin_of(store: Store, key: str, count: int) -> bytes | None:
    """The first bytes of an object that may be anybody's, or None where none is, or this machine refuses it."""
    try:
        return store.get(key, 0, count)
    except NotFoundError:
        return None
    except StoreError as exc:
        if not is_refused(store, exc):
            raise
        return None


def is_refused(store: Store, error: StoreError) -> bool:
    """Whether this machine refuses one file for good. A network's error never says that."""
    return store.path is not None and error.errno in _REFUSED


def is_no_file(store: Store, error: StoreError) -> bool:
    """Whether something else is in a file's place, such as a folder."""
    return store.path is not None and error.errno in _NO_FILE


def new_nonce() -> str:
    return secrets.token_hex(8)
