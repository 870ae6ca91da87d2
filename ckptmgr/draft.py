"""How does a save become a checkpoint? The draft: files first, manifest last, one commit.

*rename* mode writes everything, the manifest too, into `.ckptmgr/drafts/<name>.<nonce>/` and moves
that folder to its final name in one atomic step. *manifest* mode writes data to `<name>/<nonce>/`,
notes that it does so in `.ckptmgr/drafts/<name>.<nonce>`, and creates `<name>/manifest.json`: that
single conditional write is the commit. Until either step nothing can be seen of the save.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import xxhash

from .errors import AlreadyExistsError, CheckpointError, ConfigError, DamagedError, NotFoundError, StoreError
from .listing import is_committed
from .manifest import (
    MANIFEST_NAME,
    PIECE_SIZE,
    CheckpointInfo,
    FileEntry,
    Manifest,
    Pin,
    checked_name,
)
from .pins import Pins, pin_key
from .room import check_room
from .source import Source
from .store import DRAFTS, Store, Writer
from .store.disk import edge, sync_folder
from .store.leftovers import remove_unfinished
from .transfer import Body, commit_all, write_files

if TYPE_CHECKING:
    from typing_extensions import Buffer

_log = logging.getLogger("ckptmgr.draft")


class DraftFile:
    """A file of a draft; digests are taken of the bytes handed to `write`."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer
        self._size = 0
        self._piece = xxhash.xxh3_128()
        self._pieces: list[bytes] = []

    def write(self, data: Buffer) -> int:
        view = memoryview(data).cast("B")
        rest = view
        while rest:
            if self._size and self._size % PIECE_SIZE == 0:
                self._pieces.append(self._piece.digest())
                self._piece.reset()
            part = rest[: PIECE_SIZE - self._size % PIECE_SIZE]
            self._piece.update(part)
            self._writer.write(part)
            self._size += len(part)
            rest = rest[len(part) :]
        return len(view)

    def entry(self, name: str) -> FileEntry:
        return FileEntry.of(name, self._size, [*self._pieces, self._piece.digest()])


class Draft:
    """One save being written. Ends with exactly one of `commit` and `abort`; both may block."""

    def __init__(self, store: Store, name: str, nonce: str, *, rename: bool, is_begun: bool = False) -> None:
        self.name, self.nonce = name, nonce
        self._store = store
        self._rename = rename
        self._record = f"{DRAFTS}/{name}.{nonce}"
        self._folder = self._record if rename else name
        self._prefix = "" if rename else f"{nonce}/"
        self._files: dict[str, FileEntry] = {}
        self._whole: Sequence[Writer] = ()  # of small files: committed together, with the manifest as the last one
        self.needed = 0  # the most bytes for which room was found to be needed
        if not rename and not is_begun:
            try:
                store.put(self._record, b"")  # so that a sweep finds the data if this process dies
            except StoreError:
                with suppress(CheckpointError):  # it may be there all the same
                    store.delete([self._record])
                raise

    @contextmanager
    def create(self, name: str) -> Iterator[DraftFile]:
        """A new file of the checkpoint: complete when the block ends, gone when it raises."""
        own = self._own_name(name)
        writer = self._store.writer(self._key(own))
        try:
            file = DraftFile(writer)
            yield file
            writer.commit()
        except BaseException:
            writer.abort()
            raise
        self._files[name] = file.entry(own)

    def check_room(self, sizes: Iterable[int]) -> None:
        """Raises `StoreFullError` when files of these sizes in bytes do not fit, where that can be told ahead."""
        self.needed = max(self.needed, check_room(self._store, self.name, sizes))

    def write(self, bodies: Mapping[str, Body]) -> None:
        """New files of the checkpoint, complete at the `commit`, or at `finish`; blocks. When it raises, the draft is
        to be aborted: `StoreFullError` before the first byte where they do not fit."""
        self.check_room(body.size for body in bodies.values())
        own = {self._own_name(name): name for name in bodies}
        entries = write_files(
            {each: bodies[name] for each, name in own.items()},
            lambda each, size: self._store.writer(self._key(each), size),
            self._put_off,
        )
        self._files |= {own[each]: entry for each, entry in entries.items()}

    def _put_off(self, whole: Sequence[Writer]) -> None:
        """Commit these small files as late as can be: until then the disk takes them while something else is done."""
        before, self._whole = self._whole, whole
        commit_all(before)

    def finish(self) -> None:
        """Complete what was written so far, durably; blocks. For a rank that makes no commit: `commit` does it, too."""
        self._put_off(())

    def link(self, name: str, source_key: str, entry: FileEntry) -> bool:
        """A new file of the checkpoint with the bytes of one that the store has under `source_key`: its
        entry says which. False, and nothing done, where the store can't. Blocks.

        Raises `NotFoundError` when that one is gone, and `DamagedError` when it has another size.
        """
        own = self._own_name(name)
        if not self._store.copy(source_key, self._key(own)):
            return False
        found = self._store.stat(self._key(own))
        if found is None or found.size != entry.size:
            self._store.delete([self._key(own)])
            size = f"{found.size:,}" if found else "no"
            raise DamagedError(
                f"{self._store.url}/{source_key} has {size} bytes, not {entry.size:,}; it was not shared"
            )
        self._files[name] = FileEntry.of(own, entry.size, entry.digests, shared=True)
        return True

    @property
    def entries(self) -> Mapping[str, FileEntry]:
        """What was written so far, by name."""
        return self._files

    def adopt(self, entries: Mapping[str, FileEntry]) -> None:
        """Take files in that another process wrote into the same draft. Raises `AlreadyExistsError`."""
        for name, entry in entries.items():
            self._own_name(name)
            self._files[name] = entry

    def _own_name(self, name: str) -> str:
        """The name that the manifest will give to a new file."""
        if checked_name(name) in self._files or name == MANIFEST_NAME:
            raise AlreadyExistsError(f"the draft of {self.name} already has a file {name!r}")
        return self._prefix + name

    def _key(self, own_name: str) -> str:
        return f"{self._folder}/{own_name}"

    def commit(
        self,
        manifest: Manifest,
        verify: str = "size",
        check: Callable[[], None] = lambda: None,
        *,
        pin: bool = False,
        beside: Callable[[], None] = lambda: None,
    ) -> CheckpointInfo:
        """Make the draft a checkpoint; at return it is durable.

        `manifest` comes without files, which the draft fills in. `verify` looks at what the store
        holds first: `off`, `size` (compare sizes) or `full` (read everything back). `check` is called
        right before the decisive step, and raises `FencedError` when the writer's lock is lost; `beside`
        when all is written and on its way to the disk, to send more after it. With `pin` the checkpoint
        is pinned from its first moment. Raises `AlreadyExistsError` when the name is taken, `ConfigError`
        for a manifest that could not be read back, `StoreError` and `DamagedError` for what the store
        did. The draft is then still to be aborted.
        """
        manifest = dataclasses.replace(manifest, nonce=self.nonce, files=tuple(self._files.values()))
        data = readable(manifest)
        key = f"{self._folder}/{MANIFEST_NAME}"
        if self._rename:
            writer = self._store.writer(key, len(data))
            self._whole = (*self._whole, writer)
            writer.write(data)
        beside()
        self.finish()
        if problems := Source(self._store, self._folder, manifest).problems(verify):
            what = "; ".join(map(str, problems))
            raise StoreError(f"{self._store.url} does not hold what was written to {self.name}: {what}")
        pins = (Pin(self.name, self.nonce, manifest.step),) if pin else ()
        for each in pins:
            Pins(self._store).put(each)  # before the commit: no checkpoint is ever without a pin it was to have
        check()
        if self._rename:
            self._store.rename(self._folder, self.name)
        else:
            create_manifest(self._store, self.name, key, data)
            try:
                self._store.delete([self._record])
            except StoreError as exc:
                _log.warning("draft.record.kept key=%s cause=%s (the next sweep removes it)", self._record, exc)
        return CheckpointInfo(self.name, manifest.step, manifest, pins=pins)

    def let_go(self) -> None:
        """Give up what was written and is not finished: all that a rank does with a draft that another one aborts."""
        whole, self._whole = self._whole, ()
        for writer in whole:
            writer.abort()

    def abort(self) -> None:
        """Remove what was written. Never raises: what can't be removed now is left to a sweep."""
        self.let_go()
        try:
            discard(self._store, self.name, self.nonce)
        except CheckpointError as exc:
            _log.warning("draft.abort.incomplete name=%s nonce=%s cause=%s", self.name, self.nonce, exc)


