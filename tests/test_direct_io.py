"""Do large files go past the page cache where that is possible, and come out the same where it is not?"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ckptmgr import memory
from ckptmgr.errors import StoreError
from ckptmgr.store import BLOCK, direct_io, page_cache
from ckptmgr.store.disk import InUse
from ckptmgr.store.local import LocalStore

_MIB = 1 << 20
_CHUNK = 8 * _MIB
_DIRECT = getattr(os, "O_DIRECT", 0)


def _takes_direct(folder: str) -> bool:
    """Whether what is written there goes past the page cache when asked to. Some file systems only say so."""
    with tempfile.TemporaryFile(dir=folder) as file:
        if not direct_io.set_direct(file.fileno(), True):
            return False
        os.pwrite(file.fileno(), memory.buffer(_MIB), 0)
        return not page_cache.is_resident(file.fileno(), 0, _MIB)


pytestmark = pytest.mark.skipif(
    not _DIRECT or not _takes_direct(tempfile.gettempdir()), reason="no direct reads and writes here"
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def store(root: Path) -> LocalStore:
    return LocalStore(root)


def _noise(size: int) -> memoryview:
    view = memory.buffer(size)
    view[:] = random.Random(size).randbytes(size)
    return view


def _write(store: LocalStore, key: str, data: memoryview, piece: int = _MIB) -> None:
    """In pieces that follow no order, by three threads."""
    writer = store.writer(key, len(data))
    places = list(range(0, len(data), piece))
    random.Random(0).shuffle(places)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda at: writer.write_at(at, data[at : at + piece]), places))
    writer.commit()


def _read(store: LocalStore, key: str, piece: int = _MIB) -> bytes:
    reader = store.reader(key)
    found = store.stat(key)
    assert found is not None
    buffer = memory.buffer(found.size + piece)
    with ThreadPoolExecutor(3) as pool:
        count = sum(pool.map(lambda at: reader.read_into(at, [buffer[at : at + piece]]), range(0, found.size, piece)))
    reader.close()
    return bytes(buffer[:count])


def _forget(path: Path) -> None:
    """Have the page cache drop what it holds of a file."""
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def _is_cached(store: LocalStore, key: str) -> bool:
    found = store.stat(key)
    assert found is not None
    reader = store.reader(key)
    is_cached = reader.is_cached(0, found.size)
    reader.close()
    return is_cached


def _is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & _DIRECT)


class _Calls:
    """What the system is asked to read or write: is it direct, and how many bytes are there?"""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[str, bool, int]] = []
        self.most = 1 << 40  # bytes that it takes or gives in one call
        self.error: OSError | None = None  # of direct calls
        self._pwrite, self._preadv = os.pwrite, os.preadv
        monkeypatch.setattr(os, "pwrite", self.pwrite)
        monkeypatch.setattr(os, "preadv", self.preadv)

    def pwrite(self, fd: int, view: memoryview, offset: int) -> int:
        self.begin("write", fd, len(view))
        return self._pwrite(fd, view[: self.most], offset)

    def preadv(self, fd: int, views: list[memoryview], offset: int) -> int:
        self.begin("read", fd, sum(view.nbytes for view in views))
        room, given = self.most, []
        for view in views:
            given.append(memoryview(view).cast("B")[:room])
            room -= len(given[-1])
        return self._preadv(fd, given, offset)

    def begin(self, call: str, fd: int, count: int) -> None:
        self.log.append((call, _is_direct(fd), count))
        if self.error is not None and _is_direct(fd):
            raise self.error

    @property
    def ways(self) -> set[tuple[str, bool]]:
        return {(call, is_direct) for call, is_direct, _ in self.log}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> _Calls:
    return _Calls(monkeypatch)


# The same bytes


@pytest.mark.parametrize("size", [_CHUNK - 1, _CHUNK, _CHUNK + 1, 2 * _CHUNK + BLOCK + 1, 3 * _CHUNK - BLOCK])
def test_chunks_come_back_as_they_were_written(store: LocalStore, size: int) -> None:
    data = _noise(size)
    _write(store, "a/key", data, _CHUNK)
    assert _read(store, "a/key", _CHUNK) == data  # past the page cache
    assert store.get("a/key") == data
    assert _read(store, "a/key", _CHUNK) == data  # out of the page cache


def test_a_large_file_leaves_the_page_cache_to_others(store: LocalStore) -> None:
    data = _noise(4 * _MIB + 5)
    _write(store, "key", data)
    assert not _is_cached(store, "key")
    assert _read(store, "key") == data
    assert not _is_cached(store, "key")
    store.get("key")
    assert _is_cached(store, "key")


def test_every_block_goes_directly_and_the_rest_of_the_last_one_from_a_block_of_ours(
    store: LocalStore, calls: _Calls
) -> None:
    _write(store, "key", _noise(2 * _MIB + BLOCK + 1))
    assert sorted(calls.log) == [
        ("write", True, BLOCK),
        ("write", True, BLOCK),
        ("write", True, _MIB),
        ("write", True, _MIB),
    ]


def test_what_lies_across_blocks_in_memory_goes_directly_all_the_same(store: LocalStore, calls: _Calls) -> None:
    data = _noise(3 * _MIB)
    writer = store.writer("key", 3 * _MIB - BLOCK)
    writer.write_at(0, data[8 : 3 * _MIB - BLOCK + 8])
    writer.commit()
    assert calls.log == [("write", True, 2 * _MIB), ("write", True, _MIB - BLOCK)]
    assert store.get("key") == data[8 : 3 * _MIB - BLOCK + 8]


def test_a_small_file_goes_the_plain_way(store: LocalStore, calls: _Calls) -> None:
    data = _noise(_MIB - 1)
    _write(store, "key", data, BLOCK)
    assert _read(store, "key", BLOCK) == data
    assert calls.ways == {("write", False), ("read", False)}
    assert _is_cached(store, "key")


def test_what_is_cold_is_read_directly_and_what_is_warm_is_not(store: LocalStore, root: Path, calls: _Calls) -> None:
    store.put("key", _noise(2 * _MIB))
    _forget(root / "key")
    _read(store, "key")
    assert calls.ways == {("read", True)}
    calls.log.clear()
    store.get("key")
    _read(store, "key")
    assert calls.ways == {("read", False)}


def test_of_a_file_s_end_only_what_fills_no_block_is_read_the_plain_way(
    store: LocalStore, root: Path, calls: _Calls
) -> None:
    data = _noise(2 * _MIB + BLOCK + 5)
    store.put("key", data)
    _forget(root / "key")
    reader, end = store.reader("key"), memory.buffer(2 * _MIB)[: _MIB + BLOCK + 5]
    assert reader.read_into(_MIB, [end]) == len(end)
    reader.close()
    assert end == data[_MIB:]
    assert calls.log == [("read", True, _MIB + BLOCK), ("read", False, 5)]


@pytest.mark.parametrize(
    ("start", "buffers"),
    [
        (1, [memory.buffer(BLOCK)]),
        (0, [memory.buffer(BLOCK - 1)]),
        (0, [memory.buffer(2 * BLOCK)[8 : BLOCK + 8]]),
        (0, [memory.buffer(BLOCK), memory.buffer(BLOCK)]),
    ],
    ids=["place", "length", "memory", "two"],
)
def test_what_does_not_fit_into_blocks_is_read_the_plain_way(
    store: LocalStore, root: Path, calls: _Calls, start: int, buffers: list[memoryview]
) -> None:
    data = _noise(2 * _MIB)
    store.put("key", data)
    _forget(root / "key")
    reader = store.reader("key")
    count = reader.read_into(start, buffers)
    reader.close()
    assert b"".join(buffers) == data[start : start + count]
    assert calls.ways == {("read", False)}


# Where it is refused


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_refused_piece_goes_the_plain_way_and_so_do_all_others(store: LocalStore, calls: _Calls, code: int) -> None:
    data = _noise(8 * _MIB + 13)[8:]  # from memory that would go through a block of ours
    calls.error = OSError(code, os.strerror(code))
    writer = store.writer("key", len(data))
    writer.write_at(4 * _MIB, data[4 * _MIB :])
    writer.write_at(0, data[: 4 * _MIB])
    writer.commit()
    assert store.get("key") == data
    bounced = [("write", direct, 2 * _MIB) for direct in (True, False, False)]
    assert calls.log == [*bounced, ("write", False, BLOCK), ("write", False, 4 * _MIB)]


def test_a_refused_read_goes_the_plain_way_and_so_do_all_others(store: LocalStore, root: Path, calls: _Calls) -> None:
    data = _noise(3 * _MIB)
    store.put("key", data)
    calls.error = OSError(errno.EINVAL, "Invalid argument")
    reader = store.reader("key")
    buffer = memory.buffer(_MIB)
    for at in range(0, 3 * _MIB, _MIB):
        _forget(root / "key")
        assert reader.read_into(at, [buffer]) == _MIB
        assert buffer == data[at : at + _MIB]
    _forget(root / "key")
    assert reader.is_cached(0, 3 * _MIB)  # from here on, the page cache is the only way
    reader.close()
    assert [is_direct for _, is_direct, _ in calls.log] == [True, False, False, False]


def test_a_file_system_that_refuses_the_flag_gets_plain_writes_and_reads(
    store: LocalStore, root: Path, calls: _Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_flag(fd: int, command: int, flags: int = 0) -> int:
        if flags & _DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return int(real_fcntl(fd, command, flags))

    def no_open(path: Any, flags: int, *rest: Any) -> int:
        if flags & _DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *rest)

    real_fcntl, real_open = fcntl.fcntl, os.open
    monkeypatch.setattr(fcntl, "fcntl", no_flag)
    monkeypatch.setattr(os, "open", no_open)
    data = _noise(2 * _MIB + 5)
    _write(store, "key", data)
    _forget(root / "key")
    assert _read(store, "key") == data
    assert calls.ways == {("write", False), ("read", False)}


def test_a_system_with_none_of_this_writes_and_reads_the_same(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """As on Windows, where a place in a file can't be named in one call, threads take turns."""
    for name in ("pwrite", "preadv", "O_DIRECT"):
        monkeypatch.delattr(os, name)
    switch_after = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # a thread comes between any two calls of another
    request.addfinalizer(lambda: sys.setswitchinterval(switch_after))
    monkeypatch.setattr(direct_io, "_HAS_FCNTL", False)
    monkeypatch.setattr(direct_io, "_FALLOCATE", None)
    for size in (10, 2 * _MIB + 5):
        data = _noise(size)
        _write(store, "key", data, BLOCK)
        assert _read(store, "key", BLOCK) == data
    reader = store.reader("key")
    buffers = [bytearray(7), bytearray(), bytearray(BLOCK)]
    assert reader.read_into(3, buffers) == BLOCK + 7
    assert b"".join(buffers) == data[3 : BLOCK + 10]
    assert reader.read_into(len(data), buffers) == 0
    reader.close()


