"""How fast could anything be here? The machine's own speed at moving as many bytes, with no checkpoint around them."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

from ..memory import address, available, buffer
from . import disk
from .tasks import Outcome, Task

_TIMES = 3
_SPARE = 256 << 20  # bytes that are left to others


def limits(task: Task) -> Outcome:
    """Seconds for the task's size, over several tries: `copy` from memory into a ready buffer, and on a
    disk `write` (durable, from a ready buffer), `read` and `cached` (into a ready buffer). Blocks."""
    size = disk.whole_blocks(task.size)
    source, target = buffer(size), buffer(size)
    _fill(source)
    figures = {"copy": _copies(source, target, size) if task.device == "cpu" else _copies_from_device(task)}
    folder = task.place.path
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        figures |= _of_disk(folder, source, target)
    return Outcome(figures, wrong=None if folder is None or source == target else "the limits")


def prime(size: int) -> None:
    """Have the system hand over this much memory, where there is as much, and take it back.

    Memory that a virtual machine's host has taken away costs many times more at its first touch, which
    is nobody's fault; and it takes it away again within seconds."""
    left = available()
    if left is not None:
        size = max(0, min(size, left - _SPARE))
    touched = buffer(size)
    ctypes.memset(address(touched), 1, size)


def _fill(target: memoryview) -> None:
    pattern = os.urandom(1 << 20)
    for begin in range(0, len(target), len(pattern)):
        part = target[begin : begin + len(pattern)]
        part[:] = pattern[: len(part)]


def _copies(source: memoryview, target: memoryview, size: int) -> list[float]:
    times = []
    for _ in range(_TIMES + 1):
        began = time.perf_counter()
        ctypes.memmove(address(target), address(source), size)
        times.append(time.perf_counter() - began)
    return times[1:]  # the first made the memory ready


def _copies_from_device(task: Task) -> list[float]:
    import torch

    source = torch.ones(task.size, dtype=torch.uint8, device=task.device)
    target = torch.empty(task.size, dtype=torch.uint8, pin_memory=True)
    times = []
    for _ in range(_TIMES + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return times[1:]


def _of_disk(folder: Path, source: memoryview, target: memoryview) -> dict[str, list[float]]:
    path = folder / "limit"
    figures: dict[str, list[float]] = {"write": [], "cached": []}
    for _ in range(_TIMES - 1):
        path.unlink(missing_ok=True)
        prime(len(source))  # the file itself may lie in memory
        figures["write"].append(disk.write_whole(path, source))
    if disk.forget(folder):
        figures["read"] = [disk.read_whole(path, target, cached=False) for _ in range(_TIMES - 1)]
    disk.fill_cache(folder)
    figures["cached"] = [disk.read_whole(path, target, cached=True) for _ in range(_TIMES - 1)]
    path.unlink()
    return figures
