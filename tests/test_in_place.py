"""What is restored is read straight into the memory that the objects have already, wherever that is right."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from ckptmgr.errors import DamagedError, StateMismatchError
from ckptmgr.formats.safetensors_file import SafetensorsFormat
from ckptmgr.formats.torch_file import TorchFormat
from ckptmgr.state import RestorePlan, capture, match
from ckptmgr.state.collector import uncollected
from ckptmgr.state.snapshot import StoredState
from ckptmgr.testing.format_contract import written

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:'set_vital'")

FORMATS = {"safetensors": SafetensorsFormat, "torch": TorchFormat}


def save(**objects: Any) -> StoredState:
    format = SafetensorsFormat()
    return format.open(written(format, capture(objects)))


def restore(stored: StoredState, **targets: Any) -> RestorePlan:
    plan = match(targets, stored)
    plan.apply(stored.fetch)
    return plan


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    def loss() -> Any:
        optimizer.zero_grad()
        value = model(torch.arange(8.0).view(4, 2)).square().mean()
        value.backward()
        return value

    for _ in range(steps):
        optimizer.step(loss)


def trained(
    seed: int, make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = net(seed)
    optimizer = make(model.parameters())
    train(model, optimizer)
    return model, optimizer


def adamw(parameters: Iterable[nn.Parameter], **more: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=0.1, **more)


def states(optimizer: torch.optim.Optimizer) -> dict[tuple[int, str], torch.Tensor]:
    """The tensors of an optimizer's state, by the number of the parameter and the key."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        (number, key): value
        for number, parameter in enumerate(parameters)
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


def ids(tensors: dict[tuple[int, str], torch.Tensor]) -> set[int]:
    """Which tensors these are; the caller keeps them alive."""
    return {id(tensor) for tensor in tensors.values()}


def same(left: torch.optim.Optimizer, right: torch.optim.Optimizer) -> bool:
    """Whether two optimizers have the same state, settings and order."""
    a, b = left.state_dict(), right.state_dict()
    return _same(a["state"], b["state"]) and _same(a["param_groups"], b["param_groups"])


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