def test_nobody_moves_the_place_between_naming_it_and_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def checked(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: Any) -> Any:
            assert turn.locked()
            return real(*arguments)

        monkeypatch.setattr(os, name, call)

    turn = threading.Lock()
    monkeypatch.delattr(os, "pwrite")
    with (tmp_path / "file").open("wb") as file:
        checked("lseek")
        checked("write")
        direct_io.write_at(file.fileno(), 3, memoryview(b"123"), turn)
    assert (tmp_path / "file").read_bytes() == bytes(3) + b"123"


def test_a_system_that_can_t_be_asked_what_it_holds_reads_the_plain_way(
    store: LocalStore, root: Path, calls: _Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("key", _noise(2 * _MIB))
    _forget(root / "key")
    monkeypatch.setattr(page_cache, "_LIBC", None)
    _read(store, "key")
    assert calls.ways == {("read", False)}


def test_what_is_written_or_read_in_part_is_gone_on_with(store: LocalStore, calls: _Calls) -> None:
    """The rest of a block is refused directly, and then goes the plain way."""
    data = _noise(2 * _MIB + 5)
    calls.most = 100_001
    _write(store, "key", data, 2 * _MIB)
    assert calls.ways == {("write", True), ("write", False)}
    assert store.get("key") == data
    assert _read(store, "key", 2 * _MIB) == data
    reader = store.reader("key")
    buffers = [memory.buffer(size) for size in (10, 70_000, 60_000, 1, 3)]
    assert reader.read_into(1, buffers) == 130_014
    assert b"".join(buffers) == data[1:130_015]
    reader.close()


# Without the newest of kernels


def _without_cachestat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "_CACHESTAT", 99_999)  # a number that no system call has


