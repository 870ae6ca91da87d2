"""What `stage` promises: a snapshot that training can no longer change, and nothing lost on the way."""

from __future__ import annotations

import pytest
import torch

from ckptmgr.errors import StateMismatchError
from ckptmgr.staging import compact, dense_stride, host_tensor, is_dense, memory, stage
from ckptmgr.state.snapshot import Snapshot
from ckptmgr.testing.format_cases import CASES, leaves, same, without_tensors

# What torch says of its own younger and older tensors, once per process.
pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
]


@pytest.mark.parametrize("case", list(CASES))
def test_a_staged_snapshot_equals_the_captured_one(case: str) -> None:
    """Values, dtypes, shapes, ties, flags and dense strides stay as they are."""
    snapshot = CASES[case]()
    staged = stage(snapshot)
    assert without_tensors(staged.entries) == without_tensors(snapshot.entries)
    assert (staged.notes, staged.objects, staged.rng) == (snapshot.notes, snapshot.objects, snapshot.rng)
    for before, after in zip(leaves(snapshot.entries), leaves(staged.entries), strict=True):
        if isinstance(before, torch.Tensor):
            assert same(before, after)
            assert (type(before), before.requires_grad) == (type(after), after.requires_grad)


def test_training_can_not_change_what_was_staged() -> None:
    """Every kind of tensor, changed in place after staging, leaves the staged one as it was."""
    live = {
        "weights": torch.ones(3),
        "view": torch.ones(10)[3:5],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "sparse": torch.eye(2).to_sparse(),
        "compressed": torch.eye(2).to_sparse_csr(),
    }
    staged = stage(Snapshot({"model": live}, rng={"state": live["weights"]}))
    with torch.no_grad():
        for tensor in live.values():
            tensor.zero_()
    assert all(tensor.to_dense().sum() == 2 for name, tensor in staged.entries["model"].items() if name != "weights")
    assert staged.entries["model"]["weights"].tolist() == [1, 1, 1]
    assert staged.rng["state"] is staged.entries["model"]["weights"]


def test_a_quantized_tensor_is_copied_with_its_scale() -> None:
    quantized = torch.quantize_per_tensor(torch.tensor([1.0, 2.0]), 0.5, 1, torch.quint8)
    staged = stage(Snapshot({"model": quantized})).entries["model"]
    assert (staged.q_scale(), staged.q_zero_point(), staged.dequantize().tolist()) == (0.5, 1, [1.0, 2.0])
    assert staged.data_ptr() != quantized.data_ptr()


def test_a_view_is_staged_without_the_rest_of_its_storage() -> None:
    staged = stage(Snapshot({"model": {"row": torch.arange(1000.0)[10:12]}})).entries["model"]["row"]
    assert (staged.tolist(), staged.untyped_storage().nbytes()) == ([10, 11], 8)


def test_dense_strides_stay_and_others_become_contiguous() -> None:
    base = torch.arange(120.0)
    tensors = {
        "channels_last": base.view(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": base.view(10, 12).t(),
        "every_other": base[::2],
        "expanded": torch.ones(1).expand(4, 4),
    }
    staged = stage(Snapshot({"model": tensors})).entries["model"]
    strides = {name: tensor.stride() for name, tensor in staged.items()}
    assert strides == {"channels_last": (60, 1, 15, 3), "transposed": (1, 12), "every_other": (1,), "expanded": (4, 1)}


def test_a_meta_tensor_is_refused_by_name() -> None:
    with pytest.raises(StateMismatchError, match=r"model\.layer\.0 is on the meta device"):
        stage(Snapshot({"model": {"layer": [torch.empty(1, device="meta")]}}))


@pytest.mark.parametrize(
    ("shape", "stride", "dense"),
    [
        ((), (), True),
        ((3, 4), (4, 1), True),
        ((3, 4), (1, 3), True),
        ((3, 4), (8, 2), False),
        ((3, 4), (0, 1), False),
        ((3, 3), (1, 1), False),
        ((1, 3), (77, 1), True),
        ((3, 1), (1, 77), True),
        ((2, 3, 4), (1, 8, 2), True),
    ],
)
def test_dense_means_one_piece_without_hole_or_overlap(
    shape: tuple[int, ...], stride: tuple[int, ...], dense: bool
) -> None:
    assert is_dense(shape, stride) is dense


def test_strides_of_length_one_dimensions_do_not_matter() -> None:
    """A column of one element keeps no trace of the matrix that it was taken from."""
    assert dense_stride(torch.ones(5, 7)[:1, :1]) == (1, 1)


def test_memory_is_the_tensor_itself() -> None:
    """Writing to the bytes writes to the tensor: nothing was copied."""
    tensor = torch.zeros(2, dtype=torch.int32)
    memory(tensor)[4:8] = (7).to_bytes(4, "little")
    assert tensor.tolist() == [0, 7]
    assert memory(torch.empty(3, 0)).tobytes() == b""


def test_a_contiguous_host_tensor_is_not_copied() -> None:
    tensor = torch.ones(3)
    assert host_tensor(tensor).data_ptr() == tensor.data_ptr()
    assert compact(tensor) is tensor


def test_host_bytes_are_those_of_the_contiguous_values() -> None:
    """Transposed, conjugated and negated views are resolved before their bytes are taken."""
    tensor = torch.tensor([[1 + 2j, 3 - 4j]])
    for view, expected in ((tensor.t().conj(), [1, -2, 3, 4]), (tensor.conj().imag, [-2, 4])):
        assert torch.frombuffer(memory(host_tensor(view)), dtype=torch.float32).tolist() == expected
