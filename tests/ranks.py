"""How do tests run several ranks? As real processes on this machine, for no longer than they are given.

    def train(root: str) -> int:  # at the top of the test's module; in it, torch.distributed is ready (gloo)
        ...

    first, second = run_ranks(train, 2, args=(root,))
    assert first.value == second.value

What the function returns goes through JSON. A script (a path) makes its process group itself. With
`torchrun=True` torchrun starts the ranks. `Ranks` is for tests that do something to ranks while they run.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Note", "RankResult", "Ranks", "leave", "note", "run_ranks", "stay_until", "values"]

TESTS = Path(__file__).parent
ROOT = TESTS.parent

_LOOKS_S = 0.01  # between looks at processes and files
_GROUP_TIMEOUT_S = 120  # of the training's own group: never what ends a test
# Imported once, in the process that ranks are forked from.
_PRELOADED = [
    "torch",
    "sklearn.datasets",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torchdata.stateful_dataloader",
]
_PRELOADED += ["torch._dynamo", "torch.onnx"]  # what the first step of an optimizer imports
_PRELOADED += ["ckptmgr.manager", "ckptmgr.coordinator.process_group", "ckptmgr.formats.safetensors_file"]
_PRELOADED += ["ckptmgr.sharded_save"]


@dataclass(frozen=True, slots=True)
class Note:
    """What a rank said while it ran. `time` is in seconds, by a clock that all ranks share."""

    text: str
    time: float


@dataclass(frozen=True, slots=True)
class RankResult:
    """How one rank ended. `code` is its exit code, negative for a signal, None when it hung and was killed;
    under torchrun it is torchrun's. `value` is what the function returned, `error` "Class: text" of what it raised."""

    rank: int
    code: int | None
    value: Any
    error: str | None
    stdout: str
    stderr: str
    elapsed_s: float
    notes: tuple[Note, ...]

    def time_of(self, text: str) -> float:
        return next(one.time for one in self.notes if one.text == text)


def run_ranks(
    target: Callable[..., Any] | str | Path,
    world_size: int,
    *,
    torchrun: bool = False,
    torchrun_options: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    timeout_s: float = 60,
    args: Sequence[Any] = (),
    unless_left: Sequence[int] = (),
) -> list[RankResult]:
    """Run a function or a script on every rank and wait for all but those in `unless_left`, which are killed
    when the others have ended. Raises `TimeoutError` that names the ranks that hung, with
    what they printed; nothing that was started is left behind."""
    with Ranks(target, world_size, torchrun=torchrun, torchrun_options=torchrun_options, env=env, args=args) as ranks:
        return ranks.wait(timeout_s, unless_left=unless_left)


def values(done: Sequence[RankResult]) -> list[Any]:
    """What each rank returned. Fails with what was printed by those that raised or returned nothing."""
    failed = [one for one in done if one.error is not None or one.value is None]
    texts = [f"rank {one.rank} ended with {one.code}: {one.error}\n{one.stderr}" for one in failed]
    assert failed == [], "\n".join(texts)
    return [one.value for one in done]