def create_manifest(store: Store, name: str, key: str, data: bytes) -> None:
    """The commit in manifest mode. An error says nothing of whether the object was written
    (the answer may have been lost), so it is read back: our bytes, with our nonce, mean yes."""
    for last in (False, True):
        try:
            store.put(key, data, create=True)
            return
        except (AlreadyExistsError, StoreError) as exc:
            try:
                found = store.get(key, 0, len(data) + 1)
            except NotFoundError:
                if last or isinstance(exc, AlreadyExistsError):
                    raise exc from None
                continue
            if found != data:
                raise AlreadyExistsError(
                    f"{store.url}/{name} was committed by another writer; nothing of it was changed"
                ) from exc
            if store.path is not None:
                store.put(key, data)  # the same again: the disk's error may mean that it is not durable
            return


def readable(manifest: Manifest) -> bytes:
    """The manifest's bytes, seen to be readable: one that nobody can read would look like damage."""
    try:
        data = manifest.to_json()
        Manifest.from_json(data)
    except (TypeError, ValueError, DamagedError) as exc:
        raise ConfigError(
            f"step {manifest.step!r} was not committed, as its manifest could not be read back: {exc}; "
            "correct what the save was given"
        ) from exc
    return data


def discard(store: Store, name: str, nonce: str) -> bool:
    """Remove a draft in either mode with its pin, unless it became a checkpoint after all: whether it did.

    Raises `DamagedError` or `FormatVersionError`, and leaves all in place, where that can't be told."""
    is_checkpoint = is_committed(store, name, nonce)
    if store.path is not None:
        folder = store.path / name
        if is_checkpoint:
            with edge("make durable", folder):
                sync_folder(folder)  # its writer may have died before it did, and others go for this checkpoint
        remove_unfinished(folder)  # a manifest that was being written
    if not is_checkpoint:
        store.delete([f"{name}/{nonce}/", pin_key(name, nonce)])
    record = f"{DRAFTS}/{name}.{nonce}"
    store.delete([f"{record}/", record])  # a folder in rename mode, an object in manifest mode; last, as it leads here
    return is_checkpoint
