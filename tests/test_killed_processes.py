"""`CrashPoints` runs a job in a process of its own, and kills it where it is told to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptmgr.testing import CrashPoints, JobError

pytestmark = pytest.mark.skipif(os.name == "nt", reason="no fork")


def make_folders(root: Path) -> None:
    for name in ("a", "b", "c"):
        (root / name).mkdir()


def fail(root: Path) -> None:
    raise ValueError(f"not in {root.name}")


def count(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def wait_for_ever(root: Path) -> None:
    signal.pause()


@pytest.fixture(scope="module")
def points() -> Iterator[CrashPoints]:
    with CrashPoints() as points:
        yield points


def test_a_job_is_killed_before_or_after_the_call_that_was_named(points: CrashPoints, tmp_path: Path) -> None:
    recorded = tmp_path / "recorded"
    recorded.mkdir()
    assert [call.path for call in points.record(make_folders, recorded)] == ["a", "b", "c"]
    left = {}
    for when in ("before", "after"):
        root = tmp_path / when
        root.mkdir()
        assert points.kill(make_folders, root, 2, when) is True
        left[when] = points.run(count, root)
    assert left == {"before": ["a"], "after": ["a", "b"]}


def test_a_job_that_ends_before_the_call_is_not_killed(points: CrashPoints, tmp_path: Path) -> None:
    assert points.kill(make_folders, tmp_path, 4) is False
    assert count(tmp_path) == ["a", "b", "c"]


def test_a_job_that_raises_is_told_with_its_traceback(points: CrashPoints, tmp_path: Path) -> None:
    for run in (points.run, points.record):
        with pytest.raises(JobError, match="ValueError: not in"):
            run(fail, tmp_path)


def test_a_process_killed_by_others_is_told(points: CrashPoints, tmp_path: Path) -> None:
    with pytest.raises(ProcessLookupError, match="was killed"):
        points.run(wait_for_ever, tmp_path, lambda pid: os.kill(pid, signal.SIGKILL))


def test_a_job_that_does_not_end_is_ended(tmp_path: Path) -> None:
    with CrashPoints(timeout_s=0.01) as points, pytest.raises(TimeoutError, match=r"within 0\.01 s"):
        points.run(wait_for_ever, tmp_path)


def test_the_example_of_crash_points_runs(tmp_path: Path) -> None:
    text = CrashPoints.__doc__ or ""
    example = text[text.index("        from ckptmgr import") : text.index("    Each process is a fork")]
    # A few points are enough here; the example tries all.
    example = example.replace("points.record(job, tempfile.mkdtemp())", "points.record(job, tempfile.mkdtemp())[::20]")
    script = tmp_path / "example.py"
    script.write_text("\n".join(line[8:] for line in example.splitlines()))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False,
        env={**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
