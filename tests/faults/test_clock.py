"""A clock that jumps, differs or stands still: nothing goes because of it, and nobody is thrown out."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from click.testing import CliRunner

from ckptmgr import CheckpointManager, pins, run
from ckptmgr.cli import main
from ckptmgr.clock import SafeClock
from ckptmgr.errors import FencedError
from ckptmgr.lease import Lease
from ckptmgr.manifest import Pin
from ckptmgr.store.local import LocalStore
from ckptmgr.testing import MemoryStore

HOUR, DAY, DECADE = timedelta(hours=1), timedelta(days=1), timedelta(days=3653)
JUMPS = [HOUR, -HOUR, DAY, -DAY, DECADE, -DECADE, timedelta(seconds=1), timedelta(0)]
START = datetime(2030, 3, 31, 0, 30, tzinfo=UTC)  # half an hour before clocks change in Europe


class Host:
    """A host whose wall clock can be set, and whose other clock goes on evenly, or stands still."""

    def __init__(self, start: datetime = START) -> None:
        self.time, self.passed_s, self.stands_still = start, 0.0, False

    def wall(self) -> datetime:
        return self.time

    def passes(self, time: timedelta) -> None:
        self.time += time
        self.passed_s += 0.0 if self.stands_still else time.total_seconds()

    def clock(self) -> SafeClock:
        return SafeClock(self.wall, lambda: self.passed_s)


def manager(store: Any, host: Host, **options: Any) -> CheckpointManager:
    settings: dict[str, Any] = {"background": False, "save": {"on_signals": []}, **options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "SafeClock", host.clock)
        return CheckpointManager("memory", store=store, **settings)


def train(store: Any, host: Host, jump: timedelta, **keep: Any) -> list[int]:
    """The steps that are left when the clock jumps between two of eight saves, each ten minutes after the other."""
    with manager(store, host, keep={"last": 1, "newer_than": "2h", **keep}) as mgr:
        mgr.resume()
        for step in range(1, 9):
            if step == 5:
                host.time += jump
            mgr.save({"x": step}, step)
            host.passes(timedelta(minutes=10))
        assert mgr.latest_step() == 8
        return mgr.all_steps()


def missing(jump: timedelta) -> set[int]:
    return {*range(1, 9)} - {*train(MemoryStore(can_rename=False), Host(), jump)}


@pytest.mark.parametrize("jump", JUMPS, ids=str)
def test_a_clock_that_is_set_while_a_run_trains_lets_no_checkpoint_go(
    jump: timedelta, tally: Callable[[str, int], None]
) -> None:
    assert missing(jump) == set()
    tally("clocks that were wrong", bool(jump))  # without a jump it is a control


def test_the_check_finds_a_retention_that_believes_the_wall_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SafeClock, "now", lambda self: self._wall())
    assert missing(DECADE) == {1, 2, 3, 4}


@pytest.mark.parametrize("jump", [HOUR, -HOUR, DAY, -DAY, DECADE, -DECADE], ids=str)
def test_what_is_saved_after_the_clock_was_set_grows_old_as_it_should(
    jump: timedelta, tally: Callable[[str, int], None]
) -> None:
    host, store = Host(), MemoryStore(can_rename=False)
    with manager(store, host, keep={"last": 1, "newer_than": "30m"}) as mgr:
        mgr.resume()
        host.passes(timedelta(minutes=5))
        host.time += jump
        for step in range(1, 9):
            mgr.save({"x": step}, step)
            host.passes(timedelta(minutes=10))
        assert mgr.all_steps() == [6, 7, 8]
    tally("clocks that were wrong", 1)


def test_checkpoints_grow_old_as_they_should_when_nobody_sets_the_clock() -> None:
    host, store = Host(), MemoryStore(can_rename=False)
    with manager(store, host, keep={"last": 1, "newer_than": "30m"}) as mgr:
        mgr.resume()
        for step in range(1, 9):
            mgr.save({"x": step}, step)
            host.passes(timedelta(minutes=10))
        assert mgr.all_steps() == [6, 7, 8]


def test_with_a_monotonic_clock_that_stands_still_everything_stays() -> None:
    host = Host()
    host.stands_still = True
    assert train(MemoryStore(can_rename=False), host, timedelta(0)) == [*range(1, 9)]


def test_a_host_that_starts_ten_years_ahead_still_keeps_the_newest_good_one_and_min_good() -> None:
    store = MemoryStore(can_rename=False)
    train(store, Host(), timedelta(0))
    with manager(store, Host(START + DECADE), keep={"last": None, "newer_than": "2h", "min_good": 3}) as mgr:
        assert mgr.resume().step == 8
        assert mgr.all_steps() == [6, 7, 8]


@pytest.mark.parametrize("jump", JUMPS, ids=str)
def test_the_newest_is_the_newest_whatever_the_clocks_of_the_hosts_say(
    jump: timedelta, tally: Callable[[str, int], None]
) -> None:
    store = MemoryStore(can_rename=False)
    first, second = Host(), Host(START + jump)
    for host, steps in ((first, (1, 2, 3)), (second, (4, 5)), (first, (6,))):
        with manager(store, host, keep={"last": 3}) as mgr:
            mgr.resume()
            for step in steps:
                mgr.save({"x": step}, step)
            assert mgr.latest_step() == steps[-1]
    with manager(store, second, keep={"last": 3}) as mgr:
        assert (mgr.resume().step, mgr.all_steps()) == (6, [4, 5, 6])
        mgr.rewind(5)
        mgr.save({"x": 60}, 6)
    with manager(store, first, keep={"last": 3}) as mgr:
        assert mgr.resume().values["x"] == 60
    tally("clocks that were wrong", bool(jump))


@pytest.mark.parametrize("jump", [*JUMPS, -timedelta(microseconds=1)], ids=str)
def test_a_step_that_is_saved_again_is_replaced_though_the_clock_went_back(
    jump: timedelta, tally: Callable[[str, int], None]
) -> None:
    host, store = Host(), MemoryStore(can_rename=False)
    with manager(store, host, keep={"last": 2}) as mgr:
        mgr.resume()
        mgr.save({"x": 1}, 1)
        mgr.save({"x": 2}, 2, pin=True)
        host.time += jump
        mgr.save({"x": 3}, 2, overwrite=True)
        assert mgr.load()["x"] == 3
    with manager(store, host) as mgr:
        assert mgr.resume().values["x"] == 3
    tally("clocks that were wrong", bool(jump))


@pytest.mark.parametrize("ahead", [timedelta(0), HOUR, DAY, DECADE], ids=str)
def test_a_pin_for_an_hour_holds_though_the_writers_clock_is_ahead(
    ahead: timedelta, monkeypatch: pytest.MonkeyPatch, tally: Callable[[str, int], None]
) -> None:
    store = MemoryStore(can_rename=False)
    host = Host(datetime.now(UTC) + ahead)

    class Ahead(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + ahead

    with manager(store, host, keep={"last": 1}) as mgr:
        mgr.resume()
        mgr.save({"x": 1}, 1)
        CheckpointManager("memory", store=store, read_only=True).pin(1, ttl="1h")
        monkeypatch.setattr(pins, "datetime", Ahead)  # the writer's host from here on
        for step in (2, 3, 4):
            mgr.save({"x": step}, step)
        assert mgr.all_steps() == [1, 4]
        host.passes(2 * HOUR)
        for key, (data, modified) in list(store.objects.items()):
            store.objects[key] = (data, modified - 7200)
        monkeypatch.setattr(
            pins,
            "datetime",
            type("Later", (Ahead,), {"now": classmethod(lambda c, tz=None: datetime.now(tz) + ahead + 2 * HOUR)}),
        )
        mgr.save({"x": 5}, 5)
        assert mgr.all_steps() == [5]
    tally("clocks that were wrong", bool(ahead))


@pytest.mark.parametrize("command", [["prune", "--keep-last", "1"], ["rm", "1"]], ids=lambda command: command[0])
@pytest.mark.parametrize("as_json", [True, False], ids=["json", "text"])
def test_the_commands_tell_of_no_deletion_that_a_pin_by_the_stores_clock_has_kept(
    command: list[str], as_json: bool, tmp_path: Any
) -> None:
    with CheckpointManager(tmp_path, background=False, fsync=False) as mgr:
        mgr.resume()
        for step in (1, 2):
            mgr.save({"x": step}, step)
        nonce = mgr.info(1).manifest.nonce  # type: ignore[union-attr]
    key = pins.pin_key("step-00000001", nonce, "reading-ab")
    body = {"step": 1, "expires": (datetime.now(UTC) - 7 * HOUR).isoformat(), "ttl_s": 21600.0}
    LocalStore(tmp_path).put(key, json.dumps(body).encode())
    name, *rest = command
    done = CliRunner().invoke(main, [name, str(tmp_path), *rest, "--yes", *["--json"] * as_json])
    assert (done.exit_code, (tmp_path / "step-00000001").is_dir()) == (0, True)
    assert "kept step-00000001: pinned" in done.stderr
    if as_json:
        assert (json.loads(done.stdout)["dropped"], json.loads(done.stdout)["freed"]) == ([], 0)
    else:
        assert done.stdout.splitlines()[-1] == "nothing was deleted"


def test_a_pin_of_an_earlier_version_holds_by_the_clock_it_names(tmp_path: Any) -> None:
    store = LocalStore(tmp_path, fsync=False)
    them = pins.Pins(store)
    soon = datetime.now(UTC) + HOUR
    them.put(Pin("step-00000001", "ab", 1, None, soon))
    key = pins.pin_key("step-00000001", "ab")
    body = json.loads(store.get(key))
    del body["ttl_s"]
    store.put(key, json.dumps(body).encode())
    assert them.holds("step-00000001", "ab", 0.0)
    store.put(key, json.dumps({**body, "expires": (soon - DAY).isoformat()}).encode())
    assert not them.holds("step-00000001", "ab", 0.0)


class _Timeless(MemoryStore):
    """A store that does not say when anything was written."""

    def stat(self, key: str) -> Any:
        entry = super().stat(key)
        return None if entry is None else replace_time(entry)


def replace_time(entry: Any) -> Any:
    return entry._replace(modified=None)


def elsewhere(store: Any) -> None:
    """Makes the holder of the lease a process of another host."""
    claim = ".ckptmgr/lease/0000000001.json"
    store.put(claim, json.dumps({**json.loads(store.get(claim)), "space": "elsewhere", "host": "other"}).encode())


@pytest.mark.parametrize("skew", [jump for jump in JUMPS if jump], ids=str)
def test_a_living_lease_is_not_taken_because_the_hosts_clocks_differ(
    skew: timedelta, tally: Callable[[str, int], None]
) -> None:
    store, now = _Timeless(), datetime.now(UTC)
    holder = Lease(store, floor=0, takeover=False, ttl_s=3600, now=lambda: now)
    elsewhere(store)
    waited: list[float] = []

    def pause(seconds: float) -> None:
        waited.append(seconds)
        if sum(waited) >= 20:
            holder.beat()

    with pytest.raises(FencedError, match="on other since"):
        Lease(store, floor=0, takeover=False, ttl_s=60, now=lambda: now + skew, pause=pause)
    holder.check()
    holder.release()
    tally("clocks that were wrong", 1)


@pytest.mark.parametrize("skew", JUMPS, ids=str)
def test_a_dead_lease_is_free_within_its_time_whatever_the_clocks_say(
    skew: timedelta, tally: Callable[[str, int], None]
) -> None:
    store, now = _Timeless(), datetime.now(UTC)
    dead = Lease(store, floor=0, takeover=False, ttl_s=3600, now=lambda: now)
    elsewhere(store)
    waited: list[float] = []
    new = Lease(store, floor=0, takeover=False, ttl_s=60, now=lambda: now + skew, pause=waited.append)
    assert sum(waited) <= 65
    new.check()
    with pytest.raises(FencedError):
        dead.check()
    new.release()
    tally("clocks that were wrong", bool(skew))


def test_a_lock_on_a_disk_whose_clock_jumped_ahead_is_not_taken_from_a_process_that_beats(tmp_path: Any) -> None:
    store = LocalStore(tmp_path, fsync=False)
    holder = Lease(store, floor=0, takeover=False, ttl_s=3600)
    elsewhere(store)
    import os

    beat = tmp_path / ".ckptmgr/lease/0000000001.beat"
    os.utime(beat, (1.0, 1.0))  # as it looks after the jump
    waited: list[float] = []

    def pause(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:
            holder.beat()

    with pytest.raises(FencedError):
        Lease(store, floor=0, takeover=False, ttl_s=60, pause=pause)
    holder.release()


def test_saves_by_the_clock_go_on_when_the_wall_clock_is_set() -> None:
    seconds = [0.0]
    store = MemoryStore(can_rename=False)
    with CheckpointManager(
        "memory", store=store, clock=lambda: seconds[0], background=False, save={"every": "60s", "on_signals": []}
    ) as mgr:
        mgr.resume()
        saved = []
        for step in range(1, 13):
            seconds[0] += 0.0 if 4 <= step < 7 else 20.0  # a monotonic clock that stands still for a while
            if mgr.maybe_save({"x": step}, step) is not None:
                saved.append(step)
    assert saved == [3, 9, 12]


def test_a_jump_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    host = Host()
    clock = host.clock()
    host.time += DAY
    assert (clock.now(), clock.now()) == (START, START)
    assert caplog.text.count("clock.jump") == 1


def test_stamps_of_steps_that_go_on_are_the_wall_clocks() -> None:
    host = Host()
    clock = host.clock()
    assert clock.stamp(1) == START
    host.time -= HOUR
    assert clock.stamp(2) == START - HOUR
    assert clock.stamp(2) > START
