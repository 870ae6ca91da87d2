"""What is in the user's objects at this moment, and what of it is as it was the last time?

A state is looked at in bulk: its containers, keys and plain leaves by `survey`, its tensors' forms and
addresses by `Alike`. What is the same has its tree from the last time. What is not is encoded anew, and
where tensors came, went or changed their form, so is everything.
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import ConfigError
from .capturing import Reader, Reading
from .codec import encode
from .pickled import Pickled, warn_of_bare
from .plain_tags import is_plain
from .shards import local
from .snapshot import FlatSnapshot, RankPart, Tree, map_leaves
from .structure import LEAVES, TENSORS, Form, Part, form, is_lasting, is_loose, is_same_tree, is_special
from .ties import Ties

_MOST_PARTS = 64  # of an entry that are looked at one by one
_IS_META = operator.attrgetter("is_meta")
_SORTS = dict.fromkeys(TENSORS, 1) | dict.fromkeys(LEAVES, 2)


class Recorder:
    """Captures states one after the other, and knows when the next has the structure of the last.

    Holds no tensor between captures. Used from one thread at a time.
    """

    def __init__(self) -> None:
        self._reader = Reader()
        self._last: _Record | None = None

    def capture(self, objects: Mapping[str, Any], only: Collection[str] | None = None, rank: int = 0) -> FlatSnapshot:
        """The state of the objects as `capture` and `flatten` give it, parameters without gradient as `still`.
        `ranks` has the part of this process, which is `rank`.

        Takes little more than the objects' own `state_dict()` where the structure is that of the last
        capture. The trees are also those of later snapshots: they are not to be changed. Blocks, raises and
        warns like `capture`.
        """
        reading = self._reader.read(objects, only)
        last, self._last = self._last, None
        flat = None if last is None else last.again(reading)
        if flat is None:
            last, flat = _record(reading)
        self._last = last
        return replace(flat, ranks={rank: reading.part})

    def capture_part(self, objects: Mapping[str, Any], only: Collection[str] | None = None) -> RankPart:
        """Only what differs from rank to rank, for a rank whose other entries another one saves: these are
        not asked for their state. Blocks, raises and warns like `capture`."""
        return self._reader.read(objects, only, shared=False).part


def _record(reading: Reading) -> tuple[_Record | None, FlatSnapshot]:
    """Everything encoded anew, and what to remember of it: nothing when it can't be known again."""
    ties, pickled = Ties(), Pickled()

    def stand_in(tensor: torch.Tensor) -> Tree:
        return {"$tensor": ties.number(tensor)}

    trees = {
        name: encode(state, path=name, opaque=pickled.add, tensor=stand_in) for name, state in reading.states.items()
    }
    objects = pickled.dump()
    if any(map(_IS_META, reading.parameters)):
        warn_of_bare(reading.states)
    still = _still(reading.parameters, ties.find)
    pointers = list(map(_address, ties.tensors, ties.forms))
    flat = FlatSnapshot(trees, ties.tensors, reading.notes, objects, {}, object(), still, pointers)
    forms = _Forms(ties)
    return (_Record(reading, flat, forms, ties.numbers) if forms.are_lasting else None), flat


def _address(tensor: torch.Tensor, own: Form) -> int:
    return 0 if is_loose(own) else local(tensor).data_ptr()


def _still(parameters: Collection[torch.nn.Parameter], find: Callable[[torch.Tensor], int | None]) -> frozenset[int]:
    """The numbers of the parameters that take no gradient, but not of those whose memory is also one's that does."""
    numbers: dict[bool, set[int]] = {True: set(), False: set()}
    if not all(parameter.requires_grad for parameter in parameters):
        for parameter in parameters:
            if type(parameter) in TENSORS:
                found = (find(parameter), find(parameter.detach()))
                numbers[parameter.requires_grad].update(number for number in found if number is not None)
    return frozenset(numbers[False] - numbers[True])


class _Forms:
    """The forms of numbered tensors: equal ones are one object."""

    def __init__(self, ties: Ties) -> None:
        known: dict[Form, Form] = {}
        self.by_number = [known.setdefault(one, one) for one in ties.forms]
        self.ids = {one: id(one) for one in known}
        # What has no address of its own is tied only to itself.
        self.loose = {number for number, one in enumerate(self.by_number) if is_loose(one)}
        self.special = {number for number in self.loose if is_special(self.by_number[number])}
        self.are_lasting = all(map(is_lasting, known))


