"""The manager in a loop: when it saves, what it keeps, what it raises, how it goes on."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ckptmgr import (
    AlreadyExistsError,
    CheckpointManager,
    ConfigError,
    DamagedError,
    FencedError,
    NotFoundError,
    Pending,
    SaveFailedError,
    StoreError,
)
from ckptmgr.coordinator import Solo
from ckptmgr.testing import Crash, CrashingStore, MemoryStore, SlowStore


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def open_manager(store: MemoryStore) -> Iterator[Callable[..., CheckpointManager]]:
    """Managers on one memory store, in the foreground unless told otherwise, closed at the end."""
    managers: list[CheckpointManager] = []

    def make(**overrides: Any) -> CheckpointManager:
        settings: dict[str, Any] = {"store": store, "background": False, "run": "test"}
        manager = CheckpointManager("memory-store:", **{**settings, **overrides})
        managers.append(manager)
        return manager

    yield make
    for manager in managers:
        manager._let_go()


def state(value: float = 0.0) -> dict[str, Any]:
    return {"x": torch.full((3,), value), "note": "text"}


def saved_steps(manager: CheckpointManager, steps: range, **call: Any) -> list[int]:
    return [step for step in steps if manager.maybe_save(state(step), step, **call) is not None]


def test_steps_save_at_each_multiple(open_manager: Callable[..., CheckpointManager]) -> None:
    manager = open_manager(save={"every_steps": 4}, keep={"last": None})
    assert saved_steps(manager, range(1, 14)) == [4, 8, 12]
    assert manager.all_steps() == [4, 8, 12]
    assert manager.latest_step() == 12


def test_a_loop_that_skips_steps_misses_no_multiple(open_manager: Callable[..., CheckpointManager]) -> None:
    manager = open_manager(save={"every_steps": 4})
    assert saved_steps(manager, range(3, 30, 3)) == [6, 9, 12, 18, 21, 24]


def test_epochs_steps_and_clock_together_save_once_per_call(open_manager: Callable[..., CheckpointManager]) -> None:
    clock = Clock()
    manager = open_manager(save={"every_steps": 10, "every_epochs": 1, "every": "60s"}, clock=clock)
    saved = []
    for step in range(1, 31):
        clock.now += 9
        if manager.maybe_save(state(), step, epoch=step // 15):
            saved.append(step)
    assert saved == [7, 10, 15, 20, 27, 30]


def test_a_user_predicate_sees_the_moment(open_manager: Callable[..., CheckpointManager]) -> None:
    manager = open_manager(triggers=[lambda moment: moment.metrics["loss"] < 0.5])
    losses = [0.9, 0.4, 0.6, 0.3]
    saved = [s for s, loss in enumerate(losses, 1) if manager.maybe_save(state(), s, metrics={"loss": loss})]
    assert saved == [2, 4]


def test_should_save_answers_without_saving(open_manager: Callable[..., CheckpointManager]) -> None:
    manager = open_manager(save={"every_steps": 5})
    assert not manager.should_save(4)
    assert manager.should_save(5).reason == "every_steps: 5 crossed at 5"
    assert manager.all_steps() == []


def test_the_state_is_only_asked_for_when_due(open_manager: Callable[..., CheckpointManager]) -> None:
    manager, asked = open_manager(save={"every_steps": 3}), list[int]()

    def ask() -> dict[str, Any]:
        asked.append(1)
        return state()

    for step in range(1, 7):
        manager.maybe_save(ask, step)
    assert len(asked) == 2


@pytest.mark.parametrize("wrong", [None, 3, [], {}, lambda: None])
def test_a_state_that_is_no_mapping_is_refused(open_manager: Callable[..., CheckpointManager], wrong: Any) -> None:
    with pytest.raises(ConfigError, match="state must be a mapping"):
        open_manager().save(wrong, 1)


def test_metrics_are_numbers_of_any_kind(open_manager: Callable[..., CheckpointManager]) -> None:
    manager = open_manager()
    manager.save(state(), 1, metrics={"loss": torch.tensor(0.5, requires_grad=True), "n": 3})
    manifest = manager.info(1).manifest
    assert manifest is not None
    assert manifest.metrics == {"loss": 0.5, "n": 3.0}
    with pytest.raises(ConfigError, match="metric 'loss' is 'low'"):
        manager.save(state(), 2, metrics={"loss": "low"})


def test_a_request_saves_at_the_next_call(open_manager: Callable[..., CheckpointManager]) -> None:
    manager = open_manager(save={"every_steps": 1000})
    assert manager.maybe_save(state(), 1) is None
    manager.request_save("the evaluator asked")
    assert manager.should_save(2).reason == "request: the evaluator asked"
    assert saved_steps(manager, range(2, 5)) == [2]


def test_a_file_in_the_root_saves_once(open_manager: Callable[..., CheckpointManager], store: MemoryStore) -> None:
    manager = open_manager(save={"on_file": "SAVE_NOW"})
    store.put("SAVE_NOW", b"before the reboot\n")
    assert manager._request_file is not None
    manager._request_file.look()
    assert saved_steps(manager, range(1, 4)) == [1]
    assert store.stat("SAVE_NOW") is None


def test_sigterm_saves_and_asks_to_stop_and_sigusr1_only_saves(open_manager: Callable[..., CheckpointManager]) -> None:
    manager = open_manager(save={"on_signals": ["SIGTERM", "SIGUSR1"]})
    assert manager.maybe_save(state(), 1) is None
    os.kill(os.getpid(), signal.SIGUSR1)
    assert saved_steps(manager, range(2, 4)) == [2]
    assert not manager.should_stop
    os.kill(os.getpid(), signal.SIGTERM)
    assert saved_steps(manager, range(4, 6)) == [4]
    assert manager.should_stop
    assert manager.poll()


def test_close_puts_signal_handlers_back(open_manager: Callable[..., CheckpointManager]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    manager = open_manager()
    assert signal.getsignal(signal.SIGTERM) != before
    manager.close()
    manager.close()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("background", [True, False])
def test_a_last_save_on_close_only_when_asked_and_needed(
    open_manager: Callable[..., CheckpointManager], store: MemoryStore, background: bool
) -> None:
    plain = open_manager(save={"every_steps": 5}, background=background)
    saved_steps(plain, range(1, 8))
    plain.close()
    reader = open_manager(read_only=True)
    assert reader.all_steps() == [5]
    asked = open_manager(save={"every_steps": 5, "on_close": True}, background=background)
    asked.resume()
    saved_steps(asked, range(6, 9))
    asked.close()
    assert reader.all_steps() == [5, 8]
    again = open_manager(save={"every_steps": 5, "on_close": True}, background=background)
    again.resume()
    saved_steps(again, range(9, 11))  # 10 is saved by its trigger
    again.close()
    assert reader.all_steps() == [5, 8, 10]


def test_leaving_by_an_exception_makes_no_last_save(open_manager: Callable[..., CheckpointManager]) -> None:
    def train() -> None:
        with open_manager(save={"on_close": True}) as manager:
            manager.maybe_save(state(), 1)
            raise KeyError("bug")

    with pytest.raises(KeyError):
        train()
    assert open_manager(read_only=True).all_steps() == []


def test_a_failed_save_is_told_beside_the_exception_that_ends_the_loop(
    open_manager: Callable[..., CheckpointManager],
) -> None:
    def train() -> None:
        with open_manager(store=FullStore(), background=True) as manager:
            manager.save(state(), 1)
            raise KeyError("bug")

    with pytest.raises(KeyError) as caught:
        train()
    assert ["ckptmgr: besides, step 1 was not saved" in note for note in caught.value.__notes__] == [True]


class FullStore(MemoryStore):
    """No data gets through while `full`."""

    full = True

    def writer(self, key: str, size: int | None = None) -> Any:
        if self.full:
            raise StoreError(f"no space left for {key}", errno=28)
        return super().writer(key, size)


def test_a_save_in_the_foreground_raises_what_it_failed_with(open_manager: Callable[..., CheckpointManager]) -> None:
    store = FullStore()
    manager = open_manager(store=store)
    with pytest.raises(
        SaveFailedError, match=r"step 1 was not saved to .*: no space .*before it are untouched"
    ) as caught:
        manager.save(state(), 1)
    assert isinstance(caught.value.__cause__, StoreError)
    store.full = False
    manager.save(state(), 2)
    assert manager.all_steps() == [2]
    assert not [key for key in store.objects if "drafts" in key]


def test_a_save_in_the_background_raises_at_the_next_call_once(open_manager: Callable[..., CheckpointManager]) -> None:
    store = FullStore()
    manager = open_manager(store=store, background=True, save={"every_steps": 1})
    pending = manager.maybe_save(state(), 1)
    assert pending is not None
    pending.settle()
    with pytest.raises(SaveFailedError, match="step 1"):
        manager.maybe_save(state(), 2)
    store.full = False
    assert manager.maybe_save(state(), 3) is not None
    manager.close()


def test_poll_and_wait_and_close_raise_a_background_failure_too(open_manager: Callable[..., CheckpointManager]) -> None:
    for method in ("wait", "close"):
        manager = open_manager(store=FullStore(), background=True)
        manager.save(state(), 1)
        with pytest.raises(SaveFailedError):
            getattr(manager, method)()
    manager = open_manager(store=FullStore(), background=True)
    manager.save(state(), 1).settle()
    with pytest.raises(SaveFailedError):
        manager.poll()
    manager.close()


def test_a_failure_taken_by_the_pending_is_not_raised_again(open_manager: Callable[..., CheckpointManager]) -> None:
    manager = open_manager(store=FullStore(), background=True)
    pending = manager.save(state(), 1)
    with pytest.raises(SaveFailedError):
        pending.wait()
    manager.close()


def test_on_error_warn_goes_on_until_the_budget_is_spent(
    open_manager: Callable[..., CheckpointManager], caplog: pytest.LogCaptureFixture
) -> None:
    store = FullStore()
    manager = open_manager(store=store, on_error="warn", max_failures=2)
    manager.save(state(), 1)
    manager.save(state(), 2)
    assert caplog.text.count("save.failed.tolerated") == 2
    store.full = False
    manager.save(state(), 3)
    store.full = True
    manager.save(state(), 4)
    manager.save(state(), 5)
    with pytest.raises(SaveFailedError, match="step 6"):
        manager.save(state(), 6)
    assert manager.all_steps() == [3]


def test_training_goes_on_while_a_background_save_runs(
    open_manager: Callable[..., CheckpointManager], store: MemoryStore
) -> None:
    gate = threading.Event()
    slow = SlowStore(store, gate=gate)
    gate.set()
    manager = open_manager(store=slow, background=True)
    manager.resume()
    gate.clear()
    weights = torch.ones(4)
    pending = manager.save({"w": weights}, 1)
    weights.zero_()  # the saved state is the state at the call
    assert not pending.done()
    gate.set()
    manager.wait()
    assert torch.equal(manager.load()["w"], torch.ones(4))


def test_when_busy_skip_saves_as_soon_as_it_can(
    open_manager: Callable[..., CheckpointManager], store: MemoryStore
) -> None:
    gate = threading.Event()
    gate.set()
    manager = open_manager(
        store=SlowStore(store, gate=gate), background=True, when_busy="skip", save={"every_steps": 2}
    )
    manager.resume()
    gate.clear()
    first = manager.maybe_save(state(), 2)
    assert isinstance(first, Pending)
    assert [manager.maybe_save(state(), step) for step in (3, 4, 5)] == [None, None, None]
    gate.set()
    first.wait()
    assert manager.maybe_save(state(), 6) is not None
    manager.wait()
    assert manager.all_steps() == [2, 6]


def test_a_timeout_says_which_save_is_still_running(
    open_manager: Callable[..., CheckpointManager], store: MemoryStore
) -> None:
    gate = threading.Event()
    gate.set()
    manager = open_manager(store=SlowStore(store, gate=gate), background=True)
    manager.resume()
    gate.clear()
    manager.save(state(), 7)
    with pytest.raises(TimeoutError, match="step 7"):
        manager.wait(0)
    with pytest.raises(TimeoutError, match="step 7"):
        manager.close(0)
    gate.set()
    manager.close()
    assert open_manager(read_only=True).all_steps() == [7]


def test_rotation_keeps_what_the_rules_say(open_manager: Callable[..., CheckpointManager]) -> None:
    manager = open_manager(
        save={"every_steps": 1}, keep={"last": 2, "every_steps": 5, "best": {"metric": "loss", "mode": "min"}}
    )
    for step in range(1, 13):
        manager.maybe_save(state(step), step, metrics={"loss": abs(step - 3)})
    assert manager.all_steps() == [3, 5, 10, 11, 12]
    assert manager.best_step() == 3
    assert torch.equal(manager.load("best")["x"], torch.full((3,), 3.0))


def test_rotation_after_a_restart_knows_what_is_there(open_manager: Callable[..., CheckpointManager]) -> None:
    first = open_manager(save={"every_steps": 1}, keep={"last": 3})
    saved_steps(first, range(1, 6))
    first.close()
    second = open_manager(save={"every_steps": 1}, keep={"last": 3})
    assert second.resume().step == 5
    saved_steps(second, range(6, 8))
    assert second.all_steps() == [5, 6, 7]


def test_an_unhealthy_checkpoint_never_takes_the_place_of_a_healthy_one(
    open_manager: Callable[..., CheckpointManager], caplog: pytest.LogCaptureFixture
) -> None:
    manager = open_manager(keep={"last": 2}, check_finite=True)
    for step in (1, 2):
        manager.save(state(), step, metrics={"loss": 1.0})
    manager.save(state(), 3, metrics={"loss": float("nan")})
    manager.save(state(float("inf")), 4, metrics={"loss": 1.0})
    assert manager.all_steps() == [1, 2, 4]
    assert "not finite: metric loss" in caplog.text
    assert "not finite: x" in caplog.text
    healthy = [info.manifest.healthy for info in map(manager.info, (1, 2, 4)) if info.manifest]
    assert healthy == [True, True, False]


def test_pinned_checkpoints_stay(open_manager: Callable[..., CheckpointManager]) -> None:
    manager = open_manager(keep={"last": 1})
    manager.save(state(), 1, pin=True)
    manager.save(state(), 2)
    manager.pin(2, "paper", ttl=timedelta(days=1))
    manager.save(state(), 3)
    manager.save(state(), 4)
    assert manager.all_steps() == [1, 2, 4]
    assert manager.info("paper").step == 2
    with pytest.raises(ConfigError, match=r"step 2 .* is pinned; unpin\(2\) first"):
        manager.delete(2)
    assert manager.unpin("paper") == 1
    manager.delete(2)
    manager.unpin(1)
    assert str(manager.prune(dry_run=True).drop[0].info.name) == "step-00000001"
    assert manager.all_steps() == [1, 4]
    manager.prune()
    assert manager.all_steps() == [4]


def test_tags_name_a_checkpoint(open_manager: Callable[..., CheckpointManager]) -> None:
    manager = open_manager()
    manager.save(state(1), 1, tags=["warmup-done"])
    manager.save(state(2), 2)
    assert manager.load("warmup-done")["x"][0] == 1
    with pytest.raises(ConfigError, match="not usable"):
        manager.save(state(3), 3, tags=["latest"])


def test_deleting_the_newest_moves_the_pointer(
    open_manager: Callable[..., CheckpointManager], store: MemoryStore
) -> None:
    manager = open_manager()
    for step in (1, 2):
        manager.save(state(), step)
    assert store.get("latest") == b"step-00000002\n"
    manager.delete(2)
    assert store.get("latest") == b"step-00000001\n"
    manager.delete(1)
    assert store.stat("latest") is None


def test_the_pointer_may_have_another_name(open_manager: Callable[..., CheckpointManager], store: MemoryStore) -> None:
    open_manager(latest="newest.txt").save(state(), 1)
    assert store.get("newest.txt") == b"step-00000001\n"


def test_a_step_is_not_saved_twice(open_manager: Callable[..., CheckpointManager]) -> None:
    manager = open_manager(save={"every_steps": 1})
    manager.save(state(1), 1)
    with pytest.raises(AlreadyExistsError, match=r"step 1 is in .* already; pass overwrite=True"):
        manager.save(state(2), 1)
    manager.request_save()
    assert manager.maybe_save(state(3), 1) is None
    assert manager.load()["x"][0] == 1


@pytest.mark.parametrize("by", ["call", "config"])
def test_overwrite_replaces_a_step_after_the_new_one_is_durable(
    open_manager: Callable[..., CheckpointManager], store: MemoryStore, by: str
) -> None:
    manager = open_manager(overwrite=by == "config")
    manager.save(state(1), 1)
    manager.save(state(2), 1, overwrite=True if by == "call" else None)
    assert manager.load(1)["x"][0] == 2
    assert len({key.split("/")[0] for key in store.objects if key.startswith("step-")}) == 1


def test_names_follow_the_template(open_manager: Callable[..., CheckpointManager], store: MemoryStore) -> None:
    manager = open_manager(name="ep{epoch}-ba{step}")
    with pytest.raises(ConfigError, match="needs an epoch"):
        manager.save(state(), 300)
    manager.save(state(), 400, epoch=3)
    assert store.get("latest") == b"ep3-ba400\n"


def test_what_is_saved_within_an_epoch_knows_how_many_were_completed_before(
    open_manager: Callable[..., CheckpointManager],
) -> None:
    with open_manager(save={"every_steps": 10}) as manager:
        manager.resume()
        manager.maybe_save(state(), 5)
        manager.maybe_save(state(), 10)
        manager.maybe_save(state(), 15, epoch=1)  # nothing is due
        manager.maybe_save(state(), 20)
    assert [manager.info(step).manifest.epoch for step in (10, 20)] == [None, 1]  # type: ignore[union-attr]
    with open_manager(save={"every_steps": 10, "every_epochs": 1}) as manager:
        assert manager.resume().epoch == 1
        assert not manager.should_save(21)
        manager.save(state(), 21)
        assert manager.resume().epoch == 1
        assert not manager.resume(step=10).epoch
        manager.save(state(), 11)
        assert manager.resume().epoch == 0


def test_only_saves_the_named_entries(open_manager: Callable[..., CheckpointManager]) -> None:
    manager = open_manager(only=["x"])
    manager.save(state(), 1)
    assert list(manager.load()) == ["x"]
    assert list(open_manager(read_only=True).load(only=["x"])) == ["x"]
    with pytest.raises(NotFoundError, match="has no entry y; it has x"):
        manager.load(only=["y"])


def test_a_root_with_checkpoints_is_not_saved_into_by_someone_who_did_not_resume(
    open_manager: Callable[..., CheckpointManager],
) -> None:
    with open_manager() as first:
        first.save(state(), 5)
    second = open_manager()
    with pytest.raises(
        AlreadyExistsError, match=r"holds 1 checkpoint\(s\), the newest of step 5.*resume\(\).*fresh=True"
    ):
        second.save(state(), 6)
    assert second.resume().step == 5
    second.save(state(), 6)


def test_fresh_archives_what_is_there(open_manager: Callable[..., CheckpointManager], store: MemoryStore) -> None:
    with open_manager() as first:
        first.save(state(), 5)
    for method in ("resume", "save"):
        manager = open_manager(fresh=True)
        if method == "resume":
            assert not manager.resume()
        manager.save(state(), 2)
        assert manager.all_steps() == [2]
        manager.close()
    assert len([key for key in store.objects if "/archive/" in key]) == 2


def test_another_run_in_the_root_is_named(open_manager: Callable[..., CheckpointManager]) -> None:
    with open_manager(run="a") as first:
        first.save(state(), 5)
    with pytest.raises(AlreadyExistsError, match=r"holds run 'a' \(newest step 5\), and the config says run 'b'"):
        open_manager(run="b").resume()


@pytest.mark.parametrize("was_on", [True, False])
def test_a_save_of_many_new_tensors_is_not_held_up_by_the_garbage_collector(
    open_manager: Callable[..., CheckpointManager], was_on: bool
) -> None:
    """It would look at all of them again for every few hundred that are planned."""
    manager, looks = open_manager(background=True), []
    state = {str(number): torch.zeros(1) for number in range(5000)}

    def watch(phase: str, info: dict[str, int]) -> None:
        looks.append(threading.current_thread())

    if not was_on:
        gc.disable()
    gc.callbacks.append(watch)
    try:
        manager.save(state, 1)
        assert looks.count(threading.current_thread()) <= 2  # the start and stop of one, when all is planned
        assert gc.isenabled() is was_on
    finally:
        gc.callbacks.remove(watch)
        gc.enable()


def test_a_run_without_a_name_gets_one_and_keeps_it(open_manager: Callable[..., CheckpointManager]) -> None:
    with open_manager(run=None) as first:
        first.save(state(), 1)
        name = first.info(1).manifest.run  # type: ignore[union-attr]
    with open_manager(run=None) as second:
        second.resume()
        second.save(state(), 2)
        manifest = second.info(2).manifest
    assert manifest is not None
    assert (manifest.run, manifest.attempt, manifest.parent) == (name, 2, 1)


def test_checkpoints_of_another_run_are_not_rotated(
    open_manager: Callable[..., CheckpointManager], store: MemoryStore
) -> None:
    other = MemoryStore()
    with open_manager(store=other, run="other", name="old-{step}") as first:
        first.save(state(), 1)
    manager = open_manager(keep={"last": 1})
    manager.save(state(), 10)
    store.objects.update({key: value for key, value in other.objects.items() if key.startswith("old-")})
    manager.save(state(), 11)
    manager.save(state(), 12)
    assert manager.all_steps() == [12]
    assert store.stat("old-1/manifest.json") is not None


def test_a_second_manager_is_refused_and_may_take_over(open_manager: Callable[..., CheckpointManager]) -> None:
    first = open_manager()
    first.save(state(), 1)
    with pytest.raises(FencedError, match="this very process"):
        open_manager().resume()
    second = open_manager(takeover=True)
    assert second.resume().step == 1
    with pytest.raises(FencedError):
        first.save(state(), 2)
    second.save(state(), 2)
    assert second.all_steps() == [1, 2]


def test_a_manager_that_nobody_closed_does_not_stand_in_the_way_once_it_is_dropped(tmp_path: Path) -> None:
    for root in (str(tmp_path), f"memory://{tmp_path.name}"):
        for step in (1, 2, 3):  # the same cell of a notebook, run again
            manager = CheckpointManager(root, background=False)
            assert manager.resume().step == step - 1
            manager.save(state(), step)
            del manager


def test_a_manager_that_nobody_closed_watches_no_signals_once_it_is_dropped(tmp_path: Path) -> None:
    manager = CheckpointManager(str(tmp_path), save={"on_signals": ["SIGUSR1"]})
    watch = weakref.ref(manager._signals)
    gc.disable()  # it goes by itself, not when the collector comes round
    try:
        del manager
        assert watch() is None
    finally:
        gc.enable()


def test_a_fenced_writer_stops_even_under_on_error_warn(open_manager: Callable[..., CheckpointManager]) -> None:
    first = open_manager(on_error="warn")
    first.save(state(), 1)
    open_manager(takeover=True).resume()
    with pytest.raises(FencedError):
        first.save(state(), 2)


def test_another_writer_is_found_out_by_preparing_and_not_by_the_first_save(
    open_manager: Callable[..., CheckpointManager],
) -> None:
    open_manager().prepare(state())
    second = open_manager()
    with pytest.raises(FencedError, match="this very process"):
        second.prepare(state())
    open_manager(read_only=True).prepare(state())


def test_a_reader_works_beside_a_writer_and_never_writes(
    open_manager: Callable[..., CheckpointManager], store: MemoryStore
) -> None:
    writer = open_manager()
    writer.save(state(7), 7)
    before = dict(store.objects)
    reader = open_manager(read_only=True)
    assert reader.latest_step() == 7
    target = torch.zeros(3)
    assert reader.resume(x=target).step == 7
    assert target[0] == 7
    assert reader.verify() == []
    with pytest.raises(ConfigError, match="read_only=True"):
        reader.save(state(), 8)
    with pytest.raises(ConfigError, match="read_only=True"):
        reader.delete(7)
    reader.close()
    assert store.objects == before


def test_a_closed_manager_does_not_save(open_manager: Callable[..., CheckpointManager]) -> None:
    manager = open_manager()
    manager.close()
    with pytest.raises(ConfigError, match="is closed; open a new one"):
        manager.save(state(), 1)


def test_rewind_goes_back_and_keeps_the_newer_data(
    open_manager: Callable[..., CheckpointManager], store: MemoryStore
) -> None:
    manager = open_manager(keep={"last": None}, save={"every_steps": 1})
    saved_steps(manager, range(1, 5))
    manager.rewind(2)
    assert manager.all_steps() == [1, 2]
    assert store.get("latest") == b"step-00000002\n"
    assert saved_steps(manager, range(3, 5)) == [3, 4]
    assert len([key for key in store.objects if "/archive/" in key]) == 2


def test_a_rewind_that_dies_half_way_leaves_an_unbroken_branch(open_manager: Callable[..., CheckpointManager]) -> None:
    for point in range(1, 8):
        store = MemoryStore()
        with open_manager(store=store, keep={"last": None}) as manager:
            for step in range(1, 5):
                manager.save(state(), step)
        crashing = CrashingStore(store)
        dying = open_manager(store=crashing, keep={"last": None})
        dying.resume()
        crashing.after = crashing.count + point
        try:
            dying.rewind(1)
        except Crash:
            left = open_manager(store=store, read_only=True).all_steps()
            assert left == list(range(1, len(left) + 1))
            crashing.after, crashing._dead = None, False  # or closing it would die, too


def test_retention_that_fails_is_a_warning_and_the_save_stands(
    open_manager: Callable[..., CheckpointManager], caplog: pytest.LogCaptureFixture
) -> None:
    class Undeletable(MemoryStore):
        def delete(self, keys: Any) -> None:
            keys = list(keys)
            if any(key.startswith("step-") for key in keys):
                raise StoreError("no permission to delete")
            super().delete(keys)

    manager = open_manager(store=Undeletable(), keep={"last": 1})
    manager.save(state(), 1)
    manager.save(state(), 2)
    assert "retention.failed step=2" in caplog.text
    assert manager.all_steps() == [1, 2]


def test_each_commit_is_one_log_line(
    open_manager: Callable[..., CheckpointManager], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "ckptmgr.save")
    open_manager().save(state(), 3)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "ckptmgr.save"]
    assert line.startswith("save.commit.done step=3 url=memory-store:/step-00000003 bytes=")
    assert line.endswith("reason=save()")


def test_manifests_hold_no_storage_options(tmp_path: Path) -> None:
    with CheckpointManager(str(tmp_path), background=False, storage={"options": {"secret": "hunter2"}}) as manager:
        manager.save(state(), 1)
        assert "hunter2" not in repr(manager.config)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"hunter2" not in path.read_bytes()


def test_a_process_group_of_one_rank_is_no_group(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        with CheckpointManager(str(tmp_path / "one")) as manager:
            manager.save(state(), 1)
        assert manager.info(1).manifest.world_size == 1
    finally:
        torch.distributed.destroy_process_group()


def test_a_save_in_flight_is_completed_when_the_script_just_ends(tmp_path: Path) -> None:
    import subprocess
    import sys

    code = (
        "import sys, torch; from ckptmgr import CheckpointManager\n"
        "CheckpointManager(sys.argv[1]).save({'x': torch.arange(1000)}, 5)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    with CheckpointManager(str(tmp_path), read_only=True) as manager:
        assert torch.equal(manager.load()["x"], torch.arange(1000))


@pytest.mark.parametrize("wrong", [1.5, -1, True, "7", None])
def test_steps_and_epochs_that_count_nothing_are_refused(
    open_manager: Callable[..., CheckpointManager], wrong: Any
) -> None:
    manager = open_manager(save={"every_steps": 1})
    with pytest.raises(ConfigError, match=rf"step={wrong!r}: step counts completed steps"):
        manager.save(state(), wrong)
    if wrong is not None:
        with pytest.raises(ConfigError, match="epoch counts completed epochs"):
            manager.maybe_save(state(), 1, epoch=wrong)
    assert manager.all_steps() == []


def test_whole_numbers_of_other_kinds_count(open_manager: Callable[..., CheckpointManager]) -> None:
    manager = open_manager()
    manager.save(state(), np.int64(7), epoch=torch.tensor(2))  # type: ignore[arg-type]
    assert manager.resume(step=np.int64(7)).epoch == 2  # type: ignore[arg-type]


def test_after_going_back_the_steps_ahead_are_saved_again(open_manager: Callable[..., CheckpointManager]) -> None:
    manager = open_manager(save={"every_steps": 100}, keep={"last": None})
    for step in (100, 200):
        manager.maybe_save(state(step), step)
    manager.resume(step=100)
    assert manager.maybe_save(state(-1), 200) is not None
    assert manager.load(200)["x"][0] == -1
    manager.delete(200)
    manager.request_save()
    assert manager.maybe_save(state(-2), 200) is not None
    assert manager.all_steps() == [100, 200]


def test_a_fenced_writer_changes_nothing_of_the_new_one(open_manager: Callable[..., CheckpointManager]) -> None:
    old = open_manager(keep={"last": None})
    for step in (100, 200):
        old.save(state(), step)
    new = open_manager(takeover=True, keep={"last": None})
    new.resume()
    new.save(state(), 300)
    for change in (
        lambda: old.resume(step=100), lambda: old.rewind(100), lambda: old.delete(300), lambda: old.prune()
    ):  # fmt: skip
        with pytest.raises(FencedError):
            change()
    assert new.all_steps() == [100, 200, 300]


def test_a_last_save_is_never_made_of_a_state_that_was_rolled_back(
    open_manager: Callable[..., CheckpointManager],
) -> None:
    for go_back in ("resume", "rewind"):
        manager = open_manager(save={"every_steps": 100, "on_close": True}, keep={"last": None}, fresh=True)
        manager.maybe_save(state(), 100)
        manager.maybe_save(state(), 150)
        manager.resume(step=100) if go_back == "resume" else manager.rewind(100)
        manager.close()
        assert open_manager(read_only=True).all_steps() == [100]


def test_a_loop_that_begins_again_too_early_is_told_so(open_manager: Callable[..., CheckpointManager]) -> None:
    manager = open_manager(save={"every_steps": 100})
    manager.save(state(), 1000)
    with pytest.raises(ConfigError, match=r"step went back from 1000 to 1 in .*resume\(\).step \+ 1"):
        manager.maybe_save(state(), 1)
    with pytest.raises(ConfigError, match="went back"):
        manager.save(state(), 999)
    manager.close()
    assert open_manager(read_only=True).all_steps() == [1000]


def test_a_signal_saves_even_when_busy_saves_are_skipped(
    open_manager: Callable[..., CheckpointManager], store: MemoryStore
) -> None:
    gate = threading.Event()
    gate.set()
    slow = SlowStore(store, gate=gate)
    manager = open_manager(store=slow, background=True, when_busy="skip", save={"every_steps": 100})
    manager.resume()
    gate.clear()
    manager.maybe_save(state(), 100)
    os.kill(os.getpid(), signal.SIGTERM)
    assert slow.waiting.wait(60)
    gate.set()
    assert manager.maybe_save(state(), 150) is not None
    manager.close()
    assert open_manager(read_only=True).all_steps() == [100, 150]


@pytest.mark.parametrize("by", ["signal", "request"])
def test_a_signal_after_the_last_call_is_answered_by_close(
    open_manager: Callable[..., CheckpointManager], by: str
) -> None:
    manager = open_manager(save={"every_steps": 100})
    manager.maybe_save(state(), 199)
    os.kill(os.getpid(), signal.SIGTERM) if by == "signal" else manager.request_save()
    manager.close()
    assert open_manager(read_only=True).all_steps() == [199]


def test_a_state_that_cannot_be_captured_leaves_the_save_due(open_manager: Callable[..., CheckpointManager]) -> None:
    manager = open_manager(save={"every_steps": 100})

    def broken() -> dict[str, Any]:
        raise KeyError("no model yet")

    with pytest.raises(KeyError):
        manager.maybe_save(broken, 100)
    assert manager.maybe_save(state(), 100) is not None


def test_close_makes_the_last_save_although_an_earlier_one_failed(
    open_manager: Callable[..., CheckpointManager],
) -> None:
    store = FullStore()
    manager = open_manager(store=store, background=True, save={"every_steps": 100, "on_close": True})
    manager.resume()
    pending = manager.maybe_save(state(), 100)
    assert pending is not None
    pending.settle()
    store.full = False
    manager._last_call = (state(), 150, None, None)
    with pytest.raises(SaveFailedError, match="step 100"):
        manager.close()
    assert open_manager(store=store, read_only=True).all_steps() == [150]


def test_a_failed_save_is_logged_even_if_nobody_asks(
    open_manager: Callable[..., CheckpointManager], caplog: pytest.LogCaptureFixture
) -> None:
    open_manager(store=FullStore(), background=True).save(state(), 1).settle()
    assert [r.levelname for r in caplog.records if "save.failed step=1" in r.getMessage()] == ["ERROR"]


def test_leaving_by_sys_exit_without_an_error_closes_as_usual(open_manager: Callable[..., CheckpointManager]) -> None:
    def train(code: int) -> None:
        with open_manager(save={"on_close": True}) as manager:
            manager.maybe_save(state(), 1)
            raise SystemExit(code)

    with pytest.raises(SystemExit):
        train(1)
    assert open_manager(read_only=True).all_steps() == []
    with pytest.raises(SystemExit):
        train(0)
    assert open_manager(read_only=True).all_steps() == [1]


def test_close_raises_what_the_last_save_failed_with_under_on_error_warn_too(
    open_manager: Callable[..., CheckpointManager],
) -> None:
    manager = open_manager(store=FullStore(), on_error="warn")
    manager.save(state(), 1)
    with pytest.raises(SaveFailedError, match="step 1"):
        manager.close()


def test_a_failure_between_two_looks_is_not_missed(open_manager: Callable[..., CheckpointManager]) -> None:
    store = FullStore()
    gate = threading.Event()
    slow = SlowStore(store, gate=gate)
    gate.set()
    manager = open_manager(store=slow, background=True, save={"every_steps": 100})
    manager.resume()
    gate.clear()
    pending = manager.maybe_save(state(), 100)
    assert pending is not None
    looked = manager._worker.raise_failure

    def look_then_fail() -> None:
        looked()
        gate.set()
        pending.settle()

    manager._worker.raise_failure = look_then_fail  # type: ignore[method-assign]
    manager._schedule.alert()
    assert manager.maybe_save(state(), 101) is None
    del manager._worker.raise_failure  # type: ignore[method-assign]
    with pytest.raises(SaveFailedError, match="step 100"):
        manager.maybe_save(state(), 102)


def test_a_rewind_to_a_damaged_step_changes_nothing(
    open_manager: Callable[..., CheckpointManager], store: MemoryStore
) -> None:
    manager = open_manager(keep={"last": None})
    for step in (50, 100, 200):
        manager.save(state(), step)
    store.put("step-00000100/x.safetensors", b"cut")
    with pytest.raises(DamagedError, match=r"x\.safetensors"):
        manager.rewind(100)
    store.put("step-00000100/manifest.json", b"cut")
    with pytest.raises(DamagedError, match="rewind to another"):
        manager.rewind(100)
    assert manager.all_steps() == [50, 200]


@pytest.mark.parametrize("name", ["step", "strict", "skip", "map_location", "rng"])
def test_entries_that_resume_would_take_for_arguments_are_refused(
    open_manager: Callable[..., CheckpointManager], name: str
) -> None:
    with pytest.raises(ConfigError, match=f"can't be named {name}"):
        open_manager().save({name: 1}, 1)


def test_a_step_ahead_of_an_older_attempt_does_not_stand_in_the_way(
    open_manager: Callable[..., CheckpointManager],
) -> None:
    frozen = open_manager(keep={"last": None})
    frozen.save(state(), 200)
    new = open_manager(takeover=True, keep={"last": None})
    new.resume()
    frozen._run.check = lambda: None  # type: ignore[method-assign]  # it looked before it froze, and commits now
    frozen._saver.start({"x": 1}, frozen._request(300, None, None), Solo(), list, frozen._worker, list)
    new.save(state(), 250)
    new.close()
    third = open_manager(save={"every_steps": 100}, keep={"last": None})
    assert third.resume().step == 250
    assert third.maybe_save(state(7), 300) is not None
    assert third.load(300)["x"][0] == 7


def test_a_closed_manager_takes_no_lock_again(open_manager: Callable[..., CheckpointManager]) -> None:
    manager = open_manager()
    manager.save(state(), 1)
    manager.close()
    for call in (manager.resume, manager.prune, lambda: manager.delete(1), lambda: manager.rewind(1)):
        with pytest.raises(ConfigError, match="is closed; open a new one"):
            call()
    assert open_manager().resume().step == 1


def test_what_cannot_be_meant_is_refused(open_manager: Callable[..., CheckpointManager]) -> None:
    manager = open_manager()
    with pytest.raises(ConfigError, match=r"give a list of tags: \['paper'\]"):
        manager.save(state(), 1, tags="paper")
    with pytest.raises(ConfigError, match="state must be a mapping"):
        manager.save(torch.nn.Linear(1, 1), 1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="metric 'x'"):
        manager.save(state(), 1, metrics={"x": 10**400})
    manager.save(state(), 1)
    with pytest.raises(ConfigError, match="ttl=-1"):
        manager.pin(1, ttl=-1)
    manager.pin(1, ttl="7d")
    with pytest.raises(ConfigError, match="choose one"):
        open_manager(fresh=True, read_only=True)


def test_a_mark_that_cannot_be_written_does_not_hide_the_sound_one(
    open_manager: Callable[..., CheckpointManager], caplog: pytest.LogCaptureFixture
) -> None:
    class Full(MemoryStore):
        def put(self, key: str, data: Any, *, create: bool = False) -> None:
            if "/damaged/" in key:
                raise StoreError("no space left")
            super().put(key, data, create=create)

    store = Full()
    with open_manager(store=store, keep={"last": None}) as manager:
        for step in (1, 2):
            manager.save(state(), step)
    store.objects["step-00000002/x.safetensors"] = (b"cut", 0.0)
    assert open_manager(store=store).resume().step == 1
    assert "damage.mark.failed" in caplog.text


def test_a_pin_belongs_to_one_checkpoint_and_goes_with_it(open_manager: Callable[..., CheckpointManager]) -> None:
    manager = open_manager(keep={"last": None})
    for step in (100, 200):
        manager.save(state(), step)
    manager.pin(200, "paper")
    manager.resume(step=100)
    manager.save(state(7), 200)
    assert manager.info(200).pins == ()
    with pytest.raises(NotFoundError):
        manager.load("paper")


def test_a_pin_that_cannot_be_written_fails_the_save(open_manager: Callable[..., CheckpointManager]) -> None:
    class NoPins(MemoryStore):
        def put(self, key: str, data: Any, *, create: bool = False) -> None:
            if "/pins/" in key:
                raise StoreError("no permission to write pins")
            super().put(key, data, create=create)

    manager = open_manager(store=NoPins())
    with pytest.raises(SaveFailedError, match="no permission to write pins"):
        manager.save(state(), 1, pin=True)
    assert manager.all_steps() == []


def test_overwriting_with_a_pin_replaces_all_the_same(open_manager: Callable[..., CheckpointManager]) -> None:
    manager = open_manager(keep={"last": 1})
    manager.save(state(1), 1)
    manager.save(state(2), 1, pin=True, overwrite=True)
    manager.save(state(3), 2)
    assert manager.all_steps() == [1, 2]
    assert manager.load(1)["x"][0] == 2
    assert manager.unpin(1) == 1


def test_a_tag_names_one_checkpoint(open_manager: Callable[..., CheckpointManager]) -> None:
    manager = open_manager()
    manager.save(state(), 1, tags=["paper"])
    with pytest.raises(ConfigError, match="tag 'paper' is on step 1"):
        manager.save(state(), 2, tags=["paper"])


def test_deleting_one_of_two_of_a_step_needs_its_name(
    open_manager: Callable[..., CheckpointManager], store: MemoryStore
) -> None:
    with open_manager(keep={"last": None}) as manager:
        for step in (1, 2):
            manager.save(state(), step)
    store.put("step-00000002/x.safetensors", b"cut")
    with open_manager(keep={"last": 9}) as manager:
        assert manager.resume().step == 1
        manager.save(state(), 2)
        with pytest.raises(ConfigError, match=r"several checkpoints: step-00000002\.2, step-00000002; delete one"):
            manager.delete(2)
        manager.delete("step-00000002")
        assert manager.info(2).name == "step-00000002.2"


def test_a_request_that_comes_while_a_state_is_written_is_for_the_next_save(tmp_path: Path) -> None:
    """What is being written was captured before it."""

    class Asking(MemoryStore):
        ask: Any = None

        def writer(self, key: str, size: int | None = None) -> Any:
            if self.ask is not None:
                self.ask, ask = None, self.ask
                ask("while writing")
            return super().writer(key, size)

    store = Asking()
    manager = CheckpointManager("root", store=store, background=False, save={"every_steps": 10})
    store.ask = manager.request_save
    assert manager.maybe_save({"x": 1}, 10) is not None
    assert manager.maybe_save({"x": 1}, 11) is not None
    assert manager.maybe_save({"x": 1}, 12) is None
    manager.close()


def test_a_closed_manager_says_so_at_the_next_call_and_keeps_no_state(tmp_path: Path) -> None:
    manager = CheckpointManager(tmp_path, save={"every_steps": 100})
    model = nn.Linear(1, 1)
    gone = weakref.ref(model)
    assert manager.maybe_save({"model": model}, 1) is None
    manager.close()
    del model
    gc.collect()
    assert gone() is None
    with pytest.raises(ConfigError, match="is closed; open a new one"):
        manager.maybe_save({"x": 1}, 2)


def test_a_save_that_was_interrupted_as_it_began_is_waited_for_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next one would overwrite the copy that it is being written from."""
    submit = ThreadPoolExecutor.submit

    def interrupted(pool: Any, *args: Any) -> Any:
        submit(pool, *args)
        if pool._thread_name_prefix == "ckptmgr-save":
            monkeypatch.undo()
            raise KeyboardInterrupt

    manager = CheckpointManager(tmp_path, keep={"last": None})
    weights = torch.zeros(1 << 20)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        manager.save({"w": weights}, 1)
    weights.fill_(7)
    manager.save({"w": weights}, 2)
    manager.close()
    assert [manager.load(step)["w"].unique().tolist() for step in (1, 2)] == [[0], [7]]


