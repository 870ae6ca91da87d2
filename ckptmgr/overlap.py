"""Which tensors does nothing change before an optimizer's next step, and what has that step wait for their copy?"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .state.ranks import unmarked
from .state.shards import local

Mark: TypeAlias = "tuple[torch.device, torch.cuda.Event]"  # what a copy's end is waited for with


class NextSteps:
    """Of the optimizers of a state: what they change, and a hook before each of their steps. Used from one thread."""

    def __init__(self) -> None:
        self._hooks: WeakKeyDictionary[Optimizer, RemovableHandle] = WeakKeyDictionary()
        self._rest: Rest | None = None

    def tensors(self, objects: Mapping[str, Any]) -> list[torch.Tensor]:
        """Parameters, and state kept for them, of the optimizers among the objects: what training does not
        change before their next step, which waits from now on for what `hold_back` is given."""
        optimizers = [one for one in unmarked(objects).values() if isinstance(one, Optimizer) and _tells_of_steps(one)]
        for optimizer in optimizers:
            if optimizer not in self._hooks:
                self._hooks[optimizer] = optimizer.register_step_pre_hook(_hook(weakref.ref(self)))
        return [local(tensor) for optimizer in optimizers for tensor in _tensors(optimizer)]

    def hold_back(self, rest: Rest) -> None:
        """Have the next step wait for this."""
        self._rest = rest

    def let_go(self) -> None:
        """Wait for the copy. Called before each step."""
        if self._rest is not None:
            self._rest.settle()
            self._rest = None

    def close(self) -> None:
        """Leave the optimizers alone. Blocks as a step would."""
        self.let_go()
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()


def _hook(steps: weakref.ref[NextSteps]) -> Any:
    def before_step(optimizer: Optimizer, *_: object) -> None:
        if (found := steps()) is not None:
            found.let_go()

    return before_step


def _tells_of_steps(optimizer: Optimizer) -> bool:
    """Whether torch calls the hooks of an optimizer whoever makes its step. A learning rate's scheduler puts a
    method in the step's place that calls it."""
    own = vars(optimizer).get("step")
    return getattr(type(optimizer).step, "hooked", False) and (own is None or hasattr(own, "_wrapped_by_lr_sched"))


def _tensors(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.state.values():
        if isinstance(state, Mapping):
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


class Rest:
    """Copies that are not done yet. Their sources, which nobody is to change meanwhile, are `watched` and have these
    `numbers`; on devices the copies' ends have `marks`."""

    def __init__(
        self, copying: Future[None], marks: list[Mark], numbers: Sequence[int], watched: Sequence[torch.Tensor]
    ) -> None:
        self._copying, self._marks = copying, marks
        self._lock = threading.Lock()
        self._watched = [(number, one, one._version) for number, one in zip(numbers, watched, strict=True)]
        self._changed: list[int] = []

    def wait(self) -> None:
        """Block until they are done."""
        self._copying.result()
        for _, event in self._marks:
            event.synchronize()

    def settle(self) -> None:
        """Block until the tensors may be changed: those on a device in its current stream. Never raises."""
        self._copying.exception()
        for device, event in self._marks:
            torch.cuda.current_stream(device).wait_event(event)
        self.changed()

    def changed(self) -> Sequence[int]:
        """Those of the tensors that were changed until this or `settle` was called first. To be called when the copies
        are done for long: what changes a tensor counts as a change only when it has ended."""
        with self._lock:
            self._changed += [number for number, one, version in self._watched if one._version != version]
            self._watched = []
            return tuple(self._changed)
