"""Is what the local store has written still there, whole and inside its root, whatever happens?"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ckptmgr.errors import AlreadyExistsError, ConfigError, NotFoundError, StoreError
from ckptmgr.store import DRAFTS, Entry, mounts, open_store
from ckptmgr.store.disk import explain
from ckptmgr.store.local import LocalStore, local_path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def store(root: Path) -> LocalStore:
    return LocalStore(root)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What the system is asked for, in order: fsync, replace, rename, link, mkdir; paths below tmp_path."""

    def name(path: object) -> str:
        text = os.path.relpath(str(path), tmp_path)
        return "/".join("TEMP" if part.startswith(".ckptmgr-") else part for part in text.split("/"))

    def fsync(fd: int) -> None:
        log.append(f"fsync {name(Path(f'/proc/self/fd/{fd}').readlink())}")
        real_fsync(fd)

    def recorded(call: str) -> None:
        real = getattr(os, call)

        def wrapper(source: object, *rest: object, **options: object) -> object:
            target = f" {name(rest[0])}" if rest and call != "mkdir" else ""
            log.append(f"{call} {name(source)}{target}")
            return real(source, *rest, **options)

        monkeypatch.setattr(os, call, wrapper)

    log: list[str] = []
    real_fsync = os.fsync
    monkeypatch.setattr(os, "fsync", fsync)
    for call in ("replace", "rename", "link", "mkdir"):
        recorded(call)
    return log


def _everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Roots


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("/runs/a", "/runs/a"),
        ("file:///runs/a", "/runs/a"),
        ("local:///runs/a", "/runs/a"),
        (Path("/runs/a"), "/runs/a"),
        ("~/runs", str(Path.home() / "runs")),
        ("runs/a", str(Path.cwd() / "runs/a")),
        ("file://runs/a b%20c", str(Path.cwd() / "runs/a b%20c")),
        ("s3:/odd", str(Path.cwd() / "s3:/odd")),
    ],
)
def test_paths_and_file_urls_are_folders_of_this_machine(url: str | Path, path: str) -> None:
    assert local_path(url) == Path(path)


@pytest.mark.parametrize("url", ["s3://bucket/runs", "memory://runs", "simplecache::file:///runs"])
def test_other_urls_are_not(url: str) -> None:
    assert local_path(url) is None


@pytest.mark.parametrize("url", ["", "file://"])
def test_an_empty_root_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="root is empty"):
        local_path(url)


def test_opening_a_store_makes_no_folder(root: Path) -> None:
    store = open_store(root)
    assert (store.list(recursive=True), store.stat("a"), store.can_rename) == ([], None, True)
    assert not root.exists()


def test_a_store_says_whether_it_syncs(root: Path) -> None:
    assert repr(open_store(root)) == f"LocalStore('{root}')"
    assert repr(open_store(root, fsync=False)) == f"LocalStore('{root}', fsync=False)"


# Durability


def test_put_syncs_the_bytes_then_the_name_then_its_folder(store: LocalStore, calls: list[str]) -> None:
    store.put("first", b"")
    calls.clear()
    store.put("key", b"1")
    assert calls == ["fsync root/TEMP", "replace root/TEMP root/key", "fsync root"]


def test_create_links_so_that_nothing_is_replaced(store: LocalStore, calls: list[str], root: Path) -> None:
    store.put("first", b"")
    calls.clear()
    store.put("key", b"1", create=True)
    assert calls == ["fsync root/TEMP", "link root/TEMP root/key", "fsync root"]
    assert _everything(root) == ["first", "key"]


def test_a_writer_syncs_at_its_commit(store: LocalStore, calls: list[str]) -> None:
    store.put("first", b"")
    calls.clear()
    writer = store.writer("key")
    writer.write(b"1")
    assert calls == []
    writer.commit()
    assert calls == ["fsync root/TEMP", "replace root/TEMP root/key", "fsync root"]


