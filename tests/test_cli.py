"""What does the command line promise? Its answers, its exit codes, and what it never does."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from servers import Bucket

from ckptmgr import CheckpointManager, ConfigError
from ckptmgr.cli import main
from ckptmgr.cli.tables import age_text, metrics_text, size_text
from ckptmgr.config import CheckpointConfig
from ckptmgr.formats import open_format
from ckptmgr.lock import acquire
from ckptmgr.manifest import CheckpointInfo, FileEntry, Manifest, digest
from ckptmgr.pointer import Pointer
from ckptmgr.repository import Repository
from ckptmgr.run import Run
from ckptmgr.state.snapshot import Snapshot
from ckptmgr.store import open_store

OK, DAMAGED, WRONG, NOT_FOUND, HELD, STORE_FAILED, NEWER, FAULT = 0, 1, 2, 3, 4, 5, 6, 70


def about(step: int, **fields: Any) -> Manifest:
    known: dict[str, Any] = {"run": "demo", "attempt": 1, "time": datetime.now(UTC), "epoch": step // 100}
    return Manifest(step=step, nonce="", format="raw", files=(), **known | fields)


def commit(repository: Repository, step: int, **fields: Any) -> CheckpointInfo:
    draft = repository.begin(step, None, "demo")
    with draft.create("data.bin") as file:
        file.write(b"x" * step)
    info = draft.commit(about(step, **fields))
    repository.pointer.move(info.name)
    return info


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    """Steps 100, 200 and 300 with a falling loss."""
    made = Repository(open_store(tmp_path / "runs", fsync=False))
    for step in (100, 200, 300):
        commit(made, step, metrics={"loss": 1 / step, "odd": float("nan")})
    return made


@pytest.fixture
def url(repository: Repository) -> str:
    return repository.store.url


def call(*args: str | Path, expect: int = OK) -> Result:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert (result.exit_code, result.stderr if expect == OK else "") == (expect, ""), result.output
    return result


def answer(*args: str | Path, expect: int = OK) -> Any:
    """What a command prints with --json, which must be JSON as everybody reads it."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(call(*args, "--json", expect=expect).stdout, parse_constant=refuse)


def steps(url: str) -> list[int]:
    return [info.step for info in Repository(open_store(url)).infos()]


def lines(result: Result) -> list[str]:
    return result.stdout.splitlines()


def shell(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "ckptmgr", *args], text=True, capture_output=True, **options)


def config_file(tmp_path: Path, **settings: Any) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def spoil(info: CheckpointInfo, url: str) -> None:
    (Path(url) / info.name / "data.bin").write_bytes(b"y" * info.step)


# ls, show, latest


def test_ls_lists_newest_first_with_what_people_ask_for(repository: Repository, url: str) -> None:
    repository.pin(repository.find(100), "paper")
    repository.mark_damaged(repository.find(200), "torn")
    commit(repository, 400, healthy=False, time=datetime.now(UTC) - timedelta(hours=3, minutes=1))
    shown = [re.split(r"  +", line.strip()) for line in lines(call("ls", url))]
    assert shown[:5] == [
        ["step", "epoch", "age", "size", "metrics", "state", "tags", "name", "latest"],
        ["400", "4", "3 h ago", "400 B", "unhealthy", "step-00000400", "<- latest"],
        ["300", "3", shown[2][2], "300 B", "loss=0.003333 odd=nan", "ok", "step-00000300"],
        ["200", "2", shown[3][2], "200 B", "loss=0.005 odd=nan", "damaged", "step-00000200"],
        ["100", "1", shown[4][2], "100 B", "loss=0.01 odd=nan", "ok", "paper pinned", "step-00000100"],
    ]
    assert lines(call("ls", url))[-1] == f"4 checkpoints, 1000 B, 1 damaged in {url}"


def test_ls_in_json_has_bytes_iso_times_and_no_nan(repository: Repository, url: str) -> None:
    expires = datetime(2040, 1, 1, tzinfo=UTC)
    repository.pin(repository.find(300), "paper", expires)
    listed = answer("ls", url)
    assert {key: listed[key] for key in ("url", "latest", "count", "damaged", "size")} == {
        "url": url,
        "latest": "step-00000300",
        "count": 3,
        "damaged": 0,
        "size": 600,
    }
    newest = repository.find(300)
    assert newest.manifest is not None
    assert listed["checkpoints"][0] == {
        "step": 300,
        "name": "step-00000300",
        "url": f"{url}/step-00000300",
        "state": "ok",
        "damage": None,
        "tags": ["paper"],
        "pins": [{"tag": "paper", "expires": "2040-01-01T00:00:00+00:00"}],
        "verified": None,
        "epoch": 3,
        "time": newest.manifest.time.isoformat(),
        "size": 300,
        "metrics": {"loss": 1 / 300, "odd": "nan"},
        "healthy": True,
        "run": "demo",
        "attempt": 1,
        "parent": None,
        "format": "raw",
        "world_size": 1,
    }


def test_ls_shows_a_checkpoint_whose_manifest_cannot_be_read_as_damaged(repository: Repository, url: str) -> None:
    (Path(url) / "step-00000200/manifest.json").write_text("{")
    states = {one["step"]: one["state"] for one in answer("ls", url)["checkpoints"]}
    assert states == {300: "ok", 200: "damaged", 100: "ok"}
    assert "damaged" in call("ls", url).stdout
    assert "manifest is not JSON" in call("show", url, "200").stdout
    assert answer("verify", url, "200", expect=DAMAGED)["checkpoints"][0]["problems"][0]["file"] == "manifest.json"


