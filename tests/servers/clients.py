"""How do the servers' own tests speak to them? Through fsspec, or with one bare request."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from urllib.parse import urlsplit

import fsspec

from . import Bucket
from .faults import HttpServer, Request

__all__ = ["ODD_KEYS", "ask", "filesystem", "statuses_at_once", "winners"]

ODD_KEYS = ["a b", "a+b&c=d", "a/ä <x>.bin", "a/ä%2Fb", "a//b", "zz"]


def filesystem(bucket: Bucket) -> fsspec.AbstractFileSystem:
    return fsspec.filesystem(bucket.url.partition("://")[0], **bucket.options)


def ask(
    url: str, method: str, target: str, body: bytes | Iterator[bytes] = b"", headers: dict[str, str] | None = None
) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers for one request by a client that retries nothing and adds nothing."""
    connection = HTTPConnection(urlsplit(url).netloc)
    try:
        connection.request(method, target, body, headers or {})
        with connection.getresponse() as answer:
            return answer.status, answer.read(), dict(answer.getheaders())
    finally:
        connection.close()


def winners(write: Callable[[bytes], object], lost: type[Exception]) -> list[bytes]:
    """The contents of those of 16 writers at once whose `write` did not raise `lost`."""

    def attempt(number: int) -> bytes | None:
        content = b"writer %d" % number
        try:
            write(content)
        except lost:
            return None
        return content

    with ThreadPoolExecutor(16) as threads:
        return [content for content in threads.map(attempt, range(16)) if content is not None]


def statuses_at_once(server: HttpServer, request: Request) -> list[int]:
    """How a server answers the same request from 16 threads that it reaches at the same moment, sorted."""
    ready = threading.Barrier(16)

    def attempt(_: int) -> int:
        ready.wait()
        return server.answer(request).status

    with ThreadPoolExecutor(16) as threads:
        return sorted(threads.map(attempt, range(16)))
