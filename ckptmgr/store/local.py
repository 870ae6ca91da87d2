"""How are bytes kept in a folder of this machine? Atomically, durably, and never through a symbolic link."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import AlreadyExistsError, CheckpointError, ConfigError, NotFoundError, StoreError
from . import Entry
from .arguments import as_bytes, checked_folder, checked_key
from .disk import TempFile, claim, explain, open_file, sync_folder
from .mounts import can_rename_folders

if TYPE_CHECKING:
    from typing_extensions import Buffer

_TEMP_START, _TEMP_END = ".ckptmgr-", ".tmp"


def local_path(url: str | Path) -> Path | None:
    """The folder that a plain path, `file://` or `local://` URL means, or None for any other URL."""
    if isinstance(url, str):
        protocol, separator, rest = url.partition("://")
        if separator and protocol not in ("file", "local"):
            return None
        url = rest if separator else url
        if not url:
            raise ConfigError("root is empty: give a path or a URL")
        if os.name == "nt" and url[:1] == "/" and url[2:3] == ":":
            url = url[1:]  # file:///C:/runs
    return Path(url).expanduser().absolute()


class LocalStore:
    """A `Store` in a folder. The folder is made by the first write.

    What is written survives a power cut at return unless `fsync=False`. Safe from any thread, after
    a fork, and for several processes at once. The root may be a symbolic link; below it none is followed.
    """

    def __init__(self, path: str | Path, fsync: bool = True) -> None:
        self._path = Path(path).expanduser().absolute()
        self._fsync = fsync
        self._durable: set[Path] = set()  # folders whose own entries this process has seen to the disk
        self._can_rename: bool | None = None

    def __repr__(self) -> str:
        return f"LocalStore({str(self._path)!r})" if self._fsync else f"LocalStore({str(self._path)!r}, fsync=False)"

    def __reduce__(self) -> tuple[type[LocalStore], tuple[Path, bool]]:
        return LocalStore, (self._path, self._fsync)

    @property
    def url(self) -> str:
        return str(self._path)

    @property
    def path(self) -> Path | None:
        return self._path

    @property
    def can_rename(self) -> bool:
        """False on FUSE mounts, and wherever renaming a folder fails when tried. Tried once."""
        if self._can_rename is None:
            self._can_rename = can_rename_folders(self._path)
        return self._can_rename

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        path = self._locate(checked_key(key))
        with self._edge("read", path):
            try:
                fd = open_file(path)
            except (FileNotFoundError, NotADirectoryError) as exc:
                raise NotFoundError(f"{path} does not exist") from exc
            with os.fdopen(fd, "rb") as file:
                file.seek(start)
                return file.read(-1 if end is None else max(0, end - start))

    def put(self, key: str, data: Buffer, *, create: bool = False) -> None:
        target, view = self._locate(checked_key(key)), as_bytes(data)
        with self._edge("write", target, view.nbytes):
            temp = self._temp(target)
            try:
                temp.write(view)
                self._publish(temp, target, create=create)
            except FileExistsError as exc:
                raise AlreadyExistsError(f"{target} exists already and was left as it is") from exc
            finally:
                temp.discard()

    def writer(self, key: str) -> LocalWriter:
        target = self._locate(checked_key(key))
        with self._edge("write", target):
            return LocalWriter(self, self._temp(target), target)

    def list(self, folder: str = "", *, recursive: bool = False) -> list[Entry]:
        top = self._locate(f"{checked_folder(folder)}/")
        with self._edge("list", top):
            return sorted(self._scan(top, f"{folder}/" if folder else "", recursive), key=lambda entry: entry.key)

    def stat(self, key: str) -> Entry | None:
        path = self._locate(checked_key(key))
        with self._edge("read", path):
            found = _lstat(path)
        if found is None or not stat.S_ISREG(found.st_mode):
            return None
        return Entry(key, found.st_size, found.st_mtime)

    def delete(self, keys: Iterable[str]) -> None:
        touched: set[Path] = set()
        for key in keys:
            checked_key(key.removesuffix("/"))
            path = self._locate(key)
            with self._edge("delete", path):
                if _remove(path, tree=key.endswith("/")):
                    touched.add(path.parent)
        changed = {self._prune(folder) for folder in sorted(touched, key=lambda path: len(path.parts), reverse=True)}
        for folder in changed:
            # One that a later prune took with it has nothing left to make durable.
            with self._edge("delete in", folder), suppress(FileNotFoundError):
                self._sync(folder)

    def rename(self, source: str, target: str) -> None:
        old, new = self._locate(f"{checked_key(source)}/"), self._locate(checked_key(target))
        with self._edge("rename", old):
            found = _lstat(old)
            if found is None or not stat.S_ISDIR(found.st_mode):
                raise NotFoundError(f"{old} is not there to be renamed to {new}")
            if os.path.lexists(new):  # a folder would go over an empty one without a word
                raise AlreadyExistsError(f"{new} exists already; {old} was not renamed")
            for folder, _, _ in os.walk(old, topdown=False):
                self._sync(Path(folder))
            self._make(new.parent)
            try:
                old.rename(new)
            except FileNotFoundError:
                # NFS asks again after a lost answer, and then finds that it has moved the folder already.
                if not new.is_dir() or os.path.lexists(old):
                    raise
            self._durable = {folder for folder in self._durable if not folder.is_relative_to(old)}
            self._sync(new.parent)
            self._sync(old.parent)

    def _publish(self, temp: TempFile, target: Path, *, create: bool = False) -> None:
        """Give a written file its name: first its bytes, then the name, then the folder that holds it."""
        if self._fsync:
            temp.sync()
        temp.close()
        if create:
            claim(temp.path, target)
        else:
            temp.path.replace(target)
        self._sync(target.parent)

    @contextmanager
    def _edge(self, doing: str, path: Path, need: int | None = None) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except OSError as exc:
            raise explain(exc, doing, path, need) from exc

    def _locate(self, key: str) -> Path:
        """The path of a checked key. Raises `StoreError` where a folder on the way is a symbolic
        link; with a "/" at the end, also where the last one is."""
        path = self._path
        *folders, last = key.split("/")
        for name in filter(None, folders):
            path = path / name
            if path.is_symlink():
                raise explain(OSError(errno.ELOOP, "symbolic link"), "use", path)
        return path / last

    def _make(self, folder: Path) -> None:
        """Make a folder with its parents, each entry durable. Below the root this is done once even
        for one that exists: whoever made it may not have got round to it yet."""
        if folder in self._durable or (not folder.is_relative_to(self._path) and folder.is_dir()):
            return
        if folder != self._path or not folder.is_dir():
            self._make(folder.parent)
            with suppress(FileExistsError):
                folder.mkdir()
            self._sync(folder.parent)
        self._durable.add(folder)

    def _temp(self, target: Path) -> TempFile:
        path = target.with_name(f"{_TEMP_START}{secrets.token_hex(8)}{_TEMP_END}")
        for _ in range(3):
            self._make(target.parent)
            with suppress(FileNotFoundError):
                return TempFile(path)
            self._durable.clear()  # the folder went since: another thread or process emptied it
        self._make(target.parent)
        return TempFile(path)

    def _sync(self, folder: Path) -> None:
        if self._fsync:
            sync_folder(folder)

    def _scan(self, folder: Path, prefix: str, recursive: bool) -> Iterator[Entry]:
        try:
            children = list(os.scandir(folder))
        except (FileNotFoundError, NotADirectoryError):
            return
        for child in children:
            key = prefix + child.name
            if child.is_dir(follow_symlinks=False):
                if recursive:
                    yield from self._scan(Path(child.path), f"{key}/", recursive)
                else:
                    yield Entry(key, is_folder=True)
            elif child.is_file(follow_symlinks=False) and not _is_temp(child.name):
                with suppress(FileNotFoundError):  # deleted since
                    found = child.stat(follow_symlinks=False)
                    yield Entry(key, found.st_size, found.st_mtime)

    def _prune(self, folder: Path) -> Path:
        """Remove empty folders upwards, but never the root; the first folder that stays."""
        while folder != self._path:
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass
            except OSError:  # not empty, or not ours to remove: it stays
                break
            self._durable.discard(folder)
            folder = folder.parent
        return folder


class LocalWriter:
    """A `Writer` of a file that has its name only after `commit`. Gone when dropped unended."""

    def __init__(self, store: LocalStore, temp: TempFile, target: Path) -> None:
        self._store, self._target = store, target
        self._temp: TempFile | None = temp
        self._size = 0

    def write(self, data: Buffer) -> None:
        view = as_bytes(data)
        with self._store._edge("write", self._target, self._size + view.nbytes):
            self._open().write(view)
        self._size += view.nbytes

    def commit(self) -> None:
        temp = self._open()
        try:
            with self._store._edge("write", self._target, self._size):
                self._store._publish(temp, self._target)
        finally:
            self.abort()

    def abort(self) -> None:
        temp, self._temp = self._temp, None
        if temp is not None:
            temp.discard()

    def _open(self) -> TempFile:
        if self._temp is None:
            raise StoreError(f"the writer of {self._target} has ended; begin a new one")
        return self._temp


def _is_temp(name: str) -> bool:
    return name.startswith(_TEMP_START) and name.endswith(_TEMP_END)


def _lstat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _remove(path: Path, *, tree: bool) -> bool:
    """Whether a file, or with `tree` a folder with everything below it, was there and is gone."""
    found = _lstat(path)
    if found is None or stat.S_ISDIR(found.st_mode) != tree:
        return False
    if not tree:
        path.unlink(missing_ok=True)
        return True
    for folder, folders, files in os.walk(path, topdown=False):
        for name in (*folders, *files):
            child = Path(folder, name)
            if name in files or child.is_symlink():
                child.unlink(missing_ok=True)
        try:
            Path(folder).rmdir()
        except OSError:
            # NFS keeps what another process has open under such a name until it is closed.
            if not all(child.name.startswith(".nfs") or child.is_dir() for child in Path(folder).iterdir()):
                raise
    return True