def test_a_failed_save_keeps_nothing_of_the_state_alive() -> None:
    for background in (True, False):
        manager = CheckpointManager("root", store=FullStore(), background=background, on_error="warn")
        weights = torch.zeros(1000)
        gone = weakref.ref(weights)
        pending = manager.save({"w": weights}, 1)
        pending.settle()
        del weights
        gc.collect()
        assert (gone() is None, isinstance(pending.error, SaveFailedError)) == (True, True)
        with pytest.raises(SaveFailedError):
            manager.close()


def test_a_state_that_does_not_fit_twice_is_saved_while_training_waits_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with CheckpointManager(tmp_path, max_staging="1KiB", keep={"last": None}) as manager:
        pendings = [manager.save({"w": torch.full((1000,), float(step))}, step) for step in (1, 2)]
        assert [pending.in_background for pending in pendings] == [False, False]
        assert caplog.text.count("training waits for the whole save") == 1
        assert manager.load(2)["w"].unique().tolist() == [2]


@pytest.mark.parametrize(("grace", "in_background"), [("1h", True), ("0.000001s", False), (None, True)])
def test_a_save_that_does_not_fit_before_the_end_is_written_without_a_copy_and_says_so(
    open_manager: Callable[..., CheckpointManager],
    caplog: pytest.LogCaptureFixture,
    grace: str | None,
    in_background: bool,
) -> None:
    manager = open_manager(save={"grace": grace}, background=True)
    manager.save(state(), 1).wait()
    os.kill(os.getpid(), signal.SIGTERM)
    pending = manager.maybe_save(state(7), 2)
    assert pending is not None
    assert (manager.should_stop, pending.in_background) == (True, in_background)
    assert ("save.hurry: the last save took" in caplog.text) is not in_background
    manager.close()
    assert manager.load(2)["x"][0] == 7


