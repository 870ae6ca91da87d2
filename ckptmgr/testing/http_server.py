"""How does an HTTP server answer on 127.0.0.1, remember what it was asked, and fail when told to?

class Echo(HttpServer):
    def answer(self, request: Request) -> Reply:
        return Reply(200, request.body)

with Echo() as server:
    server.faults.append(HttpFault(r"POST /upload", status=503, count=2))   # the next two answer 503
    server.faults.append(HttpFault(r"PUT .*manifest", drop="after"))        # done, but nobody hears of it
    ...
    assert server.log == ["POST /upload?kind=media", ...]
"""

from __future__ import annotations

import os
import re
import socket
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Literal, NoReturn, Self
from urllib.parse import parse_qsl, urlsplit

__all__ = ["HttpFault", "HttpServer", "Reply", "Request"]

_RESET_AT_ONCE = struct.pack("hh" if os.name == "nt" else "ii", 1, 0)  # SO_LINGER: a close sends RST, not FIN
_GARBAGE = b"\x16\x03\x01 this is not HTTP\r\n\r\n"
_FAULTS = ("status", "drop", "reset", "stall", "cut", "wrong_length", "delay_s", "garbage")


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
class HttpFault:
    """What goes wrong with the next `count` requests whose "METHOD path?query" holds the regex `match`, when
    `skip` of them have passed.

    Exactly one of these; `count` goes down as it strikes, so 0 says that it all happened (an answer that
    has no bytes to lose goes out as it is, and the next one is struck):

    - `status`: nothing is done and this is answered, with `body` and `headers`
    - `drop`: the connection is closed without an answer, "before" it is done or "after"
    - `reset`: the same by a TCP reset: "before" the request is read, in the middle of its "body" (nothing
      is done in either case), or, done, in the middle of the "answer"
    - `stall`: silence until the client gives up or the server is stopped, "before" it is done or "after"
    - `cut`: done, but the connection ends after so many bytes of the answer's body
    - `wrong_length`: done, but the answer's Content-Length is wrong by so many bytes, and the connection
      ends after the body: a negative one is an answer that lacks its end without showing it
    - `delay_s`: done so many seconds late
    - `garbage`: done, but answered with bytes that are no HTTP
    """

    match: str
    status: int | None = None
    drop: Literal["before", "after"] | None = None
    reset: Literal["before", "body", "answer"] | None = None
    stall: Literal["before", "after"] | None = None
    cut: int | None = None
    wrong_length: int | None = None
    delay_s: float | None = None
    garbage: bool | None = None
    count: int = 1
    skip: int = 0
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if sum(getattr(self, name) is not None for name in _FAULTS) != 1:
            raise ValueError(f"a fault needs exactly one of {', '.join(_FAULTS)}: {self}")


