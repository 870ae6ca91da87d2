"""Into which memory do a tensor's bytes go when it is read? Straight into the target's, where that can be."""

from __future__ import annotations

import io
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import BinaryIO, cast

import torch

from ..errors import DamagedError, StateMismatchError
from ..memory import use_huge_pages
from ..staging import is_plain_host, is_special, memory, raw
from ..state.shards import boxes, is_sharded, local
from ..state.snapshot import StoredTensor
from ..transfer import CHUNK, Segment, Sink
from .boxes import as_bytes, is_run, pour, pour_box, span

_LARGE = 4 << 20  # bytes; from here on huge pages are worth a system call


def refuse_misfit(stored: StoredTensor, target: torch.Tensor) -> None:
    """Raises `StateMismatchError` when the target has another shape or dtype, or is not a dense tensor."""
    if is_special(target):
        raise StateMismatchError(
            f"a stored dense tensor of {stored.shape} does not go into a {target.layout} {target.dtype} one"
        )
    if target.dtype != stored.dtype or target.shape != stored.shape:
        raise StateMismatchError(
            f"a stored tensor of {stored.dtype} {stored.shape} does not go into one of {target.dtype} "
            f"{tuple(target.shape)}"
        )


def refuse_unsound(tensor: torch.Tensor, name: str) -> None:
    """Raises `DamagedError` for a sparse tensor of a file with indices outside of it, which torch takes as it is, and
    then writes to memory that is not its own."""
    compressed = {torch.sparse_csr, torch.sparse_bsr}, {torch.sparse_csc, torch.sparse_bsc}
    own = tensor.detach()
    try:
        if own.layout == torch.sparse_coo:
            torch.sparse_coo_tensor(own._indices(), own._values(), own.shape, check_invariants=True)
        elif own.layout in compressed[0]:
            places = own.crow_indices(), own.col_indices()
            torch.sparse_compressed_tensor(*places, own.values(), own.shape, layout=own.layout, check_invariants=True)
        elif own.layout in compressed[1]:
            places = own.ccol_indices(), own.row_indices()
            torch.sparse_compressed_tensor(*places, own.values(), own.shape, layout=own.layout, check_invariants=True)
    except (RuntimeError, ValueError) as exc:
        raise DamagedError(f"{name} has a sparse tensor that is none: {exc}") from exc


def fresh(stored: Iterable[StoredTensor], device: str | torch.device) -> dict[StoredTensor, torch.Tensor]:
    """A new tensor for each stored one, with its strides; each owns its memory."""
    kinds: dict[tuple[object, ...], list[StoredTensor]] = defaultdict(list)
    for one in stored:
        kinds[one.shape, one.dtype, one.stride].append(one)
    result: dict[StoredTensor, torch.Tensor] = {}
    for alike in kinds.values():
        shape, dtype, stride = alike[0].shape, alike[0].dtype, alike[0].stride
        if stride is None:
            first = torch.empty(shape, dtype=dtype, device=device)
        else:
            first = torch.empty_strided(shape, stride, dtype=dtype, device=device)
        tensors = [first, *map(torch.empty_like, repeat(first, len(alike) - 1))]  # half the time of `empty`
        if first.is_cpu and first.nbytes >= _LARGE:
            for tensor in tensors:
                use_huge_pages(tensor.data_ptr(), tensor.nbytes)
        result.update(zip(alike, tensors, strict=True))
    return result


