"""Which process holds a root, and does it still live? As another one, on this host or elsewhere, can tell."""

from __future__ import annotations

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import FencedError
from .manifest import digest
from .untrusted import parse as parse_json
from .untrusted import whole


def me() -> dict[str, Any]:
    """This process, as another one on any host can recognise it."""
    return {
        "host": socket.gethostname(),
        "space": process_space(),
        "pid": os.getpid(),
        "born": _life(os.getpid())[1],
        "since": datetime.now(UTC).isoformat(),
    }


def process_space() -> str:
    """Equal for two processes exactly when they can see each other's pids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def is_me(owner: dict[str, Any]) -> bool:
    """Whether it is this very process."""
    return owner.get("pid") == os.getpid() and owner.get("space") == process_space() and _is_born_as(owner)


def is_alive(owner: dict[str, Any]) -> bool | None:
    """Whether the process lives, frozen or not; None for one that can't be seen from here."""
    if owner.get("space") != process_space():
        return None
    try:
        pid = whole(owner.get("pid"))
        os.kill(pid, 0)
    except (ValueError, OverflowError):  # no process's number
        return None
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    # One that nobody has waited for yet is dead, and a number may be another process's by now.
    return _life(pid)[0] not in ("Z", "X") and _is_born_as(owner)


def _is_born_as(owner: dict[str, Any]) -> bool:
    return owner.get("born") in (None, _life(owner["pid"])[1])


def _life(pid: int) -> tuple[str, str | None]:
    """A process's state as one letter and when the kernel started it, by its own count; ("", None) where
    nobody says."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return "", None


def held(where: str, owner: dict[str, Any]) -> FencedError:
    """What a writer is told to whom the root does not belong, or no longer."""
    here = " (this very process: close() the other manager first, or pass takeover=True in a notebook's cell run again)"
    mine = here if owner.get("pid") == os.getpid() else ""
    pid, host, since = (_plain(owner.get(key, "?")) for key in ("pid", "host", "since"))
    return FencedError(
        f"{where} is being written by process {pid} on {host} since {since}{mine}. "
        "Stop it, use another root, open with read_only=True, or pass takeover=True if it is gone"
    )


def parse(data: bytes) -> dict[str, Any]:
    """A record of an owner or of its heartbeat; empty for what is none."""
    try:
        value = parse_json(data)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _plain(value: Any) -> str:
    """A value of a record for a message: short, and without what would steer a terminal."""
    if not isinstance(value, str | int):
        return "?"
    try:
        return "".join(char if char.isprintable() else "?" for char in str(value)[:80])
    except ValueError:  # a number of very many digits
        return "?"


def sealed(owner: dict[str, Any]) -> bytes:
    """The record of an owner as bytes, with a digest: of a number that has become smaller at rest the next
    checkpoints would come before those that are there."""
    return json.dumps({**owner, "digest": _digest(owner)}).encode()


def _digest(owner: dict[str, Any]) -> str:
    return digest(json.dumps(owner, sort_keys=True).encode())


def attempt_of(owner: dict[str, Any]) -> int:
    """The number of a writer; 0 where the record does not say, or is not what was written."""
    rest = {key: value for key, value in owner.items() if key != "digest"}
    if "digest" in owner and owner["digest"] != _digest(rest):
        return 0
    try:
        return whole(owner.get("attempt"))
    except ValueError:
        return 0
