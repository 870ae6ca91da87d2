"""A recorder answers as a capture from scratch would, whatever changed, and does little work where nothing did."""

from __future__ import annotations

import gc
import json
import sys
import warnings
import weakref
from argparse import Namespace
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from ckptmgr.errors import ConfigError, SaveFailedError
from ckptmgr.state import PickleWarning, Recorder, capture, structure
from ckptmgr.state.codec import from_json
from ckptmgr.state.snapshot import FlatSnapshot, flatten

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit", "ignore:Sparse CSR", "ignore:The PyTorch API of nested", "ignore:torch.quantize"
)

Objects = dict[str, Any]

FIND_GUARDS = structure.find_guards


@pytest.fixture(params=["torch's guards", "without them"], autouse=True)
def guards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds with torch's bulk check, and on a torch without it."""
    if request.param == "without them":
        monkeypatch.setattr(structure, "find_guards", lambda: None)


def bits(tensor: torch.Tensor) -> Any:
    """All that a checkpoint could say of a tensor."""
    kind = (type(tensor), tensor.dtype, tensor.device, tensor.layout, tensor.requires_grad)
    if tensor.is_nested:
        return (*kind, [bits(part) for part in tensor.unbind()])
    if tensor.is_quantized:
        return (*kind, tensor.int_repr().tolist())
    if tensor.layout != torch.strided:
        return (*kind, tensor.to_dense().tolist())
    return (*kind, tensor.shape, tensor.stride(), repr(tensor.tolist()))


def still_numbers(flat: FlatSnapshot, objects: Objects) -> set[int]:
    addresses: dict[bool, set[int]] = {True: set(), False: set()}
    for value in objects.values():
        for parameter in value.parameters() if isinstance(value, nn.Module) else ():
            addresses[parameter.requires_grad].add(parameter.data_ptr())
    wanted = addresses[False] - addresses[True] - {0}
    return {n for n, t in enumerate(flat.tensors) if t.layout == torch.strided and t.data_ptr() in wanted}


def check(flat: FlatSnapshot, objects: Objects) -> None:
    """The snapshot is what a capture from scratch gives."""
    fresh = flatten(capture(objects))
    assert json.dumps(flat.entries) == json.dumps(fresh.entries)
    assert json.dumps(flat.notes) == json.dumps(fresh.notes)
    assert [bits(tensor) for tensor in flat.tensors] == [bits(tensor) for tensor in fresh.tensors]
    assert (flat.objects is None) == (fresh.objects is None)
    assert [list(part.rng) for part in flat.ranks.values()] == [list(part.rng) for part in fresh.ranks.values()]
    assert flat.still == still_numbers(flat, objects)
    assert flat.pointers is not None
    for tensor, pointer in zip(flat.tensors, flat.pointers, strict=True):
        is_plain = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_nested)
        assert pointer == (tensor.data_ptr() if is_plain else 0)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
        self.head = nn.Linear(3, 2)
        self.tied = nn.Linear(3, 2, bias=False)
        self.tied.weight = self.head.weight


def training(net: nn.Module | None = None) -> Objects:
    torch.manual_seed(0)
    model = net or Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    step(model, optimizer)
    more = {"u": torch.zeros(3), "v": 0.5, "n": {1: 5}, "l": [[1], [2, 3]]}
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 5),
        "tokens": 3,
        "plain": {"loss": 0.0, "flag": True, "n": 1, "t": torch.ones(2, 2), "more": more},
    }


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def swap_data(objects: Objects) -> None:
    for parameter in objects["model"].parameters():
        parameter.data = torch.randn_like(parameter.data)


def cast(objects: Objects) -> None:
    objects["model"].body[0].half()


def replace(key: str, make: Callable[[], Any]) -> Callable[[Objects], None]:
    return lambda objects: objects["plain"].__setitem__(key, make())


def nest(key: str, make: Callable[[], Any]) -> Callable[[Objects], None]:
    return lambda objects: objects["plain"]["more"].__setitem__(key, make())


def new_objects(objects: Objects) -> None:
    objects |= training()


def drop_first(objects: Objects) -> None:
    objects["plain"]["t"] = objects["plain"].pop("t")


def rename(objects: Objects) -> None:
    objects["plain"] = {"tt" if key == "t" else key: value for key, value in objects["plain"].items()}


def retype_key(objects: Objects) -> None:
    objects["plain"] = {np.str_(key) if key == "loss" else key: value for key, value in objects["plain"].items()}


