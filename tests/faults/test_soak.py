"""Thousands of saves, rotations, resumes and faults: nothing grows, and the newest committed one is always there."""

from __future__ import annotations

import errno
import gc
import logging
import multiprocessing
import os
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptmgr import CheckpointManager
from ckptmgr.errors import CheckpointError, FencedError, NotFoundError
from ckptmgr.lock import FileLock
from ckptmgr.store import Store
from ckptmgr.store.local import LocalStore
from ckptmgr.store.removal import wait_for_space
from ckptmgr.testing import Crash, CrashingStore, SystemCalls

SIZE = 4096  # bytes of one tensor
CALLS_OF_A_SAVE = 12  # that change the disk, at the least
ALLOWED_KIB = 24 << 10  # that the allocator may take and keep


class Resources:
    """What a process and a folder hold now."""

    def __init__(self, root: Path) -> None:
        wait_for_space()
        gc.collect()
        files = [path for path in root.rglob("*") if path.is_file()]
        self.disk = sum(path.stat().st_size for path in files)
        self.files = len(files)
        self.threads = threading.active_count()
        self.descriptors = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0  # noqa: PTH208
        self.finalizers = len(weakref.finalize._registry)  # type: ignore[attr-defined]
        self.handlers = sum(len(logging.getLogger(name).handlers) for name in [None, *logging.root.manager.loggerDict])
        self.locks = sum(type(thing) in (FileLock, CheckpointManager) for thing in gc.get_objects())
        status = Path("/proc/self/status")
        self.resident_kib = int(status.read_text().split("VmRSS:")[1].split()[0]) if status.exists() else 0

    def growth(self, before: Resources) -> list[str]:
        """What there is more of than before."""
        allowed = {"resident_kib": ALLOWED_KIB, "disk": 16 * SIZE, "files": 24}
        return [
            f"{name}: {getattr(before, name)} -> {now}"
            for name, now in vars(self).items()
            if now - getattr(before, name) > allowed.get(name, 0)
        ]


@contextmanager
def counted_callbacks() -> Iterator[list[object]]:
    """What is registered for a fork from here on: there is no way to take one back."""
    registered: list[object] = []
    real = os.register_at_fork
    os.register_at_fork = lambda **callbacks: registered.append(callbacks) or real(**callbacks)  # type: ignore[func-returns-value]
    try:
        yield registered
    finally:
        os.register_at_fork = real


