"""What does a training do to its root, step by step, and what does the next one find there?

Runs in processes of its own, which are killed. A script is a list of operations; before and after each the job
writes a line to a file outside of the root, past all that is watched.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import crash_bugs
import gcsfs  # noqa: F401 - once for all processes that are forked, as is s3fs
import s3fs  # noqa: F401
import torch

from ckptmgr import CheckpointManager
from ckptmgr.manifest import MANIFEST_NAME
from ckptmgr.repository import Repository
from ckptmgr.store import Store, open_store

torch.set_num_threads(1)
_LOG = logging.getLogger("ckptmgr")

Op = tuple[Any, ...]


class Seen(NamedTuple):
    """A checkpoint that loads: its step, and which of several saves of that step it is."""

    step: int
    version: int


@dataclass(frozen=True)
class Job:
    """`script` is done one after the other to the root that a process is given."""

    report: str
    script: tuple[Op, ...]
    settings: dict[str, Any]
    bug: str = ""
    is_shared: bool = False

    def __call__(self, root: Path | str) -> None:
        _LOG.setLevel(logging.CRITICAL)  # in a process of its own
        with crash_bugs.planted(self.bug), told(self.report) as tell:
            work(root, self, tell)


@contextmanager
def told(report: str) -> Iterator[Callable[[int, str], None]]:
    fd = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    try:
        yield lambda index, what: os.write(fd, f"{json.dumps([index, what])}\n".encode()) and None
    finally:
        os.close(fd)


def objects(step: int, version: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer after a step: the same bits for the same numbers, others for others."""
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(step + version / 8)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.125)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float(step + 1 + version))
    optimizer.step()
    return model, optimizer


def state(step: int, version: int, is_shared: bool) -> dict[str, Any]:
    model, optimizer = objects(step, version)
    more = {"frozen": FROZEN} if is_shared else {}
    return {"model": model, "optimizer": optimizer, "n": step, "version": version, **more}


FROZEN = torch.arange(1 << 18, dtype=torch.float32)  # 1 MiB: large enough to be shared
objects(0, 0)  # what torch imports only when an optimizer steps, once for all processes that are forked


def work(root: Path | str, job: Job, tell: Callable[[int, str], None]) -> None:
    manager: Any = None
    running: tuple[int, Any] | None = None

    def settle() -> None:
        nonlocal running
        if running is not None and running[1].done():
            tell(running[0], "done")
            running = None

    for index, (name, *args) in enumerate(job.script):
        settle()
        tell(index, "begin")
        if name == "open":
            manager = open_manager(root, job.settings, **(args[0] if args else {}))
        elif name == "save":
            step, version, how = args
            pending = manager.save(state(step, version, job.is_shared), step, **how)
            settle()
            if not pending.done():
                running = (index, pending)
                continue
        elif name == "plant":
            store = open_store(str(root), job.settings["storage"]["options"])
            for key, data in FOREIGN.items():
                store.put(key, data)
        elif name == "resume":
            model, optimizer = objects(0, 0)
            manager.resume(model, optimizer, **(args[0] if args else {}))
        else:
            getattr(manager, name)(*args)
        settle()
        tell(index, "done")


def open_manager(root: Path | str, settings: dict[str, Any], **more: Any) -> CheckpointManager:
    return CheckpointManager(root, **{"run": "crash", **settings, **more})


# What the next process finds


@dataclass
class Found:
    """What a process found and did after another was killed."""

    before: list[Seen] = field(default_factory=list)
    resumed: Seen | None = None
    skipped: int = 0
    after: list[Seen] = field(default_factory=list)
    saved: list[Seen] = field(default_factory=list)
    pins: list[int] = field(default_factory=list)
    litter: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Recovery:
    """The next start: look, resume, look, save, look, leave."""

    settings: dict[str, Any]
    options: dict[str, Any] | None = None
    is_shared: bool = False
    bug: str = ""

    def __call__(self, root: Path | str) -> Found:
        _LOG.setLevel(logging.CRITICAL)
        with crash_bugs.planted(self.bug):
            return self._recover(root)

    def _recover(self, root: Path | str) -> Found:
        found = Found()
        if isinstance(root, Path):
            age(root)
        with open_manager(root, self.settings, read_only=True) as reader:
            found.before = look(reader, found)
        with open_manager(root, self.settings) as manager:
            model, optimizer = objects(0, 0)
            start = manager.resume(model, optimizer)
            found.skipped = len(start.skipped)
            if start:
                found.resumed = Seen(start.values["n"], start.values["version"])
                if start.step != found.resumed.step:
                    found.wrong.append(f"resumed step {start.step} with the values of {found.resumed.step}")
                if not same(found.resumed, model.state_dict(), optimizer.state_dict()):
                    found.wrong.append(f"step {start.step} was not restored bit for bit")
            found.after = look(manager, found)
            manager.save(state(start.step + 1, 7, self.is_shared), start.step + 1).wait()
            found.saved = look(manager, found)
            found.pins = sorted(info.step for info in infos(manager) if info.pins)
            store = manager._run.repository.store
        found.litter = litter(store)
        there = files_of(store)
        found.litter += [f"foreign: {name}" for name, data in FOREIGN.items() if _get(store, name, there) != data]
        return found


