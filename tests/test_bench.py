"""What does `ckptmgr bench` promise? True figures, values checked, nothing left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from ckptmgr.bench import BUILT_IN, Contender, Outcome, Place, Report, Task, disk, footprint, limits, measure
from ckptmgr.bench.measures import measured
from ckptmgr.bench.peers import TorchSave
from ckptmgr.bench.report import time_text
from ckptmgr.bench.session import IDEAL, rotated
from ckptmgr.bench.state import State, build, change, difference, fingerprints, scramble
from ckptmgr.cli import main
from ckptmgr.cli.benchmark import print_report
from ckptmgr.memory import buffer

MIB = 1 << 20
OURS, OURS_SYNCHRONOUS = BUILT_IN["ckptmgr"]
(TORCH,) = BUILT_IN["torch.save"]
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


class Corrupting(TorchSave):
    """Saves another number than it was given."""

    def save(self, state: State, step: int) -> None:
        with torch.no_grad():
            first = next(state.model.parameters()).view(-1)
            kept = first[0].item()
            first[0] = 17.0
            super().save(state, step)
            first[0] = kept


class Late(TorchSave):
    """Returns before it has copied anything."""

    def save(self, state: State, step: int) -> None:
        self._late = (state, step)

    def wait(self) -> None:
        super().save(*self._late)


class Interrupting(TorchSave):
    """Has the benchmark interrupted in the middle of a save, by the signal that its mode names, and goes on."""

    def __init__(self, place: Place, mode: str) -> None:
        super().__init__(place, mode)
        self._mode = mode

    def save(self, state: State, step: int) -> None:
        super().save(state, step)
        (Path(self._place.url).parents[3] / "pid").write_text(str(os.getpid()))
        os.kill(os.getppid(), signal.Signals[self._mode])
        signal.pause()


class Dying(TorchSave):
    """Ends its process."""

    def save(self, state: State, step: int) -> None:
        print("no more memory", file=sys.stderr, flush=True)
        os._exit(9)


class Refusing(TorchSave):
    """Takes nothing."""

    def save(self, state: State, step: int) -> None:
        raise RuntimeError("too many tensors")


def here(kind: type, mode: str = "synchronous") -> Contender:
    return Contender(kind.__name__, mode, f"{__name__}:{kind.__name__}")


def bench(*args: str | Path, expect: int = 0) -> Result:
    result = CliRunner().invoke(main, ["bench", *map(str, args)])
    assert result.exit_code == expect, result.output
    return result


def task(tmp_path: Path, contender: Contender, *measures: str, **more: Any) -> Task:
    return Task(measures, Place(str(tmp_path / "place")), MIB, contender=contender, **more)


def given(contender: Contender, **figures: Sequence[float]) -> tuple[Task, Outcome]:
    return Task((), Place("x"), 100, contender=contender), Outcome({name: list(v) for name, v in figures.items()})


def report(*outcomes: tuple[Task, Outcome], **limit: Sequence[float]) -> Report:
    of_limits = (Task(("limits",), Place("x"), 100), Outcome({name: list(v) for name, v in limit.items()}))
    return Report.of("runs", 100, None, 2, "cpu", [of_limits, *outcomes])


# The command


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    (folder / "mine").write_text("kept")
    return folder


@pytest.fixture(scope="module")
def answer(root: Path) -> Any:
    return json.loads(bench(root, "--size", "2MiB", "--repeats", "1", "--peers", "ckptmgr", "--json").stdout)


def test_json_has_every_figure_of_every_contender(answer: Any, root: Path) -> None:
    figures = {(one["peer"], one["mode"]): set(one["figures"]) for one in answer["contenders"]}
    always = {"bytes", "first_stall", "first_durable", "stall", "durable", "warm"}
    if not disk.is_in_memory(root):
        always.add("cold")
    if sys.platform == "linux":
        always |= {"save_bytes", "level_bytes", "resume_bytes"}
    assert figures == {
        ("ckptmgr", "background"): always | {"lost"},
        ("ckptmgr", "synchronous"): always,
    }
    assert {"copy", "write", "cached", "ideal"} <= set(answer["limits"])
    assert [one["failure"] or one["wrong"] for one in answer["contenders"]] == [None, None]


def test_json_has_every_sample_and_its_ratios(answer: Any) -> None:
    ours = answer["contenders"][0]["figures"]
    assert len(ours["stall"]["samples"]) == 2
    assert ours["stall"]["best"] == min(ours["stall"]["samples"])
    ratio = ours["durable"]["median"] / answer["limits"]["write"]["median"]
    assert ours["durable"]["to_limit"] == pytest.approx(ratio, rel=0.05)


def test_only_what_was_there_before_is_there_afterwards(answer: Any, root: Path) -> None:
    assert [(path.name, path.read_text()) for path in root.iterdir()] == [("mine", "kept")]


def test_the_table_shows_who_gave_back_other_values_and_a_new_root_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupting = Contender("torch.save", "synchronous", f"{__name__}:Corrupting")
    monkeypatch.setitem(BUILT_IN, "torch.save", (corrupting,))  # type: ignore[arg-type]
    root = tmp_path / "a/b"
    shown = bench(root, "--size", "1MiB", "--repeats", 1, "--peers", "torch.save", "--tensors", 8, expect=1).stdout
    assert shown.startswith(f"1 MiB in 8 tensors, 1 repeat, medians, in {root}\n")
    lines = [re.split(r"  +", line) for line in shown.splitlines()]
    assert ["save", "first wait", "wait", "durable", "MiB/s", "memory"] in lines
    assert re.search(r"^torch.save synchronous .* 1\.00T ", shown, re.MULTILINE)
    assert "L: what this machine can do at best: copy " in shown
    assert "WRONG: torch.save synchronous gave back other values: loaded" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (
            ["--size", "9PB"],
            r"a state of 9,000,000,000,000,000 bytes needs 27,000,000,000,000,000 bytes of disk .* free",
        ),
        (["--size", "1kB"], "1,000 bytes is too small"),
        (["--size", "much"], "must be a size above 0"),
        (["--peers", "ckptmgr,floppy"], "'floppy' is none of ckptmgr, torch.save, dcp"),
    ],
)
def test_what_can_not_be_measured_is_refused_with_the_numbers(tmp_path: Path, args: list[str], told: str) -> None:
    assert re.search(told, bench(tmp_path / "x", *args, expect=2).stderr)
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_nothing_can_be_saved_is_a_failure_of_the_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    told = bench(tmp_path / "file", "--size", "1MiB", "--repeats", 1, "--peers", "torch.save", expect=5).stderr
    assert told.startswith(f"ckptmgr: nothing could be measured in {tmp_path / 'file'}: NotADirectoryError")


@on_linux
def test_a_state_larger_than_memory_is_refused_with_the_numbers() -> None:
    told = bench("memory://bench", "--size", "9TB", expect=2).stderr
    assert re.search(r"needs 27,000,536,870,912 bytes of memory .* and [\d,]+ are available", told)


# The session


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_ends_what_is_running_and_cleans_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(BUILT_IN, "dcp", (here(Interrupting, name),))  # type: ignore[arg-type]
    said = bench(tmp_path / "root", "--size", "1MiB", "--peers", "dcp", expect=130).stderr
    assert said.strip() == "ckptmgr: interrupted"
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["pid"]


def test_one_that_fails_or_dies_is_reported_and_the_next_is_measured(tmp_path: Path) -> None:
    told: list[str] = []
    found = measure(
        str(tmp_path), {}, [here(Refusing), here(Dying)], size=MIB, repeats=1, measures=["times"],
        progress=lambda done, total, what: told.append(f"{done}/{total} {what}"),
    )  # fmt: skip
    failures = {one.peer: figures.failure for one, figures in found.contenders.items()}
    assert failures == {
        "Refusing": "RuntimeError: too many tensors",
        "Dying": "its process ended with code 9 no more memory",
    }
    assert told == ["0/3 limits", "1/3 Refusing synchronous", "2/3 Dying synchronous"]


def test_every_repeat_begins_with_another_contender_and_with_the_limits() -> None:
    whole = Task((), Place("x"), 1)
    order = [
        [
            one.contender.name if one.contender else "limits"
            for one in rotated(whole, [OURS, TORCH], {"lost", "times"}, turn)
        ]
        for turn in range(3)
    ]
    ours, torchs, ideal = OURS.name, TORCH.name, IDEAL.name
    assert order == [
        ["limits", ours, torchs, ideal],
        ["limits", torchs, ideal, ours],
        ["limits", ideal, ours, torchs],
    ]


def test_a_task_travels_as_json(tmp_path: Path) -> None:
    sent = task(tmp_path, OURS, "times", tensors=8)
    assert Task.from_json(json.loads(json.dumps(dataclasses.asdict(sent)))) == sent


# The measurements


@pytest.mark.parametrize("contender", [*BUILT_IN["ckptmgr"], TORCH, *BUILT_IN["dcp"]], ids=lambda one: one.name)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_every_contender_gives_back_what_it_was_given(tmp_path: Path, contender: Contender) -> None:
    found = measured(task(tmp_path, contender, "times", "memory"))
    assert (found.failure, found.wrong) == (None, None)
    assert len(found.figures["stall"]) == 2


def test_a_save_that_copies_too_late_is_wrong(tmp_path: Path) -> None:
    found = measured(task(tmp_path, here(Late), "memory"))
    assert found.wrong is not None
    assert found.wrong.startswith("changed in place right after the save began, and loaded: ")


def test_time_lost_is_measured_for_the_ideal_too(tmp_path: Path) -> None:
    for contender in (OURS, IDEAL):
        assert len(measured(task(tmp_path, contender, "lost")).figures["lost"]) == 2


def test_object_stores_are_measured_without_what_only_disks_have() -> None:
    for contender in (OURS, TORCH):
        place = Place(f"memory://bench/{contender.peer}", is_local=False)
        found = measured(Task(("times",), place, MIB, contender=contender))
        assert found.wrong is None
        assert set(found.figures) == {"bytes", "first_stall", "first_durable", "stall", "durable", "cold"}


def test_the_limits_of_a_disk_are_more_than_those_of_memory(tmp_path: Path) -> None:
    local = limits.limits(Task(("limits",), Place(str(tmp_path)), MIB))
    assert (local.wrong, {"copy", "write", "cached"} <= set(local.figures)) == (None, True)
    assert set(limits.limits(Task(("limits",), Place("memory://x", is_local=False), MIB)).figures) == {"copy"}


# The state


@pytest.mark.parametrize(("size", "tensors"), [(MIB, None), (64 * MIB, None), (MIB, 400)])
def test_a_state_is_as_large_as_asked(size: int, tensors: int | None) -> None:
    state = build(size, tensors, "cpu")
    assert state.size == pytest.approx(size, rel=0.03)
    assert tensors is None or len(state.tensors()) == tensors


def test_every_tensor_changes_and_every_scrambled_one_is_found() -> None:
    state = build(MIB, 40, "cpu")
    before = fingerprints(state)
    assert len(set(before.values())) >= 30  # but for the steps, no two alike
    change(state)
    changed = fingerprints(state)
    assert [name for name in before if before[name] == changed[name]] == []
    assert difference(state, changed) is None
    scramble(state)
    assert difference(state, changed) == "40 of 40 tensors, such as model.0"


# Memory and files


@on_linux
def test_the_peak_is_what_was_held_for_a_moment() -> None:
    before = footprint.level()
    assert before is not None
    with footprint.Peak() as peak:
        held = buffer(32 * MIB)
        held[::4096] = bytes(len(held) // 4096)
        seen = footprint.level()
        del held
    assert seen is not None
    assert seen - before == pytest.approx(32 * MIB, abs=2 * MIB)
    assert peak.bytes <= seen + 2 * MIB


def test_what_is_written_past_the_cache_is_read_back(tmp_path: Path) -> None:
    data, target = buffer(disk.whole_blocks(9 * MIB + 1)), buffer(disk.whole_blocks(9 * MIB + 1))
    data[-3:] = b"end"
    assert disk.write_whole(tmp_path / "file", data) > 0
    disk.flush(tmp_path)
    for cached in (False, True):
        target[-3:] = b"   "
        assert disk.read_whole(tmp_path / "file", target, cached=cached) > 0
        assert target == data
    with pytest.raises(OSError, match="ends at byte"):
        disk.read_whole(tmp_path / "file", buffer(len(data) + 4096), cached=True)


@on_linux
def test_files_in_memory_are_never_called_forgotten(tmp_path: Path) -> None:
    assert disk.forget(Path("/dev/shm")) is False
    assert disk.forget(tmp_path) is not disk.is_in_memory(tmp_path)


# The report


def test_ratios_are_of_medians_and_scaled_to_the_same_bytes() -> None:
    found = report(
        given(OURS, bytes=[200], stall=[6, 2, 4], durable=[30], cold=[5]),
        given(TORCH, bytes=[200], durable=[40], cold=[10]),
        given(IDEAL, lost=[3]),
        copy=[1],
        write=[10, 10],
        read=[5],
    )
    assert found.seconds("ckptmgr", "background", "stall") == 4
    assert found.to_limit(OURS, "stall") == 2  # the limit is of 100 bytes, and twice as many were copied
    assert found.to_limit(OURS, "durable") == 1.5
    assert found.to_reference(OURS, "stall") == 0.1
    assert found.to_reference(OURS, "cold") == 0.5
    assert found.to_reference(OURS, "warm") is None
    assert found.throughput(OURS) == 200 / 30
    assert found.limits.median("ideal") == 3


def test_advice_for_a_save_in_the_background_names_its_cadence() -> None:
    advice = report(
        given(OURS, stall=[0.05], durable=[0.3], lost=[0.06], first_stall=[0.1], save_bytes=[100 * MIB]),
        given(OURS_SYNCHRONOUS, durable=[0.25], save_bytes=[20 * MIB]),
    ).advice()
    assert advice == [
        "Save in the background, which is the default: training waits 50 ms for a save, and 250 ms with "
        "background: false.",
        "A save costs 60 ms of training time: every 10 min that is 0.01 %, and saving every 6 s or less often keeps "
        "it under 1 %.",
        "A save is durable after 300 ms. Only a loop that saves more often than that ever waits for the save before; "
        "when_busy: skip leaves such saves out.",
        "The first save waits 100 ms, as it makes the memory for the copy: prepare(state) before the loop, or "
        "resume(), takes most of that out of it.",
        "Saving in the background holds 100 MiB of memory; background: false needs 20 MiB.",
    ]


def test_advice_is_to_save_synchronously_where_the_background_costs_more() -> None:
    advice = report(
        given(OURS, stall=[0.05], durable=[0.3], lost=[0.4]), given(OURS_SYNCHRONOUS, durable=[0.1])
    ).advice()
    assert advice[0].startswith("Save synchronously (background: false): a save takes 100 ms")
    assert report(given(TORCH, durable=[1.0])).advice() == []


def test_failures_are_told_below_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    found = report((Task((), Place("x"), 1, contender=TORCH), Outcome(failure="no \x1b[31m disk")))
    with main.make_context("ckptmgr", ["config", "schema"]):
        print_report(found, "runs")
    assert "torch.save synchronous failed: no ?[31m disk" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0012, "1.2 ms"),
        (0.0123, "12 ms"),
        (0.9999, "1 s"),
        (1.234, "1.23 s"),
        (90, "90 s"),
        (300, "5 min"),
        (9000, "2.5 h"),
    ],
)
def test_times_are_told_in_the_unit_that_suits_them(seconds: float, text: str) -> None:
    assert time_text(seconds) == text