def retype_deeper_key(objects: Objects) -> None:
    objects["plain"]["more"][np.str_("l")] = objects["plain"]["more"].pop("l")


def rename_deeper(objects: Objects) -> None:
    objects["plain"]["more"]["w"] = objects["plain"]["more"].pop("v")


def reorder_state(objects: Objects) -> None:
    state = list(objects["optimizer"].state.values())[-1]
    state["exp_avg"] = state.pop("exp_avg")


def rename_state(objects: Objects) -> None:
    for state in objects["optimizer"].state.values():
        items = list(state.items())
        state.clear()
        state.update(("mean" if key == "exp_avg" else key, value) for key, value in items)


def untie(objects: Objects) -> None:
    net = objects["model"]
    net.tied.weight = nn.Parameter(net.head.weight.detach().clone())


def tie(objects: Objects) -> None:
    objects["model"].body[2].weight.data = objects["model"].body[0].weight.data


def tie_outside(objects: Objects) -> None:
    objects["plain"]["t"] = objects["plain"]["more"]["u"]


def freeze(objects: Objects) -> None:
    objects["model"].body[0].requires_grad_(False)


def extend(objects: Objects) -> None:
    extra = nn.Linear(2, 2)
    objects["model"].add_module("extra", extra)
    objects["optimizer"].add_param_group({"params": list(extra.parameters())})


def regroup(objects: Objects) -> None:
    groups = objects["optimizer"].param_groups
    groups.append({**groups[0], "params": [groups[0]["params"].pop()]})


def set_lr(objects: Objects) -> None:
    objects["optimizer"].param_groups[0]["lr"] = 0.05


def train(objects: Objects) -> None:
    step(objects["model"], objects["optimizer"])
    objects["scheduler"].step()
    objects["tokens"] += 1


def drop_state(objects: Objects) -> None:
    objects["optimizer"].state.pop(next(iter(objects["optimizer"].state)))


def transpose(objects: Objects) -> None:
    objects["plain"]["t"].t_()  # of a 2 x 2 tensor: nothing but the strides tells


def replace_in_state(make: Callable[[torch.Tensor], Any]) -> Callable[[Objects], None]:
    def change(objects: Objects) -> None:
        state = next(iter(objects["optimizer"].state.values()))
        state["exp_avg"] = make(state["exp_avg"])

    return change


def wrap(make: Callable[[nn.Module], Any]) -> Callable[[Objects], None]:
    return lambda objects: objects.__setitem__("model", make(objects["model"]))


def loose_parameter(objects: Objects) -> None:
    optimizer = objects["optimizer"]
    parameters = optimizer.param_groups[0]["params"]
    old, parameters[0] = parameters[0], nn.Parameter(parameters[0].detach().clone())
    optimizer.state[parameters[0]] = optimizer.state.pop(old)


