"""How does a snapshot become files, and files a stored state? The `Format` protocol."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, BinaryIO, Protocol

from ..errors import FormatVersionError
from ..manifest import FileEntry
from ..state.snapshot import Snapshot, StoredState

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["FileSink", "FileSource", "Format", "SinkFile", "open_format"]


class SinkFile(Protocol):
    """A file being written into a draft. Digests are computed on the bytes handed to `write`."""

    def write(self, data: Buffer) -> int:
        """Take all the bytes; their memory may change or go as soon as this returns."""


class FileSink(Protocol):
    """Where a format puts its files: a draft of the repository."""

    def create(self, name: str) -> AbstractContextManager[SinkFile]:
        """A new file; complete when the block ends, gone when the block raises."""


class FileSource(Protocol):
    """Where a format finds its files: an opened checkpoint."""

    @property
    def files(self) -> Mapping[str, FileEntry]:
        """The manifest's files by name."""

    def read(self, name: str) -> bytes:
        """A small file whole, digest checked. Raises `DamagedError`."""

    def open(self, name: str) -> BinaryIO:
        """A seekable file with `read` and `readinto`; every byte it gives is digest-checked first.
        Raises `DamagedError`."""


class Format(Protocol):
    """Snapshot <-> files. Says nothing of manifests, digests or stores."""

    @property
    def name(self) -> str: ...

    def write(self, snapshot: Snapshot, sink: FileSink) -> None: ...

    def open(self, source: FileSource) -> StoredState:
        """Read everything but the tensors' bytes. Raises `DamagedError` for what does not parse."""


def open_format(name: str, *, split_size_bytes: int | None = None) -> Format:
    """The format with this name; `split_size_bytes` begins a new tensor file above that size.

    Raises `FormatVersionError` for a name that this version does not know.
    """
    from .safetensors_file import SafetensorsFormat
    from .torch_file import TorchFormat

    if name == "safetensors":
        return SafetensorsFormat(split_size_bytes)
    if name == "torch":
        return TorchFormat()
    raise FormatVersionError(
        f"format {name!r} is not known to this version of ckptmgr (it knows safetensors and torch); install a newer one"
    )
