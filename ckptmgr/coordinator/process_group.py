"""How do the ranks of a `torch.distributed` job agree? On a gloo group and a store prefix of our own.

Nothing here touches the training's group or NCCL: a collective there that one rank does not reach hangs all.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store  # the job's own, whatever it was made by

from ..errors import CoordinationError
from .channel import Fate, Pulse, StoreChannel
from .wire import Wire

T = TypeVar("T")

_LINGER_S = 5.0  # that rank 0 waits at the end for ranks that have not read yet what it told them

_made: Counter[str] = Counter()  # coordinators of this process by name: all ranks make them in the same order


class ProcessGroup:
    """See `Coordinator`. Made by every rank of the default process group, with the same name; blocks until
    all have come. `timeout_s` is how long any rank may keep the others waiting."""

    def __init__(self, name: str, timeout_s: float) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._timeout_s = timeout_s
        _made[name] += 1
        # A launcher may keep its store, keys and all, from one attempt to the next.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"ckptmgr/{attempt}/{name}/{_made[name]}", _get_default_store())
        self._wire = Wire(_own_client(store), timeout_s)
        self._fate = Fate(self._wire)
        self._pulse = Pulse(self._wire, self.rank, self.world_size, timeout_s)
        self.prompt = self._channel("prompt", is_patient=False)
        self.patient = self._channel("patient", is_patient=True)
        self._group: Any = None
        self._circles: dict[str, _GlooCircle | None] = {}
        try:
            self.prompt.exchange("the first call of ckptmgr", lambda: None, lambda _: None)
        except BaseException:
            self.close()
            raise

    def _channel(self, name: str, *, is_patient: bool) -> StoreChannel:
        wire, pulse, fate = self._wire, self._pulse, self._fate
        return StoreChannel(name, wire, pulse, fate, self.rank, self.world_size, self._timeout_s, is_patient=is_patient)

    @property
    def problem(self) -> str | None:
        return self._fate.problem

    def ballot(self) -> GlooBallot:
        """See `Coordinator.ballot`."""
        return GlooBallot(self._own_group(), self._fate, self._pulse, self.world_size, self._timeout_s)

    def circle(self, mode: str) -> _GlooCircle | None:
        """See `Coordinator.circle`."""
        if mode not in self._circles:
            if mode == "rank0":
                members = [list(range(self.world_size))]
            else:
                hosts = self.prompt.exchange("nodes", socket.gethostname, list)
                members = [[rank for rank, host in enumerate(hosts) if host == one] for one in dict.fromkeys(hosts)]
            for ranks in members:  # every rank takes part in making every group
                group = self._own_group() if len(ranks) == self.world_size else self._new_group(ranks)
                if self.rank in ranks:
                    own = _GlooCircle(group, ranks, self.rank, self._fate) if len(ranks) > 1 else None
                    self._circles[mode] = own
        return self._circles[mode]

    def close(self) -> None:
        if not self.rank:
            for channel in (self.prompt, self.patient):
                channel.linger(min(_LINGER_S, self._timeout_s))
        self._pulse.stop()
        self._wire.close()
        # A group is not destroyed here: others may still be in it, and the job's end takes it along.

    def _own_group(self) -> Any:
        if self._group is None:
            self._group = self._new_group(list(range(self.world_size)))
        return self._group

    def _new_group(self, ranks: Sequence[int]) -> Any:
        try:
            return dist.new_group(list(ranks), timeout=timedelta(seconds=self._timeout_s), backend="gloo")
        except RuntimeError as exc:
            raise self._fate.end(f"a gloo group of ranks {list(ranks)[:8]} could not be made: {exc}") from exc


class GlooBallot:
    """See `Ballot`: one int through an asynchronous all-reduce."""

    def __init__(self, group: Any, fate: Fate, pulse: Pulse, world_size: int, timeout_s: float) -> None:
        self._group, self._fate, self._pulse = group, fate, pulse
        self._world_size, self._timeout_s = world_size, timeout_s
        self._votes = torch.zeros(1, dtype=torch.int64)
        self._work: Any = None

    @property
    def is_open(self) -> bool:
        return self._work is not None

    def cast(self, wanted: int) -> None:
        self._fate.check()
        self._votes.fill_(wanted)
        try:
            self._work = dist.all_reduce(self._votes, op=dist.ReduceOp.BOR, group=self._group, async_op=True)
        except RuntimeError as exc:
            raise self._failed(exc) from exc

    def result(self) -> int:
        self._fate.check()
        work, self._work = self._work, None
        if work is None:
            return 0
        try:
            work.wait()
        except RuntimeError as exc:
            raise self._failed(exc) from exc
        return int(self._votes.item())

    def _failed(self, error: RuntimeError) -> CoordinationError:
        problem = f"the ranks did not agree within {self._timeout_s:g} s"
        with suppress(CoordinationError):
            silent = self._pulse.without(range(self._world_size))
            named = ", ".join(map(str, silent[:8])) or "none, so one of them has not made the same calls"
            problem += f"; without a sign of life: rank {named}"
        return self._fate.end(f"{problem} ({(str(error).splitlines() or [''])[0]:.200})")


class _GlooCircle:
    """See `Circle`: the lowest rank reads."""

    def __init__(self, group: Any, ranks: Sequence[int], rank: int, fate: Fate) -> None:
        self._group, self._first, self._fate = group, ranks[0], fate
        self.is_reader, self.size = rank == ranks[0], len(ranks)

    def broadcast(self, data: memoryview) -> None:
        if data.nbytes:
            self._run(lambda: dist.broadcast(torch.frombuffer(data, dtype=torch.uint8), self._first, self._group))

    def union(self, items: list[T]) -> list[list[T]]:
        found: list[Any] = [None] * self.size
        self._run(lambda: dist.all_gather_object(found, items, group=self._group))
        return found

    def _run(self, collective: Any) -> None:
        self._fate.check()
        try:
            collective()
        except RuntimeError as exc:
            raise self._fate.end(f"the ranks that read together lost each other: {exc}") from exc


def _own_client(store: Any) -> Any:
    """A connection of its own, where the store has such: a wait on one must not keep the others waiting."""
    with suppress(RuntimeError, NotImplementedError, AttributeError):
        return store.clone()
    return store
