"""What is particular to Alibaba Cloud OSS? Spoken to through oss2, with the options of ossfs.

ossfs itself publishes half-written objects, has no create-only write and misreads ranges.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, TypeVar

import oss2
from fsspec.config import conf

from ..errors import ConfigError
from . import Entry
from .dialect import Fault, split_url
from .multipart import MultipartUpload, copy

_T = TypeVar("_T")
_TRIES = 8  # 12.7 seconds of waiting in all
_CONNECTIONS = 32
_OPTIONS = {"endpoint", "key", "secret", "token", "region"}
_OURS_TO_IGNORE = {
    "default_cache_type",
    "default_block_size",
    "use_listings_cache",
    "listings_expiry_time",
    "max_paths",
}


class OssDialect:
    credentials = (
        "OSS_ACCESS_KEY_ID, OSS_ACCESS_KEY_SECRET and OSS_SESSION_TOKEN, or key, secret and token in storage.options"
    )

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.bucket, self.prefix = split_url(url)
        given = {**conf.get("oss", {}), **options}
        if unknown := set(given) - _OPTIONS - _OURS_TO_IGNORE - {"skip_instance_cache"}:
            raise ConfigError(f"storage.options: {sorted(unknown)} are unknown for oss; known are {sorted(_OPTIONS)}")
        endpoint = given.get("endpoint") or os.environ.get("OSS_ENDPOINT")
        if not endpoint:
            raise ConfigError("oss needs an endpoint: set OSS_ENDPOINT or storage.options.endpoint")
        region = given.get("region") or os.environ.get("OSS_REGION")
        self._bucket = oss2.Bucket(
            _auth(given, "v4" if region else "v1"),
            endpoint,
            self.bucket,
            session=oss2.Session(pool_size=_CONNECTIONS),
            region=region,
            app_name="ckptmgr",
        )

    def get(self, name: str, start: int, end: int | None) -> bytes:
        return _retried(lambda: self._get(name, start, end))

    def _get(self, name: str, start: int, end: int | None) -> bytes:
        whole = start == 0 and end is None
        span = None if whole else (start, None if end is None else end - 1)
        # Without the header, a range that ends past the object is answered with all of it.
        answer = self._bucket.get_object(name, byte_range=span, headers={"x-oss-range-behavior": "standard"})
        try:
            data: bytes = answer.read()
            if answer.content_length is not None and len(data) != answer.content_length:
                raise EOFError(f"{len(data)} of {answer.content_length} bytes arrived")
        except (OSError, EOFError) as exc:  # oss2 wraps only what goes wrong before the body
            raise oss2.exceptions.RequestError(exc) from exc
        return data

    def put(self, name: str, data: bytes) -> None:
        _retried(lambda: self._bucket.put_object(name, data))

    def create(self, name: str, data: bytes) -> None:
        headers = {"x-oss-forbid-overwrite": "true"}
        _retried(lambda: self._bucket.put_object(name, data, headers=headers))

    def upload(self, name: str) -> MultipartUpload:
        return MultipartUpload(self, name)

    def begin(self, name: str) -> str:
        return str(_retried(lambda: self._bucket.init_multipart_upload(name)).upload_id)

    def send(self, name: str, upload: str, number: int, data: bytearray) -> Any:
        body = bytes(data)
        answer = _retried(lambda: self._bucket.upload_part(name, upload, number, body))
        return oss2.models.PartInfo(number, answer.etag, size=len(body), part_crc=answer.crc)

    def complete(self, name: str, upload: str, receipts: list[Any], size: int) -> None:
        try:
            _read_out(_retried(lambda: self._bucket.complete_multipart_upload(name, upload, receipts)))
        except oss2.exceptions.NoSuchUpload:
            # A lost answer makes us ask twice, and the second time there is no upload any more.
            found = self.stat(name)
            if found is None or found.size != size:
                raise

    def cancel(self, name: str, upload: str) -> None:
        _retried(lambda: self._bucket.abort_multipart_upload(name, upload))

    def copy(self, source: str, target: str, size: int) -> bool:
        copy(self, source, target, size)
        return True

    def copy_whole(self, source: str, name: str) -> None:
        _read_out(_retried(lambda: self._bucket.copy_object(self.bucket, source, name)))

    def copy_part(self, source: str, name: str, upload: str, number: int, start: int, end: int) -> Any:
        span = (start, end - 1)
        answer = _retried(lambda: self._bucket.upload_part_copy(self.bucket, source, span, name, upload, number))
        _read_out(answer)
        return oss2.models.PartInfo(number, answer.etag)

    def list(self, prefix: str, recursive: bool) -> Iterator[Entry]:
        token = ""
        while True:
            page = _retried(lambda: self._page(prefix, recursive, token))  # noqa: B023 - called at once
            for item in page.object_list:
                yield Entry(item.key, item.size, float(item.last_modified))
            for folder in page.prefix_list:
                yield Entry(folder.removesuffix("/"), is_folder=True)
            if not page.is_truncated:
                return
            token = page.next_continuation_token

    def _page(self, prefix: str, recursive: bool, token: str) -> Any:
        delimiter = "" if recursive else "/"
        return self._bucket.list_objects_v2(prefix, delimiter, continuation_token=token, max_keys=1000)

    def stat(self, name: str) -> Entry | None:
        try:
            found = _retried(lambda: self._bucket.head_object(name))
        except oss2.exceptions.NotFound:
            return None
        return Entry(name, found.content_length, float(found.last_modified))

    def delete(self, name: str) -> None:
        _retried(lambda: self._bucket.delete_object(name))

    def drop_uploads(self, prefix: str) -> None:
        for upload in list(oss2.MultipartUploadIterator(self._bucket, prefix=prefix)):
            self.cancel(upload.key, upload.upload_id)

    def diagnose(self, exc: Exception) -> Fault:
        if not isinstance(exc, oss2.exceptions.OssError):
            return Fault.UNCLEAR
        if exc.code == "NoSuchBucket":
            return Fault.NO_BUCKET
        if exc.code == "FileAlreadyExists":
            return Fault.EXISTS
        if exc.code == "NoSuchUpload":
            return Fault.UNCLEAR
        known = {401: Fault.DENIED, 403: Fault.DENIED, 404: Fault.MISSING, 416: Fault.PAST_END}
        return known.get(exc.status, Fault.UNCLEAR)

    def describe(self, exc: Exception) -> str:
        if isinstance(exc, oss2.exceptions.RequestError):
            return str(exc.exception)
        if isinstance(exc, oss2.exceptions.ServerError):  # whose own text holds the key id and what was signed
            return f"{exc.code or exc.status}: {exc.message}"
        return f"{type(exc).__name__}: {exc}"


def _auth(given: Mapping[str, Any], version: str) -> Any:
    if "key" in given:
        key, secret, token = (given.get(name) for name in ("key", "secret", "token"))
    else:
        key, secret, token = map(os.environ.get, ("OSS_ACCESS_KEY_ID", "OSS_ACCESS_KEY_SECRET", "OSS_SESSION_TOKEN"))
    if not key or not secret:
        return oss2.AnonymousAuth()
    if token:
        return oss2.StsAuth(key, secret, token, auth_version=version)
    return oss2.make_auth(key, secret, version)


def _read_out(answer: Any) -> None:
    """Take the body that oss2 leaves unread, which would keep its connection from the next request."""
    with suppress(OSError):  # the store has done it, whatever becomes of its words
        answer.resp.read()


def _retried(request: Callable[[], _T]) -> _T:
    """oss2 itself repeats nothing."""
    for again in range(_TRIES - 1):
        try:
            return request()
        except oss2.exceptions.OssError as exc:
            if not (isinstance(exc, oss2.exceptions.RequestError) or exc.status in (408, 429) or exc.status >= 500):
                raise
            time.sleep(0.1 * 2**again)
    return request()
