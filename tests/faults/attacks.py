"""Which attacks are there? Each changes a forged root; the kind of checkpoint that it needs stands beside it."""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import shutil
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from faults.forgery import SECRET, Forged, Trap, entry, sealed

Attack = Callable[[Forged], object]
_ATTACKS: list[tuple[Attack, tuple[str, ...]]] = []


def on(format: str) -> list[Attack]:
    """The attacks on a checkpoint in this format."""
    return [attack for attack, formats in _ATTACKS if format in formats]


def attack(*formats: str) -> Callable[[Attack], Attack]:
    def add(function: Attack) -> Attack:
        _ATTACKS.append((function, formats or ("safetensors",)))
        return function

    return add


def each(template: Callable[[Forged, Any], object], cases: dict[str, Any], *formats: str) -> None:
    """An attack for every case."""
    for name, case in cases.items():

        def one(forged: Forged, case: Any = case) -> object:
            return template(forged, case)

        one.__name__ = f"{template.__name__} {name}"
        attack(*formats)(one)


ALL = ("safetensors", "torch", "dcp")
DEEP = b"[" * 100_000 + b"]" * 100_000
LONG = b'{"format_version":' + b"9" * 5000 + b"}"

# Names


def file_named(forged: Forged, name: str) -> None:
    files = forged.manifest["files"]
    forged.seal(files=[entry(name, SECRET), *files])


each(
    file_named,
    {
        "up": "../../outside/secret",
        "up in the middle": "ranks/../../../outside/secret",
        "absolute": "/etc/passwd",
        "home": "~/secret",
        "dots": "..",
        "dot": ".",
        "three dots": ".../x",
        "empty": "",
        "empty part": "a//b",
        "drive": "C:\\Windows\\win.ini",
        "drive relative": "C:x",
        "backslashes": "..\\..\\outside\\secret",
        "share": "\\\\server\\share",
        "stream": "model.safetensors:stream",
        "nul": "a\0b",
        "newline": "a\nb",
        "escape": "\x1b]0;owned\x07",
        "lone surrogate": "\ud800",
        "right to left": "\u202efdp.exe",
        "fullwidth dots": "\uff0e\uff0e/secret",
        "trailing newline": "model.safetensors\n",
        "long": "a" * 5000,
        "deep": "/".join("a" * 3000),
        "the manifest": "manifest.json",
        "a number": 7,
        "null": None,
        "a list": ["a"],
    },
)


def nonce(forged: Forged, value: Any) -> None:
    forged.seal(nonce=value)


each(nonce, {"up": "../../../outside", "slash": "a/b", "nul": "a\0b", "empty": "", "long": "a" * 500, "null": None})


def field(forged: Forged, change: dict[str, Any]) -> None:
    forged.seal(**change)


each(
    field,
    {
        "time before time": {"time": "0001-01-01T00:00:00"},
        "time behind time": {"time": "9999-12-31T23:59:59+00:00"},
        "time far west": {"time": "0001-01-01T00:00:00+23:59"},
        "time without zone": {"time": "2026-01-01T00:00:00"},
        "time of no text": {"time": 5},
        "huge metric": {"metrics": {"loss": 10**400}},
        "endless metric": {"metrics": {"loss": 1e999}},
        "metric of no number": {"metrics": {"loss": {}}},
        "metric with an escape": {"metrics": {"\x1b[2J": 1.0}},
        "huge step": {"step": 10**4000},
        "negative step": {"step": -1},
        "true step": {"step": True},
        "fraction of a step": {"step": 1.5},
        "endless step": {"step": 1e999},
        "huge epoch": {"epoch": 10**4000},
        "huge attempt": {"attempt": 10**4000},
        "huge parent": {"parent": 10**4000},
        "many ranks": {"world_size": 10**12},
        "no ranks": {"world_size": 0},
        "version 0": {"format_version": 0},
        "negative version": {"format_version": -1},
        "true version": {"format_version": True},
        "format of a module": {"format": "os:system"},
        "format up": {"format": "../../outside/secret"},
        "another format": {"format": "torch"},
        "yet another format": {"format": "dcp"},
        "files of no list": {"files": {"a": 1}},
        "files of texts": {"files": ["model.safetensors"]},
        "no files": {"files": []},
        "run with an escape": {"run": "\x1b[31m\n../../outside"},
        "tags with an escape": {"tags": ["\x1b[31m", "latest", "../x"]},
        "tags of one text": {"tags": "latest"},
        "versions of no texts": {"versions": {"torch": {"a": [1]}}},
        "versions of no mapping": {"versions": 7},
        "digest of another kind": {"digest_algorithm": "none"},
        "pieces of no size": {"piece_size": 0},
    },
)


