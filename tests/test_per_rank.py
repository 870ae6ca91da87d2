"""What differs from rank to rank is saved for each rank, and given back to the same rank."""

from __future__ import annotations

import functools
import json
import logging
import pickle
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor
from torch.utils.data import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from ckptmgr import CheckpointManager, ConfigError, DamagedError, NotFoundError, StateMismatchError, per_rank
from ckptmgr.formats import open_format
from ckptmgr.formats.rank_files import OwnState
from ckptmgr.manifest import CheckpointInfo, Manifest
from ckptmgr.repository import Repository
from ckptmgr.resumption import PerRankReport, Reader, Resumed
from ckptmgr.staging import Live
from ckptmgr.state import PickleWarning, Recorder, RngReport, capture, match
from ckptmgr.state.codec import from_json
from ckptmgr.state.snapshot import FlatSnapshot, RankPart
from ckptmgr.testing import MemoryStore
from ckptmgr.testing.format_contract import written
from ckptmgr.testing.memory_files import MemoryFiles

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital'")

WORLD = 4


class Sampler:
    """Something with a state of its own on every rank."""

    def __init__(self, at: int = 0) -> None:
        self.state: dict[str, Any] = {"at": at, "order": torch.arange(at, at + 3)}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def seed(rank: int) -> None:
    random.seed(rank)
    np.random.seed(rank)
    torch.manual_seed(rank)


def draw() -> list[float]:
    return [random.random(), np.random.rand(), torch.rand(1).item()]


def loader(**options: Any) -> StatefulDataLoader[Any]:
    return StatefulDataLoader(list(range(24)), batch_size=2, shuffle=True, **options)


def saved(flat: FlatSnapshot, step: int = 5, world_size: int = WORLD, format: str = "safetensors") -> Repository:
    """A repository with one checkpoint."""
    repository = Repository(MemoryStore())
    draft = repository.begin(step, None, "run")
    plan = open_format(format).plan(flat)
    plan.write(flat, Live(plan.regions, flat), draft)
    now = datetime.now(UTC)
    draft.commit(Manifest(step, "run", 1, "", now, format, (), world_size=world_size))
    return repository


def job(objects: Callable[[int], dict[str, Any]]) -> FlatSnapshot:
    """What rank 0 has to write for a job of four: all of its own state, and what the others have of theirs."""
    parts: list[RankPart] = []
    for rank in range(WORLD):
        seed(rank)
        if rank == 0:
            flat = Recorder().capture(objects(0))
            parts.append(flat.ranks[0])
        else:
            parts.append(pickle.loads(pickle.dumps(Recorder().capture_part(objects(rank)))))
    return replace(flat, ranks=dict(enumerate(parts)))


def resume(
    repository: Repository,
    targets: dict[str, Any],
    rank: int = 0,
    world_size: int = WORLD,
    skip: Sequence[str] = (),
    **settings: Any,
) -> Resumed:
    reader = Reader(repository, "fast", settings.pop("trust_pickle", False), rank, world_size, **settings)
    found = reader.restore_first(repository.infos(), targets, True, skip, "cpu", lambda *_: None)
    assert found is not None
    return found[1]


def info(repository: Repository) -> CheckpointInfo:
    return repository.infos()[0]


@pytest.fixture(scope="module")
def four() -> Repository:
    return saved(job(lambda rank: {"model": torch.ones(3), "sampler": per_rank(Sampler(rank)), "at": per_rank(rank)}))


@pytest.mark.parametrize("format", ["safetensors", "torch"])
def test_every_rank_has_its_own_back_and_all_have_what_they_share(format: str) -> None:
    under_way: list[Any] = []

    def objects(rank: int) -> dict[str, Any]:
        own = loader()
        under_way.append(iter(own))
        for _ in range(rank + 1):
            next(under_way[rank])
        return {
            "model": nn.Linear(2, 1),
            "loader": own,
            "sampler": per_rank(Sampler(rank)),
            "position": per_rank(17 + rank),
        }

    flat = job(objects)
    rest = [[batch.tolist() for batch in batches] for batches in under_way]
    assert len({str(one) for one in rest}) == WORLD
    repository = saved(flat, format=format)
    for rank in range(WORLD):
        model, sampler, fresh = nn.Linear(2, 1), Sampler(), loader()
        report = resume(repository, {"model": model, "sampler": sampler, "loader": fresh}, rank)
        assert report.per_rank == PerRankReport("own", WORLD, WORLD)
        assert report.values == {"position": 17 + rank}
        assert (sampler.state["at"], sampler.state["order"].tolist()) == (rank, [rank, rank + 1, rank + 2])
        assert torch.equal(model.weight, flat.tensors[0])
        assert [batch.tolist() for batch in fresh] == rest[rank]


