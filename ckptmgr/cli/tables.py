"""How does a checkpoint look on a terminal, and how in JSON?"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import click

from ..manifest import CheckpointInfo

_COLORS = {"damaged": "red", "missing": "red", "unhealthy": "yellow", "drop": "red"}
_METRICS = 3  # shown in a table


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(titles: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Aligned columns, those named in `right` to the right; a column without any text is left out.

    rich lays out a thousand rows in most of a second; this has to answer at once.
    """
    cells = [[plain(cell) for cell in row] for row in rows]
    shown = [column for column in range(len(titles)) if any(row[column] for row in cells)]
    widths = {column: max(len(titles[column]), *(len(row[column]) for row in cells)) for column in shown}

    def line(row: Sequence[str], *, is_title: bool = False) -> str:
        parts = []
        for column in shown:
            cell = row[column]
            if titles[column] in right:
                padded = cell.rjust(widths[column])
            else:
                padded = cell if column == shown[-1] else cell.ljust(widths[column])
            if is_title:
                padded = click.style(padded, bold=True)
            elif cell in _COLORS:
                padded = click.style(padded, fg=_COLORS[cell])
            parts.append(padded)
        return "  ".join(parts).rstrip()  # of a last cell that is empty

    click.echo("\n".join([line(titles, is_title=True), *map(line, cells)]))


def plain(text: str) -> str:
    """Text from a checkpoint without what would steer the terminal."""
    return text if text.isprintable() else "".join(char if char.isprintable() else "?" for char in text)


def size_text(size: int) -> str:
    """Bytes for people, in powers of 1024."""
    amount, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if amount < 1024 or unit == "PiB":
            break
        amount /= 1024
    return f"{size} B" if unit == "B" else f"{amount:.1f} {unit}"


def age_text(age: timedelta) -> str:
    """How long ago, in the largest unit of which two have passed."""
    seconds = max(0, int(age.total_seconds()))
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit} ago"
    return f"{seconds} s ago"


def count_text(count: int, noun: str = "checkpoint") -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def metrics_text(metrics: Mapping[str, float]) -> str:
    shown = [f"{name}={value:.4g}" for name, value in list(metrics.items())[:_METRICS]]
    return " ".join([*shown, *([f"+{len(metrics) - _METRICS}"] if len(metrics) > _METRICS else [])])


def state_of(info: CheckpointInfo) -> str:
    """`ok`, `unhealthy` (holds NaN or infinity) or `damaged`."""
    if info.damaged is not None or info.manifest is None:
        return "damaged"
    return "ok" if info.manifest.healthy else "unhealthy"


def size_of(info: CheckpointInfo) -> int:
    return info.manifest.size if info.manifest else 0


def marks_text(info: CheckpointInfo, now: datetime) -> str:
    """Tags, and whether it is pinned."""
    return " ".join([*info.tags, *(["pinned"] if any(pin.holds(now) for pin in info.pins) else [])])


def age_of(info: CheckpointInfo, now: datetime) -> str:
    return age_text(now - info.manifest.time.astimezone(UTC)) if info.manifest else ""


def record(info: CheckpointInfo, url: str) -> dict[str, Any]:
    """A checkpoint for JSON: all that a listing knows."""
    found: dict[str, Any] = {
        "step": info.step,
        "name": info.name,
        "url": url,
        "state": state_of(info),
        "damage": info.damaged,
        "tags": list(info.tags),
        "pins": [
            {"tag": pin.tag, "expires": None if pin.expires is None else pin.expires.isoformat()} for pin in info.pins
        ],
    }
    manifest = info.manifest
    if manifest is None:
        return found
    return found | {
        "epoch": manifest.epoch,
        "time": manifest.time.isoformat(),
        "size": manifest.size,
        # JSON has no NaN: such a value is a text, as in the manifest.
        "metrics": {name: value if math.isfinite(value) else repr(value) for name, value in manifest.metrics.items()},
        "healthy": manifest.healthy,
        "run": manifest.run,
        "attempt": manifest.attempt,
        "parent": manifest.parent,
        "format": manifest.format,
        "world_size": manifest.world_size,
    }
