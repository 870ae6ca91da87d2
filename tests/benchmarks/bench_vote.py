"""What does it cost that all ranks agree on a save that nobody wants yet? Wait per step of 7 ms, medians of some runs.

python tests/benchmarks/bench_vote.py [--steps 150] [--runs 5]

`none` asks nobody, `steps alone` is a manager with step triggers and nothing else, `pipelined` one with a
clock trigger, whose votes travel during the next steps, `blocking` an all-reduce of one int that each step waits for.
The step sleeps, as the host of a GPU does, and all ranks meet at its end, as they do for gradients.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]
from ranks import run_ranks, values  # noqa: E402 (the folders come first)

from ckptmgr import CheckpointManager  # noqa: E402

STEP_S = 0.007


def measure(root: str, steps: int, runs: int) -> dict[str, list[tuple[float, float]]]:
    """For each way and run the time in its call, and that of the whole step: means over the steps, in seconds."""
    side, state = dist.new_group(backend="gloo"), {"x": torch.ones(8)}
    by_steps = CheckpointManager(f"{root}/steps", save={"every_steps": 10**9, "on_signals": []})
    by_clock = CheckpointManager(f"{root}/clock", save={"every": "10h"})
    vote, gradient = torch.zeros(1, dtype=torch.int64), torch.zeros(1)
    ways: dict[str, Callable[[int], object]] = {
        "none": lambda step: None,
        "steps alone": lambda step: by_steps.maybe_save(state, step),
        "pipelined": lambda step: by_clock.maybe_save(state, step),
        "blocking": lambda step: dist.all_reduce(vote, op=dist.ReduceOp.BOR, group=side),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    step = 0
    for _ in range(runs):
        for name, call in ways.items():
            call(step := step + 1)  # the first call finds the ranks
            dist.barrier()
            waited, began = 0.0, time.perf_counter()
            for _ in range(steps):
                time.sleep(STEP_S)
                dist.all_reduce(gradient)
                before = time.perf_counter()
                call(step := step + 1)
                waited += time.perf_counter() - before
            found[name].append((waited / steps, (time.perf_counter() - began) / steps))
    dist.barrier()
    by_steps.close()
    by_clock.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    print(f"{'ranks':>5} {'':<12} {'in the call, ms':>16} {'whole step, ms':>15} {'added, ms':>10}")
    for world_size in (2, 4):
        with tempfile.TemporaryDirectory() as root:
            done = values(run_ranks(measure, world_size, args=(root, args.steps, args.runs), timeout_s=300))
        # The slowest rank is what a step waits for.
        medians = {
            name: [max(statistics.median(run[column] for run in one[name]) for one in done) for column in (0, 1)]
            for name in done[0]
        }
        for name, (in_call, whole) in medians.items():
            added = whole - medians["none"][1]
            print(f"{world_size:>5} {name:<12} {1000 * in_call:>16.3f} {1000 * whole:>15.2f} {1000 * added:>10.2f}")


if __name__ == "__main__":
    main()
