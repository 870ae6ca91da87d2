"""What single files promise without a manager: whole or not at all, and only the bytes that are asked for."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from ckptmgr import direct
from ckptmgr.direct import load_file, reader, safe_open, save_file, writer
from ckptmgr.errors import ConfigError, DamagedError, NotFoundError, StateMismatchError, StoreError
from ckptmgr.testing import Call, MemoryStore, SystemCalls
from ckptmgr.testing.format_cases import CASES, same

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")

TENSORS = {
    "b": torch.arange(24.0).view(4, 3, 2),
    "a": torch.tensor([1, 2]),
    "s": torch.tensor(True),
    "e": torch.empty(0, 3),
}


class CountingStore(MemoryStore):
    """Notes which ranges were read."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges: list[tuple[int, int | None]] = []

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        self.ranges.append((start, end))
        return super().get(key, start, end)


@pytest.fixture
def remote(monkeypatch: pytest.MonkeyPatch) -> CountingStore:
    """A store behind a network, found at any URL."""
    store = CountingStore()
    monkeypatch.setattr(direct, "open_store", lambda root, options: store)
    return store


@pytest.fixture(
    params=[
        "path",
        "file",
        "memory",
        pytest.param("s3_moto", marks=pytest.mark.server),
        pytest.param("gcs", marks=pytest.mark.server),
        pytest.param("oss", marks=pytest.mark.server),
    ]
)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    """The URL of a folder, with its options."""
    if request.param in ("path", "file"):
        return ("file://" if request.param == "file" else "") + str(tmp_path / "new" / "folder"), {}
    if request.param == "memory":
        return f"memory://{tmp_path.name}/folder", {}
    bucket = request.getfixturevalue(request.param)
    return f"{bucket.url}/some/folder", dict(bucket.options)


# writer and reader


def test_what_torch_saves_torch_loads(place: tuple[str, dict[str, Any]]) -> None:
    """In a folder that was not there, and again over the file that now is."""
    folder, options = place
    for value in (1.0, 2.0):
        with writer(f"{folder}/state.pt", options) as file:
            torch.save({"w": torch.full((1000,), value), "step": 3}, file)
        with reader(f"{folder}/state.pt", options) as file:
            loaded = torch.load(file, weights_only=True)
        assert (loaded["step"], loaded["w"].unique().tolist()) == (3, [value])


def test_safetensors_come_back(place: tuple[str, dict[str, Any]]) -> None:
    folder, options = place
    save_file(TENSORS, f"{folder}/x.safetensors", {"made": "here"}, options)
    loaded = load_file(f"{folder}/x.safetensors", options=options)
    assert loaded.keys() == TENSORS.keys()
    assert all(same(loaded[key], tensor) for key, tensor in TENSORS.items())
    with safe_open(f"{folder}/x.safetensors", options=options) as file:
        assert (file.keys(), file.metadata()) == (["a", "b", "e", "s"], {"made": "here"})
        assert torch.equal(file.get_slice("b")[1:3, 2], TENSORS["b"][1:3, 2])


def write_then_raise(url: str | Path, error: BaseException, options: dict[str, Any] | None = None) -> None:
    with writer(url, options) as file:
        file.write(bytes(9 << 20))
        raise error


def test_a_block_that_raises_leaves_nothing(place: tuple[str, dict[str, Any]]) -> None:
    folder, options = place
    with pytest.raises(ZeroDivisionError):
        write_then_raise(f"{folder}/state.pt", ZeroDivisionError(), options)
    with pytest.raises(NotFoundError, match=r"state\.pt"), reader(f"{folder}/state.pt", options):
        pass


def test_a_block_that_raises_leaves_the_old_file_alone(tmp_path: Path) -> None:
    (tmp_path / "state.pt").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        write_then_raise(tmp_path / "state.pt", KeyboardInterrupt())
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("state.pt", b"old")]


def test_nothing_is_visible_before_the_block_ends(tmp_path: Path) -> None:
    with writer(tmp_path / "state.pt") as file:
        file.write(bytes(9 << 20))
        file.flush()
        assert not (tmp_path / "state.pt").exists()
    assert (tmp_path / "state.pt").stat().st_size == 9 << 20


