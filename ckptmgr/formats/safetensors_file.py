"""How does a snapshot become safetensors files? The default format: no pickle, any reader opens it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import DamagedError, FormatVersionError
from ..staging import host_tensor, is_dense, is_special, memory, refuse_meta
from ..state.snapshot import Snapshot, StoredState, StoredTensor, Tree, map_leaves
from . import FileSink, FileSource
from .safetensors_layout import MAX_HEADER_SIZE, Layout, bytes_of, checked_count, lay_out, portable
from .state_file import (
    STATE_NAME,
    file_stems,
    load_torch,
    read_json,
    read_objects,
    read_rng,
    revive,
    save_torch,
    write_state,
)
from .targets import fill, fresh, put, refuse_misfit

_SPECIAL_NAME = "tensors.pt"


class SafetensorsFormat:
    """One `<entry>.safetensors` per entry that has tensors, and `state.json` for everything else.

    An entry of more than `split_size_bytes` is split into files of at most that size (one tensor is
    never split). Sparse, quantized and nested tensors go to `tensors.pt`, which `torch.load` reads
    with `weights_only=True`.
    """

    name = "safetensors"

    def __init__(self, split_size_bytes: int | None = None) -> None:
        self._split_size = split_size_bytes

    def write(self, snapshot: Snapshot, sink: FileSink) -> None:
        """Write every file; blocks. Raises what the sink raises, and `StateMismatchError` for a meta tensor."""
        table = _Table()
        trees = {entry: table.take(entry, tree) for entry, tree in snapshot.entries.items()}
        for name, layout, tensors in table.files(self._split_size):
            with sink.create(name) as file:
                file.write(layout.header)
                for tensor in tensors:
                    host = host_tensor(tensor)
                    file.write(memory(host))
        if table.special:
            with sink.create(_SPECIAL_NAME) as file:
                save_torch({str(row): tensor.detach() for row, tensor in table.special.items()}, file)
        write_state(sink, self.name, snapshot, {"entries": trees, "tensors": table.rows})

    def open(self, source: FileSource) -> StoredState:
        """Read `state.json`; no tensor is read. Raises `DamagedError` and `FormatVersionError`."""
        return _SafetensorsState(source)


@dataclass
class _EntryTensors:
    """The tensors of one entry that go to safetensors files: by key, with their rows in the table."""

    tensors: dict[str, tuple[int, torch.Tensor]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)


class _Table:
    """Numbers the tensors of all entries, each object once, and gives each its place in a file."""

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []
        self.special: dict[int, torch.Tensor] = {}
        self._entries: dict[str, _EntryTensors] = {}
        self._seen: dict[int, tuple[int, str, str]] = {}

    def take(self, entry: str, tree: Tree) -> Tree:
        """The entry's tree with `{"$tensor": row}` in the tensors' places."""
        own = self._entries[entry] = _EntryTensors()

        def numbered(leaf: Any, path: tuple[str, ...]) -> Any:
            return {"$tensor": self._row(entry, own, leaf, path)} if isinstance(leaf, torch.Tensor) else leaf

        return map_leaves(tree, numbered)

    def _row(self, entry: str, own: _EntryTensors, tensor: torch.Tensor, path: tuple[str, ...]) -> int:
        key = _unicode(".".join(path) or entry)
        if (seen := self._seen.get(id(tensor))) is not None:
            row, first_entry, first_key = seen
            if first_entry == entry:
                own.aliases.setdefault(key, first_key)
            return row
        refuse_meta(tensor, (entry, *path))
        row = len(self.rows)
        more: dict[str, Any] = {}
        if tensor.requires_grad:
            more["requires_grad"] = True
        if isinstance(tensor, torch.nn.Parameter):
            more["parameter"] = True
        if is_special(tensor):
            self.special[row] = tensor
            self.rows.append([_SPECIAL_NAME, str(row), _dtype_name(tensor), _shape(tensor), 0, 0, more])
        else:
            base, count = key if key != "__metadata__" else "__metadata__~", 1
            key = base
            while key in own.tensors:
                count += 1
                key = f"{base}~{count}"
            own.tensors[key] = (row, tensor)
            if not tensor.is_contiguous() and is_dense(tensor.shape, tensor.stride()):
                more["stride"] = tensor.stride()
            self.rows.append(["", key, _dtype_name(tensor), _shape(tensor), 0, 0, more])
        self._seen[id(tensor)] = (row, entry, key)
        return row

    def files(self, split_size: int | None) -> Iterator[tuple[str, Layout, list[torch.Tensor]]]:
        """Name, layout and tensors of each file in file order; fills in the rows as it goes."""
        stems = file_stems(self._entries)
        for entry, own in self._entries.items():
            parts = _split(own.tensors, split_size)
            for number, part in enumerate(parts, 1):
                name = f"{stems[entry]}.safetensors"
                if len(parts) > 1:
                    name = f"{stems[entry]}-{number:05}-of-{len(parts):05}.safetensors"
                aliases = {alias: key for alias, key in own.aliases.items() if key in part and alias not in part}
                layout = lay_out(
                    [
                        (key, *portable(tensor.dtype, tensor.shape), tensor.numel() * tensor.element_size())
                        for key, (_, tensor) in part.items()
                    ],
                    aliases | {"format": "pt"},
                )
                for placed in layout.tensors:
                    row = self.rows[part[placed.key][0]]
                    row[0], row[4], row[5] = name, placed.begin, placed.end
                yield name, layout, [part[placed.key][1] for placed in layout.tensors]


def _split(
    tensors: dict[str, tuple[int, torch.Tensor]], split_size: int | None
) -> list[dict[str, tuple[int, torch.Tensor]]]:
    """The tensors of an entry in parts, each of at most `split_size` bytes and one header, or of one tensor."""
    parts: list[dict[str, tuple[int, torch.Tensor]]] = []
    size = header = 0
    for key, (row, tensor) in tensors.items():
        own_size = tensor.numel() * tensor.element_size()
        own_header = 6 * len(key) + 22 * tensor.dim() + 128
        too_large = split_size is not None and size + own_size > split_size
        if not parts or too_large or header + own_header > MAX_HEADER_SIZE // 2:
            parts.append({})
            size = header = 0
        parts[-1][key] = (row, tensor)
        size += own_size
        header += own_header
    return parts


def _unicode(text: str) -> str:
    """The text without the half characters (lone surrogates) that JSON readers in other languages refuse."""
    return text.encode("utf-8", "backslashreplace").decode()


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(tensor: torch.Tensor) -> list[int]:
    return [tensor.size(0)] if tensor.is_nested else list(tensor.shape)


def _stored(row: list[Any], source: FileSource) -> StoredTensor:
    """One row of the table. Raises `DamagedError` or `ValueError` for what can't be true."""
    name, key, dtype_name, shape, begin, end, more = row
    dtype = getattr(torch, str(dtype_name), None)
    if not isinstance(dtype, torch.dtype):
        raise FormatVersionError(
            f"{STATE_NAME}: tensor {key!r} has dtype {dtype_name!r}, which torch {torch.__version__} does not have; "
            "install a newer torch to read it"
        )
    if name not in source.files:
        raise DamagedError(f"{STATE_NAME}: tensor {key!r} is in {name!r}, which the checkpoint does not have")
    stride = more.get("stride")
    flags = (more.get("requires_grad") is True, more.get("parameter") is True)
    size = bytes_of(dtype, shape)
    if name == _SPECIAL_NAME:
        return StoredTensor(tuple(shape), dtype, (name, key, 0), None, *flags)
    if not 8 <= checked_count(begin) <= checked_count(end) <= source.files[name].size or end - begin != size:
        raise DamagedError(
            f"{STATE_NAME}: tensor {key!r} of {size:,} bytes can't lie in bytes {begin:,} to {end:,} of {name} "
            f"({source.files[name].size:,} bytes)"
        )
    if stride is not None:
        stride = tuple(map(checked_count, stride))
        if len(stride) != len(shape) or not is_dense(shape, stride):
            raise DamagedError(f"{STATE_NAME}: tensor {key!r} of shape {shape} can't have the strides {stride}")
    return StoredTensor(tuple(shape), dtype, (name, begin, end), stride, *flags)


