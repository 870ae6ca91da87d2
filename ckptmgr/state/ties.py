"""Which tensors are one? Those with the same memory, read in the same way: tied weights, or one tensor twice."""

from __future__ import annotations

from typing import Any

import torch

from .shards import is_sharded, local
from .structure import Form, form, is_lazy, is_loose


class Ties:
    """Numbers tensors: the same number for the same memory."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []  # by number
        self.forms: list[Form] = []  # by number
        self.numbers: dict[int, int] = {}  # by the tensors' ids
        self._seen: dict[Any, int] = {}
        self._alive: list[torch.Tensor] = []  # an id or an address means something only while its owner lives

    def number(self, tensor: torch.Tensor) -> int:
        own = form(tensor)
        home = _home(tensor) if is_loose(own) else local(tensor).data_ptr()
        key = (home, own) if home else id(tensor)
        number = self.numbers[id(tensor)] = self._seen.setdefault(key, len(self.tensors))
        if number == len(self.tensors):
            is_resolved = is_lazy(own) and not is_sharded(tensor)
            self.tensors.append(tensor.resolve_conj().resolve_neg() if is_resolved else tensor)
            self.forms.append(own)
        self._alive.append(tensor)
        return number

    def find(self, tensor: torch.Tensor) -> int | None:
        """The number of a tensor with an address, if it has one."""
        own = form(tensor)
        return None if is_loose(own) else self._seen.get((local(tensor).data_ptr(), own))


def _home(tensor: torch.Tensor) -> int:
    """Where a sharded tensor of which nothing is on this rank would be: it is tied here if it is tied elsewhere."""
    return local(tensor).untyped_storage().data_ptr() if is_sharded(tensor) else 0
