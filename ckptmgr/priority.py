"""How does a background save leave the processor and the disk to training? Its threads ask for little of either."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
import threading

_NICE = 10  # of 19: training has the processor first, and yet a save ends on a machine that is never idle
_IOPRIO_SET = {"x86_64": 251, "aarch64": 30, "riscv64": 30, "ppc64le": 273, "s390x": 282}
_WHO_THREAD, _BEST_EFFORT, _LOWEST = 1, 2, 7


def lower() -> None:
    """Lower the priority of the calling thread, and of the threads that it will start. Only on Linux,
    where priorities are a thread's own; elsewhere, and where it is refused, nothing happens."""
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
    number = _IOPRIO_SET.get(platform.machine())
    if number is not None:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).syscall(number, _WHO_THREAD, 0, _BEST_EFFORT << 13 | _LOWEST)
