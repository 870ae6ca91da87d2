"""What does a program do whose power is cut? Saves in a loop, and tells of each save that was reported."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from typing import Any

import torch

from ckptmgr import CheckpointManager

TENSOR = 20_000  # floats


def state_of(step: int) -> dict[str, Any]:
    return {"x": torch.full((TENSOR,), float(step)), "n": step}


def open_manager(folder: Path, **more: Any) -> CheckpointManager:
    return CheckpointManager(str(folder / "runs/digits"), background=False, run="cut", keep={"last": 2}, **more)


def main(folder: Path, how: str) -> None:
    """Saves until it is killed; `how` is "ckptmgr", "ckptmgr without fsync" or "torch.save"."""
    if how == "torch.save":
        start = newest(folder, how) + 1
        for step in count(start):
            torch.save(state_of(step), folder / "checkpoint.pt.tmp")
            (folder / "checkpoint.pt.tmp").replace(folder / "checkpoint.pt")
            tell(step)
    mgr = open_manager(folder, fsync=how == "ckptmgr")
    for step in count(mgr.resume().step + 1):
        mgr.save(state_of(step), step).wait()
        tell(step)


def tell(step: int) -> None:
    os.write(1, b"%d\n" % step)


def newest(folder: Path, how: str) -> int:
    """The step that is found after the cut, 0 for none. Raises whatever else is wrong."""
    if how == "torch.save":
        try:
            found = torch.load(folder / "checkpoint.pt")
        except Exception:  # noqa: BLE001 - torch has many words for a torn file, and it may not be there
            return 0
        return int(found["n"]) if torch.equal(found["x"], state_of(found["n"])["x"]) else 0
    with open_manager(folder, read_only=True) as mgr:
        for step in mgr.all_steps():
            loaded = mgr.load(step)
            assert loaded["n"] == step, loaded["n"]
            assert torch.equal(loaded["x"], state_of(step)["x"]), f"step {step} has other bits"
        return mgr.latest_step() or 0
