"""What stands beside the tensors? `state.json`, random generators and pickled objects, alike in every format."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO, cast

import torch

from ..errors import CheckpointError, DamagedError, FormatVersionError
from ..state.codec import from_json, to_json
from ..state.snapshot import Snapshot, StoredTensor, Tree, map_leaves
from . import FileSink, FileSource, SinkFile

STATE_NAME = "state.json"
OBJECTS_NAME = "objects.pt"
RNG_NAME = "ranks/rank-00000.json"
VERSION = 1
_MAX_JSON_SIZE = 1 << 30  # bytes
_MAX_STEM = 100  # characters; a file name has at most 255 on most file systems
_RESERVED = ("objects", "tensors")  # objects.pt and tensors.pt are files of our own


def file_stems(entries: Iterable[str]) -> dict[str, str]:
    """A file name without its ending for each entry: plain characters, distinct in any case."""
    stems: dict[str, str] = {}
    taken = set(_RESERVED)
    for entry in entries:
        escaped = re.sub(r"[^A-Za-z0-9._+=@~-]", _percent, entry) or "%"
        if len(escaped) > _MAX_STEM:
            escaped = f"{escaped[:64]}~{hashlib.sha256(entry.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"
        if re.search(r"-\d{5}-of-\d{5}$", escaped):  # would look like a piece of a split file
            escaped += "~"
        stem, count = escaped, 1
        while stem.casefold() in taken:
            count += 1
            stem = f"{escaped}~{count}"
        taken.add(stem.casefold())
        stems[entry] = stem
    return stems


def _percent(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogatepass"))


def write_state(sink: FileSink, format_name: str, snapshot: Snapshot, body: Mapping[str, Any]) -> None:
    """Write `state.json` with what the format adds in `body`, and the files of objects and generators."""
    if snapshot.objects is not None:
        with sink.create(OBJECTS_NAME) as file:
            file.write(snapshot.objects)
    if snapshot.rng is not None:
        _write_json(sink, RNG_NAME, {"format_version": VERSION, "rng": to_json(snapshot.rng)})
    _write_json(sink, STATE_NAME, {"format_version": VERSION, "format": format_name, "notes": snapshot.notes, **body})


def _write_json(sink: FileSink, name: str, body: Mapping[str, Any]) -> None:
    text = json.dumps(body, separators=(",", ":"), allow_nan=False) + "\n"
    with sink.create(name) as file:
        file.write(text.encode())


def read_json(source: FileSource, name: str, keys: Mapping[str, type]) -> dict[str, Any]:
    """A JSON file that has at least these keys with values of these types.

    Raises `DamagedError`, and `FormatVersionError` when a newer ckptmgr wrote it.
    """
    if name not in source.files:
        raise DamagedError(f"checkpoint has no {name}")
    if source.files[name].size > _MAX_JSON_SIZE:
        raise DamagedError(f"{name} is {source.files[name].size:,} bytes, more than any {name}")
    try:
        body = json.loads(source.read(name))
    except (ValueError, RecursionError) as exc:
        raise DamagedError(f"{name} is not JSON: {exc}") from exc
    if not isinstance(body, dict) or not isinstance(version := body.get("format_version"), int):
        raise DamagedError(f"{name} has no format_version")
    if version > VERSION:
        raise FormatVersionError(
            f"{name} has version {version}; this ckptmgr reads up to {VERSION}. Install a newer ckptmgr to read it"
        )
    for key, kind in keys.items():
        if not isinstance(body.get(key), kind):
            raise DamagedError(f"{name} has no {key}")
    return body


def read_rng(source: FileSource) -> Tree:
    """The tree of random generators, or None when none was saved. Raises `DamagedError`."""
    if RNG_NAME not in source.files:
        return None
    body = read_json(source, RNG_NAME, {})
    if "rng" not in body:
        raise DamagedError(f"{RNG_NAME} has no rng")
    try:
        return from_json(body["rng"])
    except (DamagedError, RecursionError) as exc:
        raise DamagedError(f"{RNG_NAME} does not parse: {exc}") from exc


def read_objects(source: FileSource) -> dict[str, Any]:
    """What was pickled, by path; runs code from the checkpoint. Raises `DamagedError`."""
    if OBJECTS_NAME not in source.files:
        return {}
    objects = load_torch(source, OBJECTS_NAME, weights_only=False)
    if not isinstance(objects, dict):
        raise DamagedError(f"{OBJECTS_NAME} holds a {type(objects).__name__}, not a dict")
    return objects


def revive(tree: Tree, tensors: list[StoredTensor]) -> Tree:
    """The tree with stored tensors in the places of `{"$tensor": index}`. Raises `DamagedError`."""

    def stored(leaf: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(leaf, dict):
            return leaf
        index = leaf["$tensor"]
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(tensors):
            raise DamagedError(f"{STATE_NAME}: {'.'.join(path)} is tensor {index!r} of {len(tensors)}")
        return tensors[index]

    return map_leaves(tree, stored)


def save_torch(obj: Any, file: SinkFile) -> None:
    """`torch.save` into a file of the draft; an error of the file comes out as it was raised."""
    adapter = _TorchFile(file)
    torch.save(obj, cast(BinaryIO, adapter))
    if adapter.error is not None:
        raise adapter.error


class _TorchFile:
    """What `torch.save` wants of a file. Keeps the first error, which torch would replace by one of its own."""

    def __init__(self, file: SinkFile) -> None:
        self._file = file
        self.error: BaseException | None = None

    def write(self, data: memoryview) -> int:
        if self.error is None:
            try:
                self._file.write(data)
            except BaseException as exc:  # noqa: BLE001 - raised again as soon as torch.save has returned
                self.error = exc
        return len(data)

    def flush(self) -> None:
        """Nothing to do: the draft decides when its files are durable."""


def load_torch(source: FileSource, name: str, *, weights_only: bool = True) -> Any:
    """What `torch.save` wrote to a file, in host memory. Raises `DamagedError`."""
    if name not in source.files:
        raise DamagedError(f"checkpoint has no {name}")
    with source.open(name) as file:
        try:
            return torch.load(file, map_location="cpu", weights_only=weights_only)
        except (CheckpointError, OSError, MemoryError):
            raise
        except Exception as exc:  # torch raises nearly anything for bytes that it can't read
            if "allocate memory" in str(exc):
                raise
            raise DamagedError(f"{name} is not a file that torch.load reads: {exc}") from exc
