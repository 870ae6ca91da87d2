"""Do all ranks of a job agree on when to save, on what became of it, and on what is resumed? Real ranks over gloo."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from ranks import RankResult, Ranks, leave, note, run_ranks, stay_until, values
from torch import nn
from torch.distributed.distributed_c10d import _get_default_store
from torch.nn.parallel import DistributedDataParallel

from ckptmgr import CheckpointManager, Moment, open_store, per_rank, warm_start
from ckptmgr.bench import disk
from ckptmgr.errors import CheckpointError, StoreError
from ckptmgr.testing import SlowStore

if TYPE_CHECKING:
    from servers import Bucket
    from servers.proxy import Proxy

TIMEOUT_S = 3
# Each connection to the store of the job asks the resolver for a name: an answer that is lost is no rank that is.
RESOLVER = {"RES_OPTIONS": "timeout:1 attempts:1"}


def run(target: Callable[..., Any], world_size: int, *args: Any, **more: Any) -> list[RankResult]:
    return run_ranks(target, world_size, env=RESOLVER, args=args, **more)


# What ranks are made of


class Counting(nn.Linear):
    """A model that knows how often its state was asked for."""

    asked = 0

    def state_dict(self, *args: Any, **more: Any) -> Any:
        self.asked += 1
        return super().state_dict(*args, **more)


class Probe:
    """An entry of the state that fails on request."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def state_dict(self) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return {"rank": dist.get_rank()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state


