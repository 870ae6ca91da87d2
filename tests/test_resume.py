"""Resume returns the newest good checkpoint, bit for bit, says what it skipped, and never starts fresh silently."""

from __future__ import annotations

import enum
import gc
import json
import random
import shutil
import sys
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

from ckptmgr import (
    CheckpointManager,
    ConfigError,
    DamagedError,
    FormatVersionError,
    NotFoundError,
    StateMismatchError,
    StoreError,
    per_rank,
)
from ckptmgr.config import load_config
from ckptmgr.restart import Restart
from ckptmgr.run import Run
from ckptmgr.testing import MemoryStore, ThreadRanks


def network(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Dropout(0.5), nn.Linear(width, 1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 3)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def manager(root: Any, **overrides: Any) -> CheckpointManager:
    settings: dict[str, Any] = {"background": False, "run": "test", "keep": {"last": None}}
    if isinstance(root, MemoryStore):
        return CheckpointManager("memory-store:", store=root, **{**settings, **overrides})
    return CheckpointManager(str(root), **{**settings, **overrides})


def snapshots(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Steps 1 to 4 of a network and its optimizer."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    with manager(tmp_path / "run") as mgr:
        for step in (1, 2, 3, 4):
            train(model, optimizer, 1)
            mgr.save(
                {"model": model, "optimizer": optimizer, "tokens": 100 * step}, step, epoch=1, metrics={"loss": 0.5}
            )
    return tmp_path / "run"


def spoil(root: Path, step: int, name: str = "model.safetensors") -> None:
    path = root / f"step-{step:08d}" / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("format", ["safetensors", "torch"])
def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path: Path, format: str, background: bool) -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    model, steps = network(), 6
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    with manager(tmp_path, format=format, background=background) as mgr:
        train(model, optimizer, steps)
        scheduler.step()
        mgr.save({"model": model, "optimizer": optimizer, "scheduler": scheduler, "tokens": 7}, steps, epoch=2)
    losses = train(model, optimizer, steps)
    draws = (random.random(), np.random.rand(), torch.rand(1).item())

    other = network()
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.5)
    other_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(other_optimizer, 3)
    start = manager(tmp_path).resume(other, other_optimizer, scheduler=other_scheduler)
    assert (start.step, start.epoch, start.values, bool(start)) == (steps, 2, {"tokens": 7}, True)
    assert set(start.rng.restored) >= {"python", "numpy", "torch"}
    assert other_scheduler.last_epoch == 1
    assert train(other, other_optimizer, steps) == losses
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == draws
    assert same(snapshots(model), snapshots(other))


@pytest.mark.filterwarnings("ignore:'set_vital'")
@pytest.mark.parametrize("workers", [0, 1])
def test_data_order_and_generators_go_on_from_any_step_of_any_epoch(tmp_path: Path, workers: int) -> None:
    def run(resume_at: int | None) -> list[tuple[int, list[int], float]]:
        torch.manual_seed(0 if resume_at is None else 99)
        loader = StatefulDataLoader(list(range(6)), batch_size=2, shuffle=True, num_workers=workers)
        seen = []
        with manager(tmp_path, save={"every_steps": 1}, read_only=resume_at is not None) as mgr:
            step = mgr.resume(loader=loader, step=resume_at).step
            while step < 8:
                for batch in loader:
                    step += 1
                    seen.append((step, batch.tolist(), torch.rand(1).item()))
                    if resume_at is None:
                        mgr.maybe_save({"loader": loader}, step)
                    if step == 8:
                        break
        return seen

    whole = run(None)
    for step in range(1, 8):
        assert run(step) == whole[step:]


def test_a_fresh_root_answers_falsy_and_touches_nothing(tmp_path: Path) -> None:
    model = network()
    before = snapshots(model)
    start = manager(tmp_path).resume(model, torch.optim.AdamW(model.parameters()))
    assert (bool(start), start.step, start.epoch, start.values, start.url) == (False, 0, 0, {}, None)
    assert same(before, snapshots(model))


def test_without_targets_the_whole_state_is_in_values(root: Path) -> None:
    values = manager(root).resume().values
    assert list(values) == ["model", "optimizer", "tokens"]
    assert values["tokens"] == 400
    assert values["model"]["0.weight"].shape == (4, 3)
    assert values["optimizer"]["state"][0]["step"] == 4


