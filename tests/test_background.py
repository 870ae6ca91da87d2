"""One save in flight: what a Pending says while it runs and how its failure comes back, once."""

from __future__ import annotations

import threading
from functools import partial

import pytest

from ckptmgr.background import Pending, Worker
from ckptmgr.errors import SaveFailedError
from ckptmgr.manifest import CheckpointInfo


def info(step: int) -> CheckpointInfo:
    return CheckpointInfo(f"step-{step}", step, None)


def test_a_pending_follows_its_save_from_running_to_committed() -> None:
    worker, gate, ended = Worker(), threading.Event(), threading.Event()

    def save() -> CheckpointInfo:
        gate.wait()
        return info(3)

    pending = worker.submit(3, "root", save, ended.set, in_background=True)
    assert (pending.done(), pending.step, pending.url, pending.error, pending.take_error()) == (
        False, 3, None, None, None,
    )  # fmt: skip
    assert repr(pending) == "<Pending step 3: saving>"
    with pytest.raises(TimeoutError, match="step 3 is still being saved to root after 0 s"):
        pending.wait(0)
    gate.set()
    pending.wait()
    assert (pending.done(), pending.url, pending.error) == (True, "root/step-3", None)
    assert repr(pending) == "<Pending step 3: root/step-3>"
    assert ended.wait(60)
    worker.close()


@pytest.mark.parametrize("background", [True, False])
def test_a_failure_is_raised_once(background: bool) -> None:
    worker = Worker()

    def save() -> CheckpointInfo:
        raise SaveFailedError("step 3 was not saved")

    pending = worker.submit(3, "root", save, lambda: None, in_background=background)
    with pytest.raises(SaveFailedError, match="step 3"):
        pending.wait()
    pending.wait()
    assert pending.take_error() is None
    assert str(pending.error) == "step 3 was not saved"
    assert pending.url is None
    assert repr(pending) == "<Pending step 3: step 3 was not saved>"
    worker.close()


def test_without_a_background_the_save_has_ended_when_submit_returns() -> None:
    ended: list[int] = []
    pending = Worker().submit(1, "root", lambda: info(1), lambda: ended.append(1), in_background=False)
    assert isinstance(pending, Pending)
    assert pending.done()
    assert ended == [1]


def test_saves_run_one_at_a_time_in_order() -> None:
    worker, order = Worker(), list[int]()

    def save(step: int) -> CheckpointInfo:
        order.append(step)
        return info(step)

    pendings = [
        worker.submit(step, "root", partial(save, step), lambda: None, in_background=True) for step in range(20)
    ]
    for pending in pendings:
        pending.wait()
    assert order == list(range(20))
    worker.close()