def test_new_folders_are_durable_before_what_is_in_them(store: LocalStore, calls: list[str]) -> None:
    store.put("a/b/key", b"1")
    made = ["mkdir root", "fsync .", "mkdir root/a", "fsync root", "mkdir root/a/b", "fsync root/a"]
    assert calls == [*made, "fsync root/a/b/TEMP", "replace root/a/b/TEMP root/a/b/key", "fsync root/a/b"]


def test_folders_that_another_process_has_just_made_are_made_durable_too(root: Path, calls: list[str]) -> None:
    (root / "a").mkdir(parents=True)
    calls.clear()
    LocalStore(root).put("a/key", b"1")
    assert calls[:2] == ["mkdir root/a", "fsync root"]


def test_a_rename_follows_on_everything_below_being_durable(store: LocalStore, calls: list[str]) -> None:
    for key in ("drafts/x/a", "drafts/x/b/c"):
        store.put(key, b"1")
    calls.clear()
    store.rename("drafts/x", "step-1")
    assert calls == [
        "fsync root/drafts/x/b",
        "fsync root/drafts/x",
        "rename root/drafts/x root/step-1",
        "fsync root",
        "fsync root/drafts",
    ]


def test_a_drafts_names_are_made_durable_once_before_it_is_renamed(store: LocalStore, calls: list[str]) -> None:
    store.put(f"{DRAFTS}/noted", b"")
    calls.clear()
    for key in ("a", "b/c"):
        store.put(f"{DRAFTS}/x/{key}", b"1")
    x = f"root/{DRAFTS}/x"
    assert calls == [f"mkdir {x}", f"fsync {x}/a", f"mkdir {x}/b", f"fsync {x}/b/c"]
    calls.clear()
    store.rename(f"{DRAFTS}/x", "step-1")
    assert calls == [f"fsync {x}/b", f"fsync {x}", f"rename {x} root/step-1", "fsync root", f"fsync root/{DRAFTS}"]
    calls.clear()
    store.put(f"{DRAFTS}/noted-too", b"")
    assert calls[-1] == f"fsync root/{DRAFTS}"


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise here")
@pytest.mark.parametrize("fsync", [True, False])
def test_a_small_file_is_on_its_way_to_the_disk_before_anyone_waits_for_it(
    root: Path, monkeypatch: pytest.MonkeyPatch, fsync: bool
) -> None:
    log: list[str] = []
    for call in ("posix_fadvise", "fsync"):
        real = getattr(os, call)
        monkeypatch.setattr(os, call, lambda *args, call=call, real=real: (log.append(call), real(*args)))
    store = LocalStore(root, fsync=fsync)
    writers = [store.writer(f"{DRAFTS}/x/{name}", 1) for name in "ab"]
    log.clear()
    for writer in writers:
        writer.write_at(0, b"1")
    for writer in writers:
        writer.commit()
    assert log == (["posix_fadvise"] * 2 + ["fsync"] * 2 if fsync else [])


def test_a_file_of_a_draft_is_replaced_whole_or_not_at_all(store: LocalStore, root: Path) -> None:
    key = f"{DRAFTS}/x/a"
    store.put(key, b"first")
    writer = store.writer(key, 6)
    writer.write_at(0, b"second")
    assert store.get(key) == b"first"
    writer.commit()
    store.writer(key, 5).abort()
    assert (store.get(key), _everything(root / DRAFTS)) == (b"second", ["x", "x/a"])


def test_a_file_of_a_draft_that_is_deleted_while_it_is_written_is_an_error(store: LocalStore) -> None:
    writer = store.writer(f"{DRAFTS}/x/a", 1)
    writer.write_at(0, b"1")
    store.delete([f"{DRAFTS}/x/"])
    with pytest.raises(StoreError, match="deleted while it was written"):
        writer.commit()


