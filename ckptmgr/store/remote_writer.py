"""How does a large object come into a store behind a network? In order, visible only when whole."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from ..errors import StoreError
from .arguments import as_bytes
from .dialect import Upload
from .placement import check_size

if TYPE_CHECKING:
    from typing_extensions import Buffer

_log = logging.getLogger("ckptmgr.store")


class RemoteWriter:
    """A `Writer` of the object that `url` names; what `upload` raises is told in our words by the
    block that `edge` makes. Dropped unended it publishes nothing."""

    def __init__(
        self, url: str, size: int | None, upload: Upload, edge: Callable[[], AbstractContextManager[object]]
    ) -> None:
        self._url, self._size, self._edge = url, size, edge
        self._upload: Upload | None = upload
        self._count = 0

    @property
    def is_positional(self) -> bool:
        return False

    def write(self, data: Buffer) -> None:
        view = as_bytes(data)
        with self._edge():
            self._open().write(view)
        self._count += view.nbytes

    def write_at(self, offset: int, data: Buffer) -> None:
        """Always raises `StoreError`."""
        raise StoreError(f"nothing can be placed in {self._url}: write its bytes in order")

    def commit(self) -> None:
        with self._edge():
            upload = self._open()
            check_size(self._count, self._size, self._url)
            upload.commit()
        self._upload = None

    def abort(self) -> None:
        upload, self._upload = self._upload, None
        if upload is not None:
            try:
                upload.abort()
            except Exception as exc:  # noqa: BLE001 - nothing is visible; the store forgets the rest, or a sweep does
                _log.warning("upload.abort.failed url=%s cause=%r", self._url, type(exc))

    def _open(self) -> Upload:
        if self._upload is None:
            raise StoreError(f"the writer of {self._url} has ended; begin a new one")
        return self._upload
