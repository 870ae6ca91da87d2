"""What of a state is copied to which place in the arena? Worked out once for states of one shape."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from itertools import accumulate, pairwise
from operator import add, itemgetter
from typing import Any

import torch

from .memory import address
from .moves import gather, move
from .overlap import Mark
from .staging import Region, dense_stride, is_dense, is_plain_host, is_special, like, raw
from .state.snapshot import FlatSnapshot
from .store import BLOCK

STRIDE = 8 << 20  # bytes that one of two copying threads takes at a time

_LARGE = 256 << 10  # bytes; from here on a copy lets other threads run, and is worth a second one


class Program:
    """What is to be copied where for states of one shape: worked out once, run at every save."""

    def __init__(self, regions: Mapping[str, Region], flat: FlatSnapshot, memory: memoryview) -> None:
        self.shape, self.regions, self.offsets = flat.shape, regions, _offsets(regions)
        self._small: list[tuple[int, int, int]] = []  # number, address, bytes
        self._large: list[tuple[int, int, int]] = []
        self._views: list[tuple[int, torch.Tensor]] = []
        self.device: list[tuple[int, torch.Tensor]] = []
        self.special = [number for number, tensor in enumerate(flat.tensors) if is_special(tensor)]
        self._forms: dict[int, tuple[int, torch.Tensor]] = {}  # place, and a meta tensor that says what lies there
        for name, region in regions.items():
            begin = self.offsets[name]
            for at, text in ((0, region.header), *region.texts):
                memory[begin + at : begin + at + len(text)] = text
            for number, at in zip(region.numbers, region.begins, strict=True):
                self._add(number, flat.tensors[number], memory, begin + at, region.keeps_strides)
        self.large_bytes = sum(size for _, _, size in self._large)
        numbers = [number for number, _, _ in self._small]
        self._pick: Callable[[Any], Any] = itemgetter(*numbers) if len(numbers) > 1 else _picker(numbers)
        self._sizes = [size for _, _, size in self._small]
        self._runs = _runs([place for _, place, _ in self._small], self._sizes)

    def _add(self, number: int, tensor: torch.Tensor, memory: memoryview, at: int, keeps_strides: bool) -> None:
        size = tensor.nbytes
        if keeps_strides:
            form = torch.empty_strided(tensor.shape, dense_stride(tensor), dtype=tensor.dtype, device="meta")
            self._forms[number] = (at, like(form, tensor))
        if not size:
            return
        place = address(memory) + at
        is_raw = keeps_strides and tensor.is_cpu and not (tensor.is_conj() or tensor.is_neg())
        if is_plain_host(tensor) or (is_raw and is_dense(tensor.shape, tensor.stride())):
            (self._large if size >= _LARGE else self._small).append((number, place, size))
        else:
            stride = dense_stride(tensor) if keeps_strides else None
            view = _view(memory, at, tensor.shape, stride, tensor.dtype)
            (self._views if tensor.is_cpu else self.device).append((number, view))

    def copy_small(self, flat: FlatSnapshot) -> None:
        """Tensors that are many, and those that no plain copy will do for."""
        known = flat.pointers
        places = list(map(torch.Tensor.data_ptr, self._pick(flat.tensors))) if known is None else self._pick(known)
        for begin, first, last in self._runs:
            gather(begin, places[first:last], self._sizes[first:last])
        with torch.no_grad():
            for number, view in self._views:
                if view.data_ptr() % view.itemsize:  # torch's own copy may end the process there
                    raw(view).copy_(raw(flat.tensors[number].resolve_conj().resolve_neg().contiguous()))
                else:
                    view.copy_(flat.tensors[number])

    def tensor(self, number: int, memory: memoryview) -> torch.Tensor:
        """A tensor of a region that keeps strides, in the arena."""
        at, form = self._forms[number]
        return like(_view(memory, at, form.shape, form.stride(), form.dtype), form)

    def numbers(self, flat: FlatSnapshot, late: Collection[torch.Tensor]) -> list[int]:
        """Of large tensors and those on a CUDA device, the ones that lie just where one of `late` does."""
        if not late:
            return []
        places = {(tensor.data_ptr(), tensor.nbytes) for tensor in late if tensor.layout == torch.strided}
        mine = [number for number, _, _ in self._large]
        mine += [number for number, _ in self.device if flat.tensors[number].is_cuda]
        return [number for number in mine if (flat.tensors[number].data_ptr(), flat.tensors[number].nbytes) in places]

    def large(self, flat: FlatSnapshot, late: Collection[int], *, is_late: bool) -> list[Callable[[], object]]:
        """Copies of those large tensors that are late, or are not, in pieces that threads may share."""
        return [
            partial(move, place + at, flat.tensors[number].data_ptr() + at, min(STRIDE, size - at))
            for number, place, size in self._large
            if (number in late) == is_late
            for at in range(0, size, STRIDE)
        ]

    def copy_from_devices(self, flat: FlatSnapshot, late: Collection[int]) -> tuple[list[Mark], list[Mark]]:
        """Start the copies from devices; what the end of those that are not late, and of those that are, is
        waited for with."""
        now, later = list[Mark](), list[Mark]()
        turns = [(now, False), (later, True)] if late else [(now, False)]
        with torch.no_grad():
            for device in {flat.tensors[number].device for number, _ in self.device}:
                mine = [(n, flat.tensors[n], view) for n, view in self.device if flat.tensors[n].device == device]
                if device.type != "cuda":
                    for _, tensor, view in mine:
                        view.copy_(tensor)
                    continue
                # A stream of its own, after what training has queued so far.
                side = _side_stream(device)
                side.wait_stream(torch.cuda.current_stream(device))
                for marks, is_late in turns:
                    with torch.cuda.stream(side):
                        for number, tensor, view in mine:
                            if (number in late) == is_late:
                                view.copy_(tensor, non_blocking=True)
                                tensor.record_stream(side)
                    marks.append((device, side.record_event()))
        return now, later


def staged_size(regions: Mapping[str, Region]) -> int:
    """The bytes of an arena that holds these regions."""
    return sum(map(_room, regions.values()))


def _offsets(regions: Mapping[str, Region]) -> dict[str, int]:
    ends = list(accumulate(map(_room, regions.values())))
    return dict(zip(regions, [0, *ends[:-1]], strict=True)) if regions else {}


def _room(region: Region) -> int:
    return -(-region.size // BLOCK) * BLOCK


def _view(
    memory: memoryview, at: int, shape: torch.Size, stride: tuple[int, ...] | None, dtype: torch.dtype
) -> torch.Tensor:
    """The tensor that lies in memory from `at` on, with a storage of just its size."""
    size = math.prod(shape)
    if not size:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(memory, dtype=torch.uint8, offset=at, count=size * dtype.itemsize).view(dtype)
    return flat.view(shape) if stride is None else flat.as_strided(shape, stride)


def _runs(places: list[int], sizes: list[int]) -> list[tuple[int, int, int]]:
    """Where in memory each run of places without gaps begins, and from which number to which it goes."""
    ends = map(add, places, sizes)
    firsts = [0, *(number for number, end in enumerate(ends, 1) if number < len(places) and places[number] != end)]
    return [(places[first], first, last) for first, last in pairwise([*firsts, len(places)])] if places else []


def _picker(numbers: list[int]) -> Callable[[Any], Any]:
    """What `itemgetter` does for two and more."""
    return lambda items: [items[number] for number in numbers]


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _streams[device]
