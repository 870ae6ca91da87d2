"""A process that is killed at any call that changes the disk, or any request, has lost nothing it said was saved."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import pytest
from conftest import Profile
from crash_job import Job, Op, Recovery, plant_foreign
from crash_model import Root, after, violations
from servers import Bucket

from ckptmgr.testing import Call, CrashPoints, FaultProxy
from ckptmgr.testing.fault_proxy import Reply, Request
from ckptmgr.testing.http_server import HttpServer

T = TypeVar("T")
When = Literal["before", "after"]
KEEP = 2
THINNED = 5  # one of so many ends in the full profile; odd, so that it is before and after a call in turn
LEAST_SHARE = 0.8  # of the kills must have struck: a job with threads may make fewer calls than when it was recorded
BUGS_OF_A_START = {"pointer believed without its manifest", "what is not known is swept"}


@pytest.fixture(scope="module")
def points() -> Iterator[CrashPoints]:
    with CrashPoints() as points:
        yield points


def saves(*steps: int, version: int = 0, **how: Any) -> tuple[Op, ...]:
    return tuple(("save", step, version, how) for step in steps)


OPEN: tuple[Op, ...] = (("open",), ("resume",))
CLOSE: tuple[Op, ...] = (("close",),)


@dataclass(frozen=True)
class Scene:
    """What a job does, and what was done to its root before."""

    script: tuple[Op, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    earlier: tuple[Op, ...] = ()
    is_shared: bool = False


SCENES = {
    "sync": Scene((*OPEN, *saves(1, 2, 3, 4), *CLOSE)),
    "background": Scene((*OPEN, *saves(1, 2, 3, 4), *CLOSE), {"background": True}),
    "torch": Scene((*OPEN, *saves(1), *CLOSE), {"format": "torch"}),
    "shared": Scene((*OPEN, *saves(2, 3, 4), *CLOSE), earlier=(*OPEN, *saves(1), *CLOSE), is_shared=True),
    "overwrite": Scene(
        (*OPEN, *saves(2, version=1, overwrite=True), *saves(3), *saves(3, version=1, overwrite=True), *CLOSE),
        earlier=(*OPEN, *saves(1, 2), *CLOSE),
    ),
    "pin": Scene(
        (*OPEN, ("pin", 1, "paper"), *saves(3, pin=True), *saves(4, 5), ("unpin", 1), *saves(6), *CLOSE),
        earlier=(*OPEN, *saves(1, 2), *CLOSE),
    ),
    "rewind": Scene(
        (*OPEN, ("rewind", 2), *saves(3, version=1), *CLOSE), {"keep": {"last": 4}},
        (*OPEN, *saves(1, 2, 3, 4), *CLOSE),
    ),
    "go back": Scene(
        (("open",), ("resume", {"step": 1}), *saves(2, version=1), *CLOSE), earlier=(*OPEN, *saves(1, 2), *CLOSE)
    ),
    "delete": Scene((*OPEN, ("delete", 1), ("delete", 2), *saves(3), *CLOSE), earlier=(*OPEN, *saves(1, 2), *CLOSE)),
}  # fmt: skip


class Theatre:
    """Plays a scene again and again, each time with another end."""

    def __init__(self, points: CrashPoints, folder: Path, scene: Scene, mode: str, bug: str = "") -> None:
        self.points, self.folder, self.scene, self.bug = points, folder, scene, bug
        self.settings = {"background": False, "keep": {"last": KEEP}, "commit": mode, **scene.settings}
        self.keep = self.settings["keep"]["last"]
        self.start = Root()
        self._count = 0
        self._first = folder / "first"
        self._first.mkdir(parents=True)
        plant_foreign(self._first)
        if scene.earlier:
            points.run(self._job(folder / "earlier", scene.earlier), self._first)
            for op in scene.earlier:
                self.start = after(self.start, op, self.keep)

    def _job(self, report: Path, script: tuple[Op, ...], bug: str = "") -> Job:
        return Job(str(report), script, self.settings, bug, self.scene.is_shared)

    def fresh(self) -> tuple[Path, Path]:
        """A root as the scene begins with, and the name of a report."""
        self._count += 1
        root = self.folder / str(self._count)
        shutil.copytree(self._first, root)
        return root, self.folder / f"{self._count}.report"

    def calls(self) -> list[Call]:
        root, report = self.fresh()
        return self.points.record(self._job(report, self.scene.script, self.bug), root)

    def play(self, number: int, when: When, second: float | None = None) -> list[str] | None:
        """What was wrong after a kill at this call, or None when it came to its end before; with `second`, after
        the next start was killed, too, when it had made that share of its own calls."""
        root, report = self.fresh()
        bug = self.bug if self.bug in BUGS_OF_A_START else ""
        try:
            if not self.points.kill(self._job(report, self.scene.script, self.bug), root, number, when):
                return None
            if second is not None and not self._kill_again(root, report.with_suffix(".second"), second):
                return None
            found = self.points.run(Recovery(self.settings, is_shared=self.scene.is_shared, bug=bug), root)
            lines, again = read_report(report), second is not None
            return violations(found, lines, self.scene.script, self.keep, self.start, again=again)
        finally:
            shutil.rmtree(root)

    def _kill_again(self, root: Path, report: Path, share: float) -> bool:
        copy = root.with_suffix(".copy")
        shutil.copytree(root, copy)
        try:
            calls = self.points.record(self._job(report, OPEN), copy)
        finally:
            shutil.rmtree(copy)
        return self.points.kill(self._job(report, OPEN), root, calls[int(share * len(calls))].number, "after")


def read_report(path: Path) -> list[tuple[int, str]]:
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def thinned(ends: list[T], every: int) -> list[T]:
    """One of so many, from a random one on: a failure names its own."""
    return ends[random.randrange(every) :: every]


def stages(points: CrashPoints, folder: Path, profile: Profile) -> Iterator[tuple[str, Theatre]]:
    """Every scene in both ways to commit; in the quick profile two of them."""
    chosen = list(SCENES) if profile.is_full else ["shared", "overwrite"]
    for mode in ("rename", "manifest"):
        for name in chosen if profile.is_full else [chosen[mode == "manifest"]]:
            yield f"{name}, {mode}", Theatre(points, folder / f"{name} {mode}", SCENES[name], mode)


@pytest.mark.timeout(1200)
def test_a_kill_at_every_call_that_changes_the_disk(
    profile: Profile, points: CrashPoints, tally: Callable[[str, int], None], tmp_path: Path
) -> None:
    """Whatever the process was doing, the next one resumes at the last step that it reported or the one in
    flight, bit for bit, saves again, keeps what was to be kept, and leaves no litter and all that is not ours.

    In the full profile one end of five of every scene, from a random one on: several runs try them all."""
    tried, survived, bad = 0, 0, {}
    for title, theatre in stages(points, tmp_path, profile):
        ends: list[tuple[int, When]] = [(call.number, when) for call in theatre.calls() for when in ("before", "after")]
        for number, when in thinned(ends, THINNED) if profile.is_full else profile.sample(ends, quick=6):
            told = theatre.play(number, when)
            tried += 1
            survived += told == []
            if told:
                bad[f"{title}, {when} call {number}"] = told
    assert bad == {}
    assert survived >= LEAST_SHARE * tried > 0
    tally("crash points of real processes, by system call", survived)


@pytest.mark.timeout(600)
def test_a_second_kill_of_the_one_that_recovers(
    profile: Profile, points: CrashPoints, tally: Callable[[str, int], None], tmp_path: Path
) -> None:
    """The next start clears up after the dead one, and may die at any call of that.

    In the full profile after one call of nine of every scene, from a random one on; each time at another
    place of the start, among seven."""
    tried, survived, bad = 0, 0, {}
    for title, theatre in stages(points, tmp_path, profile):
        numbers = [call.number for call in theatre.calls()]
        for count, number in enumerate(thinned(numbers, 9) if profile.is_full else profile.sample(numbers, quick=2)):
            second = (0.5 + count % 7) / 7
            told = theatre.play(number, "after", second)
            tried += 1
            survived += told == []
            if told:
                bad[f"{title}, after call {number}, then after {second:.0%}"] = told
    assert bad == {}
    assert survived >= LEAST_SHARE * tried > 0
    tally("crash points of real processes, a second one in the recovery", survived)


CAUGHT = {  # in which mode, after which call, and as what
    "manifest before the data": ("manifest", "link", "step-00000003/manifest.json", "does not load"),
    "prune before the commit": ("rename", "unlink", "step-00000001/manifest.json", "let go of"),
    "data deleted before the manifest": ("rename", "unlink", ".safetensors", "does not load"),
    "pointer believed without its manifest": ("rename", "rename", "step-00000003", "resumed"),
    "no record of drafts": ("manifest", "rename", "model.safetensors", "litter: step-"),
    "what is not known is swept": ("rename", "create", "manifest.json", "foreign:"),
    "reported before the commit": ("rename", "create", "step-00000004", "lost"),
}


@pytest.mark.parametrize("bug", CAUGHT)
def test_the_same_check_catches_a_planted_bug(
    bug: str, points: CrashPoints, tally: Callable[[str, int], None], tmp_path: Path
) -> None:
    """A check that finds nothing would be worth nothing."""
    mode, name, where, words = CAUGHT[bug]
    scene = Scene((*OPEN, *saves(3, 4), *CLOSE), {"verify": {"on_save": "off"}}, (*OPEN, *saves(1, 2), *CLOSE))
    theatre = Theatre(points, tmp_path / "theatre", scene, mode, bug)
    calls = [call for call in theatre.calls() if call.name == name and where in (call.target or call.path)]
    told = next((told for call in calls if (told := theatre.play(call.number, "after"))), [])
    assert any(words in each for each in told), told
    tally("planted bugs caught by the check of crash points", 1)


class Remote:
    """Kills a process at a request to a server, and lets the next one recover."""

    def __init__(self, points: CrashPoints, folder: Path, bucket: Bucket, server: HttpServer, background: bool) -> None:
        self.points, self.folder, self.bucket, self.server = points, folder, bucket, server
        self.settings = {
            "background": background, "keep": {"last": KEEP - 1}, "lease_ttl": "1h",
            "storage": {"options": bucket.options},
        }  # fmt: skip
        self.script = (("plant",), *OPEN, *saves(1, 2), *CLOSE)
        self._count = 0
        self._changed = threading.Condition()
        self._pid, self._requests, self._answered = 0, 0, 0

    def requests(self) -> tuple[int, int]:
        """The first request that is the job's own, and the last."""
        self._play(0, "before", (("plant",),))
        first = self._requests + 1
        self._play(0, "before", self.script)
        return first, self._requests

    def play(self, number: int, when: When) -> list[str] | None:
        """What was wrong after a kill at this request, or None when it came to its end before."""
        root, report = self._play(number, when, self.script)
        if root is None:
            return None
        self.server.before, self.server.after = lambda request: None, lambda request: None
        found = self.points.run(Recovery(self.settings), root)
        return violations(found, read_report(report), self.script, KEEP - 1, Root())

    def _play(self, number: int, when: When, script: tuple[Op, ...]) -> tuple[str | None, Path]:
        self._count += 1
        root, report = f"{self.bucket.url}/{self._count}", self.folder / f"{self._count}.report"
        self._pid, self._requests, self._answered = 0, 0, 0
        is_dead = False

        def before(request: Request) -> Reply | None:
            nonlocal is_dead
            with self._changed:
                self._requests += 1
                if when == "before" and self._requests == number:
                    is_dead = True
                    self._kill()
                return Reply(503) if is_dead else None  # to nobody

        def after(request: Request) -> None:
            nonlocal is_dead
            with self._changed:
                self._answered += 1
                if when == "after" and self._answered == number and not is_dead:
                    is_dead = True
                    self._kill()
                self._changed.notify_all()

        def started(pid: int) -> None:
            with self._changed:
                self._pid = pid
                self._changed.notify_all()

        self.server.before, self.server.after = before, after
        try:
            self.points.run(Job(str(report), script, self.settings), root, started)
        except ProcessLookupError:
            with self._changed:  # what it had asked for before it died is done, or not, before the next one comes
                assert self._changed.wait_for(lambda: self._answered == self._requests, timeout=30)
            return root, report
        return None, report

    def _kill(self) -> None:
        assert self._changed.wait_for(lambda: self._pid, timeout=30)
        os.kill(self._pid, signal.SIGKILL)


