"""Which bytes of a stored tensor belong into a part of it, and how do they get there?

A part is a box: so many elements from an offset on, along every dimension. Stored bytes are those of a
contiguous tensor, cut anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from operator import itemgetter, mul

import torch

from ..memory import view
from ..staging import raw
from ..transfer import Segment


def span(shape: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]) -> tuple[int, int]:
    """From which element to which the box reaches in a contiguous tensor of this shape; it has elements."""
    strides = [*accumulate(reversed(shape[1:]), mul, initial=1)][::-1] if shape else []
    first = sum(map(mul, offsets, strides))
    return first, first + sum((length - 1) * stride for length, stride in zip(lengths, strides, strict=True)) + 1


def is_run(shape: Sequence[int], offsets: Sequence[int], lengths: Sequence[int]) -> bool:
    """Whether the box is all that lies between its first and its last element."""
    first, last = span(shape, offsets, lengths)
    return last - first == math.prod(lengths)


def pour(target: torch.Tensor, begin: int, data: memoryview) -> None:
    """Put bytes of a dense tensor's contiguous form, from `begin` on, into the tensor. Any device and
    strides, and wherever the bytes are cut; takes no more memory than `data` has."""
    if target.is_contiguous() and not (target.is_conj() or target.is_neg()):
        raw(target)[begin : begin + len(data)].copy_(as_bytes(data))
    elif target.numel() == 1:
        whole = target.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        pour(whole, begin, data)
        target.copy_(whole)
    else:
        row = target.nbytes // target.shape[0]
        done = 0
        while done < len(data):
            number, inside = divmod(begin + done, row)
            whole_rows = (len(data) - done) // row
            if inside == 0 and whole_rows:
                count = whole_rows * row
                rows = as_numbers(data[done : done + count], target.dtype).view(whole_rows, *target.shape[1:])
                target[number : number + whole_rows].copy_(rows)
            else:
                count = min(row - inside, len(data) - done)
                pour(target[number], inside, data[done : done + count])
            done += count


def as_bytes(data: memoryview) -> torch.Tensor:
    """The same memory as a tensor; a copy of what may not be written, which torch has no tensor for."""
    return torch.frombuffer(bytearray(data) if data.readonly else data, dtype=torch.uint8)


def as_numbers(data: memoryview, dtype: torch.dtype) -> torch.Tensor:
    """The same memory as a tensor of numbers; a copy where they do not lie as the processor wants them, on which
    torch may end the process."""
    found = as_bytes(data)
    return (found.clone() if found.data_ptr() % dtype.itemsize else found).view(dtype)


def pour_box(target: torch.Tensor, shape: Sequence[int], offsets: Sequence[int], begin: int, data: memoryview) -> None:
    """Put into the target what of it is in `data`: bytes, from `begin` on, of a contiguous tensor of this shape, in
    which the target is the box at these offsets."""
    if tuple(target.shape) == tuple(shape):
        pour(target, begin, data)
        return
    row = math.prod(shape[1:]) * target.itemsize
    low, high = offsets[0], offsets[0] + target.shape[0]
    done = 0
    while done < len(data):
        number, inside = divmod(begin + done, row)
        rows = (len(data) - done) // row
        if inside == 0 and rows:
            count = rows * row
            lower, upper = max(number, low), min(number + rows, high)
            if lower < upper:
                part = data[done + (lower - number) * row : done + (upper - number) * row]
                found = as_numbers(part, target.dtype).view(upper - lower, *shape[1:])
                for dim, (offset, length) in enumerate(zip(offsets[1:], target.shape[1:], strict=True), 1):
                    found = found.narrow(dim, offset, length)
                target[lower - low : upper - low].copy_(found)
        else:
            count = min(row - inside, len(data) - done)
            if low <= number < high:
                pour_box(target[number - low], shape[1:], offsets[1:], inside, data[done : done + count])
        done += count


def in_order(segments: Sequence[Segment]) -> list[Segment]:
    """The segments by their begin; those that have bytes in common are one, which gives each of them its own."""
    ordered: list[Segment] = []
    shared: list[Segment] = []
    for one in sorted(segments, key=itemgetter(0, 1)):
        if shared and one[0] < max(map(itemgetter(1), shared)):
            shared.append(one)
        else:
            ordered += _joined(shared)
            shared = [one]
    return ordered + _joined(shared)


def _joined(shared: Sequence[Segment]) -> list[Segment]:
    if len(shared) < 2:
        return list(shared)
    first, last = shared[0][0], max(map(itemgetter(1), shared))

    def take(begin: int, data: memoryview) -> None:
        at, stop = first + begin, first + begin + len(data)
        for low, high, sink in shared:
            lower, upper = max(low, at), min(high, stop)
            if lower < upper:
                part = data[lower - at : upper - at]
                if isinstance(sink, int):
                    view(sink + lower - low, upper - lower)[:] = part
                else:
                    sink(lower - low, part)

    return [(first, last, take)]
