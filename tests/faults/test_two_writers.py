"""Two writers on one root: one commits, the other is told who holds it, and no checkpoint of either is harmed."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptmgr import CheckpointManager, Resumed
from ckptmgr import lock as lock_module
from ckptmgr.errors import AlreadyExistsError, CheckpointError, FencedError, NotFoundError, StoreError
from ckptmgr.fences import Fences
from ckptmgr.manifest import CheckpointInfo
from ckptmgr.repository import Repository
from ckptmgr.run import Run
from ckptmgr.store import Store
from ckptmgr.store.local import LocalStore
from ckptmgr.testing import MemoryStore, PausingStore, SystemCalls
from ckptmgr.trash import Trash

STEPS = (1, 2, 3)  # what is there when the first writer goes on
OLD, NEW = 1.0, 2.0  # who wrote a checkpoint
THINNED = 5  # one point of so many in the full profile


class Unconditional(MemoryStore):
    """An object store without conditional writes: what is to be created is looked for first, and then written."""

    between: Callable[[str, str], None] = staticmethod(lambda method, key: None)

    def put(self, key: str, data: Any, *, create: bool = False) -> None:
        if create and key in self.objects:
            raise AlreadyExistsError(f"{key} exists already")
        if create and "/lease/" not in key:  # of two claims of one number the later one holds: neither is frozen
            self.between("create", key)
        super().put(key, data)


def state(step: int, who: float) -> dict[str, Any]:
    return {"x": torch.full((300,), step * 10 + who), "number": step, "who": who}


def manager(store: Store, **options: Any) -> CheckpointManager:
    settings: dict[str, Any] = {"keep": {"last": 2}, "background": False, "save": {"on_signals": []}, **options}
    return CheckpointManager(store.url if store.path else "memory", store=store, **settings)


class Unlistable(PausingStore):
    """A store for one whose sweep fails."""

    def list(self, folder: str = "", *, recursive: bool = False) -> list[Any]:
        if folder == ".ckptmgr/trash":
            raise StoreError("the store does not answer")
        return super().list(folder, recursive=recursive)


@dataclass
class World:
    """One root, the writer that is frozen, and the one that comes after it."""

    store: Store
    options: dict[str, Any]
    act: str
    follow: str
    new: CheckpointManager | None = None
    saved: list[int] = field(default_factory=list)  # by the second one
    base: int = 0  # the step that it goes on from

    def prepare(self) -> CheckpointManager:
        """The first writer, right before what it does when it is frozen."""
        with manager(self.store, keep={"last": None}, **self.options) as first:
            first.resume()
            for step in STEPS:
                first.save(state(step, OLD), step)
        self.frozen = PausingStore(self.store)
        if isinstance(self.store, Unconditional):
            self.store.between = self.frozen.pause
        zombie = manager(self.frozen, **self.options)
        if self.act == "start":  # what a dead one left is swept when it begins
            dead = Repository(self.store, commit=self.options.get("commit", "auto")).begin(9, None, "run")
            with dead.create("half") as file:
                file.write(b"half")
            return zombie
        zombie.resume(step=None)
        return zombie

    def go_on(self, zombie: CheckpointManager) -> None:
        """What the first one does."""
        match self.act:
            case "save":
                zombie.save(state(4, OLD), 4)
            case "overwrite":
                zombie.save(state(3, OLD), 3, overwrite=True)
            case "delete":
                zombie.delete(2)
            case "rewind":
                zombie.rewind(2)
            case "start":
                zombie.resume()
                zombie.save(state(4, OLD), 4)

    def take_over(self) -> None:
        """What the second one does while the first stands still."""
        if self.follow.startswith("after"):  # and after that one nobody has to be taken over from any more
            dies = "died" in self.follow
            store = Unlistable(self.store) if dies else self.store
            with (
                manager(store, takeover=True, **self.options) as other,
                pytest.raises(StoreError) if dies else nullcontext(),
            ):
                other.resume()
        self.new = manager(self.store, takeover=not self.follow.startswith("after"), **self.options)
        start = self.resume_from_the_oldest() if "the oldest" in self.follow else self.new.resume()
        self.base = start.step
        if "only" in self.follow:
            return
        for step in (start.step + 1, start.step + 2):
            self.new.save(state(step, NEW), step)
            self.saved.append(step)

    def resume_from_the_oldest(self) -> Resumed:
        assert self.new is not None
        try:
            return self.new.resume(step=min(self.new.all_steps()))
        except NotFoundError:  # it was on its way out
            return self.new.resume(step=min(self.new.all_steps()))

    def problems(self, outcome: BaseException | None) -> list[str]:
        """What does not hold when both have done their work."""
        found = []
        if outcome is not None and not (isinstance(outcome, FencedError) and f"process {os.getpid()}" in str(outcome)):
            found.append(f"the frozen one got {outcome!r}")
        assert self.new is not None
        if not self.saved and self.base not in self.new.all_steps():
            found.append(f"step {self.base}, from which the second writer goes on, is gone")
        if lost := {*self.saved[-2:]} - {*self.new.all_steps()}:
            found.append(f"steps {lost}, which the second writer saved, are gone")
        last = self.saved[-1] if self.saved else self.base
        try:
            self.new.save(state(last + 1, NEW), last + 1)
            self.saved.append(last + 1)
        except CheckpointError as exc:
            return [*found, f"the rightful writer could not save: {exc!r}"]
        repository = self.new._run.repository
        found += [
            f"{info.name}: {info.damaged} {repository.verify(info)}"
            for info in repository.infos()
            if info.damaged or repository.verify(info)
        ]
        missing = {*self.saved[-2:]} - {*self.new.all_steps()}
        found += [f"steps {missing} of the second writer are gone"] if missing else []
        found += [] if repository.pointer.read() == self.new.info("latest").name else ["the pointer names another one"]
        self.new.close()
        with manager(self.store, **self.options) as third:
            start = third.resume()
            if (start.step, start.values["who"]) != (self.saved[-1], NEW):
                found.append(f"resumed from {start.step} of {start.values['who']}, not {self.saved[-1]}")
            elif not torch.equal(start.values["x"], state(start.step, NEW)["x"]):
                found.append("a mixture")
        found += [f"litter: {key}" for key in litter(self.store)]
        return found


def litter(store: Store) -> list[str]:
    """What belongs to no checkpoint, record or lock."""
    repository = Repository(store)
    infos = repository.infos()
    mine = {f"{info.name}/{file.name}" for info in infos if info.manifest for file in info.manifest.files}
    mine |= {f"{info.name}/manifest.json" for info in infos}
    mine |= {f"{one.name}/{file.name}" for one in repository.archived() for file in one.manifest.files}
    mine |= {one.key for one in repository.archived()} | {"latest", ".ckptmgr/lock"}
    keys = [entry.key for entry in store.list(recursive=True)]
    notes = (".fenced", ".closed")  # they outlive those who put them
    return [
        key for key in keys if key not in mine and not key.startswith(".ckptmgr/lease/") and not key.endswith(notes)
    ]


def wake_up(make: Callable[[], Store], options: dict[str, Any], act: str, follow: str, at: int | None) -> list[str]:
    """Freeze a writer before its `at`-th call, let another one take over, let it go on; what does not hold then."""
    world = World(make(), options, act, follow)
    zombie = world.prepare()
    world.frozen.at, world.frozen.meanwhile = at and world.frozen.count + at, world.take_over
    outcome: BaseException | None = None
    try:
        world.go_on(zombie)
    except (CheckpointError, OSError) as exc:
        outcome = exc
    assert world.new is not None, "it was never frozen"
    for again in (lambda: zombie.save(state(7, OLD), 7), lambda: zombie.delete(1), zombie.close):
        try:
            again()
        except CheckpointError:
            continue
    return [f"{act}, {follow}, call {at}: {problem}" for problem in world.problems(outcome)]


def calls_of(make: Callable[[], Store], options: dict[str, Any], act: str) -> int:
    world = World(make(), options, act, "saves")
    zombie = world.prepare()
    before = world.frozen.count
    world.go_on(zombie)
    count = world.frozen.count - before
    zombie.close()
    return count


KINDS = ("rename", "manifest", "no flock", "object store", "no conditional create", "memory with rename")
ACTS = ("save", "overwrite", "delete", "rewind", "start")
FOLLOWS = (
    "saves",
    "only resumes",
    "saves from the oldest",
    "only resumes from the oldest",
    "after another one, saves from the oldest",
    "after one that died in its sweep, saves from the oldest",
)


@pytest.fixture(params=KINDS)
def root(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Callable[[], Store], dict[str, Any]]:
    """Makes an empty root of a kind, with the settings that go with it."""
    folders = iter(range(100_000))

    def local() -> Store:
        return LocalStore(tmp_path / str(next(folders)), fsync=False)

    if request.param == "no flock":

        def unsupported(*args: object) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(lock_module.fcntl, "flock", unsupported)
    match request.param:
        case "rename" | "no flock":
            return local, {}
        case "manifest":
            return local, {"commit": "manifest"}
        case "object store":
            return lambda: MemoryStore(can_rename=False), {}
        case "no conditional create":
            return lambda: Unconditional(can_rename=False), {}
    return MemoryStore, {}


def test_a_writer_that_wakes_up_after_a_take_over_harms_nothing_wherever_it_was_frozen(
    root: Any, profile: Any, tally: Callable[[str, int], None]
) -> None:
    """In the full profile one call of five, from a random one on: several runs try them all."""
    make, options = root
    points = [
        (act, follow, at)
        for act in ACTS
        for count in (calls_of(make, options, act),)
        for follow in FOLLOWS
        for at in range(1, count + 1)
    ]
    chosen = profile.sample(points[random.randrange(THINNED) :: THINNED] if profile.is_full else points, quick=2)
    problems = [problem for act, follow, at in chosen for problem in wake_up(make, options, act, follow, at)]
    assert not problems, "\n".join(problems)
    tally("zombie wake-ups", len(chosen))


@pytest.mark.parametrize("act", ["save", "rewind"])
def test_nor_does_it_when_it_was_frozen_between_two_calls_of_the_system(
    act: str, tmp_path: Path, profile: Any, tally: Callable[[str, int], None]
) -> None:
    """One call of two in the full profile, from a random one on."""
    folders = iter(range(100_000))

    def make() -> Store:
        return LocalStore(tmp_path / str(next(folders)))

    def attempt(at: int | None) -> tuple[int, list[str]]:
        world = World(make(), {}, act, "saves")
        zombie = world.prepare()
        outcome: list[CheckpointError] = []

        def before(call: Any) -> None:
            if call.number == at:
                world.take_over()

        with SystemCalls(world.store.path or "", before) as calls:
            try:
                world.go_on(zombie)
            except CheckpointError as exc:
                outcome.append(exc)
        count = len(calls.log)
        if at is None:
            zombie.close()
            return count, []
        found = world.problems(outcome[0] if outcome else None)
        zombie.close()
        return count, [f"{act}, system call {at}: {problem}" for problem in found]

    count, _ = attempt(None)
    chosen = profile.sample(range(1 + profile.is_full * random.randrange(2), count + 1, 2), quick=2)
    problems = [problem for at in chosen for problem in attempt(at)[1]]
    assert not problems, "\n".join(problems)
    tally("zombie wake-ups", len(chosen))


# What comes late: it was on its way when the other one came


class Late(MemoryStore):
    """A store to which a writer is about to put one thing when another one takes its place; with `dies` it does
    nothing more after that."""

    def __init__(self, *, can_rename: bool = False, dies: bool = False) -> None:
        super().__init__(can_rename=can_rename)
        self.dies, self.is_dead = dies, False
        self.before: tuple[str, Callable[[], None]] | None = None

    def late(self, what: str, meanwhile: Callable[[], None]) -> None:
        self.before = (what, meanwhile)

    def put(self, key: str, data: Any, *, create: bool = False) -> None:
        if self.before and self.before[0] in key and (key[0] != "." or "/drafts/" not in key):
            _, meanwhile = self.before
            self.before = None
            meanwhile()
            super().put(key, data, create=create)
            if self.dies:
                raise KeyboardInterrupt
            return
        super().put(key, data, create=create)


def kept(store: Store) -> CheckpointManager:
    mgr = manager(store, takeover=True, keep={"last": 50})
    mgr.resume()
    return mgr


@pytest.mark.parametrize("dies", [False, True])
@pytest.mark.parametrize("kind", ["trash", "archive"])
def test_a_record_that_comes_after_the_take_over_takes_nothing_of_those_who_follow(
    kind: str, dies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, follower = Late(dies=dies), list[CheckpointManager]()
    first = manager(store, keep={"last": 2 if kind == "trash" else 9})
    first.resume()
    for step in (1, 2):
        first.save(state(step, OLD), step)
    if kind == "archive":
        first.save(state(3, OLD), 3)
    store.late(f"/{kind}/", lambda: follower.append(kept(store)))
    with monkeypatch.context() as patch:
        if dies:  # and can't take the record back
            patch.setattr(Trash, "_take_back", lambda self, key: None)
        with pytest.raises(KeyboardInterrupt if dies else FencedError):
            first.save(state(3, OLD), 3) if kind == "trash" else first.rewind(1)
    second = follower[0]
    assert len(store.list(f".ckptmgr/{kind}")) == int(dies)
    assert second.all_steps() == [1, 2, 3]
    second.pin(2, "mine")  # it is not about to go
    third = kept(store)
    assert (third.all_steps(), third.info(2).tags) == ([1, 2, 3], ("mine",))
    third.save(state(4, NEW), 4)
    assert (litter(store), third.all_steps()) == (pin_keys(store), [1, 2, 3, 4])


def pin_keys(store: Store) -> list[str]:
    return [entry.key for entry in store.list(".ckptmgr/pins")]


@pytest.mark.parametrize("attempt", ["", ".by-1"])
def test_what_the_one_before_may_still_do_is_done_and_what_an_earlier_one_recorded_is_not(attempt: str) -> None:
    """A record of an earlier version does not say whose it is."""
    store = MemoryStore(can_rename=False)
    first = manager(store, keep={"last": None})
    first.resume()
    for step in (1, 2, 3):
        first.save(state(step, OLD), step)
    going, leaving = (info for info in first._run.infos() if info.step != 3)

    def record(kind: str, info: CheckpointInfo) -> None:
        assert info.manifest is not None
        store.put(f".ckptmgr/{kind}/{info.name}.{info.manifest.nonce}{attempt}.json", info.manifest.to_json())

    record("trash", going)
    record("archive", leaving)
    second = kept(store)
    assert second.all_steps() == [3]
    assert [aside.name for aside in second._run.repository.archived()] == [leaving.name]
    assert {going.name, leaving.name} <= second._run.repository._fences.names
    second.save(state(4, NEW), 4)
    record("trash", second.info(3))
    third = kept(store)
    assert third.all_steps() == ([3, 4] if attempt else [4])
    assert not store.list(".ckptmgr/trash")


def test_a_record_is_taken_back_when_the_look_that_follows_it_fails() -> None:
    """Else nobody could pin what the writer did not delete."""

    class Blinking(MemoryStore):
        fails = False

        def stat(self, key: str) -> Any:
            if self.fails and "/trash/" in key:
                self.fails = False
                raise StoreError("try again")
            return super().stat(key)

    store = Blinking(can_rename=False)
    with manager(store, keep={"last": 9}) as mgr:
        mgr.resume()
        for step in (1, 2):
            mgr.save(state(step, OLD), step)
        store.fails = True
        with pytest.raises(StoreError, match="try again"):
            mgr.delete(1)
        manager(store, read_only=True).pin(1)
        assert [info.step for info in mgr._run.infos() if info.pins] == [1]


def test_a_commit_that_comes_after_the_take_over_is_an_error_to_its_writer_and_seen_by_nobody() -> None:
    store, follower = Late(), list[CheckpointManager]()
    first = manager(store)
    first.resume()
    first.save(state(1, OLD), 1)
    store.late("step-00000002/manifest.json", lambda: follower.append(kept(store)))
    with pytest.raises(FencedError):
        first.save(state(2, OLD), 2)
    second = follower[0]
    assert second.all_steps() == [1]
    second.save(state(3, NEW), 3)
    assert second.all_steps() == [1, 3]


@pytest.mark.parametrize("when", ["before the sweep", "while it is swept"])
def test_a_commit_that_came_before_the_sweep_stays_though_its_draft_is_still_recorded(when: str) -> None:
    """The writer was frozen right after it, or while the other one was about to close the draft."""

    class Noting(MemoryStore):
        late: Callable[[], None] | None = None

        def put(self, key: str, data: Any, *, create: bool = False) -> None:
            if self.late is not None and key.endswith(".fenced"):
                self.late, late = None, self.late
                late()
            super().put(key, data, create=create)

    store = Noting(can_rename=False)
    first = manager(store)
    first.resume()
    for step in (1, 2):
        first.save(state(step, OLD), step)
    info = first.info(2)
    assert info.manifest is not None
    store.put(f".ckptmgr/drafts/{info.name}.{info.manifest.nonce}", b"")
    if when == "while it is swept":
        key = f"{info.name}/manifest.json"
        body = store.get(key)
        store.delete([key])
        store.late = lambda: MemoryStore.put(store, key, body)
    second = kept(store)
    assert second.all_steps() == [1, 2]
    second.save(state(3, NEW), 3)
    assert second.all_steps() == [1, 2, 3]
    second.close()
    assert litter(store) == []


# Planted bugs: the same check finds each


def found(make: Callable[[], Store], act: str, follow: str, options: dict[str, Any] | None = None) -> list[str]:
    problems = []
    for at in range(1, calls_of(make, options or {}, act) + 1):
        problems += wake_up(make, options or {}, act, follow, at)
        if problems:
            break
    return problems


def test_the_check_finds_a_commit_without_a_look_at_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """It commits late, and its rotation takes the step from which the other one goes on."""
    monkeypatch.setattr(Run, "check", lambda self: None)
    problems = found(lambda: MemoryStore(can_rename=False), "save", "only resumes")
    assert "step 3, from which the second writer goes on, is gone" in problems[0]


@pytest.mark.parametrize(
    ("method", "follow"),
    [
        ("recall", "after another one, saves from the oldest"),
        ("announce", "after one that died in its sweep, saves from the oldest"),
    ],
)
def test_the_check_finds_that_the_next_writer_but_one_knows_of_no_zombie(
    method: str, follow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fences, method, lambda self, what: None)
    assert found(lambda: MemoryStore(can_rename=False), "rewind", follow) != []


def test_the_check_finds_a_zombies_rotation_without_a_look_at_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "_may_go", lambda self, info: True)
    monkeypatch.setattr(Fences, "names", property(lambda self: set(), lambda self, value: None), raising=False)
    monkeypatch.setattr(Repository, "_can_spare", lambda self, aside: False)
    problems = found(lambda: MemoryStore(can_rename=False), "save", "only resumes from the oldest")
    assert "step 2, from which the second writer goes on, is gone" in problems[0]


def test_the_check_finds_an_order_that_ignores_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    def order(self: CheckpointInfo) -> tuple[int, int, float]:
        return (0, self.step, self.manifest.time.timestamp() if self.manifest else 0.0)

    monkeypatch.setattr(Fences, "expel", lambda self: 0)
    monkeypatch.setattr(Run, "check", lambda self: None)
    monkeypatch.setattr(CheckpointInfo, "order", property(order))
    problems = found(lambda: MemoryStore(can_rename=False), "save", "saves from the oldest")
    assert any("resumed from 7 of 1.0, not 5" in problem for problem in problems)


# Real processes


DRIVER = """
import json, os, signal, sys
import torch
from ckptmgr import CheckpointManager
from ckptmgr.errors import FencedError
from ckptmgr.store import open_store
from ckptmgr.testing import PausingStore