def test_ls_says_when_the_pointer_names_nothing(repository: Repository, url: str) -> None:
    repository.pointer.move("step-00000999")
    result = CliRunner().invoke(main, ["ls", url])
    assert (result.exit_code, result.stderr) == (
        OK,
        f"ckptmgr: the pointer of {url} names 'step-00000999', which is not there\n",
    )


def test_ls_does_not_let_a_manifest_steer_the_terminal(repository: Repository, url: str) -> None:
    commit(repository, 400, metrics={"\x1b[2Jloss\n": 1.0})
    assert "?[2Jloss?=1" in call("ls", url).stdout


@pytest.mark.parametrize("format_name", ["safetensors", "torch"])
def test_show_tells_everything_of_one_checkpoint(repository: Repository, url: str, format_name: str) -> None:
    weight = torch.zeros(4, 2)
    draft = repository.begin(400, None, "demo")
    open_format(format_name).write(
        Snapshot({"model": {"a": weight, "b": weight, "c": [torch.zeros(3, dtype=torch.int64)]}, "step": 400}), draft
    )
    draft.commit(about(400, parent=300, versions={"torch": "2.9"}, tags=("release",), config="c0ffee"))
    shown = answer("show", url, "release")
    assert (shown["step"], shown["parent"], shown["versions"], shown["config"]) == (
        400,
        300,
        {"torch": "2.9"},
        "c0ffee",
    )
    sizes = {file["name"]: file["size"] for file in shown["files"]}
    assert sum(sizes.values()) == shown["size"]
    expected = [("model", 2, 56), ("step", 0, 0)]
    if format_name == "torch":
        expected = [("model", None, sizes["model.pt"]), ("step", None, sizes["step.pt"])]
    assert [(entry["name"], entry["tensors"], entry["size"]) for entry in shown["entries"]] == expected
    text = call("show", url, "release").stdout
    for word in (f"{url}/step-00000400", "release", "torch 2.9", "c0ffee", "demo, attempt 1", "model", *sizes):
        assert word in text


def test_show_tells_of_damage_and_pins(repository: Repository, url: str) -> None:
    repository.pin(repository.find(300), "paper", datetime(2040, 1, 1, tzinfo=UTC))
    repository.pin(repository.find(300))
    repository.mark_damaged(repository.find(300), "did not load")
    (Path(url) / "step-00000300/data.bin").write_bytes(b"")
    text = call("show", url, "300").stdout
    for word in ("did not load", "data.bin: has 0 bytes", "paper, until 2040-01-01", "for ever", "damaged"):
        assert word in text
    shown = answer("show", url, "300")
    assert (shown["state"], shown["problems"]) == (
        "damaged",
        [{"file": "data.bin", "what": "has 0 bytes, not the 300 of the manifest"}],
    )


@pytest.mark.parametrize(
    "body", ["[", "{}", '{"entries": {"a": {"$tensor": 7}}, "tensors": []}', '{"files": {"a": "b"}}']
)
def test_show_leaves_out_entries_that_it_cannot_read(repository: Repository, url: str, body: str) -> None:
    draft = repository.begin(400, None, "demo")
    with draft.create("state.json") as file:
        file.write(body.encode())
    draft.commit(about(400))
    assert "entries" not in answer("show", url)


def test_show_says_that_a_size_is_unknown_where_it_takes_torch_to_know(repository: Repository, url: str) -> None:
    draft = repository.begin(400, None, "demo")
    open_format("safetensors").write(Snapshot({"model": torch.eye(2).to_sparse()}), draft)
    draft.commit(about(400))
    assert answer("show", url)["entries"] == [{"name": "model", "tensors": 1, "size": None}]
    assert call("show", url).exit_code == OK


@pytest.mark.parametrize("which", ["latest", "300", "step-00000300"])
def test_a_step_is_a_number_a_word_or_a_folder(url: str, which: str) -> None:
    assert answer("show", url, which)["step"] == 300


def test_best_is_what_the_configuration_calls_best(url: str, tmp_path: Path) -> None:
    path = config_file(tmp_path, root=url, keep={"best": {"metric": "loss", "mode": "max"}})
    assert answer("show", path, "best")["step"] == 100
    assert "keep.best" in call("show", url, "best", expect=WRONG).stderr


def test_latest_prints_the_newest_good_one(repository: Repository, url: str) -> None:
    repository.mark_damaged(repository.find(300), "torn")
    assert call("latest", url).stdout == f"{url}/step-00000200\n"
    assert call("latest", url, "--step").stdout == "200\n"
    assert answer("latest", url)["step"] == 200
    for step in (100, 200):
        repository.mark_damaged(repository.find(step), "torn")
    assert call("latest", url, expect=NOT_FOUND).stderr == f"ckptmgr: all of the 3 checkpoints in {url} are damaged\n"


@pytest.mark.parametrize("command", ["ls", "show", "latest", "verify", "prune --keep-last 1 --yes", "rm 1 --yes"])
def test_a_root_without_checkpoints_is_not_found_and_not_made(tmp_path: Path, command: str) -> None:
    name, *rest = command.split()
    stderr = call(name, tmp_path / "no", *rest, expect=NOT_FOUND).stderr
    assert stderr == f"ckptmgr: no checkpoint in {tmp_path / 'no'}\n"
    assert not (tmp_path / "no").exists()


def test_a_url_of_a_checkpoint_itself_gets_a_hint(url: str) -> None:
    assert "give the folder above it" in call("ls", f"{url}/step-00000300", expect=NOT_FOUND).stderr


