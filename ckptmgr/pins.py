"""Which checkpoints did somebody pin? The records below `.ckptmgr/pins/`.

A pin names one checkpoint by its folder and nonce, so that it never passes to another of the same
step. Both stand in the key, as the tag does: a pin whose content is lost still protects. One with an end
says when that is, and how long it was to hold: two hosts' clocks may differ. So one that has ended gives up its
tag at once, and is removed a day later, by the clock of the writer and by that of the store.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from .errors import ConfigError, NotFoundError, StoreError
from .folder_names import guessed_step
from .manifest import CheckpointInfo, Pin
from .records import checked_tag, each, is_refused
from .store import Entry, Store
from .untrusted import FOLDER_NAME, MAX_RECORD_SIZE, moment, parse, whole

_FOLDER = ".ckptmgr/pins"
# A nonce has no "-": the last part can't be both a nonce and a tag.
_KEY = re.compile(
    rf"{_FOLDER}/(?P<name>{FOLDER_NAME})\.(?P<nonce>[0-9A-Za-z]+)"
    r"(?:\.tag-(?P<tag>[A-Za-z0-9_-]+))?\.json"
)
_LONGEST = 255  # bytes in a file's name
_READERS_TAG = 16  # characters of the longest tag that a reader gives; it reads what has a longer name, too
_SLACK = timedelta(days=1)  # between a pin's end and its removal

_log = logging.getLogger("ckptmgr.pins")


class _Found(NamedTuple):
    """A pin as the store has it, and how many seconds it was to hold; None for ever, or where that is not known."""

    entry: Entry
    pin: Pin
    ttl_s: float | None


class Pins:
    """Reads and writes the pins of one root."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._told: set[str] = set()  # what was warned of already: listings are frequent

    def read(self) -> list[Pin]:
        """Every pin. One that can't be read holds for ever, with a warning."""
        return [found.pin for found in self._look_into(self._store.list(_FOLDER))]

    def _look_into(self, entries: Sequence[Entry]) -> list[_Found]:
        return [found for found in each(self._store, self._read, entries) if found is not None]

    def _read(self, entry: Entry) -> _Found | None:
        key = entry.key
        match = _KEY.fullmatch(key)
        if match is None:
            self._tell(key, "its name is not a pin's; it keeps nothing, remove it")
            return None
        name, nonce, tag = match["name"], match["nonce"], match["tag"]
        try:
            body = parse(self._store.get(key, 0, MAX_RECORD_SIZE))
            expires = None if body["expires"] is None else moment(body["expires"])
            has_ended = expires is not None and expires <= datetime.now(UTC)
            return _Found(entry, Pin(name, nonce, whole(body["step"]), tag, expires, has_ended), _ttl_s(body))
        except NotFoundError:
            return None  # unpinned since the listing
        except StoreError as exc:
            if not is_refused(self._store, exc):
                raise
            cause: Exception = exc
        except (ValueError, KeyError, TypeError) as exc:
            cause = exc
        self._tell(key, f"it can't be read and keeps {name} until it is removed: {cause!r}")
        return _Found(entry, Pin(name, nonce, guessed_step(name), tag), None)

    def _tell(self, key: str, what: str) -> None:
        if key not in self._told:
            self._told.add(key)
            _log.warning("pin.read.failed key=%s/%s %s", self._store.url, key, what)

    def holds(self, name: str, nonce: str | None, at: float | None) -> bool:
        """Whether a pin holds a checkpoint: by the clock of this host, or by that of the store, where it was `at`
        this time, in seconds since 1970, just now. Without a nonce, any of its folder."""
        matches = ((entry, _KEY.fullmatch(entry.key)) for entry in self._store.list(_FOLDER))
        of_it = [entry for entry, m in matches if m and m["name"] == name and nonce in (None, m["nonce"])]
        now = datetime.now(UTC)
        return any(found.pin.holds(now) or _is_young(found, at) for found in self._look_into(of_it))

    def put(self, pin: Pin) -> None:
        """Raises `ConfigError` for a tag that can't be had."""
        if pin.tag is not None:
            room = max(_LONGEST - len(pin_key(pin.name, pin.nonce, "").rpartition("/")[2]), _READERS_TAG)
            if len(checked_tag(pin.tag)) > room:
                raise ConfigError(
                    f"tag {pin.tag!r:.60} has {len(pin.tag)} characters, and beside the name of {pin.name} there is "
                    f"room for {room}: use a shorter one"
                )
        body: dict[str, object] = {"step": pin.step, "expires": None, "ttl_s": None}
        if pin.expires is not None:
            ttl_s = (pin.expires - datetime.now(UTC)).total_seconds()
            body |= {"expires": pin.expires.isoformat(), "ttl_s": ttl_s}
        self._store.put(pin_key(pin.name, pin.nonce, pin.tag), json.dumps(body).encode())

    def remove(self, pins: Iterable[Pin]) -> None:
        self._store.delete([pin_key(pin.name, pin.nonce, pin.tag) for pin in pins])

    def remove_ended(self, check: Callable[[], None], clock: Callable[[], float | None]) -> int:
        """Remove the pins that ended more than a day ago by this host's clock, and by the store's, where `clock` asks
        it for a time that has come already; answers how many. `check` is asked before."""
        now = datetime.now(UTC)
        found = self._look_into(self._store.list(_FOLDER))
        ended = [one for one in found if one.pin.expires is not None and now - one.pin.expires > _SLACK]
        if not ended:
            return 0
        at = clock()
        over = {one.entry for one in ended if _is_over(one, at)}
        check()
        over &= {*self._store.list(_FOLDER)}  # not those that somebody has put anew meanwhile
        self._store.delete(sorted(entry.key for entry in over))
        return len(over)

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
    return f"{_FOLDER}/{name}.{nonce}{'' if tag is None else f'.tag-{tag}'}.json"


def _ttl_s(body: Mapping[str, Any]) -> float | None:
    try:
        return float(body["ttl_s"])
    except (ValueError, KeyError, TypeError, OverflowError):
        return None  # it has no end, or is of an earlier version


def _is_young(found: _Found, at: float | None) -> bool:
    """Whether a pin was put, by the store's clock, less long ago than it was to hold. Of one put later than `at`
    the store's clock says nothing: where a tombstone is a second name of the manifest it is as old as that."""
    if at is None or found.entry.modified is None or found.ttl_s is None:
        return False
    return 0 <= at - found.entry.modified < found.ttl_s


def _is_over(found: _Found, at: float | None) -> bool:
    """Whether a pin has ended long ago by the store's clock, or that tells nothing."""
    if found.entry.modified is None:
        return True
    return at is not None and at - found.entry.modified > max(found.ttl_s or 0, 0) + _SLACK.total_seconds()


def check_free(tag: str, others: Iterable[CheckpointInfo], url: str) -> None:
    """Raises `ConfigError` when a tag is not usable, or one of the `others`, in the root at `url`, has it."""
    checked_tag(tag)
    for other in others:
        if tag in other.tags:
            raise ConfigError(
                f"tag {tag!r} is on step {other.step} ({url}/{other.name}) already; "
                "unpin or delete that one first, or use another tag"
            )
