"""How fast are saves and resumes on this machine and this storage, beside others and beside what is possible?

Every measurement is a process of its own, so that no memory, cache or import of one contender helps or
hinders the next. The process that plans them and reports never imports torch.
"""

from __future__ import annotations

from .report import Report
from .session import BUILT_IN, check_fits, measure
from .tasks import Contender, Outcome, Place, Task

__all__ = ["BUILT_IN", "Contender", "Outcome", "Place", "Report", "Task", "check_fits", "measure"]
