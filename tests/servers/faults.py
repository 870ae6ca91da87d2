"""How does a test server answer on 127.0.0.1, remember what it was asked, and fail when told to?

with GcsServer() as server:
    server.faults.append(Fault(r"POST /upload", status=503, count=2))   # the next two answer 503
    server.faults.append(Fault(r"PUT .*manifest", drop="after"))        # done, but nobody hears of it
    ...
    assert server.log == ["POST /upload/storage/v1/b/bucket/o?uploadType=media", ...]
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from email.message import Message
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, Self
from urllib.parse import parse_qsl, urlsplit

__all__ = ["Fault", "HttpServer", "Reply", "Request"]


@dataclass(frozen=True)
class Request:
    """What a client sent, read to its end. `target` is the path and query as they came, still quoted."""

    method: str
    target: str
    headers: Message
    body: bytes

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @cached_property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(urlsplit(self.target).query, keep_blank_values=True))

    def __str__(self) -> str:
        return f"{self.method} {self.target}"


@dataclass(frozen=True, slots=True)
class Reply:
    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Fault:
    """What goes wrong with the next `count` requests whose "METHOD path?query" holds the regex `match`.

    Exactly one of: `status` (answered with this status, nothing done), `drop="before"` (the
    connection closed, nothing done), `drop="after"` (done, then closed without an answer) and
    `cut` (done, but closed after so many bytes of the answer's body).
    """

    match: str
    status: int | None = None
    drop: Literal["before", "after"] | None = None
    cut: int | None = None
    count: int = 1

    def __post_init__(self) -> None:
        if [self.status, self.drop, self.cut].count(None) != 2:
            raise ValueError(f"a fault needs exactly one of status, drop and cut: {self}")


class HttpServer:
    """A server with a thread per connection, from `start` (or `with`) to `stop`. A subclass answers."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self._choosing = threading.Lock()
        self._listener = _Listener(("127.0.0.1", 0), _Handler, bind_and_activate=False)
        self._listener.owner = self

    def answer(self, request: Request) -> Reply:
        raise NotImplementedError

    def failure(self, status: int) -> Reply:
        """An injected error, in the words of the store."""
        return Reply(status)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._listener.server_address[1]}"

    def start(self) -> Self:
        self._listener.server_bind()
        self._listener.server_activate()
        threading.Thread(
            target=self._listener.serve_forever, args=(0.01,), name=type(self).__name__, daemon=True
        ).start()
        return self

    def stop(self) -> None:
        self._listener.shutdown()
        self._listener.server_close()

    def reset(self) -> None:
        """Forget the log and the faults, not the objects."""
        self.log.clear()
        self.faults.clear()

    def fault_for(self, request: Request) -> Fault | None:
        """The first fault with something left that fits the request, which is written to the log."""
        with self._choosing:
            self.log.append(str(request))
            for fault in self.faults:
                if fault.count > 0 and re.search(fault.match, str(request)):
                    fault.count -= 1
                    return fault
        return None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    owner: HttpServer

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that hung up; anything else is a mistake in a test server."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True
    server: _Listener

    def log_message(self, format: str, *args: object) -> None:
        """The log is a list on the server, not lines on stderr."""

    def handle_expect_100(self) -> bool:
        """Botocore sends no body before it hears that it may."""
        going_on = super().handle_expect_100()
        self.wfile.flush()
        return going_on

    def do_GET(self) -> None:
        request = Request(self.command, self.path, self.headers, self._read_body())
        owner = self.server.owner
        fault = owner.fault_for(request)
        if fault is not None and fault.drop == "before":
            self.close_connection = True
            return
        reply = owner.failure(fault.status) if fault is not None and fault.status else owner.answer(request)
        if fault is not None and fault.drop == "after":
            self.close_connection = True
            return
        self._send(reply, fault.cut if fault is not None else None)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = do_GET  # noqa: N815 (names that http.server looks for)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = bytearray()
        while size := int(self.rfile.readline().partition(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return bytes(body)

    def _send(self, reply: Reply, cut: int | None) -> None:
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if cut is not None:
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(reply.body[:cut])
