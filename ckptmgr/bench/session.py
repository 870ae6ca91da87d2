"""In which order, and where, are the measurements made? Each in a fresh process, in rotation; nothing stays."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..memory import available
from ..store import open_store
from . import disk
from .report import Report
from .tasks import Contender, Outcome, Place, Task

BUILT_IN: Mapping[str, tuple[Contender, ...]] = {
    "ckptmgr": (
        Contender("ckptmgr", "background", "ckptmgr.bench.peers:Ckptmgr"),
        Contender("ckptmgr", "synchronous", "ckptmgr.bench.peers:Ckptmgr"),
    ),
    "torch.save": (Contender("torch.save", "synchronous", "ckptmgr.bench.peers:TorchSave"),),
    "dcp": (
        Contender("dcp", "background", "ckptmgr.bench.dcp_peer:Dcp"),
        Contender("dcp", "synchronous", "ckptmgr.bench.dcp_peer:Dcp"),
    ),
}
IDEAL = Contender("ideal", "background", "ckptmgr.bench.peers:Ideal")

_IN_MEMORY, _ON_DISK, _SPARE = 3, 3, 512 << 20  # times the state, and bytes for Python and torch
_SMALLEST = 1 << 20
_LINES = 3  # of what a process that died said last


def measure(
    url: str,
    options: Mapping[str, Any],
    contenders: Sequence[Contender],
    *,
    size: int,
    tensors: int | None = None,
    repeats: int = 5,
    device: str = "cpu",
    measures: Sequence[str] = ("times", "memory", "lost"),
    saves: int = 3,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> Report:
    """Measure the contenders below a URL, `size` in bytes. Blocks, for minutes where sizes are large.

    Works in a sub-folder of its own, which is gone afterwards, whatever happens. `progress` is told how
    many of how many processes are done, and what comes next. Raises `ConfigError` for a size that does not
    fit, and what the store refuses (`StoreError`).
    """
    check_fits(url, size)
    with _workplace(url, options) as place:
        task = Task((), place, size, tensors, device, saves=saves)
        tasks = [(repeat, one) for repeat in range(repeats) for one in rotated(task, contenders, set(measures), repeat)]
        outcomes = []
        for index, (repeat, one) in enumerate(tasks):
            progress(index, len(tasks), one.contender.name if one.contender else "limits")
            own = place.below(f"{repeat}-{index}")
            outcomes.append((one, _run(replace(one, place=own))))
            open_store(place.url, dict(options), fsync=False).delete([f"{repeat}-{index}/"])
        return Report.of(open_store(url).url, size, tensors, repeats, device, outcomes)


def check_fits(url: str, size: int) -> None:
    """Raises `ConfigError`, with the numbers, where a state of `size` bytes can't be measured here."""
    if size < _SMALLEST:
        raise ConfigError(f"a state of {size:,} bytes is too small to measure; give at least {_SMALLEST:,}")
    folder = open_store(url).path
    memory = _IN_MEMORY * size + _SPARE
    if folder is not None:
        folder = next(one for one in (folder, *folder.parents) if one.exists())
        if disk.is_in_memory(folder):
            memory += _ON_DISK * size
        need, free = _ON_DISK * size, shutil.disk_usage(folder).free
        if need > free:
            raise ConfigError(
                f"a state of {size:,} bytes needs {need:,} bytes of disk ({_ON_DISK} checkpoints) and {folder} has "
                f"{free:,} free; give a smaller size, or another place"
            )
    left = available()
    if left is not None and memory > left:
        raise ConfigError(
            f"a state of {size:,} bytes needs {memory:,} bytes of memory (itself, a copy, and room to load) and "
            f"{left:,} are available; give a smaller size"
        )


def rotated(task: Task, contenders: Sequence[Contender], measures: set[str], repeat: int) -> Iterator[Task]:
    """One repeat: the limits, then every contender, beginning with another one each time."""
    yield replace(task, measures=("limits",))
    if "lost" in measures and task.place.is_local and any(contender.is_background for contender in contenders):
        contenders = [*contenders, IDEAL]
    turn = repeat % len(contenders)
    for contender in [*contenders[turn:], *contenders[:turn]]:
        wanted = {
            "times": contender is not IDEAL,
            "memory": contender is not IDEAL and not repeat,  # it is the same every time
            "lost": contender.is_background,
        }
        if asked := tuple(name for name, fits in wanted.items() if fits and name in measures):
            yield replace(task, measures=asked, contender=contender)


def _run(task: Task) -> Outcome:
    """The task in a process of its own, with all that this one can import."""
    paths = os.pathsep.join(path for path in sys.path if path)
    with (
        # A file, not a pipe: what a contender started may hold it open for ever.
        tempfile.TemporaryFile("w+", errors="replace") as said,
        subprocess.Popen(
            [sys.executable, "-P", "-m", "ckptmgr.bench"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,  # an interrupt is ours to pass on, to what the process started too
        ) as process,
    ):
        try:
            answer, _ = process.communicate(json.dumps(asdict(task)))
        finally:
            _end(process)
        try:
            return Outcome(**json.loads(answer))
        except ValueError:
            said.seek(0)
            last = " / ".join(said.read().strip().splitlines()[-_LINES:])
            return Outcome(failure=f"its process ended with code {process.returncode} {last}".rstrip())


def _end(process: subprocess.Popen[str]) -> None:
    """Nothing that it began goes on, or writes again below the folder that is about to go."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


@contextmanager
def _workplace(url: str, options: Mapping[str, Any]) -> Iterator[Place]:
    """A new sub-folder, and at the end none, nor any folder above it that was not there before."""
    store = open_store(url, dict(options))
    name = f"bench-{secrets.token_hex(6)}"
    path = store.path
    made = [] if path is None else [one for one in (path, *path.parents) if not one.exists()]
    root = url.rstrip("/") if path is None else str(path)
    try:
        yield Place(f"{root}/{name}", options, path is not None)
    finally:
        with _uninterrupted():
            store.delete([f"{name}/"])
            _remove_empty(made)


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # never made after all, or somebody else's by now
            folder.rmdir()


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C does not stop the cleaning that the first one began."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not the main thread, which alone is interrupted
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
