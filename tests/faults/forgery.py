"""How does an enemy write into a folder that we read, and what may we do then? Forged checkpoints, and a guard.

`Forged` changes a sound root as somebody would who knows the format and makes every digest fit. `guarded` runs
code that must neither execute, read, write nor delete anything outside of the root, nor take much memory or long.
"""

from __future__ import annotations

# Paths are looked at as the system was given them.
# ruff: noqa: PTH100, PTH118, PTH119, PTH120
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ckptmgr import CheckpointManager
from ckptmgr.manifest import MANIFEST_NAME, PIECE_SIZE, FileEntry, digest

SECRET = b"the secret of another folder\n"
_MEMORY = 1 << 30  # bytes that an attack may make us map beyond what is mapped already
_TIME_S = 30

np.random.get_state()  # so that its generator is among those that are saved


def model(step: int = 0) -> nn.Module:
    """A module whose weights tell the step."""
    made = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) + 100 * step + number)
    return made


def state(step: int) -> dict[str, Any]:
    own = model(step)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1, momentum=0.9)
    own(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    model_again = model(step)
    return {
        "model": model_again,
        "optimizer": optimizer,
        "extra": {
            "n": step,
            "array": np.arange(4),
            "names": {"a", "b"},
            "big": 2**70,
            "sparse": torch.eye(3).to_sparse(),
        },
    }


def manager(root: Path, **overrides: Any) -> CheckpointManager:
    return CheckpointManager(str(root), **{"background": False, "fsync": False} | overrides)


def build(root: Path, format: str) -> None:
    """A root with the checkpoints of steps 1 and 2, and a pin, a mark and a record put aside."""
    with manager(root, format=format, keep={"last": None}) as made:
        made.resume()
        for step in (1, 2):
            made.save(state(step), step)


def entry(name: str, data: bytes) -> dict[str, Any]:
    """What a manifest says of a file."""
    pieces = [data[at : at + PIECE_SIZE] for at in range(0, max(len(data), 1), PIECE_SIZE)]
    made = FileEntry.of(name, len(data), [bytes.fromhex(digest(piece)) for piece in pieces])
    return {"name": name, "size": made.size, "digest": made.digest} | (
        {"pieces": list(made.pieces)} if made.pieces else {}
    )


def sealed(body: dict[str, Any]) -> bytes:
    """A manifest whose digest fits, whatever it says."""
    body = {key: value for key, value in body.items() if key != "digest"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps(body | {"digest": digest(text.encode())}).encode()


class Forged:
    """A root in an enemy's hands; `outside` is a folder beside it that is none of our business."""

    def __init__(self, root: Path, outside: Path) -> None:
        self.root, self.outside = root, outside
        self.folder = root / "step-00000002"
        self.ours = root / ".ckptmgr"

    @property
    def secret(self) -> Path:
        return self.outside / "secret"

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.folder / MANIFEST_NAME).read_bytes())

    @property
    def nonce(self) -> str:
        return self.manifest["nonce"]

    def seal(self, **changes: Any) -> None:
        """Change the manifest of step 2."""
        (self.folder / MANIFEST_NAME).write_bytes(sealed(self.manifest | changes))

    def put(self, name: str, data: bytes) -> None:
        """Put a file into step 2, as if it had been saved."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        others = [file for file in self.manifest["files"] if file["name"] != name]
        self.seal(files=[*others, entry(name, data)])

    def sparse(self, name: str, size: int) -> None:
        """Put a file of zeros into step 2 that takes no room on the disk."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        with path.open("xb") as file:
            file.truncate(size)
        whole, rest = divmod(size, PIECE_SIZE)
        pieces = [digest(bytes(PIECE_SIZE))] * whole + ([digest(bytes(rest))] if rest else [])
        made = FileEntry.of(name, size, [bytes.fromhex(piece) for piece in pieces])
        others = [file for file in self.manifest["files"] if file["name"] != name]
        row = {"name": name, "size": size, "digest": made.digest, "pieces": list(made.pieces)}
        self.seal(files=[*others, row])

    def edit(self, name: str, change: Callable[[dict[str, Any]], object]) -> None:
        """Change a JSON file of step 2."""
        body = json.loads((self.folder / name).read_bytes())
        change(body)
        self.put(name, json.dumps(body).encode())

    def state(self, change: Callable[[dict[str, Any]], object]) -> None:
        self.edit("state.json", change)

    def tree(self, tree: Any) -> None:
        """Make the entry `extra` this tree."""
        self.state(lambda body: body["entries"].update(extra=tree))

    def record(self, name: str, data: bytes | str) -> Path:
        """Put a record below `.ckptmgr/`."""
        path = self.ours / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        return path

    def tombstone(self, name: str, files: list[str], kind: str = "trash", nonce: str = "feedbeef") -> None:
        """A record that leads a deletion to these files of the folder `name`."""
        body = self.manifest | {"nonce": nonce, "files": [entry(each, SECRET) for each in files]}
        self.record(f"{kind}/{name}.{nonce}.json", sealed(body))


