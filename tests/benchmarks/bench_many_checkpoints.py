"""What do ten thousand checkpoints in a root cost?

python tests/benchmarks/bench_many_checkpoints.py [COUNT] [FOLDER]

Finding the newest one, against a bare `os.scandir` of the root measured in turns with it; a save, against
one in a root of ten; and what a save of next to nothing costs beside its fsyncs.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from bench_ls import fill

from ckptmgr import CheckpointManager

REPEATS, SAVES = 15, 200

Rules = dict[str, Any]


def ms(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1000


def manager(root: Path, **settings: Any) -> CheckpointManager:
    return CheckpointManager(root, run="bench", background=False, **settings)


def make_root(root: Path, count: int) -> Path:
    """A run of `count` checkpoints, of which the newest can be loaded."""
    with manager(root, keep={"last": None}) as mgr:
        mgr.save({"x": 1}, count)
    fill(root, count - 1)
    return root


def scan(root: Path) -> None:
    with os.scandir(root) as entries:
        for _ in entries:
            pass


def find_newest(root: Path) -> None:
    with closing(manager(root, read_only=True)) as mgr:
        assert mgr.latest_step() is not None


def pick(root: Path) -> None:
    """What a resume does before it opens a checkpoint, but for the writer's lock."""
    with closing(manager(root, read_only=True)) as mgr:
        next(mgr._run.newest_first(mgr._run.listing()))


def bench_newest(root: Path, count: int) -> None:
    calls: dict[str, Callable[[Path], None]] = {
        "bare scandir": scan,
        "open a manager, latest_step()": find_newest,
        "open a manager, a resume's pick": pick,
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, call in calls.items():
            times[name].append(ms(lambda call=call: call(root)))  # type: ignore[misc]
    base = statistics.median(times["bare scandir"])
    print(f"{f'{count:,} checkpoints':<42} {'median ms':>10} {'best ms':>8} {'x scandir':>10}")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:<42} {median:>10.2f} {min(values):>8.2f} {median / base:>9.1f}x")


def bench_saves(roots: dict[int, Path], keep: Rules, fsync: bool) -> None:
    """Saves in the roots by turns, so that what else the machine does costs all alike."""
    managers = {count: manager(root, keep=keep, fsync=fsync) for count, root in roots.items()}
    resumed = {count: ms(mgr.resume) for count, mgr in managers.items()}
    times: dict[int, list[float]] = {count: [] for count in roots}
    for turn in range(1, SAVES + 1):
        for count, mgr in managers.items():
            step = 10_000_000 + turn
            times[count].append(ms(lambda mgr=mgr, step=step: mgr.save({"x": 1}, step)))  # type: ignore[misc]
    for count, mgr in managers.items():
        mgr.close()
        for step in range(10_000_001, 10_000_001 + SAVES):
            shutil.rmtree(roots[count] / f"step-{step:08d}", ignore_errors=True)
        values = times[count]
        print(
            f"{f'{count:,} there, keep {keep}':<58} {statistics.median(values):>10.2f} {min(values):>8.2f} "
            f"{statistics.fmean(values):>8.2f} {resumed[count]:>10.1f}"
        )


def bench_tiny(folder: Path) -> None:
    """A save of one number against the disk's own price of making it durable."""

    def bare() -> None:
        """Two files and a rename, each durable, as four fsyncs."""
        temp = folder / "bare"
        temp.mkdir()
        for name in ("a", "b"):
            with (temp / name).open("wb", buffering=0) as file:
                file.write(b"x" * 1000)
                os.fsync(file.fileno())
        fd = os.open(temp, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        temp.rename(folder / "done")
        fd = os.open(folder, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)

    times: dict[str, list[float]] = {"four fsyncs": [], "save": [], "save, fsync off": []}
    with (
        manager(folder / "on", keep={"last": None}) as on,
        manager(folder / "off", keep={"last": None}, fsync=False) as off,
    ):
        for turn in range(1, SAVES + 1):
            times["four fsyncs"].append(ms(bare))
            for file in (folder / "done").iterdir():
                file.unlink()
            (folder / "done").rmdir()
            times["save"].append(ms(lambda: on.save({"x": 1}, turn)))  # noqa: B023 - called at once
            times["save, fsync off"].append(ms(lambda: off.save({"x": 1}, turn)))  # noqa: B023
    print(f"{'a save of one number':<58} {'median ms':>10} {'best ms':>8}")
    for name, values in times.items():
        print(f"{name:<58} {statistics.median(values):>10.2f} {min(values):>8.2f}")


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as folder:
        roots = {n: make_root(Path(folder) / str(n), n) for n in (10, count)}
        bench_newest(roots[count], count)
        print(f"\n{'a save':<58} {'median ms':>10} {'best ms':>8} {'mean ms':>8} {'resume ms':>10}")
        for keep in ({"last": None}, {"last": 3, "every_steps": 1}, {"last": 2 * count}, {"last": count}):
            bench_saves(roots, keep, fsync=False)
        print()
        bench_tiny(Path(folder))


if __name__ == "__main__":
    main()
