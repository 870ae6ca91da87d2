"""What can be asked of any fsspec filesystem? Only what all of them do, and nothing that a half-done one would show."""

from __future__ import annotations

import inspect
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from socket import gaierror
from typing import Any, TypeVar

import fsspec

from ..errors import ConfigError
from . import Entry
from .dialect import Fault, Unended, seconds
from .disk import TempFile
from .retries import Outlook, Patience, Retries

_T = TypeVar("_T")
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")


def filesystem_class(protocol: str) -> Any:
    """fsspec's class. Raises `ConfigError` for an unknown protocol, `ImportError` where its library is missing."""
    try:
        return fsspec.get_filesystem_class(protocol)
    except ValueError as exc:
        raise ConfigError(
            f"root: protocol {protocol!r} is not known to fsspec; use a path, s3://, gs:// or oss://"
        ) from exc


class GenericDialect:
    """A filesystem of which nothing is known. A large object waits in a temporary file of this
    machine (see `TMPDIR`) until its commit, as many filesystems show what is being written."""

    credentials = "storage.options, and what the documentation of this filesystem names"

    def __init__(self, url: str, options: Mapping[str, Any], patience: Patience) -> None:
        self.retries = Retries(patience, self.outlook)
        self._fs, root = fsspec.core.url_to_fs(url, **options)
        self.prefix = root.rstrip("/")
        self.bucket = self.prefix.strip("/").partition("/")[0]
        self._can_create = "mode" in inspect.signature(self._fs.pipe_file).parameters

    def get(self, name: str, start: int, end: int | None) -> bytes:
        return self._ask(lambda: bytes(self._fs.cat_file(name, start=start, end=end)))

    def put(self, name: str, data: bytes) -> None:
        self._ask(lambda: self._in_folder(name, lambda: self._fs.pipe_file(name, data)))

    def create(self, name: str, data: bytes) -> None:
        if self.stat(name) is not None:
            raise FileExistsError(name)
        mode = {"mode": "create"} if self._can_create else {}
        self._ask(lambda: self._in_folder(name, lambda: self._fs.pipe_file(name, data, **mode)))

    def upload(self, name: str) -> _Upload:
        return _Upload(self, name)

    def copy(self, source: str, target: str, size: int) -> bool:
        """Never: what a filesystem calls a copy may well bring the bytes here and back."""
        return False

    def put_file(self, local: str, name: str) -> None:
        try:
            self._ask(lambda: self._in_folder(name, lambda: self._fs.put_file(local, name)))
        except BaseException:
            with suppress(Exception):  # the first error says more
                self._fs.rm_file(name)
            raise

    def list(self, prefix: str, recursive: bool) -> Iterator[Entry]:
        def look() -> Iterable[Any]:
            self._fs.invalidate_cache()
            if recursive:
                return dict(self._fs.find(folder, detail=True)).values()
            return tuple(self._fs.ls(folder or "/", detail=True))

        folder = prefix.rstrip("/")
        try:
            found = self._ask(look)
        except (FileNotFoundError, NotADirectoryError):
            return
        for info in found:
            name = self._rooted(info["name"])
            if name.startswith(prefix) and name != prefix:  # a file lists itself
                yield _entry(name, info)

    def stat(self, name: str) -> Entry | None:
        def look() -> Any:
            self._fs.invalidate_cache()
            try:
                return self._fs.info(name)
            except FileNotFoundError as exc:  # which fsspec makes of any answer over HTTP
                if getattr(exc.__cause__, "status", 404) not in (404, 410):
                    raise OSError(str(exc.__cause__)) from exc
                raise

        try:
            info = self._ask(look)
        except (FileNotFoundError, NotADirectoryError):
            return None
        return _entry(name, info) if info["type"] == "file" else None

    def delete(self, name: str) -> None:
        self._ask(lambda: self._fs.rm_file(name))

    def unended(self, prefix: str) -> Iterator[Unended]:
        """None: an upload is one call."""
        return iter(())

    def sized(self, upload: Unended) -> Unended:
        return upload

    def cancel(self, name: str, upload: str) -> None:
        """Nothing: there is none."""

    def outlook(self, exc: Exception) -> Outlook:
        """Only what any library means the same by: most have retries of their own."""
        if isinstance(exc, ConnectionRefusedError | gaierror):
            return Outlook(True, is_reached=False)
        return Outlook(isinstance(exc, ConnectionError | TimeoutError | EOFError))

    def diagnose(self, exc: Exception) -> Fault:
        match exc:
            case FileExistsError():
                return Fault.EXISTS
            case FileNotFoundError() | NotADirectoryError():
                return Fault.MISSING
            case PermissionError():
                return Fault.DENIED
        return Fault.UNCLEAR

    def describe(self, exc: Exception) -> str:
        return f"{type(exc).__name__}: {exc}"

    def _in_folder(self, name: str, write: Any) -> None:
        try:
            write()
        except FileNotFoundError:  # one with real folders, unlike an object store
            self._fs.makedirs(name.rpartition("/")[0], exist_ok=True)
            write()

    def _ask(self, request: Callable[[], _T]) -> _T:
        return self.retries(lambda limit: request())

    def _rooted(self, name: str) -> str:
        """Listings name things with a leading slash or without, whatever the root has."""
        return ("/" if self.prefix.startswith("/") else "") + name.strip("/")


class _Upload:
    def __init__(self, dialect: GenericDialect, name: str) -> None:
        self._dialect, self._name = dialect, name
        self._file = TempFile(str(Path(tempfile.gettempdir(), f"ckptmgr-{secrets.token_hex(8)}.tmp")))

    def write(self, data: memoryview) -> None:
        self._file.write(data)

    def commit(self) -> None:
        self._file.close()
        self._dialect.put_file(self._file.path, self._name)
        self._file.discard()

    def abort(self) -> None:
        self._file.discard()


def _entry(name: str, info: Mapping[str, Any]) -> Entry:
    if info["type"] == "directory":
        return Entry(name.rstrip("/"), is_folder=True)
    modified = next((info[key] for key in _TIMES if info.get(key) is not None), None)
    return Entry(name, int(info.get("size") or 0), seconds(modified))
