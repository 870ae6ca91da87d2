"""How does a server misbehave that cannot be told to? Through the proxy of `ckptmgr.testing`."""

from __future__ import annotations

from ckptmgr.testing.fault_proxy import FaultProxy, Reply, Request

__all__ = ["Proxy", "knows_no_conditions"]

Proxy = FaultProxy

_NOT_IMPLEMENTED = (
    b"<Error><Code>NotImplemented</Code>"
    b"<Message>A header you provided implies functionality that is not implemented.</Message></Error>"
)


def knows_no_conditions(proxy: Proxy, status: int = 501, body: bytes = _NOT_IMPLEMENTED) -> None:
    """Make a server of S3 one of those that refuse a conditional write, in these words."""

    def refuse(request: Request) -> Reply | None:
        return Reply(status, body) if "If-None-Match" in request.headers else None

    proxy.before = refuse
