"""Values keep their types through trees, and a tree can't make the reader do anything."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import functools
import io
import json
import math
import pathlib
import sys
import types
import uuid
import zoneinfo
from typing import Any, NamedTuple

import numpy as np
import omegaconf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptmgr.errors import ConfigError, DamagedError, StateMismatchError
from ckptmgr.formats import open_format
from ckptmgr.state import capture, materialize
from ckptmgr.state.codec import MAX_DEPTH, decode, encode, from_json, from_torch_safe, to_json, to_torch_safe
from ckptmgr.state.snapshot import StoredTensor
from ckptmgr.testing.memory_files import MemoryFiles

NAN = float("nan")


class Point(NamedTuple):
    x: int
    y: float = 0.0


class Color(enum.Enum):
    RED = "red"
    BLUE = object  # a value that no tree could hold


class Level(enum.IntEnum):
    LOW = 1


class Word(enum.StrEnum):
    YES = "yes"


class Access(enum.Flag):
    READ = 1
    WRITE = 2
    RUN = 4


@dataclasses.dataclass
class Config:
    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    names: list[str] = dataclasses.field(default_factory=list)
    made: int = dataclasses.field(default=0, init=False)
    ran = 0

    def __post_init__(self) -> None:
        type(self).ran += 1


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    a: int
    b: str = "b"


class Outer:
    @dataclasses.dataclass
    class Inner:
        value: int


class LoudDict(dict[str, int]):
    pass


@dataclasses.dataclass
class DictClass(dict[str, int]):
    width: int = 1


class Loose(enum.Flag, boundary=enum.KEEP):
    A = 1


class Text(str):
    __slots__ = ()


@dataclasses.dataclass
class ModuleClass(torch.nn.Module):
    width: int

    def __post_init__(self) -> None:
        super().__init__()


def through_json(value: Any) -> Any:
    """The value as it comes back from a tree that was a JSON text in between."""
    leaves: list[torch.Tensor] = []

    def numbered(leaf: torch.Tensor) -> Any:
        leaves.append(leaf)
        return {"$leaf": len(leaves) - 1}

    text = json.dumps(encode(value, tensor=numbered), allow_nan=False)  # type: ignore[arg-type]
    tree = json.loads(text, object_hook=lambda d: leaves[d["$leaf"]].detach().clone() if d.keys() == {"$leaf"} else d)
    return decode(tree)


def same(a: Any, b: Any) -> bool:
    """Whether two values have the same types and contents all the way down."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return bool(a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return math.copysign(1, a) == math.copysign(1, b) and (a == b or (a != a and b != b))
    if isinstance(a, np.generic):
        return a.dtype == b.dtype and np.array(a).tobytes() == np.array(b).tobytes()
    if isinstance(a, dict):
        return same([*a], [*b]) and same([*a.values()], [*b.values()])
    if isinstance(a, list | tuple | collections.deque):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Generator):
        return a.device == b.device and torch.equal(a.get_state(), b.get_state())
    if isinstance(a, np.random.Generator):
        return repr(a.bit_generator.state) == repr(b.bit_generator.state)
    if isinstance(a, np.random.RandomState):
        return repr(a.get_state(legacy=False)) == repr(b.get_state(legacy=False))
    if isinstance(a, decimal.Decimal | complex):
        return repr(a) == repr(b)
    if dataclasses.is_dataclass(a) or isinstance(a, argparse.Namespace | types.SimpleNamespace):
        return repr(a) == repr(b)
    return bool(a == b)