# What changes, and whether tensors stay the same in number, place, form and ties: None where either answer is right.
CHANGES: dict[str, tuple[Callable[[Objects], Any], bool | None]] = {
    "nothing": (lambda objects: None, True),
    "a step of training": (train, True),
    "the learning rate": (set_lr, True),
    "all parameters' memory": (swap_data, True),
    "all objects": (new_objects, True),
    "a bool": (replace("flag", lambda: 1), True),
    "a whole number": (replace("n", lambda: True), True),
    "a number's type": (replace("n", lambda: 1.0), True),
    "a sign of zero": (replace("loss", lambda: -0.0), True),
    "a number that is none": (replace("loss", lambda: float("nan")), True),
    "a text": (replace("loss", lambda: "0.0"), True),
    "none": (replace("flag", lambda: None), True),
    "a deeper sign of zero": (nest("v", lambda: -0.5), True),
    "a deeper plain value": (nest("v", lambda: None), True),
    "a deeper container": (nest("v", lambda: [1, (2, 3)]), True),
    "a plain key": (replace("new", lambda: 3), True),
    "a plain container": (replace("n", lambda: {"a": [1]}), True),
    "an enormous number": (replace("n", lambda: 1 << 80), True),
    "an odd value": (replace("n", lambda: 3 + 4j), True),
    "odd keys": (replace("n", lambda: {1: 2, None: 3}), True),
    "a class of the library": (replace("n", lambda: deque([1], 3)), True),
    "an array": (replace("n", lambda: np.arange(3)), False),
    "another tensor": (replace("t", lambda: torch.zeros(2, 2)), True),
    "a tensor more": (replace("new", lambda: torch.ones(1)), False),
    "a tensor for a number": (replace("n", lambda: torch.ones(1)), False),
    "a number for a tensor": (replace("t", lambda: 1), False),
    "a tensor's shape": (replace("t", lambda: torch.ones(4)), False),
    "a tensor's type": (replace("t", lambda: torch.ones(2, 2, dtype=torch.float64)), False),
    "a tensor's type of the same size": (replace("t", lambda: torch.ones(2, 2, dtype=torch.int32)), False),
    "a tensor's strides": (transpose, False),
    "a parameter for a tensor": (replace("t", lambda: nn.Parameter(torch.ones(2, 2), requires_grad=False)), False),
    "a gradient": (replace("t", lambda: torch.ones(2, 2, requires_grad=True)), False),
    "an intermediate result": (replace("t", lambda: torch.ones(2, 2, requires_grad=True) * 2), None),
    "a meta tensor": (replace("t", lambda: torch.ones(2, 2, device="meta")), False),
    "a sparse tensor": (replace("t", lambda: torch.eye(2).to_sparse()), False),
    "a compressed tensor": (replace("t", lambda: torch.eye(2).to_sparse_csr()), False),
    "an opaque tensor": (replace("t", lambda: torch.ones(2, 2).to_mkldnn()), False),
    "a quantized tensor": (
        replace("t", lambda: torch.quantize_per_tensor(torch.ones(2, 2), 1.0, 0, torch.qint8)),
        False,
    ),
    "a nested tensor": (replace("t", lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(1)])), False),
    "a complex tensor": (replace("t", lambda: torch.ones(2, 2, dtype=torch.complex64)), False),
    "a conjugate": (replace("t", lambda: torch.full((2, 2), 1j).conj()), False),
    "a negative": (replace("t", lambda: torch.full((2, 2), 1j).conj().imag), False),
    "an empty tensor": (replace("t", lambda: torch.ones(0, 2)), False),
    "a slice of a larger tensor": (replace("t", lambda: torch.ones(4, 4)[:2, :2]), False),
    "a deeper tensor": (nest("u", lambda: torch.ones(3, dtype=torch.float64)), False),
    "a deeper list": (nest("u", lambda: [torch.zeros(3)]), False),
    "the order of keys": (drop_first, False),
    "a key's name": (rename, False),
    "a key's type": (retype_key, None),
    "the type of a deeper key": (retype_deeper_key, None),
    "a deeper key's name": (rename_deeper, True),
    "the order of an optimizer's keys": (reorder_state, False),
    "the name of an optimizer's key": (rename_state, False),
    "a deeper key's type": (nest("n", lambda: {True: 5}), True),
    "how deeper lists are divided": (nest("l", lambda: [[1, 2], [3]]), True),
    "a tie between entries": (lambda objects: objects["plain"].__setitem__("t", objects["model"].head.weight), False),
    "a tie within an entry": (tie_outside, False),
    "a tie between parameters": (tie, False),
    "a tie cut": (untie, False),
    "parameters without gradient": (freeze, False),
    "a submodule and its group": (extend, False),
    "groups": (regroup, None),
    "a parameter that no module has": (loose_parameter, None),
    "an optimizer's state gone": (drop_state, False),
    "an optimizer's tensor": (replace_in_state(torch.clone), True),
    "an optimizer's type": (replace_in_state(torch.Tensor.double), False),
    "an optimizer's view": (replace_in_state(torch.Tensor.flatten), None),
    "a module cast": (cast, False),
    "a wrapper": (wrap(nn.DataParallel), None),
    "a compiled module": (wrap(torch.compile), None),
    "a container of modules": (wrap(lambda net: {"net": net, "x": 1}), False),
    "a container of one more": (wrap(lambda net: [net, nn.Linear(1, 1)]), False),
    "a module of another kind": (wrap(lambda net: nn.Sequential(net)), False),
    "a state of its own": (wrap(lambda net: net.state_dict()), None),
    "an entry more": (lambda objects: objects.__setitem__("new", 1), False),
    "an entry less": (lambda objects: objects.pop("tokens"), False),
    "the order of entries": (lambda objects: objects.__setitem__("model", objects.pop("model")), False),
    "an entry's kind": (lambda objects: objects.__setitem__("plain", OrderedDict(objects["plain"])), True),
    "an entry for a number": (lambda objects: objects.__setitem__("tokens", [1, 2]), True),
    "an entry of tensors": (lambda objects: objects.__setitem__("tokens", torch.ones(1)), False),
    "an entry of none": (lambda objects: objects.__setitem__("plain", None), False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_follows_a_change_is_as_if_captured_for_the_first_time(change: str) -> None:
    mutate, keeps_shape = CHANGES[change]
    recorder, objects = Recorder(), training()
    first = recorder.capture(objects)
    check(first, objects)
    assert recorder.capture(objects).shape is first.shape
    mutate(objects)
    second = recorder.capture(objects)
    check(second, objects)
    if keeps_shape is not None:
        assert (second.shape is first.shape) == keeps_shape
    train_if_can(objects)
    check(recorder.capture(objects), objects)


def train_if_can(objects: Objects) -> None:
    if isinstance(objects.get("tokens"), int):
        objects["tokens"] += 1
    with torch.no_grad():
        for group in objects["optimizer"].param_groups:
            for parameter in group["params"]:
                parameter.add_(1.0)


def holds(*made: Any) -> Objects:
    return {"before": torch.ones(1), "e": made[0] if len(made) == 1 else list(made), "after": torch.zeros(1)}


def test_what_is_no_plain_container_is_read_anew_each_time_and_keeps_its_shape() -> None:
    odd: list[Callable[[], Any]] = [
        lambda: deque([torch.ones(2), 1]),
        lambda: defaultdict(list, a=torch.ones(2), b=[1]),
        lambda: {1: torch.ones(2), "x": {None: torch.ones(2)}},
        lambda: {"s": np.ones(3), "t": torch.ones(2)},
        lambda: Namespace(a=torch.ones(1), b=[torch.ones(2)]),
        lambda: {"sparse": torch.eye(2).to_sparse(), "dense": torch.eye(2)},
        lambda: [torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), torch.ones(2)],
        lambda: {"$tensor": torch.ones(1), "$x": 1},
        lambda: {"none": torch.ones(0), "tie": torch.ones(1)},
        lambda: (torch.ones(1), {"x": np.float64(1.5)}, frozenset([1])),
        lambda: {"x": torch.Size([1, 2]), "y": torch.ones(1, requires_grad=True) * 2},
        lambda: OrderedDict(a=torch.ones(1), b=OrderedDict(c=torch.ones(2))),
        lambda: {f"k{i}": {"t": torch.ones(1), "n": 1} for i in range(70)},
    ]
    for make in odd:
        recorder, objects = Recorder(), holds(make())
        first = recorder.capture(objects)
        check(first, objects)
        for _ in range(3):
            objects |= holds(make())
            later = recorder.capture(objects)
            check(later, objects)
            assert later.shape is first.shape
            assert later.entries["e"] is first.entries["e"]


