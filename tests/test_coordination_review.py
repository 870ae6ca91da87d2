"""What happens to the other ranks when one leaves a call half-way, can't copy its part, or hosts a store that stops?"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import leave, note, run_ranks, stay_until, values
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ckptmgr import CheckpointManager, open_store
from ckptmgr.copying import Copier
from ckptmgr.errors import CheckpointError, ConfigError, CoordinationError, StoreError
from ckptmgr.repository import Repository
from ckptmgr.testing import ThreadRanks

TIMEOUT_S = 3
# Each connection to the store of the job asks the resolver for a name: an answer that is lost is no rank that is.
RESOLVER = {"RES_OPTIONS": "timeout:1 attempts:1"}


class Unreadable:
    """A part that can be pickled, and not be made again."""

    def __reduce__(self) -> Any:
        return _refuse, ()


def _refuse() -> None:
    raise LookupError("not known here")


def _outcome(call: Any) -> list[str]:
    """[class, text] of what a call raised."""
    try:
        call()
    except BaseException as exc:  # noqa: BLE001 - it is what the test is about
        return [type(exc).__name__, str(exc)]
    return []


def _together(ranks: Sequence[ThreadRanks], calls: Sequence[Any]) -> list[list[str]]:
    results: list[Any] = [None] * len(ranks)

    def one(rank: int) -> None:
        results[rank] = _outcome(calls[rank])

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for one_of in ranks:
        one_of.close()
    return results


# Leaving a turn


@pytest.mark.parametrize("channel", ["prompt", "patient"])
def test_a_part_that_rank_0_cannot_read_ends_the_call_on_all_ranks(channel: str) -> None:
    """Rank 0 lives on, so waiting for a sign of its death would be for ever."""
    ranks = ThreadRanks.make(2, timeout_s=1)
    calls = [
        lambda: getattr(ranks[0], channel).exchange("work", lambda: 1, lambda _: None),
        lambda: getattr(ranks[1], channel).exchange("work", Unreadable, lambda _: None),
    ]
    text = "work: rank 0 left it half-way: LookupError: not known here"
    assert _together(ranks, calls) == [["LookupError", "not known here"], ["CoordinationError", text]]
    assert [one.problem for one in ranks] == [text, text]


@pytest.mark.parametrize("leaving", [0, 1])
def test_a_rank_interrupted_while_all_wait_for_rank_0_ends_the_call_on_all(
    leaving: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C on one rank in a synchronous save, which the loop catches: nobody waits for it from then on."""
    ranks = ThreadRanks.make(2, timeout_s=1)

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ranks[leaving].patient, "_await_verdict" if leaving else "_tell", interrupted)
    done = threading.Event()

    def call(rank: int) -> Any:
        def again() -> None:
            try:
                ranks[rank].patient.first("write", lambda: 1)
            finally:
                if rank == leaving:
                    done.set()
            done.wait(10)
            ranks[rank].prompt.exchange("next", lambda: 1, lambda _: None)

        return again

    results = _together(ranks, [call(0), call(1)])
    assert results[leaving][0] == "KeyboardInterrupt"
    assert results[1 - leaving][0] == "CoordinationError"
    assert f"write: rank {leaving} left it half-way: KeyboardInterrupt" in results[1 - leaving][1]


def test_a_store_that_is_lost_while_rank_0_tells_ends_the_coordination_there() -> None:
    """So that rank 0 may write alone at once."""
    ranks = ThreadRanks.make(2, timeout_s=1)

    def lost(*_: Any) -> None:
        raise CoordinationError("the store is gone")

    ranks[0].patient._wire.put = lost  # type: ignore[method-assign]
    assert _outcome(lambda: ranks[0].patient.first("write", lambda: 1)) == ["CoordinationError", "the store is gone"]
    assert ranks[0].problem == "the store is gone"
    for one in ranks:
        one.close()


# A stopped host


def _host_stops(root: str, save: dict[str, Any]) -> None:
    model = nn.Linear(4, 4)
    manager = CheckpointManager(root, save=save, ranks={"timeout": f"{TIMEOUT_S}s"}, background=False)
    manager.resume(model)
    manager.maybe_save({"model": model}, 1)
    dist.barrier()
    if dist.get_rank() == 0:
        note("stops")
        os.kill(os.getpid(), signal.SIGSTOP)
    stay_until("stops", [0])
    began = time.monotonic()

    def loop() -> None:
        for step in range(2, 50):
            manager.maybe_save({"model": model}, step)

    leave([_outcome(loop)[0], time.monotonic() - began])


@pytest.mark.parametrize("save", [{"every_steps": 1}, {"every": "1h"}], ids=["steps", "clock"])
def test_a_stopped_host_of_the_store_is_waited_for_no_longer_than_the_timeout(
    save: dict[str, Any], tmp_path: Path
) -> None:
    """It was waited for once more at each thing that was asked about the problem: two and three timeouts."""
    done = run_ranks(_host_stops, 2, args=(str(tmp_path), save), timeout_s=60, unless_left=[0], env=RESOLVER)
    kind, elapsed_s = done[1].value
    assert (kind, elapsed_s < TIMEOUT_S + 2) == ("CoordinationError", True)


# A part that can't be copied


class FullStore:
    """A store with no room for files."""

    def __init__(self, root: str) -> None:
        self._store, self.is_full = open_store(root, fsync=False), False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def writer(self, *args: Any, **more: Any) -> Any:
        if self.is_full:
            raise StoreError("the disk is full", 28)
        return self._store.writer(*args, **more)


