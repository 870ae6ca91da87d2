"""Format `dcp` keeps every promise of a format in one process, and its files are what they say."""

from __future__ import annotations

import pytest
import torch

from ckptmgr.sharded.names import joined, tensor_paths
from ckptmgr.sharded.state import ShardedFormat
from ckptmgr.state import capture
from ckptmgr.state.snapshot import flatten
from ckptmgr.testing.format_contract import FormatContract

pytestmark = [
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:Sparse (CSR|BSR) tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype"),
]


class TestDcp(FormatContract):
    for_others = frozenset({".metadata", "values.distcp"})

    @pytest.fixture
    def format(self) -> ShardedFormat:
        return ShardedFormat()


class TestDcpSplit(FormatContract):
    for_others = frozenset({".metadata", "values.distcp"})

    @pytest.fixture
    def format(self) -> ShardedFormat:
        return ShardedFormat(split_size_bytes=32)


def test_names_are_those_of_parameters_wherever_the_optimizer_stands() -> None:
    """A parameter's number in an optimizer says nothing to another rank."""
    net = torch.nn.Linear(2, 1)
    optimizers = {name: torch.optim.SGD([parameter], momentum=0.9) for name, parameter in net.named_parameters()}
    net(torch.ones(2)).sum().backward()
    for optimizer in optimizers.values():
        optimizer.step()
    state = {
        "net": net,
        "one": optimizers["weight"],
        "more": {"all": [optimizers["bias"]]},
        "free": {"state": [torch.ones(1)]},
    }
    names = joined(tensor_paths(flatten(capture(state))))
    assert names == [
        "net.weight",
        "net.bias",
        "one.state.net.weight.momentum_buffer",
        "more.all.0.state.net.bias.momentum_buffer",
        "free.state.0",
    ]


def test_names_are_distinct() -> None:
    assert joined([("a", "b.c"), ("a.b", "c"), ("a", "b", "c"), ("a.b.c~2",)]) == [
        "a.b.c",
        "a.b.c~2",
        "a.b.c~3",
        "a.b.c~2~2",
    ]
