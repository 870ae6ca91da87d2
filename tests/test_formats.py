"""What the formats promise: the contract of all, and what each one's files are to those who read them otherwise."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from ckptmgr.errors import AlreadyExistsError, DamagedError, FormatVersionError, StateMismatchError
from ckptmgr.formats import open_format, safetensors_file, targets
from ckptmgr.formats.safetensors_file import SafetensorsFormat
from ckptmgr.formats.state_file import file_stems, load_torch
from ckptmgr.formats.torch_file import TorchFormat
from ckptmgr.state.snapshot import RankPart, Snapshot, StoredTensor
from ckptmgr.testing.format_cases import CASES, leaves, same
from ckptmgr.testing.format_contract import FormatContract, fetch_all, stored_tensors, written
from ckptmgr.testing.memory_files import MemoryFiles

# What torch says of its own younger and older tensors, once per process.
pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:Sparse (CSR|BSR) tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype"),
]

SAFETENSORS, TORCH = SafetensorsFormat(), TorchFormat()


class TestSafetensors(FormatContract):
    @pytest.fixture
    def format(self) -> SafetensorsFormat:
        return SAFETENSORS


class TestSafetensorsSplit(FormatContract):
    @pytest.fixture
    def format(self) -> SafetensorsFormat:
        return SafetensorsFormat(split_size_bytes=32)


class TestTorch(FormatContract):
    @pytest.fixture
    def format(self) -> TorchFormat:
        return TORCH


def tied_model() -> torch.nn.Module:
    model = torch.nn.Module()
    model.embedding = torch.nn.Embedding(5, 4)
    model.norm = torch.nn.BatchNorm1d(4)
    model.head = torch.nn.Linear(4, 5, bias=False)
    model.head.weight = model.embedding.weight
    return model


def captured(model: torch.nn.Module) -> dict[str, Any]:
    """A model's state with one object for each tied tensor, as capture gives it."""
    return {key: tensor.detach() for key, tensor in model.state_dict(keep_vars=True).items()} | {
        "head.weight": (shared := model.embedding.weight.detach()),
        "embedding.weight": shared,
    }


def saved(folder: Path, files: MemoryFiles) -> dict[str, Path]:
    """The files on disk, for readers that want a path."""
    for name, data in files.data.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    return {name: folder / name for name in files.data}


# Files of format safetensors in the hands of others


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("split", [None, 40])
def test_the_official_reader_opens_every_file(case: str, split: int | None, tmp_path: Path) -> None:
    """`safe_open` and `load_file` read each .safetensors file, and each tensor's bytes are the saved ones."""
    snapshot = CASES[case]()
    files = written(SafetensorsFormat(split), snapshot)
    paths = saved(tmp_path, files)
    table = json.loads(files.data["state.json"])["tensors"]
    distinct = {id(t): t for t in leaves(snapshot.entries) if isinstance(t, torch.Tensor)}
    assert len(table) == len(distinct)
    loaded = {n: safetensors.torch.load_file(path) for n, path in paths.items() if path.suffix == ".safetensors"}
    for (name, key, *_), tensor in zip(table, distinct.values(), strict=True):
        if name != "tensors.pt":
            with safetensors.safe_open(paths[name], "pt") as file:
                assert file.metadata()["format"] == "pt"
                assert key in file.keys()  # noqa: SIM118 - the official file has no other way to ask
            assert same(loaded[name][key].view(tensor.dtype).view(tensor.shape), tensor)


def test_a_model_loads_its_file_without_ckptmgr(tmp_path: Path) -> None:
    """`load_state_dict(load_file(...))` takes an untied model, `load_model` a tied one."""
    torch.manual_seed(0)
    tied, plain = tied_model(), torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    paths = saved(tmp_path, written(SAFETENSORS, Snapshot({"tied": captured(tied), "plain": dict(plain.state_dict())})))
    target = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    target.load_state_dict(safetensors.torch.load_file(paths["plain.safetensors"]))
    assert torch.equal(target[0].weight, plain[0].weight)
    other = tied_model()
    assert safetensors.torch.load_model(other, paths["tied.safetensors"]) == (set(), [])
    assert torch.equal(other.head.weight, tied.embedding.weight)


