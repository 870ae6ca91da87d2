"""How is a single file written and read where the checkpoints live? By any fsspec URL or path, without a manager.

`torch.save` and `torch.load` through `writer` and `reader`, safetensors through `save_file`,
`load_file` and `safe_open`. A write is all or nothing; a read fetches only what it needs. Nothing
here keeps digests or old versions: that is what `CheckpointManager` is for.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from .errors import CheckpointError, ConfigError, DamagedError, NotFoundError, StoreError
from .manifest import FileEntry
from .memory import enough
from .ranged import RangedFile
from .scatter import Wanted, scatter
from .store import Reader, Store, Writer, open_store
from .store.arguments import as_bytes
from .store.local_reader import LocalReader
from .transfer import Segment, write_files

if TYPE_CHECKING:
    import torch

    from .formats.safetensors_single import SafetensorsReader

__all__ = ["load_file", "reader", "safe_open", "save_file", "writer"]

# A FIFO in a file's place must not block us.
_OPEN_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
_BLOCK = 8 << 20  # bytes; small writes are gathered up to this, small reads read this far ahead
_LARGEST_READ = 64 << 20  # bytes asked of a remote store at a time


@contextmanager
def writer(url: str | Path, options: Mapping[str, Any] | None = None) -> Iterator[BinaryIO]:
    """A file to write the object at `url`: `with writer(url) as f: torch.save(state, f)`.

    The object appears whole and durable when the block ends, replacing one of that name; when the
    block raises, nothing of it is or becomes visible. Writing and leaving the block may block.
    Raises `ConfigError` for the URL and `StoreError` for what the store did, also where `torch.save`
    hides it behind an error of its own. `options` go to the fsspec filesystem.
    """
    store, key = _locate(url, options)
    upload = store.writer(key)
    file = _UploadFile(upload)
    try:
        yield cast(BinaryIO, file)
        file.finish()
        upload.commit()
    except BaseException as exc:
        upload.abort()
        if file.error is not None and file.error is not exc:
            raise file.error from exc
        raise
    finally:
        file.close()


@contextmanager
def reader(url: str | Path, options: Mapping[str, Any] | None = None) -> Iterator[BinaryIO]:
    """The object at `url` as a seekable file: `with reader(url) as f: state = torch.load(f)`.

    Small reads read 8 MiB ahead, large ones go straight to their destination; a local file is
    opened as it is. Reads may block. Raises `NotFoundError` when there is no such object, and
    `StoreError`.
    """
    store, key = _locate(url, options)
    with io.BufferedReader(_open_raw(store, key)[0], _BLOCK) as file:
        yield cast(BinaryIO, file)


def save_file(
    tensors: Mapping[str, torch.Tensor],
    url: str | Path,
    metadata: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Write tensors to a safetensors file at `url`, whole or not at all; blocks.

    Takes what the official `save_file` takes, and non-contiguous tensors besides. Tensors that
    share memory are refused as there: the file can't say that they are one, so a model loaded from
    it would come back untied and larger than it was. Raises `ConfigError` that names them (or the
    sparse, quantized or otherwise unfit tensor, or what is no mapping, such as a module), and `StoreError`.
    """
    from .formats.safetensors_single import body

    if not isinstance(tensors, Mapping):
        raise ConfigError(
            f"save_file got a {type(tensors).__name__}; give a dict of tensors, such as model.state_dict()"
        )
    store, key = _locate(url, options)
    write_files({key: body(tensors, metadata)}, store.writer)


