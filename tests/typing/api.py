"""What type checkers see of the public API; checked by mypy --strict, never run."""

from __future__ import annotations

from typing import Any, assert_type

import torch

import ckptmgr
from ckptmgr import CheckpointConfig, CheckpointManager, Moment, Pending, Plan, Resumed, SaveConfig

model = torch.nn.Linear(1, 1)
optimizer = torch.optim.AdamW(model.parameters())


def improved(moment: Moment) -> bool:
    return moment.metrics.get("loss", 1.0) < 0.5


config = CheckpointConfig(root="runs/digits", save=SaveConfig(every_steps=10))
with CheckpointManager(config, triggers=[improved], keep={"last": 2}) as mgr:
    assert_type(mgr, CheckpointManager)
    start = mgr.resume(model, optimizer, scheduler=None, skip=["optimizer"])
    assert_type(start, Resumed)
    assert_type(start.step, int)
    assert_type(start.epoch, int)
    assert_type(mgr.maybe_save({"model": model}, 1, epoch=0, metrics={"loss": 0.1}), Pending | None)
    pending = mgr.save(lambda: {"model": model}, 2, tags=["x"], pin=True)
    assert_type(pending, Pending)
    assert_type(pending.done(), bool)
    assert_type(pending.url, str | None)
    assert_type(mgr.should_stop, bool)
    assert_type(mgr.all_steps(), list[int])
    assert_type(mgr.latest_step(), int | None)
    assert_type(mgr.load("best"), dict[str, Any])
    assert_type(mgr.prune(dry_run=True), Plan)

with ckptmgr.writer("memory://b/x.pt") as sink:
    torch.save({}, sink)
with ckptmgr.reader("memory://b/x.pt") as source:
    torch.load(source)
ckptmgr.save_file({"w": torch.ones(1)}, "memory://b/x.safetensors", {"k": "v"})
assert_type(ckptmgr.load_file("memory://b/x.safetensors"), dict[str, torch.Tensor])
with ckptmgr.safe_open("memory://b/x.safetensors") as opened:
    assert_type(opened.get_tensor("w"), torch.Tensor)
