"""A snapshot holds what the objects held, under clean names, and taking it changes nothing."""

from __future__ import annotations

import functools
import json
import random
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode
from torchdata.stateful_dataloader import StatefulDataLoader

from ckptmgr.errors import ConfigError, SaveFailedError
from ckptmgr.state import PickleWarning, capture, non_finite
from ckptmgr.state.codec import decode, from_json
from ckptmgr.state.names import clean_names, one_to_one, pair, parameter_names
from ckptmgr.state.snapshot import Snapshot, flatten

# torch warns of itself: of its own imports, and of its sparse tensors.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:Sparse CSR", "ignore:'set_vital'")


class Net(nn.Module):
    """Has a submodule that is really called "module"."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        self.head = nn.Linear(2, 1)


NAMES = ["module.weight", "module.bias", "head.weight", "head.bias"]


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def ddp(module: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(module)


def compiled(module: nn.Module) -> Any:
    return torch.compile(module)


@pytest.mark.usefixtures("group")
def test_names_carry_no_wrapper_however_they_are_nested() -> None:
    wraps = {
        "ddp": ddp,
        "compile": compiled,
        "ddp of compile": lambda m: ddp(compiled(m)),
        "compile of ddp": lambda m: compiled(ddp(m)),
        "data parallel": nn.DataParallel,
    }
    assert {name: list(capture({"m": wrap(Net())}).entries["m"]) for name, wrap in wraps.items()} == dict.fromkeys(
        wraps, NAMES
    )


@pytest.mark.usefixtures("group")
def test_a_wrapped_submodule_carries_no_wrapper_either() -> None:
    net = Net()
    net.head = ddp(compiled(net.head))  # type: ignore[assignment]
    net.module = compiled(net.module)
    assert list(capture({"m": net}).entries["m"]) == NAMES


@pytest.mark.usefixtures("group")
def test_an_averaged_model_keeps_its_own_names_but_not_an_inner_wrapper() -> None:
    average = AveragedModel(compiled(Net()))
    assert list(capture({"ema": average}).entries["ema"]) == ["n_averaged", *(f"module.{name}" for name in NAMES)]


def test_checkpointed_activations_do_not_show_in_names() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    net = nn.Sequential(checkpoint_wrapper(nn.Linear(1, 1)))
    snapshot = capture({"m": net, "o": torch.optim.SGD(net.parameters())})
    assert list(snapshot.entries["m"]) == ["0.weight", "0.bias"]
    assert snapshot.notes["o"]["params"] == [["m.0.weight", "m.0.bias"]]


def test_keys_of_the_users_own_making_stay_as_they_are() -> None:
    net = nn.DataParallel(nn.Linear(1, 1))
    keys = ["module.weight", "weight", "module.other.deep"]
    assert clean_names(net, keys) == {key: key for key in keys}
    assert clean_names(nn.ModuleDict(), ["anything.at.all", "x"]) == {"anything.at.all": "anything.at.all", "x": "x"}
    assert clean_names(net, keys[::2]) == {"module.weight": "weight", "module.other.deep": "other.deep"}


def test_names_are_paired_across_wrappers_only_where_it_is_unambiguous() -> None:
    assert pair(["a.w", "b.w"], ["module.a._orig_mod.w", "b.w", "c"]) == {"a.w": "module.a._orig_mod.w", "b.w": "b.w"}
    assert pair(["a", "module.a"], ["_orig_mod.a"]) == {}
    assert pair(["a"], ["_orig_mod.a", "module.a"]) == {}


def test_a_submodule_that_is_none_is_no_obstacle() -> None:
    net = Net()
    net.head = None  # type: ignore[assignment]
    assert list(capture({"m": net}).entries["m"]) == NAMES[:2]


def test_parameter_names_skip_what_is_none_and_keep_the_first() -> None:
    layer = nn.Linear(1, 1, bias=False)
    names = parameter_names([("m", nn.Sequential(layer, layer)), ("again", layer)])
    assert names == {id(layer.weight): "m.0.weight"}


# Objects


def test_an_optimizer_is_captured_with_the_names_of_its_parameters() -> None:
    model, other = Net(), nn.Linear(1, 1)
    loose = nn.Parameter(torch.ones(1))
    groups = [{"params": [*model.head.parameters(), loose]}, {"params": [model.module.weight, other.bias]}]
    snapshot = capture({"o": torch.optim.AdamW(groups), "model": compiled(model), "parts": {"x": [other]}}, only=["o"])
    assert snapshot.notes == {
        "o": {
            "class": "torch.optim.adamw.AdamW",
            "params": [["model.head.weight", "model.head.bias", None], ["model.module.weight", "parts.x[0].bias"]],
        }
    }
    assert list(snapshot.entries) == ["o"]


def test_objects_within_containers_say_their_state_and_are_noted() -> None:
    net = nn.Linear(1, 1)
    state = {"a": [net, 3, (net,)], 5: {"b": torch.optim.SGD(net.parameters())}}
    snapshot = capture({"e": state})
    weight, bias = snapshot.entries["e"]["$dict"][0][1][0].values()
    sgd = torch.optim.SGD(net.parameters()).state_dict()
    assert decode(snapshot.entries["e"]) == {
        "a": [{"weight": weight, "bias": bias}, 3, ({"weight": weight, "bias": bias},)],
        5: {"b": sgd},
    }
    assert weight.data_ptr() == net.weight.data_ptr()
    assert {path: note["class"].split(".")[-1] for path, note in snapshot.notes["e"]["parts"].items()} == {
        "a[0]": "Linear",
        "a[2][0]": "Linear",
        "[5].b": "SGD",
    }


def test_versions_of_submodules_are_noted() -> None:
    snapshot = capture({"m": nn.Sequential(compiled(nn.BatchNorm1d(2)))})
    assert snapshot.notes["m"]["versions"] == {"0.": 2}


def test_plain_values_and_tensors_are_entries_too() -> None:
    tensor = torch.ones(2)
    snapshot = capture({"step": 3, "t": tensor, "best": np.float64(0.5), "x y/z": None})
    assert (snapshot.entries["step"], snapshot.entries["t"] is tensor, snapshot.entries["x y/z"]) == (3, True, None)
    assert type(decode(snapshot.entries["best"])) is np.float64


def test_a_class_with_a_state_dict_method_is_not_asked() -> None:
    with pytest.warns(PickleWarning, match=r"kind is a builtins\.type"):
        assert capture({"kind": nn.Linear}).entries["kind"] == {"$object": "kind"}


def test_tied_weights_are_one_tensor_within_and_across_entries() -> None:
    net = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    net["b"].weight = net["a"].weight
    entries = capture({"m": net, "head": net["b"], "view": net["a"].weight.detach()[:1]}).entries
    assert entries["m"]["a.weight"] is entries["m"]["b.weight"] is entries["head"]["weight"]
    assert entries["m"]["a.bias"] is not entries["m"]["b.bias"]
    assert entries["view"] is not entries["m"]["a.weight"]


def test_the_same_memory_seen_otherwise_is_not_tied() -> None:
    base = torch.arange(4.0)
    views = {
        "base": base, "dtype": base.view(torch.int32), "shape": base.view(2, 2), "transposed": base.view(2, 2).t(),
        "offset": base[1:], "parameter": nn.Parameter(base), "empty": base[:0], "other empty": base[:0],
    }  # fmt: skip
    tree = capture({"e": views}).entries["e"]
    assert len({id(leaf) for leaf in tree.values()}) == len(views)


def test_lazily_conjugated_and_negated_tensors_are_resolved() -> None:
    value = torch.tensor([1 + 2j])
    tree = capture({"e": [value.conj(), value.conj().imag, value, value.conj()]}).entries["e"]
    assert [leaf.tolist() for leaf in tree] == [[1 - 2j], [-2.0], [1 + 2j], [1 - 2j]]
    assert not any(leaf.is_conj() or leaf.is_neg() for leaf in tree)
    assert tree[0] is tree[3]


def test_tensors_of_every_layout_are_leaves() -> None:
    dense = torch.eye(3)
    tensors = [
        dense.to_sparse(), dense.to_sparse_csr(), dense.t(), dense[::2], dense[0].expand(4, 3), torch.empty(0, 3),
        torch.tensor(3), torch.ones(1, 2, 3, 4).to(memory_format=torch.channels_last), torch.zeros(2).bfloat16(),
        torch.zeros(2, dtype=torch.float8_e4m3fn), torch.zeros(2, dtype=torch.uint16), torch.zeros(2) > 0,
    ]  # fmt: skip
    tree = capture({"e": tensors}).entries["e"]
    assert [leaf is tensor for leaf, tensor in zip(tree, tensors, strict=True)] == [True] * len(tensors)


def test_a_snapshot_does_not_see_what_training_changes_later_in_containers() -> None:
    history = {"losses": [1.0]}
    scheduler = torch.optim.lr_scheduler.MultiStepLR(torch.optim.SGD([torch.ones(1)], lr=1.0), [3])
    snapshot = capture({"history": history, "scheduler": scheduler})
    history["losses"].append(2.0)
    scheduler.milestones[9] = 1
    assert snapshot.entries["history"] == {"losses": [1.0]}
    assert decode(snapshot.entries["scheduler"])["milestones"] == {3: 1}


def test_capture_leaves_the_random_streams_as_they_were_and_saves_them_so() -> None:
    class Loud:
        def state_dict(self) -> dict[str, Any]:
            return {"drawn": [torch.rand(1).item(), random.random(), np.random.rand()]}

    loader = StatefulDataLoader(list(range(8)), shuffle=True)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    python = random.getstate()
    snapshot = capture({"loud": Loud(), "loader": loader})
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    assert torch.equal(from_json(snapshot.ranks[0].rng)["torch"], state)
    assert torch.rand(1) == expected


def test_random_streams_are_put_back_when_an_object_fails() -> None:
    class Broken:
        def state_dict(self) -> None:
            torch.rand(1)
            raise OSError("no")

    state = torch.get_rng_state()
    with pytest.raises(SaveFailedError, match=r"e\.a\[0\]: .*Broken\.state_dict\(\) failed: OSError\('no'\)"):
        capture({"e": {"a": [Broken()]}})
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_of_ours_within_a_state_dict_comes_out_as_it_is() -> None:
    class Careful:
        def state_dict(self) -> None:
            raise ConfigError("mine")

    with pytest.raises(ConfigError, match=r"^mine$"):
        capture({"e": Careful()})


@pytest.mark.parametrize("name", ["", 3, None])
def test_entries_have_names(name: Any) -> None:
    with pytest.raises(ConfigError, match="named by texts"):
        capture({name: 1})


def test_only_names_entries_that_are_there() -> None:
    with pytest.raises(ConfigError, match="no entry 'modle'; the state has model, step"):
        capture({"model": nn.Linear(1, 1), "step": 1}, only=["modle"])


def test_a_cycle_is_refused_by_name() -> None:
    loop: list[Any] = [1]
    loop.append({"again": loop})
    with pytest.raises(ConfigError, match=r"loop\[1\]\.again.* contains itself"):
        capture({"loop": loop})


@pytest.mark.parametrize(
    "last", [1 << 63, -(1 << 63) - 1, True, 1.0, float("nan"), float("inf"), "\ud800", "ä", None, ()]
)
@pytest.mark.parametrize("others", [[1, 2], [1.0, 2.0], ["a", "b"], [None, False], []])
def test_one_odd_item_in_a_long_list_is_kept_as_it_is(others: list[Any], last: Any) -> None:
    for value in ([*others, last], (last, *others)):
        tree = capture({"e": value}).entries["e"]
        assert repr(decode(json.loads(json.dumps(tree, allow_nan=False)))) == repr(value)


# What has no plain form


def test_what_needs_pickling_is_pickled_at_once_with_a_warning_that_names_it() -> None:
    with pytest.warns(PickleWarning) as caught:
        snapshot = capture({"args": {"fn": functools.partial(int, base=2), "lr": 1}, "err": ValueError("x")})
    assert [str(w.message).split(" is a ")[0] for w in caught] == ["args.fn", "err"]
    assert all("trust_pickle=True" in str(w.message) for w in caught)
    assert snapshot.entries == {"args": {"fn": {"$object": "args.fn"}, "lr": 1}, "err": {"$object": "err"}}
    import io

    objects = torch.load(io.BytesIO(snapshot.objects or b""), weights_only=False)
    assert (objects["args.fn"]("101"), repr(objects["err"])) == (5, "ValueError('x')")


def test_saving_never_fails_for_what_cannot_be_pickled() -> None:
    with pytest.warns(PickleWarning) as caught:
        snapshot = capture({"args": {"lock": threading.Lock(), "fn": lambda: 1, "ok": object, "lr": 1}})
    assert snapshot.entries["args"] == {
        "lock": {"$unsaved": "_thread.lock"},
        "fn": {"$unsaved": "builtins.function"},
        "ok": {"$object": "args.ok"},
        "lr": 1,
    }
    assert ["NOT saved" in str(w.message) for w in caught] == [True, True, False]


def test_nothing_is_pickled_and_no_warning_given_for_plain_state() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert capture({"model": Net(), "step": 1}).objects is None


def test_two_values_with_the_same_path_are_both_kept() -> None:
    with pytest.warns(PickleWarning):
        snapshot = capture({"e": {"a.b": int, "a": {"b": str}}})
    assert snapshot.entries["e"] == {"a.b": {"$object": "e.a.b"}, "a": {"b": {"$object": "e.a.b#2"}}}


# Finite


def test_tensors_that_are_not_finite_are_named() -> None:
    nan, inf = float("nan"), float("inf")
    tree = {
        "fine": torch.tensor([1e38, -1e38]),
        "nan": torch.tensor([1.0, nan]),
        "inf": torch.tensor([[inf, 0.0]]),
        "minus": torch.tensor(-inf).double(),
        "large": torch.tensor([1e300], dtype=torch.float64),
        "half": torch.tensor([65504.0]).half(),
        "bf16": torch.tensor([inf]).bfloat16(),
        "fp8": torch.tensor([nan]).to(torch.float8_e4m3fn),
        "fp8 fine": torch.tensor([1.0]).to(torch.float8_e5m2),
        "complex": torch.tensor([complex(1, nan)]),
        "conj": torch.tensor([complex(1, 1)]).conj(),
        "int": torch.tensor([1]),
        "empty": torch.empty(0),
        "sparse": torch.tensor([0, inf]).to_sparse(),
        "csr": torch.tensor([[0, inf]]).to_sparse_csr(),
        "fp4": torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "parameter": nn.Parameter(torch.tensor([nan])),
    }
    odd = ["nan", "inf", "minus", "bf16", "fp8", "complex", "sparse", "csr", "parameter"]
    assert non_finite(flatten(Snapshot({"m": tree}))) == [f"m.{name}" for name in odd]
    assert non_finite(flatten(Snapshot({"n": 1}))) == []


class _NoDoubles(TorchDispatchMode):
    """A device that knows no float64, as those of Apple."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
            raise TypeError("no float64 here")
        return made