def test_an_odd_value_beside_tensors_may_change_without_them() -> None:
    recorder, objects = Recorder(), holds({"q": deque([torch.ones(2), 1]), "many": {"t": torch.ones(2)}})
    first = recorder.capture(objects)
    objects["e"]["q"][1] = 2
    second = recorder.capture(objects)
    check(second, objects)
    assert second.shape is first.shape
    assert second.entries["e"]["many"] is first.entries["e"]["many"]
    objects["e"]["q"].append(torch.ones(1))
    third = recorder.capture(objects)
    check(third, objects)
    assert third.shape is not first.shape
    objects["e"]["q"].rotate()
    check(recorder.capture(objects), objects)


def test_one_of_very_many_parts_may_change_alone() -> None:
    recorder, objects = Recorder(), holds({f"k{i}": {"t": torch.ones(1), "n": 1} for i in range(70)})
    first = recorder.capture(objects)
    objects["e"]["k7"]["n"] = True
    second = recorder.capture(objects)
    check(second, objects)
    assert second.shape is first.shape
    same = {key for key, tree in second.entries["e"].items() if tree is first.entries["e"][key]}
    assert set(second.entries["e"]) - same == {"k7"}


def test_a_torch_without_the_bulk_check_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    find = FIND_GUARDS.__wrapped__
    assert find() is not None  # of the version that the tests run with
    monkeypatch.setitem(sys.modules, "torch._C._dynamo.guards", None)  # type: ignore[arg-type]
    assert find() is None