def test_resume_of_the_model_alone_leaves_the_rest_in_values(root: Path) -> None:
    model = network()
    start = manager(root).resume(model)
    assert sorted(start.values) == ["optimizer", "tokens"]
    assert same(snapshots(model), manager(root, read_only=True).load()["model"])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_is_skipped_reported_and_marked(
    root: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = manager(root, read_only=True).load(3)["model"]
    spoil(root, 4, name)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    with manager(root) as mgr:
        start = mgr.resume(model, optimizer)
        assert start.step == 3
        assert same(snapshots(model), expected)
        (skipped,) = start.skipped
        assert skipped.step == 4
        assert name in skipped.reason or "manifest" in skipped.reason
        assert "resume.skip.damaged step=4" in caplog.text
        assert mgr.latest_step() == 3
        mgr.save({"model": model}, 4)  # the damaged one does not stand in the way
        assert mgr.all_steps() == [1, 2, 3, 4]
    with manager(root) as again:
        assert again.resume(network()).step == 4


def test_a_missing_file_is_damage(root: Path) -> None:
    (root / "step-00000004" / "model.safetensors").unlink()
    start = manager(root).resume(network())
    assert start.step == 3
    assert "model.safetensors: missing" in start.skipped[0].reason


def test_when_nothing_can_be_loaded_it_is_an_error_that_lists_why(root: Path) -> None:
    for step in (1, 2, 3, 4):
        spoil(root, step)
    with pytest.raises(DamagedError, match=r"(?s)can't be loaded.*step 4: .*step 1: .*resume\(step=...\).*fresh=True"):
        manager(root).resume(network())
    with pytest.raises(DamagedError):  # still, now that they are marked
        manager(root).resume(network())


def test_damage_that_is_repaired_by_hand_can_be_loaded_by_step(root: Path) -> None:
    spoil(root, 4)
    with manager(root) as mgr:
        assert mgr.resume(network()).step == 3
    with manager(root, read_only=True) as reader, pytest.raises(DamagedError):
        reader.resume(network(), step=4)


def test_retention_keeps_the_damaged_until_enough_good_ones_are_newer(root: Path) -> None:
    spoil(root, 4)
    with manager(root, keep={"last": 2}) as mgr:
        mgr.resume(network())
        assert mgr.info(4).damaged is not None
        mgr.save({"x": 1}, 5)
        assert mgr.info(4).damaged is not None
        mgr.save({"x": 1}, 6)
        assert mgr.all_steps() == [5, 6]
        with pytest.raises(NotFoundError):
            mgr.info(4)


def test_going_back_to_a_step_archives_the_newer_ones(root: Path) -> None:
    model = network()
    with manager(root) as mgr:
        assert mgr.resume(model, step=2).step == 2
        assert mgr.all_steps() == [1, 2]
        assert (root / "latest").read_text() == "step-00000002\n"
        mgr.save({"model": model}, 3)
        assert mgr.info(3).manifest.parent == 2  # type: ignore[union-attr]
    assert (root / "step-00000003" / "model.safetensors").exists()
    assert (root / "step-00000003.2" / "manifest.json").exists()
    with manager(root) as again:
        assert again.resume(network()).url == str(root / "step-00000003.2")


def test_a_step_that_is_not_there_is_an_error_that_says_what_is(root: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no checkpoint step 9 in .*; steps there: 4, 3, 2, 1"):
        manager(root).resume(network(), step=9)


def test_resume_takes_best_and_tags(tmp_path: Path) -> None:
    with manager(tmp_path, keep={"last": None, "best": {"metric": "loss", "mode": "min"}}) as mgr:
        for step, loss in ((1, 0.5), (2, 0.0), (3, 0.7)):
            mgr.save({"x": step}, step, metrics={"loss": loss}, tags=[f"t{step}"])
        assert mgr.load("best") == {"x": 2}
        assert mgr.load("t3") == {"x": 3}
        assert mgr.all_steps() == [2, 3]  # the best and the newest
        assert mgr.resume(step="best").values == {"x": 2}
        assert mgr.all_steps() == [2]


def test_everything_that_does_not_fit_is_listed_and_nothing_is_touched(root: Path) -> None:
    model = network(width=5)
    model.append(nn.Linear(1, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    before = snapshots(model)
    with pytest.raises(StateMismatchError) as caught:
        manager(root).resume(model, optimizer)
    text = str(caught.value)
    for words in ("0.weight", "(4, 3)", "(5, 3)", "3.weight", "4.weight", "4.bias", "strict=False", "skip="):
        assert words in text, text
    assert "\n" in text
    assert same(before, snapshots(model))
    assert optimizer.state == {}


def test_strict_false_loads_what_fits_and_reports_the_rest(root: Path) -> None:
    stored = manager(root, read_only=True).load()["model"]
    model = network()
    model.append(nn.Linear(1, 1))
    start = manager(root).resume(model, strict=False)
    assert {"model.4.weight", "model.4.bias"} <= set(start.missing)
    assert torch.equal(model[0].weight, stored["0.weight"])


def test_skip_leaves_an_entry_alone(root: Path) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    start = manager(root).resume(model, optimizer, skip=["optimizer", "rng"])
    assert start.step == 4
    assert optimizer.state == {}
    assert "optimizer" not in start.values
    assert start.rng.restored == ()
    assert torch.equal(torch.get_rng_state(), before)


def test_map_location_says_where_values_go(root: Path) -> None:
    values = manager(root).resume(map_location="meta").values
    assert values["model"]["0.weight"].device.type == "meta"


def test_today_s_config_does_not_decide_how_old_ones_are_read(root: Path) -> None:
    with manager(root, format="torch", name="s{step}") as mgr:
        assert mgr.resume(network()).step == 4
        mgr.save({"model": network()}, 5)
    with manager(root) as mgr:
        assert mgr.resume(network()).url == str(root / "s5")


def test_a_store_that_is_down_is_not_mistaken_for_damage_or_for_nothing() -> None:
    class Flaky(MemoryStore):
        down: Callable[[str], bool] = staticmethod(lambda key: False)

        def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            if self.down(key):
                raise StoreError("connection reset")
            return super().get(key, start, end)

        def list(self, folder: str = "", *, recursive: bool = False) -> Any:
            if self.down(folder):
                raise StoreError("connection reset")
            return super().list(folder, recursive=recursive)

    store = Flaky()
    with manager(store) as mgr:
        for step in (1, 2):
            mgr.save({"x": torch.ones(2)}, step)
    for broken in (
        lambda key: key.endswith(".safetensors"),
        lambda key: key.endswith("manifest.json"),
        lambda key: not key,
    ):
        store.down = broken
        with manager(store) as mgr, pytest.raises(StoreError, match="connection reset"):
            mgr.resume()
        store.down = lambda key: False
        with manager(store, read_only=True) as reader:
            assert reader.all_steps() == [1, 2]
            assert reader.info(2).damaged is None


def test_a_newer_format_stops_the_resume(root: Path) -> None:
    (root / "step-00000009").mkdir()
    (root / "step-00000009" / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(FormatVersionError, match="version 99; this ckptmgr reads up to 2"):
        manager(root).resume(network())


def test_pickled_objects_need_trust(tmp_path: Path) -> None:
    with manager(tmp_path) as mgr, pytest.warns(UserWarning, match=r"extra\.fn.*trust_pickle"):
        mgr.save({"x": torch.ones(1), "extra": {"fn": print, "n": 3}}, 1)
    with pytest.raises(StateMismatchError, match=r"extra\.fn.*trust_pickle=True"):
        manager(tmp_path).resume()
    assert manager(tmp_path, read_only=True).load(only=["x"])["x"] == 1
    assert manager(tmp_path, read_only=True).resume(skip=["extra"]).values["x"] == 1
    assert manager(tmp_path, trust_pickle=True).resume().values["extra"] == {"fn": print, "n": 3}


def test_full_verification_reads_every_file_first(root: Path) -> None:
    spoil(root, 4, "optimizer.safetensors")
    model = network()
    start = manager(root, verify={"on_resume": "full"}).resume(model, skip=["optimizer"])
    assert start.step == 3


def test_verification_can_be_left_out(root: Path) -> None:
    spoil(root, 4)
    assert manager(root, verify={"on_resume": "size"}, read_only=True).resume(network()).step == 4


def test_a_healthy_older_one_is_named_when_the_newest_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with manager(tmp_path) as mgr:
        mgr.save({"x": 1}, 1)
        mgr.save({"x": 2}, 2, metrics={"loss": float("nan")})
    assert manager(tmp_path).resume().step == 2
    assert "resume.unhealthy step=2" in caplog.text
    assert "resume(step=1)" in caplog.text


def test_loading_latest_passes_over_the_damaged_and_an_exact_step_does_not(root: Path) -> None:
    spoil(root, 4)
    reader = manager(root, read_only=True)
    assert reader.load()["tokens"] == 300
    with pytest.raises(DamagedError, match=r"step-00000004/model\.safetensors"):
        reader.load(4)
    assert reader.info(4).damaged is None  # a reader leaves no mark
    for step in (1, 2, 3):
        spoil(root, step)
    with pytest.raises(DamagedError, match="step-00000004"):
        reader.load()


def test_loading_from_an_empty_root_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="steps there: none"):
        manager(tmp_path, read_only=True).load()
    assert list(tmp_path.iterdir()) == []


def test_best_needs_a_metric(root: Path) -> None:
    reader = manager(root, read_only=True)
    with pytest.raises(ValueError, match=r'"best" needs a metric: set keep\.best'):
        reader.load("best")
    other = manager(root, read_only=True, keep={"best": {"metric": "accuracy", "mode": "max"}})
    assert other.best_step() is None
    with pytest.raises(NotFoundError, match="finite value"):
        other.load("best")


def test_a_checkpoint_folder_can_be_copied_and_still_resumes(root: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(root / "step-00000003", copy / "step-00000003")
    model = network()
    assert manager(copy).resume(model).step == 3
    assert same(snapshots(model), manager(root, read_only=True).load(3)["model"])


def odd(seed: int) -> nn.ModuleDict:
    """Memory of every kind: scattered, permuted, complex, empty, tied, of another precision, larger than a chunk."""
    torch.manual_seed(seed)
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last),
            "norm": nn.BatchNorm2d(8),
            "one": nn.Linear(5, 5),
            "two": nn.Linear(5, 5),
            "small": nn.Linear(4, 4).bfloat16(),
        }
    )
    model["two"].weight = model["one"].weight
    model.register_buffer("scattered", torch.rand(6, 10)[:, ::2])
    model.register_buffer("wide", torch.rand(7, 3, dtype=torch.complex128).t())
    model.register_buffer("large", torch.rand(3, 2000, 700).transpose(0, 1))
    model.register_buffer("none", torch.rand(0, 4))
    return model


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_memory_of_every_kind_is_filled_where_it_is(tmp_path: Path, mode: Callable[[], Any]) -> None:
    with mode():
        model, other = odd(0), odd(1)
        places = {name: (value.data_ptr(), value.stride()) for name, value in other.state_dict().items()}
        with manager(tmp_path) as mgr:
            mgr.save({"model": model}, 1)
            mgr.resume(other)
    assert same(model.state_dict(), other.state_dict())
    assert {name: (value.data_ptr(), value.stride()) for name, value in other.state_dict().items()} == places
    assert other["two"].weight is other["one"].weight


def test_damage_found_half_way_is_overwritten_in_the_optimizer_s_own_state_too(root: Path) -> None:
    expected = manager(root, read_only=True).load(3)
    spoil(root, 4, "optimizer.safetensors")
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 5)
    before = [value["exp_avg"] for value in optimizer.state.values()]
    assert manager(root).resume(model, optimizer).step == 3
    assert same(snapshots(model), expected["model"])
    for index, value in enumerate(optimizer.state.values()):
        assert all(torch.equal(value[key], expected["optimizer"]["state"][index][key]) for key in value)
    assert [id(value["exp_avg"]) for value in optimizer.state.values()] == list(map(id, before))


class Resetting(nn.Module):
    """Loads as some code does: from scratch, and with a look at what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.anchor: dict[str, torch.Tensor] = {}

    def load_state_dict(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        self.layer.reset_parameters()
        self.anchor = dict(state)
        return super().load_state_dict(state, *args, **kwargs)


@pytest.mark.parametrize("kind", ["method", "hook"])
def test_code_that_changes_parameters_before_it_loads_gets_the_checkpoint_s_values(tmp_path: Path, kind: str) -> None:
    """Such a module is given copies, which it may keep: they are not its live parameters."""

    def model() -> nn.Module:
        if kind == "method":
            return Resetting()
        hooked = nn.Linear(4, 4)
        hooked.register_load_state_dict_pre_hook(lambda module, *_: module.weight.data.zero_())
        return hooked

    saved, back = model(), model()
    with CheckpointManager(tmp_path) as manager:
        manager.save({"model": saved}, 1)
    with CheckpointManager(tmp_path) as manager:
        manager.resume(back)
    assert all(map(torch.equal, back.state_dict().values(), saved.state_dict().values()))
    if isinstance(back, Resetting):
        assert back.anchor["layer.weight"].data_ptr() != back.layer.weight.data_ptr()


def test_a_value_whose_class_is_not_imported_is_told_before_a_target_is_touched(tmp_path: Path) -> None:
    module = types.ModuleType("userlib")
    module.Color = enum.Enum("Color", "RED", module="userlib")  # type: ignore[attr-defined, misc]
    sys.modules["userlib"] = module
    extra = {"color": module.Color.RED, "t": torch.ones(2)}
    with CheckpointManager(tmp_path) as manager:
        manager.save({"model": torch.ones(3), "extra": extra}, 1)
    del sys.modules["userlib"]
    model, other = torch.zeros(3), {"color": None, "t": torch.zeros(2)}
    with CheckpointManager(tmp_path) as manager, pytest.raises(StateMismatchError, match="userlib:Color"):
        manager.resume(model, extra=other)
    assert (model.sum(), other["t"].sum()) == (0, 0)  # type: ignore[union-attr]


@pytest.mark.parametrize("digest", ["zz" * 16, "", "00" * 15, 7])
def test_a_digest_that_is_none_is_damage_like_any_other(tmp_path: Path, digest: Any) -> None:
    """Resume goes on to the older checkpoint, also when the manifest's own digest fits."""
    with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            manager.save({"model": torch.full((3,), float(step))}, step)
    path = tmp_path / "step-00000002" / "manifest.json"
    body = json.loads(path.read_text())
    body["files"][0]["digest"] = digest
    del body["digest"]
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()
    path.write_text(json.dumps(body | {"digest": xxhash.xxh3_128_hexdigest(canonical)}))
    model = torch.zeros(3)
    with CheckpointManager(tmp_path) as manager:
        assert manager.resume(model).step == 1


def test_without_garbage_collection_nothing_of_a_state_stays_alive(tmp_path: Path) -> None:
    """Loops that switch it off, to have no pauses, free a dropped model at once."""

    def state() -> dict[str, Any]:
        model, average = nn.Linear(2, 2), nn.Linear(2, 2)
        own = {"table": torch.ones(2), "models": [nn.Linear(2, 2)], "seen": {"count": 1}}
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "average": average, "own": own}

    def parts(state: dict[str, Any]) -> list[weakref.ref[Any]]:
        each = [*list(state.values())[:-1], state["own"]["table"], state["own"]["models"][0]]
        return [weakref.ref(part) for part in (*each, *state["model"].parameters())]

    first = state()
    gone = parts(first)
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with CheckpointManager(tmp_path) as manager:
            manager.resume(**first)
            first["model"](torch.ones(2)).sum().backward()
            first["optimizer"].step()
            manager.save(first, 1).wait()
        second = state()
        gone += parts(second)
        with CheckpointManager(tmp_path) as manager:
            assert manager.resume(**second).step == 1
        del first, second
        assert [one() for one in gone] == [None] * len(gone)
    finally:
        if was_on:
            gc.enable()


