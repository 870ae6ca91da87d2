"""Which checkpoints did somebody pin? The records below `.ckptmgr/pins/`.

A pin names one checkpoint by its folder and nonce, so that it never passes to another of the same
step. Both stand in the key, as the tag does: a pin whose content is lost still protects.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from datetime import datetime

from .errors import NotFoundError, StoreError
from .manifest import Pin, guessed_step
from .records import checked_tag, is_refused
from .store import Store

_FOLDER = ".ckptmgr/pins"
# A nonce has no "-": the last part can't be both a nonce and a tag.
_KEY = re.compile(rf"{_FOLDER}/(?P<name>[^/]+)\.(?P<nonce>[0-9A-Za-z]+)(?:\.tag-(?P<tag>[A-Za-z0-9_-]+))?\.json")

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
            body = json.loads(self._store.get(key))
            expires = None if body["expires"] is None else datetime.fromisoformat(body["expires"])
            if expires is not None and expires.tzinfo is None:
                raise ValueError(f"{expires} has no time zone")
            return Pin(name, nonce, int(body["step"]), tag, expires)
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

    def put(self, pin: Pin) -> None:
        body = {"step": pin.step, "expires": None if pin.expires is None else pin.expires.isoformat()}
        self._store.put(pin_key(pin.name, pin.nonce, pin.tag), json.dumps(body).encode())

    def remove(self, pins: Iterable[Pin]) -> None:
        self._store.delete([pin_key(pin.name, pin.nonce, pin.tag) for pin in pins])

    def forget(self, *gone: tuple[str, str | None]) -> None:
        """Remove the pins of checkpoints that are none any more, by folder and nonce; without a nonce,
        all of its folder."""
        matches = [match for entry in self._store.list(_FOLDER) if (match := _KEY.fullmatch(entry.key))]
        them = {*gone}
        self._store.delete(
            match[0] for match in matches if (match["name"], match["nonce"]) in them or (match["name"], None) in them
        )


def pin_key(name: str, nonce: str, tag: str | None = None) -> str:
    """The key of a checkpoint's pin."""
    return f"{_FOLDER}/{name}.{nonce}{'' if tag is None else f'.tag-{checked_tag(tag)}'}.json"