def manifest_bytes(forged: Forged, data: bytes) -> None:
    (forged.folder / "manifest.json").write_bytes(data)


each(
    manifest_bytes,
    {
        "empty": b"",
        "deep": DEEP,
        "deep within": b'{"format_version":2,"files":' + DEEP + b"}",
        "long number": LONG,
        "nan": b'{"format_version":NaN}',
        "utf-16": '{"format_version": 2}'.encode("utf-16"),
        "pickle": pickle.dumps({"format_version": 2}),
        "a list": b"[]",
        "twice a key": b'{"format_version":99,"format_version":2}',
    },
)


@attack()
def manifest_that_is_a_pickle(forged: Forged) -> None:
    (forged.folder / "manifest.json").write_bytes(pickle.dumps(Trap(forged.outside / "sprung")))


@attack()
def manifest_of_a_terabyte(forged: Forged) -> None:
    os.truncate(forged.folder / "manifest.json", 1 << 40)


@attack()
def many_files(forged: Forged) -> None:
    row = entry("model.safetensors", b"")
    forged.seal(files=[row | {"name": f"f{number}"} for number in range(20_000)])


@attack(*ALL)
def one_file_twice(forged: Forged) -> None:
    files = forged.manifest["files"]
    forged.seal(files=[*files, files[0] | {"size": 1}])


def size(forged: Forged, value: Any) -> None:
    files = forged.manifest["files"]
    forged.seal(files=[files[0] | {"size": value}, *files[1:]])


each(size, {"2^62": 1 << 62, "2^63": 1 << 63, "10^4000": 10**4000, "negative": -1, "text": "7", "null": None})


# What stands in the place of a file


def instead(name: str) -> None:
    """Other things in the place of one file of a checkpoint."""

    def path(forged: Forged) -> Path:
        found = forged.folder / name
        found.unlink()
        return found

    @attack()
    def link(forged: Forged) -> None:
        forged.secret.write_bytes((forged.folder / name).read_bytes())
        path(forged).symlink_to(forged.secret)

    @attack()
    def fifo(forged: Forged) -> None:
        os.mkfifo(path(forged))

    @attack()
    def endless_zeros(forged: Forged) -> None:
        path(forged).symlink_to("/dev/zero")

    @attack()
    def folder(forged: Forged) -> None:
        path(forged).mkdir()

    @attack()
    def server(forged: Forged) -> None:
        with socket.socket(socket.AF_UNIX) as made:
            here = Path.cwd()
            os.chdir(forged.folder)  # a socket's path is a short one
            try:
                path(forged)
                made.bind(name)
            finally:
                os.chdir(here)

    @attack()
    def hard_link(forged: Forged) -> None:
        forged.secret.write_bytes((forged.folder / name).read_bytes())
        path(forged).hardlink_to(forged.secret)

    for one in (link, fifo, endless_zeros, folder, server, hard_link):
        one.__name__ = f"{one.__name__} for {name}"


instead("manifest.json")
instead("state.json")
instead("model.safetensors")


@attack(*ALL)
def folder_that_is_a_link(forged: Forged) -> None:
    shutil.rmtree(forged.outside / "folder")
    forged.folder.rename(forged.outside / "folder")
    forged.folder.symlink_to(forged.outside / "folder")


@attack(*ALL)
def ranks_that_are_a_link(forged: Forged) -> None:
    shutil.rmtree(forged.outside / "folder")
    (forged.folder / "ranks").rename(forged.outside / "folder")
    (forged.folder / "ranks").symlink_to(forged.outside / "folder")


# Pickles


def _trap(forged: Forged) -> Trap:
    return Trap(forged.outside / "sprung")


def _archive(forged: Forged) -> bytes:
    buffer = io.BytesIO()
    torch.save(_trap(forged), buffer)
    return buffer.getvalue()


def pickle_in(forged: Forged, name: str) -> None:
    forged.put(name, pickle.dumps(_trap(forged)))


def archive_in(forged: Forged, name: str) -> None:
    forged.put(name, _archive(forged))


