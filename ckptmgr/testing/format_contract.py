"""What does every format promise? `FormatContract`, a test class for any of them.

class TestMyFormat(FormatContract):
    @pytest.fixture
    def format(self):
        return MyFormat()
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from ..errors import DamagedError, StateMismatchError
from ..formats import Format
from ..manifest import checked_name
from ..state.codec import from_json
from ..state.snapshot import RankPart, Snapshot, StoredState, StoredTensor, Tree, map_leaves
from .format_cases import CASES, every_shape, leaves, odd_entries, same, without_tensors
from .memory_files import MemoryFile, MemoryFiles

if TYPE_CHECKING:
    from typing_extensions import Buffer


def written(format: Format, snapshot: Snapshot) -> MemoryFiles:
    """The files of a snapshot."""
    files = MemoryFiles()
    format.write(snapshot, files)
    return files


def fetch_all(state: StoredState) -> dict[str, Tree]:
    """Every entry with its tensors read into fresh memory."""
    tensors = state.fetch(dict.fromkeys(stored_tensors(state)))
    return {
        entry: map_leaves(tree, lambda leaf, _: tensors[leaf] if isinstance(leaf, StoredTensor) else leaf)
        for entry, tree in state.entries.items()
    }


def stored_tensors(state: StoredState) -> list[StoredTensor]:
    """The tensors of a stored state, each once."""
    return list(dict.fromkeys(leaf for leaf in leaves(dict(state.entries)) if isinstance(leaf, StoredTensor)))


def _read_all(state: StoredState) -> None:
    state.part(0)
    fetch_all(state)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
class FormatContract:
    """Promises of `Format`; give a fixture `format`. `for_others` are files that are written for readers of
    other libraries, and that the format itself never reads."""

    for_others: frozenset[str] = frozenset()

    @pytest.fixture(params=list(CASES))
    def snapshot(self, request: pytest.FixtureRequest) -> Snapshot:
        return CASES[request.param]()

    @pytest.fixture
    def state(self) -> Snapshot:
        """A plain state to damage and to restore."""
        weights = torch.arange(12.0).view(3, 4)
        entries = {"model": {"w": weights, "b": torch.ones(4), "tied": weights}, "step": 7}
        return Snapshot(entries, ranks={0: RankPart({"seed": 3})})

    def test_a_snapshot_comes_back_as_it_was(self, format: Format, snapshot: Snapshot) -> None:
        """Values, dtypes, shapes, order, ties and notes are those of the snapshot."""
        state = format.open(written(format, snapshot))
        back = fetch_all(state)
        assert without_tensors(back) == without_tensors(snapshot.entries)
        assert [list(back), state.notes] == [list(snapshot.entries), snapshot.notes]
        for expected, actual in zip(leaves(snapshot.entries), leaves(back), strict=True):
            assert not isinstance(expected, torch.Tensor) or same(expected, actual)

    def test_what_ranks_had_of_their_own_comes_back(self, format: Format, snapshot: Snapshot) -> None:
        """Each rank's generators, entries and notes, with values, flags and ties; a rank without any has none."""
        state = format.open(written(format, snapshot))
        assert state.part(7) is None
        for rank, part in snapshot.ranks.items():
            own = state.part(rank)
            assert own is not None
            assert repr(own.rng) == repr(from_json(part.rng))
            assert [list(own.entries), own.notes, own.objects()] == [list(part.entries), part.notes, {}]
            places = [leaf for leaf in leaves(dict(own.entries)) if isinstance(leaf, StoredTensor)]
            numbers = [leaf["$tensor"] for leaf in leaves(part.entries) if isinstance(leaf, dict)]
            assert len(places) == len(numbers)
            for number, stored in zip(numbers, places, strict=True):
                expected = from_json(part.tensors[number])
                assert same(own.tensors[stored], expected)
                assert (stored.shape, stored.dtype) == (tuple(expected.shape), expected.dtype)
                assert stored.requires_grad == expected.requires_grad
                assert stored.is_parameter == isinstance(expected, torch.nn.Parameter)
            assert len(set(map(id, places))) == len(set(numbers))

    def test_what_is_known_before_reading_is_true(self, format: Format, snapshot: Snapshot) -> None:
        """A stored tensor has the shape, dtype, dense strides and flags of the one that was saved."""
        state = format.open(written(format, snapshot))
        for tensor, stored in zip(leaves(snapshot.entries), leaves(dict(state.entries)), strict=True):
            if isinstance(tensor, torch.Tensor):
                assert (stored.shape, stored.dtype) == (tuple(tensor.shape), tensor.dtype)
                assert stored.requires_grad == tensor.requires_grad
                assert stored.is_parameter == isinstance(tensor, torch.nn.Parameter)

    def test_dense_strides_come_back(self, format: Format) -> None:
        """A channels_last tensor is stored and fetched as one; a fresh one is otherwise contiguous."""
        state = format.open(written(format, every_shape()))
        tensors = fetch_all(state)["model"]
        expected = every_shape().entries["model"]
        for name in ("channels_last", "channels_last_3d", "transposed"):
            assert tensors[name].stride() == expected[name].stride()
            assert state.entries["model"][name].stride == expected[name].stride()
        for name in ("view", "row", "expanded", "scalar", "conjugate"):
            assert tensors[name].is_contiguous()
            assert state.entries["model"][name].stride is None

    def test_a_fresh_tensor_owns_just_its_bytes(self, format: Format) -> None:
        """What is fetched shares no memory with the checkpoint, a second fetch, or a larger storage."""
        state = format.open(written(format, every_shape()))
        first, second = fetch_all(state)["model"], fetch_all(state)["model"]
        for name, tensor in first.items():
            assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            before = second[name].clone()
            tensor.detach().zero_()
            assert same(second[name], before)

    def test_a_target_is_filled_in_place(self, format: Format, snapshot: Snapshot) -> None:
        """Given a target of any strides, its own memory receives the values and it is the answer."""
        state = format.open(written(format, snapshot))
        tensors = {
            s: t for t, s in zip(leaves(snapshot.entries), leaves(dict(state.entries)), strict=True) if _is_plain(t)
        }
        for change in (torch.Tensor.contiguous, _scattered):
            targets = {
                s: change(torch.zeros_like(t, memory_format=torch.contiguous_format)) for s, t in tensors.items()
            }
            strides = {s: (t.data_ptr(), t.stride()) for s, t in targets.items()}
            back = state.fetch(targets)
            assert all(back[s] is targets[s] for s in targets)
            assert all((t.data_ptr(), t.stride()) == strides[s] for s, t in targets.items())
            assert all(same(back[s], t) for s, t in tensors.items())

    def test_a_target_that_wants_grad_is_filled(self, format: Format, state: Snapshot) -> None:
        """Restoring into a live parameter raises nothing and leaves no graph behind."""
        opened = format.open(written(format, state))
        for target in (torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(4, 3).t())):
            opened.fetch({opened.entries["model"]["w"]: target})
            assert same(target, state.entries["model"]["w"])
            assert target.grad_fn is None
            assert target.requires_grad

    def test_only_what_is_wanted_is_answered(self, format: Format, state: Snapshot) -> None:
        opened = format.open(written(format, state))
        wanted = opened.entries["model"]["b"]
        assert list(opened.fetch({wanted: None})) == [wanted]
        assert opened.fetch({}) == {}

    @pytest.mark.parametrize(
        "target", [torch.zeros(4, 4), torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 4).to_sparse()]
    )
    def test_a_target_that_does_not_fit_is_refused(self, format: Format, state: Snapshot, target: torch.Tensor) -> None:
        """No memory is written when shape, dtype or layout differ."""
        opened = format.open(written(format, state))
        with pytest.raises(StateMismatchError):
            opened.fetch({opened.entries["model"]["w"]: target})
        assert not target.to_dense().any()

    def test_file_names_are_plain_and_differ_in_more_than_case(self, format: Format) -> None:
        """Any entry name gives a file that a manifest takes and every file system tells apart."""
        names = list(written(format, odd_entries()).data)
        assert [checked_name(name) for name in names] == names
        assert len({name.casefold() for name in names}) == len(names)
        assert all(len(name) < 160 for name in names)
        assert "manifest.json" not in names

    def test_the_snapshot_is_not_changed(self, format: Format, snapshot: Snapshot) -> None:
        before = without_tensors(snapshot.entries)
        versions = [t._version for t in leaves(snapshot.entries) if isinstance(t, torch.Tensor)]
        written(format, snapshot)
        assert without_tensors(snapshot.entries) == before
        assert [t._version for t in leaves(snapshot.entries) if isinstance(t, torch.Tensor)] == versions

    def test_the_same_snapshot_gives_the_same_bytes(self, format: Format, snapshot: Snapshot) -> None:
        assert written(format, snapshot).data == written(format, snapshot).data

    def test_a_damaged_file_is_noticed(self, format: Format, state: Snapshot) -> None:
        """Each file, cut, emptied, lengthened, changed or missing, is a DamagedError when it is read."""
        whole = written(format, state)
        for name, data in whole.data.items():
            if name in self.for_others:
                continue
            for bad in (None, b"", data[:-1], data + b"\0", bytes([data[0] ^ 1]) + data[1:], data[:-1] + b"\xff"):
                files = MemoryFiles()
                files.data = {k: v for k, v in (whole.data | {name: bad}).items() if v is not None}
                files.files = {k: v for k, v in whole.files.items() if k in files.data}
                if bad is None and name.startswith("ranks/"):
                    continue  # a checkpoint without random generators is a whole one
                with pytest.raises(DamagedError):
                    _read_all(format.open(files))

    def test_a_forged_file_is_noticed(self, format: Format, state: Snapshot) -> None:
        """Bytes that match their digests but are not what the format writes are a DamagedError too."""
        whole = written(format, state)
        for name in whole.data.keys() - self.for_others:
            for bad in (
                b"",
                b"{}",
                b"[]",
                b"\x80\x02.",
                b"[" * 100_000,
                b'{"format_version":1}',
                b"PK\x03\x04",
                b"\xff" * 99,
            ):
                files = MemoryFiles()
                files.data = whole.data | {name: bad}
                files.seal()
                if len(bad) >= 24 and name.endswith((".safetensors", ".distcp")):
                    continue  # nothing tells one float from another
                with pytest.raises(DamagedError):
                    _read_all(format.open(files))

    def test_an_error_of_the_sink_comes_out(self, format: Format, state: Snapshot) -> None:
        """What a file raises at any single write is what `write` raises."""
        count = 0
        while True:
            files = _FailingFiles(count)
            try:
                format.write(state, files)
            except _DiskFullError:
                count += 1
            else:
                break
        assert count >= len(written(format, state).data)

    def test_objects_come_back_only_when_asked_for(self, format: Format) -> None:
        """Opening and fetching touch nothing that was pickled."""
        buffer = io.BytesIO()
        torch.save({"a.b": {1, 2}, "c": complex}, buffer)
        snapshot = Snapshot({"x": {"b": {"$object": "a.b"}, "t": torch.ones(1)}}, objects=buffer.getvalue())
        files = written(format, snapshot)
        state = format.open(files)
        fetch_all(state)
        assert "objects.pt" not in files.opened
        assert state.objects() == {"a.b": {1, 2}, "c": complex}
        assert state.entries["x"]["b"] == {"$object": "a.b"}

    def test_without_objects_there_are_none(self, format: Format, state: Snapshot) -> None:
        assert format.open(written(format, state)).objects() == {}

    def test_a_tensor_without_values_is_refused_by_name(self, format: Format) -> None:
        snapshot = Snapshot({"model": {"w": torch.empty(2, device="meta")}})
        with pytest.raises(StateMismatchError, match=r"model\.w is on the meta device"):
            written(format, snapshot)


def _is_plain(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided


def _scattered(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor like this one whose elements are every second one of a larger storage."""
    return torch.empty(*tensor.shape, 2, dtype=tensor.dtype).select(-1, 0)


class _DiskFullError(Exception):
    pass


class _FailingFile(MemoryFile):
    def __init__(self, files: _FailingFiles) -> None:
        super().__init__()
        self._files = files

    def write(self, data: Buffer) -> int:
        self._files.left -= 1
        if self._files.left == -1:
            raise _DiskFullError
        return super().write(data)


class _FailingFiles(MemoryFiles):
    """Takes `left` writes, raises at the next, and would take any after it."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    @contextmanager
    def create(self, name: str) -> Iterator[MemoryFile]:
        yield _FailingFile(self)
