"""What of a nested state is there besides its tensors' contents? Found in bulk, without a call per leaf."""

from __future__ import annotations

import functools
import json
import operator
from array import array
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence, Set
from importlib import import_module
from itertools import chain, compress
from typing import Any, TypeAlias

import torch

from .shards import is_sharded, local, placement
from .snapshot import Tree

Form: TypeAlias = tuple[Any, ...]

TENSORS = frozenset({torch.Tensor, torch.nn.Parameter})
LEAVES = frozenset({type(None), bool, int, float, str})
_DICTS = frozenset({dict, OrderedDict})
_FLOATS = frozenset({float})
_OTHERS = LEAVES - _FLOATS
_CONTAINERS = _DICTS | {list, tuple}
_KNOWN = TENSORS | LEAVES | _CONTAINERS
_DEEPEST = 64  # levels


def survey(values: Sequence[Any]) -> tuple[list[Any], list[torch.Tensor]] | None:
    """Everything about plain values but their tensors, and these, level by level. None for values of other kinds.

    The first is equal for two values if and only if they have the same containers, of the same types and
    with the same keys in the same order, and equal leaves of the same types in the same places, tensors in
    the same places among them. Every bit of a float counts.
    """
    facts: list[Any] = []
    tensors: list[torch.Tensor] = []
    around: set[int] = set()
    above: Sequence[Any] = ()
    for _ in range(_DEEPEST):
        level = _Level(values)
        if not level.kinds <= _KNOWN:
            return None
        facts.append(level.fact)
        tensors += level.of(TENSORS)
        if floats := level.of(_FLOATS):
            facts.append(array("d", floats).tobytes())
        if leaves := level.of(_OTHERS):
            facts.append(leaves)
        inner = level.of(_CONTAINERS)
        if not inner:
            return facts, tensors
        around.update(map(id, above))
        if not around.isdisjoint(map(id, inner)):  # a cycle, or something shared in an uncommon way
            return None
        above = inner
        keys = list(chain.from_iterable(level.of(_DICTS)))
        if not set(map(type, keys)) <= {str, int}:
            return None
        facts += (keys, list(map(len, inner)))
        values = list(chain.from_iterable(map(_items(level.kinds), inner)))
    return None


class _Level:
    """Values and their types; `fact` says of what type each is."""

    def __init__(self, values: Sequence[Any]) -> None:
        self._values = values
        self._types: list[type] = []
        self.kinds = set(map(type, values))
        self.fact: Any = (*self.kinds, len(values))
        if len(self.kinds) > 1:
            self._types = self.fact = list(map(type, values))

    def of(self, kinds: frozenset[type]) -> Sequence[Any]:
        """The values of these types."""
        if self.kinds <= kinds:
            return self._values
        if self.kinds.isdisjoint(kinds):
            return ()
        return list(compress(self._values, map(kinds.__contains__, self._types)))


def _items(kinds: set[type]) -> Callable[[Any], Any]:
    """What gives the values in a container of one of these types."""
    inner = kinds - TENSORS - LEAVES
    if inner == {dict}:
        return dict.values
    if inner <= _DICTS:
        return operator.methodcaller("values")
    return lambda container: container.values() if isinstance(container, dict) else container


def is_same_tree(one: Tree, other: Tree) -> bool:
    """Whether two trees without live tensors are written as the same JSON."""
    return bool(one == other) and json.dumps(one) == json.dumps(other)  # True == 1 == 1.0, and 0.0 == -0.0


def form(tensor: torch.Tensor) -> Form:
    """All about a tensor but its numbers and where they are. Of a sharded one it is about the part here."""
    if is_sharded(tensor):
        own = form(local(tensor))
        return ((type(tensor), placement(tensor)), tensor.requires_grad, *own[2:])
    layout, is_quantized, is_nested = tensor.layout, tensor.is_quantized, tensor.is_nested
    return (
        type(tensor),
        tensor.requires_grad,
        tensor.dtype,
        tensor.device,
        layout,
        is_quantized,
        tensor.is_conj() or tensor.is_neg(),
        None if is_nested else tensor.shape,
        tensor.stride() if layout is torch.strided and not (is_quantized or is_nested) else None,
    )


def is_special(one: Form) -> bool:
    """Whether a tensor of this form is more than numbers at an address: sparse, quantized or nested."""
    return one[-1] is None


def is_loose(one: Form) -> bool:
    """Whether a tensor of this form has no address: it is special, or has no numbers."""
    return is_special(one) or 0 in one[-2]


def is_lasting(one: Form) -> bool:
    """Whether a tensor of this form is known by it when it is captured again. A lazy conjugate or negative has
    other memory each time, and a nested tensor a form of its own making."""
    return not is_lazy(one) and one[-2] is not None


