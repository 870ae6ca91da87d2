"""What is in the user's objects at this moment? From live objects to a snapshot."""

from __future__ import annotations

import io
import warnings
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..errors import CheckpointError, ConfigError, SaveFailedError
from .codec import encode, join
from .names import clean_names, modules, parameter_names
from .rng import capture_rng, restore_rng
from .snapshot import Snapshot, Tree, map_leaves


class PickleWarning(UserWarning):
    """A value has no plain form: it is pickled, or not saved at all. Names the value."""


def capture(objects: Mapping[str, Any], only: Collection[str] | None = None) -> Snapshot:
    """The state of the objects on this rank, one entry each; with `only`, of those entries.

    An object is anything with `state_dict()`, a tensor, plain data, or dicts, lists and tuples of
    such. Tensors are live, not copied, and tied ones (same memory) are one tensor; containers are
    new. Random generators are captured before any object is asked, and left as they were. What
    needs pickling is pickled at once, with a `PickleWarning`.

    Blocks for what the objects' `state_dict()` take. Raises `ConfigError` for unknown names in
    `only`, entry names that are no texts, reference cycles and sharded tensors; `SaveFailedError` naming
    the entry when a `state_dict()` fails.
    """
    if odd := [name for name in objects if not isinstance(name, str) or not name]:
        raise ConfigError(f"entries are named by texts; these are not: {', '.join(map(repr, odd))}")
    if unknown := [name for name in only or () if name not in objects]:
        raise ConfigError(f"only: no entry {', '.join(map(repr, unknown))}; the state has {', '.join(objects)}")
    rng = capture_rng()
    try:
        reader = _Reader(parameter_names(named_modules(objects)))
        states = {name: reader.read(name, value) for name, value in objects.items() if only is None or name in only}
    finally:
        # A data loader starts an epoch, and so draws from the generators, to say where it stands.
        restore_rng(rng)
    ties, pickled = _Ties(), _Pickled()
    entries = {name: encode(state, path=name, opaque=pickled.add, tensor=ties.one) for name, state in states.items()}
    return Snapshot(entries, reader.notes, pickled.dump(), rng)


def has_state(value: Any) -> bool:
    """Whether the value is an object that can say its state."""
    return not isinstance(value, type) and callable(getattr(value, "state_dict", None))


def class_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def group_names(optimizer: Optimizer, names: Mapping[int, str]) -> list[list[str | None]]:
    """The names of the parameters of each group; None for one that no module has."""
    return [[names.get(id(parameter)) for parameter in group["params"]] for group in optimizer.param_groups]


def named_modules(objects: Mapping[str, Any]) -> list[tuple[str, nn.Module]]:
    found: list[tuple[str, nn.Module]] = []
    seen: set[int] = set()

    def visit(path: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            found.append((path, value))
        elif type(value) in (dict, OrderedDict, list, tuple) and id(value) not in seen:
            seen.add(id(value))
            for step, item in value.items() if isinstance(value, dict) else enumerate(value):
                visit(join(path, [step if isinstance(step, str | int) else [step]]), item)

    for name, value in objects.items():
        visit(name, value)
    return found


class _Reader:
    """Asks objects for their state, within plain containers too, and takes notes."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names = names
        self.notes: dict[str, dict[str, Any]] = {}

    def read(self, entry: str, value: Any) -> Any:
        return self._read(entry, value, (), ())

    def _read(self, entry: str, value: Any, steps: tuple[Any, ...], around: tuple[int, ...]) -> Any:
        kind = type(value)
        if kind in (dict, OrderedDict, list, tuple):
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
        try:
            state, note = self._ask(value)
        except CheckpointError:
            raise
        except Exception as exc:
            raise SaveFailedError(f"{join(entry, steps)}: {kind.__qualname__}.state_dict() failed: {exc!r}") from exc
        own = self.notes.setdefault(entry, {})
        if steps:
            own.setdefault("parts", {})[join("", steps)] = note
        else:
            own.update(note)
        return state

    def _ask(self, value: Any) -> tuple[Any, dict[str, Any]]:
        note: dict[str, Any] = {"class": class_name(value)}
        state = value.state_dict()
        if isinstance(value, nn.Module):
            names = clean_names(value, state)
            versions = {clean: module._version for _, clean, module in modules(value) if module._version != 1}
            state = {names[key]: item for key, item in state.items()}
            if versions:
                note["versions"] = versions
        elif isinstance(value, Optimizer):
            note["params"] = group_names(value, self._names)
        return state, note


class _Ties:
    """Gives the same tensor object for the same memory."""

    def __init__(self) -> None:
        self._seen: dict[Any, torch.Tensor] = {}
        self._alive: list[torch.Tensor] = []  # an id or an address means something only while its owner lives

    def one(self, tensor: torch.Tensor) -> torch.Tensor:
        own = tensor if not (tensor.is_conj() or tensor.is_neg()) else tensor.resolve_conj().resolve_neg()
        self._alive.append(tensor)
        return self._seen.setdefault(self._key(tensor), own)

    @staticmethod
    def _key(tensor: torch.Tensor) -> Any:
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested or tensor.numel() == 0:
            return id(tensor)
        kind = (type(tensor), tensor.requires_grad, tensor.dtype, tensor.device, tensor.is_conj(), tensor.is_neg())
        return (*kind, tensor.data_ptr(), tuple(tensor.shape), tensor.stride())


class _Pickled:
    """Collects what has no plain form, and pickles it."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._nodes: dict[str, dict[str, str]] = {}

    def add(self, value: Any, path: str) -> Tree:
        key, count = path, 1
        while key in self._values:
            count += 1
            key = f"{path}#{count}"
        self._values[key] = value
        node = self._nodes[key] = {"$object": key}
        return node

    def dump(self) -> bytes | None:
        """The `torch.save` file of all that pickles, or None. The nodes of the rest become `$unsaved`."""
        for key, value in list(self._values.items()):
            try:
                _pickle(value)
            except Exception as exc:  # noqa: BLE001 - pickling runs the value's own code, which may raise anything
                del self._values[key]
                node = self._nodes[key]
                node.clear()
                node["$unsaved"] = class_name(value)
                warnings.warn(
                    f"{key} is a {class_name(value)}, which can't be pickled ({exc}): it is NOT saved",
                    PickleWarning,
                    stacklevel=3,
                )
            else:
                warnings.warn(
                    f"{key} is a {class_name(value)}, which has no plain form: it is pickled, and loading it needs "
                    "trust_pickle=True; plain data or an object with state_dict() would not",
                    PickleWarning,
                    stacklevel=3,
                )
        return _pickle(self._values) if self._values else None


def _pickle(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def non_finite(snapshot: Snapshot) -> list[str]:
    """The names of tensors with a value that is not finite. Reads every floating tensor once, on its
    device, and waits for each device once; needs no memory of the tensors' size."""
    named: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}

    def look(leaf: Any, path: tuple[str, ...]) -> None:
        if isinstance(leaf, torch.Tensor) and (extremes := _extremes(leaf)) is not None:
            named.setdefault(leaf.device, []).append((".".join(path), extremes))

    for entry, tree in snapshot.entries.items():
        map_leaves(tree, look, (entry,))
    odd: list[str] = []
    for found in named.values():
        finite = torch.isfinite(torch.stack([extremes for _, extremes in found])).all(dim=1).tolist()
        odd += [name for (name, _), good in zip(found, finite, strict=True) if not good]
    return odd


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
