"""A checkpoint goes back into live objects whole, or all that does not fit is said before anything is touched."""

from __future__ import annotations

import functools
import io
import subprocess
import sys
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel
from torchdata.stateful_dataloader import StatefulDataLoader

import ckptmgr.state
from ckptmgr.errors import ConfigError, DamagedError, StateMismatchError
from ckptmgr.state import PickleWarning, capture, match, materialize, per_rank, unclaimed
from ckptmgr.state.codec import from_json
from ckptmgr.state.snapshot import Snapshot, StoredTensor, map_leaves

# torch warns of itself: of its own imports, and of its deprecated parts.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit", "ignore:'set_vital'", "ignore:.*lr_scheduler.step", "ignore:.*Lazy modules"
)  # fmt: skip


class Stored:
    """A snapshot as a format gives it back: stored tensors in the tree, bytes on demand."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._bytes: dict[int, StoredTensor] = {}
        self._values: dict[StoredTensor, torch.Tensor] = {}
        own = snapshot.ranks[0]
        self.notes = snapshot.notes | own.notes
        self._objects = snapshot.objects
        self.fetched: list[StoredTensor] = []
        self.placed: list[StoredTensor] = []
        self.entries = {name: map_leaves(tree, self._store) for name, tree in snapshot.entries.items()}
        tensors = list(map(from_json, own.tensors))
        for name, tree in own.entries.items():
            live = map_leaves(tree, lambda leaf, _: tensors[leaf["$tensor"]] if isinstance(leaf, dict) else leaf)
            self.entries[name] = map_leaves(live, self._store)

    def _store(self, leaf: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) not in self._bytes:
            stored = StoredTensor(
                tuple(leaf.shape), leaf.dtype, None, None, leaf.requires_grad, isinstance(leaf, nn.Parameter)
            )
            self._bytes[id(leaf)] = stored
            self._values[stored] = leaf.detach().clone()
        return self._bytes[id(leaf)]

    def part(self, rank: int) -> None:
        """All is in the entries."""

    def fetch(
        self,
        wanted: Mapping[StoredTensor, torch.Tensor | None],
        device: str | torch.device = "cpu",
        addresses: Mapping[StoredTensor, int] = {},
    ) -> dict[StoredTensor, torch.Tensor]:
        self.fetched += wanted
        result = {}
        for stored, target in wanted.items():
            value = self._values[stored]
            if target is None:
                result[stored] = value.to(device, copy=True)
                continue
            assert (target.dtype, tuple(target.shape)) == (stored.dtype, stored.shape)
            self.placed.append(stored)
            with torch.no_grad():
                result[stored] = target.copy_(value)
        return result

    def objects(self) -> dict[str, Any]:
        loaded: dict[str, Any] = torch.load(io.BytesIO(self._objects or b""), weights_only=False)
        return loaded


def save(**objects: Any) -> Stored:
    return Stored(capture(objects))


def restore(stored: Stored, **targets: Any) -> Any:
    plan = match(targets, stored)
    plan.apply(stored.fetch)
    return plan


def refusal(stored: Stored, **targets: Any) -> str:
    """What match says, having seen that it changed nothing and read nothing."""
    before = {name: str(target.state_dict()) for name, target in targets.items() if hasattr(target, "state_dict")}
    with pytest.raises(StateMismatchError) as caught:
        match(targets, stored)
    assert {n: str(t.state_dict()) for n, t in targets.items() if hasattr(t, "state_dict")} == before
    assert stored.fetched == []
    return str(caught.value)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def train(model: nn.Module, *optimizers: torch.optim.Optimizer, steps: int = 2) -> None:
    for i in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(torch.full((4, 2), float(i)) + torch.arange(8.0).view(4, 2)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# Modules


def test_a_model_comes_back_bit_for_bit_straight_into_its_own_memory() -> None:
    model, other = net(0), net(1)
    train(model)
    stored = save(model=model)
    places = [tensor.data_ptr() for tensor in other.state_dict().values()]
    restore(stored, model=other)
    assert equal(other.state_dict(), model.state_dict())
    assert [tensor.data_ptr() for tensor in other.state_dict().values()] == places
    assert len(stored.placed) == len(stored.fetched) == len(places)


WRAPS: dict[str, Callable[[nn.Module], Any]] = {
    "bare": lambda m: m,
    "ddp": lambda m: nn.parallel.DistributedDataParallel(m),
    "compiled": lambda m: torch.compile(m),
    "ddp of compiled": lambda m: nn.parallel.DistributedDataParallel(torch.compile(m)),  # type: ignore[arg-type]
    "compiled ddp": lambda m: torch.compile(nn.parallel.DistributedDataParallel(m)),
}


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("now", WRAPS)
def test_a_model_restores_whatever_it_was_and_is_wrapped_in(now: str) -> None:
    for then in WRAPS.values():
        model, other = net(0), net(1)
        restore(save(model=then(model)), model=WRAPS[now](other))
        assert equal(other.state_dict(), model.state_dict())


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("then", WRAPS)
def test_a_plain_state_dict_saved_with_its_wrappers_names_restores_too(then: str) -> None:
    model, other = net(0), net(1)
    model[0] = WRAPS[then](model[0])  # type: ignore[operator, index]
    wrapped = WRAPS[then](model)
    restore(save(model=dict(wrapped.state_dict()), again=wrapped.state_dict()), model=other)
    assert equal(list(other.state_dict().values()), list(wrapped.state_dict().values()))
    third = net(2)
    restore(save(model=wrapped.state_dict()), model=WRAPS[then](third))
    assert equal(third.state_dict(), other.state_dict())


@pytest.mark.usefixtures("group")
def test_an_averaged_model_restores_whatever_is_averaged() -> None:
    model = net(0)
    average = AveragedModel(torch.compile(model))  # type: ignore[arg-type]
    average.update_parameters(model)
    other = AveragedModel(net(1))
    restore(save(ema=average), ema=other)
    assert (int(other.n_averaged), equal(other.module.state_dict(), model.state_dict())) == (1, True)


def test_tied_weights_are_read_once_and_stay_tied() -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[1].weight = model[0].weight
        return model

    model, other = tied(), tied()
    stored = save(model=model)
    restore(stored, model=other)
    assert equal(other.state_dict(), model.state_dict())
    assert other[0].weight is other[1].weight  # type: ignore[index]
    assert len(stored.fetched) == 3


def test_ties_may_come_and_go() -> None:
    tied, loose = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    restore(save(model=tied), model=loose)
    assert torch.equal(loose[0].weight, tied[0].weight)
    assert torch.equal(loose[1].weight, tied[0].weight)
    assert loose[0].weight is not loose[1].weight
    with torch.no_grad():
        loose[1].weight.add_(1)
    stored = save(model=loose)
    # A format reads in the order of its files.
    match({"model": tied}, stored).apply(lambda wanted, **more: stored.fetch(dict(reversed(wanted.items())), **more))
    assert torch.equal(tied[0].weight, loose[1].weight)  # as torch does it: the last one stands


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128,
              torch.bool, torch.uint16, torch.int64, torch.float64], ids=str
)  # fmt: skip
def test_buffers_of_every_dtype_and_shape_come_back(dtype: torch.dtype) -> None:
    def holder(value: int) -> nn.Module:
        module = nn.Module()
        base = torch.full((24,), value).to(dtype)
        shapes = {
            "zero_d": base[0].clone(), "empty": base[:0], "view": base[3:7], "rows": base.view(4, 6)[:, 2],
            "last": base.view(1, 2, 3, 4).to(memory_format=torch.channels_last), "flat": base.clone(),
        }  # fmt: skip
        for name, tensor in shapes.items():
            module.register_buffer(name, tensor)
        return module

    model, other = holder(1), holder(0)
    layout = [tensor.stride() for tensor in other.state_dict().values()]
    restore(save(model=model), model=other)
    assert equal(
        {k: v.float() if v.dtype.itemsize == 1 else v for k, v in other.state_dict().items()},
        {k: v.float() if v.dtype.itemsize == 1 else v for k, v in model.state_dict().items()},
    )
    assert [tensor.stride() for tensor in other.state_dict().values()] == layout


def test_another_dtype_is_cast_and_reported() -> None:
    model, other = nn.Linear(2, 1), nn.Linear(2, 1).bfloat16()
    plan = restore(save(model=model), model=other)
    assert torch.equal(other.weight, model.weight.bfloat16())
    assert plan.casts == (
        "model.weight: torch.float32 -> torch.bfloat16",
        "model.bias: torch.float32 -> torch.bfloat16",
    )


def test_extra_state_and_lazy_parameters_restore() -> None:
    class Extra(nn.Module):
        def __init__(self, value: Any) -> None:
            super().__init__()
            self.value = value
            self.lazy = nn.LazyLinear(2)

        def get_extra_state(self) -> Any:
            return self.value

        def set_extra_state(self, state: Any) -> None:
            self.value = state

    for value, now in (({"a": (1, 2)}, None), (torch.ones(3), torch.zeros(1))):
        model, other = Extra(value), Extra(now)
        model.lazy(torch.ones(1, 4))
        restore(save(model=model), model=other)
        assert equal(other.value, value)
        assert torch.equal(other.lazy.weight, model.lazy.weight)


def test_versions_of_modules_reach_their_loading_code() -> None:
    class Old(nn.Linear):
        _version = 3
        seen: Any = None

        def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
            self.seen = (prefix, local_metadata.get("version"))
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    model, other = nn.Sequential(Old(1, 1)), nn.Sequential(torch.compile(Old(1, 1)))
    other[0]._orig_mod._version = 4
    restore(save(model=model), model=other)
    assert other[0]._orig_mod.seen == ("0._orig_mod.", 3)


def test_a_module_with_a_state_dict_of_its_own_making_restores() -> None:
    class Own(nn.Linear):
        def state_dict(self) -> Any:  # type: ignore[override]
            return {"all": torch.cat([self.weight.flatten(), self.bias]).detach()}

        def load_state_dict(self, state: Any) -> None:  # type: ignore[override]
            with torch.no_grad():
                self.weight.copy_(state["all"][:2].view(1, 2))
                self.bias.copy_(state["all"][2:])

    model, other = Own(2, 1), Own(2, 1)
    restore(save(model=model), model=other)
    assert equal(list(other.parameters()), list(model.parameters()))


def test_every_difference_of_every_object_is_said_at_once_and_nothing_is_touched() -> None:
    stored = save(model=nn.Linear(3, 2), other=nn.Linear(1, 1), fine=nn.Linear(1, 1))
    other = nn.Module()
    other.register_parameter("scale", nn.Parameter(torch.ones(1)))
    text = refusal(stored, model=nn.Linear(3, 4), other=other, fine=nn.Linear(1, 1), gone=nn.Linear(1, 1))
    assert text.splitlines() == [
        "the checkpoint does not fit the objects to restore; nothing was changed:",
        "  model: 2 different:",
        "    model.weight has shape (2, 3) in the checkpoint and (4, 3) in the object",
        "    model.bias has shape (2,) in the checkpoint and (4,) in the object",
        "  other: 1 in the object but not in the checkpoint:",
        "    scale",
        "  other: 2 in the checkpoint but not in the object:",
        "    weight",
        "    bias",
        "  gone: the checkpoint has no such entry; it has model, other, fine",
        "Ways out: pass objects built as they were when this was saved, strict=False to load what fits and report the "
        "rest, or skip=['model', 'other', 'gone'] to leave entries as they are",
    ]


def test_a_long_list_of_differences_is_cut_and_counted() -> None:
    text = refusal(save(m={"x": torch.ones(1)}), m=nn.Sequential(*[nn.Linear(1, 1) for _ in range(15)]))
    assert "  m: 30 in the object but not in the checkpoint:" in text
    assert "    and 10 more" in text
    assert "    9.bias" in text
    assert "    10.weight" not in text


@pytest.mark.parametrize(
    ("saved", "now", "hint"),
    [
        ("", "backbone.", "all 2 names fit after adding the prefix 'backbone.' in front of the checkpoint's names"),
        ("a.b.", "", "all 2 names fit after removing the prefix 'a.b.' from the checkpoint's names"),
    ],
)
def test_a_prefix_that_would_mend_it_is_named(saved: str, now: str, hint: str) -> None:
    def build(prefix: str) -> nn.Module:
        module: nn.Module = nn.Linear(1, 1)
        for name in reversed(prefix.split(".")[:-1]):
            module = nn.ModuleDict({name: module})
        return module

    text = refusal(save(m=build(saved)), m=build(now))
    assert f"  m: {hint}" in text.splitlines()


def test_what_fits_is_loaded_when_not_strict_and_the_rest_reported() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(1, 1, bias=False)})
    other = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 3), "d": nn.Linear(1, 1, bias=False)})
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    stored = save(model=model)
    plan = match({"model": other, "gone": nn.Linear(1, 1)}, stored, strict=False)
    plan.apply(stored.fetch)
    assert torch.equal(other["a"].weight, model["a"].weight)
    assert equal(
        {n: other.state_dict()[n] for n in before if n[0] != "a"}, {n: before[n] for n in before if n[0] != "a"}
    )
    assert plan.missing == ("model.d.weight", "gone")
    assert plan.unexpected == ("model.c.weight",)
    assert [one.split(" has ")[0] for one in plan.mismatched] == ["model.b.weight", "model.b.bias"]


def test_meta_tensors_are_mismatches_on_either_side() -> None:
    with torch.device("meta"):
        meta = nn.Linear(1, 1, bias=False)
    assert "model.weight is on the meta device here" in refusal(save(model=nn.Linear(1, 1, bias=False)), model=meta)
    assert "model.weight was on the meta device" in refusal(save(model=meta), model=nn.Linear(1, 1, bias=False))


def test_what_is_no_state_dict_or_tensor_is_said() -> None:
    assert "model is no state dict" in refusal(save(model=[1]), model=nn.Linear(1, 1))
    assert "model.bias is not a tensor" in refusal(
        save(model={"weight": torch.ones(1, 1), "bias": 3}), model=nn.Linear(1, 1)
    )


def test_targets_whose_memory_cannot_be_read_into_are_copied_into() -> None:
    class Holder(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.register_buffer("sparse", (torch.eye(2) * value).to_sparse())
            self.register_buffer("conj", torch.tensor([value + 1j]).conj())
            self.register_buffer("plain", torch.tensor([value]))

    model, other = Holder(2.0), Holder(1.0)
    stored = save(model=model)
    restore(stored, model=other)
    assert torch.equal(other.sparse.to_dense(), torch.eye(2) * 2)  # type: ignore[operator]
    assert other.conj.tolist() == [2 - 1j]  # type: ignore[operator]
    assert len(stored.placed) == 1


# Optimizers


def adam(model: nn.Module, **more: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.1, **more)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "plain sgd": lambda p: torch.optim.SGD(p, 0.1),
    "adagrad": torch.optim.Adagrad,
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.1, centered=True),
    "adafactor": torch.optim.Adafactor,
    "nadam": torch.optim.NAdam,
    "rprop": torch.optim.Rprop,
    "adadelta": torch.optim.Adadelta,
    "adamax": torch.optim.Adamax,
    "asgd": torch.optim.ASGD,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_the_same_with_a_restored_optimizer(name: str) -> None:
    model, other = net(0), net(1)
    optimizer, fresh = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](other.parameters())
    train(model, optimizer)
    restore(save(model=model, optimizer=optimizer), optimizer=fresh, model=other)
    assert equal(fresh.state_dict(), optimizer.state_dict())
    train(model, optimizer)
    train(other, fresh)
    assert equal(other.state_dict(), model.state_dict())


def test_matching_takes_no_step_and_makes_no_state() -> None:
    model = net()
    optimizer = adam(model)
    match({"optimizer": optimizer, "model": model}, save(model=model, optimizer=adam(model)))
    assert len(optimizer.state) == 0


def test_state_goes_to_the_parameter_of_the_same_name_in_any_order() -> None:
    model, other = net(0), net(1)
    optimizer = torch.optim.AdamW(list(model.named_parameters()))
    train(model, optimizer)
    fresh = torch.optim.AdamW(list(reversed(list(other.named_parameters()))))
    restore(save(model=model, optimizer=optimizer), model=other, optimizer=fresh)
    saved = {name: optimizer.state[p] for name, p in model.named_parameters()}
    assert equal({name: fresh.state[p] for name, p in other.named_parameters()}, saved)
    assert fresh.param_groups[0]["param_names"] == [name for name, _ in reversed(list(model.named_parameters()))]


def test_other_parameters_and_groups_are_listed_by_name() -> None:
    model = net()
    a, b = list(model.parameters())[:2], list(model.parameters())[2:]
    stored = save(model=model, optimizer=torch.optim.AdamW([{"params": a}, {"params": b}]))
    text = refusal(stored, model=model, optimizer=torch.optim.AdamW([{"params": a[:1]}, {"params": [a[1], *b]}]))
    assert "optimizer has parameters in other groups than in the checkpoint: model.0.bias (group 0 then, 1 now)" in text
    text = refusal(stored, model=model, optimizer=torch.optim.AdamW(b))
    assert "optimizer has 2 parameter groups in the checkpoint and 1 in the object" in text
    assert "has state in the checkpoint for parameters that it does not have here: model.0.weight, model.0.bias" in text
    text = refusal(save(model=model, optimizer=torch.optim.AdamW(b)), model=model, optimizer=torch.optim.AdamW(a + b))
    assert "has parameters here that it did not have in the checkpoint: model.0.weight, model.0.bias" in text


def test_without_names_sizes_and_shapes_are_compared() -> None:
    model = net()
    optimizer = adam(model)
    train(model, optimizer)
    stored = save(optimizer=optimizer)
    text = refusal(stored, optimizer=torch.optim.AdamW(list(model.parameters())[:2]))
    assert "optimizer has groups of [6] parameters in the checkpoint and of [2] in the object" in text
    text = refusal(stored, optimizer=torch.optim.AdamW(list(reversed(list(model.parameters())))))
    assert "has exp_avg of shape (3, 2) in the checkpoint for parameter 0 of group 0 of shape (1,)" in text
    fresh = adam(net(1))
    restore(stored, optimizer=fresh)
    assert equal(fresh.state_dict(), optimizer.state_dict())


def test_a_misshapen_state_is_said_with_the_parameters_name() -> None:
    model, wider = nn.Linear(1, 1, bias=False), nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    model(torch.ones(1)).backward()
    optimizer.step()
    text = refusal(save(model=model, o=optimizer), model=wider, o=torch.optim.SGD(wider.parameters(), momentum=0.9))
    assert "o has momentum_buffer of shape (1, 1) in the checkpoint for model.weight of shape (1, 2)" in text


def test_state_of_a_parameter_without_a_shape_yet_is_not_judged() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = adam(model)
    model(torch.ones(2)).backward()
    optimizer.step()
    lazy = nn.LazyLinear(1, bias=False)
    plan = match({"m": lazy, "o": adam(lazy)}, save(m=model, o=optimizer))
    assert plan.mismatched == ()


def test_another_kind_of_optimizer_is_refused_in_plain_words() -> None:
    model = net()
    text = refusal(save(o=adam(model)), o=torch.optim.SGD(model.parameters()))
    assert "o was a torch.optim.adamw.AdamW when it was saved and is a torch.optim.sgd.SGD here" in text
    # Adam would silently take over AdamW's decoupled decay with the settings.
    assert "was a torch.optim.adamw.AdamW" in refusal(save(o=adam(model)), o=torch.optim.Adam(model.parameters()))
    stored = save(o=adam(model))
    stored.notes = {}
    text = refusal(stored, o=torch.optim.SGD(model.parameters()))
    assert "o lacks the settings dampening, momentum, nesterov in the checkpoint: it was another kind" in text


def test_a_wrapper_class_around_an_optimizer_may_come_and_go() -> None:
    class Wrapped(torch.optim.AdamW):
        pass

    model = net()
    optimizer = Wrapped(model.parameters())
    train(model, optimizer)
    fresh = torch.optim.AdamW(net(1).parameters())
    restore(save(o=optimizer), o=fresh)
    assert equal(fresh.state_dict(), optimizer.state_dict())


def test_an_optimizer_that_does_not_fit_is_left_alone_when_not_strict() -> None:
    model = net()
    stored = save(o=adam(model), model=model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    plan = match({"o": sgd, "model": model}, stored, strict=False)
    plan.apply(stored.fetch)
    assert sgd.param_groups[0]["lr"] == 0.5
    assert len(plan.mismatched) == 1


def test_full_precision_moments_of_half_precision_parameters_stay_so_bit_for_bit() -> None:
    model, other = nn.Linear(2, 1).bfloat16(), nn.Linear(2, 1).bfloat16()
    optimizer, fresh = adam(model), adam(other)
    for parameter in model.parameters():
        optimizer.state[parameter] = {
            "step": torch.tensor(3.0),
            "exp_avg": torch.rand(parameter.shape),
            "exp_avg_sq": torch.rand(parameter.shape, dtype=torch.float64),
            "parts": [torch.rand(2), {"deep": (torch.rand(1),)}, 1],
        }
    for names in (True, False):
        targets = {"optimizer": fresh} | ({"model": other} if names else {})
        restore(save(model=model, optimizer=optimizer), **targets)
        assert equal(fresh.state_dict(), optimizer.state_dict())


def test_moments_follow_a_parameter_whose_dtype_was_changed() -> None:
    model, other = nn.Linear(2, 1), nn.Linear(2, 1).bfloat16()
    optimizer, fresh = adam(model), adam(other)
    model(torch.ones(2)).backward()
    optimizer.step()
    restore(save(model=model, optimizer=optimizer), optimizer=fresh, model=other)
    assert {value["exp_avg"].dtype for value in fresh.state.values()} == {torch.bfloat16}
    assert {value["step"].dtype for value in fresh.state.values()} == {torch.float32}


def test_an_optimizer_with_a_state_dict_of_its_own_making_restores() -> None:
    class Own(torch.optim.SGD):
        extra = 0

        def state_dict(self) -> dict[str, Any]:
            return {"extra": self.extra}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.extra = state["extra"]

    optimizer, fresh = Own([torch.ones(1)]), Own([torch.ones(1)])
    optimizer.extra = 5
    restore(save(o=optimizer), o=fresh)
    assert fresh.extra == 5


@pytest.mark.parametrize("groups", [[3], [{"lr": 1.0}], 5])
def test_groups_that_are_none_reach_the_optimizers_own_check(groups: Any) -> None:
    stored = save(o={"state": {}, "param_groups": groups})
    with pytest.raises(StateMismatchError, match=r"^o: its load_state_dict\(\) refused"):
        restore(stored, o=torch.optim.SGD([torch.ones(1)]))


# Schedulers, scalers, loaders, and anything else


def schedulers() -> dict[str, Callable[[Any], Any]]:
    return {
        "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 1.0, total_steps=20),
        "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
        "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
        "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
        "sequential": lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.5)], [2]
        ),
        "multi step": lambda o: lr_scheduler.MultiStepLR(o, [1, 2, 2]),
        "chained": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.StepLR(o, 2), lr_scheduler.ConstantLR(o)]),
    }


@pytest.mark.parametrize("name", schedulers())
def test_the_learning_rate_goes_on_the_same_with_a_restored_scheduler(name: str) -> None:
    def build() -> tuple[Any, Any]:
        optimizer = torch.optim.SGD([torch.ones(1)], lr=0.1)
        return optimizer, schedulers()[name](optimizer)

    def run(pair: tuple[Any, Any], steps: int) -> list[float]:
        rates = []
        for i in range(steps):
            pair[0].step()
            pair[1].step(np.float64(1 + i)) if name == "plateau" else pair[1].step()
            rates.append(pair[0].param_groups[0]["lr"])
        return rates

    old, new = build(), build()
    run(old, 3)
    restore(save(scheduler=old[1], optimizer=old[0]), scheduler=new[1], optimizer=new[0])
    assert run(new, 4) == run(old, 4)


def test_another_kind_of_schedule_is_never_taken_over_silently() -> None:
    optimizer = torch.optim.SGD([torch.ones(1)], lr=0.1)
    stored = save(s=lr_scheduler.StepLR(optimizer, 3))
    text = refusal(stored, s=lr_scheduler.ExponentialLR(optimizer, 0.9))
    assert "s was a torch.optim.lr_scheduler.StepLR when it was saved and is a torch.optim.lr_scheduler.Exp" in text


def test_a_grad_scaler_restores_and_one_switched_on_or_off_since_is_refused() -> None:
    on = torch.amp.GradScaler("cpu", init_scale=8.0)
    off = torch.amp.GradScaler("cpu", enabled=False)
    fresh = torch.amp.GradScaler("cpu")
    restore(save(s=on), s=fresh)
    assert fresh.get_scale() == 8.0
    restore(save(s=off), s=torch.amp.GradScaler("cpu", enabled=False))
    assert "s was disabled when it was saved and is enabled here" in refusal(save(s=off), s=on)
    assert "s was enabled when it was saved and is disabled here" in refusal(save(s=on), s=off)


def test_a_data_loader_goes_on_in_the_middle_of_its_epoch() -> None:
    def build() -> Any:
        return StatefulDataLoader(list(range(12)), batch_size=2, shuffle=True)

    loader, fresh = build(), build()
    batches = iter(loader)
    next(batches), next(batches)
    stored = save(loader=loader)
    rest = [batch.tolist() for batch in batches]
    restore(stored, loader=fresh)
    assert [batch.tolist() for batch in fresh] == rest


class Recorder:
    def __init__(self, log: list[str], name: str) -> None:
        self.log, self.name = log, name

    def state_dict(self) -> dict[str, Any]:
        self.log.append(f"{self.name} was asked for its state")
        return {"name": self.name}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.log.append(state["name"])


def test_modules_come_first_then_optimizers_schedulers_and_loaders_last(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    objects: dict[str, Any] = {
        "loader": StatefulDataLoader([1, 2]),
        "scheduler": lr_scheduler.StepLR(optimizer, 1),
        "other": Recorder(log, "other"),
        "optimizer": optimizer,
        "model": model,
    }
    stored = save(**objects)
    log.clear()
    for name, target in objects.items():
        if name != "other":
            monkeypatch.setattr(target, "load_state_dict", lambda state, name=name: log.append(name), raising=False)
    restore(stored, **objects)
    assert log == ["model", "optimizer", "other", "scheduler", "loader"]


def test_a_target_that_refuses_its_state_is_named() -> None:
    class Picky:
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: Any) -> None:
            raise TypeError("too picky")

    with pytest.raises(StateMismatchError, match=r"^ema\.best: its load_state_dict\(\) refused .*too picky") as caught:
        restore(save(ema={"best": Picky()}), ema={"best": Picky()})
    assert isinstance(caught.value.__cause__, TypeError)


def test_damage_found_while_reading_comes_out_as_damage() -> None:
    def broken(wanted: Any, **more: Any) -> Any:
        raise DamagedError("torn")

    with pytest.raises(DamagedError, match="torn"):
        match({"m": nn.Linear(1, 1)}, save(m=nn.Linear(1, 1))).apply(broken)


def test_damage_found_while_decoding_comes_out_as_damage() -> None:
    stored = save(other={"name": 1})
    stored.entries["other"] = {"name": {"$int": "x"}}
    with pytest.raises(DamagedError, match=r"other\.name"):
        restore(stored, other=Recorder([], "x"))


def test_an_object_gets_memory_of_its_own() -> None:
    class Keeper:
        held: Any = None

        def state_dict(self) -> Any:
            return {"w": self.held}

        def load_state_dict(self, state: Any) -> None:
            self.held = state["w"]

    model, keeper = nn.Linear(1, 1), Keeper()
    keeper.held = model.weight.detach()
    stored = save(model=model, keeper=keeper)
    other, fresh = nn.Linear(1, 1), Keeper()
    restore(stored, model=other, keeper=fresh)
    assert torch.equal(fresh.held, model.weight)
    assert fresh.held.data_ptr() != other.weight.data_ptr()


# Tensors and containers


def test_tensors_are_filled_in_place() -> None:
    target, half = torch.zeros(2, 3), torch.zeros(2, dtype=torch.float16)
    parameter = nn.Parameter(torch.zeros(1))
    plan = restore(
        save(t=torch.ones(3, 2).t(), h=torch.ones(2), p=nn.Parameter(torch.ones(1))), t=target, h=half, p=parameter
    )
    assert (target.tolist(), half.tolist(), parameter.tolist()) == ([[1.0] * 3] * 2, [1.0, 1.0], [1.0])
    assert plan.casts == ("h: torch.float32 -> torch.float16",)
    assert "t has shape (3,) in the checkpoint and (2, 3) in the object" in refusal(save(t=torch.ones(3)), t=target)


def test_containers_are_filled_in_place_and_plain_values_in_them_replaced() -> None:
    model, other = nn.Linear(1, 1), nn.Linear(1, 1)
    state = {
        "nets": [model, "x"],
        "pair": (model, torch.ones(2)),
        "best": np.float64(0.5),
        "log": [1, {"a": 2}],
        3: None,
    }
    stored = save(e=state, o=OrderedDict(a=1), d=defaultdict(list, a=[1]))
    tensor = torch.zeros(2)
    target: dict[Any, Any] = {"nets": [other, "y"], "pair": (other, tensor), "best": 0.0, "log": [], 3: 4}
    log = target["log"]
    ordered: dict[str, int] = OrderedDict(a=0)
    filled: dict[str, Any] = {}
    restore(stored, e=target, o=ordered, d=filled)
    assert equal(other.state_dict(), model.state_dict())
    assert (target["nets"][1], tensor.tolist(), target["best"], log, target[3]) == (
        "x",
        [1.0, 1.0],
        0.5,
        [1, {"a": 2}],
        None,
    )
    assert (ordered, filled) == ({"a": 1}, {"a": [1]})


def test_plain_data_becomes_what_it_was_whatever_became_of_it_since() -> None:
    saved = {"rows": [{"loss": 1.0}], "best": None, "by_step": {1: 0.5}, "flag": [1]}
    target: dict[str, Any] = {"rows": [{"loss": 1.0}, {"loss": 2.0}], "best": {"a": 1}, "by_step": {1: 0, 2: 0}, "x": 1}
    rows, by_step = target["rows"], target["by_step"]
    restore(save(e=saved), e=target)
    assert target == saved
    assert (target["rows"] is rows, target["by_step"] is by_step) == (True, True)


def test_a_tuple_of_objects_and_plain_values_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"e\.a is a tuple of objects and plain values"):
        match({"e": {"a": (nn.Linear(1, 1), 3)}}, save(e={"a": (nn.Linear(1, 1), 3)}))


def test_notes_on_objects_within_containers_are_used() -> None:
    model, other = net(0), net(1)
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer)
    fresh = torch.optim.AdamW(reversed(list(other.parameters())))
    restore(save(all={"nets": [model], "opts": (optimizer,)}), all={"nets": [other], "opts": (fresh,)})
    assert equal([fresh.state[p] for p in other.parameters()], [optimizer.state[p] for p in model.parameters()])


def test_differences_within_containers_are_listed() -> None:
    stored = save(e={"a": 1, "l": [nn.Linear(1, 1), 2], "n": [1], "t": 3})
    target = {"a": 0, "b": 0, "l": [nn.Linear(1, 1)], "n": {"x": torch.ones(1)}, "t": [torch.ones(1)]}
    with pytest.raises(StateMismatchError) as caught:
        match({"e": target}, stored)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert "b" in lines
    assert "e.l has 2 items in the checkpoint and 1 in the object" in lines
    assert "e.n is no dict in the checkpoint" in lines
    assert "e.t is no list in the checkpoint" in lines
    assert lines[-1].endswith("skip=['e'] to leave entries as they are")


@pytest.mark.parametrize("target", [3, "x", None, nn.Linear, (), (nn.Linear(1, 1), 3), np.zeros(1)], ids=repr)
def test_a_target_that_cannot_be_filled_is_a_mistake_of_the_call(target: Any) -> None:
    with pytest.raises(ConfigError, match="t is a"):
        match({"t": target}, save(t=1))


def test_skipped_entries_are_left_alone_and_a_misspelt_one_is_named() -> None:
    stored = save(m=nn.Linear(1, 1))
    match({"m": nn.Linear(5, 5), "x": nn.Linear(1, 1)}, stored, skip=["m", "x", "rng"]).apply(stored.fetch)
    assert stored.fetched == []
    with pytest.raises(ConfigError, match="no entry 'modle'; there are m, rng"):
        match({}, stored, skip=["modle"])


# Values without a target, and what was pickled


def test_whole_entries_come_back_without_targets_and_keep_their_ties() -> None:
    weight = nn.Parameter(torch.ones(2))
    stored = save(a={"w": weight, "n": (1, {2})}, b=[weight.detach(), weight], c=3, d=torch.ones(1, requires_grad=True))
    assert unclaimed(stored, ["a", "x"]) == ["b", "c", "d"]
    values = materialize(stored, stored.entries, stored.fetch)
    assert (values["a"]["n"], values["c"], values["d"].requires_grad) == ((1, {2}), 3, True)
    assert isinstance(values["a"]["w"], nn.Parameter)
    assert values["a"]["w"] is values["b"][1]
    assert torch.equal(values["b"][0], weight)
    assert list(materialize(stored, ["c"], stored.fetch)) == ["c"]
    assert materialize(stored, ["d"], stored.fetch, device="meta")["d"].is_meta


@pytest.mark.filterwarnings("ignore::ckptmgr.state.pickled.PickleWarning")
def test_pickled_values_load_only_when_trusted() -> None:
    stored = save(args={"fn": functools.partial(int, base=2), "lr": 1}, kind=int)
    for load in (
        lambda: materialize(stored, ["args", "kind"], stored.fetch),
        lambda: match({"args": {}, "kind": Recorder([], "x")}, stored).apply(stored.fetch),
    ):
        with pytest.raises(StateMismatchError, match=r"args\.fn, kind\. Pass trust_pickle=True") as caught:
            load()
        assert "skip=[...]" in str(caught.value)
    assert stored.fetched == []
    values = materialize(stored, ["args", "kind"], stored.fetch, objects=stored.objects)
    assert (values["args"]["fn"]("11"), values["kind"]) == (3, int)
    target: dict[str, Any] = {}
    match({"args": target}, stored).apply(stored.fetch, objects=stored.objects)
    assert target["fn"]("11") == 3
    with pytest.raises(DamagedError, match=r"lack args\.fn"):
        materialize(stored, ["args"], stored.fetch, objects=dict)


def test_what_could_not_be_saved_is_reported_as_missing() -> None:
    with pytest.warns(PickleWarning, match="NOT saved"):
        stored = save(a={"lock": threading.Lock(), "n": 1}, b=threading.Lock(), c={"x": [threading.Lock()]})
    held = threading.Lock()
    target: dict[str, Any] = {"lock": held, "n": 0}
    seen: list[Any] = []

    class Sink:
        def load_state_dict(self, state: Any) -> None:
            seen.append(state)

    plan = restore(stored, a=target, b=Sink(), c=Sink())
    assert plan.missing == ("a.lock", "b", "c.x[0]")
    assert (target["lock"] is held, target["n"], seen) == (True, 1, [{"x": [None]}])
    assert materialize(stored, ["a", "b"], stored.fetch) == {"a": {"n": 1}}


def test_plain_tensors_of_a_container_go_where_they_were_asked_for() -> None:
    stored = save(e={"t": torch.ones(1)})
    target: dict[str, Any] = {}
    match({"e": target}, stored).apply(stored.fetch, map_location="meta")
    assert target["t"].is_meta


def test_importing_the_state_package_does_not_import_torch() -> None:
    code = "import sys, ckptmgr.state, ckptmgr.state.snapshot; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="nothing"):
        ckptmgr.state.nothing  # noqa: B018


# Optimizers whose parameters have other names


class Shared(nn.Module):
    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__()
        self.encoder, self.head = nn.Linear(2, 3), nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.encoder(x))


def states_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[Any]:
    return [optimizer.state[parameter] for parameter in model.parameters()]


@pytest.mark.parametrize("order", ["encoder model optimizer", "model optimizer encoder", "optimizer model encoder"])
def test_a_parameter_of_several_entries_is_the_same_in_whatever_order_they_are_given(order: str) -> None:
    model, other = Shared(0), Shared(1)
    optimizer, fresh = adam(model), adam(other)
    train(model, optimizer)
    targets = {"encoder": other.encoder, "model": other, "optimizer": fresh}
    stored = save(encoder=model.encoder, model=model, optimizer=optimizer)
    restore(stored, **{name: targets[name] for name in order.split()})
    assert equal(other.state_dict(), model.state_dict())
    assert equal(states_of(fresh, other), states_of(optimizer, model))


def test_a_trunk_that_two_networks_share_has_its_state_back_when_these_are_given_in_another_order() -> None:
    def build(seed: int) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
        actor, critic = Shared(seed), Shared(seed + 10)
        critic.encoder = actor.encoder
        optimizer = adam(nn.ModuleList([actor, critic]))
        train(actor, optimizer)
        train(critic, optimizer)
        return actor, critic, optimizer

    actor, critic, optimizer = build(0)
    other, judge, fresh = build(1)
    restore(save(actor=actor, critic=critic, o=optimizer), critic=judge, o=fresh, actor=other)
    assert equal(states_of(fresh, nn.ModuleList([other, judge])), states_of(optimizer, nn.ModuleList([actor, critic])))


def test_an_optimizer_has_its_state_back_without_the_entry_that_named_its_parameters() -> None:
    model = Shared(0)
    optimizer = adam(model)
    train(model, optimizer)
    for entry in (model.encoder, {"parts": [(model.encoder,)]}):
        for wrap in (lambda module: module, Wrapper):
            other = Shared(1)
            fresh = torch.optim.AdamW(reversed(list(other.parameters())))
            restore(save(encoder=entry, model=model, o=optimizer), model=wrap(other), o=fresh)
            assert equal(states_of(fresh, other), states_of(optimizer, model))


def test_state_for_two_parameters_never_goes_to_one_nor_that_of_one_to_two() -> None:
    def build(is_tied: bool) -> dict[str, Any]:
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        if is_tied:
            model[1].weight = model[0].weight
        optimizer = adam(model)
        train(model, optimizer)
        return {"model": model, "o": optimizer}

    text = refusal(save(**build(False)), **build(True))
    assert "o has state in the checkpoint for parameters that it does not have here: model.1.weight" in text
    text = refusal(save(**build(True)), **build(False))
    assert "o has parameters here that it did not have in the checkpoint: model.1.weight" in text


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("is_wrapped", [True, False])
def test_an_optimizer_restores_when_a_wrapper_of_ones_own_came_or_went(is_wrapped: bool) -> None:
    model, other = net(0), net(1)
    optimizer, fresh = adam(model), torch.optim.AdamW(reversed(list(other.parameters())))
    train(model, optimizer)
    then, now = (Wrapper(model), other) if is_wrapped else (model, Wrapper(other))
    restore(save(model=then, optimizer=optimizer), model=now, optimizer=fresh)
    assert equal(states_of(fresh, other), states_of(optimizer, model))


def test_state_is_never_guessed_where_a_name_could_be_that_of_two() -> None:
    model = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)})
    other = nn.ModuleDict({"module": Wrapper(nn.Linear(1, 1, bias=False)), "_orig_mod": nn.Linear(1, 1, bias=False)})
    text = refusal(save(m=model["a"], o=adam(model["a"])), m=other, o=adam(other))
    assert "o has parameters here that it did not have in the checkpoint: m.module.module.weight, m._orig_mod.w" in text


def test_names_that_differ_by_nothing_but_a_prefix_are_told_apart_in_any_order() -> None:
    def build() -> nn.Module:
        return nn.ModuleDict({name: nn.Linear(1, 1, bias=False) for name in ("module", "_orig_mod")})

    part, other = build(), build()
    optimizer, fresh = OPTIMIZERS["sgd"](part.parameters()), OPTIMIZERS["sgd"](other.parameters())
    for number, parameter in enumerate(part.parameters()):
        optimizer.state[parameter]["momentum_buffer"] = torch.full((1, 1), float(number))
    stored = save(part=part, model=nn.Sequential(part), o=optimizer)
    restore(stored, model=nn.Sequential(other), o=fresh, part=other)
    assert equal(states_of(fresh, other), states_of(optimizer, part))


class LowRank(torch.optim.Optimizer):
    """Keeps the mean over the rows of a gradient."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.defaults["rank"] = 1

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state, rows = self.state[parameter], parameter.grad.reshape(-1, parameter.shape[-1])
            mean = state.setdefault("exp_avg", torch.zeros(1, parameter.shape[-1]))
            mean.mul_(0.9).add_(rows.mean(0, keepdim=True))
            parameter.data.sub_(mean.reshape(-1, *mean.shape[2:])[0])


