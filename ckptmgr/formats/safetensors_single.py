"""How is one safetensors file written and read by itself, outside of a checkpoint?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import EllipsisType
from typing import Any, BinaryIO

import torch

from ..errors import ConfigError, DamagedError, StateMismatchError
from ..staging import Gathered, Region, compact, is_special
from ..state.snapshot import FlatSnapshot, StoredTensor
from ..transfer import Segment
from .safetensors_layout import (
    MAX_HEADER_SIZE,
    NATIVE,
    Header,
    Layout,
    Placed,
    bytes_of,
    header_size,
    lay_out,
    native,
    parse_header,
)
from .targets import fill, fresh, read_exactly

_FIRST_READ = 64 << 10  # bytes; most headers are smaller, and come with the length in one read

Index = int | slice | EllipsisType | None | list[int] | torch.Tensor


def body(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None) -> Gathered:
    """A whole file, to be written while the tensors stay as they are.

    Raises `ConfigError` for what a file can't hold."""
    layout = _plan(tensors, metadata)
    placed = layout.tensors
    size = placed[-1].end if placed else len(layout.header)
    region = Region(size, range(len(placed)), [each.begin for each in placed], layout.header)
    return Gathered(region, FlatSnapshot({}, [tensors[each.key] for each in placed], {}, None, {}, None))


def _plan(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None) -> Layout:
    for key, tensor in tensors.items():
        if not isinstance(key, str) or key == "__metadata__" or not isinstance(tensor, torch.Tensor):
            raise ConfigError(f"{key!r}: {type(tensor).__name__} is not a tensor under a text that may be a key")
        if is_special(tensor) or tensor.is_meta or tensor.dtype not in NATIVE:
            raise ConfigError(
                f"{key!r}: a safetensors file can't hold a {tensor.layout} tensor of {tensor.dtype} on "
                f"{tensor.device}; convert it, or save it with torch.save through ckptmgr.writer"
            )
        if tensor.dtype == getattr(torch, "float4_e2m1fn_x2", None) and not tensor.dim():
            raise ConfigError(f"{key!r}: a safetensors file can't hold a single {tensor.dtype}; give it a dimension")
    for key, value in (metadata or {}).items():
        if not isinstance(key, str) or not isinstance(value, str):
            raise ConfigError(f"metadata {key!r}: {value!r} is not text; safetensors metadata maps text to text")
    if shared := _shared(tensors):
        groups = "; ".join(", ".join(group) for group in shared)
        raise ConfigError(
            f"these tensors share memory, which a safetensors file can't say: {groups}. Leave out all but one of each "
            "group, .clone() them, or save with CheckpointManager or torch.save, which keep them tied"
        )
    rows = [(key, *native(t.dtype, t.shape), t.numel() * t.element_size()) for key, t in tensors.items()]
    try:
        layout = lay_out(rows, metadata)
    except UnicodeEncodeError as exc:
        raise ConfigError(f"a key or metadata is not valid Unicode: {exc}") from exc
    if len(layout.header) - 8 > MAX_HEADER_SIZE:
        raise ConfigError(
            f"{len(tensors):,} tensors need a header of {len(layout.header):,} bytes; safetensors libraries read up to "
            f"{MAX_HEADER_SIZE:,}. Use several files"
        )
    return layout


