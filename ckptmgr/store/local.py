"""How are bytes kept in a folder of this machine? Atomically, durably, and never through a symbolic link."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..errors import AlreadyExistsError, ConfigError, NotFoundError
from . import DRAFTS, Entry
from .arguments import as_bytes, checked_folder, checked_key
from .disk import NO_LINKS, TempFile, claim, edge, explain, open_file, sync_folder
from .folder_scan import folders_below, folders_in, scan
from .leftovers import temp_name
from .local_reader import LocalReader
from .local_writer import LocalWriter
from .mounts import can_rename_folders
from .removal import names_first, remove
from .spares import Spares, make_space

if TYPE_CHECKING:
    from typing_extensions import Buffer

_T = TypeVar("_T")
_DISK_TROUBLE = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_NO_LINK_HERE = NO_LINKS | {errno.EXDEV, errno.EMLINK}


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
        # Below it, paths are texts: each save asks for some fifty, and a Path takes ten times as long to make.
        self._top = str(self._path)
        self._in_drafts = os.path.join(self._top, *DRAFTS.split("/"), "")
        self._fsync = fsync
        self._durable: set[str] = set()  # folders whose own entries this process has seen to the disk
        self._can_rename: bool | None = None
        self.spares = Spares(self._path, is_wanted=fsync)  # else nobody knows what a power cut brings back

    def __repr__(self) -> str:
        return f"LocalStore({self._top!r})" if self._fsync else f"LocalStore({self._top!r}, fsync=False)"

    def __reduce__(self) -> tuple[type[LocalStore], tuple[Path, bool]]:
        return LocalStore, (self._path, self._fsync)

    @property
    def url(self) -> str:
        return self._top

    @property
    def path(self) -> Path | None:
        return self._path

    @property
    def can_rename(self) -> bool:
        """False on FUSE mounts, and wherever renaming a folder fails when tried. Tried once. Raises `StoreError` where
        the disk is full or failing."""
        if self._can_rename is None:
            with edge("write", self._path):
                self._can_rename = can_rename_folders(self._path)
        return self._can_rename

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        path = self._locate(checked_key(key))
        with edge("read", path), os.fdopen(_open(path), "rb") as file:
            file.seek(start)
            return file.read(-1 if end is None else max(0, end - start))

    def put(self, key: str, data: Buffer, *, create: bool = False) -> None:
        target, view = self._locate(checked_key(key)), as_bytes(data)
        with edge("write", target, view.nbytes):
            temp = self._temp(target, is_claim=create)
            try:
                temp.write(view)
                self._publish(temp, target, create=create)
            except FileExistsError as exc:
                raise AlreadyExistsError(f"{target} exists already and was left as it is") from exc
            finally:
                temp.discard()

    def reader(self, key: str, *, by_many: bool = False) -> LocalReader:
        path = self._locate(checked_key(key))
        with edge("read", path):
            return LocalReader(_open(path), path, by_many=by_many)

    def writer(self, key: str, size: int | None = None) -> LocalWriter:
        target = self._locate(checked_key(key))
        with edge("write", target, size):
            try:
                return self._writer(target, size)
            except OSError as exc:
                # A checkpoint that was just deleted may still be on its way out, or be a spare.
                if exc.errno not in (errno.ENOSPC, errno.EDQUOT) or not make_space():
                    raise
            return self._writer(target, size)

    def _writer(self, target: str, size: int | None) -> LocalWriter:
        temp = self._temp(target, size=size or 0)
        if size is not None and self._is_in_draft(temp.path):
            draft = temp.path[len(self._in_drafts) :].partition(os.sep)[0]
            self.spares.wrote(temp.fd, size, draft, is_new=temp.is_new)
        return LocalWriter(temp, target, size, self._publish, is_synced=self._fsync)

    def copy(self, source: str, target: str) -> bool:
        """A hard link: both names are one file, which goes with the last of them."""
        old, new = self._locate(checked_key(source)), self._locate(checked_key(target))
        with edge("copy", old):
            with os.fdopen(_open(old), "rb") as file:
                links = os.fstat(file.fileno()).st_nlink
                try:
                    self._in_folder(_parent(new), lambda: os.link(old, new))
                except FileExistsError as exc:
                    # NFS asks again after a lost answer, and then finds the link that it made itself.
                    if os.fstat(file.fileno()).st_nlink == links or not os.path.samefile(new, old):
                        raise AlreadyExistsError(f"{new} exists already and was left as it is") from exc
                except OSError as exc:
                    if exc.errno not in _NO_LINK_HERE:
                        raise
                    self._prune(_parent(new))
                    return False
            self._sync(_parent(new))
        return True

    def folders(self, folder: str = "") -> list[str]:  # no entries are made, which takes as long as the look
        top = self._locate(f"{checked_folder(folder)}/")
        with edge("list", top):
            return sorted(folders_in(top))

    def list(self, folder: str = "", *, recursive: bool = False) -> list[Entry]:
        top = self._locate(f"{checked_folder(folder)}/")
        with edge("list", top):
            found = scan(top, f"{folder}/" if folder else "", recursive)
        found.sort(key=itemgetter(0))
        return found

    def stat(self, key: str) -> Entry | None:
        name = checked_key(key.removesuffix("/"))
        path = self._locate(key)
        with edge("read", path):
            found = _lstat(path)
        if found is None:
            return None
        if key.endswith("/"):
            return Entry(name, is_folder=True) if stat.S_ISDIR(found.st_mode) else None
        return Entry(name, found.st_size, found.st_mtime) if stat.S_ISREG(found.st_mode) else None

    def delete(self, keys: Iterable[str]) -> None:
        with names_first():
            self._delete(keys)

    def _delete(self, keys: Iterable[str]) -> None:
        touched: set[str] = set()
        changed: set[str] = set()
        for key in keys:
            checked_key(key.removesuffix("/"))
            path = self._locate(key)
            with edge("delete", path):
                if not key.endswith("/") and self.spares.keep(path):
                    changed.add(self.spares.folder)
                else:
                    remove(path, tree=key.endswith("/"))
                if _is_folder(_parent(path)):  # also where nothing was: an earlier attempt may not have come so far
                    touched.add(_parent(path))
        for folder in sorted(touched, key=lambda path: path.count(os.sep), reverse=True):
            with edge("delete", folder):
                changed.add(self._prune(folder))
        for folder in changed:
            # One that a later prune took with it has nothing left to make durable.
            with edge("delete in", folder), suppress(FileNotFoundError):
                self._sync(folder)

    def rename(self, source: str, target: str) -> None:
        old, new = self._locate(f"{checked_key(source)}/"), self._locate(checked_key(target))
        with edge("rename", old):
            found = _lstat(old)
            if found is None or not stat.S_ISDIR(found.st_mode):
                raise NotFoundError(f"{old} is not there to be renamed to {new}")
            if os.path.lexists(new):  # a folder would go over an empty one without a word
                raise AlreadyExistsError(f"{new} exists already; {old} was not renamed")
            for folder, _ in reversed(folders_below(old)) if self._fsync else ():
                sync_folder(folder)
            self._make(_parent(new))
            try:
                os.rename(old, new)
            except OSError:
                # NFS asks again after a lost answer, and then finds that it has moved the folder already.
                if not _is_folder(new) or os.path.lexists(old):
                    raise
            self._durable = {folder for folder in self._durable if not f"{folder}{os.sep}".startswith(old + os.sep)}
            try:
                self._sync(_parent(new))
                self._sync(_parent(old))
            except OSError:
                with suppress(OSError):  # what may not be durable shall not be seen either
                    os.rename(new, old)
                raise

    def _publish(self, temp: TempFile, target: str, *, create: bool = False) -> None:
        """Give a written file its name: first its bytes, then the name, then the folder that holds it."""
        if self._fsync:
            temp.sync()
        if not create:
            temp.move(target)
            self._sync(_parent(target))
            return
        temp.close()
        claim(temp.path, target)
        try:
            self._sync(_parent(target))
        except OSError:
            with suppress(OSError):  # what may not be durable shall not be seen either
                os.unlink(target)
            raise

    def _locate(self, key: str) -> str:
        """The path of a checked key. Raises `StoreError` where a folder on the way is a symbolic
        link; with a "/" at the end, also where the last one is."""
        folder, _, last = key.rpartition("/")
        path = os.path.join(self._top, folder)
        if path in self._durable and self._is_in_draft(path):  # made by this save, and asked for a dozen times
            return os.path.join(path, last) if last else path
        path = self._top
        *folders, last = key.split("/")
        for name in filter(None, folders):
            path = os.path.join(path, name)
            if os.path.islink(path):
                raise explain(OSError(errno.ELOOP, "symbolic link"), "use", path)
        return os.path.join(path, last) if last else path

    def _make(self, folder: str) -> None:
        """Make a folder with its parents, each entry durable. Below the root this is done once even
        for one that exists: whoever made it may not have got round to it yet."""
        if folder in self._durable or (not folder.startswith(self._top) and _is_folder(folder)):
            return
        if folder != self._top or not _is_folder(folder):
            self._make(_parent(folder))
            is_new = False
            with suppress(FileExistsError):
                os.mkdir(folder)
                is_new = True
            try:
                if not self._is_in_draft(folder):
                    self._sync(_parent(folder))
            except OSError:
                if is_new:  # to be made anew: a second fsync would not look at this one's entry again
                    with suppress(OSError):
                        os.rmdir(folder)
                raise
        self._durable.add(folder)

    def _temp(self, target: str, *, is_claim: bool = False, size: int = 0) -> TempFile:
        """A new file that is to become `target`. In a draft it has that name at once, but when it is to `claim` it,
        and may be a spare of about this `size`."""
        folder = _parent(target)

        def begin() -> TempFile:
            if not is_claim and self._is_in_draft(folder):
                if (fd := self.spares.take(target, size)) is not None:
                    return TempFile(target, fd)
                with suppress(FileExistsError):
                    return TempFile(target)
            return TempFile(os.path.join(folder, temp_name()))

        return self._in_folder(folder, begin)

    def _in_folder(self, folder: str, act: Callable[[], _T]) -> _T:
        """Make the folder and act in it."""
        for _ in range(3):
            with suppress(FileNotFoundError):
                self._make(folder)
                return act()
            self._durable.clear()  # the folder, or one that it is in, went since: another thread or process emptied it
        self._make(folder)
        return act()

    def _sync(self, folder: str) -> None:
        if self._fsync and not self._is_in_draft(folder):  # what is there, the rename of the draft makes durable
            sync_folder(folder)

    def _is_in_draft(self, folder: str) -> bool:
        """Whether this is the folder of a draft, or one in it: nobody looks for a file there."""
        return folder.startswith(self._in_drafts)

    def _prune(self, folder: str) -> str:
        """Remove empty folders upwards, but never the root; the first folder that stays."""
        while folder != self._top:
            try:
                os.rmdir(folder)
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError as exc:
                if exc.errno in _DISK_TROUBLE:
                    raise
                break  # not empty, or not ours to remove: it stays
            self._durable.discard(folder)
            folder = _parent(folder)
        return folder


_parent = os.path.dirname


def _open(path: str) -> int:
    try:
        return open_file(path)
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise NotFoundError(f"{path} does not exist") from exc


def _lstat(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _is_folder(path: str) -> bool:
    """Whether there is a folder, or a link to one. Unlike `os.path.isdir`, raises what a failing disk says."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
