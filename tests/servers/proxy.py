"""How does a server misbehave that cannot be told to? Through a proxy that breaks its answers.

with Proxy(server_url) as proxy:
    proxy.faults.append(Fault(r"PUT /bucket/key", drop="after"))    # the store did it, the client hears nothing
"""

from __future__ import annotations

from http.client import HTTPConnection
from urllib.parse import urlsplit

from .faults import HttpServer, Reply, Request

__all__ = ["Proxy"]

_OF_ONE_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade"}


class Proxy(HttpServer):
    """Passes every request on to `target`, with the Host header that the client sent."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self._target = urlsplit(target).netloc

    def answer(self, request: Request) -> Reply:
        connection = HTTPConnection(self._target)
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
