"""How does a test server answer, remember what it was asked, and fail when told to? As `ckptmgr.testing` does it."""

from __future__ import annotations

from ckptmgr.testing.http_server import HttpFault, HttpServer, Reply, Request

__all__ = ["Fault", "HttpServer", "Reply", "Request"]

Fault = HttpFault