class _Now:
    """What is gathered for one snapshot: a tensor for each place in the trees."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.numbers: list[int] = []
        self.addresses: list[int] = []
        self.pickled = Pickled()

    def add(self, tensors: Sequence[torch.Tensor], numbers: Sequence[int], addresses: Sequence[int]) -> None:
        self.tensors += tensors
        self.numbers += numbers
        self.addresses += addresses


class _Record:
    """A state as it was captured last. Holds forms and addresses of its tensors, but no tensor."""

    def __init__(self, reading: Reading, flat: FlatSnapshot, forms: _Forms, numbers: Mapping[int, int]) -> None:
        self._facts, self._notes = reading.facts, flat.notes
        self._shape, self._still, self._addresses = flat.shape, flat.still, flat.pointers
        self._forms = forms
        self._entries = {
            name: _Entry(name, state, flat.entries[name], forms, numbers) for name, state in reading.states.items()
        }
        self._places = _Places([number for entry in self._entries.values() for number in entry.numbers()], forms)

    def again(self, reading: Reading) -> FlatSnapshot | None:
        """The next snapshot, or None where tensors are not the same in number, place, form or ties."""
        now = _Now()
        if list(self._entries) != list(reading.states) or self._facts != reading.facts:
            return None
        for name, state in reading.states.items():
            entry = self._entries[name].look(state, now)
            if entry is None:
                return None
            self._entries[name] = entry
        if self._places.numbers != now.numbers:
            self._places = _Places(now.numbers, self._forms)
        tensors, addresses = self._places.first(now.tensors), self._places.first(now.addresses)
        if not self._places.are_tied(now, addresses):
            return None
        if addresses != self._addresses and not self._is_rightly_moved(reading, addresses):
            return None
        self._addresses = addresses
        objects = now.pickled.dump()
        entries = {name: entry.settled() for name, entry in self._entries.items()}
        notes = reading.notes
        self._notes = {
            name: self._notes[name] if self._notes.get(name) == note else note for name, note in notes.items()
        }
        return FlatSnapshot(entries, tensors, self._notes, objects, {}, self._shape, self._still, addresses)

    def _is_rightly_moved(self, reading: Reading, addresses: list[int]) -> bool:
        """Whether tensors that moved in memory are no more tied, and no less still, than they were."""
        forms = self._forms
        apart = [number for number in range(len(addresses)) if number not in forms.loose]
        numbers = {(addresses[number], id(forms.by_number[number])): number for number in apart}
        if len(numbers) != len(apart):
            return False

        def find(tensor: torch.Tensor) -> int | None:
            own = form(tensor)
            return None if is_loose(own) else numbers.get((local(tensor).data_ptr(), forms.ids.get(own, 0)))

        return self._still == _still(reading.parameters, find)


class _Places:
    """Where in the trees, in the order they are gathered, the tensors stand, by their numbers."""

    def __init__(self, numbers: list[int], forms: _Forms) -> None:
        self.numbers = numbers
        firsts = dict(zip(reversed(numbers), range(len(numbers) - 1, -1, -1), strict=True))
        self._repeats = [(place, number) for place, number in enumerate(numbers) if firsts[number] != place]
        self._loose = [(place, number) for place, number in enumerate(numbers) if number in forms.loose]
        self._firsts = [firsts[number] for number in sorted(firsts)]
        self._is_in_order = self._firsts == list(range(len(numbers)))

    def first(self, gathered: list[Any]) -> list[Any]:
        """What was gathered for each number where it stands first."""
        return gathered if self._is_in_order else [gathered[place] for place in self._firsts]

    def are_tied(self, now: _Now, addresses: list[int]) -> bool:
        """Whether all places of a number hold the same memory; `addresses` are by number."""
        loose = {number: now.tensors[place] for place, number in self._loose}
        return (
            all(now.addresses[place] == addresses[number] for place, number in self._repeats)
            and all(now.tensors[place] is loose[number] for place, number in self._loose)
            and len(set(map(id, loose.values()))) == len(loose)
        )


class _Entry:
    """An entry's tree, and what has to be the same for it to be the same."""

    def __init__(self, name: str, state: Any, tree: Tree, forms: _Forms, numbers: Mapping[int, int]) -> None:
        self._name, self._forms, self._tree = name, forms, tree
        self._kind, self._keys, values = _first_level(state)
        self._trees = self._old = self._by_key(tree)
        self._fresh: dict[str, Tree] = {}
        self._sorts = _sorts(values)
        self._parts = [Part(positions, values, numbers, forms.special) for positions in _divided(self._sorts)]

    def numbers(self) -> list[int]:
        """The numbers of the tensors that `look` finds where all is as before."""
        return [number for part in self._parts for number in part.numbers]

    def look(self, state: Any, now: _Now) -> _Entry | None:
        """Gather the tensors and encode what changed; what to remember of the entry from now on. None where
        tensors came, went or changed their form."""
        values = self._values(state)
        if values is None or _sorts(values) != self._sorts:
            return self._renewed(state, now)
        for part in self._parts:
            found = part.find(values)
            if found is not None:
                now.add(found[0], part.numbers, found[1])
            elif not self._encode(part, state, values, now):
                return None
        return self

    def settled(self) -> Tree:
        """The tree, in every part that is the same the very same object as before. Once after each `look`."""
        if self._fresh:
            old, fresh = self._old, self._fresh
            kept = {key: old[key] for key, tree in fresh.items() if key in old and is_same_tree(old[key], tree)}
            if old is not self._trees or len(kept) < len(fresh):
                self._old = self._trees = self._trees | fresh | kept
                self._tree = {"$ordered": self._trees} if self._kind is OrderedDict else self._trees
                if self._kind is None:
                    self._tree = self._trees[""]
            self._fresh = {}
        return self._tree

    def _by_key(self, tree: Tree) -> dict[str, Tree]:
        """The trees at the first level."""
        if self._kind is None:
            return {"": tree}
        trees: dict[str, Tree] = tree["$ordered"] if self._kind is OrderedDict else tree
        return trees

    def _values(self, state: Any) -> list[Any] | None:
        """The values at the first level, or None where their keys are not the same."""
        if self._kind is None:
            return [state]
        if type(state) is not self._kind or tuple(state) != self._keys or set(map(type, state)) != {str}:
            return None
        return list(state.values())

    def _encode(self, part: Part, state: Any, values: list[Any], now: _Now) -> bool:
        """Encode a part anew. Whether its tensors are the same in number, place and form."""
        keys = [self._keys[position] for position in part.positions]
        before = self._tree
        if self._kind is not None:
            before = {key: self._trees[key] for key in keys}
            state = self._kind(zip(keys, part.pick(values), strict=True))
        encoded = self._encoded(state, [] if part.has_no_tensors else _places(before), now)
        if encoded is None:
            return False
        self._fresh |= self._by_key(encoded[0])
        part.learn(values, encoded[1], self._forms.special)
        return True

    def _renewed(self, state: Any, now: _Now) -> _Entry | None:
        """The same entry with other values at its first level, if its tensors are the same."""
        encoded = self._encoded(state, _places(self._tree), now)
        if encoded is None:
            return None
        entry = _Entry(self._name, state, encoded[0], self._forms, encoded[1])
        entry._old, entry._fresh = self._trees, entry._trees
        return entry

    def _encoded(self, state: Any, places: list[tuple[Any, int]], now: _Now) -> tuple[Tree, dict[int, int]] | None:
        """The tree of a state whose tensors stand in these places, and their numbers by id."""
        tensors: list[torch.Tensor] = []
        numbers = [number for _, number in places]

        def stand_in(tensor: torch.Tensor) -> Tree:
            tensors.append(tensor)
            return {"$tensor": numbers[len(tensors) - 1] if len(tensors) <= len(numbers) else -1}

        try:
            tree = encode(state, path=self._name, opaque=now.pickled.add, tensor=stand_in)
        except ConfigError:
            return None  # it is raised again, with its right path, when everything is encoded anew
        if (tensors or places) and _places(tree) != places:
            return None
        forms = [self._forms.by_number[number] for number in numbers]
        if list(map(form, tensors)) != forms:
            return None
        now.add(tensors, numbers, list(map(_address, tensors, forms)))
        return tree, dict(zip(map(id, tensors), numbers, strict=True))


