"""How do a hundred thousand objects come to be without Python looking at all of them again and again?"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def uncollected() -> Iterator[None]:
    """Within the block no cycles are looked for, in any thread: the collector finds the many new objects
    of a large state alive each time, which takes longer than to make them. Then it goes on as before."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