def test_a_device_without_float64_is_looked_through() -> None:
    tree = {"fine": torch.ones(2), "half": torch.ones(2).half(), "bf16": torch.tensor([float("nan")]).bfloat16()}
    flat = flatten(Snapshot({"m": tree}))
    with _NoDoubles():
        assert non_finite(flat) == ["m.bf16"]


def test_an_ordered_state_dict_is_captured_under_its_keys() -> None:
    state = OrderedDict(a=torch.ones(1))
    assert capture({"m": state}).entries["m"] == {"$ordered": {"a": state["a"]}}


def test_a_shared_parameter_is_named_by_an_entry_that_is_saved() -> None:
    net = nn.Sequential(nn.Linear(1, 1, bias=False))
    objects = {"part": net[0], "model": net, "o": torch.optim.AdamW(net.parameters())}
    for only, name in ((None, "part.weight"), (["model", "o"], "model.0.weight"), (["o"], "part.weight")):
        assert capture(objects, only).notes["o"]["params"] == [[name]]


def test_every_name_of_a_parameter_is_known() -> None:
    layer = nn.Linear(1, 1, bias=False)
    names = parameter_names([("m", nn.Sequential(layer, layer)), ("again", layer)])
    assert names.every() == {id(layer.weight): ["m.0.weight", "m.1.weight", "again.weight"]}


def test_only_those_are_taken_for_the_same_that_alone_have_a_name_in_common() -> None:
    assert one_to_one({1: ["a", "b"], 2: ["c", "c"]}, {"x": ["b"], "y": ["c"]}) == {1: "x", 2: "y"}
    assert one_to_one({1: ["a"], 2: ["a"]}, {"x": ["a"]}) == {}
    assert one_to_one({1: ["a"]}, {"x": ["a"], "y": ["a"]}) == {}
    assert one_to_one({1: ["a"], 2: ["b"]}, {"x": ["a", "b"]}) == {1: "x"}
    assert one_to_one({1: ["a", "b"]}, {"x": ["a"], "y": ["b"]}) == {1: "x"}
