"""What is written beside the checkpoints, never into them? The records below `.ckptmgr/`.

`pins/` keep checkpoints, `damaged/` remembers what failed to load, `archive/` holds the manifests
of a branch that was rewound, `trash/` those of checkpoints whose data is being deleted. Drafts
(`draft`) and the writer's lock (`lock`) live there too.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from .errors import ConfigError, DamagedError, NotFoundError
from .manifest import Manifest, Pin
from .store import Store

FOLDER = ".ckptmgr"
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
RESERVED_TAGS = ("latest", "best")


@dataclass(frozen=True, slots=True)
class Aside:
    """A checkpoint's manifest under another name: no checkpoint any more, its data still there."""

    key: str
    name: str
    manifest: Manifest

    @property
    def is_dropped(self) -> bool:
        """Whether its data is on its way out."""
        return self.key.startswith(f"{FOLDER}/trash/")


class Records:
    """Reads and writes the records of one root."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def keys(self) -> list[str]:
        """Every record there is, from one listing."""
        return [entry.key for entry in self._store.list(FOLDER, recursive=True)]

    # Pins

    def pins(self, keys: Iterable[str]) -> list[Pin]:
        return [pin for key in keys if key.startswith(f"{FOLDER}/pins/") and (pin := self._pin(key)) is not None]

    def _pin(self, key: str) -> Pin | None:
        try:
            body = json.loads(self._store.get(key))
            expires = body["expires"]
            return Pin(int(body["step"]), body["tag"], None if expires is None else datetime.fromisoformat(expires))
        except NotFoundError:
            return None  # unpinned since the listing
        except (ValueError, KeyError, TypeError) as exc:
            # A pin protects: one that can't be read must not end in a deletion.
            raise DamagedError(f"{self._store.url}/{key} is not a pin: {exc!r}; remove it, then pin again") from exc

    def pin(self, pin: Pin) -> None:
        body = {
            "step": pin.step,
            "tag": pin.tag,
            "expires": None if pin.expires is None else pin.expires.isoformat(),
        }
        self._store.put(self._pin_key(pin.step, pin.tag), json.dumps(body).encode())

    def unpin(self, step: int, tag: str | None, keys: Iterable[str]) -> int:
        """Remove a step's pins, or the one with a tag; answers how many there were."""
        one, every = self._pin_key(step, tag), f"{FOLDER}/pins/{step}."
        gone = [key for key in keys if (key.startswith(every) if tag is None else key == one)]
        self._store.delete(gone)
        return len(gone)

    def _pin_key(self, step: int, tag: str | None) -> str:
        return f"{FOLDER}/pins/{step}.{'' if tag is None else checked_tag(tag) + '.'}json"

    # Damage

    def damaged(self, keys: Iterable[str]) -> dict[tuple[str, str], str]:
        """What is known to be damaged, by folder and nonce, with the reason."""
        marks = {}
        for key in keys:
            if key.startswith(f"{FOLDER}/damaged/"):
                name, _, nonce = key.rsplit("/", 1)[1].removesuffix(".json").rpartition(".")
                try:
                    marks[name, nonce] = str(json.loads(self._store.get(key))["reason"])
                except NotFoundError:
                    continue
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

    def asides(self, kind: str, keys: Iterable[str]) -> list[Aside]:
        found = []
        for key in keys:
            if key.startswith(f"{FOLDER}/{kind}/"):
                try:
                    manifest = Manifest.from_json(self._store.get(key))
                except NotFoundError:
                    continue
                name = key.rsplit("/", 1)[1].removesuffix(f".{manifest.nonce}.json")
                found.append(Aside(key, name, manifest))
        return found


def checked_tag(tag: str) -> str:
    """A tag that can stand in a file name and is not mistaken for a step or a pointer."""
    if not _TAG.fullmatch(tag) or tag.isdecimal() or tag in RESERVED_TAGS:
        raise ConfigError(
            f"tag {tag!r} is not usable: letters, digits, _ and -, not only digits, none of {', '.join(RESERVED_TAGS)}"
        )
    return tag


def new_nonce() -> str:
    return secrets.token_hex(8)
