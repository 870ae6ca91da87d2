"""Checkpoints for PyTorch training loops that are never half-written, lost, or silently wrong."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    AlreadyExistsError,
    CheckpointError,
    ConfigError,
    CoordinationError,
    DamagedError,
    DeletedMeanwhileError,
    FencedError,
    FormatVersionError,
    NotFoundError,
    RankError,
    SaveFailedError,
    StateMismatchError,
    StoreError,
    StoreFullError,
)

__version__ = "0.1.0"

# Loaded on first use: what needs torch, pydantic or fsspec, so that importing ckptmgr costs nothing.
_LAZY = {
    "BestConfig": "config",
    "CheckpointConfig": "config",
    "CheckpointInfo": "manifest",
    "CheckpointManager": "manager",
    "Decision": "triggers",
    "KeepConfig": "config",
    "Manifest": "manifest",
    "Moment": "triggers",
    "Pending": "background",
    "Plan": "retention",
    "PerRankReport": "resumption",
    "Resumed": "resumption",
    "SaveConfig": "config",
    "Store": "store",
    "StoreReader": "sharded.reader",
    "StoreWriter": "sharded.writer",
    "WarmStarted": "weights",
    "load_file": "direct",
    "open_store": "store",
    "plain_errors": "sharded.plain",
    "per_rank": "state",
    "reader": "direct",
    "safe_open": "direct",
    "save_file": "direct",
    "warm_start": "weights",
    "writer": "direct",
}

if TYPE_CHECKING:
    from .background import Pending
    from .config import BestConfig, CheckpointConfig, KeepConfig, SaveConfig
    from .direct import load_file, reader, safe_open, save_file, writer
    from .manager import CheckpointManager
    from .manifest import CheckpointInfo, Manifest
    from .resumption import PerRankReport, Resumed
    from .retention import Plan
    from .sharded.plain import plain_errors
    from .sharded.reader import StoreReader
    from .sharded.writer import StoreWriter
    from .state import per_rank
    from .store import Store, open_store
    from .triggers import Decision, Moment
    from .weights import WarmStarted, warm_start

__all__ = [
    # The manager and what it answers
    "CheckpointManager",
    "Pending",
    "Resumed",
    "Decision",
    "Moment",
    "Plan",
    "CheckpointInfo",
    "Manifest",
    # Many ranks
    "per_rank",
    "PerRankReport",
    # Configuration
    "CheckpointConfig",
    "SaveConfig",
    "KeepConfig",
    "BestConfig",
    # Weights from elsewhere
    "warm_start",
    "WarmStarted",
    # Files anywhere, one line each
    "writer",
    "reader",
    "save_file",
    "load_file",
    "safe_open",
    # torch.distributed.checkpoint anywhere
    "StoreWriter",
    "StoreReader",
    "plain_errors",
    # Stores
    "Store",
    "open_store",
    # Errors
    "CheckpointError",
    "ConfigError",
    "NotFoundError",
    "DeletedMeanwhileError",
    "AlreadyExistsError",
    "DamagedError",
    "FormatVersionError",
    "StateMismatchError",
    "StoreError",
    "StoreFullError",
    "FencedError",
    "SaveFailedError",
    "CoordinationError",
    "RankError",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ckptmgr' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