def test_an_optimizer_with_state_in_shapes_of_its_own_takes_back_its_own_checkpoint() -> None:
    model = nn.Linear(2, 3)
    optimizer = LowRank(model.parameters())
    train(model, optimizer)
    stored, saved = save(model=model, o=optimizer), [state["exp_avg"].clone() for state in states_of(optimizer, model)]
    train(model, optimizer)
    other = nn.Linear(2, 3)
    for target, live in ((model, optimizer), (other, LowRank(other.parameters()))):
        restore(stored, model=target, o=live)
        assert equal([state["exp_avg"] for state in states_of(live, target)], saved)


def test_state_in_shapes_of_its_own_is_judged_by_the_state_that_the_optimizer_has() -> None:
    model, other = nn.Linear(2, 3, bias=False), nn.Linear(2, 3, bias=False)
    optimizer, live = LowRank(model.parameters()), LowRank(other.parameters())
    train(model, optimizer)
    live.state[other.weight]["exp_avg"] = torch.zeros(1, 4)
    text = refusal(save(model=model, o=optimizer), model=other, o=live)
    assert "o has exp_avg of shape (1, 2) in the checkpoint for model.weight of shape (3, 2)" in text


def test_state_of_a_class_that_steps_as_torchs_own_is_judged_by_its_parameters() -> None:
    class Renamed(torch.optim.AdamW):
        pass

    model = net()
    optimizer = Renamed(model.parameters())
    train(model, optimizer)
    text = refusal(save(o=optimizer), o=Renamed(reversed(list(model.parameters()))))
    assert "has exp_avg of shape (3, 2) in the checkpoint for parameter 0 of group 0 of shape (1,)" in text


