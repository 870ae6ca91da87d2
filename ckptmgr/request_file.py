"""Has somebody asked for a save by making a file? `RequestFile` looks for it and takes it away, once."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable

from .errors import CheckpointError, NotFoundError
from .store import Store

_log = logging.getLogger("ckptmgr.request_file")

_MAX_REASON = 200  # characters
_NEAR_S, _FAR_S = 1.0, 10.0  # seconds between looks at a local folder, and over a network
_STOP_TIMEOUT_S = 5.0


class RequestFile:
    """A daemon thread that looks for the file `key` in a store every `every_s` seconds, until stopped or dropped.

    A file found is removed first, then `on_request` gets the reason: the key, and the first line
    of what the file holds. It is called in the thread that looked. A file that can't be removed is
    no request, or it would be one for ever.
    """

    def __init__(self, store: Store, key: str, on_request: Callable[[str], None], every_s: float | None = None) -> None:
        self._store, self._key, self._on_request = store, key, on_request
        self._every_s = every_s if every_s is not None else _FAR_S if store.path is None else _NEAR_S
        self._looking = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._has_failed = False

    def start(self) -> None:
        """Begin to look, at once and then again and again. May be repeated; does not block."""
        if self._thread is None:
            looks = (weakref.ref(self), self._stopping, self._every_s)
            self._thread = threading.Thread(target=_keep_looking, args=looks, name="ckptmgr-request-file", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Look no more. Waits for a look under way, but not for a store that does not answer."""
        self._stopping.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(_STOP_TIMEOUT_S)

    def look(self) -> bool:
        """Look once, now; whether a request was taken. What the store refuses is logged once, not raised."""
        if not self._looking.acquire(blocking=False):
            return False  # another thread looks; it takes the request if there is one
        try:
            reason = self._taken()
            self._has_failed = False
        except CheckpointError as exc:
            if not self._has_failed:
                _log.warning("request_file.look.failed url=%s key=%s cause=%s", self._store.url, self._key, exc)
            self._has_failed = True
            return False
        finally:
            self._looking.release()
        if reason is not None:
            self._on_request(reason)
        return reason is not None

    def _taken(self) -> str | None:
        entry = self._store.stat(self._key)
        if entry is None:
            return None
        try:
            # A character is at most four bytes.
            start = self._store.get(self._key, 0, 4 * _MAX_REASON) if entry.size else b""
        except NotFoundError:
            return None  # somebody took it back
        self._store.delete([self._key])
        lines = start.decode(errors="replace").split("\n", 1)[0]
        words = "".join(c if c.isprintable() else " " for c in lines).strip()[:_MAX_REASON]
        return f"{self._key}: {words}" if words else self._key


def _keep_looking(held: weakref.ref[RequestFile], stopping: threading.Event, every_s: float) -> None:
    """The thread's work. It keeps nothing alive: in a notebook a dropped one would take its successor's file."""
    while not stopping.is_set():
        file = held()
        if file is None:
            return
        file.look()
        del file
        stopping.wait(every_s)
