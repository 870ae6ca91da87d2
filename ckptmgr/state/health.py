"""Which tensors of a snapshot hold values that are not finite?"""

from __future__ import annotations

import torch

from .shards import local
from .snapshot import FlatSnapshot, names_of


def non_finite(flat: FlatSnapshot) -> list[str]:
    """The names of tensors with a value that is not finite, on this rank. Reads every floating tensor once,
    on its device, and waits for each device once; needs no memory of the tensors' size."""
    extremes: dict[torch.device, list[tuple[int, torch.Tensor]]] = {}
    for number, tensor in enumerate(flat.tensors):
        if (found := _extremes(local(tensor))) is not None:
            extremes.setdefault(tensor.device, []).append((number, found))
    odd: set[int] = set()
    for device_extremes in extremes.values():
        finite = torch.isfinite(torch.stack([pair for _, pair in device_extremes])).all(dim=1).tolist()
        odd |= {number for (number, _), good in zip(device_extremes, finite, strict=True) if not good}
    return names_of(flat, odd)


def _extremes(tensor: torch.Tensor) -> torch.Tensor | None:
    """The least and the greatest value: both finite if and only if all values are."""
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
    return torch.stack(torch.aminmax(tensor)).double()
