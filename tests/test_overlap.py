"""Does a step wait for what it changes to be copied, and is everything else copied before `save` returns?"""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptmgr import CheckpointManager
from ckptmgr.errors import ConfigError, SaveFailedError
from ckptmgr.overlap import NextSteps

WIDTH = 512  # a weight has 1 MiB: it is large


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[CheckpointManager]:
    manager = CheckpointManager(tmp_path / "run", overlap=True, keep={"last": None}, save={"on_signals": []})
    yield manager
    manager.close()


def _model() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def _backward(model: nn.Module) -> None:
    model.zero_grad()
    model(torch.randn(8, WIDTH)).square().mean().backward()


def _clones(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {f"model.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{number}.{key}": tensor.clone() for key, tensor in state.items()}
    return found


def _loaded(manager: CheckpointManager, step: int) -> dict[str, torch.Tensor]:
    values = manager.load(step)
    found = {f"model.{name}": tensor for name, tensor in values["model"].items()}
    for number, state in values["optimizer"]["state"].items():
        found |= {f"optimizer.{number}.{key}": tensor for key, tensor in state.items()}
    return found


def _assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@contextmanager
def _copies_held_up(manager: CheckpointManager, state: dict[str, Any], until: Callable[[], bool]) -> Iterator[None]:
    """The thread that copies does nothing before it is so, or the block ends."""
    ended = threading.Event()

    def hold_up() -> None:
        while not (until() or ended.is_set()):
            pass

    manager.prepare(state)
    future = manager._saver._copier._arena._threads().submit(hold_up)
    try:
        yield
    finally:
        ended.set()
        future.result(60)


def _is_in(thread: int, function: str) -> bool:
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code.co_name == function:
            return True
        frame = frame.f_back
    return False


def test_the_next_step_waits_for_the_copy(manager: CheckpointManager) -> None:
    model, optimizer = _model()
    _backward(model)
    optimizer.step()
    before, own, state = _clones(model, optimizer), threading.get_ident(), {"model": model, "optimizer": optimizer}
    with _copies_held_up(manager, state, lambda: _is_in(own, "let_go")):
        pending = manager.save(state, 1)
        optimizer.step()  # which waits, or else the copy begins only at the end of this block
    pending.wait()
    _assert_same(_loaded(manager, 1), before)
    assert not torch.equal(before["model.0.weight"], model.state_dict()["0.weight"])


def test_what_forward_changes_is_copied_at_once(manager: CheckpointManager) -> None:
    model, optimizer = _model()
    model.register_buffer("seen", torch.zeros(WIDTH, WIDTH))  # a large one
    _backward(model)
    optimizer.step()
    before, state = _clones(model, optimizer), {"model": model, "optimizer": optimizer}
    with _copies_held_up(manager, state, lambda: False):
        pending = manager.save(state, 1)
        _backward(model)
        assert isinstance(model.seen, torch.Tensor)
        model.seen += 1
    pending.wait()
    _assert_same(_loaded(manager, 1), before)


def test_many_steps_with_a_save_before_each_are_each_what_they_were(manager: CheckpointManager) -> None:
    model, optimizer = _model()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    expected = {}
    for step in range(1, 9):
        _backward(model)
        optimizer.step()
        scheduler.step()
        expected[step] = _clones(model, optimizer)
        manager.save({"model": model, "optimizer": optimizer, "scheduler": scheduler}, step)
    manager.wait()
    for step, clones in expected.items():
        _assert_same(_loaded(manager, step), clones)


def test_a_change_before_the_step_fails_the_save_and_is_named(manager: CheckpointManager) -> None:
    model = nn.Embedding(WIDTH, WIDTH, max_norm=1.0)  # whose forward changes its weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = {"model": model, "optimizer": optimizer}
    manager.save(state, 1).wait()
    with _copies_held_up(manager, state, lambda: False):
        pending = manager.save(state, 2)
        model(torch.arange(WIDTH))
    with pytest.raises(SaveFailedError, match=r"model\.weight changed .* set overlap: false"):
        pending.wait()
    assert manager.all_steps() == [1]
    manager.save(state, 3).wait()
    assert manager.all_steps() == [1, 3]


def test_the_optimizer_is_left_alone_in_the_end(manager: CheckpointManager) -> None:
    model, optimizer = _model()
    manager.save({"model": model, "optimizer": optimizer}, 1)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    manager.save({"model": model, "optimizer": optimizer}, 2)
    assert len(optimizer._optimizer_step_pre_hooks) == 1
    manager.close()
    assert len(optimizer._optimizer_step_pre_hooks) == 0


def test_nothing_is_kept_alive_by_waiting_for_its_step(manager: CheckpointManager) -> None:
    model, optimizer = _model()
    _backward(model)
    optimizer.step()
    known = weakref.ref(next(model.parameters()))
    manager.save({"model": model, "optimizer": optimizer}, 1).wait()
    del model, optimizer
    gc.collect()
    assert known() is None


def test_only_optimizers_whose_steps_torch_tells_of_can_wait() -> None:
    model, optimizer = _model()
    steps = NextSteps()
    assert len(steps.tensors({"model": model})) == 0
    assert len(steps.tensors({"optimizer": optimizer})) == 6
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # puts a method of its own in the step's place
    assert len(steps.tensors({"optimizer": optimizer})) == 6
    optimizer.step = lambda: None  # type: ignore[method-assign]
    assert len(steps.tensors({"optimizer": optimizer})) == 0


def test_it_needs_background(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="overlap"):
        CheckpointManager(tmp_path / "run", overlap=True, background=False)