def test_a_newest_checkpoint_that_was_deleted_whole_is_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with CheckpointManager(tmp_path, background=False, fsync=False) as mgr:
        mgr.resume()
        for step in (1, 2):
            mgr.save({"x": step}, step)
    shutil.rmtree(tmp_path / "step-00000002")
    with CheckpointManager(tmp_path, read_only=True) as reader:
        assert reader.resume(step=1).step == 1
        assert "newest_gone" not in caplog.text
        assert reader.resume().step == 1
    assert caplog.text.count("resume.newest_gone") == caplog.text.count(f"{tmp_path}/step-00000002") == 1
    caplog.clear()
    shutil.rmtree(tmp_path / "step-00000001")
    with CheckpointManager(tmp_path, read_only=True) as reader:
        assert not reader.resume()
    assert caplog.text.count("resume.newest_gone") == 1


def test_nothing_is_told_of_a_newest_checkpoint_that_is_there_or_was_deleted_through_the_manager(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for turn in range(3):
        with CheckpointManager(tmp_path, background=False, fsync=False) as mgr:
            mgr.resume()
            mgr.save({"x": turn}, 2 * turn + 1)
            mgr.save({"x": turn}, 2 * turn + 2)
            mgr.delete(2 * turn + 2)
    assert "newest_gone" not in caplog.text


# Mistakes of the call


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (float("inf"), "best is a float, which can't be filled in place"),
        ([{"pair": (nn.Linear(1, 1), 3)}], r"best\[0\]\.pair is a tuple of objects and plain values"),
    ],
    ids=["a number", "a mixed tuple"],
)
def test_a_target_that_can_not_be_filled_fails_as_well_when_there_is_nothing_to_fill_it_from(
    tmp_path: Path, value: Any, words: str
) -> None:
    state = {"model": network(), "best": value}
    with manager(tmp_path) as mgr:
        with pytest.raises(ConfigError, match=words) as first:
            mgr.resume(**state)
        assert list(tmp_path.iterdir()) == []  # nor does it keep the root
        assert not mgr.resume(skip=["best"], **state)
        mgr.save(state, 1)
    with pytest.raises(ConfigError) as later:
        manager(tmp_path).resume(**state)
    assert str(later.value) == str(first.value)
    with pytest.raises(ConfigError):
        manager(tmp_path, fresh=True).resume(**state)
    assert manager(tmp_path, read_only=True).all_steps() == [1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_target_that_can_not_be_filled_on_one_rank_fails_on_all(rank: int) -> None:
    store, config = MemoryStore(), load_config("memory")

    def start(ranks: ThreadRanks) -> Any:
        run = Run(store, config, takeover=False, read_only=False)
        target = 1.5 if ranks.rank == rank else torch.zeros(1)
        return Restart(run, config, ranks, read_only=False, fresh=False).resume({"x": target}, None, True, (), "cpu")

    results = ThreadRanks.run(3, start)
    assert {type(result) for result in results} == {ConfigError}
    assert all("x is a float" in str(result) for result in results)
    assert store.list() == []


@pytest.mark.parametrize("step", [None, 4])
def test_a_text_for_a_list_of_entries_is_told_apart_from_its_letters(
    root: Path, tmp_path: Path, step: int | None
) -> None:
    where = root if step else tmp_path / "empty"
    with pytest.raises(ConfigError, match=r"skip='optimizer' is one text; give a list: \['optimizer'\]"):
        manager(where).resume(network(), skip="optimizer")
    with pytest.raises(ConfigError, match=r"only='model' is one text; give a list: \['model'\]"):
        manager(root, read_only=True).load(step or "latest", only="model")


# Objects that were forgotten


def unclaimed_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.messages if "resume.entry.unclaimed" in line]


