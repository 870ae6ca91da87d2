"""Readers beside a writer that deletes: what they get is whole, what is pinned stays, and nothing counts as damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptmgr import CheckpointManager
from ckptmgr.config import load_config
from ckptmgr.errors import CheckpointError, DeletedMeanwhileError, NotFoundError, StoreError
from ckptmgr.reading import TRIES
from ckptmgr.repository import Repository
from ckptmgr.restart import Restart
from ckptmgr.run import Run
from ckptmgr.store import Store
from ckptmgr.store.local import LocalStore
from ckptmgr.testing import MemoryStore, PausingStore, ThreadRanks


class ReadOnly(PausingStore):
    """A store that takes nothing from this reader."""

    def put(self, key: str, data: Any, *, create: bool = False) -> None:
        self.pause("put", key)
        raise StoreError(f"{key}: permission denied", 13)


def manager(store: Any, **options: Any) -> CheckpointManager:
    settings: dict[str, Any] = {"keep": {"last": 1}, "background": False, "save": {"on_signals": []}, **options}
    return CheckpointManager(store.url if store.path else "memory", store=store, **settings)


def state(step: int) -> dict[str, Any]:
    return {"x": torch.full((300,), float(step)), "number": step}


@pytest.fixture(params=["disk", "object store"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Store]:
    folders = iter(range(100_000))
    if request.param == "disk":
        return lambda: LocalStore(tmp_path / str(next(folders)), fsync=False)
    return lambda: MemoryStore(can_rename=False)


class Writer:
    """One that keeps only the newest."""

    def __init__(self, store: Store) -> None:
        self.manager = manager(store)
        self.manager.resume()
        self.step = 0
        self.save()

    def save(self) -> None:
        self.step += 1
        self.manager.save(state(self.step), self.step)


def load(reader: CheckpointManager) -> Any:
    return reader.load()


def resume(reader: CheckpointManager) -> Any:
    return reader.resume().values


def resume_into(reader: CheckpointManager) -> Any:
    values = {"x": torch.zeros(300), "number": 0}
    start = reader.resume(x=values["x"])
    return {"x": values["x"], "number": start.values["number"]}


def load_mapped(reader: CheckpointManager) -> Any:
    return reader.load(mmap=True) if reader._run.repository.store.path else reader.load()


READS = (load, resume, resume_into, load_mapped)


def read_beside_a_rotation(
    make: Callable[[], Store], read: Callable[[Any], Any], at: int | None, kind: Any
) -> list[str]:
    """What is wrong when a writer saves, and deletes what was there, before a reader's `at`-th call."""
    store = make()
    writer = Writer(store)
    reading = kind(store, at, writer.save)
    found = []
    try:
        values = read(manager(reading, read_only=True))
    except CheckpointError as exc:
        found.append(f"call {at}: {exc!r}")
    else:
        if values["number"] not in (1, 2) or not torch.equal(values["x"], state(values["number"])["x"]):
            found.append(f"call {at}: wrong data {values}")
    writer.save()
    repository = Repository(store)
    if [info.step for info in repository.infos()] != [writer.step]:
        found.append(f"call {at}: {[info.step for info in repository.infos()]} are left")
    if pins_or_marks := [*store.list(".ckptmgr/pins"), *store.list(".ckptmgr/damaged")]:
        found.append(f"call {at}: left behind {pins_or_marks}")
    writer.manager.close()
    if at is None:
        return [str(reading.count)]
    return found


@pytest.mark.parametrize("kind", [PausingStore, ReadOnly], ids=["writable", "read-only"])
@pytest.mark.parametrize("read", READS, ids=lambda read: read.__name__)
def test_a_reader_gets_the_next_one_whole_wherever_it_was_when_the_writer_deleted_what_it_read(
    make: Callable[[], Store], read: Any, kind: Any, profile: Any, tally: Callable[[str, int], None]
) -> None:
    count = int(read_beside_a_rotation(make, read, None, kind)[0])
    points = profile.sample(range(1, count + 1), quick=3)
    problems = [problem for at in points for problem in read_beside_a_rotation(make, read, at, kind)]
    assert problems == []
    tally("deletions under a reader", len(points))


@pytest.mark.parametrize("kind", [PausingStore, ReadOnly], ids=["writable", "read-only"])
def test_a_reader_slower_than_the_writer_pins_what_it_reads_or_says_so(kind: Any) -> None:
    store = MemoryStore(can_rename=False)
    writer = Writer(store)

    class Slow(kind):  # type: ignore[misc]
        def reader(self, key: str, *, by_many: bool = False) -> Any:
            writer.save()
            return super().reader(key, by_many=by_many)

    reader = manager(Slow(store), read_only=True)
    if kind is ReadOnly:
        with pytest.raises(NotFoundError, match="was deleted while it was read"):
            reader.load()
        assert writer.step >= TRIES
    else:
        values = reader.load()
        assert torch.equal(values["x"], state(values["number"])["x"])
    assert store.list(".ckptmgr/damaged") == []
    writer.save()
    assert store.list(".ckptmgr/pins") == []
    writer.manager.close()