for _make in (pickle_in, archive_in):
    each(_make, {name: name for name in ("state.json", "ranks/rank-00000.json")}, *ALL)
    each(_make, {name: name for name in ("tensors.pt", "objects.pt", "ranks/rank-00000.pt")})
    each(_make, {name: name for name in ("model.pt", "extra.pt", "objects.pt")}, "torch")
    each(_make, {name: name for name in (".metadata", "shards.json", "__0_0.distcp", "values.distcp")}, "dcp")


@attack(*ALL)
def pickled_object_asked_for(forged: Forged) -> None:
    forged.put("objects.pt", _archive(forged))
    if "entries" in json.loads((forged.folder / "state.json").read_bytes()):
        forged.tree({"$object": "extra"})


@attack("torch")
def pickle_within_an_archive(forged: Forged) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2), "b": _trap(forged)}, buffer)
    forged.put("model.pt", buffer.getvalue())


@attack("torch")
def torchscript(forged: Forged) -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(buffer.getvalue())) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
        new.writestr(f"{old.namelist()[0].split('/')[0]}/constants.pkl", pickle.dumps(_trap(forged)))
    forged.put("model.pt", out.getvalue())


@attack("torch")
def old_style_pickle(forged: Forged) -> None:
    buffer = io.BytesIO()
    torch.save({"b": _trap(forged)}, buffer, _use_new_zipfile_serialization=False)
    forged.put("model.pt", buffer.getvalue())


# Bombs


def _deflated(data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return out.getvalue()


def deflated_zeros(count: int) -> bytes:
    buffer = io.BytesIO()
    torch.save({"0": torch.zeros(count, dtype=torch.uint8)}, buffer)
    return _deflated(buffer.getvalue())


@attack("torch")
def archive_that_unpacks_to_more(forged: Forged) -> None:
    forged.put("extra.pt", deflated_zeros(1 << 22))


@attack()
def special_tensors_that_unpack_to_more(forged: Forged) -> None:
    forged.put("tensors.pt", deflated_zeros(1 << 22))


@attack("torch")
def lists_that_hold_lists_many_times(forged: Forged) -> None:
    value: Any = [0]
    for _ in range(40):
        value = [value] * 10
    buffer = io.BytesIO()
    torch.save(value, buffer)
    forged.put("extra.pt", buffer.getvalue())


@attack("torch")
def tuples_that_hold_tuples_many_times(forged: Forged) -> None:
    value: Any = (0,)
    for _ in range(40):
        value = (value,) * 10
    buffer = io.BytesIO()
    torch.save(value, buffer)
    forged.put("extra.pt", buffer.getvalue())


@attack("torch")
def tensor_of_one_number_that_claims_many(forged: Forged) -> None:
    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(1).expand(1 << 40)}, buffer)
    forged.put("extra.pt", buffer.getvalue())


class _Call:
    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def claims(forged: Forged, made: Any) -> None:
    buffer = io.BytesIO()
    torch.save({"w": made}, buffer)
    forged.put("extra.pt", buffer.getvalue())


each(
    claims,
    {
        "a terabyte of bytes": _Call(bytearray, 1 << 40),
        "a terabyte of storage": _Call(torch.UntypedStorage, 1 << 40),
        "a huge tensor": _Call(
            torch._utils._rebuild_tensor_v2, torch.zeros(1).untyped_storage(), 0, (1 << 38,), (1,), False, {}
        ),
        "a negative shape": _Call(
            torch._utils._rebuild_tensor_v2, torch.zeros(1).untyped_storage(), 0, (-5,), (1,), False, {}
        ),
        "a far offset": _Call(
            torch._utils._rebuild_tensor_v2, torch.zeros(1).untyped_storage(), 1 << 60, (1,), (1,), False, {}
        ),
    },
    "torch",
)


def _sparse() -> bytes:
    far = torch.sparse_coo_tensor(torch.tensor([[0, 10**9], [0, 0]]), torch.ones(2), (3, 3), check_invariants=False)
    buffer = io.BytesIO()
    torch.save({"0": far, "1": far, "2": far, "3": far, "4": far, "5": far, "6": far, "7": far, "8": far}, buffer)
    return buffer.getvalue()


@attack()
def sparse_tensor_with_a_far_index(forged: Forged) -> None:
    forged.put("tensors.pt", _sparse())


@attack("torch")
def sparse_tensor_with_a_far_index_in_an_archive(forged: Forged) -> None:
    forged.put("extra.pt", _sparse())


@attack(*ALL)
def json_of_half_a_gigabyte(forged: Forged) -> None:
    forged.sparse("state.json", 1 << 29)


