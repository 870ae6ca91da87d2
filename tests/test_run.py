"""A writer remembers what it wrote, asks only for what others may have changed, and harms nothing they did."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from ckptmgr import CheckpointManager
from ckptmgr.errors import ConfigError, DamagedError, FencedError, StoreError
from ckptmgr.lock import acquire
from ckptmgr.manifest import CheckpointInfo, Manifest
from ckptmgr.repository import Repository
from ckptmgr.store import Entry, Store
from ckptmgr.store.local import LocalStore
from ckptmgr.testing import MemoryStore, PausingStore

NOW = datetime(2020, 1, 1, tzinfo=UTC)


class Noting(MemoryStore):
    """Notes what is asked of it: (method, key)."""

    def __init__(self) -> None:
        super().__init__(can_rename=False)
        self.calls: list[tuple[str, str]] = []

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        self.calls.append(("get", key))
        return super().get(key, start, end)

    def list(self, folder: str = "", *, recursive: bool = False) -> list[Entry]:
        self.calls.append(("list", folder))
        return super().list(folder, recursive=recursive)

    def stat(self, key: str) -> Entry | None:
        self.calls.append(("stat", key))
        return super().stat(key)

    def delete(self, keys: Iterable[str]) -> None:
        keys = list(keys)
        self.calls += [("delete", key) for key in keys]
        super().delete(keys)

    def manifests_read(self) -> Counter[str]:
        names = (key.split("/")[0] for method, key in self.calls if method == "get" and key.endswith("/manifest.json"))
        return Counter(names)


def manager(store: MemoryStore, **settings: Any) -> CheckpointManager:
    return CheckpointManager("root", store=store, background=False, run="run", **settings)


def fill(store: MemoryStore, steps: Iterable[int]) -> None:
    """Checkpoints of a first attempt, whose claim is recorded, without data."""
    store.put(".ckptmgr/lease/0000000001.json", b"{}")
    store.put(".ckptmgr/lease/0000000001.beat", b'{"released": true}')
    for step in steps:
        about = Manifest(
            step=step, run="run", attempt=1, nonce=f"{step:016x}", time=NOW, format="safetensors", files=()
        )
        store.put(f"step-{step:08d}/manifest.json", about.to_json())


def started(store: MemoryStore, **settings: Any) -> CheckpointManager:
    mgr = manager(store, **settings)
    mgr.save({"x": 1}, 1)
    return mgr


def put_into(store: MemoryStore, step: int, attempt: int) -> None:
    about = Manifest(step=step, run="run", attempt=attempt, nonce="c0ffee", time=NOW, format="raw", files=())
    store.put(f"step-{step:08d}/manifest.json", about.to_json())


# What is read


def test_a_resume_without_keep_rules_lists_the_root_once_and_reads_one_checkpoint() -> None:
    store = Noting()
    with manager(store, keep={"last": None}) as mgr:
        for step in range(1, 31):
            mgr.save({"x": step}, step)
    store.calls.clear()
    with manager(store, keep={"last": None}) as mgr:
        assert mgr.resume().values == {"x": 30}
        assert store.manifests_read() == {"step-00000030": 1}
        assert store.calls.count(("list", "")) == 1


def test_a_resume_with_keep_rules_lists_the_root_once_and_reads_each_manifest_once() -> None:
    store = Noting()
    with manager(store, keep={"last": 20}) as mgr:
        for step in range(1, 31):
            mgr.save({"x": step}, step)
    store.calls.clear()
    with manager(store, keep={"last": 5}) as mgr:
        mgr.resume()
        opened = store.manifests_read()
        assert [opened[f"step-{step:08d}"] for step in (30, 26)] == [1, 1]
        assert set(opened) == {f"step-{step:08d}" for step in range(11, 31)}
        assert store.calls.count(("list", "")) == 1
        assert mgr.all_steps() == [26, 27, 28, 29, 30]


def test_a_reader_finds_the_newest_by_one_manifest() -> None:
    store = Noting()
    with started(store, keep={"last": None}) as writer:
        for step in range(2, 40):
            writer.save({"x": step}, step)
        store.calls.clear()
        reader = manager(store, read_only=True)
        assert (reader.latest_step(), reader.info("latest").step) == (39, 39)
        assert reader.load()["x"] == 39
        assert set(store.manifests_read()) == {"step-00000039"}


def test_a_writer_that_has_not_saved_yet_finds_the_newest_by_one_manifest() -> None:
    store = Noting()
    fill(store, range(1, 50))
    with manager(store, keep={"last": None}) as mgr:
        mgr._run.hold()
        store.calls.clear()
        assert mgr.latest_step() == 49
        assert set(store.manifests_read()) == {"step-00000049"}


def test_a_writer_that_has_saved_finds_the_newest_by_one_manifest() -> None:
    store = Noting()
    with started(store, keep={"last": None}) as mgr:
        mgr.save({"x": 2}, 2)
        store.calls.clear()
        assert mgr.latest_step() == 2
        assert set(store.manifests_read()) == {"step-00000002"}


@pytest.mark.parametrize("keep", [{"last": None}, {"last": 1000}, {"last": 3, "every_steps": 1}, {"last": 3}])
def test_a_save_asks_as_much_of_the_store_whatever_the_number_of_checkpoints(keep: dict[str, Any]) -> None:
    asked = []
    for count in (5, 300):
        store = Noting()
        fill(store, range(1, count + 1))
        with manager(store, keep=keep) as mgr:
            info = mgr.info("latest")
            mgr._run.go_on_from(info, mgr._run.listing())
            mgr._run.rotate()
            mgr.save({"x": 1}, count + 1)
            store.calls.clear()
            mgr.save({"x": 1}, count + 2)
            asked.append(Counter(method for method, _ in store.calls))
    assert asked[0] == asked[1]
    assert asked[0]["list"] <= 7  # each look at the lock and at the pins is one
    assert asked[0]["get"] <= 6


def test_a_tag_is_looked_for_among_what_is_known() -> None:
    store = Noting()
    with started(store) as mgr:
        mgr.save({"x": 2}, 2, tags=["paper"])
        store.calls.clear()
        mgr.save({"x": 3}, 3, tags=["talk"])
        assert store.manifests_read() == {"step-00000003": 1}  # is there one already?


# What others do meanwhile


def test_a_pin_set_by_a_reader_holds_at_the_very_next_save_until_it_is_taken_away() -> None:
    store = MemoryStore(can_rename=False)
    with started(store, keep={"last": 2}) as mgr:
        for step in (2, 3):
            mgr.save({"x": step}, step)
        manager(store, read_only=True).pin(2, "eval")
        for step in (4, 5, 6):
            mgr.save({"x": step}, step)
        assert mgr.all_steps() == [2, 5, 6]
        manager(store, read_only=True).unpin(2)
        mgr.save({"x": 7}, 7)
        assert mgr.all_steps() == [6, 7]


def test_a_pin_set_before_a_save_with_a_tag_holds() -> None:
    store = MemoryStore(can_rename=False)
    with started(store, keep={"last": 2}) as mgr:
        for step in (2, 3):
            mgr.save({"x": step}, step)
        manager(store, read_only=True).pin(2)
        mgr.save({"x": 4}, 4, tags=["paper"])
        assert mgr.all_steps() == [2, 3, 4]


def test_a_mark_of_damage_counts_at_the_very_next_save() -> None:
    store = MemoryStore(can_rename=False)
    with started(store, keep={"last": 2}) as mgr:
        for step in (2, 3):
            mgr.save({"x": step}, step)
        mgr._run.repository.mark_damaged(mgr.info(3), "bit rot")
        mgr.save({"x": 4}, 4)
        assert mgr.all_steps() == [2, 4]  # 3 counts for nothing


def test_what_somebody_deleted_is_no_error_and_counts_for_nothing_when_it_was_to_stay() -> None:
    store = MemoryStore(can_rename=False)
    with started(store, keep={"last": 2, "min_good": 3}) as mgr:
        for step in range(2, 7):
            mgr.save({"x": step}, step)
        assert mgr.all_steps() == [4, 5, 6]
        store.delete(["step-00000005/", "step-00000006/"])
        mgr.save({"x": 7}, 7)
        assert mgr.all_steps() == [4, 7]  # by what was known, 4 was one too many
        store.delete(["step-00000004/"])
        for step in range(8, 12):
            mgr.save({"x": step}, step)
        assert mgr.all_steps() == [9, 10, 11]


def test_the_latest_step_is_what_the_store_says_not_what_was_saved() -> None:
    store = MemoryStore(can_rename=False)
    with started(store) as mgr:
        mgr.save({"x": 2}, 2)
        store.delete(["step-00000002/"])
        assert (mgr.latest_step(), mgr.all_steps(), mgr.info().step) == (1, [1], 1)


def test_a_checkpoint_of_a_later_attempt_carried_in_by_hand_is_archived_and_costs_none_of_ours() -> None:
    store = MemoryStore(can_rename=False)
    with started(store, keep={"last": 2}) as mgr:
        for step in (2, 3):
            mgr.save({"x": step}, step)
    put_into(store, 1, attempt=9)
    with manager(store, keep={"last": 2}) as mgr:
        assert mgr.resume().step == 3
        mgr.save({"x": 4}, 4)
        assert mgr.all_steps() == [3, 4]
        assert [aside.name for aside in mgr._run.repository.archived()] == ["step-00000001"]


def test_prune_looks_at_the_store_again() -> None:
    store = MemoryStore(can_rename=False)
    with started(store, keep={"last": 2}) as mgr:
        mgr.save({"x": 2}, 2)
        put_into(store, 0, attempt=1)
        assert [verdict.info.step for verdict in mgr.prune().drop] == [0]


def test_after_a_deletion_on_request_the_rules_are_asked_anew() -> None:
    store = MemoryStore(can_rename=False)
    with started(store, keep={"last": 3}) as mgr:
        for step in (2, 3):
            mgr.save({"x": step}, step)
        mgr.delete(2)
        mgr.save({"x": 4}, 4)
        assert mgr.all_steps() == [1, 3, 4]


def test_a_failed_deletion_is_made_up_for_at_the_next_save(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(MemoryStore):
        fails = False

        def delete(self, keys: Iterable[str]) -> None:
            keys = list(keys)
            if self.fails and any(key.startswith("step-") for key in keys):
                raise StoreError("could not delete")
            super().delete(keys)

    store = Failing(can_rename=False)
    with started(store, keep={"last": 2}) as mgr:
        mgr.save({"x": 2}, 2)
        store.fails = True
        with caplog.at_level(logging.WARNING):
            mgr.save({"x": 3}, 3)
        assert "retention.failed step=3" in caplog.text
        store.fails = False
        mgr.save({"x": 4}, 4)
        assert mgr.all_steps() == [3, 4]


def test_a_prune_that_failed_is_made_up_for_at_the_next_save() -> None:
    class Failing(MemoryStore):
        fails = False

        def delete(self, keys: Iterable[str]) -> None:
            keys = list(keys)
            if self.fails and any(key.startswith("step-") for key in keys):
                raise StoreError("could not delete")
            super().delete(keys)

    store = Failing(can_rename=False)
    with started(store, keep={"last": 2}) as mgr:
        mgr.save({"x": 3}, 3)
        put_into(store, 2, attempt=1)
        put_into(store, 0, attempt=1)
        store.fails = True
        with pytest.raises(StoreError):
            mgr.prune()
        store.fails = False
        mgr.save({"x": 4}, 4)
        assert mgr.all_steps() == [3, 4]


def test_records_that_could_not_be_read_are_asked_for_again_at_the_next_save() -> None:
    class Failing(MemoryStore):
        fails = False

        def list(self, folder: str = "", *, recursive: bool = False) -> list[Entry]:
            if self.fails and folder == ".ckptmgr":
                raise StoreError("could not list")
            return super().list(folder, recursive=recursive)

    store = Failing(can_rename=False)
    with started(store, keep={"last": 2}) as mgr:
        mgr.save({"x": 2}, 2)
        store.fails = True
        mgr.save({"x": 3}, 3)
        store.fails = False
        for step in (4, 5):
            mgr.save({"x": step}, step)
        assert mgr.all_steps() == [4, 5]


def test_what_a_rewind_put_aside_counts_for_nothing() -> None:
    store = MemoryStore(can_rename=False)
    with started(store, keep={"last": 2}) as mgr:
        for step in (2, 3, 4):
            mgr.save({"x": step}, step)
    with manager(store, keep={"last": 2}) as mgr:
        mgr.resume(step=3)
        mgr.save({"x": 5}, 5)
        assert mgr.all_steps() == [3, 5]


def test_overwriting_replaces_the_one_that_is_there_and_the_rules_go_on() -> None:
    store = MemoryStore(can_rename=True)
    with started(store, keep={"last": 2}) as mgr:
        for step in (2, 2, 3, 3):
            mgr.save({"x": step}, step, overwrite=True)
        assert sorted(info.name for info in mgr._run.infos()) == ["step-00000002.2", "step-00000003.2"]


@pytest.mark.parametrize("torn", [False, True])
def test_overwriting_leaves_a_folder_that_is_no_checkpoint_of_this_run_as_it_is(torn: bool) -> None:
    """Of one without a readable manifest nobody knows whose it is, or whether it is being copied in right now."""
    store = MemoryStore(can_rename=True)
    with started(store, keep={"last": 5}) as mgr:
        foreign = {"step-00000002/state.json": b"{}", "step-00000002/notes.txt": b"mine"}
        foreign |= {"step-00000002/manifest.json": b"{"} if torn else {}
        for key, data in foreign.items():
            store.put(key, data)
    with manager(store, keep={"last": 5}) as mgr:
        mgr.resume()
        mgr.save({"x": 2}, 2, overwrite=True)
        assert {key: store.get(key) for key in foreign} == foreign
        assert mgr.latest_step() == 2


def test_a_person_may_delete_a_folder_without_a_readable_manifest_unless_it_is_pinned() -> None:
    store = MemoryStore(can_rename=False)
    with started(store) as mgr:
        mgr.save({"x": 2}, 2)
        mgr.pin(1)
        for step in (1, 2):
            store.put(f"step-{step:08d}/manifest.json", b"{")
        with pytest.raises(DamagedError, match="only go with its whole folder"):
            mgr._run.drop(*mgr._run.infos())
        mgr.delete(2)
        with pytest.raises(ConfigError, match="pinned"):
            mgr.delete(1)
        assert [info.step for info in mgr._run.drop_asked_for(*mgr._run.infos())] == []
        assert {entry.key for entry in store.list()} >= {"step-00000001"}
        assert not store.list("step-00000002")


@pytest.mark.parametrize("takeover", [False, True])
def test_a_sweep_that_failed_is_made_up_for_by_the_next_thing_that_writes(takeover: bool) -> None:
    """Also of the one that was taken over: its draft can't become a checkpoint any more."""

    class Failing(MemoryStore):
        fails = False

        def list(self, folder: str = "", *, recursive: bool = False) -> list[Entry]:
            if self.fails and folder == ".ckptmgr/drafts":
                raise StoreError("could not list")
            return super().list(folder, recursive=recursive)

    store = Failing(can_rename=False)
    first = started(store)
    draft = first._run.repository.begin(3, None, "run")
    with draft.create("state.json") as file:
        file.write(b"{}")
    if not takeover:
        first.close()
    store.fails = True
    with manager(store, takeover=takeover) as mgr:
        with pytest.raises(StoreError, match="could not list"):
            mgr.delete(1)
        store.fails = False
        assert mgr.resume().step == 1
        notes = [entry.name for entry in store.list(".ckptmgr/drafts")]
        assert notes == ([f"{draft.name}.{draft.nonce}.fenced"] if takeover else [])
        assert not store.list(draft.name, recursive=True)
        mgr.save({"x": 2}, 2)
    with manager(store) as mgr:
        assert mgr.resume().step == 2