class Ranks:
    """Ranks that have been started. A context manager: leaving it kills what is left of them."""

    def __init__(
        self,
        target: Callable[..., Any] | str | Path,
        world_size: int,
        *,
        torchrun: bool = False,
        torchrun_options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        args: Sequence[Any] = (),
    ) -> None:
        self.world_size = world_size
        self._scratch = tempfile.TemporaryDirectory(prefix="ranks-")
        self.folder = Path(self._scratch.name)
        self._began = time.monotonic()
        self._elapsed_s: dict[int, float] = {}
        variables = {
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "RANKS_FOLDER": str(self.folder),  # also what the processes of a torchrun are known by
            **(env or {}),
        }
        self._torchrun: subprocess.Popen[bytes] | None = None
        self._processes: list[BaseProcess] = []
        if torchrun:
            self._torchrun = self._start_torchrun(target, variables, torchrun_options, args)
            return
        port = _free_port()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOADED)
        for rank in range(world_size):
            place = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world_size}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            own = {**os.environ, **variables, **{name: str(value) for name, value in place.items()}}
            process = context.Process(target=_forked, args=(str(Path.cwd()), own, target, tuple(args)))
            with _one_thread():
                process.start()
            self._processes.append(process)

    def _start_torchrun(
        self, target: Callable[..., Any] | str | Path, variables: Mapping[str, str], options: Sequence[str], args: Any
    ) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={self.world_size}"]
        command += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", *options]
        command += [f"--log-dir={self.folder / 'logs'}", "--redirects=3"]
        if callable(target):
            task = {"module": target.__module__, "function": target.__qualname__, "args": list(args)}
            command += [str(TESTS / "ranks.py"), json.dumps(task)]
        else:
            command += [str(target), *map(str, args)]
        paths = [*filter(None, [variables.get("PYTHONPATH", "")]), str(ROOT), str(TESTS)]
        with (self.folder / "torchrun.txt").open("wb") as output:
            return subprocess.Popen(
                command,
                env={**os.environ, **variables, "PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    # While they run

    @property
    def torchrun_pid(self) -> int:
        assert self._torchrun is not None
        return self._torchrun.pid

    @property
    def is_running(self) -> bool:
        """Whether any rank is."""
        return bool(self._running())

    def pid(self, rank: int) -> int:
        """The process of a rank, which must have said something."""
        return int((self.folder / f"pid-{rank}").read_text())

    def notes(self, rank: int) -> tuple[Note, ...]:
        return _notes(self.folder, rank)

    def wait_for_note(self, rank: int, text: str, timeout_s: float = 60) -> Note:
        """The first note of a rank with this text. Raises `TimeoutError`, or `RuntimeError` when all have ended."""
        deadline = time.monotonic() + timeout_s
        while True:
            is_over = not self._running()
            if found := [one for one in self.notes(rank) if one.text == text]:
                return found[0]
            if is_over:
                raise RuntimeError(f"the ranks ended before rank {rank} said {text!r}\n{self._printed()}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {rank} did not say {text!r} within {timeout_s} s\n{self._printed()}")
            time.sleep(_LOOKS_S)

    def wait(self, timeout_s: float = 60, *, unless_left: Sequence[int] = ()) -> list[RankResult]:
        """See `run_ranks`."""
        deadline = time.monotonic() + timeout_s
        while (waited_for := self._running() - set(unless_left)) or self._is_torchrun_waited_for(unless_left):
            if time.monotonic() > deadline:
                printed = self._printed()
                self.kill()
                who = "torchrun" if self._torchrun else f"ranks {sorted(waited_for)}"
                raise TimeoutError(f"{who} had not ended after {timeout_s} s\n{printed}")
            time.sleep(_LOOKS_S)
        hung = self._running()
        self.kill()
        return [self._result(rank, is_hung=rank in hung) for rank in range(self.world_size)]

    def kill(self) -> None:
        """SIGKILL everything that was started, and wait until it is gone."""
        for process in self._processes:
            if process.is_alive() and process.pid is not None:
                _kill_group(process.pid)
                process.kill()  # it may not have made its group yet
            process.join()
        if self._torchrun is not None:
            self._torchrun.kill()
            self._torchrun.wait()
            killed: set[int] = set()
            while left := self._torchrun_processes():
                killed.update(left)
                for pid in left:
                    _kill(pid)
            while any(map(_is_ending, killed)):  # one that ends has no variables any more
                time.sleep(_LOOKS_S)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._scratch.cleanup()

    # How they are

    def _running(self) -> set[int]:
        """The ranks that have not ended; those of a script all together with torchrun."""
        if self._torchrun is not None:
            is_over = self._torchrun.poll() is not None
            ends = {rank for rank in range(self.world_size) if (self.folder / f"end-{rank}.json").exists()}
            return set() if is_over else set(range(self.world_size)) - ends
        running = {rank for rank, process in enumerate(self._processes) if process.exitcode is None}
        for rank in set(range(self.world_size)) - running:
            self._elapsed_s.setdefault(rank, time.monotonic() - self._began)
        return running

    def _is_torchrun_waited_for(self, unless_left: Sequence[int]) -> bool:
        """It does not end before a rank that was stopped."""
        return self._torchrun is not None and not unless_left and self._torchrun.poll() is None

    def _torchrun_processes(self) -> list[int]:
        """Also those that torchrun has left behind. Only what carries the name of our folder is ours."""
        mark = f"RANKS_FOLDER={self.folder}".encode()
        return [pid for pid in _processes() if mark in _variables(pid)]

    def _result(self, rank: int, *, is_hung: bool) -> RankResult:
        code = self._torchrun.returncode if self._torchrun else self._processes[rank].exitcode
        path = self.folder / f"end-{rank}.json"
        end = json.loads(path.read_text()) if path.exists() else {}
        return RankResult(
            rank,
            None if is_hung else code,
            end.get("value"),
            end.get("error"),
            self._output(rank, "stdout"),
            self._output(rank, "stderr"),
            self._elapsed_s.get(rank, time.monotonic() - self._began),
            self.notes(rank),
        )

    def _output(self, rank: int, name: str) -> str:
        """What a rank printed; under torchrun, that of all attempts."""
        paths = [self.folder / f"{name}-{rank}"]
        paths += sorted(self.folder.glob(f"logs/*/attempt_*/{rank}/{name}.log"))
        return "".join(path.read_text(errors="replace") for path in paths if path.exists())

    def _printed(self) -> str:
        parts = [f"--- rank {rank}\n{self._output(rank, 'stderr')[-3000:]}" for rank in range(self.world_size)]
        if self._torchrun is not None:
            parts.append(f"--- torchrun\n{(self.folder / 'torchrun.txt').read_text(errors='replace')[-3000:]}")
        return "\n".join(parts)


# In a rank


def note(text: str) -> None:
    """Tell the test something, with the time."""
    _write_pid()
    with (_folder() / f"notes-{os.environ['RANK']}").open("a") as file:
        file.write(json.dumps([text, time.monotonic()]) + "\n")


def stay_until(text: str, ranks: Sequence[int], timeout_s: float = 30) -> None:
    """Wait until these ranks have said it: rank 0 has the store of the job, and takes it along when it ends."""
    deadline = time.monotonic() + timeout_s
    while not all(any(one.text == text for one in _notes(_folder(), rank)) for rank in ranks):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not all of ranks {list(ranks)} said {text!r} within {timeout_s} s")
        time.sleep(_LOOKS_S)


def leave(value: Any = None) -> None:
    """End this rank here, with what its function would have returned: without a word to the others, and
    without the end of the interpreter, which a broken group may not survive."""
    _end(value=value)


def _forked(
    folder: str, variables: Mapping[str, str], target: Callable[..., Any] | str | Path, args: tuple[Any, ...]
) -> None:
    """The life of a rank that the test started."""
    os.setsid()  # so that its own children can be killed with it
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    for name, number in (("stdout", 1), ("stderr", 2)):
        path = _folder() / f"{name}-{os.environ['RANK']}"
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server, from which it was forked, ignores it
    _live(target, args)


def _live(target: Callable[..., Any] | str | Path, args: Sequence[Any]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    _write_pid()
    try:
        if callable(target):
            dist.init_process_group("gloo", timeout=timedelta(seconds=_GROUP_TIMEOUT_S))
            value = target(*args)
        else:
            sys.argv = [str(target), *map(str, args)]
            value = None
            runpy.run_path(str(target), run_name="__main__")
        gc.collect()  # what FSDP made must be gone before its group is
        if dist.is_initialized():
            with suppress(RuntimeError):  # another rank has failed
                dist.barrier()  # rank 0 has the store, so it leaves last
                dist.destroy_process_group()
    except BaseException as exc:  # noqa: BLE001 - it is reported, whatever it is
        traceback.print_exc()
        _end(error=f"{type(exc).__name__}: {exc}", code=1)
    _end(value=value)


def _end(*, value: Any = None, error: str | None = None, code: int = 0) -> None:
    path = _folder() / f"end-{os.environ['RANK']}"
    path.write_text(json.dumps({"value": value, "error": error}))
    path.rename(path.with_suffix(".json"))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # FSDP2 over gloo now and then aborts in the interpreter's last moments


def _folder() -> Path:
    return Path(os.environ["RANKS_FOLDER"])


def _notes(folder: Path, rank: int) -> tuple[Note, ...]:
    path = folder / f"notes-{rank}"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []  # but one that is being written
    return tuple(Note(*json.loads(line)) for line in lines)


def _write_pid() -> None:
    (_folder() / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))


# Processes


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def _one_thread() -> Iterator[None]:
    """What is set now is what the server that ranks are forked from starts with."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _processes() -> Iterator[int]:
    return (int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit())


def _variables(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # gone, or not ours; a zombie has none
        return b""


def _is_ending(pid: int) -> bool:
    """Whether a killed process is still there, and no zombie yet."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


if __name__ == "__main__":  # started by torchrun
    _task = json.loads(sys.argv[1])
    _live(getattr(importlib.import_module(_task["module"]), _task["function"]), _task["args"])
