"""How does a snapshot become safetensors files? The default format: no pickle, any reader opens it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..staging import Held, Region, is_dense, is_special, refuse_hidden
from ..state.snapshot import FlatSnapshot, Snapshot, StoredState, map_leaves
from . import FileSink, FileSource, refuse_sharded, write_live
from .json_texts import JsonTexts
from .rank_files import rank_bodies
from .safetensors_layout import MAX_HEADER_SIZE, lay_out, portable
from .safetensors_state import SPECIAL_NAME, SafetensorsState
from .state_file import file_stems, save_torch, state_bodies

_WORTH_SHARING = 1 << 20  # bytes


class SafetensorsFormat:
    """One `<entry>.safetensors` per entry that has tensors, and `state.json` for everything else.

    An entry of more than `split_size_bytes` is split into files of at most that size (one tensor is
    never split). Large parameters that take no gradient have files of their own. Sparse, quantized and
    nested tensors go to `tensors.pt`, which `torch.load` reads with `weights_only=True`.
    """

    name = "safetensors"

    def __init__(self, split_size_bytes: int | None = None) -> None:
        self._split_size = split_size_bytes
        self._last: _SafetensorsPlan | None = None

    def plan(self, flat: FlatSnapshot) -> _SafetensorsPlan:
        """See `Format.plan`. Raises `StateMismatchError` for a meta tensor, and `ConfigError` for a sharded one."""
        if self._last is None or self._last.shape is not flat.shape:
            refuse_sharded(flat, self.name)
            self._last = _SafetensorsPlan(flat, self._split_size)
        return self._last

    def write(self, snapshot: Snapshot, sink: FileSink) -> None:
        write_live(self, snapshot, sink)

    def open(self, source: FileSource) -> StoredState:
        """Read `state.json`; no tensor is read. Raises `DamagedError` and `FormatVersionError`."""
        return SafetensorsState(source)


class _SafetensorsPlan:
    """Every tensor has its place in a file, or among the special ones."""

    def __init__(self, flat: FlatSnapshot, split_size: int | None) -> None:
        self.shape = flat.shape
        self._rows: list[list[Any]] = []
        self._special: list[int] = []
        entries = _named(flat)
        self._add_rows(flat, entries)
        self.regions = self._lay_out(flat, entries, split_size)
        self._texts = JsonTexts()

    def write(self, flat: FlatSnapshot, held: Held, sink: FileSink) -> None:
        """See `Plan.write`."""
        held.wait()
        if self._special:
            with sink.create(SPECIAL_NAME) as file:
                save_torch({str(number): held.tensor(number).detach() for number in self._special}, file)
        body = {"entries": flat.entries, "tensors": self._rows}
        beside = state_bodies(self._texts, SafetensorsFormat.name, flat, body)
        sink.write({**held.parts, **beside, **rank_bodies(flat.ranks)})

    def _add_rows(self, flat: FlatSnapshot, entries: dict[str, _EntryTensors]) -> None:
        """The row of each tensor in `state.json`; file, begin and end are filled in later."""
        keys = {number: key for own in entries.values() for key, number in own.numbers.items()}
        for number, tensor in enumerate(flat.tensors):
            key = keys[number]
            more: dict[str, Any] = {}
            if tensor.requires_grad:
                more["requires_grad"] = True
            if isinstance(tensor, torch.nn.Parameter):
                more["parameter"] = True
            file = ""
            if is_special(tensor):
                file, key = SPECIAL_NAME, str(number)
                self._special.append(number)
            elif not tensor.is_contiguous() and is_dense(tensor.shape, tensor.stride()):
                more["stride"] = tensor.stride()
            self._rows.append([file, key, _dtype_name(tensor), _shape(tensor), 0, 0, more])
        special = set(self._special)
        for own in entries.values():
            own.numbers = {key: number for key, number in own.numbers.items() if number not in special}

    def _lay_out(
        self, flat: FlatSnapshot, entries: dict[str, _EntryTensors], split_size: int | None
    ) -> dict[str, Region]:
        """Where each tensor lies in which file; fills in the rows as it goes."""
        regions: dict[str, Region] = {}
        stems = file_stems(flat.entries)
        for entry, own in entries.items():
            moving, still = _apart(own.numbers, flat)
            parts = [*_split(moving, flat, split_size), *_split(still, flat, split_size)]
            for count, part in enumerate(parts, 1):
                name = f"{stems[entry]}.safetensors"
                if len(parts) > 1:
                    name = f"{stems[entry]}-{count:05}-of-{len(parts):05}.safetensors"
                aliases = {alias: key for alias, key in own.aliases.items() if key in part and alias not in part}
                layout = lay_out(
                    [
                        (key, *portable(tensor.dtype, tensor.shape), tensor.nbytes)
                        for key, number in part.items()
                        for tensor in (flat.tensors[number],)
                    ],
                    aliases | {"format": "pt"},
                )
                numbers = [part[placed.key] for placed in layout.tensors]
                for number, placed in zip(numbers, layout.tensors, strict=True):
                    row = self._rows[number]
                    row[0], row[4], row[5] = name, placed.begin, placed.end
                size = layout.tensors[-1].end
                regions[name] = Region(size, numbers, [placed.begin for placed in layout.tensors], layout.header)
        return regions


@dataclass
class _EntryTensors:
    """The tensors that stand first in one entry: their numbers by key, and further keys of theirs there."""

    numbers: dict[str, int] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)


def _named(flat: FlatSnapshot) -> dict[str, _EntryTensors]:
    """A key for each tensor, in the entry where it stands first."""
    entries: dict[str, _EntryTensors] = {}
    first: dict[int, tuple[str, str]] = {}
    for entry, tree in flat.entries.items():
        own = entries[entry] = _EntryTensors()

        def name(leaf: Any, path: tuple[str, ...], entry: str = entry, own: _EntryTensors = own) -> Any:
            if not isinstance(leaf, dict):
                return leaf
            number, key = leaf["$tensor"], _unicode(".".join(path) or entry)
            if number in first:
                if first[number][0] == entry:
                    own.aliases.setdefault(key, first[number][1])
                return leaf
            refuse_hidden(flat.tensors[number], (entry, *path))
            base, count = key if key != "__metadata__" else "__metadata__~", 1
            key = base
            while key in own.numbers:
                count += 1
                key = f"{base}~{count}"
            own.numbers[key] = number
            first[number] = (entry, key)
            return leaf

        map_leaves(tree, name)
    return entries


def _apart(numbers: dict[str, int], flat: FlatSnapshot) -> tuple[dict[str, int], dict[str, int]]:
    """The tensors that training changes, and those that it does not where they are worth a file of their
    own: one that every further checkpoint can share."""
    still = {key: number for key, number in numbers.items() if number in flat.still}
    if sum(flat.tensors[number].nbytes for number in still.values()) < _WORTH_SHARING:
        return numbers, {}
    return {key: number for key, number in numbers.items() if key not in still}, still


def _split(numbers: dict[str, int], flat: FlatSnapshot, split_size: int | None) -> list[dict[str, int]]:
    """The tensors of an entry in parts, each of at most `split_size` bytes and one header, or of one tensor."""
    parts: list[dict[str, int]] = []
    size = header = 0
    for key, number in numbers.items():
        tensor = flat.tensors[number]
        own_size = tensor.nbytes
        own_header = 6 * len(key) + 22 * tensor.dim() + 128
        too_large = split_size is not None and size + own_size > split_size
        if not parts or too_large or header + own_header > MAX_HEADER_SIZE // 2:
            parts.append({})
            size = header = 0
        parts[-1][key] = number
        size += own_size
        header += own_header
    return parts


def _unicode(text: str) -> str:
    """The text without the half characters (lone surrogates) that JSON readers in other languages refuse."""
    return text.encode("utf-8", "backslashreplace").decode()


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _shape(tensor: torch.Tensor) -> list[int]:
    return [tensor.size(0)] if tensor.is_nested else list(tensor.shape)
