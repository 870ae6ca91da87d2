"""What is filled, from what, and in which order? The records that a restore plan is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .codec import decode
from .differences import Differences
from .snapshot import StoredTensor, Tree
from .trees import Needs

# The order of filling.
FIRST, OPTIMIZER, OTHER, SCHEDULER, LOADER = range(5)


class Source:
    """The checkpoint's values, once the tensors have been read."""

    def __init__(
        self,
        fetched: Mapping[StoredTensor, torch.Tensor],
        memory: Mapping[StoredTensor, torch.Tensor],
        objects: Mapping[str, Any],
        device: str | torch.device,
    ) -> None:
        self._fetched, self._memory, self._objects = fetched, memory, objects
        self._device = device
        self._own: dict[StoredTensor, torch.Tensor] = {}

    def decode(self, tree: Tree, path: str) -> Any:
        """The value of a tree; nothing of it shares memory with a target."""
        return decode(tree, tensor=self.tensor, objects=self._objects.__getitem__, path=path)

    def place(self, tree: Tree, path: str) -> Any:
        """As `decode`, with tensors on the device that was asked for."""
        return decode(
            tree, tensor=lambda leaf: self.tensor(leaf).to(self._device), objects=self._objects.__getitem__, path=path
        )

    def tensor(self, leaf: StoredTensor) -> torch.Tensor:
        """The value of a leaf, the same tensor each time."""
        if leaf not in self._own:
            value = self._fetched[leaf]
            if leaf in self._memory:
                value = value.detach().clone()
            if leaf.is_parameter:
                value = nn.Parameter(value, requires_grad=leaf.requires_grad)
            elif leaf.requires_grad:
                value = value.detach().requires_grad_()
            self._own[leaf] = value
        return self._own[leaf]


@dataclass(frozen=True)
class Filling:
    """One object to fill: the trees it takes, each with its name, and how."""

    order: int
    where: str
    trees: list[tuple[Tree, str]]
    fill: Callable[[Source], None]


@dataclass
class Fitting:
    """What is known while targets are compared: their parameters' names, and what was found so far.

    `memory` says which leaves are read straight into a target; `dtypes` the stored dtype of a
    target's parameter, by id.
    """

    names: dict[int, str]
    differences: Differences
    fillings: list[Filling] = field(default_factory=list)
    memory: dict[StoredTensor, torch.Tensor] = field(default_factory=dict)
    dtypes: dict[int, torch.dtype] = field(default_factory=dict)
    _taken: set[tuple[Any, ...]] = field(default_factory=set)

    def needs(self) -> Needs:
        needs = Needs()
        for filling in self.fillings:
            for tree, path in filling.trees:
                needs.add(tree, path)
        return needs

    def offer(self, leaf: StoredTensor, target: torch.Tensor) -> bool:
        """Have a leaf read straight into a target's memory, if that can be and neither is taken."""
        if target.dtype != leaf.dtype or not _is_readable_into(target) or leaf in self.memory:
            return False
        place = (target.device, target.data_ptr())
        if place in self._taken:  # tied here but not in the checkpoint
            return False
        self._taken.add(place)
        self.memory[leaf] = target.detach()
        return True


def _is_readable_into(target: torch.Tensor) -> bool:
    if type(target) not in (torch.Tensor, nn.Parameter) or target.layout != torch.strided:
        return False
    if target.is_quantized or target.is_meta or target.is_conj() or target.is_neg() or target.numel() == 0:
        return False
    return bool(torch._debug_has_internal_overlap(target) == 0)


def another_class(target: Any, note: Mapping[str, Any]) -> str | None:
    """That an object was of another class when it was saved, or None."""
    then = note.get("class")
    if not isinstance(then, str) or then.rpartition(".")[2] == type(target).__name__:
        return None
    return f"was a {then} when it was saved and is a {type(target).__module__}.{type(target).__qualname__} here"