def test_generators_of_every_rank_go_on_where_they_were(four: Repository) -> None:
    for rank in range(WORLD):
        seed(99)
        assert resume(four, {}, rank).rng == RngReport(("python", "torch", "numpy"))
        drawn = draw()
        seed(rank)
        assert drawn == draw()


def test_a_rank_that_does_not_write_is_asked_only_for_its_own() -> None:
    class Loud(nn.Module):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            raise AssertionError("asked")

    part = Recorder().capture_part({"model": Loud(), "sampler": per_rank(Sampler(3)), "plain": 1})
    assert list(part.entries) == ["sampler"]
    assert part.notes == {"sampler": {"class": "test_per_rank.Sampler"}}


def test_a_part_is_a_copy_that_can_be_pickled() -> None:
    sampler = Sampler(1)
    objects = {"sampler": per_rank(sampler), "tied": per_rank([sampler.state["order"]] * 2)}
    flat = Recorder().capture(objects, rank=2)
    assert (list(flat.ranks), flat.entries, list(flat.tensors)) == ([2], {}, [])
    sampler.state["order"].zero_()
    sampler.state["at"] = 9
    back = pickle.loads(pickle.dumps(flat.ranks[2]))
    assert back.entries == {"sampler": {"at": 1, "order": {"$tensor": 0}}, "tied": [{"$tensor": 0}, {"$tensor": 0}]}
    assert [from_json(tensor).tolist() for tensor in back.tensors] == [[1, 2, 3]]


def test_only_chooses_among_what_is_per_rank_too() -> None:
    objects = {"model": torch.ones(1), "a": per_rank(1), "b": per_rank(2)}
    assert list(Recorder().capture(objects, only=["model", "b"]).ranks[0].entries) == ["b"]
    assert list(Recorder().capture_part(objects, only=["model", "a"]).entries) == ["a"]


@pytest.mark.parametrize("is_marked", [True, False])
def test_a_target_stands_there_marked_or_not(four: Repository, is_marked: bool) -> None:
    sampler = Sampler()
    resume(four, {"model": torch.zeros(3), "sampler": per_rank(sampler) if is_marked else sampler}, 2)
    assert sampler.state["at"] == 2


