"""Which entries does a checkpoint's state have, and how large are they? Read without torch.

The formats tell, but they import torch; `state.json` is JSON, and says enough for a summary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import DamagedError
from ..manifest import CheckpointInfo, FileEntry
from ..source import Source
from ..store import Store

STATE_NAME = "state.json"


@dataclass(frozen=True, slots=True)
class EntrySummary:
    """One entry of a state. `tensors` and `size` (bytes) are None where the format does not tell without torch."""

    name: str
    tensors: int | None
    size: int | None


def entries_of(store: Store, info: CheckpointInfo) -> list[EntrySummary] | None:
    """The entries of a checkpoint, or None where they can't be told. Blocks; raises `StoreError`."""
    if info.manifest is None:
        return None
    source = Source(store, info.name, info.manifest)
    if STATE_NAME not in source.files:
        return None
    try:
        body = json.loads(source.read(STATE_NAME))
        if "tensors" in body:
            return [_of_rows(name, tree, body["tensors"]) for name, tree in body["entries"].items()]
        return [_of_file(name, file, source.files) for name, file in body["files"].items()]
    # Another format's file, or one that a newer version wrote; damage is told by verifying.
    except (DamagedError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return None


def _of_rows(name: str, tree: Any, rows: list[list[Any]]) -> EntrySummary:
    """An entry whose tensors are rows of a table: file, key, dtype, shape, begin, end, more."""
    found = set(_rows_in(tree))
    sizes = [rows[row][5] - rows[row][4] for row in found]
    # Sparse and quantized tensors lie in a pickle of torch's: begin and end are 0 for them.
    is_known = all(str(rows[row][0]).endswith(".safetensors") for row in found)
    return EntrySummary(name, len(found), sum(sizes) if is_known else None)


def _rows_in(tree: Any) -> Iterator[int]:
    """The row of each tensor in a tree, as often as it stands there."""
    if isinstance(tree, dict) and tree.keys() == {"$tensor"}:
        yield tree["$tensor"]
    elif isinstance(tree, dict | list):
        for inner in tree.values() if isinstance(tree, dict) else tree:
            yield from _rows_in(inner)


def _of_file(name: str, file: str, files: Mapping[str, FileEntry]) -> EntrySummary:
    """An entry that is one file."""
    return EntrySummary(name, None, files[file].size)
