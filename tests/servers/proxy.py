"""How does a server misbehave that cannot be told to? Through the proxy of `ckptmgr.testing`."""

from __future__ import annotations

from ckptmgr.testing.fault_proxy import FaultProxy

__all__ = ["Proxy"]

Proxy = FaultProxy