class Soak:
    """One run in one folder, over many restarts."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.dice = root, random.Random(seed)
        self.manager: CheckpointManager | None = None
        self.step, self.committed = 0, 0
        self.counts: dict[str, int] = {}

    def open(self, store: Store | None = None, **options: Any) -> CheckpointManager:
        return CheckpointManager(
            str(self.root),
            store=store or LocalStore(self.root, fsync=False),
            keep={"last": 2, "every_steps": 100_000},
            save={"on_signals": []},
            background=self.dice.random() < 0.5,
            **options,
        )

    def state(self, step: int) -> dict[str, Any]:
        return {"x": torch.full((SIZE // 4,), float(step)), "number": step}

    def cycle(self) -> None:
        if self.manager is None:
            self.restart()
        deeds = ["save"] * 12 + ["restart", "error", "crash", "pin", "delete", "rewind", "rival", "damage", "load"]
        deed = self.dice.choice(deeds)
        self.count(deed)
        getattr(self, deed)()

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def restart(self) -> None:
        self.close()
        self.manager = self.open()
        start = self.manager.resume()
        assert start.step in (self.committed, self.committed + 1), (start.step, self.committed)
        if start:
            assert torch.equal(start.values["x"], self.state(start.step)["x"])
        self.step = self.committed = start.step

    def close(self) -> None:
        if self.manager is not None:
            with suppress(CheckpointError):
                self.manager.close()
            self.manager = None

    def save(self) -> None:
        assert self.manager is not None
        self.step += 1
        self.manager.save(self.state(self.step), self.step).wait()
        self.committed = self.step

    def error(self) -> None:
        """One call of the system fails during a save, among the first of those that every save makes."""
        number = self.dice.randrange(1, CALLS_OF_A_SAVE + 1)
        code = self.dice.choice([errno.EIO, errno.ENOSPC, errno.EDQUOT])

        def before(call: Any) -> None:
            if call.number == number:
                self.count("failed")
                raise OSError(code, os.strerror(code))

        with SystemCalls(self.root, before):
            try:
                self.save()
            except CheckpointError:
                self.close()

    def crash(self) -> None:
        """The process dies during a save, as far as the folder can tell."""
        self.close()
        dying = CrashingStore(LocalStore(self.root, fsync=False))
        manager = self.open(dying)
        try:
            start = manager.resume()
            self.step = self.committed = start.step
            dying.after = dying.count + self.dice.randrange(1, 16)
            self.step += 1
            manager.save(self.state(self.step), self.step).wait()
            self.committed = self.step
        except (Crash, CheckpointError):
            self.count("crashed")
        with suppress(Crash, CheckpointError):
            manager.close()
        manager._run.release()

    def pin(self) -> None:
        assert self.manager is not None
        steps = self.manager.all_steps()
        if steps:
            self.manager.pin(steps[0], ttl=0.001)
            self.manager.pin(steps[-1], "kept")
            self.manager.unpin(steps[-1], "kept")

    def delete(self) -> None:
        assert self.manager is not None
        steps = self.manager.all_steps()
        if len(steps) > 1:
            self.manager.delete(steps[0])

    def rewind(self) -> None:
        assert self.manager is not None
        steps = self.manager.all_steps()
        if len(steps) > 1:
            self.manager.rewind(steps[0])
            self.step = self.committed = steps[0]
            for aside in self.manager._run.repository.archived():
                self.manager._run.repository.drop_archived(aside)

    def rival(self) -> None:
        """A second writer is refused, or takes over."""
        assert self.manager is not None
        with pytest.raises(FencedError):
            self.open().resume()
        self.manager.wait()
        rival = self.open(takeover=True)
        assert rival.resume().step == self.committed
        with pytest.raises(FencedError):
            self.save()
        self.close()
        self.manager = rival
        self.step = self.committed

    def damage(self) -> None:
        """The newest loses a byte: the one before is resumed from."""
        assert self.manager is not None
        steps = self.manager.all_steps()
        if len(steps) > 1:
            name = self.manager.info(steps[-1]).name
            self.close()
            path = next((self.root / name).glob("**/x.safetensors"))
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
            self.committed = steps[-2]
            self.restart()

    def load(self) -> None:
        try:
            number = self.open(read_only=True).load()["number"]
        except NotFoundError:
            number = 0
        assert number in (self.committed, self.committed + 1)


def _nothing(cycle: int) -> None:
    """No leak."""


def soak(root: Path, cycles: int, leak: Callable[[int], object] = _nothing) -> tuple[list[str], str]:
    """What has grown from a third of the cycles to the end, and figures to print."""
    one = Soak(root, seed=9)
    logging.disable(logging.CRITICAL)
    with counted_callbacks() as registered:
        try:
            for cycle in range(cycles):
                if cycle == cycles // 3:
                    one.close()
                    before = Resources(root)
                one.cycle()
                leak(cycle)
            one.close()
            after = Resources(root)
            one.restart()
            one.save()
            one.close()
        finally:
            one.close()
            logging.disable(logging.NOTSET)
    found = after.growth(before) + ([f"{len(registered)} callbacks at a fork"] if registered else [])
    return found, f"{vars(before)}\n{vars(after)}\n{one.counts}"


def soak_alone(root: Path, cycles: int, leak: Callable[[int], object] = _nothing) -> tuple[list[str], str]:
    """The same in a process of its own, whose memory nothing but this uses and gives back."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(soak, root, cycles, leak).result()


_hoard: list[bytearray] = []


def _hoard_memory(cycle: int) -> None:
    _hoard.append(bytearray(b"x") * (4 << 20))


@pytest.mark.timeout(600)
def test_nothing_grows_over_thousands_of_cycles_with_faults(
    tmp_path: Path, profile: Any, tally: Callable[[str, int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    cycles = 2000 if profile.is_full else 60
    found, figures = soak_alone(tmp_path / "run", cycles)
    print(figures)
    assert found == []
    tally("cycles of saves and faults", cycles)


def _leak_file(root: Path, name: str, size: int) -> None:
    (root / f"left-{name}").write_bytes(bytes(size))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="descriptors and memory are counted in /proc")
@pytest.mark.parametrize("kind", ["descriptors", "threads", "files", "disk", "finalizers"])
def test_the_check_finds_what_is_left_behind(kind: str, tmp_path: Path) -> None:
    kept: list[Any] = []
    end = threading.Event()

    def thread(cycle: int) -> None:
        kept.append(threading.Thread(target=end.wait, daemon=True))
        kept[-1].start()

    def finalizer(cycle: int) -> None:
        kept.append(threading.Event())
        weakref.finalize(kept[-1], id, None)

    leaks: dict[str, Callable[[int], object]] = {
        "descriptors": lambda cycle: kept.append(Path(os.devnull).open("rb")),  # noqa: SIM115
        "threads": thread,
        "files": lambda cycle: [_leak_file(tmp_path / "run", f"{cycle}-{n}", 0) for n in range(3)],
        "disk": lambda cycle: _leak_file(tmp_path / "run", f"{cycle}", 16 * SIZE),
        "finalizers": finalizer,
    }
    found, _ = soak(tmp_path / "run", 20, leaks[kind])
    end.set()
    for thing in kept:
        if hasattr(thing, "close"):
            thing.close()
        if isinstance(thing, threading.Thread):
            thing.join()
    assert kind in [line.split(":")[0] for line in found]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is counted in /proc")
def test_the_check_finds_memory_that_is_kept(tmp_path: Path) -> None:
    found, _ = soak_alone(tmp_path / "run", 20, _hoard_memory)
    assert [line.split(":")[0] for line in found] == ["resident_kib"]
