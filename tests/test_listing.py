"""The newest is found without reading all, and is the one that reading all would give."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.errors import FormatVersionError, NotFoundError
from ckptmgr.folder_names import NameTemplate
from ckptmgr.lock import acquire
from ckptmgr.manifest import Manifest, Pin
from ckptmgr.repository import Repository
from ckptmgr.testing import MemoryStore

NOW = datetime(2030, 1, 1, tzinfo=UTC)


class Counting(MemoryStore):
    """Notes what is read and listed."""

    def __init__(self) -> None:
        super().__init__(can_rename=False)
        self.gets: list[str] = []
        self.lists: list[str] = []

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        self.gets.append(key)
        return super().get(key, start, end)

    def list(self, folder: str = "", *, recursive: bool = False):  # type: ignore[no-untyped-def]
        self.lists.append(folder)
        return super().list(folder, recursive=recursive)


def manifest(step: int, attempt: int = 1, minute: int = 0) -> Manifest:
    return Manifest(
        step=step, run="run", attempt=attempt, nonce=f"{step:08x}{attempt:04x}{minute:04x}",
        time=NOW + timedelta(minutes=minute), format="raw", files=(),
    )  # fmt: skip


def fill(store: MemoryStore, steps: Iterable[int], attempt: int = 1) -> None:
    for step in steps:
        store.put(f"step-{step:08d}/manifest.json", manifest(step, attempt).to_json())


class Folder(NamedTuple):
    """One folder of a root: what its name and its manifest say, and what became of it."""

    step: int
    attempt: int
    fate: str
    name: str
    is_pinned: bool


FOLDERS = st.lists(
    st.builds(
        Folder,
        step=st.integers(0, 12),
        attempt=st.integers(1, 4),
        fate=st.sampled_from(["good", "good", "good", "good", "marked", "torn", "foreign", "litter", "archived"]),
        name=st.sampled_from(["step-{:08d}"] * 6 + ["ckpt-{}", "ckpt-{}.2", "step-{:08d}.2", "model at {}", "step-{}"]),
        is_pinned=st.booleans(),
    ),
    max_size=14,
    unique_by=lambda folder: folder.name.format(folder.step),
)


def build(store: MemoryStore, folders: list[Folder]) -> None:
    """As writers, zombies of earlier attempts among them, and people may leave a root."""
    repository = Repository(store)
    for minute, folder in enumerate(folders):
        name, about = folder.name.format(folder.step), manifest(folder.step, folder.attempt, minute)
        match folder.fate:
            case "torn":
                store.put(f"{name}/manifest.json", about.to_json()[:-9])
            case "foreign":
                store.put(f"{name}/manifest.json", b"{}")
            case "litter" | "archived":
                store.put(f"{name}/a.bin", b"")
            case _:
                store.put(f"{name}/manifest.json", about.to_json())
        if folder.fate == "archived":
            store.put(f".ckptmgr/archive/{name}.{about.nonce}.json", about.to_json())
        info = repository.read(name)
        if info is not None and folder.fate == "marked":
            repository.mark_damaged(info, "bit rot")
        if folder.is_pinned:
            repository._pins.put(Pin(name, about.nonce, folder.step))


@given(
    folders=FOLDERS,
    names=st.sampled_from(["step-{step:08d}", "ckpt-{step}"]),
    commitless=st.sampled_from([0, 0, 1]),
    is_recorded=st.booleans(),
    taken=st.integers(0, 15),
)
def test_one_after_the_other_they_are_those_of_the_whole_listing(
    folders: list[Folder], names: str, commitless: int, is_recorded: bool, taken: int
) -> None:
    store = MemoryStore(can_rename=False)
    build(store, folders)
    highest = max((folder.attempt for folder in folders), default=0)
    if is_recorded:
        store.put(f".ckptmgr/lease/{highest + commitless:010d}.json", b"{}")
    repository = Repository(store, names=NameTemplate(names))
    expected = repository.infos()
    assert list(repository.listing().newest_first()) == expected
    listing = repository.listing()
    one_by_one = listing.newest_first()
    first = list(islice(one_by_one, taken))
    assert listing.infos() == expected
    assert first + list(one_by_one) == expected
    good = [info for info in expected if info.damaged is None]
    assert repository.find_all("latest") == good[:1]


def newest(repository: Repository) -> str:
    return next(repository.listing().newest_first()).name


def test_the_newest_is_found_by_one_manifest_among_thousands() -> None:
    store = Counting()
    fill(store, range(1, 2001))
    acquire(store).release()
    store.gets.clear()
    store.lists.clear()
    assert newest(Repository(store)) == "step-00002000"
    assert store.gets == ["latest", "step-00002000/manifest.json"]  # it may name what the listing lacks
    assert store.lists == ["", ".ckptmgr", ".ckptmgr/lease"]


def test_the_newest_is_the_highest_number_where_names_sort_otherwise() -> None:
    store = Counting()
    fill(store, (99_999_998, 99_999_999, 100_000_000))
    acquire(store).release()
    store.gets.clear()
    assert newest(Repository(store)) == "step-100000000"
    assert store.gets == ["latest", "step-100000000/manifest.json"]


def test_a_damaged_newest_costs_a_few_manifests_more() -> None:
    store = Counting()
    fill(store, range(1, 2001))
    repository = Repository(store)
    repository.mark_damaged(next(repository.listing().newest_first()), "torn")
    acquire(store).release()
    store.gets.clear()
    assert repository.find("latest").name == "step-00001999"
    assert len([key for key in store.gets if key.endswith("manifest.json")]) == 3


def test_a_zombies_late_commit_of_a_higher_step_is_passed_over() -> None:
    store = Counting()
    acquire(store).release()
    fill(store, (10, 20, 100))
    acquire(store).release()
    fill(store, (30, 40), attempt=2)
    assert newest(Repository(store)) == "step-00000040"
    assert "step-00000020/manifest.json" not in store.gets


def test_before_a_writers_first_commit_everything_is_read_by_all_but_the_writer() -> None:
    store = Counting()
    acquire(store).release()
    fill(store, range(1, 41))
    acquire(store).release()
    store.gets.clear()
    assert newest(Repository(store)) == "step-00000040"
    assert len(store.gets) == 41  # with the pointer
    store.gets.clear()
    assert next(Repository(store).listing(last_attempt=1).newest_first()).step == 40
    assert len(store.gets) == 2


def test_a_checkpoint_of_an_attempt_that_nobody_claimed_has_everything_read() -> None:
    """Somebody copied it here from another root."""
    store = Counting()
    acquire(store).release()
    fill(store, range(1, 41))
    fill(store, (50,), attempt=7)
    fill(store, (45,), attempt=8)
    assert newest(Repository(store)) == "step-00000045"
    assert len([key for key in store.gets if key.startswith("step-")]) == 42


def test_a_name_that_tells_another_step_than_its_manifest_has_everything_read() -> None:
    store = Counting()
    acquire(store).release()
    fill(store, range(1, 41))
    acquire(store).release()
    for name, step in (("v1.5.30", 30), ("v1.5.500", 500), ("v1.5.60", 60)):
        store.put(f"{name}/manifest.json", manifest(step, attempt=2).to_json())
    repository = Repository(store, names=NameTemplate("{run}.{step}"))  # "v1", step 5, the 30th of them
    assert [info.step for info in repository.infos()[:4]] == [500, 60, 30, 40]
    assert newest(repository) == "v1.5.500"


def test_names_of_another_template_have_everything_read() -> None:
    store = Counting()
    acquire(store).release()
    for name, step in (("3.100", 100), ("2.300", 300), ("1.200", 200)):  # by "{epoch}.{step}"
        store.put(f"{name}/manifest.json", manifest(step).to_json())
    assert newest(Repository(store, names=NameTemplate("{step}"))) == "2.300"


def test_of_equal_steps_the_later_one_is_newest_whatever_their_names() -> None:
    store = Counting()
    acquire(store).release()
    for name, minute in (("step-00000010", 7), ("step-00000010.2", 3), ("step-00000009", 1)):
        store.put(f"{name}/manifest.json", manifest(int(name[5:13]), minute=minute).to_json())
    assert newest(Repository(store)) == "step-00000010"


def test_one_whose_name_tells_no_step_takes_its_place_among_the_others() -> None:
    store = Counting()
    acquire(store).release()
    fill(store, (1, 2, 4, 5))
    store.put("final/manifest.json", manifest(3).to_json())
    assert [info.step for info in Repository(store).listing().newest_first()] == [5, 4, 3, 2, 1]


def test_where_no_attempt_is_recorded_everything_is_read() -> None:
    store = Counting()
    fill(store, (1, 2), attempt=1)
    fill(store, (3, 4), attempt=0)
    assert newest(Repository(store)) == "step-00000002"


def test_a_newer_format_is_noticed_when_it_is_come_to() -> None:
    store = Counting()
    acquire(store).release()
    fill(store, (1, 2, 3))
    store.put("step-00000004/manifest.json", b'{"format_version": 99}')
    with pytest.raises(FormatVersionError, match="step-00000004"):
        newest(Repository(store))


def test_a_lock_that_may_not_be_read_has_everything_read(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from ckptmgr.store.local import LocalStore

    store = LocalStore(tmp_path, fsync=False)
    acquire(store).release()
    fill(store, (1, 2), attempt=1)  # type: ignore[arg-type]
    (tmp_path / ".ckptmgr/lock").unlink()
    (tmp_path / ".ckptmgr/lock").mkdir()  # refused as a file of another user is
    assert newest(Repository(store)) == "step-00000002"


@given(
    st.lists(st.text("step-.0123456789/ \n", min_size=1).map(lambda text: text.replace("/", "") or "x")),
    st.lists(st.integers(0, 10**9)),
)
def test_the_steps_of_many_names_are_those_of_each(names: list[str], steps: list[int]) -> None:
    for template in ("step-{step:08d}", "{step}", "{run}.{step}-{step}", "ep{epoch}-{step}"):
        of = NameTemplate(template)
        assert [int(step) if step else None for step in of.steps(names)] == list(map(of.step, names))
        own = [of.format(step, 1, "run") for step in steps]
        assert list(map(int, of.steps(own))) == steps


def test_pins_and_marks_are_those_of_the_same_save() -> None:
    store = MemoryStore(can_rename=False)
    fill(store, (1,))
    repository = Repository(store)
    (info,) = repository.infos()
    repository.pin(info, "paper")
    repository.mark_damaged(info, "torn")
    store.put("step-00000001/manifest.json", replace(manifest(1), nonce="0123456789abcdef").to_json())
    (other,) = repository.infos()
    assert (other.pins, other.damaged) == ((), None)


# Folders without a manifest

OURS = b'{"format_version":1,"format":"raw","notes":{}}'


@pytest.fixture
def rewound() -> Counting:
    """A root of 40 checkpoints, of which all but the first were archived."""
    store = Counting()
    fill(store, range(1, 41))
    for step in range(1, 41):
        store.put(f"step-{step:08d}/state.json", OURS)
    repository = Repository(store)
    for info in repository.infos()[:-1]:
        repository.archive(info)
    store.gets.clear()
    store.lists.clear()
    return store


def test_what_was_archived_costs_a_listing_no_look_into_its_folder(rewound: Counting) -> None:
    assert [info.step for info in Repository(rewound).infos()] == [1]
    assert [folder for folder in rewound.lists if folder.startswith("step-")] == []
    assert len(rewound.lists) <= 6
    assert len(rewound.gets) <= 42


def test_one_that_has_lost_its_manifest_among_the_archived_is_told_of_and_alone_looked_into(rewound: Counting) -> None:
    rewound.put("step-00000041/state.json", OURS)
    assert [(info.step, info.damaged) for info in Repository(rewound).infos()] == [
        (41, "manifest.json is missing"),
        (1, None),
    ]
    assert {folder for folder in rewound.lists if folder.startswith("step-")} == {"step-00000041"}


def test_without_a_folder_that_lacks_a_manifest_no_record_of_one_is_read() -> None:
    store = Counting()
    fill(store, range(1, 4))
    Repository(store).infos()
    assert store.lists == ["", ".ckptmgr"]


@pytest.mark.parametrize(
    "data", [b"{}", b"", b"[1]", b'{"format_version":1}', b'{"best": {"format_version":1,"format":"x"}}']
)
def test_a_folder_of_somebody_elses_with_a_state_json_is_no_checkpoint(data: bytes) -> None:
    store = Counting()
    fill(store, [1])
    store.put("step-00000500/state.json", data)
    store.put("step-00000501/0123456789abcdef/state.json", data)
    assert [info.name for info in Repository(store).infos()] == ["step-00000001"]


def test_a_root_whose_foreign_folders_come_and_go_for_ever_is_listed_all_the_same() -> None:
    class Churning(Counting):
        def list(self, folder: str = "", *, recursive: bool = False):  # type: ignore[no-untyped-def]
            self.put(f"job-{len(self.lists)}/log.txt", b"")
            return super().list(folder, recursive=recursive)

    store = Churning()
    assert Repository(store).infos() == []
    assert len(store.lists) < 100


def test_a_save_that_was_not_yet_committed_when_the_last_one_was_listed_is_found_in_the_same_folder() -> None:
    class Rotating(Counting):
        """Commits step 2, and deletes step 1, between the looks at their manifests."""

        def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            is_first = key not in self.gets
            if is_first and key == "step-00000002/manifest.json":
                self.gets.append(key)
                raise NotFoundError(key)
            if is_first and key == "step-00000001/manifest.json":
                fill(self, [2])
                self.delete([key])
            return super().get(key, start, end)

    store = Rotating()
    fill(store, [1])
    store.put("step-00000001/data", b"still to be deleted")
    store.put("step-00000002/data", b"")
    assert [info.step for info in Repository(store).infos()] == [2]