# verify


def test_verify_finds_a_changed_byte_and_names_the_file(repository: Repository, url: str) -> None:
    assert answer("verify", url)["checkpoints"][0]["state"] == "ok"
    spoil(repository.find(200), url)
    assert answer("verify", url, "--all", "--level", "size")["damaged"] == 0
    found = answer("verify", url, "--all", expect=DAMAGED)
    assert [one["state"] for one in found["checkpoints"]] == ["ok", "damaged", "ok"]
    assert [problem["file"] for problem in found["checkpoints"][1]["problems"]] == ["data.bin"]
    result = call("verify", url, "200", expect=DAMAGED)
    assert "data.bin: " in result.stdout
    assert lines(result)[-1] == "1 checkpoint verified (full), 1 damaged"


def test_verify_counts_what_failed_to_load_as_damaged(repository: Repository, url: str) -> None:
    repository.mark_damaged(repository.find(200), "did not parse")
    assert "did not parse" in call("verify", url, "200", expect=DAMAGED).stdout


def test_verify_takes_a_mark_away_when_asked_to_and_every_byte_is_as_written(repository: Repository, url: str) -> None:
    newest, older, *_ = repository.infos()
    spoil(older, url)
    for info in (newest, older):
        repository.mark_damaged(info, "could not be read")
    found = call("verify", url, "--all", expect=DAMAGED)
    assert "its bytes are as written, but it was marked: could not be read (--unmark takes" in found.stdout
    assert "2 damaged" in found.stdout
    assert "1 damaged" in call("verify", url, "--all", "--unmark", expect=DAMAGED).stdout
    assert [bool(info.damaged) for info in repository.infos()[:2]] == [False, True]
    call("verify", url, "--unmark", "--level", "size", expect=WRONG)


def test_verify_does_not_call_it_damage_when_training_deletes_one_meanwhile(
    repository: Repository, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    verify = Repository.verify

    def deleted_meanwhile(self: Repository, info: CheckpointInfo, level: str = "full") -> Any:
        if info.step == 100:
            repository.drop(info)
        return verify(self, info, level)

    monkeypatch.setattr(Repository, "verify", deleted_meanwhile)
    assert [one["state"] for one in answer("verify", url, "--all")["checkpoints"]] == ["ok", "ok", "gone"]


def test_verify_takes_a_step_or_all(url: str) -> None:
    assert "not both" in call("verify", url, "100", "--all", expect=WRONG).stderr


def test_verify_shows_progress_on_a_terminal_and_nowhere_else(url: str) -> None:
    assert shell("verify", url, "--all").stderr == ""
    code, shown = on_terminal("verify", url, "--all")
    assert code == OK
    assert "600/600 bytes" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


# prune and rm


def test_prune_shows_reasons_and_deletes_what_it_showed(repository: Repository, url: str) -> None:
    rules = ("--keep-last", "1", "--keep-best", "loss:max:1")
    assert "2 of 3" not in call("prune", url, *rules, "--dry-run").stdout
    assert steps(url) == [300, 200, 100]
    planned = answer("prune", url, *rules, "--dry-run")
    assert [(one["step"], one["reasons"]) for one in planned["keep"]] == [
        (300, ["newest", "last: 1 of 1"]),
        (100, ["best: 1 of 1 by max loss (0.01)"]),
    ]
    assert [(one["step"], one["reasons"]) for one in planned["drop"]] == [(200, ["no rule keeps it"])]
    assert (planned["dropped"], planned["freed"]) == ([], 0)
    result = call("prune", url, *rules, "--yes")
    assert "no rule keeps it" in result.stdout
    assert lines(result)[-1] == "deleted 1 checkpoint, 200 B"
    assert steps(url) == [300, 100]
    assert answer("prune", url, *rules)["dropped"] == []
    acquire(repository.store).release()  # the lock was let go


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        (["--keep-every-steps", "200"], [300, 200]),
        (["--keep-newer-than", "24h"], [300, 200, 100]),
        (["--max-bytes", "500"], [300, 200]),
        (["--keep-last", "1", "--min-good", "2"], [300, 200]),
        (["--keep-best", "loss:min", "--keep-best", "loss:max"], [300, 100]),
    ],
)
def test_prune_takes_every_rule_from_the_command_line(url: str, rules: list[str], left: list[int]) -> None:
    answer("prune", url, "--yes", *rules)
    assert steps(url) == left


def test_prune_deletes_nothing_by_default_rules(url: str, tmp_path: Path) -> None:
    path = config_file(tmp_path, root=url)
    for args in ((url,), (path,), (url, "--min-good", "1")):
        assert "no keep rule" in call("prune", *args, "--yes", expect=WRONG).stderr
    assert steps(url) == [300, 200, 100]


def test_prune_takes_the_rules_of_the_configuration_and_lays_those_given_over_them(url: str, tmp_path: Path) -> None:
    path = config_file(tmp_path, root=url, keep={"last": 2, "best": {"metric": "loss", "mode": "max"}})
    assert [one["step"] for one in answer("prune", path, "--dry-run")["keep"]] == [300, 200, 100]
    assert [one["step"] for one in answer("prune", path, "--dry-run", "--keep-last", "1")["keep"]] == [300, 100]


def test_prune_says_what_is_still_over_the_cap(url: str) -> None:
    result = CliRunner().invoke(main, ["prune", url, "--max-bytes", "100", "--dry-run"])
    assert result.stderr == "still 200 B over the cap: the rest must stay\n"