def test_what_was_deleted_is_seen_before_anything_goes_not_only_by_its_name() -> None:
    store = MemoryStore(can_rename=False)
    repository = Repository(store)
    put_into(store, 1, attempt=1)
    (info,) = repository.infos()
    assert repository.is_there(info)
    put_into(store, 1, attempt=2)
    other = CheckpointInfo(info.name, 1, None, "torn")
    assert (repository.is_there(info), repository.is_there(other)) == (True, False)
    store.put(f"{info.name}/manifest.json", b"torn")
    assert not repository.is_there(info)


# Checkpoints from elsewhere


@pytest.mark.parametrize("keep", [{"last": 2}, {"last": None}])
def test_a_run_that_was_trained_on_elsewhere_and_copied_back_goes_on_from_there(
    keep: dict[str, Any], tmp_path: Path, on_disk: bool
) -> None:
    """The writers elsewhere have higher numbers than this root has come to: its new saves are the newest even so."""
    here, there = (LocalStore(tmp_path / name) if on_disk else MemoryStore() for name in ("here", "there"))
    train(here, keep, until=2)
    copy(here, there)
    for until in (3, 4, 5):
        train(there, keep, until)
    copy(there, here)
    assert train(here, keep, until=7) == [*range(1, 8)][-2 if keep["last"] else 0 :]
    assert train(here, keep, until=8) == [*range(1, 9)][-2 if keep["last"] else 0 :]


