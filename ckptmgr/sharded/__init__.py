"""How does state that is sharded over ranks become a checkpoint, and come back on other ranks?

DCP's planners say who writes and reads what; the bytes go through our stores, with digests, one commit, and
no pickle on the way back.
"""

from __future__ import annotations
