"""How do tensors come to host memory, and how are their bytes reached there?

`stage` makes a snapshot that training can no longer change. `host_tensor` and `memory` give one
tensor's bytes as a file holds them: those of its contiguous form.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import torch

from .errors import StateMismatchError
from .state.snapshot import Snapshot, Tree, map_leaves


def stage(snapshot: Snapshot) -> Snapshot:
    """A copy of the snapshot whose tensors are all in host memory that nobody else holds.

    Blocks until the last byte is copied. Tied tensors (one tensor object in several places) are
    copied once and stay tied; a view of a larger storage becomes a tensor of its own size; dense
    strides (channels_last) stay. `objects` is shared: it is bytes. Raises `StateMismatchError` for
    a tensor on the meta device.
    """
    copies: dict[int, torch.Tensor] = {}

    def copied(leaf: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) not in copies:
            refuse_meta(leaf, path)
            copies[id(leaf)] = _own_copy(leaf)
        return copies[id(leaf)]

    def staged(tree: Tree, name: str) -> Tree:
        return map_leaves(tree, copied, (name,))

    entries = {name: staged(tree, name) for name, tree in snapshot.entries.items()}
    return Snapshot(entries, snapshot.notes, snapshot.objects, staged(snapshot.rng, "rng"))


def _own_copy(tensor: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        if is_special(tensor):
            copy = tensor.detach().to("cpu", copy=True)
        else:
            copy = torch.empty_strided(tensor.shape, dense_stride(tensor), dtype=tensor.dtype)
            copy.copy_(tensor)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(copy, requires_grad=tensor.requires_grad)
    return copy.requires_grad_(tensor.requires_grad)


def refuse_meta(tensor: torch.Tensor, path: Sequence[str]) -> None:
    """Raises `StateMismatchError` naming the path when the tensor is on the meta device."""
    if tensor.is_meta:
        raise StateMismatchError(
            f"{'.'.join(path)} is on the meta device and has no values to save; "
            "materialize it first (`to_empty`, then load)"
        )


def is_special(tensor: torch.Tensor) -> bool:
    """Whether the tensor is more than dense numbers: sparse, quantized or nested."""
    return tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether elements with these strides fill one piece of memory with no hole and no overlap."""
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True


def dense_stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """The tensor's own strides where it is dense, else those of its contiguous form."""
    if tensor.is_contiguous() or not is_dense(tensor.shape, tensor.stride()):
        return tuple(math.prod(tensor.shape[i + 1 :]) for i in range(tensor.dim()))
    return tensor.stride()


def host_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where it is contiguous in host memory, else a contiguous copy there."""
    return tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()


def compact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself where it is in host memory and fills its storage, else a copy that does."""
    if tensor.device.type != "cpu":
        return _own_copy(tensor)
    if is_special(tensor) or tensor.untyped_storage().nbytes() <= tensor.numel() * tensor.element_size():
        return tensor
    return _own_copy(tensor)


def memory(tensor: torch.Tensor) -> memoryview:
    """The bytes of a dense host tensor, not copied. The caller keeps the tensor alive meanwhile."""
    size = tensor.numel() * tensor.element_size()
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B") if size else memoryview(b"")