@pytest.mark.parametrize("rule", ["loss", "loss:mid", ":min", "loss:min:x", "min:3"])
def test_prune_refuses_a_best_rule_that_it_cannot_read(url: str, rule: str) -> None:
    assert "METRIC:min" in call("prune", url, "--keep-best", rule, expect=WRONG).stderr


def test_a_metric_may_have_a_colon(repository: Repository, url: str) -> None:
    commit(repository, 400, metrics={"acc@top:1": 1.0})
    assert "top:1:max" not in call("prune", url, "--keep-best", "acc@top:1:max:2", "--dry-run").stdout


@pytest.mark.parametrize("command", ["prune --keep-last 1", "rm 100", "prune --archived"])
def test_deleting_needs_the_lock_and_a_yes(repository: Repository, url: str, command: str) -> None:
    repository.archive(commit(repository, 400))
    name, *rest = command.split()
    assert "--yes" in call(name, url, *rest, expect=WRONG).stderr
    lock = acquire(repository.store)
    assert f"process {os.getpid()}" in call(name, url, *rest, "--yes", expect=HELD).stderr
    lock.release()
    assert steps(url) == [300, 200, 100]
    assert len(repository.archived()) == 1


@pytest.mark.parametrize("command", ["prune --keep-last 1", "rm 100 200", "prune --archived"])
def test_deleting_asks_on_a_terminal(repository: Repository, url: str, command: str) -> None:
    repository.archive(commit(repository, 400))
    name, *rest = command.split()
    code, shown = on_terminal(name, url, *rest, typed="n\n")
    assert (code, "nothing was deleted" in shown) == (OK, True)
    assert (steps(url), len(repository.archived())) == ([300, 200, 100], 1)
    code, shown = on_terminal(name, url, *rest, typed="y\n")
    assert (code, "[y/N]" in shown) == (OK, True)
    assert (steps(url), len(repository.archived())) in (([300], 1), ([300, 200, 100], 0))


def test_a_question_without_an_answer_deletes_nothing(url: str) -> None:
    end_of_input = "\x04"
    code, shown = on_terminal("rm", url, "100", typed=end_of_input)
    assert (code, shown.splitlines()[-1]) == (130, "ckptmgr: interrupted")
    assert steps(url) == [300, 200, 100]


def test_prune_archived_deletes_what_was_put_aside_and_nothing_else(repository: Repository, url: str) -> None:
    repository.archive(repository.find(300))
    assert "keep rules" in call("prune", url, "--archived", "--keep-last", "1", expect=WRONG).stderr
    assert answer("prune", url, "--archived", "--dry-run") == {
        "url": url,
        "archived": [{"step": 300, "name": "step-00000300", "size": 300}],
        "dropped": [],
        "freed": 0,
    }
    assert lines(call("prune", url, "--archived", "--yes")) == [
        "archived  step-00000300  300 B",
        "1 archived checkpoint",
        "deleted 1 checkpoint, 300 B",
    ]
    assert steps(url) == [200, 100]
    assert not (Path(url) / "step-00000300").exists()
    assert answer("prune", url, "--archived", "--yes")["dropped"] == []


def test_rm_deletes_what_it_is_told_and_moves_the_pointer(repository: Repository, url: str) -> None:
    assert answer("rm", url, "300", "step-00000100", "100", "--yes") == {
        "url": url,
        "dropped": ["step-00000300", "step-00000100"],
        "freed": 400,
    }
    assert steps(url) == [200]
    assert repository.pointer.read() == "step-00000200"


def test_rm_deletes_nothing_when_one_of_its_steps_must_stay(repository: Repository, url: str) -> None:
    repository.pin(repository.find(100))
    assert "is pinned" in call("rm", url, "200", "100", "--yes", "--force", expect=WRONG).stderr
    assert "no checkpoint step 7" in call("rm", url, "200", "7", "--yes", expect=NOT_FOUND).stderr
    assert steps(url) == [300, 200, 100]


def test_rm_of_a_step_that_two_checkpoints_have_asks_for_the_folder(repository: Repository, url: str) -> None:
    second = commit(repository, 200, attempt=2)
    stderr = call("rm", url, "200", "--yes", expect=WRONG).stderr
    assert "200 could mean step-00000200.2, step-00000200: give the folder's name; nothing was deleted" in stderr
    assert answer("rm", url, "step-00000200", "--yes")["dropped"] == ["step-00000200"]
    assert repository.find_all(200) == [second]


def test_rm_leaves_a_good_checkpoint_unless_forced(repository: Repository, url: str) -> None:
    repository.mark_damaged(repository.find(100), "torn")
    assert "--force" in call("rm", url, "200", "300", "--yes", expect=WRONG).stderr
    assert steps(url) == [300, 200, 100]
    assert lines(call("rm", url, "100", "--yes")) == ["deleted step-00000100, 100 B"]
    call("rm", url, "200", "300", "--yes", "--force")
    assert steps(url) == []


