"""What stands around a tensor's bytes, so that `torch.load` reads them? Known before the bytes are at hand.

`torch.save` makes a zip archive, uncompressed: a pickle that describes the tensor, and its bytes. Here the
archive is made around bytes that are somewhere else, so that they are copied only once, on their way out.
The checksum of the bytes is left out: torch never looks at it, and the checkpoint has better ones.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from operator import mul
from typing import Any

import torch
from torch._utils import _rebuild_tensor_v3

ALIGNMENT = 64  # bytes, as torch aligns
_FOLDER = "archive"
_LARGEST = 0xFFFFFFFF  # what a size of 32 bits can't say, stands in a further field of 64
_DATE = 0x21  # 1980-01-01, the first day that a zip archive knows


@dataclass(frozen=True, slots=True)
class Blob:
    """A file of `torch.save`: `prefix`, `size` bytes of a contiguous tensor, `suffix`. The prefix has a length
    that is a multiple of `ALIGNMENT`."""

    prefix: bytes
    size: int
    suffix: bytes

    @property
    def length(self) -> int:
        return len(self.prefix) + self.size + len(self.suffix)


@lru_cache(4096)
def tensor_blob(dtype: torch.dtype, shape: Sequence[int]) -> Blob:
    """The file of a tensor on the host that takes no gradient."""
    size = math.prod(shape) * dtype.itemsize
    small = {
        f"{_FOLDER}/data.pkl": _pickle(dtype, shape, size),
        f"{_FOLDER}/byteorder": b"little",
        f"{_FOLDER}/version": b"3\n",
    }
    prefix, entries = bytearray(), []
    for name, content in small.items():
        crc = zlib.crc32(content)
        entries.append(_entry(name, len(content), crc, len(prefix)))
        prefix += _header(name, len(content), crc, 0) + content
    name = f"{_FOLDER}/data/0"
    entries.append(_entry(name, size, 0, len(prefix)))
    unpadded = len(prefix) + len(_header(name, size, 0, 4))
    prefix += _header(name, size, 0, 4 + -unpadded % ALIGNMENT)
    return Blob(bytes(prefix), size, _directory(entries, len(prefix) + size))


def value_blob(value: Any) -> bytes:
    """The file of any value."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class _Storage:
    """Stands for the tensor's bytes in the pickle."""


class _Described:
    """Stands for the tensor."""


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, dtype: torch.dtype, shape: Sequence[int], size: int) -> None:
        super().__init__(file, protocol=2)
        self._dtype, self._shape, self._size = dtype, tuple(shape), size

    def persistent_id(self, obj: Any) -> Any:
        return ("storage", torch.UntypedStorage, "0", "cpu", self._size) if isinstance(obj, _Storage) else None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Described):
            return NotImplemented
        # As torch has it: a dimension of no elements counts as one.
        strides = accumulate((max(length, 1) for length in reversed(self._shape[1:])), mul, initial=1)
        stride = tuple(strides)[::-1] if self._shape else ()
        hooks: collections.OrderedDict[str, Any] = collections.OrderedDict()
        return _rebuild_tensor_v3, (_Storage(), 0, self._shape, stride, False, hooks, self._dtype)


def _pickle(dtype: torch.dtype, shape: Sequence[int], size: int) -> bytes:
    file = io.BytesIO()
    _Pickler(file, dtype, shape, size).dump(_Described())
    return file.getvalue()


def _header(name: str, size: int, crc: int, padding: int) -> bytes:
    """What stands before a member, with `padding` bytes of filling (none, or at least 4)."""
    extra = struct.pack("<HHQQ", 1, 16, size, size) if size >= _LARGEST else b""
    if padding:
        extra += struct.pack("<2sH", b"FB", padding - 4) + b"Z" * (padding - 4)
    short = min(size, _LARGEST)
    fields = (0x04034B50, 45, 0, 0, 0, _DATE, crc, short, short, len(name), len(extra))
    return struct.pack("<IHHHHHIIIHH", *fields) + name.encode() + extra


def _entry(name: str, size: int, crc: int, at: int) -> bytes:
    """What the archive's directory says of a member."""
    extra = struct.pack("<HHQQ", 1, 16, size, size) if size >= _LARGEST else b""
    short = min(size, _LARGEST)
    fields = (0x02014B50, 45, 45, 0, 0, 0, _DATE, crc, short, short, len(name), len(extra), 0, 0, 0, 0, at)
    return struct.pack("<IHHHHHHIIIHHHHHII", *fields) + name.encode() + extra


def _directory(entries: Sequence[bytes], at: int) -> bytes:
    """The archive's end."""
    directory = b"".join(entries)
    count, size, far = len(entries), len(directory), b""
    if at >= _LARGEST:
        far = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, size, at)
        far += struct.pack("<IIQI", 0x07064B50, 0, at + size, 1)
    return directory + far + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, count, count, size, min(at, _LARGEST), 0)
