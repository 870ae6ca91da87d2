"""What of a tensor is on this rank? A sharded tensor (`DTensor`) has a part here, any other one is here whole.

Nothing in this file communicates, and nothing imports `torch.distributed.tensor` for whom did not use it.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable
from typing import Any

import torch

_PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a `DTensor`: a part of a larger one, or a replica that others have too."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def has_sharded(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether one of many tensors is sharded."""
    tensors = list(tensors)
    return not set(map(type, tensors)) <= _PLAIN and any(one is not None and is_sharded(one) for one in tensors)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part that is on this rank, with the memory of its own; the tensor itself where it is not sharded."""
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    part = sharded._local_tensor.detach()
    return part.wait() if hasattr(part, "wait") else part  # type: ignore[no-any-return]


def boxes(tensor: torch.Tensor) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Where in the whole the part on this rank is, as offsets and sizes; nothing where there is no part."""
    if not is_sharded(tensor):
        return [((0,) * tensor.dim(), tuple(tensor.shape))]
    sharded: Any = tensor
    if sharded.device_mesh.get_coordinate() is None:
        return []
    return [(tuple(one.offsets), tuple(one.sizes)) for one in sharded.__create_chunk_list__()]


def placement(tensor: torch.Tensor) -> Hashable:
    """Where the parts of a sharded tensor are, as something to compare."""
    sharded: Any = tensor
    return sharded.device_mesh, sharded.placements, tensor.shape, tensor.stride()


def like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A new tensor sharded like this one, in memory of its own, without values."""
    with torch.no_grad():
        return torch.empty_like(tensor.detach(), dtype=dtype, requires_grad=False)
