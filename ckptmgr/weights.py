"""How do weights from another run or file get into a model? A start, not a resume."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .direct import load_chosen, reader
from .errors import CheckpointError, ConfigError, DamagedError, NotFoundError, StateMismatchError, StoreError
from .formats.state_file import refuse_unpacking
from .formats.targets import put
from .manifest import MANIFEST_NAME
from .reading import read_first
from .repository import Repository
from .request import refuse_text
from .resumption import Reader
from .state.models import is_pickled
from .state.names import clean_names, pair
from .state.plain_tags import is_unsaved
from .state.shards import is_sharded, like
from .state.snapshot import StoredTensor, Tree
from .state.trees import items
from .store import open_store
from .store.local import local_path

_log = logging.getLogger("ckptmgr.warm_start")

_SHOWN = 20  # names of each kind in an error
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_NESTS = ("model", "state_dict", "model_state_dict", "module")  # where people put the weights in a torch.save file

Rename = Mapping[str, str] | Callable[[str], str | None]
# Which of a source's values are wanted, by its names for them, each with whether it is a weight.
Choose = Callable[[Mapping[str, bool]], list[str]]


@dataclass(frozen=True, slots=True)
class WarmStarted:
    """What `warm_start` did, by the model's own names: parameters, buffers and extra states `loaded`, those left as
    they were as the source has none of that name (`missing`) or one that can't go there (`mismatched`, each
    with both shapes or what else is in the way), and weights of the source without a place (`unexpected`)."""

    url: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[str, ...]


def warm_start(
    url: str | Path,
    model: torch.nn.Module,
    *,
    entry: str = "model",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    rename: Rename | None = None,
    strict: bool = True,
    options: Mapping[str, Any] | None = None,
) -> WarmStarted:
    """Copy weights into `model`, and the extra state of its modules; optimizer, step and random generators are
    left alone. Blocks. Every rank that has the model or a part of it calls this: each reads all that is wanted and
    keeps what is its own, and nothing is communicated. What goes nowhere in the model is not read, but for the
    rest of a `torch.save` file and of the 64 MiB pieces of a checkpoint's files, whose digests are checked.

    `url` is another run's root (its newest good checkpoint is taken), one checkpoint's folder, a
    `.safetensors` file, or a `torch.save` file (.pt, .pth, .bin, .ckpt; read without running code).
    `entry` names the checkpoint's entry. `rename` maps prefixes of the source's names to the model's, or is a
    callable that gives the new name, or None to leave the weight out. `include` and `exclude` are
    glob patterns over the model's names. With `strict` everything included must be found with the same
    shape and nothing may be left over, or nothing is touched; without it what fits is loaded, and the rest is
    reported: in `.missing`, `.unexpected` and, where it can't go into what the model has, `.mismatched`, as
    `resume` does.

    Raises `StateMismatchError` listing every difference, for values that only running code could load, and where
    the model refuses what it is given; `ConfigError` for a `rename` that leads several weights to one of the model's,
    and for a file that holds something else than a state dict, such as a whole pickled module; `NotFoundError`,
    `DamagedError`, `StoreError`.
    """
    refuse_text(include, "include")
    refuse_text(exclude, "exclude")
    raw = model.state_dict()
    clean = clean_names(model, raw)
    wanted = {name: key for key, name in clean.items() if _is_chosen(name, include, exclude)}
    olds: dict[str, str] = {}
    left: list[str] = []

    def choose(stored: Mapping[str, bool]) -> list[str]:
        nonlocal olds, left  # of the source that is read in the end: one that is damaged gives way to another
        olds, left = _matched(url, wanted, stored, rename)
        return list(olds.values())

    source = _weights(str(url), entry, dict(options or {}), choose)
    problems = {n: problem for n, old in olds.items() if (problem := _misfit(n, raw[wanted[n]], source[old]))}
    missing = [name for name in wanted if name not in olds]
    unexpected = [name for name in left if _is_chosen(name, include, exclude)]
    mismatched = [f"{name} {problem}" for name, problem in problems.items()]
    fitting = {name: old for name, old in olds.items() if name not in problems}
    if not fitting or (strict and (missing or unexpected or mismatched)):
        what = f"the weights of {url} do not fit" if fitting else f"no weight of {url} fits"
        lines = [
            f"  {kind}: {', '.join(names[:_SHOWN])}{f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''}"
            for kind, names in (
                ("not in the source", missing),
                ("without a place", unexpected),
                ("different", mismatched),
            )
            if names
        ]
        ways = "Use rename=, include= or exclude= to choose" + (
            ", or strict=False to load what fits" if fitting else ""
        )
        raise StateMismatchError("\n".join([f"{what} the model, which was left as it was:", *lines, ways]))
    # Of a sharded parameter this rank's part, in a tensor sharded alike: torch does not copy a whole one there.
    state = {wanted[name]: _own_part(source[old], raw[wanted[name]]) for name, old in fitting.items()}
    try:
        model.load_state_dict(state, strict=False)
    except CheckpointError:
        raise
    except Exception as exc:
        raise StateMismatchError(
            f"the model's load_state_dict() refused the weights of {url}: {exc or repr(exc)}. It may be partly filled"
        ) from exc
    _log.info(
        "warm_start.done url=%s loaded=%d missing=%d unexpected=%d mismatched=%d",
        url, len(fitting), len(missing), len(unexpected), len(mismatched),
    )  # fmt: skip
    return WarmStarted(str(url), tuple(fitting), tuple(missing), tuple(unexpected), tuple(mismatched))


def _matched(
    url: str | Path, wanted: Iterable[str], stored: Mapping[str, bool], rename: Rename | None
) -> tuple[dict[str, str], list[str]]:
    """What the source calls each of the names that it has of those wanted; and its other weights, as they would be
    called here. Raises `ConfigError` where `rename` leads several to one."""
    origins: dict[str, list[str]] = {}
    for old in stored:
        if (new := _renamed(old, rename)) is not None:
            origins.setdefault(new, []).append(old)
    pairs = pair(wanted, origins)
    if clashes := [f"  {', '.join(origins[o])} to {n}" for n, o in pairs.items() if len(origins[o]) > 1]:
        raise ConfigError(
            f"rename leads several weights of {url} to one of the model, which was left as it was:\n"
            + "\n".join(clashes[:_SHOWN])
            + "\nGive each a name of its own, or have a callable return None for those to leave out"
        )
    taken = set(pairs.values())
    left = [new for new, olds in origins.items() if stored[olds[0]] and new not in taken]
    return {name: origins[new][0] for name, new in pairs.items()}, left


def _is_chosen(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    return any(fnmatchcase(name, p) for p in include) and not any(fnmatchcase(name, p) for p in exclude)


def _renamed(name: str, rename: Rename | None) -> str | None:
    if rename is None:
        return name
    if callable(rename):
        return rename(name)
    # The longest prefix says most.
    for old in sorted(rename, key=len, reverse=True):
        if name.startswith(old):
            return rename[old] + name[len(old) :]
    return name


def _is_extra_state(name: str) -> bool:
    return name.rpartition(".")[2] == "_extra_state"  # torch's own name for it


def _misfit(name: str, here: Any, there: Any) -> str | None:
    """Why a value of the source can't go to its place in the model, or None when it can."""
    if _is_extra_state(name) or not isinstance(here, torch.Tensor):
        return None  # what the module made of it, only the module can judge
    if not isinstance(there, torch.Tensor):
        return "is not a tensor there"
    if there.is_meta:
        return "was on the meta device when it was saved, and has no values"
    if here.is_meta:
        return "is on the meta device here and can't be filled; give it memory first (to_empty)"
    if not torch.nn.parameter.is_lazy(here) and here.shape != there.shape:
        return f"is {tuple(there.shape)} there and {tuple(here.shape)} here"
    return None