def test_models_and_optimizers_can_be_per_rank() -> None:
    """A stage of a pipeline and its optimizer, on every rank another."""

    def stage(rank: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(rank)
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(torch.ones(2)).sum().backward()
        optimizer.step()
        return model, optimizer

    def objects(rank: int) -> dict[str, Any]:
        model, optimizer = stage(rank)
        return {"model": per_rank(model), "optimizer": per_rank(optimizer)}

    repository = saved(job(objects))
    for rank in (3, 0):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(model.parameters())
        resume(repository, {"model": model, "optimizer": optimizer}, rank)
        expected, expected_optimizer = stage(rank)
        assert torch.equal(model.weight, expected.weight)
        assert optimizer.param_groups[0]["lr"] == 0.1
        state, wanted = optimizer.state[model.weight], expected_optimizer.state[expected.weight]  # type: ignore[index]
        assert torch.equal(state["exp_avg"], wanted["exp_avg"])


@pytest.mark.parametrize("value", [{"a": per_rank(1)}, [[per_rank(1)]], (per_rank(1),), per_rank(per_rank(1))], ids=str)
def test_only_whole_entries_can_be_marked(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"^e.*: per_rank marks a whole entry and can't stand within one"):
        capture({"e": value})
    stored = open_format("safetensors").open(written(open_format("safetensors"), capture({"e": 1})))
    with pytest.raises(ConfigError, match=r"^e: per_rank marks a whole entry"):
        match({"e": value}, stored)


def test_a_mark_in_an_uncommon_container_is_refused_too() -> None:
    with pytest.raises(ConfigError, match=r"^e\[0\]: per_rank marks a whole entry"):
        capture({"e": deque([per_rank(1)])})


def test_a_sharded_tensor_is_no_rank_s_own() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = distribute_tensor(torch.ones(2), init_device_mesh("cpu", (1,)))
        with pytest.raises(ConfigError, match="own holds a DTensor, of which every rank's part is saved anyway"):
            capture({"own": per_rank({"w": sharded})})
    finally:
        dist.destroy_process_group()


def test_loaders_in_a_container_of_their_own_are_per_rank_and_beside_others_are_not() -> None:
    part = capture({"loaders": {"train": loader(), "val": loader()}, "mixed": [loader(), 1], "none": []})
    assert list(part.ranks[0].entries) == ["loaders"]
    assert list(part.entries) == ["mixed", "none"]


def test_what_has_no_plain_form_is_pickled_for_each_rank_and_loads_when_trusted() -> None:
    sparse = torch.eye(2).to_sparse()
    with pytest.warns(PickleWarning, match="is pickled"):
        flat = job(lambda rank: {"own": per_rank({"fn": functools.partial(int, base=rank + 7), "t": sparse})})
    repository = saved(flat)
    with pytest.raises(StateMismatchError, match=r"pickled.*: own\.fn, own\. Pass trust_pickle=True"):
        resume(repository, {}, 3)
    own = resume(repository, {}, 3, trust_pickle=True).values["own"]
    assert (own["fn"]("11"), own["t"].to_dense().tolist()) == (11, [[1, 0], [0, 1]])


def test_what_all_ranks_share_of_pickled_values_is_read_when_one_of_them_is_asked_for() -> None:
    """Ranks read together, so none may read what the others do not."""
    with pytest.warns(PickleWarning):
        snapshot = capture({"own": per_rank(functools.partial(int)), "shared": functools.partial(str)})
    files = written(open_format("safetensors"), snapshot)
    stored = open_format("safetensors").open(files)
    state = OwnState(stored, stored.part(0))
    files.opened.clear()
    assert state.objects()["own"]() == 0
    assert files.opened == []
    assert state.objects()["shared"]() == ""
    assert files.opened == ["objects.pt"]
    objects = state.objects()
    assert (sorted(objects), len(objects)) == (["own", "shared"], 2)
    assert OwnState(stored, None).entries.keys() == {"shared"}


def test_a_part_is_filled_into_tensors_that_fit() -> None:
    format = open_format("safetensors")
    stored = format.open(written(format, capture({"own": per_rank(torch.ones(2))})))
    state = OwnState(stored, stored.part(0))
    leaf, target = state.entries["own"], torch.zeros(2)
    assert state.fetch({leaf: target})[leaf] is target
    assert target.tolist() == [1, 1]
    with pytest.raises(StateMismatchError):
        state.fetch({leaf: torch.zeros(3)})
    fresh = state.fetch({leaf: None})[leaf].zero_()
    assert (fresh.tolist(), state.fetch({leaf: None})[leaf].tolist()) == ([0, 0], [1, 1])


def test_a_rank_reads_only_its_own_file() -> None:
    flat = job(lambda rank: {"at": per_rank(rank)})
    format = open_format("safetensors")
    files = MemoryFiles()
    plan = format.plan(flat)
    plan.write(flat, Live(plan.regions, flat), files)
    assert sorted(name for name in files.data if name != "state.json") == [f"ranks/rank-0000{r}.json" for r in range(4)]
    part = format.open(files).part(2)
    assert part is not None
    assert part.entries == {"at": 2}
    assert files.opened == ["state.json", "ranks/rank-00002.json"]


def test_every_rank_makes_one_call_to_its_source_whatever_it_finds() -> None:
    """A source that reads for all ranks at once counts on it."""

    class Counting(MemoryFiles):
        calls = 0

        def scatter(self, segments: Any) -> None:
            self.calls += 1
            super().scatter(segments)

    files = Counting()
    format = open_format("safetensors")
    format.write(capture({"at": per_rank(1)}), files)
    state = format.open(files)
    for calls, rank in enumerate((0, 5), 1):
        state.part(rank)
        assert files.calls == calls


def test_what_a_tensor_is_comes_back_with_it() -> None:
    own = {
        "parameter": nn.Parameter(torch.ones(2)),
        "frozen": nn.Parameter(torch.ones(2), requires_grad=False),
        "leaf": torch.ones(2, requires_grad=True),
        "empty": torch.ones(0, 3, dtype=torch.float8_e5m2),
        "words": torch.tensor([1 << 31], dtype=torch.uint32),
    }
    values = resume(saved(job(lambda _: {"own": per_rank(own)})), {}, 1).values["own"]

    def about(tensors: dict[str, torch.Tensor]) -> list[Any]:
        return [(name, type(t), t.requires_grad, t.dtype, t.shape, t.tolist()) for name, t in tensors.items()]

    assert about(values) == about(own)


def test_a_part_that_is_gone_is_damage() -> None:
    flat = job(lambda rank: {"at": per_rank(rank)})
    repository = saved(replace(flat, ranks={0: flat.ranks[0]}))
    assert resume(repository, {}, 0).values == {"at": 0}
    with pytest.raises(DamagedError, match="saved by 4 ranks, and what rank 3 had is not there"):
        resume(repository, {}, 3)


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.pop("rng"),
        lambda body: body.update(entries=[]),
        lambda body: body.update(tensors=[3]),
        lambda body: body.update(tensors=[]),
        lambda body: body.update(tensors=3),
        lambda body: body.update(notes=3),
    ],
)
def test_a_file_of_a_rank_that_does_not_parse_is_damage(change: Callable[[dict[str, Any]], Any]) -> None:
    format = open_format("safetensors")
    files = written(format, capture({"own": per_rank(torch.ones(1))}))
    body = json.loads(files.data["ranks/rank-00000.json"])
    change(body)
    files.data["ranks/rank-00000.json"] = json.dumps(body).encode()
    files.seal()
    with pytest.raises(DamagedError, match=r"ranks/rank-00000\.json"):
        format.open(files).part(0)


