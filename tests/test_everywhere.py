"""The same manager, the same promises, on every store there is a server for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptmgr import CheckpointManager, FencedError
from ckptmgr.store import open_store


@pytest.fixture(
    params=["local", "memory", "s3_moto", pytest.param("s3_seaweed", marks=pytest.mark.server), "gcs", "oss"]
)
def place(request: pytest.FixtureRequest, tmp_path: Any) -> Iterator[dict[str, Any]]:
    """Where a run lives: `root` and storage options, as a config has them."""
    if request.param == "local":
        yield {"root": str(tmp_path / "runs" / "digits")}
    elif request.param == "memory":
        yield {"root": f"memory://{tmp_path.name}/runs/digits"}
    else:
        bucket = request.getfixturevalue(request.param)
        yield {"root": f"{bucket.url}/runs/digits", "storage": {"options": bucket.options}}


def objects() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}


def step(state: dict[str, Any]) -> float:
    state["optimizer"].zero_grad()
    loss = state["model"](torch.randn(4, 8)).square().mean()
    loss.backward()
    state["optimizer"].step()
    return loss.item()


def test_a_run_saves_rotates_dies_and_goes_on_bit_for_bit(place: dict[str, Any]) -> None:
    settings = {**place, "save": {"every_steps": 2}, "keep": {"last": 2, "best": {"metric": "loss", "mode": "min"}}}
    state = objects()
    with CheckpointManager(settings) as mgr:
        assert not mgr.resume(state["model"], state["optimizer"])
        for number in range(1, 8):
            loss = step(state)
            mgr.maybe_save({**state, "seen": number}, number, metrics={"loss": -number if number == 2 else loss})
        mgr.wait()
        assert mgr.all_steps() == [2, 4, 6]
        assert mgr.best_step() == 2
        assert [problem for one in (2, 4, 6) for problem in mgr.verify(one)] == []
    # The process went on to step 7 and died; another starts from the same command.
    again = objects()
    with CheckpointManager(settings) as mgr:
        start = mgr.resume(again["model"], again["optimizer"])
        assert (start.step, start.values) == (6, {"seen": 6})
        assert step(again) == loss
        assert all(
            torch.equal(a, b) for a, b in zip(state["model"].parameters(), again["model"].parameters(), strict=True)
        )
        mgr.save({**again, "seen": 7}, 7)
        mgr.wait()
        assert mgr.all_steps() == [2, 6, 7]
        manifest = mgr.info().manifest
        assert manifest is not None
        assert (manifest.attempt, manifest.parent) == (2, 6)


def test_damage_is_skipped_and_a_rewind_archives(place: dict[str, Any]) -> None:
    with CheckpointManager(place, background=False, keep={"last": None}) as mgr:
        for number in (1, 2, 3):
            mgr.save({"x": torch.full((100,), float(number))}, number)
        name, manifest = mgr.info(3).name, mgr.info(3).manifest
    assert manifest is not None
    store = open_store(place["root"], place.get("storage", {}).get("options"))
    key = f"{name}/{next(f.name for f in manifest.files if f.name.endswith('x.safetensors'))}"
    data = bytearray(store.get(key))
    data[-1] ^= 1
    store.put(key, bytes(data))
    with CheckpointManager(place, background=False, keep={"last": None}) as mgr:
        start = mgr.resume()
        assert start.step == 2
        assert [one.step for one in start.skipped] == [3]
        assert mgr.all_steps() == [1, 2]
        mgr.rewind(1)
        mgr.save({"x": torch.zeros(1)}, 2)
        assert mgr.all_steps() == [1, 2]
        assert mgr.load(2)["x"].shape == (1,)


def test_one_writer_at_a_time(place: dict[str, Any]) -> None:
    with CheckpointManager(place, background=False) as first:
        first.save({"x": 1}, 1)
        with CheckpointManager(place) as second, pytest.raises(FencedError, match="this very process"):
            second.resume()
        with CheckpointManager(place, read_only=True) as reader:
            assert reader.load() == {"x": 1}
    with CheckpointManager(place) as third:
        assert third.resume().step == 1


def test_nothing_but_the_run_s_own_files_is_left(place: dict[str, Any]) -> None:
    store = open_store(place["root"], place.get("storage", {}).get("options"))
    with CheckpointManager(place, background=False, keep={"last": 1}, save={"on_file": "SAVE_NOW"}) as mgr:
        store.put("notes.txt", b"mine")
        for number in (1, 2, 3):
            mgr.save({"x": torch.ones(3)}, number)
    keys = {entry.key for entry in store.list(recursive=True)}
    outside = {key for key in keys if not key.startswith((".ckptmgr/lock", ".ckptmgr/lease", "step-00000003"))}
    assert outside == {"latest", "notes.txt"}
    names = {key.rsplit("/", 1)[1] for key in keys if key.startswith("step-00000003")}
    assert names == {"manifest.json", "x.safetensors", "state.json", "rank-00000.json"}


@pytest.mark.parametrize("name", ["s3", "gcs", "oss"])
def test_the_shipped_config_works_with_what_the_environment_says(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = request.getfixturevalue({"s3": "s3_moto"}.get(name, name))
    options = bucket.options
    monkeypatch.setenv(f"{name.upper()}_BUCKET", bucket.url.partition("://")[2])
    variables = {
        "s3": {"S3_ENDPOINT_URL": "endpoint_url", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"},
        "gcs": {"STORAGE_EMULATOR_HOST": "endpoint_url"},
        "oss": {"OSS_ENDPOINT": "endpoint", "OSS_ACCESS_KEY_ID": "key", "OSS_ACCESS_KEY_SECRET": "secret"},
    }
    for variable, option in variables[name].items():
        monkeypatch.setenv(variable, options[option])
    config = Path(__file__).parent.parent / "configs" / f"{name}.yaml"
    with CheckpointManager(config) as mgr:
        mgr.save({"x": torch.arange(3)}, 1)
    with CheckpointManager(config) as mgr:
        assert torch.equal(mgr.resume().values["x"], torch.arange(3))


def test_a_run_goes_on_where_the_server_refuses_conditional_writes(s3_proxy: tuple[Any, Any]) -> None:
    from servers.proxy import knows_no_conditions

    bucket, proxy = s3_proxy
    knows_no_conditions(proxy)
    settings = {"root": f"{bucket.url}/runs/digits", "storage": {"options": bucket.options}, "background": False}
    with CheckpointManager(settings) as first:
        assert not first.resume()
        first.save({"x": torch.arange(3)}, 1)
        with CheckpointManager(settings) as second, pytest.raises(FencedError, match="this very process"):
            second.resume()
    with CheckpointManager(settings) as mgr:
        assert torch.equal(mgr.resume().values["x"], torch.arange(3))
        mgr.save({"x": torch.arange(4)}, 2)
        assert [(step, mgr.verify(step)) for step in mgr.all_steps()] == [(1, []), (2, [])]
