"""Who may read what we write? Whoever the user's umask lets."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ckptmgr import CheckpointManager, save_file, writer
from ckptmgr.testing import Call, SystemCalls

pytestmark = pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX")


@pytest.fixture(params=[0o077, 0o022, 0o027, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    old = os.umask(request.param)
    yield request.param
    os.umask(old)


def modes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): stat.S_IMODE(path.lstat().st_mode) for path in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize(
    ("umask", "commit", "format"),
    [(0o077, commit, format) for commit in ("rename", "manifest") for format in ("safetensors", "torch", "dcp")]
    + [(0o022, "rename", "safetensors"), (0o027, "manifest", "torch"), (0o002, "rename", "safetensors")],
    indirect=["umask"],
)
def test_no_file_is_ever_readable_beyond_the_umask(tmp_path: Path, umask: int, commit: str, format: str) -> None:
    """Drafts, locks and unfinished files included: looked at after every call that makes or moves one."""
    root = tmp_path / "root"
    seen: dict[str, int] = {}

    def look(call: Call) -> None:
        if call.name not in ("write", "sync", "sync_folder") and root.exists():
            seen.update(modes(root))

    with (
        SystemCalls(root, after=look),
        CheckpointManager(str(root), background=False, fsync=False, commit=commit, format=format) as manager,
    ):
        manager.resume()
        manager.save({"w": torch.ones(3), "sparse": torch.eye(2).to_sparse()}, 1)
        manager.pin(1)
        manager.save({"w": torch.ones(3)}, 2)
    seen |= modes(root)
    assert {name: mode for name, mode in seen.items() if mode & umask} == {}
    assert any(".ckptmgr/drafts" in name for name in seen)


def test_files_have_the_modes_that_other_programs_would_give_them(tmp_path: Path, umask: int) -> None:
    """With a umask of 022 files are 0644 and folders 0755."""
    root = tmp_path / "root"
    with CheckpointManager(str(root), background=False, fsync=False) as manager:
        manager.resume()
        manager.save({"w": torch.ones(3)}, 1)
    save_file({"w": torch.ones(3)}, root / "x.safetensors")
    with writer(root / "y.bin") as file:
        file.write(b"y")
    found = modes(root)
    files = {name for name in found if (root / name).is_file()}
    assert {name: oct(found[name]) for name in files} == dict.fromkeys(files, oct(0o666 & ~umask))
    assert {name: oct(found[name]) for name in found.keys() - files} == dict.fromkeys(
        found.keys() - files, oct(0o777 & ~umask)
    )