# Optimizers

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adagrad": torch.optim.Adagrad,
    "adafactor": torch.optim.Adafactor,
    "nadam": torch.optim.NAdam,
    "asgd": torch.optim.ASGD,
    "rprop": torch.optim.Rprop,
    "lbfgs": lambda p: torch.optim.LBFGS(p, history_size=2, max_iter=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_the_same_with_state_read_into_the_state_that_is_there(name: str) -> None:
    model, optimizer = trained(0, OPTIMIZERS[name])
    other, live = trained(1, OPTIMIZERS[name])
    restore(save(model=model, optimizer=optimizer), model=other, optimizer=live)
    assert same(live, optimizer)
    train(model, optimizer)
    train(other, live)
    assert _same(dict(other.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("name", ["adamw", "fused", "sgd", "adagrad", "nadam"])
@pytest.mark.parametrize("format", FORMATS)
def test_an_optimizer_keeps_the_tensors_of_its_state(name: str, format: str) -> None:
    model, optimizer = trained(0, OPTIMIZERS[name])
    other, live = trained(1, OPTIMIZERS[name])
    before = states(live)
    made = FORMATS[format]()
    stored = made.open(written(made, capture({"model": model, "optimizer": optimizer})))
    restore(stored, model=other, optimizer=live)
    assert same(live, optimizer)
    assert {key: id(value) for key, value in states(live).items()} == {key: id(value) for key, value in before.items()}


def test_state_goes_straight_to_the_parameter_of_the_same_name_in_another_order() -> None:
    model, optimizer = trained(0, adamw)
    other, live = trained(1, lambda parameters: adamw(reversed(list(parameters))))
    before = states(live)
    restore(save(model=model, optimizer=optimizer), model=other, optimizer=live)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert _same(live.state[mine], optimizer.state[theirs])
    assert ids(states(live)) == ids(before)


def test_settings_come_back_with_state_that_is_read_in_place() -> None:
    model, optimizer = trained(0, lambda p: adamw(p, betas=(0.5, 0.6), weight_decay=0.3))
    optimizer.param_groups[0]["lr"] = 0.7
    optimizer.param_groups[0]["initial_lr"] = 0.9
    other, live = trained(1, adamw)
    restore(save(model=model, optimizer=optimizer), model=other, optimizer=live)
    group = live.param_groups[0]
    assert (group["lr"], group["initial_lr"], group["betas"], group["weight_decay"]) == (0.7, 0.9, (0.5, 0.6), 0.3)
    assert [id(parameter) for parameter in group["params"]] == [id(parameter) for parameter in other.parameters()]


def test_state_that_the_checkpoint_lacks_is_gone_and_state_that_is_lacking_here_comes() -> None:
    model, optimizer = trained(0, adamw)
    other, live = trained(1, adamw)
    first, last = next(model.parameters()), list(other.parameters())[-1]
    del optimizer.state[first], live.state[last]
    optimizer.state["note"] = 5  # type: ignore[index]
    before = states(live)
    restore(save(model=model, optimizer=optimizer), model=other, optimizer=live)
    assert same(live, optimizer)
    assert next(other.parameters()) not in live.state
    assert live.state["note"] == 5  # type: ignore[index]
    assert len(ids(states(live)) & ids(before)) == len(before) - 3


def test_state_under_a_number_of_its_own_is_not_taken_for_a_parameter_s() -> None:
    class Own(torch.optim.AdamW):
        """Numbers its parameters from 10 on."""

        def state_dict(self) -> Any:
            state = super().state_dict()
            state["state"] = {key + 10: value for key, value in state["state"].items()} | {0: {"x": torch.ones(1)}}
            state["param_groups"] = [{**group, "params": list(range(10, 16))} for group in state["param_groups"]]
            return state

    model, optimizer = trained(0, Own)
    other, live = trained(1, Own)
    restore(save(model=model, optimizer=optimizer), model=other, optimizer=live)
    assert live.state.pop(0) == {"x": 1}  # type: ignore[call-overload]
    assert same(live, optimizer)


def test_keys_that_differ_from_the_state_that_is_there_are_those_of_the_checkpoint() -> None:
    model, optimizer = trained(0, lambda p: adamw(p, amsgrad=True))
    other, live = trained(1, adamw)
    for value in live.state.values():
        value["mine"] = torch.ones(1)
    restore(save(model=model, optimizer=optimizer), model=other, optimizer=live)
    assert same(live, optimizer)


@pytest.mark.parametrize("hook", ["register_load_state_dict_pre_hook", "register_load_state_dict_post_hook"])
def test_hooks_see_state_that_is_new_and_have_the_last_word(hook: str) -> None:
    model, optimizer = trained(0, adamw)
    other, live = trained(1, adamw)
    before = states(live)

    def halve(_: Any, given: Any = None) -> None:
        for value in (given["state"] if given is not None else live.state).values():
            value["exp_avg"] = value["exp_avg"] / 2

    getattr(live, hook)(halve)
    restore(save(model=model, optimizer=optimizer), model=other, optimizer=live)
    assert not ids(states(live)) & ids(before)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(live.state[mine]["exp_avg"], optimizer.state[theirs]["exp_avg"] / 2)


def test_an_optimizer_that_loads_in_a_way_of_its_own_gets_state_that_is_new() -> None:
    class Own(torch.optim.AdamW):
        seen: Any = None

        def load_state_dict(self, state_dict: Any) -> None:
            self.seen = state_dict
            super().load_state_dict(state_dict)

    model, optimizer = trained(0, Own)
    other, live = trained(1, Own)
    before = states(live)
    restore(save(model=model, optimizer=optimizer), model=other, optimizer=live)
    assert same(live, optimizer)
    assert not ids(states(live)) & ids(before)
    assert live.seen["param_groups"][0]["params"] == list(range(6))  # type: ignore[attr-defined]


def test_code_that_an_optimizer_runs_when_it_is_loaded_runs() -> None:
    class Own(torch.optim.AdamW):
        seen = 0

        def __setstate__(self, state: Any) -> None:
            super().__setstate__(state)
            self.seen = len(self.state)

    model, optimizer = trained(0, Own)
    other, live = trained(1, Own)
    restore(save(model=model, optimizer=optimizer), model=other, optimizer=live)
    assert (live.seen, same(live, optimizer)) == (6, True)  # type: ignore[attr-defined]


def test_steps_that_were_numbers_in_an_older_torch_become_tensors() -> None:
    model, optimizer = trained(0, adamw)
    for value in optimizer.state.values():
        value["step"] = 2
    other, live = trained(1, adamw)
    restore(save(model=model, optimizer=optimizer), model=other, optimizer=live)
    assert {(type(value["step"]), float(value["step"])) for value in live.state.values()} == {(torch.Tensor, 2.0)}


def test_one_tensor_in_the_state_of_several_parameters_stays_one() -> None:
    model, optimizer = trained(0, adamw)
    shared = torch.tensor(7.0)
    for value in optimizer.state.values():
        value["step"] = shared
    other, live = trained(1, adamw)
    restore(save(model=model, optimizer=optimizer), model=other, optimizer=live)
    assert same(live, optimizer)
    assert len({id(value["step"]) for value in live.state.values()}) == 1


def test_memory_that_several_parts_of_a_state_share_here_is_not_read_into() -> None:
    model, optimizer = trained(0, adamw)
    for number, value in enumerate(optimizer.state.values()):
        value["step"] = torch.tensor(float(number))
    other, live = trained(1, adamw)
    shared = torch.tensor(1.0)
    flat = torch.zeros(8)
    for value in live.state.values():
        value["step"] = shared
    live.state[other[2].weight]["exp_avg"] = flat[:3].view(1, 3)
    live.state[other[2].weight]["exp_avg_sq"] = flat[2:5].view(1, 3)
    restore(save(model=model, optimizer=optimizer), model=other, optimizer=live)
    assert same(live, optimizer)
    assert (shared.item(), flat.any().item()) == (1.0, False)


@pytest.mark.parametrize("targets", ["optimizer", "both", "optimizer first"])
def test_state_that_lies_in_a_parameter_never_overwrites_it(targets: str) -> None:
    model, optimizer = trained(0, adamw)
    other, live = trained(1, adamw)
    for one in (model, other):
        state = (optimizer if one is model else live).state
        for parameter in one.parameters():
            state[parameter]["exp_avg"] = torch.rand_like(parameter)
    for parameter in other.parameters():
        live.state[parameter]["exp_avg"] = parameter.detach().view_as(parameter)
    before = [parameter.detach().clone() for parameter in other.parameters()]
    stored = save(model=model, optimizer=optimizer)
    chosen: dict[str, Any] = {"optimizer": live} if targets == "optimizer" else {"model": other, "optimizer": live}
    restore(stored, **dict(reversed(chosen.items())) if targets == "optimizer first" else chosen)
    expected = before if targets == "optimizer" else list(model.parameters())
    assert all(map(torch.equal, other.parameters(), expected))
    assert same(live, optimizer)


@pytest.mark.parametrize("now", [torch.float32, torch.bfloat16])
def test_full_precision_state_of_half_precision_parameters_is_read_in_place_bit_for_bit(now: torch.dtype) -> None:
    """Where the parameters have changed their precision since, the state follows, as torch has it."""
    model, other = nn.Linear(2, 1).bfloat16(), nn.Linear(2, 1).to(now)
    optimizer, live = adamw(model.parameters()), adamw(other.parameters())
    for one, its in ((optimizer, model), (live, other)):
        for parameter in its.parameters():
            one.state[parameter] = {"step": torch.tensor(3.0), "exp_avg": torch.rand(parameter.shape)}
    restore(save(model=model, optimizer=optimizer), model=other, optimizer=live)
    assert same(live, optimizer)


def test_state_follows_a_parameter_whose_precision_has_changed_even_where_the_old_one_would_fit() -> None:
    model, other = nn.Linear(2, 1), nn.Linear(2, 1).bfloat16()
    optimizer, live = adamw(model.parameters()), adamw(other.parameters())
    for one, its in ((optimizer, model), (live, other)):
        for parameter in its.parameters():
            one.state[parameter] = {"step": torch.tensor(3.0), "exp_avg": torch.rand(parameter.shape)}
    restore(save(model=model, optimizer=optimizer), model=other, optimizer=live)
    assert {value["exp_avg"].dtype for value in live.state.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda value: value.requires_grad_(),
        lambda value: value.double(),
        lambda value: value.to_sparse() if value.dim() else value.clone(),
        lambda value: nn.Parameter(value),
        lambda value: value.new_zeros(()).expand(value.shape),
        lambda value: torch._neg_view(value.clone()),
        lambda value: value.new_zeros(7),
    ],
)
def test_state_here_that_is_not_like_the_stored_one_is_replaced(spoil: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model, optimizer = trained(0, adamw)
    other, live = trained(1, adamw)
    for value in live.state.values():
        value["exp_avg"] = spoil(value["exp_avg"])
    restore(save(model=model, optimizer=optimizer), model=other, optimizer=live)
    assert same(live, optimizer)
    assert not any(type(v) is nn.Parameter or v.requires_grad for v in states(live).values())


def test_stored_state_that_wants_grad_comes_back_so() -> None:
    model, optimizer = trained(0, adamw)
    for value in optimizer.state.values():
        value["exp_avg"].requires_grad_()
        value["exp_avg_sq"] = nn.Parameter(value["exp_avg_sq"])
    other, live = trained(1, adamw)
    restore(save(model=model, optimizer=optimizer), model=other, optimizer=live)
    assert all(value["exp_avg"].requires_grad for value in live.state.values())
    assert all(type(value["exp_avg_sq"]) is nn.Parameter for value in live.state.values())


def test_an_object_that_holds_the_same_tensor_gets_a_copy_of_its_own() -> None:
    class Keeper:
        held: Any = None

        def state_dict(self) -> Any:
            return {"held": self.held}

        def load_state_dict(self, state: Any) -> None:
            self.held = state["held"]

    model, optimizer = trained(0, adamw)
    keeper, fresh = Keeper(), Keeper()
    keeper.held = next(iter(optimizer.state.values()))["exp_avg"]
    other, live = trained(1, adamw)
    restore(save(model=model, optimizer=optimizer, keeper=keeper), model=other, optimizer=live, keeper=fresh)
    own = live.state[next(other.parameters())]["exp_avg"]
    assert torch.equal(fresh.held, own)
    assert fresh.held.data_ptr() != own.data_ptr()


def test_nothing_is_touched_by_a_refusal() -> None:
    model, optimizer = trained(0, adamw)
    other, live = trained(1, adamw)
    before = {key: value.clone() for key, value in states(live).items()}
    with pytest.raises(StateMismatchError, match=r"gone: the checkpoint has no such entry"):
        match({"model": other, "optimizer": live, "gone": nn.Linear(1, 1)}, save(model=model, optimizer=optimizer))
    assert _same(before, states(live))


def test_what_a_broken_read_has_left_is_overwritten_by_the_next_one() -> None:
    model, optimizer = trained(0, adamw)
    other, live = trained(1, adamw)
    stored = save(model=model, optimizer=optimizer)

    def torn(wanted: Any, **more: Any) -> Any:
        for target in wanted.values():
            if target is not None:
                target.detach().fill_(-1)
        raise DamagedError("torn")

    with pytest.raises(DamagedError, match="torn"):
        match({"model": other, "optimizer": live}, stored).apply(torn)
    restore(stored, model=other, optimizer=live)
    assert same(live, optimizer)
    assert _same(dict(other.state_dict()), dict(model.state_dict()))


# Modules


class Hooked(nn.Linear):
    """Says what its loading code has seen."""

    def __init__(self) -> None:
        super().__init__(2, 1)
        self.log: list[str] = []


def _pre_hook(module: Any) -> None:
    module.register_load_state_dict_pre_hook(lambda *_: module.log.append("seen"))


def _post_hook(module: Any) -> None:
    module.register_load_state_dict_post_hook(lambda *_: module.log.append("seen"))


def _own_load(module: Any) -> None:
    load = module.load_state_dict
    module.load_state_dict = lambda state: (module.log.append("seen"), load(state))


def _own_part(module: Any) -> None:
    load = module._load_from_state_dict
    module._load_from_state_dict = lambda *args: (module.log.append("seen"), load(*args))


@pytest.mark.parametrize("hook", [_pre_hook, _post_hook, _own_load, _own_part])
def test_loading_code_of_a_module_runs(hook: Callable[[Any], None]) -> None:
    model, other = Hooked(), Hooked()
    hook(other)
    restore(save(model=model), model=other)
    assert (other.log, _same(dict(other.state_dict()), dict(model.state_dict()))) == (["seen"], True)


def test_state_that_a_hook_changes_on_its_way_out_is_loaded_on_its_way_in() -> None:
    """What such a module shows as its state is not its memory."""

    def build() -> nn.Linear:
        module = nn.Linear(2, 1)
        module.register_state_dict_post_hook(lambda _m, state, prefix, _: state.update(weight=state["weight"] * 2))
        module.register_load_state_dict_pre_hook(lambda _m, state, *_: state.update(weight=state["weight"] / 2))
        return module

    model, other = build(), build()
    restore(save(model=model), model=other)
    assert torch.equal(other.weight, model.weight)


def test_parameters_are_swapped_where_torch_was_asked_to() -> None:
    seen: list[int] = []

    class Own(nn.Parameter):
        def module_load(self, other: torch.Tensor, assign: bool = False) -> torch.Tensor:
            seen.append(self.numel())
            return Own(other.detach().clone())

    model, other = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    other.weight = Own(other.weight.detach())
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        restore(save(model=model), model=other)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert (seen, torch.equal(other.weight, model.weight)) == ([2], True)


def test_a_module_with_very_many_children_is_loaded_with_its_ties_and_casts() -> None:
    def build(dtype: torch.dtype) -> nn.ModuleList:
        modules = nn.ModuleList(nn.Linear(1, 1) for _ in range(50)).to(dtype)
        modules[1].weight = modules[0].weight
        return modules

    model, other = build(torch.float32), build(torch.float64)
    plan = restore(save(model=model), model=other)
    assert all(torch.equal(a, b.double()) for a, b in zip(other.parameters(), model.parameters(), strict=True))
    assert other[1].weight is other[0].weight
    assert len(plan.casts) == 100


def test_weights_tied_by_memory_alone_are_read_once_into_it() -> None:
    def build() -> nn.ModuleList:
        modules = nn.ModuleList([nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)])
        modules[1].weight.data = modules[0].weight.data
        return modules

    model, other = build(), build()
    place = other[0].weight.data_ptr()
    stored = save(model=model)

    def only_read(wanted: Any, **more: Any) -> dict[Any, torch.Tensor]:
        stored.fetch(wanted)
        return {}  # nothing is left to be copied

    match({"model": other}, stored).apply(only_read)
    assert [torch.equal(other[i].weight, model[i].weight) for i in (0, 1)] == [True, True]
    assert [other[i].weight.data_ptr() for i in (0, 1)] == [place, place]


def test_of_parts_that_overlap_the_last_one_stands_as_with_torch() -> None:
    def build() -> nn.Module:
        module = nn.Module()
        base = torch.arange(8.0)
        module.register_buffer("base", base)
        module.register_buffer("middle", base[3:5] if len(built) else torch.tensor([50.0, 60.0]))
        module.register_buffer("far", torch.zeros(2))
        built.append(module)
        return module

    built: list[nn.Module] = []
    model, other = build(), build()
    restore(save(model=model), model=other)
    assert other.base.tolist() == [0, 1, 2, 50, 60, 5, 6, 7]  # type: ignore[operator]
    assert other.middle.tolist() == [50, 60]  # type: ignore[operator]


def test_columns_of_one_matrix_are_each_filled() -> None:
    """They lie between each other without sharing an element."""

    def build(value: float) -> nn.Module:
        module = nn.Module()
        matrix = torch.full((3, 4), value)
        for column in range(4):
            module.register_buffer(f"c{column}", matrix[:, column])
        module.register_buffer("none", torch.zeros(0, 3).t())
        return module

    model, other = build(2.0), build(1.0)
    restore(save(model=model), model=other)
    assert _same(dict(other.state_dict()), dict(model.state_dict()))


def test_autograd_notices_that_a_value_it_kept_was_replaced() -> None:
    model = nn.Linear(2, 2)
    stored = save(model=model)
    loss = model(model(torch.ones(1, 2))).sum()
    restore(stored, model=model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("is_within", [True, False])
def test_inference_tensors_are_filled(is_within: bool) -> None:
    with torch.inference_mode():
        other = nn.Linear(3, 2)
        other.register_buffer("wide", torch.zeros(3, 2).t())
        model = nn.Linear(3, 2)
        model.register_buffer("wide", torch.ones(2, 3))
    stored = save(model=model)
    with torch.inference_mode(is_within):
        restore(stored, model=other)
    assert _same(dict(other.state_dict()), dict(model.state_dict()))


# Memory and time

_SCRIPT = """
import resource, sys, torch
from ckptmgr import CheckpointManager

def high_water():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) >> 10

def build(value):
    model = torch.nn.ModuleList(torch.nn.Linear(1024, 1024) for _ in range(size))
    optimizer = torch.optim.AdamW(model.parameters())
    for p in model.parameters():
        optimizer.state[p] = {"step": torch.tensor(value), "exp_avg": p.detach() * value, "exp_avg_sq": p.detach() + 1}
    return model, optimizer

root, size = sys.argv[1], 11  # 132 MiB
model, optimizer = build(2.0)
with CheckpointManager(root, background=False) as mgr:
    mgr.save({"model": model, "optimizer": optimizer}, 1)
expected = [p.sum().item() for p in model.parameters()]
with torch.no_grad():
    for p in model.parameters():
        p.zero_()
        optimizer.state[p]["exp_avg"].zero_()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = high_water()
with CheckpointManager(root, background=False) as mgr:  # which makes no room for the next save meanwhile
    mgr.resume(model, optimizer)
    print(high_water() - before)
assert [p.sum().item() for p in model.parameters()] == expected
assert all(torch.equal(optimizer.state[p]["exp_avg"], p * 2) for p in model.parameters())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is read from /proc")
def test_a_resume_into_live_objects_takes_no_second_copy_of_the_state(tmp_path: Any) -> None:
    """At most 32 MiB, for a state of 132 MiB."""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, str(tmp_path)], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) <= 32


@pytest.mark.parametrize("was_on", [True, False])
def test_the_collector_goes_on_as_it_was(was_on: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if was_on else gc.disable)()
        with contextlib.suppress(ZeroDivisionError), uncollected():
            assert not gc.isenabled()
            raise ZeroDivisionError
        assert gc.isenabled() == was_on
    finally:
        (gc.enable if before else gc.disable)()