def test_a_deletion_is_durable_in_the_folder_that_stays(store: LocalStore, calls: list[str], root: Path) -> None:
    for key in ("a/b/one", "a/b/two", "keep/three"):
        store.put(key, b"1")
    calls.clear()
    store.delete(["a/b/one", "a/b/two", "keep/missing"])
    # Also where it was gone already: whoever removed it may have died before that was durable.
    assert sorted(calls) == ["fsync root", "fsync root/keep"]
    assert _everything(root) == ["keep", "keep/three"]
    store.delete(["keep/three"])
    assert root.is_dir()


def test_without_fsync_the_system_is_never_asked_for_one(root: Path, calls: list[str]) -> None:
    store = LocalStore(root, fsync=False)
    store.put("a/key", b"1")
    store.put("a/new", b"1", create=True)
    store.writer("a/large").commit()
    store.rename("a", "b")
    store.delete(["b/"])
    assert [call for call in calls if call.startswith("fsync")] == []


def test_a_failed_fsync_is_not_repeated_and_leaves_nothing(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("key", b"old")
    asked: list[int] = []

    def fails(fd: int) -> None:
        asked.append(fd)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(StoreError, match="check the disk") as caught:
        store.put("key", b"new")
    assert (caught.value.errno, len(asked)) == (errno.EIO, 1)

    writer = store.writer("large")
    writer.write(b"new")
    with pytest.raises(StoreError):
        writer.commit()
    with pytest.raises(StoreError, match="ended"):
        writer.commit()
    assert len(asked) == 2
    assert (_everything(root), store.get("key")) == (["key"], b"old")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_syncs_no_folders_is_accepted(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real = os.fsync

    def files_only(fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").is_dir():
            raise OSError(code, os.strerror(code))
        real(fd)

    monkeypatch.setattr(os, "fsync", files_only)
    store.put("a/key", b"1")
    store.rename("a", "b")
    assert store.get("b/key") == b"1"


def test_any_other_error_of_a_folder_is_an_error(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def files_only(fd: int) -> None:
        if Path(f"/proc/self/fd/{fd}").is_dir():
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    monkeypatch.setattr(os, "fsync", files_only)
    with pytest.raises(StoreError, match="Input/output"):
        store.put("key", b"1")


# Killed, full, and in each other's way


def test_a_killed_writer_leaves_nothing_that_is_seen_and_deletion_removes_the_rest(
    store: LocalStore, root: Path
) -> None:
    store.put("draft/done", b"1")
    child = os.fork()
    if child == 0:  # pragma: no cover - in another process
        store.writer("draft/half").write(b"12345")
        writer = store.writer("draft/open")
        writer.write(b"12345")
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert [entry.key for entry in store.list(recursive=True)] == ["draft/done"]
    assert len(_everything(root)) == 3
    store.delete(["draft/"])
    assert _everything(root) == []


def test_a_full_disk_says_what_it_needed(store: LocalStore, monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    message = r"no space left to write .*key \(1,234 bytes needed, [\d,]+ bytes free\): free some space"
    root.mkdir()
    with pytest.raises(StoreError, match=message) as caught:
        store.put("key", bytes(1234))
    assert caught.value.errno == errno.ENOSPC
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "change its owner or mode"),
        (errno.EROFS, "read-only"),
        (errno.ELOOP, "symbolic link"),
        (errno.EISDIR, "in its place"),
        (errno.EIO, "check the disk"),
    ],
)
def test_every_trouble_names_the_path_and_a_remedy(code: int, words: str, tmp_path: Path) -> None:
    error = explain(OSError(code, os.strerror(code)), "write", tmp_path / "missing" / "key")
    assert error.errno == code
    assert words in str(error)
    assert str(tmp_path / "missing" / "key") in str(error)


def test_a_folder_that_another_process_removed_is_made_again(root: Path) -> None:
    one, other = LocalStore(root), LocalStore(root)
    one.put("a/b/x", b"1")
    other.delete(["a/b/x"])
    one.put("a/b/y", b"2")
    assert other.get("a/b/y") == b"2"


def test_writes_and_deletions_in_one_folder_do_not_trip_each_other(root: Path) -> None:
    def work(name: str) -> None:
        store = LocalStore(root, fsync=False)
        for _ in range(100):
            store.put(f"pins/{name}", b"1")
            store.delete([f"pins/{name}"])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, ["one", "two"]))
    assert _everything(root) == []


