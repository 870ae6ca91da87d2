"""How are a checkpoint's tensors had without reading them? In private mappings of its files."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import DamagedError, StoreError
from ..manifest import FileEntry
from ..state.snapshot import StoredTensor
from ..store.disk import open_file


class MappedFiles:
    """The files of one checkpoint below a local folder, each mapped when it is first needed.

    A mapping lives as long as a tensor in it, also when its file is deleted meanwhile (which Windows
    refuses). What is written to it stays in this process.
    """

    def __init__(self, folder: Path, files: Mapping[str, FileEntry]) -> None:
        self._folder, self._files = folder, files
        self._maps: dict[str, mmap.mmap] = {}

    def tensor(self, stored: StoredTensor) -> torch.Tensor:
        """The tensor, contiguous; its bytes are read when they are first touched. Raises `DamagedError`
        for a file that is missing or of another size, and `StoreError` for one that can't be mapped."""
        name, begin, end = stored.location
        if begin == end:
            return torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
        if name not in self._maps:
            self._maps[name] = self._map(self._files[name])
        own = torch.frombuffer(self._maps[name], dtype=torch.uint8, count=end - begin, offset=begin)
        if own.data_ptr() % stored.dtype.itemsize:  # complex128, which files align to 8 bytes only
            own = own.clone()
        return own.view(stored.dtype).view(stored.shape)

    def _map(self, entry: FileEntry) -> mmap.mmap:
        path = self._folder / entry.name
        if any(folder.is_symlink() for folder in path.parents if folder.is_relative_to(self._folder)):
            raise StoreError(f"can't map {path}: a symbolic link is not followed below the root")
        try:
            with os.fdopen(open_file(path), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != entry.size:
                    raise DamagedError(f"{path} has {size:,} bytes, not the {entry.size:,} of the manifest")
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except FileNotFoundError as exc:
            raise DamagedError(f"{path} is missing") from exc
        except OSError as exc:
            raise StoreError(f"can't map {path}: {exc.strerror}; load it without mmap=True", exc.errno) from exc