def test_bytes_arrive_in_order_however_they_are_cut(tmp_path: Path) -> None:
    """Pieces below, at and above the block size, and buffers that are not bytes; `tell` counts them all."""
    pieces = [b"a" * 3, b"", b"b" * (8 << 20), b"c", b"d" * (9 << 20), b"e" * (8 << 20), b"f" * 7]
    with writer(tmp_path / "x") as file:
        assert (file.writable(), file.readable(), file.seekable()) == (True, False, False)
        for piece in pieces:
            before = file.tell()
            assert file.write(piece) == len(piece) == file.tell() - before
        file.write(memoryview(torch.tensor([1.0]).numpy()))
    assert (tmp_path / "x").read_bytes() == b"".join(pieces) + b"\0\0\x80?"


def test_a_closed_writer_takes_no_more(tmp_path: Path) -> None:
    """Closing early does not commit early: the block's end does."""
    with writer(tmp_path / "x") as file:
        file.write(b"abc")
        file.close()
        with pytest.raises(ValueError, match="closed"):
            file.write(b"d")
        assert not (tmp_path / "x").exists()
    assert (tmp_path / "x").read_bytes() == b"abc"


class FullStore(MemoryStore):
    """Refuses every large write."""

    def writer(self, key: str) -> Any:
        upload = super().writer(key)

        class Full:
            abort = staticmethod(upload.abort)
            commit = staticmethod(upload.commit)

            def write(self, data: Any) -> None:
                raise StoreError("no space", 28)

        return Full()


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> FullStore:
    store = FullStore()
    monkeypatch.setattr(direct, "open_store", lambda root, options: store)
    return store


def test_the_error_of_the_store_comes_out_through_torch_save(full: FullStore) -> None:
    """torch.save puts an error of its own in its place; the caller still learns that the disk is full."""
    with pytest.raises(StoreError, match="no space"), writer("s3://bucket/x.pt") as file:
        torch.save(torch.zeros(10 << 20), file)
    assert full.list(recursive=True) == []


def test_an_ignored_error_is_raised_at_the_end(full: FullStore) -> None:
    """A block that swallows a failed write does not get a short file committed."""

    def write() -> None:
        with writer("s3://bucket/x.pt") as file, contextlib.suppress(StoreError):
            file.write(bytes(9 << 20))

    with pytest.raises(StoreError, match="no space"):
        write()
    assert full.list(recursive=True) == []


def test_small_writes_fail_at_the_end_of_the_block(full: FullStore) -> None:
    with pytest.raises(StoreError, match="no space"), writer("s3://bucket/x.pt") as file:
        file.write(b"abc")


def test_a_remote_reader_is_a_file(remote: CountingStore) -> None:
    """seek, tell, read and readinto are those of a local file, also past the end."""
    data = bytes(range(256)) * 10
    remote.put("x", data)
    local = io.BytesIO(data)
    with reader("s3://bucket/x") as file:
        assert (file.seekable(), file.readable()) == (True, True)
        for offset, whence in ((5, 0), (10, 1), (-3, 2), (0, 2), (9999, 0), (-2, 1), (0, 0)):
            assert file.seek(offset, whence) == local.seek(offset, whence)
            assert (file.read(7), file.tell()) == (local.read(7), local.tell())
        with pytest.raises(ValueError, match="seek"):
            file.seek(-1)
        assert file.read() == local.read()


def test_small_reads_read_ahead_and_large_ones_do_not(remote: CountingStore) -> None:
    """A thousand small reads are one request of at most 8 MiB; a large one asks for its own bytes alone."""
    remote.put("x", bytes(30 << 20))
    with reader("s3://bucket/x") as file:
        for _ in range(1000):
            file.read(100)
        assert remote.ranges == [(0, 8 << 20)]
        file.seek(10 << 20)
        file.readinto(bytearray(16 << 20))
    assert remote.ranges[1:] == [(10 << 20, 26 << 20)]