def test_what_changes_before_the_lock_is_held_is_looked_at_again(
    repository: Repository, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold = Run.hold

    def saved_meanwhile(self: Run) -> None:
        commit(repository, 400)
        hold(self)

    monkeypatch.setattr(Run, "hold", saved_meanwhile)
    assert answer("prune", url, "--keep-last", "1", "--yes")["dropped"] == ["step-00000200", "step-00000100"]
    assert steps(url) == [400, 300]  # 300 was not shown as one to go

    def pinned_meanwhile(self: Run) -> None:
        repository.pin(repository.find(300))
        hold(self)

    monkeypatch.setattr(Run, "hold", pinned_meanwhile)
    assert "is pinned" in call("rm", url, "300", "--yes", expect=WRONG).stderr
    assert steps(url) == [400, 300]


# pin and unpin


def test_pin_keeps_a_checkpoint_until_unpin(repository: Repository, url: str) -> None:
    assert call("pin", url, "100", "--tag", "paper").stdout == "pinned step 100 as paper\n"
    assert answer("prune", url, "--keep-last", "1", "--yes")["dropped"] == ["step-00000200"]
    assert call("unpin", url, "paper").stdout == "removed 1 pin of step 100\n"
    assert repository.find(100).pins == ()
    assert call("unpin", url, "100", expect=NOT_FOUND).stderr == f"ckptmgr: step 100 in {url} has no pin\n"


def test_a_pin_can_end_by_itself_and_have_company(repository: Repository, url: str) -> None:
    before = datetime.now(UTC)
    expires = datetime.fromisoformat(answer("pin", url, "latest", "--ttl", "7d")["expires"])
    assert before + timedelta(days=7) <= expires <= datetime.now(UTC) + timedelta(days=7)
    assert answer("pin", url, "300", "--tag", "a") == {"step": 300, "tag": "a", "expires": None}
    assert "until" in call("pin", url, "300", "--tag", "b", "--ttl", "1h").stdout
    assert answer("unpin", url, "300", "--tag", "a") == {"step": 300, "tag": "a", "removed": 1}
    assert {pin.tag for pin in repository.find(300).pins} == {None, "b"}
    assert "'a'" in call("unpin", url, "300", "--tag", "a", expect=NOT_FOUND).stderr
    assert "removed 2 pins" in call("unpin", url, "300").stdout


def test_a_pin_that_outlived_its_checkpoint_can_be_removed(repository: Repository, url: str) -> None:
    repository.pin(repository.find(100))
    repository.pin(repository.find(200), "paper")
    for name in ("step-00000100", "step-00000200"):
        shutil.rmtree(Path(url) / name)
    assert answer("unpin", url, "100") == {"step": 100, "tag": None, "removed": 1}
    assert call("unpin", url, "paper").stdout == "removed 1 pin of step 200\n"
    assert call("unpin", url, "paper", expect=NOT_FOUND).stderr == f"ckptmgr: 'paper' in {url} has no pin\n"


def test_unpin_takes_best(repository: Repository, url: str, tmp_path: Path) -> None:
    path = config_file(tmp_path, root=url, keep={"best": {"metric": "loss", "mode": "min"}})
    repository.pin(repository.find(300), "paper")
    repository.pin(repository.find(200))
    assert answer("unpin", path, "best") == {"step": 300, "tag": None, "removed": 1}
    assert [pin.step for pin in repository.pins(200)] == [200]


@pytest.mark.parametrize("args", [["--ttl", "soon"], ["--tag", "latest"], ["--tag", "7"]])
def test_pin_refuses_what_it_cannot_keep(repository: Repository, url: str, args: list[str]) -> None:
    call("pin", url, "100", *args, expect=WRONG)
    assert repository.find(100).pins == ()


# config


def test_config_schema_is_that_of_the_settings() -> None:
    assert set(json.loads(call("config", "schema").stdout)["properties"]) == set(CheckpointConfig.model_fields)
    assert answer("config", "schema")["$schema"].startswith("https://json-schema.org/")


def test_config_check_prints_the_settings_without_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTMGR_KEEP__LAST", "5")
    path = config_file(tmp_path, root="s3://b/r", storage={"options": {"secret": "hunter22"}})
    text = call("config", "check", path).stdout
    assert "hunter22" not in text
    assert yaml.safe_load(text) == answer("config", "check", path)
    assert (yaml.safe_load(text)["root"], yaml.safe_load(text)["keep"]["last"]) == ("s3://b/r", 5)


def test_config_check_lists_every_error(tmp_path: Path) -> None:
    path = config_file(tmp_path, rot="runs", keep={"last": 0})
    stderr = call("config", "check", path, expect=WRONG).stderr
    assert all(word in stderr for word in ("rot", "keep.last", "root"))
    assert ".yaml" in call("config", "check", tmp_path, expect=WRONG).stderr


def test_config_check_imports_the_predicate_from_the_current_folder_and_nothing_else_does(
    url: str, tmp_path: Path
) -> None:
    (tmp_path / "myrules.py").write_text("def due(moment): return True\n")
    path = config_file(tmp_path, root=url, save={"when": "myrules:due"})
    script = "import sys; from ckptmgr.__main__ import main; sys.path.remove(''); main()"

    def installed(*args: str) -> subprocess.CompletedProcess[str]:
        """As the installed command runs: without the current folder on the path."""
        return subprocess.run(
            [sys.executable, "-c", script, *args],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
            text=True,
            capture_output=True,
        )

    checked = installed("config", "check", "run.yaml")
    assert (checked.returncode, "when: myrules:due" in checked.stdout) == (OK, True), checked.stderr
    path.write_text(path.read_text().replace("myrules", "notthere"))
    assert installed("ls", "run.yaml").returncode == OK
    assert "notthere" in installed("config", "check", "run.yaml").stderr


# URLs, options and secrets


def test_any_fsspec_url_is_a_root() -> None:
    root = "memory://cli/run"
    commit(Repository(open_store(root)), 100)
    assert answer("ls", root)["url"] == root
    assert call("latest", root).stdout == f"{root}/step-00000100\n"
    assert answer("verify", root)["damaged"] == 0


def test_every_command_works_on_an_object_store(s3_moto: Bucket, tmp_path: Path) -> None:
    repository = Repository(open_store(s3_moto.url, s3_moto.options))
    for step in (100, 200, 300):
        commit(repository, step)
    by_flags = ["--option", json.dumps({"key": s3_moto.options["key"]})]
    by_flags += ["--option", f"secret={s3_moto.options['secret']}"]
    by_flags += ["--option", f"endpoint_url={s3_moto.options['endpoint_url']}"]
    assert answer("ls", s3_moto.url, *by_flags)["count"] == 3
    path = config_file(tmp_path, root=s3_moto.url, keep={"last": 2}, storage={"options": s3_moto.options})
    assert answer("show", path)["files"][0]["size"] == 300
    assert answer("verify", path, "--all")["damaged"] == 0
    assert answer("pin", path, "100", "--tag", "first")["step"] == 100
    assert answer("prune", path, "--dry-run")["drop"] == []
    assert answer("unpin", path, "first")["removed"] == 1
    assert answer("prune", path, "--yes")["dropped"] == ["step-00000100"]
    assert answer("rm", path, "200", "--yes")["dropped"] == ["step-00000200"]
    assert call("latest", path).stdout == f"{s3_moto.url}/step-00000300\n"


def test_secrets_are_never_printed(s3_moto: Bucket) -> None:
    given = {**s3_moto.options, "secret": "hunter22hunter22", "client_kwargs": {"nonsense": ["hunter33"]}}
    for root, options, code in (
        (s3_moto.url, given, STORE_FAILED),
        ("s3://user:hunter44@no-such-bucket/x", s3_moto.options, STORE_FAILED),
    ):
        result = call("ls", root, "--debug", "--option", json.dumps(options), expect=code)
        assert "Traceback" in result.stderr
        assert not re.search(r"hunter|testsecret", result.output), result.output
    result = call("ls", "runs", "--option", "hunter55", expect=WRONG)
    assert "hunter" not in result.output
    assert "hunter" not in call("ls", "runs", "--option", "{hunter66", expect=WRONG).output


def test_options_are_json_where_they_can_be() -> None:
    from ckptmgr.cli.roots import _parsed

    context, parameter = click.Context(main), click.Option(["--option"])
    texts = ["a=x=y", "b=7", 'c="7"', "d=[1]", '{"e": {"f": null}}']
    assert _parsed(context, parameter, texts) == {"a": "x=y", "b": 7, "c": "7", "d": [1], "e": {"f": None}}


def test_settings_come_from_the_environment_too(
    s3_moto: Bucket, monkeypatch: pytest.MonkeyPatch, repository: Repository, url: str
) -> None:
    commit(Repository(open_store(s3_moto.url, s3_moto.options)), 100)
    monkeypatch.setenv("CKPTMGR_STORAGE__OPTIONS", json.dumps(s3_moto.options))
    assert answer("ls", s3_moto.url)["count"] == 1


def test_a_configuration_gives_names_and_pointer(tmp_path: Path) -> None:
    from ckptmgr.folder_names import NameTemplate

    made = Repository(open_store(tmp_path / "r", fsync=False), names=NameTemplate("at{step}"), pointer="newest")
    commit(made, 5)
    (tmp_path / "r/at6").mkdir()
    (tmp_path / "r/at6/manifest.json").write_text("torn")
    path = config_file(tmp_path, root=str(tmp_path / "r"), name="at{step}", latest="newest")
    listed = answer("ls", path)
    assert ({one["name"] for one in listed["checkpoints"]}, listed["latest"]) == ({"at5", "at6"}, "at5")
    assert answer("ls", tmp_path / "r")["pointer"] is None


# Errors


def test_every_error_is_one_message_and_an_exit_code(repository: Repository, url: str, tmp_path: Path) -> None:
    manifest = Path(url) / "step-00000300/manifest.json"
    manifest.write_text(manifest.read_text().replace('"format_version": 2', '"format_version": 99'))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked/.ckptmgr").symlink_to(url)
    (tmp_path / "linked/step-00000001").mkdir()
    for code, args in (
        (NEWER, ["ls", url]),
        (STORE_FAILED, ["ls", str(tmp_path / "linked")]),
        (NOT_FOUND, ["ls", str(tmp_path / "nothing")]),
        (WRONG, ["ls", "foo://x"]),
        (WRONG, ["ls", str(tmp_path / "none.yaml")]),
    ):
        result = call(*args, expect=code)
        assert result.stdout == ""
        assert re.fullmatch(r"ckptmgr: .+\n", result.stderr)
        assert "Traceback" in call(*args, "--debug", expect=code).stderr


def test_a_fault_of_our_own_is_not_taken_for_damage(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Pointer) -> None:
        raise RuntimeError("surprise")

    monkeypatch.setattr(Pointer, "read", broken)
    assert "RuntimeError('surprise')" in call("ls", url, expect=FAULT).stderr


def test_a_broken_pipe_is_quiet(url: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "ckptmgr", "ls", url], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_the_shell_sees_the_exit_codes(repository: Repository, url: str) -> None:
    spoil(repository.find(300), url)
    assert shell("verify", url).returncode == DAMAGED
    assert shell("nonsense").returncode == WRONG
    done = shell("ls", f"{url}x")
    assert (done.returncode, done.stdout, done.stderr) == (NOT_FOUND, "", f"ckptmgr: no checkpoint in {url}x\n")


def commands(group: click.Group = main, *path: str) -> dict[tuple[str, ...], click.Command]:
    found: dict[tuple[str, ...], click.Command] = {}
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found |= commands(command, *path, name)
        else:
            found[(*path, name)] = command
    return found


def test_every_command_has_help_an_example_and_json() -> None:
    for path, command in commands().items():
        text = call(*path, "--help").stdout
        assert f"Example:\n    {'ckptmgr' if path != ('latest',) else 'aws'} " in text
        assert f"ckptmgr {' '.join(path)}" in text.partition("Example:")[2]
        assert {"--json", "--debug"} <= {option for parameter in command.params for option in parameter.opts}
        assert all(option.help for option in command.params if isinstance(option, click.Option))
    assert "Exit codes:" in call("--help").stdout


# What a command costs


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("thousand")
    files = tuple(FileEntry(f"{name}.safetensors", 1 << 20, digest(b"")) for name in ("model", "optimizer"))
    for step in range(1, 1001):
        (root / f"step-{step:08d}").mkdir()
        manifest = Manifest(
            step=step, run="demo", attempt=1, nonce=f"{step:016x}", time=datetime.now(UTC), format="raw", files=files
        )
        (root / f"step-{step:08d}/manifest.json").write_bytes(manifest.to_json())
    return str(root)


def in_fresh_process(script: str, *args: str) -> Any:
    """What a script prints as JSON in its last line."""
    done = subprocess.run([sys.executable, "-c", script, *args], text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_ls_reads_each_manifest_once_and_lists_a_fixed_number_of_folders(thousand: str) -> None:
    script = """
import collections, json, os, sys
root, counts = sys.argv[1], collections.Counter()
def count(event, args):
    if event in ("open", "os.scandir", "os.listdir") and str(args[0]).startswith(root):
        counts[event] += 1
sys.addaudithook(count)
from ckptmgr.cli import main
main(["ls", root], standalone_mode=False)
print(json.dumps(counts))
"""
    counts = in_fresh_process(script, thousand)
    assert counts["open"] <= 1000 + 3  # and the pointer, by the listing too, and what was verified when
    assert counts["os.scandir"] <= 2
    assert "os.listdir" not in counts


def test_ls_of_a_folder_imports_nothing_heavy_and_no_reading_command_imports_torch(url: str) -> None:
    script = """
import json, sys
from ckptmgr.cli import main
url, seen = sys.argv[1], {}
for line in sys.argv[2:]:
    main(line.split(), standalone_mode=False)
    heavy = ("torch", "numpy", "pydantic", "fsspec", "yaml", "rich", "safetensors")
    seen[line] = [name for name in heavy if name in sys.modules]
print(json.dumps(seen))
"""
    light = [f"ls {url}", f"show {url}", f"latest {url}", f"verify {url} --all", f"pin {url} 100", f"unpin {url} 100"]
    heavier = [f"prune {url} --keep-last 1 --dry-run", f"prune {url} --archived", f"rm {url} 100 --yes"]
    heavier += ["config check configs/minimal.yaml", "config schema"]
    seen = in_fresh_process(script, url, *light, *heavier)
    assert [seen[line] for line in light] == [[]] * len(light)
    assert [line for line in heavier if {"torch", "numpy", "safetensors"} & set(seen[line])] == []


# Texts


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s ago"), (119, "119 s ago"), (120, "2 min ago"), (7200, "2 h ago"), (3 * 86400, "3 d ago")],
)
def test_ages_are_told_in_the_largest_unit_of_which_two_have_passed(seconds: int, text: str) -> None:
    assert age_text(timedelta(seconds=seconds)) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (5 << 20, "5.0 MiB"),
        (3 << 30, "3.0 GiB"),
        (1 << 61, "2048.0 PiB"),
    ],
)
def test_sizes_are_told_in_powers_of_1024(size: int, text: str) -> None:
    assert size_text(size) == text