def test_tied_tensors_are_written_once_and_named_in_the_metadata(tmp_path: Path) -> None:
    weights = torch.arange(3.0)
    tree = {"a": weights, "b": {"c": [weights]}, "format": weights}
    paths = saved(tmp_path, written(SAFETENSORS, Snapshot({"model": tree, "other": {"d": weights}})))
    with safetensors.safe_open(paths["model.safetensors"], "pt") as file:
        assert (file.keys(), file.metadata()) == (["a"], {"b.c.0": "a", "format": "pt"})
    assert "other.safetensors" not in paths


def test_keys_are_paths_and_stay_distinct(tmp_path: Path) -> None:
    """Two paths that join to the same text, and the reserved key, get a name of their own."""
    one = torch.ones(1)
    tree = {
        "a": {"b": one + 1, "$tuple": [one + 2]},
        "a.b": one + 3,
        "__metadata__": one + 4,
        "state": {"$dict": [[0, {"exp_avg": one + 5}], [{"$tuple": [1, "x"]}, one + 6]]},
    }
    paths = saved(tmp_path, written(SAFETENSORS, Snapshot({"m": tree, "alone": one})))
    keys = {key: tensor.item() for key, tensor in safetensors.torch.load_file(paths["m.safetensors"]).items()}
    assert keys == {
        "a.b": 2,
        "a.0": 3,
        "a.b~2": 4,
        "__metadata__~": 5,
        "state.0.exp_avg": 6,
        "state.1_x": 7,
    }
    assert list(safetensors.torch.load_file(paths["alone.safetensors"])) == ["alone"]


def test_dtypes_that_readers_may_not_know_are_written_as_ones_they_do(tmp_path: Path) -> None:
    tree = {
        "complex": torch.tensor([[1 + 2j]], dtype=torch.complex128),
        "half": torch.zeros(2, dtype=torch.complex32),
        "fnuz": torch.zeros(3, dtype=torch.float8_e4m3fnuz),
        "native": torch.zeros((), dtype=torch.complex64),
    }
    paths = saved(tmp_path, written(SAFETENSORS, Snapshot({"m": tree})))
    loaded = safetensors.torch.load_file(paths["m.safetensors"])
    assert {key: (t.dtype, tuple(t.shape)) for key, t in loaded.items()} == {
        "complex": (torch.float64, (1, 1, 2)),
        "half": (torch.float16, (2, 2)),
        "fnuz": (torch.uint8, (3,)),
        "native": (torch.complex64, ()),
    }
    assert loaded["complex"].tolist() == [[[1.0, 2.0]]]


