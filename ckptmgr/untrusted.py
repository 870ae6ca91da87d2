"""What of a file that anybody may have written can be believed? Whole numbers, times and names within bounds.

Pure: no I/O, no clock, no environment, no torch. Everything here raises `ValueError`.
"""

from __future__ import annotations

import json
import re
from datetime import datetime
from typing import Any

MAX_RECORD_SIZE = 64 << 10  # bytes; more is no pin, mark, claim or heartbeat

# A checkpoint's folder in a record's name: one part of a path, that leads nowhere else on any system.
FOLDER_NAME = r"[^./\\:\x00-\x1f\x7f\ud800-\udfff][^/\\:\x00-\x1f\x7f\ud800-\udfff]*"

_MOST = (1 << 63) - 1
_NONCE = re.compile(r"[0-9A-Za-z]{0,64}")
# So that no arithmetic with a time ends outside of what a datetime can be.
_FIRST_YEAR, _LAST_YEAR = 1970, 9000


def parse(data: bytes) -> Any:
    """The value of some JSON."""
    try:
        return json.loads(data)
    except RecursionError as exc:
        raise ValueError("it is nested too deep") from exc


def whole(value: Any) -> int:
    """A whole number of 0 or more, and of at most 64 bits: a longer one may take hours to be printed."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= _MOST:
        raise ValueError(f"{_short(value)} is not a whole number")
    return value


def moment(value: Any) -> datetime:
    """A time with its zone."""
    if not isinstance(value, str):
        raise ValueError(f"{_short(value)} is not a time")
    found = datetime.fromisoformat(value)
    if found.tzinfo is None or not _FIRST_YEAR <= found.year <= _LAST_YEAR:
        raise ValueError(f"{value!r:.60} is not a time of these centuries with its zone")
    return found


def nonce(value: Any) -> str:
    """The nonce of a save, which stands in names of files."""
    if not isinstance(value, str) or not _NONCE.fullmatch(value):
        raise ValueError(f"{_short(value)} is not a nonce")
    return value


def _short(value: Any) -> str:
    # Python refuses to print a number of more than 4,300 digits.
    return "a number of many digits" if isinstance(value, int) and abs(value) > _MOST else f"{value!r:.60}"