def test_a_table_shows_three_metrics() -> None:
    assert metrics_text({"a": 1.0, "b": 0.123456, "c": 3e-9, "d": 4.0, "e": 5.0}) == "a=1 b=0.1235 c=3e-09 +2"


def on_terminal(*args: str, typed: str = "") -> tuple[int, str]:
    """A command on a terminal: its exit code, and what is seen there."""
    controller, terminal = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "ckptmgr", *args],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=_own_terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120"},
    ) as process:
        os.close(terminal)
        shown = b""
        while True:
            try:
                data = os.read(controller, 4096)
            except OSError:  # the terminal has no writer any more
                break
            if not data:
                break
            shown += data
            if typed and b"[y/N]: " in shown:
                os.write(controller, typed.encode())
                typed = ""
    os.close(controller)
    return process.returncode, shown.decode()


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_pin_that_is_to_hold_too_long_is_refused_and_told_how_to_hold_for_ever(
    repository: Repository, url: str
) -> None:
    told = call("pin", url, "100", "--ttl", "9999999d", expect=WRONG).stderr
    assert "must be at most 100000d (about 270 years); give a shorter time, or none to pin for ever" in told
    with (
        CheckpointManager(url, read_only=True) as manager,
        pytest.raises(ConfigError, match=r"^ttl='9999999d': must be at most 100000d .*, or none to pin for ever$"),
    ):
        manager.pin(100, ttl="9999999d")
    assert repository.pins(100) == []
    call("pin", url, "100", "--ttl", "100000d")
    assert [pin.holds(datetime.now(UTC) + timedelta(days=99_000)) for pin in repository.pins(100)] == [True]