class Landing:
    """Where the bytes of tensors go while files are read, from any thread.

    The bytes may come between `begin` and `end`, which block until devices are ready for them, and have them.
    """

    def __init__(self) -> None:
        self._devices: set[torch.device] = set()
        self._threads = threading.local()

    def sink(self, stored: StoredTensor, target: torch.Tensor) -> Sink:
        """Takes a tensor's bytes into the target. Raises `StateMismatchError` when it does not fit."""
        if target.layout != torch.strided or target.dtype != stored.dtype or target.shape != stored.shape:
            refuse_misfit(stored, target)
        # As `is_plain_host`, without a call for each of 100,000.
        if target.is_cpu and target.is_contiguous() and not (target.is_conj() or target.is_neg()):
            return target.data_ptr()
        return self._through(target.detach())

    def parts(self, stored: StoredTensor, target: torch.Tensor, begin: int) -> list[Segment]:
        """Takes the part of a sharded target that is on this rank, from where the whole tensor begins in a file.
        Raises `StateMismatchError` when it does not fit."""
        refuse_misfit(stored, target)
        found = []
        for offsets, sizes in boxes(target):
            if 0 not in sizes:
                first, last, sink = self.box(local(target), stored.shape, offsets)
                found.append((begin + first, begin + last, sink))
        return found

    def box(self, target: torch.Tensor, shape: Sequence[int], offsets: Sequence[int]) -> Segment:
        """Takes, from the bytes of a contiguous tensor of this shape, those of the box at these offsets, which
        the target is. The target has elements, and the stored dtype."""
        first, last = (place * target.itemsize for place in span(shape, offsets, target.shape))
        if is_run(shape, offsets, target.shape):
            if is_plain_host(target):
                return first, last, target.data_ptr()
            return first, last, self._through(target.detach())

        def put_bytes(target: torch.Tensor, begin: int, data: memoryview) -> None:
            pour_box(target, shape, offsets, first + begin, data)

        if target.is_cuda:
            self._devices.add(target.device)
        return first, last, _taking(put_bytes, target.detach())

    def _through(self, target: torch.Tensor) -> Sink:
        """For memory that is elsewhere, or scattered."""
        put_bytes = pour
        if target.is_cuda:
            self._devices.add(target.device)
            if target.is_contiguous() and not (target.is_conj() or target.is_neg()):
                put_bytes, target = self._send, raw(target)
        return _taking(put_bytes, target)

    def begin(self) -> None:
        for device in self._devices:
            torch.cuda.synchronize(device)  # what training has under way on these tensors comes first

    end = begin

    def _send(self, target: torch.Tensor, begin: int, data: memoryview) -> None:
        """Bytes to a CUDA device through pinned memory: while one half travels the other is filled."""
        lanes = self._threads.__dict__.setdefault(str(target.device), [])
        for at in range(0, len(data), CHUNK):
            part = data[at : at + CHUNK]
            if len(lanes) < 2:
                lane = torch.empty(CHUNK, dtype=torch.uint8, device="cpu", pin_memory=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
            else:
                lane = lanes.pop(0)
                lane[1].synchronize()
            pinned = lane[0][: len(part)]
            pinned.copy_(as_bytes(part))
            target[begin + at : begin + at + len(part)].copy_(pinned, non_blocking=True)
            lane[1].record(torch.cuda.current_stream(target.device))
            lanes.append(lane)


def _taking(
    put_bytes: Callable[[torch.Tensor, int, memoryview], None], target: torch.Tensor
) -> Callable[[int, memoryview], None]:
    def take(begin: int, data: memoryview) -> None:
        with torch.inference_mode(target.is_inference()):  # a thread of its own begins without the mode
            put_bytes(target, begin, data)

    return take


def fill(target: torch.Tensor, file: BinaryIO, name: str) -> None:
    """Fill a contiguous tensor with the next bytes of a file: straight, or through `CHUNK` bytes of
    host memory where it is on a device. Raises `DamagedError` naming the file when it ends first."""
    if target.is_cpu:
        read_exactly(file, memory(target), name)
        return
    bounce = memoryview(bytearray(min(CHUNK, target.nbytes)))
    for begin in range(0, target.nbytes, CHUNK):
        part = bounce[: target.nbytes - begin]
        read_exactly(file, part, name)
        pour(target, begin, part)


def read_exactly(file: BinaryIO, view: memoryview, name: str) -> None:
    """Fill the view from a file, or raise `DamagedError` when the file ends first."""
    done = 0
    while done < len(view):
        count = cast(io.RawIOBase, file).readinto(view[done:])
        if not count:
            raise DamagedError(f"{name} ends {len(view) - done:,} bytes too early")
        done += count


def put(tensor: torch.Tensor, target: torch.Tensor | None, device: str | torch.device) -> torch.Tensor:
    """A loaded tensor in the target's memory, or as a fresh one that shares no memory with it.

    Raises `StateMismatchError` when the target can't hold it.
    """
    if target is None:
        return tensor.detach().to(device, copy=True)
    try:
        with torch.no_grad():
            if is_sharded(target):
                for offsets, sizes in boxes(target):
                    for dim, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
                        tensor = tensor.narrow(dim, offset, size)
                    local(target).copy_(tensor)
                return target
            if tensor.layout not in (torch.strided, torch.sparse_coo):
                target.resize_as_sparse_(tensor)
            target.copy_(tensor)
    except RuntimeError as exc:
        raise StateMismatchError(
            f"a stored {tensor.layout} tensor of {tensor.dtype} does not go into a {target.layout} one of "
            f"{target.dtype}: {exc}"
        ) from exc
    return target
