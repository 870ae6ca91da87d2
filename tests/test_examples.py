"""Do the examples do what they say, each run by its own command line?"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from servers import Bucket

from ckptmgr import CheckpointManager

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
# This seed kills after step 53, when the save of step 20 must have been committed: that of 40 waits for it.
ONE_LATE_KILL = ("--steps", "120", "--kills", "1", "--seed", "2")


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([*filter(None, [environment.pop("PYTHONPATH", "")]), str(ROOT)])
    return subprocess.run(
        [sys.executable, str(EXAMPLES / script), *arguments],
        env={**os.environ, **environment, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def crash_and_resume() -> ModuleType:
    spec = importlib.util.spec_from_file_location("crash_and_resume", EXAMPLES / "crash_and_resume.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The main job


def test_a_training_killed_three_times_ends_bit_for_bit_where_an_undisturbed_one_does(tmp_path: Path) -> None:
    root = tmp_path / "run"

    done = run("crash_and_resume.py", "--root", str(root), "--steps", "240", "--seed", "7")

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(", killed ") == 3
    assert f"$ ckptmgr ls {root}" in done.stdout
    assert "step-00000240" in done.stdout
    assert done.stdout.splitlines()[-1] == "bit-exact: yes"


@pytest.mark.server
def test_it_does_so_on_s3_with_credentials_from_the_environment(s3_moto: Bucket) -> None:
    done = run(
        "crash_and_resume.py",
        *("--root", f"{s3_moto.url}/runs/digits", *ONE_LATE_KILL),
        AWS_ENDPOINT_URL=s3_moto.options["endpoint_url"],
        AWS_ACCESS_KEY_ID=s3_moto.options["key"],
        AWS_SECRET_ACCESS_KEY=s3_moto.options["secret"],
        AWS_DEFAULT_REGION="us-east-1",
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(", killed ") == 1
    assert "resumed after step " in done.stdout
    assert "step-00000120" in done.stdout
    assert done.stdout.splitlines()[-1] == "bit-exact: yes"


def test_a_restore_that_forgets_the_random_generators_is_found_out(tmp_path: Path) -> None:
    """Every Python started below imports sitecustomize, and resumes without them."""
    (tmp_path / "sitecustomize.py").write_text(
        "from ckptmgr import CheckpointManager\n"
        "resume = CheckpointManager.resume\n"
        "CheckpointManager.resume = lambda self, **state: resume(self, skip=['rng'], **state)\n"
    )

    done = run("crash_and_resume.py", *ONE_LATE_KILL, PYTHONPATH=str(tmp_path))

    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("bit-exact: no (loss of step ")


def test_it_refuses_a_root_that_holds_checkpoints(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "run") as manager:
        manager.save({"weight": torch.ones(2)}, 1)

    done = run("crash_and_resume.py", "--root", str(tmp_path / "run"))

    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == (
        f"bit-exact: no ({tmp_path}/run holds checkpoints already: give another --root)"
    )


# Its comparison


@pytest.mark.parametrize(
    ("actual", "differences"),
    [
        ([(1, "0x1.0p+0"), (2, "0x1.8p+0")], []),
        ([(1, "0x1.0p+0"), (1, "0x1.0p+0"), (2, "0x1.8p+0")], []),
        ([(1, "0x1.0p+0"), (2, "0x1.8000000000001p+0")], ["loss of step 2 is 1.5000000000000002, not 1.5"]),
        ([(1, "0x1.1p+0"), (1, "0x1.0p+0"), (2, "0x1.8p+0")], ["loss of step 1 is 1.0625, not 1.0"]),
        ([(2, "0x1.8p+0")], ["1 steps were never made, the first is 1"]),
        ([(1, "0x1.0p+0"), (2, "0x1.8p+0"), (3, "0x1.8p+0")], ["step 3 is one too many"]),
    ],
)
def test_losses_must_be_equal_each_time_a_step_is_made(
    crash_and_resume: ModuleType, actual: list[tuple[int, str]], differences: list[str]
) -> None:
    assert list(crash_and_resume.curve_differences([(1, "0x1.0p+0"), (2, "0x1.8p+0")], actual)) == differences


@pytest.mark.parametrize(
    ("actual", "differences"),
    [
        ({"w": torch.tensor([0.0, float("nan")]), "n": [1, 2.0]}, []),
        ({"w": torch.tensor([-0.0, float("nan")]), "n": [1, 2.0]}, ["/w differs"]),
        (
            {"w": torch.tensor([0.0, float("nan")]).double(), "n": [1, 2.0]},
            ["/w is torch.float64 [2], not torch.float32 [2]"],
        ),
        ({"w": torch.tensor([0.0, float("nan")]), "n": [1, 2]}, ["/n/1 is a int, not a float"]),
        ({"w": torch.tensor([0.0, float("nan")]), "n": [1]}, ["/n has 1 items, not 2"]),
        ({"w": torch.tensor([0.0, float("nan")]), "n": [3, 2.0]}, ["/n/0 is 3, not 1"]),
        ({"w": torch.tensor([0.0, float("nan")])}, ["/n is in one of the two only"]),
    ],
)
def test_checkpoints_must_be_equal_value_by_value_and_byte_by_byte(
    crash_and_resume: ModuleType, actual: dict[str, object], differences: list[str]
) -> None:
    expected = {"w": torch.tensor([0.0, float("nan")]), "n": [1, 2.0]}

    assert list(crash_and_resume.state_differences(expected, actual)) == differences


# The trainers


def test_the_gpt_goes_on_with_the_losses_that_it_had(tmp_path: Path) -> None:
    """Its last checkpoint is deleted, so the second run makes the last steps once more."""
    root, curve = tmp_path / "run", tmp_path / "curve.txt"
    small = ("--layers", "2", "--width", "32", "--context", "16", "--batch", "4", "--sample", "20")
    arguments = ("--root", str(root), "--curve", str(curve), "--steps", "35", *small)

    first = run("train_chargpt.py", *arguments)
    assert first.returncode == 0, first.stdout + first.stderr
    with CheckpointManager(root) as manager:
        manager.delete(35)
    second = run("train_chargpt.py", *arguments)

    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.startswith("resumed from step 25\n")
    lines = curve.read_text().splitlines()
    assert [int(line.split()[0]) for line in lines] == [*range(1, 36), *range(26, 36)]
    assert lines[25:35] == lines[35:]
    assert first.stdout.splitlines()[-1] == second.stdout.splitlines()[-1]


@pytest.mark.parametrize("name", ["crash_and_resume", "train_chargpt", "train_digits"])
def test_an_example_begins_with_its_command(name: str) -> None:
    assert (EXAMPLES / f"{name}.py").read_text().startswith(f"# python examples/{name}.py")


@pytest.mark.parametrize("name", ["train_chargpt", "train_digits"])
def test_a_trainer_needs_at_most_six_lines_of_ours_and_marks_them(name: str) -> None:
    lines = (EXAMPLES / f"{name}.py").read_text().splitlines()
    marked = [line for line in lines if "# ckptmgr:" in line and not line.startswith(('"""', "at any", "on where"))]
    ours = [line for line in lines if "CheckpointManager" in line or "manager." in line]

    assert marked == ours
    assert len(ours) <= 6