def test_the_deepest_values_are_known_again_or_captured_from_scratch() -> None:
    for depth in (60, 70):
        recorder, objects = Recorder(), {"e": torch.ones(1)}
        for _ in range(depth):
            objects = {"e": [objects["e"]]}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PickleWarning)
            recorder.capture(objects)
            check(recorder.capture(objects), objects)


def test_modes_of_autograd_do_not_matter() -> None:
    recorder, objects = Recorder(), training()
    objects["plain"]["p"] = nn.Parameter(torch.ones(1))
    first = recorder.capture(objects)
    with torch.no_grad():
        assert recorder.capture(objects).shape is first.shape
    with torch.inference_mode():
        check(recorder.capture(objects), objects)
        check(recorder.capture(objects), objects)
    check(recorder.capture(objects), objects)


def test_lazy_and_nested_tensors_are_captured_from_scratch_each_time() -> None:
    for tensor in (torch.full((2,), 1j).conj(), torch.nested.nested_tensor([torch.ones(2), torch.ones(1)])):
        recorder, objects = Recorder(), holds({"x": tensor})
        shapes = []
        for _ in range(3):
            flat = recorder.capture(objects)
            check(flat, objects)
            shapes.append(flat.shape)
        assert len(set(map(id, shapes))) == 3


def test_parameters_without_values_are_named_once_as_not_saved() -> None:
    model, recorder = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta")), Recorder()
    with pytest.warns(PickleWarning, match=r"^model\.1\.weight, model\.1\.bias: on the meta device, .* NOT saved"):
        recorder.capture({"model": model})
    recorder.capture({"model": model})  # warnings are errors here
    with pytest.warns(PickleWarning, match=r"^parts\.0\.0\.weight, .* and 1 more: "):
        Recorder().capture({"parts": [nn.Sequential(*(nn.Linear(2, 2, device="meta") for _ in range(2)))]})


def test_a_module_may_leave_parameters_without_values_out_of_its_state() -> None:
    class Adapter(nn.Linear):
        def state_dict(self, *args: Any, **how: Any) -> Any:
            return {"scale": torch.ones(1)}

    Recorder().capture({"model": Adapter(2, 2, device="meta")})


def test_ties_are_found_and_lost_with_tensors_that_have_no_address() -> None:
    recorder, empty = Recorder(), torch.ones(0)
    objects = holds(empty, empty, torch.ones(0), 1)
    first = recorder.capture(objects)
    check(first, objects)
    assert len(first.tensors) == 4
    assert recorder.capture(objects).shape is first.shape
    objects["e"][1] = torch.ones(0)
    second = recorder.capture(objects)
    check(second, objects)
    assert len(second.tensors) == 5
    objects["e"][0] = objects["e"][2]
    check(recorder.capture(objects), objects)


def test_tensors_on_several_levels_keep_their_numbers_when_a_leaf_beside_them_changes() -> None:
    recorder, objects = Recorder(), holds({"more": {"deep": {"x": torch.ones(2)}, "flat": torch.zeros(2), "n": 1}})
    first = recorder.capture(objects)
    for n in (2, 2, 3):
        objects["e"]["more"]["n"] = n
        flat = recorder.capture(objects)
        check(flat, objects)
        assert flat.shape is first.shape


def test_parts_stay_the_same_when_another_key_goes() -> None:
    recorder, objects = Recorder(), holds({"x": {"t": torch.ones(2)}, "y": [1]})
    first = recorder.capture(objects)
    del objects["e"]["y"]
    second = recorder.capture(objects)
    check(second, objects)
    assert second.shape is first.shape
    assert second.entries["e"]["x"] is first.entries["e"]["x"]


def test_a_tensor_that_stands_twice_is_one() -> None:
    recorder, tensor = Recorder(), torch.ones(2)
    objects = holds(tensor, tensor, torch.ones(2))
    first = recorder.capture(objects)
    objects["e"][:2] = [torch.zeros(2)] * 2
    second = recorder.capture(objects)
    check(second, objects)
    assert second.shape is first.shape
    objects["e"][0] = torch.zeros(2)
    check(recorder.capture(objects), objects)


def test_an_intermediate_result_is_cut_off_from_its_graph_though_it_looks_like_what_was_there() -> None:
    recorder, objects = Recorder(), holds({"t": torch.ones(2, requires_grad=True)})
    recorder.capture(objects)
    objects["e"]["t"] = objects["e"]["t"] * 2
    flat = recorder.capture(objects)
    check(flat, objects)
    assert not flat.tensors[1].requires_grad


