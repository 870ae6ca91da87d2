"""What do the ranks of `test_store_writer` do? They save and load with `torch.distributed.checkpoint`."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ckptmgr import StoreReader, StoreWriter, plain_errors

ROWS = 11


def state(scale: float = 1.0, world: int | None = None) -> dict[str, Any]:
    """Sharded by rows and by columns, replicated, plain, and what is no tensor."""
    values = scale * torch.arange(ROWS * 7, dtype=torch.float32).view(ROWS, 7)
    plain = {"large": scale * torch.arange(30_000.0), "small": scale * torch.ones(3)}
    found: dict[str, Any] = {"rows": values, "columns": values + 1, "same": values + 2}
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (world or dist.get_world_size(),))
        placements = {"rows": Shard(0), "columns": Shard(1), "same": Replicate()}
        found = {key: distribute_tensor(value, mesh, [placements[key]]) for key, value in found.items()}
    return {"model": {**found, **plain}, "step": int(17 * scale), "history": [1, 2, {"loss": 0.5 * scale}]}


def whole(sd: dict[str, Any]) -> dict[str, Any]:
    """As plain values that can be compared. A collective."""
    model = {
        key: (value.full_tensor() if isinstance(value, DTensor) else value).tolist()
        for key, value in sd["model"].items()
    }
    return {"model": model, "step": sd["step"], "history": sd["history"]}


def is_loaded(reader: Any, expected: float = 1.0) -> bool:
    """Whether a reader gives a whole state back."""
    loaded = state(0.0)
    with plain_errors():
        dcp.load(loaded, storage_reader=reader)
    return whole(loaded) == whole(state(expected))


def error_of(call: Callable[[], object]) -> str:
    """What was raised, in words of ours."""
    try:
        with plain_errors():
            call()
    except Exception as exc:  # noqa: BLE001 - it is the answer
        return f"{type(exc).__name__}: {exc}"
    return ""


class UnpicklableError(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__("no bytes today")
        self.held = lambda: (one, two)


class Failing(dcp.DefaultSavePlanner):
    """Fails on rank 1, with what can't be sent to another rank, once some of it is written."""

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if dist.get_rank() == 1:
            raise UnpicklableError(1, 2)
        return super().resolve_data(write_item)


