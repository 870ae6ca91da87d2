# python examples/crash_and_resume.py
"""Does a training that is killed again and again end exactly where an undisturbed one ends?

Trains twice from the same seed. One training is left alone; the other is killed with SIGKILL at random
moments, in the middle of epochs and of saves, and started again with the same command line. Then all
losses and everything in the last checkpoints are compared, bit for bit."""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ckptmgr import CheckpointError, CheckpointManager, open_store
from ckptmgr.cli import main as ckptmgr

EXAMPLES = Path(__file__).parent
STEPS = {"digits": 600, "chargpt": 200}

console = Console(highlight=False, markup=False, soft_wrap=True)


class NotComparableError(Exception):
    """A training did not get to its end, or could not begin."""


class Trainer:
    """One training: one command line, started as often as needed. Its loss curve and log are in `folder`."""

    def __init__(self, example: str, root: str, steps: int, seed: int, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.root, self.curve, self.log = root, folder / "curve.txt", folder / "log.txt"
        self.command = [sys.executable, str(EXAMPLES / f"train_{example}.py"), "--root", root]
        self.command += ["--steps", str(steps), "--seed", str(seed), "--curve", str(self.curve)]
        self.store = open_store(root)
        self.process: subprocess.Popen[bytes] | None = None
        self.old_size = 0  # of the curve, when the process was started
        self.curve.touch()

    def start(self) -> None:
        self.old_size = self.curve.stat().st_size
        # GPU kernels may add in another order each time; on the CPU, equal work has equal results.
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def new_steps(self) -> list[int]:
        """The steps made since the start."""
        with self.curve.open("rb") as curve:
            curve.seek(self.old_size)
            return [int(line.split()[0]) for line in curve.read().splitlines()]

    def reached(self) -> int:
        return max(self.new_steps(), default=0)

    def is_running(self) -> bool:
        assert self.process is not None
        code = self.process.poll()
        if code not in (None, 0):
            raise NotComparableError(f"a training ended with exit code {code}: {self.log.read_text()[-3000:]}")
        return code is None

    def kill(self) -> bool:
        """Send SIGKILL; whether that, and not its own end, is what stopped it."""
        if self.process is None:
            return False
        self.process.kill()
        return self.process.wait() == -signal.SIGKILL

    def is_saving(self) -> bool:
        """Whether a save is being written, or was when the process was killed."""
        return bool(self.store.list(".ckptmgr/drafts"))

    def story(self) -> str:
        steps = self.new_steps()
        if not steps:
            return "resumed after the last step"
        return f"{'began' if steps[0] == 1 else f'resumed after step {steps[0] - 1}'}, reached step {steps[-1]}"


def run_and_kill(trainer: Trainer, aims: list[int], chance: random.Random, show: Callable[[], None]) -> bool:
    """Run to the end, through a kill soon after each of the steps in `aims`; whether all of them hit.
    Every other kill comes as soon as a save is seen to be written."""
    for i, aim in enumerate(aims):
        in_save = i % 2 == 1
        trainer.start()
        while trainer.is_running() and (trainer.reached() < aim or (in_save and not trainer.is_saving())):
            show()
            time.sleep(0.002)
        time.sleep(0 if in_save else chance.uniform(0, 0.03))
        if not trainer.kill():
            return False
        where = "in the middle of a save" if trainer.is_saving() else "between saves"
        console.print(f"  {trainer.story()}, killed {where}")
    trainer.start()
    while trainer.is_running():
        show()
        time.sleep(0.02)
    console.print(f"  {trainer.story()}: the end")
    return True


def read_curve(path: Path) -> list[tuple[int, str]]:
    """All steps and losses, in the order in which they were made."""
    lines = (line.split() for line in path.read_text().splitlines())
    return [(int(step), loss) for step, loss in lines]


def curve_differences(expected: list[tuple[int, str]], actual: list[tuple[int, str]]) -> Iterator[str]:
    """Every step must have been made, with the expected loss each time that it was."""
    losses = dict(expected)
    for step, loss in actual:
        if step not in losses:
            yield f"step {step} is one too many"
        elif loss != losses[step]:
            yield f"loss of step {step} is {float.fromhex(loss)!r}, not {float.fromhex(losses[step])!r}"
    if missing := sorted(losses.keys() - {step for step, _ in actual}):
        yield f"{len(missing)} steps were never made, the first is {missing[0]}"


def state_differences(expected: Any, actual: Any, path: str = "") -> Iterator[str]:
    """Two loaded checkpoints, value by value; tensors as their bytes, so that -0.0 is not 0.0."""
    if type(expected) is not type(actual):
        yield f"{path} is a {type(actual).__name__}, not a {type(expected).__name__}"
    elif isinstance(expected, Mapping):
        for key in sorted(expected.keys() | actual.keys(), key=str):
            if key in expected and key in actual:
                yield from state_differences(expected[key], actual[key], f"{path}/{key}")
            else:
                yield f"{path}/{key} is in one of the two only"
    elif isinstance(expected, list | tuple):
        if len(expected) != len(actual):
            yield f"{path} has {len(actual)} items, not {len(expected)}"
        for i, pair in enumerate(zip(expected, actual, strict=False)):
            yield from state_differences(*pair, f"{path}/{i}")
    elif isinstance(expected, torch.Tensor):
        if expected.dtype != actual.dtype or expected.shape != actual.shape:
            yield f"{path} is {actual.dtype} {list(actual.shape)}, not {expected.dtype} {list(expected.shape)}"
        elif not torch.equal(as_bytes(expected), as_bytes(actual)):
            yield f"{path} differs"
    elif repr(expected) != repr(actual):
        yield f"{path} is {actual!r}, not {expected!r}"


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)


