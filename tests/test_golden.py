"""A checkpoint written with an earlier on-disk format version opens for ever.

Each `tests/data/format-N` was written by `write` below, once, by the first version of ckptmgr that wrote
this format; it is never written again. A later format version adds a folder of its own beside it.
`tests/data/ranks-2` was written by `write_ranks` in the same way; 2 is the version of the files of ranks.
"""

from __future__ import annotations

import dataclasses
import random
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptmgr import CheckpointManager, per_rank
from ckptmgr.formats import open_format
from ckptmgr.formats.rank_files import OwnState
from ckptmgr.manifest import Manifest
from ckptmgr.repository import Repository
from ckptmgr.staging import Live
from ckptmgr.state import Recorder, materialize, restore_rng
from ckptmgr.store.local import LocalStore

GOLDEN = Path(__file__).parent / "data"


def state() -> dict[str, Any]:
    torch.manual_seed(1)
    shared = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    return {
        "model": {"embed.weight": shared, "head.weight": shared, "scale": torch.tensor(0.5, dtype=torch.bfloat16)},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "tensors": {
            "fp8": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
            "complex": torch.tensor([1 + 2j], dtype=torch.complex128),
            "bool": torch.tensor([True, False]),
            "empty": torch.zeros(0, 4),
            "sparse": torch.eye(2).to_sparse(),
        },
        "plain": {"tuple": (1, "two", None), "nan": float("nan"), "bytes": b"\x00\xff", 7: {3, 1}, "$odd": 2**70},
    }


def write(root: Path) -> None:
    for step, format in ((1, "safetensors"), (2, "torch")):
        with CheckpointManager(str(root), format=format, background=False, run="golden") as mgr:
            mgr.resume()
            mgr.save(state(), step, epoch=0, metrics={"loss": 0.25}, tags=[f"as-{format}"])
    share(Repository(LocalStore(root)))


def own(rank: int) -> dict[str, Any]:
    random.seed(rank)
    torch.manual_seed(rank)
    order = torch.arange(rank, rank + 3)
    return {"model": torch.ones(2), "sampler": per_rank({"at": rank, "order": order, "again": order})}


def write_ranks(root: Path) -> None:
    """A checkpoint of two ranks, as their rank 0 writes it."""
    repository = Repository(LocalStore(root))
    for step, name in ((1, "safetensors"), (2, "torch")):
        flat = Recorder().capture(own(0))
        flat = dataclasses.replace(flat, ranks={**flat.ranks, 1: Recorder().capture_part(own(1))})
        draft = repository.begin(step, None, "golden")
        plan = open_format(name).plan(flat)
        plan.write(flat, Live(plan.regions, flat), draft)
        draft.commit(Manifest(step, "golden", 1, "", datetime.now(UTC), name, (), world_size=2))


def share(repository: Repository) -> None:
    """A third checkpoint, whose model is the first one's file."""
    first = repository.find(1)
    assert first.manifest is not None
    files = repository.open(first)
    draft = repository.begin(3, 0, "golden")
    for name, entry in files.files.items():
        if name == "model.safetensors":
            assert draft.link(name, f"{first.name}/{entry.name}", entry)
        else:
            with draft.create(name) as file:
                file.write(files.read(name))
    draft.commit(dataclasses.replace(first.manifest, step=3, tags=("as-shared",)))


@pytest.mark.parametrize("version", [1, 2])
def test_a_checkpoint_of_every_format_version_opens(version: int) -> None:
    with CheckpointManager(str(GOLDEN / f"format-{version}"), read_only=True) as mgr:
        assert mgr.all_steps() == [1, 2] if version == 1 else [1, 2, 3]
        for step, tag in ((1, "as-safetensors"), (2, "as-torch"), (3, "as-shared"))[: 2 if version == 1 else 3]:
            assert mgr.verify(step) == []
            info = mgr.info(tag)
            assert info.manifest is not None
            assert info.manifest.version == version
            assert (info.step, info.manifest.epoch, info.manifest.metrics) == (step, 0, {"loss": 0.25})
            assert [file.name for file in info.manifest.files if file.shared] == (
                ["model.safetensors"] if step == 3 else []
            )
            loaded, expected = mgr.load(step), state()
            assert loaded["model"]["embed.weight"] is loaded["model"]["head.weight"]
            for entry in ("model", "tensors"):
                for name, tensor in expected[entry].items():
                    got = loaded[entry][name]
                    assert (got.dtype, got.shape, got.layout) == (tensor.dtype, tensor.shape, tensor.layout)
                    assert torch.equal(
                        got.to_dense().float().real if got.is_sparse else got,
                        tensor.to_dense() if tensor.is_sparse else tensor,
                    )
            assert loaded["optimizer"] == expected["optimizer"]
            assert repr(loaded["plain"]) == repr(expected["plain"])
        assert set(mgr.resume().rng.restored) >= {"python", "torch"}


@pytest.mark.parametrize("step", [1, 2])
def test_what_ranks_saved_for_themselves_comes_back(step: int) -> None:
    repository = Repository(LocalStore(GOLDEN / "ranks-2"))
    info = repository.find(step)
    assert info.manifest is not None
    assert info.manifest.world_size == 2
    stored = open_format(info.manifest.format).open(repository.open(info, "full"))
    for rank in (0, 1):
        part = stored.part(rank)
        assert part is not None
        state = OwnState(stored, part)
        sampler = materialize(state, ["sampler"], state.fetch)["sampler"]
        assert (sampler["at"], sampler["order"].tolist()) == (rank, [rank, rank + 1, rank + 2])
        assert sampler["again"] is sampler["order"]
        assert set(restore_rng(part.rng).restored) >= {"python", "torch"}
        drawn = random.random(), torch.rand(1).item()
        own(rank)
        assert drawn == (random.random(), torch.rand(1).item())
    assert stored.part(2) is None


def test_a_manifest_is_written_again_as_it_was_read() -> None:
    """An archived checkpoint of an earlier version stays one of that version."""
    for path in sorted(GOLDEN.glob("*/*/manifest.json")):
        manifest = Manifest.from_json(path.read_bytes())
        assert Manifest.from_json(manifest.to_json()) == manifest
        assert manifest.to_json() == path.read_bytes()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
    write_ranks(Path(sys.argv[1]) / "ranks")
