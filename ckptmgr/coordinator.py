"""Who else takes part in a save? The ranks of a job, behind one small protocol.

This version coordinates one process. "No process group" is an object, not an `if`.
"""

from __future__ import annotations

import sys
from typing import Protocol

from .errors import CoordinationError


class Coordinator(Protocol):
    """The ranks that make the same calls."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...


class Solo:
    """One process, which is rank 0 of 1."""

    rank = 0
    world_size = 1


def find_coordinator() -> Coordinator:
    """The coordinator for this process. Raises `CoordinationError` in a job of several ranks,
    where every rank would take itself for the writer."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        world_size = torch.distributed.get_world_size()
        if world_size > 1:
            raise CoordinationError(
                f"this version of ckptmgr coordinates one process, and torch.distributed has {world_size} ranks; "
                "create the manager on rank 0 only, before init_process_group"
            )
    return Solo()
