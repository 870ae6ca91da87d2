"""What is particular to S3 and the stores that speak like it? Spoken to through s3fs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import s3fs
from aiohttp import ClientPayloadError
from botocore.exceptions import (
    ClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
    ResponseStreamingError,
)
from fsspec.config import conf

from . import Entry
from .dialect import Fault, seconds, split_url
from .multipart import MultipartUpload, copy

_DENIED_CODES = {
    "AccessDenied",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
_ENDPOINT_VARIABLES = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_CUT_OFF = (ClientPayloadError, IncompleteReadError, ResponseStreamingError)  # after botocore's part: in the body
_TRIES = 5


class S3Dialect:
    """Whole puts, parts and listings are asked of S3 itself, past the caches and file objects of
    s3fs, whose files publish what they hold when they are closed after an error."""

    credentials = (
        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, ~/.aws, the machine's role, or storage.options"
    )

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.bucket, self.prefix = split_url(url)
        self._fs = s3fs.S3FileSystem(**_arguments(options), use_listings_cache=False, skip_instance_cache=True)
        self._fs.retries = 1  # botocore repeats what failed; s3fs would repeat all of botocore's tries

    def get(self, name: str, start: int, end: int | None) -> bytes:
        for again in range(_TRIES):
            try:
                data: bytes = self._fs.cat_file(f"{self.bucket}/{name}", start=start, end=end)
            except _CUT_OFF:
                if again == _TRIES - 1:
                    raise
            else:
                break
        return data

    def put(self, name: str, data: bytes) -> None:
        self._call("put_object", name, Body=data)

    def create(self, name: str, data: bytes) -> None:
        for again in range(_TRIES):
            try:
                self._call("put_object", name, Body=data, IfNoneMatch="*")
            except OSError as exc:
                # Another create of the same name is under way, and may yet fail.
                if _status(exc) != 409 or again == _TRIES - 1:
                    raise
                time.sleep(0.1 * 2**again)
            else:
                return

    def upload(self, name: str) -> MultipartUpload:
        return MultipartUpload(self, name)

    def begin(self, name: str) -> str:
        return str(self._call("create_multipart_upload", name)["UploadId"])

    def send(self, name: str, upload: str, number: int, data: bytearray) -> dict[str, Any]:
        answer = self._call("upload_part", name, UploadId=upload, PartNumber=number, Body=data)
        return _receipt(number, answer)

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
            UploadId=upload,
            PartNumber=number,
            CopySource={"Bucket": self.bucket, "Key": source},
            CopySourceRange=f"bytes={start}-{end - 1}",
        )
        return _receipt(number, answer["CopyPartResult"])

    def list(self, prefix: str, recursive: bool) -> Iterator[Entry]:
        more = {} if recursive else {"Delimiter": "/"}
        while True:
            page = self._fs.call_s3("list_objects_v2", Bucket=self.bucket, Prefix=prefix, **more)
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

    def drop_uploads(self, prefix: str) -> None:
        more: dict[str, str] = {}
        while True:
            page = self._fs.call_s3("list_multipart_uploads", Bucket=self.bucket, Prefix=prefix, **more)
            for upload in page.get("Uploads", ()):
                if upload["Key"].startswith(prefix):  # not every store heeds the prefix
                    self.cancel(upload["Key"], upload["UploadId"])
            if not page.get("IsTruncated"):
                return
            more = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def diagnose(self, exc: Exception) -> Fault:
        if isinstance(exc, NoCredentialsError | PartialCredentialsError | ProfileNotFound):
            return Fault.DENIED
        status, code = _status(exc), _code(exc)
        if code == "NoSuchBucket":
            return Fault.NO_BUCKET
        if code in _DENIED_CODES or status in (401, 403):
            return Fault.DENIED
        known = {404: Fault.MISSING, 412: Fault.EXISTS, 416: Fault.PAST_END}
        # An upload that has gone is no object that is missing.
        return Fault.UNCLEAR if code == "NoSuchUpload" else known.get(status, Fault.UNCLEAR)

    def describe(self, exc: Exception) -> str:
        error = _client_error(exc)
        if error is None:
            return f"{type(exc).__name__}: {exc}"
        details = error.response.get("Error", {})
        return f"{details.get('Code', 'error')}: {details.get('Message', '')}"

    def _call(self, method: str, name: str, **arguments: Any) -> Any:
        return self._fs.call_s3(method, Bucket=self.bucket, Key=name, **arguments)


def _receipt(number: int, answer: Mapping[str, Any]) -> dict[str, Any]:
    checksums = {key: value for key, value in answer.items() if key.startswith("Checksum")}
    return {"PartNumber": number, "ETag": answer["ETag"], **checksums}


def _arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    given = {**conf.get("s3", {}), **options}
    arguments = dict(options)
    arguments["config_kwargs"] = {
        "retries": {"mode": "adaptive", "max_attempts": 10},
        "read_timeout": 60,
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