def test_lbfgs_goes_on_the_same_but_is_refused_with_its_parameters_in_another_order() -> None:
    def build(seed: int, *, is_reversed: bool = False) -> tuple[nn.Module, torch.optim.LBFGS]:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        parameters = list(model.parameters())
        return model, torch.optim.LBFGS(reversed(parameters) if is_reversed else parameters, max_iter=3)

    def run(model: nn.Module, optimizer: torch.optim.LBFGS) -> list[float]:
        x = torch.arange(8.0).view(4, 2)

        def loss() -> torch.Tensor:
            optimizer.zero_grad()
            found: torch.Tensor = (model(x) - x.sum(1, keepdim=True)).square().mean()
            found.backward()
            return found

        return [optimizer.step(loss).item() for _ in range(3)]  # type: ignore[arg-type, attr-defined]

    model, optimizer = build(0)
    fresh = save(m=model, o=optimizer)
    run(model, optimizer)
    stored = save(m=model, o=optimizer)
    other, again = build(1, is_reversed=True)
    text = refusal(stored, m=other, o=again)
    order = "m.0.weight, m.0.bias, m.2.weight, m.2.bias"
    assert f"o has one state for all its parameters together: build it with them in order, {order}" in text
    restore(fresh, m=other, o=again)  # which has no state yet
    other, again = build(1)
    restore(stored, m=other, o=again)
    assert run(other, again) == run(model, optimizer)


