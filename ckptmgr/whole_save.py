"""How is a state saved that every rank has whole? Rank 0 writes it, with what each rank has of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .committing import Committer
from .coordinator import Coordinator
from .copying import Copier, refuse_changed
from .formats import Format, Plan
from .manifest import CheckpointInfo, Manifest
from .request import Request
from .staging import Held, Live
from .state import Recorder
from .state.snapshot import FlatSnapshot, RankPart


class WholeSave:
    """One save: `capture`, `decide` on rank 0, `take`, `write`, in this order. It holds the state until dropped."""

    def __init__(
        self,
        request: Request,
        format: Format,
        recorder: Recorder,
        copier: Copier,
        committer: Committer,
        non_finite: Callable[[FlatSnapshot], Sequence[str]],
    ) -> None:
        self._request, self._format = request, format
        self._recorder, self._copier, self._committer = recorder, copier, committer
        self._non_finite = non_finite
        self._objects: Mapping[str, Any] = {}
        self._flat: FlatSnapshot | None = None
        self._plan: Plan | None = None
        self._held: Held | None = None
        self._about: Manifest | None = None

    def capture(self, objects: Mapping[str, Any], only: Sequence[str] | None, ranks: Coordinator) -> RankPart:
        """What this rank has of its own; on rank 0 all the rest is captured besides."""
        if ranks.rank:
            return self._recorder.capture_part(objects, only=only)
        self._flat, self._objects = self._recorder.capture(objects, only=only), objects
        return self._flat.ranks[0]

    def decide(self, parts: Sequence[RankPart]) -> bool:
        """On rank 0: copy the state, if it is to be written in the background; whether it is."""
        assert self._flat is not None
        flat = replace(self._flat, ranks=dict(enumerate(parts)))
        self._about = self._committer.manifest(self._request, self._format.name, len(parts), self._non_finite(flat))
        self._plan = self._format.plan(flat)
        copy = None if self._request.hurry else self._copier.copy(self._plan.regions, flat, self._objects)
        self._held = copy or Live(self._plan.regions, flat)
        # The copy is what is written: nothing holds on to what training drops.
        self._flat, self._objects = flat if copy is None else replace(flat, tensors=()), {}
        return copy is not None

    def take(self, answer: bool, ranks: Coordinator) -> bool:
        """Whether the save goes on in the background, as rank 0 decided."""
        return answer

    def write(self, ranks: Coordinator) -> CheckpointInfo:
        """On every rank: the committed checkpoint, which rank 0 has written. Blocks."""
        what = f"write of step {self._request.step}"
        return self._committer.in_room(self._request, ranks, lambda: ranks.patient.first(what, self._written))

    def _written(self) -> CheckpointInfo:
        assert self._flat is not None
        assert self._plan is not None
        assert self._held is not None
        assert self._about is not None
        draft = self._committer.begin(self._request)
        with self._committer.aborting(draft):
            # A region without a name is no file that could be shared: it is written whole, here or there.
            draft.check_room(region.size for name, region in self._plan.regions.items() if not name)
            self._plan.write(self._flat, self._held, self._committer.sink(draft))
            refuse_changed(self._held, self._flat)
            info = self._committer.commit(draft, self._about, self._request)
        self._committer.committed(info, self._request)
        return info
