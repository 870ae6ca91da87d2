"""Weights from another run or file get into a model by name, all of them or as chosen, and nothing else does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from ckptmgr import (
    CheckpointManager,
    ConfigError,
    DamagedError,
    NotFoundError,
    StateMismatchError,
    save_file,
    warm_start,
)


def network(out: int = 2) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, out))


@pytest.fixture
def source(tmp_path: Path) -> nn.Sequential:
    torch.manual_seed(0)
    model = network()
    with CheckpointManager(str(tmp_path / "run"), background=False, keep={"last": None}) as mgr:
        for step in (1, 2):
            nn.init.constant_(model[0].bias, step)
            mgr.save({"model": model, "other": {"a": 1}}, step)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w.pt")
    return model


def equal(left: nn.Module, right: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), right.state_dict().values(), strict=True))


@pytest.mark.parametrize("where", ["run", "run/step-00000002", "w.safetensors", "w.pt"])
def test_weights_come_from_a_run_a_checkpoint_or_a_file(tmp_path: Path, source: nn.Sequential, where: str) -> None:
    model = network()
    done = warm_start(tmp_path / where, model)
    assert equal(model, source)
    assert set(done.loaded) == set(model.state_dict())
    assert (done.missing, done.unexpected) == ((), ())


def test_one_checkpoint_of_a_run_is_named_by_its_folder(tmp_path: Path, source: nn.Sequential) -> None:
    model = network()
    warm_start(tmp_path / "run" / "step-00000001", model)
    assert model[0].bias.tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("here", "where"),
    [("run", "step-00000001"), ("run/step-00000001", "."), ("run/step-00000002", "../step-00000001/"), ("run", "link")],
)
def test_a_checkpoint_is_named_by_any_path_to_its_folder(
    tmp_path: Path, source: nn.Sequential, monkeypatch: pytest.MonkeyPatch, here: str, where: str
) -> None:
    (tmp_path / "run" / "link").symlink_to(tmp_path / "run" / "step-00000001")
    monkeypatch.chdir(tmp_path / here)
    model = network()
    warm_start(where, model)
    assert model[0].bias.tolist() == [1.0] * 4


@pytest.mark.parametrize("name", ["0007", "2", "latest", "best"])
def test_a_copied_checkpoint_may_have_any_name(tmp_path: Path, source: nn.Sequential, name: str) -> None:
    """Also one that elsewhere means a step, beside a checkpoint of that very step."""
    for folder, step in ((name, 1), ("other", 2)):
        shutil.copytree(tmp_path / "run" / f"step-{step:08d}", tmp_path / "pre" / folder)
    model = network()
    warm_start(tmp_path / "pre" / name, model)
    assert model[0].bias.tolist() == [1.0] * 4


def test_a_folder_with_someone_else_s_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "manifest.json").write_text("{}")
    with pytest.raises(NotFoundError, match=r"no checkpoint in .*theirs; give"):
        warm_start(tmp_path / "theirs", network())


def test_a_damaged_newest_is_passed_over(
    tmp_path: Path, source: nn.Sequential, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (2, 1):
        path = tmp_path / "run" / f"step-{step:08d}" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
        model = network()
        if step == 2:
            warm_start(tmp_path / "run", model)
            assert model[0].bias.tolist() == [1.0] * 4
            assert "warm_start.skip.damaged step=2" in caplog.text
        else:
            with pytest.raises(DamagedError):
                warm_start(tmp_path / "run", model)


def test_the_manager_warm_starts_with_its_own_options(tmp_path: Path, source: nn.Sequential) -> None:
    model = network()
    with CheckpointManager(str(tmp_path / "new")) as mgr:
        assert not mgr.resume(model)
        mgr.warm_start(tmp_path / "run", model)
    assert equal(model, source)


def test_what_does_not_fit_is_listed_and_the_model_is_left_alone(tmp_path: Path, source: nn.Sequential) -> None:
    model = network(out=5)
    model.append(nn.Linear(5, 1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(StateMismatchError) as caught:
        warm_start(tmp_path / "run", model)
    for words in ("3.weight", "2.weight is (2, 4) there and (5, 4) here", "strict=False", "exclude="):
        assert words in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    done = warm_start(tmp_path / "run", model, strict=False)
    assert set(done.missing) == {"2.weight", "2.bias", "3.weight", "3.bias"}
    assert torch.equal(model[0].weight, source[0].weight)


def test_patterns_choose_by_the_model_s_names(tmp_path: Path, source: nn.Sequential) -> None:
    model = network(out=5)
    done = warm_start(tmp_path / "w.safetensors", model, exclude=["2.*"])
    assert set(done.loaded) == {name for name in model.state_dict() if not name.startswith("2.")}
    only = warm_start(tmp_path / "w.safetensors", model, include=["0.*"])
    assert only.loaded == ("0.weight", "0.bias")


def test_names_are_mapped_by_prefix_or_by_a_function(tmp_path: Path, source: nn.Sequential) -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = network()

    model = Body()
    warm_start(tmp_path / "w.safetensors", model, rename={"": "encoder."})
    assert equal(model.encoder, source)
    again = Body()
    warm_start(
        tmp_path / "w.safetensors", again, rename=lambda n: f"encoder.{n}" if n[0] != "2" else None, exclude=["*.2.*"]
    )
    assert torch.equal(again.encoder[0].weight, source[0].weight)


def test_a_source_in_which_nothing_fits_is_an_error_even_when_not_strict(tmp_path: Path, source: nn.Module) -> None:
    with pytest.raises(StateMismatchError, match="no weight of"):
        warm_start(tmp_path / "run", nn.Embedding(2, 2), strict=False)


def test_wrong_sources_say_what_they_are(tmp_path: Path, source: nn.Module) -> None:
    torch.save({"epoch": 3}, tmp_path / "no.pt")
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "junk.pt").write_bytes(b"junk")
    cases = {
        "no.pt": (ConfigError, "keys are epoch"),
        "list.pt": (NotFoundError, "holds a list"),
        "junk.pt": (DamagedError, r"junk\.pt"),
        "gone.pt": (NotFoundError, r"gone\.pt"),
        "empty": (NotFoundError, r"no checkpoint in .*empty; give"),
    }
    for name, (error, words) in cases.items():
        with pytest.raises(error, match=words):
            warm_start(tmp_path / name, network())
    with pytest.raises(NotFoundError, match="no entry ema; it has model, other"):
        warm_start(tmp_path / "run", network(), entry="ema")
    with pytest.raises(ConfigError, match="no state dict"):
        warm_start(tmp_path / "run", network(), entry="other")
