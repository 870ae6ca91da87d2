"""Where do bytes live? The `Store` protocol: bytes under keys, at a root URL.

A key is a relative path with "/" between its parts. Everything above this package speaks to a
store only through these ten methods and three attributes; `ckptmgr.testing.StoreContract` holds
what they promise, for any store.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "BLOCK",
    "DRAFTS",
    "Entry",
    "Reader",
    "Store",
    "Writer",
    "drop_spares",
    "give_up",
    "keeping_spares",
    "open_store",
]


DRAFTS = ".ckptmgr/drafts"  # where a folder is filled that is going to be renamed
BLOCK = 4096  # bytes; what disks and file systems read and write at a time


class Entry(NamedTuple):  # a folder may hold ten thousand, and a dataclass takes twice the time to make
    """One thing in a listing.

    `key` is relative to the store's root; `size` is in bytes (0 for a folder); `modified` is in
    seconds since 1970 by the *store's* clock (None where the store does not say).
    """

    key: str
    size: int = 0
    modified: float | None = None
    is_folder: bool = False

    @property
    def name(self) -> str:
        return self.key.rsplit("/", 1)[-1]


class Writer(Protocol):
    """A large object on its way into a store. Exactly one of `commit` and `abort` ends it."""

    @property
    def is_positional(self) -> bool:
        """Whether `write_at` may be used: the object was begun with its size, and the store takes
        its bytes in any order."""

    def write(self, data: Buffer) -> None:
        """Take the next bytes. Raises `StoreError`; the object must then be aborted."""

    def write_at(self, offset: int, data: Buffer) -> None:
        """Take the bytes at `offset`, a multiple of `BLOCK`; so is their number, but at the object's end.
        From any thread, in any order, instead of `write`. Fast where `data` begins at a multiple of
        `BLOCK` in memory. Raises `StoreError`; the object must then be aborted."""

    def commit(self) -> None:
        """Make the whole object visible under its key, durably, or raise `StoreError`."""

    def abort(self) -> None:
        """Give the object up: nothing of it is or becomes visible. May be repeated; never raises."""


class Reader(Protocol):
    """One object open for reading. Safe from any thread."""

    def is_cached(self, start: int, end: int) -> bool:
        """Whether reading these bytes is a mere copy of host memory, which is best made straight into
        their last place. If not, they are best read into memory that begins at a multiple of `BLOCK`."""

    def read_into(self, start: int, buffers: Sequence[Buffer]) -> int:
        """Fill the buffers, one after the other, with the bytes from `start` on; the number of bytes,
        less than asked for only at the object's end. Never from a cache of our own. Raises `StoreError`."""

    def close(self) -> None:
        """May be repeated; never raises."""


class Store(Protocol):
    """Bytes under keys. Every method blocks, is safe from any thread, and raises `StoreError`
    (or a subclass-like built-in of `ckptmgr.errors`) for anything the store refuses.

    What is written is durable at return and whole when it is seen, but in a folder below `DRAFTS`, where nobody
    looks for it: a new file may be seen there before it is whole, and `rename` makes the names durable before it
    moves the folder."""

    @property
    def url(self) -> str:
        """The root for messages, without credentials."""

    @property
    def path(self) -> Path | None:
        """The root as a folder of this machine, or None where the bytes are behind a network."""

    @property
    def can_rename(self) -> bool:
        """Whether `rename` moves a whole folder in one atomic step."""

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes [start, end) of an object, cut at its end; never from a cache.

        Raises `NotFoundError` when there is no such object."""

    def put(self, key: str, data: Buffer, *, create: bool = False) -> None:
        """Write a small object whole: readers see the old bytes or the new ones, never a part, and
        at return the new ones are durable. With `create`, raises `AlreadyExistsError` and changes
        nothing when the key exists (one winner where the store has conditional writes)."""

    def reader(self, key: str, *, by_many: bool = False) -> Reader:
        """The object open for reading. Raises `NotFoundError` when there is no such object, here or
        at the first `read_into`. `by_many`: other processes of this machine read the same bytes now, which
        had better come from a disk once for all of them."""

    def writer(self, key: str, size: int | None = None) -> Writer:
        """A writer for a large object, of `size` bytes where that is known; nothing is visible under
        `key` before its `commit`, but in a draft."""

    def copy(self, source: str, target: str) -> bool:
        """Make `target` an object of the bytes of `source`, without a byte passing through this
        machine: a hard link, a copy made by the server. Durable at return, like `put`. False, and
        nothing done, where the store can't; raises `NotFoundError` without a source and
        `AlreadyExistsError` when `target` exists."""

    def folders(self, folder: str = "") -> list[str]:
        """The names of the folders that `list` would show, sorted. A root may hold ten thousand checkpoints."""

    def list(self, folder: str = "", *, recursive: bool = False) -> list[Entry]:
        """What is in a folder, sorted by key: files and folders one level down, or with
        `recursive` every file below it. Never from a cache. A folder that does not exist is empty;
        a bucket that does not exist is a `StoreError`."""

    def stat(self, key: str) -> Entry | None:
        """The file under a key, or None when there is no such file. A key that ends in "/" is a folder,
        which object stores have while something is below it. Never from a cache."""

    def delete(self, keys: Iterable[str]) -> None:
        """Remove files, durably at return. A key that ends in "/" is a folder: everything below it
        goes, unfinished files too. A missing one is no error. Folders that become empty go too.
        Never follows a symbolic link."""

    def rename(self, source: str, target: str) -> None:
        """Make everything below the folder `source` durable, then move it to `target` in one
        atomic step, durable at return. Only where `can_rename`. Raises `AlreadyExistsError` when
        `target` exists."""


def open_store(
    url: str | Path, options: dict[str, Any] | None = None, *, fsync: bool = True, deadline_s: float | None = None
) -> Store:
    """The store for a path or any fsspec URL. Opens no connection and makes no folder yet.

    `options` go to the fsspec filesystem as they are. `deadline_s` is how long one request to a store behind
    a network may take, its retries included; ten minutes if not said. Raises `ConfigError` for a URL whose
    protocol is unknown or whose library is not installed, naming the extra to install.
    """
    from .local import LocalStore, local_path

    path = local_path(url)
    if path is not None:
        return LocalStore(path, fsync=fsync)
    from .remote import FsspecStore
    from .retries import Patience

    return FsspecStore(str(url), options or {}, Patience() if deadline_s is None else Patience(deadline_s))


def keeping_spares(store: Store) -> AbstractContextManager[None]:
    """A block in which, on a disk, large files that are deleted leave their blocks to the next save: see `spares`."""
    from .local import LocalStore

    return store.spares.keeping() if isinstance(store, LocalStore) else nullcontext()


def drop_spares(store: Store) -> None:
    """For a writer that ends: nothing is left for its next save. Never raises."""
    from .local import LocalStore

    if isinstance(store, LocalStore):
        store.spares.drop()


def give_up(store: Store) -> None:
    """For a process that ends: a store behind a network tries no request again, for the length of its deadline.
    What waits for another try fails at once, in whatever thread; this returns at once."""
    if store.path is None:
        from .remote import FsspecStore

        if isinstance(store, FsspecStore):
            store.give_up()
