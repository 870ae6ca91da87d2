"""How does a snapshot become files, and files a stored state? The `Format` protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from importlib import import_module
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from ..errors import ConfigError, FormatVersionError
from ..manifest import FileEntry
from ..staging import Held, Live, Region
from ..state.shards import is_sharded
from ..state.snapshot import FlatSnapshot, Snapshot, StoredState, flatten, map_leaves
from ..transfer import Body, Segment

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

    def write(self, bodies: Mapping[str, Body]) -> None:
        """Whole files by name, as fast as the store takes them; complete at return, or with the draft. Blocks."""


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

    def scatter(self, segments: Mapping[str, Sequence[Segment]]) -> None:
        """Read segments of files, in order of their begin and without overlap, straight to where they
        go, digest-checked in the same pass: targets may be half filled when it raises `DamagedError`.
        Blocks; several threads read, in bounded memory."""


class Plan(Protocol):
    """How states of one shape become files, known before a byte is moved."""

    @property
    def regions(self) -> Mapping[str, Region]:
        """Where tensors lie in runs of bytes: what is to be held when `write` is called."""

    def write(self, flat: FlatSnapshot, held: Held, sink: FileSink) -> None:
        """Write every file; `flat` has the plan's shape, and `held` its tensors. Blocks. Raises what
        the sink raises."""


class Format(Protocol):
    """Snapshot <-> files. Says nothing of manifests, digests or stores."""

    @property
    def name(self) -> str: ...

    def plan(self, flat: FlatSnapshot) -> Plan:
        """The plan for a snapshot; the last one again for a snapshot of the same `shape`. Moves nothing.
        Raises `StateMismatchError` for a meta tensor."""

    def write(self, snapshot: Snapshot, sink: FileSink) -> None:
        """Plan a snapshot and write it from where its tensors are."""

    def open(self, source: FileSource) -> StoredState:
        """Read everything but the tensors' bytes. Raises `DamagedError` for what does not parse."""


def write_live(format: Format, snapshot: Snapshot, sink: FileSink) -> None:
    """What `Format.write` does."""
    flat = flatten(snapshot)
    plan = format.plan(flat)
    plan.write(flat, Live(plan.regions, flat), sink)


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
    if name == "dcp":  # by its name only: it is built upon this package, and takes long to import
        sharded: Format = import_module("ckptmgr.sharded.state").ShardedFormat(split_size_bytes)
        return sharded
    raise FormatVersionError(
        f"format {name!r} is not known to this version of ckptmgr (it knows safetensors, torch and dcp); install a "
        "newer one"
    )


def refuse_sharded(flat: FlatSnapshot, format_name: str) -> None:
    """Raises `ConfigError` naming the first sharded tensor, which only format `dcp` writes."""
    if not flat.has_sharded:
        return

    def look(leaf: Any, path: tuple[str, ...]) -> None:
        if isinstance(leaf, dict) and is_sharded(flat.tensors[leaf["$tensor"]]):
            raise ConfigError(
                f"{'.'.join(path)} is sharded (a DTensor), and format {format_name} writes whole tensors; set "
                "format: dcp, which writes each rank's part"
            )

    for entry, tree in flat.entries.items():
        map_leaves(tree, look, (entry,))
