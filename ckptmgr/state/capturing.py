"""What is in the user's objects at this moment? From live objects to a snapshot."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from ..errors import CheckpointError, ConfigError, SaveFailedError
from .codec import encode, join, to_json
from .names import Known, Names
from .pickled import Pickled, class_name
from .ranks import PerRank, is_per_rank, mark_within, sampler_epoch, unmarked
from .rng import generators, put_back
from .shards import has_sharded, is_sharded
from .snapshot import RankPart, Snapshot, Tree
from .structure import form, is_special, survey
from .ties import Ties


def capture(objects: Mapping[str, Any], only: Collection[str] | None = None, rank: int = 0) -> Snapshot:
    """The state of the objects on this rank, one entry each; with `only`, of those entries. What differs from
    rank to rank (see `per_rank`) is in the part of `rank`, which this process is.

    An object is anything with `state_dict()`, a tensor, plain data, or dicts, lists and tuples of
    such. Tensors are live, not copied, and tied ones (same memory) are one tensor; containers are
    new. Random generators are captured before any object is asked, and left as they were. What
    needs pickling is pickled at once, with a `PickleWarning`.

    Blocks for what the objects' `state_dict()` take. Raises `ConfigError` for unknown names in
    `only`, entry names that are no texts and reference cycles; `SaveFailedError` naming
    the entry when a `state_dict()` fails.
    """
    reading = Reader().read(objects, only)
    ties, pickled = Ties(), Pickled()

    def one(tensor: torch.Tensor) -> torch.Tensor:
        return ties.tensors[ties.number(tensor)]

    entries = {name: encode(state, path=name, opaque=pickled.add, tensor=one) for name, state in reading.states.items()}
    return Snapshot(entries, reading.notes, pickled.dump(), {rank: reading.part})


@dataclass(frozen=True, slots=True)
class Reading:
    """What objects said of themselves at one moment. Holds the objects' own tensors and containers, but in
    `part`, which is what this rank saves for itself.

    `parameters` are those of the modules among the entries; `facts` say all about these modules that
    is not in their state.
    """

    states: dict[str, Any]
    notes: dict[str, dict[str, Any]]
    part: RankPart
    facts: list[Any]
    parameters: list[nn.Parameter]


class Reader:
    """Asks objects for their state, and knows their names from the last time where nothing changed."""

    def __init__(self) -> None:
        self._known = Known()

    def read(self, objects: Mapping[str, Any], only: Collection[str] | None = None, *, shared: bool = True) -> Reading:
        """See `capture`. Without `shared` only what differs from rank to rank is asked."""
        if odd := [name for name in objects if not isinstance(name, str) or not name]:
            raise ConfigError(f"entries are named by texts; these are not: {', '.join(map(repr, odd))}")
        if unknown := [name for name in only or () if name not in objects]:
            raise ConfigError(f"only: no entry {', '.join(map(repr, unknown))}; the state has {', '.join(objects)}")
        own = {name for name, value in objects.items() if is_per_rank(value)}
        objects = unmarked(objects)
        before = generators()
        try:
            saved = {name: value for name, value in objects.items() if only is None or name in only}
            # What stands in several entries is named by one that is saved: the checkpoint knows that name.
            found = named_modules(saved | objects)
            names = Names(found, self._known)
            chosen = {name: value for name, value in saved.items() if shared or name in own}
            asking, asking_own = _Asking(names), _Asking(names)
            states = {name: (asking_own if name in own else asking).read(name, value) for name, value in chosen.items()}
        finally:
            # A data loader starts an epoch, and so draws from the generators, to say where it stands.
            put_back(before)
        inside = found if len(chosen) == len(objects) else named_modules(chosen)
        self._known = names.known
        own_states = {name: states.pop(name) for name in chosen if name in own}
        part = _part(encode(before, path="rng"), own_states, asking_own.notes)
        return Reading(states, asking.notes, part, *names.of_modules(inside))


def _part(rng: Tree, states: Mapping[str, Any], notes: dict[str, dict[str, Any]]) -> RankPart:
    """What a rank saves for itself, of the states of its own entries. Holds nothing of the objects."""
    ties, pickled = Ties(), Pickled()

    def stand_in(tensor: torch.Tensor, entry: str) -> Tree:
        if is_sharded(tensor):
            raise ConfigError(
                f"{entry} holds a DTensor, of which every rank's part is saved anyway: don't mark it per_rank"
            )
        # What is more than numbers has no place in JSON.
        return pickled.add(tensor, entry) if is_special(form(tensor)) else {"$tensor": ties.number(tensor)}

    trees = {
        name: encode(state, path=name, opaque=pickled.add, tensor=partial(stand_in, entry=name))
        for name, state in states.items()
    }
    return RankPart(to_json(rng), trees, notes, tuple(map(to_json, ties.tensors)), pickled.dump())


def has_state(value: Any) -> bool:
    """Whether the value is an object that can say its state."""
    return not isinstance(value, type) and callable(getattr(value, "state_dict", None))


def holds_sharded(objects: Mapping[str, Any]) -> bool:
    """Whether tensors among the objects are sharded over ranks: parameters of modules and optimizers, and
    those that stand in the mapping or its lists and dicts themselves."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False  # without a mesh there are none, and there may be 100,000 to look at

    def tensors(value: Any) -> Iterator[torch.Tensor]:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, nn.Module):
            yield from value.parameters()
            yield from value.buffers()
        elif isinstance(value, Optimizer):
            yield from (parameter for group in value.param_groups for parameter in group["params"])
        elif type(value) in (dict, OrderedDict, list, tuple):
            for item in value.values() if isinstance(value, dict) else value:
                yield from tensors(item)

    return has_sharded(tensor for value in objects.values() for tensor in tensors(value))


