"""How does `torch.distributed.checkpoint` take part? In a file of its own, as the others need not import it."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import torch
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from .peers import state_dicts
from .state import State
from .tasks import Place


class Dcp:
    """Saves in one process; in the background with a `DefaultStager` that keeps its memory."""

    def __init__(self, place: Place, mode: str) -> None:
        if place.path is None:
            raise NotImplementedError("is measured on local disks only")
        self._folder = place.path
        self._stager: DefaultStager | None = None
        if mode == "background":
            has_device = torch.cuda.is_available()
            # Without shared memory, which costs a file per tensor and serves another process only.
            self._stager = DefaultStager(StagingOptions(has_device, False, has_device, has_device))
        self._saving: Future[Any] | None = None

    def prepare(self, state: State) -> None:
        pass

    def save(self, state: State, step: int) -> None:
        target = self._folder / f"step-{step}"
        if self._stager is None:
            save(state_dicts(state), checkpoint_id=target, no_dist=True)
            return
        begun = async_save(state_dicts(state), checkpoint_id=target, async_stager=self._stager, no_dist=True)
        if isinstance(begun, Future):
            self._saving = begun
        else:
            self._saving = begun.upload_completion
            begun.staging_completion.result()  # only then may the weights change

    def wait(self) -> None:
        if self._saving is not None:
            self._saving.result()

    def load(self, state: State, step: int) -> None:
        targets = state_dicts(state)  # the live tensors, which are filled in place
        load(targets, checkpoint_id=self._folder / f"step-{step}", no_dist=True)
        state.optimizer.load_state_dict(targets["optimizer"])

    def close(self) -> None:
        if self._stager is not None:
            self._stager.close()
