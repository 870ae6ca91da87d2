"""Which parts help to test code that uses this library? Stores that crash, wait or forget, what any must hold, ranks.

`StoreContract` and `FormatContract` need pytest; the rest of this package does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .corruption import Corruption, corruptions
from .crash_points import CrashPoints, JobError
from .fault_proxy import FaultProxy
from .http_server import HttpFault
from .memory_files import MemoryFiles
from .memory_store import MemoryStore
from .pausing_store import PausingStore
from .power_loss import DiskState, PowerLoss
from .stores import Crash, CrashingStore, SlowStore
from .system_calls import Call, SystemCalls
from .thread_circle import ThreadCircle
from .thread_ranks import ThreadRanks

if TYPE_CHECKING:
    from .format_contract import FormatContract
    from .store_contract import StoreContract

__all__ = [
    "Call",
    "Corruption",
    "Crash",
    "CrashPoints",
    "CrashingStore",
    "DiskState",
    "FaultProxy",
    "FormatContract",
    "HttpFault",
    "JobError",
    "MemoryFiles",
    "MemoryStore",
    "PausingStore",
    "PowerLoss",
    "SlowStore",
    "StoreContract",
    "SystemCalls",
    "ThreadCircle",
    "ThreadRanks",
    "corruptions",
]


def __getattr__(name: str) -> Any:
    if name == "StoreContract":
        from .store_contract import StoreContract

        return StoreContract
    if name == "FormatContract":
        from .format_contract import FormatContract

        return FormatContract
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