VALUES: dict[str, Any] = {
    "none": None,
    "bools": [True, False],
    "ints": [0, -1, 2**63 - 1, -(2**63), 2**63, -(2**64), 10**5000],
    "floats": [0.1, 5e-324, 1e308, -0.0, NAN, -NAN, math.inf, -math.inf],
    "texts": ["", "é", "\x00", "$tag", "\ud800", "\ud83d\ude00", "\U0001f600"],
    "bytes": [b"", b"\x00\xff", bytearray(b"ab"), bytearray()],
    "complex": [1 + 2j, complex(NAN, -0.0)],
    "containers": [[], (), {}, set(), frozenset(), [[1], (2, [3])], {"a": ({"b": 1},)}],
    "sets": [{1, 2}, frozenset({(1, 2), None})],
    "keys": {1: "a", (1, (2, None)): "b", None: "c", False: "d", 0.5: "e", "f": "g", frozenset([1]): "h", NAN: 1},
    "dollar keys": {"$tuple": [1], "$": 2, "a$": 3},
    "surrogate keys": {"\ud800": 1, "a": 2},
    "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
    "ordered with odd keys": collections.OrderedDict([(2, 1), (1, 2)]),
    "counter": collections.Counter({"a": 3, "b": -1}),
    "defaultdicts": [
        collections.defaultdict(list, {1: [1]}),
        collections.defaultdict(None, {"a": 1}),
        collections.defaultdict(int),
    ],
    "deques": [collections.deque([1, (2,)], maxlen=3), collections.deque()],
    "ranges": [range(3), range(10**30, 0, -2), slice(None, 2), slice(1, 2, 3)],
    "namespaces": [argparse.Namespace(lr=0.1, deep=argparse.Namespace(x=(1,))), types.SimpleNamespace(a=1)],
    "torch": [torch.Size([2, 3]), torch.bfloat16, torch.float8_e4m3fn, torch.device("cuda", 1), torch.device("cpu")],
    "torch formats": [torch.strided, torch.sparse_coo, torch.channels_last, torch.preserve_format],
    "generator": torch.Generator().manual_seed(5),
    "scalars": [
        np.float64(0.1), np.float32("nan"), np.float16(1), np.int64(-1), np.uint8(255), np.bool_(True),
        np.complex64(1 + 2j), np.longdouble(1) / 3, np.datetime64("2024-01-02T03:04", "ns"), np.datetime64("NaT"),
        np.timedelta64(3, "D"), np.str_("hé"), np.str_(""), np.bytes_(b"x"), np.void(b"\x01\x02"),
        np.array((1, 2.0), dtype=[("a", "<i4"), ("b", ">f8")])[()],
    ],
    "dtypes": [np.dtype(">f4"), np.dtype("U5"), np.dtype([("a", "i4", (2,)), ("b", "M8[s]")]), np.dtype(("f4", (2,)))],
    "arrays": [
        np.arange(6).reshape(2, 3), np.array(1.5), np.empty((0, 3), np.float32), np.arange(10)[::3], np.arange(4)[::-1],
        np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.arange(3, dtype=">i4"), np.array([1 + 2j], ">c8"),
        np.arange(3, dtype=np.uint64), np.arange(3, dtype=np.uint16), np.array([True]), np.array([1], np.float16),
        np.broadcast_to(np.arange(2), (3, 2)),
    ],
    "arrays of other kinds": [
        np.array(["a", "bcd"]), np.array([b"x"]), np.array(["2024-01-01"], "M8[D]"), np.array([], "U3"),
        np.array([(1, "x")], [("a", "i4"), ("b", "U2")]), np.arange(2, dtype=np.longdouble), np.array("zero-d"),
    ],
    "numpy generators": [
        np.random.default_rng(3), np.random.Generator(np.random.MT19937(1)), np.random.Generator(np.random.Philox(2)),
        np.random.Generator(np.random.SFC64(2)), np.random.RandomState(4),
    ],
    "numpy legacy states": [np.random.RandomState(1).get_state(), np.random.RandomState(1).get_state(legacy=False)],
    "times": [
        dt.datetime(2024, 1, 2, 3, 4, 5, 6), dt.datetime(2024, 1, 2, tzinfo=dt.UTC), dt.date(1, 1, 1),
        dt.time(1, 2, fold=1), dt.timedelta(-1, 2, 3), dt.timezone(dt.timedelta(hours=5.5), "IST"), dt.UTC,
        dt.datetime(2024, 10, 27, 2, 30, fold=1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin")),
        zoneinfo.ZoneInfo("Asia/Tokyo"),
    ],
    "paths": [
        pathlib.Path("a/b"), pathlib.Path("/x/\udcff"), pathlib.PurePosixPath("c"), pathlib.PureWindowsPath("C:\\d"),
    ],
    "numbers": [
        uuid.UUID(int=5), decimal.Decimal("1.10"), decimal.Decimal("sNaN1"), decimal.Decimal("-0"),
        fractions.Fraction(1, 3),
    ],
    "classes": [Point(1, 2.5), Config(0.1, names=["a"]), Slotted(1), Outer.Inner(3)],
    "enums": [Color.RED, Color.BLUE, Level.LOW, Word.YES, Access.READ, Access.READ | Access.RUN, Access(0)],
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_every_plain_value_comes_back_with_its_type(name: str) -> None:
    assert same(through_json(VALUES[name]), VALUES[name])


@pytest.mark.parametrize("name", VALUES)
def test_torch_load_reads_a_torch_safe_value_without_help_and_the_tree_comes_back(name: str) -> None:
    buffer = io.BytesIO()
    torch.save(to_torch_safe(encode(VALUES[name])), buffer)
    buffer.seek(0)
    tree = from_torch_safe(torch.load(buffer, weights_only=True))
    assert same(decode(tree), VALUES[name])


@pytest.mark.parametrize(
    "name", ["none", "floats", "containers", "keys", "complex", "ordered", "counter", "torch", "texts"]
)
def test_what_torch_knows_is_real_in_a_torch_safe_value(name: str) -> None:
    value = [item for item in VALUES[name] if type(item) is not frozenset] if name == "containers" else VALUES[name]
    if name == "keys":
        value = {key: item for key, item in value.items() if type(key) is not frozenset}
    assert same(to_torch_safe(encode(value)), value)


def test_bytes_and_whole_numbers_are_real_where_torch_load_reads_them() -> None:
    value = [b"a", bytearray(b"b"), 2**64, -(2**64)]
    assert same(to_torch_safe(encode(value)), value)


def test_an_optimizer_state_in_a_torch_file_is_what_load_state_dict_takes() -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    buffer = io.BytesIO()
    torch.save(to_torch_safe(encode(optimizer.state_dict())), buffer)
    buffer.seek(0)
    fresh = torch.optim.AdamW(torch.nn.Linear(2, 1).parameters())
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert str(fresh.state_dict()) == str(optimizer.state_dict())


def test_a_value_that_could_not_be_saved_is_still_marked_after_a_torch_file() -> None:
    tree = {"a": {"$unsaved": "x.Y"}, "b": {"$dict": [[1, {"$unsaved": "x.Y"}], [2, 3]]}}
    assert from_torch_safe(to_torch_safe(tree)) == tree


def test_from_torch_safe_refuses_what_ckptmgr_does_not_write() -> None:
    with pytest.raises(DamagedError, match="function"):
        from_torch_safe({"a": len})


keys = st.one_of(st.text(), st.integers(), st.none(), st.booleans(), st.tuples(st.integers(), st.text()))
plain = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.binary(max_size=9), st.datetimes(), st.decimals(),
        st.text(st.characters(exclude_categories=())), st.complex_numbers(),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.lists(inner, max_size=4).map(tuple), st.dictionaries(keys, inner, max_size=4),
        st.lists(inner, max_size=3).map(collections.deque), st.dictionaries(st.sampled_from(["$a", "$tuple"]), inner),
    ),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(plain)
def test_any_nesting_of_plain_values_comes_back_with_its_types(value: Any) -> None:
    assert same(through_json(value), value)
    assert same(decode(from_torch_safe(to_torch_safe(encode(value)))), value)


def test_texts_keys_without_a_dollar_make_plain_json_in_order() -> None:
    assert list(encode({"b": 1, "a": [1, 2.5, "x", None, True]}).items()) == [
        ("b", 1),
        ("a", [1, 2.5, "x", None, True]),
    ]


@pytest.mark.parametrize(
    "value",
    [len, Point, functools.partial(len), ValueError("x"), object(), LoudDict(a=1), Text("a"), ModuleClass(3),
     DictClass(), Loose(5), np.array([object()]), np.array([1]).view(np.ma.MaskedArray), iter([]), sys, (i for i in ()),
     torch.max(torch.ones(2, 2), 0)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_has_no_plain_form_is_never_flattened(value: Any) -> None:
    found: list[tuple[Any, str]] = []

    def opaque(one: Any, path: str) -> Any:
        found.append((one, path))
        return {"$object": path}

    tree = encode({"a": [value]}, path="entry", opaque=opaque)
    assert tree == {"a": [{"$object": "entry.a[0]"}]}
    assert [one is value and path == "entry.a[0]" for one, path in found] == [True]
    assert decode(tree, objects=lambda path: path) == {"a": ["entry.a[0]"]}
    with pytest.raises(ConfigError, match=r"entry\.a\[0\]"):
        encode({"a": [value]}, path="entry")


def test_a_class_that_cannot_be_found_again_is_not_named() -> None:
    @dataclasses.dataclass
    class Local:
        x: int

    hidden = enum.Enum("hidden", ["A"])
    nameless = collections.namedtuple("nameless", ["a"])
    marked = Point(1)
    for value in (Local(1), hidden.A, nameless(1)):
        assert encode(value, opaque=lambda value, path: "opaque") == "opaque"
    assert encode(marked) == {"$namedtuple": f"{__name__}:Point", "names": ["x", "y"], "values": [1, 0.0]}


def test_omegaconf_configs_keep_interpolations_and_flags() -> None:
    config = omegaconf.OmegaConf.create({"a": {"b": "${c}", "m": "???"}, "c": [1, None]})
    omegaconf.OmegaConf.set_struct(config, True)
    back = through_json({"config": config, "list": config.c})
    assert type(back["config"]) is omegaconf.DictConfig
    assert omegaconf.OmegaConf.to_container(back["config"]) == {"a": {"b": "${c}", "m": "???"}, "c": [1, None]}
    assert omegaconf.OmegaConf.is_struct(back["config"])
    assert not omegaconf.OmegaConf.is_readonly(back["config"])
    assert type(back["list"]) is omegaconf.ListConfig
    assert back["list"] == [1, None]


def test_a_config_without_a_value_has_no_plain_form() -> None:
    assert encode(omegaconf.DictConfig(None), opaque=lambda value, path: "opaque") == "opaque"


def test_a_dataclass_is_filled_without_running_its_code() -> None:
    tree = encode(Config(0.5))
    before = Config.ran
    assert decode(tree) == Config(0.5)
    assert before + 1 == Config.ran  # the one made for the comparison


def test_a_dataclass_gets_the_default_of_a_field_that_came_later() -> None:
    tree = encode(Slotted(1))
    del tree["fields"]["b"]
    assert decode(tree) == Slotted(1, "b")


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"$dataclass": "nowhere.mod:Config", "fields": {}}, "nowhere.mod:Config"),
        ({"$dataclass": "subprocess:Popen", "fields": {}}, "no dataclass"),
        ({"$dataclass": f"{__name__}:np.ndarray", "fields": {}}, "import its module"),
        ({"$dataclass": f"{__name__}:ModuleClass", "fields": {}}, "no dataclass"),
        ({"$dataclass": f"{__name__}:Slotted", "fields": {"a": 1, "c": 2}}, "the class lacks c"),
        ({"$dataclass": f"{__name__}:Slotted", "fields": {}}, "the checkpoint lacks a"),
        ({"$namedtuple": f"{__name__}:Config", "names": [], "values": []}, "no named tuple"),
        ({"$namedtuple": f"{__name__}:Point", "names": ["x"], "values": [1]}, "has the fields x, y here and x in"),
        ({"$enum": f"{__name__}:Color", "names": ["GREEN"]}, "GREEN"),
        ({"$enum": f"{__name__}:Config", "names": []}, "no enum"),
        ({"$zoneinfo": "Mars/Base"}, "tzdata"),
        ({"$generator": "cuda:77", "state": ""}, "cuda:77"),
        ({"$object": "p"}, "trust_pickle=True"),
    ],
)
def test_what_is_not_here_is_a_mismatch_that_names_place_and_thing(tree: Any, words: str) -> None:
    with pytest.raises(StateMismatchError, match=r"entry\.a\[0\]") as caught:
        decode({"a": [tree]}, path="entry")
    assert words in str(caught.value)


