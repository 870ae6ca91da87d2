"""Into which memory does a tensor's bytes go when it is read? Straight into the target's, where that can be."""

from __future__ import annotations

import io
from typing import BinaryIO, cast

import torch

from ..errors import DamagedError, StateMismatchError
from ..staging import is_special, memory
from ..state.snapshot import StoredTensor

_BOUNCE_SIZE = 64 << 20  # bytes; what a read into device or scattered memory holds on the host at a time


def refuse_misfit(stored: StoredTensor, target: torch.Tensor) -> None:
    """Raises `StateMismatchError` when the target has another shape or dtype, or is not a dense tensor."""
    if is_special(target):
        raise StateMismatchError(
            f"a stored dense tensor of {stored.shape} does not go into a {target.layout} {target.dtype} one"
        )
    if target.dtype != stored.dtype or tuple(target.shape) != stored.shape:
        raise StateMismatchError(
            f"a stored tensor of {stored.dtype} {stored.shape} does not go into one of {target.dtype} "
            f"{tuple(target.shape)}"
        )


def fresh(stored: StoredTensor, device: str | torch.device) -> torch.Tensor:
    """A new tensor for a stored one, with its strides."""
    if stored.stride is None:
        return torch.empty(stored.shape, dtype=stored.dtype, device=device)
    return torch.empty_strided(stored.shape, stored.stride, dtype=stored.dtype, device=device)


def fill(target: torch.Tensor, file: BinaryIO, name: str) -> None:
    """Fill a tensor with the next bytes of a file, which are those of its contiguous form.

    They go straight into a contiguous host tensor, for others through at most 64 MiB of host memory
    at a time. Raises `DamagedError` naming the file when it ends first.
    """
    if target.device.type == "cpu" and target.is_contiguous() and not (target.is_conj() or target.is_neg()):
        read_exactly(file, memory(target), name)
        return
    target = target.detach()
    size = target.numel() * target.element_size()
    if size <= _BOUNCE_SIZE:
        bounce = torch.empty(target.shape, dtype=target.dtype)
        read_exactly(file, memory(bounce), name)
        target.copy_(bounce)
    elif target.shape[0] == 1:
        fill(target[0], file, name)
    else:
        rows = max(1, _BOUNCE_SIZE * target.shape[0] // size)
        for start in range(0, target.shape[0], rows):
            fill(target[start : start + rows], file, name)


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
            if tensor.layout not in (torch.strided, torch.sparse_coo):
                target.resize_as_sparse_(tensor)
            target.copy_(tensor)
    except RuntimeError as exc:
        raise StateMismatchError(
            f"a stored {tensor.layout} tensor of {tensor.dtype} does not go into a {target.layout} one of "
            f"{target.dtype}: {exc}"
        ) from exc
    return target
