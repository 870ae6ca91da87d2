"""Where does each tensor lie in a safetensors file? Headers written and read.

A file is the header's length (8 bytes, little endian), the header (JSON, padded with spaces) and the
tensors without holes. Offsets here are positions in the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import DamagedError

MAX_HEADER_SIZE = 100_000_000  # bytes; what the official library accepts
_ALIGNMENT = 64  # bytes; a cache line, and where torch puts a tensor in memory
_MAX_BYTES = 1 << 62
_METADATA = "__metadata__"

# What every safetensors library reads since 0.5.
PORTABLE = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}

# What newer ones read besides; a torch of before has no such dtype.
_NEWER = {
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "float8_e8m0fnu": "F8_E8M0",
    "float4_e2m1fn_x2": "F4",
}
NATIVE: dict[torch.dtype, str] = PORTABLE | {
    getattr(torch, name): code for name, code in _NEWER.items() if hasattr(torch, name)
}
_DTYPES: dict[str, torch.dtype] = {code: dtype for dtype, code in NATIVE.items()}


@dataclass(frozen=True, slots=True)
class Placed:
    """One tensor of a file: its bytes are [begin, end). `code` and `shape` are those of the header."""

    key: str
    code: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.code]

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The tensor's shape in torch, which keeps two F4 numbers in one element."""
        return (*self.shape[:-1], self.shape[-1] // 2) if self.code == "F4" else self.shape


@dataclass(frozen=True, slots=True)
class Layout:
    """A whole file before a byte of it is written: `header` with its length, tensors in file order."""

    header: bytes
    tensors: tuple[Placed, ...]


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself: its tensors by key, in file order, and its metadata (None: none)."""

    tensors: dict[str, Placed]
    metadata: dict[str, str] | None


def native(dtype: torch.dtype, shape: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """Code and header shape of a dtype in `NATIVE`."""
    code, own = NATIVE[dtype], tuple(shape)
    return (code, (*own[:-1], own[-1] * 2)) if code == "F4" else (code, own)


def portable(dtype: torch.dtype, shape: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """Code and header shape under which any reader opens the bytes of any dtype.

    Complex numbers that safetensors does not know get a last dimension of 2, others one of bytes.
    """
    if dtype in PORTABLE:
        return PORTABLE[dtype], tuple(shape)
    if dtype.is_complex:
        return PORTABLE[dtype.to_real()], (*shape, 2)
    return "U8", (*shape, dtype.itemsize) if dtype.itemsize > 1 else tuple(shape)


def lay_out(tensors: Sequence[tuple[str, str, tuple[int, ...], int]], metadata: Mapping[str, str] | None) -> Layout:
    """Place tensors given as (key, code, header shape, size in bytes); keys are distinct.

    Sizes that are multiples of 64 bytes come first, so that each of these tensors begins at one, too, and is copied
    whole cache lines at a time; then multiples of 32, of 16 and so on, which aligns every tensor to its elements.
    Equal ones keep the order given.
    """
    header: dict[str, Any] = {} if metadata is None else {_METADATA: dict(metadata)}
    offset, spans = 0, []
    for key, code, shape, size in sorted(tensors, key=lambda tensor: -_alignment(tensor[3])):
        header[key] = {"dtype": code, "shape": shape, "data_offsets": (offset, offset + size)}
        spans.append((key, code, shape, offset, offset + size))
        offset += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    start = 8 + len(text)
    placed = tuple(Placed(key, code, shape, start + begin, start + end) for key, code, shape, begin, end in spans)
    return Layout(len(text).to_bytes(8, "little") + text, placed)


def header_size(data: bytes, file_size: int) -> int:
    """The header's size in bytes, from the file's first 8 bytes. Raises `DamagedError`."""
    size = int.from_bytes(data, "little")
    if len(data) < 8 or size > min(MAX_HEADER_SIZE, file_size - 8):
        raise DamagedError(f"not a safetensors file: its header claims {size:,} bytes of {file_size:,}")
    return size


def parse_header(data: bytes, file_size: int) -> Header:
    """Read a header (without its length) back. Raises `DamagedError` for anything that is off."""
    try:
        raw = json.loads(data, object_pairs_hook=_distinct)
        metadata = raw.pop(_METADATA, None)
        if metadata is not None and not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata is not text")
        start = 8 + len(data)
        tensors = [
            Placed(key, row["dtype"], tuple(row["shape"]), *(start + checked_count(at) for at in row["data_offsets"]))
            for key, row in raw.items()
        ]
        tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
        expected = start
        for tensor in tensors:
            _check(tensor, expected)
            expected = tensor.end
        if expected != file_size:
            raise ValueError(f"tensors end at byte {expected:,} of {file_size:,}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise DamagedError(f"safetensors header does not parse: {exc!r}") from exc
    return Header({tensor.key: tensor for tensor in tensors}, metadata)


def _check(tensor: Placed, expected: int) -> None:
    if tensor.begin != expected:
        raise ValueError(f"{tensor.key!r} begins at byte {tensor.begin:,}, not at {expected:,}")
    if tensor.code not in _DTYPES:
        raise ValueError(f"{tensor.key!r} has dtype {tensor.code!r}, which this version of torch does not have")
    if tensor.code == "F4" and (not tensor.shape or tensor.shape[-1] % 2):
        raise ValueError(f"{tensor.key!r} does not end at a whole byte")
    if bytes_of(tensor.dtype, tensor.torch_shape) != tensor.end - tensor.begin:
        raise ValueError(f"{tensor.key!r} has {tensor.end - tensor.begin:,} bytes for the shape {tensor.shape}")


def bytes_of(dtype: torch.dtype, shape: Sequence[Any]) -> int:
    """The size in bytes of a contiguous tensor. Raises `ValueError` for a shape that no tensor has."""
    sizes = [checked_count(size) for size in shape]
    # Zeros count as ones in the bound: torch computes strides from the other dimensions.
    if len(sizes) > 64 or math.prod(max(size, 1) for size in sizes) * dtype.itemsize > _MAX_BYTES:
        raise ValueError(f"no tensor has the shape {tuple(shape)}")
    return math.prod(sizes) * int(dtype.itemsize)


def checked_count(value: Any) -> int:
    """The value, which a file claims to be a size or offset. Raises `ValueError` when it is none."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MAX_BYTES:
        raise ValueError(f"{value!r} is not a count")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key stands twice")
    return result


def _alignment(size: int) -> int:
    """The largest power of two, up to what matters, of which a size in bytes is a multiple."""
    return (size | _ALIGNMENT) & -(size | _ALIGNMENT)