@pytest.mark.parametrize("name", ["array", "omegaconf", "np_dtype"])
def test_a_library_that_is_not_imported_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numpy")
    monkeypatch.delitem(sys.modules, "omegaconf")
    trees = {
        "array": {"$array": torch.ones(1)},
        "omegaconf": {"$omegaconf": {}, "flags": []},
        "np_dtype": {"$np_dtype": "f"},
    }
    with pytest.raises(StateMismatchError, match="omegaconf" if name == "omegaconf" else "numpy"):
        decode(trees[name])
    assert encode(object, opaque=lambda value, path: "opaque") == "opaque"


@pytest.mark.parametrize(
    "tree",
    [
        {"$nope": 1}, {"$tuple": {}}, {"$tuple": [1], "more": 1}, {"$tuple": [1], "$set": []}, {"$int": "x"},
        {"$int": 5}, {"$float": "1.5"}, {"$str": "@@"}, {"$str": "/w=="}, {"$bytes": "@"}, {"$bytes": 3},
        {"$dict": [[1, 2], [1, 3]]}, {"$dict": [[1]]}, {"$dict": 5}, {"$dict": [[[], 1]]}, {"$set": [[1]]},
        {"$ordered": [1]}, {"$counter": 1}, {"$defaultdict": {}, "factory": "eval"}, {"$defaultdict": {}},
        {"$defaultdict": 1, "factory": None}, {"$deque": [], "maxlen": -1}, {"$range": [1, 2, 0]}, {"$slice": []},
        {"$datetime": "noon", "fold": 0, "tz": None}, {"$date": 3}, {"$timedelta": [10**20]}, {"$timezone": [1]},
        {"$path": 3, "kind": "Path"}, {"$path": "x", "kind": "str"}, {"$uuid": "x"}, {"$decimal": "x"},
        {"$fraction": [1, 0]}, {"$size": ["a"]}, {"$dtype": "load"}, {"$dtype": 3}, {"$layout": "float32"},
        {"$device": "moon"}, {"$device": 3}, {"$generator": "cpu", "state": "AAAA"}, {"$namespace": [1]},
        {"$np_dtype": "O"}, {"$np_dtype": {"$tuple": []}}, {"$scalar": "<f8", "data": "AA=="},
        {"$scalar": "O", "data": "AAAAAAAAAAA="}, {"$array": 3}, {"$array": torch.ones(1), "order": "?"},
        {"$raw_array": "<U1", "shape": [-1], "data": None}, {"$raw_array": "<U1", "shape": [2], "data": torch.ones(3)},
        {"$np_generator": {"bit_generator": "Popen"}}, {"$random_state": 3},
        {"$enum": f"{__name__}:Color", "names": []},
        {"$enum": 3, "names": []}, {"$enum": f"{__name__}:Color", "names": ["RED", "BLUE"]}, {"$meta": [-1]},
        {"$omegaconf": 3, "flags": []}, {"$omegaconf": {}, "flags": ["allow_objects"]}, {"$meta": [1], "dtype": "load"},
        {"$namedtuple": f"{__name__}:Point", "names": ["x", "y"], "values": [1]}, object(),
        {"a": (1,)}, {"a": StoredTensor},
    ],
    ids=lambda tree: str(tree) if type(tree) is dict else type(tree).__name__,  # an address is another one each time
)  # fmt: skip
def test_a_tree_that_encode_does_not_make_is_damage(tree: Any) -> None:
    with pytest.raises(DamagedError):
        decode({"a": tree}, path="entry")


