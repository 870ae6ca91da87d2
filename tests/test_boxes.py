"""Every element of a box finds its place, however the bytes of the whole are cut; and blobs are what torch reads."""

from __future__ import annotations

import io
import math
import zipfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptmgr.arena import Arena
from ckptmgr.formats.boxes import in_order, is_run, pour_box, span
from ckptmgr.formats.targets import Landing
from ckptmgr.memory import address, buffer
from ckptmgr.sharded import blobs
from ckptmgr.sharded.layout import Piece, lay_out
from ckptmgr.staging import Gathered, raw
from ckptmgr.state.snapshot import FlatSnapshot

DTYPES = [torch.float32, torch.bfloat16, torch.complex128, torch.bool, torch.uint16, torch.int64]


@st.composite
def boxes_in_wholes(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    shape = draw(st.lists(st.integers(1, 5), max_size=4))
    offsets = [draw(st.integers(0, size - 1)) for size in shape]
    lengths = [draw(st.integers(1, size - offset)) for size, offset in zip(shape, offsets, strict=True)]
    return shape, offsets, lengths


def part(whole: torch.Tensor, offsets: list[int], lengths: list[int]) -> torch.Tensor:
    for dim, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        whole = whole.narrow(dim, offset, length)
    return whole


@settings(deadline=None)
@given(boxes_in_wholes(), st.sampled_from(DTYPES), st.lists(st.integers(0, 5000), max_size=4), st.booleans())
def test_a_box_is_filled_from_the_bytes_of_the_whole(
    case: tuple[list[int], list[int], list[int]], dtype: torch.dtype, cuts: list[int], is_transposed: bool
) -> None:
    """Cut anywhere, even within an element, and into memory with any strides."""
    shape, offsets, lengths = case
    whole = torch.arange(math.prod(shape)).view(shape).to(dtype)
    data = memoryview(bytearray(raw(whole.reshape(-1).contiguous()).tolist()))
    target = torch.zeros(lengths, dtype=dtype)
    if is_transposed and len(lengths) > 1:
        target = torch.zeros(lengths[::-1], dtype=dtype).permute(*range(len(lengths))[::-1])
    first, last, sink = Landing().box(target, shape, offsets)
    elements = span(shape, offsets, lengths)
    assert (first, last) == (elements[0] * dtype.itemsize, elements[1] * dtype.itemsize)
    if isinstance(sink, int):
        assert sink == target.data_ptr()
        assert is_run(shape, offsets, lengths)
    else:
        places = sorted({0, last - first, *(cut % (last - first + 1) for cut in cuts)})
        for begin, end in pairwise(places):
            sink(begin, data[first + begin : first + end])
        assert torch.equal(target, part(whole, offsets, lengths))
    again = torch.zeros_like(target)
    pour_box(again, shape, offsets, 0, data)
    assert torch.equal(again, part(whole, offsets, lengths))


def test_segments_with_common_bytes_each_get_their_own() -> None:
    one, other, apart = bytearray(6), bytearray(4), bytearray(2)
    parts: list[tuple[int, bytes]] = []
    segments = in_order(
        [
            (20, 22, address(memoryview(apart))),
            (4, 8, lambda begin, data: parts.append((begin, bytes(data)))),
            (0, 6, address(memoryview(one))),
            (2, 6, address(memoryview(other))),
        ]
    )
    assert [(begin, end) for begin, end, _ in segments] == [(0, 8), (20, 22)]
    sink = segments[0][2]
    assert callable(sink)
    data = memoryview(bytearray(range(8)))
    sink(0, data[:3])
    sink(3, data[3:])
    assert (list(one), list(other)) == ([0, 1, 2, 3, 4, 5], [2, 3, 4, 5])
    assert parts == [(0, bytes([4, 5, 6, 7]))]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(3, 4), (), (0, 5), (2, 0, 3), (7,)])
def test_torch_reads_a_blob(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """As it reads what it saved itself, with `weights_only` too."""
    tensor = torch.arange(math.prod(shape)).view(shape).to(dtype)
    blob = blobs.tensor_blob(dtype, shape)
    data = blob.prefix + bytes(raw(tensor).tolist()) + blob.suffix
    assert (len(blob.prefix) % blobs.ALIGNMENT, len(data)) == (0, blob.length)
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    assert (loaded.dtype, loaded.shape, loaded.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    assert torch.equal(raw(loaded), raw(tensor))


def test_torch_reads_a_blob_of_more_than_four_gigabytes(tmp_path: Path) -> None:
    """Here one of holes, which takes no room on the disk."""
    count = (5 << 30) // 4
    blob = blobs.tensor_blob(torch.float32, (count,))
    with (tmp_path / "large").open("wb") as file:
        file.write(blob.prefix)
        file.seek(len(blob.prefix) + blob.size - 4)
        file.write(raw(torch.tensor([7.0])).numpy().tobytes())
        file.write(blob.suffix)
    assert (tmp_path / "large").stat().st_size == blob.length
    loaded = torch.load(tmp_path / "large", weights_only=True, mmap=True)
    assert (loaded.shape, loaded[0].item(), loaded[-1].item()) == ((count,), 0.0, 7.0)
    assert [one.file_size for one in zipfile.ZipFile(tmp_path / "large").infolist()][-1] == blob.size


def test_a_file_of_blobs_is_the_same_from_live_tensors_and_from_copies() -> None:
    """Whatever parts of it are asked for."""
    tensors = [torch.arange(n, dtype=torch.float32) for n in (1, 0, 500, 33)]
    pieces = [Piece(f"{i}", (0,), blobs.tensor_blob(t.dtype, tuple(t.shape)), i) for i, t in enumerate(tensors)]
    regions, rows = lay_out(pieces, rank=3)
    assert [row.file for row in rows] == ["__3_0.distcp"] * 4
    region, flat = regions["__3_0.distcp"], FlatSnapshot({}, tensors, {}, None, {}, object())
    whole = bytes(Arena().hold(regions, flat).parts["__3_0.distcp"].part(0, region.size, memoryview(b"")))
    for row, tensor in zip(rows, tensors, strict=True):
        blob = whole[row.offset : row.offset + row.length]
        assert torch.equal(torch.load(io.BytesIO(blob), weights_only=True), tensor)
        assert whole[row.begin : row.begin + tensor.nbytes] == bytes(raw(tensor).tolist())
    body = Gathered(region, flat)
    for step in (1, 7, 64, 1000):
        scratch = buffer(step)
        scratch[:] = b"\xff" * step
        parts = [bytes(body.part(at, min(at + step, region.size), scratch)) for at in range(0, region.size, step)]
        assert b"".join(parts) == whole
