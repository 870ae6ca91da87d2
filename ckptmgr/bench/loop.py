"""How much training time does a save cost, all in? A loop timed with a save beside it, and without."""

from __future__ import annotations

import itertools
import time

import torch

from .peers import Peer
from .state import State, make_ready

_PAIRS = 2
_SHORTEST_S = 0.2
_MATRIX, _UPDATED = 384, 4 << 20  # elements a side; bytes changed in one step, at least
_PYTHON = 4000  # additions


class _Loop:
    """Steps of a training: a matrix product, plain Python, and some weights changed in place."""

    def __init__(self, state: State) -> None:
        device = next(state.model.parameters()).device
        self._factor = torch.ones(_MATRIX, _MATRIX, device=device)
        self._groups = itertools.cycle(_grouped([tensor for tensor in state.tensors().values() if tensor.dim()]))

    def seconds(self, steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            product = self._factor @ self._factor
            total = 0
            for number in range(_PYTHON):
                total += number
            for tensor in next(self._groups):
                tensor.add_(1.0)
            float(product[0, 0])  # waits for the device, as a loop that logs its loss does
        return time.perf_counter() - began


def lost(peer: Peer, state: State) -> list[float]:
    """Seconds that the loop takes longer for a save that begins with it, its whole wait included."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a loop that leaves a core to others, as one that feeds a device does
    try:
        loop = _Loop(state)
        peer.prepare(state)
        make_ready(state)
        began = time.perf_counter()
        peer.save(state, 1)
        peer.wait()
        length = max(_SHORTEST_S, 2 * (time.perf_counter() - began))
        loop.seconds(5)
        steps = max(5, round(length / (loop.seconds(20) / 20)))
        found = []
        for step in range(2, _PAIRS + 2):
            alone = loop.seconds(steps)
            make_ready(state)
            loop.seconds(20)  # as the training that goes before; for why see `measures.timed_save`
            began = time.perf_counter()
            peer.save(state, step)
            loop.seconds(steps)
            peer.wait()
            found.append(time.perf_counter() - began - alone)
        peer.close()
        return found
    finally:
        torch.set_num_threads(threads)


def _grouped(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    groups: list[list[torch.Tensor]] = [[]]
    for tensor in tensors:
        if sum(one.nbytes for one in groups[-1]) >= _UPDATED:
            groups.append([])
        groups[-1].append(tensor)
    return groups