def test_a_stored_tensor_needs_someone_who_reads_it() -> None:
    leaf = StoredTensor((1,), torch.float32, None)
    assert decode([leaf, leaf], tensor=lambda one: one.shape) == [(1,), (1,)]
    with pytest.raises(DamagedError, match="StoredTensor"):
        decode(leaf)


def test_nesting_is_bounded_both_ways() -> None:
    def nested(levels: int) -> Any:
        value: Any = 1.5
        for i in range(levels):
            value = {(0,): value} if i % 2 else (value,)
        return value

    assert same(through_json(nested(MAX_DEPTH)), nested(MAX_DEPTH))
    assert same(decode(from_torch_safe(to_torch_safe(encode(nested(MAX_DEPTH))))), nested(MAX_DEPTH))
    assert encode(nested(MAX_DEPTH + 2), opaque=lambda value, path: "opaque") is not None
    with pytest.raises(ConfigError, match="no form"):
        encode(nested(MAX_DEPTH + 2))
    tree: Any = []
    for _ in range(100_000):
        tree = [tree]
    with pytest.raises(DamagedError, match="levels deep"):
        decode(tree)


def test_a_reference_cycle_is_named_and_not_followed() -> None:
    loop: dict[str, Any] = {"a": [1]}
    loop["a"].append(loop)
    with pytest.raises(ConfigError, match=r"entry\.a\[1\] contains itself"):
        encode(loop, path="entry")


