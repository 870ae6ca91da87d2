"""How does a stored state get back into live objects? Compare everything first, then fill."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from ..errors import CheckpointError, ConfigError, DamagedError, StateMismatchError
from .capturing import named_modules
from .codec import decode
from .differences import Differences
from .filling import LOADER, Fitting, Source
from .fitting import fit, refuse_unfillable
from .in_place import InPlace
from .models import compare_pickled, leave_pickled
from .names import parameter_names
from .plain_tags import is_unsaved
from .ranks import refuse_marks_within, unmarked
from .snapshot import StoredState, StoredTensor, Tree
from .trees import Needs

Fetch: TypeAlias = Callable[..., dict[StoredTensor, torch.Tensor]]
Objects: TypeAlias = Callable[[], Mapping[str, Any]]


def match(
    targets: Mapping[str, Any],
    stored: StoredState,
    *,
    strict: bool = True,
    skip: Collection[str] = (),
    objects: Objects | None = None,
) -> RestorePlan:
    """Compare the targets with a checkpoint; touches neither.

    A target is an object with `load_state_dict()`, a tensor, or a dict, list or tuple of such,
    under its entry's name, marked `per_rank` or not; entries in `skip` are left out. Plain values within a dict or list
    are replaced there, and a dict gets the checkpoint's further keys; a dict or list of nothing
    but plain values becomes what it was.

    Raises `StateMismatchError` with every missing, unexpected and misshapen key of all targets; with
    `strict=False` what fits goes into the plan and the rest into its reports. With `objects`, as for
    `apply`, what was pickled for a tensor is loaded and compared too; else `apply` does it. Raises
    `ConfigError` for a target that can't be filled and for unknown names in `skip`.
    """
    if unknown := [name for name in skip if name not in targets and name not in stored.entries and name != "rng"]:
        raise ConfigError(f"skip: no entry {', '.join(map(repr, unknown))}; there are {', '.join(stored.entries)}, rng")
    claimed = fillable(targets, skip)
    differences = Differences(list(stored.entries), list(claimed))
    fitting = Fitting(parameter_names(named_modules(claimed)), differences, stored.entries)
    for name, target in claimed.items():
        if name in stored.entries:
            fit(fitting, name, target, stored.entries[name], stored.notes.get(name, {}))
        else:
            differences.no_entry(name)
    if objects is not None and fitting.pickled:
        compare_pickled(fitting, _trusted([one.key for one in fitting.pickled], objects))
    if strict and differences:
        raise StateMismatchError(differences.text())
    return RestorePlan(fitting, strict)


def fillable(targets: Mapping[str, Any], skip: Collection[str] = ()) -> dict[str, Any]:
    """The targets that are not in `skip`, without their marks. Raises `ConfigError` for one that no checkpoint could
    fill, so that this is known before there is one."""
    claimed = {name: target for name, target in unmarked(targets).items() if name not in skip}
    for name, target in claimed.items():
        refuse_marks_within(name, target)
        refuse_unfillable(name, target)
    return claimed


class RestorePlan:
    """What `apply` will fill. `missing`, `unexpected` and `mismatched` name what it will not, as
    "entry.key" (values that could not be saved are missing even when strict); `casts` the
    tensors that change their dtype on the way."""

    def __init__(self, fitting: Fitting, strict: bool) -> None:
        fitting.in_place.settle()
        self._fitting, self._strict = fitting, strict
        self._needs = fitting.needs()
        differences = fitting.differences
        differences.unsaved += self._needs.unsaved
        self.missing = differences.names("missing")
        self.unexpected = differences.names("unexpected")

    @property
    def mismatched(self) -> tuple[str, ...]:
        return self._fitting.differences.names("mismatched")

    @property
    def casts(self) -> tuple[str, ...]:
        return tuple(self._fitting.differences.casts)

    def apply(self, fetch: Fetch, objects: Objects | None = None, map_location: str | torch.device = "cpu") -> None:
        """Read the tensors, straight into the targets' memory where that can be, and fill the
        targets: modules, then optimizers, schedulers, and data loaders last. Blocks.

        `fetch` is `StoredState.fetch`; `objects` is `StoredState.objects`, or None when the
        checkpoint is not trusted. `map_location` is where tensors go that are plain values of a
        container. Raises `StateMismatchError` before anything is touched when pickled values are
        needed but not trusted or do not fit, or a class that is not imported, or naming the entry when a
        `load_state_dict()` fails; `DamagedError` when reading finds damage, with targets possibly half filled.
        """
        fitting = self._fitting
        if objects is None and not self._strict and fitting.pickled:
            leave_pickled(fitting)
            self._needs = fitting.needs()
        pickled = _trusted(self._needs.objects, objects)
        compare_pickled(fitting, pickled)
        if self._strict and fitting.differences:
            raise StateMismatchError(fitting.differences.text())
        for tree, path in self._needs.foreign:  # to see now whether it can be; nothing has been touched
            decode(tree, tensor=lambda leaf: leaf, objects=pickled.__getitem__, path=path)
        in_place = fitting.in_place
        wanted = {**self._needs.tensors, **in_place.targets}
        source = Source(fetch(wanted, addresses=in_place.addresses), in_place, pickled, map_location)
        for filling in sorted(fitting.fillings, key=lambda one: one.order):
            try:
                with torch.no_grad():
                    filling.fill(source)
            except CheckpointError:
                raise
            except Exception as exc:
                cause = str(exc) or repr(exc)
                if filling.order == LOADER:
                    cause += ". A data loader goes on with as many workers as it had, over the same data, or is skipped"
                raise StateMismatchError(
                    f"{filling.where}: its load_state_dict() refused what the checkpoint holds: {cause}. "
                    "The objects may be partly filled"
                ) from exc


def unclaimed(stored: StoredState, targets: Collection[str]) -> list[str]:
    """The checkpoint's entries that no target has the name of."""
    return [name for name in stored.entries if name not in targets]


