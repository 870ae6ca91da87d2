"""Random generators go on exactly where they were saved, or the report says which do not."""

from __future__ import annotations

import builtins
import json
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch

from ckptmgr.errors import DamagedError
from ckptmgr.state import RngReport, capture_rng, derive_rng, restore_rng
from ckptmgr.state.codec import encode, from_json, to_json


def draw() -> list[Any]:
    return [random.gauss(), np.random.standard_normal(), np.random.rand(), torch.rand(3).tolist()]


def test_all_generators_of_the_process_go_on_where_they_were() -> None:
    np.random.standard_normal()  # leaves half a pair for the next call
    random.gauss()
    tree = from_json(json.loads(json.dumps(to_json(capture_rng()))))
    expected = draw()
    draw()
    report = restore_rng(tree)
    assert draw() == expected
    assert report == RngReport(("python", "torch", "numpy"), ())


def test_a_state_of_python_s_generator_as_first_versions_wrote_it_goes_on_too() -> None:
    random.gauss()
    tree = encode({"python": random.getstate()})
    assert len(tree["python"]["$tuple"][1]["$tuple"]) == 625
    expected = [random.gauss(), random.random()]
    assert restore_rng(tree) == RngReport(("python",))
    assert [random.gauss(), random.random()] == expected


def test_derived_generators_are_the_same_for_the_same_origin_and_apart_otherwise() -> None:
    tree, other = capture_rng(), {"python": 3}
    drawn = []
    for origin, step, rank in ((tree, 1, 0), (tree, 2, 0), (tree, 1, 1), (other, 1, 0), (tree, 1, 0)):
        assert derive_rng(origin, step, rank) == RngReport(derived=("python", "torch", "numpy"))
        drawn.append([random.random(), np.random.rand(), torch.rand(1).item()])
    assert drawn[4] == drawn[0]
    assert len({number for one in drawn for number in one}) == 4 * 3


def test_derived_generators_of_a_process_without_numpy_are_python_s_and_torch_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "numpy")
    assert derive_rng({}, 1, 0).derived == ("python", "torch")


def test_capturing_moves_no_generator() -> None:
    torch.manual_seed(0)
    expected = torch.rand(2).tolist()
    torch.manual_seed(0)
    capture_rng()
    assert torch.rand(2).tolist() == expected


def test_numpy_is_left_out_where_it_is_not_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numpy")
    assert list(capture_rng()) == ["python", "torch"]


def test_missing_devices_and_libraries_are_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = capture_rng()
    state = tree["torch"]
    real = builtins.__import__
    monkeypatch.setitem(sys.modules, "numpy", None)
    report = restore_rng(tree | {"cuda": [state, state], "xpu": [state], "mps": state, "tpu": state})
    assert builtins.__import__ is real
    assert report == RngReport(
        ("python", "torch"),
        (
            "numpy: not installed here",
            "cuda:0: no such device here",
            "cuda:1: no such device here",
            "xpu:0: no such device here",
            "mps: no such device here",
            "tpu: not known to this version of ckptmgr",
        ),
    )


def test_every_device_in_use_is_captured_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [torch.tensor([1], dtype=torch.uint8), torch.tensor([2], dtype=torch.uint8)]
    put_back: dict[Any, list[int]] = {}
    for backend, name in ((torch.cuda, "cuda"), (torch.xpu, "xpu")):
        monkeypatch.setattr(backend, "is_initialized", lambda: True)
        monkeypatch.setattr(backend, "get_rng_state_all", lambda: states)
        monkeypatch.setattr(backend, "device_count", lambda: 1)
        monkeypatch.setattr(
            backend, "set_rng_state", lambda state, index, name=name: put_back.update({(name, index): state.tolist()})
        )
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: states[1])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: put_back.update({"mps": state.tolist()}))
    report = restore_rng(capture_rng())
    assert put_back == {("cuda", 0): [1], ("xpu", 0): [1], "mps": [2]}
    assert report == RngReport(
        ("python", "torch", "numpy", "cuda:0", "xpu:0", "mps"),
        ("cuda:1: no such device here", "xpu:1: no such device here"),
    )


@pytest.mark.parametrize(
    "tree",
    [
        {"python": {"version": 3, "words": {"$bytes": "AA=="}, "gauss": None}},
        {"python": [3]},
        {"torch": torch.zeros(3)},
        {"numpy": {"$tuple": ["PCG", 1]}},
        {"torch": {"$no": 1}},
        [],
        None,
    ],
)
def test_a_state_that_is_none_is_damage(tree: Any) -> None:
    with pytest.raises(DamagedError):
        restore_rng(tree)