def cut(store: MemoryStore, step: int) -> None:
    """Take the last byte of a checkpoint's weights."""
    (key,) = (key for key in store.objects if key.startswith(f"step-{step:08d}/") and key.endswith(".safetensors"))
    store.put(key, store.get(key)[:-1])


def test_a_prune_counts_only_those_whose_files_have_the_right_sizes(
    open_manager: Callable[..., CheckpointManager], store: MemoryStore
) -> None:
    manager = open_manager(keep={"last": 3})
    for step in (1, 2, 3):
        manager.save(state(step), step)
    manager.close()
    cut(store, 3)
    manager = open_manager(keep={"last": 1})
    assert [verdict.info.step for verdict in manager.prune(dry_run=True).drop] == [1]
    assert manager.info(3).damaged is None  # a dry run leaves no mark
    assert [verdict.info.step for verdict in manager.prune().drop] == [1]
    assert "x.safetensors: has" in str(manager.info(3).damaged)
    assert manager.resume().step == 2


def test_metrics_without_the_one_of_keep_best_are_warned_of_once(
    open_manager: Callable[..., CheckpointManager], caplog: pytest.LogCaptureFixture
) -> None:
    manager = open_manager(keep={"best": {"metric": "val_loss", "mode": "min"}})
    manager.save(state(), 1)  # none at all: nobody meant to be ranked
    manager.save(state(), 2, metrics={"val_loss": 1.0, "acc": 0.5})
    assert "keep.best" not in caplog.text
    for step in (3, 4):
        manager.save(state(), step, metrics={"acc": 0.5, "valloss": 1.0})
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert told == [
        "keep.best.missing step=3 metric=val_loss: this save has acc, valloss, and one without it is never the best; "
        "did you mean valloss?"
    ]