def test_a_number_that_went_is_not_found_and_never_damaged() -> None:
    store = MemoryStore(can_rename=False)
    writer = Writer(store)
    count = PausingStore(store)
    manager(count, read_only=True).load(1)
    for at in range(1, count.count + 1):
        step = writer.step
        try:
            values = manager(PausingStore(store, at, writer.save), read_only=True).load(step)
        except NotFoundError:
            pass
        else:
            assert values["number"] == step
    assert store.list(".ckptmgr/damaged") == []
    writer.manager.close()


def test_verify_of_one_that_went_is_not_found_and_never_a_problem(make: Callable[[], Store]) -> None:
    store = make()
    writer = Writer(store)
    count = PausingStore(store)
    assert manager(count, read_only=True).verify() == []
    for at in range(1, count.count + 1):
        step = writer.step
        assert manager(PausingStore(store, at, writer.save), read_only=True).verify() == []
        with suppress(NotFoundError):
            assert manager(PausingStore(store, at, writer.save), read_only=True).verify(step + 1) == []
    assert store.list(".ckptmgr/pins") == []
    writer.manager.close()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("times", [1, 3, TRIES])
def test_all_ranks_look_again_when_what_they_read_was_deleted_and_rank_0_pins_for_all(
    make: Callable[[], Store], world_size: int, times: int
) -> None:
    store = make()
    writer = Writer(store)
    pins_of_turns: list[int] = []

    def read(ranks: ThreadRanks) -> float:
        config = load_config("memory", keep={"last": 1})
        run = Run(store, config, takeover=False, read_only=True)
        real = run.repository.open

        def late(info: Any, level: str = "fast") -> Any:
            pins_of_turns.append(len(store.list(".ckptmgr/pins")))
            if len(pins_of_turns) <= times:
                for pin in store.list(".ckptmgr/pins"):
                    store.delete([pin.key])  # by somebody who wants it to go all the same
                writer.save()
            return real(info, level)

        run.repository.open = late  # type: ignore[method-assign]
        target = {"x": torch.zeros(300)}
        Restart(run, config, ranks, read_only=True, fresh=False).resume({"x": target["x"]}, None, True, (), "cpu")
        return float(target["x"][0])

    results = ThreadRanks.run(world_size, read)
    if times < TRIES:
        assert results == [float(writer.step)] * world_size
        assert pins_of_turns == [0, *[1] * times]
    else:
        assert {type(result) for result in results} == {DeletedMeanwhileError}
        assert len(pins_of_turns) == TRIES
    assert store.list(".ckptmgr/pins") == store.list(".ckptmgr/damaged") == []
    writer.manager.close()


# Pins


def pin_at_each_call_of_a_rotation(make: Callable[[], Store], at: int | None) -> list[str]:
    """A reader pins the one that is about to go before the writer's `at`-th call."""
    store = make()
    writing = PausingStore(store)
    writer = Writer(writing)
    held: list[int] = []

    def pin() -> None:
        reader = manager(store, read_only=True)
        try:
            reader.pin(1, "eval")
            held.append(1)
        except NotFoundError:
            return

    writing.at, writing.meanwhile, before = at and writing.count + at, pin, writing.count
    writer.save()
    count = writing.count - before
    there = writer.manager.all_steps()
    problems = [f"call {at}: the pinned one went"] if held and 1 not in there else []
    problems += [f"call {at}: {problem}" for step in there for problem in writer.manager.verify(step)]
    writer.save()
    if held and 1 not in writer.manager.all_steps():
        problems.append(f"call {at}: the pinned one went later")
    writer.manager.close()
    return [str(count)] if at is None else problems


def test_a_pin_that_was_put_holds_at_whatever_moment_of_a_rotation(
    make: Callable[[], Store], profile: Any, tally: Callable[[str, int], None]
) -> None:
    count = int(pin_at_each_call_of_a_rotation(make, None)[0])
    points = profile.sample(range(1, count + 1), quick=3)
    assert [problem for at in points for problem in pin_at_each_call_of_a_rotation(make, at)] == []
    tally("pins in a rotation", len(points))


def test_a_rotation_at_whatever_moment_of_a_pin_leaves_what_is_pinned(
    make: Callable[[], Store], tally: Callable[[str, int], None]
) -> None:
    at = 0
    while True:
        at += 1
        store = make()
        writer = Writer(store)
        pinning = PausingStore(store, at, writer.save)
        held = True
        try:
            manager(pinning, read_only=True).pin(1)
        except NotFoundError:
            held = False
        is_past = pinning.count < at
        writer.save()
        assert (1 in writer.manager.all_steps()) == held
        assert bool(store.list(".ckptmgr/pins")) == held
        writer.manager.close()
        if is_past:
            break
    tally("pins in a rotation", at)