def test_pin_says_of_a_long_tag_that_it_is_too_long(repository: Repository, url: str) -> None:
    told = call("pin", url, "100", "--tag", "t" * 240, expect=WRONG).stderr
    assert "has 240 characters, more than 200: use a shorter one" in told
    assert repository.pins(100) == []


# What a person deletes, and what is to stay instead


def cut(info: CheckpointInfo, url: str) -> None:
    (Path(url) / info.name / "data.bin").write_bytes(b"x")


def test_prune_counts_only_those_whose_files_have_the_right_sizes(repository: Repository, url: str) -> None:
    cut(repository.find(300), url)
    planned = answer("prune", url, "--keep-last", "1", "--dry-run")
    assert [(one["step"], one["damage"] is None) for one in planned["keep"]] == [(300, False), (200, True)]
    assert "data.bin: has 1 bytes, not the 300" in call("prune", url, "--keep-last", "1", "--dry-run").stdout
    assert [info.damaged for info in repository.infos()] == [None] * 3  # a dry run leaves no mark
    assert answer("prune", url, "--keep-last", "1", "--yes")["dropped"] == ["step-00000100"]
    assert [(info.step, info.damaged is None) for info in repository.infos()] == [(300, False), (200, True)]


@pytest.mark.parametrize(
    "rules",
    [
        ("--keep-best", "loss:min"),
        ("--keep-every-steps", "300"),
        ("--max-bytes", "300"),
        ("--keep-last", "1", "--min-good", "1"),
    ],
)
def test_whatever_the_rule_a_good_checkpoint_is_left_where_the_one_it_prefers_lacks_bytes(
    repository: Repository, url: str, rules: tuple[str, ...]
) -> None:
    cut(repository.find(300), url)
    answer("prune", url, *rules, "--yes")
    assert answer("verify", url, "200")["damaged"] == 0


