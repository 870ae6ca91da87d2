"""Which checkpoints are there, and how do they come and go? THE commit protocol over a store.

The order is always data, manifest, pointer, retention; a checkpoint exists exactly when its
manifest does. Deleting goes the other way: a tombstone, the manifest, the data, the tombstone. Whatever
a dead process left half done is named by a record below `.ckptmgr/`, so that `sweep` never guesses
what is ours. Methods that change the root expect the caller to hold the writer's lock.

A writer may lose that lock between any two of its steps, and not know it. So every step that can't be
taken back is recorded first, then `check` is asked whether the lock still holds, and then it is made: see `trash`
and `sweep`.
"""

from __future__ import annotations

import logging
import operator
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice

from .draft import Draft
from .errors import ConfigError, DamagedError, NotFoundError, StoreError
from .fences import Fences
from .folder_names import DEFAULT_NAMES, NameTemplate
from .listing import Listing, current, read_checkpoint
from .lock import last_writer
from .manifest import MANIFEST_NAME, MAX_MANIFEST_SIZE, CheckpointInfo, Pin
from .pins import Pins, check_free
from .pointer import Pointer
from .records import FOLDER, Aside, Records, begin_of, each, is_refused, new_nonce
from .source import Problem, Source
from .store import Store
from .sweep import Sweep
from .trash import Trash
from .untrusted import FOLDER_NAME

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
        self.store = store
        self.names = names or DEFAULT_NAMES
        self._templates = tuple(dict.fromkeys((self.names, DEFAULT_NAMES)))
        self._records, self._pins, self._fences = Records(store), Pins(store), Fences(store)
        self._trash = Trash(store, self._records, self._pins, self._templates)
        self._sweep = Sweep(store, self._records, self._pins, self._trash, self._fences, self._can_spare)
        self.pointer = Pointer(store, pointer)
        self._commit = commit

    @property
    def renames(self) -> bool:
        """Whether a commit is a rename (else it is the creation of the manifest). For writers: it may be tried.
        Raises `ConfigError` where it was to be one and can't."""
        if self._commit == "manifest" or self.store.can_rename:
            return self._commit != "manifest"
        if self._commit == "rename":
            raise ConfigError(
                f"commit: rename is not possible at {self.store.url}: its folders can't be renamed in one step; "
                "use auto or manifest"
            )
        return False

    # What is there

    def infos(self) -> list[CheckpointInfo]:
        """Every checkpoint, newest first, with pins and known damage.

        Raises `FormatVersionError` for one that a newer ckptmgr wrote.
        """
        return current(self.listing).infos()

    def listing(self, last_attempt: int | None = None) -> Listing:
        """What is there now, to be read as far as it is asked for. `last_attempt` is the highest that a
        checkpoint can have, where the caller knows better than the records of the writer's lock."""
        folders = self.store.folders()
        del folders[bisect_left(folders, ".") : bisect_left(folders, "/")]  # those that begin with a dot
        if self.store.path is None:  # a listing may lag behind, and what it lacks is the newest
            named = self.pointer.read()
            if named and named not in folders and re.fullmatch(FOLDER_NAME, named):
                folders.append(named)
        pins, marks = self.records() if folders else ([], {})
        ask = (lambda: last_writer(self.store)) if last_attempt is None else (lambda: last_attempt)
        return Listing(self.store, self._templates, folders, pins, marks, ask)

    def records(self) -> tuple[list[Pin], dict[tuple[str, str], str]]:
        """The pins, and what is known to be damaged, by folder and nonce with the reason, as they are now."""
        there = self.store.folders(FOLDER)
        pins = self._pins.read() if "pins" in there else []
        return pins, self._records.damaged() if "damaged" in there else {}

    def read(self, name: str) -> CheckpointInfo | None:
        """The checkpoint in a folder, without pins and known damage, or None when there is none."""
        return read_checkpoint(self.store, name, self._templates)

    def is_itself_one(self) -> bool:
        """Whether this is no root but the folder of a checkpoint. Other people have files of that name, too."""
        data = begin_of(self.store, MANIFEST_NAME, MAX_MANIFEST_SIZE) or b""
        return b'"format_version"' in data and b'"nonce"' in data

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

    def open(self, info: CheckpointInfo, level: str = "fast") -> Source:
        """A checkpoint's files for reading. Raises `DamagedError` when a size is wrong already."""
        source = self.source(info, level)
        if problems := source.problems("full" if level == "full" else "size" if level != "off" else "off"):
            raise DamagedError(f"{source.where}: " + "; ".join(map(str, problems)))
        return source

    def source(self, info: CheckpointInfo, level: str = "fast", *, by_many: bool = False) -> Source:
        """The same, without a look at the store; for `by_many` see `Source`."""
        if info.manifest is None:
            raise DamagedError(f"{self.store.url}/{info.name}/{MANIFEST_NAME}: {info.damaged}")
        return Source(self.store, info.name, info.manifest, level, by_many=by_many)

    def verify(self, info: CheckpointInfo, level: str = "full") -> list[Problem]:
        """What is wrong with a checkpoint, file by file; `size` compares sizes, `full` reads all."""
        if info.manifest is None:
            return [Problem(MANIFEST_NAME, info.damaged or "can't be read")]
        return Source(self.store, info.name, info.manifest, level).problems(level)

    def seen(self, infos: Sequence[CheckpointInfo]) -> list[CheckpointInfo]:
        """These after a look at the sizes of their files: `damaged` where one is wrong, and without those that were
        deleted meanwhile. Lists the folder of each, several at a time over a network; marks none."""
        return [info for info in each(self.store, self._seen, infos) if info is not None]

    def _seen(self, info: CheckpointInfo) -> CheckpointInfo | None:
        try:
            self.open(info, "size")
        except DamagedError as exc:
            return replace(info, damaged=str(exc)) if self.is_there(info) else None
        return info

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
        if name in self._fences.names:
            return True
        if self.renames:
            return any(self.store.stat(key) is not None for key in (f"{name}/", name))
        try:
            self.store.get(f"{name}/{MANIFEST_NAME}", 0, 1)
        except NotFoundError:
            return False
        except StoreError as exc:
            if not is_refused(self.store, exc):  # else something is there that is no file
                raise
        return True

    # How one goes

    def drop(self, info: CheckpointInfo, may_go: Callable[[CheckpointInfo], bool] = lambda _: True) -> bool:
        """Delete a checkpoint, out of sight first. Only the files it names; whatever else lies in its folder stays.

        `may_go` is asked when everyone can see that it is about to go, and before it does; when it says no,
        or raises, the checkpoint stays as it is. Answers whether it is gone. Raises `DamagedError` for one whose
        manifest can't be read, as nobody knows which files are its own."""
        if info.manifest is None:
            raise DamagedError(f"{self.store.url}/{info.name} can only go with its whole folder: {info.damaged}")
        aside = self._trash.record("trash", info.name, info.manifest, lambda: may_go(info))
        if aside is None:
            return False
        self._trash.delete_manifest(info.name)
        self._trash.delete_data(aside)
        _log.info("checkpoint.drop.done step=%d url=%s/%s", info.step, self.store.url, info.name)
        return True

    def drop_folder(self, info: CheckpointInfo, may_go: Callable[[CheckpointInfo], bool] = lambda _: True) -> bool:
        """Delete one whose manifest can't be read, with all that lies in its folder, whosever that is: only when a
        person asked for this one. The rest as with `drop`."""
        with self._fences.closing(info.name):
            if not may_go(info):
                return False
            self._trash.delete_manifest(info.name)
            self.store.delete([f"{info.name}/"])
            self._pins.forget((info.name, None))
        _log.info("folder.drop.done step=%d url=%s/%s", info.step, self.store.url, info.name)
        return True

    def is_there(self, info: CheckpointInfo) -> bool:
        """Whether it still is a checkpoint."""
        return info.manifest is not None and self._sweep.is_there(info.name, info.manifest.nonce)

    def archive(self, info: CheckpointInfo, check: Callable[[], None] = lambda: None) -> None:
        """Make a checkpoint no checkpoint, without its pins, and keep its data until `drop_archived`.
        One whose manifest can't be read stays where it is: it is no checkpoint to anyone. `check` raises
        `FencedError` when the lock is lost, with the checkpoint left as it is."""
        if info.manifest is None:
            return
        self._trash.record("archive", info.name, info.manifest, _passed(check))
        self._trash.delete_manifest(info.name)
        self._pins.forget((info.name, info.manifest.nonce))
        _log.info("checkpoint.archive.done step=%d url=%s/%s", info.step, self.store.url, info.name)

    def archived(self) -> list[Aside]:
        """What `archive` put aside."""
        return self._records.asides("archive")

    def drop_archived(self, aside: Aside, check: Callable[[], None] = lambda: None) -> None:
        """Delete the data of an archived checkpoint; `check` is as with `archive`."""
        going = self._trash.record("trash", aside.name, aside.manifest, _passed(check))
        assert going is not None
        self._trash.delete_data(going, aside.key)

    def mark_damaged(self, info: CheckpointInfo, reason: str) -> None:
        """Remember that a checkpoint did not load, for retention and for the next resume."""
        if info.manifest is not None:
            self._records.mark_damaged(info.name, info.manifest.nonce, reason, datetime.now(UTC))

    # What must stay

    def pin(self, info: CheckpointInfo, tag: str | None = None, expires: datetime | None = None) -> None:
        """Keep a checkpoint from every keep rule. Needs no lock: readers pin what they read. At return it
        holds, whatever the writer does at this very moment.

        Raises `DamagedError` for one whose manifest can't be read, `ConfigError` for a tag that can't be had, and
        `NotFoundError` for one that is gone, or about to go."""
        if tag is not None:
            check_free(tag, [other for other in self.infos() if other.name != info.name], self.store.url)
        self.put_pin(info, tag, expires)

    def put_pin(self, info: CheckpointInfo, tag: str | None, expires: datetime | None) -> Pin:
        """The same, for a tag that nobody else has."""
        if info.manifest is None:
            raise DamagedError(f"{self.store.url}/{info.name} can't be pinned: {info.damaged}")
        pin = Pin(info.name, info.manifest.nonce, info.step, tag, expires)
        self._pins.put(pin)
        # In this order: a tombstone that is gone again has taken the manifest with it. One that is put
        # from here on comes before a look at the pins, which finds this one.
        if self._records.is_going(info.name, info.manifest.nonce) or not self.is_there(info):
            self._pins.remove([pin])
            raise NotFoundError(
                f"step {info.step} ({self.store.url}/{info.name}) is not there to be pinned: it was deleted, or is "
                "about to be; pin a newer one"
            )
        return pin

    def let_go(self, pin: Pin) -> None:
        """Remove a pin."""
        self._pins.remove([pin])

    def is_held(self, info: CheckpointInfo) -> bool:
        """Whether a pin holds a checkpoint now that is about to go: by the store's clock, too, which is right where
        those of the two hosts differ."""
        if info.manifest is None:
            return self._pins.holds(info.name, None, None)
        nonce = info.manifest.nonce
        since = self._records.going_since(info.name, nonce, self._trash.attempt)
        return self._pins.holds(info.name, nonce, since)

    def pins(self, which: int | str, tag: str | None = None) -> list[Pin]:
        """The pins (only those with `tag`) that a step, folder name or tag means, also where the checkpoint itself
        is gone. A pin's own tag means that one alone."""
        pins, step = self._pins.read(), _as_step(which)
        meant = [pin for pin in pins if pin.tag == which]
        if not meant:
            held = {pin for info in self.find_all(which) for pin in info.pins}
            meant = [pin for pin in pins if pin in held or (pin.name == which if step is None else pin.step == step)]
        return [pin for pin in meant if tag in (None, pin.tag)]

    def unpin(self, which: int | str, tag: str | None = None) -> int:
        """Remove what `pins` lists; answers how many there were."""
        pins = self.pins(which, tag)
        self._pins.remove(pins)
        return len(pins)

    # What dead processes left

    def announce(self, attempt: int) -> None:
        """For whoever is about to take the place of a writer that may still be alive."""
        self._fences.announce(attempt)

    def sweep(self, check: Callable[[], None] = lambda: None, *, attempt: int = 0) -> int:
        """For whoever has become the writer, with this `attempt`, before it writes: remove dead drafts and finish
        interrupted deletions; answers how many there were. Writers from one that was announced on may go on at any
        moment, all others are dead. `check` raises `FencedError` when the lock was lost."""
        self._trash.attempt = attempt
        return self._sweep.run(check)

    def _can_spare(self, aside: Aside) -> bool:
        """Whether a checkpoint that was about to go is not pinned, nor the last good one."""
        infos, now = self.infos(), datetime.now(UTC)
        it = next((info for info in infos if info.name == aside.name), None)
        if it is None or any(pin.holds(now) for pin in it.pins):
            return False
        return any(other.damaged is None and other.name != it.name for other in infos)

    def expel(self) -> None:
        """Remove what a writer that was taken over has committed all the same since the sweep."""
        self._sweep.expel()


def _passed(check: Callable[[], None]) -> Callable[[], bool]:
    def passed() -> bool:
        check()
        return True

    return passed


def _as_step(which: int | str) -> int | None:
    if isinstance(which, str):
        return int(which) if which.isdecimal() else None
    return operator.index(which)  # a numpy integer too