@pytest.mark.server
@pytest.mark.timeout(600)
@pytest.mark.parametrize("background", [False, True], ids=["sync", "background"])
@pytest.mark.parametrize("kind", ["s3", "gcs"])
def test_a_kill_at_every_request_to_an_object_store(
    kind: str,
    background: bool,
    profile: Profile,
    points: CrashPoints,
    tally: Callable[[str, int], None],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """The same of a process that saves over a network: before a request is passed on, and after it was answered.

    In the full profile one end of nine on S3 and of three on Google Cloud, from a random one on."""
    if kind == "s3" and not profile.is_full:
        pytest.skip("a second each: in the full profile")
    with ExitStack() as stack:
        bucket: Bucket = request.getfixturevalue("s3_moto" if kind == "s3" else "gcs")
        server: HttpServer = (
            request.getfixturevalue("gcs_server")
            if kind == "gcs"
            else stack.enter_context(FaultProxy(bucket.options["endpoint_url"]))
        )
        bucket = Bucket(bucket.url, {**bucket.options, "endpoint_url": server.url})
        stack.callback(setattr, server, "before", server.before)
        stack.callback(setattr, server, "after", server.after)
        remote = Remote(points, tmp_path, bucket, server, background)
        first, last = remote.requests()
        ends: list[tuple[int, When]] = [(n, when) for n in range(first, last + 1) for when in ("before", "after")]
        tried, survived, bad = 0, 0, {}
        chosen = thinned(ends, 9 if kind == "s3" else 3) if profile.is_full else profile.sample(ends, quick=2)
        for number, when in chosen:
            told = remote.play(number, when)
            tried += 1
            survived += told == []
            if told:
                bad[f"{when} request {number}"] = told
    assert bad == {}
    assert survived >= LEAST_SHARE * tried > 0
    tally("crash points of real processes, by request", survived)