def test_unchanged_parts_are_the_very_same_objects() -> None:
    recorder, objects = Recorder(), training()
    first = recorder.capture(objects)
    train(objects)
    set_lr(objects)
    second = recorder.capture(objects)
    assert second.shape is first.shape
    assert second.entries["model"] is first.entries["model"]
    assert second.entries["plain"] is first.entries["plain"]
    assert second.entries["optimizer"]["state"] is first.entries["optimizer"]["state"]
    assert second.entries["optimizer"]["param_groups"][0]["lr"] == 0.05
    assert first.entries["optimizer"]["param_groups"][0]["lr"] == 0.1
    assert second.notes["optimizer"] is first.notes["optimizer"]
    third = recorder.capture(objects)
    assert third.entries["optimizer"] is second.entries["optimizer"]
    assert third.tensors is not second.tensors


def calls_of(recorder: Recorder, objects: Objects) -> int:
    """How many of our functions run while the objects are captured."""
    count = 0

    def notice(frame: Any, event: str, _: Any) -> None:
        nonlocal count
        count += event == "call" and "ckptmgr" in frame.f_code.co_filename

    sys.setprofile(notice)
    try:
        recorder.capture(objects)
    finally:
        sys.setprofile(None)
    return count


def test_the_second_capture_calls_nothing_per_tensor(request: pytest.FixtureRequest) -> None:
    if "without" in request.node.name:
        pytest.skip("without the bulk check each tensor is looked at")
    counts = []
    for size in (20, 400):
        objects = training(nn.ParameterList([nn.Parameter(torch.ones(2)) for _ in range(size)]))
        recorder = Recorder()
        recorder.capture(objects)
        set_lr(objects)
        counts.append(calls_of(recorder, objects))
    assert counts[0] == counts[1]


def test_nothing_is_kept_alive_between_captures() -> None:
    recorder, objects = Recorder(), training()
    objects["odd"] = deque([torch.ones(2)])
    recorder.capture(objects)
    recorder.capture(objects)
    state = next(iter(objects["optimizer"].state.values()))
    watched = [weakref.ref(one) for one in (objects["model"], objects["model"].head.weight, objects["optimizer"])]
    watched += [weakref.ref(one) for one in (state["exp_avg"], objects["plain"]["t"], objects["odd"][0])]
    del objects, state
    gc.collect()
    assert [reference() for reference in watched] == [None] * 6


def test_names_follow_parameters_that_move_and_new_ones_in_their_memory() -> None:
    recorder, names = Recorder(), []
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    optimizer = torch.optim.SGD([{"params": [net[0].weight]}, {"params": [net[1].weight]}], lr=1.0)
    for _ in range(3):
        flat = recorder.capture({"net": net, "o": optimizer})
        check(flat, {"net": net, "o": optimizer})
        names.append(flat.notes["o"]["params"])
        groups = optimizer.param_groups
        groups[0]["params"], groups[1]["params"] = groups[1]["params"], groups[0]["params"]
    assert names == [
        [["net.0.weight"], ["net.1.weight"]],
        [["net.1.weight"], ["net.0.weight"]],
        [["net.0.weight"], ["net.1.weight"]],
    ]
    assert recorder.capture({"net": net, "o": optimizer}).notes["o"]["params"] == names[1]
    net[0], net[1] = net[1], net[0]
    assert recorder.capture({"net": net, "o": optimizer}).notes["o"]["params"] == names[0]


def test_keys_are_named_as_ever_when_a_module_names_them_otherwise() -> None:
    class Renaming(nn.Linear):
        names = ("a", "b")

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return dict(zip(self.names, (self.weight.detach(), self.bias.detach()), strict=True))

    net, recorder = Renaming(2, 2), Recorder()
    recorder.capture({"net": net})
    net.names = ("a", "c")
    check(recorder.capture({"net": net}), {"net": net})


def test_keys_are_named_as_ever_when_what_looks_like_a_wrapper_is_none() -> None:
    class Holder(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    recorder, layer = Recorder(), nn.Linear(2, 2)
    kept = [list(recorder.capture({"net": kind(layer)}).entries["net"]) for kind in (nn.DataParallel, Holder)]
    assert kept == [["weight", "bias"], ["module.weight", "module.bias"]]


def test_a_module_within_itself_is_refused() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1)))
    net[1].append(net)
    with pytest.raises(RecursionError):
        Recorder().capture({"net": net})