def test_every_tensor_begins_at_a_multiple_of_its_element() -> None:
    """The header ends at a multiple of 64 bytes and odd sizes come last, with no hole between."""
    files = written(SAFETENSORS, CASES["every dtype"]())
    data = files.data["model.safetensors"]
    end = 8 + int.from_bytes(data[:8], "little")
    assert end % 64 == 0
    for _, _, dtype, _, begin, stop, _ in sorted(json.loads(files.data["state.json"])["tensors"], key=lambda r: r[4]):
        width = getattr(torch, dtype).itemsize
        assert (begin, begin % (width if not dtype.startswith("complex") else width // 2)) == (end, 0)
        end = stop
    assert end == len(data)


def test_tensors_of_whole_cache_lines_begin_at_one_whatever_lies_between() -> None:
    """An optimizer's steps, 4 bytes each among large averages, do not shift what comes after them."""
    sizes = {"step": 1, "large": 16, "none": 0, "bytes": 3, "larger": 160, "half a line": 8, "last": 32}
    tree = {name: torch.zeros(size) for name, size in sizes.items()} | {"bytes": torch.zeros(3, dtype=torch.uint8)}
    files = written(SAFETENSORS, Snapshot({"optimizer": tree}))
    rows = sorted(json.loads(files.data["state.json"])["tensors"], key=lambda row: (row[4], row[5]))
    assert [row[1] for row in rows if row[4] != row[5]] == ["large", "larger", "last", "half a line", "step", "bytes"]
    assert all(row[4] % 64 == 0 for row in rows if (row[5] - row[4]) % 64 == 0)


def test_state_json_locates_every_byte() -> None:
    """A tensor can be read by its row alone, without the header."""
    files = written(SAFETENSORS, Snapshot({"m": {"a": torch.tensor([1, 2]), "b": torch.tensor(3.0).double()}}))
    name, key, dtype, shape, begin, end, more = json.loads(files.data["state.json"])["tensors"][0]
    assert (name, key, dtype, shape, more) == ("m.safetensors", "a", "int64", [2], {})
    assert files.data[name][begin:end] == (1).to_bytes(8, "little") + (2).to_bytes(8, "little")


def test_a_large_entry_is_split() -> None:
    """Files stay within the size; a tensor above it has a file for itself; the others are not split."""
    tree = {"a": torch.zeros(4), "b": torch.zeros(4), "huge": torch.zeros(100), "c": torch.zeros(1)}
    files = written(SafetensorsFormat(split_size_bytes=32), Snapshot({"model": tree, "small": torch.zeros(8)}))
    rows = [(row[0], row[1]) for row in json.loads(files.data["state.json"])["tensors"]]
    assert rows == [
        ("model-00001-of-00003.safetensors", "a"),
        ("model-00001-of-00003.safetensors", "b"),
        ("model-00002-of-00003.safetensors", "huge"),
        ("model-00003-of-00003.safetensors", "c"),
        ("small.safetensors", "small"),
    ]


def test_more_tensors_than_a_header_may_have_go_to_several_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers refuse headers of more than 100 MB, so a file is full before that."""
    monkeypatch.setattr(safetensors_file, "MAX_HEADER_SIZE", 1000)
    snapshot = Snapshot({"m": {str(i): torch.tensor(i) for i in range(20)}})
    files = written(SAFETENSORS, snapshot)
    assert max(int.from_bytes(d[:8], "little") for n, d in files.data.items() if n.endswith(".safetensors")) < 1000
    assert [t.item() for t in leaves(fetch_all(SAFETENSORS.open(files)))] == list(range(20))


# Reading format safetensors


def test_only_the_files_of_wanted_tensors_are_opened() -> None:
    files = written(SAFETENSORS, Snapshot({"a": torch.ones(1), "b": torch.zeros(1)}))
    state = SAFETENSORS.open(files)
    assert files.opened == ["state.json"]
    assert state.fetch({state.entries["b"]: None})[state.entries["b"]].item() == 0
    assert files.opened == ["state.json", "b.safetensors"]


@pytest.mark.parametrize("case", ["every shape", "every dtype"])
def test_scattered_targets_are_filled_wherever_the_bytes_are_cut(case: str) -> None:
    """However few bytes come at a time, within an element too, every element arrives at its place."""
    files = written(SAFETENSORS, CASES[case]())
    state = SAFETENSORS.open(files)
    expected = CASES[case]().entries["model"]
    for files.chunk in (1, 5, 8, 50, 1000):
        wanted = {
            stored: torch.empty(*stored.shape, 2, dtype=stored.dtype).select(-1, 0) for stored in stored_tensors(state)
        }
        state.fetch(wanted)
        assert all(same(wanted[stored], expected[name]) for name, stored in state.entries["model"].items())


@pytest.mark.parametrize("chunk", [3, 16])
def test_a_conjugated_target_gets_the_values_that_it_shows(chunk: int) -> None:
    """Its memory holds other numbers than it stands for."""
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    files = written(SAFETENSORS, Snapshot({"m": tensor}))
    state, files.chunk = SAFETENSORS.open(files), chunk
    target = torch.zeros(2, dtype=torch.complex64).conj()
    state.fetch({state.entries["m"]: target})
    assert target.tolist() == tensor.tolist()


def forge(row: list[Any]) -> MemoryFiles:
    """A checkpoint whose only tensor has this row."""
    files = written(SAFETENSORS, Snapshot({"m": torch.arange(6.0).view(2, 3)}))
    body = json.loads(files.data["state.json"])
    body["tensors"] = [row]
    files.data["state.json"] = json.dumps(body).encode()
    files.seal()
    return files


def test_an_unforged_row_opens() -> None:
    """The rows of the next test are wrong in one thing only; strides may be large where there is no second step."""
    SAFETENSORS.open(forge(["m.safetensors", "m", "float32", [2, 3], 128, 152, {"stride": [1, 2]}]))
    large = {"stride": [2**40, 2**40, 1, 2]}
    back = fetch_all(SAFETENSORS.open(forge(["m.safetensors", "m", "float32", [1, 1, 2, 3], 128, 152, large])))
    assert back["m"].tolist() == [[[[0, 1, 2], [3, 4, 5]]]]


@pytest.mark.parametrize(
    "row",
    [
        [],
        "row",
        ["m.safetensors", "m", "float32", [2, 3], 128, 152],
        ["x.safetensors", "m", "float32", [2, 3], 128, 152, {}],
        [["m.safetensors"], "m", "float32", [2, 3], 128, 152, {}],
        ["m.safetensors", "m", "float32", [2, 4], 128, 152, {}],
        ["m.safetensors", "m", "float32", [-2, -3], 128, 152, {}],
        ["m.safetensors", "m", "float32", [2, 3.0], 128, 152, {}],
        ["m.safetensors", "m", "float32", [2, True], 128, 152, {}],
        ["m.safetensors", "m", "float32", "23", 128, 152, {}],
        ["m.safetensors", "m", "float32", 6, 128, 152, {}],
        ["m.safetensors", "m", "float32", [2, 3], 132, 156, {}],
        ["m.safetensors", "m", "float32", [2, 3], 0, 24, {}],
        ["m.safetensors", "m", "float32", [2, 3], -24, 0, {}],
        ["m.safetensors", "m", "float32", [2, 3], 128.0, 152.0, {}],
        ["m.safetensors", "m", "float32", [2, 3], "128", "152", {}],
        ["m.safetensors", "m", "float32", [2**62, 2**62], 128, 128, {}],
        ["m.safetensors", "m", "float32", [0, 2**62], 128, 128, {}],
        ["m.safetensors", "m", "float32", [0] * 65, 128, 128, {}],
        ["m.safetensors", "m", "float32", [2, 3], 128, 152, None],
        ["m.safetensors", "m", "float32", [2, 3], 128, 152, {"stride": [2, 2]}],
        ["m.safetensors", "m", "float32", [2, 3], 128, 152, {"stride": [1]}],
        ["m.safetensors", "m", "float32", [2, 3], 128, 152, {"stride": 1}],
        ["m.safetensors", "m", "float32", [2, 3], 128, 152, {"stride": [-1, 2]}],
    ],
)
def test_a_row_that_can_not_be_true_is_damage(row: Any) -> None:
    """No memory is taken and no byte read for a tensor that can't be where its row says."""
    with pytest.raises(DamagedError):
        SAFETENSORS.open(forge(row))


@pytest.mark.parametrize("shape", [[1, 6], [1, 6.0], [True, 6]])
def test_a_shape_is_checked_though_an_equal_one_was_seen_before(shape: list[Any]) -> None:
    """Python takes true, 1 and 1.0 for equal; no tensor has the last two shapes."""
    files = written(SAFETENSORS, Snapshot({"m": [torch.arange(6.0).view(1, 6), torch.zeros(1, 6)]}))
    body = json.loads(files.data["state.json"])
    body["tensors"][1][3] = shape
    files.data["state.json"] = json.dumps(body).encode()
    files.seal()
    if shape == [1, 6] and type(shape[0]) is type(shape[1]) is int:
        assert [tensor.shape for tensor in leaves(fetch_all(SAFETENSORS.open(files)))] == [(1, 6), (1, 6)]
    else:
        with pytest.raises(DamagedError):
            SAFETENSORS.open(files)


def test_tensors_that_lie_in_the_same_bytes_are_refused() -> None:
    """No writer of ours makes such a table; one of a hundred thousand rows over one piece would be read as often."""
    files = written(SAFETENSORS, Snapshot({"m": [torch.zeros(4), torch.ones(4)]}))
    body = json.loads(files.data["state.json"])
    begin = body["tensors"][0][4]
    body["tensors"][1][4:6] = begin + 8, begin + 24
    files.data["state.json"] = json.dumps(body).encode()
    files.seal()
    with pytest.raises(DamagedError, match=r"two tensors lie in the same bytes of m\.safetensors"):
        fetch_all(SAFETENSORS.open(files))


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="has no huge pages")
def test_large_new_tensors_lie_in_huge_pages() -> None:
    """A page fault for each 4 KiB takes longer than to read what comes there."""
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("huge pages are switched off")
    stored = StoredTensor((4 << 20,), torch.float32, None)
    (tensor,) = targets.fresh([stored], "cpu").values()
    tensor.zero_()
    flags = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            begin, end = (int(place, 16) for place in line.split()[0].split("-"))
        elif line.startswith("VmFlags:"):
            flags[begin, end] = line.split()[1:]
    middle = tensor.data_ptr() + tensor.nbytes // 2
    # "hg": asked for. Whether the system has some left at this moment is not ours.
    assert ["hg" in own for (begin, end), own in flags.items() if begin <= middle < end] == [True]


@pytest.mark.parametrize("leaf", [1, -1, True, "0", None, [0], {}])
def test_a_tensor_that_is_not_in_the_table_is_damage(leaf: Any) -> None:
    files = written(SAFETENSORS, Snapshot({"m": torch.ones(1)}))
    body = json.loads(files.data["state.json"]) | {"entries": {"m": [{"$tensor": leaf}]}}
    files.data["state.json"] = json.dumps(body).encode()
    files.seal()
    with pytest.raises(DamagedError, match=r"state\.json: 0 is tensor .* of 1"):
        SAFETENSORS.open(files)


def test_a_dtype_that_this_torch_lacks_asks_for_a_newer_torch() -> None:
    """It is no damage: an older checkpoint would not be the right answer."""
    with pytest.raises(FormatVersionError, match=r"'m' has dtype 'float3', which torch .* does not have"):
        SAFETENSORS.open(forge(["m.safetensors", "m", "float3", [2, 3], 96, 120, {}]))


@pytest.mark.parametrize("format", [SAFETENSORS, TORCH])
def test_a_newer_state_json_is_refused_with_both_versions(format: Any) -> None:
    files = written(format, Snapshot({"m": torch.ones(1)}))
    body = json.loads(files.data["state.json"]) | {"format_version": 2}
    files.data["state.json"] = json.dumps(body).encode()
    files.seal()
    with pytest.raises(FormatVersionError, match=r"state\.json has version 2; this ckptmgr reads up to 1"):
        format.open(files)


def test_a_file_larger_than_any_state_json_is_not_read() -> None:
    files = written(SAFETENSORS, Snapshot({}))
    entry = files.files["state.json"]
    files.files["state.json"] = type(entry)(entry.name, 2 << 30, entry.digest)
    with pytest.raises(DamagedError, match=r"state\.json is 2,147,483,648 bytes"):
        SAFETENSORS.open(files)
    assert files.opened == []


# Tensors that are more than dense numbers


def special_tensors() -> dict[str, torch.Tensor]:
    dense = torch.tensor([[0.0, 2.0], [1.0, 0.0]])
    return {
        "csr": dense.to_sparse_csr(),
        "bsr": torch.eye(4).to_sparse_bsr((2, 2)),
        "quantized": torch.quantize_per_tensor(dense, 0.5, 1, torch.quint8),
        "per_channel": torch.quantize_per_channel(
            dense, torch.tensor([0.5, 0.25]), torch.tensor([0, 1]), 0, torch.qint8
        ),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.zeros(3)]),
    }