def named_modules(objects: Mapping[str, Any]) -> list[tuple[str, nn.Module]]:
    seen: set[int] = set()
    return [found for name, value in objects.items() for found in _modules_in(name, value, seen)]


def _modules_in(path: str, value: Any, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(value, nn.Module):
        yield path, value
    elif _may_hold_objects(value) and id(value) not in seen:
        seen.add(id(value))
        for step, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _modules_in(join(path, [step if isinstance(step, str | int) else [step]]), item, seen)


def _may_hold_objects(value: Any) -> bool:
    """Whether the value is a plain container of something that is not plain."""
    return type(value) in (dict, OrderedDict, list, tuple) and survey([value]) is None


class _Asking:
    """Asks objects for their state, within plain containers too, and takes notes."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self.notes: dict[str, dict[str, Any]] = {}

    def read(self, entry: str, value: Any) -> Any:
        return self._read(entry, value, (), ())

    def _read(self, entry: str, value: Any, steps: tuple[Any, ...], around: tuple[int, ...]) -> Any:
        kind = type(value)
        if isinstance(value, PerRank):
            raise mark_within(join(entry, steps))
        if _may_hold_objects(value):
            if id(value) in around:
                return value  # refused when it is encoded
            around = (*around, id(value))
            if isinstance(value, dict):
                return kind(
                    (key, self._read(entry, item, (*steps, key if isinstance(key, str | int) else [key]), around))
                    for key, item in value.items()
                )
            return kind(self._read(entry, item, (*steps, i), around) for i, item in enumerate(value))
        if not has_state(value):
            return value
        path = join(entry, steps)
        try:
            state, note = self._ask(value, path)
        except CheckpointError:
            raise
        except Exception as exc:
            raise SaveFailedError(f"{path}: {kind.__qualname__}.state_dict() failed: {exc!r}") from exc
        own = self.notes.setdefault(entry, {})
        if steps:
            own.setdefault("parts", {})[join("", steps)] = note
        else:
            own.update(note)
        return state

    def _ask(self, value: Any, path: str) -> tuple[Any, dict[str, Any]]:
        note: dict[str, Any] = {"class": class_name(value)}
        state = value.state_dict()
        if isinstance(value, nn.Module):
            named = self._names.of_state(path, value, state)
            state = dict(zip(named.names, state.values(), strict=True))
            if named.versions:
                note["versions"] = named.versions
        elif isinstance(value, Optimizer):
            note["params"] = self._names.of_groups(path, [group["params"] for group in value.param_groups])
        elif isinstance(value, DataLoader) and (epoch := sampler_epoch(value)) is not None:
            note["sampler_epoch"] = epoch
        return state, note