def _on_an_overlay(monkeypatch: pytest.MonkeyPatch) -> None:
    real = page_cache._LIBC
    below = SimpleNamespace(syscall=lambda *_: 0, mincore=real.mincore, fstatfs=lambda *_: -1)
    monkeypatch.setattr(page_cache, "_LIBC", below)


@pytest.mark.parametrize("pretend", [_without_cachestat, _on_an_overlay])
def test_what_is_cached_is_known_by_other_means(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch, pretend: Callable[[pytest.MonkeyPatch], None]
) -> None:
    store.put("key", _noise(2 * _MIB))
    pretend(monkeypatch)
    assert _is_cached(store, "key")
    _forget(root / "key")
    assert not _is_cached(store, "key")
    reader = store.reader("key")
    assert not reader.is_cached(BLOCK, BLOCK + 1)
    assert reader.is_cached(2 * _MIB, 3 * _MIB)  # nothing is there to be read
    reader.close()


@pytest.mark.parametrize(("pretend", "expected"), [(_without_cachestat, True), (_on_an_overlay, False)])
def test_what_is_cached_of_a_stranger_s_file_is_not_made_up(
    store: LocalStore,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    pretend: Callable[[pytest.MonkeyPatch], None],
    expected: bool,
) -> None:
    store.put("key", _noise(2 * _MIB))
    _forget(root / "key")
    pretend(monkeypatch)
    monkeypatch.setattr(os, "geteuid", lambda: (root / "key").stat().st_uid + 1)
    assert _is_cached(store, "key") is expected


