"""Who is measured? Each contender behind the same few calls, as its own documentation would have it used."""

from __future__ import annotations

import importlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Protocol, cast

import fsspec
import torch

from ..manager import CheckpointManager
from ..memory import buffer, view
from . import disk
from .state import State
from .tasks import Contender, Place


class Peer(Protocol):
    """One way of saving, on its defaults, into a place of its own. Made with a `Place` and a mode.

    Whatever it raises is reported as its failure."""

    def prepare(self, state: State) -> None:
        """What a user may do ahead of the first save; not timed."""

    def save(self, state: State, step: int) -> None:
        """Begin a save; at return the training may change the state."""

    def wait(self) -> None:
        """Block until the last save is complete. The caller flushes the files to the disk."""

    def load(self, state: State, step: int) -> None:
        """Bring the live model and optimizer to the state of that step."""

    def close(self) -> None:
        """Let go of everything."""


def open_peer(contender: Contender, place: Place) -> Peer:
    """The contender at work in a place."""
    module, _, name = contender.factory.partition(":")
    return cast(Peer, getattr(importlib.import_module(module), name)(place, contender.mode))


class Ckptmgr:
    """This library, as it is by default."""

    def __init__(self, place: Place, mode: str) -> None:
        self._mode = mode
        self._manager = CheckpointManager(
            place.url, storage={"options": dict(place.options)}, background=mode != "synchronous"
        )

    def prepare(self, state: State) -> None:
        if self._mode == "prepared":
            self._manager.prepare(_objects(state))

    def save(self, state: State, step: int) -> None:
        self._manager.save(_objects(state), step)

    def wait(self) -> None:
        self._manager.wait()

    def load(self, state: State, step: int) -> None:
        self._manager.resume(state.model, state.optimizer)

    def close(self) -> None:
        self._manager.close()


class TorchSave:
    """`torch.save` into one file, `torch.load` and `load_state_dict`."""

    def __init__(self, place: Place, mode: str) -> None:
        self._place = place

    def prepare(self, state: State) -> None:
        pass

    def save(self, state: State, step: int) -> None:
        folder = self._place.below(f"step-{step}")
        if folder.path is not None:
            folder.path.mkdir(parents=True)
            torch.save(state_dicts(state), folder.path / "state.pt")
        else:
            with self._open(step, "wb") as file:
                torch.save(state_dicts(state), file)

    def wait(self) -> None:
        pass

    def load(self, state: State, step: int) -> None:
        path = self._place.below(f"step-{step}").path
        if path is not None:
            loaded = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        else:
            with self._open(step, "rb") as file:
                loaded = torch.load(file, map_location="cpu", weights_only=True)
        state.model.load_state_dict(loaded["model"])
        state.optimizer.load_state_dict(loaded["optimizer"])

    def close(self) -> None:
        pass

    def _open(self, step: int, mode: str) -> IO[bytes]:
        url = self._place.below(f"step-{step}/state.pt").url
        return cast(IO[bytes], fsspec.open(url, mode, **self._place.options))


class Ideal:
    """The least that a save in the background can do: copy the bytes into ready memory, then write that
    memory to a file in a thread. Its files hold the bytes and nothing else, and can't be loaded."""

    def __init__(self, place: Place, mode: str) -> None:
        assert place.path is not None
        self._folder: Path = place.path
        self._pool = ThreadPoolExecutor(1)
        self._saving: Future[float] | None = None
        self._arena, self._views = memoryview(b""), list[torch.Tensor]()

    def prepare(self, state: State) -> None:
        self._folder.mkdir(parents=True)
        tensors = list(state.tensors().values())
        size = disk.whole_blocks(state.size)
        if any(tensor.is_cuda for tensor in tensors):
            whole = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            self._arena = view(whole.data_ptr(), size)
        else:
            self._arena = buffer(size)
            whole = torch.frombuffer(self._arena, dtype=torch.uint8)
        whole.zero_()
        begin = 0
        for tensor in tensors:
            part = whole[begin : begin + tensor.nbytes]
            self._views.append(part.view(tensor.dtype).view(tensor.shape))
            begin += tensor.nbytes

    def save(self, state: State, step: int) -> None:
        for target, tensor in zip(self._views, state.tensors().values(), strict=True):
            target.copy_(tensor, non_blocking=True)
        if any(tensor.is_cuda for tensor in state.model.parameters()):
            torch.cuda.synchronize()
        self._saving = self._pool.submit(disk.write_whole, self._folder / f"step-{step}", self._arena)

    def wait(self) -> None:
        if self._saving is not None:
            self._saving.result()

    def load(self, state: State, step: int) -> None:
        raise NotImplementedError("holds bytes without names")

    def close(self) -> None:
        self._pool.shutdown()


def _objects(state: State) -> dict[str, Any]:
    return {"model": state.model, "optimizer": state.optimizer}


def state_dicts(state: State) -> dict[str, Any]:
    """What most contenders are given. Its tensors are the live ones."""
    return {"model": state.model.state_dict(), "optimizer": state.optimizer.state_dict()}