kind, url, options, points = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
if kind == "lease":
    import errno
    from ckptmgr import lock
    def unsupported(*args):
        raise OSError(errno.ENOLCK, "No locks available")
    lock.fcntl.flock = unsupported

def manager(root, store=None, **more):
    store = store or open_store(root, options)
    return CheckpointManager(root, store=store, keep={"last": 2}, background=False, save={"on_signals": []}, **more)

def state(step, who):
    return {"x": torch.full((64,), step * 10.0 + who), "who": who}

def first(root):
    with manager(root) as mgr:
        mgr.resume()
        for step in (1, 2):
            mgr.save(state(step, 1), step)

def zombie(root, at):
    store = PausingStore(open_store(root, options), None, lambda: os.kill(os.getpid(), signal.SIGSTOP))
    mgr = manager(root, store)
    mgr.resume()
    store.at = store.count + at
    try:
        mgr.save(state(3, 1), 3)
        mgr.save(state(9, 1), 9)
    except FencedError as exc:
        mgr.close()
        return 3 if "is being written by process" in str(exc) else 4
    mgr.close()
    return 0

def second(root):
    mgr = manager(root, takeover=True)
    start = mgr.resume()
    mgr.save(state(start.step + 1, 2), start.step + 1)
    os.kill(os.getpid(), signal.SIGKILL)