class _SafetensorsState:
    """A checkpoint opened: trees with stored tensors, whose `location` is (file, begin, end)."""

    def __init__(self, source: FileSource) -> None:
        self._source = source
        body = read_json(source, STATE_NAME, {"entries": dict, "tensors": list, "notes": dict})
        try:
            tensors = [_stored(row, source) for row in body["tensors"]]
            self.entries: Mapping[str, Tree] = {entry: revive(tree, tensors) for entry, tree in body["entries"].items()}
        except (ValueError, TypeError, AttributeError, RecursionError) as exc:
            raise DamagedError(f"{STATE_NAME} does not parse: {exc!r}") from exc
        self.notes: Mapping[str, dict[str, Any]] = body["notes"]
        self.rng: Tree = read_rng(source)

    def objects(self) -> dict[str, Any]:
        return read_objects(self._source)

    def fetch(
        self, wanted: Mapping[StoredTensor, torch.Tensor | None], device: str | torch.device = "cpu"
    ) -> dict[StoredTensor, torch.Tensor]:
        """See `StoredState.fetch`. Reads each file once, in the order of its bytes; blocks."""
        by_file: dict[str, list[StoredTensor]] = defaultdict(list)
        for stored, target in wanted.items():
            if target is not None and stored.location[0] != _SPECIAL_NAME:
                refuse_misfit(stored, target)
            by_file[stored.location[0]].append(stored)
        result: dict[StoredTensor, torch.Tensor] = {}
        special = by_file.pop(_SPECIAL_NAME, [])
        for name, tensors in by_file.items():
            with self._source.open(name) as file:
                for stored in sorted(tensors, key=lambda tensor: tensor.location[1]):
                    target = wanted[stored]
                    result[stored] = fresh(stored, device) if target is None else target
                    file.seek(stored.location[1])
                    fill(result[stored], file, name)
        if special:
            loaded = load_torch(self._source, _SPECIAL_NAME)
            for stored in special:
                tensor = loaded.get(stored.location[1]) if isinstance(loaded, dict) else None
                if not isinstance(tensor, torch.Tensor):
                    raise DamagedError(f"{_SPECIAL_NAME} has no tensor {stored.location[1]!r}")
                result[stored] = put(tensor, wanted[stored], device)
        return result
