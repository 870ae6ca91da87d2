"""What lies in a root that is no part of a checkpoint, and who put it there? We, in processes that died.

Only what carries our names: drafts that never became checkpoints, deletions that did not end, and the parts of
large files that a store holds for an upload which nobody will complete.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from .errors import DamagedError, FormatVersionError, StoreError
from .folder_names import DEFAULT_NAMES
from .listing import is_committed
from .records import FOLDER, Records
from .repository import Repository
from .store import DRAFTS, Store
from .store.dialect import Unended
from .store.spares import FOLDER as SPARES

_DATA = re.compile(r"(?P<name>[^/]+)/(?P<nonce>[0-9a-f]{16})/.+")  # where a save puts its files


class Litter(NamedTuple):
    """`kind` is draft, deletion or upload. `since` is in seconds since 1970 by the store's clock, if it says."""

    kind: str
    key: str
    bytes: int
    since: float | None
    upload: Unended | None = None

    @property
    def identity(self) -> tuple[str, str, str]:
        """What stays the same from one look to the next."""
        return self.kind, self.key, self.upload.upload if self.upload else ""


def litter(repository: Repository, tell: Callable[[StoreError], object]) -> list[Litter]:
    """What is there now. Blocks, needs no lock, and may so find a save that is under way. Uploads that the store
    does not let us see are left out, and `tell` hears why. Raises `StoreError` for anything else."""
    store = repository.store
    found = [*_drafts(store), *_deletions(store)]
    try:
        return [*found, *_uploads(repository)]
    except StoreError as exc:
        tell(exc)
        return found


def drop_uploads(store: Store, found: list[Litter]) -> None:
    """Give up the uploads among what `litter` found. For whoever holds the writer's lock: nobody completes them."""
    from .store.remote import FsspecStore

    for one in found:
        if one.upload is not None and isinstance(store, FsspecStore):
            store.drop_upload(one.upload)


def _drafts(store: Store) -> Iterator[Litter]:
    for draft in Records(store).drafts():
        if draft.note:  # against a writer that lost the root: few, empty, and in use
            continue
        entry = draft.entry
        try:
            is_checkpoint = not entry.is_folder and is_committed(store, draft.name, draft.nonce)
        except (DamagedError, FormatVersionError):
            continue  # nobody can tell, so a sweep leaves it
        if is_checkpoint:  # whose note was left behind: the data is no litter
            yield Litter("draft", entry.key, 0, entry.modified)
            continue
        data = entry.key if entry.is_folder else f"{draft.name}/{draft.nonce}"
        files = store.list(data, recursive=True)
        times = [file.modified for file in (entry, *files) if file.modified]
        yield Litter("draft", data, sum(file.size for file in files), max(times, default=None))


def _deletions(store: Store) -> Iterator[Litter]:
    for aside in Records(store).asides("trash"):
        sizes = {file.key: file.size for file in store.list(aside.name, recursive=True)}
        left = sum(sizes.get(f"{aside.name}/{file.name}", 0) for file in aside.manifest.files)
        record = store.stat(aside.key)
        yield Litter("deletion", aside.name, left, record.modified if record else None)
    if spares := store.list(SPARES) if store.path is not None else ():
        yield Litter("deletion", SPARES, sum(file.size for file in spares), None)


def _uploads(repository: Repository) -> Iterator[Litter]:
    store = repository.store
    if store.path is not None:
        return
    from .store.remote import FsspecStore

    if isinstance(store, FsspecStore):
        for upload in store.uploads():
            if _is_ours(repository, upload.name):
                yield Litter("upload", upload.name, upload.bytes, upload.begun, upload)


def _is_ours(repository: Repository, key: str) -> bool:
    """Whether a save of ours was to put a file there: other tools have folders with a hash for a name as well."""
    if key.startswith(f"{FOLDER}/"):
        return True
    match = _DATA.fullmatch(key)
    if match is None:
        return False
    name, nonce = match["name"], match["nonce"]
    if any(names.step(name) is not None for names in (repository.names, DEFAULT_NAMES)):
        return True
    if repository.store.stat(f"{DRAFTS}/{name}.{nonce}") is not None:
        return True
    info = repository.read(name)
    return info is not None and info.manifest is not None and info.manifest.nonce == nonce
