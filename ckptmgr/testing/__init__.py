"""Which parts help to test code that uses this library? Stores that crash, wait or forget, and what any must hold.

`StoreContract` and `FormatContract` need pytest; the rest of this package does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .memory_files import MemoryFiles
from .memory_store import MemoryStore
from .stores import Crash, CrashingStore, SlowStore

if TYPE_CHECKING:
    from .format_contract import FormatContract
    from .store_contract import StoreContract

__all__ = ["Crash", "CrashingStore", "FormatContract", "MemoryFiles", "MemoryStore", "SlowStore", "StoreContract"]


def __getattr__(name: str) -> Any:
    if name == "StoreContract":
        from .store_contract import StoreContract

        return StoreContract
    if name == "FormatContract":
        from .format_contract import FormatContract

        return FormatContract
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
