"""What is in a run's root, as far as its writer knows without reading it again, and what may go of it?

Nobody else writes: what the writer committed and deleted it need not read. What others may have changed, pins and
marks of damage, is read each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from weakref import WeakMethod

from .clock import SafeClock
from .config import KeepConfig
from .manifest import CheckpointInfo, Pin
from .repository import Repository
from .retention import KeepRule, Plan, plan
from .rotation import Rotation


class Ledger:
    """That of one run; `read` answers its checkpoints from the store. Methods block and raise `StoreError`."""

    def __init__(
        self,
        repository: Repository,
        rules: Sequence[KeepRule],
        keep: KeepConfig,
        clock: SafeClock,
        read: Callable[[], list[CheckpointInfo]],
    ) -> None:
        self.can_let_go = bool(rules) or keep.max_bytes is not None
        self._repository, self._rules, self._keep, self._clock = repository, rules, keep, clock
        self._read = WeakMethod(read)  # else the run would live on, with its lock, when nobody has it any more
        self._rotation = Rotation(rules, min_good=keep.min_good, max_bytes=keep.max_bytes)
        self._known: dict[str, CheckpointInfo] | None = None  # by folder; None: to be read
        self._records: tuple[list[Pin], dict[tuple[str, str], str]] | None = None  # at the last plan

    def forget(self) -> None:
        """All is to be read again."""
        self._known = None

    def forget_plan(self) -> None:
        """The next plan is one of all."""
        self._records = None

    def put(self, infos: Iterable[CheckpointInfo]) -> None:
        """These are all that there are."""
        self._known = {info.name: info for info in infos}

    def add(self, info: CheckpointInfo) -> None:
        if self._known is not None:
            self._known[info.name] = info

    def remove(self, info: CheckpointInfo) -> None:
        if self._known is not None:
            self._known.pop(info.name, None)

    def infos(self) -> list[CheckpointInfo]:
        """The run's checkpoints with their pins and known damage as they are now, newest first."""
        return self._with(*self._repository.records())

    def _with(self, pins: list[Pin], marks: dict[tuple[str, str], str]) -> list[CheckpointInfo]:
        if self._known is None:
            read = self._read()
            assert read is not None
            self.put(read())
            assert self._known is not None
        by_name: dict[tuple[str, str], list[Pin]] = {}
        for pin in pins:
            by_name.setdefault((pin.name, pin.nonce), []).append(pin)
        for info in self._known.values():
            if info.manifest is not None:
                key = (info.name, info.manifest.nonce)
                held, damaged = tuple(by_name.get(key, ())), marks.get(key)
                if (held, damaged) != (info.pins, info.damaged):
                    self._known[info.name] = replace(info, pins=held, damaged=damaged)
        return sorted(self._known.values(), key=lambda info: info.order, reverse=True)

    def judge(self, infos: Iterable[CheckpointInfo]) -> Plan:
        """What the keep rules say of these."""
        known = [info for info in infos if info.manifest is not None]
        min_good, max_bytes = self._keep.min_good, self._keep.max_bytes
        return plan(known, self._rules, now=self._clock.now(), min_good=min_good, max_bytes=max_bytes)

    def plan(self) -> Plan:
        """What the keep rules say of all. One whose manifest can't be read is not judged: only a person can tell what
        it was."""
        self._records = self._repository.records()
        judged = [info for info in self._with(*self._records) if info.manifest is not None]
        return self._rotation.plan(judged, self._clock.now())

    def plan_after(self, added: CheckpointInfo) -> Plan:
        """The same where only this one was committed since the last plan, with less to do."""
        made = None
        if self._known is not None and self._records == self._repository.records():
            made = self._rotation.plan_after(added, self._clock.now())
        made = made or self.plan()
        return self.sure(made, added) if made.drop else made

    def sure(self, made: Plan, added: CheckpointInfo | None = None) -> Plan:
        """The plan, or another one when somebody deleted what was to stay by this one."""
        others = (info for info in made.must if added is None or info.name != added.name)
        if all(map(self._repository.is_there, others)):
            return made
        self.forget()
        return self.plan()