def test_a_container_that_stands_in_two_places_is_no_cycle() -> None:
    shared = [1]
    assert encode({"a": shared, "b": [shared]}) == {"a": [1], "b": [[1]]}


def test_encoded_containers_are_new() -> None:
    value = {"losses": [1, 2], "names": collections.deque([1])}
    tree = encode(value)
    value["losses"].append(3)
    value["names"].append(2)
    assert decode(tree) == {"losses": [1, 2], "names": collections.deque([1])}


# Tensors


@pytest.mark.parametrize(
    "tensor",
    [torch.arange(3), torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2), requires_grad=False),
     torch.ones(1, requires_grad=True), torch.ones(2).to_sparse(), torch.empty(0), torch.tensor(1.0),
     torch.zeros(3, dtype=torch.float8_e5m2)],
    ids=str,
)  # fmt: skip
def test_a_tensor_is_a_leaf_as_it_is(tensor: torch.Tensor) -> None:
    tree = encode({"a": (tensor, tensor)})
    assert [leaf is tensor for leaf in tree["a"]["$tuple"]] == [True, True]


def test_a_result_of_a_computation_is_cut_off_from_its_graph() -> None:
    leaf = encode(torch.ones(2, requires_grad=True) * 2)
    assert (leaf.requires_grad, leaf.tolist()) == (False, [2.0, 2.0])