def dense_values(tensor: torch.Tensor) -> list[Any]:
    if tensor.is_nested:
        return [part.tolist() for part in tensor.unbind()]
    values: list[Any] = (tensor.dequantize() if tensor.is_quantized else tensor.to_dense()).tolist()
    return values


@pytest.mark.parametrize("format", [SAFETENSORS, TORCH])
@pytest.mark.parametrize("kind", ["csr", "bsr", "quantized", "per_channel", "nested"])
def test_compressed_quantized_and_nested_tensors_come_back(format: Any, kind: str) -> None:
    """Fresh and into a target with other values."""
    tensor, target = special_tensors()[kind], special_tensors()[kind]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        target = torch.zeros_like(target)
    elif kind == "quantized":
        target = torch.quantize_per_tensor(torch.zeros(2, 2), 2.0, 0, torch.quint8)
    state = format.open(written(format, Snapshot({"m": {"t": tensor, "again": tensor}})))
    stored = state.entries["m"]["t"]
    assert state.entries["m"]["again"] is stored
    for given in (None, target):
        back = state.fetch({stored: given})[stored]
        assert given is None or back is given
        assert (back.layout, back.dtype, dense_values(back)) == (tensor.layout, tensor.dtype, dense_values(tensor))


@pytest.mark.parametrize("format", [SAFETENSORS, TORCH])
def test_a_compressed_tensor_does_not_go_into_a_dense_one(format: Any) -> None:
    state = format.open(written(format, Snapshot({"m": special_tensors()["csr"]})))
    with pytest.raises(StateMismatchError, match=r"a stored torch\.sparse_csr"):
        state.fetch({state.entries["m"]: torch.zeros(2, 2)})


