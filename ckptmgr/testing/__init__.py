"""Which parts help to test code that uses this library? Stores that crash, wait or forget, what any must hold, ranks.

`StoreContract` and `FormatContract` need pytest; the rest of this package does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .memory_files import MemoryFiles
from .memory_store import MemoryStore
from .stores import Crash, CrashingStore, SlowStore
from .thread_circle import ThreadCircle
from .thread_ranks import ThreadRanks

if TYPE_CHECKING:
    from .format_contract import FormatContract
    from .store_contract import StoreContract

__all__ = [
    "Crash",
    "CrashingStore",
    "FormatContract",
    "MemoryFiles",
    "MemoryStore",
    "SlowStore",
    "StoreContract",
    "ThreadCircle",
    "ThreadRanks",
]


def __getattr__(name: str) -> Any:
    if name == "StoreContract":
        from .store_contract import StoreContract

        return StoreContract
    if name == "FormatContract":
        from .format_contract import FormatContract

        return FormatContract
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