def test_a_file_of_a_rank_that_is_too_large_to_be_one_is_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    format = open_format("safetensors")
    files = written(format, capture({"own": per_rank(torch.ones(1))}))
    monkeypatch.setattr("ckptmgr.formats.rank_files.MAX_JSON_SIZE", 100)
    with pytest.raises(DamagedError, match=r"ranks/rank-00000\.json is [\d,]+ bytes, more than any"):
        format.open(files).part(0)


# Another number of ranks


def test_exact_refuses_another_number_of_ranks_and_names_both(four: Repository) -> None:
    before = torch.get_rng_state()
    sampler = Sampler()
    for world_size, now in ((1, "is restored by 1 rank,"), (2, "is restored by 2 ranks,")):
        with pytest.raises(StateMismatchError, match=f"step 5 .*saved by 4 ranks and {now}"):
            resume(four, {"sampler": sampler}, 0, world_size, on_world_change="exact")
    assert sampler.state["at"] == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert resume(four, {}, on_world_change="exact").per_rank.policy == "own"


def test_derive_seeds_every_rank_apart_and_the_same_again(four: Repository) -> None:
    drawn = []
    for world_size in (2, 8):
        for rank in range(world_size):
            for start in (1, 2):
                seed(start)
                report = resume(four, {}, rank, world_size)
                assert report.rng == RngReport(derived=("python", "torch", "numpy"))
                drawn.append(draw())
    assert drawn[::2] == drawn[1::2]
    assert drawn[:4] == drawn[4:8]  # it does not depend on how many there are now
    assert len({tuple(one) for one in drawn}) == 8
    assert len({number for one in drawn[::2] for number in one}) == 3 * 8


def test_derive_depends_on_the_step_and_on_what_was_saved(four: Repository) -> None:
    drawn = []
    flat = job(lambda rank: {"model": torch.ones(1)})
    other = Recorder().capture({"model": torch.ones(1)}).ranks[0]
    for repository in (saved(flat), saved(flat, step=6), saved(replace(flat, ranks={0: other}))):
        resume(repository, {}, 0, 2)
        drawn.append(draw())
    assert len({number for one in drawn for number in one}) == 9


def test_entries_of_other_ranks_are_left_alone_and_reported(four: Repository, caplog: pytest.LogCaptureFixture) -> None:
    for rank, policy in ((0, "derive"), (1, "drop")):
        model, sampler = torch.zeros(3), Sampler(50)
        report = resume(four, {"model": model, "sampler": sampler}, rank, 2, on_world_change=policy)
        assert report.per_rank == PerRankReport(policy, WORLD, 2, ("at", "sampler"))
        assert (report.values, report.missing, sampler.state["at"]) == ({}, (), 50)
        assert model.tolist() == [1, 1, 1]
    assert [record.message for record in caplog.records] == [
        "resume.world_changed step=5 saved_by=4 now=2 on_world_change=derive: random generators are seeded anew on "
        "every rank; not restored: at, sampler"
    ]
    assert caplog.records[0].levelno == logging.WARNING


def test_drop_leaves_the_generators_as_they_are_and_says_why(four: Repository) -> None:
    before = torch.get_rng_state()
    report = resume(four, {}, 0, 1, on_world_change="drop")
    assert torch.equal(torch.get_rng_state(), before)
    reason = "saved by 4 ranks, restored by 1 rank"
    assert report.rng == RngReport(skipped=tuple(f"{name}: {reason}" for name in ("python", "torch", "numpy")))


def test_what_is_skipped_is_not_reported_and_its_generators_stay(four: Repository) -> None:
    before = torch.get_rng_state()
    report = resume(four, {"sampler": Sampler()}, 0, 2, skip=["sampler", "rng"])
    assert report.per_rank.not_restored == ("at",)
    assert report.rng == RngReport()
    assert torch.equal(torch.get_rng_state(), before)
    assert resume(four, {}, 1, skip=["at", "sampler", "model"]).values == {}