@attack(*ALL)
def json_of_a_terabyte(forged: Forged) -> None:
    forged.sparse("state.json", 1 << 35)


@attack()
def rank_of_a_terabyte(forged: Forged) -> None:
    forged.sparse("ranks/rank-00000.json", 1 << 35)


@attack()
def objects_of_a_rank_of_a_terabyte(forged: Forged) -> None:
    forged.sparse("ranks/rank-00000.pt", 1 << 35)


@attack()
def tensors_of_a_terabyte(forged: Forged) -> None:
    forged.sparse("tensors.pt", 1 << 35)


@attack()
def terabyte_of_zeros(forged: Forged) -> None:
    """A file without a byte on the disk, and a tensor as large."""
    forged.sparse("extra.safetensors", 1 << 40)

    def claim(body: dict[str, Any]) -> None:
        body["tensors"].append(["extra.safetensors", "x", "uint8", [(1 << 40) - 8], 8, 1 << 40, {}])
        body["entries"]["extra"] = {"$tensor": len(body["tensors"]) - 1}

    forged.state(claim)


def rest(forged: Forged, data: bytes) -> None:
    for name in ("state.json", "ranks/rank-00000.json"):
        forged.put(name, data)


each(rest, {"empty": b"", "deep": DEEP, "long number": LONG, "list": b"[1]", "utf-16": "{}".encode("utf-16")}, *ALL)


def deep_tree(forged: Forged, depth: int) -> None:
    tree: Any = 1
    for _ in range(depth):
        tree = [tree]
    forged.tree(tree)


each(deep_tree, {str(depth): depth for depth in (70, 300, 600, 900)}, "safetensors", "dcp")


# state.json


def tree(forged: Forged, tree: Any) -> None:
    forged.tree(tree)


_TEXT = base64.b64encode(SECRET).decode()
each(
    tree,
    {
        "unknown tag": {"$system": "id"},
        "fraction of a text": {"$fraction": ["1e99999999"]},
        "fraction of texts": {"$fraction": ["1", "2"]},
        "decimal": {"$decimal": "1E+99999999999999999999"},
        "zone up": {"$zoneinfo": "../../outside/secret"},
        "zone absolute": {"$zoneinfo": "/etc/passwd"},
        "zone of a folder": {"$zoneinfo": "America"},
        "zone of no text": {"$zoneinfo": 5},
        "huge array of nothing": {"$raw_array": "<U4", "shape": [1 << 28], "data": None},
        "array of objects": {"$raw_array": "|O", "shape": [1], "data": None},
        "scalar of objects": {"$scalar": "|O", "data": _TEXT},
        "dtype of objects": {"$np_dtype": [["a", "|O"]]},
        "dtype of a module": {"$dtype": "_inductor"},
        "dtype of a function": {"$dtype": "load"},
        "dtype with a dot": {"$dtype": "os.system"},
        "layout of no text": {"$layout": 5},
        "huge meta": {"$meta": [1 << 40, 1 << 40], "dtype": "float32"},
        "meta with more": {"$meta": [1], "dtype": "float32", "out": 1},
        "huge size": {"$size": [10**30]},
        "size of texts": {"$size": ["a"]},
        "class of os": {"$dataclass": "os:stat_result", "fields": {}},
        "class of a function": {"$dataclass": "os:system", "fields": {}},
        "class not there": {"$dataclass": "this:that", "fields": {}},
        "class of the standard library": {"$dataclass": "subprocess:Popen", "fields": {"args": "id"}},
        "class without a colon": {"$enum": "os", "names": []},
        "class of dots": {"$enum": "os:path.join.__globals__", "names": ["x"]},
        "enum without a name": {"$enum": "socket:AddressFamily", "names": ["NOPE"]},
        "enum of no names": {"$enum": "socket:AddressFamily", "names": 5},
        "named tuple of nothing": {"$namedtuple": "shutil:_ntuple_diskusage", "names": [], "values": []},
        "namespace of odd names": {"$namespace": {"__class__": 1, "__dict__": 2}},
        "twice a key": {"$dict": [[1, 2], [1, 3]]},
        "unhashable key": {"$dict": [[[1], 2]]},
        "pairs of three": {"$dict": [[1, 2, 3]]},
        "unhashable item": {"$set": [[1]]},
        "bytes of no base64": {"$bytes": "!!"},
        "number of no digits": {"$int": "import os"},
        "time of nothing": {"$datetime": "now", "fold": 0, "tz": None},
        "zone far off": {"$timezone": [{"$timedelta": [9, 0, 0]}, "x"]},
        "endless complex": {"$complex": [1e999, {"$float": "nan"}]},
        "path with nul": {"$path": "a\0b", "kind": "Path"},
        "path of another kind": {"$path": "a", "kind": "system"},
        "generator of a device": {"$generator": "cuda:99", "state": ""},
        "generator of nothing": {"$generator": "cpu", "state": _TEXT},
        "tag with more": {"$tuple": [], "x": 1},
        "tensor out of range": {"$tensor": 10**9},
        "tensor below range": {"$tensor": -1},
        "tensor of a text": {"$tensor": "0"},
        "inline in a shared tree": {"$inline": "AAAA", "dtype": "float32", "shape": [1]},
        "generator out of its words": {
            "$np_generator": {
                "bit_generator": "MT19937",
                "state": {"key": {"$array": {"$tensor": 0}}, "pos": 10**7},
            }
        },
        "generator out of its buffer": {
            "$np_generator": {
                "bit_generator": "Philox",
                "state": {"counter": {"$raw_array": "<u8", "shape": [0], "data": None}, "key": [1, 2]},
                "buffer": [1, 2, 3, 4], "buffer_pos": -(10**8), "has_uint32": 0, "uinteger": 0,
            }
        },
        "generator of another kind": {"$np_generator": {"bit_generator": "os"}},
        "config": {"$omegaconf": {"a": "${oc.env:HOME}"}, "flags": ["allow_objects"]},
        "empty tag": {"$": 1},
        "table": [{"a": 1}] * 10_000,
    },
)  # fmt: skip