# Tensors that had to be pickled: those of a class that is not torch's, and what is more than numbers in a rank's part


class Marked(torch.Tensor):
    """A class that is nothing but a name."""


class Wrapped(torch.Tensor):
    """A class that holds another tensor and takes torch's calls itself, as quantized weights do."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Wrapped:
        made: Wrapped = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)  # type: ignore[attr-defined]
        return made

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Wrapped({self.inner})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Wrapped, (self.inner,)

    @classmethod
    def __torch_dispatch__(cls, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [one.inner if isinstance(one, Wrapped) else one for one in args]
        if call is torch.ops.aten.copy_.default:
            if not isinstance(args[1], Wrapped):
                raise TypeError("only a Wrapped is copied into a Wrapped")
            given[0].copy_(given[1])
            return args[0]
        made = call(*given, **(kwargs or {}))
        return Wrapped(made) if isinstance(made, torch.Tensor) else made


class Odd(nn.Module):
    """A module with a parameter and a buffer of such classes, among plain ones."""

    def __init__(self, wrapped: torch.Tensor, marked: torch.Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.wrapped = nn.Parameter(Wrapped(wrapped), requires_grad=False)
        self.register_buffer("marked", marked.as_subclass(Marked))


# Each with bits that arithmetic would not keep.
def numbers() -> torch.Tensor:
    return torch.tensor([0x7FA00001, -0x80000000, 0x3F800000], dtype=torch.int32).view(torch.float32)


def bits(tensor: torch.Tensor) -> list[int]:
    plain = tensor.inner if isinstance(tensor, Wrapped) else tensor.as_subclass(torch.Tensor)
    listed: list[int] = plain.view(torch.int32).tolist()
    return listed


def save_own(**objects: Any) -> Stored:
    snapshot = capture({name: per_rank(value) for name, value in objects.items()})
    stored = Stored(snapshot)
    stored._objects = snapshot.ranks[0].objects
    return stored


odd_pickles = pytest.mark.filterwarnings("ignore::ckptmgr.state.pickled.PickleWarning")


@odd_pickles
def test_tensors_of_other_classes_come_back_bit_for_bit_where_they_are_when_trusted() -> None:
    model, other = Odd(numbers(), numbers()), Odd(torch.zeros(3), torch.zeros(3))
    stored = save(model=model, own=numbers().as_subclass(Marked), parts=[numbers().as_subclass(Marked), 1])
    own, part = torch.zeros(3).as_subclass(Marked), torch.zeros(3).as_subclass(Marked)
    parts = [part, 0]
    wrapped, inner, marked = other.wrapped, other.wrapped.inner, other.marked  # type: ignore[attr-defined]
    plan = match({"model": other, "own": own, "parts": parts}, stored)
    plan.apply(stored.fetch, objects=stored.objects)
    assert (plan.mismatched, plan.casts) == ((), ())
    assert other.wrapped is wrapped
    assert (wrapped.inner is inner, other.marked is marked) == (True, True)  # type: ignore[attr-defined]
    assert [type(one) for one in (wrapped, marked, own, part)] == [Wrapped, Marked, Marked, Marked]
    assert [bits(one) for one in (inner, marked, own, part)] == [bits(numbers())] * 4  # type: ignore[arg-type]
    assert parts[0] is part
    assert parts[1] == 1
    assert torch.equal(other.layer.weight, model.layer.weight)


@odd_pickles
def test_a_sparse_tensor_of_a_rank_s_own_comes_back_when_trusted() -> None:
    class Holder(nn.Module):
        def __init__(self, value: torch.Tensor) -> None:
            super().__init__()
            self.register_buffer("sparse", value)

    stored = save_own(x=torch.eye(3).to_sparse(), model=Holder(torch.eye(2).to_sparse()))
    x, model = torch.zeros(3, 3).to_sparse(), Holder(torch.zeros(2, 2).to_sparse())
    match({"x": x, "model": model}, stored).apply(stored.fetch, objects=stored.objects)
    assert torch.equal(x.to_dense(), torch.eye(3))
    assert torch.equal(model.sparse.to_dense(), torch.eye(2))  # type: ignore[operator]
    dense = torch.zeros(3, 3)
    with pytest.raises(StateMismatchError, match=r"x is a Tensor \(torch.sparse_coo.*and a Tensor \(torch.strided"):
        match({"x": dense}, stored).apply(stored.fetch, objects=stored.objects)
    assert dense.sum() == 0


@odd_pickles
def test_a_tensor_that_was_pickled_needs_trust_and_nothing_is_touched_without_it() -> None:
    stored = save(model=Odd(numbers(), numbers()), own=numbers().as_subclass(Marked))
    model, own = Odd(torch.zeros(3), torch.zeros(3)), torch.zeros(3).as_subclass(Marked)
    before = model.layer.weight.tolist()
    with pytest.raises(
        StateMismatchError, match=r"model\.wrapped, model\.marked, own\. Pass trust_pickle=True"
    ) as caught:
        match({"model": model, "own": own}, stored).apply(stored.fetch)
    assert "no tensor" not in str(caught.value)
    assert "not a tensor" not in str(caught.value)
    assert "skip=" in str(caught.value)
    assert (model.layer.weight.tolist(), stored.fetched, bits(own)) == (before, [], [0, 0, 0])


@odd_pickles
def test_without_trust_and_not_strict_the_rest_is_loaded_and_a_pickled_tensor_reported() -> None:
    saved = Odd(numbers(), numbers())
    stored = save(model=saved, own=numbers().as_subclass(Marked))
    model, own = Odd(torch.zeros(3), torch.zeros(3)), torch.zeros(3).as_subclass(Marked)
    plan = match({"model": model, "own": own}, stored, strict=False)
    plan.apply(stored.fetch)
    assert plan.mismatched == tuple(
        f"{name} was pickled, and loading it needs trust_pickle=True"
        for name in ("model.wrapped", "model.marked", "own")
    )
    assert torch.equal(model.layer.weight, saved.layer.weight)
    assert [bits(model.wrapped), bits(model.marked), bits(own)] == [[0, 0, 0]] * 3  # type: ignore[arg-type]


@odd_pickles
@pytest.mark.parametrize("when", ["match", "apply"])
def test_pickled_tensors_that_do_not_fit_are_all_said_before_anything_is_touched(when: str) -> None:
    saved = Odd(numbers(), numbers())
    stored = save(model=saved, own=numbers().as_subclass(Marked), other=torch.ones(2).as_subclass(Marked), what=int)
    model = Odd(torch.zeros(3).double(), torch.zeros(4))
    own, other, what = torch.zeros(2).as_subclass(Marked), Wrapped(torch.zeros(2)), torch.zeros(1)
    targets: dict[str, Any] = {"model": model, "own": own, "other": other, "what": what}
    before = model.layer.weight.tolist()
    early = stored.objects if when == "match" else None
    if early:  # then they are said with what else does not fit
        targets["lacking"] = torch.zeros(1)
    with pytest.raises(StateMismatchError) as caught:
        match(targets, stored, objects=early).apply(stored.fetch, objects=stored.objects)
    message = str(caught.value)
    for line in (
        "model.wrapped is a Wrapped (torch.strided, torch.float32) in the checkpoint and a Wrapped (torch.strided, "
        "torch.float64) in the object",
        "model.marked has shape (3,) in the checkpoint and (4,) in the object",
        "own has shape (3,) in the checkpoint and (2,) in the object",
        "other is a Marked (torch.strided, torch.float32) in the checkpoint and a Wrapped (torch.strided, "
        "torch.float32) in the object",
        "what is not a tensor in the checkpoint",
        *(["lacking: the checkpoint has no such entry"] if early else []),
    ):
        assert line in message
    assert "nothing was changed" in message
    assert (model.layer.weight.tolist(), stored.fetched) == (before, [])

    plan = match(targets, stored, strict=False, objects=early)
    plan.apply(stored.fetch, objects=stored.objects)
    assert [line.split()[0] for line in plan.mismatched] == ["model.wrapped", "model.marked", "own", "other", "what"]
    assert torch.equal(model.layer.weight, saved.layer.weight)
    assert (model.marked.tolist(), own.tolist(), what.tolist()) == ([0] * 4, [0, 0], [0])  # type: ignore[operator]


@odd_pickles
def test_a_pickled_tensor_of_another_precision_is_cast_and_reported_and_its_optimizer_s_state_follows() -> None:
    class Plain(nn.Module):
        def __init__(self, value: torch.Tensor) -> None:
            super().__init__()
            self.weight = nn.Parameter(value.as_subclass(Marked))

    def sgd(model: Plain) -> torch.optim.SGD:
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        model.weight.as_subclass(torch.Tensor).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return optimizer

    saved, model = Plain(torch.ones(2)), Plain(torch.zeros(2).double())
    stored = save(model=saved, optimizer=sgd(saved))
    optimizer = sgd(model)
    plan = match({"model": model, "optimizer": optimizer}, stored)
    plan.apply(stored.fetch, objects=stored.objects)
    assert plan.casts == ("model.weight: torch.float32 -> torch.float64",)
    assert torch.equal(model.weight, saved.weight.double())
    assert optimizer.state[model.weight]["momentum_buffer"].dtype == torch.float64


@odd_pickles
def test_a_pickled_tensor_without_values_is_said() -> None:
    class Still(torch.Tensor):
        def __reduce_ex__(self, protocol: Any) -> Any:
            return functools.partial(torch.empty, device="meta"), (2,)

    stored = save(x=torch.ones(2).as_subclass(Still))
    with pytest.raises(StateMismatchError, match="x was on the meta device when it was saved"):
        match({"x": torch.zeros(2)}, stored).apply(stored.fetch, objects=stored.objects)
    with pytest.raises(StateMismatchError, match="x is on the meta device here"):
        match({"x": torch.zeros(2, device="meta")}, stored)


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@odd_pickles
def test_a_nested_tensor_as_a_target_is_refused_in_words() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))
            self.register_buffer("nested", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))

    stored = save_own(own=torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    with pytest.raises(StateMismatchError, match=r"own is a nested Tensor \(.* in the checkpoint and a Tensor"):
        match({"own": torch.zeros(2, 3)}, stored).apply(stored.fetch, objects=stored.objects)
    stored = save(model={"weight": torch.ones(2), "nested": torch.ones(2)})
    with pytest.raises(StateMismatchError, match=r"model\.nested is a nested tensor here and can't be filled in place"):
        match({"model": Holder()}, stored)
    model = Holder()
    nn.init.zeros_(model.weight)
    plan = match({"model": model}, stored, strict=False)
    plan.apply(stored.fetch)
    assert len(plan.mismatched) == 1
    assert model.weight.tolist() == [1, 1]


@odd_pickles
def test_a_class_that_is_nothing_but_a_name_may_come_and_go() -> None:
    stored = save(x=numbers().as_subclass(Marked), y=numbers())
    x, y = torch.zeros(3), torch.zeros(3).as_subclass(Marked)
    match({"x": x, "y": y}, stored).apply(stored.fetch, objects=stored.objects)
    assert bits(x) == bits(y) == bits(numbers())
