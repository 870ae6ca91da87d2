"""What is particular to Google Cloud Storage? Spoken to through gcsfs, one request at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from fsspec.asyn import sync
from fsspec.config import conf

from . import Entry
from .dialect import Fault, Unended, seconds, split_url
from .retries import Outlook, Patience, Retries, of_status, range_length

if find_spec("gcsfs") is None:  # imported below, once it is known how
    raise ImportError("gcsfs is not installed")

_NO_UPLOAD = 410  # as the store says of some uploads that have ended
_FAULTS = {
    401: Fault.EXPIRED,
    403: Fault.DENIED,
    _NO_UPLOAD: Fault.NO_UPLOAD,
    412: Fault.EXISTS,
    416: Fault.PAST_END,
}
_DONE_TOO = {"PUT": 308, "DELETE": 499}  # a block of an upload was kept; an upload was cancelled
_BLOCK = 32 << 20  # bytes; sent one after the other


class GcsError(Exception):
    """What the store answered instead of doing it."""

    def __init__(self, status: int, message: str, wait: str | None = None) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.wait = status, wait


class GcsDialect:
    credentials = (
        "GOOGLE_APPLICATION_CREDENTIALS, `gcloud auth application-default login`, "
        "the machine's service account, or storage.options"
    )

    def __init__(self, url: str, options: Mapping[str, Any], patience: Patience) -> None:
        self.bucket, self.prefix = split_url(url)
        self.retries = Retries(patience, self.outlook)
        given = {**conf.get("gs", {}), **conf.get("gcs", {}), **options}
        arguments = {"consistency": "md5", **options}
        if emulator := given.get("endpoint_url") or os.environ.get("STORAGE_EMULATOR_HOST"):
            arguments["token"] = given.get("token", "anon")
            # What bucket is it? Newer gcsfs asks that over gRPC, which no emulator answers.
            os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        import gcsfs
        import gcsfs.core
        from aiohttp import ClientTimeout

        if "requests_timeout" not in given:
            silence = patience.silence_s
            arguments["requests_timeout"] = ClientTimeout(total=None, sock_connect=silence, sock_read=silence)
        kind = gcsfs.core.GCSFileSystem if emulator else gcsfs.GCSFileSystem
        self._fs = kind(**arguments, use_listings_cache=False, skip_instance_cache=True)
        self._fs._request = self._request  # its own repeats itself, and forgets what the store said of when

    async def _request(self, method: str, path: str, *args: str, **more: Any) -> tuple[int, Any, Any, bytes]:
        """What gcsfs builds everything on, without retries. Raises `GcsError`."""
        fs = self._fs
        headers, body, data = (more.pop(name, None) for name in ("headers", "json", "data"))
        more = {name: value for name, value in more.items() if name not in ("cache_type", "cache_source")}
        await fs._set_session()
        async with fs.session.request(
            method=method,
            url=fs._format_path(path, args),
            params=fs._get_params(more),
            json=body,
            headers=fs._get_headers(headers),
            data=data,
            timeout=fs.requests_timeout,
        ) as answer:
            content = await answer.read()
            if answer.status // 100 != 2 and answer.status != _DONE_TOO.get(method):
                raise GcsError(answer.status, _message(content), answer.headers.get("Retry-After"))
            return answer.status, answer.headers, answer.request_info, content

    def ask(self, function: Callable[..., Any], *args: Any, what: str = "", **more: Any) -> Any:
        """What a coroutine function of gcsfs answers; asked again where that helps."""
        return self.retries(lambda limit: sync(self._fs.loop, function, *args, timeout=limit, **more), what)

    def get(self, name: str, start: int, end: int | None) -> bytes:
        # An empty object has no range, which gcsfs would log as an error.
        span = {} if start == 0 and end is None else {"start": start, "end": end}
        data: bytes = self.ask(self._get, name, span)
        return data

    async def _get(self, name: str, span: Mapping[str, int | None]) -> bytes:
        path = self._fs.url(f"{self.bucket}/{name}")
        headers = {"Range": await self._fs._process_limits(path, **span)} if span else {}
        _, answer, _, data = await self._request("GET", path, headers=headers)
        if (wanted := answer.get("Content-Range")) is not None and len(data) != range_length(wanted):
            raise EOFError(f"{len(data)} bytes arrived of {wanted}")
        return data

    def put(self, name: str, data: bytes) -> None:
        self.ask(self._fs._pipe_file, f"{self.bucket}/{name}", data, chunksize=len(data) + 1)

    def create(self, name: str, data: bytes) -> None:
        self.ask(self._fs._pipe_file, f"{self.bucket}/{name}", data, mode="create", chunksize=len(data) + 1)

    def upload(self, name: str) -> _Upload:
        return _Upload(self, name, self._fs.consistency)

    def begin(self, name: str) -> str:
        """The URL of a resumable upload."""
        headers, _ = self.ask(
            self._fs._call,
            "POST",
            f"{self._fs._location}/upload/storage/v1/b/{{}}/o",
            self.bucket,
            uploadType="resumable",
            json={"name": name},
            headers={"X-Upload-Content-Type": "application/octet-stream"},
        )
        return str(headers["Location"])

    def send(self, upload: str, data: memoryview, offset: int, is_last: bool) -> dict[str, Any]:
        """The bytes of an object from `offset` on. Nothing is said of it before the last ones: then the object."""
        end = offset + len(data)
        total, done, is_sure = str(end) if is_last else "*", offset, True

        async def attempt() -> dict[str, Any] | None:
            nonlocal is_sure
            # An earlier try may have arrived, in part or whole.
            if not is_sure and ((found := await exchange(data[:0], "*")) is not None or done == end):
                return found
            is_sure = False
            return await exchange(data[done - offset :], f"{done}-{end - 1}")

        async def exchange(body: memoryview, span: str) -> dict[str, Any] | None:
            nonlocal done, is_sure
            headers = {"Content-Range": f"bytes {span}/{total}", "Content-Type": "application/octet-stream"}
            try:
                status, answer, _, content = await self._request("PUT", upload, headers=headers, data=body)
            except GcsError as exc:
                if exc.status == 404:  # not of an object or a bucket
                    raise GcsError(_NO_UPLOAD, f"the upload has expired or was cancelled: {exc}") from exc
                raise
            is_sure = True
            if status != 308:
                return dict(json.loads(content)) if content else {}
            before, done = done, int(answer["Range"].rpartition("-")[2]) + 1 if "Range" in answer else 0
            if not offset <= done <= end:
                raise ValueError(f"the store holds {done} bytes of an upload that was sent from {offset} to {end}")
            if body and done == before:
                raise EOFError(f"of {len(body)} bytes none were kept")
            return None

        while True:
            answer = self.ask(attempt, what=f"bytes {offset} to {end}")
            if answer is not None:
                return dict(answer)
            if done == end and not is_last:
                return {}

    def cancel(self, name: str, upload: str) -> None:
        self.ask(self._request, "DELETE", upload)

    def copy(self, source: str, target: str, size: int) -> bool:
        path = "b/{}/o/{}/rewriteTo/b/{}/o/{}"
        more: dict[str, str] = {}
        while True:  # a large object takes several calls, unless it stays where it is, in its class of storage
            answer = self._call("POST", path, self.bucket, source, self.bucket, target, **more)
            if answer["done"]:
                return True
            more["rewriteToken"] = answer["rewriteToken"]

    def list(self, prefix: str, recursive: bool) -> Iterator[Entry]:
        more = {} if recursive else {"delimiter": "/"}
        while True:
            page = self._call("GET", "b/{}/o", self.bucket, prefix=prefix, **more)
            for item in page.get("items", ()):
                yield _entry(item)
            for folder in page.get("prefixes", ()):
                yield Entry(folder.removesuffix("/"), is_folder=True)
            if "nextPageToken" not in page:
                return
            more["pageToken"] = page["nextPageToken"]

    def stat(self, name: str) -> Entry | None:
        found = self.about(name)
        return None if found is None else _entry(found)

    def about(self, name: str) -> dict[str, Any] | None:
        try:
            return dict(self._call("GET", "b/{}/o/{}", self.bucket, name))
        except GcsError as exc:
            if exc.status != 404:
                raise
            return None

    def delete(self, name: str) -> None:
        self.ask(self._fs._call, "DELETE", "b/{}/o/{}", self.bucket, name)

    def unended(self, prefix: str) -> Iterator[Unended]:
        """None: unended uploads can't be listed, are not paid for and expire by themselves."""
        return iter(())

    def sized(self, upload: Unended) -> Unended:
        return upload

    def outlook(self, exc: Exception) -> Outlook:
        import aiohttp
        from gcsfs.retry import ChecksumError
        from google.auth.exceptions import GoogleAuthError

        match exc:
            case GcsError():
                return of_status(exc.status, exc.wait)
            case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError():
                return Outlook(True, is_reached=False)
            case aiohttp.ClientError() | TimeoutError() | ConnectionError() | EOFError() | ChecksumError():
                return Outlook(True)
            case json.JSONDecodeError():  # an answer that is none
                return Outlook(True)
            case GoogleAuthError():
                return Outlook(exc.retryable)
        return Outlook(False)

    def diagnose(self, exc: Exception) -> Fault:
        from google.auth.exceptions import GoogleAuthError

        if isinstance(exc, GoogleAuthError):
            return Fault.DENIED
        if not isinstance(exc, GcsError):
            return Fault.UNCLEAR
        if exc.status == 404:
            return Fault.MISSING if self._bucket_exists() else Fault.NO_BUCKET
        return _FAULTS.get(exc.status, Fault.ELSEWHERE if exc.status // 100 == 3 else Fault.UNCLEAR)

    def describe(self, exc: Exception) -> str:
        return str(exc) if isinstance(exc, GcsError) else f"{type(exc).__name__}: {exc}"

    def _call(self, method: str, path: str, *args: str, **more: Any) -> Any:
        return self.ask(self._fs._call, method, path, *args, json_out=True, **more)

    def _bucket_exists(self) -> bool:
        # Listing needs no right that saving does not need as well; looking at the bucket would.
        try:
            self._call("GET", "b/{}/o", self.bucket, maxResults=1)
        except GcsError as exc:
            return exc.status != 404
        except Exception:  # noqa: BLE001 - whatever it is, it does not say that there is no bucket
            return True
        return True


class _Upload:
    """A resumable upload; a small object is one put. Nothing is to be seen before the last bytes are there."""

    def __init__(self, dialect: GcsDialect, name: str, consistency: str | None) -> None:
        from gcsfs.checkers import get_consistency_checker

        self._dialect, self._name = dialect, name
        self._checker = get_consistency_checker(consistency)
        self._buffer = bytearray()
        self._offset = 0
        self._upload: str | None = None

    def write(self, data: memoryview) -> None:
        while data:
            if len(self._buffer) == _BLOCK:  # not before there is more: the last bytes are sent as such
                self._send(is_last=False)
            room = _BLOCK - len(self._buffer)
            self._buffer += data[:room]
            data = data[room:]

    def commit(self) -> None:
        if self._upload is None:
            self._dialect.put(self._name, bytes(self._buffer))
            return
        answer = self._send(is_last=True)
        self._upload = None
        found = answer if "md5Hash" in answer else self._dialect.about(self._name) or {}
        try:
            self._checker.validate_json_response(found)
        except Exception:
            self._dialect.delete(self._name)
            raise

    def abort(self) -> None:
        self._buffer = bytearray()
        if self._upload is not None:
            upload, self._upload = self._upload, None
            self._dialect.cancel(self._name, upload)

    def _send(self, *, is_last: bool) -> dict[str, Any]:
        self._upload = self._upload or self._dialect.begin(self._name)
        self._checker.update(self._buffer)
        answer = self._dialect.send(self._upload, memoryview(self._buffer), self._offset, is_last)
        self._offset += len(self._buffer)
        self._buffer = bytearray()
        return answer


def _entry(item: Mapping[str, Any]) -> Entry:
    return Entry(item["name"], int(item.get("size", 0)), seconds(item.get("updated")))


def _message(content: bytes) -> str:
    """What of an error's body is for people."""
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return content.decode(errors="replace")[:200]
