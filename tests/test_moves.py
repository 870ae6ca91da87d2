"""Many small copies are one system call where the system allows it, and come out the same where it does not."""

from __future__ import annotations

import platform
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptmgr.memory import address, buffer
from ckptmgr.moves import gather, spread


@given(st.lists(st.integers(0, 70), max_size=60), st.integers(0, 2**32))
def test_many_places_get_their_bytes_and_give_them_back(sizes: list[int], seed: int) -> None:
    """Few or many, empty ones too, wherever they lie; no byte between them is touched."""
    check(sizes, seed)


def test_more_places_than_one_call_takes() -> None:
    check([1 + number % 300 for number in range(5000)], 0)


def check(sizes: list[int], seed: int) -> None:
    draw = random.Random(seed)
    total = sum(sizes)
    data = draw.randbytes(total)
    source, far, back = buffer(total), buffer(total + len(sizes) + 1), buffer(total)
    source[:] = data
    far[:] = b"\xee" * len(far)
    order = draw.sample(range(len(sizes)), len(sizes))
    offsets, at = [0] * len(sizes), 1
    for number in order:  # scattered, a byte between any two
        offsets[number] = at
        at += sizes[number] + 1
    places = [address(far) + offset for offset in offsets]

    spread(address(source), places, sizes)
    begin = 0
    untouched = bytearray(far)
    for offset, size in zip(offsets, sizes, strict=True):
        assert bytes(far[offset : offset + size]) == data[begin : begin + size]
        untouched[offset : offset + size] = b"\xee" * size
        begin += size
    assert untouched == b"\xee" * len(far)

    gather(address(back), places, sizes)
    assert bytes(back) == data


# What a container's runtime may do: from here on the two calls fail with EPERM, as a seccomp filter says.
FORBID = """
import ctypes, struct
machine, first = {"x86_64": (0xC000003E, 310), "aarch64": (0xC00000B7, 270)}[MACHINE]
rules = [
    (0x20, 0, 0, 4), (0x15, 0, 3, machine),  # of this machine's own calls
    (0x20, 0, 0, 0), (0x15, 2, 0, first), (0x15, 1, 0, first + 1),  # these two
    (0x06, 0, 0, 0x7FFF0000),  # allow
    (0x06, 0, 0, 0x00050001),  # EPERM
]
filters = b"".join(struct.pack("HBBI", *rule) for rule in rules)
held = ctypes.create_string_buffer(filters, len(filters))
program = struct.pack("HxxxxxxP", len(rules), ctypes.addressof(held))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()  # PR_SET_SECCOMP
from ckptmgr import memory, moves
assert not moves._copied_by_system(moves._READ, memory.address(memory.buffer(99)), [1] * 99, [1] * 99)
"""

MANY_SMALL = """
import torch, sys
from ckptmgr import CheckpointManager
model = torch.nn.ParameterList(torch.randn(1 + number % 9) for number in range(500))
with CheckpointManager(sys.argv[1]) as manager:
    manager.save({"model": model}, 1)
copy = torch.nn.ParameterList(torch.zeros_like(one) for one in model)
with CheckpointManager(sys.argv[1]) as manager:
    assert manager.resume(copy).step == 1
assert all(map(torch.equal, model, copy))
"""


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"), reason="forbids calls of Linux"
)
def test_where_the_call_is_forbidden_many_small_tensors_are_saved_and_resumed(tmp_path: Path) -> None:
    script = f"MACHINE = {platform.machine()!r}\n{FORBID}\n{MANY_SMALL}"
    ran = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
