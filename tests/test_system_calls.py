"""`SystemCalls` sees every call that changes a folder, in order, and makes it fail, fall short or last."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from ckptmgr.store import direct_io
from ckptmgr.store.local import LocalStore
from ckptmgr.testing import Call, DiskState, PowerLoss, SystemCalls

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the calls of POSIX")


def names(calls: SystemCalls) -> list[tuple[str, ...]]:
    return [(call.name, call.path, *filter(None, [call.target])) for call in calls.log]


def test_a_written_file_is_seen_from_its_creation_to_its_close(tmp_path: Path) -> None:
    with SystemCalls(tmp_path, keep_data=True) as calls:
        fd = os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT)
        os.write(fd, b"one")
        os.write(fd, b"two")
        os.pwrite(fd, b"NE", 1)
        os.writev(fd, [b"x", b"yz"])
        os.pwritev(fd, [b"X"], 6)
        os.ftruncate(fd, 8)
        os.fsync(fd)
        os.close(fd)
        os.truncate(tmp_path / "a", 7)
    assert [call[1:] for call in calls.log] == [
        ("create", "a", "", 0, 0, None),
        ("write", "a", "", 0, 3, b"one"),
        ("write", "a", "", 3, 3, b"two"),
        ("write", "a", "", 1, 2, b"NE"),
        ("write", "a", "", 6, 3, b"xyz"),
        ("write", "a", "", 6, 1, b"X"),
        ("truncate", "a", "", 0, 8, None),
        ("sync", "a", "", 0, 0, None),
        ("close", "a", "", 0, 0, None),
        ("truncate", "a", "", 0, 7, None),
    ]
    assert [call.number for call in calls.log] == list(range(1, 11))
    assert (tmp_path / "a").read_bytes() == b"oNEtwoX"


def test_names_and_folders_are_seen_through_pathlib_and_shutil(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with SystemCalls(root) as calls:
        root.mkdir()
        (root / "a" / "b").mkdir(parents=True)
        (root / "a" / "b" / "f").touch()
        (root / "a" / "b" / "f").rename(root / "a" / "b" / "g")
        os.link(root / "a" / "b" / "g", root / "h")
        (root / "h").replace(root / "i")
        (root / "i").unlink()
        (root / "a").rename(root / "c")
        fd = os.open(root, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)
        shutil.rmtree(root / "c")
    assert names(calls) == [
        ("mkdir", "."), ("mkdir", "a"), ("mkdir", "a/b"), ("create", "a/b/f"), ("close", "a/b/f"),
        ("rename", "a/b/f", "a/b/g"), ("link", "a/b/g", "h"), ("rename", "h", "i"), ("unlink", "i"),
        ("rename", "a", "c"), ("sync_folder", "."), ("unlink", "c/b/g"), ("rmdir", "c/b"), ("rmdir", "c"),
    ]  # fmt: skip


def test_what_is_elsewhere_was_opened_before_or_failed_is_not_seen(tmp_path: Path) -> None:
    root, other = tmp_path / "root", tmp_path / "other"
    root.mkdir()
    early = os.open(root / "early", os.O_WRONLY | os.O_CREAT)
    with SystemCalls(root) as calls:
        other.mkdir()
        (other / "a").touch()
        os.write(early, b"x")
        with pytest.raises(FileExistsError):
            root.mkdir()
        with pytest.raises(FileNotFoundError):
            (root / "missing").unlink()
        (root / "b").mkdir()
    os.close(early)
    (root / "c").mkdir()
    assert [(call.number, call.name, call.path) for call in calls.log] == [(3, "mkdir", "b")]


def test_a_file_moved_while_it_is_open_is_known_by_its_new_name(tmp_path: Path) -> None:
    with SystemCalls(tmp_path) as calls:
        (tmp_path / "a").mkdir()
        fd = os.open(tmp_path / "a" / "f", os.O_WRONLY | os.O_CREAT)
        (tmp_path / "a").rename(tmp_path / "b")
        copy = os.dup(fd)
        os.close(fd)
        os.write(copy, b"x")
        os.close(copy)
    assert names(calls)[3:] == [("close", "b/f"), ("write", "b/f"), ("close", "b/f")]


def test_what_is_appended_is_logged_where_it_went(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"12345678")
    before = DiskState.of(tmp_path)
    with SystemCalls(tmp_path, keep_data=True) as calls:
        one, other = (os.open(tmp_path / "a", os.O_WRONLY | os.O_APPEND) for _ in range(2))
        os.write(one, b"app")
        os.writev(other, [b"e", b"nd"])
        os.pwrite(one, b"ed", 1 if sys.platform == "linux" else 14)
        os.write(other, b".")
        os.close(one)
        os.close(other)
    writes = [(call.offset, call.size) for call in calls.log if call.name == "write"]
    assert writes == [(8, 3), (11, 3), (14, 2), (16, 1)]
    assert PowerLoss(calls.log, before).after_all().files == {"a": b"12345678append" + b"ed."}
    assert (tmp_path / "a").read_bytes() == b"12345678appended."


def test_the_copies_of_a_number_are_known(tmp_path: Path) -> None:
    with SystemCalls(tmp_path, keep_data=True) as calls:
        fd = os.open(tmp_path / "a", os.O_WRONLY | os.O_CREAT)
        other = os.open(tmp_path / "b", os.O_WRONLY | os.O_CREAT)
        os.write(fd, b"1234")
        assert os.dup2(fd, other) == other
        os.write(other, b"5678")
        assert os.dup2(fd, fd) == fd
        os.write(fd, b"9")
        elsewhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(elsewhere, fd)
        os.write(fd, b"past")
        for each in (fd, other, elsewhere):
            os.close(each)
    assert [(call.name, call.path, call.offset, call.data) for call in calls.log[2:]] == [
        ("write", "a", 0, b"1234"), ("write", "a", 4, b"5678"), ("write", "a", 8, b"9"), ("close", "a", 0, None),
    ]  # fmt: skip
    assert PowerLoss(calls.log).after_all().has_same_content(DiskState.of(tmp_path))


def test_a_symlink_is_seen_and_can_fail_and_the_model_of_a_disk_refuses_it(tmp_path: Path) -> None:
    def refuse(call: Call) -> None:
        if call.path == "bad":
            raise OSError(errno.EPERM, "none here")

    with SystemCalls(tmp_path, before=refuse) as calls:
        (tmp_path / "l").symlink_to("a")
        (tmp_path / "m").symlink_to("..", target_is_directory=True)
        with pytest.raises(OSError, match="none here"):
            (tmp_path / "bad").symlink_to("a")
    assert names(calls) == [("symlink", "l", "a"), ("symlink", "m", "..")]
    with pytest.raises(ValueError, match="call 1 makes the symlink 'l'"):
        PowerLoss(calls.log)


@pytest.mark.skipif(sys.platform != "linux", reason="sendfile to a file, copy_file_range: Linux")
def test_what_the_kernel_copies_into_a_file_is_a_write(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"0123456789")
    before = DiskState.of(tmp_path)
    limit: dict[str, int] = {}
    with SystemCalls(tmp_path, lambda call: limit.get(call.name), keep_data=True) as calls:
        source = os.open(tmp_path / "source", os.O_RDONLY)
        fd = os.open(tmp_path / "copy", os.O_WRONLY | os.O_CREAT)
        assert os.sendfile(fd, source, 2, 3) == 3
        assert os.sendfile(fd, source, None, 100) == 10
        assert os.copy_file_range(source, fd, 4, 6, 20) == 4
        limit["write"] = 2
        assert os.copy_file_range(source, fd, 4, offset_src=0) == 2
        os.posix_fallocate(fd, 24, 8)
        os.close(fd)
        os.close(source)
    assert [(call.offset, call.data) for call in calls.log if call.name == "write"] == [
        (0, b"234"), (3, b"0123456789"), (20, b"6789"), (13, b"01"),
    ]  # fmt: skip
    assert ("allocate", 32) in [(call.name, call.size) for call in calls.log]
    assert PowerLoss(calls.log, before).after_all().has_same_content(DiskState.of(tmp_path))


def test_names_below_an_open_folder_and_those_made_in_rows_are_seen(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    with SystemCalls(root) as calls:
        folder = os.open(root / "in", os.O_RDONLY)
        os.mkdir("a", dir_fd=folder)
        os.mkdir("../b", dir_fd=folder)
        os.mkdir("../../past", dir_fd=folder)
        os.rename("a", "c", src_dir_fd=folder, dst_dir_fd=folder)
        os.rmdir("c", dir_fd=folder)
        os.close(folder)
        os.makedirs(root / "x" / "y")  # noqa: PTH103 - the one of os
        os.renames(root / "x" / "y", root / "z" / "w")
        os.removedirs(root / "z" / "w")
        os.close(os.open(root / "lock", os.O_RDONLY | os.O_CREAT))
        fd = os.open(root / "lock", os.O_WRONLY)
        os.fdatasync(fd) if hasattr(os, "fdatasync") else os.fsync(fd)
        os.close(fd)
        (root / "f").write_bytes(b"past")
    assert names(calls) == [
        ("mkdir", "in/a"), ("mkdir", "b"), ("rename", "in/a", "in/c"), ("rmdir", "in/c"),
        ("mkdir", "x"), ("mkdir", "x/y"), ("mkdir", "z"), ("rename", "x/y", "z/w"), ("rmdir", "x"),
        ("rmdir", "z/w"), ("rmdir", "z"), ("create", "lock"), ("open_write", "lock"), ("sync", "lock"),
        ("close", "lock"),
    ]  # fmt: skip
    assert DiskState.of(root).files.keys() - {"lock"} == {"f"}  # which went by unseen, as the docstring says


def test_existing_files_are_told_from_new_ones(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    with SystemCalls(tmp_path) as calls:
        for flags in (os.O_WRONLY, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_TRUNC, os.O_RDONLY):
            os.close(os.open(tmp_path / "f", flags))
    assert [name for name, _ in names(calls)] == ["open_write", "close", "open_write", "close", "truncate", "close"]


def test_a_number_that_became_another_file_s_unseen_is_not_taken_for_the_old_one(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    with SystemCalls(root) as calls:
        fd = os.open(root / "a", os.O_WRONLY | os.O_CREAT)
        with os.fdopen(fd, "wb"):
            pass  # closes it past `os`
        with (tmp_path / "elsewhere").open("wb", buffering=0) as other:
            assert other.fileno() == fd
            os.fsync(fd)
    assert names(calls) == [("create", "a")]


def test_before_may_refuse_a_call(tmp_path: Path) -> None:
    def full(call: Call) -> None:
        if call.name == "write":
            raise OSError(errno.ENOSPC, "full")

    with SystemCalls(tmp_path, before=full) as calls:
        fd = os.open(tmp_path / "a", os.O_WRONLY | os.O_CREAT)
        with pytest.raises(OSError, match="full"):
            os.write(fd, b"abc")
        os.close(fd)
    assert names(calls) == [("create", "a"), ("close", "a")]
    assert (tmp_path / "a").read_bytes() == b""


def test_after_may_fail_a_call_that_was_made(tmp_path: Path) -> None:
    def lose(call: Call) -> None:
        if call.name in ("mkdir", "create"):
            raise OSError(errno.EIO, "no answer")

    opened = Path("/proc/self/fd")
    before = len([*opened.iterdir()]) if opened.is_dir() else 0
    with SystemCalls(tmp_path, after=lose) as calls:
        for act in (lambda: (tmp_path / "a").mkdir(), lambda: os.open(tmp_path / "b", os.O_WRONLY | os.O_CREAT)):
            with pytest.raises(OSError, match="no answer"):
                act()
    assert names(calls) == [("mkdir", "a"), ("create", "b")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    if before:
        assert len([*opened.iterdir()]) == before


def test_a_close_that_is_refused_closes_all_the_same(tmp_path: Path) -> None:
    def refuse(call: Call) -> None:
        if call.name == "close":
            raise OSError(errno.EIO, "not written")

    with SystemCalls(tmp_path, before=refuse):
        fd = os.open(tmp_path / "a", os.O_WRONLY | os.O_CREAT)
        with pytest.raises(OSError, match="not written"):
            os.close(fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_a_write_may_fall_short_and_the_store_writes_the_rest(tmp_path: Path) -> None:
    limit = {"write": 3}
    store = LocalStore(tmp_path)
    with SystemCalls(tmp_path, before=lambda call: limit.get(call.name), keep_data=True) as calls:
        store.put("a", b"abcdefgh")
        fd = os.open(tmp_path / "v", os.O_WRONLY | os.O_CREAT)
        assert os.pwritev(fd, [b"ab", b"cd"], 0) == 3
        assert os.writev(fd, [b"x", b"yz", b"."]) == 3
        os.close(fd)
    writes = [(call.offset, call.size, call.data) for call in calls.log if call.name == "write"]
    assert writes == [(0, 3, b"abc"), (3, 3, b"def"), (6, 2, b"gh"), (0, 3, b"abc"), (0, 3, b"xyz")]
    assert store.get("a") == b"abcdefgh"


def test_fallocate_is_seen_and_can_fail(tmp_path: Path) -> None:
    if direct_io._FALLOCATE is None:
        pytest.skip("no fallocate here")

    def full(call: Call) -> None:
        if call.name == "allocate":
            raise OSError(errno.ENOSPC, "full")

    with SystemCalls(tmp_path) as calls, os.fdopen(os.open(tmp_path / "a", os.O_RDWR | os.O_CREAT), "wb") as file:
        direct_io.preallocate(file.fileno(), 8192)
    assert [call for call in calls.log if call.name == "allocate"] in ([], [Call(2, "allocate", "a", size=8192)])
    with (
        SystemCalls(tmp_path, before=full),
        os.fdopen(os.open(tmp_path / "b", os.O_RDWR | os.O_CREAT), "wb") as file,
        pytest.raises(OSError, match="full"),
    ):
        direct_io.preallocate(file.fileno(), 8192)


def test_reads_are_seen_when_asked_for(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    store.put("a", b"abc")

    def fail(call: Call) -> None:
        if call.name == "read" and call.path == "broken":
            raise OSError(errno.EIO, "unreadable")

    with SystemCalls(tmp_path, before=fail, reads=True) as calls:
        assert store.get("a", 1) == b"bc"
        assert [entry.key for entry in store.list()] == ["a"]
        assert store.stat("a") is not None
        store.put("broken", b"x")
        with pytest.raises(OSError, match="unreadable"):
            store.get("broken")
    assert [name for name in names(calls) if name == ("list", ".") or name[1] == "a"][:4] == [
        ("open_read", "a"), ("read", "a"), ("read", "a"), ("list", "."),
    ]  # fmt: skip
    assert ("stat", "a") in names(calls)
    assert [call.size for call in calls.log if call.name == "read" and call.path == "a"] == [2, 0]


def test_calls_of_many_threads_are_logged_in_the_order_in_which_they_were_made(tmp_path: Path) -> None:
    def work(name: str) -> None:
        for _ in range(20):
            (tmp_path / name).mkdir()
            (tmp_path / name).rmdir()

    with SystemCalls(tmp_path) as calls:
        threads = [threading.Thread(target=work, args=(str(number % 2),)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for name in ("0", "1"):
        assert [call.name for call in calls.log if call.path == name] == ["mkdir", "rmdir"] * 20
    assert sorted(call.number for call in calls.log) == list(range(1, 81))


def test_everything_is_as_before_afterwards(tmp_path: Path) -> None:
    before = {name: getattr(os, name) for name in dir(os) if callable(getattr(os, name))}, direct_io.allocate
    with SystemCalls(tmp_path, reads=True) as calls:
        late = os.mkdir
    assert ({name: getattr(os, name) for name in before[0]}, direct_io.allocate) == before
    late(tmp_path / "a")
    assert calls.log == []


# Against what the kernel saw

_TRACED = {
    "openat": "create", "write": "write", "pwrite64": "write", "ftruncate": "truncate", "fallocate": "allocate",
    "fsync": "sync", "fdatasync": "sync", "rename": "rename", "renameat": "rename", "renameat2": "rename",
    "link": "link", "linkat": "link", "unlink": "unlink", "unlinkat": "unlink", "mkdir": "mkdir", "rmdir": "rmdir",
    "symlink": "symlink", "symlinkat": "symlink", "pwritev": "write", "writev": "write", "truncate": "truncate",
}  # fmt: skip

_JOB = """
import sys, json, torch
from pathlib import Path
from ckptmgr import CheckpointManager
from ckptmgr.testing import SystemCalls

