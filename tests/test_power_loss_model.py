"""The states that a power cut may leave are those that the calls before it allow, and no others."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ckptmgr.testing import Call, DiskState, PowerLoss, SystemCalls

OLD, NEW = b"o" * 600, b"n" * 1300


def calls(*steps: tuple[Any, ...]) -> list[Call]:
    """Calls by name, path and whatever else."""
    made = []
    for number, (name, path, *more) in enumerate(steps, 1):
        if name == "write":
            offset, data = more
            made.append(Call(number, name, path, offset=offset, size=len(data), data=data))
        elif name in ("truncate", "allocate"):
            made.append(Call(number, name, path, size=more[0]))
        else:
            made.append(Call(number, name, path, *more))
    return made


def at_the_end(made: list[Call], before: DiskState | None = None) -> list[DiskState]:
    """What may be there when all calls were made."""
    return [state for state in PowerLoss(made, before).states(promises=[len(made)]) if state.calls == len(made)]


def contents(made: list[Call], name: str, before: DiskState | None = None) -> set[bytes | None]:
    return {state.files.get(name) for state in at_the_end(made, before)}


def write_file(name: str, data: bytes = b"data") -> list[tuple[Any, ...]]:
    return [("create", name), ("write", name, 0, data)]


def test_what_was_not_fsynced_is_there_or_not() -> None:
    made = calls(*write_file("a"))
    assert contents(made, "a") == {None, b"", b"data", b"\0\0\0\0"}


def test_an_fsync_of_the_file_keeps_its_bytes_but_not_its_name() -> None:
    made = calls(*write_file("a"), ("sync", "a"))
    assert contents(made, "a") == {None, b"data"}


def test_an_fsync_of_the_folder_keeps_the_name_but_not_the_bytes() -> None:
    made = calls(*write_file("a"), ("sync_folder", "."))
    assert contents(made, "a") == {b"", b"data", b"\0\0\0\0"}


def test_both_keep_the_file() -> None:
    made = calls(*write_file("a"), ("sync", "a"), ("sync_folder", "."))
    assert contents(made, "a") == {b"data"}


def test_what_is_written_after_the_fsync_is_not_durable() -> None:
    made = calls(*write_file("a", b"one"), ("sync", "a"), ("sync_folder", "."), ("write", "a", 3, b"two"))
    assert contents(made, "a") == {b"one", b"one\0\0\0", b"onetwo"}


def test_the_name_of_a_folder_is_not_kept_by_an_fsync_of_that_folder() -> None:
    made = calls(("mkdir", "f"), *write_file("f/a"), ("sync", "f/a"), ("sync_folder", "f"))
    assert contents(made, "f/a") == {None, b"data"}
    assert contents([*made, Call(6, "sync_folder", ".")], "f/a") == {b"data"}


def test_a_rename_may_overtake_the_bytes() -> None:
    """The file of that name from before is lost then, too."""
    before = DiskState({"final": b"old"})
    made = calls(*write_file("temp", b"new"), ("rename", "temp", "final"))
    assert contents(made, "final", before) == {b"old", b"", b"new", b"\0\0\0"}


def test_a_rename_is_never_half() -> None:
    before = DiskState({"d/a": b"old"}, frozenset({"d", "e"}))
    made = calls(("rename", "d/a", "e/b"))
    assert [dict(state.files) for state in at_the_end(made, before)] == [{"e/b": b"old"}, {"d/a": b"old"}]


@pytest.mark.parametrize(("folder", "is_durable"), [("e", True), ("d", False)])
def test_a_rename_is_durable_with_the_folder_it_went_to(folder: str, is_durable: bool) -> None:
    before = DiskState({"d/a": b"old"}, frozenset({"d", "e"}))
    made = calls(("rename", "d/a", "e/b"), ("sync_folder", folder))
    assert (len(at_the_end(made, before)) == 1) is is_durable


def test_a_folder_that_was_renamed_twice_is_in_one_place() -> None:
    before = DiskState({"a/x": b"1"}, frozenset({"a"}))
    made = calls(("rename", "a", "b"), ("rename", "b", "c"))
    assert {tuple(state.files) for state in at_the_end(made, before)} == {("a/x",), ("b/x",), ("c/x",)}


def test_a_removed_file_may_be_back() -> None:
    before = DiskState({"a": b"old"})
    made = calls(("unlink", "a"))
    assert contents(made, "a", before) == {b"old", None}
    assert contents([*made, Call(2, "sync_folder", ".")], "a", before) == {None}


def test_a_removed_folder_may_be_back_without_what_was_in_it() -> None:
    before = DiskState({"f/a": b"old"}, frozenset({"f"}))
    made = calls(("unlink", "f/a"), ("sync_folder", "f"), ("rmdir", "f"))
    assert {state.folders for state in at_the_end(made, before)} == {frozenset({"f"}), frozenset()}
    assert contents(made, "f/a", before) == {None}


def test_two_names_are_one_file() -> None:
    made = calls(*write_file("a"), ("sync", "a"), ("link", "a", "b"), ("sync_folder", "."), ("write", "b", 0, b"DATA"))
    states = at_the_end(made)
    assert {state.files["a"] for state in states} == {b"data", b"DATA"}
    assert all(state.files["a"] == state.files["b"] for state in states)


def test_a_file_of_a_name_that_was_used_before_is_another() -> None:
    made = calls(
        *write_file("a", b"one"), ("sync", "a"), ("sync_folder", "."), ("unlink", "a"), *write_file("a", b"two")
    )
    assert contents(made, "a") == {b"one", b"two", b"", b"\0\0\0", None}


def test_a_file_that_is_rewritten_in_place_may_be_empty_old_or_mixed() -> None:
    before = DiskState({"lock": b"old!!"})
    made = calls(("truncate", "lock", 0), ("write", "lock", 0, b"new"))
    assert contents(made, "lock", before) == {b"old!!", b"", b"new", b"new!!", b"\0\0\0"}


def test_a_write_is_torn_at_its_sectors() -> None:
    before = DiskState({"a": OLD})
    made = calls(("write", "a", 0, NEW))
    found = contents(made, "a", before)
    assert NEW[:512] + OLD[512:] in found  # the first sector
    assert OLD + bytes(700) in found  # only the size
    assert NEW[:512] + OLD[512:600] + bytes(700) in found
    assert NEW in found
    assert all(data is not None and {*data[:512]} in ({ord("n")}, {ord("o")}) for data in found)


def test_allocated_blocks_are_zeros() -> None:
    made = calls(("create", "a"), ("allocate", "a", 4), ("sync_folder", "."))
    assert contents(made, "a") == {b"", bytes(4)}


def test_a_write_behind_the_end_leaves_zeros_before_it() -> None:
    made = calls(("create", "a"), ("write", "a", 2, b"x"), ("sync", "a"), ("sync_folder", "."))
    assert contents(made, "a") == {b"\0\0x"}


def test_a_file_that_was_removed_while_it_is_open_takes_writes() -> None:
    before = DiskState({"a": b"old"})
    made = calls(("unlink", "a"), ("write", "a", 0, b"new"), ("sync", "a"))
    assert contents(made, "a", before) == {None, b"new"}


def test_what_leaves_the_folder_is_gone() -> None:
    assert contents(calls(("rename", "a", ""), ("sync_folder", ".")), "a", DiskState({"a": b"old"})) == {None}


def test_states_of_every_moment_come_once_and_twice_around_a_promise() -> None:
    made = calls(*write_file("a"), ("sync", "a"), ("sync_folder", "."))
    seen = [dict(state.files) for state in PowerLoss(made).states()]
    assert seen == [{}, {"a": b""}, {"a": b"data"}, {"a": b"\0\0\0\0"}]
    twice = [dict(state.files) for state in PowerLoss(made).states(promises=[4])]
    assert twice == [*seen, {"a": b"data"}]


def test_a_state_says_what_it_lost() -> None:
    made = calls(*write_file("a"))
    lost = next(state for state in PowerLoss(made).states(promises=[2]) if state.calls == 2 and not state.files)
    assert str(lost) == "after 2 calls, lost: 1 create a; 2 write a: the size; 2 write a: bytes 0 to 4"
    assert str(PowerLoss(made).after_all()) == "after 2 calls, lost: nothing"


def test_most_bounds_how_many_are_tried_and_the_seed_says_which() -> None:
    made = calls(*(step for name in "abcdef" for step in write_file(name)))
    assert len(list(PowerLoss(made).states(most=5))) <= 5
    first, again, other = (
        [dict(state.files) for state in PowerLoss(made).states(seed=seed, subsets=9)] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_calls_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="'a' is not there"):
        PowerLoss(calls(("unlink", "a")))
    with pytest.raises(ValueError, match="keep_data=True"):
        PowerLoss([Call(1, "create", "a"), Call(2, "write", "a", size=3)])


def test_a_recorded_trace_ends_in_what_is_really_there(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    (folder / "old").mkdir(parents=True)
    (folder / "old/file").write_bytes(OLD)
    before = DiskState.of(folder)
    with SystemCalls(folder, keep_data=True) as made:
        (folder / "old").rename(folder / "new")
        fd = os.open(folder / "new/other", os.O_CREAT | os.O_RDWR)
        os.write(fd, NEW)
        os.pwrite(fd, b"middle", 700)
        os.ftruncate(fd, 1000)
        os.link(folder / "new/other", folder / "linked")
        os.pwrite(fd, b"end", 1200)
        os.close(fd)
        (folder / "new/file").unlink()
        (folder / "gone").mkdir()
        (folder / "gone").rmdir()
    state = PowerLoss(made.log, before).after_all()
    assert state.has_same_content(DiskState.of(folder))
    state.write_to(tmp_path / "again")
    assert DiskState.of(tmp_path / "again") == DiskState.of(folder)


def test_a_folder_that_is_not_there_holds_nothing(tmp_path: Path) -> None:
    assert DiskState.of(tmp_path / "none") == DiskState()
