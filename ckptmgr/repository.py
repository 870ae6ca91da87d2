"""Which checkpoints are there, and how do they come and go? THE commit protocol over a store.

The order is always data, manifest, pointer, retention; a checkpoint exists exactly when its
manifest does. Deleting goes the other way: a tombstone, the manifest, the data, the tombstone. Whatever
a dead process left half done is named by a record below `.ckptmgr/`, so that `sweep` never guesses
what is ours. Methods that change the root expect the caller to hold the writer's lock.
"""

from __future__ import annotations

import logging
import operator
import re
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from itertools import islice

from .draft import Draft, discard
from .errors import ConfigError, DamagedError, FormatVersionError, NotFoundError, StoreError
from .listing import Listing, each, read_checkpoint
from .lock import last_writer
from .manifest import DEFAULT_NAMES, MANIFEST_NAME, CheckpointInfo, NameTemplate, Pin
from .pins import Pins
from .records import FOLDER, Aside, Records, checked_tag, new_nonce
from .source import Problem, Source
from .store import DRAFTS, Store

_DRAFT = re.compile(r"(?P<name>.+)\.(?P<nonce>[0-9a-f]{16})")

_log = logging.getLogger("ckptmgr.repository")


class Repository:
    """All checkpoints under one root. Every method may block on the store and raises `StoreError`."""

    def __init__(
        self,
        store: Store,
        *,
        names: NameTemplate | None = None,
        pointer: str = "latest",
        commit: str = "auto",
    ) -> None:
        if commit == "rename" and not store.can_rename:
            raise ConfigError(
                f"commit: rename is not possible at {store.url}: its folders can't be renamed in one step; "
                "use auto or manifest"
            )
        self.store = store
        self.names = names or DEFAULT_NAMES
        self._templates = tuple(dict.fromkeys((self.names, DEFAULT_NAMES)))
        self._records, self._pins = Records(store), Pins(store)
        self._pointer = pointer
        self._commit = commit

    @property
    def renames(self) -> bool:
        """Whether a commit is a rename (else it is the creation of the manifest)."""
        return self._commit != "manifest" and self.store.can_rename

    # What is there

    def infos(self) -> list[CheckpointInfo]:
        """Every checkpoint, newest first, with pins and known damage.

        Raises `FormatVersionError` for one that a newer ckptmgr wrote.
        """
        return self.listing().infos()

    def listing(self, last_attempt: int | None = None) -> Listing:
        """What is there now, to be read as far as it is asked for. `last_attempt` is the highest that a
        checkpoint can have, where the caller knows better than the records of the writer's lock."""
        folders = [entry.key for entry in self.store.list() if entry.is_folder and entry.key[0] != "."]
        pins, marks = self.records() if folders else ([], {})
        ask = (lambda: last_writer(self.store)) if last_attempt is None else (lambda: last_attempt)
        return Listing(self.store, self._templates, folders, pins, marks, ask)

    def records(self) -> tuple[list[Pin], dict[tuple[str, str], str]]:
        """The pins, and what is known to be damaged, by folder and nonce with the reason, as they are now."""
        there = {entry.name for entry in self.store.list(FOLDER)}
        pins = self._pins.read() if "pins" in there else []
        return pins, self._records.damaged() if "damaged" in there else {}

    def read(self, name: str) -> CheckpointInfo | None:
        """The checkpoint in a folder, without pins and known damage, or None when there is none."""
        return read_checkpoint(self.store, name, self._templates)

    def find(self, which: int | str, infos: Sequence[CheckpointInfo] | None = None) -> CheckpointInfo:
        """One checkpoint by step, folder name, tag, or "latest" (the newest not known damaged).

        Raises `NotFoundError` that says what there is.
        """
        matches = self.find_all(which, infos)
        if not matches:
            infos = self.infos() if infos is None else infos
            what = repr(which) if _as_step(which) is None else f"step {which}"
            there = ", ".join(str(info.step) for info in infos[:10]) or "none"
            more = f" and {len(infos) - 10} more" if len(infos) > 10 else ""
            raise NotFoundError(f"no checkpoint {what} in {self.store.url}; steps there: {there}{more}")
        return matches[0]

    def find_all(self, which: int | str, infos: Sequence[CheckpointInfo] | None = None) -> list[CheckpointInfo]:
        """All that `find` could have meant, its answer first: what is about to be deleted must be one."""
        if which == "latest":
            newest_first = self.listing().newest_first() if infos is None else infos
            return [*islice((info for info in newest_first if info.damaged is None), 1)]
        infos = self.infos() if infos is None else infos
        if (step := _as_step(which)) is not None:
            # Of equal steps a sound one before a damaged one, then the newer attempt's.
            return sorted((info for info in infos if info.step == step), key=lambda info: info.damaged is not None)
        return [info for info in infos if info.name == which] or [info for info in infos if which in info.tags]

    def pointer(self) -> str | None:
        """What the pointer says: a hint, to be believed only together with its manifest."""
        try:
            return self.store.get(self._pointer, 0, 1024).decode("utf-8", "replace").strip()
        except NotFoundError:
            return None

    def open(self, info: CheckpointInfo, level: str = "fast") -> Source:
        """A checkpoint's files for reading. Raises `DamagedError` when a size is wrong already."""
        source = self.source(info, level)
        if problems := source.problems("full" if level == "full" else "size" if level != "off" else "off"):
            raise DamagedError(f"{source.where}: " + "; ".join(map(str, problems)))
        return source

    def source(self, info: CheckpointInfo, level: str = "fast") -> Source:
        """The same, without a look at the store."""
        if info.manifest is None:
            raise DamagedError(f"{self.store.url}/{info.name}: {info.damaged}")
        return Source(self.store, info.name, info.manifest, level)

    def verify(self, info: CheckpointInfo, level: str = "full") -> list[Problem]:
        """What is wrong with a checkpoint, file by file; `size` compares sizes, `full` reads all."""
        if info.manifest is None:
            return [Problem(MANIFEST_NAME, info.damaged or "can't be read")]
        return Source(self.store, info.name, info.manifest, level).problems(level)

    # How one comes

    def begin(self, step: int, epoch: int | None, run: str) -> Draft:
        """A draft for a step, under a name that nothing else has."""
        name = self.names.format(step, epoch, run)
        free, count = name, 1
        while self._is_taken(free):
            count += 1
            free = f"{name}.{count}"
        return Draft(self.store, free, new_nonce(), rename=self.renames)

    def join(self, name: str, nonce: str) -> Draft:
        """A draft that another process began, to write files into; that process commits or aborts it."""
        return Draft(self.store, name, nonce, rename=self.renames, is_begun=True)

    def _is_taken(self, name: str) -> bool:
        """A rename needs a folder that does not exist; a manifest only that there is no other."""
        if self.renames:
            return any(self.store.stat(key) is not None for key in (f"{name}/", name))
        return self.store.stat(f"{name}/{MANIFEST_NAME}") is not None

    def point(self, name: str | None) -> None:
        """Move the pointer: a hint, so its failure is a warning."""
        try:
            if name is None:
                self.store.delete([self._pointer])
            else:
                self.store.put(self._pointer, f"{name}\n".encode())
        except StoreError as exc:
            _log.warning("pointer.put.failed key=%s name=%s cause=%s", self._pointer, name, exc)

    # How one goes

    def drop(self, info: CheckpointInfo) -> None:
        """Delete a checkpoint, out of sight first. Only the files it names; whatever else lies in
        its folder stays. One whose manifest can't be read goes with its whole folder: call it for
        such a one only when a person asked."""
        if info.manifest is None:
            self.store.delete([f"{info.name}/{MANIFEST_NAME}"])
            self.store.delete([f"{info.name}/"])
            self._pins.forget((info.name, None))
        else:
            tombstone = self._records.put_aside("trash", info.name, info.manifest)
            self.store.delete([f"{info.name}/{MANIFEST_NAME}"])
            self._delete_data(tombstone)
        _log.info("checkpoint.drop.done step=%d url=%s/%s", info.step, self.store.url, info.name)

    def _delete_data(self, aside: Aside) -> None:
        there = self.read(aside.name)
        # Another save of the step may have taken the folder since.
        kept = {file.name for file in there.manifest.files} if there and there.manifest else set()
        self.store.delete([f"{aside.name}/{file.name}" for file in aside.manifest.files if file.name not in kept])
        self._pins.forget((aside.name, aside.manifest.nonce))
        self._records.forget(aside)
        self.store.delete([aside.key])  # last: it is what leads a sweep here

    def _is_committed(self, name: str, nonce: str) -> bool:
        """Whether a save is a checkpoint. Most that are asked about have no manifest at all."""
        if self.store.stat(f"{name}/{MANIFEST_NAME}") is None:
            return False
        there = self.read(name)
        return there is not None and there.manifest is not None and there.manifest.nonce == nonce

    def is_there(self, info: CheckpointInfo) -> bool:
        """Whether it still is a checkpoint."""
        return info.manifest is not None and self._is_committed(info.name, info.manifest.nonce)

    def archive(self, info: CheckpointInfo) -> None:
        """Make a checkpoint no checkpoint, without its pins, and keep its data until `drop_archived`.
        One whose manifest can't be read stays where it is: it is no checkpoint to anyone."""
        if info.manifest is None:
            return
        self._records.put_aside("archive", info.name, info.manifest)
        self.store.delete([f"{info.name}/{MANIFEST_NAME}"])
        self._pins.forget((info.name, info.manifest.nonce))
        _log.info("checkpoint.archive.done step=%d url=%s/%s", info.step, self.store.url, info.name)

    def archived(self) -> list[Aside]:
        """What `archive` put aside."""
        return self._records.asides("archive")

    def drop_archived(self, aside: Aside) -> None:
        """Delete the data of an archived checkpoint."""
        self._delete_data(self._records.put_aside("trash", aside.name, aside.manifest))

    def mark_damaged(self, info: CheckpointInfo, reason: str) -> None:
        """Remember that a checkpoint did not load, for retention and for the next resume."""
        if info.manifest is not None:
            self._records.mark_damaged(info.name, info.manifest.nonce, reason, datetime.now(UTC))

    # What must stay

    def pin(self, info: CheckpointInfo, tag: str | None = None, expires: datetime | None = None) -> None:
        """Keep a checkpoint from every keep rule. Needs no lock: readers pin what they read. Raises
        `DamagedError` for one whose manifest can't be read, `ConfigError` for a tag that can't be had."""
        if info.manifest is None:
            raise DamagedError(f"{self.store.url}/{info.name} can't be pinned: {info.damaged}")
        if tag is not None:
            self.check_tag_free(tag, [other for other in self.infos() if other.name != info.name])
        self._pins.put(Pin(info.name, info.manifest.nonce, info.step, tag, expires))

    def check_tag_free(self, tag: str, others: Iterable[CheckpointInfo]) -> None:
        """Raises `ConfigError` when a tag is not usable, or one of the `others` has it."""
        checked_tag(tag)
        for other in others:
            if tag in other.tags:
                raise ConfigError(
                    f"tag {tag!r} is on step {other.step} ({self.store.url}/{other.name}) already; "
                    "unpin or delete that one first, or use another tag"
                )

    def pins(self, which: int | str, tag: str | None = None) -> list[Pin]:
        """The pins (only those with `tag`) that a step, folder name or tag means, also where the
        checkpoint itself is gone."""
        held = {pin for info in self.find_all(which) for pin in info.pins}
        step = _as_step(which)
        meant = [
            pin
            for pin in self._pins.read()
            if pin in held or (which in (pin.name, pin.tag) if step is None else pin.step == step)
        ]
        return [pin for pin in meant if tag in (None, pin.tag)]

    def unpin(self, which: int | str, tag: str | None = None) -> int:
        """Remove what `pins` lists; answers how many there were."""
        pins = self.pins(which, tag)
        self._pins.remove(pins)
        return len(pins)

    # What dead processes left

    def sweep(self) -> int:
        """Remove dead drafts and finish interrupted deletions; answers how many there were.

        Whoever holds the writer's lock and has no save in flight may do so: every other writer is
        dead, or fenced off before its commit.
        """
        done = 0
        for aside in self._records.asides("trash"):
            if self._is_committed(aside.name, aside.manifest.nonce):
                self.store.delete([aside.key])  # its manifest was never deleted: it stays a checkpoint
            else:
                self._delete_data(aside)
            done += 1
        archived = self._records.archived()
        alive = each(self.store, lambda one: self._is_committed(*one), [*archived])
        self.store.delete(key for key, lives in zip(archived.values(), alive, strict=True) if lives)
        self._pins.forget(*(one for one, lives in zip(archived, alive, strict=True) if not lives))
        done += sum(alive)
        for entry in self.store.list(DRAFTS):
            if match := _DRAFT.fullmatch(entry.name):
                try:
                    discard(self.store, match["name"], match["nonce"])
                except (DamagedError, FormatVersionError) as exc:
                    _log.warning("draft.sweep.kept key=%s/%s cause=%s", self.store.url, entry.key, exc)
                else:
                    done += 1
        if done:
            _log.info("root.sweep.done url=%s removed=%d", self.store.url, done)
        return done


def _as_step(which: int | str) -> int | None:
    if isinstance(which, str):
        return int(which) if which.isdecimal() else None
    return operator.index(which)  # a numpy integer too
