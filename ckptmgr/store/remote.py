"""How are bytes kept behind a URL? Through the client libraries of fsspec, whose traps end here."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from errno import EACCES
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import AlreadyExistsError, CheckpointError, ConfigError, NotFoundError, StoreError
from . import Entry
from .arguments import as_bytes, checked_folder, checked_key, is_key
from .dialect import Dialect, Fault, Unended, public_url
from .dialects import dialect_for
from .haste import in_haste
from .multipart import TO_LOOK_S
from .range_reader import RangeReader
from .redaction import passwords, secrets_of, secrets_of_environment
from .remote_writer import RemoteWriter
from .retries import Patience, tries

if TYPE_CHECKING:
    from typing_extensions import Buffer

_log = logging.getLogger("ckptmgr.store")

_DELETES_AT_ONCE = 8


class FsspecStore:
    """A `Store` at any fsspec URL.

    S3, GCS and OSS have conditional writes: of several `put(create=True)` one wins. Elsewhere, and on
    servers that speak like S3 but refuse those, "is it there?" and the write are two steps, and only
    names that nobody else uses are safe. An answer can get lost after the store did what it was
    asked, so a key that turns out to hold exactly the bytes given to `put(create=True)` counts as
    created by this call: put something in them that nobody else would, such as a random number.

    A request that fails is tried again within the deadline of `patience` where that can help. Clients
    are built on first use, once per process, and never shared with a forked one or pickled.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None, patience: Patience | None = None) -> None:
        self._url, self._options = url, dict(options or {})
        self._patience = patience or Patience()
        self._connect = dialect_for(url)
        # By process: a forked one must not use its parent's connections, nor wait for its threads.
        self._dialects: dict[int, Dialect] = {}
        self._building: dict[int, threading.Lock] = {}
        self._hides_uploads = False

    def __repr__(self) -> str:
        return f"FsspecStore({self.url!r})"

    def __reduce__(self) -> tuple[type[FsspecStore], tuple[str, dict[str, Any], Patience]]:
        return FsspecStore, (self._url, self._options, self._patience)

    @property
    def url(self) -> str:
        return public_url(self._url)

    @property
    def path(self) -> Path | None:
        return None

    @property
    def can_rename(self) -> bool:
        """Never: what a bucket calls a rename is a copy and a deletion."""
        return False

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        name = self._name(checked_key(key))
        with self._edge("read", key) as dialect:
            if end is not None and end <= start:
                if dialect.stat(name) is None:
                    raise NotFoundError(f"{self.url}/{key} does not exist")
                return b""
            try:
                return dialect.get(name, start, end)
            except Exception as exc:
                if dialect.diagnose(exc) is not Fault.PAST_END:
                    raise
                return b""

    def put(self, key: str, data: Buffer, *, create: bool = False) -> None:
        name, body = self._name(checked_key(key)), bytes(as_bytes(data))
        with self._edge("write", key) as dialect:
            if create:
                self._create(dialect, key, name, body)
            else:
                dialect.put(name, body)

    def reader(self, key: str, *, by_many: bool = False) -> RangeReader:
        return RangeReader(self, checked_key(key))

    def writer(self, key: str, size: int | None = None) -> RemoteWriter:
        name = self._name(checked_key(key))
        with self._edge("write", key) as dialect:
            return RemoteWriter(f"{self.url}/{key}", size, dialect.upload(name), lambda: self._edge("write", key))

    def copy(self, source: str, target: str) -> bool:
        """S3, GCS and OSS copy; of any other filesystem it is not known who does. "Is the target
        there?" and the copy are two steps: only names that nobody else uses are safe."""
        old, new = self._name(checked_key(source)), self._name(checked_key(target))
        with self._edge("copy", source) as dialect:
            found = dialect.stat(old)
            if found is None:
                raise NotFoundError(f"{self.url}/{source} does not exist")
            if dialect.stat(new) is not None:
                raise AlreadyExistsError(f"{self.url}/{target} exists already and was left as it is")
            return dialect.copy(old, new, found.size)

    def folders(self, folder: str = "") -> list[str]:
        return [entry.name for entry in self.list(folder) if entry.is_folder]

    def list(self, folder: str = "", *, recursive: bool = False) -> list[Entry]:
        prefix = self._name(f"{checked_folder(folder)}/" if folder else "")
        with self._edge("list", folder) as dialect:
            return sorted(self._listed(dialect, prefix, recursive), key=lambda entry: entry.key)

    def stat(self, key: str) -> Entry | None:
        name = self._name(checked_key(key.removesuffix("/")))
        with self._edge("read", key) as dialect:
            if key.endswith("/"):  # the first page tells; one level would show folders that are empty by now
                below = any(True for _ in self._listed(dialect, f"{name}/", recursive=True))
                return Entry(key.removesuffix("/"), is_folder=True) if below else None
            found = dialect.stat(name)
        return None if found is None else Entry(key, found.size, found.modified)

    def delete(self, keys: Iterable[str]) -> None:
        names: list[str] = []
        for key in keys:
            name = self._name(checked_key(key.removesuffix("/")))
            if not key.endswith("/"):
                names.append(name)
                continue
            with self._edge("delete", key) as dialect:
                names.extend(entry.key for entry in dialect.list(f"{name}/", True))
                self._cancel_below(dialect, f"{name}/")
        if len(names) == 1:
            self._delete(names[0])
        elif names:
            with ThreadPoolExecutor(_DELETES_AT_ONCE, thread_name_prefix="ckptmgr-delete") as pool:
                list(pool.map(self._delete, names))

    def rename(self, source: str, target: str) -> None:
        """Always raises `StoreError`."""
        raise StoreError(f"folders can't be renamed at {self.url}: copy {source} to {target} and delete it instead")

    def uploads(self, folder: str = "") -> tuple[Unended, ...]:
        """The uploads of large objects that were begun and not ended, named by their keys, with their bytes."""
        prefix = self._name(f"{checked_folder(folder)}/" if folder else "")
        with self._edge("list the uploads of", folder) as dialect:
            found = [self._sized(dialect, upload) for upload in [*dialect.unended(prefix)]]
        return tuple(upload._replace(name=self._key(upload.name)) for upload in found if upload is not None)

    def _sized(self, dialect: Dialect, upload: Unended) -> Unended | None:
        try:
            return dialect.sized(upload)
        except Exception as exc:
            if dialect.diagnose(exc) is not Fault.NO_UPLOAD:
                raise
            return None  # it has ended since the listing

    def drop_upload(self, upload: Unended) -> None:
        """End one of `uploads` without an object. One that has ended meanwhile is no error."""
        with self._edge("cancel the upload of", upload.name) as dialect:
            _cancel(dialect, self._name(upload.name), upload.upload)

    def give_up(self) -> None:
        """For the length of the deadline no request is tried again, and none is made while the store is down: for
        a process that ends. From any thread; returns at once."""
        if (dialect := self._dialects.get(os.getpid())) is not None:
            dialect.retries.give_up()

    def _cancel_below(self, dialect: Dialect, prefix: str) -> None:
        """Give up the uploads below a folder that goes, where the store lets us see them."""
        if self._hides_uploads:
            return
        try:
            with in_haste(TO_LOOK_S, is_once=True):
                for upload in [*dialect.unended(prefix)]:
                    _cancel(dialect, upload.name, upload.upload)
        except Exception as exc:  # noqa: BLE001 - may be refused or not be there; the objects go all the same
            self._hides_uploads = not dialect.outlook(exc).may_pass
            cause = self._without_secrets(dialect.describe(exc))
            _log.debug("uploads.drop.failed url=%s/%s cause=%s", self.url, self._key(prefix), cause)

    def _listed(self, dialect: Dialect, prefix: str, recursive: bool) -> Iterator[Entry]:
        for entry in dialect.list(prefix, recursive):
            key = self._key(entry.key)
            if is_key(key):  # else it is nothing of ours, such as the empty object "folder/" that some tools make
                yield Entry(key, entry.size, entry.modified, entry.is_folder)

    def _name(self, key: str) -> str:
        prefix = self._dialect.prefix
        return f"{prefix}/{key}" if prefix else key

    def _key(self, name: str) -> str:
        return name[len(self._name("")) :]

    def _delete(self, name: str) -> None:
        with self._edge("delete", self._key(name)) as dialect:
            try:
                dialect.delete(name)
            except Exception as exc:
                if dialect.diagnose(exc) is not Fault.MISSING:
                    raise

    def _create(self, dialect: Dialect, key: str, name: str, body: bytes) -> None:
        try:
            dialect.create(name, body)
        except Exception as exc:
            fault = dialect.diagnose(exc)
            if fault not in (Fault.EXISTS, Fault.UNCLEAR):
                raise
            # The answer to a try that succeeded may have been lost: only the object knows whose it is.
            found = _read(dialect, name)
            if found == body:
                return
            if found is None and fault is Fault.UNCLEAR:
                raise
            raise AlreadyExistsError(f"{self.url}/{key} exists already and was left as it is") from exc

    @property
    def _dialect(self) -> Dialect:
        pid = os.getpid()
        dialect = self._dialects.get(pid)
        if dialect is not None:
            return dialect
        with self._building.setdefault(pid, threading.Lock()):
            if (dialect := self._dialects.get(pid)) is None:
                dialect = self._dialects[pid] = self._new_dialect()
            return dialect

    def _new_dialect(self) -> Dialect:
        try:
            return self._connect(self._url, self._options, self._patience)
        except CheckpointError:
            raise
        except Exception as exc:  # noqa: BLE001 - every library has its own way to refuse an option
            cause = self._without_secrets(f"{type(exc).__name__}: {exc}")
            raise ConfigError(f"storage.options do not fit {self.url}: {cause}") from self._shown(exc)

    @contextmanager
    def _edge(self, doing: str, key: str) -> Iterator[Dialect]:
        dialect = self._dialect
        try:
            yield dialect
        except CheckpointError:
            raise
        except Exception as exc:  # noqa: BLE001 - client libraries and what lies below them share no base class
            raise self._explained(dialect, exc, doing, f"{self.url}/{key}" if key else self.url) from self._shown(exc)

    def _explained(self, dialect: Dialect, exc: Exception, doing: str, url: str) -> CheckpointError:
        cause = self._without_secrets(" ".join(dialect.describe(exc).split()))
        if told := tries(exc):
            cause = f"{cause} ({told})"
        match dialect.diagnose(exc):
            case Fault.NO_BUCKET:
                return StoreError(f"bucket {dialect.bucket!r} does not exist: create it or correct the root {self.url}")
            case Fault.MISSING:
                return NotFoundError(f"{url} does not exist")
            case Fault.DENIED:
                text = f"no permission to {doing} {url}: {cause}; check the credentials: {dialect.credentials}"
                return StoreError(text, EACCES)
            case Fault.EXPIRED:
                self._forget(dialect)  # the next request looks for new ones
                text = f"could not {doing} {url}, as the credentials have expired: {cause}; renew {dialect.credentials}"
                return StoreError(text, EACCES)
            case Fault.SKEWED:
                return StoreError(
                    f"could not {doing} {url}: {cause}; the clock of this machine is wrong by minutes: set it"
                )
            case Fault.ELSEWHERE:
                return StoreError(
                    f"could not {doing} {url}: {cause}; bucket {dialect.bucket!r} is in another region or behind "
                    "another endpoint: correct storage.options"
                )
        text = f"could not {doing} {url}: {cause}; check the store, the network and the endpoint, then try again"
        return StoreError(text, exc.errno if isinstance(exc, OSError) else None)

    def _forget(self, dialect: Dialect) -> None:
        """Another thread may have replaced it already."""
        pid = os.getpid()
        with self._building.setdefault(pid, threading.Lock()):
            if self._dialects.get(pid) is dialect:
                del self._dialects[pid]

    def _shown(self, exc: Exception) -> Exception | None:
        """What a traceback may show as the cause: nothing where any error that led to it speaks of a secret."""
        each: BaseException | None = exc
        while each is not None:
            if self._without_secrets(text := str(each)) != text:
                return None
            each = each.__cause__ or each.__context__
        return exc

    def _without_secrets(self, text: str) -> str:
        secrets = {*passwords(self._url), *secrets_of(self._options), *secrets_of_environment()}
        for secret in sorted(secrets, key=len, reverse=True):  # one may hold another
            text = text.replace(secret, "***")
        return text


def _cancel(dialect: Dialect, name: str, upload: str) -> None:
    try:
        dialect.cancel(name, upload)
    except Exception as exc:
        if dialect.diagnose(exc) is not Fault.NO_UPLOAD:  # else it has ended meanwhile
            raise


def _read(dialect: Dialect, name: str) -> bytes | None:
    try:
        return dialect.get(name, 0, None)
    except Exception as exc:
        match dialect.diagnose(exc):
            case Fault.MISSING:
                return None
            case Fault.PAST_END:
                return b""
        raise
