"""Which checkpoint does `latest` name? A small file for people and shell scripts.

A hint: it moves after each commit, so a crash may leave it behind, and it is to be believed only together with the
manifest of the checkpoint that it names.
"""

from __future__ import annotations

import logging
from contextlib import suppress

from .errors import StoreError
from .records import begin_of
from .store import Store, Writer

_log = logging.getLogger("ckptmgr.repository")


class Pointer:
    """The pointer of one root, the file `key`."""

    def __init__(self, store: Store, key: str = "latest") -> None:
        self._store, self._key = store, key
        self._begun: tuple[str, Writer] | None = None  # a checkpoint's name, and the writer of the file that names it

    def read(self) -> str | None:
        """What it says, which anybody may have written, or None without one."""
        data = begin_of(self._store, self._key, 1024)
        return None if data is None else data.decode("utf-8", "replace").strip()

    def begin(self, name: str) -> None:
        """On a disk, have what `move(name)` is going to write on its way there: it then takes half the time."""
        self.forget()
        if self._store.path is not None:
            data = _content(name)
            with suppress(StoreError):  # `move` will meet it, too
                self._begun = name, self._store.writer(self._key, len(data))
                self._begun[1].write(data)

    def forget(self) -> None:
        """Give up what was begun, if anything was. Never raises."""
        if self._begun is not None:
            self._begun[1].abort()
            self._begun = None

    def move(self, name: str | None) -> None:
        """Name this checkpoint; None: remove the pointer. It is a hint, so its failure is a warning."""
        try:
            if name is None:
                self._store.delete([self._key])
            elif self._begun is not None and self._begun[0] == name:
                self._begun[1].commit()
            else:
                self._store.put(self._key, _content(name))
        except StoreError as exc:
            _log.warning("pointer.put.failed key=%s name=%s cause=%s", self._key, name, exc)
        finally:
            self.forget()


def _content(name: str) -> bytes:
    return f"{name}\n".encode()
