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
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from .draft import DRAFTS, Draft, discard
from .errors import ConfigError, DamagedError, FormatVersionError, NotFoundError, StoreError
from .manifest import DEFAULT_NAMES, MANIFEST_NAME, CheckpointInfo, Manifest, NameTemplate, Pin, guessed_step
from .pins import Pins
from .records import Aside, Records, checked_tag, is_refused, new_nonce
from .source import Problem, Source
from .store import Store

_READERS = 16  # manifests fetched at a time from a remote store
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
        folders = [e.name for e in self.store.list() if e.is_folder and not e.name.startswith(".")]
        if not folders:
            return []
        keys = self._records.keys()
        pins, marks = self._pins.read(keys), self._records.damaged(keys)
        if self.store.path is not None:
            found = [self._info(name) for name in folders]
        else:
            with ThreadPoolExecutor(_READERS, "ckptmgr-list") as pool:
                found = list(pool.map(self._info, folders))
        infos, attempt = [], 0
        for info in sorted(filter(None, found), key=lambda info: (info.step, info.manifest is None)):
            # One that can't be read counts as written by whoever wrote the step before it.
            attempt = info.manifest.attempt if info.manifest else attempt
            nonce = info.manifest.nonce if info.manifest else ""
            damaged = info.damaged or marks.get((info.name, nonce))
            # Whichever one it was: one that can't be read has no nonce to tell.
            held = tuple(pin for pin in pins if pin.name == info.name and (pin.nonce == nonce or not nonce))
            guess = attempt if info.manifest is None else 0
            infos.append(CheckpointInfo(info.name, info.step, info.manifest, damaged, held, guess))
        return sorted(infos, key=lambda info: info.order, reverse=True)

    def _info(self, name: str) -> CheckpointInfo | None:
        # Someone else's manifest.json in someone else's folder is no checkpoint, and no obstacle either.
        step = next((step for names in (self.names, DEFAULT_NAMES) if (step := names.step(name)) is not None), None)
        try:
            data = self.store.get(f"{name}/{MANIFEST_NAME}")
        except NotFoundError:
            return None  # a draft, or nothing of ours
        except StoreError as exc:
            if step is not None or not is_refused(self.store, exc):
                raise
            _log.debug("folder.skip.refused url=%s/%s cause=%s", self.store.url, name, exc)
            return None
        if step is None and b'"format_version"' in data and b'"nonce"' in data:
            step = guessed_step(name)  # ours, from when `name` was another
        try:
            manifest = Manifest.from_json(data)
        except FormatVersionError as exc:
            if step is None:
                return None
            raise FormatVersionError(f"{self.store.url}/{name}: {exc}") from exc
        except DamagedError as exc:
            return None if step is None else CheckpointInfo(name, step, None, str(exc))
        return CheckpointInfo(name, manifest.step, manifest)

    def find(self, which: int | str, infos: Sequence[CheckpointInfo] | None = None) -> CheckpointInfo:
        """One checkpoint by step, folder name, tag, or "latest" (the newest not known damaged).

        Raises `NotFoundError` that says what there is.
        """
        infos = self.infos() if infos is None else infos
        matches = self.find_all(which, infos)
        if not matches:
            what = repr(which) if _as_step(which) is None else f"step {which}"
            there = ", ".join(str(info.step) for info in infos[:10]) or "none"
            more = f" and {len(infos) - 10} more" if len(infos) > 10 else ""
            raise NotFoundError(f"no checkpoint {what} in {self.store.url}; steps there: {there}{more}")
        return matches[0]

    def find_all(self, which: int | str, infos: Sequence[CheckpointInfo] | None = None) -> list[CheckpointInfo]:
        """All that `find` could have meant, its answer first: what is about to be deleted must be one."""
        infos = self.infos() if infos is None else infos
        if which == "latest":
            return [info for info in infos if info.damaged is None][:1]
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
        if info.manifest is None:
            raise DamagedError(f"{self.store.url}/{info.name}: {info.damaged}")
        source = Source(self.store, info.name, info.manifest, level)
        if problems := source.problems("full" if level == "full" else "size" if level != "off" else "off"):
            raise DamagedError(f"{source.where}: " + "; ".join(map(str, problems)))
        return source

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

    def _is_taken(self, name: str) -> bool:
        """A rename needs a folder that does not exist; a manifest only that there is no other."""
        if self.renames:
            return any(entry.name == name for entry in self.store.list())
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
            self._pins.forget(info.name, None, self._records.keys())
        else:
            tombstone = self._records.put_aside("trash", info.name, info.manifest)
            self.store.delete([f"{info.name}/{MANIFEST_NAME}"])
            self._delete_data(tombstone)
        _log.info("checkpoint.drop.done step=%d url=%s/%s", info.step, self.store.url, info.name)

    def _delete_data(self, aside: Aside) -> None:
        there = self._info(aside.name)
        # Another save of the step may have taken the folder since.
        kept = {file.name for file in there.manifest.files} if there and there.manifest else set()
        self.store.delete([f"{aside.name}/{file.name}" for file in aside.manifest.files if file.name not in kept])
        self._pins.forget(aside.name, aside.manifest.nonce, self._records.keys())
        self._records.forget(aside)
        self.store.delete([aside.key])  # last: it is what leads a sweep here

    def archive(self, info: CheckpointInfo) -> None:
        """Make a checkpoint no checkpoint, without its pins, and keep its data until `drop_archived`.
        One whose manifest can't be read stays where it is: it is no checkpoint to anyone."""
        if info.manifest is None:
            return
        self._records.put_aside("archive", info.name, info.manifest)
        self.store.delete([f"{info.name}/{MANIFEST_NAME}"])
        self._pins.forget(info.name, info.manifest.nonce, self._records.keys())
        _log.info("checkpoint.archive.done step=%d url=%s/%s", info.step, self.store.url, info.name)

    def archived(self) -> list[Aside]:
        """What `archive` put aside."""
        return self._records.asides("archive", self._records.keys())

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
            for pin in self._pins.read(self._records.keys())
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
        keys = self._records.keys()
        for aside in [*self._records.asides("trash", keys), *self._records.asides("archive", keys)]:
            there = self._info(aside.name)
            if there and there.manifest and there.manifest.nonce == aside.manifest.nonce:
                self.store.delete([aside.key])  # its manifest was never deleted: it stays a checkpoint
            elif aside.is_dropped:
                self._delete_data(aside)
            else:
                self._pins.forget(aside.name, aside.manifest.nonce, keys)
                continue
            done += 1
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
