"""Is what the README shows true? Its blocks run here, in order, as one session in one folder."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torchdata.stateful_dataloader import StatefulDataLoader

from ckptmgr import errors
from ckptmgr.cli import main
from ckptmgr.config import load_config

README = Path(__file__).parent.parent / "README.md"


@dataclass(frozen=True)
class Block:
    language: str
    line: int  # of its first line of text
    text: str


def blocks() -> list[Block]:
    text = README.read_text()
    found = re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(match[1], text.count("\n", 0, match.start(2)) + 1, match[2]) for match in found]


@pytest.fixture
def names() -> dict[str, Any]:
    """What the README's reader has: a model, an optimizer and so on."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    dataset = torch.utils.data.TensorDataset(torch.rand(64, 4))
    loader = StatefulDataLoader(dataset, batch_size=16)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def train_step() -> float:
        loss = model(*next(batches)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        return loss.item()

    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "train_step": train_step,
        "total_steps": 300,
        "loader": loader,
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("S3_BUCKET", "GCS_BUCKET", "OSS_BUCKET"):
        monkeypatch.setenv(name, "bucket")
    return tmp_path


def commands(block: Block) -> Iterator[list[str]]:
    for line in block.text.splitlines():
        words = shlex.split(line, comments=True)
        if words and words[0] == "ckptmgr":
            yield words[1:]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata under a recent torch
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")  # one process
def test_every_block_of_the_readme_runs(folder: Path, names: dict[str, Any]) -> None:
    for block in blocks():
        where = f"README.md line {block.line}"
        if block.language == "python":
            # Blank lines in front, so that a traceback names the README's own line.
            exec(compile("\n" * (block.line - 1) + block.text, README, "exec"), names)
        elif block.language == "yaml":
            path = folder / "digits.yaml"
            path.write_text(block.text)
            load_config(path)
        elif block.language == "bash":
            for arguments in commands(block):
                result = CliRunner().invoke(main, arguments)
                assert result.exit_code == 0, f"{where}: ckptmgr {shlex.join(arguments)}\n{result.output}"


def test_every_error_has_a_row_with_the_builtin_that_it_also_is() -> None:
    rows = dict(re.findall(r"^\| `(\w+Error)` \| (?:`(\w+)`)? *\|", README.read_text(), re.MULTILINE))

    public = {name: getattr(errors, name) for name in errors.__all__ if name != "CheckpointError"}
    assert rows == {name: "".join(base.__name__ for base in kind.__bases__[1:]) for name, kind in public.items()}


def test_every_command_is_shown() -> None:
    shown = {arguments[0] for block in blocks() if block.language == "bash" for arguments in commands(block)}

    assert shown == set(main.commands)


def test_a_newcomer_needs_two_commands_and_both_pin_torch() -> None:
    installs = [line for block in blocks() for line in block.text.splitlines() if "pip install -c" in line]

    assert installs == [
        "python -m venv .venv && .venv/bin/pip install -c tests/constraints.txt -e '.[demo]' "
        "&& .venv/bin/python examples/crash_and_resume.py",
        "python -m venv .venv && .venv/bin/pip install -c tests/constraints.txt -e '.[test]' "
        "&& .venv/bin/python -m pytest -n 2",
    ]
