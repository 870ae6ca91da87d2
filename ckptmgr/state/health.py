"""Which tensors of a snapshot hold values that are not finite?"""

from __future__ import annotations

import torch

from .shards import local
from .snapshot import FlatSnapshot, names_of


def non_finite(flat: FlatSnapshot) -> list[str]:
    """The names of tensors with a value that is not finite, on this rank. Reads every floating tensor once,
    on its device, and waits for each device once, or twice where it has float64 beside others; needs no memory
    of the tensors' size."""
    extremes: dict[tuple[torch.device, torch.dtype], list[tuple[int, torch.Tensor]]] = {}
    for number, tensor in enumerate(flat.tensors):
        if (found := _extremes(local(tensor))) is not None:
            extremes.setdefault((tensor.device, found.dtype), []).append((number, found))
    odd: set[int] = set()
    for alike in extremes.values():
        finite = torch.isfinite(torch.stack([pair for _, pair in alike])).all(dim=1).tolist()
        odd |= {number for (number, _), good in zip(alike, finite, strict=True) if not good}
    return names_of(flat, odd)


def _extremes(tensor: torch.Tensor) -> torch.Tensor | None:
    """The least and the greatest value, in float32 or wider: both finite if and only if all values are."""
    tensor = tensor.detach()
    if tensor.is_quantized or tensor.is_nested or not (tensor.is_floating_point() or tensor.is_complex()):
        return None
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.coalesce().values()
    elif tensor.layout != torch.strided:
        tensor = tensor.values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.numel() == 0:
        return None
    if tensor.dtype.itemsize == 1:  # small floats know no arithmetic; float4 has no infinity and no nan
        if "float8" not in str(tensor.dtype):
            return None
        tensor = tensor.float()
    pair = torch.stack(torch.aminmax(tensor))
    return pair if pair.dtype == torch.float64 else pair.float()  # not all in float64: some devices know none
