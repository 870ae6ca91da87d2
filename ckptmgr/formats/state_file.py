"""What stands beside the tensors? `state.json` and pickled objects, alike in every format."""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, BinaryIO, cast

import torch
from pydantic_core import from_json

from ..errors import CheckpointError, DamagedError, FormatVersionError
from ..state.snapshot import FlatSnapshot, StoredTensor, Tree, map_leaves
from . import FileSource, SinkFile
from .json_texts import JsonTexts

STATE_NAME = "state.json"
OBJECTS_NAME = "objects.pt"
VERSION = 1
MAX_JSON_SIZE = 1 << 30  # bytes
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


def state_bodies(texts: JsonTexts, format_name: str, flat: FlatSnapshot, body: Mapping[str, Any]) -> dict[str, Whole]:
    """`state.json` with what the format adds in `body`, and the file of objects."""
    bodies = {} if flat.objects is None else {OBJECTS_NAME: Whole(flat.objects)}
    state = {"format_version": VERSION, "format": format_name, "notes": flat.notes, **body}
    bodies[STATE_NAME] = Whole(texts.dump(state))
    return bodies


class Whole:
    """A file that is there as bytes: a `transfer.Body`."""

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._data = memoryview(data)

    def part(self, begin: int, end: int, scratch: memoryview) -> memoryview:
        return self._data[begin:end]


def read_json(source: FileSource, name: str, keys: Mapping[str, type]) -> dict[str, Any]:
    """A JSON file that has at least these keys with values of these types.

    Raises `DamagedError`, and `FormatVersionError` when a newer ckptmgr wrote it.
    """
    if name not in source.files:
        raise DamagedError(f"checkpoint has no {name}")
    if source.files[name].size > MAX_JSON_SIZE:
        raise DamagedError(f"{name} is {source.files[name].size:,} bytes, more than any {name}")
    return parse_json(source.read(name), name, keys)


def parse_json(data: bytes | bytearray, name: str, keys: Mapping[str, type], newest: int = VERSION) -> dict[str, Any]:
    """The same from a file's bytes, for a version up to `newest`."""
    try:
        body = _parsed(data)
    except (ValueError, RecursionError) as exc:
        raise DamagedError(f"{name} is not JSON: {exc}") from exc
    if not isinstance(body, dict) or not isinstance(version := body.get("format_version"), int):
        raise DamagedError(f"{name} has no format_version")
    if version > newest:
        raise FormatVersionError(
            f"{name} has version {version}; this ckptmgr reads up to {newest}. Install a newer ckptmgr to read it"
        )
    for key, kind in keys.items():
        if not isinstance(body.get(key), kind):
            raise DamagedError(f"{name} has no {key}")
    return body


def _parsed(data: bytes | bytearray) -> Any:
    try:
        return from_json(data, cache_strings="keys")  # in a quarter less time, of 100,000 tensors
    except ValueError:  # what it does not take, as a deep nesting, may yet be JSON; else the error names the place
        return json.loads(data)


def read_objects(source: FileSource) -> dict[str, Any]:
    """What was pickled, by path; runs code from the checkpoint. Raises `DamagedError`."""
    if OBJECTS_NAME not in source.files:
        return {}
    with source.open(OBJECTS_NAME) as file:
        return parse_objects(file, OBJECTS_NAME)


def parse_objects(file: BinaryIO, name: str) -> dict[str, Any]:
    """The same from a file."""
    objects = parse_torch(file, name, weights_only=False)
    if not isinstance(objects, dict):
        raise DamagedError(f"{name} holds a {type(objects).__name__}, not a dict")
    return objects


def revive(tree: Tree, tensors: Sequence[StoredTensor], file: str = STATE_NAME) -> Tree:
    """The tree, changed in place, with stored tensors where `{"$tensor": index}` stood. Raises `DamagedError`."""

    def refuse(leaf: Any, path: tuple[str, ...]) -> None:
        if isinstance(leaf, dict) and (type(index := leaf["$tensor"]) is not int or not 0 <= index < len(tensors)):
            raise DamagedError(f"{file}: {'.'.join(path)} is tensor {index!r} of {len(tensors)}")

    top = [tree]
    if not _revive(top, tensors):
        map_leaves(top[0], refuse)
    return top[0]


def _revive(tree: dict[str, Tree] | list[Tree], tensors: Sequence[StoredTensor]) -> bool:
    """Whether every index within a dict or list was one of a tensor."""
    count = len(tensors)
    for place, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if type(part) is dict and len(part) == 1 and "$tensor" in part:
            index = part["$tensor"]
            if type(index) is not int or not 0 <= index < count:  # there may be 100,000: no call for each
                return False
            tree[place] = tensors[index]  # type: ignore[index]
        elif type(part) in (dict, list) and not _revive(part, tensors):
            return False
    return True


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


def refuse_unpacking(file: BinaryIO) -> None:
    """Raises `DamagedError` for an archive that holds more than its own size: `torch.save` never packs tightly, and
    torch would unpack all of it."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    is_archive = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    if is_archive:
        reader: Any = torch._C.PyTorchFileReader(file)
        if hasattr(reader, "get_record_size"):
            total = sum(map(reader.get_record_size, reader.get_all_records()))
        else:  # an older torch
            with zipfile.ZipFile(file) as archive:
                total = sum(member.file_size for member in archive.infolist())
        if total > size:
            raise DamagedError(f"it is packed, and would take more than its {size:,} bytes")
        file.seek(0)


def load_torch(source: FileSource, name: str) -> Any:
    """What `torch.save` wrote to a file, in host memory. Raises `DamagedError`."""
    if name not in source.files:
        raise DamagedError(f"checkpoint has no {name}")
    with source.open(name) as file:
        return parse_torch(file, name)


def parse_torch(file: BinaryIO, name: str, *, weights_only: bool = True) -> Any:
    """The same from an open file; without `weights_only` it runs code from the checkpoint."""
    try:
        refuse_unpacking(file)
        return torch.load(file, map_location="cpu", weights_only=weights_only)
    except (CheckpointError, OSError, MemoryError):
        raise
    except Exception as exc:  # torch raises nearly anything for bytes that it can't read
        if "allocate memory" in str(exc):
            raise
        raise DamagedError(f"{name} is not a file that torch.load reads: {exc}") from exc
