"""Which mistakes must the check of crash points find? Each is planted in a process that is about to be killed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ckptmgr.committing import Committer
from ckptmgr.errors import NotFoundError
from ckptmgr.manifest import MANIFEST_NAME
from ckptmgr.repository import Repository
from ckptmgr.run import Run
from ckptmgr.store import DRAFTS
from ckptmgr.store.disk import TempFile
from ckptmgr.store.local import LocalStore

Planted = tuple[type, str, Callable[..., Any]]


@contextmanager
def planted(bug: str) -> Iterator[None]:
    if not bug:
        yield
        return
    owner, name, mistake = BUGS[bug]()
    with patch.object(owner, name, mistake):
        yield


def manifest_before_data() -> Planted:
    publish = LocalStore._publish
    late: list[tuple[Path, bytes]] = []

    def hold_back(store: LocalStore, temp: TempFile, target: str, *, create: bool = False) -> None:
        path = Path(target)
        is_ours = path.relative_to(store._path).parts[0].startswith("step-")
        if is_ours and path.name != MANIFEST_NAME and path.suffix != ".late":
            late.append((path, Path(temp.path).read_bytes()))
            return
        publish(store, temp, target, create=create)
        if path.name == MANIFEST_NAME:
            while late:
                path, data = late.pop()
                path.parent.mkdir(parents=True, exist_ok=True)
                store.put(f"{path.relative_to(store._path).as_posix()}.late", data)
                path.with_name(f"{path.name}.late").rename(path)

    return LocalStore, "_publish", hold_back


def prune_before_commit() -> Planted:
    commit = Committer.commit

    def prune(self: Committer, *args: Any) -> Any:
        self._run.drop(*self._run.known()[1:])
        return commit(self, *args)

    return Committer, "commit", prune


def data_deleted_before_manifest() -> Planted:
    drop = Repository.drop

    def delete(self: Repository, info: Any, *args: Any) -> Any:
        self.store.delete([f"{info.name}/{file.name}" for file in info.manifest.files])
        return drop(self, info, *args)

    return Repository, "drop", delete


def pointer_believed() -> Planted:
    def believe(self: Run, listing: Any = None) -> Iterator[Any]:
        infos = self.infos(listing)
        name = self.repository.pointer.read()
        if name is not None and name not in {info.name for info in infos}:
            raise NotFoundError(name)
        return iter(sorted(infos, key=lambda info: info.name != name))

    return Run, "newest_first", believe


def no_record_of_drafts() -> Planted:
    put = LocalStore.put

    def forget(self: LocalStore, key: str, data: Any, **how: Any) -> None:
        if not key.startswith(DRAFTS):
            put(self, key, data, **how)

    return LocalStore, "put", forget


def sweeps_what_it_does_not_know() -> Planted:
    sweep = Repository.sweep

    def clear(self: Repository, *args: Any, **how: Any) -> int:
        known = {info.name for info in self.infos()} | {".ckptmgr"}
        self.store.delete([f"{each.key}/" for each in self.store.list() if each.is_folder and each.key not in known])
        return sweep(self, *args, **how)

    return Repository, "sweep", clear


def saved_before_it_is_committed() -> Planted:
    """The draft never becomes a checkpoint until the next one does."""
    commit = Committer.commit
    late: list[tuple[Any, ...]] = []

    def promise(self: Committer, draft: Any, about: Any, request: Any) -> Any:
        late.append((draft, about, request))
        if len(late) == 1:
            from ckptmgr.manifest import CheckpointInfo

            return CheckpointInfo(draft.name, about.step, about)
        commit(self, *late.pop(0))
        return commit(self, *late.pop(0))

    return Committer, "commit", promise


BUGS: dict[str, Callable[[], Planted]] = {
    "manifest before the data": manifest_before_data,
    "prune before the commit": prune_before_commit,
    "data deleted before the manifest": data_deleted_before_manifest,
    "pointer believed without its manifest": pointer_believed,
    "no record of drafts": no_record_of_drafts,
    "what is not known is swept": sweeps_what_it_does_not_know,
    "reported before the commit": saved_before_it_is_committed,
}
