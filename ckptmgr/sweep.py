"""What did dead processes leave, and what may one that was taken over still do?

A record below `.ckptmgr/` names each thing that somebody left half done, so that nothing is guessed. Where a
writer was taken over, it may go on at any moment: what it had recorded before the sweep it may yet
do, and nothing else. So what it was about to delete is deleted (but never the last good checkpoint), what it was
about to archive is archived, its draft can't become a checkpoint any more, and none of these folders' names is
given to a new one, by anybody: see `fences`. What such a writer records after the sweep it does not do, as it
looks at its lock then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

from .draft import discard
from .errors import DamagedError, FormatVersionError, StoreError, StoreFullError
from .fences import Fences
from .listing import is_committed
from .manifest import MANIFEST_NAME
from .pins import Pins
from .records import FOLDER, Aside, AsideKey, DraftKey, Records, each
from .store import Store
from .store.leftovers import remove_leftovers
from .store.spares import FOLDER as SPARES
from .trash import Trash

_log = logging.getLogger("ckptmgr.repository")


class Sweep:
    """Sweeps one root. `can_spare` tells whether a checkpoint that was about to be deleted may go. Methods block and
    raise `StoreError`."""

    def __init__(
        self,
        store: Store,
        records: Records,
        pins: Pins,
        trash: Trash,
        fences: Fences,
        can_spare: Callable[[Aside], bool],
    ) -> None:
        self._store, self._records, self._pins, self._trash, self._fences = store, records, pins, trash, fences
        self._can_spare = can_spare
        self._since: int | None = None  # the first attempt of those that may be alive all the same; None: all are dead

    def run(self, check: Callable[[], None]) -> int:
        """Remove dead drafts and finish what was interrupted; answers how many there were. `check` raises `FencedError`
        when the lock is lost meanwhile, with nothing touched that is not this writer's to touch."""
        self._since = self._fences.unswept()
        asides, archived = self._records.asides("trash"), self._records.aside_keys("archive")
        drafts = self._records.drafts()
        check()  # so these are no later writer's
        done = self._finish_deletions(asides, archived, check)
        gone = {(aside.name, aside.manifest.nonce) for aside in asides}
        done += self._finish_archiving([one for one in archived if (one.name, one.nonce) not in gone], check)
        notes = [draft for draft in drafts if draft.note]
        self._fences.recall(notes)
        self._fences.expel()
        self._fences.forget_oldest(notes)
        done += self._remove_drafts([draft for draft in drafts if not draft.note])
        if self._since is not None:
            check()
            self._fences.settle()
        self._remove_pins(check)
        if self._store.path is not None:
            with suppress(StoreError):  # a dead writer's: they served its next save only. One that lives may still add
                if self._store.stat(f"{SPARES}/") is not None:
                    self._store.delete([f"{SPARES}/"])
            done += remove_leftovers(self._store.path, FOLDER)
        if done:
            _log.info("root.sweep.done url=%s removed=%d", self._store.url, done)
        return done

    def _may_act(self, attempt: int) -> bool:
        """Whether the writer of a record may act by it: one that came before may have looked at its lock no more since
        the sweep of its follower. Of an earlier version's nobody knows whose it is."""
        return self._since is not None and (attempt >= self._since or not attempt)

    def _finish_deletions(
        self, asides: Sequence[Aside], archived: Sequence[AsideKey], check: Callable[[], None]
    ) -> int:
        keys: dict[tuple[str, str], set[str]] = {}
        for one in archived:
            keys.setdefault((one.name, one.nonce), set()).add(one.key)
        for aside in asides:
            if self._may_act(aside.attempt):
                self._fences.close(aside.name, aside.manifest.nonce, aside.key)
            going = aside
            if self.is_there(aside.name, aside.manifest.nonce):
                own = self._take_up("trash", aside, check) if self._may_act(aside.attempt) else None
                if own is None:
                    self._store.delete([aside.key])  # its manifest was never deleted: it stays a checkpoint
                    continue
                going = own
                self._trash.delete_manifest(aside.name)
            elif self._store.stat(f"{aside.name}/{MANIFEST_NAME}") is None:
                self._trash.delete_manifest(aside.name)  # once more: whoever did may have died before it was durable
            of_it = keys.get((aside.name, aside.manifest.nonce), set())
            self._trash.delete_data(going, *sorted({aside.key, *of_it} - {going.key}))
        return len(asides)

    def _take_up(self, kind: str, aside: Aside, check: Callable[[], None]) -> Aside | None:
        """Make another one's record this writer's own, to act by; None when the checkpoint is to stay."""

        def may_go() -> bool:
            check()
            return kind == "archive" or self._can_spare(aside)

        return self._trash.record(kind, aside.name, aside.manifest, may_go)

    def _finish_archiving(self, archived: Sequence[AsideKey], check: Callable[[], None]) -> int:
        alive = each(self._store, lambda one: self.is_there(one.name, one.nonce), archived)
        undone = [one for one, lives in zip(archived, alive, strict=True) if lives]
        gone = [one for one in archived if one not in undone]
        for one in undone:
            if self._may_act(one.attempt):
                self._fences.close(one.name, one.nonce, one.key)
            aside = self._records.read_aside(one.key) if self._may_act(one.attempt) else None
            own = self._take_up("archive", aside, check) if aside else None
            if own is not None:
                self._trash.delete_manifest(one.name)
                gone.append(one)
            if own is None or own.key != one.key:
                self._store.delete([one.key])
        self._pins.forget(*((one.name, one.nonce) for one in gone))
        return len(undone)

    def _remove_drafts(self, drafts: Sequence[DraftKey]) -> int:
        done = 0
        for draft in drafts:
            try:
                if self._since is not None:
                    self._fences.put_up(draft)
                if discard(self._store, draft.name, draft.nonce):
                    self._fences.take_back(draft)
            except (DamagedError, FormatVersionError, StoreFullError) as exc:
                _log.warning("draft.sweep.kept key=%s/%s cause=%s", self._store.url, draft.entry.key, exc)
            else:
                done += 1
        return done

    def _remove_pins(self, check: Callable[[], None]) -> None:
        """Remove the pins that have ended: those of readers that were killed, too. One that stays harms nobody."""
        try:
            if count := self._pins.remove_ended(check, self._now_s):
                _log.info("pin.sweep.done url=%s removed=%d", self._store.url, count)
        except StoreError as exc:
            _log.warning("pin.sweep.failed url=%s cause=%s (the next sweep tries again)", self._store.url, exc)

    def _now_s(self) -> float | None:
        """When the writer's lock was last written, by the store's clock: a moment ago. None where nobody says."""
        lock = self._store.stat(f"{FOLDER}/lock")  # on a local disk; elsewhere a lease
        entries = [*([lock] if lock else []), *self._store.list(f"{FOLDER}/lease")]
        return max((entry.modified for entry in entries if entry.modified is not None), default=None)

    def expel(self) -> None:
        """Remove what a writer that was fenced off has committed, or recorded, all the same since the sweep. Asks
        nothing of the store where nobody was taken over."""
        if self._since is not None:
            attempt = self._trash.attempt
            earlier = [one for one in self._records.aside_keys("trash") if 0 < one.attempt < attempt]
            if late := [one.key for one in earlier if self.is_there(one.name, one.nonce)]:
                self._store.delete(late)
        self._fences.expel()

    def is_there(self, name: str, nonce: str) -> bool:
        """Whether a save is a checkpoint. One whose manifest can't be read is none."""
        try:
            return is_committed(self._store, name, nonce)
        except DamagedError:
            return False