def _sharded() -> DTensor:
    return distribute_tensor(torch.ones(64, 64), init_device_mesh("cpu", (2,)), [Shard(0)])


def _one_has_no_room(root: str) -> None:
    rank, weight, store = dist.get_rank(), _sharded(), FullStore(root)
    limit = {"max_staging": 1} if rank else {}
    manager = CheckpointManager(
        root,
        store=store,  # type: ignore[arg-type]
        save={"every_steps": 2},
        ranks={"timeout": f"{TIMEOUT_S}s"},
        **limit,
    )
    manager.resume(w=weight)
    told: list[Any] = []
    for step in range(1, 7):
        store.is_full = rank == 1 and step == 4
        try:
            pending = manager.maybe_save({"w": weight}, step)
            told.append(pending and pending.in_background)
        except CheckpointError as exc:
            told.append(f"{type(exc).__name__}: {exc}".replace(root, "ROOT"))
    manager.close()
    note("done")
    stay_until("done", [0, 1])
    leave(told)


def test_a_rank_without_room_for_its_copy_has_all_ranks_wait_and_hear_the_same(tmp_path: Path) -> None:
    """Else that rank would raise at this call, and the others lose it before they are told why."""
    first, second = values(run_ranks(_one_has_no_room, 2, args=(str(tmp_path),), timeout_s=60, env=RESOLVER))
    failed = (
        "SaveFailedError: step 4 was not saved to ROOT: rank 1: the disk is full; the checkpoints before it are "
        "untouched"
    )
    expected = [None, False, None, failed, None, False]
    assert first == expected
    assert second == expected


def test_a_folder_that_another_process_removed_is_made_again_with_those_it_was_in(tmp_path: Path) -> None:
    """As rank 0 clears away what a failed save left, and another rank is the first to write the next one."""
    one, other = open_store(tmp_path, fsync=False), open_store(tmp_path, fsync=False)
    one.put("drafts/first/a", b"1")
    other.put("drafts/first/b", b"1")
    one.delete(["drafts/first/"])
    assert not (tmp_path / "drafts").exists()
    other.put("drafts/second/b", b"2")
    assert other.get("drafts/second/b") == b"2"


def _interrupted_copy(root: str) -> None:
    rank, weight = dist.get_rank(), _sharded()
    manager = CheckpointManager(root, save={"every_steps": 1}, ranks={"timeout": f"{TIMEOUT_S}s"})
    manager.resume(w=weight)
    copy = Copier.copy

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    if rank == 1:
        Copier.copy = interrupted  # type: ignore[method-assign, assignment]
    told = [_outcome(lambda: (manager.maybe_save({"w": weight}, 1), manager.wait(20)))[0]]
    Copier.copy = copy  # type: ignore[method-assign]
    manager.maybe_save({"w": weight}, 2)
    manager.wait()
    manager.close()
    note("done")
    stay_until("done", [0, 1])
    leave([told])


def test_an_interrupt_while_one_rank_copies_its_part_ends_the_save_on_all_and_the_next_is_made(tmp_path: Path) -> None:
    """The others waited for a rank that was alive and wrote nothing."""
    first, second = values(run_ranks(_interrupted_copy, 2, args=(str(tmp_path),), timeout_s=60, env=RESOLVER))
    assert [first[0], second[0]] == [["SaveFailedError"], ["KeyboardInterrupt"]]
    assert (tmp_path / "step-00000002" / "manifest.json").exists()
    assert not (tmp_path / "step-00000001").exists()


# Between turns


def _marks_fail(root: str) -> None:
    weight = torch.zeros(4)
    manager = CheckpointManager(root, ranks={"timeout": f"{TIMEOUT_S}s"}, background=False)
    manager.resume(w=weight)
    for step in (1, 2):
        manager.save({"w": torch.full((4,), float(step))}, step)
    manager.close()
    if dist.get_rank() == 0:
        for file in (Path(root) / "step-00000002").glob("*.safetensors"):
            file.write_bytes(b"")

        def refused(*_: Any) -> None:
            raise ConfigError("no marks here")

        Repository.mark_damaged = refused  # type: ignore[method-assign, assignment]
    dist.barrier()
    with CheckpointManager(root, ranks={"timeout": f"{TIMEOUT_S}s"}) as again:
        resumed = again.resume(w=weight)
    note("done")
    stay_until("done", [0, 1])
    leave([resumed.step, weight.tolist()])


def test_a_mark_of_damage_that_rank_0_cannot_leave_keeps_nobody_waiting(tmp_path: Path) -> None:
    done = values(run_ranks(_marks_fail, 2, args=(str(tmp_path),), timeout_s=60, env=RESOLVER))
    assert done == [[1, [1.0] * 4]] * 2


def _collective_state(root: str) -> None:
    manager = CheckpointManager(root, ranks={"timeout": f"{TIMEOUT_S}s"}, background=False)
    manager.resume()

    def state() -> dict[str, Any]:
        dist.barrier()  # as gathering a whole state of sharded parts is
        return {"w": torch.ones(4)}

    manager.save(state, 1)
    told = _outcome(lambda: manager.save(state, 1))[0]
    manager.close()
    note("done")
    stay_until("done", [0, 1])
    leave(told)


def test_a_step_that_is_there_is_refused_on_all_ranks_though_the_state_is_gathered(tmp_path: Path) -> None:
    """Rank 0 refused before it called for the state, and the others waited for it in a collective of the training."""
    done = values(run_ranks(_collective_state, 2, args=(str(tmp_path),), timeout_s=60, env=RESOLVER))
    assert done == ["AlreadyExistsError"] * 2