def _shared(tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Groups of keys whose tensors overlap in memory."""
    spans = defaultdict(list)
    for key, tensor in tensors.items():
        if tensor.numel():
            extent = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            begin = tensor.data_ptr()
            spans[tensor.device].append((begin, begin + extent * tensor.element_size(), key))
    groups: list[list[str]] = []
    for of_device in spans.values():
        reached = 0
        for begin, end, key in sorted(of_device):
            if begin < reached:
                groups[-1].append(key)
            else:
                groups.append([key])
            reached = max(reached, end)
    return [group for group in groups if len(group) > 1]


class SafetensorsReader:
    """An open safetensors file, used as the official `safe_open`'s: only what is asked for is read.

    Every method may block. Raises `DamagedError` for what is not a safetensors file, and
    `StateMismatchError` (a `KeyError`) for a key that is not in it.
    """

    def __init__(self, file: BinaryIO, size: int, where: str, device: str | torch.device) -> None:
        self._file, self._where, self._device = file, where, device
        try:
            self._header = self._read_header(size)
        except DamagedError as exc:
            raise DamagedError(f"{where}: {exc}") from exc

    def _read_header(self, size: int) -> Header:
        first = self._read(0, min(size, _FIRST_READ))
        length = header_size(bytes(first[:8]), size)
        text = first[8 : 8 + length]
        if len(text) < length:
            text += self._read(8 + len(text), length - len(text))
        return parse_header(bytes(text), size)

    def _read(self, begin: int, size: int) -> bytearray:
        data = bytearray(size)
        self._file.seek(begin)
        read_exactly(self._file, memoryview(data), self._where)
        return data

    def keys(self) -> list[str]:
        """The keys, sorted."""
        return sorted(self._header.tensors)

    def offset_keys(self) -> list[str]:
        """The keys in the order of the tensors in the file."""
        return list(self._header.tensors)

    def metadata(self) -> dict[str, str] | None:
        """The file's own metadata, or None."""
        return self._header.metadata

    def get_tensor(self, key: str) -> torch.Tensor:
        """One tensor, on the device that was asked for."""
        placed = self._placed(key)
        return self._tensor(placed, placed.begin, placed.torch_shape)

    def get_tensors(
        self, keys: Iterable[str] | None = None, scatter: Callable[[Sequence[Segment]], None] | None = None
    ) -> dict[str, torch.Tensor]:
        """The tensors of these keys, or all, in the order of the file; with `scatter` that reads those that go to host
        memory."""
        keys = self._header.tensors if keys is None else keys
        places = sorted(map(self._placed, keys), key=lambda placed: placed.begin)
        if scatter is None or torch.device(self._device).type != "cpu":
            return {placed.key: self.get_tensor(placed.key) for placed in places}
        stored = [StoredTensor(placed.torch_shape, placed.dtype, placed) for placed in places]
        tensors = fresh(stored, self._device)
        scatter([(one.location.begin, one.location.end, tensors[one].data_ptr()) for one in stored])
        return {one.location.key: tensors[one] for one in stored}

    def get_slice(self, key: str) -> TensorSlice:
        """A tensor to take parts of by indexing; nothing is read yet."""
        return TensorSlice(self, self._placed(key))

    def _placed(self, key: str) -> Placed:
        placed = self._header.tensors.get(key)
        if placed is None:
            there = self.keys()
            more = f" and {len(there) - 10} more" if len(there) > 10 else ""
            raise StateMismatchError(f"{self._where} has no tensor {key!r}; it has {', '.join(there[:10])}{more}")
        return placed

    def _tensor(self, placed: Placed, begin: int, shape: tuple[int, ...]) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=placed.dtype, device=self._device)
        self._file.seek(begin)
        fill(tensor, self._file, self._where)
        return tensor


class TensorSlice:
    """A tensor of a file, of which `slice[...]` reads the rows that it needs."""

    def __init__(self, reader: SafetensorsReader, placed: Placed) -> None:
        self._reader, self._placed = reader, placed

    def get_shape(self) -> list[int]:
        return list(self._placed.shape)

    def get_dtype(self) -> str:
        """The dtype's name in the file, such as "F32"."""
        return self._placed.code

    def __getitem__(self, index: Index | tuple[Index, ...]) -> torch.Tensor:
        """What indexing the whole tensor gives. Leading numbers and the first slice after them limit
        what is read; anything else is taken from the rows in memory."""
        rest = list(index) if isinstance(index, tuple) else [index]
        begin, shape = self._placed.begin, list(self._placed.torch_shape)
        while rest and shape and isinstance(rest[0], int) and not isinstance(rest[0], bool):
            number, size = rest.pop(0), shape.pop(0)
            assert isinstance(number, int)
            if not -size <= number < size:
                dimension = len(self._placed.shape) - len(shape) - 1
                raise IndexError(f"index {number} is out of bounds for dimension {dimension} with size {size}")
            begin += number % size * bytes_of(self._placed.dtype, shape)
        if rest and shape and isinstance(rest[0], slice):
            start, stop, step = rest[0].indices(shape[0])
            if step < 0:
                raise ValueError("step must be greater than zero")
            begin += start * bytes_of(self._placed.dtype, shape[1:])
            shape[0] = max(0, stop - start)
            rest[0] = slice(None, None, step)
        rows = self._reader._tensor(self._placed, begin, tuple(shape))
        return _own(rows[tuple(rest)]) if rest else rows


def _own(part: Any) -> torch.Tensor:
    """The part without the rows that it was taken from."""
    tensor: torch.Tensor = part
    return compact(tensor) if tensor.device.type == "cpu" else tensor.clone()