def test_the_check_finds_a_writer_that_looks_at_the_pins_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Store:
        return MemoryStore(can_rename=False)

    monkeypatch.setattr(Repository, "is_held", lambda self, info: False)
    count = int(pin_at_each_call_of_a_rotation(make, None)[0])
    assert any(pin_at_each_call_of_a_rotation(make, at) for at in range(1, count + 1))


def test_the_check_finds_a_reader_that_takes_a_deletion_for_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Store:
        return MemoryStore(can_rename=False)

    monkeypatch.setattr("ckptmgr.reading.check_there", lambda *args: None)
    count = int(read_beside_a_rotation(make, load, None, PausingStore)[0])
    assert any(read_beside_a_rotation(make, load, at, PausingStore) for at in range(1, count + 1))


# Real processes


DRIVER = """
import json, logging, os, signal, sys, time
import torch
from click.testing import CliRunner
import ckptmgr.cli
from ckptmgr import CheckpointManager, load_file, warm_start
from ckptmgr.errors import NotFoundError

logging.disable(logging.WARNING)
root, loads, commit = sys.argv[1], int(sys.argv[2]), sys.argv[3]

def model(step):
    made = torch.nn.Linear(8, 8)
    torch.nn.init.constant_(made.weight, float(step)); torch.nn.init.constant_(made.bias, float(step))
    return made

def check(weights):
    values = {float(v) for t in weights for v in t.flatten()}
    assert len(values) == 1, values

def reader(kind):
    mgr = CheckpointManager(root, read_only=True, save={"on_signals": []})
    for number in range(loads):
        if kind == "load":
            check(mgr.load()["model"].values())
        elif kind == "resume":
            made = model(-1); mgr.resume(made); check(made.state_dict().values())
        elif kind == "warm_start":
            made = model(-1); warm_start(root, made); check(made.state_dict().values())
        elif kind == "load_file":
            while True:
                try:
                    name = open(f"{root}/latest").read().strip()
                    folder = f"{root}/{name}"
                    nested = [f for f in os.listdir(folder) if os.path.isdir(f"{folder}/{f}") and f != "ranks"]
                    check(dict(load_file("/".join([folder, *nested, "model.safetensors"]))).values())
                    break
                except (NotFoundError, FileNotFoundError):
                    continue
        elif number % 5 == 0:
            result = CliRunner().invoke(ckptmgr.cli.main, ["verify", root])
            assert result.exit_code == 0, result.output

def writer(channel):
    options = {"keep": {"last": 1}, "background": False, "commit": commit, "fsync": False, "save": {"on_signals": []}}
    with CheckpointManager(root, **options) as mgr:
        mgr.resume()
        step = 0
        while not os.path.exists(f"{root}.stop"):
            step += 1
            mgr.save({"model": model(step)}, step)
            if step == 1:
                os.write(channel, b"x")
        mgr.save({"model": model(step + 1)}, step + 1)
        mgr.save({"model": model(step + 2)}, step + 2)
        left = mgr.all_steps()
        assert left == [step + 2], left
    sys.stderr.write(f"saves {step}\\\\n")

def run(work, *args):
    pid = os.fork()
    if pid == 0:
        try:
            work(*args); os._exit(0)
        except BaseException:
            import traceback; traceback.print_exc(); sys.stderr.flush(); os._exit(9)
    return pid

def done(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

reading, writing = os.pipe()
pid = run(writer, writing)
os.close(writing)
assert os.read(reading, 1), "the writer ended before its first save"
readers = {kind: run(reader, kind) for kind in ("load", "resume", "warm_start", "load_file", "verify")}
codes = {kind: done(one) for kind, one in readers.items()}
open(f"{root}.stop", "w").close()
codes["writer"] = done(pid)
print(json.dumps(codes))
"""


@pytest.mark.parametrize("commit", ["rename", "manifest"])
def test_reader_processes_get_only_whole_checkpoints_beside_a_process_that_rotates(
    commit: str, tmp_path: Path, profile: Any, tally: Callable[[str, int], None]
) -> None:
    if commit == "manifest" and not profile.is_full:
        pytest.skip("one of the two in the quick profile")
    loads = 400 if profile.is_full else 8
    done = subprocess.run(
        [sys.executable, "-c", DRIVER.replace("\\\\n", "\\n"), str(tmp_path / "run"), str(loads), commit],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {*json.loads(done.stdout).values()} == {0}, done.stderr
    for folder in ("pins", "damaged", "trash", "drafts"):
        assert list(tmp_path.glob(f"run/.ckptmgr/{folder}/*")) == []
    tally("reads beside a rotating process", 4 * loads + -(-loads // 5))
