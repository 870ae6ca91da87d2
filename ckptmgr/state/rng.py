"""Where do this process's random generators stand, and how do they get back there?

Python's, NumPy's global one where NumPy is in use, torch's on the CPU and on every device in use.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import random
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import DamagedError
from .codec import decode, encode, to_json
from .numpy_tags import check_place
from .snapshot import Tree


@dataclass(frozen=True, slots=True)
class RngReport:
    """Which generators go on where they were saved, and which do not, each with the reason. Those in `derived`
    begin anew, each rank's elsewhere, from what the checkpoint holds; torch's with those of its devices."""

    restored: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()


def capture_rng() -> Tree:
    """The tree of all generators of this process. Starts no device that is not yet in use."""
    return encode(generators(), path="rng")


def generators() -> dict[str, Any]:
    """The states of all generators of this process, by name, for `put_back` and `encode`."""
    state: dict[str, Any] = {"python": _packed(random.getstate()), "torch": torch.get_rng_state()}
    if numpy := sys.modules.get("numpy"):
        state["numpy"] = numpy.random.get_state(legacy=False)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.xpu.is_initialized():  # type: ignore[no-untyped-call]
        state["xpu"] = torch.xpu.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def put_back(states: dict[str, Any]) -> None:
    """Undo what was drawn since `generators` gave these states."""
    for name, state in states.items():
        _put_back(name, state, [], [])


def derive_rng(tree: Tree, step: int, rank: int) -> RngReport:
    """Start every generator in use anew, from a captured tree, a step and a rank: the same for the same
    of all three, and another for another of any."""
    origin = hashlib.sha256(json.dumps(to_json(tree), sort_keys=True).encode()).hexdigest()

    def seed(name: str) -> bytes:
        return hashlib.sha256(f"{origin}/{step}/{rank}/{name}".encode()).digest()

    random.seed(seed("python"))
    torch.manual_seed(int.from_bytes(seed("torch")[:8], "little"))
    derived = ["python", "torch"]
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(struct.unpack("<8I", seed("numpy")))
        derived.append("numpy")
    return RngReport(derived=tuple(derived))


def restore_rng(tree: Tree) -> RngReport:
    """Put the generators back. Those without their device or library here are skipped and reported.

    Raises `DamagedError` for a tree that `capture_rng` did not make.
    """
    if not isinstance(tree, dict):
        raise DamagedError("the random generators' state is not a mapping")
    restored: list[str] = []
    skipped: list[str] = []
    for name, saved in tree.items():
        if reason := _absent(name):
            skipped.append(f"{name}: {reason}")
            continue
        try:
            _put_back(name, decode(saved, path=f"rng.{name}"), restored, skipped)
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, OverflowError, struct.error) as exc:
            raise DamagedError(f"the state of random generator {name!r} can't be put back: {exc!r}") from exc
    return RngReport(tuple(restored), tuple(skipped))


def _put_back(name: str, state: Any, restored: list[str], skipped: list[str]) -> None:
    if name in ("cuda", "xpu"):
        backend = torch.cuda if name == "cuda" else torch.xpu
        _restore_devices(name, state, backend.device_count(), backend.set_rng_state, restored, skipped)
    else:
        _SETTERS[name](state)
        restored.append(name)


def _packed(state: tuple[Any, ...]) -> dict[str, Any]:
    """Python's state of 625 numbers in few values: it is written at every save."""
    version, words, gauss = state
    return {"version": version, "words": struct.pack(f"<{len(words)}I", *words), "gauss": gauss}


def _set_python(state: Any) -> None:
    if isinstance(state, dict):
        words = state["words"]
        state = (state["version"], struct.unpack(f"<{len(words) // 4}I", words), state["gauss"])
    random.setstate(state)  # a tuple as it is: as first versions wrote it


def _set_numpy(state: Any) -> None:
    check_place(state if isinstance(state, dict) else {"bit_generator": state[0], "state": {"pos": state[2]}})
    importlib.import_module("numpy").random.set_state(state)


_SETTERS: dict[str, Callable[[Any], None]] = {
    "python": _set_python,
    "torch": torch.set_rng_state,
    "numpy": _set_numpy,
    "mps": lambda state: torch.mps.set_rng_state(state),
}


def _absent(name: str) -> str | None:
    """Why a generator can't be put back here, or None."""
    if name == "numpy":
        try:
            importlib.import_module("numpy")
        except ImportError:
            return "not installed here"
    if name == "mps" and not torch.backends.mps.is_available():
        return "no such device here"
    return None if name in (*_SETTERS, "cuda", "xpu") else "not known to this version of ckptmgr"


def _restore_devices(
    name: str,
    states: list[torch.Tensor],
    count: int,
    put_back: Callable[[torch.Tensor, int], None],
    restored: list[str],
    skipped: list[str],
) -> None:
    for index, state in enumerate(states):
        if index < count:
            put_back(state, index)
            restored.append(f"{name}:{index}")
        else:
            skipped.append(f"{name}:{index}: no such device here")
