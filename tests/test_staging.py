"""What staging promises: a copy that training can no longer change, laid out like the files, and nothing lost."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.arena import Arena
from ckptmgr.errors import StateMismatchError
from ckptmgr.formats.safetensors_file import SafetensorsFormat
from ckptmgr.formats.torch_file import TorchFormat
from ckptmgr.memory import address, available, buffer, view
from ckptmgr.program import staged_size
from ckptmgr.staging import Live, compact, copy_out, dense_stride, is_dense, memory
from ckptmgr.state.snapshot import FlatSnapshot, Snapshot, flatten
from ckptmgr.testing.format_cases import CASES, leaves, same

# What torch says of its own younger and older tensors, once per process.
pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
]


def staged(tree: Any) -> list[torch.Tensor]:
    """The distinct tensors of a tree, as the copy in the arena has them."""
    flat = flatten(Snapshot({"model": tree}))
    held = Arena().hold(TorchFormat().plan(flat).regions, flat)
    return [held.tensor(number) for number in range(len(flat.tensors))]


def images(parts: Mapping[str, Any]) -> dict[str, bytes]:
    """The bytes of each region, taken in pieces of odd sizes."""
    scratch = buffer(1 << 20)
    return {
        name: b"".join(bytes(part.part(at, min(at + 777, part.size), scratch)) for at in range(0, part.size, 777))
        for name, part in parts.items()
    }


@pytest.mark.parametrize("case", list(CASES))
def test_a_copied_tensor_equals_the_live_one(case: str) -> None:
    """Values, dtypes, shapes, flags and dense strides stay as they are."""
    live = [leaf for leaf in leaves(CASES[case]().entries) if isinstance(leaf, torch.Tensor)]
    distinct = list({id(tensor): tensor for tensor in live}.values())
    copies = staged(live)
    assert len(copies) == len(distinct)
    for before, after in zip(distinct, copies, strict=True):
        assert same(before, after)
        assert (type(before), before.requires_grad) == (type(after), after.requires_grad)


@pytest.mark.parametrize("case", list(CASES))
def test_the_arena_holds_the_very_bytes_that_are_gathered_from_live_tensors(case: str) -> None:
    """So a background save writes the same files as a synchronous one, headers included."""
    flat = flatten(CASES[case]())
    regions = SafetensorsFormat().plan(flat).regions
    assert images(Arena().hold(regions, flat).parts) == images(Live(regions, flat).parts)


def test_training_can_not_change_what_was_copied() -> None:
    """Every kind of tensor, changed in place after staging, leaves the copy as it was."""
    live = [
        torch.ones(3),
        torch.ones(10)[3:5],
        torch.nn.Parameter(torch.ones(2)),
        torch.eye(2).to_sparse(),
        torch.eye(2).to_sparse_csr(),
        torch.ones(300_000),
        torch.ones(4, 4).t(),
        torch.ones(8)[::2],
    ]
    copies = staged(live)
    with torch.no_grad():
        for tensor in live:
            tensor.zero_()
    sums = [tensor.to_dense().sum().item() for tensor in copies]
    assert sums == [3, 2, 2, 2, 2, 300_000, 16, 4]


def test_the_arena_serves_states_of_one_shape_without_new_memory_and_another_shape_too() -> None:
    arena = Arena()
    weights = torch.zeros(1000)
    first = flatten(Snapshot({"model": {"w": weights}}))
    plan = SafetensorsFormat().plan(first)
    for value in range(3):
        weights.fill_(value)
        again = FlatSnapshot({}, [weights], {}, None, None, first.shape)
        assert images(arena.hold(plan.regions, again).parts)["model.safetensors"].endswith(
            torch.full((1000,), float(value)).numpy().tobytes()
        )
    other = flatten(Snapshot({"model": {"w": torch.full((5000,), 7.0)}}))
    held = arena.hold(SafetensorsFormat().plan(other).regions, other)
    assert images(held.parts)["model.safetensors"].endswith(torch.full((5000,), 7.0).numpy().tobytes())


def test_large_and_many_tensors_are_copied_whole_by_two_threads() -> None:
    tensors = [torch.arange(n, dtype=torch.int32) for n in (9_000_000, 1, 70_000, 3_000_000, 65_536, 65_535)]
    flat = flatten(Snapshot({"model": tensors}))
    regions = SafetensorsFormat().plan(flat).regions
    arena = Arena()
    arena.prepare(staged_size(regions)).result()
    held = arena.hold(regions, flat).parts["model.safetensors"]
    in_order = [tensors[number] for number in regions["model.safetensors"].numbers]
    expected = b"".join(tensor.numpy().tobytes() for tensor in in_order)
    assert bytes(held.part(held.size - len(expected), held.size, buffer(1))) == expected
    arena.release()


def test_nothing_of_the_state_is_kept_alive_by_its_copy() -> None:
    """What training drops is freed although the copy is still being written."""
    tensor = torch.ones(100)
    flat = flatten(Snapshot({"model": tensor}))
    held = Arena().hold(SafetensorsFormat().plan(flat).regions, flat)
    flat = FlatSnapshot(flat.entries, (), {}, None, {}, flat.shape)
    gc.collect()
    holders = [one for one in gc.get_referrers(tensor) if one is not globals() and type(one).__name__ != "frame"]
    assert holders == []
    assert held.parts


def test_a_limit_is_the_most_that_the_arena_takes() -> None:
    arena = Arena(limit=1 << 20)
    assert (arena.has_room(1 << 20), arena.has_room((1 << 20) + 1)) == (True, False)
    assert not Arena().has_room(1 << 60)
    arena.prepare(1 << 20).result()
    assert arena.has_room(1 << 20)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_an_arena_of_its_own() -> None:
    """The parent's memory is not in the child; a save there works all the same."""
    flat = flatten(Snapshot({"model": torch.ones(1 << 20)}))
    regions = SafetensorsFormat().plan(flat).regions
    arena = Arena()
    expected = images({"x": arena.hold(regions, flat).parts["model.safetensors"]})
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # its own threads do not survive a fork
        filled = [torch.full((1 << 20,), 3.0) for _ in range(20)]  # lies where the parent's arena would be unmapped
        good = images({"x": arena.hold(regions, flat).parts["model.safetensors"]}) == expected
        os._exit(0 if good and all(bool((tensor == 3).all()) for tensor in filled) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_after_an_error_in_a_copy_no_thread_goes_on_copying() -> None:
    """What it copies from may be freed as soon as the error is out."""
    arena, done = Arena(), list[int]()

    def task(number: int) -> None:
        if number == 0:
            raise KeyboardInterrupt
        done.append(number)

    with pytest.raises(KeyboardInterrupt):
        arena._in_two_threads([partial(task, number) for number in range(1000)], 1 << 30)
    count = len(done)
    arena.release()
    assert len(done) == count


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_while_memory_is_being_made_can_let_go_of_it() -> None:
    arena = Arena()
    arena.prepare(1 << 29)
    child = os.fork()
    if child == 0:
        arena.release()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    arena.release()


def test_a_quantized_tensor_is_copied_with_its_scale() -> None:
    quantized = torch.quantize_per_tensor(torch.tensor([1.0, 2.0]), 0.5, 1, torch.quint8)
    (copy,) = staged(quantized)
    assert (copy.q_scale(), copy.q_zero_point(), copy.dequantize().tolist()) == (0.5, 1, [1.0, 2.0])
    assert copy.data_ptr() != quantized.data_ptr()


def test_a_view_is_copied_without_the_rest_of_its_storage() -> None:
    (row,) = staged(torch.arange(1000.0)[10:12])
    assert (row.tolist(), row.untyped_storage().nbytes()) == ([10, 11], 8)


def test_dense_strides_stay_and_others_become_contiguous() -> None:
    base = torch.arange(120.0)
    copies = staged(
        [
            base.view(2, 3, 4, 5).to(memory_format=torch.channels_last),
            base.view(10, 12).t(),
            base[::2],
            torch.ones(1).expand(4, 4),
        ]
    )
    assert [tensor.stride() for tensor in copies] == [(60, 1, 15, 3), (1, 12), (1,), (4, 1)]


@pytest.mark.parametrize("format", [SafetensorsFormat(), TorchFormat()])
def test_a_meta_tensor_is_refused_by_name(format: SafetensorsFormat | TorchFormat) -> None:
    with pytest.raises(StateMismatchError, match=r"model\.layer\.0 is on the meta device"):
        format.plan(flatten(Snapshot({"model": {"layer": [torch.empty(1, device="meta")]}})))


@pytest.mark.parametrize("format", [SafetensorsFormat(), TorchFormat()])
def test_a_tensor_that_only_mkldnn_can_read_is_refused_by_name(format: SafetensorsFormat | TorchFormat) -> None:
    with pytest.raises(StateMismatchError, match=r"model\.w is an mkldnn tensor, .* save its to_dense"):
        format.plan(flatten(Snapshot({"model": {"w": torch.ones(2).to_mkldnn()}})))


@given(data=st.data())
def test_any_bytes_of_any_tensor_are_those_of_its_contiguous_form(data: st.DataObject) -> None:
    """Whatever the strides, and wherever a piece begins and ends, within an element too."""
    dtype = data.draw(st.sampled_from([torch.bool, torch.bfloat16, torch.float32, torch.complex64, torch.complex128]))
    sizes = data.draw(st.lists(st.integers(0, 5), min_size=0, max_size=4))
    tensor = torch.randint(0, 2, sizes).to(dtype)
    if sizes:
        tensor = tensor.permute(data.draw(st.permutations(range(len(sizes)))))
        tensor = tensor[:: data.draw(st.integers(1, 3))]
        if data.draw(st.booleans()):
            tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
    if dtype.is_complex and data.draw(st.booleans()):
        tensor = tensor.conj()
    host = tensor.contiguous().resolve_conj().resolve_neg()
    whole = bytes(memory(host))
    begin = data.draw(st.integers(0, len(whole)))
    out = bytearray(data.draw(st.integers(0, len(whole) - begin)))
    copy_out(tensor, begin, memoryview(out))
    assert bytes(out) == whole[begin : begin + len(out)]


def test_memory_begins_at_a_page_and_says_where_it_is() -> None:
    memory = buffer(10_000)
    memory[:3] = b"abc"
    assert (address(memory) % 4096, len(memory), bytes(view(address(memory), 3))) == (0, 10_000, b"abc")
    assert (available() or 1) > 0


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
    assert compact(tensor) is tensor


def test_host_bytes_are_those_of_the_contiguous_values() -> None:
    """Transposed, conjugated and negated views are resolved before their bytes are taken."""
    tensor = torch.tensor([[1 + 2j, 3 - 4j]])
    for odd, expected in ((tensor.t().conj(), [1, -2, 3, 4]), (tensor.conj().imag, [-2, 4])):
        out = bytearray(odd.nbytes)
        copy_out(odd, 0, memoryview(out))
        assert torch.frombuffer(out, dtype=torch.float32).tolist() == expected