def of_objects(stored: StoredState, names: Iterable[str]) -> list[str]:
    """Those of the entries that hold the state of an object, or of several."""
    notes = {name: stored.notes.get(name) for name in names}
    return [name for name, note in notes.items() if isinstance(note, dict) and ("class" in note or "parts" in note)]


def materialize(
    stored: StoredState,
    names: Iterable[str],
    fetch: Fetch,
    objects: Objects | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """The values of entries: see `grown`."""
    return grown({name: stored.entries[name] for name in names}, fetch, objects, device)


def grown(
    trees: Mapping[str, Tree], fetch: Fetch, objects: Objects | None = None, device: str | torch.device = "cpu"
) -> dict[str, Any]:
    """The values of stored trees, by their names, their tensors new on `device`; ties stay ties. Blocks.

    What could not be saved is left out. Raises `StateMismatchError` when pickled values
    are needed and `objects` is None, or a class is not imported; `DamagedError`.
    """
    needs = Needs()
    for name, tree in trees.items():
        needs.add(tree, name)
    pickled = _trusted(needs.objects, objects)
    source = Source(fetch(dict.fromkeys(needs.tensors), device), InPlace(), pickled, device)
    return {name: source.decode(tree, name) for name, tree in trees.items() if not is_unsaved(tree)}


def _trusted(needed: Sequence[str], objects: Objects | None) -> Mapping[str, Any]:
    """What was pickled, of which these paths are needed."""
    if not needed:
        return {}
    if objects is None:
        raise StateMismatchError(
            f"these values were pickled, and loading them runs code from the checkpoint: {', '.join(needed)}. "
            "Pass trust_pickle=True if you trust where it comes from, "
            "or leave their entries out with skip=[...] or only=[...]"
        )
    values = objects()
    if lost := [path for path in needed if path not in values]:
        raise DamagedError(f"the checkpoint's pickled objects lack {', '.join(lost)}")
    return values
