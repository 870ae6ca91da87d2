"""What may a writer that was fenced off still do? Nothing that harms: the drafts and names that are closed to it.

A writer can be frozen between the last look at its lock and the one step that commits or deletes. Where that step
moves a folder, the folder is moved away first. Where it creates a manifest nothing can keep it from that: a note
`.ckptmgr/drafts/<name>.<nonce>.fenced` says that the data is gone, so that such a checkpoint is removed
as soon as it is seen. And where it deletes, a note `<name>.<nonce>.closed` keeps the folder's name from new ones.

Nobody knows when such a writer wakes up, so the notes outlive the one who put them. `.ckptmgr/unswept` names the
first writer that was taken over from before all of that was noted, for whoever comes if that one dies meanwhile.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from .errors import AlreadyExistsError, DamagedError, FormatVersionError, NotFoundError, StoreFullError
from .listing import is_committed
from .manifest import MANIFEST_NAME
from .records import FOLDER, DraftKey, new_nonce
from .store import DRAFTS, Store

_UNSWEPT = f"{FOLDER}/unswept"
_KEPT = {"fenced": 16, "closed": 256}  # notes; of a writer that many take-overs ago nothing is heard any more

_log = logging.getLogger("ckptmgr.repository")


class Fences:
    """Those of one root. `names` are the folders that no new checkpoint may have: a fenced off writer may
    still delete from them. Methods block and raise `StoreError`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.names: set[str] = set()
        self._drafts: set[tuple[str, str]] = set()  # those whose manifest may yet appear

    # Until a take-over is swept

    def announce(self, attempt: int) -> None:
        """Before a writer is taken over from that may still be alive."""
        since = self.unswept()
        if since is None or attempt < since:
            self._store.put(_UNSWEPT, f"{attempt}\n".encode())

    def unswept(self) -> int | None:
        """The first attempt of those that may be alive, with what they may yet do not noted; None without any."""
        try:
            text = self._store.get(_UNSWEPT, 0, 20).decode(errors="replace").strip()
        except NotFoundError:
            return None
        return int(text) if text.isdecimal() else 0

    def settle(self) -> None:
        """All of it is noted."""
        self._store.delete([_UNSWEPT])

    # What is noted

    def put_up(self, draft: DraftKey) -> None:
        """Before a draft is removed that somebody may still be writing to, and about to commit. Raises
        `StoreFullError` where there is no room for a note of that: the draft must then stay."""
        self.names.add(draft.name)
        if draft.entry.is_folder:
            self._move_away(draft)
        elif not self._is_committed(draft.name, draft.nonce):
            self._drafts.add((draft.name, draft.nonce))
            self._note(f"{draft.entry.key}.fenced", draft.entry.key)

    def take_back(self, draft: DraftKey) -> None:
        """It was committed at that very moment, with its data: it is a checkpoint like any other."""
        if (draft.name, draft.nonce) in self._drafts:
            self._drafts.remove((draft.name, draft.nonce))
            self._store.delete([f"{draft.entry.key}.fenced"])

    def close(self, name: str, nonce: str, source: str) -> None:
        """Keep a folder's name from new checkpoints. `source` is a file that a full disk may have a second name for."""
        self.names.add(name)
        self._note(_closed(name, nonce), source)

    @contextmanager
    def closing(self, name: str) -> Iterator[None]:
        """The same while this writer itself deletes the folder: until the block ends, or else for good."""
        note = _closed(name, new_nonce())
        with suppress(StoreFullError):  # it is here to make room
            self._store.put(note, b"")
        yield
        self._store.delete([note])

    def _move_away(self, draft: DraftKey) -> None:
        aside = f"{DRAFTS}/{draft.name}.{new_nonce()}"  # which is a draft's name: a later sweep finds it
        try:
            self._store.rename(draft.entry.key, aside)
        except NotFoundError:
            return  # it was committed, or aborted, just now
        self._store.delete([f"{aside}/"])

    def _note(self, note: str, source: str) -> None:
        try:
            self._store.put(note, b"")
        except StoreFullError:
            is_linked = False
            with suppress(AlreadyExistsError):
                is_linked = self._store.copy(source, note)
            if not is_linked:
                raise

    def recall(self, notes: Iterable[DraftKey]) -> None:
        """Close what writers before this one had closed."""
        for note in notes:
            self.names.add(note.name)
            if note.note == "fenced":
                self._drafts.add((note.name, note.nonce))

    def expel(self) -> None:
        """Remove the checkpoints that were committed without their data."""
        late = [draft for draft in self._drafts if self._is_committed(*draft)]
        for name, nonce in late:
            self._store.delete([f"{name}/{MANIFEST_NAME}"])
            self._store.delete([f"{name}/{nonce}/"])
            _log.warning("commit.late.removed url=%s/%s: its writer had lost the root before", self._store.url, name)

    def forget_oldest(self, notes: Iterable[DraftKey]) -> None:
        """Remove all notes but the newest."""
        newest_first = sorted(notes, key=lambda note: note.entry.modified or 0, reverse=True)
        oldest = [old for kind, kept in _KEPT.items() for old in [n for n in newest_first if n.note == kind][kept:]]
        if oldest:
            self._store.delete([note.entry.key for note in oldest])

    def _is_committed(self, name: str, nonce: str) -> bool:
        try:
            return is_committed(self._store, name, nonce)
        except (DamagedError, FormatVersionError):
            return False


def _closed(name: str, nonce: str) -> str:
    return f"{DRAFTS}/{name}.{nonce}.closed"
