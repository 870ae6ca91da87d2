"""What is filled, from what, and in which order? The records that a restore plan is made of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .codec import decode
from .differences import Differences
from .in_place import InPlace
from .names import ParameterNames
from .snapshot import StoredTensor, Tree
from .trees import Needs

# The order of filling.
FIRST, OPTIMIZER, OTHER, SCHEDULER, LOADER = range(5)


class Source:
    """The checkpoint's values, once the tensors have been read."""

    def __init__(
        self,
        fetched: Mapping[StoredTensor, torch.Tensor],
        in_place: InPlace,
        objects: Mapping[str, Any],
        device: str | torch.device,
    ) -> None:
        self.in_place = in_place
        self._fetched, self._objects, self._device = fetched, objects, device
        self._own: dict[StoredTensor, torch.Tensor] = {}

    def decode(self, tree: Tree, path: str, live: Mapping[StoredTensor, torch.Tensor] | None = None) -> Any:
        """The value of a tree; nothing of it shares memory with a target, but the leaves in `live`:
        they are the tensors given there."""
        own = self.tensor
        if not live:
            return decode(tree, tensor=own, objects=self._objects.__getitem__, path=path)
        return decode(
            tree,
            tensor=lambda leaf: live[leaf] if leaf in live else own(leaf),
            objects=self._objects.__getitem__,
            path=path,
        )

    def place(self, tree: Tree, path: str) -> Any:
        """As `decode`, with tensors on the device that was asked for."""
        return decode(
            tree, tensor=lambda leaf: self.tensor(leaf).to(self._device), objects=self._objects.__getitem__, path=path
        )

    def tensor(self, leaf: StoredTensor) -> torch.Tensor:
        """The value of a leaf, the same tensor each time."""
        value = self._own.get(leaf)
        if value is None:
            value = self._fetched[leaf]
            if leaf in self.in_place.targets and leaf not in self.in_place.made:
                value = value.detach().clone()
            if leaf.is_parameter:
                value = nn.Parameter(value, requires_grad=leaf.requires_grad)
            elif leaf.requires_grad:
                value = value.detach().requires_grad_()
            self._own[leaf] = value
        return value

    def copy(self, pairs: Iterable[tuple[StoredTensor, torch.Tensor]]) -> None:
        """Give tensors the values of leaves."""
        changed = []
        for leaf, target in pairs:
            if not self.in_place.has(leaf, target):
                target.copy_(self.tensor(leaf))
            elif not target.is_inference():
                changed.append(target)
        # What autograd keeps of their old values must not be taken for the new ones.
        torch.autograd.graph.increment_version(changed)


@dataclass(frozen=True)
class Filling:
    """One object to fill: the trees it takes, each with its name, and how."""

    order: int
    where: str
    trees: list[tuple[Tree, str]]
    fill: Callable[[Source], None]


@dataclass(frozen=True, eq=False)
class PickledTensor:
    """What was pickled under `key` is to fill `target`, which is at `path`, in the object `where`. Only loading it can
    tell whether it fits."""

    target: torch.Tensor
    key: str
    where: str
    path: str


@dataclass
class Fitting:
    """What is known while targets are compared: their parameters' names, the checkpoint's entries, and
    what was found so far.

    `dtypes` has the stored dtype of a target's parameter, by id. `pickled` are still to be compared; of those
    that were, `left_out` has the keys of those that fill nothing.
    """

    names: ParameterNames
    differences: Differences
    entries: Mapping[str, Tree]
    fillings: list[Filling] = field(default_factory=list)
    in_place: InPlace = field(default_factory=InPlace)
    dtypes: dict[int, torch.dtype] = field(default_factory=dict)
    pickled: list[PickledTensor] = field(default_factory=list)
    left_out: set[str] = field(default_factory=set)

    def compare_later(self, target: torch.Tensor, tree: Tree, where: str, path: str) -> None:
        self.pickled.append(PickledTensor(target, str(tree["$object"]), where, path))

    def needs(self) -> Needs:
        needs = Needs()
        for filling in self.fillings:
            for tree, path in filling.trees:
                if not is_left_out(tree, self.left_out):
                    needs.add(tree, path)
        return needs


def is_left_out(tree: Tree, left_out: Collection[str]) -> bool:
    """Whether a tree stands for something pickled whose key is among these."""
    return bool(left_out) and isinstance(tree, dict) and str(tree.get("$object")) in left_out


def another_class(target: Any, note: Mapping[str, Any]) -> str | None:
    """That an object was of another class when it was saved, or None."""
    then = note.get("class")
    if not isinstance(then, str) or then.rpartition(".")[2] == type(target).__name__:
        return None
    return f"was a {then} when it was saved and is a {type(target).__module__}.{type(target).__qualname__} here"
