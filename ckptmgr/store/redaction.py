"""Which texts must no message show? What storage options name as a secret, however deep, whole and in parts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_SECRET = re.compile("secret|token|pass|key|sas|credential|connection|auth|cookie|signature", re.IGNORECASE)
_SHORTEST = 4  # characters; less is no secret, and is found in every word


def secrets_of(value: Any, name: str = "") -> Iterator[str]:
    """Those of options, or of the one called `name`; of "AccountKey=...;..." or "Bearer ..." also the parts."""
    if isinstance(value, Mapping):
        for inner, one in value.items():
            yield from secrets_of(one, str(inner))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from secrets_of(one, name)
    elif isinstance(value, str) and len(value) >= _SHORTEST and _SECRET.search(name):
        yield value
        for part in re.split(r"[;,\s]+", value):
            first, sign, last = part.partition("=")
            text = last if sign and _SECRET.search(first) else "" if sign else first
            if len(text) >= _SHORTEST and text != value:
                yield text
