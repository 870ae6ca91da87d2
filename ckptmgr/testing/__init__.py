"""Which parts help to test code that uses this library? Stores that crash, wait or forget; what any store must hold.

`StoreContract` needs pytest; the rest of this package does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .stores import Crash, CrashingStore, MemoryStore, SlowStore

if TYPE_CHECKING:
    from .store_contract import StoreContract

__all__ = ["Crash", "CrashingStore", "MemoryStore", "SlowStore", "StoreContract"]


def __getattr__(name: str) -> Any:
    if name == "StoreContract":
        from .store_contract import StoreContract

        return StoreContract
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