def job(root):
    state = {"model": torch.nn.Linear(2, 2), "big": torch.arange(1 << 18)}
    with CheckpointManager(root, keep={"last": 1}, commit=sys.argv[3]) as manager:
        manager.resume()
        manager.save(state, 1)
        manager.save(state, 2)

with SystemCalls(sys.argv[1]) as calls:
    job(Path(sys.argv[1]))
Path(sys.argv[2]).write_text(json.dumps([[call.name, call.path, call.target] for call in calls.log]))
"""


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("commit", ["rename", "manifest"])
def test_nothing_that_the_kernel_was_asked_to_change_goes_past_it(commit: str, tmp_path: Path) -> None:
    """Of a whole save with rotation strace, which sees all, saw the same calls by kind and number."""
    root, seen, trace = tmp_path / "root", tmp_path / "seen.json", tmp_path / "trace"
    command = [
        "strace",
        "-f",
        "--seccomp-bpf",
        "-qq",
        "-y",
        "-s",
        "0",
        "-e",
        f"trace={','.join(_TRACED)}",
        "-e",
        "signal=none",
    ]
    command += ["-o", str(trace), sys.executable, "-c", _JOB, str(root), str(seen), commit]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.splitlines()[0]}")
    assert done.returncode == 0, done.stderr
    ours = Counter(name.replace("sync_folder", "sync") for name, *_ in json.loads(seen.read_text()))
    del ours["close"]  # which changes nothing
    assert ours == _kinds(trace.read_text(), root)


def _kinds(trace: str, root: Path) -> Counter[str]:
    """The calls that succeeded on something below the root."""
    kinds = Counter[str]()
    for line in _whole(trace):
        match = re.match(r"\d+ +(\w+)\((.*)\) += +(-?\d+)", line)
        if match is None or int(match[3]) < 0 or match[1] not in _TRACED:
            continue
        name, arguments = _TRACED[match[1]], match[2]
        if f'"{root}' not in arguments and f"<{root}" not in arguments:
            continue
        if name != "create" or "O_CREAT" in arguments:
            kinds["rmdir" if "AT_REMOVEDIR" in arguments else name] += 1
    return kinds


def _whole(trace: str) -> list[str]:
    """The lines, those put together again that other threads' came between."""
    lines, begun = [], dict[str, str]()
    for line in trace.splitlines():
        pid = line.split(" ", 1)[0]
        if line.endswith("<unfinished ...>"):
            begun[pid] = line.removesuffix("<unfinished ...>").rstrip()
        elif match := re.match(r"\d+ +<\.\.\. \w+ resumed>(.*)", line):
            lines.append(begun.pop(pid) + match[1])
        else:
            lines.append(line)
    return lines