class HttpServer:
    """A server with a thread per connection, from `start` (or `with`) to `stop`. A subclass answers.

    `before` is called with every request before it is answered, and answers it itself where it returns a
    `Reply`; `after` is called when it was answered, before the client hears of it. Either may be replaced,
    and is called in the thread of the connection. `log` has every request as "METHOD path?query".
    """

    def __init__(self) -> None:
        self.faults: list[HttpFault] = []
        self.log: list[str] = []
        self.before: Callable[[Request], Reply | None] = lambda request: None
        self.after: Callable[[Request], object] = lambda request: None
        self._choosing = threading.Lock()
        self._stopping = threading.Event()
        self._listener = _Listener(("127.0.0.1", 0), _Handler, bind_and_activate=False)
        self._listener.owner = self

    def answer(self, request: Request) -> Reply:
        raise NotImplementedError

    def failure(self, status: int) -> Reply:
        """An injected error without a body of its own, in the words of the store."""
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
        """End every connection, and wait for their threads."""
        self._stopping.set()
        self._listener.shutdown()
        self._listener.server_close()
        self._listener.end_connections()

    def reset(self) -> None:
        """Forget the log, the faults and the hooks, not the objects."""
        self.log.clear()
        self.faults.clear()
        self.before = self.after = lambda request: None

    def fault_for(self, request: str) -> HttpFault | None:
        """The first fault with something left that fits the "METHOD path?query", which is written to the log."""
        with self._choosing:
            self.log.append(request)
            for fault in self.faults:
                if fault.count > 0 and re.search(fault.match, request):
                    if fault.skip == 0:
                        fault.count -= 1
                        return fault
                    fault.skip -= 1
        return None

    def give_back(self, fault: HttpFault) -> None:
        """It had nothing to strike."""
        with self._choosing:
            fault.count += 1

    def wait(self, seconds: float) -> None:
        """Let time pass, but no longer than until `stop`."""
        self._stopping.wait(seconds)

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

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._connections: dict[threading.Thread, Any] = {}

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        thread = threading.current_thread()
        self._connections[thread] = request
        try:
            super().process_request_thread(request, client_address)
        finally:
            del self._connections[thread]

    def end_connections(self) -> None:
        for thread, connection in list(self._connections.items()):
            with suppress(OSError):  # it may have ended by itself
                connection.shutdown(socket.SHUT_RDWR)
            thread.join()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that hung up; anything else is a mistake in a server."""
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
        owner = self.server.owner
        fault = owner.fault_for(f"{self.command} {self.path}")
        if fault is not None and fault.reset == "before":
            self._reset()
        if fault is not None and fault.reset == "body":
            self.rfile.read(int(self.headers.get("Content-Length") or 0) // 2)
            self._reset()
        request = Request(self.command, self.path, self.headers, self._read_body())
        if fault is None:
            self._send(self._answer(request))
        elif fault.status is not None:
            reply = owner.failure(fault.status) if fault.body is None else Reply(fault.status, fault.body)
            self._send(Reply(reply.status, reply.body, {**reply.headers, **fault.headers}))
        elif fault.drop == "before" or fault.stall == "before":
            self._go_silent(fault)
        else:
            owner.wait(fault.delay_s or 0)
            self._spoil(self._answer(request), fault)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = do_GET  # noqa: N815 (names that http.server looks for)

    def _answer(self, request: Request) -> Reply:
        owner = self.server.owner
        reply = owner.before(request) or owner.answer(request)
        owner.after(request)
        return reply

    def _spoil(self, reply: Reply, fault: HttpFault) -> None:
        """Send the answer as the fault lets it through."""
        if self._is_proof(reply, fault):
            self.server.owner.give_back(fault)
            self._send(reply)
        elif fault.drop or fault.stall:
            self._go_silent(fault)
        elif fault.reset:
            self._send(reply, len(reply.body) // 2)
            self._reset()
        elif fault.garbage:
            self.close_connection = True
            self.wfile.write(_GARBAGE)
        elif fault.wrong_length is not None:
            length = int(reply.headers.get("Content-Length", len(reply.body))) + fault.wrong_length
            headers = {name: value for name, value in reply.headers.items() if name.lower() != "content-length"}
            length = max(0, length)
            self._send(Reply(reply.status, reply.body[:length], {**headers, "Content-Length": str(length)}))
            self.close_connection = True
        else:
            self._send(reply, fault.cut)

    def _is_proof(self, reply: Reply, fault: HttpFault) -> bool:
        """Whether an answer, such as one without a body, is the same after the fault."""
        size = 0 if self.command == "HEAD" else len(reply.body)
        if fault.cut is not None:
            return size <= fault.cut
        if fault.wrong_length is not None:  # of HEAD it would be the size of the object, which no network changes
            return self.command == "HEAD" or (fault.wrong_length < 0 and size == 0)
        return False

    def _go_silent(self, fault: HttpFault) -> None:
        self.close_connection = True
        if fault.stall:
            self.connection.settimeout(None)
            self.connection.recv(1)  # answers when the client hangs up, or when the server does

    def _reset(self) -> NoReturn:
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_ONCE)
        for each in (self.rfile, self.wfile, self.connection):  # the last one closes it
            each.close()
        raise ConnectionResetError

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

    def _send(self, reply: Reply, cut: int | None = None) -> None:
        self.send_response(reply.status)
        for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if cut is not None:
            self.close_connection = True
        if self.command != "HEAD":
            self.wfile.write(reply.body[:cut])
