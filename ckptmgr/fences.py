"""What may a writer that was fenced off still do? Nothing that harms: the drafts and names that are closed to it.

A writer can be frozen between the last look at its lock and the one step that commits. Where that step
moves a folder, the folder is moved away first. Where it creates a manifest nothing can keep it from that: a note
`.ckptmgr/drafts/<name>.<nonce>.fenced` says that the data is gone, so that such a checkpoint is removed
as soon as it is seen.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import suppress

from .errors import AlreadyExistsError, DamagedError, FormatVersionError, NotFoundError, StoreFullError
from .listing import is_committed
from .manifest import MANIFEST_NAME
from .records import DraftKey, new_nonce
from .store import DRAFTS, Store

_KEPT = 16  # notes; of a writer that many take-overs ago nothing is heard any more

_log = logging.getLogger("ckptmgr.fences")


class Fences:
    """Those of one root. `names` are the folders that no new checkpoint may have: a fenced off writer may
    still delete from them. Methods block and raise `StoreError`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.names: set[str] = set()
        self._drafts: set[tuple[str, str]] = set()  # those whose manifest may yet appear

    def put_up(self, draft: DraftKey) -> None:
        """Before a draft is removed that somebody may still be writing to, and about to commit. Raises
        `StoreFullError` where there is no room for a note of that: the draft must then stay."""
        self.names.add(draft.name)
        if draft.entry.is_folder:
            self._move_away(draft)
        elif not self._is_committed(draft.name, draft.nonce):
            self._drafts.add((draft.name, draft.nonce))
            self._note(draft)

    def take_back(self, draft: DraftKey) -> None:
        """It was committed at that very moment, with its data: it is a checkpoint like any other."""
        if (draft.name, draft.nonce) in self._drafts:
            self._drafts.remove((draft.name, draft.nonce))
            self._store.delete([f"{draft.entry.key}.fenced"])

    def _move_away(self, draft: DraftKey) -> None:
        aside = f"{DRAFTS}/{draft.name}.{new_nonce()}"  # which is a draft's name: a later sweep finds it
        try:
            self._store.rename(draft.entry.key, aside)
        except NotFoundError:
            return  # it was committed, or aborted, just now
        self._store.delete([f"{aside}/"])

    def _note(self, draft: DraftKey) -> None:
        note = f"{draft.entry.key}.fenced"
        try:
            self._store.put(note, b"")
        except StoreFullError:
            is_linked = False
            with suppress(AlreadyExistsError):
                is_linked = self._store.copy(draft.entry.key, note)
            if not is_linked:
                raise

    def recall(self, notes: Iterable[DraftKey]) -> None:
        """Close what writers before this one had closed."""
        for note in notes:
            self.names.add(note.name)
            self._drafts.add((note.name, note.nonce))

    def expel(self) -> int:
        """Remove the checkpoints that were committed without their data; answers how many there were."""
        late = [draft for draft in self._drafts if self._is_committed(*draft)]
        for name, nonce in late:
            self._store.delete([f"{name}/{MANIFEST_NAME}"])
            self._store.delete([f"{name}/{nonce}/"])
            _log.warning("commit.late.removed url=%s/%s: its writer had lost the root before", self._store.url, name)
        return len(late)

    def forget_oldest(self, notes: Iterable[DraftKey]) -> None:
        """Remove all notes but the newest."""
        oldest = sorted(notes, key=lambda note: note.entry.modified or 0)[:-_KEPT]
        if oldest:
            self._store.delete([note.entry.key for note in oldest])

    def take_down(self, notes: Iterable[DraftKey]) -> None:
        """Every other writer is dead: remove the notes."""
        if keys := [note.entry.key for note in notes]:
            self._store.delete(keys)
        self._drafts.clear()

    def _is_committed(self, name: str, nonce: str) -> bool:
        try:
            return is_committed(self._store, name, nonce)
        except (DamagedError, FormatVersionError):
            return False
