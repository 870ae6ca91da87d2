"""What becomes of a save when one rank fails, dies, stops or is slow? Real ranks, one of them broken.

Every survivor ends with an error of ours within the timeout and two seconds, the same on all where there is
something to say, and a fresh job resumes from a checkpoint that was committed. `pytest -m faults` runs the whole
matrix and prints it; without that a few of its rows run.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from ranks import leave, note, run_ranks, stay_until, values
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ckptmgr import CheckpointError, CheckpointManager, CoordinationError, open_store, per_rank

TIMEOUT_S = 5
MARGIN_S = 2
LATE_S = TIMEOUT_S + MARGIN_S + 2

FAULTS = ("state_dict", "store", "SIGKILL", "SIGSTOP", "slow", "late")
RAISES, GONE = ("state_dict", "store"), ("SIGKILL", "SIGSTOP")


class Row(NamedTuple):
    """One row of the matrix. `fault` comes at the save of step 2, on the first or on the last rank."""

    fault: str
    victim: str
    in_background: bool
    kind: str
    torchrun: bool = False

    def __str__(self) -> str:
        way = "background" if self.in_background else "sync"
        return f"{self.kind}, {self.victim}, {self.fault}, {way}" + (", torchrun" if self.torchrun else "")

    @property
    def ranks(self) -> int:
        return 4 if self.torchrun else 3

    @property
    def victim_rank(self) -> int:
        return 0 if self.victim == "rank 0" else self.ranks - 1

    @property
    def lost(self) -> list[int]:
        """The ranks that do not come back."""
        return [self.victim_rank] if self.fault in GONE else []

    @property
    def writes(self) -> bool:
        """Whether the victim writes anything."""
        return self.kind == "fsdp" or self.victim_rank == 0

    @property
    def place(self) -> str:
        """Where the victim is struck: while its state is captured, in the store, or back in the training."""
        if self.fault == "store" or (self.fault in GONE and self.in_background and self.writes):
            return "store"
        return "training" if self.fault in GONE and self.in_background else "state_dict"

    @property
    def is_saved(self) -> bool:
        """Whether step 2 is to be saved all the same."""
        return self.fault == "slow" or (self.place == "store" and not self.writes)


# Without torchrun rank 0 is the host of the job's store, too.
MATRIX = [
    Row(fault, victim, in_background, kind, torchrun)
    for torchrun, kind, victim, in_background, fault in itertools.product(
        (False, True), ("ddp", "fsdp"), ("rank 0", "rank k"), (False, True), FAULTS
    )
]
QUICK = {
    Row("state_dict", "rank k", True, "ddp"),
    Row("store", "rank 0", True, "ddp"),
    Row("SIGKILL", "rank k", False, "ddp"),
    Row("SIGSTOP", "rank 0", False, "ddp"),
    Row("slow", "rank k", False, "ddp"),
    Row("state_dict", "rank 0", False, "fsdp"),
    Row("store", "rank k", True, "fsdp"),
    Row("SIGKILL", "rank k", True, "fsdp"),
}


# In a rank


@dataclass
class Fault:
    """What happens to the victim, at a place, once."""

    row: Row
    is_armed: bool = False

    def strike(self, place: str) -> None:
        if not self.is_armed or place != self.row.place:
            return
        self.is_armed = False
        note("fault")
        match self.row.fault:
            case "state_dict" | "store":
                raise Unpicklable("broken", on=self.row.victim)
            case "SIGKILL" | "SIGSTOP" as name:
                os.kill(os.getpid(), signal.Signals[name])
            case "slow":
                time.sleep(TIMEOUT_S / 2)
            case "late":
                time.sleep(LATE_S)


class Unpicklable(Exception):  # noqa: N818
    """An error that can be made from no pickle, and whose text must arrive all the same."""

    def __init__(self, what: str, *, on: str) -> None:
        super().__init__(f"the {what} thing of {on}")


class Probe:
    """An entry of the state with the fault in it, captured on every rank."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault

    def state_dict(self) -> dict[str, Any]:
        self.fault.strike("state_dict")
        return {"calls": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {"calls": 1}


class BrokenStore:
    """A store with the fault in what writes."""

    def __init__(self, root: str, fault: Fault) -> None:
        self._store, self._fault = open_store(root), fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put(self, *args: Any, **more: Any) -> Any:
        self._fault.strike("store")
        return self._store.put(*args, **more)

    def writer(self, *args: Any, **more: Any) -> Any:
        self._fault.strike("store")
        return self._store.writer(*args, **more)


def objects(kind: str) -> dict[str, Any]:
    """A model and its optimizer after one step, on all ranks."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 12))
    if kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    else:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.ones(2, 24)).square().sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer}


def scale(model: nn.Module, factor: float) -> None:
    """A training step that talks to nobody: what a broken rank does to the training's own group is not at issue."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


def digest(model: nn.Module) -> str:
    """Of this rank's part of the weights."""
    parts = [getattr(p, "to_local", lambda p=p: p)().detach().contiguous() for p in model.parameters()]
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()[:16]


def open_manager(root: str, fault: Fault, in_background: bool) -> CheckpointManager:
    ranks = {"timeout": f"{TIMEOUT_S}s"}
    return CheckpointManager(root, store=BrokenStore(root, fault), ranks=ranks, background=in_background)  # type: ignore[arg-type]


def save_with_fault(root: str, row: list[Any]) -> None:
    """Save step 1, step 2 with the fault, and step 3; after the ranks have lost each other, rank 0 of a DDP job
    saves the next step alone."""
    about, rank = Row(*row), dist.get_rank()
    fault = Fault(about)
    state = objects(about.kind) | {"probe": per_rank(Probe(fault))}
    manager = open_manager(root, fault, about.in_background)
    assert not manager.resume()
    digests: dict[int, str] = {}

    def save(step: int) -> None:
        scale(state["model"], 1 + step / 8)
        digests[step] = digest(state["model"])
        manager.save(state, step)
        if fault.is_armed:
            fault.strike("training")
        manager.wait()

    save(1)
    dist.barrier()  # no rank is struck while another is still at step 1
    error: CheckpointError | None = None
    saved = [1]
    for step in (2, 3):
        fault.is_armed = step == 2 and rank == about.victim_rank
        try:
            save(step)
            saved.append(step)
        except CheckpointError as exc:
            if error is None:
                note("outcome")
            error = error or exc
            if isinstance(exc, CoordinationError):
                break
    note("outcome")  # of those that had no error
    if isinstance(error, CoordinationError) and rank == 0 and about.kind == "ddp":
        save(4)
        saved.append(4)
    manager.close()
    note("closed")
    if rank == 0:
        stay_until("closed", [one for one in range(about.ranks) if one not in about.lost])
    leave({"error": error and type(error).__name__, "text": error and str(error), "saved": saved, "digests": digests})


def resume(root: str, kind: str) -> dict[str, Any]:
    """What a fresh job finds."""
    fault = Fault(Row("state_dict", "rank 0", False, kind))
    state = objects(kind) | {"probe": per_rank(Probe(fault))}
    manager = open_manager(root, fault, False)
    start = manager.resume(**state)
    manager.close()
    found = {"step": start.step, "digest": digest(state["model"])}
    state.clear()
    return found


# In the test


@dataclass
class Finding:
    """What a row came to."""

    row: Row
    outcome: str = "hung"
    after_s: float = math.nan
    resumed: int | None = None
    held: bool = False

    def __str__(self) -> str:
        verdict = "" if self.held else "   DID NOT HOLD"
        return f"{self.row!s:42} {self.outcome:34} {self.after_s:5.1f} s   resumed step {self.resumed}{verdict}"


@pytest.fixture(scope="module")
def findings(request: pytest.FixtureRequest) -> Iterator[list[Finding]]:
    """What the rows came to, printed at the end."""
    found: list[Finding] = []
    yield found
    counts = Counter((one.row.fault, one.outcome) for one in found)
    lines = [*map(str, found), ""]
    lines += [f"{fault:12} {outcome:34} {count:3}" for (fault, outcome), count in sorted(counts.items())]
    lines += [f"{sum(one.held for one in found)} of {len(found)} rows held"]
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n", *lines, sep="\n")


def rows() -> list[Any]:
    marks = {row: () if row in QUICK else pytest.mark.faults for row in MATRIX}
    return [pytest.param(row, marks=mark, id=str(row)) for row, mark in marks.items()]


@pytest.mark.parametrize("row", rows())
def test_a_broken_rank_hangs_nobody_and_harms_no_checkpoint(row: Row, tmp_path: Path, findings: list[Finding]) -> None:
    root = str(tmp_path / "run")
    findings.append(finding := Finding(row))

    done = run_ranks(
        save_with_fault, row.ranks, torchrun=row.torchrun, args=(root, list(row)), unless_left=row.lost, timeout_s=60
    )
    survivors = [one for one in done if one.rank not in row.lost]
    ends = {one.rank: end for one, end in zip(survivors, values(survivors), strict=True)}
    finding.outcome = " ".join(sorted({end["error"] or "saved" for end in ends.values()}))
    struck = done[row.victim_rank].time_of("fault") if row.place != "store" or row.writes else None
    after_s = {one.rank: one.time_of("outcome") - (struck or one.time_of("outcome")) for one in survivors}
    # A late rank itself hears of it when it is back.
    finding.after_s = max(after_s[rank] for rank in ends if row.fault != "late" or rank != row.victim_rank)

    if row.is_saved:
        assert [end["saved"] for end in ends.values()] == [[1, 2, 3]] * row.ranks
    elif row.fault in RAISES:
        check_same_error(row, ends)
        assert [end["saved"] for end in ends.values()] == [[1, 3]] * row.ranks
    else:
        check_lost(row, ends)
    assert finding.after_s < TIMEOUT_S + MARGIN_S
    assert max(after_s.values()) < TIMEOUT_S + MARGIN_S + (LATE_S if row.fault == "late" else 0)

    fresh = run_ranks(resume, row.ranks, args=(root, row.kind))
    found = {one.rank: end for one, end in zip(fresh, values(fresh), strict=True)}
    finding.resumed = found[0]["step"]
    assert finding.resumed >= max(max(end["saved"]) for end in ends.values())
    for rank, end in found.items():
        assert end["step"] == finding.resumed
        # Under DDP all have the same weights, and rank 0 may have saved the last ones alone.
        own = ends.get(rank, {"digests": {}})["digests"] | (
            ends[0]["digests"] if row.kind == "ddp" and 0 in ends else {}
        )
        assert rank in row.lost or end["digest"] == own[str(finding.resumed)]
    finding.held = True


def check_same_error(row: Row, ends: dict[int, Any]) -> None:
    assert len({(end["error"], end["text"]) for end in ends.values()}) == 1
    error, text = ends[0]["error"], ends[0]["text"]
    assert error in ("RankError", "SaveFailedError")
    assert f"rank {row.victim_rank}" in text
    assert f"the broken thing of {row.victim}" in text


def check_lost(row: Row, ends: dict[int, Any]) -> None:
    assert {end["error"] for end in ends.values()} == {"CoordinationError"}
    for rank, end in ends.items():
        assert rank == row.victim_rank or str(row.victim_rank) in end["text"], end["text"]
    if row.kind == "ddp" and 0 in ends:
        assert ends[0]["saved"][-1] == 4
