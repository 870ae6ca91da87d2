"""The errors people meet say what happened, to which step and place, and what to do now."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptmgr import (
    AlreadyExistsError,
    CheckpointError,
    CheckpointManager,
    ConfigError,
    DamagedError,
    FormatVersionError,
    SaveFailedError,
    StateMismatchError,
    StoreError,
)
from ckptmgr import errors as errors_module


def manager(root: Path | str, **overrides: Any) -> CheckpointManager:
    return CheckpointManager(str(root), **{"background": False, **overrides})


def save(root: Path, **state: Any) -> None:
    with manager(root) as mgr:
        mgr.save(state, 300)


def body(*, width: int = 2, norm: bool = False) -> nn.Module:
    layers: list[nn.Module] = [nn.Linear(2, width), nn.Linear(width, 2)]
    return nn.Sequential(*layers, *([nn.LayerNorm(2)] if norm else []))


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = body()


def message(root: Path, *targets: Any, **others: Any) -> str:
    with pytest.raises(StateMismatchError) as caught, manager(root) as mgr:
        mgr.resume(*targets, **others)
    return str(caught.value)


def test_every_error_is_one_of_ours_and_a_built_in_where_one_fits() -> None:
    kinds = {name: getattr(errors_module, name) for name in errors_module.__all__}
    assert all(issubclass(kind, CheckpointError) for kind in kinds.values())
    fits = {
        "ConfigError": ValueError, "NotFoundError": FileNotFoundError, "AlreadyExistsError": FileExistsError,
        "StateMismatchError": KeyError, "StoreError": OSError,
    }  # fmt: skip
    assert all(issubclass(kinds[name], built_in) for name, built_in in fits.items())


def test_wrong_key_prefix(tmp_path: Path) -> None:
    save(tmp_path, model=Wrapped())
    text = message(tmp_path, body())
    assert "backbone." in text
    assert "prefix" in text
    save(tmp_path / "other", model=body())
    assert "backbone." in message(tmp_path / "other", Wrapped())


def test_changed_architecture(tmp_path: Path) -> None:
    save(tmp_path, model=body())
    text = message(tmp_path, body(width=3, norm=True))
    for words in ("0.weight", "(2, 2)", "(3, 2)", "2.weight", "strict=False"):
        assert words in text, text


def test_optimizer_mismatch(tmp_path: Path) -> None:
    model = body()
    save(tmp_path, model=model, optimizer=torch.optim.AdamW(model.parameters()))
    fewer = torch.optim.AdamW(list(model.parameters())[:2])
    text = message(tmp_path, model, fewer)
    assert "optimizer" in text
    assert "1.weight" in text
    assert "skip=['optimizer']" in text or 'skip=["optimizer"]' in text
    assert "optimizer" in message(tmp_path, model, torch.optim.SGD(model.parameters(), momentum=0.9))


def test_entry_under_another_name(tmp_path: Path) -> None:
    save(tmp_path, net=body())
    text = message(tmp_path, body())
    assert "model" in text
    assert "net" in text


def test_corrupt_file(tmp_path: Path) -> None:
    save(tmp_path, model=body())
    path = tmp_path / "step-00000300" / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(DamagedError) as caught, manager(tmp_path) as mgr:
        mgr.resume(body())
    text = str(caught.value)
    for words in (str(path), "step 300", "resume(step=...)", "fresh=True"):
        assert words in text, text


def test_unknown_yaml_key(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"root: {tmp_path}\nsave: {{evry_steps: 5}}\n")
    with pytest.raises(ConfigError) as caught:
        CheckpointManager(path)
    for words in (str(path), "save.evry_steps", "every_steps"):
        assert words in str(caught.value)


def test_step_exists(tmp_path: Path) -> None:
    with manager(tmp_path) as mgr:
        mgr.save({"x": 1}, 300)
        with pytest.raises(AlreadyExistsError, match=rf"step 300 is in {tmp_path} already; pass overwrite=True"):
            mgr.save({"x": 2}, 300)


def test_no_permission(oss: Any) -> None:
    options = {**oss.options, "secret": "wrong"}
    with pytest.raises(StoreError) as caught:
        manager(f"{oss.url}/run", storage={"options": options}).resume(body())
    assert caught.value.errno == errno.EACCES
    assert oss.url in str(caught.value)
    assert "OSS_ACCESS_KEY" in str(caught.value)
    assert "wrong" not in str(caught.value)


def test_bucket_missing(s3_moto: Any) -> None:
    with pytest.raises(StoreError, match="bucket 'no-such-bucket' does not exist"):
        manager("s3://no-such-bucket/run", storage={"options": s3_moto.options}).resume(body())
    with pytest.raises((StoreError, SaveFailedError), match="bucket 'no-such-bucket' does not exist"):
        manager("s3://no-such-bucket/run", storage={"options": s3_moto.options}).save({"x": torch.ones(1)}, 1)


def test_newer_format(tmp_path: Path) -> None:
    save(tmp_path, model=body())
    path = tmp_path / "step-00000300" / "manifest.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 7'))
    with pytest.raises(FormatVersionError, match=r"step-00000300.*format version 7.*reads up to 2.*newer ckptmgr"):
        manager(tmp_path).resume(body())


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with manager(tmp_path) as mgr:
        mgr.save({"model": body()}, 300)

        def full(fd: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(SaveFailedError) as caught:
            mgr.save({"model": body()}, 301)
        monkeypatch.undo()
        cause = caught.value.__cause__
        assert isinstance(cause, StoreError)
        assert cause.errno == errno.ENOSPC
        for words in ("step 301", str(tmp_path), "free", "checkpoints before it are untouched"):
            assert words in str(caught.value)
        mgr.save({"model": body()}, 302)
        assert mgr.all_steps() == [300, 302]
        assert list((tmp_path / ".ckptmgr" / "drafts").glob("*")) == []
