"""What is in a run's root, as far as its writer knows without reading it again, and what may go of it?

Nobody else writes: what the writer committed and deleted it need not read. What others may have changed, pins and
marks of damage, is read each time.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from weakref import WeakMethod

from .clock import SafeClock
from .config import KeepConfig
from .errors import StoreError
from .manifest import CheckpointInfo, Manifest, Pin
from .repository import Repository
from .retention import Best, KeepEverySteps, KeepRule, NewerThan, Plan, plan
from .rotation import Rotation

_log = logging.getLogger("ckptmgr.run")


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
        # Metrics that keep.best asks for, until a save lacks one for the first time.
        self._ranked_by = {rule.metric for rule in rules if isinstance(rule, Best)}
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
        """This one was committed."""
        if info.manifest is not None and info.manifest.metrics:
            self._warn_if_unranked(info.manifest)
        if self._known is not None:
            self._known[info.name] = info

    def _warn_if_unranked(self, manifest: Manifest) -> None:
        """Say so once when a save has metrics, but not the one that keep.best asks for."""
        for metric in sorted(self._ranked_by - manifest.metrics.keys()):
            self._ranked_by.discard(metric)
            _log.warning(
                "keep.best.missing step=%d metric=%s: this save has %s, and one without it is never the best%s",
                manifest.step, metric, ", ".join(manifest.metrics), did_you_mean(metric, manifest.metrics),
            )  # fmt: skip

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

    def judge_seen(self, infos: Iterable[CheckpointInfo], *, marks: bool) -> Plan:
        """The same, after a look at the files of those that others are to go for: what has not the sizes of its
        manifest counts as damaged, and is marked so with `marks`. For deletions that a person asks for: after each
        save it would cost too much."""
        # Where nothing goes it costs nothing, and else a listing of a folder for each of those relied on. Ten thousand
        # of them take a second or two on a disk, and over a network about as long as their manifests took to read.
        known = {info.name: info for info in infos}
        looked_at: set[str] = set()
        ahead = 0
        while True:
            made = self.judge(known.values())
            # Where much is damaged the next in line are looked at, too: else each would take a plan of its own.
            wanted = [*self._relied_on(made), *(verdict.info for verdict in made.drop[:ahead])] if made.drop else []
            wanted = [info for info in wanted if info.damaged is None and info.name not in looked_at]
            there = {info.name: info for info in self._repository.seen(wanted)}
            looked_at.update(there)
            if all(there.get(info.name) is info for info in wanted):
                return made
            for info in wanted:
                seen = there.get(info.name)
                if seen is None:  # deleted meanwhile
                    del known[info.name]
                    self.remove(info)
                elif seen is not info:
                    known[info.name] = seen
                    if marks:
                        self._mark_damaged(seen)
            ahead = 2 * ahead or 16

    def has_sound(self, infos: Iterable[CheckpointInfo], *, marks: bool) -> bool:
        """Whether one of these is sound, by the sizes of its files, too. Looks no further than the first that is;
        `marks` is as with `judge_seen`."""
        for info in infos:
            for seen in self._repository.seen([info]) if info.damaged is None else ():
                if seen.damaged is None:
                    return True
                if marks:
                    self._mark_damaged(seen)
        return False

    def _mark_damaged(self, info: CheckpointInfo) -> None:
        """A store that takes no mark, such as a full disk, must not stop what makes room in it."""
        url = self._repository.store.url
        _log.warning("retention.damaged step=%d url=%s/%s cause=%s", info.step, url, info.name, info.damaged)
        try:
            self._repository.mark_damaged(info, info.damaged or "")
        except StoreError as exc:
            _log.warning("damage.mark.failed step=%d url=%s cause=%s", info.step, url, exc)

    def _relied_on(self, made: Plan) -> list[CheckpointInfo]:
        """Of those that stay the ones in whose place, were they damaged, one would stay that goes."""
        kept, going = (
            [verdict.info for verdict in verdicts if verdict.info.damaged is None]
            for verdicts in (made.keep, made.drop)
        )
        if self._keep.max_bytes is not None or len({info.step for info in (*kept, *going)}) < len(kept) + len(going):
            return kept  # each takes up room, or the place of another one of its step
        names = {info.name for info in made.must}
        for rule in self._rules:
            if isinstance(rule, NewerThan):
                continue  # which judges each by itself
            its = [info for info, _ in rule.keeps(kept, self._clock.now())]
            if isinstance(rule, KeepEverySteps):
                places = {info.step // rule.n for info in going}
                its = [info for info in its if info.step // rule.n in places]
            names |= {info.name for info in its}
        return [info for info in kept if info.name in names]

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


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a message about a word that is none of those known."""
    close = difflib.get_close_matches(word, [*known], n=1)
    return f"; did you mean {close[0]}?" if close else ""
