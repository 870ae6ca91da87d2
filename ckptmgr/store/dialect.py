"""What does a store ask of a client library? One class per library answers: the one place that knows its traps."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from enum import Enum
from typing import Any, NamedTuple, Protocol

from . import Entry
from .retries import Outlook, Retries


class Fault(Enum):
    """What an error of a client library means for what was asked."""

    EXISTS = "the key is taken"
    MISSING = "there is no such key"
    PAST_END = "the object ends before the range begins"
    NO_BUCKET = "there is no such bucket"
    DENIED = "the credentials are missing, wrong or not allowed to"
    EXPIRED = "the credentials were right once"
    ELSEWHERE = "the bucket is in another region"
    SKEWED = "the store's clock and this machine's differ too much"
    NO_UPLOAD = "the upload has ended, or expired: whether it was completed is not known"
    UNCLEAR = "anything else: whether it was done is not known"


class Upload(Protocol):
    """A large object on its way: invisible until `commit` returns, with bounded memory, gone after `abort`."""

    def write(self, data: memoryview) -> None: ...

    def commit(self) -> None: ...

    def abort(self) -> None: ...


class Unended(NamedTuple):
    """A multipart upload that was begun and neither completed nor cancelled; `bytes` of its parts are paid for."""

    name: str
    upload: str
    begun: float | None
    bytes: int


class Dialect(Protocol):
    """One bucket, spoken to through its client library, whose own errors come out of every method
    as they are, when `retries.Retries` gave up. Names are those of objects in the bucket; `prefix` is the root's."""

    bucket: str
    prefix: str
    retries: Retries
    credentials: str  # where people of this library keep them, for messages

    def get(self, name: str, start: int, end: int | None) -> bytes:
        """The bytes [start, end), never from a cache."""

    def put(self, name: str, data: bytes) -> None:
        """One whole put."""

    def create(self, name: str, data: bytes) -> None:
        """The same, if the name is free: `Fault.EXISTS`, also where an earlier try of its own took it. One step
        where the store can do it in one."""

    def upload(self, name: str) -> Upload: ...

    def copy(self, source: str, target: str, size: int) -> bool:
        """Have the store copy an object of `size` bytes, or False where it can't."""

    def list(self, prefix: str, recursive: bool) -> Iterator[Entry]:
        """Every object below a prefix that is empty or ends in "/"; or one level, with folders."""

    def stat(self, name: str) -> Entry | None: ...

    def delete(self, name: str) -> None:
        """One object. May raise `Fault.MISSING`."""

    def unended(self, prefix: str) -> Iterator[Unended]:
        """Every upload below a prefix that nobody ended; its bytes are 0 where `sized` was not called."""

    def sized(self, upload: Unended) -> Unended:
        """The same, with the bytes that arrived. May raise `Fault.NO_UPLOAD`."""

    def cancel(self, name: str, upload: str) -> None:
        """Give an upload up. May raise `Fault.NO_UPLOAD`."""

    def outlook(self, exc: Exception) -> Outlook:
        """Whether the same request can succeed later."""

    def diagnose(self, exc: Exception) -> Fault: ...

    def describe(self, exc: Exception) -> str:
        """The error in a line, without what the library adds of request and credentials."""


def split_url(url: str) -> tuple[str, str]:
    """Bucket and prefix of `protocol://bucket/prefix`."""
    bucket, _, prefix = url.partition("://")[2].strip("/").partition("/")
    return bucket, prefix.strip("/")


def public_url(url: str) -> str:
    """The URL without user, password and query."""
    protocol, _, rest = url.partition("://")
    place, slash, path = rest.partition("?")[0].partition("/")
    return f"{protocol}://{place.rpartition('@')[2]}{slash}{path}".rstrip("/")


def seconds(value: Any) -> float | None:
    """The seconds since 1970 of a time in any of the shapes that client libraries give it."""
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return None
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    return float(value) if isinstance(value, int | float) else None