def test_one_request_is_never_larger_than_the_limit(remote: CountingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of any size comes in pieces that fit in memory twice."""
    monkeypatch.setattr(direct, "_LARGEST_READ", 1000)
    remote.put("x", bytes(2500))
    with reader("s3://bucket/x") as file:
        assert len(file.read()) == 2500
    assert remote.ranges == [(0, 1000), (1000, 2000), (2000, 2500)]


def test_an_object_that_shrinks_while_it_is_read_is_an_error(remote: CountingStore) -> None:
    remote.put("x", bytes(100))
    with reader("s3://bucket/x") as file:
        remote.put("x", bytes(10))
        with pytest.raises(StoreError, match="changed while it was read"):
            file.read(50)


def test_a_local_reader_follows_symbolic_links(tmp_path: Path) -> None:
    """Model files are often links into a cache."""
    (tmp_path / "real").write_bytes(b"abc")
    (tmp_path / "link").symlink_to("real")
    with reader(tmp_path / "link") as file:
        assert file.read() == b"abc"


def test_a_relative_path_is_below_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with writer("x") as file:
        file.write(b"abc")
    with reader(Path("x")) as file:
        assert file.read() == b"abc"
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


@pytest.mark.parametrize("url", ["s3://bucket/folder/", "/", "", "a/..", Path()])
def test_a_folder_is_no_file(url: str | Path) -> None:
    with pytest.raises(ConfigError, match="folder"), reader(url):
        pass


def test_a_folder_that_is_there_is_no_file_either(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="can't open"), reader(tmp_path):
        pass


def test_a_message_never_has_the_password() -> None:
    with pytest.raises(ConfigError) as caught, reader("ftp://me:secret@host/folder/"):
        pass
    assert "secret" not in str(caught.value)


# safetensors: as the official library


@pytest.mark.parametrize("case", ["every dtype", "every shape", "odd keys"])
def test_what_the_official_library_writes_is_read_the_same(case: str, tmp_path: Path) -> None:
    tensors = _savable(CASES[case]().entries["model"])
    safetensors.torch.save_file(tensors, tmp_path / "x", {"a": "b"})
    loaded = load_file(tmp_path / "x")
    assert loaded.keys() == tensors.keys()
    assert all(same(loaded[key], tensor) for key, tensor in tensors.items())
    with safetensors.safe_open(tmp_path / "x", "pt") as official, safe_open(tmp_path / "x") as ours:
        assert (ours.keys(), ours.offset_keys()) == (official.keys(), official.offset_keys())
        assert ours.metadata() == official.metadata()
        for key in tensors:
            a, b = official.get_slice(key), ours.get_slice(key)
            assert (a.get_shape(), a.get_dtype()) == (b.get_shape(), b.get_dtype())


@pytest.mark.parametrize("case", ["every dtype", "every shape", "odd keys"])
def test_what_is_written_the_official_library_reads_the_same(case: str, tmp_path: Path) -> None:
    tensors = _savable(CASES[case]().entries["model"])
    save_file(tensors, tmp_path / "x")
    loaded = safetensors.torch.load_file(tmp_path / "x")
    assert loaded.keys() == tensors.keys()
    assert all(same(loaded[key], tensor) for key, tensor in tensors.items())
    with safetensors.safe_open(tmp_path / "x", "pt") as official:
        assert official.metadata() is None


def _savable(tree: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a tree that the official library takes."""
    return {
        key: tensor.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
        for key, tensor in tree.items()
        if isinstance(tensor, torch.Tensor)
        and tensor.dtype not in (torch.complex32, torch.complex128)
        and key != "__metadata__"
    }


INDICES = [
    slice(0, 2),
    slice(-2, None),
    slice(None, None, 2),
    slice(1, None, 2),
    slice(2, 1),
    slice(0, 99),
    (slice(1, 3), slice(1, 2)),
    (slice(None), slice(1, 3), 0),
    1,
    -1,
    (1, 2),
    (1, slice(1, 2)),
    (3, -1, 1),
    (1, slice(None), slice(0, 1)),
    ...,
    (..., 1),
    (0, ..., 1),
    None,
    (None, slice(1, 2)),
    (slice(None), [0, 2]),
    [0, 2],
    torch.tensor([True, False, True, False]),
    (),
]


@pytest.mark.parametrize("index", INDICES, ids=str)
def test_a_slice_is_what_indexing_the_tensor_gives(index: Any, tmp_path: Path) -> None:
    """Also what the official `get_slice` gives, and it owns no more memory than it shows."""
    save_file(TENSORS, tmp_path / "x")
    with safe_open(tmp_path / "x") as ours:
        part = ours.get_slice("b")[index]
    assert torch.equal(part, TENSORS["b"][index])
    assert part.untyped_storage().nbytes() == part.numel() * 4
    if index not in [()]:
        with safetensors.safe_open(tmp_path / "x", "pt") as official:
            assert torch.equal(part, official.get_slice("b")[index])


@pytest.mark.parametrize("index", [4, -5, (0, 3), (0, 0, 0, 0), slice(None, None, -1)], ids=str)
def test_a_wrong_slice_is_refused_as_by_the_official_library(index: Any, tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x")
    with safe_open(tmp_path / "x") as ours, safetensors.safe_open(tmp_path / "x", "pt") as official:
        with pytest.raises((IndexError, ValueError)) as expected:
            official.get_slice("b")[index]
        with pytest.raises(expected.type):
            ours.get_slice("b")[index]


def test_a_scalar_has_a_slice_too(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x")
    with safe_open(tmp_path / "x") as file:
        assert file.get_slice("s")[...].item() is True
        assert file.get_slice("e")[:].shape == (0, 3)


def test_only_the_asked_for_rows_are_read(remote: CountingStore) -> None:
    """The header in one request, then the rows of a slice, then a tensor: nothing else."""
    tensors = {"big": torch.arange(1 << 20, dtype=torch.float32).view(1024, 1024), "small": torch.ones(2)}
    save_file(tensors, "s3://bucket/x")
    begin = 8 + int.from_bytes(remote.get("x", 0, 8), "little")
    remote.ranges.clear()
    with safe_open("s3://bucket/x") as file:
        assert file.keys() == ["big", "small"]
        assert remote.ranges == [(0, 64 << 10)]
        assert torch.equal(file.get_slice("big")[10:12, 5:7], tensors["big"][10:12, 5:7])
        assert torch.equal(file.get_slice("big")[3, 4:6], tensors["big"][3, 4:6])
        file.get_tensor("small")
    row, end = 4096, begin + (4 << 20)
    expected = [(10 * row, 12 * row), (3 * row + 16, 3 * row + 24)]
    assert remote.ranges[1:] == [*((begin + a, begin + b) for a, b in expected), (end, end + 8)]


def test_a_header_larger_than_the_first_read_is_read_whole(remote: CountingStore) -> None:
    tensors = {f"tensor number {i}": torch.tensor(i) for i in range(2000)}
    save_file(tensors, "s3://bucket/x")
    assert load_file("s3://bucket/x") == tensors


def test_a_file_that_was_closed_gives_no_more(remote: CountingStore, tmp_path: Path) -> None:
    for url in ("s3://bucket/x", tmp_path / "x"):
        save_file(TENSORS, "s3://bucket/x")
        (tmp_path / "x").write_bytes(remote.get("x"))
        with safe_open(url) as file:
            pass
        with pytest.raises(ValueError, match="closed"):
            file.get_tensor("b")


@pytest.mark.parametrize("size", [4, 1 << 20])
def test_a_file_that_is_deleted_while_it_is_loaded_is_loaded_whole(size: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    expected = {"w": torch.arange(float(size))}
    save_file(expected, path)

    def delete(call: Call) -> None:
        if call.name == "open_read":
            path.unlink(missing_ok=True)

    with SystemCalls(tmp_path, after=delete, reads=True):
        found = load_file(path)
    assert not path.exists()
    assert torch.equal(expected["w"], found["w"])


def test_a_missing_key_is_named_with_those_there(tmp_path: Path) -> None:
    save_file({str(i): torch.tensor(i) for i in range(12)}, tmp_path / "x")
    with safe_open(tmp_path / "x") as file:
        for get in (file.get_tensor, file.get_slice):
            with pytest.raises(StateMismatchError, match=r"x has no tensor 'w'; it has 0, 1, .* and 2 more") as caught:
                get("w")
            assert isinstance(caught.value, KeyError)


def header(content: Any, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


MALFORMED = {
    "empty": b"",
    "short": b"\x08\0\0",
    "header beyond the end": b"\xff\0\0\0\0\0\0\0{}",
    "header too large": (1 << 60).to_bytes(8, "little") + b"{}",
    "not JSON": header(b"{'a'}"),
    "not Unicode": header(b'{"\xff": 1}'),
    "deep": header(b"[" * 100_000),
    "a list": header([]),
    "a text for a tensor": header({"a": "b"}),
    "twice the same key": header(
        b'{"a":' + json.dumps(tensor()).encode() + b',"a":' + json.dumps(tensor()).encode() + b"}", bytes(8)
    ),
    "no dtype": header({"a": {"shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
    "unknown dtype": header({"a": tensor(dtype="F33")}, bytes(8)),
    "dtype is a list": header({"a": tensor(dtype=["F32"])}, bytes(8)),
    "too few bytes": header({"a": tensor(shape=[3])}, bytes(8)),
    "negative shape": header({"a": tensor(shape=[-1, -2])}, bytes(8)),
    "huge shape": header({"a": tensor(shape=[1 << 62, 1 << 62])}, bytes(8)),
    "shape is a float": header({"a": tensor(shape=[2.0])}, bytes(8)),
    "shape is a number": header({"a": tensor(shape=2)}, bytes(8)),
    "negative offset": header({"a": tensor(data_offsets=[-8, 0])}, bytes(8)),
    "three offsets": header({"a": tensor(data_offsets=[0, 8, 8])}, bytes(8)),
    "end before begin": header({"a": tensor(data_offsets=[8, 0])}, bytes(8)),
    "beyond the end": header({"a": tensor()}, bytes(7)),
    "bytes left over": header({"a": tensor()}, bytes(9)),
    "a hole": header({"a": tensor(), "b": tensor(data_offsets=[9, 17])}, bytes(17)),
    "an overlap": header({"a": tensor(), "b": tensor(data_offsets=[4, 12])}, bytes(12)),
    "half a byte": header({"a": tensor(dtype="F4", shape=[15], data_offsets=[0, 8])}, bytes(8)),
    "metadata is no text": header({"__metadata__": {"a": 1}}),
    "metadata is a list": header({"__metadata__": []}),
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_file_is_damage_and_named(data: bytes, tmp_path: Path) -> None:
    """Whatever the official library refuses is refused here, before any tensor is made."""
    (tmp_path / "x").write_bytes(data)
    if data != MALFORMED["twice the same key"]:  # which the official library takes, and the specification forbids
        with pytest.raises((safetensors.SafetensorError, OSError)):
            safetensors.torch.load_file(tmp_path / "x")
    with pytest.raises(DamagedError, match=r"/x: "):
        load_file(tmp_path / "x")


def test_the_smallest_file_is_an_empty_one(tmp_path: Path) -> None:
    save_file({}, tmp_path / "x")
    assert load_file(tmp_path / "x") == safetensors.torch.load_file(tmp_path / "x") == {}


def test_tensors_that_share_memory_are_refused_by_name(tmp_path: Path) -> None:
    """All groups at once; parts of one storage that do not overlap are fine, as they are officially."""
    base = torch.arange(10.0)
    tied = torch.ones(3)
    shared = {"a": base[:6], "b": base[5:], "c": tied, "d": tied, "e": torch.ones(1)}
    with pytest.raises(ConfigError, match=r"share memory.*: (a, b; c, d|c, d; a, b)\."):
        save_file(shared, tmp_path / "x")
    with pytest.raises(RuntimeError):
        safetensors.torch.save_file(shared, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
    save_file({"a": base[:5], "b": base[5:], "none": base[:0]}, tmp_path / "x")
    assert load_file(tmp_path / "x")["b"].tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"a": [1.0]}, None),
        ({1: torch.ones(1)}, None),
        ({"__metadata__": torch.ones(1)}, None),
        ({"a": torch.eye(2).to_sparse()}, None),
        ({"a": torch.ones(2, device="meta")}, None),
        ({"a": torch.ones(2, dtype=torch.complex128)}, None),
        ({"a": torch.zeros(1, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)[0]}, None),
        ({"\ud800": torch.ones(1)}, None),
        ({"a": torch.ones(1)}, {"a": 1}),
        ({"a": torch.ones(1)}, {1: "a"}),
    ],
)
def test_what_a_file_can_not_hold_is_refused_before_it_is_written(tensors: Any, metadata: Any, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(ConfigError):
        save_file(tensors, tmp_path / "x", metadata)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("x", b"old")]


def test_a_header_that_no_reader_takes_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptmgr.formats import safetensors_single

    monkeypatch.setattr(safetensors_single, "MAX_HEADER_SIZE", 100)
    with pytest.raises(ConfigError, match="Use several files"):
        save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "x")


def test_non_contiguous_tensors_are_written_as_their_values(tmp_path: Path) -> None:
    """The official `save_file` refuses them; the values are the same as of the contiguous tensor."""
    tensors = {"t": torch.arange(6.0).view(2, 3).t(), "c": torch.tensor([1 + 2j]).conj()}
    save_file(tensors, tmp_path / "x")
    loaded = safetensors.torch.load_file(tmp_path / "x")
    assert all(torch.equal(loaded[key], tensor) for key, tensor in tensors.items())


def test_tensors_come_to_the_device_asked_for(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x")
    assert {tensor.device.type for tensor in load_file(tmp_path / "x", device="cpu").values()} == {"cpu"}


@pytest.mark.parametrize("given", [torch.nn.Linear(2, 2), [torch.ones(2)]], ids=["module", "list"])
def test_what_is_no_dict_of_tensors_is_refused_with_what_to_give(tmp_path: Path, given: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{type(given).__name__}; give a dict of tensors, .* model\.state_dict\(\)"):
        save_file(given, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
