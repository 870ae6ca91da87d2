"""A checkpoint written with on-disk format version 1 opens for ever.

`tests/data/format-1` was written by `write` below, once; it is never written again. A later format
version adds a folder of its own beside it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from ckptmgr import CheckpointManager

GOLDEN = Path(__file__).parent / "data" / "format-1"


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


def test_a_checkpoint_of_format_version_1_opens() -> None:
    with CheckpointManager(str(GOLDEN), read_only=True) as mgr:
        assert mgr.all_steps() == [1, 2]
        for step, tag in ((1, "as-safetensors"), (2, "as-torch")):
            assert mgr.verify(step) == []
            info = mgr.info(tag)
            assert info.manifest is not None
            assert (info.step, info.manifest.epoch, info.manifest.metrics) == (step, 0, {"loss": 0.25})
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
        assert mgr.resume().rng.restored != ()


if __name__ == "__main__":
    write(Path(sys.argv[1]))