def test_objects_that_resume_was_not_given_are_named_once_and_plain_values_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedulers = {"warm": torch.optim.lr_scheduler.StepLR(optimizer, 3)}
    state = {"model": model, "optimizer": optimizer, "schedulers": schedulers, "tokens": 7, "mean": torch.ones(2)}
    with manager(tmp_path) as mgr:
        for step in (1, 2, 3):
            mgr.save(state, step)
    spoil(tmp_path, 3)
    start = manager(tmp_path).resume(model)
    assert (start.step, sorted(start.values)) == (2, ["mean", "optimizer", "schedulers", "tokens"])
    (line,) = unclaimed_lines(caplog)
    assert "step=2 entries=optimizer,schedulers:" in line
    assert ".values" in line
    assert "skip=['optimizer', 'schedulers']" in line


def test_nothing_is_told_of_objects_that_were_given_or_skipped_or_where_none_was_given(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = network()
    manager(root, read_only=True).resume(model, torch.optim.AdamW(model.parameters()))
    manager(root, read_only=True).resume(model, skip=["optimizer"])
    assert "optimizer" in manager(root, read_only=True).resume().values
    assert unclaimed_lines(caplog) == []


def test_of_several_ranks_one_tells_of_objects_that_were_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    store, config = MemoryStore(), load_config("memory")
    with manager(store) as mgr:
        mgr.save({"x": torch.ones(1), "layer": nn.Linear(1, 1)}, 1)

    def start(ranks: ThreadRanks) -> bool:
        run = Run(store, config, takeover=False, read_only=True)
        restart = Restart(run, config, ranks, read_only=True, fresh=False)
        return bool(restart.resume({"x": torch.zeros(1)}, None, True, (), "cpu")[1])

    assert ThreadRanks.run(3, start) == [True] * 3
    assert len(unclaimed_lines(caplog)) == 1


# Going back


@pytest.mark.parametrize("step", [2, "mark"])
def test_going_back_warns_at_each_start_of_how_much_it_puts_aside(
    root: Path, caplog: pytest.LogCaptureFixture, step: int | str
) -> None:
    with manager(root) as mgr:
        mgr.resume(step=2)
        mgr.save({"x": 1}, 3, tags=["mark"])
        mgr.save({"x": 1}, 4)
        mgr.save({"x": 1}, 5)
    caplog.clear()
    for archived in (3, 1) if step == 2 else (2, 1):
        with manager(root) as mgr:
            back = mgr.resume(step=step).step
            (record,) = [one for one in caplog.records if "resume.rewind.archived" in one.message]
            assert record.levelname == "WARNING"
            assert f"step={back} archived={archived} newest={5 if archived > 1 else 6} " in record.message
            assert f"resume(step={step!r})" in record.message
            assert f"manager.rewind({back})" in record.message
            mgr.save({"x": 1}, 6)
        caplog.clear()


def test_nothing_is_told_of_going_back_where_nothing_is_put_aside(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    manager(root, read_only=True).resume(step=2)
    for step in (4, "latest", None):
        with manager(root) as mgr:
            mgr.resume(step=step)
    with manager(root) as mgr:
        mgr.rewind(3)
        mgr.resume()
    spoil(root, 3)
    with manager(root) as mgr:
        assert mgr.resume(network()).step == 2
    assert "resume.rewind" not in caplog.text


class Marked(torch.Tensor):
    """A class of its own, as libraries of images have, and nothing but a name."""


class Labelled(nn.Module):
    def __init__(self, value: float, size: int = 3) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("label", torch.full((size,), value).as_subclass(Marked))


@pytest.mark.parametrize("format", ["safetensors", "torch", "dcp"])
def test_a_model_with_a_tensor_of_another_class_resumes_whole_when_trusted_and_says_so_when_not(
    tmp_path: Path, format: str
) -> None:
    saved, sparse = Labelled(float("nan")), torch.eye(3).to_sparse()
    with manager(tmp_path, format=format) as mgr, pytest.warns(UserWarning, match=r"trust_pickle"):
        mgr.save({"model": saved, "own": per_rank(sparse)}, 1)
    model, own = Labelled(0.0), torch.zeros(3, 3).to_sparse()
    before = snapshots(model)
    with (
        manager(tmp_path) as mgr,
        pytest.raises(StateMismatchError, match=r"model\.label, own\. Pass trust_pickle=True"),
    ):
        mgr.resume(model, own=own)
    misshapen = Labelled(0.0, size=4)
    untouched = snapshots(misshapen)
    with manager(tmp_path, trust_pickle=True) as mgr:
        with pytest.raises(StateMismatchError, match=r"model\.label has shape \(3,\) in the checkpoint and \(4,\)"):
            mgr.resume(misshapen, own=own)
        assert same(snapshots(misshapen), untouched)
        assert same(snapshots(model), before)
        assert own._nnz() == 0
        assert mgr.resume(model, own=own).step == 1
    assert type(model.label) is Marked
    label, then = (one.label.as_subclass(torch.Tensor).view(torch.int32) for one in (model, saved))  # type: ignore[operator]
    assert torch.equal(label, then)
    assert torch.equal(model.layer.weight, saved.layer.weight)
    assert torch.equal(own.to_dense(), sparse.to_dense())


@pytest.mark.filterwarnings("ignore::ckptmgr.state.pickled.PickleWarning")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_pickled_tensor_that_does_not_fit_on_one_rank_fails_on_all_with_what_else_does_not_fit(rank: int) -> None:
    store, config = MemoryStore(), load_config("memory", trust_pickle=True, read="all")
    with manager(store) as mgr:
        mgr.save({"model": Labelled(1.0), "x": torch.ones(1)}, 1)
    models = [Labelled(0.0, 4 if one == rank else 3) for one in range(3)]
    before = list(map(snapshots, models))

    def start(ranks: ThreadRanks) -> Any:
        run = Run(store, config, takeover=False, read_only=True)
        targets = {"model": models[ranks.rank], "x": torch.zeros(2 if ranks.rank == rank else 1)}
        return Restart(run, config, ranks, read_only=True, fresh=False).resume(targets, None, True, (), "cpu")

    results = ThreadRanks.run(3, start)
    assert {type(result) for result in results} == {StateMismatchError}
    assert all("model.label has shape" in str(result) and "x has shape" in str(result) for result in results)
    assert all(map(same, map(snapshots, models), before))
