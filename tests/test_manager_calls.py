"""What do calls of a manager promise beside each other? What was asked for is not lost, and nothing hangs."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptmgr import CheckpointManager, ConfigError, FencedError, SaveFailedError, StateMismatchError, StoreError
from ckptmgr.testing import MemoryStore


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(can_rename=False)


@pytest.fixture
def open_manager(store: MemoryStore) -> Iterator[Callable[..., CheckpointManager]]:
    managers: list[CheckpointManager] = []

    def make(**overrides: Any) -> CheckpointManager:
        settings: dict[str, Any] = {"store": store, "background": False, "run": "test", "keep": {"last": None}}
        managers.append(CheckpointManager("memory-store:", **{**settings, **overrides}))
        return managers[-1]

    yield make
    for manager in managers:
        manager._let_go()


def saved(open_manager: Callable[..., CheckpointManager], *steps: int) -> None:
    with open_manager() as manager:
        for step in steps:
            manager.save({"x": step}, step)


# What was asked for before and during a resume


@pytest.mark.parametrize("ask", ["signal", "request"])
@pytest.mark.parametrize("go_back", ["resume", "rewind"])
def test_what_was_asked_for_before_a_resume_is_answered_by_the_next_call(
    open_manager: Callable[..., CheckpointManager], ask: str, go_back: str
) -> None:
    saved(open_manager, 4, 5)
    manager = open_manager()
    if go_back == "rewind":
        manager.resume()
    if ask == "signal":
        os.kill(os.getpid(), signal.SIGTERM)
    else:
        manager.request_save("please")
    manager.resume() if go_back == "resume" else manager.rewind(5)
    assert manager.maybe_save({"x": 6}, 6) is not None
    assert manager.maybe_save({"x": 7}, 7) is None
    assert manager.should_stop == (ask == "signal")
    assert manager.all_steps() == [4, 5, 6]


# Steps


def test_a_resume_that_finds_nothing_begins_at_the_beginning(
    open_manager: Callable[..., CheckpointManager], store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an earlier loop of the same manager had come further, as in a notebook."""
    manager = open_manager(save={"every_steps": 5})
    assert not manager.resume()
    for step in range(1, 6):
        manager.maybe_save({"x": step}, step)
    manager.delete(5)
    start = manager.resume()
    assert (bool(start), start.step) == (False, 0)
    for step in range(start.step + 1, 6):
        manager.maybe_save({"x": -step}, step)
    assert manager.load()["x"] == -5


def test_on_close_makes_no_last_save_of_what_a_later_save_has_left_behind(
    open_manager: Callable[..., CheckpointManager],
) -> None:
    with open_manager(save={"every_steps": 1000, "on_close": True}) as manager:
        manager.maybe_save({"x": 5}, 5)
        manager.save({"x": 10}, 10)
    assert open_manager(read_only=True).all_steps() == [10]


def test_should_save_changes_nothing(open_manager: Callable[..., CheckpointManager]) -> None:
    with open_manager(save={"every_steps": 3, "on_close": True}) as manager:
        for step in range(1, 8):
            manager.maybe_save({"x": step}, step)
        with pytest.raises(ConfigError, match="step went back"):
            manager.should_save(2)
    assert open_manager(read_only=True).all_steps() == [3, 6, 7]


def test_should_save_takes_the_steps_that_maybe_save_takes(open_manager: Callable[..., CheckpointManager]) -> None:
    manager = open_manager(save={"every_steps": 2}, overwrite=True)
    manager.save({"x": 6}, 6)
    assert bool(manager.should_save(4)) == (manager.maybe_save({"x": 4}, 4) is not None)


def test_objects_come_back_under_one_name_each(open_manager: Callable[..., CheckpointManager]) -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="two objects as model"):
        open_manager().resume(model, model=torch.nn.Linear(2, 2))


def test_a_lazy_module_on_meta_is_refused_like_any_other_on_meta(
    open_manager: Callable[..., CheckpointManager],
) -> None:
    with open_manager() as manager:
        manager.save({"model": torch.nn.Linear(2, 3)}, 1)
    with pytest.raises(StateMismatchError, match="on the meta device"):
        open_manager().resume(torch.nn.LazyLinear(3, device="meta"))


# Failures


class Failing(MemoryStore):
    fails = False

    def put(self, key: str, data: Any, *, create: bool = False) -> None:
        if self.fails:
            raise StoreError("no network")
        super().put(key, data, create=create)


class Flaky:
    """An object whose state can't be had at first."""

    left = 0

    def state_dict(self) -> dict[str, Any]:
        if self.left:
            self.left -= 1
            raise RuntimeError("not now")
        return {}


def test_on_error_warn_lets_training_go_on_also_where_a_save_fails_before_anything_is_written(
    open_manager: Callable[..., CheckpointManager], caplog: pytest.LogCaptureFixture
) -> None:
    manager, flaky = open_manager(on_error="warn", max_failures=2, save={"every_steps": 1}), Flaky()
    flaky.left = 2
    made = [manager.maybe_save({"x": flaky}, step) is not None for step in (1, 2, 3)]
    assert made == [False, False, True]
    assert caplog.text.count("save.failed.tolerated") == 2
    flaky.left = 3
    assert [manager.maybe_save({"x": flaky}, step) for step in (4, 5)] == [None, None]
    with pytest.raises(SaveFailedError, match="not now"):
        manager.maybe_save({"x": flaky}, 6)


def test_on_error_warn_lets_training_go_on_where_the_root_can_not_be_had_at_once(
    open_manager: Callable[..., CheckpointManager],
) -> None:
    store = Failing(can_rename=False)
    manager = open_manager(store=store, on_error="warn", save={"every_steps": 1})
    store.fails = True
    assert manager.maybe_save({"x": 1}, 1) is None
    store.fails = False
    assert manager.maybe_save({"x": 2}, 2) is not None
    assert manager.all_steps() == [2]


# What will never save


@pytest.mark.parametrize(
    ("save", "epoch", "words"),
    [
        ({}, None, "set save.every_steps"),
        ({"every_epochs": 1}, None, "was not given"),
        ({"every_epochs": 1}, 1, ""),
        ({"every_steps": 1}, None, ""),
        ({"on_close": True}, None, ""),
        ({"on_file": "SAVE"}, None, ""),
    ],
)
def test_the_first_call_warns_once_of_rules_that_no_save_may_come_of(
    open_manager: Callable[..., CheckpointManager],
    caplog: pytest.LogCaptureFixture,
    save: dict[str, Any],
    epoch: int | None,
    words: str,
) -> None:
    with caplog.at_level(logging.WARNING):
        manager = open_manager(save=save)
        for step in (1, 2):
            manager.maybe_save({"x": step}, step, epoch=epoch)
    assert caplog.text.count("save.doubt") == bool(words)
    assert words in caplog.text


# Forked processes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("is_local", [True, False])
def test_a_forked_child_is_refused_and_neither_hangs_nor_lets_go_of_the_parents_root(
    tmp_path: Path, is_local: bool, open_manager: Callable[..., CheckpointManager]
) -> None:
    manager = CheckpointManager(tmp_path, save={"every_steps": 1}) if is_local else open_manager(background=True)
    manager.save({"x": 1}, 1).wait()
    child = os.fork()
    if not child:
        code = 1
        try:
            threading.Timer(60, os._exit, [2]).start()
            manager.save({"x": 2}, 2)
            manager.close()
        except FencedError:
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    manager.save({"x": 2}, 2).wait()
    assert manager.all_steps() == [1, 2]
    manager.close()
