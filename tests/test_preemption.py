"""What happens to a job of several ranks when its machine is taken away? Real signals, by hand and by torchrun."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, leave, note, run_ranks, values

from ckptmgr import CheckpointManager

README = Path(__file__).parent.parent / "README.md"
TERM_AND_USR1 = "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"


def leave_group(_: int) -> None:
    """In a worker of a data loader: torchrun sends its signals to the whole process group of a rank."""
    os.setpgid(0, 0)


def train(root: str, options: dict[str, Any]) -> dict[str, Any]:
    """Steps of a few milliseconds on all ranks, until `should_stop` or `steps`. Notes step 5 and the end."""
    weight = torch.zeros(8)
    loader: Any = itertools.repeat(torch.ones(8))
    if options.get("workers"):
        epoch = torch.utils.data.DataLoader(torch.ones(64, 8), num_workers=1, worker_init_fn=leave_group)
        loader = itertools.chain.from_iterable(itertools.repeat(epoch))
    save = {"on_signals": ["SIGTERM", "SIGUSR1"], **options.get("save", {})}
    manager = CheckpointManager(root, save=save, ranks={"timeout": "10s"}, run="preempted")
    step = manager.resume(weight=weight).step
    saved = []
    for batch in itertools.islice(loader, options.get("steps", 10**6)):
        step += 1
        gradient = batch.reshape(-1).clone()
        dist.all_reduce(gradient)
        weight += gradient
        if step == 5:
            note("step 5")
            if dist.get_rank() == options.get("signalled"):
                os.kill(os.getpid(), signal.SIGTERM)
        if manager.maybe_save({"weight": weight}, step) is not None:
            saved.append(step)
            note("saved")
        if manager.should_stop and not options.get("deaf"):
            break
        time.sleep(0.002)
    note("stopped")
    manager.close()
    del loader
    return {"step": step, "saved": saved, "stop": manager.should_stop}


def check_stopped_together(ends: list[dict[str, Any]], root: Path) -> None:
    """All ranks left the loop after the same step, which is saved."""
    step = ends[0]["step"]
    assert ends == [{"step": step, "saved": [step], "stop": True}] * len(ends)
    with CheckpointManager(root, read_only=True) as manager:
        assert manager.all_steps() == [step]
        assert manager.load()["weight"].tolist() == [float(step * len(ends))] * 8


# By hand


def test_a_signal_on_one_rank_stops_all_after_the_same_saved_step(tmp_path: Path) -> None:
    done = run_ranks(train, 3, args=(str(tmp_path), {"signalled": 1}))

    check_stopped_together(values(done), tmp_path)


def test_signals_on_all_ranks_at_different_moments_are_one(tmp_path: Path) -> None:
    with Ranks(train, 3, args=(str(tmp_path), {})) as ranks:
        for rank in (2, 0, 1):
            ranks.wait_for_note(rank, "step 5")
        for rank in (2, 0, 1):
            os.kill(ranks.pid(rank), signal.SIGTERM)
        done = ranks.wait()

    check_stopped_together(values(done), tmp_path)


def test_sigusr1_saves_on_all_ranks_and_training_goes_on(tmp_path: Path) -> None:
    with Ranks(train, 2, args=(str(tmp_path), {"steps": 400})) as ranks:
        ranks.wait_for_note(1, "step 5")
        os.kill(ranks.pid(1), signal.SIGUSR1)
        done = ranks.wait()

    ends = values(done)
    assert ends == [{"step": 400, "saved": ends[0]["saved"], "stop": False}] * 2
    assert len(ends[0]["saved"]) == 1


def test_a_second_sigterm_ends_a_rank_at_once(tmp_path: Path) -> None:
    with Ranks(train, 2, args=(str(tmp_path), {"deaf": True})) as ranks:
        ranks.wait_for_note(1, "step 5")
        os.kill(ranks.pid(1), signal.SIGTERM)
        ranks.wait_for_note(1, "saved")
        began = time.monotonic()
        os.kill(ranks.pid(1), signal.SIGTERM)
        _, second = ranks.wait(unless_left=[0])

    assert second.code == -signal.SIGTERM
    assert second.elapsed_s < 60
    assert time.monotonic() - began < 5


def test_the_signal_counts_beside_workers_of_a_data_loader(tmp_path: Path) -> None:
    """They are forked after our handlers are there, and a SIGTERM must still end them."""
    done = run_ranks(train, 2, args=(str(tmp_path), {"signalled": 0, "workers": True}))

    check_stopped_together(values(done), tmp_path)


def kill_workers(root: str) -> None:
    """SIGTERM to a worker, forked while we watch: how it ended."""
    manager = CheckpointManager(root, ranks={"timeout": "10s"})
    manager.resume()
    batches = iter(torch.utils.data.DataLoader(torch.ones(64, 8), num_workers=1))
    next(batches)
    worker = batches._workers[0]
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(30)
    leave([worker.exitcode, manager.should_stop])


def test_a_worker_of_a_data_loader_dies_of_its_own_sigterm_and_stops_nobody(tmp_path: Path) -> None:
    done = run_ranks(kill_workers, 2, args=(str(tmp_path),))

    assert values(done) == [[-signal.SIGTERM, False]] * 2


# By torchrun


@pytest.mark.parametrize("workers", [False, True])
def test_torchruns_sigterm_is_one_save_and_one_last_step_on_all_ranks(workers: bool, tmp_path: Path) -> None:
    with Ranks(train, 4, torchrun=True, args=(str(tmp_path), {"workers": workers})) as ranks:
        for rank in range(4):
            ranks.wait_for_note(rank, "step 5")
        os.kill(ranks.torchrun_pid, signal.SIGTERM)
        done = ranks.wait()

    check_stopped_together(values(done), tmp_path)
    assert {one.code for one in done} == {1}  # torchrun's own, though every rank ends with 0


def test_torchrun_hands_on_sigusr1_when_it_is_told_to(tmp_path: Path) -> None:
    """And then waits for the ranks to leave, until its shutdown timeout."""
    with Ranks(
        train, 2, torchrun=True, torchrun_options=[TERM_AND_USR1, "--shutdown-timeout=20"], args=(str(tmp_path), {})
    ) as ranks:
        ranks.wait_for_note(0, "step 5")
        os.kill(ranks.torchrun_pid, signal.SIGUSR1)
        ranks.wait_for_note(1, "saved")
        os.kill(ranks.torchrun_pid, signal.SIGTERM)
        done = ranks.wait()

    with CheckpointManager(tmp_path, read_only=True) as manager:
        assert manager.all_steps() != []
    first, second = values(done)
    assert first == second


def test_a_preempted_job_goes_on_after_the_step_that_it_saved(tmp_path: Path) -> None:
    first = run_ranks(train, 2, args=(str(tmp_path), {"signalled": 0}))
    second = run_ranks(train, 2, args=(str(tmp_path), {"steps": 3, "save": {"on_close": True}}))

    step = values(first)[0]["step"]
    assert [end["step"] for end in values(second)] == [step + 3] * 2
    with CheckpointManager(tmp_path, read_only=True) as manager:
        assert manager.load(step + 3)["weight"].tolist() == [2.0 * (step + 3)] * 8


# By Slurm


def test_the_readmes_batch_script_hands_the_notice_on_and_asks_for_another_turn_afterwards(tmp_path: Path) -> None:
    """Run by bash, with a torchrun and an scontrol that write down what they are told."""
    (block,) = re.findall(r"^```bash\n(#SBATCH .*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    programs = {
        "torchrun": 'trap "echo left >> log; exit 1" TERM; echo started "$@" >> log; while true; do sleep 0.05; done',
        "scontrol": 'echo scontrol "$@" >> log',
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o700)
    (tmp_path / "job.sh").write_text(f"#!/bin/bash\n{block}")
    log = tmp_path / "log"
    paths = os.pathsep.join([str(tmp_path), os.environ["PATH"]])

    with subprocess.Popen(
        ["bash", "job.sh"],
        cwd=tmp_path,
        env={**os.environ, "PATH": paths, "SLURM_JOB_ID": "17"},
        start_new_session=True,
    ) as job:
        try:
            while not log.exists():
                time.sleep(0.01)
            os.kill(job.pid, signal.SIGUSR1)
            job.wait(20)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(job.pid, signal.SIGKILL)

    assert log.read_text().splitlines() == [
        "started --nproc-per-node 8 --shutdown-timeout 80 train.py",
        "left",
        "scontrol requeue 17",
    ]