def test_other_ranks_entries_load_only_where_there_are_as_many(four: Repository) -> None:
    assert Reader(four, "fast", False, 3, WORLD).load(info(four), ["at"], "cpu") == {"at": 3}
    alone = Reader(four, "fast", False)
    assert list(alone.load(info(four), None, "cpu")) == ["model"]
    with pytest.raises(NotFoundError, match=r"no entry at; it has model\. What 4 ranks had of at loads only where"):
        alone.load(info(four), ["at"], "cpu")


def test_matching_touches_nothing_until_it_is_applied(four: Repository) -> None:
    model, sampler, before = torch.zeros(3), Sampler(), torch.get_rng_state()
    reader = Reader(four, "fast", False, 1, WORLD)
    matched = reader.open_and_match(info(four), {"model": model, "sampler": sampler}, True, (), "cpu")
    assert (matched.info.step, matched.values) == (5, {"at": 1})
    assert (model.sum(), sampler.state["at"]) == (0, 0)
    assert torch.equal(torch.get_rng_state(), before)
    assert matched.apply().step == 5
    assert (model.sum(), sampler.state["at"]) == (3, 1)


# One process


def test_a_loader_of_one_process_stands_in_its_rank_s_file(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save({"model": nn.Linear(1, 1)}, 1).wait()
        manager.save({"model": nn.Linear(1, 1), "loader": loader(), "at": per_rank(3)}, 2).wait()
    first, second = (json.loads((tmp_path / f"step-0000000{n}/ranks/rank-00000.json").read_bytes()) for n in (1, 2))
    assert list(first) == ["format_version", "rng"]
    assert list(second["entries"]) == ["loader", "at"]
    assert list(json.loads((tmp_path / "step-00000002/state.json").read_bytes())["entries"]) == ["model"]
    with CheckpointManager(tmp_path, read_only=True) as manager:
        assert list(manager.load()) == ["model", "loader", "at"]
        assert list(manager.load(mmap=True)) == ["model", "loader", "at"]
        fresh = loader()
        assert manager.resume(loader=per_rank(fresh)).values["at"] == 3


def test_a_loader_that_was_saved_among_the_shared_entries_is_restored_as_it_was() -> None:
    """First versions wrote it so; by another number of ranks it is not taken for every rank's."""
    whole = loader()
    batches = iter(whole)
    next(batches)
    flat = Recorder().capture({"loader": [whole, 0]})  # not a loader alone, so it is shared
    old = replace(flat, entries={"loader": flat.entries["loader"][0]}, notes={})
    repository = saved(old, world_size=1)
    rest = [batch.tolist() for batch in batches]
    for target in (loader(), per_rank(loader())):
        assert resume(repository, {"loader": target}, world_size=1).per_rank.not_restored == ()
        assert [batch.tolist() for batch in getattr(target, "value", target)] == rest
    report = resume(repository, {"loader": loader()}, 1, 2)
    assert report.per_rank == PerRankReport("derive", 1, 2, ("loader",))
    assert report.values == {}


@pytest.mark.parametrize(("then", "now"), [(0, 1), (2, 1)])
def test_a_loader_with_another_number_of_workers_is_named(tmp_path: Path, then: int, now: int) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save({"loader": loader(num_workers=then)}, 1)
    with CheckpointManager(tmp_path) as manager, pytest.raises(StateMismatchError) as caught:
        manager.resume(loader=loader(num_workers=now))
    assert str(caught.value).startswith("loader: its load_state_dict() refused what the checkpoint holds: ")
    assert "A data loader goes on with as many workers as it had, over the same data, or is skipped." in str(
        caught.value
    )


def test_a_loader_goes_on_in_the_order_of_its_epoch(tmp_path: Path) -> None:
    """Its own state says how far it was, but not what `set_epoch` had said."""

    def loader() -> StatefulDataLoader[Any]:
        data = list(range(12))
        return StatefulDataLoader(data, batch_size=2, sampler=DistributedSampler(data, num_replicas=1, rank=0))

    first = loader()
    first.sampler.set_epoch(3)
    batches = iter(first)
    seen = [next(batches).tolist(), next(batches).tolist()]
    with CheckpointManager(str(tmp_path)) as manager:
        manager.save({"loader": first}, 2)
    rest = [batch.tolist() for batch in batches]
    second = loader()
    with CheckpointManager(str(tmp_path)) as manager:
        manager.resume(loader=second)
    assert (second.sampler.epoch, [batch.tolist() for batch in second]) == (3, rest)
    assert sorted(number for batch in seen + rest for number in batch) == list(range(12))