@pytest.mark.parametrize("can_rename", [True, False])
def test_a_checkpoint_is_no_root_and_stays_as_it_is(can_rename: bool) -> None:
    root = MemoryStore(can_rename=can_rename)
    with CheckpointManager("root", store=root, background=False) as manager:
        manager.save(state(), 1)
    inside = MemoryStore(can_rename=can_rename)
    inside.objects = {
        key.removeprefix("step-00000001/"): value for key, value in root.objects.items() if key.startswith("step-")
    }
    before = dict(inside.objects)
    calls: list[tuple[dict[str, bool], Callable[[CheckpointManager], object]]] = [
        ({}, lambda manager: manager.resume()),
        ({}, lambda manager: manager.save(state(), 2)),
        ({}, lambda manager: manager.prepare(state())),
        ({"fresh": True}, lambda manager: manager.resume()),
        ({"read_only": True}, lambda manager: manager.resume()),
        ({"read_only": True}, lambda manager: manager.load()),
        ({"read_only": True}, lambda manager: manager.load(1)),
    ]
    for settings, call in calls:
        manager = CheckpointManager("inside", store=inside, background=False, **settings)
        with pytest.raises(ConfigError, match=r"is a checkpoint itself; give the folder above it.*warm_start"):
            call(manager)
        manager.close()
    assert inside.objects == before


def test_a_root_where_a_run_began_inside_a_checkpoint_and_saved_nothing_is_told_so_too(
    open_manager: Callable[..., CheckpointManager], store: MemoryStore
) -> None:
    manager = open_manager()
    manager.prepare(state())
    manager.close()
    with CheckpointManager("other", store=(other := MemoryStore()), background=False) as source:
        source.save(state(), 1)
    store.put("manifest.json", other.get("step-00000001/manifest.json"))
    for fresh in (False, True):
        manager = open_manager(fresh=fresh)
        with pytest.raises(ConfigError, match="is a checkpoint itself"):
            manager.save(state(), 2)
        manager.close()


def test_another_ones_manifest_json_does_not_stand_in_the_way_of_a_run(
    open_manager: Callable[..., CheckpointManager], store: MemoryStore
) -> None:
    store.put("manifest.json", b'{"name": "a web page"}')
    manager = open_manager()
    assert not manager.resume()
    manager.save(state(), 1)
    assert manager.all_steps() == [1]