def table(forged: Forged, row: list[Any]) -> None:
    """A row of the table of tensors, for what the entry `extra` is."""

    def change(body: dict[str, Any]) -> None:
        body["tensors"].append(row)
        body["entries"]["extra"] = {"$tensor": len(body["tensors"]) - 1}

    forged.state(change)


_FILE = "model.safetensors"
each(
    table,
    {
        "negative begin": [_FILE, "x", "uint8", [8], -8, 0, {}],
        "in the header's length": [_FILE, "x", "uint8", [8], 0, 8, {}],
        "behind the end": [_FILE, "x", "uint8", [8], 1 << 40, (1 << 40) + 8, {}],
        "end before begin": [_FILE, "x", "uint8", [0], 16, 8, {}],
        "product that overflows": [_FILE, "x", "uint8", [1 << 32, 1 << 32], 8, 8, {}],
        "overflow beside a zero": [_FILE, "x", "uint8", [0, 1 << 62, 1 << 62], 8, 8, {}],
        "negative sizes": [_FILE, "x", "uint8", [-2, -4], 8, 16, {}],
        "many dimensions": [_FILE, "x", "uint8", [1] * 1000, 8, 9, {}],
        "true sizes": [_FILE, "x", "uint8", [True], 8, 9, {}],
        "fraction of a begin": [_FILE, "x", "uint8", [8], 8.0, 16, {}],
        "huge begin": [_FILE, "x", "uint8", [8], 10**30, 10**30 + 8, {}],
        "strides to elsewhere": [_FILE, "x", "uint8", [2, 4], 8, 16, {"stride": [1 << 40, 1]}],
        "negative strides": [_FILE, "x", "uint8", [8], 8, 16, {"stride": [-1]}],
        "strides of nothing": [_FILE, "x", "uint8", [8], 8, 16, {"stride": []}],
        "dtype of a function": [_FILE, "x", "load", [8], 8, 16, {}],
        "dtype of a module": [_FILE, "x", "_inductor", [8], 8, 16, {}],
        "dtype of no text": [_FILE, "x", 5, [8], 8, 16, {}],
        "quantized": [_FILE, "x", "qint8", [8], 8, 16, {}],
        "a file outside": ["../../outside/secret", "x", "uint8", [8], 8, 16, {}],
        "an absolute file": ["/etc/passwd", "x", "uint8", [8], 8, 16, {}],
        "the manifest": ["manifest.json", "x", "uint8", [8], 8, 16, {}],
        "not aligned": [_FILE, "x", "float64", [1], 9, 17, {}],
        "special that is not there": ["tensors.pt", "99", "float32", [1], 0, 0, {}],
        "special of a list": ["tensors.pt", [1], "float32", [1], 0, 0, {}],
        "special of another shape": ["tensors.pt", "0", "float32", [1 << 40], 0, 0, {}],
        "short": [_FILE, "x"],
        "a text": "model",
        "more of a text": [_FILE, "x", "uint8", [8], 8, 16, "more"],
    },
)


