"""How are bytes copied from one address to another? One range at a time, or many small ones at once."""

from __future__ import annotations

import ctypes
import os
import sys
from array import array
from collections.abc import Callable, Sequence
from typing import cast

_MANY = 16  # places; fewer are copied one by one in less time
_AT_ONCE = 1024  # places; what Linux takes in one call

# Two ways to copy `count` bytes to an address from another: `move(to, from, count)`. The first lets other
# threads run meanwhile, which costs more than a small copy itself.
move = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)
move_small = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ctypes.cast(ctypes.memmove, ctypes.c_void_p).value or 0
)


def spread(begin: int, places: Sequence[int], sizes: Sequence[int]) -> None:
    """Copy what lies from an address on to these places, one after the other. Other threads run meanwhile
    where the system does it."""
    if not _copied_by_system(_READ, begin, places, sizes):
        for place, size in zip(places, sizes, strict=True):
            move_small(place, begin, size)
            begin += size


def gather(begin: int, places: Sequence[int], sizes: Sequence[int]) -> None:
    """Copy what lies in these places to an address, one after the other: the way back of `spread`."""
    if not _copied_by_system(_WRITE, begin, places, sizes):
        for place, size in zip(places, sizes, strict=True):
            move_small(begin, place, size)
            begin += size


def _copied_by_system(call: Callable[..., int] | None, begin: int, places: Sequence[int], sizes: Sequence[int]) -> bool:
    """Whether a system call did it, which is made for copies between processes, and takes many places at a time."""
    if call is None or len(places) < _MANY:
        return False
    parts = array("Q", bytes(16 * len(places)))
    parts[0::2], parts[1::2] = array("Q", places), array("Q", sizes)
    at, own = parts.buffer_info()[0], os.getpid()
    for first in range(0, len(places), _AT_ONCE):
        own_sizes = sizes[first : first + _AT_ONCE]
        whole = array("Q", (begin, sum(own_sizes)))
        if call(own, at + 16 * first, len(own_sizes), whole.buffer_info()[0], 1, 0) != whole[1]:
            return False  # not allowed here, or it could not: the plain way does it all, or says why not
        begin += whole[1]
    return True


def _system_call(name: str) -> Callable[..., int] | None:
    call = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" and sys.maxsize > 1 << 32 else None
    if call is not None:
        size = ctypes.c_size_t
        call.argtypes, call.restype = (ctypes.c_int, size, size, size, size, size), ctypes.c_ssize_t
    return cast("Callable[..., int] | None", call)


_READ, _WRITE = _system_call("process_vm_readv"), _system_call("process_vm_writev")
