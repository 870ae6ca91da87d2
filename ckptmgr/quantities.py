"""How long, how large? Durations such as `30m` and sizes such as `64MiB`, read and written.

Pure: no I/O, no clock, no environment, no torch.
"""

from __future__ import annotations

import re
from datetime import timedelta
from decimal import Decimal
from typing import Any

_MICROSECONDS = {"ms": 1_000, "s": 1_000_000, "m": 60_000_000, "h": 3_600_000_000, "d": 86_400_000_000}
_BYTES = {
    "B": 1,
    **{f"{letter}B": 1000**power for power, letter in enumerate("KMGTP", start=1)},
    **{f"{letter}iB": 1024**power for power, letter in enumerate("KMGTP", start=1)},
}
_BYTES_ANY_CASE = {unit.lower(): count for unit, count in _BYTES.items()}

DURATION_PATTERN = r"^\d+(\.\d+)?\s*(ms|s|m|h|d)?$"
SIZE_PATTERN = r"^\d+(\.\d+)?\s*([KMGTPkmgtp]?[Bb]|[KMGTPkmgtp][Ii][Bb])?$"
MAX_DURATION = timedelta(days=100_000)  # 273 years: no arithmetic with it, and no wait of Python's, overflows
DURATION_HELP = "a time above 0 such as 500ms, 0.5s, 30m, 1.5h or 2d; a plain number is in seconds"
_TOO_LONG = f"must be at most {MAX_DURATION.days}d (about 270 years); give a shorter time"
SIZE_HELP = "a size above 0 such as 64MiB, 500GB or 1TB; a plain number is in bytes"


def parse_duration(value: Any) -> timedelta:
    """A duration above 0, and of at most `MAX_DURATION`, from text, a number of seconds, or a timedelta. Raises
    `ValueError`."""
    if isinstance(value, timedelta):
        duration = value
    else:
        number, unit = _split(value, DURATION_PATTERN, DURATION_HELP)
        try:
            duration = timedelta(microseconds=round(number * _MICROSECONDS[unit or "s"]))
        except OverflowError as exc:
            raise ValueError(_TOO_LONG) from exc
    if duration <= timedelta(0):
        raise ValueError(f"must be {DURATION_HELP}")
    if duration > MAX_DURATION:
        raise ValueError(_TOO_LONG)
    return duration


def format_duration(duration: timedelta) -> str:
    """The shortest text that `parse_duration` reads back as the same duration."""
    microseconds = duration // timedelta(microseconds=1)
    for unit, length in reversed(_MICROSECONDS.items()):
        if microseconds % length == 0:
            return f"{microseconds // length}{unit}"
    return f"{Decimal(microseconds).scaleb(-6):f}s"


def parse_size(value: Any) -> int:
    """Bytes, at least 1, from text or a number. Raises `ValueError`."""
    number, unit = _split(value, SIZE_PATTERN, SIZE_HELP)
    size = int(number * _BYTES_ANY_CASE[(unit or "B").lower()])
    if size < 1:
        raise ValueError(f"must be {SIZE_HELP}")
    return size


def format_size(size: int) -> str | int:
    """The shortest form that `parse_size` reads back as the same size."""
    fitting = [(size // count, unit) for unit, count in _BYTES.items() if count > 1 and size % count == 0]
    if not fitting:
        return size
    number, unit = min(fitting)
    return f"{number}{unit}"


def _split(value: Any, pattern: str, allowed: str) -> tuple[Decimal, str | None]:
    text = f"{Decimal(str(value)):f}" if isinstance(value, int | float) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not re.match(pattern, text := text.strip(), re.ASCII):
        raise ValueError(f"must be {allowed}")
    number = re.match(r"[\d.]+", text)
    assert number is not None
    return Decimal(number[0]), text[number.end() :].strip() or None
