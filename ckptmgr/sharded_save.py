"""How is a state saved of which every rank has a part? Each writes its own files into one draft, rank 0 commits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .committing import Committer
from .coordinator import Coordinator
from .copying import Copier, refuse_changed
from .draft import Draft
from .formats.state_file import Whole
from .manifest import CheckpointInfo, FileEntry, Manifest
from .request import Request
from .sharded.layout import Row
from .sharded.plan import FORMAT, GlobalIndex, LocalPlan, RankPlan, finish, global_plan, local_plan, resolved
from .staging import Held, Live
from .state import Recorder
from .state.snapshot import FlatSnapshot, RankPart


@dataclass(frozen=True, slots=True)
class Share:
    """What a rank tells of a state: its own part, where its tensors are (None: as the last time), what is odd."""

    part: RankPart
    plan: LocalPlan | None
    odd: Sequence[str]


class ShardPlans:
    """Who writes what, for states of the shape of the last one: on each rank its own, on rank 0 all besides."""

    def __init__(self, split_size: int | None) -> None:
        self._split_size = split_size
        self.known: object = None  # the shape and number of ranks that this rank's plan is for
        self.own: RankPlan | None = None
        self.index: GlobalIndex | None = None
        self._local: list[LocalPlan] = []

    def joined(self, plans: Sequence[LocalPlan | None]) -> list[RankPlan | None]:
        """On rank 0: every rank's plan, None where it is the last one."""
        if not any(plans):
            return [None] * len(plans)
        local = [new or self._local[rank] for rank, new in enumerate(plans)]
        self.index, made = global_plan(local, self._split_size)
        self._local = local  # only now: the ranks keep their plans, too, when this fails
        return list(made)


class ShardedSave:
    """One save: `capture`, `decide` on rank 0, `take`, `write`, in this order. It holds the state until dropped."""

    def __init__(
        self,
        request: Request,
        plans: ShardPlans,
        recorder: Recorder,
        copier: Copier,
        committer: Committer,
        non_finite: Callable[[FlatSnapshot], Sequence[str]],
    ) -> None:
        self._request, self._plans = request, plans
        self._recorder, self._copier, self._committer = recorder, copier, committer
        self._non_finite = non_finite
        self._objects: Mapping[str, Any] = {}
        self._flat: FlatSnapshot | None = None
        self._kind: object = None
        self._parts: dict[int, RankPart] = {}
        self._plan: RankPlan | None = None
        self._held: Held | None = None
        self._about: Manifest | None = None

    def capture(self, objects: Mapping[str, Any], only: Sequence[str] | None, ranks: Coordinator) -> Share:
        """What this rank has."""
        flat, self._objects = self._recorder.capture(objects, only=only, rank=ranks.rank), objects
        self._flat, self._kind = resolved(flat), (flat.shape, ranks.world_size)
        plan = None if self._plans.known == self._kind else local_plan(flat, ranks.rank, ranks.world_size)
        return Share(flat.ranks[ranks.rank], plan, self._non_finite(flat))

    def decide(self, shares: Sequence[Share]) -> list[RankPlan | None]:
        """On rank 0: what each rank is to write."""
        odd = list(dict.fromkeys(name for share in shares for name in share.odd))
        self._about = self._committer.manifest(self._request, FORMAT, len(shares), odd)
        self._parts = {rank: share.part for rank, share in enumerate(shares)}
        return self._plans.joined([share.plan for share in shares])

    def take(self, answer: list[RankPlan | None], ranks: Coordinator) -> bool:
        """Copy what this rank writes, if that is to happen in the background; whether it is, on all ranks: one
        that must write at once would raise at this call what the others hear of at a later one."""

        def copied() -> bool:
            return self._is_copied(answer[ranks.rank])

        with self._committer.failing(self._request):
            return ranks.patient.exchange(f"copy of step {self._request.step}", copied, all)

    def _is_copied(self, plan: RankPlan | None) -> bool:
        assert self._flat is not None
        plans = self._plans
        plans.own = self._plan = plan or plans.own
        plans.known = self._kind
        assert self._plan is not None
        copy = None if self._request.hurry else self._copier.copy(self._plan.regions, self._flat, self._objects)
        self._held = copy or Live(self._plan.regions, self._flat)
        flat = replace(self._flat, ranks=self._parts)
        self._flat, self._objects = flat if copy is None else replace(flat, tensors=()), {}
        return copy is not None

    def write(self, ranks: Coordinator) -> CheckpointInfo:
        """On every rank: the committed checkpoint, when all have written their files. Blocks."""
        info = self._committer.in_room(self._request, ranks, lambda: self._attempt(ranks))
        if not ranks.rank:
            self._committer.committed(info, self._request)
        return info

    def _attempt(self, ranks: Coordinator) -> CheckpointInfo:
        what, committer = f"write of step {self._request.step}", self._committer
        draft: Draft | None = None

        def sizes() -> list[int]:
            assert self._plan is not None
            return [region.size for region in self._plan.regions.values()]

        def begun(needs: Sequence[list[int]]) -> tuple[str, str]:
            nonlocal draft
            draft = committer.begin(self._request)
            with committer.aborting(draft):
                draft.check_room(size for own in needs for size in own)
            return draft.name, draft.nonce

        named = ranks.patient.exchange(what, sizes, begun)
        own = draft or committer.join(*named)

        def mine() -> tuple[list[Row], dict[str, FileEntry]]:
            return self._written(own), dict(own.entries)

        def decide(written: Sequence[tuple[list[Row], dict[str, FileEntry]]]) -> CheckpointInfo:
            assert self._about is not None
            assert self._plans.index is not None
            for _, entries in written[1:]:
                own.adopt(entries)
            own.write({name: Whole(data) for name, data in finish(self._plans.index, [r for r, _ in written]).items()})
            return committer.commit(own, self._about, self._request)

        try:
            with committer.aborting(draft):
                return ranks.patient.exchange(what, mine, decide)
        finally:
            own.let_go()

    def _written(self, draft: Draft) -> list[Row]:
        assert self._flat is not None
        assert self._plan is not None
        assert self._held is not None
        rows = self._plan.write(self._flat, self._held, draft)
        refuse_changed(self._held, self._flat)
        draft.finish()
        return rows
