"""Which texts must no message show? Those of a store's URL, those of the environment, and
what storage options name as a secret, however deep, whole and in parts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

_SECRET = re.compile("secret|token|pass|key|sas|credential|connection|auth|cookie|signature", re.IGNORECASE)
_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "OSS_ACCESS_KEY_SECRET", "OSS_SESSION_TOKEN")
_SHORTEST = 4  # characters; less is no secret, and is found in every word


def secrets_of(value: Any, name: str = "") -> Iterator[str]:
    """Those of options, or of the one called `name`; of "AccountKey=...;..." or "Bearer ..." also the parts."""
    if isinstance(value, Mapping):
        for inner, one in value.items():
            yield from secrets_of(one, str(inner))
    elif isinstance(value, list | tuple):
        for one in value:
            yield from secrets_of(one, name)
    elif isinstance(value, int) and not isinstance(value, bool):  # as YAML takes a password of digits
        yield from secrets_of(str(value), name)
    elif isinstance(value, str) and len(value) >= _SHORTEST and _SECRET.search(name):
        yield value
        for part in re.split(r"[;,\s]+", value):
            first, sign, last = part.partition("=")
            text = last if sign and _SECRET.search(first) else "" if sign else first
            if len(text) >= _SHORTEST and text != value:
                yield text


def secrets_of_environment() -> Iterator[str]:
    """Those that client libraries look for themselves."""
    for name in _VARIABLES:
        yield from secrets_of(os.environ.get(name, ""), name)


def passwords(url: str) -> Iterator[str]:
    """The secret that a URL carries, if it does, as it stands there and as it is meant."""
    if password := urlsplit(url).password:
        yield from {password, unquote(password)}
