"""Do the examples for several ranks do what they say? Killed, started again, with fewer ranks, under torchrun."""

from __future__ import annotations

import os
import random
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ranks import RankResult, Ranks, run_ranks

from ckptmgr import CheckpointManager

ROOT = Path(__file__).parent.parent
EXAMPLES, README = ROOT / "examples", ROOT / "README.md"
BOTH = pytest.mark.parametrize("name", ["ddp", "fsdp"])
# The environment of a torchrun in which rank 1 dies after step 45, but not again after the restart.
SUICIDE = """
import os, signal
if os.environ.get("RANK") == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    from ckptmgr import CheckpointManager
    maybe_save = CheckpointManager.maybe_save
    def die(self, state, step, **more):
        if step == 45:
            os.kill(os.getpid(), signal.SIGKILL)
        return maybe_save(self, state, step, **more)
    CheckpointManager.maybe_save = die
"""


def arguments(root: Path, steps: int) -> tuple[str, ...]:
    return "--root", str(root), "--steps", str(steps)


def run(name: str, ranks: int, root: Path, steps: int = 100, **options: Any) -> list[RankResult]:
    done = run_ranks(EXAMPLES / f"train_{name}.py", ranks, args=arguments(root, steps), timeout_s=120, **options)
    assert [one.code for one in done] == [0] * ranks, done[0].stderr + done[-1].stderr
    return done


def weights(done: list[RankResult]) -> str:
    """The digest that rank 0 prints at its end."""
    return done[0].stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What trainings on four ranks print at their end when nobody disturbs them."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return {name: weights(run(name, 4, folder / name)) for name in ("ddp", "fsdp")}


@BOTH
def test_four_ranks_killed_at_a_random_moment_and_started_again_end_with_the_same_weights(
    name: str, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    script, root = EXAMPLES / f"train_{name}.py", tmp_path / "run"

    with Ranks(script, 4, args=arguments(root, 100)) as first:
        wait_for_step(root, chance.choice([20, 40, 60]), first)
        time.sleep(chance.uniform(0, 0.3))  # in the middle of whatever it does then
        first.kill()
        before = first.wait()
    after = run(name, 4, root)

    assert "weights" not in before[0].stdout, f"seed {seed}: it was at its end before it was killed"
    assert re.match(r"resumed from step \d+\n", after[0].stdout), f"seed {seed}: {after[0].stdout}"
    assert weights(after) == undisturbed[name], f"seed {seed}"


@pytest.mark.parametrize("name", ["ddp", pytest.param("fsdp", marks=pytest.mark.faults)])  # half a minute each
def test_torchrun_starts_again_after_a_rank_has_died_and_the_training_goes_on_by_itself(
    name: str, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SUICIDE)

    done = run(
        name,
        4,
        tmp_path / "run",
        torchrun=True,
        torchrun_options=["--max-restarts=1"],
        env={"PYTHONPATH": str(tmp_path)},
    )

    lines = done[0].stdout.splitlines()
    assert [line for line in lines if "step 50" not in line and "step 100:" not in line] == [
        "a fresh run",
        "resumed from step 40",
    ]
    assert weights(done) == undisturbed[name]


@BOTH
def test_two_ranks_and_one_go_on_from_the_weights_of_four(name: str, tmp_path: Path) -> None:
    """With no step left to make they print the weights that they resumed with."""
    four = run(name, 4, tmp_path / "run", steps=20)
    two = run(name, 2, tmp_path / "run", steps=20)
    one = run(name, 1, tmp_path / "run", steps=20)

    assert two[0].stdout.splitlines() == ["resumed from step 20", weights(four)]
    assert one[0].stdout.splitlines() == ["resumed from step 20", weights(four)]


@BOTH
def test_they_go_on_training_on_fewer_ranks(name: str, tmp_path: Path) -> None:
    run(name, 4, tmp_path / "run", steps=40)
    with CheckpointManager(tmp_path / "run") as manager:
        manager.delete(40)
    two = run(name, 2, tmp_path / "run", steps=40)

    assert two[0].stdout.splitlines()[0] == "resumed from step 20"
    assert "weights after step 40: " in weights(two)
    assert CheckpointManager(tmp_path / "run", read_only=True).all_steps() == [20, 40]


@BOTH
def test_the_readmes_line_runs(name: str, tmp_path: Path) -> None:
    (line,) = re.findall(rf"^(torchrun .*/train_{name}\.py .*)$", README.read_text(), re.MULTILINE)
    options = shlex.split(line)[1:]
    options = [str(ROOT / word) if word.startswith("examples/") else word for word in options]

    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, "--steps", "20"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "a fresh run"
    assert CheckpointManager(tmp_path / "runs" / f"digits-{name}", read_only=True).all_steps() == [20]


@BOTH
def test_an_example_begins_with_its_command(name: str) -> None:
    assert (
        (EXAMPLES / f"train_{name}.py")
        .read_text()
        .startswith(f"# torchrun --nproc-per-node 2 examples/train_{name}.py")
    )


@BOTH
def test_it_needs_no_more_lines_of_ours_than_one_process_and_marks_them(name: str) -> None:
    lines = (EXAMPLES / f"train_{name}.py").read_text().splitlines()
    marked = [line for line in lines if "# ckptmgr: " in line]
    ours = [line for line in lines if "CheckpointManager" in line or "manager." in line]

    assert marked == ours
    assert len(ours) <= 6


def wait_for_step(root: Path, step: int, ranks: Ranks) -> None:
    """Until a step is committed: a folder is there under its name when it is."""
    deadline = time.monotonic() + 100
    while not (root / f"step-{step:08d}").exists():
        assert ranks.is_running, "the training ended before it was killed"
        assert time.monotonic() < deadline, f"step {step} was not saved"
        time.sleep(0.01)
