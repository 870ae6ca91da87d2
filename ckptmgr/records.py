"""What is written beside the checkpoints, never into them? The records below `.ckptmgr/`.

`damaged/` remembers what failed to load, `archive/` holds the manifests of a branch that was
rewound, `trash/` those of checkpoints whose data is being deleted. Pins (`pins`), drafts (`draft`)
and the writer's lock (`lock`) live there too. One record that can't be read stops nothing.
"""

from __future__ import annotations

import errno
import json
import logging
import re
import secrets
from dataclasses import dataclass
from datetime import datetime

from .errors import ConfigError, DamagedError, FormatVersionError, NotFoundError, StoreError
from .manifest import Manifest
from .store import Store

FOLDER = ".ckptmgr"
_ASIDE = re.compile(r"(?P<name>.+)\.(?P<nonce>[0-9A-Za-z]+)\.json")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
RESERVED_TAGS = ("latest", "best")
# No permission, or no plain file (`LocalStore` says EINVAL of a folder, and of a link ELOOP).
_REFUSED = {errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EINVAL, errno.ELOOP}

_log = logging.getLogger("ckptmgr.records")


@dataclass(frozen=True, slots=True)
class Aside:
    """A checkpoint's manifest under another name: no checkpoint any more, its data still there."""

    key: str
    name: str
    manifest: Manifest


class Records:
    """Reads and writes the records of one root."""

    def __init__(self, store: Store) -> None:
        self._store = store

    # Damage

    def damaged(self) -> dict[tuple[str, str], str]:
        """What is known to be damaged, by folder and nonce, with the reason."""
        marks = {}
        for entry in self._store.list(f"{FOLDER}/damaged"):
            name, _, nonce = entry.name.removesuffix(".json").rpartition(".")
            try:
                marks[name, nonce] = str(json.loads(self._store.get(entry.key))["reason"])
            except NotFoundError:
                continue
            except StoreError as exc:
                if not is_refused(self._store, exc):
                    raise
                marks[name, nonce] = "marked as damaged"
            except (ValueError, KeyError, TypeError):
                marks[name, nonce] = "marked as damaged"
        return marks

    def mark_damaged(self, name: str, nonce: str, reason: str, now: datetime) -> None:
        body = {"reason": reason, "time": now.isoformat()}
        self._store.put(f"{FOLDER}/damaged/{name}.{nonce}.json", json.dumps(body).encode())

    def forget(self, aside: Aside) -> None:
        """Remove what else is recorded of a checkpoint whose data is gone."""
        self._store.delete(
            [f"{FOLDER}/{kind}/{aside.name}.{aside.manifest.nonce}.json" for kind in ("damaged", "archive")]
        )

    # Manifests put aside

    def put_aside(self, kind: str, name: str, manifest: Manifest) -> Aside:
        """Keep a manifest under `archive` or `trash`; the checkpoint's own is still there."""
        key = f"{FOLDER}/{kind}/{name}.{manifest.nonce}.json"
        self._store.put(key, manifest.to_json())
        return Aside(key, name, manifest)

    def asides(self, kind: str) -> list[Aside]:
        """What was put aside. What can't be read is left where it is, with a warning."""
        start = f"{FOLDER}/{kind}"
        found = (self._aside(entry.key, f"{start}/") for entry in self._store.list(start))
        return [aside for aside in found if aside is not None]

    def archived(self) -> dict[tuple[str, str], str]:
        """The keys of what is under `archive`, by folder and nonce. There may be thousands: none is read."""
        found = ((_ASIDE.fullmatch(entry.name), entry.key) for entry in self._store.list(f"{FOLDER}/archive"))
        return {(match["name"], match["nonce"]): key for match, key in found if match}

    def _aside(self, key: str, start: str) -> Aside | None:
        try:
            manifest = Manifest.from_json(self._store.get(key))
            name = key[len(start) :].removesuffix(f".{manifest.nonce}.json")
            if f"{start}{name}" == key:
                raise DamagedError(f"its manifest has another nonce, {manifest.nonce}")
            return Aside(key, name, manifest)
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


def checked_tag(tag: str) -> str:
    """A tag that can stand in a file name and is not mistaken for a step or a pointer."""
    if not _TAG.fullmatch(tag) or tag.isdecimal() or tag in RESERVED_TAGS:
        raise ConfigError(
            f"tag {tag!r} is not usable: letters, digits, _ and -, not only digits, none of {', '.join(RESERVED_TAGS)}"
        )
    return tag


def is_refused(store: Store, error: StoreError) -> bool:
    """Whether this machine refuses one file for good. A network's error never says that."""
    return store.path is not None and error.errno in _REFUSED


def new_nonce() -> str:
    return secrets.token_hex(8)