def _first_level(state: Any) -> tuple[type[dict[str, Any]] | None, tuple[str, ...], list[Any]]:
    """The type of a dict with names for its keys, these, and its values. What is no such dict counts as one
    value without a name."""
    is_named = type(state) in (dict, OrderedDict) and set(map(type, state)) == {str}
    if is_named and all(key[:1] != "$" and is_plain(key) for key in state):
        return type(state), tuple(state), list(state.values())
    return None, ("",), [state]


def _sorts(values: list[Any]) -> list[int | None]:
    """Of each value, whether it is a tensor, a plain leaf, or something else."""
    return list(map(_SORTS.get, map(type, values)))


def _divided(sorts: list[int | None]) -> list[Sequence[int]]:
    """The positions of values that are looked at together: tensors, plain leaves, and anything else on its own."""
    positions = [[place for place, one in enumerate(sorts) if one == sort] for sort in (1, 2, None)]
    others = [positions[2]] if len(positions[2]) > _MOST_PARTS else [[place] for place in positions[2]]
    return [some for some in (*positions[:2], *others) if some]


def _places(tree: Tree) -> list[tuple[Any, int]]:
    """The path and the number of each tensor in a tree."""
    found: list[tuple[Any, int]] = []

    def look(leaf: Any, path: tuple[str, ...]) -> None:
        if isinstance(leaf, dict):
            found.append((path, leaf["$tensor"]))

    map_leaves(tree, look)
    return found