def test_a_meta_tensor_keeps_shape_and_dtype() -> None:
    back = through_json(torch.empty(2, 3, dtype=torch.bfloat16, device="meta"))
    assert (back.device.type, back.shape, back.dtype) == ("meta", (2, 3), torch.bfloat16)


def test_a_tensor_sharded_in_the_old_way_is_refused_with_the_way_out() -> None:
    class ShardedTensor(torch.Tensor):
        pass

    with pytest.raises(ConfigError, match=r"model\.w is a ShardedTensor.*FSDP2"):
        encode({"w": torch.ones(2).as_subclass(ShardedTensor)}, path="model")


def test_another_tensor_class_is_never_flattened() -> None:
    class Special(torch.Tensor):
        pass

    assert encode(torch.ones(2).as_subclass(Special), opaque=lambda value, path: "opaque") == "opaque"


def test_an_array_shares_its_memory_with_its_leaf() -> None:
    array = np.arange(4)
    encode(array)["$array"][0] = 9
    assert array[0] == 9


# Without a tensor file


def test_small_tensors_go_inline_into_json() -> None:
    tree = {"a": [torch.arange(4, dtype=torch.int16).view(2, 2)], "b": torch.tensor(1.5), "c": torch.empty(0), "d": "x"}
    back = from_json(json.loads(json.dumps(to_json(tree))))
    assert same(back, tree)


@pytest.mark.parametrize(
    "change", [{"$inline": "@"}, {"dtype": "load"}, {"shape": [7]}, {"shape": None}, {"$inline": 3}]
)
def test_a_changed_inline_tensor_is_damage(change: dict[str, Any]) -> None:
    with pytest.raises(DamagedError):
        from_json({"a": to_json(torch.ones(2)) | change})


@pytest.mark.parametrize("name", ["safetensors", "torch"])
def test_every_value_comes_back_from_every_format(name: str) -> None:
    files = MemoryFiles()
    open_format(name).write(capture(VALUES), files)
    stored = open_format(name).open(files)
    values = materialize(stored, stored.entries, stored.fetch)
    assert [key for key, value in VALUES.items() if not same(values[key], value)] == []


def test_what_could_not_be_saved_is_left_out_of_dicts_and_none_elsewhere() -> None:
    lost = {"$unsaved": "x.Y"}
    tree = {"a": lost, "b": [lost, 1], "c": {"$dict": [[1, lost], [2, 3]]}, "d": {"$defaultdict": {}, "factory": lost}}
    assert decode(tree) == {"b": [None, 1], "c": {2: 3}, "d": collections.defaultdict(None)}