class Forgetful(StoreWriter):
    """Loses a result on its way to rank 0."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        future = super().write_data(plan, planner)
        if dist.get_rank() == 1:
            del future.value()[0]
        return future


class Skipping(dcp.DefaultLoadPlanner):
    """Plans to read less than is there."""

    def create_local_plan(self) -> Any:
        plan = super().create_local_plan()
        plan.items = [item for item in plan.items if item.storage_index.fqn != "model.rows"]
        return plan


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return _write, (self.path,)


def _write(path: str) -> str:
    Path(path).write_text("ran")
    return path


@contextmanager
def logged() -> Iterator[list[str]]:
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Handler()
    logger = logging.getLogger("ckptmgr.sharded")
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def two_ranks(root: str, s3_url: str, s3_options: dict[str, Any]) -> dict[str, Any]:
    """Everything that two ranks do, and what came of it."""
    rank = dist.get_rank()
    found: dict[str, Any] = {}
    for place, url, options in (("local", f"{root}/step-100", None), ("s3", f"{s3_url}/run/step-100", s3_options)):
        writer = StoreWriter(url, options=options, split_size_bytes=2000)
        with plain_errors():
            dcp.save(state(), storage_writer=writer)
        found[f"{place} is back"] = is_loaded(StoreReader(url, options=options))
        again = StoreWriter(url, options=options)
        found[f"{place} again"] = error_of(lambda again=again: dcp.save(state(2.0), storage_writer=again))
        found[f"{place} is untouched"] = is_loaded(StoreReader(url, options=options))
        half = f"{url}-half"
        failing = StoreWriter(half, options=options)
        found[f"{place} unpicklable"] = error_of(
            lambda failing=failing: dcp.save(state(), storage_writer=failing, planner=Failing())
        )
        lossy = Forgetful(half, options=options)
        found[f"{place} forgotten"] = error_of(lambda lossy=lossy: dcp.save(state(), storage_writer=lossy))
        found[f"{place} half"] = error_of(
            lambda half=half, options=options: is_loaded(StoreReader(half, options=options))
        )
        with plain_errors():
            dcp.save(state(3.0), storage_writer=StoreWriter(half, options=options))
        found[f"{place} after failures"] = is_loaded(StoreReader(half, options=options), 3.0)
    other = f"{s3_url}/run/by-id"
    with plain_errors():
        dcp.save(state(4.0), checkpoint_id=other, storage_writer=StoreWriter(f"{s3_url}/x/y", options=s3_options))
    found["by id"] = is_loaded(StoreReader(other, options=s3_options), 4.0)
    found["stock"] = is_loaded(dcp.FileSystemReader(StoreReader(f"{root}/step-100").data_url))

    side = dist.new_group(backend="gloo")
    future = dcp.async_save(state(5.0), storage_writer=StoreWriter(f"{root}/async"), process_group=side)
    with plain_errors():
        future.result()
    found["async"] = is_loaded(StoreReader(f"{root}/async"), 5.0)

    differing = {"value": f"of {rank}", "rng": torch.full((3,), float(rank)), f"rank_{rank}": f"own {rank}"}
    dcp.save(differing, storage_writer=StoreWriter(f"{root}/differing"))
    back: dict[str, Any] = {"value": "", "rng": torch.zeros(3), f"rank_{rank}": ""}
    dcp.load(back, storage_reader=StoreReader(f"{root}/differing"))
    found["differing"] = [back["value"], back["rng"].tolist(), back[f"rank_{rank}"]]

    mark = f"{root}/ran-{rank}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dcp.save({"odd": Payload(mark)} if rank == 0 else {}, storage_writer=StoreWriter(f"{root}/payload"))
    found["payload warned"] = [f"{one.category.__name__}: {one.message}" for one in caught if "odd" in str(one.message)]
    odd = {"odd": 0} if rank == 0 else {}
    found["payload"] = error_of(lambda: dcp.load(odd, storage_reader=StoreReader(f"{root}/payload")))
    found["payload ran"] = Path(mark).exists()
    dcp.load(odd, storage_reader=StoreReader(f"{root}/payload", trust_pickle=True))
    found["payload trusted"] = [odd.get("odd") == mark, Path(mark).exists()]

    halves = {"model": {"large": torch.zeros(30_000, dtype=torch.bfloat16)}}
    reader = StoreReader(f"{root}/step-100")
    with logged() as lines:
        found["other dtype"] = error_of(lambda: dcp.load(halves, storage_reader=reader))
    found["left"] = lines
    dcp.load(halves, storage_reader=StoreReader(f"{root}/step-100", casts=True))
    found["cast"] = torch.equal(halves["model"]["large"], torch.arange(30_000.0).bfloat16())
    found["uncovered"] = error_of(lambda: dcp.load(state(), storage_reader=reader, planner=Skipping()))
    found["nothing"] = error_of(lambda: dcp.load(state(), storage_reader=StoreReader(f"{root}/nothing")))
    dcp.save(state(), storage_writer=dcp.FileSystemWriter(f"{root}/stock", sync_files=False))
    found["stock folder"] = error_of(lambda: dcp.load(state(), storage_reader=StoreReader(f"{root}/stock")))
    found["no collectives"] = error_of(
        lambda: dcp.save(state(), storage_writer=StoreWriter(f"{root}/alone"), use_collectives=False)
    )
    found["one rank only"] = error_of(
        lambda: dcp.save(state(), storage_writer=StoreWriter(f"{root}/alone"), no_dist=True)
    )
    last = StoreWriter(f"{root}/alone")
    left = state()
    dist.destroy_process_group()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found["group gone"] = error_of(lambda: dcp.save(left, storage_writer=last))
    found["alone"] = error_of(StoreReader(f"{root}/alone")._place.open)
    return found


def load_on(root: str, expected: float) -> bool:
    return is_loaded(
        StoreReader(
            f"{root}/one",
        ),
        expected,
    ) and is_loaded(StoreReader(f"{root}/step-100"))
