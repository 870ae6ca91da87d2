"""`load(mmap=True)` gives a checkpoint's tensors without reading them, and nothing done to them reaches the file."""

from __future__ import annotations

import gc
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ckptmgr import CheckpointManager, ConfigError, DamagedError, StoreError
from ckptmgr.formats.mapping import MappedFiles
from ckptmgr.manifest import FileEntry
from ckptmgr.state.snapshot import StoredTensor
from ckptmgr.testing import MemoryStore


def manager(root: Path, **overrides: Any) -> CheckpointManager:
    return CheckpointManager(str(root), **{"background": False, "keep": {"last": None}, **overrides})


def state() -> dict[str, Any]:
    weight = nn.Parameter(torch.arange(12.0).view(3, 4))
    return {
        "model": {
            "weight": weight,
            "tied": weight,
            "half": torch.tensor([1.5, 2.5], dtype=torch.bfloat16),
            "wide": torch.tensor([1 + 2j], dtype=torch.complex128),
            "flags": torch.tensor([True, False, True]),
            "scalar": torch.tensor(7),
            "none": torch.zeros(0, 3),
            "last": torch.arange(120.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last),
        },
        "sparse": torch.eye(3).to_sparse(),
        "tokens": 5,
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Steps 1 and 2 of a state."""
    with manager(tmp_path / "run") as mgr:
        for step in (1, 2):
            mgr.save(state(), step)
    return tmp_path / "run"


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("step-*/*.safetensors")}


def mapped_paths() -> str:
    return Path("/proc/self/maps").read_text()


def test_what_is_mapped_equals_what_is_loaded_with_its_ties_and_flags(root: Path) -> None:
    reader = manager(root, read_only=True)
    plain, mapped = reader.load(), reader.load(mmap=True)
    assert list(mapped) == list(plain)
    assert mapped["tokens"] == 5
    assert torch.equal(mapped["sparse"].to_dense(), torch.eye(3))
    for name, tensor in plain["model"].items():
        own = mapped["model"][name]
        assert (own.dtype, own.shape, own.requires_grad, type(own)) == (
            tensor.dtype, tensor.shape, tensor.requires_grad, type(tensor)
        )  # fmt: skip
        assert torch.equal(own, tensor)
    assert mapped["model"]["tied"] is mapped["model"]["weight"]


@pytest.mark.skipif(sys.platform != "linux", reason="mappings are listed in /proc")
def test_only_files_of_what_is_wanted_are_mapped_and_no_longer_than_its_tensors_live(tmp_path: Path) -> None:
    with manager(tmp_path) as mgr:
        mgr.save({"a": torch.ones(4), "b": torch.ones(4)}, 3)
    loaded = manager(tmp_path, read_only=True).load(only=["a"], mmap=True)
    assert "/a.safetensors" in mapped_paths()
    assert "/b.safetensors" not in mapped_paths()
    part = loaded.pop("a")[2:]
    gc.collect()
    assert part.tolist() == [1, 1]
    del part
    gc.collect()
    assert "/a.safetensors" not in mapped_paths()


def test_what_is_written_to_a_mapped_tensor_stays_out_of_the_file_and_of_other_loads(root: Path) -> None:
    before = files(root)
    reader = manager(root, read_only=True)
    mapped, other = reader.load(mmap=True)["model"], reader.load(mmap=True)["model"]
    with torch.no_grad():
        mapped["weight"].zero_()
        mapped["last"].add_(1)
    assert not mapped["tied"].any()
    assert torch.equal(other["weight"], state()["model"]["weight"])
    assert files(root) == before
    assert reader.verify() == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not delete a mapped file")
def test_a_deleted_checkpoint_stays_readable(root: Path) -> None:
    mapped = manager(root, read_only=True).load(1, mmap=True)["model"]
    with manager(root) as mgr:
        mgr.resume()
        mgr.delete(1)
        assert mgr.all_steps() == [2]
    shutil.rmtree(root)
    assert torch.equal(mapped["last"], state()["model"]["last"])


def test_a_module_runs_on_mapped_weights(root: Path) -> None:
    model = nn.Linear(4, 3, bias=False)
    model.load_state_dict({"weight": manager(root, read_only=True).load(mmap=True)["model"]["weight"]}, assign=True)
    assert model(torch.ones(4)).tolist() == [6, 22, 38]


def spoil(root: Path, step: int, change: int) -> None:
    """Change the last byte, or with a negative number the size."""
    path = root / f"step-{step:08d}" / "model.safetensors"
    data = bytearray(path.read_bytes())
    if change < 0:
        del data[change:]
    else:
        data[-1] ^= change
    path.write_bytes(data)


def test_sizes_are_compared_and_digests_only_when_asked_for_in_full(root: Path) -> None:
    spoil(root, 2, 1)
    assert "model" in manager(root, read_only=True).load(2, mmap=True)
    full = manager(root, read_only=True, verify={"on_resume": "full"})
    with pytest.raises(DamagedError, match=r"model\.safetensors"):
        full.load(2, mmap=True)
    assert torch.equal(full.load(mmap=True)["model"]["weight"], state()["model"]["weight"])  # of step 1
    spoil(root, 1, -8)
    for level in ("off", "size", "fast"):
        with pytest.raises(DamagedError, match=r"model\.safetensors.* bytes, not the .* of the manifest"):
            manager(root, read_only=True, verify={"on_resume": level}).load(1, mmap=True)


def test_a_file_that_is_gone_is_damage_and_one_that_is_no_file_the_store_s_error(tmp_path: Path) -> None:
    stored = StoredTensor((2,), torch.float32, ("m.safetensors", 8, 16))
    mapped = MappedFiles(tmp_path, {"m.safetensors": FileEntry("m.safetensors", 16, "")})
    with pytest.raises(DamagedError, match=r"m\.safetensors is missing"):
        mapped.tensor(stored)
    (tmp_path / "m.safetensors").mkdir()
    with pytest.raises(StoreError, match=r"can't map .*m\.safetensors: .*; load it without mmap=True"):
        mapped.tensor(stored)


def test_what_cannot_be_mapped_is_a_mistake_of_the_call_that_names_the_way_out(tmp_path: Path) -> None:
    with manager(tmp_path, format="torch") as mgr:
        mgr.save({"x": torch.ones(1)}, 1)
        with pytest.raises(ConfigError, match=r"step-00000001 is of format torch, .*; load it without mmap"):
            mgr.load(mmap=True)
    with manager(tmp_path / "other") as mgr:
        mgr.save({"x": torch.ones(1)}, 1)
        with pytest.raises(ConfigError, match=r"into host memory, not to meta; load it without mmap"):
            mgr.load(mmap=True, map_location="meta")
        assert mgr.load(mmap=True, map_location=torch.device("cpu"))["x"] == 1
    with CheckpointManager("memory-store:", store=MemoryStore(), background=False) as mgr:
        mgr.save({"x": torch.ones(1)}, 1)
        with pytest.raises(ConfigError, match=r"is not on a disk of this machine; load it without mmap"):
            mgr.load(mmap=True)


def test_a_checkpoint_whose_data_lies_under_its_nonce_is_mapped_too(tmp_path: Path) -> None:
    with manager(tmp_path, commit="manifest") as mgr:
        mgr.save({"x": torch.ones(3)}, 1)
        assert mgr.load(mmap=True)["x"].tolist() == [1, 1, 1]