class Trap:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.sign),)


@contextmanager
def guarded(root: Path, outside: Path) -> Iterator[list[str]]:
    """A block whose crimes are in the list afterwards."""
    crimes: list[str] = []
    before = _look(outside)
    _watch(root, outside, crimes)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, hard))
    old = signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(_TIME_S)
    try:
        yield crimes
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        _watch(None, None, None)
        if _look(outside) != before:
            crimes.append(f"{outside} was changed")


def _too_long(*_: object) -> None:
    raise TimeoutError(f"still busy after {_TIME_S} s")


def _look(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if not folder.exists():
        return found
    for path in sorted([folder, *folder.rglob("*")]):
        facts = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        found[str(path)] = (facts.st_mode, facts.st_mtime_ns if path.is_file() else 0, content)
    return found


# One hook for the whole process: the system takes none back.
_watched: tuple[str, str, list[str]] | None = None
_CHANGES = {"os.remove", "os.rmdir", "os.rename", "os.link", "os.symlink", "os.truncate", "os.mkdir", "os.chmod"}
_RUNS = {"os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "pickle.find_class"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_HARMLESS = ("/dev/null", "/dev/tty")


def _watch(root: Path | None, outside: Path | None, crimes: list[str] | None) -> None:
    global _watched
    _watched = None if crimes is None else (str(root), str(outside), crimes)


def _is_below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if _watched is None:
        return
    root, outside, crimes = _watched
    if event in _RUNS:
        crimes.append(f"{event} {args[:2]!r:.200}")
    elif event == "import" and args[0] in ("this", "antigravity"):
        crimes.append(f"import {args[0]}")
    elif event == "open" and isinstance(args[0], str | bytes | os.PathLike):
        flags = args[2] or 0
        path = os.path.abspath(os.fsdecode(args[0]))
        # An open that follows no link fails at one.
        real = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        real = real if flags & os.O_NOFOLLOW else os.path.realpath(path)
        is_written = flags & _WRITES and real not in _HARMLESS
        if _is_below(real, outside) or (is_written and not _is_below(real, root)):
            crimes.append(f"open {real} {flags:#x}")
    elif event in _CHANGES or event in ("os.listdir", "os.scandir"):
        paths = [arg for arg in args[:2] if isinstance(arg, str | bytes | os.PathLike)]
        for path in paths:
            text = os.path.abspath(os.fsdecode(path))
            real = os.path.join(os.path.realpath(os.path.dirname(text)), os.path.basename(text))
            if _is_below(real, outside) or (event in _CHANGES and not _is_below(real, root)):
                crimes.append(f"{event} {real}")


sys.addaudithook(_audit)


def copy(root: Path, target: Path) -> None:
    shutil.copytree(root, target, symlinks=True)
