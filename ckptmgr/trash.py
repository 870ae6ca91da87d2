"""How does a checkpoint go, so that whoever comes next can tell how far that came? By a record that comes first.

The record is put, then the writer is asked whether the checkpoint still may go, and then its manifest is deleted.
A record names the attempt of the writer that put it: only that writer acts by it, and takes it away again
when the answer was no. Whoever carries out another one's does so by a record of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

from .errors import CheckpointError
from .folder_names import NameTemplate
from .listing import read_checkpoint
from .manifest import MANIFEST_NAME, Manifest
from .pins import Pins
from .records import Aside, Records
from .store import Store


class Trash:
    """What goes from one root. Methods block and raise `StoreError`."""

    def __init__(self, store: Store, records: Records, pins: Pins, names: Sequence[NameTemplate]) -> None:
        self._store, self._records, self._pins, self._names = store, records, pins, names
        self.attempt = 0  # of the writer; 0 where nobody holds the root

    def record(self, kind: str, name: str, manifest: Manifest, may_go: Callable[[], bool]) -> Aside | None:
        """Record below `trash` or `archive` that a checkpoint is going, and then ask whether it may. None, and no
        record, when it may not; nor is there one when that raises."""
        try:
            aside = self._records.put_aside(kind, name, manifest, self.attempt)
            if may_go():
                return aside
        except BaseException:
            with suppress(CheckpointError):  # what is left of it is cleared away as that of a dead one
                self._take_back(self._records.aside_key(kind, name, manifest.nonce, self.attempt))
            raise
        self._take_back(aside.key)
        return None

    def _take_back(self, key: str) -> None:
        self._store.delete([key])

    def delete_manifest(self, name: str) -> None:
        """From here on it is no checkpoint."""
        self._store.delete([f"{name}/{MANIFEST_NAME}"])

    def delete_data(self, aside: Aside, *keys: str) -> None:
        """Delete the files of what is no checkpoint any more, its pins, and its records, of which there may be `keys`
        besides."""
        there = read_checkpoint(self._store, aside.name, self._names)
        # Another save of the step may have taken the folder since.
        kept = {file.name for file in there.manifest.files} if there and there.manifest else set()
        self._store.delete([f"{aside.name}/{file.name}" for file in aside.manifest.files if file.name not in kept])
        self._pins.forget((aside.name, aside.manifest.nonce))
        self._records.forget(aside.name, aside.manifest.nonce, *keys)
        self._store.delete([aside.key])  # last: it is what leads a sweep here
