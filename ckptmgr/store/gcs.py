"""What is particular to Google Cloud Storage? Spoken to through gcsfs."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from fsspec.config import conf

from . import Entry
from .dialect import Fault, seconds, split_url

if find_spec("gcsfs") is None:  # imported below, once it is known how
    raise ImportError("gcsfs is not installed")

_BLOCK = 32 << 20  # bytes; sent one after the other


class GcsDialect:
    credentials = (
        "GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`, "
        "the machine's service account, or storage.options"
    )

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.bucket, self.prefix = split_url(url)
        given = {**conf.get("gs", {}), **conf.get("gcs", {}), **options}
        arguments = {"consistency": "md5", **options}
        if emulator := given.get("endpoint_url") or os.environ.get("STORAGE_EMULATOR_HOST"):
            arguments["token"] = given.get("token", "anon")
            # What bucket is it? Newer gcsfs asks that over gRPC, which no emulator answers.
            os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        import gcsfs
        import gcsfs.core

        kind = gcsfs.core.GCSFileSystem if emulator else gcsfs.GCSFileSystem
        self._fs = kind(**arguments, use_listings_cache=False, skip_instance_cache=True)

    def get(self, name: str, start: int, end: int | None) -> bytes:
        # An empty object has no range, which gcsfs would log as an error.
        span = {} if start == 0 and end is None else {"start": start, "end": end}
        data: bytes = self._fs.cat_file(f"{self.bucket}/{name}", **span)
        return data

    def put(self, name: str, data: bytes) -> None:
        self._fs.pipe_file(f"{self.bucket}/{name}", data)

    def create(self, name: str, data: bytes) -> None:
        self._fs.pipe_file(f"{self.bucket}/{name}", data, mode="create")

    def upload(self, name: str) -> _Upload:
        return _Upload(self._fs, f"{self.bucket}/{name}")

    def copy(self, source: str, target: str, size: int) -> bool:
        path = "b/{}/o/{}/rewriteTo/b/{}/o/{}"
        more: dict[str, str] = {}
        while True:  # a large object takes several calls, unless it stays where it is, in its class of storage
            answer = self._fs.call("POST", path, self.bucket, source, self.bucket, target, json_out=True, **more)
            if answer["done"]:
                return True
            more["rewriteToken"] = answer["rewriteToken"]

    def list(self, prefix: str, recursive: bool) -> Iterator[Entry]:
        more = {} if recursive else {"delimiter": "/"}
        while True:
            page = self._fs.call("GET", "b/{}/o", self.bucket, prefix=prefix, json_out=True, **more)
            for item in page.get("items", ()):
                yield _entry(item)
            for folder in page.get("prefixes", ()):
                yield Entry(folder.removesuffix("/"), is_folder=True)
            if "nextPageToken" not in page:
                return
            more["pageToken"] = page["nextPageToken"]

    def stat(self, name: str) -> Entry | None:
        try:
            return _entry(self._fs.call("GET", "b/{}/o/{}", self.bucket, name, json_out=True))
        except FileNotFoundError:
            return None

    def delete(self, name: str) -> None:
        self._fs.call("DELETE", "b/{}/o/{}", self.bucket, name)

    def drop_uploads(self, prefix: str) -> None:
        """Nothing: unended uploads can't be listed, are not paid for and expire by themselves."""

    def diagnose(self, exc: Exception) -> Fault:
        from google.auth.exceptions import GoogleAuthError

        if isinstance(exc, FileExistsError):
            return Fault.EXISTS
        if isinstance(exc, FileNotFoundError):
            return Fault.MISSING if self._bucket_exists() else Fault.NO_BUCKET
        status = str(getattr(exc, "code", ""))
        if status in ("401", "403") or isinstance(exc, GoogleAuthError) or str(exc).startswith("Forbidden"):
            return Fault.DENIED
        return Fault.PAST_END if status == "416" else Fault.UNCLEAR

    def describe(self, exc: Exception) -> str:
        return f"{type(exc).__name__}: {exc}"

    def _bucket_exists(self) -> bool:
        # Listing needs no right that saving does not need as well; looking at the bucket would.
        try:
            self._fs.call("GET", "b/{}/o", self.bucket, maxResults=1, json_out=True)
        except FileNotFoundError:
            return False
        except Exception:  # noqa: BLE001 - whatever it is, it does not say that there is no bucket
            return True
        return True


class _Upload:
    """A file of gcsfs that never closes itself: to close one is to publish it."""

    def __init__(self, fs: Any, path: str) -> None:
        self._file = fs.open(path, "wb", block_size=_BLOCK, consistency=fs.consistency)
        weakref.finalize(self, setattr, self._file, "closed", True)

    def write(self, data: memoryview) -> None:
        for start in range(0, len(data), _BLOCK):  # what it is given, it holds in memory at once
            self._file.write(data[start : start + _BLOCK])

    def commit(self) -> None:
        self._file.close()

    def abort(self) -> None:
        if getattr(self._file, "location", None) is not None:
            self._file.discard()


def _entry(item: Mapping[str, Any]) -> Entry:
    return Entry(item["name"], int(item.get("size", 0)), seconds(item.get("updated")))