# Room


def test_a_large_file_has_its_room_before_its_bytes(store: LocalStore, root: Path) -> None:
    writer = store.writer("key", 16 * _MIB + 1)
    (temp,) = root.iterdir()
    found = temp.stat()
    writer.abort()
    if not found.st_size:
        pytest.skip("this file system allocates nothing ahead")
    assert found.st_blocks * 512 >= 16 * _MIB
    assert list(root.iterdir()) == []


_FULL = """
import os, sys
from ckptmgr.errors import StoreError
from ckptmgr.store.local import LocalStore
store = LocalStore(sys.argv[1])
try:
    store.writer("key", 64 << 20)
except StoreError as error:
    print(error.errno, os.listdir(sys.argv[1]), error)
"""


def test_a_full_disk_says_so_before_the_first_byte(tmp_path: Path) -> None:
    """On a real file system of 8 MiB, in a name space of its own."""
    (tmp_path / "small").mkdir()
    (tmp_path / "full.py").write_text(_FULL)
    mount = f"mount -t tmpfs -o size=8m none {tmp_path}/small && exec {sys.executable} full.py {tmp_path}/small"
    try:
        done = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        )
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode and "Traceback" not in done.stderr:
        pytest.skip(f"nothing can be mounted here: {done.stderr}")
    told = r"no space left to write .*small/key \(67,108,864 bytes needed, 8,388,608 bytes free\): free some space"
    code, left, message = done.stdout.split(" ", 2)
    assert (int(code), left) == (errno.ENOSPC, "[]")
    assert re.match(told, message)


@pytest.mark.parametrize("answers", [[errno.EOPNOTSUPP], [errno.ENOSYS], [errno.EINTR, errno.EINTR, 0]])
def test_a_file_system_without_preallocation_takes_the_file(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, answers: list[int]
) -> None:
    def fallocate(*_: object) -> int:
        code = left.pop(0)
        ctypes.set_errno(code)
        return -1 if code else 0

    left = list(answers)
    monkeypatch.setattr(direct_io, "_FALLOCATE", fallocate)
    data = _noise(2 * _MIB + 5)
    _write(store, "key", data)
    assert (left, store.get("key")) == ([], data)


# Durability