def differences(expected: Trainer, actual: Trainer) -> list[str]:
    """Everything that differs between two finished trainings."""
    losses = [read_curve(trainer.curve) for trainer in (expected, actual)]
    states = [CheckpointManager(trainer.root, read_only=True).load() for trainer in (expected, actual)]
    console.print(
        f"compared: {len(losses[1])} losses ({len(losses[1]) - len(losses[0])} of steps made twice), and all that is "
        f"in the last checkpoints: {', '.join(states[0])}"
    )
    return [*curve_differences(*losses), *state_differences(*states)]


def crash_and_resume(example: str, root: str, steps: int, kills: int, seed: int, folder: Path) -> list[str] | None:
    """What differs between the two trainings, or None when one was at its end before it was killed often enough."""
    chance = random.Random(seed)
    if CheckpointManager(root, read_only=True).latest_step() is not None:
        raise NotComparableError(f"{root} holds checkpoints already: give another --root")
    console.print(f"train_{example}.py: {steps} steps, {kills} kills, seed {seed}, checkpoints in {root}")
    left_alone = Trainer(example, f"{folder}/left-alone/checkpoints", steps, seed, folder / "left-alone")
    killed = Trainer(example, root, steps, seed, folder / "killed")
    columns = TextColumn("{task.description:>10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        bars = [(progress.add_task("left alone", total=steps), left_alone)]
        bars += [(progress.add_task("killed", total=steps), killed)]

        def show() -> None:
            for bar, trainer in bars:
                progress.update(bar, completed=trainer.reached())

        try:
            left_alone.start()
            span = steps / (kills + 1)
            aims = [int(span * (i + chance.uniform(0.2, 0.9))) + 1 for i in range(kills)]
            if not run_and_kill(killed, aims, chance, show):
                return None
            while left_alone.is_running():
                show()
                time.sleep(0.02)
        finally:
            left_alone.kill()
            killed.kill()
    return differences(left_alone, killed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--root", help="where the killed training saves: a folder or any fsspec URL (default: temporary)"
    )
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of each training (default: 600 for digits, 200 for chargpt)")
    parser.add_argument("--seed", type=int, help="of the trainings and of the kills (default: another each time)")
    parser.add_argument("--example", choices=STEPS, default="digits")
    args = parser.parse_args()
    seed = random.randrange(10**6) if args.seed is None else args.seed
    steps, tries = args.steps or STEPS[args.example], 0
    with tempfile.TemporaryDirectory(prefix="ckptmgr-") as folder:
        root = args.root or f"{folder}/checkpoints"
        try:
            found = None
            while found is None:  # a training that was at its end too soon is made longer
                tries += 1
                found = crash_and_resume(args.example, root, steps, args.kills, seed, Path(folder) / str(tries))
                if found is None:
                    steps, root = 2 * steps, f"{root}-longer"
        except (NotComparableError, CheckpointError) as exc:
            found = [str(exc)]
        else:
            console.print(f"\n$ ckptmgr ls {root}")
            ckptmgr(["ls", root], standalone_mode=False)
            console.print()
    if found:
        console.print(f"bit-exact: no ({'; '.join(found[:5])}{'; …' if len(found) > 5 else ''})")
        sys.exit(1)
    console.print("bit-exact: yes")


if __name__ == "__main__":
    main()
