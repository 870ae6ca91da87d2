"""Where does the copy of a state lie that is written while training goes on? In one piece of memory, made once.

The arena is laid out like the files: each region begins at a page boundary, its header and tensors
lie as they will on the disk, so that the writer takes large pieces straight out of it.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import accumulate
from operator import itemgetter
from typing import Any

import torch

from .memory import address, available, buffer, move, move_small
from .overlap import Mark, Rest
from .staging import Part, Region, dense_stride, is_dense, is_plain_host, is_special, like, own_copy, raw
from .state.snapshot import FlatSnapshot
from .store import BLOCK

_LARGE = 256 << 10  # bytes; from here on a copy lets other threads run, and is worth a second one
_STRIDE = 8 << 20  # bytes that one of two copying threads takes at a time
_RESERVE = 512 << 20  # bytes left free for everything else

_log = logging.getLogger("ckptmgr.save")


class Arena:
    """Host memory for one copied state at a time; grown when a state needs more, never shrunk.

    `limit` is the most bytes to use; None: as many as are free. The memory is pinned as soon as a
    state has tensors on a CUDA device. Methods are called from one thread.
    """

    def __init__(self, limit: int | None = None) -> None:
        self._limit = limit
        self._memory: memoryview | None = None
        self._program: _Program | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._touched = _done()
        self._pid = os.getpid()
        self._is_pinned: bool | None = None  # until it is tried

    def has_room(self, size: int) -> bool:
        """Whether `size` bytes fit, in what is there already or could be made."""
        own = self._size
        if size <= own:
            return True
        free = available()
        reserve = min(_RESERVE, size)
        return (self._limit is None or size <= self._limit) and (free is None or size - own <= free - reserve)

    def prepare(self, size: int) -> Future[None]:
        """Make room for `size` bytes, and have a thread touch every page of it: the first use of memory
        costs more than the copy. `hold` waits for it. Raises `MemoryError`."""
        if size > self._size:
            memory = self._reserve(size)
            with suppress(RuntimeError):  # the interpreter ends and starts no thread
                self._touched = self._threads().submit(_touch, memory)
        return self._touched

    def hold(self, regions: Mapping[str, Region], flat: FlatSnapshot, late: Collection[torch.Tensor] = ()) -> Staged:
        """Copy the tensors. At return the caller may change those in host memory, and use those on a
        device in its current stream: the copies come first there. The larger ones of `late` may be changed only
        after the `settle` of `Staged.rest`. What was held before is overwritten. Raises `MemoryError`."""
        self._wait_for_touch()
        memory = self._reserve(staged_size(regions))
        program = self._program
        if program is None or program.shape is not flat.shape or program.regions is not regions:
            program = self._program = _Program(regions, flat, memory)
        if program.device and self._is_pinned is None:
            self._is_pinned = _pin(memory)
        waiting = dict.fromkeys(program.numbers(flat, late))
        in_time = program.large(flat, waiting, is_late=False)
        self._in_two_threads(in_time, 0 if waiting else program.large_bytes)
        program.copy_small(flat)  # after these, as two threads bring the memory faster than one
        now, later = program.copy_from_devices(flat, waiting)
        for device, event in now:
            torch.cuda.current_stream(device).wait_event(event)
        watched = [flat.tensors[number] for number in waiting]
        rest = self._in_a_thread(program.large(flat, waiting, is_late=True), watched)
        return Staged(program, memory, flat, [event for _, event in now], Rest(rest, later, [*waiting], watched))

    def release(self) -> None:
        """Give the memory back."""
        self._wait_for_touch()
        if self._memory is not None and self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(address(self._memory))  # type: ignore[no-untyped-call]
        self._memory = self._program = self._is_pinned = None
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    @property
    def _size(self) -> int:
        if self._pid != os.getpid():  # forked: the memory stayed with the parent, and so did the thread
            self._memory = self._program = self._pool = None
            self._touched, self._is_pinned = _done(), None
            self._pid = os.getpid()
        return 0 if self._memory is None else len(self._memory)

    def _wait_for_touch(self) -> None:
        if self._size:  # else there is none, or the thread stayed with the parent
            self._touched.result()

    def _reserve(self, size: int) -> memoryview:
        if self._size < size or self._memory is None:
            self.release()
            self._memory = buffer(size)  # after an error there is none
        return self._memory

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "ckptmgr-copy")
        return self._pool

    def _in_a_thread(self, tasks: list[Callable[[], object]], sources: Sequence[torch.Tensor]) -> Future[None]:
        """The tasks know addresses: the `sources` stay until they are done."""

        def work(sources: Sequence[torch.Tensor] = sources) -> None:
            for task in tasks:
                task()

        if tasks:
            with suppress(RuntimeError):  # the interpreter ends and starts no thread
                return self._threads().submit(work)
            work()
        return _done()

    def _in_two_threads(self, tasks: list[Callable[[], object]], size: int) -> None:
        if size < 2 * _STRIDE:
            for task in tasks:
                task()
            return
        todo = tasks[::-1]

        def work() -> None:
            while todo:
                try:
                    task = todo.pop()
                except IndexError:  # the other one was faster
                    return
                task()

        other = _done()
        with suppress(RuntimeError):  # the interpreter ends and starts no thread
            other = self._threads().submit(work)
        try:
            work()
        finally:
            todo.clear()  # after an error the other one stops, too: what it reads from may go any moment
            other.result()


class _Program:
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
        self._to = [place for _, place, _ in self._small]
        self._sizes = [size for _, _, size in self._small]

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
        addresses = map(torch.Tensor.data_ptr, self._pick(flat.tensors)) if known is None else self._pick(known)
        for _ in map(move_small, self._to, addresses, self._sizes):
            pass
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
            partial(move, place + at, flat.tensors[number].data_ptr() + at, min(_STRIDE, size - at))
            for number, place, size in self._large
            if (number in late) == is_late
            for at in range(0, size, _STRIDE)
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


class Staged:
    """A state copied into the arena: `staging.Held`. Valid until the arena holds the next one."""

    def __init__(
        self, program: _Program, memory: memoryview, flat: FlatSnapshot, events: list[torch.cuda.Event], rest: Rest
    ) -> None:
        self._program, self._memory, self._events, self.rest = program, memory, events, rest
        self._special = {number: own_copy(flat.tensors[number]) for number in program.special}
        self.parts: Mapping[str, Part] = {
            name: _Copied(memory[at : at + region.size])
            for (name, region), at in zip(program.regions.items(), program.offsets.values(), strict=True)
        }

    def tensor(self, number: int) -> torch.Tensor:
        return self._special[number] if number in self._special else self._program.tensor(number, self._memory)

    def wait(self) -> None:
        for event in self._events:
            event.synchronize()
        self.rest.wait()

    def changed(self) -> Sequence[int]:
        return self.rest.changed()


class _Copied:
    """A region in the arena."""

    def __init__(self, memory: memoryview) -> None:
        self.size = len(memory)
        self._memory = memory

    def part(self, begin: int, end: int, scratch: memoryview) -> memoryview:
        return self._memory[begin:end]


def staged_size(regions: Mapping[str, Region]) -> int:
    """The bytes of an arena that holds these regions."""
    return sum(map(_room, regions.values()))


def _offsets(regions: Mapping[str, Region]) -> dict[str, int]:
    ends = list(accumulate(map(_room, regions.values())))
    return dict(zip(regions, [0, *ends[:-1]], strict=True)) if regions else {}


def _room(region: Region) -> int:
    return -(-region.size // BLOCK) * BLOCK


def _touch(memory: memoryview) -> None:
    for at in range(0, len(memory), _STRIDE):
        ctypes.memset(address(memory) + at, 0, min(_STRIDE, len(memory) - at))


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


def _view(
    memory: memoryview, at: int, shape: torch.Size, stride: tuple[int, ...] | None, dtype: torch.dtype
) -> torch.Tensor:
    """The tensor that lies in memory from `at` on, with a storage of just its size."""
    size = math.prod(shape)
    if not size:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(memory, dtype=torch.uint8, offset=at, count=size * dtype.itemsize).view(dtype)
    return flat.view(shape) if stride is None else flat.as_strided(shape, stride)


def _picker(numbers: list[int]) -> Callable[[Any], Any]:
    """What `itemgetter` does for two and more."""
    return lambda items: [items[number] for number in numbers]


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return _streams[device]


def _pin(memory: memoryview) -> bool:
    """Pin the memory, so that devices write to it while the processor does something else."""
    code = torch.cuda.cudart().cudaHostRegister(address(memory), len(memory), 0)  # type: ignore[no-untyped-call]
    if code.value:
        _log.warning("arena.pin.failed code=%s (copies from the device are slower)", code)
    return not code.value
