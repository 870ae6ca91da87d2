"""Which checkpoints did somebody pin? The records below `.ckptmgr/pins/`.

A pin names one checkpoint by its folder and nonce, so that it never passes to another of the same
step. Both stand in the key, as the tag does: a pin whose content is lost still protects. One with an end
says when that is, and how long it was to hold: two hosts' clocks may differ.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from datetime import UTC, datetime

from .errors import ConfigError, NotFoundError, StoreError
from .folder_names import guessed_step
from .manifest import CheckpointInfo, Pin
from .records import checked_tag, is_refused
from .store import Entry, Store
from .untrusted import FOLDER_NAME, MAX_RECORD_SIZE, moment, parse, whole

_FOLDER = ".ckptmgr/pins"
# A nonce has no "-": the last part can't be both a nonce and a tag.
_KEY = re.compile(
    rf"{_FOLDER}/(?P<name>{FOLDER_NAME})\.(?P<nonce>[0-9A-Za-z]+)"
    r"(?:\.tag-(?P<tag>[A-Za-z0-9_-]+))?\.json"
)

_log = logging.getLogger("ckptmgr.pins")


class Pins:
    """Reads and writes the pins of one root."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._told: set[str] = set()  # what was warned of already: listings are frequent

    def read(self) -> list[Pin]:
        """Every pin. One that can't be read holds for ever, with a warning."""
        return [pin for entry in self._store.list(_FOLDER) if (pin := self._read(entry.key)) is not None]

    def _read(self, key: str) -> Pin | None:
        match = _KEY.fullmatch(key)
        if match is None:
            self._tell(key, "its name is not a pin's; it keeps nothing, remove it")
            return None
        name, nonce, tag = match["name"], match["nonce"], match["tag"]
        try:
            body = parse(self._store.get(key, 0, MAX_RECORD_SIZE))
            expires = None if body["expires"] is None else moment(body["expires"])
            return Pin(name, nonce, whole(body["step"]), tag, expires)
        except NotFoundError:
            return None  # unpinned since the listing
        except StoreError as exc:
            if not is_refused(self._store, exc):
                raise
            cause: Exception = exc
        except (ValueError, KeyError, TypeError) as exc:
            cause = exc
        self._tell(key, f"it can't be read and keeps {name} until it is removed: {cause!r}")
        return Pin(name, nonce, guessed_step(name), tag)

    def _tell(self, key: str, what: str) -> None:
        if key not in self._told:
            self._told.add(key)
            _log.warning("pin.read.failed key=%s/%s %s", self._store.url, key, what)

    def holds(self, name: str, nonce: str | None, at: float | None) -> bool:
        """Whether a pin holds a checkpoint: by the clock of this host, or by that of the store, where it was `at`
        this time, in seconds since 1970, just now. Without a nonce, any of its folder."""
        for entry in self._store.list(_FOLDER):
            match = _KEY.fullmatch(entry.key)
            if match is None or match["name"] != name or nonce not in (None, match["nonce"]):
                continue
            pin = self._read(entry.key)
            if pin is not None and (pin.holds(datetime.now(UTC)) or self._is_young(entry, at)):
                return True
        return False

    def _is_young(self, entry: Entry, at: float | None) -> bool:
        """Whether a pin was put, by the store's clock, less long ago than it was to hold. Of one put later than `at`
        the store's clock says nothing: where a tombstone is a second name of the manifest it is as old as that."""
        if at is None or entry.modified is None:
            return False
        try:
            ttl_s = float(parse(self._store.get(entry.key, 0, MAX_RECORD_SIZE))["ttl_s"])
            return 0 <= at - entry.modified < ttl_s
        except (NotFoundError, ValueError, KeyError, TypeError, OverflowError):
            return False  # unpinned since, or of an earlier version

    def put(self, pin: Pin) -> None:
        body: dict[str, object] = {"step": pin.step, "expires": None, "ttl_s": None}
        if pin.expires is not None:
            ttl_s = (pin.expires - datetime.now(UTC)).total_seconds()
            body |= {"expires": pin.expires.isoformat(), "ttl_s": ttl_s}
        self._store.put(pin_key(pin.name, pin.nonce, pin.tag), json.dumps(body).encode())

    def remove(self, pins: Iterable[Pin]) -> None:
        self._store.delete([pin_key(pin.name, pin.nonce, pin.tag) for pin in pins])

    def forget(self, *gone: tuple[str, str | None]) -> None:
        """Remove the pins of checkpoints that are none any more, by folder and nonce; without a nonce,
        all of its folder."""
        if not gone:
            return
        matches = [match for entry in self._store.list(_FOLDER) if (match := _KEY.fullmatch(entry.key))]
        them = {*gone}
        keys = [match[0] for match in matches if them & {(match["name"], match["nonce"]), (match["name"], None)}]
        if keys:
            self._store.delete(keys)


def pin_key(name: str, nonce: str, tag: str | None = None) -> str:
    """The key of a checkpoint's pin."""
    return f"{_FOLDER}/{name}.{nonce}{'' if tag is None else f'.tag-{checked_tag(tag)}'}.json"


def check_free(tag: str, others: Iterable[CheckpointInfo], url: str) -> None:
    """Raises `ConfigError` when a tag is not usable, or one of the `others`, in the root at `url`, has it."""
    checked_tag(tag)
    for other in others:
        if tag in other.tags:
            raise ConfigError(
                f"tag {tag!r} is on step {other.step} ({url}/{other.name}) already; "
                "unpin or delete that one first, or use another tag"
            )
