"""Where is a checkpoint that has a URL of its own? In a folder of a store; its data one level down, under a nonce."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, NotFoundError
from ..manifest import MANIFEST_NAME, MAX_MANIFEST_SIZE, Manifest
from ..source import Source
from ..store import Store, open_store
from .index import METADATA_NAME

_NAME = re.compile(r"[A-Za-z0-9._+=@%~-]+")


@dataclass(frozen=True, slots=True)
class Place:
    """The folder `name` of a store."""

    store: Store
    name: str

    @classmethod
    def of(cls, url: str | Path, options: dict[str, Any] | None, *, fsync: bool = True) -> Place:
        """Raises `ConfigError` for a URL that names no folder, or one of an unknown protocol."""
        text = str(url).rstrip("/")
        parent, _, name = text.rpartition("/")
        if not _NAME.fullmatch(name) or name in (".", "..") or parent.endswith("/"):
            raise ConfigError(
                f"a sharded checkpoint needs a folder of its own, such as s3://bucket/run/step-100; {name!r} at the "
                "end of the URL is none (letters, digits and . _ + = @ % ~ - make one)"
            )
        if isinstance(url, Path) or "/" not in text:
            return cls(open_store(Path(text).absolute().parent, options, fsync=fsync), name)
        return cls(open_store(parent, options, fsync=fsync), name)

    @property
    def url(self) -> str:
        """For messages, without credentials."""
        return f"{self.store.url}/{self.name}"

    def key(self, name: str) -> str:
        return f"{self.name}/{name}"

    @property
    def manifest_key(self) -> str:
        return self.key(MANIFEST_NAME)

    def open(self) -> tuple[Source, Manifest]:
        """The checkpoint's files. Blocks. Raises `NotFoundError` when there is none of ours, and `DamagedError`."""
        try:
            manifest = Manifest.from_json(self.store.get(self.manifest_key, 0, MAX_MANIFEST_SIZE + 1))
        except NotFoundError as exc:
            if self.store.stat(self.key(METADATA_NAME)) is not None:
                raise NotFoundError(
                    f"{self.url} was not saved with StoreWriter: it has DCP's own {METADATA_NAME} and no "
                    f"{MANIFEST_NAME}; load it with torch.distributed.checkpoint.FileSystemReader"
                ) from exc
            raise NotFoundError(
                f"no checkpoint at {self.url}: it has no {MANIFEST_NAME}, so nothing was saved there to the end"
            ) from exc
        return Source(self.store, self.name, manifest), manifest