def test_a_file_where_a_folder_belongs_is_a_store_error(store: LocalStore) -> None:
    store.put("file", b"1")
    store.put("folder/key", b"1")
    for call in (lambda: store.put("file/below", b""), lambda: store.put("folder", b""), lambda: store.get("folder")):
        with pytest.raises(StoreError):
            call()


# Where links or renames answer oddly


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP])
def test_create_has_one_winner_without_links(store: LocalStore, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refused(source: object, target: object) -> None:
        raise OSError(code, os.strerror(code))

    def create(data: bytes) -> bool:
        start.wait()
        try:
            store.put("key", data, create=True)
        except AlreadyExistsError:
            return False
        return True

    monkeypatch.setattr(os, "link", refused)
    start = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(create, [b"%d" % n for n in range(8)]))
    assert won.count(True) == 1
    assert store.get("key") == b"%d" % won.index(True)


def test_a_claim_that_fails_without_links_is_withdrawn(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(source: object, target: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(StoreError):
        store.put("key", b"1", create=True)
    assert _everything(root) == []


def test_any_other_error_of_a_link_is_an_error(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(source: object, target: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "link", fails)
    with pytest.raises(StoreError):
        store.put("key", b"1", create=True)


def test_a_link_whose_answer_was_lost_counts(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS asks again after a lost answer, and is then told that the file exists."""
    real = os.link

    def twice(source: str, target: str) -> None:
        real(source, target)
        real(source, target)

    monkeypatch.setattr(os, "link", twice)
    store.put("key", b"1", create=True)
    with pytest.raises(AlreadyExistsError):
        store.put("key", b"2", create=True)
    assert store.get("key") == b"1"


def test_a_rename_whose_answer_was_lost_counts(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.rename

    def twice(source: str, target: str) -> None:
        real(source, target)
        real(source, target)

    store.put("draft/a", b"1")
    monkeypatch.setattr(os, "rename", twice)
    store.rename("draft", "step-1")
    assert store.get("step-1/a") == b"1"


def test_a_rename_that_did_not_happen_is_an_error(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(source: str, target: str) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")

    store.put("draft/a", b"1")
    monkeypatch.setattr(os, "rename", gone)
    with pytest.raises(StoreError):
        store.rename("draft", "step-1")


def test_a_rename_makes_the_parents_of_its_target(store: LocalStore) -> None:
    store.put("draft/a", b"1")
    store.rename("draft", "trash/deep/x")
    assert store.get("trash/deep/x/a") == b"1"


# Copies are links


def test_a_copy_is_one_file_under_two_names_and_durable(store: LocalStore, root: Path, calls: list[str]) -> None:
    store.put("a/key", b"1")
    calls.clear()
    assert store.copy("a/key", "b/copy")
    assert calls == ["mkdir root/b", "fsync root", "link root/a/key root/b/copy", "fsync root/b"]
    assert (root / "a/key").samefile(root / "b/copy")
    LocalStore(root, fsync=False).copy("a/key", "b/other")
    assert calls[4:] == ["mkdir root/b", "link root/a/key root/b/other"]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK])
def test_where_no_link_can_be_made_there_is_no_copy_and_nothing_is_left(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refused(source: object, target: object) -> None:
        raise OSError(code, os.strerror(code))

    store.put("key", b"1")
    monkeypatch.setattr(os, "link", refused)
    assert not store.copy("key", "deep/er/copy")
    assert _everything(root) == ["key"]


def test_a_copy_that_fails_is_an_error(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(source: object, target: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    store.put("key", b"1")
    monkeypatch.setattr(os, "link", fails)
    with pytest.raises(StoreError, match="can't copy"):
        store.copy("key", "copy")


def test_a_copy_whose_answer_was_lost_counts(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link

    def twice(source: str, target: str) -> None:
        real(source, target)
        real(source, target)

    store.put("key", b"1")
    monkeypatch.setattr(os, "link", twice)
    assert store.copy("key", "copy")
    monkeypatch.undo()
    with pytest.raises(AlreadyExistsError):  # this time, it was there before
        store.copy("key", "copy")


def test_a_copy_makes_a_folder_that_another_process_removed_again(root: Path) -> None:
    one, other = LocalStore(root), LocalStore(root)
    one.put("key", b"1")
    one.put("a/b/x", b"1")
    other.delete(["a/b/x"])
    assert one.copy("key", "a/b/copy")
    assert other.get("a/b/copy") == b"1"


def test_stat_of_a_folder_lists_nothing(store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("a/key", b"1")
    (root / "empty").mkdir()
    monkeypatch.setattr(os, "scandir", None)
    assert store.stat("a/") == Entry("a", is_folder=True)
    assert store.stat("empty/") == Entry("empty", is_folder=True)


def test_nfs_leftovers_do_not_fail_a_deletion(store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS keeps a file that some process has open under a new name."""
    real = os.unlink

    def kept(path: str | Path) -> None:
        Path(path).replace(Path(path).with_name(".nfs0001"))

    store.put("a/b/open", b"1")
    monkeypatch.setattr(os, "unlink", kept)
    store.delete(["a/"])
    assert _everything(root) == ["a", "a/b", "a/b/.nfs0001"]
    monkeypatch.setattr(os, "unlink", real)
    store.delete(["a/"])
    assert _everything(root) == []


def test_a_deletion_that_is_refused_is_an_error(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("a/b", b"1")
    monkeypatch.setattr(os, "unlink", lambda path: None)
    with pytest.raises(StoreError):
        store.delete(["a/"])


# Symbolic links


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    """A folder outside the root, which nothing may touch."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "secret").write_bytes(b"secret")
    yield folder
    assert _everything(folder) == ["secret"]
    assert (folder / "secret").read_bytes() == b"secret"


def test_a_linked_folder_is_not_followed(store: LocalStore, root: Path, outside: Path) -> None:
    store.put("a/key", b"1")
    (root / "link").symlink_to(outside)
    (root / "a" / "link").symlink_to(outside)
    calls = [
        lambda: store.get("link/secret"),
        lambda: store.put("link/new", b""),
        lambda: store.put("a/link/new", b""),
        lambda: store.writer("link/new"),
        lambda: store.stat("link/secret"),
        lambda: store.stat("link/"),
        lambda: store.reader("link/secret"),
        lambda: store.copy("link/secret", "copy"),
        lambda: store.copy("a/key", "link/copy"),
        lambda: store.list("link"),
        lambda: store.delete(["link/secret"]),
        lambda: store.delete(["link/"]),
        lambda: store.rename("link", "step-1"),
        lambda: store.rename("a", "link/a"),
    ]
    for call in calls:
        with pytest.raises(StoreError, match="symbolic link") as caught:
            call()
        assert caught.value.errno == errno.ELOOP


def test_links_are_no_files_of_the_store(store: LocalStore, root: Path, outside: Path) -> None:
    store.put("a/key", b"1")
    (root / "a" / "link").symlink_to(outside)
    (root / "file").symlink_to(outside / "secret")
    assert [entry.key for entry in store.list(recursive=True)] == ["a/key"]
    assert [entry.key for entry in store.list()] == ["a"]
    assert store.stat("file") is None
    for call in (lambda: store.get("file"), lambda: store.reader("file"), lambda: store.copy("file", "copy")):
        with pytest.raises(StoreError, match="symbolic link"):
            call()


def test_writing_and_deleting_replace_the_link_itself(store: LocalStore, root: Path, outside: Path) -> None:
    root.mkdir()
    for name in ("put", "write", "delete"):
        (root / name).symlink_to(outside / "secret")
    store.put("put", b"own")
    writer = store.writer("write")
    writer.write(b"own")
    writer.commit()
    store.delete(["delete"])
    assert [store.get("put"), store.get("write")] == [b"own", b"own"]
    assert _everything(root) == ["put", "write"]


def test_deleting_a_folder_removes_links_and_not_what_they_point_to(
    store: LocalStore, root: Path, outside: Path
) -> None:
    store.put("a/b/key", b"1")
    (root / "a" / "b" / "folder").symlink_to(outside)
    (root / "a" / "file").symlink_to(outside / "secret")
    (root / "a" / "nowhere").symlink_to(outside / "missing")
    store.delete(["a/"])
    assert _everything(root) == []


def test_the_root_itself_may_be_a_link(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    store = LocalStore(tmp_path / "link")
    store.put("a/key", b"1")
    assert [entry.key for entry in store.list(recursive=True)] == ["a/key"]
    store.rename("a", "b")
    store.delete(["b/"])
    assert (tmp_path / "link").is_symlink()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
def test_a_planted_fifo_is_refused_instead_of_waited_for(store: LocalStore, root: Path) -> None:
    root.mkdir()
    os.mkfifo(root / "key")
    for call in (lambda: store.get("key"), lambda: store.reader("key"), lambda: store.copy("key", "copy")):
        with pytest.raises(StoreError, match="not a regular file"):
            call()
    assert (store.list(), store.stat("key")) == ([], None)
    with pytest.raises(NotFoundError):
        store.get("key/below")


# can_rename

_MOUNTINFO = r"""
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
30 22 0:40 / /mnt/bucket rw - fuse.s3fs s3fs rw
31 22 0:41 / /mnt/bucket/local rw - xfs /dev/sdb rw
32 22 0:42 / /mnt/with\040space rw shared:7 master:1 - fuse.gcsfuse bucket rw
33 22 0:43 / /mnt/win rw - fuseblk /dev/sdc rw
34 22 0:44 / /mnt/twice rw - ext4 /dev/sdd rw
35 22 0:45 / /mnt/twice rw - fuse jfs rw
nonsense
""".strip().splitlines()


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/home/me", "ext4"),
        ("/mnt/bucket/runs", "fuse.s3fs"),
        ("/mnt/bucketful", "ext4"),
        ("/mnt/bucket/local/runs", "xfs"),
        ("/mnt/with space/runs", "fuse.gcsfuse"),
        ("/mnt/win", "fuseblk"),
        ("/mnt/twice/a", "fuse"),
    ],
)
def test_the_mount_table_is_read_as_the_kernel_means_it(folder: str, kind: str) -> None:
    assert mounts.mount_type(_MOUNTINFO, Path(folder)) == kind


@pytest.mark.parametrize(
    ("kind", "expected"), [("fuse.s3fs", False), ("fuse", False), ("fuseblk", True), ("xfs", True)]
)
def test_folders_are_not_renamed_on_a_mounted_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, expected: bool
) -> None:
    table = tmp_path / "mountinfo"
    (tmp_path / "mount").mkdir()
    table.write_text(f"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n23 22 0:40 / {tmp_path / 'mount'} rw - {kind} x rw\n")
    monkeypatch.setattr(mounts, "_MOUNTS", table)
    assert LocalStore(tmp_path / "mount" / "runs").can_rename is expected


def test_folders_are_not_renamed_where_trying_fails(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(source: object, target: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    root.mkdir()
    monkeypatch.setattr(os, "rename", refused)
    store = LocalStore(root)
    assert not store.can_rename
    assert _everything(root) == []
    monkeypatch.undo()
    assert not store.can_rename  # tried once
    assert LocalStore(root).can_rename
    assert _everything(root) == []


def test_a_system_without_a_mount_table_is_tried(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mounts, "_MOUNTS", root / "missing")
    assert LocalStore(root).can_rename