@attack()
def two_tensors_in_the_same_bytes(forged: Forged) -> None:
    def change(body: dict[str, Any]) -> None:
        row = next(row for row in body["tensors"] if row[0] == _FILE)
        body["tensors"].append([row[0], "x", "uint8", [row[5] - row[4]], row[4], row[5], {}])
        body["entries"]["extra"] = {"$tensor": len(body["tensors"]) - 1}

    forged.state(change)


def body(forged: Forged, change: dict[str, Any]) -> None:
    forged.state(lambda body: body.update(change))


each(
    body,
    {
        "notes of a list": {"notes": []},
        "notes of texts": {"notes": {"model": "x", "optimizer": 5}},
        "notes of numbers": {"notes": {"model": {"kind": 7}, "optimizer": {"names": 7, "groups": "x"}}},
        "entries of a list": {"entries": []},
        "entries of numbers": {"entries": {"model": 7, "extra": 1}},
        "entry of another kind": {"entries": {"model": [1, 2]}},
        "no entries": {"entries": {}},
        "tensors of a mapping": {"tensors": {}},
        "newer": {"format_version": 10**30},
        "version of a text": {"format_version": "1"},
        "odd entry": {"entries": {"../../outside": 1, "\x1b[2J": 2, "": 3}},
        "files outside": {"files": {"model": "../../outside/secret"}},
        "files of numbers": {"files": {"model": 7}},
        "ties of texts": {"ties": ["x"]},
        "ties out of range": {"ties": [["model", 99, "model", 98]]},
        "ties below range": {"ties": [["model", -1, "optimizer", -1]]},
        "ties without end": {"ties": [["model", 0, "model", 10**30]]},
    },
    *ALL,
)


# Random generators


def rng(forged: Forged, change: dict[str, Any]) -> None:
    forged.edit("ranks/rank-00000.json", lambda body: body["rng"].update(change))


def _words(count: int) -> dict[str, Any]:
    return {"$array": {"$inline": base64.b64encode(bytes(4 * count)).decode(), "dtype": "uint32", "shape": [count]}}


def _numpy(pos: Any, key: Any = None) -> dict[str, Any]:
    inner = {"key": _words(624) if key is None else key, "pos": pos}
    return {"bit_generator": "MT19937", "state": inner, "has_gauss": 0, "gauss": 0.0}


each(
    rng,
    {
        "numpy beyond its words": {"numpy": _numpy(10**7)},
        "numpy before its words": {"numpy": _numpy(-(10**7))},
        "numpy of few words": {"numpy": _numpy(0, _words(3))},
        "numpy of no words": {"numpy": _numpy(0, [])},
        "numpy of another kind": {"numpy": {"bit_generator": "PCG64"}},
        "numpy of a text": {"numpy": "x"},
        "python of few words": {"python": [3, [1, 2, 3], None]},
        "python of no version": {"python": {"version": 99, "words": {"$bytes": "AAAA"}, "gauss": None}},
        "torch of few bytes": {"torch": {"$inline": "AAAA", "dtype": "uint8", "shape": [3]}},
        "torch of zeros": {
            "torch": {"$inline": base64.b64encode(bytes(5056)).decode(), "dtype": "uint8", "shape": [5056]}
        },
        "torch of a text": {"torch": "x"},
        "inline of another size": {"torch": {"$inline": "AAAA", "dtype": "uint8", "shape": [1 << 40]}},
        "inline of a module": {"torch": {"$inline": "AAAA", "dtype": "_inductor", "shape": [3]}},
        "devices that are not there": {"cuda": [{"$inline": "AAAA", "dtype": "uint8", "shape": [3]}]},
        "unknown": {"os": "system"},
    },
    *ALL,
)


# shards.json


def chunks(forged: Forged, make: Callable[[str, int], Any]) -> None:
    def change(body: dict[str, Any]) -> None:
        for row in body["tensors"].values():
            if row["shape"] == [2, 3]:
                row["chunks"] = make(row["chunks"][0][2], row["chunks"][0][3])

    forged.edit("shards.json", change)


