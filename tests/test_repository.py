"""Commit, list, delete, archive, sweep: what the repository promises on both kinds of store."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ckptmgr import CheckpointManager
from ckptmgr.errors import (
    AlreadyExistsError,
    ConfigError,
    DamagedError,
    FencedError,
    FormatVersionError,
    NotFoundError,
    StoreError,
)
from ckptmgr.folder_names import MAX_LENGTH, NameTemplate, guessed_step
from ckptmgr.litter import litter
from ckptmgr.lock import acquire
from ckptmgr.manifest import PIECE_SIZE, CheckpointInfo, FileEntry, Manifest, digest
from ckptmgr.repository import Repository
from ckptmgr.store import Store
from ckptmgr.store.local import LocalStore
from ckptmgr.testing import Call, MemoryStore, SystemCalls

NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture(params=["rename", "manifest", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return LocalStore(tmp_path / "root", fsync=False)
    return MemoryStore(can_rename=request.param == "rename")


@pytest.fixture
def repository(store: Store) -> Repository:
    return Repository(store)


def about(step: int, attempt: int = 1, run: str = "run", **fields: object) -> Manifest:
    return Manifest(step=step, run=run, attempt=attempt, nonce="", time=NOW, format="raw", files=(), **fields)  # type: ignore[arg-type]


def commit(
    repository: Repository, step: int, files: dict[str, bytes] | None = None, attempt: int = 1
) -> CheckpointInfo:
    draft = repository.begin(step, None, "run")
    for name, data in (files or {"a.bin": b"a%d" % step, "ranks/b.bin": b"b"}).items():
        with draft.create(name) as file:
            file.write(data)
    return draft.commit(about(step, attempt))


def names(repository: Repository) -> list[str]:
    return [info.name for info in repository.infos()]


def keys(store: Store) -> set[str]:
    return {entry.key for entry in store.list(recursive=True)}


def test_a_commit_is_listed_and_reads_back(repository: Repository) -> None:
    info = commit(repository, 3)
    (listed,) = repository.infos()
    assert listed == info
    assert repository.open(listed).read("a.bin") == b"a3"
    assert repository.open(listed).read("ranks/b.bin") == b"b"
    assert repository.verify(listed) == []


def test_nothing_of_a_draft_is_a_checkpoint_before_its_commit(repository: Repository) -> None:
    draft = repository.begin(3, None, "run")
    with draft.create("a.bin") as file:
        file.write(b"a")
    assert repository.infos() == []
    draft.abort()
    assert keys(repository.store) == set()


def test_small_files_are_whole_at_the_commit_or_when_their_rank_finishes_them(repository: Repository) -> None:
    store = repository.store
    first = repository.begin(3, None, "run")
    other = repository.join(first.name, first.nonce)  # on another rank
    first.write({"a.bin": _Body(b"a")})
    other.write({"b.bin": _Body(b"b")})
    assert not {key for key in keys(store) if store.path is None and key.endswith(".bin")}
    other.finish()
    assert [key for key in keys(store) if key.endswith("b.bin")]
    first.adopt(other.entries)
    info = first.commit(about(3), verify="full")
    assert repository.verify(info) == []


def open_files() -> int:
    """How many this process has open, where the system says."""
    return len([*Path("/proc/self/fd").iterdir()]) if sys.platform == "linux" else 0


def test_a_rank_lets_go_of_files_that_it_has_not_finished_when_another_one_aborts(tmp_path: Path) -> None:
    repository = Repository(LocalStore(tmp_path / "root"))
    first = repository.begin(3, None, "run")
    other = repository.join(first.name, first.nonce)
    before = open_files()
    other.write({"b.bin": _Body(b"b")})
    other.let_go()
    assert open_files() == before
    assert not [key for key in keys(repository.store) if key.endswith("b.bin")]
    first.abort()


def test_an_aborted_draft_leaves_nothing_of_files_that_were_not_finished(repository: Repository) -> None:
    draft = repository.begin(3, None, "run")
    draft.write({"a.bin": _Body(b"a")})
    draft.abort()
    assert keys(repository.store) == set()


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise here")
def test_all_that_a_small_save_writes_is_on_its_way_to_the_disk_before_any_of_it_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = Repository(LocalStore(tmp_path / "root"))
    repository.pointer.move(commit(repository, 1).name)
    log: list[str] = []
    for call in ("posix_fadvise", "fsync"):
        real = getattr(os, call)
        monkeypatch.setattr(os, call, lambda *args, call=call, real=real: (log.append(call), real(*args)))
    draft = repository.begin(2, None, "run")
    draft.write({"a.bin": _Body(b"a"), "b.bin": _Body(b"b")})
    draft.commit(about(2), beside=partial(repository.pointer.begin, draft.name))
    repository.pointer.move(draft.name)
    begun, *waits = [call for call, _ in itertools.groupby(log)]
    assert (begun, waits) == ("posix_fadvise", ["fsync"])
    assert log.count("posix_fadvise") == 4  # two files, the manifest and the pointer
    assert repository.pointer.read() == draft.name


def test_a_pointer_that_was_begun_is_given_up_for_another(tmp_path: Path) -> None:
    repository = Repository(LocalStore(tmp_path / "root"))
    repository.pointer.begin("step-00000003")
    repository.pointer.move("step-00000001")
    assert repository.pointer.read() == "step-00000001"
    assert [path.name for path in (tmp_path / "root").iterdir()] == ["latest"]


def test_an_exception_while_a_file_is_written_leaves_nothing_of_it(repository: Repository) -> None:
    draft = repository.begin(3, None, "run")

    def fail() -> None:
        with draft.create("a.bin") as file:
            file.write(b"half")
            raise KeyError("training")

    with pytest.raises(KeyError):
        fail()
    assert not [key for key in keys(repository.store) if key.endswith("a.bin")]
    info = draft.commit(about(3))
    assert info.manifest is not None
    assert info.manifest.files == ()


def test_a_file_name_is_written_once_and_stays_inside(repository: Repository) -> None:
    draft = repository.begin(3, None, "run")
    with draft.create("a.bin"):
        pass
    for name, error in (("a.bin", AlreadyExistsError), ("manifest.json", AlreadyExistsError), ("../x", DamagedError)):
        with pytest.raises(error), draft.create(name):
            pass


def test_newest_is_the_highest_step_of_the_latest_attempt(repository: Repository) -> None:
    for step, attempt in ((5, 1), (9, 1), (7, 2), (8, 2)):
        commit(repository, step, attempt=attempt)
    assert [info.step for info in repository.infos()] == [8, 7, 9, 5]


def test_a_second_checkpoint_of_a_step_gets_a_folder_of_its_own(repository: Repository) -> None:
    commit(repository, 3)
    second = commit(repository, 3, attempt=2)
    assert names(repository) == ["step-00000003.2", "step-00000003"]
    assert repository.find(3) == second


def test_a_file_in_the_place_of_a_checkpoint_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "step-00000003").write_text("mine")
    assert commit(Repository(LocalStore(tmp_path, fsync=False)), 3).name == "step-00000003.2"


def test_find_takes_steps_names_tags_and_latest(repository: Repository) -> None:
    first, second = commit(repository, 1), commit(repository, 2)
    repository.pin(first, "paper")
    assert repository.find("latest") == second
    assert [repository.find(which).step for which in (1, "1", "step-00000001", "paper")] == [1, 1, 1, 1]
    with pytest.raises(NotFoundError, match=r"no checkpoint step 7 in .*; steps there: 2, 1"):
        repository.find(7)


def test_find_all_tells_what_a_step_or_tag_could_mean_and_a_folders_name_means_one(repository: Repository) -> None:
    first, second = commit(repository, 1), commit(repository, 1, attempt=2)
    repository.mark_damaged(second, "torn")
    assert [info.name for info in repository.find_all(1)] == [first.name, second.name]
    assert [repository.find_all(which) for which in ("1", first.name)] == [repository.find_all(1), [first]]
    assert [repository.find_all(which) for which in ("latest", 7, "none")] == [[first], [], []]


def test_find_latest_passes_over_the_damaged(repository: Repository) -> None:
    commit(repository, 1)
    repository.mark_damaged(commit(repository, 2), "bit flip in a.bin")
    assert repository.find("latest").step == 1
    assert repository.find(2).damaged == "bit flip in a.bin"


def test_pieces_have_digests_of_their_own(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("draft", "source", "manifest"):
        monkeypatch.setattr(f"ckptmgr.{module}.PIECE_SIZE", 4)
    data = bytes(range(18))
    draft = repository.begin(1, None, "run")
    with draft.create("a.bin") as file:
        assert file.write(data[:3]) == 3
        file.write(data[3:17])
        file.write(data[17:])
    info = draft.commit(about(1))
    assert info.manifest is not None
    assert [len(file.pieces) for file in info.manifest.files] == [5]
    with repository.open(info).open("a.bin") as opened:
        assert opened.read() == data
        opened.seek(-5, 2)
        assert (opened.tell(), opened.read(3), opened.read(), opened.read()) == (13, data[13:16], data[16:], b"")
        opened.seek(2)
        opened.seek(1, 1)
        assert opened.read(2) == data[3:5]
        with pytest.raises(ValueError, match="before the file's start"):
            opened.seek(-1)
        assert opened.readable()
        assert opened.seekable()
    assert PIECE_SIZE == 64 << 20


class _Body:
    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self._data = memoryview(data)

    def part(self, begin: int, end: int, scratch: memoryview) -> memoryview:
        return self._data[begin:end]


def test_whole_files_are_written_as_those_that_come_bit_by_bit(repository: Repository) -> None:
    draft = repository.begin(1, None, "run")
    with draft.create("ranks/a.bin") as file:
        file.write(b"abc")
    draft.write({"a.bin": _Body(b"abc"), "empty.bin": _Body(b"")})
    info = draft.commit(about(1))
    opened = repository.open(info)
    assert [opened.read(name) for name in ("ranks/a.bin", "a.bin", "empty.bin")] == [b"abc", b"abc", b""]
    assert opened.files["a.bin"].digest == opened.files["ranks/a.bin"].digest == digest(b"abc")
    assert repository.verify(info) == []


def test_a_whole_file_takes_no_name_twice_and_none_that_leads_out(repository: Repository) -> None:
    draft = repository.begin(3, None, "run")
    draft.write({"a.bin": _Body(b"a")})
    for name, error in (("a.bin", AlreadyExistsError), ("manifest.json", AlreadyExistsError), ("../x", DamagedError)):
        with pytest.raises(error):
            draft.write({"b.bin": _Body(b"b"), name: _Body(b"x")})
        with pytest.raises(error):
            draft.link(name, "x", FileEntry("x", 1, ""))
    info = draft.commit(about(3))
    assert info.manifest is not None
    assert [file.size for file in info.manifest.files] == [1]


def linked(repository: Repository, info: CheckpointInfo, step: int) -> CheckpointInfo:
    """A checkpoint that shares a.bin with another one, and has a b.bin of its own."""
    draft = repository.begin(step, None, "run")
    entry = repository.open(info).files["a.bin"]
    assert draft.link("a.bin", f"{info.name}/{entry.name}", entry)
    draft.write({"b.bin": _Body(b"own")})
    return draft.commit(about(step))


def test_a_shared_file_is_one_of_the_checkpoint_like_any_other(repository: Repository) -> None:
    """It is marked and not counted as written, and goes with the last of those that share it."""
    first = commit(repository, 1, {"a.bin": b"shared"})
    second = linked(repository, first, 2)
    third = linked(repository, second, 3)
    assert [info.manifest and (info.manifest.size, info.manifest.written) for info in (first, second, third)] == [
        (6, 6),
        (9, 3),
        (9, 3),
    ]
    assert [file.shared for file in repository.open(second).files.values()] == [True, False]
    repository.drop(first)
    repository.drop(second)
    assert repository.infos() == [third]
    assert repository.verify(third) == []
    assert repository.open(third).read("a.bin") == b"shared"


def test_on_a_disk_a_shared_file_takes_no_space(tmp_path: Path) -> None:
    repository = Repository(LocalStore(tmp_path, fsync=False))
    first = commit(repository, 1)
    second = linked(repository, first, 2)
    assert (tmp_path / first.name / "a.bin").samefile(tmp_path / second.name / "a.bin")


def test_a_store_that_can_not_share_says_so_and_nothing_is_done() -> None:
    class Plain(MemoryStore):
        def copy(self, source: str, target: str) -> bool:
            return False

    repository = Repository(Plain())
    entry = repository.open(commit(repository, 1)).files["a.bin"]
    draft = repository.begin(2, None, "run")
    assert not draft.link("a.bin", "step-00000001/a.bin", entry)
    draft.write({"a.bin": _Body(b"new")})
    assert repository.open(draft.commit(about(2))).read("a.bin") == b"new"


@pytest.mark.parametrize("change", ["cut", "remove"])
def test_a_file_that_changed_is_not_shared(repository: Repository, change: str) -> None:
    info = commit(repository, 1)
    entry = repository.open(info).files["a.bin"]
    key = f"{info.name}/{entry.name}"
    if change == "cut":
        repository.store.put(key, b"a")
    else:
        repository.store.delete([key])
    draft = repository.begin(2, None, "run")
    before = keys(repository.store)
    with pytest.raises(DamagedError if change == "cut" else NotFoundError, match=r"a\.bin"):
        draft.link("a.bin", key, entry)
    assert keys(repository.store) == before


def _of_version_1(data: bytes) -> Manifest:
    """A checkpoint with a file of two pieces, whose digest is that of all its bytes."""
    pieces = tuple(digest(data[at : at + PIECE_SIZE]) for at in (0, PIECE_SIZE))
    return dataclasses.replace(about(1), version=1, files=(FileEntry("a.bin", len(data), digest(data), pieces),))


def test_large_files_of_format_version_1_are_read_checked_archived_and_shared(store: Store) -> None:
    """Every promise holds for them, by the digests of their pieces."""
    data = bytes(PIECE_SIZE) + b"tail"
    manifest = dataclasses.replace(_of_version_1(data), nonce="0" * 16)
    store.put("step-00000001/a.bin", data)
    store.put("step-00000001/manifest.json", manifest.to_json())
    repository = Repository(store)
    (info,) = repository.infos()
    assert (info.manifest, repository.verify(info)) == (manifest, [])
    new = linked(repository, info, 2)
    assert repository.verify(new) == []
    assert new.manifest is not None
    assert Manifest.from_json(new.manifest.to_json()) == new.manifest
    repository.archive(info)
    assert [aside.manifest for aside in repository.archived()] == [manifest]
    store.put("step-00000001/a.bin", data[:-1] + b"?")
    assert [problem.file for problem in repository.verify(info)] == ["a.bin"]


def test_digests_that_contradict_each_other_are_a_damaged_manifest() -> None:
    good = FileEntry.of("a.bin", PIECE_SIZE + 1, [bytes(16), bytes(16)])
    assert Manifest.from_json(dataclasses.replace(about(1), files=(good,)).to_json()).files == (good,)
    for bad, what in (
        (dataclasses.replace(good, digest=digest(b"")), "not that of its pieces"),
        (dataclasses.replace(good, pieces=good.pieces[:1]), "1 digests for the 2 pieces"),
        (dataclasses.replace(good, size=PIECE_SIZE), "2 digests for the 1 pieces"),
        (dataclasses.replace(good, pieces=("?", "?")), r"'\?' for a digest of 'a\.bin'"),
    ):
        with pytest.raises(DamagedError, match=what):
            Manifest.from_json(dataclasses.replace(about(1), files=(bad,)).to_json())


@pytest.mark.parametrize("change", ["flip", "cut", "extend", "remove", "empty"])
def test_any_change_to_a_file_is_found(repository: Repository, change: str) -> None:
    info = commit(repository, 3)
    assert info.manifest is not None
    key = f"{info.name}/{info.manifest.files[0].name}"
    changed = {"flip": b"a2", "cut": b"a", "extend": b"a3x", "empty": b""}
    if change == "remove":
        repository.store.delete([key])
    else:
        repository.store.put(key, changed[change])
    assert [problem.file for problem in repository.verify(info)] == ["a.bin"]
    with pytest.raises(DamagedError, match=r"a\.bin"):
        repository.open(info).read("a.bin")


def test_one_file_can_be_checked_by_itself(repository: Repository) -> None:
    info = commit(repository, 3)
    source = repository.open(info)
    repository.store.put(f"{info.name}/{source.files['a.bin'].name}", b"a2")
    source.check(source.files["ranks/b.bin"])
    with pytest.raises(DamagedError, match=r"a\.bin is not what was written \(bytes 0 to 2\)"):
        source.check(source.files["a.bin"])
    with pytest.raises(DamagedError, match=r"manifest\.json lists no file 'c\.bin'"):
        source.scatter({"c.bin": []})


def test_sizes_alone_find_a_cut_but_not_a_flip(repository: Repository) -> None:
    info = commit(repository, 3)
    assert info.manifest is not None
    key = f"{info.name}/{info.manifest.files[0].name}"
    repository.store.put(key, b"a2")
    assert repository.verify(info, "size") == []
    repository.store.put(key, b"a")
    assert [str(p) for p in repository.verify(info, "size")] == ["a.bin: has 1 bytes, not the 2 of the manifest"]
    assert repository.verify(info, "off") == []


def test_a_body_garbled_on_the_way_is_fetched_again() -> None:
    store = _GarblingOnce(can_rename=False)
    repository = Repository(store)
    info = commit(repository, 3)
    store.garble = True
    assert repository.open(info).read("a.bin") == b"a3"
    assert not store.garble


class _GarblingOnce(MemoryStore):
    garble = False

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        data = super().get(key, start, end)
        if self.garble and key.endswith("a.bin"):
            self.garble = False
            return b"?" * len(data)
        return data


def test_a_torn_manifest_is_a_damaged_checkpoint(repository: Repository) -> None:
    info = commit(repository, 3)
    data = repository.store.get(f"{info.name}/manifest.json")
    for damage in (data[:100], b"", data.replace(b'"step": 3', b'"step": 4'), b"[]", b"\xff"):
        repository.store.put(f"{info.name}/manifest.json", damage)
        (listed,) = repository.infos()
        assert (listed.step, listed.manifest) == (3, None)
        assert listed.damaged
        assert [problem.file for problem in repository.verify(listed)] == ["manifest.json"]
        with pytest.raises(DamagedError):
            repository.open(listed)


def test_folders_of_others_are_not_checkpoints(repository: Repository) -> None:
    repository.store.put("web/manifest.json", b'{"name": "app"}')
    repository.store.put("step-00000001/notes.txt", b"mine")
    repository.store.put("other.txt", b"mine")
    assert repository.infos() == []


def test_a_foreign_format_version_is_no_checkpoint_and_no_obstacle(repository: Repository) -> None:
    info = commit(repository, 1)
    repository.store.put("web/manifest.json", b'{"format_version": 7, "name": "app"}')
    assert repository.infos() == [info]
    repository.store.put("web/manifest.json", b'{"format_version": 7, "nonce": "0123456789abcdef"}')
    with pytest.raises(FormatVersionError, match=r"web: .* version 7"):
        repository.infos()


@pytest.mark.parametrize("name", ["step-00000003", "other"])
@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EIO, None])
def test_a_refused_folder_is_passed_over_only_where_its_name_is_not_ours(
    tmp_path: Path, name: str, code: int | None
) -> None:
    class Refusing(LocalStore):
        def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            if key.startswith(f"{name}/"):
                raise StoreError("refused", code)
            return super().get(key, start, end)

    (tmp_path / name).mkdir()
    repository = Repository(Refusing(tmp_path, fsync=False))
    info = commit(repository, 1)
    if name == "other" and code not in (errno.EIO, None):
        assert repository.infos() == [info]
    elif code in (errno.EISDIR, errno.ENOTDIR):  # what is no file is no manifest that could be read some day
        assert repository.infos() == [CheckpointInfo(name, 3, None, "refused", attempt=1), info]
    else:
        with pytest.raises(StoreError, match="refused"):
            repository.infos()


def test_an_error_of_a_network_is_never_taken_for_a_foreign_folder() -> None:
    class Refusing(MemoryStore):
        def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            raise StoreError("forbidden", errno.EACCES)

    repository = Repository(Refusing())
    repository.store.put("other/manifest.json", b"")
    with pytest.raises(StoreError, match="forbidden"):
        repository.infos()


def test_a_folder_or_link_named_manifest_json_is_no_checkpoint(tmp_path: Path) -> None:
    repository = Repository(LocalStore(tmp_path, fsync=False))
    (tmp_path / "web" / "manifest.json").mkdir(parents=True)
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").symlink_to(tmp_path / "elsewhere")
    assert repository.infos() == []


def test_records_that_this_machine_refuses_stop_nothing(tmp_path: Path) -> None:
    class Refusing(LocalStore):
        code: int | None = None

        def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            if self.code and key.startswith((".ckptmgr/pins", ".ckptmgr/archive", ".ckptmgr/damaged")):
                raise StoreError("refused", self.code)
            return super().get(key, start, end)

    store = Refusing(tmp_path, fsync=False)
    repository = Repository(store)
    info, gone = commit(repository, 1), commit(repository, 2)
    repository.pin(info, "paper")
    repository.mark_damaged(info, "torn")
    repository.archive(gone)
    store.code = errno.EACCES
    (listed,) = repository.infos()
    assert (listed.tags, listed.damaged) == (("paper",), "marked as damaged")
    assert (repository.archived(), repository.sweep()) == ([], 0)
    for kind in ("pins", "damaged", "archive"):
        store.code = errno.EACCES
        for other in {"pins", "damaged", "archive"} - {kind}:
            store.delete([f".ckptmgr/{other}/"])
        store.code = errno.EIO
        with pytest.raises(StoreError, match="refused"):
            repository.infos() if kind != "archive" else repository.archived()
        store.code = None
        repository.pin(info, "paper")
        repository.mark_damaged(info, "torn")
        repository.archive(commit(repository, 2))


@pytest.mark.parametrize(
    ("before", "now", "step"),
    [
        ("ckpt-{step}", None, 7),
        ("{run}.{step:06d}", None, 7),
        (None, "ckpt-{step}", 7),
        ("ep{epoch}-ba{step}", None, 7),
    ],
)
def test_a_torn_checkpoint_is_seen_though_the_names_changed_since(
    store: Store, before: str | None, now: str | None, step: int
) -> None:
    written = Repository(store, names=before and NameTemplate(before))
    info = written.begin(7, 2, "run").commit(about(7))
    data = store.get(f"{info.name}/manifest.json")
    repository = Repository(store, names=now and NameTemplate(now))
    for damage in (data[:-40], data.replace(b'"attempt": 1', b'"attempt": 2')):
        store.put(f"{info.name}/manifest.json", damage)
        assert [(listed.step, listed.manifest) for listed in repository.infos()] == [(step, None)]


def test_an_emptied_manifest_in_a_folder_of_the_default_name_is_seen_under_any_other(store: Store) -> None:
    info = commit(Repository(store), 7)
    store.put(f"{info.name}/manifest.json", b"")
    (listed,) = Repository(store, names=NameTemplate("ckpt-{step}")).infos()
    assert (listed.step, listed.manifest) == (7, None)


@pytest.mark.parametrize(
    ("name", "step"), [("ckpt-12", 12), ("ckpt-12.2", 12), ("ep3-ba12", 12), ("run.12", 12), ("final", 0)]
)
def test_a_step_is_guessed_from_the_last_number_of_a_folder(name: str, step: int) -> None:
    assert guessed_step(name) == step


def test_a_newer_format_is_an_error_that_names_both(repository: Repository) -> None:
    commit(repository, 1)
    repository.store.put("step-00000002/manifest.json", b'{"format_version": 99}')
    with pytest.raises(FormatVersionError, match=r"step-00000002: .* version 99; this ckptmgr reads up to 2\."):
        repository.infos()


def test_drop_deletes_what_the_manifest_names_and_nothing_else(repository: Repository) -> None:
    info = commit(repository, 3)
    repository.store.put(f"{info.name}/eval.txt", b"mine")
    repository.mark_damaged(info, "so it seems")
    repository.drop(info)
    assert repository.infos() == []
    assert keys(repository.store) == {f"{info.name}/eval.txt"}


def test_only_the_drop_of_a_folder_takes_one_that_cannot_be_read_and_asks_first(repository: Repository) -> None:
    info = commit(repository, 3)
    repository.store.put(f"{info.name}/manifest.json", b"torn")
    (torn,) = repository.infos()
    with pytest.raises(DamagedError, match="can only go with its whole folder"):
        repository.drop(torn)
    assert not repository.drop_folder(torn, lambda info: False)
    assert repository.infos() == [torn]
    assert repository.drop_folder(torn)
    assert keys(repository.store) == set()


def test_an_archived_checkpoint_is_none_but_its_data_stays(repository: Repository) -> None:
    info = commit(repository, 3)
    repository.archive(info)
    assert repository.infos() == []
    again = commit(repository, 3, {"a.bin": b"new"}, attempt=2)
    (aside,) = repository.archived()
    assert aside.manifest == info.manifest
    repository.drop_archived(aside)
    assert repository.archived() == []
    assert repository.verify(again) == []
    assert repository.infos() == [again]


def test_the_data_of_an_archived_checkpoint_stays_when_the_lock_was_lost(repository: Repository) -> None:
    repository.archive(commit(repository, 1))
    (aside,) = repository.archived()
    before = keys(repository.store)

    def fenced() -> None:
        raise FencedError("taken over")

    with pytest.raises(FencedError):
        repository.drop_archived(aside, fenced)
    assert keys(repository.store) == before


def test_an_unreadable_one_is_left_where_it_is_by_archive(repository: Repository) -> None:
    info = commit(repository, 3)
    repository.store.put(f"{info.name}/manifest.json", b"torn")
    (torn,) = repository.infos()
    repository.archive(torn)
    assert repository.infos() == [torn]


def test_the_pointer_names_a_folder(repository: Repository) -> None:
    assert repository.pointer.read() is None
    repository.pointer.move("step-00000003")
    assert repository.pointer.read() == "step-00000003"
    repository.pointer.move(None)
    assert repository.pointer.read() is None


def test_pins_carry_tags_and_end(repository: Repository) -> None:
    one, two = commit(repository, 1), commit(repository, 2)
    repository.pin(one)
    repository.pin(one, "paper", NOW + timedelta(days=1))
    (_, listed) = repository.infos()
    assert {(pin.tag, pin.holds(NOW), pin.holds(NOW + timedelta(days=2))) for pin in listed.pins} == {
        (None, True, True),
        ("paper", True, False),
    }
    with pytest.raises(ConfigError, match="'paper' is on step 1"):
        repository.pin(two, "paper")
    assert repository.unpin(1, "paper") == 1
    assert repository.unpin(1) == 1
    assert repository.unpin(1) == 0


@pytest.mark.parametrize("tag", ["latest", "best", "12", "a.b", "", "-x", "a/b"])
def test_tags_that_could_be_mistaken_are_refused(repository: Repository, tag: str) -> None:
    with pytest.raises(ConfigError, match="not usable"):
        repository.pin(commit(repository, 1), tag)


def pin_key(info: CheckpointInfo, tag: str = "") -> str:
    assert info.manifest is not None
    return f".ckptmgr/pins/{info.name}.{info.manifest.nonce}{tag and f'.tag-{tag}'}.json"


@pytest.mark.parametrize("goes", ["archive", "drop"])
def test_a_pin_and_its_tag_never_pass_to_another_checkpoint_of_the_step(repository: Repository, goes: str) -> None:
    first = commit(repository, 100)
    repository.pin(first)
    repository.pin(first, "paper")
    getattr(repository, goes)(first)
    second = commit(repository, 100, attempt=2)
    assert repository.infos() == [second]
    assert second.pins == ()
    assert repository.pins(100) == []
    with pytest.raises(NotFoundError):
        repository.find("paper")


def test_a_pin_holds_only_the_one_of_two_with_the_same_step(repository: Repository) -> None:
    first = commit(repository, 100)
    repository.pin(first, "paper")
    second = commit(repository, 100, attempt=2)
    assert [(info.name, info.tags) for info in repository.infos()] == [(second.name, ()), (first.name, ("paper",))]
    assert repository.find("paper").name == first.name
    with pytest.raises(ConfigError, match=rf"'paper' is on step 100 \(.*/{first.name}\) already"):
        repository.pin(second, "paper")
    repository.pin(first, "paper", NOW)
    assert [pin.expires for pin in repository.pins("paper")] == [NOW]


def test_a_pin_left_over_from_a_checkpoint_removed_by_hand_holds_nothing_and_can_be_removed(
    repository: Repository,
) -> None:
    for tag in (None, "paper", "draft"):
        repository.pin(commit(repository, 100), tag)
        repository.store.delete(["step-00000100/"])
    other = commit(repository, 100)
    assert repository.infos() == [other]
    repository.pin(other, "paper")
    assert [repository.unpin("draft"), repository.unpin(other.name, "paper"), repository.unpin(100)] == [1, 2, 1]
    assert not [key for key in keys(repository.store) if "/pins/" in key]


def test_unpin_by_the_tag_of_a_pin_leaves_the_other_pins_of_that_checkpoint(repository: Repository) -> None:
    info = commit(repository, 1)
    for tag in (None, "paper", "talk"):
        repository.pin(info, tag)
    assert repository.unpin("paper") == 1
    (listed,) = repository.infos()
    assert [pin.tag for pin in listed.pins] == [None, "talk"]


def test_unpin_by_a_tag_of_the_save_removes_the_pins_of_that_checkpoint(repository: Repository) -> None:
    draft = repository.begin(1, None, "run")
    info = draft.commit(about(1, tags=("release",)), pin=True)
    repository.pin(commit(repository, 2))
    assert repository.unpin("release", "other") == 0
    assert repository.unpin("release") == 1
    assert [len(listed.pins) for listed in repository.infos()] == [1, 0]
    assert repository.unpin("latest") == 1
    assert repository.find(1) == dataclasses.replace(info, pins=())


def test_one_whose_manifest_cannot_be_read_keeps_its_pins_and_gets_no_new_one(repository: Repository) -> None:
    info = commit(repository, 3)
    repository.pin(info, "paper")
    repository.store.put(f"{info.name}/manifest.json", b"torn")
    (torn,) = repository.infos()
    assert torn.tags == ("paper",)
    with pytest.raises(DamagedError, match="can't be pinned"):
        repository.pin(torn, "other")
    assert repository.is_held(torn)
    repository.drop_folder(torn)
    assert keys(repository.store) == set()


def test_a_tag_that_looks_like_a_nonce_is_a_tag(repository: Repository) -> None:
    info = commit(repository, 1)
    repository.pin(info, "0123456789abcdef")
    assert repository.find("0123456789abcdef").name == info.name
    assert repository.infos()[0].pins == (repository.pins(1)[0],)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"step": 1}', b'{"step": 1, "expires": "2020-01-01T00:00:00"}'])
def test_a_pin_that_cannot_be_read_keeps_what_its_key_names_and_stops_nothing(
    repository: Repository, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    info, other = commit(repository, 1), commit(repository, 2)
    repository.pin(info, "paper", NOW)
    repository.store.put(pin_key(info, "paper"), body)
    listed = {i.step: [(p.step, p.tag, p.expires) for p in i.pins] for i in repository.infos()}
    assert listed == {1: [(1, "paper", None)], 2: []}
    repository.infos()
    assert [record.getMessage().count(pin_key(info, "paper")) for record in caplog.records] == [1]
    assert repository.find(2) == other
    assert repository.unpin(1) == 1


def test_a_foreign_file_among_the_pins_stops_nothing(repository: Repository, caplog: pytest.LogCaptureFixture) -> None:
    info = commit(repository, 1)
    repository.store.put(".ckptmgr/pins/readme.txt", b"mine")
    assert repository.infos() == [info]
    assert ".ckptmgr/pins/readme.txt" in caplog.text


@pytest.mark.parametrize("kind", ["trash", "archive"])
@pytest.mark.parametrize("body", [b"", b"{", b'{"format_version": 7}'])
def test_a_torn_record_of_one_put_aside_stops_nothing_and_stays(
    repository: Repository, kind: str, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    info = commit(repository, 1)
    key = f".ckptmgr/{kind}/step-00000009.0123456789abcdef.json"
    repository.store.put(key, body)
    repository.store.put(f".ckptmgr/{kind}/copy.json", about(1).to_json())
    assert repository.sweep() == 0
    assert repository.archived() == []
    assert repository.infos() == [info]
    assert key in caplog.text
    assert repository.store.get(key) == body


@pytest.mark.parametrize("manifest", [b"", b'{"format_version": 7}'])
def test_a_draft_whose_name_holds_an_unreadable_manifest_is_left_and_stops_nothing(
    repository: Repository, manifest: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    draft, other = repository.begin(1, None, "run"), repository.begin(2, None, "run")
    for each in (draft, other):
        with each.create("a.bin") as file:
            file.write(b"half")
    repository.store.put(f"{draft.name}/manifest.json", manifest)
    before = {key for key in keys(repository.store) if draft.nonce in key}
    assert repository.sweep() == 1
    assert {key for key in keys(repository.store) if draft.nonce in key} == before
    assert not [key for key in keys(repository.store) if other.nonce in key]
    assert f"{draft.name}.{draft.nonce}" in caplog.text


def test_a_damage_mark_that_cannot_be_read_still_marks(repository: Repository) -> None:
    info = commit(repository, 1)
    assert info.manifest is not None
    repository.store.put(f".ckptmgr/damaged/{info.name}.{info.manifest.nonce}.json", b"{")
    assert repository.infos()[0].damaged == "marked as damaged"


def test_sweep_removes_drafts_and_nothing_foreign(repository: Repository) -> None:
    info = commit(repository, 1)
    draft = repository.begin(2, None, "run")
    with draft.create("a.bin") as file:
        file.write(b"half")
    repository.store.put(".ckptmgr/drafts/readme.txt", b"mine")
    repository.store.put("step-00000009/notes.txt", b"mine")
    before = keys(repository.store) - {key for key in keys(repository.store) if draft.nonce in key}
    assert repository.sweep() == 1
    assert keys(repository.store) == before
    assert repository.infos() == [info]
    assert repository.sweep() == 0


def test_sweep_finishes_a_deletion_that_was_interrupted(repository: Repository) -> None:
    info = commit(repository, 1)
    assert info.manifest is not None
    repository.store.put(f".ckptmgr/trash/{info.name}.{info.manifest.nonce}.json", info.manifest.to_json())
    repository.sweep()
    assert repository.infos() == [info]  # its manifest was never deleted
    repository.store.put(f".ckptmgr/trash/{info.name}.{info.manifest.nonce}.json", info.manifest.to_json())
    repository.store.delete([f"{info.name}/manifest.json"])
    assert repository.sweep() == 1
    assert keys(repository.store) == set()


def test_a_lost_lock_stops_the_commit_and_takes_back_the_pin(store: Store) -> None:
    def lost() -> None:
        raise FencedError("taken over")

    repository = Repository(store)
    draft = repository.begin(1, None, "run")
    with pytest.raises(FencedError):
        draft.commit(about(1), check=lost, pin=True)
    assert [key for key in keys(store) if "/pins/" in key]
    draft.abort()
    assert keys(store) == set()


def test_a_pin_asked_for_with_the_save_is_there_from_the_first_moment(repository: Repository) -> None:
    info = repository.begin(1, None, "run").commit(about(1), pin=True)
    assert [(pin.step, pin.tag, pin.expires) for pin in info.pins] == [(1, None, None)]
    assert repository.infos() == [info]
    repository.sweep()
    assert repository.infos() == [info]


@pytest.mark.parametrize("can_rename", [True, False])
def test_a_save_whose_pin_cannot_be_written_fails_as_a_whole(can_rename: bool) -> None:
    class Full(MemoryStore):
        def put(self, key: str, data: bytes, *, create: bool = False) -> None:
            if "/pins/" in key:
                raise StoreError("no space")
            super().put(key, data, create=create)

    repository = Repository(Full(can_rename=can_rename))
    draft = repository.begin(1, None, "run")
    with pytest.raises(StoreError, match="no space"):
        draft.commit(about(1), pin=True)
    draft.abort()
    assert keys(repository.store) == set()


@pytest.mark.parametrize(
    "wrong", [{"step": -1}, {"attempt": True}, {"metrics": {"loss": "low"}}, {"epoch": -1}, {"run": "\ud800"}]
)
def test_a_manifest_that_nobody_could_read_is_never_committed(repository: Repository, wrong: dict[str, Any]) -> None:
    draft = repository.begin(1, None, "run")
    with pytest.raises(ConfigError, match="was not committed, as its manifest could not be read back"):
        draft.commit(dataclasses.replace(about(1), **wrong))
    draft.abort()
    assert keys(repository.store) == set()


def test_commit_rename_is_refused_to_writers_where_folders_cannot_be_renamed() -> None:
    store = MemoryStore(can_rename=False)
    commit(Repository(store), 1)
    repository = Repository(store, commit="rename")
    assert [info.step for info in repository.infos()] == [1]
    with pytest.raises(ConfigError, match="commit: rename is not possible"):
        repository.begin(2, None, "run")
    with pytest.raises(ConfigError, match="commit: rename is not possible"):
        CheckpointManager("memory", store=store, commit="rename").resume()


def test_a_reader_of_a_root_that_it_may_not_write_to_tries_no_rename(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "root", commit="rename", background=False) as manager:
        manager.save({"x": 1}, 1)
    tried: list[str] = []

    def refuse(call: Call) -> None:
        tried.append(call.name)
        raise PermissionError(errno.EACCES, "Permission denied")

    with SystemCalls(tmp_path, before=refuse):
        assert CheckpointManager(tmp_path / "root", commit="rename", read_only=True).load()["x"] == 1
        assert tried == []
        with pytest.raises(StoreError, match="no permission"):
            CheckpointManager(tmp_path / "root", commit="rename").resume()


def test_commit_manifest_works_on_a_local_disk(tmp_path: Path) -> None:
    repository = Repository(LocalStore(tmp_path), commit="manifest")
    info = commit(repository, 1)
    assert info.manifest is not None
    assert (tmp_path / info.name / info.manifest.nonce / "a.bin").read_bytes() == b"a1"
    assert repository.verify(info) == []


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("error", [StoreError("lost"), AlreadyExistsError("lost")])
def test_a_lost_answer_to_the_commit_is_found_out(when: str, error: Exception) -> None:
    class Losing(MemoryStore):
        losses = 1

        def put(self, key: str, data: bytes, *, create: bool = False) -> None:
            lose = create and self.losses > 0
            if lose and when == "before":
                self.losses -= 1
                raise error
            super().put(key, data, create=create)
            if lose:
                self.losses -= 1
                raise error

    repository = Repository(Losing(can_rename=False))
    if when == "before" and isinstance(error, AlreadyExistsError):
        with pytest.raises(AlreadyExistsError):
            commit(repository, 1)
    else:
        info = commit(repository, 1)
        assert repository.infos() == [info]


def test_a_manifest_of_someone_else_is_never_overwritten() -> None:
    store = MemoryStore(can_rename=False)
    repository = Repository(store)
    mine = repository.begin(1, None, "run")
    theirs = commit(repository, 1)
    with pytest.raises(AlreadyExistsError, match="committed by another writer"):
        mine.commit(about(1))
    mine.abort()
    assert repository.infos() == [theirs]
    assert repository.verify(theirs) == []


def test_a_store_that_drops_bytes_is_noticed_before_the_commit(repository: Repository) -> None:
    draft = repository.begin(1, None, "run")
    with draft.create("a.bin") as file:
        file.write(b"abc")
    (key,) = [entry.key for entry in repository.store.list(recursive=True) if entry.key.endswith("a.bin")]
    repository.store.put(key, b"ab")
    with pytest.raises(StoreError, match="does not hold what was written"):
        draft.commit(about(1))
    draft.abort()
    assert repository.infos() == []


def test_full_verification_on_save_reads_back_every_byte(repository: Repository) -> None:
    draft = repository.begin(1, None, "run")
    with draft.create("a.bin") as file:
        file.write(b"abc")
    (key,) = [entry.key for entry in repository.store.list(recursive=True) if entry.key.endswith("a.bin")]
    repository.store.put(key, b"abX")
    with pytest.raises(StoreError, match=r"a\.bin"):
        draft.commit(about(1), "full")


@pytest.mark.parametrize("template", ["{step}", "ep{epoch}-ba{step}", "{run}.step{step:06d}"])
def test_names_follow_the_template_and_are_found_under_any_other(store: Store, template: str) -> None:
    repository = Repository(store, names=NameTemplate(template))
    draft = repository.begin(7, 2, "run")
    info = draft.commit(about(7, epoch=2))
    assert info.name == template.format(step=7, epoch=2, run="run")
    assert Repository(store).infos() == [info]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("step", "must contain {step}"),
        ("{step}-{loss}", "unknown|fields are"),
        ("a/{step}", "folders like"),
        (".{step}", "folders like"),
        ("{step", "not a template"),
        ("{step:x!}", "not a template"),
        ("{0}{step}", "not a template"),
        ("{step:,}", "folders like"),
        ("{step:x}", "step can't be told"),
        ("{step:e}", "step can't be told"),
        ("{epoch}{step}", "step can't be told"),
    ],
)
def test_bad_templates_are_refused_with_the_reason(template: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        NameTemplate(template)


def test_a_template_with_epoch_needs_one() -> None:
    with pytest.raises(ConfigError, match="needs an epoch"):
        NameTemplate("ep{epoch}-{step}").format(1, None, "run")


@pytest.mark.parametrize("run", [".hid", "my run", "a/b", "../up"])
def test_a_runs_name_that_gives_no_folder_of_ours_is_refused(run: str) -> None:
    with pytest.raises(ConfigError, match="no dot in front"):
        NameTemplate("{run}-{step}").format(1, None, run)


# Manifest mode on a disk that fails


def _failing(root: Path, fails: Callable[[Call], bool], code: int) -> SystemCalls:
    def before(call: Call) -> None:
        if fails(call):
            raise OSError(code, os.strerror(code))

    return SystemCalls(root, before)


def test_a_commit_whose_folder_could_not_be_made_durable_is_no_success(tmp_path: Path) -> None:
    """From the failed fsync on the file system is read-only: the manifest that can be read may be gone tomorrow."""
    repository = Repository(LocalStore(tmp_path), commit="manifest")
    draft = repository.begin(1, None, "run")
    with draft.create("a.bin") as file:
        file.write(b"a")
    broken = []

    def fails(call: Call) -> bool:
        is_link = any(one.name == "link" and one.target.endswith("/manifest.json") for one in calls.log)
        if is_link and call.name == "sync_folder":
            broken.append(call)
        return bool(broken) and call.name != "close"

    with _failing(tmp_path, fails, errno.EROFS) as calls, pytest.raises(StoreError, match="read-only"):
        draft.commit(about(1))


def test_one_failed_fsync_of_a_commit_is_made_up_for(tmp_path: Path) -> None:
    repository = Repository(LocalStore(tmp_path), commit="manifest")
    draft = repository.begin(1, None, "run")
    failed = []

    def fails(call: Call) -> bool:
        is_it = call.name == "sync_folder" and call.path == draft.name and not failed
        failed.extend([call] if is_it else [])
        return is_it

    with _failing(tmp_path, fails, errno.EIO) as calls:
        info = draft.commit(about(1))
    assert failed
    assert repository.infos() == [info]
    assert [call.path for call in calls.log if call.name == "sync_folder"].count(info.name) >= 1


def _full(call: Call) -> bool:
    return call.name == "write" or (call.name == "create" and call.path.startswith(".ckptmgr"))


@pytest.mark.parametrize("since", [None, 1])
def test_a_full_disk_stops_no_sweep(tmp_path: Path, since: int | None) -> None:
    repository = Repository(LocalStore(tmp_path), commit="manifest")
    info = commit(repository, 1)
    assert info.manifest is not None
    if since is not None:
        repository.announce(since)
    repository.store.put(f".ckptmgr/drafts/{info.name}.{info.manifest.nonce}", b"")
    draft = repository.begin(2, None, "run")
    with draft.create("a.bin") as file:
        file.write(b"a")
    with _failing(tmp_path, _full, errno.ENOSPC) as calls:
        repository.sweep(attempt=2)
    assert info.name in [call.path for call in calls.log if call.name == "sync_folder"]
    assert repository.infos() == [info]
    assert {key for key in keys(repository.store) if draft.nonce in key} == (
        set() if since is None else {f".ckptmgr/drafts/{draft.name}.{draft.nonce}.fenced"}
    )


def test_a_draft_that_can_not_even_be_closed_stays_and_is_no_checkpoint_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    repository = Repository(LocalStore(tmp_path), commit="manifest")
    draft = repository.begin(2, None, "run")
    with draft.create("a.bin") as file:
        file.write(b"a")
    follower = Repository(LocalStore(tmp_path), commit="manifest")
    follower.announce(1)
    with _failing(tmp_path, lambda call: _full(call) or call.name == "link", errno.ENOSPC):
        assert follower.sweep(attempt=2) == 0
    assert "draft.sweep.kept" in caplog.text
    draft.commit(about(2))
    follower.expel()
    assert follower.infos() == []


def test_notes_of_closed_drafts_outlive_the_writer_that_put_them_and_are_no_litter() -> None:
    store = MemoryStore(can_rename=False)
    draft = Repository(store).begin(2, None, "run")
    second, third = Repository(store), Repository(store)
    second.announce(1)
    second.sweep(attempt=2)
    third.sweep(attempt=3)
    assert litter(third, pytest.fail) == []
    draft.commit(about(2))
    third.expel()
    assert third.infos() == []
    assert third.begin(2, None, "run").name != draft.name


# Pins that have ended, and names that are too long


def put_pin(store: Store, info: CheckpointInfo, tag: str, *, ended: timedelta, ttl: timedelta, put: timedelta) -> str:
    """A pin that ended so long ago by its writer's clock, and was put so long ago by the store's; its key."""
    key = pin_key(info, tag)
    body = {"step": info.step, "expires": (datetime.now(UTC) - ended).isoformat(), "ttl_s": ttl.total_seconds()}
    store.put(key, json.dumps(body).encode())
    age_file(store, key, put)
    return key


def age_file(store: Store, key: str, by: timedelta) -> None:
    if isinstance(store, MemoryStore):
        data, modified = store.objects[key]
        store.objects[key] = (data, modified - by.total_seconds())
    else:
        assert store.path is not None
        modified = (store.path / key).stat().st_mtime - by.total_seconds()
        os.utime(store.path / key, (modified, modified))


def sweep(store: Store, check: Callable[[], None] = lambda: None) -> None:
    """As a writer does that comes."""
    lock = acquire(store)
    try:
        Repository(store).sweep(check, attempt=lock.attempt)
    finally:
        lock.release()


def pin_files(store: Store) -> set[str]:
    return {key for key in keys(store) if "/pins/" in key}


def test_a_pin_that_has_ended_gives_no_tag_and_takes_none(repository: Repository) -> None:
    one, two = commit(repository, 1), commit(repository, 2)
    repository.pin(one, "paper", datetime.now(UTC) - timedelta(seconds=1))
    repository.pin(one, "draft", datetime.now(UTC) + timedelta(hours=1))
    assert repository.find(1).tags == ("draft",)
    with pytest.raises(NotFoundError):
        repository.find("paper")
    with pytest.raises(ConfigError, match="'draft' is on step 1"):
        repository.pin(two, "draft")
    repository.pin(two, "paper")
    assert repository.find("paper").name == two.name
    assert repository.unpin(1) == 2
    assert repository.find("paper").name == two.name


def test_a_sweep_removes_the_pins_that_ended_long_ago_by_every_clock(repository: Repository) -> None:
    info, store, day, hour = commit(repository, 1), repository.store, timedelta(days=1), timedelta(hours=1)
    repository.pin(info)
    repository.pin(info, "running", datetime.now(UTC) + hour)
    stays = {pin_key(info), pin_key(info, "running")}
    for tag, times in {
        "just-ended": {"ended": 2 * hour, "ttl": hour, "put": 5 * day},
        "by-a-clock-that-is-behind": {"ended": 400 * day, "ttl": hour, "put": hour / 2},
        "renewed-by-such-a-clock": {"ended": 400 * day, "ttl": 7 * day, "put": 7 * day},
    }.items():
        stays.add(put_pin(store, info, tag, **times))
    unreadable = put_pin(store, info, "unreadable", ended=9 * day, ttl=hour, put=9 * day)
    store.put(unreadable, b"?")
    put_pin(store, info, "candidate", ended=2 * day, ttl=day, put=3 * day)
    put_pin(store, info, "reading-0123abcd", ended=2 * day, ttl=6 * hour, put=2 * day + 6 * hour)
    sweep(store)
    assert pin_files(store) == {*stays, unreadable}


def test_a_pin_of_a_version_that_noted_no_length_goes_a_day_after_its_end_at_the_earliest(
    repository: Repository,
) -> None:
    info, store, day = commit(repository, 1), repository.store, timedelta(days=1)
    for tag, put in (("old", 3 * day), ("new", day / 2)):
        key = put_pin(store, info, tag, ended=2 * day, ttl=day, put=timedelta())
        store.put(key, json.dumps({**json.loads(store.get(key)), "ttl_s": None}).encode())
        age_file(store, key, put)
    sweep(store)
    assert pin_files(store) == {pin_key(info, "new")}


class Meddled(MemoryStore):
    """Calls `meddle` after a pin was read; where it `is_guarded`, it removes none."""

    is_guarded = False

    def __init__(self) -> None:
        super().__init__(can_rename=False)
        self.meddle: Callable[[str], object] = lambda key: None

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        data = super().get(key, start, end)
        if "/pins/" in key:
            self.meddle(key)
        return data

    def delete(self, keys: Iterable[str]) -> None:
        gone = list(keys)
        if self.is_guarded and any("/pins/" in key for key in gone):
            raise StoreError("no permission to delete pins")
        super().delete(gone)


def ended_pin(store: Store, info: CheckpointInfo, tag: str) -> str:
    return put_pin(store, info, tag, ended=timedelta(days=3), ttl=timedelta(hours=1), put=timedelta(days=3))


def test_a_pin_that_is_put_anew_while_a_sweep_looks_stays() -> None:
    store = Meddled()
    repository = Repository(store)
    info = commit(repository, 1)
    renewed, _ = (ended_pin(store, info, tag) for tag in ("paper", "old"))
    later = datetime.now(UTC) + timedelta(days=1)
    store.meddle = lambda key: key == renewed and repository.put_pin(info, "paper", later)
    sweep(store)
    assert [(pin.tag, pin.expires) for pin in Repository(store).pins(1)] == [("paper", later)]


def test_a_writer_that_lost_its_lock_removes_no_pin() -> None:
    store = Meddled()
    key = ended_pin(store, commit(Repository(store), 1), "paper")
    read = list[str]()
    store.meddle = read.append

    def check() -> None:
        if read:
            raise FencedError("somebody else writes")

    with pytest.raises(FencedError):
        sweep(store, check)
    assert pin_files(store) == {key}


def test_a_pin_that_can_not_be_removed_stops_no_writer(caplog: pytest.LogCaptureFixture) -> None:
    store = Meddled()
    key = ended_pin(store, commit(Repository(store), 1), "paper")
    store.is_guarded = True
    sweep(store)
    assert "no permission to delete pins (the next sweep tries again)" in caplog.text
    assert pin_files(store) == {key}


def test_of_a_remote_root_several_pins_and_marks_are_read_at_a_time() -> None:
    class Waiting(MemoryStore):
        """Answers for a record when four have been asked for."""

        four = threading.Barrier(4)

        def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            if key.startswith((".ckptmgr/pins/", ".ckptmgr/damaged/")):
                self.four.wait(timeout=10)
            return super().get(key, start, end)

    store = Waiting(can_rename=False)
    repository = Repository(store)
    infos = [commit(repository, step) for step in (1, 2, 3, 4)]
    for info in infos:
        repository.pin(info)
        repository.mark_damaged(info, f"torn {info.step}")
    pins, marks = repository.records()
    assert [pin.step for pin in pins] == [1, 2, 3, 4]
    assert list(marks.values()) == ["torn 1", "torn 2", "torn 3", "torn 4"]
    for tag in ("a", "b", "c"):
        put_pin(store, infos[0], tag, ended=timedelta(days=3), ttl=timedelta(), put=timedelta(days=3))
    assert repository.is_held(infos[0])


@pytest.mark.parametrize("can_rename", [True, False])
def test_the_longest_name_that_is_taken_can_be_saved_twice_marked_pinned_and_deleted(
    tmp_path: Path, can_rename: bool
) -> None:
    store = LocalStore(tmp_path, fsync=False)
    names = NameTemplate("a" * (MAX_LENGTH - 10) + "{step}")
    repository = Repository(store, names=names, commit="auto" if can_rename else "manifest")
    repository.sweep(attempt=10**18 - 1)
    info, other = commit(repository, 1_234_567_890), commit(repository, 1_234_567_890, attempt=2)
    assert (len(info.name), len(other.name)) == (MAX_LENGTH, MAX_LENGTH + 2)
    repository.mark_damaged(info, "torn")
    repository.pin(info, "reading-0123abcd")
    assert [info.name for info in repository.infos()] == [other.name, info.name]
    assert repository.drop(info)
    repository.archive(other)
    repository.drop_archived(repository.archived()[0])
    assert keys(store) == set()


def test_a_tag_that_is_too_long_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, fsync=False)
    repository = Repository(store, names=NameTemplate("a" * 150 + "{step}"))
    info = commit(repository, 1)
    with pytest.raises(ConfigError, match="has 201 characters, more than 200: use a shorter one"):
        repository.pin(info, "t" * 201)
    with pytest.raises(ConfigError, match=r"has 78 characters, and beside the name of a*1 there is room for 77: use"):
        repository.pin(info, "t" * 78)
    assert pin_files(store) == set()
    repository.pin(info, "t" * 77)
    assert repository.find("t" * 77).name == info.name


def test_what_an_earlier_version_let_have_a_long_name_or_tag_is_read_pinned_and_unpinned_all_the_same() -> None:
    store = MemoryStore(can_rename=False)
    info = commit(Repository(store), 1)
    for key in [key for key in keys(store) if key.startswith(info.name)]:
        store.put(key.replace(info.name, "a" * 240 + "-1"), store.get(key))
    store.delete([f"{info.name}/"])
    repository = Repository(store)
    (long,) = repository.infos()
    repository.put_pin(long, "reading-0123abcd", datetime.now(UTC) + timedelta(hours=6))
    store.put(pin_key(long, "t" * 240), store.get(pin_key(long, "reading-0123abcd")))
    assert repository.unpin("t" * 240, "t" * 240) == 1
    assert repository.unpin(long.name) == 1
