"""What does a `maybe_save` that is not due cost? Against an empty method call, medians of alternating runs.

python tests/benchmarks/bench_maybe_save.py
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from ckptmgr import CheckpointManager

CALLS, REPEATS = 200_000, 9


class Empty:
    def maybe_save(self, state: Any, step: int, *, epoch: int | None = None, metrics: Any = None) -> None:
        pass


def per_call_ns(call: Callable[..., Any]) -> float:
    state = {"x": 1}
    began = time.perf_counter_ns()
    for step in range(1, CALLS + 1):
        call(state, step, epoch=0)
    return (time.perf_counter_ns() - began) / CALLS


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        steps = CheckpointManager(root, save={"every_steps": 10**9, "at_steps": [10**9]})
        everything = CheckpointManager(
            root, save={"every_steps": 10**9, "every_epochs": 10, "every": "10h", "at_steps": [10**9]}
        )
        predicate = CheckpointManager(root, save={"every_steps": 10**9}, triggers=[lambda moment: False])
        contenders = {
            "empty method": Empty().maybe_save,
            "step triggers alone": steps.maybe_save,
            "every step, epoch and time trigger on": everything.maybe_save,
            "and a predicate, asked at every call": predicate.maybe_save,
        }
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(REPEATS):
            for name, call in contenders.items():
                times[name].append(per_call_ns(call))
        base = statistics.median(times["empty method"])
        print(f"{'call':<40} {'median ns':>10} {'best ns':>8} {'ratio':>7}")
        for name, values in times.items():
            median = statistics.median(values)
            print(f"{name:<40} {median:>10.0f} {min(values):>8.0f} {median / base:>6.1f}x")
        for manager in (steps, everything, predicate):
            manager.close()


if __name__ == "__main__":
    main()