each(
    chunks,
    {
        "twice the same half": lambda file, at: [[[0, 0], [1, 3], file, at], [[0, 0], [1, 3], file, at]],
        "overlapping": lambda file, at: [[[0, 0], [2, 2], file, at], [[0, 1], [1, 2], file, at]],
        "none": lambda file, at: [],
        "negative": lambda file, at: [[[-1, 0], [2, 3], file, at]],
        "outside the tensor": lambda file, at: [[[1, 0], [2, 3], file, at]],
        "behind the file": lambda file, at: [[[0, 0], [2, 3], file, 1 << 40]],
        "before the file": lambda file, at: [[[0, 0], [2, 3], file, -8]],
        "in another file": lambda file, at: [[[0, 0], [2, 3], "../../outside/secret", 0]],
        "of one dimension": lambda file, at: [[[0], [6], file, at]],
        "of no elements": lambda file, at: [[[0, 0], [0, 3], file, at], [[0, 0], [2, 3], file, at]],
        "many of no elements": lambda file, at: [[[0, 0], [0, 3], file, at]] * 5000,
        "of texts": lambda file, at: ["x"],
    },
    "dcp",
)


def index(forged: Forged, change: dict[str, Any]) -> None:
    forged.edit("shards.json", lambda body: body.update(change))


each(
    index,
    {
        "values outside": {"values": {"x": ["../../outside/secret", 0, 5]}},
        "values of a terabyte": {"values": {"x": ["values.distcp", 0, 1 << 40]}},
        "paths of numbers": {"paths": {"x": 5}},
        "no tensors": {"tensors": {}},
        "tensors of texts": {"tensors": {"x": "y"}},
    },
    "dcp",
)


# Records beside the checkpoints


def tombstone(forged: Forged, case: tuple[str, list[str]]) -> None:
    (forged.root / "step-00000009").mkdir()
    (forged.root / "step-00000009" / "other").write_bytes(b"")  # a folder that becomes empty goes
    forged.tombstone(*case)


each(
    tombstone,
    {
        "outside": ("..", ["outside/secret"]),
        "up": ("../outside", ["secret"]),
        "of three dots": ("...", ["secret"]),
        "of the records": (".ckptmgr", ["lock", "pins/x"]),
        "files up": ("step-00000009", ["../../outside/secret"]),
        "files absolute": ("step-00000009", ["/etc/passwd"]),
        "of another's manifest": ("step-00000001", ["manifest.json"]),
        "of another's data": ("step-00000001", ["model.safetensors", "state.json"]),
        "with an escape": ("step\x1b[2J", ["x"]),
        "with a backslash": ("..\\outside", ["secret"]),
        "with a colon": ("C:x", ["secret"]),
    },
)


@attack()
def tombstone_through_a_link(forged: Forged) -> None:
    (forged.root / "step-00000009").symlink_to(forged.outside)
    forged.tombstone("step-00000009", ["secret"])


@attack()
def tombstone_through_a_link_within(forged: Forged) -> None:
    (forged.root / "step-00000009").mkdir()
    (forged.root / "step-00000009" / "sub").symlink_to(forged.outside)
    forged.tombstone("step-00000009", ["sub/secret"])


@attack()
def tombstone_of_another_nonce(forged: Forged) -> None:
    forged.record("trash/step-00000001.x.json", sealed(forged.manifest | {"nonce": "x/../../../outside"}))


def odd_record(forged: Forged, case: tuple[str, bytes]) -> None:
    forged.record(*case)


_RECORDS = {
    "trash": "trash/step-00000002.abc.json",
    "archive": "archive/step-00000002.abc.json",
    "damaged": "damaged/step-00000002.abc.json",
    "pins": "pins/step-00000002.abc.json",
    "lock": "lock",
    "lease": "lease/0000000001.json",
    "beat": "lease/0000000001.beat",
}
for _kind, _name in _RECORDS.items():
    each(
        odd_record,
        {
            f"{_kind} {what}": (_name, data)
            for what, data in {
                "empty": b"",
                "deep": b"[" * 4000,
                "deeper": DEEP,
                "long": LONG,
                "pickle": pickle.dumps({"a": 1}),
                "endless": b'{"step": 1e999, "expires": null, "attempt": 1e999, "reason": 1e999, "pid": 1e999}',
                "huge": b'{"step": %s, "expires": null, "attempt": %s, "reason": "", "pid": 1}' % ((b"9" * 4000,) * 2),
                "of lists": b'{"step": [], "expires": [], "attempt": [], "reason": ["\\u001b[2J"], "pid": []}',
                "early": b'{"step": 1, "expires": "0001-01-01T00:00:00+23:59"}',
                "late": b'{"step": 1, "expires": "9999-12-31T23:59:59-23:59", "attempt": -5}',
                "without zone": b'{"step": 1, "expires": "2030-01-01T00:00:00"}',
            }.items()
        },
    )


