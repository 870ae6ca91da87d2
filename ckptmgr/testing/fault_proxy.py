"""What does a program do when its network fails? Put a proxy before the server, and break what passes.

with FaultProxy("http://127.0.0.1:9000") as proxy:
    store = open_store("s3://bucket/runs", {"endpoint_url": proxy.url, ...})
    proxy.faults.append(HttpFault(r"PUT /bucket/.*manifest", drop="after"))  # the store did it, nobody hears of it
    proxy.before = lambda request: server.kill() if "uploadId" in request.query else None
    ...
    assert proxy.faults[0].count == 0  # it happened
    assert proxy.log == ["PUT /bucket/runs/step-1/manifest.json", ...]
"""

from __future__ import annotations

from http.client import HTTPConnection, HTTPSConnection
from urllib.parse import urlsplit

from .http_server import HttpFault, HttpServer, Reply, Request

__all__ = ["FaultProxy", "HttpFault", "Reply", "Request"]

_OF_ONE_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"}
_ANSWERS_WITHIN_S = 120


class FaultProxy(HttpServer):
    """Passes every request on to the server at `target_url`, with the Host header that the client sent, as it
    may be part of a signature. It listens on 127.0.0.1 only, at `url`, from `start` (or `with`) to `stop`; it
    holds bodies in memory, and one request at a time of each connection. When the target can't be reached,
    the client's connection is closed without an answer.

    `faults`, `log` and the hooks `before` and `after` are those of `HttpServer`.
    """

    def __init__(self, target_url: str) -> None:
        super().__init__()
        self._target = urlsplit(target_url)

    def answer(self, request: Request) -> Reply:
        kind = HTTPSConnection if self._target.scheme == "https" else HTTPConnection
        connection = kind(self._target.netloc, timeout=_ANSWERS_WITHIN_S)
        try:
            connection.putrequest(request.method, request.target, skip_host=True, skip_accept_encoding=True)
            for name, value in request.headers.items():
                if name.lower() not in {*_OF_ONE_CONNECTION, "content-length", "expect"}:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(request.body)))
            connection.endheaders(request.body)
            with connection.getresponse() as answer:
                headers = {name: value for name, value in answer.getheaders() if name.lower() not in _OF_ONE_CONNECTION}
                return Reply(answer.status, answer.read(), headers)
        finally:
            connection.close()