def train(store: Store, keep: dict[str, Any], until: int) -> list[int]:
    """Save a step at a time, after where the last one stopped; the steps that are there then."""
    with CheckpointManager("root", store=store, background=False, run="run", keep=keep) as mgr:
        first = mgr.resume().step + 1
        assert until - 2 <= first <= until
        for step in range(first, until + 1):
            mgr.save({"x": step}, step)
        return mgr.all_steps()


def copy(source: Store, target: Store) -> None:
    for entry in source.list(recursive=True):
        if entry.key.startswith("step-"):
            target.put(entry.key, source.get(entry.key))


@pytest.fixture(params=[True, False], ids=["disk", "object store"])
def on_disk(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


# The pointer is begun beside the save


def test_the_pointer_takes_no_room_before_the_manifest_has_its_own(tmp_path: Path) -> None:
    store = PausingStore(LocalStore(tmp_path))
    with CheckpointManager(tmp_path, store=store, background=False) as mgr:
        mgr.save({"x": 1}, 1)
    begun = [key.rpartition("/")[2] for method, key in store.log if method == "writer"]
    assert begun[-2:] == ["manifest.json", "latest"]


def test_a_writer_that_is_fenced_off_as_it_commits_leaves_no_file_of_the_pointer(tmp_path: Path) -> None:
    class Overtaken(PausingStore):
        def pause(self, method: str, key: str) -> None:
            if method == "rename":
                acquire(self.store, takeover=True)

    with CheckpointManager(tmp_path, background=False) as mgr:
        mgr.save({"x": 1}, 1)
    mgr = CheckpointManager(tmp_path, store=Overtaken(LocalStore(tmp_path)), background=False)
    mgr.resume()
    with pytest.raises(FencedError):
        mgr.save({"x": 2}, 2)
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []
    mgr.close()


# What a person asks to go


def test_whatever_goes_wrong_after_a_commit_is_a_warning_and_the_save_stands(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Odd(MemoryStore):
        fails = False

        def delete(self, keys: Iterable[str]) -> None:
            keys = list(keys)
            if self.fails and any(key.startswith("step-00000001/") for key in keys):
                raise OverflowError("date value out of range")
            super().delete(keys)

    store = Odd(can_rename=False)
    with started(store, keep={"last": 1}) as mgr:
        store.fails = True
        assert mgr.save({"x": 2}, 2).error is None
        assert "retention.failed step=2 url=memory-store: cause=OverflowError('date value out of range')" in caplog.text
        store.fails = False
        mgr.save({"x": 3}, 3)
        assert mgr.all_steps() == [3]


def looked_at(store: Noting) -> list[int]:
    """The steps whose folders were listed, each once."""
    folders = {key.split("/")[0] for method, key in store.calls if method == "list" and key.startswith("step-")}
    return sorted(int(folder.removeprefix("step-")) for folder in folders)


@pytest.mark.parametrize(
    ("keep", "looks"),
    [
        ({"last": 3}, [98, 99, 100]),
        ({"last": 1, "every_steps": 50}, [50, 100]),
        ({"last": 1, "newer_than": "36500d"}, []),  # all stay
        ({"last": 1, "every_steps": 1}, []),
        ({"last": 1, "every_steps": 90, "min_good": 2}, [90, 99, 100]),
        ({"last": None, "newer_than": "1s"}, [100]),
    ],
)
def test_a_plan_looks_at_those_alone_in_whose_place_another_would_stay(keep: dict[str, Any], looks: list[int]) -> None:
    store = Noting()
    fill(store, range(1, 101))
    store.calls.clear()
    manager(store, keep=keep, read_only=True).prune(dry_run=True)
    assert looked_at(store) == looks


def test_those_that_a_rule_keeps_where_nothing_goes_are_not_looked_at() -> None:
    store = Noting()
    fill(store, [*range(10, 60, 10), 61, 62, 63])
    store.calls.clear()
    plan = manager(store, keep={"last": 1, "every_steps": 10}, read_only=True).prune(dry_run=True)
    assert ([verdict.info.step for verdict in plan.drop], looked_at(store)) == ([62], [61, 63])


def test_a_rotation_after_a_save_looks_at_no_files() -> None:
    store = Noting()
    with started(store, keep={"last": 2}) as mgr:
        mgr.save({"x": 2}, 2)
        store.calls.clear()
        mgr.save({"x": 3}, 3)
        assert looked_at(store) == [3]  # the new one's own, as it is committed
        assert mgr.all_steps() == [2, 3]


def saved_and_cut(store: MemoryStore) -> None:
    """Steps 1 to 4, the last of which lacks a byte."""
    with started(store, keep={"last": 4}) as mgr:
        for step in (2, 3, 4):
            mgr.save({"x": step}, step)
    (key,) = (key for key in store.objects if key.startswith("step-00000004/") and key.endswith("state.json"))
    store.put(key, store.get(key)[:-1])


def test_one_that_is_deleted_while_a_plan_is_made_is_not_damaged_and_counts_for_nothing() -> None:
    class Deleting(MemoryStore):
        victim = "-"

        def list(self, folder: str = "", *, recursive: bool = False) -> list[Entry]:
            if folder == self.victim:
                self.delete([f"{folder}/"])
            return super().list(folder, recursive=recursive)

    store = Deleting(can_rename=False)
    saved_and_cut(store)
    store.victim = "step-00000004"
    with manager(store, keep={"last": 1}) as mgr:
        made = mgr.prune()
        assert [verdict.info.step for verdict in made.keep] == [3]
        assert [verdict.info.step for verdict in made.drop] == [2, 1]
        assert store.list(".ckptmgr/damaged") == []


def test_a_mark_of_damage_that_cannot_be_written_does_not_stop_a_prune_nor_count_for_less(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Refusing(MemoryStore):
        def put(self, key: str, data: Any, *, create: bool = False) -> None:
            if key.startswith(".ckptmgr/damaged/"):
                raise StoreError("no room")
            super().put(key, data, create=create)

    store = Refusing(can_rename=False)
    saved_and_cut(store)
    with manager(store, keep={"last": 1}) as mgr:
        assert [verdict.info.step for verdict in mgr.prune().drop] == [2, 1]
    told = [record.getMessage().split()[0] for record in caplog.records if record.levelno >= logging.WARNING]
    assert told == ["retention.damaged", "damage.mark.failed"]


def test_a_store_that_fails_while_sizes_are_compared_is_no_damage_and_nothing_goes() -> None:
    class Failing(MemoryStore):
        fails = False

        def list(self, folder: str = "", *, recursive: bool = False) -> list[Entry]:
            if self.fails and folder.startswith("step-"):
                raise StoreError("no network")
            return super().list(folder, recursive=recursive)

    store = Failing(can_rename=False)
    saved_and_cut(store)
    store.fails = True
    with manager(store, keep={"last": 1}) as mgr:
        with pytest.raises(StoreError, match="no network"):
            mgr.prune()
        assert [(info.step, info.damaged) for info in mgr._run.infos()] == [(step, None) for step in (4, 3, 2, 1)]


def test_those_that_stay_for_their_age_alone_are_not_looked_at() -> None:
    store = Noting()
    fill(store, range(1, 11))
    for step in range(5, 11):
        manifest = Manifest.from_json(store.get(f"step-{step:08d}/manifest.json"))
        store.put(f"step-{step:08d}/manifest.json", replace(manifest, time=datetime.now(UTC)).to_json())
    store.calls.clear()
    plan = manager(store, keep={"last": 2, "newer_than": "1d"}, read_only=True).prune(dry_run=True)
    assert ([verdict.info.step for verdict in plan.drop], looked_at(store)) == ([4, 3, 2, 1], [9, 10])