def record_that_is_no_file(forged: Forged, case: tuple[str, str]) -> None:
    name, kind = case
    path = forged.ours / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "link":
            path.symlink_to(forged.secret)
        case "new link":
            path.symlink_to(forged.outside / "new")
        case "hard link":
            path.hardlink_to(forged.secret)
        case "zeros":
            path.symlink_to("/dev/zero")
        case "folder":
            path.mkdir()
        case "terabyte":
            path.touch()
            os.truncate(path, 1 << 40)


for _kind, _name in _RECORDS.items():
    each(
        record_that_is_no_file,
        {
            f"{_kind} {what}": (_name, what)
            for what in ("fifo", "link", "new link", "hard link", "zeros", "folder", "terabyte")
        },
    )


def record_named(forged: Forged, name: str) -> None:
    forged.record(name, b"{}")


each(
    record_named,
    {
        f"{kind} {what}": f"{kind}/{name}"
        for kind in ("trash", "archive", "damaged", "pins", "lease", "drafts")
        for what, name in {
            "dots": "...0123456789abcdef",
            "records": ".ckptmgr.0123456789abcdef",
            "backslash": "..\\x.0123456789abcdef.json",
            "colon": "C:x.0123456789abcdef.json",
            "newline": "a\nb.0123456789abcdef.json",
            "escape": "\x1b[2J.0123456789abcdef.json",
            "superscript": "\u00b2.json",
            "arabic": "\u0663.json",
            "many digits": f"{'9' * 200}.json",
            "no unicode": os.fsdecode(b"\xff\xfe.0123456789abcdef.json"),
        }.items()
    },
)


@attack()
def draft_of_a_link(forged: Forged) -> None:
    (forged.root / "step-00000009").symlink_to(forged.outside)
    forged.record("drafts/step-00000009.0123456789abcdef", b"")
    (forged.outside / "0123456789abcdef").mkdir()
    (forged.outside / "0123456789abcdef" / "x").write_bytes(SECRET)


@attack()
def draft_that_is_a_link(forged: Forged) -> None:
    (forged.ours / "drafts").mkdir(exist_ok=True)
    (forged.ours / "drafts" / "step-00000009.0123456789abcdef").symlink_to(forged.outside)


@attack()
def draft_with_links(forged: Forged) -> None:
    folder = forged.ours / "drafts" / "step-00000009.0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "folder").symlink_to(forged.outside)
    (folder / "file").symlink_to(forged.secret)
    (folder / "hard").hardlink_to(forged.secret)


def ours_that_is_a_link(forged: Forged, name: str) -> None:
    path = forged.root / name
    if path.is_dir():
        shutil.rmtree(path)
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(forged.outside)


each(
    ours_that_is_a_link,
    {
        name: f".ckptmgr/{name}".removesuffix("/")
        for name in ("", "trash", "drafts", "pins", "damaged", "lease", "archive")
    },
)


# The pointer, the request file, and folders in the root


def pointer(forged: Forged, text: bytes) -> None:
    (forged.root / "latest").write_bytes(text)


each(
    pointer,
    {
        "up": b"../outside",
        "absolute": b"/etc",
        "deep": DEEP,
        "pickle": pickle.dumps(1),
        "escape": b"\x1b[2J",
        "no": b"\xff",
    },
)


def pointer_that_is(forged: Forged, kind: str) -> None:
    path = forged.root / "latest"
    path.unlink()
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "link":
            path.symlink_to(forged.secret)
        case "folder":
            path.mkdir()
        case "zeros":
            path.symlink_to("/dev/zero")
        case "terabyte":
            path.touch()
            os.truncate(path, 1 << 40)


each(pointer_that_is, {kind: kind for kind in ("fifo", "link", "folder", "zeros", "terabyte")})


def folder_named(forged: Forged, name: str) -> None:
    shutil.copytree(forged.folder, forged.root / name)


each(
    folder_named,
    {
        "colon": "C:step-00000003",
        "backslash": "step\\00000003",
        "newline": "step-00000003\n",
        "escape": "\x1b[2Jstep-3",
        "no unicode": os.fsdecode(b"step-\xff3"),
        "arabic": "step-\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0663",
        "many digits": f"step-{'9' * 240}",
        "tilde": "~",
        "dash": "-rf",
        "dots": "...",
    },
)