def load_file(
    url: str | Path, device: str | torch.device = "cpu", options: Mapping[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file at `url`, by key; blocks.

    Raises `NotFoundError`, `DamagedError` for what is not a safetensors file, and `StoreError`.
    """
    return load_chosen(url, lambda keys: keys, device, options)


def load_chosen(
    url: str | Path,
    choose: Callable[[Sequence[str]], Iterable[str]],
    device: str | torch.device = "cpu",
    options: Mapping[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """As `load_file`, of those keys that `choose` takes of all."""
    from .formats.safetensors_single import SafetensorsReader

    store, key = _locate(url, options)
    raw, size = _open_raw(store, key)

    def fetch(segments: Sequence[Segment]) -> None:
        wanted = Wanted(FileEntry(key, size, ""), _where(store, key), lambda: _reader(store, key, raw), segments)
        try:
            scatter([wanted], digests=False, is_remote=store.path is None)
        except DamagedError as exc:
            if isinstance(exc.__cause__, NotFoundError):
                raise NotFoundError(f"{_where(store, key)} was deleted while it was read") from exc
            raise

    with raw, enough(f"load {_where(store, key)}"):
        opened = SafetensorsReader(cast(BinaryIO, raw), size, _where(store, key), device)
        return opened.get_tensors(choose(opened.offset_keys()), fetch)


@contextmanager
def safe_open(
    url: str | Path, device: str | torch.device = "cpu", options: Mapping[str, Any] | None = None
) -> Iterator[SafetensorsReader]:
    """A safetensors file at `url`, of which only what is asked for is read: the header now, then the
    bytes of each tensor or of the rows of a slice.

    `with safe_open(url) as f: f.keys(); f.get_tensor("w"); f.get_slice("w")[10:20]`. Raises
    `NotFoundError`, `DamagedError` for what is not a safetensors file, and `StoreError`.
    """
    from .formats.safetensors_single import SafetensorsReader

    store, key = _locate(url, options)
    raw, size = _open_raw(store, key)
    with raw:
        yield SafetensorsReader(cast(BinaryIO, raw), size, _where(store, key), device)


def _locate(url: str | Path, options: Mapping[str, Any] | None) -> tuple[Store, str]:
    """The store of the folder that holds the object, and the object's key there."""
    text = str(url)
    protocol, separator, rest = text.rpartition("://") if isinstance(url, str) else ("", "", text)
    folder, slash, name = rest.rpartition("/")
    if name in ("", ".", ".."):
        raise ConfigError(f"{_without_secrets(text)} names a folder; give the URL of a file in it")
    root = f"{protocol}{separator}{folder or slash}" or "."
    return open_store(root, dict(options or {})), name


def _without_secrets(url: str) -> str:
    before, at, after = url.rpartition("@")
    return f"{before.partition('://')[0]}://…@{after}" if at and "://" in before else url


def _where(store: Store, key: str) -> str:
    return f"{store.url.rstrip('/')}/{key}"


def _open_raw(store: Store, key: str) -> tuple[io.RawIOBase, int]:
    """The object unbuffered, and its size in bytes."""
    if store.path is not None:
        return _open_local(store.path / key)
    entry = store.stat(key)
    if entry is None:
        raise NotFoundError(f"there is no file {_where(store, key)}")
    return _RangeFile(store, key, entry.size), entry.size


def _reader(store: Store, key: str, opened: io.RawIOBase) -> Reader:
    if store.path is None:
        return store.reader(key)
    return LocalReader(os.dup(opened.fileno()), str((store.path / key).resolve()))  # whatever has the name by now


def _open_local(path: Path) -> tuple[io.RawIOBase, int]:
    """Unlike a store, this follows symbolic links: the file is the user's own."""
    try:
        fd = os.open(path, os.O_RDONLY | _OPEN_FLAGS)
        file = os.fdopen(fd, "rb", buffering=0)
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            file.close()
            raise StoreError(f"can't open {path}: it is no plain file", errno.EINVAL)
        return file, found.st_size
    except FileNotFoundError as exc:
        raise NotFoundError(f"there is no file {path}") from exc
    except StoreError:
        raise
    except OSError as exc:
        raise StoreError(f"can't open {path}: {exc.strerror}", exc.errno) from exc


class _UploadFile(io.RawIOBase):
    """A write-only file over a store's writer. Keeps the first error, for those who hide it."""

    def __init__(self, upload: Writer) -> None:
        self._upload = upload
        self._pending = bytearray()
        self._position = 0
        self.error: CheckpointError | None = None

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def write(self, data: Any) -> int:
        if self.closed:
            raise ValueError("write to a closed file")
        view = as_bytes(data)
        if len(self._pending) + len(view) > _BLOCK:
            self._send_pending()
        if len(view) > _BLOCK:
            self._send(view)
        else:
            self._pending += view
        self._position += len(view)
        return len(view)

    def finish(self) -> None:
        """Send what is still here, or raise the error of an earlier write that the caller ignored."""
        if self.error is not None:
            raise self.error
        self._send_pending()

    def _send_pending(self) -> None:
        if self._pending:
            data, self._pending = self._pending, bytearray()
            self._send(memoryview(data))

    def _send(self, view: memoryview) -> None:
        try:
            self._upload.write(view)
        except CheckpointError as exc:
            self.error = self.error or exc
            raise


class _RangeFile(RangedFile):
    """A file over ranges of a remote object."""

    def __init__(self, store: Store, key: str, size: int) -> None:
        super().__init__(size)
        self._store, self._key = store, key

    def readinto(self, buffer: Any) -> int:
        if self.closed:
            raise ValueError("read of a closed file")
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._size - self._position, _LARGEST_READ))
        if count:
            data = self._store.get(self._key, self._position, self._position + count)
            if len(data) != count:
                raise StoreError(f"{_where(self._store, self._key)} changed while it was read; read it again")
            view[:count] = data
            self._position += count
        return count
