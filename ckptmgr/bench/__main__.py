"""What does `python -m ckptmgr.bench` do? One task: read as JSON from its input, answered as JSON on its output."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

from .limits import limits
from .tasks import Outcome, Task


def main() -> None:
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a contender prints is no part of the answer
    task = Task.from_json(json.load(sys.stdin))
    try:
        outcome = _outcome(task)
    except Exception as exc:  # noqa: BLE001 - a contender may fail in any way, and the others are measured all the same
        outcome = Outcome(failure=" ".join(f"{type(exc).__name__}: {exc}".split()))
    with answer:
        json.dump(asdict(outcome), answer)


def _outcome(task: Task) -> Outcome:
    if task.contender is None:
        return limits(task)
    from .measures import measured

    return measured(task)


if __name__ == "__main__":
    main()
