"""How much memory does this process hold, with every process that it started? Shared memory counts once."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from types import TracebackType

_INTERVAL_S = 0.002


def level() -> int | None:
    """Bytes of anonymous and shared memory in the process tree, or None where the system does not say.
    Pages of files (libraries, mapped checkpoints) are not counted: the system can drop them."""
    sizes = [size for pid in _tree(os.getpid()) if (size := _own(pid)) is not None]
    return sum(sizes) if sizes else None


class Peak:
    """The highest `level` between entering and leaving, looked for in a thread of its own.

    It takes the processor from whatever it watches: nothing is timed meanwhile."""

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="footprint", daemon=True)

    def __enter__(self) -> Peak:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._ended.wait(_INTERVAL_S):
            self._look()

    def _look(self) -> None:
        self.bytes = max(self.bytes, level() or 0)


def _tree(pid: int) -> list[int]:
    found = [pid]
    with contextlib.suppress(OSError):  # it ended meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += _tree(int(child))
    return found


def _own(pid: int) -> int | None:
    """One process's share: a page that several processes map counts for each with its part."""
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) << 10 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return None
