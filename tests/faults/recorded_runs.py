"""What may a root hold when the power goes in the middle of a run? Recorded runs, each with what was promised when."""

from __future__ import annotations

import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ckptmgr import CheckpointManager
from ckptmgr.lock import last_writer
from ckptmgr.store.local import LocalStore
from ckptmgr.testing import Call, DiskState, PowerLoss, SystemCalls

ROOT = "runs/digits"
FOREIGN = {"notes.txt": b"mine", "data/manifest.json": b"{}", f"{ROOT}/README": b"also mine"}
AFTER = 1000  # the step that is saved after the power is back

Steps = Mapping[int, int]  # the checkpoints of a run: which version of each step


def value(step: int, version: int) -> torch.Tensor:
    return torch.arange(300.0) * step + version  # of three sectors


def state_of(step: int, version: int = 1) -> dict[str, Any]:
    return {"x": value(step, version), "n": [step, version]}


@dataclass(frozen=True)
class Act:
    """Something that a program did to the root: during the calls from `begin` to `end`."""

    begin: int
    end: int
    before: Steps
    after: Steps
    pinned: frozenset[int] = frozenset()
    aim: Steps | None = None  # what was to be there, of one that was cut short by a kill
    may_return: Steps = field(default_factory=dict)  # archived by one that was killed: of an older attempt

    def problem(self, there: list[tuple[int, int]], calls: int) -> str | None:
        """What is wrong with the checkpoints that are there when so many calls were made."""
        first, last, found = set(self.before.items()), set(self.after.items()), set(there)
        if len(there) != len(found):
            return f"twice the same in {there}"
        found -= set(self.may_return.items()) - first - last
        if calls >= self.end:
            return None if found == last else f"has {sorted(found)}, promised were {sorted(last)}"
        aims = [last] if self.aim is None else [last, set(self.aim.items())]
        if found == first or any(aim <= found <= first | aim for aim in aims):
            return None
        return f"has {sorted(found)}, on the way from {sorted(first)} to {sorted(last)}"


class RecordedRun:
    """What a program does below a folder, call by call."""

    def __init__(self, folder: Path, *, there: Steps | None = None, **settings: Any) -> None:
        self.folder, self.settings = folder, settings
        self.before = DiskState.of(folder)
        self.acts: list[Act] = []
        self.there: Steps = there or {}
        self.pinned: frozenset[int] = frozenset()
        self.aim: Steps = {}
        self.calls = SystemCalls(folder, keep_data=True)

    def manager(self, root: Path | None = None, **more: Any) -> CheckpointManager:
        settings = {"background": False, "run": "power", "keep": {"last": 2}, "save": {"on_signals": []}}
        return CheckpointManager(str((root or self.folder) / ROOT), **{**settings, **self.settings, **more})

    @contextmanager
    def act(self, after: Steps | None = None, pinned: frozenset[int] | None = None) -> Iterator[None]:
        """A block at whose end these checkpoints are promised."""
        begin, before = len(self.calls.log), self.there
        self.aim = before if after is None else after
        yield
        self.there = before if after is None else after
        self.pinned = self.pinned if pinned is None else pinned
        self.acts.append(Act(begin, len(self.calls.log), before, self.there, self.pinned))

    def save(self, mgr: CheckpointManager, step: int, *, leaves: str, version: int = 1, **how: Any) -> None:
        """Save a step; `leaves` names the steps there are then."""
        steps = {int(each): self.there.get(int(each), version) for each in leaves.split()}
        with self.act({**steps, step: version}):
            mgr.save({**state_of(step, version), **how.pop("more", {})}, step, **how).wait()

    def states(self, *, most: int | None = None, subsets: int = 4, seed: int = 0) -> Iterator[tuple[Act, DiskState]]:
        loss = PowerLoss(self.calls.log, self.before)
        assert loss.after_all().has_same_content(DiskState.of(self.folder))  # the model saw every call
        promises = [place for act in self.acts for place in (act.begin, act.end)]
        for state in loss.states(promises=promises, subsets=subsets, seed=seed, most=most):
            yield next(act for act in reversed(self.acts) if act.begin <= state.calls), state

    def losses(self, scratch: Path, *, in_any_order: bool = False, **how: Any) -> Iterator[str | None]:
        """For each state what is wrong with it, or None."""
        states: Iterable[tuple[Act, DiskState]] = self.states(**how)
        if in_any_order:
            random.Random(0).shuffle(states := list(states))
        for act, state in states:
            state.write_to(scratch)
            try:
                problem = self._problem(act, state, scratch)
            except Exception as exc:  # noqa: BLE001 - whatever it is, it is not to happen
                problem = f"raised {exc!r}"
            finally:
                shutil.rmtree(scratch)
            yield problem and f"{problem}; {state}"

    def _problem(self, act: Act, state: DiskState, scratch: Path) -> str | None:
        """What does not hold when the run goes on from this."""
        store = LocalStore(scratch / ROOT, fsync=False)
        with self.manager(scratch, read_only=True, store=store) as mgr:
            infos = mgr._run.infos()
            loaded = [mgr.load(info.name) for info in infos]
            there = [(info.step, one["n"][1]) for info, one in zip(infos, loaded, strict=True)]
            if not all(torch.equal(one["x"], value(*each)) for each, one in zip(there, loaded, strict=True)):
                return "loads other bits"
            newest = there[0] if there else (0, 0)
            if mgr.latest_step() != (newest[0] or None):
                return f"latest_step() is {mgr.latest_step()}, not {newest[0]}"
        if problem := act.problem(there, state.calls):
            return problem
        attempts = [info.manifest.attempt for info in infos if info.manifest]
        if 0 < last_writer(store) < max(attempts, default=0):
            return f"the lock's attempt is {last_writer(store)}, one of {attempts} outlived it"
        if state.calls >= act.end and (lost := act.pinned - {info.step for info in infos if info.pins}):
            return f"not pinned any more: {lost}"
        with self.manager(scratch, store=store, keep={"last": 99}) as mgr:
            found = mgr.resume()
            if (found.step, found.skipped) != (newest[0], ()):
                return f"resumed from {found.step}, not {newest}, skipping {found.skipped}"
            if found and not (torch.equal(found.values["x"], value(*newest)) and found.values["n"] == list(newest)):
                return "resumed with other bits"
            mgr.save(state_of(AFTER), AFTER).wait()
            if set(mgr.all_steps()) != {AFTER, *(step for step, _ in there)}:
                return f"the next save left {mgr.all_steps()} of {there}"
            if mgr.latest_step() != AFTER or not torch.equal(mgr.load(AFTER)["x"], value(AFTER, 1)):
                return "the next save is not there"
            asides = len(mgr._run.repository.archived())
        if litter := _litter(store, asides):
            return f"left: {litter}"
        gone = [name for name, data in FOREIGN.items() if state.files.get(name) and _read(scratch / name) != data]
        return f"foreign files gone: {gone}" if gone else None