def third(root):
    with manager(root) as mgr:
        start = mgr.resume()
        assert start.values["who"] == 2 and torch.equal(start.values["x"], state(start.step, 2)["x"]), start
        for info in mgr._run.repository.infos():
            assert not mgr._run.repository.verify(info) and not info.damaged, info
        mgr.save(state(start.step + 1, 3), start.step + 1)

def run(work, *args):
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(work(*args) or 0)
        except BaseException:
            import traceback
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(9)
    return pid

def done(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

problems = []
for at in points:
    root = f"{url}/{at}"
    assert done(run(first, root)) == 0
    frozen = run(zombie, root, at)
    _, status = os.waitpid(frozen, os.WUNTRACED)
    if not os.WIFSTOPPED(status):
        problems.append(f"{at}: never frozen, {status}")
        continue
    if (code := done(run(second, root))) != -signal.SIGKILL:
        problems.append(f"{at}: the second writer ended with {code}")
    os.kill(frozen, signal.SIGCONT)
    if (code := done(frozen)) != 3:
        problems.append(f"{at}: the frozen one ended with {code}")
    if (code := done(run(third, root))) != 0:
        problems.append(f"{at}: the third ended with {code}")
print(json.dumps(problems))
"""


def drive(kind: str, url: str, options: dict[str, Any], points: list[int]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, kind, url, json.dumps(options), json.dumps(points)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    problems: list[str] = json.loads(done.stdout)
    return [f"{problem}\n{done.stderr[-2000:]}" for problem in problems]


@pytest.mark.parametrize("kind", ["flock", "lease"])
def test_a_process_stopped_by_a_signal_is_told_who_took_over_when_it_goes_on(
    kind: str, tmp_path: Path, profile: Any, tally: Callable[[str, int], None]
) -> None:
    if kind == "lease" and not profile.is_full:
        pytest.skip("flock stands for both in the quick profile")
    points = list(range(1, 34, 5)) if profile.is_full else [9]
    assert drive(kind, str(tmp_path), {}, points) == []
    tally("zombie wake-ups", len(points))


@pytest.mark.faults
def test_so_is_one_that_saves_to_an_object_store(s3_moto: Any, tally: Callable[[str, int], None]) -> None:
    points = list(range(1, 33, 10))
    assert drive("s3", s3_moto.url, s3_moto.options, points) == []
    tally("zombie wake-ups", len(points))


def test_of_writers_started_together_one_holds_the_root(
    root: Any, profile: Any, tally: Callable[[str, int], None]
) -> None:
    make, options = root
    rounds = 30 if profile.is_full else 1
    for _ in range(rounds):
        store = make()
        won: list[CheckpointManager] = []
        told: list[FencedError] = []
        start = threading.Barrier(3)

        def race(who: int, store: Store = store, won: Any = won, told: Any = told, start: Any = start) -> None:
            mgr = manager(store, **options)
            start.wait()
            try:
                mgr.resume()
                mgr.save(state(1, who), 1)
                won.append(mgr)
            except FencedError as exc:
                told.append(exc)

        threads = [threading.Thread(target=race, args=(who,)) for who in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(told)) == (1, 2)
        assert [info.step for info in Repository(store).infos()] == [1]
        won[0].save(state(2, NEW), 2)
        won[0].close()
        assert litter(store) == []
    tally("races of two writers", rounds)
