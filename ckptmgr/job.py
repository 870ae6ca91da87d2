"""Which ranks take part in a call? Those of this job, found at the first one; rank 0 alone once they are lost."""

from __future__ import annotations

from .coordinator import Coordinator, Solo, find_coordinator
from .errors import CoordinationError


class Job:
    """The ranks that make the calls of one manager. `name` is the same on all of them; `timeout_s` is how long
    any rank may keep the others waiting."""

    def __init__(self, name: str, timeout_s: float) -> None:
        self._name, self._timeout_s = name, timeout_s
        self._ranks: Coordinator | None = None

    @property
    def is_known(self) -> bool:
        """Whether the first call was made."""
        return self._ranks is not None

    @property
    def is_alone(self) -> bool:
        """Whether there is, or has been asked, no other rank."""
        return self._ranks is None or self._ranks.world_size == 1

    def ranks(self) -> Coordinator:
        """All of them. The first call finds them, so every rank has to make it. Blocks."""
        if self._ranks is None:
            self._ranks = find_coordinator(self._name, self._timeout_s)
        return self._ranks

    def check(self) -> None:
        """Raises `CoordinationError` when they do not answer any more."""
        if self._ranks is not None and self._ranks.problem is not None:
            problem = self._ranks.problem
            raise CoordinationError(f"{problem} (the ranks are not asked any more: restart the job to go on)")

    def for_save(self) -> Coordinator:
        """Those that make a save: rank 0 alone, in an emergency, when the others are lost."""
        ranks = self.ranks()
        return ranks if ranks.problem is None or self.is_left_out else Solo()

    @property
    def is_lost(self) -> bool:
        """Whether the ranks have lost each other."""
        return self._ranks is not None and self._ranks.problem is not None

    @property
    def is_left_out(self) -> bool:
        """Whether they have, and this is not the one that can still save alone."""
        return self.is_lost and self.ranks().rank > 0

    def close(self) -> None:
        """Let go of the others. Blocks for some seconds at most."""
        if self._ranks is not None:
            self._ranks.close()
