"""How long does `ckptmgr ls` take on a thousand local checkpoints? Run: python tests/benchmarks/bench_ls.py [COUNT]

Prints the median of five runs of whole processes, beside that of a process that only starts the interpreter.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from ckptmgr.manifest import FileEntry, Manifest

RUNS = 5


def fill(root: Path, count: int) -> None:
    """Manifests as a training run leaves them; a listing reads nothing else."""
    files = tuple(FileEntry.of(f"{name}.safetensors", 1 << 30, [bytes(16)] * 16) for name in "abc")
    for step in range(1, count + 1):
        (root / f"step-{step:08d}").mkdir()
        manifest = Manifest(
            step=step,
            epoch=step // 10,
            metrics={"loss": 1 / step, "accuracy": 0.5},
            run="bench",
            attempt=1,
            nonce=f"{step:016x}",
            time=datetime.now(UTC),
            format="safetensors",
            files=files,
        )
        (root / f"step-{step:08d}/manifest.json").write_bytes(manifest.to_json())


def median_ms(*args: str) -> float:
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        subprocess.run([sys.executable, *args], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder), count)
        for what, args in (
            ("interpreter alone", ("-c", "pass")),
            ("import ckptmgr.cli", ("-c", "import ckptmgr.cli")),
            (f"ls of {count:,}", ("-m", "ckptmgr", "ls", folder)),
            (f"ls --json of {count:,}", ("-m", "ckptmgr", "ls", folder, "--json")),
            (f"latest of {count:,}", ("-m", "ckptmgr", "latest", folder)),
        ):
            print(f"{what:24} {median_ms(*args):7.0f} ms")


if __name__ == "__main__":
    main()
