"""What is particular to Alibaba Cloud OSS? Spoken to through oss2, with the options of ossfs.

ossfs itself publishes half-written objects, has no create-only write and misreads ranges.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import copy as shallow_copy
from typing import Any, TypeVar
from xml.etree.ElementTree import ParseError

import oss2
from fsspec.config import conf
from requests.exceptions import ConnectTimeout, ProxyError, RequestException, SSLError
from urllib3.exceptions import HTTPError, NewConnectionError

from ..errors import ConfigError
from . import Entry
from .dialect import Fault, Unended, split_url
from .multipart import MultipartUpload, cancel_others, copy
from .retries import Outlook, Patience, Retries, of_status, range_length

_T = TypeVar("_T")
_EXPIRED_CODES = {"SecurityTokenExpired", "InvalidSecurityToken"}
_CONNECTIONS = 32
_BLOCK = 1 << 20  # bytes
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

    def __init__(self, url: str, options: Mapping[str, Any], patience: Patience) -> None:
        self.bucket, self.prefix = split_url(url)
        self.retries = Retries(patience, self.outlook)
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
            connect_timeout=patience.silence_s,  # and for an answer's next bytes
            region=region,
            app_name="ckptmgr",
        )

    def get(self, name: str, start: int, end: int | None) -> bytes:
        return self.retries(lambda limit: self._get(name, start, end, limit))

    def _get(self, name: str, start: int, end: int | None, limit: float) -> bytes:
        until = time.monotonic() + limit
        whole = start == 0 and end is None
        span = None if whole else (start, None if end is None else end - 1)
        # Without the header, a range that ends past the object is answered with all of it.
        answer = self._within(limit).get_object(name, byte_range=span, headers={"x-oss-range-behavior": "standard"})
        try:
            data = _body(answer, until)
            expected = answer.content_length
            if wanted := answer.headers.get("Content-Range"):
                expected = range_length(wanted)
            if expected is not None and len(data) != expected:
                raise EOFError(f"{len(data)} of {expected} bytes arrived")
        except (OSError, EOFError, HTTPError) as exc:  # oss2 wraps only what goes wrong before the body
            answer.close()
            raise oss2.exceptions.RequestError(exc) from exc
        return data

    def put(self, name: str, data: bytes) -> None:
        self._ask(lambda bucket: bucket.put_object(name, data))

    def create(self, name: str, data: bytes) -> None:
        headers = {"x-oss-forbid-overwrite": "true"}
        self._ask(lambda bucket: bucket.put_object(name, data, headers=headers))

    def upload(self, name: str) -> MultipartUpload:
        return MultipartUpload(self, name)

    def begin(self, name: str) -> str:
        def mend(answer: Any) -> None:
            cancel_others(self, name, answer.upload_id)

        return str(self._ask(lambda bucket: bucket.init_multipart_upload(name), mend=mend).upload_id)

    def send(self, name: str, upload: str, number: int, data: bytearray) -> Any:
        body = bytes(data)
        answer = self._ask(lambda bucket: bucket.upload_part(name, upload, number, body), f"part {number}")
        return oss2.models.PartInfo(number, answer.etag, size=len(body), part_crc=answer.crc)

    def complete(self, name: str, upload: str, receipts: list[Any], size: int) -> None:
        try:
            _read_out(self._ask(lambda bucket: bucket.complete_multipart_upload(name, upload, receipts)))
        except oss2.exceptions.NoSuchUpload:
            # A lost answer makes us ask twice, and the second time there is no upload any more.
            found = self.stat(name)
            if found is None or found.size != size:
                raise

    def cancel(self, name: str, upload: str) -> None:
        self._ask(lambda bucket: bucket.abort_multipart_upload(name, upload))

    def copy(self, source: str, target: str, size: int) -> bool:
        copy(self, source, target, size)
        return True

    def copy_whole(self, source: str, name: str) -> None:
        _read_out(self._ask(lambda bucket: bucket.copy_object(self.bucket, source, name)))

    def copy_part(self, source: str, name: str, upload: str, number: int, start: int, end: int) -> Any:
        span = (start, end - 1)
        answer = self._ask(
            lambda bucket: bucket.upload_part_copy(self.bucket, source, span, name, upload, number), f"part {number}"
        )
        _read_out(answer)
        return oss2.models.PartInfo(number, answer.etag)

    def list(self, prefix: str, recursive: bool) -> Iterator[Entry]:
        token = ""
        while True:
            page = self._ask(lambda bucket: self._page(bucket, prefix, recursive, token))  # noqa: B023 - called at once
            for item in page.object_list:
                yield Entry(item.key, item.size, float(item.last_modified))
            for folder in page.prefix_list:
                yield Entry(folder.removesuffix("/"), is_folder=True)
            if not page.is_truncated:
                return
            token = page.next_continuation_token

    def _page(self, bucket: Any, prefix: str, recursive: bool, token: str) -> Any:
        delimiter = "" if recursive else "/"
        return bucket.list_objects_v2(prefix, delimiter, continuation_token=token, max_keys=1000)

    def stat(self, name: str) -> Entry | None:
        try:
            found = self._ask(lambda bucket: bucket.head_object(name))
        except oss2.exceptions.NotFound:
            return None
        return Entry(name, found.content_length, float(found.last_modified))

    def delete(self, name: str) -> None:
        self._ask(lambda bucket: bucket.delete_object(name))

    def unended(self, prefix: str) -> Iterator[Unended]:
        more: dict[str, str] = {}
        while True:
            page = self._ask(lambda bucket: bucket.list_multipart_uploads(prefix, **more))  # noqa: B023 - called at once
            for upload in page.upload_list:
                yield Unended(upload.key, upload.upload_id, float(upload.initiation_date), 0)
            if not page.is_truncated:
                return
            more = {"key_marker": page.next_key_marker, "upload_id_marker": page.next_upload_id_marker}

    def sized(self, upload: Unended) -> Unended:
        count, marker = 0, ""
        while True:
            page = self._ask(lambda bucket: bucket.list_parts(upload.name, upload.upload, marker))  # noqa: B023
            count += sum(part.size for part in page.parts)
            if not page.is_truncated:
                return upload._replace(bytes=count)
            marker = page.next_marker

    def outlook(self, exc: Exception) -> Outlook:
        if isinstance(exc, oss2.exceptions.RequestError):
            cause = exc.exception
            reason = getattr(cause.args[0] if cause.args else None, "reason", None)
            is_unreached = isinstance(cause, ConnectTimeout | ProxyError | SSLError)
            return Outlook(True, is_reached=not (is_unreached or isinstance(reason, NewConnectionError)))
        if isinstance(exc, oss2.exceptions.InconsistentError | ParseError):  # the bytes, or the words
            return Outlook(True)
        if isinstance(exc, RequestException | HTTPError | ConnectionError | TimeoutError):  # in the midst of an answer
            return Outlook(True)
        if isinstance(exc, oss2.exceptions.ServerError):
            return of_status(exc.status, exc.headers.get("Retry-After"))
        return Outlook(False)

    def diagnose(self, exc: Exception) -> Fault:
        if not isinstance(exc, oss2.exceptions.OssError):
            return Fault.UNCLEAR
        if exc.code == "NoSuchBucket":
            return Fault.NO_BUCKET
        if exc.code == "FileAlreadyExists":
            return Fault.EXISTS
        if exc.code == "NoSuchUpload":
            return Fault.NO_UPLOAD
        if exc.code == "RequestTimeTooSkewed":
            return Fault.SKEWED
        if exc.code in _EXPIRED_CODES:
            return Fault.EXPIRED
        known = {401: Fault.DENIED, 403: Fault.DENIED, 404: Fault.MISSING, 416: Fault.PAST_END}
        return known.get(exc.status, Fault.UNCLEAR)

    def describe(self, exc: Exception) -> str:
        if isinstance(exc, oss2.exceptions.RequestError):
            return str(exc.exception)
        if isinstance(exc, oss2.exceptions.ServerError):  # whose own text holds the key id and what was signed
            return f"{exc.code or exc.status}: {exc.message}"
        return f"{type(exc).__name__}: {exc}"

    def _ask(self, request: Callable[[Any], _T], what: str = "", mend: Callable[[_T], object] | None = None) -> _T:
        return self.retries(lambda limit: request(self._within(limit)), what, mend)

    def _within(self, limit: float) -> Any:
        """The bucket, over the same connections, with no silence longer than `limit` seconds."""
        bucket = shallow_copy(self._bucket)
        bucket.timeout = min(bucket.timeout, limit)
        return bucket


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


def _body(answer: Any, until: float) -> bytes:
    """All of it, as it comes: a store that drips is given up when its time is over."""
    raw = answer.resp.response.raw
    read = getattr(raw, "read1", raw.read)  # of urllib3 1 only the latter, which waits for a whole block
    body = bytearray()
    while block := read(_BLOCK):
        body += block
        if time.monotonic() > until:
            raise TimeoutError(f"{len(body)} bytes arrived in time")
    return bytes(body)


def _read_out(answer: Any) -> None:
    """Take the body that oss2 leaves unread, which would keep its connection from the next request."""
    with suppress(OSError):  # the store has done it, whatever becomes of its words
        answer.resp.read()
