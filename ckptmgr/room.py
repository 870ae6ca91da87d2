"""Is there room for this save? And what has to go where there is none?

Asked once, before the first byte: what is free is compared with what the files will take up, in whole blocks. Where
nobody knows what is free the write decides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from errno import ENOSPC

from .errors import StoreFullError
from .manifest import CheckpointInfo, FileEntry
from .store import Store
from .store.disk import full
from .store.local import LocalStore
from .store.space import Space, space_left
from .store.spares import make_space


def check_room(store: Store, what: str, sizes: Iterable[int]) -> int:
    """The bytes that files of these sizes take up, 0 where that is not known ahead. One look at the file system.

    Raises `StoreFullError` when there is no room for them; `what` is what they are for.
    """
    sizes = list(sizes)
    space = space_left(store.path) if sizes and store.path is not None else None
    if space is None or store.path is None:
        return 0
    needed = space.needed(sizes)
    spare = store.spares.taken_over(sizes) if isinstance(store, LocalStore) else 0
    # A checkpoint that was just deleted may still be on its way out.
    if not space.has(needed - spare) and make_space():
        space = space_left(store.path) or space
        spare = 0
    if not space.has(needed - spare):
        raise full(f"write {what} to {store.url}", store.path / what, needed)
    return needed


class Shortage:
    """A save that did not fit, and how much has to go before it is tried once more, and again."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._needed = 0  # the most bytes that an attempt is known to need
        self._attempts = 0
        self._before: list[CheckpointInfo] = []
        self.gone: list[CheckpointInfo] = []  # since the last attempt

    def met(self, error: StoreFullError, needed: int) -> None:
        """An attempt has failed that is known to need so many bytes, 0 where that is not known."""
        self.cause, self._errno, self._free = str(error), error.errno, error.free
        self._needed = max(self._needed, needed, error.needed or 0)
        self._attempts += 1
        self._before += self.gone
        self.gone = []
        make_space()
        space = self._space()
        # Blocks that are set aside are counted as free, and nobody tells what a quota leaves. Where there is said to
        # be room the first time, there may be by now.
        says_room = space is None or space.has(max(self._needed, 1))
        self._is_counted = self._errno == ENOSPC and (self._attempts == 1 or not says_room)

    def _space(self) -> Space | None:
        return None if self._store.path is None else space_left(self._store.path)

    def is_over(self, left: Sequence[CheckpointInfo]) -> bool:
        """Whether there is room, or may be, now that only these checkpoints are left."""
        make_space()
        space = self._space()
        if space is not None and self._is_counted:
            return space.has(self._needed)
        block = 1 if space is None else space.block
        return bool(self.gone) and freed(self.gone, left, block) >= self._needed

    def is_hopeless(self, spare: Sequence[CheckpointInfo], left: Sequence[CheckpointInfo]) -> bool:
        """Whether there would be no room even with all gone that can be spared: then none should go."""
        space = self._space()
        if not spare or space is None or self._errno != ENOSPC:
            return not spare
        names = {info.name for info in spare}
        left = [info for info in left if info.name not in names]
        return space.free + freed(spare, left, space.block) < self._needed

    def error(self) -> StoreFullError:
        """What to raise when it is hopeless."""
        steps = ", ".join(str(info.step) for info in (*self._before, *self.gone))
        told = f"has deleted step {steps}, which was not enough" if steps else "has deleted nothing"
        return StoreFullError(
            f"{self.cause}; on_full: prune {told}: all that it may still delete (never the pinned, the newest good "
            "one and those of keep.min_good) would not make enough room",
            self._errno,
            needed=self._needed,
            free=self._free,
        )


def freed(gone: Sequence[CheckpointInfo], left: Sequence[CheckpointInfo], block: int = 1) -> int:
    """The bytes, in blocks of so many, that deleting these frees, as far as manifests tell: a file that others share
    frees nothing."""
    shared = {file.digest for info in (*gone, *left) for file in _files(info) if file.shared}
    held = {file.digest for info in left for file in _files(info)}
    sizes = [file.size for info in gone for file in _files(info) if file.digest not in shared]
    links = {file.digest: file.size for info in gone for file in _files(info) if file.digest in shared - held}
    return sum(-(-size // block) * block for size in (*sizes, *links.values()))


def _files(info: CheckpointInfo) -> Iterable[FileEntry]:
    return info.manifest.files if info.manifest else ()
