"""What is a checkpoint? The record whose presence makes a folder one.

Pure: no I/O, no clock, no environment, no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import xxhash

from .errors import DamagedError, FormatVersionError
from .untrusted import moment, nonce, parse, whole

FORMAT_VERSION = 2
MANIFEST_NAME = "manifest.json"
DIGEST = "xxh3_128"
PIECE_SIZE = 64 << 20  # bytes; each piece of a file has a digest of its own
MAX_MANIFEST_SIZE = 64 << 20  # bytes; more is not a manifest

_FILE_PART = re.compile(r"[A-Za-z0-9._+=@%~-]+")
_DIGEST = re.compile(r"[0-9a-f]{32}")


def digest(data: Any) -> str:
    """The xxh3_128 hex digest of a buffer (https://xxhash.com)."""
    return xxhash.xxh3_128_hexdigest(data)


def pieces(size: int) -> list[tuple[int, int]]:
    """Where the pieces of a file of `size` bytes begin and end; an empty file is one empty piece."""
    return [(begin, min(begin + PIECE_SIZE, size)) for begin in range(0, max(size, 1), PIECE_SIZE)]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint: name relative to its folder, size in bytes, digests.

    `pieces` are the digests of consecutive pieces of `PIECE_SIZE` bytes; empty for a file of at
    most one piece, whose digest is `digest`. For a file of more, `digest` is that of its pieces'
    digests, one after the other (in format version 1: of all its bytes). `shared` says that its
    bytes were not written but are those of a file of an earlier checkpoint.
    """

    name: str
    size: int
    digest: str
    pieces: tuple[str, ...] = ()
    shared: bool = False

    @classmethod
    def of(cls, name: str, size: int, pieces: Sequence[bytes], *, shared: bool = False) -> FileEntry:
        """A file with these digests of its pieces."""
        if len(pieces) == 1:
            return cls(name, size, pieces[0].hex(), shared=shared)
        return cls(name, size, digest(b"".join(pieces)), tuple(piece.hex() for piece in pieces), shared)

    @property
    def digests(self) -> tuple[bytes, ...]:
        """The digest of each piece."""
        return tuple(map(bytes.fromhex, self.pieces or (self.digest,)))


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything that lists and retention need to know of a checkpoint. No secrets.

    `files` are named relative to the checkpoint's folder; `attempt` numbers the processes that
    wrote to the run, `nonce` the save; `parent` is the step this one was trained on from; `version`
    is that of the format it was read from, in which it is written again.
    """

    step: int
    run: str
    attempt: int
    nonce: str
    time: datetime
    format: str
    files: tuple[FileEntry, ...]
    epoch: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    parent: int | None = None
    world_size: int = 1
    tags: tuple[str, ...] = ()
    healthy: bool = True
    versions: Mapping[str, str] = field(default_factory=dict)
    config: str = ""
    version: int = FORMAT_VERSION

    @property
    def size(self) -> int:
        """Bytes of all files, without the manifest."""
        return sum(file.size for file in self.files)

    @property
    def written(self) -> int:
        """Bytes of the files that this save itself wrote."""
        return sum(file.size for file in self.files if not file.shared)

    def file(self, name: str) -> FileEntry | None:
        return next((file for file in self.files if file.name == name), None)

    def to_json(self) -> bytes:
        """The manifest's bytes. The last key is the digest of everything before it."""
        body = {
            "format_version": self.version,
            "step": self.step,
            "epoch": self.epoch,
            # JSON has no NaN; a text keeps it readable by every parser.
            "metrics": {k: v if v - v == 0 else repr(float(v)) for k, v in self.metrics.items()},
            "time": self.time.isoformat(),
            "run": self.run,
            "attempt": self.attempt,
            "nonce": self.nonce,
            "parent": self.parent,
            "world_size": self.world_size,
            "format": self.format,
            "digest_algorithm": DIGEST,
            "piece_size": PIECE_SIZE,
            "files": [_file_to_json(file) for file in self.files],
            "tags": list(self.tags),
            "healthy": self.healthy,
            "versions": dict(self.versions),
            "config": self.config,
        }
        body["digest"] = digest(_canonical(body))
        return (json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Read a manifest back.

        Raises `FormatVersionError` when it is newer than this version reads, and `DamagedError`
        when it is not what `to_json` wrote: torn, changed, or naming files outside its folder.
        """
        if len(data) > MAX_MANIFEST_SIZE:
            raise DamagedError(f"manifest is {len(data):,} bytes, more than any manifest ({MAX_MANIFEST_SIZE:,})")
        try:
            body = parse(data)
        except ValueError as exc:
            raise DamagedError(f"manifest is not JSON: {exc}") from exc
        if not isinstance(body, dict) or type(version := body.get("format_version")) is not int or version < 1:
            raise DamagedError("manifest has no format_version: not written by ckptmgr, or damaged")
        if version > FORMAT_VERSION:
            raise FormatVersionError(
                f"checkpoint has format version {version}; this ckptmgr reads up to {FORMAT_VERSION}. "
                "Install a newer ckptmgr to read it"
            )
        expected = body.pop("digest", None)
        try:
            if digest(_canonical(body)) != expected:
                raise DamagedError("manifest's digest does not match its content")
            if body["digest_algorithm"] != DIGEST or body["piece_size"] != PIECE_SIZE:
                raise FormatVersionError(
                    f"checkpoint uses digests {body['digest_algorithm']!r} over pieces of {body['piece_size']} bytes; "
                    f"this ckptmgr knows {DIGEST!r} over {PIECE_SIZE}. Install a newer ckptmgr to read it"
                )
            return cls(
                step=whole(body["step"]),
                epoch=None if body["epoch"] is None else whole(body["epoch"]),
                metrics={str(k): float(v) for k, v in body["metrics"].items()},
                time=moment(body["time"]),
                run=str(body["run"]),
                attempt=whole(body["attempt"]),
                nonce=nonce(body["nonce"]),
                parent=None if body["parent"] is None else whole(body["parent"]),
                world_size=whole(body["world_size"]),
                format=str(body["format"]),
                files=_files_from_json(body["files"], version),
                tags=tuple(map(str, body["tags"])),
                healthy=bool(body["healthy"]),
                versions={str(k): str(v) for k, v in body["versions"].items()},
                config=str(body["config"]),
                version=version,
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as exc:
            raise DamagedError(f"manifest does not parse: {exc!r}") from exc


def _file_to_json(file: FileEntry) -> dict[str, Any]:
    body: dict[str, Any] = {"name": file.name, "size": file.size, "digest": file.digest}
    if file.pieces:
        body["pieces"] = list(file.pieces)
    if file.shared:
        body["shared"] = True
    return body


def _files_from_json(rows: Any, version: int) -> tuple[FileEntry, ...]:
    files = tuple(_file_from_json(row, version) for row in rows)
    # What is named here is deleted with the checkpoint, and only a deletion's own step takes a manifest away.
    if len(names := {file.name for file in files}) < len(files) or any(
        name.rpartition("/")[2] == MANIFEST_NAME for name in names
    ):
        raise DamagedError(f"manifest names a file twice, or a {MANIFEST_NAME}")
    return files


def _file_from_json(body: Any, version: int) -> FileEntry:
    odd = [text for text in (body["digest"], *body.get("pieces", ())) if not _DIGEST.fullmatch(text)]
    if odd:
        raise DamagedError(f"manifest has {odd[0]!r:.60} for a digest of {body['name']!r}")
    entry = FileEntry(
        checked_name(body["name"]),
        whole(body["size"]),
        str(body["digest"]),
        tuple(map(str, body.get("pieces", ()))),
        body.get("shared") is True,
    )
    count = -(-entry.size // PIECE_SIZE)
    if len(entry.pieces) != (count if count > 1 else 0):
        raise DamagedError(f"manifest has {len(entry.pieces)} digests for the {count} pieces of {entry.name!r}")
    if version > 1 and entry.pieces and digest(b"".join(entry.digests)) != entry.digest:
        raise DamagedError(f"manifest's digest of {entry.name!r} is not that of its pieces")
    return entry


def _canonical(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def checked_name(name: Any) -> str:
    """A file name from a manifest, refused with `DamagedError` when it could lead out of its folder."""
    parts = name.split("/") if isinstance(name, str) else []
    if not parts or not all(_FILE_PART.fullmatch(part) and part.strip(".") for part in parts):
        raise DamagedError(f"manifest names a file {name!r:.200}, which is not a plain relative name")
    return str(name)


@dataclass(frozen=True, slots=True)
class Pin:
    """Keeps the checkpoint with this folder and nonce from every keep rule until `expires` (None: for ever). One that
    `has_ended` when it was read has no tag any more, whatever `tag` was."""

    name: str
    nonce: str
    step: int
    tag: str | None = None
    expires: datetime | None = None
    has_ended: bool = False

    def holds(self, now: datetime) -> bool:
        return self.expires is None or now < self.expires


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A committed checkpoint as a listing sees it.

    `name` is its folder below the root; `damaged` says why it can't be trusted, or is None;
    `manifest` is None only where the manifest itself can't be read: only then `attempt` counts,
    which like the step is what the folder's name and its neighbours let guess.
    """

    name: str
    step: int
    manifest: Manifest | None
    damaged: str | None = None
    pins: tuple[Pin, ...] = ()
    attempt: int = 0

    @property
    def order(self) -> tuple[int, int, float]:
        """Newest has the highest. A later attempt comes after any step of an earlier one: it went
        on from an older step on purpose, or the earlier one was fenced off."""
        if self.manifest is None:
            return (self.attempt, self.step, 0.0)
        return (self.manifest.attempt, self.step, self.manifest.time.timestamp())

    @property
    def tags(self) -> tuple[str, ...]:
        own = self.manifest.tags if self.manifest else ()
        pinned = (pin.tag for pin in self.pins if pin.tag is not None and not pin.has_ended)
        return own + tuple(tag for tag in pinned if tag not in own)
