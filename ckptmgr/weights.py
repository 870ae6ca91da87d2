"""How do weights from another run or file get into a model? A start, not a resume."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .direct import load_file, reader
from .errors import ConfigError, DamagedError, NotFoundError, StateMismatchError
from .formats.state_file import refuse_unpacking
from .manifest import MANIFEST_NAME
from .reading import read_first
from .repository import Repository
from .resumption import Reader
from .state.names import clean_names, pair
from .store import open_store
from .store.local import local_path

_log = logging.getLogger("ckptmgr.warm_start")

_SHOWN = 20  # names of each kind in an error
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")
_NESTS = ("model", "state_dict", "model_state_dict", "module")  # where people put the weights in a torch.save file

Rename = Mapping[str, str] | Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class WarmStarted:
    """What `warm_start` did, by the model's own names: parameters and buffers `loaded`, those left as
    they were (`missing`), and weights of the source without a place (`unexpected`)."""

    url: str
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


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
    """Copy weights into `model`; optimizer, step and random generators are left alone. Blocks.

    `url` is another run's root (its newest good checkpoint is taken), one checkpoint's folder, a
    `.safetensors` file, or a `torch.save` file (.pt, .pth, .bin, .ckpt; read without running code).
    `entry` names the checkpoint's entry. `rename` maps prefixes of the source's names to the model's, or is a
    callable that gives the new name, or None to leave the weight out. `include` and `exclude` are
    glob patterns over the model's names. With `strict` everything included must be found with the same
    shape and nothing may be left over, or nothing is touched; without it what fits is loaded.

    Raises `StateMismatchError` listing every difference, `NotFoundError`, `DamagedError`, `StoreError`.
    """
    raw = model.state_dict()
    clean = clean_names(model, raw)
    wanted = {name: key for key, name in clean.items() if _is_chosen(name, include, exclude)}
    source = {
        new: value
        for name, value in _weights(str(url), entry, dict(options or {})).items()
        if (new := _renamed(name, rename)) is not None
    }
    pairs = pair(wanted, source)
    misshapen = {n: o for n, o in pairs.items() if _shape(source[o]) != _shape(raw[wanted[n]])}
    missing = [name for name in wanted if name not in pairs]
    taken = set(pairs.values())
    unexpected = [name for name in source if name not in taken and _is_chosen(name, include, exclude)]
    shapes = [f"{n} is {_shape(source[o])} there and {_shape(raw[wanted[n]])} here" for n, o in misshapen.items()]
    if strict and (missing or unexpected or shapes):
        lines = [
            f"  {kind}: {', '.join(names[:_SHOWN])}{f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''}"
            for kind, names in (("not in the source", missing), ("without a place", unexpected), ("misshapen", shapes))
            if names
        ]
        raise StateMismatchError(
            f"the weights of {url} do not fit the model, which was left as it was:\n" + "\n".join(lines)
            + "\nUse rename=, include= or exclude= to choose, or strict=False to load what fits"
        )  # fmt: skip
    fitting = {name: old for name, old in pairs.items() if name not in misshapen}
    if not fitting:
        raise StateMismatchError(f"no weight of {url} fits the model by name and shape; see rename= and include=")
    model.load_state_dict({wanted[name]: source[old] for name, old in fitting.items()}, strict=False)
    left = (*missing, *misshapen)
    _log.info(
        "warm_start.done url=%s loaded=%d missing=%d unexpected=%d", url, len(fitting), len(left), len(unexpected)
    )
    return WarmStarted(str(url), tuple(fitting), left, tuple(unexpected))


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


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def _weights(url: str, entry: str, options: dict[str, Any]) -> dict[str, Any]:
    """The source's state dict, flat, by name."""
    if url.endswith(".safetensors"):
        return dict(load_file(url, options=options))
    if url.endswith(_PICKLED):
        with reader(url, options) as file:
            return _flat(_unpickled(file, url), url)
    return _flat(_from_checkpoint(url, entry, options), f"{url} (entry {entry!r})")


def _unpickled(file: BinaryIO, url: str) -> Any:
    try:
        refuse_unpacking(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as exc:
        raise DamagedError(f"{url} is not a torch.save file that loads without running code: {exc}") from exc


def _from_checkpoint(url: str, entry: str, options: dict[str, Any]) -> Any:
    """The newest good checkpoint of a root, or the one whose folder this is."""
    path = local_path(url)
    # Without links, or the folder's parent need not be the root that it is in.
    root = url.rstrip("/") if path is None else Path(os.path.realpath(path)).as_posix()
    store, folder = open_store(root, options), None
    if store.stat(MANIFEST_NAME) is not None:
        root, _, folder = root.rpartition("/")
        store = open_store(root or "/", options)
    repository = Repository(store)
    source = Reader(repository, "fast", trust_pickle=False)
    state = read_first(
        repository,
        lambda: [info for info in repository.infos() if folder in (None, info.name)],
        lambda info: source.load(info, [entry], "cpu"),
        lambda info, exc: _log.warning("warm_start.skip.damaged step=%d cause=%s", info.step, exc),
    )
    if state is None:
        raise NotFoundError(f"no checkpoint in {url}; give a run's root, one checkpoint's folder, or a file of weights")
    return state[entry]


def _flat(value: Any, where: str) -> dict[str, Any]:
    """A state dict: its own, or the one under a name that people give it."""
    if isinstance(value, Mapping):
        for nest in _NESTS:
            if isinstance(value.get(nest), Mapping):
                return _flat(value[nest], where)
        if any(isinstance(item, torch.Tensor) for item in value.values()):
            return {str(name): item for name, item in value.items() if isinstance(item, torch.Tensor)}
        raise ConfigError(f"{where} holds no state dict of tensors; its keys are {', '.join(map(str, value))[:200]}")
    raise NotFoundError(f"{where} holds a {type(value).__name__}, not a state dict")