def is_lazy(one: Form) -> bool:
    """Whether a tensor of this form is the conjugate or the negative of what is in its memory."""
    return bool(one[-3])


class Alike:
    """Knows the forms of some tensors, none of them special or lazy, and keeps none of them alive."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._guards: list[tuple[slice, Any]] = []
        self._forms: list[Form] = []
        guards = find_guards()
        if guards is not None:
            for begin in range(0, len(tensors), _CACHED):
                some = slice(begin, begin + _CACHED)
                guard = guards(*tensors[some], dynamic_dims_sizes=None, dynamic_dims_strides=None)
                self._guards.append((some, guard))
        else:
            known: dict[Form, Form] = {}
            self._forms = [known.setdefault(one, one) for one in map(form, tensors)]

    def addresses(self, tensors: Sequence[torch.Tensor]) -> list[int] | None:
        """Where as many other tensors are, if they have these forms one by one."""
        found: list[int] = []
        try:
            for some, guard in self._guards:
                part = tensors[some]
                found += map(torch.Tensor.data_ptr, part)
                # The guard must not see what has no strides: it ends the process. Where there is an address,
                # only nested tensors are left to fear.
                if any(map(_IS_NESTED, part)) or not guard.check(*part):
                    return None
            if self._forms:
                found += map(torch.Tensor.data_ptr, tensors)
                if not all(map(operator.eq, map(form, tensors), self._forms)):
                    return None
        except RuntimeError:  # special: there is no one address
            return None
        return found


_CACHED = 1024  # tensors whose objects stay in a processor's cache while they are looked at three times
_IS_NESTED = operator.attrgetter("is_nested")


@functools.cache
def find_guards() -> Any:
    """torch's own bulk check, from behind `torch.compile`, if this torch has it and it sees all that counts.
    It is several times as fast as a look at each tensor; where one stands twice, it never finds them alike."""
    try:
        guards: Any = import_module("torch._C._dynamo.guards").TensorGuards
        with torch.inference_mode(False):
            base = torch.zeros(2, 3, dtype=torch.complex64, device="cpu")
            others = [
                base.real, base.conj(), base.conj().imag, base[:1], base.flatten(), base.to(torch.complex128),
                base.view(3, 2).t(), base.to("meta"), torch.nn.Parameter(base, requires_grad=False),
                torch.nn.Parameter(base), base.detach().requires_grad_(),
            ]  # fmt: skip
            guard = guards(base, dynamic_dims_sizes=None, dynamic_dims_strides=None)
            sees = guard.check(torch.ones_like(base)) and not any(map(guard.check, others))
    except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, SystemError):
        return None
    return guards if sees else None


class Part:
    """Some of the values at the first level of an entry, by their positions, and how they are known again.

    `numbers` are those of their tensors, in the order of `find`.
    """

    def __init__(
        self, positions: Sequence[int], values: list[Any], numbers: Mapping[int, int], special: Set[int]
    ) -> None:
        self.positions = positions
        self.numbers: list[int] = []
        self.has_no_tensors = False
        self._facts: list[Any] | None = None  # None: what survey does not understand is never known again
        self._alike: Alike | None = None
        self._with_gradient: list[int] = []
        self.learn(values, numbers, special)

    def pick(self, values: list[Any]) -> list[Any]:
        """The values of this part."""
        return values if len(self.positions) == len(values) else [values[position] for position in self.positions]

    def learn(self, values: list[Any], numbers: Mapping[int, int], special: Set[int]) -> None:
        """Know these values from now on, whose tensors have these numbers by id; `special` are of special ones."""
        self._facts = None
        surveyed = survey(self.pick(values))
        if surveyed is None:
            return
        facts, tensors = surveyed
        own = [numbers.get(id(tensor), -1) for tensor in tensors]
        if -1 in own or not special.isdisjoint(own):  # meta tensors and intermediate results have no number
            return
        if self._alike is None or own != self.numbers:
            self.numbers, self._alike = own, Alike(tensors)
            self._with_gradient = [place for place, tensor in enumerate(tensors) if tensor.requires_grad]
        self._facts, self.has_no_tensors = facts, not own

    def find(self, values: list[Any]) -> tuple[list[torch.Tensor], list[int]] | None:
        """The tensors and their addresses, if all else about the values is as it was."""
        surveyed = survey(self.pick(values)) if self._facts is not None else None
        if surveyed is None or self._alike is None or surveyed[0] != self._facts:
            return None
        tensors = surveyed[1]
        addresses = self._alike.addresses(tensors)
        if addresses is None or not all(tensors[place].is_leaf for place in self._with_gradient):
            return None
        return tensors, addresses
