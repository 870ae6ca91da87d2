"""Is ckptmgr as fast as it is meant to be? Its targets, beside what is measured here; `--rows` takes fewer minutes.

    python tests/benchmarks/bench_peers.py FOLDER [--rows stall,durable] [--size 1GiB] [--repeats 5] [--rivals]

The same harness as `ckptmgr bench`. T is torch.save made durable, or torch.load and load_state_dict; L is what
the machine can do, measured in the same run; I is an ideal that copies into ready memory and writes that.
`--rivals` measures whoever else is installed too, and prints the whole table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory

import rivals
import torch

from ckptmgr import CheckpointManager
from ckptmgr.bench import BUILT_IN, Contender, Report, measure
from ckptmgr.bench.report import size_text, time_text
from ckptmgr.cli import main as command_line
from ckptmgr.cli.benchmark import print_report
from ckptmgr.quantities import parse_size

MIB = 1 << 20
OURS, SYNCHRONOUS = BUILT_IN["ckptmgr"]
PREPARED = Contender(OURS.peer, "prepared", OURS.factory)
(TORCH,) = BUILT_IN["torch.save"]
MANY, MANY_SIZE = 100_000, 256 * MIB
SAVES, TINY_SAVES, LAYERS = 50, 30, 10
STEADY_SAVES = 8  # by default three stay: from the fifth save on each takes over the blocks of one that went


@dataclass(frozen=True)
class Line:
    """One figure, and what it is held against: a ratio, or the figure itself."""

    what: str
    figure: str
    value: float | None
    target: float
    unit: str = ""

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.what:<46} {self.figure:>10} {'':>8}         not measured here"
        verdict = "met" if self.value <= self.target else "MISSED"
        return f"{self.what:<46} {self.figure:>10} {self.value:>8.3g} {self.unit:<3} <= {self.target:<5g} {verdict}"


class Bench:
    """What was measured so far; every report is made once, when a row first asks for it."""

    def __init__(self, folder: Path, size: int, repeats: int, with_rivals: bool) -> None:
        self.folder, self._size, self._repeats, self._with_rivals = folder, size, repeats, with_rivals

    @cached_property
    def large(self) -> Report:
        others = [one for peer in (BUILT_IN["dcp"], *rivals.installed().values()) for one in peer]
        contenders = [OURS, SYNCHRONOUS, PREPARED, TORCH, *(others if self._with_rivals else [])]
        return self._measured(contenders, size=self._size, repeats=self._repeats, saves=STEADY_SAVES)

    @cached_property
    def many(self) -> Report:
        others = [one for one in rivals.installed().get("safetensors", ()) if self._with_rivals]
        return self._measured(
            [OURS, TORCH, *others], size=MANY_SIZE, tensors=MANY, repeats=self._repeats, measures=["times"]
        )

    @cached_property
    def fifty(self) -> Report:
        return self._measured([OURS], size=self._size, repeats=1, measures=["memory"], saves=SAVES)

    def _measured(self, contenders: list[Contender], **how: object) -> Report:
        report = measure(str(self.folder), {}, contenders, progress=_progress, **how)  # type: ignore[arg-type]
        print("\r\x1b[K", end="", file=sys.stderr)
        with command_line.make_context("ckptmgr", ["config", "schema"]):
            print_report(report, str(self.folder))
        print()
        return report

    def limit(self, report: Report, contender: Contender, name: str, target: float, unit: str = "L") -> Line:
        return self._line(report, contender, name, report.to_limit(contender, name), target, unit)

    def reference(self, report: Report, contender: Contender, name: str, target: float) -> Line:
        return self._line(report, contender, name, report.to_reference(contender, name), target, "T")

    def memory(self, contender: Contender, name: str, target: float) -> Line:
        found = self.large.seconds(contender.peer, contender.mode, name)
        mib = None if found is None else found / MIB
        return Line(_called(contender, name), "" if found is None else size_text(found), mib, target, "MiB")

    def _line(
        self, report: Report, contender: Contender, name: str, ratio: float | None, target: float, unit: str
    ) -> Line:
        found = report.seconds(contender.peer, contender.mode, name)
        return Line(_called(contender, name), "" if found is None else time_text(found), ratio, target, unit)


def stall(bench: Bench) -> Iterator[Line]:
    yield bench.limit(bench.large, OURS, "stall", 1.2)


def first(bench: Bench) -> Iterator[Line]:
    yield bench.limit(bench.large, OURS, "first_stall", 1.6)
    yield bench.limit(bench.large, PREPARED, "first_stall", 1.2)


def durable(bench: Bench) -> Iterator[Line]:
    yield bench.reference(bench.large, OURS, "durable", 0.6)
    yield bench.limit(bench.large, OURS, "durable", 1.4)


def synchronous(bench: Bench) -> Iterator[Line]:
    yield bench.reference(bench.large, SYNCHRONOUS, "durable", 0.45)
    yield bench.limit(bench.large, SYNCHRONOUS, "durable", 1.2)


def lost(bench: Bench) -> Iterator[Line]:
    yield bench.limit(bench.large, OURS, "lost", 1.2, "I")


def memory(bench: Bench) -> Iterator[Line]:
    yield bench.memory(SYNCHRONOUS, "save_bytes", 32)
    # In the background a resume also makes the memory of the saves to come.
    yield bench.memory(SYNCHRONOUS, "resume_bytes", 32)
    state, held = (bench.large.seconds(OURS.peer, OURS.mode, name) for name in ("bytes", "save_bytes"))
    if state is not None and held is not None:
        yield Line(_called(OURS, "save_bytes"), size_text(held), held / state, 1.01, "x")


def flat(bench: Bench) -> Iterator[Line]:
    levels = next(iter(bench.fifty.contenders.values())).samples.get("level_bytes")
    if levels:
        growth = max(levels) - levels[0]
        yield Line(f"growth over {SAVES} saves", size_text(growth), growth / MIB, 1, "MiB")


def resume(bench: Bench) -> Iterator[Line]:
    for contender in (OURS, SYNCHRONOUS):
        yield bench.reference(bench.large, contender, "cold", 0.5)
        yield bench.limit(bench.large, contender, "cold", 1.1)
        yield bench.reference(bench.large, contender, "warm", 0.14)


def tensors(bench: Bench) -> Iterator[Line]:
    yield bench.reference(bench.many, OURS, "stall", 0.06)
    yield bench.reference(bench.many, OURS, "durable", 0.12)
    yield bench.reference(bench.many, OURS, "warm", 0.06)
    yield bench.reference(bench.many, OURS, "cold", 0.06)


def commit(bench: Bench) -> Iterator[Line]:
    with _root(bench) as root, CheckpointManager(root, background=False, keep={"last": None}) as manager:
        saves, bare = [], []
        for step in range(1, TINY_SAVES + 1):
            began = time.perf_counter()
            manager.save({"x": torch.zeros(4)}, step)
            saves.append(time.perf_counter() - began)
            began = time.perf_counter()
            _commit_barely(root.parent / f"bare-{step}")
            bare.append(time.perf_counter() - began)
    seconds = statistics.median(saves) - statistics.median(bare)
    what = f"save of four numbers, {time_text(statistics.median(saves))}, less its fsyncs"
    yield Line(what, time_text(seconds), 1000 * seconds, 2, "ms")


def _commit_barely(folder: Path) -> None:
    """What the disk has to do for a save of one tensor: four files, the folders they are in, two renames."""
    draft = folder.with_suffix(".draft")
    (draft / "ranks").mkdir(parents=True)
    for name in ("x.safetensors", "state.json", "ranks/rank-00000.json", "manifest.json"):
        _write_durably(draft / name)
    for one in (draft / "ranks", draft):
        _sync(one)
    draft.rename(folder)
    _sync(folder.parent)
    _write_durably(folder.with_suffix(".pointer"))
    folder.with_suffix(".pointer").rename(folder.parent / "pointer")
    _sync(folder.parent)


def _write_durably(path: Path) -> None:
    with path.open("xb") as file:
        file.write(bytes(200))
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def frozen(bench: Bench) -> Iterator[Line]:
    layers = torch.nn.ModuleList(torch.nn.Linear(1024, 1024) for _ in range(LAYERS))
    layers[:-1].requires_grad_(requires_grad=False)
    with _root(bench) as root, CheckpointManager(root, background=False) as manager:
        written = []
        for step in (1, 2):
            before = _bytes_written()
            manager.save({"model": layers}, step)
            written.append(_bytes_written() - before)
            with torch.no_grad():
                layers[-1].weight.add_(1)
                layers[-1].bias.add_(1)
    share = 100 * written[1] / written[0] if written[0] else None
    yield Line(f"second save, {LAYERS - 1} of {LAYERS} layers frozen", size_text(written[1]), share, 11, "%")


def _script(name: str, bench: Bench) -> Iterator[Line]:
    """A benchmark of its own, with targets of its own."""
    subprocess.run([sys.executable, Path(__file__).parent / name], check=True)
    yield from ()


ROWS: dict[str, Callable[[Bench], Iterator[Line]]] = {
    "stall": stall,
    "first": first,
    "durable": durable,
    "sync": synchronous,
    "lost": lost,
    "memory": memory,
    "flat": flat,
    "resume": resume,
    "tensors": tensors,
    "call": partial(_script, "bench_maybe_save.py"),
    "many": partial(_script, "bench_many_checkpoints.py"),
    "commit": commit,
    "frozen": frozen,
}


@contextmanager
def _root(bench: Bench) -> Iterator[Path]:
    """A root on the disk that is measured, gone at the end."""
    bench.folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=bench.folder) as folder:
        yield Path(folder, "run")


def _bytes_written() -> int:
    """What this process has sent towards the disk so far; 0 where the system does not say."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return int(next(line.split()[1] for line in lines if line.startswith("write_bytes:")))


def _called(contender: Contender, name: str) -> str:
    return f"{contender.name} {name.replace('_bytes', ' memory').replace('_', ' ')}"


def _progress(done: int, total: int, what: str) -> None:
    print(f"\r\x1b[K{done + 1} of {total}: {what}", end="", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", default=",".join(ROWS), help="of " + ", ".join(ROWS))
    parser.add_argument("--size", type=parse_size, default="1GiB")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rivals", action="store_true")
    given = parser.parse_args()
    names = given.rows.split(",")
    if unknown := set(names) - set(ROWS):
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    bench = Bench(given.folder, given.size, given.repeats, given.rivals)
    lines = [(name, line) for name in names for line in ROWS[name](bench)]
    for name, line in lines:
        print(f"{name:<8} {line}")


if __name__ == "__main__":
    main()
