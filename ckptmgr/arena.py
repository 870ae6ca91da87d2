"""Where does the copy of a state lie that is written while training goes on? In one piece of memory, made once.

The arena is laid out like the files: each region begins at a page boundary, its header and tensors
lie as they will on the disk, so that the writer takes large pieces straight out of it.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch

from .memory import address, available, buffer
from .overlap import Rest
from .program import STRIDE, Program, staged_size
from .staging import Part, Region, own_copy
from .state.snapshot import FlatSnapshot

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
        self._program: Program | None = None
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
            program = self._program = Program(regions, flat, memory)
        if self._is_pinned is None and any(flat.tensors[number].is_cuda for number, _ in program.device):
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
        if size < 2 * STRIDE:
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


class Staged:
    """A state copied into the arena: `staging.Held`. Valid until the arena holds the next one."""

    def __init__(
        self, program: Program, memory: memoryview, flat: FlatSnapshot, events: list[torch.cuda.Event], rest: Rest
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


def _touch(memory: memoryview) -> None:
    for at in range(0, len(memory), STRIDE):
        ctypes.memset(address(memory) + at, 0, min(STRIDE, len(memory) - at))


def _done() -> Future[None]:
    future: Future[None] = Future()
    future.set_result(None)
    return future


def _pin(memory: memoryview) -> bool:
    """Pin the memory, so that devices write to it while the processor does something else."""
    code = torch.cuda.cudart().cudaHostRegister(address(memory), len(memory), 0)  # type: ignore[no-untyped-call]
    if code.value:
        _log.warning("arena.pin.failed code=%s (copies from the device are slower)", code)
    return not code.value
