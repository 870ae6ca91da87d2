"""Do tests that run several ranks end, and say what happened? The launcher itself, with ranks that misbehave."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks, leave, note, run_ranks


def add(*numbers: int) -> list[int]:
    total = torch.tensor(sum(numbers) + dist.get_rank())
    dist.all_reduce(total)
    print("rank", dist.get_rank())
    return [int(total), torch.get_num_threads()]


def misbehave() -> None:
    dist.barrier()
    note("here")
    match dist.get_rank():
        case 0:
            time.sleep(1000)
        case 1:
            raise ValueError("one")
        case 2:
            os.kill(os.getpid(), signal.SIGKILL)
        case 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        case 4:
            leave({"left": True})


def is_alive(pid: int) -> bool:
    """A killed orphan is a zombie until somebody asks for it."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_every_rank_answers_with_what_its_function_returned_and_printed() -> None:
    done = run_ranks(add, 2, args=(1, 2))

    assert [(one.rank, one.code, one.value, one.error) for one in done] == [(0, 0, [7, 1], None), (1, 0, [7, 1], None)]
    assert [one.stdout for one in done] == ["rank 0\n", "rank 1\n"]


def test_torchrun_starts_them_too() -> None:
    done = run_ranks(add, 2, args=(1, 2), torchrun=True)

    assert [(one.rank, one.code, one.value, one.error) for one in done] == [(0, 0, [7, 1], None), (1, 0, [7, 1], None)]
    assert [one.stdout for one in done] == ["rank 0\n", "rank 1\n"]


def test_whoever_is_left_is_killed_when_the_others_have_ended() -> None:
    with Ranks(misbehave, 5) as ranks:
        done = ranks.wait(unless_left=[0, 3])
        pids = [ranks.pid(rank) for rank in range(5)]

    assert [one.code for one in done] == [None, 1, -signal.SIGKILL, None, 0]
    assert [one.error for one in done] == [None, "ValueError: one", None, None, None]
    assert done[4].value == {"left": True}
    assert "ValueError: one" in done[1].stderr
    assert [pid for pid in pids if is_alive(pid)] == []


def test_ranks_that_hang_are_named_and_nothing_is_left_of_them() -> None:
    with Ranks(misbehave, 4) as ranks:
        for rank in range(4):
            ranks.wait_for_note(rank, "here")
        pids = [ranks.pid(rank) for rank in range(4)]
        with pytest.raises(TimeoutError, match=r"ranks \[0, 3\] had not ended after 0.5 s\n(?s:.*)ValueError: one"):
            ranks.wait(0.5)

    assert [pid for pid in pids if is_alive(pid)] == []


def test_a_torchrun_that_hangs_leaves_nothing_behind_even_when_it_is_dead() -> None:
    with Ranks(misbehave, 1, torchrun=True) as ranks:
        ranks.wait_for_note(0, "here")
        os.kill(ranks.torchrun_pid, signal.SIGKILL)
        (done,) = ranks.wait()
        pid = ranks.pid(0)

    assert done.code == -signal.SIGKILL
    assert not is_alive(pid)
