"""Who else is measured beside ckptmgr? Each as its documentation has it used; `pip install -e ".[bench]"` brings them.

Left out: what can't be had beside a recent torch (Composer), what needs a GPU for every save
(nvidia-resiliency-ext), and what needs an agent in a second process and leaves its shared memory behind
when killed (dlrover).
"""

from __future__ import annotations

import importlib.util
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from ckptmgr.bench import Contender, Place
from ckptmgr.bench.peers import state_dicts
from ckptmgr.bench.state import State

_NEEDS = {
    "torch.save-plain": ("torch", ("synchronous",), "TorchSavePlain"),
    "safetensors": ("safetensors", ("synchronous",), "Safetensors"),
    "dcp-process": ("torch", ("background",), "DcpProcess"),
    "torch_checkpointing": ("torch_checkpointing", ("background",), "TorchCheckpointing"),
    "torchsnapshot": ("torchsnapshot", ("background",), "Torchsnapshot"),
    "lightning": ("lightning", ("background", "synchronous"), "Lightning"),
    "orbax": ("orbax", ("background",), "Orbax"),
}


def installed() -> dict[str, tuple[Contender, ...]]:
    """The rivals whose library is there."""
    return {
        peer: tuple(Contender(peer, mode, f"rivals:{name}") for mode in modes)
        for peer, (library, modes, name) in _NEEDS.items()
        if importlib.util.find_spec(library) is not None
    }


class _Rival:
    """What most have in common: a folder for each step, and nothing to do before or after."""

    def __init__(self, place: Place, mode: str) -> None:
        assert place.path is not None
        self._folder: Path = place.path
        self._mode = mode

    def prepare(self, state: State) -> None:
        pass

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass

    def at(self, step: int) -> Path:
        folder = self._folder / f"step-{step}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


class TorchSavePlain(_Rival):
    """`torch.save` without its checksum, `torch.load` of a mapped file."""

    def save(self, state: State, step: int) -> None:
        torch.serialization.set_crc32_options(False)
        torch.save(state_dicts(state), self.at(step) / "state.pt")

    def load(self, state: State, step: int) -> None:
        loaded = torch.load(self.at(step) / "state.pt", map_location="cpu", weights_only=True, mmap=True)
        state.model.load_state_dict(loaded["model"])
        # The optimizer would keep the mapped tensors themselves, and fault their pages in at its next step.
        for slot, found in zip(state.optimizer.state.values(), loaded["optimizer"]["state"].values(), strict=True):
            for key, tensor in found.items():
                slot[key].copy_(tensor)


class Safetensors(_Rival):
    """One file of tensors and nothing else."""

    def save(self, state: State, step: int) -> None:
        from safetensors.torch import save_file

        save_file(state.tensors(), self.at(step) / "state.safetensors")

    def load(self, state: State, step: int) -> None:
        from safetensors.torch import load_file

        loaded = load_file(self.at(step) / "state.safetensors")
        for name, tensor in state.tensors().items():
            tensor.copy_(loaded[name])


class DcpProcess(_Rival):
    """`async_save` with a `DefaultStager` and a process that writes."""

    def __init__(self, place: Place, mode: str) -> None:
        super().__init__(place, mode)
        from torch import distributed
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        if not distributed.is_initialized():  # its second process is made a group of its own by this one's
            distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
        has_device = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(has_device, True, has_device, has_device))
        self._saving: Future[Any] | None = None

    def save(self, state: State, step: int) -> None:
        from torch.distributed.checkpoint import async_save
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        begun = async_save(
            state_dicts(state),
            checkpoint_id=self.at(step),
            async_stager=self._stager,
            async_checkpointer_type=AsyncCheckpointerType.PROCESS,
            no_dist=True,
        )
        self._saving = begun if isinstance(begun, Future) else begun.upload_completion
        if not isinstance(begun, Future):
            begun.staging_completion.result()

    def wait(self) -> None:
        if self._saving is not None:
            self._saving.result()

    def load(self, state: State, step: int) -> None:
        import torch.distributed.checkpoint as dcp

        targets = state_dicts(state)
        dcp.load(targets, checkpoint_id=self.at(step), no_dist=True)
        state.optimizer.load_state_dict(targets["optimizer"])

    def close(self) -> None:
        self._stager.close()


class TorchCheckpointing(_Rival):
    """Copies in a thread, writes in a process. Its direct I/O is off, as its writes are not aligned."""

    def __init__(self, place: Place, mode: str) -> None:
        super().__init__(place, mode)
        from torch_checkpointing import CheckpointManager
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        storage = LocalFileSystemStorageConfig(use_direct_io=False)
        self._manager = CheckpointManager.Config(storage_config=storage).build()
        self._saving: Future[Any] | None = None

    def save(self, state: State, step: int) -> None:
        self._saving = self._manager.save(str(self.at(step)), state_dicts(state))
        with self._manager.lock():  # what its loops hold around optimizer.step()
            pass

    def wait(self) -> None:
        if self._saving is not None:
            self._saving.result()

    def load(self, state: State, step: int) -> None:
        loaded = self._manager.load(str(self.at(step)), into=state_dicts(state))
        state.model.load_state_dict(loaded["model"])
        state.optimizer.load_state_dict(loaded["optimizer"])

    def close(self) -> None:
        self._manager.close()


class Torchsnapshot(_Rival):
    """`Snapshot.async_take` and `restore`."""

    def save(self, state: State, step: int) -> None:
        from torchsnapshot import Snapshot

        self._pending = Snapshot.async_take(str(self.at(step)), {"model": state.model, "optimizer": state.optimizer})

    def wait(self) -> None:
        self._pending.wait()

    def load(self, state: State, step: int) -> None:
        from torchsnapshot import Snapshot

        Snapshot(str(self.at(step))).restore({"model": state.model, "optimizer": state.optimizer})


class Lightning(_Rival):
    """The plugins that its Trainer saves with, the asynchronous one in the background."""

    def __init__(self, place: Place, mode: str) -> None:
        super().__init__(place, mode)
        from lightning.fabric.plugins import TorchCheckpointIO
        from lightning.pytorch.plugins import AsyncCheckpointIO

        self._io: Any = TorchCheckpointIO()
        if mode == "background":
            self._io = AsyncCheckpointIO(self._io)

    def save(self, state: State, step: int) -> None:
        self._io.save_checkpoint(state_dicts(state), str(self.at(step) / "state.ckpt"))

    def wait(self) -> None:
        if self._mode == "background":
            self._io.teardown()  # the only call that waits

    def load(self, state: State, step: int) -> None:
        loaded = self._io.load_checkpoint(str(self.at(step) / "state.ckpt"), map_location="cpu")
        state.model.load_state_dict(loaded["model"])
        state.optimizer.load_state_dict(loaded["optimizer"])


class Orbax(_Rival):
    """`AsyncCheckpointer` on numpy views of the same memory."""

    def __init__(self, place: Place, mode: str) -> None:
        super().__init__(place, mode)
        import orbax.checkpoint as ocp

        self._saver = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())

    def save(self, state: State, step: int) -> None:
        self._saver.save(self.at(step) / "state", {name: t.cpu().numpy() for name, t in state.tensors().items()})

    def wait(self) -> None:
        self._saver.wait_until_finished()

    def load(self, state: State, step: int) -> None:
        loaded = self._saver.restore(self.at(step) / "state")
        for name, tensor in state.tensors().items():
            tensor.copy_(torch.as_tensor(loaded[name]))

    def close(self) -> None:
        self._saver.close()
