"""What is particular to S3 and the stores that speak like it? Spoken to through s3fs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from socket import gaierror
from typing import Any

import aiohttp
import s3fs
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    FlexibleChecksumError,
    HTTPClientError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ProxyConnectionError,
    SSLError,
)
from botocore.parsers import ResponseParserError
from fsspec.asyn import sync
from fsspec.config import conf

from . import Entry
from .dialect import Fault, Unended, seconds, split_url
from .multipart import MultipartUpload, cancel_others, copy
from .retries import Outlook, Patience, Retries, of_status, range_length

_DENIED_CODES = {"AccessDenied", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}
_EXPIRED_CODES = {"ExpiredToken", "TokenRefreshRequired"}
_ELSEWHERE_CODES = {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}
_PASSING_CODES = {  # with a status that says nothing of the kind
    "BadDigest",
    "IncompleteBody",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
}
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_UNREACHED = (
    EndpointConnectionError,
    ConnectTimeoutError,
    ProxyConnectionError,
    SSLError,
    aiohttp.ClientConnectorError,
    ConnectionRefusedError,
    gaierror,
)
_BROKEN_OFF = (
    FlexibleChecksumError,
    HTTPClientError,
    ResponseParserError,
    aiohttp.ClientError,
    ConnectionError,
    TimeoutError,
    EOFError,
)

_log = logging.getLogger("ckptmgr.store")


class S3Dialect:
    """Whole puts, parts and listings are asked of S3 itself, past the caches and file objects of
    s3fs, whose files publish what they hold when they are closed after an error."""

    credentials = (
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, ~/.aws, the machine's role, or storage.options"
    )

    def __init__(self, url: str, options: Mapping[str, Any], patience: Patience) -> None:
        self.bucket, self.prefix = split_url(url)
        self.retries = Retries(patience, self.outlook)
        arguments = _arguments(options, patience.silence_s)
        self._fs = s3fs.S3FileSystem(**arguments, use_listings_cache=False, skip_instance_cache=True)
        self._fs.retries = 1  # tries
        self._can_create = True  # until the store says that it can't

    def get(self, name: str, start: int, end: int | None) -> bytes:
        return self.retries(lambda limit: bytes(sync(self._fs.loop, self._get, name, start, end, timeout=limit)))

    async def _get(self, name: str, start: int, end: int | None) -> bytes:
        span = {} if start == 0 and end is None else {"Range": f"bytes={start}-{'' if end is None else end - 1}"}
        answer = await self._fs._call_s3("get_object", Bucket=self.bucket, Key=name, **span)
        async with answer["Body"] as body:
            data: bytes = await body.read()
        if (wanted := answer.get("ContentRange")) and len(data) != range_length(wanted):
            raise EOFError(f"{len(data)} bytes arrived of {wanted}")
        return data

    def put(self, name: str, data: bytes) -> None:
        self._call("put_object", name, Body=data)

    def create(self, name: str, data: bytes) -> None:
        if self._can_create:
            try:
                self._call("put_object", name, Body=data, IfNoneMatch="*")
                return
            except OSError as exc:
                if _status(exc) != 501 and _code(exc) != "NotImplemented":
                    raise
                self._can_create = False  # speaks like S3, but not of conditions
                _log.info("create.condition.unsupported bucket=%s code=%s, looking first", self.bucket, _code(exc))
        if self.stat(name) is not None:
            raise FileExistsError(name)
        self.put(name, data)

    def upload(self, name: str) -> MultipartUpload:
        return MultipartUpload(self, name)

    def begin(self, name: str) -> str:
        def mend(answer: Any) -> None:
            cancel_others(self, name, answer["UploadId"])

        return str(self._ask("create_multipart_upload", mend=mend, Key=name)["UploadId"])

    def send(self, name: str, upload: str, number: int, data: bytearray) -> dict[str, Any]:
        what = f"part {number}"
        return _receipt(number, self._call("upload_part", name, what, UploadId=upload, PartNumber=number, Body=data))

    def complete(self, name: str, upload: str, receipts: list[Any], size: int) -> None:
        try:
            self._call("complete_multipart_upload", name, UploadId=upload, MultipartUpload={"Parts": receipts})
        except OSError as exc:
            # A lost answer makes the client ask twice, and the second time there is no upload any more.
            if _code(exc) != "NoSuchUpload" or (found := self.stat(name)) is None or found.size != size:
                raise

    def cancel(self, name: str, upload: str) -> None:
        self._call("abort_multipart_upload", name, UploadId=upload)

    def copy(self, source: str, target: str, size: int) -> bool:
        try:
            copy(self, source, target, size)
        except OSError as exc:
            if _status(exc) not in (405, 501):  # speaks like S3, but not of copies
                raise
            return False
        return True

    def copy_whole(self, source: str, name: str) -> None:
        self._call("copy_object", name, CopySource={"Bucket": self.bucket, "Key": source})

    def copy_part(self, source: str, name: str, upload: str, number: int, start: int, end: int) -> dict[str, Any]:
        answer = self._call(
            "upload_part_copy",
            name,
            f"part {number}",
            UploadId=upload,
            PartNumber=number,
            CopySource={"Bucket": self.bucket, "Key": source},
            CopySourceRange=f"bytes={start}-{end - 1}",
        )
        return _receipt(number, answer["CopyPartResult"])

    def list(self, prefix: str, recursive: bool) -> Iterator[Entry]:
        more: dict[str, Any] = {} if recursive else {"Delimiter": "/"}
        while True:
            page = self._ask("list_objects_v2", Prefix=prefix, **more)
            for item in page.get("Contents", ()):
                yield Entry(item["Key"], item["Size"], seconds(item.get("LastModified")))
            for item in page.get("CommonPrefixes", ()):
                yield Entry(item["Prefix"].removesuffix("/"), is_folder=True)
            if not page.get("IsTruncated"):
                return
            more["ContinuationToken"] = page["NextContinuationToken"]

    def stat(self, name: str) -> Entry | None:
        try:
            found = self._call("head_object", name)
        except FileNotFoundError:
            return None
        return Entry(name, found["ContentLength"], seconds(found.get("LastModified")))

    def delete(self, name: str) -> None:
        self._call("delete_object", name)

    def unended(self, prefix: str) -> Iterator[Unended]:
        more: dict[str, Any] = {}
        while True:
            page = self._ask("list_multipart_uploads", Prefix=prefix, **more)
            for upload in page.get("Uploads", ()):
                if upload["Key"].startswith(prefix):  # not every store heeds the prefix
                    yield Unended(upload["Key"], upload["UploadId"], seconds(upload.get("Initiated")), 0)
            if not page.get("IsTruncated"):
                return
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def sized(self, upload: Unended) -> Unended:
        count, more = 0, dict[str, Any]()
        while True:
            page = self._call("list_parts", upload.name, UploadId=upload.upload, **more)
            count += sum(part["Size"] for part in page.get("Parts", ()))
            if not page.get("IsTruncated"):
                return upload._replace(bytes=count)
            more = {"PartNumberMarker": page["NextPartNumberMarker"]}

    def outlook(self, exc: Exception) -> Outlook:
        if isinstance(exc, _UNREACHED):
            return Outlook(True, is_reached=False)
        error = _client_error(exc)
        if error is None:
            return Outlook(isinstance(exc, _BROKEN_OFF))
        headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        # 409: another create of the same name is under way, and may yet fail.
        if _code(exc) in _PASSING_CODES or _status(exc) == 409:
            return of_status(503, headers.get("retry-after"))
        return of_status(_status(exc), headers.get("retry-after"))

    def diagnose(self, exc: Exception) -> Fault:
        if isinstance(exc, NoCredentialsError | PartialCredentialsError | ProfileNotFound):
            return Fault.DENIED
        if isinstance(exc, FileExistsError):
            return Fault.EXISTS
        status, code = _status(exc), _code(exc)
        if code == "NoSuchBucket":
            return Fault.NO_BUCKET
        if code in _EXPIRED_CODES:
            return Fault.EXPIRED
        if code == "RequestTimeTooSkewed":
            return Fault.SKEWED
        if code == "NoSuchUpload":
            return Fault.NO_UPLOAD
        if code in _ELSEWHERE_CODES or status == 301:
            return Fault.ELSEWHERE
        if code in _DENIED_CODES or status in (401, 403):
            return Fault.DENIED
        known = {404: Fault.MISSING, 412: Fault.EXISTS, 416: Fault.PAST_END}
        return known.get(status, Fault.UNCLEAR)

    def describe(self, exc: Exception) -> str:
        error = _client_error(exc)
        if error is None:
            return f"{type(exc).__name__}: {exc}"
        details = error.response.get("Error", {})
        return f"{details.get('Code', 'error')}: {details.get('Message', '')}"

    def _call(self, method: str, name: str, what: str = "", **arguments: Any) -> Any:
        return self._ask(method, what, Key=name, **arguments)

    def _ask(self, method: str, what: str = "", mend: Callable[[Any], object] | None = None, **arguments: Any) -> Any:
        arguments = {"Bucket": self.bucket, **arguments}
        return self.retries(
            lambda limit: sync(self._fs.loop, self._fs._call_s3, method, timeout=limit, **arguments), what, mend
        )


def _receipt(number: int, answer: Mapping[str, Any]) -> dict[str, Any]:
    checksums = {key: value for key, value in answer.items() if key.startswith("Checksum")}
    return {"PartNumber": number, "ETag": answer["ETag"], **checksums}


def _arguments(options: Mapping[str, Any], silence_s: float) -> dict[str, Any]:
    given = {**conf.get("s3", {}), **options}
    arguments = dict(options)
    arguments["config_kwargs"] = {
        "retries": {"mode": "standard", "total_max_attempts": 1},
        "connect_timeout": silence_s,
        "read_timeout": silence_s,
        "max_pool_connections": 32,
        **given.get("config_kwargs", {}),
    }
    # Not botocore's name for it, but one that many tools share.
    endpoint = os.environ.get("S3_ENDPOINT_URL")
    chosen = [given.get("endpoint_url"), given.get("client_kwargs", {}).get("endpoint_url")]
    if endpoint and not any(chosen) and not any(map(os.environ.get, _ENDPOINT_VARIABLES)):
        arguments["endpoint_url"] = endpoint
    return arguments


def _client_error(exc: BaseException | None) -> ClientError | None:
    """botocore's error behind the built-in one that s3fs makes of it."""
    while exc is not None and not isinstance(exc, ClientError):
        exc = exc.__cause__
    return exc


def _code(exc: BaseException) -> str:
    error = _client_error(exc)
    return "" if error is None else str(error.response.get("Error", {}).get("Code", ""))


def _status(exc: BaseException) -> int:
    error = _client_error(exc)
    return 0 if error is None else int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