class FullStore:
    """A store whose disk is full from the n-th effect on, until it is emptied."""

    def __init__(self, root: str) -> None:
        self._store = open_store(root, fsync=False)
        self.left: int | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def put(self, *args: Any, **more: Any) -> Any:
        self._use()
        return self._store.put(*args, **more)

    def writer(self, *args: Any, **more: Any) -> Any:
        self._use()
        return self._store.writer(*args, **more)

    def _use(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise StoreError("the disk is full", errno.ENOSPC)


Fault = Callable[[int, dict[str, Probe], FullStore], None]  # what happens before a step


def training(kind: type[nn.Linear] = nn.Linear, scale: float = 1.0) -> dict[str, Any]:
    """A model and its optimizer, after one step."""
    torch.manual_seed(0)
    model = kind(8, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    (scale * model(torch.ones(2, 8)).sum()).backward()
    optimizer.step()
    optimizer.zero_grad()
    return {"model": model, "optimizer": optimizer}


def scale(model: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(factor)


def digest(model: nn.Module) -> str:
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()[:16]


def manager(root: str, **more: Any) -> CheckpointManager:
    more.setdefault("keep", {"last": 10})
    more.setdefault("ranks", {"timeout": f"{TIMEOUT_S}s"})
    return CheckpointManager(root, fsync=False, **more)


def outcome(call: Callable[[], Any]) -> list[str]:
    """The class and the text of what a call raised."""
    try:
        call()
    except CheckpointError as exc:
        return [type(exc).__name__, str(exc)]
    return []


def steps_in(root: str | Path) -> list[int]:
    with CheckpointManager(str(root), read_only=True) as reader:
        return reader.all_steps()


def same(done: Any) -> Any:
    """What every rank returned alike."""
    found = values(done)
    assert found == [found[0]] * len(found)
    return found[0]


def keys_of_ours() -> list[str]:
    """What is in the store of the job under our prefix, but for signs of life."""
    return sorted(key for key in _get_default_store().list_keys() if "ckptmgr/" in key and "/alive/" not in key)


@contextmanager
def files_touched(root: str) -> Iterator[list[str]]:
    """What this process does to files below `root`, as the interpreter reports it."""
    found: list[str] = []
    is_over = False

    def hear(event: str, args: tuple[Any, ...]) -> None:
        if not is_over and event.partition(".")[0] in {"open", "os", "shutil"}:
            found.extend(f"{event} {one}" for one in args if isinstance(one, str) and one.startswith(root))

    sys.addaudithook(hear)
    yield found
    is_over = True


# 1. Rank 0 writes


def train_ddp(root: str) -> dict[str, Any]:
    """Eight steps of DDP with saves by step and epoch; then calls at which nothing is due."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    inner = Counting(8, 4)
    model = DistributedDataParallel(inner)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    save = {"every_steps": 3, "every_epochs": 2, "on_signals": []}
    state = {"model": model, "optimizer": optimizer, "at": per_rank(10 * rank)}
    mgr = manager(root, save=save)
    with files_touched(root) as touched:
        start = mgr.resume(model, optimizer)
        saved = []
        for step in range(1, 9):
            model(torch.ones(2, 8)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if mgr.maybe_save(state, step, epoch=step // 2) is not None:
                saved.append(step)
        mgr.wait()
        dist.barrier()
        before = keys_of_ours()
        dist.barrier()
        for ahead in (0, 1):  # one makes all its calls before the other begins, and waits for nobody
            for _ in range(300 if rank == ahead else 0):
                mgr.maybe_save(state, 8, epoch=4)
            dist.barrier()
        after = keys_of_ours()
        dist.barrier()
        mgr.close()
    return {
        "fresh": not start,
        "saved": saved,
        "touched": len(touched),
        "asked": inner.asked,
        "keys": before == after and before != [],
        "digest": digest(inner),
    }


def resume_ddp(root: str) -> dict[str, Any]:
    model = DistributedDataParallel(Counting(8, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    with manager(root) as mgr:
        start = mgr.resume(model, optimizer)
    return {
        "step": [start.step, start.epoch],
        "at": start.values["at"],
        "digest": digest(model.module),
        "lr": optimizer.param_groups[0]["lr"],
        "policy": start.per_rank.policy,
    }


def test_rank_0_alone_writes_and_for_steps_and_epochs_the_ranks_ask_each_other_nothing(tmp_path: Path) -> None:
    first, second = values(run(train_ddp, 2, str(tmp_path / "run")))

    assert first["saved"] == second["saved"] == [3, 4, 6, 8]
    assert [second["touched"], second["asked"]] == [0, 0]
    assert first["touched"] > 20  # or the count means nothing
    assert first["asked"] == 4
    assert [first["fresh"], first["keys"], second["fresh"], second["keys"]] == [True] * 4
    assert steps_in(tmp_path / "run") == [3, 4, 6, 8]
    back = values(run(resume_ddp, 2, str(tmp_path / "run")))
    assert back == [
        {"step": [8, 4], "at": 10 * rank, "digest": first["digest"], "lr": 0.01, "policy": "own"} for rank in (0, 1)
    ]


# 2. When


class SkewedClock:
    """Counts seconds of 7 ms steps from anywhere, at a rate of its own and with jitter."""

    def __init__(self, rank: int) -> None:
        self.random = random.Random(rank)
        self.now, self.rate = 1000.0 * rank, (1.0, 1.02, 0.98, 1.3)[rank]

    def go_on(self) -> None:
        self.now += self.rate * self.random.uniform(0.005, 0.009)

    def __call__(self) -> float:
        return self.now


def save_by_skewed_clocks(root: str) -> dict[str, Any]:
    """400 steps; also what each rank would have decided by itself."""
    clock = SkewedClock(dist.get_rank())
    mgr = manager(root, clock=clock, save={"every": "100ms", "every_steps": 50}, keep={"last": 1})
    saved, alone = [], []
    since = clock.now
    for step in range(1, 401):
        clock.go_on()
        if clock.now - since >= 0.1:
            alone.append(step)
            since = clock.now
        if mgr.maybe_save({"x": torch.ones(8)}, step) is not None:
            saved.append(step)
    mgr.close()
    return {"saved": saved, "alone": alone}


def test_four_ranks_with_skewed_clocks_save_at_the_same_steps_of_400(tmp_path: Path) -> None:
    done = values(run(save_by_skewed_clocks, 4, str(tmp_path)))

    assert [one["saved"] for one in done] == [done[0]["saved"]] * 4
    assert len(done[0]["saved"]) > 20
    assert set(range(50, 401, 50)) <= set(done[0]["saved"])
    by_clock = [later - earlier for earlier, later in itertools.pairwise(done[0]["saved"]) if later % 50]
    assert min(by_clock) >= 0.1 / 0.009  # nothing is saved again that a save of another trigger has answered
    assert done[1]["alone"] != done[0]["alone"]  # or the clocks were not skewed


def ask(root: str) -> dict[str, Any]:
    """What each way to ask for a save leads to, when one rank asks at step 5."""
    rank = dist.get_rank()

    def is_five(moment: Moment) -> bool:
        return rank == 0 and moment.step == 5

    found: dict[str, Any] = {}

    def loop(name: str, at_five: Callable[[CheckpointManager], None], until: int = 60, **more: Any) -> None:
        mgr = manager(f"{root}/{name}", **more)
        saved, stops = [], []
        for step in range(1, until):
            if step == 5:
                at_five(mgr)
            if mgr.maybe_save({"x": torch.ones(8)}, step) is not None:
                saved.append(step)
            stops.append(mgr.should_stop)
            time.sleep(0.001)
        mgr.close()
        found[name] = [saved, stops.index(True) + 1 if True in stops else None]

    loop("predicate", lambda mgr: None, triggers=[is_five])
    loop("request", lambda mgr: mgr.request_save() if rank == 2 else None)
    loop("signal", lambda mgr: os.kill(os.getpid(), signal.SIGTERM) if rank == 1 else None)

    def wait_until_it_is_taken(mgr: CheckpointManager) -> None:
        path = Path(f"{root}/file/SAVE_NOW")
        if rank == 1:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("please")
        dist.barrier()
        deadline = time.monotonic() + 20
        while path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    loop("file", wait_until_it_is_taken, save={"on_file": "SAVE_NOW"})
    return found


def test_whoever_asks_for_a_save_all_ranks_make_it_at_the_same_step_once(tmp_path: Path) -> None:
    found = same(run(ask, 3, str(tmp_path)))

    for name, (saved, stop) in found.items():
        assert len(saved) == 1, (name, saved)
        assert saved[0] > 5, name  # a vote carries it to the others
        assert stop == (saved[0] if name == "signal" else None), name
        assert steps_in(tmp_path / name) == saved


# 3. What became of it


def fail_in_many_ways(root: str) -> dict[str, Any]:
    """For each way to fail the calls that raised, and what; also what the loop went on to save."""
    rank = dist.get_rank()
    found: dict[str, Any] = {}

    def breaks(moment: Moment) -> bool:
        if moment.step == 3:
            raise ZeroDivisionError("no such number")
        return False

    def loop(name: str, fault: Fault, **more: Any) -> None:
        store = FullStore(f"{root}/{name}")
        probes = {"shared": Probe(), "own": Probe()}
        state = {**training(), "shared": probes["shared"], "own": per_rank(probes["own"])}
        more = {"save": {"at_steps": [2, 4, 6]}, "background": False, **more}
        mgr = manager(f"{root}/{name}", store=store, **more)
        raised, saved = [], []
        pending = None
        for step in range(1, 60):
            fault(step, probes, store)
            try:
                pending = mgr.maybe_save(state, step)
                if pending is not None:
                    saved.append(step)
            except CheckpointError as exc:
                raised.append([step, type(exc).__name__, str(exc), getattr(exc, "errno", None)])
            if mgr.config.background:  # for the failure to be known, though not told
                while pending is not None and not pending.done():
                    time.sleep(0.001)
                dist.barrier()
        error = outcome(mgr.close)
        found[name] = {"raised": raised, "saved": saved, "closed": error}

    def state_breaks(entry: str, on: int) -> Fault:
        def fault(step: int, probes: dict[str, Probe], store: FullStore) -> None:
            probes[entry].error = OSError(f"{entry} is torn") if step == 4 and rank == on else None

        return fault

    def disk_is_full(left: int, *, at: tuple[int, ...] = (4,)) -> Fault:
        def fault(step: int, probes: dict[str, Probe], store: FullStore) -> None:
            if step in at:
                store.left = left
            elif step - 1 not in at:
                store.left = None

        return fault

    loop("predicate", lambda *_: None, triggers=[breaks])
    for mode, background in (("sync", False), ("background", True)):
        loop(f"own state, {mode}", state_breaks("own", 2), background=background)
        loop(f"model, {mode}", state_breaks("shared", 0), background=background)
        for left in (0, 1, 3):
            loop(f"store {left}, {mode}", disk_is_full(left), background=background)
        loop(
            f"tolerated, {mode}", disk_is_full(0, at=(2, 4, 6)),
            on_error="warn", max_failures=2, background=background,
        )  # fmt: skip
    return found


def test_what_fails_on_one_rank_is_raised_on_all_at_the_same_call_and_they_go_on(tmp_path: Path) -> None:
    found = same(run(fail_in_many_ways, 3, str(tmp_path)))

    ((_, *predicate),) = found.pop("predicate")["raised"]
    assert predicate == ["RankError", "rank 0: ZeroDivisionError: no such number", None]
    for name, one in found.items():
        kind, mode = name.split(", ")
        steps = [step for step, *_ in one["raised"]]
        texts = [text for *_, text, _ in one["raised"]]
        if kind == "tolerated":
            assert len(steps) == 1, (name, one)
            assert "step 6 was not saved" in texts[0]
            assert steps_in(tmp_path / name) == []
            continue
        assert len(steps) == 1, (name, one)
        assert steps[0] == 4 or (mode == "background" and "store" in kind)
        # What could not be captured stays due; what could not be written is left at that.
        expected = [2, 6] if "store" in kind else [2, 5, 6]
        if steps == [6]:
            expected = [2, 7]  # the call at which all hear of it saves nothing
        assert steps_in(tmp_path / name) == expected, name
        if "store" in kind:
            assert "step 4 was not saved" in texts[0]
            assert "the disk is full" in texts[0]
        else:
            assert f"{'own' if 'own' in kind else 'shared'} is torn" in texts[0]
            assert f"rank {2 if 'own' in kind else 0}" in texts[0]


# 4. Out of step


def fall_out_of_step(root: str) -> dict[str, Any]:
    """Ranks that make different calls; then rank 0 saves alone."""
    rank = dist.get_rank()
    found: dict[str, Any] = {}

    def phase(name: str, call: Callable[[CheckpointManager, dict[str, Any]], object]) -> None:
        state = {**training(), "own": per_rank(rank), "shared": 7}
        mgr = manager(f"{root}/{name}", background=False, save={"every_steps": 5})
        mgr.resume()
        mgr.save(state, 1)
        scale(state["model"], 2.0)
        dist.barrier()
        began = time.monotonic()
        error = outcome(lambda: call(mgr, state))
        took = time.monotonic() - began
        dist.barrier()
        again = outcome(lambda: mgr.save(state, 3))  # also a silent rank now hears of it
        saved = mgr.save(state, 3, overwrite=True).url if rank == 0 else None
        closed = outcome(mgr.close)
        total = torch.ones(1)
        dist.all_reduce(total)  # the training's own group is as it was
        found[name] = [error, round(took, 1), again[:1], saved is not None, closed, int(total)]

    phase("another step", lambda mgr, state: mgr.save(state, 3 if rank == 1 else 2))
    phase("another call", lambda mgr, state: mgr.resume(**state) if rank == 2 else mgr.save(state, 2))
    phase("no call", lambda mgr, state: None if rank == 1 else mgr.save(state, 2))
    phase("no call of rank 0", lambda mgr, state: None if rank == 0 else mgr.save(state, 2))
    phase("no vote", lambda mgr, state: None if rank == 1 else [mgr.maybe_save(state, s) for s in (1, 2, 3)])
    return found


def resume_emergency(root: str) -> list[Any]:
    state = {**training(), "own": Probe()}
    with manager(root) as mgr:
        start = mgr.resume(state["model"], state["optimizer"])
        return [
            start.step,
            float(state["model"].weight.min()),
            start.values["shared"],
            start.values.get("own"),
            start.per_rank.policy,
            start.per_rank.saved_world_size,
        ]


def test_ranks_that_make_different_calls_are_told_who_and_what_and_rank_0_can_save_alone(tmp_path: Path) -> None:
    done = values(run(fall_out_of_step, 3, str(tmp_path)))
    expected = {
        "another step": r"save of step 3|save of step 2",
        "another call": r"rank 2.*resume|resume.*rank 2",
        "no call": r"rank 1 \(alive\)",
        "no call of rank 0": r"rank 0 \(alive\)",
        "no vote": r"rank|agree",
    }
    silent = {"no call": 1, "no call of rank 0": 0, "no vote": 1}
    for name, pattern in expected.items():
        for rank, one in enumerate(done):
            error, took, again, saved, closed, total = one[name]
            assert total == 3
            assert saved is (rank == 0)
            assert closed == [], (name, rank, closed)
            if rank == silent.get(name):
                assert again == ["CoordinationError"], (name, rank, again)
                continue
            assert error[0] == "CoordinationError", (name, rank, error)
            assert re.search(pattern, error[1]), (name, rank, error)
            assert took < TIMEOUT_S + 2, (name, rank, took)
            assert again == ([] if rank == 0 else ["CoordinationError"])
        assert steps_in(tmp_path / name) == [1, 3]
    (alone,) = values(run(resume_emergency, 1, str(tmp_path / "no call")))
    assert alone == [3, 2.0, 7, 0, "own", 1]
    two = values(run(resume_emergency, 2, str(tmp_path / "no call")))
    assert two == [[3, 2.0, 7, None, "derive", 1]] * 2


def stop_in_a_save(root: str) -> dict[str, Any]:
    """Rank 2 is stopped while its state is captured, and goes on later."""
    rank = dist.get_rank()
    state = {**training(), "own": per_rank(probe := Probe())}
    mgr = manager(root, background=False)
    mgr.resume()
    mgr.save(state, 1)
    dist.barrier()
    if rank == 2:
        probe.state_dict = lambda: [note("stops"), os.kill(os.getpid(), signal.SIGSTOP), {"rank": 2}][2]  # type: ignore[method-assign, misc]
    began = time.monotonic()
    error = outcome(lambda: mgr.save(state, 2))
    took = time.monotonic() - began
    note("heard")
    total = torch.ones(1)
    dist.all_reduce(total)
    mgr.close()
    return {"error": error, "took": took, "total": int(total)}


def test_a_stopped_rank_is_named_in_time_and_the_training_s_own_group_is_as_it_was(tmp_path: Path) -> None:
    with Ranks(stop_in_a_save, 3, env=RESOLVER, args=(str(tmp_path),)) as ranks:
        ranks.wait_for_note(2, "stops")
        for rank in (0, 1):
            ranks.wait_for_note(rank, "heard")
        os.kill(ranks.pid(2), signal.SIGCONT)
        done = values(ranks.wait())

    for rank in (0, 1):
        assert done[rank]["error"][0] == "CoordinationError"
        assert "rank 2 (no sign of life)" in done[rank]["error"][1]
        assert done[rank]["took"] < TIMEOUT_S + 2
    assert done[2]["error"][0] == "CoordinationError"
    assert [one["total"] for one in done] == [3, 3, 3]
    assert steps_in(tmp_path) == [1]


# 5. Traps


def leave_early(root: str) -> Any:
    """Two saves in the background, and the process group goes at once."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank = dist.get_rank()
    whole = {**training(), "own": per_rank(rank)}
    sharded = nn.Linear(64, 64)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    pairs = []
    for kind, state in (("ddp", whole), ("fsdp", {"model": sharded, "own": per_rank(rank)})):
        store = SlowStore(open_store(f"{root}/{kind}", fsync=False))
        mgr = manager(f"{root}/{kind}", store=store)
        mgr.resume()
        mgr.save(state, 1)
        mgr.wait()
        store.delay_s = 0.05
        pairs.append((mgr, state))
    for mgr, state in pairs:
        mgr.save(state, 2)
    dist.destroy_process_group()
    closed = [outcome(mgr.close) for mgr, _ in pairs]
    note("closed")
    if rank == 0:
        stay_until("closed", [1])
    leave([one[:1] for one in closed])


def test_a_save_in_flight_when_the_group_is_destroyed_is_whole_or_absent(tmp_path: Path) -> None:
    done = values(run(leave_early, 2, str(tmp_path)))

    for number, kind in enumerate(("ddp", "fsdp")):
        assert {error for one in done for error in one[number]} <= {"CoordinationError", "SaveFailedError"}
        with CheckpointManager(tmp_path / kind, read_only=True) as reader:
            steps = reader.all_steps()
            assert steps in ([1], [1, 2])
            for step in steps:
                reader.verify(step, "full")
        fresh = same(run(resume_whole_or_sharded, 2, str(tmp_path / kind), kind))
        assert fresh == steps[-1]


def resume_whole_or_sharded(root: str, kind: str) -> int:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: nn.Module = nn.Linear(8, 4) if kind == "ddp" else nn.Linear(64, 64)
    if kind == "fsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    with manager(root) as mgr:
        return mgr.resume(model).step


def files_made_durable(root: str) -> list[str]:
    """The files of a sharded save that this rank has seen to the disk."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(8, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115
        fsync(descriptor)

    with CheckpointManager(root, background=False) as mgr:
        mgr.resume()
        os.fsync = noted
        mgr.save({"model": model}, 1)
        os.fsync = fsync
    return [Path(path).name for path in synced]


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the names of open files")
def test_every_rank_makes_its_own_small_files_durable(tmp_path: Path) -> None:
    synced = values(run(files_made_durable, 2, str(tmp_path)))
    written = {path.name for path in tmp_path.glob("step-*/__*.distcp")}
    assert [sorted(written & set(names)) for names in synced] == [["__0_0.distcp"], ["__1_0.distcp"]]


def commit_on_s3(url: str, options: dict[str, Any], step: int) -> list[int]:
    with CheckpointManager(url, storage={"options": options}, run="one") as mgr:
        mgr.resume()
        mgr.save({"x": torch.full((4,), float(step))}, step).wait()
        return mgr.all_steps()


def test_what_another_process_commits_is_seen_by_who_has_listed_before(s3_moto: Bucket) -> None:
    url = f"{s3_moto.url}/run"
    with CheckpointManager(url, storage={"options": s3_moto.options}, read_only=True) as reader:
        assert [reader.all_steps(), bool(reader.resume())] == [[], False]
        for step in (1, 2):
            values(run(commit_on_s3, 1, url, s3_moto.options, step))
            assert reader.all_steps()[-1] == step
            assert reader.latest_step() == step
            assert reader.resume().values["x"].tolist() == [float(step)] * 4


# 6. Resume


def save_steps(root: str, steps: list[int], **more: Any) -> None:
    """Weights that are the step all over, something of each rank's own, and its generators."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    state = training()
    with manager(root, run="one", **more) as mgr:
        mgr.resume()
        for step in steps:
            scale(state["model"], step)
            torch.manual_seed(100 * step + rank)
            mgr.save({**state, "own": per_rank(rank)}, step)


def save_on_four(root: str) -> bool:
    save_steps(root, [1, 2])
    return True


def resume_in_many_ways(root: str) -> dict[str, Any]:
    rank, found = dist.get_rank(), {}

    def phase(name: str, at: str, model: nn.Linear | None = None, **more: Any) -> None:
        model = model or nn.Linear(8, 4)
        optimizer = torch.optim.AdamW(model.parameters())
        before = digest(model)
        torch.manual_seed(5)
        mgr = manager(f"{root}/{at}", **more)
        answer: dict[str, Any] = {}

        def resume() -> None:
            start = mgr.resume(model, optimizer)
            answer.update(
                step=start.step,
                skipped=[one.step for one in start.skipped],
                policy=start.per_rank.policy,
                saved_by=start.per_rank.saved_world_size,
                not_restored=list(start.per_rank.not_restored),
                own=start.values.get("own"),
                weight=float(model.weight.max()),
            )

        answer["error"] = outcome(resume)
        answer["touched"] = digest(model) != before
        answer["states"] = len(optimizer.state)
        answer["drawn"] = torch.rand(1).item()
        dist.barrier()
        mgr.close()
        found[name] = answer

    phase("nothing", "nothing")
    phase("damaged", "damaged")
    phase("misfit", "sound", nn.Linear(8, 4) if rank != 1 else nn.Linear(8, 5))
    for read in ("all", "rank0", "per_node", "auto"):
        phase(f"read {read}", "sound", read=read)
    for policy in ("exact", "derive", "drop"):
        phase(policy, "four" if dist.get_world_size() == 2 else "one", on_world_change=policy)
    phase("derive again", "four" if dist.get_world_size() == 2 else "one", on_world_change="derive")
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_ranks_resume_the_same_or_none_does(world_size: int, tmp_path: Path) -> None:
    for at in ("damaged", "sound", "one"):
        save_steps(str(tmp_path / at), [1, 2, 3])
    (path,) = (tmp_path / "damaged").glob("step-*3/model.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    saved_by = 1
    if world_size == 2:
        saved_by = 4
        assert same(run(save_on_four, 4, str(tmp_path / "four")))

    done = values(run(resume_in_many_ways, world_size, str(tmp_path)))

    for one in done:
        nothing, damaged, misfit = one["nothing"], one["damaged"], one["misfit"]
        assert [nothing["step"], nothing["touched"], nothing["states"]] == [0, False, 0]
        assert [damaged["step"], damaged["skipped"], damaged["weight"]] == [2, [3], 2.0]
        assert [misfit["error"][0], misfit["touched"], misfit["states"]] == ["StateMismatchError", False, 0]
        assert "rank 1: " in misfit["error"][1]
        for read in ("all", "rank0", "per_node", "auto"):
            found = one[f"read {read}"]
            assert [found["error"], found["step"], found["weight"], found["states"]] == [[], 3, 3.0, 2], read
        assert [one["exact"]["error"][0], one["exact"]["touched"]] == ["StateMismatchError", False]
        for policy in ("derive", "drop"):
            found = one[policy]
            assert [found["error"], found["policy"], found["saved_by"]] == [[], policy, saved_by]
            assert found["weight"] == (2.0 if saved_by == 4 else 3.0)
            assert found["own"] is None
        assert one["derive again"] == one["derive"]
    drawn = [one["derive"]["drawn"] for one in done]
    assert len(set(drawn)) == world_size
    assert {one["drop"]["drawn"] for one in done} == {one["nothing"]["drawn"] for one in done}
    marks = [path for path in (tmp_path / "damaged/.ckptmgr/damaged").rglob("*") if path.is_file()]
    assert len(marks) == 1


def read_from_disk(root: str, neighbours: int) -> list[int]:
    """The bytes that a resume, a load and a warm start had from the disk."""
    os.environ["LOCAL_WORLD_SIZE"] = str(neighbours)  # as launchers do
    model, counts = nn.Linear(2048, 4096), []
    with manager(root, read_only=True, ranks={"timeout": "30s"}) as mgr:
        for way in (mgr.resume, lambda _: mgr.load(), lambda model: warm_start(root, model)):
            dist.barrier()
            if not dist.get_rank():
                disk.forget(Path(root))
            dist.barrier()
            before = _from_disk()
            way(model)
            counts.append(_from_disk() - before)
    return counts


def _from_disk() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells what a process reads from a disk")
def test_ranks_of_one_machine_have_a_checkpoint_from_the_disk_once(tmp_path: Path) -> None:
    model = nn.Linear(2048, 4096)
    with manager(tmp_path) as mgr:
        mgr.save({"model": model}, 1)
    disk.flush(tmp_path)
    size = 4 * (2048 * 4096 + 4096)
    alone = values(run(read_from_disk, 2, str(tmp_path), 1))
    if min(map(min, alone)) < size:
        pytest.skip("the folder for temporary files is on no disk")
    together = values(run(read_from_disk, 2, str(tmp_path), 2))
    for way in range(3):
        assert sum(one[way] for one in together) < 1.25 * size


def resume_from_s3(url: str, options: dict[str, Any], read: str) -> list[float]:
    state = training()
    with manager(url, storage={"options": options}, read=read, read_only=True, ranks={"timeout": "30s"}) as mgr:
        return [mgr.resume(**state).step, float(state["model"].weight.min())]


@pytest.mark.parametrize("read", ["auto", "rank0", "per_node"])
def test_four_ranks_ask_a_remote_store_for_what_one_would(read: str, s3_proxy: tuple[Bucket, Proxy]) -> None:
    bucket, proxy = s3_proxy
    url = f"{bucket.url}/run"
    save_steps(url, [1, 2], storage={"options": bucket.options})
    asked: list[tuple[str, str | None, int]] = []
    answer = proxy.answer

    def noting(request: Any) -> Any:
        reply = answer(request)
        asked.append((str(request), request.headers.get("Range"), len(reply.body)))
        return reply

    proxy.answer = noting  # type: ignore[method-assign]
    assert values(run(resume_from_s3, 1, url, bucket.options, read)) == [[2, 2.0]]
    of_one = sorted(asked, key=str)
    asked.clear()
    assert values(run(resume_from_s3, 4, url, bucket.options, read)) == [[2, 2.0]] * 4
    assert sorted(asked, key=str) == of_one
    print(f"read {read}: {len(of_one)} requests, {sum(size for *_, size in of_one):,} bytes")