def _get(store: Store, key: str, there: set[str]) -> bytes:
    return store.get(key) if key in there else b""


def infos(manager: CheckpointManager) -> list[Any]:
    return manager._run.repository.infos()


def look(manager: CheckpointManager, found: Found) -> list[Seen]:
    """Every checkpoint of the root, loaded and compared with what was saved."""
    seen = []
    for info in infos(manager):
        if info.damaged:
            continue
        try:
            loaded = manager.load(info.name)
        except Exception as exc:  # noqa: BLE001 - whatever it is, it is to be told
            found.wrong.append(f"step {info.step} is there and does not load: {exc!r}")
            continue
        one = Seen(loaded["n"], loaded["version"])
        seen.append(one)
        if one.step != info.step or not same(one, loaded["model"], loaded["optimizer"]):
            found.wrong.append(f"step {info.step} is not what was saved")
        if "frozen" in loaded and not torch.equal(loaded["frozen"], FROZEN):
            found.wrong.append(f"step {info.step} has another frozen tensor")
    return sorted(seen)


def same(seen: Seen, model: Any, optimizer: Any) -> bool:
    expected_model, expected_optimizer = objects(*seen)
    return _equal(expected_model.state_dict(), model) and _equal(expected_optimizer.state_dict(), optimizer)


def _equal(expected: Any, actual: Any) -> bool:
    if isinstance(expected, torch.Tensor):
        return isinstance(actual, torch.Tensor) and torch.equal(expected, actual)
    if isinstance(expected, dict):
        return expected.keys() == actual.keys() and all(_equal(expected[key], actual[key]) for key in expected)
    if isinstance(expected, list | tuple):
        return len(expected) == len(actual) and all(map(_equal, expected, actual))
    return bool(expected == actual)


def age(root: Path) -> None:
    """Two hours pass: a file that a dead process left unfinished may be one of a living one's before."""
    for path in [*root.rglob(".ckptmgr-*.tmp")]:
        then = path.lstat().st_mtime - 7200
        os.utime(path, (then, then))


FOREIGN = {
    "notes.txt": b"mine",
    "checkpoint-500/model.bin": b"another tool's",
    "step-00000002.bak/data.bin": b"somebody's copy",
    ".hidden/x": b"hidden",
    ".ckptmgr-mine/x": b"not ours, whatever it is called",
}


def plant_foreign(root: Path) -> None:
    for name, data in FOREIGN.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def litter(store: Store) -> list[str]:
    """What is in the root and is no checkpoint's, no record, and not foreign."""
    repository = Repository(store)
    expected = {"latest", *FOREIGN}
    for info in repository.infos():
        expected.add(f"{info.name}/{MANIFEST_NAME}")
        expected |= {f"{info.name}/{file.name}" for file in info.manifest.files} if info.manifest else set()
    for aside in repository.archived():
        expected.add(aside.key)
        expected |= {f"{aside.name}/{file.name}" for file in aside.manifest.files}
    records = (".ckptmgr/lock", ".ckptmgr/lease/", ".ckptmgr/damaged/", ".ckptmgr/pins/")
    there = files_of(store)
    left = [key for key in there - expected if not (key.startswith(records) and ".tmp" not in key)]
    left = [key for key in left if not re.fullmatch(r"\.ckptmgr/\w+/", key)]  # an empty folder for records
    return sorted(left) + [f"missing: {key}" for key in sorted(expected - there - {"latest"} - FOREIGN.keys())]


def files_of(store: Store) -> set[str]:
    """Every file, those too that the store itself does not show."""
    if store.path is None:
        return {entry.key for entry in store.list(recursive=True)}
    root = store.path
    paths = [path for path in root.rglob("*") if not path.is_dir() or not any(path.iterdir())]
    return {path.relative_to(root).as_posix() + "/" * path.is_dir() for path in paths}