def _own_part(value: Any, pattern: Any) -> Any:
    if isinstance(value, torch.Tensor) and isinstance(pattern, torch.Tensor) and is_sharded(pattern):
        return put(value, like(pattern, value.dtype), "cpu")
    return value


def _weights(url: str, entry: str, options: dict[str, Any], choose: Choose) -> dict[str, Any]:
    """What is chosen of the source's state dict. Of a file of tensors and of a checkpoint nothing else is read."""
    if url.endswith(".safetensors"):
        return dict(load_chosen(url, lambda keys: choose(dict.fromkeys(keys, True)), options=options))
    if url.endswith(_PICKLED):
        with reader(url, options) as file:
            found = _flat(_unpickled(file, url), url, _inner, _is_tensor)
        return {name: found[name] for name in choose({name: _is_tensor(value) for name, value in found.items()})}
    return _from_checkpoint(url, entry, options, choose)


def _unpickled(file: BinaryIO, url: str) -> Any:
    try:
        refuse_unpacking(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except (StoreError, MemoryError):
        raise
    except Exception as exc:
        cause = str(exc).rpartition("WeightsUnpickler error:")[2].strip()  # without the advice to run the file's code
        if found := re.search(r"GLOBAL (\S+)|TorchScript", cause):
            raise ConfigError(
                f"{url} holds pickled objects ({found[1] or found[0]}), not just a state dict, and loading them would "
                "run code from the file; where you trust it, load it yourself and save model.state_dict() to a file of "
                "its own"
            ) from exc
        raise DamagedError(f"{url} is not a torch.save file that loads without running code: {cause}") from exc


def _from_checkpoint(url: str, entry: str, options: dict[str, Any], choose: Choose) -> dict[str, Any]:
    """What is chosen of the newest good checkpoint of a root, or of the one whose folder this is."""
    path = local_path(url)
    # Without links, or the folder's parent need not be the root that it is in.
    root = url.rstrip("/") if path is None else Path(os.path.realpath(path)).as_posix()
    store, folder = open_store(root, options), None
    if store.stat(MANIFEST_NAME) is not None:
        root, _, folder = root.rpartition("/")
        store = open_store(root or "/", options)
    repository = Repository(store)
    source = Reader(repository, "fast", trust_pickle=False)

    def take(tree: Tree) -> dict[str, Tree]:
        found = _flat(tree, f"{url} (entry {entry!r})", items, _stands_for_tensor)
        found = {name: part for name, part in found.items() if not is_unsaved(part)}
        chosen = choose({name: _stands_for_tensor(part) for name, part in found.items()})
        return {f"{entry}.{name}": found[name] for name in chosen}  # as messages call them

    try:
        values = read_first(
            repository,
            lambda: [info for info in repository.infos() if folder in (None, info.name)],
            lambda info: source.load_parts(info, entry, take),
            lambda info, exc: _log.warning("warm_start.skip.damaged step=%d cause=%s", info.step, exc),
        )
    except StateMismatchError as exc:
        if "trust_pickle" not in str(exc):
            raise
        raise StateMismatchError(
            f"{exc}. That goes for a CheckpointManager; warm_start runs no code of its source. Leave them out with "
            "exclude=, or have a manager with read_only=True and trust_pickle=True give the weights by "
            f"load(only=[{entry!r}]), to pass to model.load_state_dict()"
        ) from exc
    if values is None:
        raise NotFoundError(f"no checkpoint in {url}; give a run's root, one checkpoint's folder, or a file of weights")
    return {path.removeprefix(f"{entry}."): value for path, value in values.items()}


def _flat(
    value: Any, where: str, inner: Callable[[Any], Mapping[Any, Any] | None], is_tensor: Callable[[Any], bool]
) -> dict[str, Any]:
    """A state dict: its own, or the one under a name that people give it. `inner` gives a mapping's items."""
    found = inner(value)
    if found is None:
        kind = "tensor" if is_tensor(value) else type(value).__name__
        raise NotFoundError(f"{where} holds a {kind}, not a state dict")
    for nest in _NESTS:
        if inner(found.get(nest)) is not None:
            return _flat(found[nest], where, inner, is_tensor)
    if not any(map(is_tensor, found.values())):
        raise ConfigError(f"{where} holds no state dict of tensors; its keys are {', '.join(map(str, found))[:200]}")
    named = zip(map(str, found), found.values(), strict=True)
    return {name: item for name, item in named if is_tensor(item) or _is_extra_state(name)}


def _inner(value: Any) -> Mapping[Any, Any] | None:
    return value if isinstance(value, Mapping) else None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _stands_for_tensor(tree: Tree) -> bool:
    """What was pickled, too, is one for all that is known of it."""
    return isinstance(tree, StoredTensor) or is_pickled(tree) or (isinstance(tree, dict) and "$meta" in tree)