def test_tensors_pt_loads_without_ckptmgr(tmp_path: Path) -> None:
    """With weights_only, under the number of the tensor in state.json."""
    paths = saved(tmp_path, written(SAFETENSORS, Snapshot({"m": [torch.ones(1), torch.eye(2).to_sparse()]})))
    loaded = torch.load(paths["tensors.pt"], weights_only=True)
    assert list(loaded) == ["1"]
    assert torch.equal(loaded["1"].to_dense(), torch.eye(2))


def test_a_tensor_missing_in_tensors_pt_is_damage() -> None:
    files = written(SAFETENSORS, Snapshot({"m": torch.eye(2).to_sparse()}))
    files.data["tensors.pt"] = written(TORCH, Snapshot({"m": {}})).data["m.pt"]
    files.seal()
    with pytest.raises(DamagedError, match=r"tensors\.pt has no tensor '0'"):
        fetch_all(SAFETENSORS.open(files))


# Format torch


def test_an_entry_loads_with_torch_load(tmp_path: Path) -> None:
    """A model and its optimizer take what `torch.load(weights_only=True)` gives for their files."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    # Integer keys make a tagged dict of the tree, as capture does.
    tree = state | {"state": {"$dict": [[key, value] for key, value in state["state"].items()]}}
    tree["param_groups"] = [g | {"betas": {"$tuple": list(g["betas"])}} for g in state["param_groups"]]
    paths = saved(tmp_path, written(TORCH, Snapshot({"model": dict(model.state_dict()), "optimizer": tree})))
    model.load_state_dict(torch.load(paths["model.pt"], weights_only=True))
    fresh = torch.optim.AdamW(model.parameters())
    fresh.load_state_dict(torch.load(paths["optimizer.pt"], weights_only=True))
    assert fresh.state_dict()["param_groups"] == state["param_groups"]
    assert torch.equal(fresh.state_dict()["state"][0]["exp_avg"], state["state"][0]["exp_avg"])


def test_a_view_is_written_without_the_rest_of_its_storage() -> None:
    shared = torch.zeros(100_000)[5:7]
    files = written(TORCH, Snapshot({"m": {"a": shared, "b": shared, "c": torch.zeros(100_000)[::50_000]}}))
    assert len(files.data["m.pt"]) < 4000


def test_tensors_in_a_set_are_not_taken_for_others() -> None:
    """A set comes back in any order, so ties with another entry are given up rather than guessed."""
    members = [torch.tensor(float(i)) for i in range(50)]
    snapshot = Snapshot({"a": {"$set": members}, "b": members, "c": members})
    back = fetch_all(TORCH.open(written(TORCH, snapshot)))
    assert {tensor.item() for tensor in leaves(back["a"])} == set(range(50))
    assert [tensor.item() for tensor in back["b"]] == list(range(50))
    assert [id(tensor) for tensor in back["b"]] == [id(tensor) for tensor in back["c"]]


def test_ties_across_entries_that_do_not_fit_are_damage() -> None:
    files = written(TORCH, Snapshot({"m": torch.ones(1)}))
    for ties in ([["m", 0, "m", 1]], [["m", 0, "x", 0]], [["m", 0]], ["m"]):
        files.data["state.json"] = json.dumps(
            {"format_version": 1, "files": {"m": "m.pt"}, "ties": ties, "notes": {}}
        ).encode()
        files.seal()
        with pytest.raises(DamagedError, match=r"its ties do not fit"):
            TORCH.open(files)


def test_a_class_in_an_entry_is_not_loaded(tmp_path: Path) -> None:
    """A forged entry that would run code is refused with weights_only, and named."""
    torch.save(FormatContract, tmp_path / "m.pt")
    files = written(TORCH, Snapshot({"m": torch.ones(1)}))
    files.data["m.pt"] = (tmp_path / "m.pt").read_bytes()
    files.seal()
    with pytest.raises(DamagedError, match=r"m\.pt is not a file that torch\.load reads"):
        TORCH.open(files)


# What both write beside the tensors


@pytest.mark.parametrize("format", [SAFETENSORS, TORCH])
def test_objects_that_are_no_dict_are_damage(format: Any, tmp_path: Path) -> None:
    torch.save([1], tmp_path / "objects.pt")
    state = format.open(written(format, Snapshot({}, objects=(tmp_path / "objects.pt").read_bytes())))
    with pytest.raises(DamagedError, match=r"objects\.pt holds a list"):
        state.objects()


@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "io"), RuntimeError("can't allocate memory")])
def test_trouble_of_the_machine_is_not_damage(error: Exception) -> None:
    """Too little memory or a failing disk never makes an older checkpoint the answer."""

    class Failing(MemoryFiles):
        def open(self, name: str) -> Any:
            file = super().open(name)
            if name == "m.pt":
                file = Raising(file.read())
            return file

    class Raising(io.BytesIO):
        def read(self, *_: Any) -> bytes:
            raise error

        readinto = read

    files = Failing()
    TORCH.write(Snapshot({"m": torch.ones(1)}), files)
    with pytest.raises(type(error)):
        load_torch(files, "m.pt")


@pytest.mark.parametrize("rng", [{"$inline": 1}, {"$inline": "AA==", "dtype": "float32", "shape": [1]}])
def test_random_generators_that_do_not_decode_are_damage(rng: Any) -> None:
    files = written(SAFETENSORS, Snapshot({}, ranks={0: RankPart([1])}))
    files.data["ranks/rank-00000.json"] = json.dumps({"format_version": 1, "rng": rng}).encode()
    files.seal()
    with pytest.raises(DamagedError, match=r"ranks/rank-00000\.json does not parse"):
        SAFETENSORS.open(files).part(0)


def test_an_entry_that_is_no_tree_is_damage() -> None:
    """What weights_only loads but ckptmgr never writes is named with its file."""
    buffer = io.BytesIO()
    torch.save(torch.nn.Parameter, buffer)
    files = written(TORCH, Snapshot({"m": torch.ones(1)}))
    files.data["m.pt"] = buffer.getvalue()
    files.seal()
    with pytest.raises(DamagedError, match=r"m\.pt"):
        TORCH.open(files)


def test_a_file_that_ends_too_early_is_damage() -> None:
    """Also where its size had looked right."""
    view = memoryview(bytearray(8))
    with pytest.raises(DamagedError, match=r"x ends 5 bytes too early"):
        targets.read_exactly(io.BytesIO(b"abc"), view, "x")


def test_random_generators_are_written_alike_in_every_format() -> None:
    rng = {"python": [3, [1, 2], None]}
    snapshot = Snapshot({}, ranks={0: RankPart(rng)})
    files = [written(format, snapshot).data["ranks/rank-00000.json"] for format in (SAFETENSORS, TORCH)]
    assert files[0] == files[1]


def test_file_names_are_escaped() -> None:
    """Plain names stay as they are; others are escaped, cut, and kept apart."""
    stems = file_stems(["model", "Model", "a/b", "é", "objects", "", "z" * 300, "m-00001-of-00002"])
    assert list(stems.values())[:6] == ["model", "Model~2", "a%2Fb", "%C3%A9", "objects~2", "%"]
    assert [len(stems["z" * 300]), stems["m-00001-of-00002"]] == [81, "m-00001-of-00002~"]


def test_memory_files_are_created_once() -> None:
    """A format that writes a file twice fails in tests as in a draft; a block that raises leaves none."""
    files = MemoryFiles()
    with pytest.raises(ZeroDivisionError), files.create("a"):
        raise ZeroDivisionError
    with files.create("a") as file:
        file.write(b"x")
    with pytest.raises(AlreadyExistsError), files.create("a"):
        pass
    assert files.read("a") == b"x"
    with pytest.raises(DamagedError, match="lists no file 'b'"):
        files.open("b")


def test_formats_are_found_by_name() -> None:
    assert [open_format(name).name for name in ("safetensors", "torch")] == ["safetensors", "torch"]
    with pytest.raises(FormatVersionError, match="'zarr' is not known"):
        open_format("zarr")
