"""What do the ranks of `test_sharded` do? They train, save and load sharded states, in the way a manager does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from ckptmgr.arena import Arena
from ckptmgr.draft import DraftFile
from ckptmgr.errors import CheckpointError
from ckptmgr.formats import SinkFile, open_format
from ckptmgr.manifest import FileEntry, Manifest
from ckptmgr.sharded.plan import RankPlan, finish, global_plan, local_plan, resolved
from ckptmgr.source import Source
from ckptmgr.staging import Live
from ckptmgr.state import Recorder, capture, match, non_finite
from ckptmgr.state.models import takes_in_place
from ckptmgr.state.snapshot import StoredState
from ckptmgr.store import open_store
from ckptmgr.transfer import Body, write_files

NONCE = "0123456789abcdef"


class Net(nn.Module):
    """Parameters that do not divide evenly, one with fewer rows than ranks, and a large plain buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 4)
        self.norm = nn.LayerNorm(4)
        self.last = nn.Linear(4, 3, bias=False)
        self.register_buffer("table", torch.arange(20_000, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(self.norm(self.down(torch.relu(self.up(x)))))
        return out * self.table[0]


def build(layout: str, seed: int) -> nn.Module:
    """The net spread over all ranks."""
    torch.manual_seed(seed)
    net = Net()
    net.table += seed
    world = dist.get_world_size() if dist.is_initialized() else 1
    if layout == "fsdp":
        fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
    elif layout == "hsdp":
        fully_shard(net, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    elif layout == "tp":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
        parallelize_module(net, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(net.up, mesh=mesh["data"])
        fully_shard(net.down, mesh=mesh["data"])
    elif layout == "ddp":
        return DistributedDataParallel(net)
    return net


def make(layout: str, seed: int, steps: int = 0) -> dict[str, Any]:
    """A state of training; after some steps, or fresh."""
    model = build(layout, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * (seed + 1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    objects = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "seen": 17 * steps}
    torch.manual_seed(99)
    for _ in range(steps):
        train(objects)
    return objects


def train(objects: Mapping[str, Any]) -> None:
    objects["model"](torch.randn(3, 6)).square().sum().backward()
    objects["optimizer"].step()
    objects["optimizer"].zero_grad()
    objects["scheduler"].step()


def _not_sharded_alike(optimizer: torch.optim.Optimizer) -> list[str]:
    """State that is not spread over the ranks as its parameter is."""
    return [
        key
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if key != "step"
        and (
            type(value) is not type(parameter.data)
            or getattr(value, "placements", 0) != getattr(parameter, "placements", 0)
        )
    ]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def fingerprint(objects: Mapping[str, Any]) -> dict[str, str]:
    """Every bit of weights and optimizer state, by names that do not depend on the layout. A collective."""
    model, optimizer = objects["model"], objects["optimizer"]
    names = {id(parameter): name.removeprefix("module.") for name, parameter in model.named_parameters()}
    found = {name.removeprefix("module."): whole(tensor) for name, tensor in model.state_dict().items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state[parameter].items():
                found[f"{names[id(parameter)]}/{key}"] = whole(value)
    texts = {name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest() for name, tensor in found.items()}
    settings = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    return texts | {"settings": repr(sorted(settings.items())), "scheduler": repr(objects["scheduler"].last_epoch)}


class Sink:
    """A rank's files, next to those of the others."""

    def __init__(self, root: str, name: str) -> None:
        self._store, self._name = open_store(root), name
        self.entries: dict[str, FileEntry] = {}

    @contextmanager
    def create(self, name: str) -> Iterator[SinkFile]:
        writer = self._store.writer(f"{self._name}/{name}")
        file = DraftFile(writer)
        yield file
        writer.commit()
        self.entries[name] = file.entry(name)

    def write(self, bodies: Mapping[str, Body]) -> None:
        self.entries |= write_files(bodies, lambda name, size: self._store.writer(f"{self._name}/{name}", size))


class Bytes:
    def __init__(self, data: bytes) -> None:
        self.size, self._data = len(data), data

    def part(self, begin: int, end: int, scratch: memoryview) -> memoryview:
        return memoryview(self._data)[begin:end]


def gathered(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def save(root: str, name: str, objects: Mapping[str, Any], recorder: Recorder | None = None) -> None:
    """One save by all ranks."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    flat = (recorder or Recorder()).capture(objects)
    index, plans = global_plan(gathered(local_plan(flat, rank, world)), split_size_bytes=100_000)
    plan: RankPlan = gathered(plans)[0][rank]
    here = resolved(flat)
    arena = Arena()
    held = arena.hold(plan.regions, here) if rank % 2 == 0 else Live(plan.regions, here)
    sink = Sink(root, name)
    rows = plan.write(flat, held, sink)
    parts = gathered((rows, sink.entries))
    if rank == 0:
        bodies = finish(index, [one for one, _ in parts])
        sink.write({file: Bytes(data) for file, data in bodies.items()})
        entries = {**sink.entries, **{file: entry for _, own in parts for file, entry in own.items()}}
        commit(root, name, entries, world)
    if dist.is_initialized():
        dist.barrier()


def commit(root: str, name: str, entries: Mapping[str, FileEntry], world: int = 1, format_name: str = "dcp") -> None:
    files, now = tuple(entries.values()), datetime.now(UTC)
    manifest = Manifest(0, "", 1, NONCE, now, format_name, files, world_size=world)
    open_store(root).put(f"{name}/manifest.json", manifest.to_json())


def opened(root: str, name: str) -> StoredState:
    store = open_store(root)
    manifest = Manifest.from_json(store.get(f"{name}/manifest.json"))
    return open_format(manifest.format).open(Source(store, name, manifest))


def load(root: str, name: str, objects: Mapping[str, Any]) -> None:
    """Fill the objects on this rank, without a word to the others."""
    state = opened(root, name)
    match({key: value for key, value in objects.items() if key != "seen"}, state).apply(state.fetch)


def save_and_note(root: str, name: str, layout: str, seed: int, format_name: str = "dcp") -> None:
    """Save a trained state, and what it is, in one of the formats."""
    objects = make(layout, seed, steps=2)
    if format_name == "dcp":
        save(root, name, objects)
    else:
        sink = Sink(root, name)
        open_format(format_name).write(capture(objects), sink)
        commit(root, name, sink.entries, format_name=format_name)
    rank = dist.get_rank() if dist.is_initialized() else 0
    Path(root, f"{name}.{rank}.json").write_text(json.dumps(fingerprint(objects)))


def differences(root: str, name: str, layout: str) -> list[str]:
    """What of a checkpoint is not the same once it was loaded, fresh and over a trained state."""
    expected = json.loads(Path(root, f"{name}.0.json").read_text())
    found = []
    for steps in (0, 1):
        objects = make(layout, seed=7, steps=steps)
        load(root, name, objects)
        actual = fingerprint(objects)
        found += [f"{name} -> {layout} after {steps}: {key}" for key in expected if actual.get(key) != expected[key]]
        found += [f"{name} -> {layout} after {steps}: {key} is new" for key in actual if key not in expected]
        found += [f"{name} -> {layout} after {steps}: {key}" for key in _not_sharded_alike(objects["optimizer"])]
        train(objects)
    return found


# What ranks are started with


def save_layouts(root: str, layouts: Mapping[str, str]) -> list[str]:
    for number, (name, layout) in enumerate(layouts.items()):
        save_and_note(root, name, layout, number)
    return sorted(layouts)


def load_layouts(root: str, pairs: list[tuple[str, str]], saves: Mapping[str, str] | None = None) -> list[str]:
    found = [one for name, layout in pairs for one in differences(root, name, layout)]
    save_layouts(root, saves or {})
    return found


def odd_states(root: str) -> dict[str, Any]:
    """What two ranks find of states that are not as usual."""
    rank = dist.get_rank()
    found: dict[str, Any] = {}
    recorder = Recorder()
    objects = make("fsdp", 0, steps=1)
    first = recorder.capture(objects)
    objects["seen"] = 18
    second = recorder.capture(objects)
    found["one shape"] = first.shape is second.shape and first.has_sharded
    found["in place"] = takes_in_place(objects["model"])
    plan = global_plan(gathered(local_plan(first, rank, 2)))[1][rank]
    found["bytes"] = sum(region.size for region in plan.regions.values())
    for name in ("safetensors", "torch"):
        found[name] = error_of(lambda name=name: open_format(name).plan(first))

    model = objects["model"]
    found["finite"] = non_finite(first)
    with torch.no_grad():
        model.up.weight.to_local()[0, 0] = float("nan")
    found["not finite"] = non_finite(Recorder().capture(objects))
    with torch.no_grad():
        model.up.weight.to_local()[0, 0] = 0.5

    # Parameters of another dtype, moments that are not of the parameters' dtype.
    for parameter in model.parameters():
        objects["optimizer"].state[parameter]["exp_avg"] = torch.full_like(parameter, 1 / 3, dtype=torch.float64)
    save(root, "wide", objects)
    expected = fingerprint(objects)
    fresh = make("fsdp", 1)
    load(root, "wide", fresh)
    found["wide"] = [key for key, value in fingerprint(fresh).items() if value != expected[key]]
    torch.manual_seed(0)
    half = fully_shard(Net().to(torch.bfloat16))
    load(root, "wide", {"model": half})
    found["cast"] = torch.equal(whole(half.up.weight), whole(model.up.weight).bfloat16())

    # Tied parameters, and one without rows on the second rank.
    tied, back = tied_rows(0), tied_rows(1)
    save(root, "tied", {"model": tied})
    load(root, "tied", {"model": back})
    found["tied"] = torch.equal(whole(back[1].weight), whole(tied[0].weight)) and back[0].weight is back[1].weight
    found["tied names"] = sorted(json.loads(Path(root, "tied/shards.json").read_text())["tensors"])

    # Only half of the elements of a tensor are there.
    mesh = init_device_mesh("cpu", (2,))
    partial = DTensor.from_local(torch.ones(2, 2), mesh, [Partial()])
    found["partial"] = error_of(lambda: local_plan(Recorder().capture({"w": partial}), rank, 2))
    other = {"w": torch.ones(3 + rank)} if rank else {"w": torch.ones(3), "v": torch.ones(1)}
    plans = gathered(local_plan(Recorder().capture(other), rank, 2))
    found["other"] = error_of(lambda: global_plan(plans))
    found["too few"] = error_of(lambda: global_plan(plans[:1]))
    sharded = gathered(
        local_plan(Recorder().capture({"w": distribute_tensor(torch.ones(4), mesh, [Shard(0)])}), rank, 2)
    )
    alone = replace(sharded[0], world_size=1)
    sharded[1] = replace(sharded[1], items=replace(sharded[1].items, items=[]))
    found["half"] = error_of(lambda: global_plan(sharded))
    sharded[0] = replace(sharded[0], items=sharded[1].items)
    found["none"] = error_of(lambda: global_plan(sharded))
    found["half of one"] = error_of(lambda: global_plan([alone]))
    if rank == 0:
        index, own = global_plan([replace(plans[0], world_size=1)])
        found["missing"] = error_of(lambda: finish(index, [own[0].rows[1:]]))
        found["surplus"] = error_of(lambda: finish(index, [[*own[0].rows, own[0].rows[0]._replace(fqn="x")]]))
        found["twice"] = error_of(lambda: finish(index, [[*own[0].rows, own[0].rows[0]]]))
    return found


def tied_rows(seed: int) -> nn.Module:
    """A weight of one row that stands twice, and a larger one."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(3, 1, bias=False), nn.Linear(3, 4))
    net[1].weight = net[0].weight
    return fully_shard(net)


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except CheckpointError as exc:
        return f"{type(exc).__name__}: {exc}"
    return ""
