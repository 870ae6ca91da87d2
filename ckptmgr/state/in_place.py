"""Which stored tensors are read straight into the memory of live ones?

Of a sharded one only the part on this rank is read: where that can't go to its place at once, a tensor that
is sharded alike takes it in, and never the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from operator import gt

import torch
from torch import nn

from .shards import is_sharded, like, local
from .snapshot import StoredTensor, Tree

_TYPES = (torch.Tensor, nn.Parameter)
_STRIDED = torch.strided
_REAL = {torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool}


class InPlace:
    """Collects offers of memory. Once `settle` was called, `targets` are the tensors to read into, of which
    those of `made` are new ones, sharded like a live one, and those of `addresses` lie there in one piece."""

    def __init__(self) -> None:
        self.targets: dict[StoredTensor, torch.Tensor] = {}
        self.made: dict[StoredTensor, torch.Tensor] = {}
        self.addresses: dict[StoredTensor, int] = {}
        self._begins: list[int] = []  # of the targets' memory
        self._ends: list[int] = []
        self._twins: dict[int, StoredTensor] = {}  # by the id of a tensor with the memory of its leaf's target
        self._kept: dict[int, torch.Tensor] = {}

    def offer(self, offers: Iterable[tuple[StoredTensor, torch.Tensor]]) -> None:
        """Have each leaf read straight into the tensor of its shape, where that can be."""
        targets, addresses, begins, ends = self.targets, self.addresses, self._begins, self._ends
        for leaf, target in offers:
            dtype = target.dtype
            if dtype is not leaf.dtype:
                self.make([(leaf, target)])
                continue
            # The first is what the second says, without a call for each of 100,000.
            if (
                type(target) in _TYPES
                and dtype in _REAL
                and target.layout is _STRIDED
                and target.is_cpu
                and target.is_contiguous()
                and not target.is_neg()
            ):
                begin, reach, is_one_piece = target.data_ptr(), target.nbytes, True
            elif _is_readable_into(target):
                begin, reach, is_one_piece = local(target).data_ptr(), _reach(target), False
            else:
                self.make([(leaf, target)])
                continue
            if leaf not in targets:
                targets[leaf] = target
                if is_one_piece:
                    addresses[leaf] = begin
                begins.append(begin)
                ends.append(begin + reach)
            elif _is_twin(target, targets[leaf]):
                self._twins[id(target)] = leaf

    def make(self, offers: Iterable[tuple[StoredTensor, torch.Tensor]]) -> None:
        """Have each leaf, of those that were not offered anything better, read into a new tensor that is
        sharded like the one given for it. Nothing for one that is not sharded."""
        for leaf, pattern in offers:
            if is_sharded(pattern) and pattern.shape == leaf.shape and leaf not in self.targets:
                self.made[leaf] = pattern

    def keep(self, tensors: Iterable[torch.Tensor]) -> None:
        """See to it that nothing is read into the memory of these by way of another tensor."""
        self._kept.update((id(tensor), tensor) for tensor in tensors)

    def settle(self) -> None:
        """Take offers back where memory was offered twice: it is to hold what is filled in last."""
        leaves, begins, ends = list(self.targets), self._begins, self._ends
        for offered in chain(map(id, self.targets.values()), self._twins):
            self._kept.pop(offered, None)
        for tensor in filter(_is_readable_into, self._kept.values()):
            begins.append(local(tensor).data_ptr())
            ends.append(begins[-1] + _reach(tensor))
        # If no two overlap, each ends before the next one begins.
        if any(map(gt, sorted(ends), islice(sorted(begins), 1, None))):
            for number in _overlapping(begins, ends):
                if number < len(leaves):
                    taken = self.targets.pop(leaves[number], None)
                    if taken is not None:
                        self.addresses.pop(leaves[number], None)
                        self.make([(leaves[number], taken)])
        self.made = {leaf: like(one, leaf.dtype) for leaf, one in self.made.items() if leaf not in self.targets}
        self.targets |= self.made

    def has(self, leaf: Tree, target: torch.Tensor) -> bool:
        """Whether this is a leaf that is read straight into this tensor."""
        taken = self.targets.get(leaf) if type(leaf) is StoredTensor else None
        return taken is not None and (taken is target or self._twins.get(id(target)) is leaf)


def _is_readable_into(tensor: torch.Tensor) -> bool:
    """Whether each element of the tensor has memory of its own, which holds just its value."""
    tensor = local(tensor)
    if type(tensor) not in _TYPES or tensor.layout != torch.strided or tensor.is_meta:
        return False
    if tensor.is_quantized or tensor.is_conj() or tensor.is_neg():
        return False
    return tensor.is_contiguous() or torch._debug_has_internal_overlap(tensor) == 0


def _is_twin(one: torch.Tensor, other: torch.Tensor) -> bool:
    if is_sharded(one) or is_sharded(other):
        return is_sharded(one) and is_sharded(other) and _is_twin(local(one), local(other))
    return (one.data_ptr(), one.stride(), one.device) == (other.data_ptr(), other.stride(), other.device)


def _reach(tensor: torch.Tensor) -> int:
    """How many bytes there are from a tensor's first element to the end of its last."""
    tensor = local(tensor)
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return int(last + 1) * tensor.itemsize


def _overlapping(begins: list[int], ends: list[int]) -> Iterator[int]:
    """The numbers of the spans that have a byte in common with another."""
    widest = None
    for number in sorted(range(len(begins)), key=begins.__getitem__):
        if widest is not None and begins[number] < ends[widest]:
            yield widest
            yield number
        if widest is None or ends[number] > ends[widest]:
            widest = number
