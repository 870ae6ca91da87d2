"""How do a state's tensors become runs of bytes in host memory?

A `Region` says where each tensor lies in a run of bytes, such as a file. `Live` gathers those bytes
from tensors where they are; the arena (`arena`) from copies that training can no longer change.
"""

from __future__ import annotations

import ctypes
import math
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Protocol

import torch

from .errors import StateMismatchError
from .memory import address
from .moves import move
from .state.snapshot import FlatSnapshot

_BEGIN = itemgetter(0)


@dataclass(frozen=True, slots=True)
class Region:
    """A run of `size` bytes made of tensors: after `header`, tensor `numbers[k]` begins at `begins[k]`.
    In order and without overlap. A tensor's bytes are those of its contiguous form, or with
    `keeps_strides` those of its own memory where that is dense. `texts` are further bytes besides
    tensors, each with its begin, in order."""

    size: int
    numbers: Sequence[int]
    begins: Sequence[int]
    header: bytes = b""
    keeps_strides: bool = False
    texts: Sequence[tuple[int, bytes]] = ()


class Part(Protocol):
    """A region's bytes; see `transfer.Body`."""

    @property
    def size(self) -> int: ...

    def part(self, begin: int, end: int, scratch: memoryview) -> memoryview: ...


class Held(Protocol):
    """The tensors of a state as a save writes them, live or copied."""

    @property
    def parts(self) -> Mapping[str, Part]:
        """Each region by its name."""

    def tensor(self, number: int) -> torch.Tensor:
        """One tensor, in host memory and filling its storage; with its strides, where they are dense."""

    def wait(self) -> None:
        """Block until all copies are there, and have come from their devices."""

    def changed(self) -> Sequence[int]:
        """The numbers of tensors that somebody changed before their copy was done. To be asked when all is written."""


class Live:
    """Tensors written from where they are, while training waits."""

    def __init__(self, regions: Mapping[str, Region], flat: FlatSnapshot) -> None:
        self._tensors = flat.tensors
        self.parts: Mapping[str, Part] = {name: Gathered(region, flat) for name, region in regions.items()}

    def tensor(self, number: int) -> torch.Tensor:
        return compact(self._tensors[number])

    def wait(self) -> None:
        for device in {tensor.device for tensor in self._tensors if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()

    def changed(self) -> Sequence[int]:
        return ()  # training waits


class Gathered:
    """A region whose bytes are gathered from live tensors, a part at a time."""

    def __init__(self, region: Region, flat: FlatSnapshot) -> None:
        self.size = region.size
        self._region, self._flat = region, flat

    def part(self, begin: int, end: int, scratch: memoryview) -> memoryview:
        region, flat = self._region, self._flat
        out, base = scratch[: end - begin], address(scratch) - begin
        if begin < len(region.header):
            piece = region.header[begin:end]
            out[: len(piece)] = piece
        first = max(0, bisect_right(region.texts, begin, key=_BEGIN) - 1)
        for k in range(first, bisect_left(region.texts, end, key=_BEGIN)):
            at, text = region.texts[k]
            piece = text[max(0, begin - at) : end - at]
            out[max(0, at - begin) : max(0, at - begin) + len(piece)] = piece
        first = max(0, bisect_right(region.begins, begin) - 1)
        for k in range(first, bisect_left(region.begins, end)):
            at, tensor = region.begins[k], flat.tensors[region.numbers[k]]
            lower, upper = max(at, begin), min(at + tensor.nbytes, end)
            if lower >= upper:
                continue
            if is_plain_host(tensor):
                move(base + lower, tensor.data_ptr() + lower - at, upper - lower)
            else:
                copy_out(tensor, lower - at, scratch[lower - begin : upper - begin])
        return out


def is_plain_host(tensor: torch.Tensor) -> bool:
    """Whether the tensor's contiguous form is what lies at its address in host memory."""
    return tensor.is_cpu and tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg())


def copy_out(tensor: torch.Tensor, begin: int, out: memoryview) -> None:
    """Bytes of a dense tensor's contiguous form, from `begin` on as many as `out` has room for. Any
    device and strides; beside `out` it takes no more memory than `out` has."""
    if not out:
        return
    tensor = tensor.detach()
    if tensor.is_contiguous() and not (tensor.is_conj() or tensor.is_neg()):
        torch.frombuffer(out, dtype=torch.uint8).copy_(raw(tensor)[begin : begin + len(out)])
    elif tensor.numel() == 1 or tensor.dim() == 0:
        copy_out(tensor.resolve_conj().resolve_neg().contiguous(), begin, out)
    else:
        row = tensor.nbytes // tensor.shape[0]
        end, done = begin + len(out), 0
        while done < len(out):
            number, inside = divmod(begin + done, row)
            whole = (end - begin - done) // row
            if inside == 0 and whole:
                count = whole * row
                rows = tensor[number : number + whole].resolve_conj().resolve_neg().contiguous()
                copy_out(rows, 0, out[done : done + count])
            else:
                count = min(row - inside, len(out) - done)
                copy_out(tensor[number], inside, out[done : done + count])
            done += count


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor, as a tensor of the same memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def own_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in host memory that nobody else holds, and that fills its storage. Dense strides stay."""
    with torch.no_grad():
        if is_special(tensor):
            copy = tensor.detach().to("cpu", copy=True)
        else:
            copy = torch.empty_strided(tensor.shape, dense_stride(tensor), dtype=tensor.dtype)
            copy.copy_(tensor)
    return like(copy, tensor)


def like(copy: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The copy as a parameter and with `requires_grad` where the tensor is so."""
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(copy, requires_grad=tensor.requires_grad)
    return copy.requires_grad_(tensor.requires_grad)


def refuse_hidden(tensor: torch.Tensor, path: Sequence[str]) -> None:
    """Raises `StateMismatchError` naming the path when the tensor has no values, or none that can be read."""
    if tensor.is_meta:
        raise StateMismatchError(
            f"{'.'.join(path)} is on the meta device and has no values to save; "
            "materialize it first (`to_empty`, then load)"
        )
    if tensor.is_mkldnn:
        raise StateMismatchError(
            f"{'.'.join(path)} is an mkldnn tensor, whose memory only mkldnn can read; save its to_dense()"
        )


def is_special(tensor: torch.Tensor) -> bool:
    """Whether the tensor is more than dense numbers: sparse, quantized or nested."""
    return tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether elements with these strides fill one piece of memory with no hole and no overlap."""
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True


def dense_stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """The tensor's own strides where it is dense, else those of its contiguous form."""
    if tensor.is_contiguous() or not is_dense(tensor.shape, tensor.stride()):
        return tuple(math.prod(tensor.shape[i + 1 :]) for i in range(tensor.dim()))
    return tensor.stride()


def compact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where it is in host memory and fills its storage, else a copy that does."""
    if tensor.device.type != "cpu":
        return own_copy(tensor)
    if is_special(tensor) or tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size():
        return tensor
    return own_copy(tensor)


def memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a dense host tensor, not copied. The caller keeps the tensor alive meanwhile."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B") if size else memoryview(b"")