def test_prune_where_the_newer_half_lacks_bytes_keeps_the_newest_good_one(tmp_path: Path) -> None:
    made = Repository(open_store(tmp_path / "runs", fsync=False))
    for step in range(1, 101):
        info = commit(made, step)
        if step > 50:
            (tmp_path / "runs" / info.name / "data.bin").unlink()
    answer("prune", tmp_path / "runs", "--keep-last", "1", "--yes")
    assert [info.step for info in made.infos() if info.damaged is None] == [50]


def test_rm_takes_none_that_lacks_bytes_for_the_good_one_that_is_left(repository: Repository, url: str) -> None:
    cut(repository.find(300), url)
    stderr = call("rm", url, "100", "200", "--yes", expect=WRONG).stderr
    assert "no good checkpoint would be left" in stderr
    assert "verify --all" in stderr
    assert steps(url) == [300, 200, 100]
    assert answer("rm", url, "100", "--yes")["dropped"] == ["step-00000100"]
    assert [(info.step, info.damaged is None) for info in repository.infos()] == [(300, False), (200, True)]
    assert answer("rm", url, "300", "--yes")["dropped"] == ["step-00000300"]
    call("rm", url, "200", "--yes", expect=WRONG)
    assert answer("rm", url, "200", "--yes", "--force")["dropped"] == ["step-00000200"]


def test_prune_refuses_a_metric_that_no_checkpoint_has(repository: Repository, url: str) -> None:
    commit(repository, 400, metrics={"acc": 0.5})
    for flag in ("--yes", "--dry-run"):
        stderr = call("prune", url, "--keep-best", "lss:min", flag, expect=WRONG).stderr
        there = "metrics there: acc, loss, odd; did you mean loss?"
        assert stderr == f"ckptmgr: no checkpoint in {url} has a metric lss; {there}\n"
    assert "acc, loss, odd\n" in call("prune", url, "--keep-best", "wer:min", "--yes", expect=WRONG).stderr
    assert steps(url) == [400, 300, 200, 100]


def test_ls_marks_what_latest_prints(repository: Repository, url: str) -> None:
    repository.mark_damaged(repository.find(300), "torn")
    assert repository.pointer.read() == "step-00000300"
    marked = [line for line in lines(call("ls", url)) if line.endswith("<- latest")]
    assert [line.split()[-3] for line in marked] == ["step-00000200"]
    listed = answer("ls", url)
    assert (listed["latest"], listed["pointer"]) == ("step-00000200", "step-00000300")
    assert answer("latest", url)["name"] == "step-00000200"


def test_another_ones_manifest_json_in_a_root_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    assert call("ls", tmp_path, expect=NOT_FOUND).stderr == f"ckptmgr: no checkpoint in {tmp_path}\n"


def test_under_a_cap_one_that_lacks_bytes_takes_no_room_from_a_good_one(repository: Repository, url: str) -> None:
    cut(repository.find(200), url)
    assert answer("prune", url, "--max-bytes", "500", "--yes")["dropped"] == ["step-00000200"]


def test_one_that_lacks_bytes_takes_no_place_of_an_earlier_one_of_its_step(repository: Repository, url: str) -> None:
    second = commit(repository, 200, attempt=2)
    commit(repository, 400, attempt=2)
    rules = ("--keep-newer-than", "24h")
    assert [one["name"] for one in answer("prune", url, *rules, "--dry-run")["drop"]] == ["step-00000200"]
    cut(second, url)
    assert [one["name"] for one in answer("prune", url, *rules, "--dry-run")["drop"]] == [second.name]


def test_rm_of_what_is_known_to_be_damaged_takes_no_good_one_away(repository: Repository, url: str) -> None:
    repository.mark_damaged(repository.find(300), "torn")
    for step in (100, 200):
        cut(repository.find(step), url)
    assert answer("rm", url, "300", "--yes")["dropped"] == ["step-00000300"]
