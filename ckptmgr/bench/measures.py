"""How long does one contender take, and how much memory? Measured here, in a process that does nothing else."""

from __future__ import annotations

import ctypes
import gc
import os
import shutil
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from . import disk, footprint
from .loop import lost
from .peers import Peer, open_peer
from .state import State, build, change, difference, fingerprints, make_ready, scramble, settle
from .tasks import Contender, Outcome, Place, Task


@dataclass
class _Measured:
    """The figures so far, and the first thing that came back wrong."""

    figures: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    wrong: str | None = None

    def check(self, state: State, expected: dict[str, int], when: str) -> None:
        found = difference(state, expected)
        if found is not None and self.wrong is None:
            self.wrong = f"{when}: {found}"


def measured(task: Task) -> Outcome:
    """Everything that the task asks for. Blocks. Whatever the contender raises comes through."""
    assert task.contender is not None
    state = build(task.size, task.tensors, task.device)
    found = _Measured()
    found.figures["bytes"].append(state.size)
    if "times" in task.measures:
        _times(task.contender, task.place.below("times"), state, task.saves, found)
    if "memory" in task.measures:
        _memory(task.contender, task.place.below("memory"), state, task.saves, found)
    if "lost" in task.measures:
        place = task.place.below("lost")
        found.figures["lost"] += lost(open_peer(task.contender, place), state)
        _remove(place)
    return Outcome(dict(found.figures), wrong=found.wrong)


def _times(contender: Contender, place: Place, state: State, saves: int, found: _Measured) -> None:
    peer = open_peer(contender, place)
    for step in range(1, saves + 1):
        make_ready(state)
        if step == 1:
            peer.prepare(state)
        stall, durable = timed_save(peer, state, step, place)
        first = "first_" if step == 1 else ""
        found.figures[f"{first}stall"].append(stall)
        found.figures[f"{first}durable"].append(durable)
    expected = fingerprints(state)
    peer.close()
    if place.path is not None:
        disk.flush(place.path)  # what a contender removes as it closes is the disk's to do before anyone resumes
    if place.path is None or disk.forget(place.path):
        found.figures["cold"].append(_timed_load(contender, place, state, saves))
        found.check(state, expected, "loaded")
    if place.path is not None:
        disk.fill_cache(place.path)
        found.figures["warm"].append(_timed_load(contender, place, state, saves))
        found.check(state, expected, "loaded from the cache")
        _remove(place)


def timed_save(peer: Peer, state: State, step: int, place: Place) -> tuple[float, float]:
    """Seconds until the state may be changed, and until the save is complete and on the disk.

    After `make_ready` it comes after a training step, which uses all of the state. That counts in virtual machines:
    memory given back takes their maps of what is in use with it."""
    change(state)
    settle(state)
    began = time.perf_counter()
    peer.save(state, step)
    settle(state)
    stall = time.perf_counter() - began
    peer.wait()
    if place.path is not None:
        disk.flush(place.path)
    return stall, time.perf_counter() - began


def _timed_load(contender: Contender, place: Place, state: State, step: int) -> float:
    peer = open_peer(contender, place)
    make_ready(state)
    scramble(state)  # after it, as a model is made right before it is loaded; for why see `timed_save`
    settle(state)
    began = time.perf_counter()
    peer.load(state, step)
    settle(state)
    taken = time.perf_counter() - began
    peer.close()
    return taken


def _memory(contender: Contender, place: Place, state: State, saves: int, found: _Measured) -> None:
    """Bytes above the level before, at the highest; and, as nothing is timed here, whether a training
    that changes the state at once gets into the checkpoint."""
    _save_something_small(contender, place.below("small"))
    large = place.below("large")
    peer = open_peer(contender, large)
    _give_back()
    before = footprint.level()
    levels: list[float] = []
    with footprint.Peak() as peak:
        for step in range(1, saves + 1):
            change(state)
            expected = fingerprints(state)
            peer.save(state, step)
            change(state)
            peer.wait()
            levels.append((footprint.level() or 0) - (before or 0))
        peer.close()
    if before is not None:
        found.figures["save_bytes"].append(peak.bytes - before)
        found.figures["level_bytes"] += levels
    scramble(state)
    _give_back()
    before = footprint.level()
    with footprint.Peak() as peak:
        peer = open_peer(contender, large)
        peer.load(state, saves)
        peer.close()
    if before is not None:
        found.figures["resume_bytes"].append(peak.bytes - before)
    found.check(state, expected, "changed in place right after the save began, and loaded")
    _remove(place)


def _save_something_small(contender: Contender, place: Place) -> None:
    """So that what is imported by the first save counts for nobody."""
    small: Any = build(1 << 20, None, "cpu")
    peer = open_peer(contender, place)
    peer.save(small, 1)
    peer.wait()
    peer.close()
    peer = open_peer(contender, place)
    peer.load(small, 1)
    peer.close()


def _give_back() -> None:
    """What is free must not count as held, nor serve what is measured next for nothing."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _remove(place: Place) -> None:
    """Make room for what is measured next; what is behind a network waits for the end."""
    if place.path is not None:
        shutil.rmtree(place.path)
