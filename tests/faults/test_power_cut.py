"""A real file system that loses its power in the middle of saves holds every step that was reported, and what it needs.

A loop device that is told to forget what it has not written (`FS_IOC_SHUTDOWN`), as a disk does that loses its
power, then mounted again. Needs root, loop devices, and mkfs.
"""

from __future__ import annotations

import fcntl
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from faults.power_cut_job import main, newest, open_manager, state_of

if TYPE_CHECKING:
    from faults.conftest import Profile

_SHUTDOWN, _NO_LOG_FLUSH = 0x8004587D, 2
_MKFS = {"ext4": ("mkfs.ext4", "-q", "-F"), "xfs": ("mkfs.xfs", "-q", "-f")}
_SIZE = {"ext4": 128 << 20, "xfs": 320 << 20}  # bytes; no smaller XFS is made
_WAIT_S = 60.0


class Disk:
    """A file system on a loop device that can lose its power."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.image, self.mount_point = folder / "image", folder / "disk"
        self.mount_point.mkdir()
        with self.image.open("wb") as file:
            file.truncate(_SIZE[kind])
        _run(*_MKFS[kind], str(self.image))
        self.mount()

    def mount(self) -> None:
        _run("mount", "-o", "loop", str(self.image), str(self.mount_point))

    def cut(self) -> None:
        """From now on nothing reaches the disk."""
        fd = os.open(self.mount_point, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(fd)

    def unmount(self) -> None:
        if os.path.ismount(self.mount_point):
            _run("umount", str(self.mount_point))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, timeout=_WAIT_S, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.decode()}")


@pytest.fixture(params=["ext4", "xfs"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux can mount a loop device")
    if shutil.which(_MKFS[request.param][0]) is None:
        pytest.skip(f"{_MKFS[request.param][0]} is not installed")
    try:
        made = Disk(tmp_path, request.param)
    except OSError as exc:
        pytest.skip(f"no loop device can be mounted: {exc}")
    try:
        yield made
    finally:
        made.unmount()


def lost_by(disk: Disk, how: str, after_s: float, *, waits_for: int = 1) -> bool:
    """Whether a cut so many seconds after a reported save costs a reported step."""
    before = newest(disk.mount_point, how)
    ear, mouth = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.dup2(mouth, 1)
            main(disk.mount_point, how)
        finally:
            os._exit(1)
    os.close(mouth)
    told = b""
    try:
        while told.count(b"\n") < waits_for:
            assert select.select([ear], [], [], _WAIT_S)[0], "the job saves nothing"
            part = os.read(ear, 1 << 16)
            assert part, "the job has ended"
            told += part
        select.select([], [], [], after_s)  # any moment is as good as another
        disk.cut()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        while part := os.read(ear, 1 << 16):
            told += part
        os.close(ear)
    disk.unmount()
    disk.mount()
    reported = max((int(line) for line in told.split(b"\n")[:-1]), default=before)
    return newest(disk.mount_point, how) < reported


@pytest.mark.timeout(600)
def test_a_real_power_cut_costs_no_reported_step(
    disk: Disk, profile: Profile, tally: Callable[[str, int], None]
) -> None:
    lots = random.Random(7)
    cuts = 60 if profile.is_full else 2
    assert [cut for cut in range(cuts) if lost_by(disk, "ckptmgr", lots.uniform(0, 0.1))] == []
    with open_manager(disk.mount_point) as mgr:
        start = mgr.resume()
        assert start.skipped == ()
        mgr.save(state_of(start.step + 1), start.step + 1).wait()
        assert mgr.latest_step() == start.step + 1
    tally("real power cuts", cuts)


@pytest.mark.faults
@pytest.mark.timeout(600)
@pytest.mark.parametrize("how", ["ckptmgr without fsync", "torch.save"])
def test_the_same_cuts_cost_steps_that_were_not_fsynced(how: str, disk: Disk) -> None:
    """Else the cuts would prove nothing."""
    lots = random.Random(7)
    lost = [lost_by(disk, how, lots.uniform(0, 0.1)) for _ in range(10)]
    assert sum(lost) >= 5