def _litter(store: LocalStore, archived: int) -> list[str]:
    """What of dead processes is there still: drafts, tombstones, folders that are no checkpoints."""
    left = [entry.key for kind in ("drafts", "trash") for entry in store.list(f".ckptmgr/{kind}")]
    folders = [entry.key for entry in store.list() if entry.key.startswith("step-")]
    bare = [folder for folder in folders if store.list(folder) and store.stat(f"{folder}/manifest.json") is None]
    return left + (bare if len(bare) > archived else [])


def _read(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


# The runs


def first_saves(run: RecordedRun) -> None:
    """Into a root that is not there, until the first ones go."""
    with run.manager() as mgr:
        with run.act():
            mgr.resume()
        run.save(mgr, 1, leaves="1")
        run.save(mgr, 2, leaves="1 2")
        run.save(mgr, 3, leaves="2 3")
        run.save(mgr, 4, leaves="3 4")


def only_the_last(run: RecordedRun) -> None:
    """Each save takes the place of the one before."""
    with run.manager() as mgr:
        run.save(mgr, 1, leaves="1")
        run.save(mgr, 2, leaves="2")
        run.save(mgr, 3, leaves="3")


def shared_files(run: RecordedRun) -> None:
    """A frozen tensor is written once; each checkpoint has a name of its own for it."""
    frozen = {"frozen": torch.arange(float(1 << 18))}
    with run.manager() as mgr:
        run.save(mgr, 1, leaves="1", more=frozen)
        run.save(mgr, 2, leaves="1 2", more=frozen)
        run.save(mgr, 3, leaves="2 3", more=frozen)


def replaced_steps(run: RecordedRun) -> None:
    """A step is saved again."""
    with run.manager() as mgr:
        run.save(mgr, 1, leaves="1")
        run.save(mgr, 2, leaves="1 2")
        run.save(mgr, 2, leaves="1 2", version=2, overwrite=True)
        run.save(mgr, 2, leaves="1 2", version=3, overwrite=True)


def pins_and_deletions(run: RecordedRun) -> None:
    with run.manager() as mgr:
        run.save(mgr, 1, leaves="1")
        with run.act(pinned=frozenset({1})):
            mgr.pin(1, "paper")
        run.save(mgr, 2, leaves="1 2", tags=["two"])
        run.save(mgr, 3, leaves="1 2 3")
        run.save(mgr, 4, leaves="1 3 4")
        with run.act({1: 1, 4: 1}):
            mgr.delete(3)
        with run.act(pinned=frozenset()):
            mgr.unpin(1)
        with run.act({4: 1}):
            mgr.delete(1)


def branches(run: RecordedRun) -> None:
    """The run goes back, and on another way."""
    with run.manager() as mgr:
        for step in (1, 2, 3, 4):
            run.save(mgr, step, leaves=" ".join(map(str, range(1, step + 1))))
        with run.act({1: 1, 2: 1}):
            mgr.rewind(2)
        run.save(mgr, 3, leaves="1 2 3", version=2)


def restarts(run: RecordedRun) -> None:
    """One process after the other, some of them killed, and a new run in the end."""
    for step in (1, 2, 3):
        mgr = run.manager()
        with run.act():
            mgr.resume()
        run.save(mgr, step, leaves=f"{step - 1} {step}" if step > 1 else "1")
        if step == 2:
            mgr._run._lock.forget()  # type: ignore[union-attr] # as the kernel does for one that was killed
        else:
            mgr.close()
    held = run.manager()
    with run.act():
        held.resume()
    with run.manager(takeover=True) as mgr:
        with run.act():
            mgr.resume()
        run.save(mgr, 4, leaves="3 4")
    held._run._lock.forget()  # type: ignore[union-attr]
    with run.manager(fresh=True) as mgr:
        with run.act({}):
            mgr.resume()
        run.save(mgr, 1, leaves="1", version=9)


KEEP = {branches: {"keep": {"last": 9}}, only_the_last: {"keep": {"last": 1}}}
RUNS: dict[str, Callable[[RecordedRun], None]] = {
    run.__name__: run
    for run in (first_saves, only_the_last, shared_files, replaced_steps, pins_and_deletions, branches, restarts)
}


def new_run(folder: Path, what: Callable[[RecordedRun], None], **settings: Any) -> RecordedRun:
    """A run in a new folder in which other people's files are."""
    for name, data in FOREIGN.items():
        if what is not first_saves or not name.startswith(ROOT):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    return RecordedRun(folder, **{**KEEP.get(what, {}), **settings})


def record(folder: Path, what: Callable[[RecordedRun], None], **settings: Any) -> RecordedRun:
    """Let a run happen."""
    run = new_run(folder, what, **settings)
    with run.calls:
        what(run)
    return run


def record_killed(folder: Path, what: Callable[[RecordedRun], None], call: int, **settings: Any) -> RecordedRun:
    """Let a run be killed after so many calls, and another process go on."""
    run = new_run(folder, what, **settings)
    told = folder.with_name(f"{folder.name}.told")
    child = os.fork()
    if not child:
        try:
            _run_until(run, what, call, told)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    log, run.acts, before, aim = pickle.loads(told.read_bytes())
    begin = run.acts[-1].end if run.acts else 0
    gone = dict(before.items() - aim.items()) if what is branches else {}
    with run.calls:
        run.calls.log[:] = log
        mgr = run.manager()
        mgr.resume()
        run.there = {info.step: mgr.load(info.name)["n"][1] for info in reversed(mgr._run.infos())}
        run.acts.append(Act(begin, len(run.calls.log), before, run.there, aim=aim, may_return=gone))
        leaves = sorted({*run.there, AFTER - 1})[-run.settings.get("keep", {"last": 2})["last"] :]
        run.save(mgr, AFTER - 1, leaves=" ".join(map(str, leaves)))
        run.acts[-1] = replace(run.acts[-1], may_return=gone)
        mgr.close()
    return run


def decisive(run: RecordedRun) -> list[int]:
    """How many calls are made right after each that makes a checkpoint, or makes one none."""
    last = ((call.target or call.path) if call.name in ("rename", "link", "unlink") else "" for call in run.calls.log)
    return [
        place
        for place, path in enumerate(last, 1)
        if path.startswith(f"{ROOT}/step-") and (path.count("/") == 2 or path.endswith("/manifest.json"))
    ]


def _run_until(run: RecordedRun, what: Callable[[RecordedRun], None], call: int, told: Path) -> None:
    """In a process of its own, which ends right before a call, and has told then what it did."""

    def before(_: Call) -> None:
        if len(run.calls.log) == call:
            told.write_bytes(pickle.dumps((run.calls.log, run.acts, run.there, run.aim)))
            os._exit(0)

    run.calls = SystemCalls(run.folder, before, keep_data=True)
    with run.calls:
        what(run)