def test_modules_that_stand_on_several_levels_are_named_as_ever() -> None:
    shared = nn.Sequential(nn.Linear(1, 1))
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.Sequential(shared, nn.Linear(1, 1)))})
    recorder, objects = Recorder(), training(net)
    first = recorder.capture(objects)
    check(first, objects)
    assert recorder.capture(objects).shape is first.shape
    net["a"] = nn.Sequential(nn.Linear(1, 1))
    check(recorder.capture(objects), objects)


def test_parameters_without_gradient_are_still_but_not_where_their_memory_is_trained() -> None:
    recorder, net = Recorder(), Net()
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    first = recorder.capture({"net": net, "sgd": {"copy": net.head.weight.detach().clone()}})
    still = {key for key, node in first.entries["net"].items() if node["$tensor"] in first.still}
    assert still == set(dict(net.named_parameters(remove_duplicate=False)))
    assert len(first.still) == len(list(net.parameters()))
    net.body[0].weight = nn.Parameter(net.body[2].weight.detach())
    second = recorder.capture({"net": net, "sgd": {"copy": net.head.weight.detach().clone()}})
    still = {key for key, node in second.entries["net"].items() if node["$tensor"] in second.still}
    assert not still & {"body.0.weight", "body.2.weight"}


def test_parameters_that_leave_the_saved_memory_are_no_longer_still() -> None:
    class Shadowed(nn.Linear):
        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return {"weight": self.shadow}

    net = Shadowed(2, 2).requires_grad_(False)
    net.shadow = net.weight.detach()
    recorder = Recorder()
    assert recorder.capture({"net": net}).still == {0}
    net.shadow = torch.zeros(2, 2)
    assert recorder.capture({"net": net}).still == set()


def test_only_some_entries_are_captured_and_named_by_all() -> None:
    recorder, objects = Recorder(), training()
    first = recorder.capture(objects, only=["optimizer"])
    assert list(first.entries) == ["optimizer"]
    assert first.notes == capture(objects, only=["optimizer"]).notes
    assert recorder.capture(objects, only=["optimizer"]).shape is first.shape
    second = recorder.capture(objects, only=["model"])
    assert (list(second.entries), second.shape is first.shape) == (["model"], False)
    with pytest.raises(ConfigError, match="no entry 'modle'"):
        recorder.capture(objects, only=["modle"])


def test_an_error_is_the_same_at_any_capture_and_costs_the_next_one_nothing() -> None:
    recorder, objects = Recorder(), training()
    recorder.capture(objects)
    objects["plain"]["more"]["again"] = objects["plain"]
    with pytest.raises(ConfigError) as expected:
        capture(objects)
    with pytest.raises(ConfigError) as raised:
        recorder.capture(objects)
    assert str(raised.value) == str(expected.value)
    del objects["plain"]["more"]["again"]
    check(recorder.capture(objects), objects)

    class Cyclic:
        def state_dict(self) -> Any:
            root: Objects = {"a": {}}
            root["a"] |= {"root": root} if objects["is_cyclic"] else {}
            return root

    objects |= {"is_cyclic": False, "cyclic": Cyclic()}
    recorder.capture(objects)
    objects["is_cyclic"] = True
    with pytest.raises(ConfigError, match=r"^cyclic\.a\.root contains itself"):
        recorder.capture(objects)
    del objects["cyclic"]

    class Broken:
        def state_dict(self) -> None:
            raise OSError("no")

    objects["tokens"] = Broken()
    with pytest.raises(SaveFailedError, match=r"tokens: .*Broken\.state_dict\(\) failed"):
        recorder.capture(objects)
    objects["tokens"] = 4
    check(recorder.capture(objects), objects)


def test_what_needs_pickling_is_pickled_and_named_each_time() -> None:
    recorder = Recorder()
    objects = holds({"a.b": int, "a": {"b": lambda: 1}, "t": torch.ones(2)})
    told = []
    for count in range(3):
        objects["tokens"] = count
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            flat = recorder.capture(objects)
        told.append([str(warning.message).split(",")[0] for warning in caught])
        assert {warning.category for warning in caught} == {PickleWarning}
        assert flat.objects is not None
        assert flat.entries["e"]["a"] == {"b": {"$unsaved": "builtins.function"}}
        assert flat.entries["e"]["a.b"] == {"$object": "e.a.b"}
    assert told[0] == told[1] == told[2]
    assert len(told[0]) == 2


