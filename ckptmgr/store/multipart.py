"""How does a large object go up in parts? Several at a time, in bounded memory, visible only when complete."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Protocol

from .dialect import Unended
from .haste import in_haste

_SMALLEST = 16 << 20  # bytes
_EVEN_PARTS = 5_000  # of one size, as some stores want them
_GROW_EVERY = 1_000
_IN_FLIGHT = 8
_COPIED_AT_ONCE = 512 << 20  # bytes; below what any store copies in one request, and several go faster
_MOST_PARTS = 10_000
TO_LOOK_S = 30.0  # for uploads that nobody will end


def part_size(number: int) -> int:
    """Bytes of the part with this number, from 0. Grows so that 10,000 parts make more than 1,000 GiB."""
    return _SMALLEST if number < _EVEN_PARTS else _SMALLEST << 1 + (number - _EVEN_PARTS) // _GROW_EVERY


class Multipart(Protocol):
    """The requests that a multipart upload is made of."""

    def put(self, name: str, data: bytes) -> None: ...

    def begin(self, name: str) -> str:
        """The id of a new upload, which with `cancel_others` is the only one of this name."""

    def send(self, name: str, upload: str, number: int, data: bytearray) -> Any:
        """Numbers begin at 1; the answer is a receipt that `complete` hands in."""

    def complete(self, name: str, upload: str, receipts: list[Any], size: int) -> None: ...

    def cancel(self, name: str, upload: str) -> None: ...

    def unended(self, prefix: str) -> Iterator[Unended]: ...

    def copy_whole(self, source: str, name: str) -> None:
        """One request that copies a small object."""

    def copy_part(self, source: str, name: str, upload: str, number: int, start: int, end: int) -> Any:
        """The bytes [start, end) of an object as a part; the answer is a receipt as that of `send`."""


def cancel_others(requests: Multipart, name: str, upload: str) -> None:
    """Give up what an earlier try has begun whose answer got lost: nobody knows its id, and it would be paid for.
    Only for names that nobody else uses."""
    with suppress(Exception), in_haste(TO_LOOK_S, is_once=True):  # a sweep would find it too
        for other in [*requests.unended(name)]:
            if other.name == name and other.upload != upload:
                requests.cancel(name, other.upload)


def copy(requests: Multipart, source: str, name: str, size: int) -> None:
    """Have the store copy an object, a large one in several parts at a time."""

    def copy_part(start: int) -> Any:
        with in_haste(unwanted=failed):
            try:
                return requests.copy_part(source, name, upload, start // step + 1, start, min(start + step, size))
            except BaseException:
                failed.set()
                raise

    step = max(_COPIED_AT_ONCE, -(-size // _MOST_PARTS))
    if size <= step:
        requests.copy_whole(source, name)
        return
    failed = threading.Event()
    upload = requests.begin(name)
    try:
        with ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="ckptmgr-copy") as pool:
            receipts = list(pool.map(copy_part, range(0, size, step)))
        requests.complete(name, upload, receipts, size)
    except BaseException:
        with suppress(Exception):  # the first error says more, and a sweep drops what is left
            requests.cancel(name, upload)
        raise


class MultipartUpload:
    """An `Upload`. One that is dropped unended publishes nothing, but its parts stay on the store
    until the folder is deleted or the bucket's lifecycle rule removes them."""

    def __init__(self, requests: Multipart, name: str) -> None:
        self._requests, self._name = requests, name
        self._buffer = bytearray()
        self._size = 0
        self._upload: str | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._sent: list[Future[Any]] = []
        self._in_flight: deque[Future[Any]] = deque()
        self._ended = threading.Event()

    def write(self, data: memoryview) -> None:
        while data:
            room = part_size(len(self._sent)) - len(self._buffer)
            self._buffer += data[:room]
            self._size += min(room, len(data))
            data = data[room:]
            if len(self._buffer) == part_size(len(self._sent)):
                self._send()

    def commit(self) -> None:
        if self._upload is None:
            self._requests.put(self._name, bytes(self._buffer))
            return
        if self._buffer:
            self._send()
        receipts = [future.result() for future in self._sent]
        self._requests.complete(self._name, self._upload, receipts, self._size)
        self._upload = None
        self._close()

    def abort(self) -> None:
        self._close()  # first: a part that arrives after the cancelling would stay
        self._buffer = bytearray()
        if self._upload is not None:
            upload, self._upload = self._upload, None
            self._requests.cancel(self._name, upload)

    def _send(self) -> None:
        if self._upload is None:
            self._upload = self._requests.begin(self._name)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="ckptmgr-upload")
        if len(self._in_flight) == _IN_FLIGHT:
            self._in_flight.popleft().result()
        part, self._buffer = self._buffer, bytearray()
        number = len(self._sent) + 1
        future = self._pool.submit(_send_until, self._ended, self._requests, self._name, self._upload, number, part)
        self._sent.append(future)
        self._in_flight.append(future)

    def __del__(self) -> None:  # of one that nobody has ended; its threads must not keep the process
        self._ended.set()

    def _close(self) -> None:
        self._ended.set()
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _send_until(
    ended: threading.Event, requests: Multipart, name: str, upload: str, number: int, part: bytearray
) -> Any:
    with in_haste(unwanted=ended):
        return requests.send(name, upload, number, part)
