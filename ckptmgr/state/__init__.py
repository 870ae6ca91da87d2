"""What is the state of a training loop? Capturing live objects, and restoring them.

Names are loaded on first use: importing this package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .capturing import capture, holds_sharded
    from .health import non_finite
    from .pickled import PickleWarning
    from .ranks import PerRank, is_per_rank, per_rank
    from .recorder import Recorder
    from .restore import RestorePlan, match, materialize, unclaimed
    from .rng import RngReport, capture_rng, derive_rng, restore_rng

__all__ = [
    "PerRank",
    "PickleWarning",
    "Recorder",
    "RestorePlan",
    "RngReport",
    "capture",
    "capture_rng",
    "derive_rng",
    "holds_sharded",
    "is_per_rank",
    "match",
    "materialize",
    "non_finite",
    "per_rank",
    "restore_rng",
    "unclaimed",
]

_HOMES = {
    "capturing": ("capture", "holds_sharded"),
    "health": ("non_finite",),
    "pickled": ("PickleWarning",),
    "ranks": ("PerRank", "is_per_rank", "per_rank"),
    "recorder": ("Recorder",),
    "restore": ("RestorePlan", "match", "materialize", "unclaimed"),
    "rng": ("RngReport", "capture_rng", "derive_rng", "restore_rng"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{home}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