def test_a_placed_file_is_cut_to_its_size_then_synced_once(
    store: LocalStore, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def note(name: str) -> None:
        real = getattr(os, name)

        def noted(fd: int, *rest: int) -> object:
            log.append((name, os.fstat(fd).st_size if not Path(f"/proc/self/fd/{fd}").is_dir() else "folder"))
            return real(fd, *rest)

        monkeypatch.setattr(os, name, noted)

    log: list[tuple[str, object]] = []
    store.put("first", b"")
    note("fsync")
    note("ftruncate")
    _write(store, "key", _noise(2 * _MIB + 5))
    size = 2 * _MIB + 5
    assert log == [("ftruncate", 2 * _MIB + BLOCK), ("fsync", size), ("fsync", "folder")]
    log.clear()
    _write(LocalStore(root, fsync=False), "key", _noise(size))
    assert log == [("ftruncate", 2 * _MIB + BLOCK)]


def test_a_file_that_others_cut_is_no_object(store: LocalStore, root: Path) -> None:
    writer = store.writer("key", 2 * _MIB)
    writer.write_at(0, _noise(2 * _MIB))
    (temp,) = root.iterdir()
    os.truncate(temp, _MIB)
    with pytest.raises(StoreError, match=r"begun as 2,097,152 bytes, but 1,048,576 were written"):
        writer.commit()
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_piece_that_is_not_written_is_an_error(store: LocalStore, root: Path, calls: _Calls, code: int) -> None:
    calls.error = OSError(code, os.strerror(code))
    writer = store.writer("key", 2 * _MIB)
    with pytest.raises(StoreError) as caught:
        writer.write_at(0, _noise(2 * _MIB))
    assert caught.value.errno == code
    with pytest.raises(StoreError, match="0 were written"):
        writer.commit()
    assert list(root.iterdir()) == []


def test_a_piece_that_is_not_read_is_an_error(store: LocalStore, root: Path, calls: _Calls) -> None:
    store.put("key", _noise(2 * _MIB))
    _forget(root / "key")
    calls.error = OSError(errno.EIO, "Input/output error")
    reader = store.reader("key")
    with pytest.raises(StoreError, match="check the disk") as caught:
        reader.read_into(0, [memory.buffer(_MIB)])
    assert caught.value.errno == errno.EIO
    reader.close()


# Descriptors


def _descriptors(path: Path) -> int:
    found = [entry.readlink() for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    return sum(target.is_relative_to(path) for target in found)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """The first write waits: set once it does, and to be set for it to go on."""
    reached, go_on = threading.Event(), threading.Event()
    real = os.pwrite

    def pwrite(fd: int, view: memoryview, offset: int) -> int:
        reached.set()
        assert go_on.wait(60)
        return real(fd, view, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    yield reached, go_on
    go_on.set()


def test_an_abort_leaves_the_descriptor_to_the_thread_that_still_writes(
    store: LocalStore, root: Path, held: tuple[threading.Event, threading.Event]
) -> None:
    """Its number could at once be that of another file, which would then be written to."""
    reached, go_on = held
    writer = store.writer("key", 2 * _MIB)
    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(writer.write_at, 0, _noise(2 * _MIB))
        assert reached.wait(60)
        writer.abort()
        assert _descriptors(root) == 1
        with pytest.raises(StoreError, match="ended"):
            writer.write_at(0, bytes(BLOCK))
        go_on.set()
        writing.result(60)
    assert (_descriptors(root), list(root.iterdir())) == (0, [])


def test_what_is_in_use_is_closed_once_by_the_last() -> None:
    closed: list[int] = []
    in_use = InUse(lambda: closed.append(1), "it has ended")
    with in_use, in_use:
        in_use.end()
        in_use.end()
        assert closed == []
    assert closed == [1]
    in_use.end()
    assert closed == [1]
    with pytest.raises(StoreError, match="it has ended"), in_use:
        pass


def test_readers_and_writers_leave_no_descriptor_behind(store: LocalStore, root: Path) -> None:
    _write(store, "key", _noise(2 * _MIB))
    reader = store.reader("key")
    assert _descriptors(root) == 2
    reader.close()
    assert _descriptors(root) == 0
    reader = store.reader("key")
    del reader
    writer = store.writer("other", 2 * _MIB)
    writer.write_at(0, _noise(2 * _MIB))
    del writer
    assert (_descriptors(root), [path.name for path in root.iterdir()]) == (0, ["key"])


def test_a_reader_stays_with_the_file_that_it_opened(store: LocalStore, root: Path) -> None:
    old, new = _noise(2 * _MIB), _noise(2 * _MIB + BLOCK)
    store.put("key", old)
    _forget(root / "key")
    reader = store.reader("key")
    store.put("key", new)
    buffer = memory.buffer(4 * _MIB)
    assert reader.read_into(0, [buffer]) == 2 * _MIB
    assert buffer[: 2 * _MIB] == old
    reader.close()
    assert _read(store, "key") == new


def test_another_file_in_its_place_is_not_opened_for_direct_reads(store: LocalStore, root: Path) -> None:
    for key in ("one", "other"):
        store.put(key, bytes(_MIB))
    fd = os.open(root / "one", os.O_RDONLY)
    assert direct_io.open_direct(root / "other", fd) is None
    assert direct_io.open_direct(root / "missing", fd) is None
    assert _descriptors(root) == 1
    os.close(fd)
