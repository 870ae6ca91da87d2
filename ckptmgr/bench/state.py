"""What is saved in a benchmark? A model shaped like a transformer, with its AdamW, whose every value is known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import xxhash
from torch import nn

from ..memory import view
from .limits import prime

_LAYERS = 8
_BYTES_PER_PARAMETER = 12  # the weight and AdamW's two averages, all float32
_MIX = 0x9E3779B1 - (1 << 32)  # odd: neighbours become far apart, so that nothing compresses
_FINITE = 0x3FFFFFFF  # the bits of floats from 0 to 2


@dataclass(frozen=True)
class State:
    """A model and its optimizer, as a training loop has them."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by a name, as they are now: loading may put others in their place."""
        found = {f"model.{name}": tensor.detach() for name, tensor in self.model.named_parameters()}
        for index, (_, state) in enumerate(self.optimizer.state.items()):
            found |= {f"optimizer.{index}.{key}": tensor for key, tensor in state.items()}
        return found

    @property
    def size(self) -> int:
        """In bytes."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


class _Transformer(nn.Module):
    """Three quarters of the parameters in its blocks, the others in its embedding."""

    def __init__(self, parameters: int) -> None:
        super().__init__()
        width = max(8, round((0.75 * parameters / (12 * _LAYERS)) ** 0.5) // 8 * 8)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(_LAYERS))
        self.norm = nn.LayerNorm(width)
        left = parameters - sum(parameter.numel() for parameter in self.parameters())
        self.embedding = nn.Embedding(max(1, left // width), width)


def build(size: int, tensors: int | None, device: str) -> State:
    """A state of about `size` bytes; of about `tensors` tensors of one size where that is given."""
    parameters = size // _BYTES_PER_PARAMETER
    model: nn.Module
    with torch.device("meta"):
        if tensors is None:
            model = _Transformer(parameters)
        else:
            count = max(1, tensors // 4)  # each with two averages and a step
            each = max(1, parameters // count)
            model = nn.ParameterList(nn.Parameter(torch.empty(each)) for _ in range(count))
    state = State(model.to_empty(device=device), torch.optim.AdamW(model.parameters()))
    for parameter in model.parameters():
        averages = {key: torch.empty_like(parameter.detach()) for key in ("exp_avg", "exp_avg_sq")}
        state.optimizer.state[parameter] = {"step": torch.tensor(1.0), **averages}
    for index, tensor in enumerate(state.tensors().values()):
        if tensor.dim():
            _fill(tensor, index)
    return state


def change(state: State) -> None:
    """Give every element another value, in place, as an optimizer's step does."""
    with _one_thread():
        for tensor in state.tensors().values():
            tensor.add_(1.0)


def scramble(state: State) -> None:
    """Leave no value of what was saved, so that a load that does nothing is found out."""
    with _one_thread():
        for tensor in state.tensors().values():
            tensor.fill_(-1.0)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Torch's others go on turning for milliseconds after their work, beside what is timed next."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def make_ready(state: State) -> None:
    """Wait until the device has nothing to do, and the system has memory for a copy and a cached file."""
    settle(state)
    prime(2 * state.size)


def settle(state: State) -> None:
    """Wait until the device has done what it was given."""
    if any(parameter.is_cuda for parameter in state.model.parameters()):
        torch.cuda.synchronize()


def fingerprints(state: State) -> dict[str, int]:
    """A digest of every tensor."""
    return {name: _digest(tensor) for name, tensor in state.tensors().items()}


def difference(state: State, expected: dict[str, int]) -> str | None:
    """What of the state is not what it should be, in words."""
    found = fingerprints(state)
    names = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    return f"{len(names):,} of {len(expected):,} tensors, such as {names[0]}" if names else None


def _fill(tensor: torch.Tensor, index: int) -> None:
    bits = tensor.view(-1).view(torch.int32)
    begin = index * 7919 % (1 << 30)
    torch.arange(begin, begin + bits.numel(), dtype=torch.int32, out=bits)
    bits.mul_(_MIX).bitwise_and_(_FINITE)


def _digest(tensor: torch.Tensor) -> int:
    host = tensor.detach().cpu().contiguous()
    return xxhash.xxh3_64_intdigest(view(host.data_ptr(), host.nbytes))