def test_random_streams_stay_as_they_were_at_every_capture() -> None:
    class Loud:
        def state_dict(self) -> dict[str, Any]:
            return {"drawn": torch.rand(1).item()}

    recorder = Recorder()
    recorder.capture({"loud": Loud()})
    state = torch.get_rng_state()
    flat = recorder.capture({"loud": Loud()})
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(from_json(flat.ranks[0].rng)["torch"], state)


# Any change at all

TENSORS: list[Callable[[], torch.Tensor]] = [
    lambda: torch.ones(2),
    lambda: torch.zeros(2),
    lambda: torch.ones(2, dtype=torch.int32),
    lambda: torch.ones(0),
    lambda: torch.arange(4.0)[::2],
    lambda: nn.Parameter(torch.ones(2)),
    lambda: torch.eye(2).to_sparse(),
    lambda: torch.ones(2, requires_grad=True) * 1,
    lambda: torch.ones(2, device="meta"),
]
SHARED = [make() for make in TENSORS[:6]]
LEAVES: list[Any] = [None, True, 1, 1.0, 0.0, -0.0, float("nan"), "a", "", 1 << 70, (), b"x"]

leaves = st.sampled_from(LEAVES)
tensors = st.one_of(st.sampled_from(TENSORS).map(lambda make: make()), st.sampled_from(SHARED))
keys = st.sampled_from(["a", "b", "c", "$d", 1, 2, True, None])
values = st.recursive(
    st.one_of(leaves, tensors),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.lists(inner, max_size=3).map(deque),
        st.dictionaries(keys, inner, max_size=3),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=3).map(OrderedDict),
    ),
    max_leaves=8,
)


def containers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list | deque):
        yield value
    if isinstance(value, dict | list | deque | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from containers(item)


def copied(value: Any) -> Any:
    """New containers, the same tensors."""
    if isinstance(value, dict):
        return type(value)((key, copied(item)) for key, item in value.items())
    return type(value)(map(copied, value)) if isinstance(value, list | tuple | deque) else value


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_sequence_of_changes_is_captured_as_if_from_scratch(data: st.DataObject) -> None:
    recorder = Recorder()
    state: Objects = data.draw(st.dictionaries(st.sampled_from("xyz"), values, min_size=1, max_size=3))
    check(recorder.capture(state), state)
    for _ in range(data.draw(st.integers(1, 4))):
        inner = list(containers(state))
        target = inner[data.draw(st.integers(0, len(inner) - 1))]
        kind = data.draw(st.sampled_from(["nothing", "leaf", "tensor", "value", "remove", "copy", "rename", "swap"]))
        place = list(target) if isinstance(target, dict) else list(range(len(target)))
        if kind == "copy":
            state = copied(state)
        elif kind == "remove" and len(place) > (target is state):
            del target[data.draw(st.sampled_from(place))]
        elif kind == "rename" and isinstance(target, dict) and target is not state:
            items = list(target.items())
            target.clear()
            target.update((data.draw(keys) if data.draw(st.booleans()) else key, value) for key, value in items)
        elif kind == "swap" and len(place) > 1:
            target[place[0]], target[place[1]] = target[place[1]], target[place[0]]
        elif kind not in ("nothing", "rename", "swap", "remove") and place:
            source = {"leaf": leaves, "tensor": tensors}.get(kind, values)
            target[data.draw(st.sampled_from(place))] = data.draw(source)
        check(recorder.capture(state), state)
    last = recorder.capture(state)
    again = recorder.capture(copied(state))
    assert again.shape is last.shape
    assert all(again.entries[name] is tree for name, tree in last.entries.items() if isinstance(tree, dict | list))


def test_names_follow_which_entries_are_saved_from_capture_to_capture() -> None:
    recorder, objects = Recorder(), training()
    objects = {"part": objects["model"].head, **objects}
    for only in (None, ["model", "optimizer"], None, ["optimizer"], ["optimizer", "model"], ["part", "optimizer"]):
        flat = recorder.capture(objects, only=only)
        assert flat.notes == capture(objects, only=only).notes
        named = {name.partition(".")[0] for name in flat.notes["optimizer"]["params"][0]}
        assert named == {"model"} | ({"part"} if only is None or "model" not in only else set())
