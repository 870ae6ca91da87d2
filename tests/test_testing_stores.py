"""Do the shipped fakes crash, wait and count as they say?"""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import ckptmgr.testing
from ckptmgr.store.local import LocalStore
from ckptmgr.testing import Crash, CrashingStore, MemoryStore, SlowStore

_EFFECTS = [
    ("put", "a"),
    ("writer", "draft/b"),
    ("write", "draft/b"),
    ("commit", "draft/b"),
    ("writer", "draft/d"),
    ("write_at", "draft/d"),
    ("commit", "draft/d"),
    ("rename", "draft"),
    ("copy", "e"),
    ("delete", "a"),
    ("delete", "c"),
]


def _work(store: CrashingStore) -> None:
    """Every effect once, among questions."""
    store.put("a", b"1")
    writer = store.writer("draft/b")
    writer.write(b"2")
    writer.commit()
    writer = store.writer("draft/d", 1)
    assert writer.is_positional
    writer.write_at(0, b"4")
    writer.commit()
    assert store.stat("draft/b") is not None
    store.rename("draft", "done")
    assert store.copy("done/d", "e")
    assert [entry.key for entry in store.list(recursive=True)] == ["a", "done/b", "done/d", "e"]
    reader, buffer = store.reader("done/d"), bytearray(2)
    assert reader.is_cached(0, 1)
    assert (reader.read_into(0, [buffer]), buffer) == (1, b"4\0")
    reader.close()
    store.delete(["a", "c"])
    assert store.get("done/b") == b"2"


def test_without_a_crash_the_effects_are_counted_and_named() -> None:
    store = CrashingStore(MemoryStore())
    _work(store)
    assert (store.count, store.log) == (len(_EFFECTS), _EFFECTS)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("after", range(1, len(_EFFECTS) + 1))
def test_the_crash_comes_at_its_effect_and_nothing_follows(after: int, when: str) -> None:
    memory = MemoryStore()
    store = CrashingStore(memory, after, when=when)  # type: ignore[arg-type]
    with pytest.raises(Crash, match=f"{when} {_EFFECTS[after - 1][0]} {_EFFECTS[after - 1][1]}"):
        _work(store)
    done = after if when == "after" else after - 1
    drafts, whole = ["a", "draft/b"], ["done/b", "done/d"]
    states = [[], *[["a"]] * 3, *[drafts] * 3, [*drafts, "draft/d"], ["a", *whole], ["a", *whole, "e"], [*whole, "e"]]
    expected = [*states, states[-1]][done]
    assert sorted(memory.objects) == expected
    for call in (
        lambda: store.get("a"),
        lambda: store.stat("a"),
        lambda: store.list(),
        lambda: store.put("x", b""),
        lambda: store.reader("a"),
        lambda: store.writer("x"),
        lambda: store.copy("a", "x"),
        lambda: store.delete(["a"]),
        lambda: store.delete([]),
        lambda: store.rename("done", "x"),
    ):
        with pytest.raises(Crash, match="dead"):
            call()
    assert (store.count, sorted(memory.objects)) == (after, expected)


def test_a_dead_process_ends_no_writer() -> None:
    store = CrashingStore(MemoryStore(), after=3)
    writer = store.writer("x")
    writer.write(b"1")
    for call in (lambda: writer.write(b"2"), lambda: writer.write_at(0, b"2"), writer.commit, writer.abort):
        with pytest.raises(Crash):
            call()


def test_a_dead_process_reads_no_more() -> None:
    store = CrashingStore(MemoryStore(), after=2)
    store.put("x", b"1")
    reader = store.reader("x")
    with pytest.raises(Crash):
        store.put("y", b"2")
    for call in (lambda: reader.read_into(0, [bytearray(1)]), lambda: reader.is_cached(0, 1)):
        with pytest.raises(Crash, match="dead"):
            call()
    reader.close()


def test_no_handler_of_errors_sees_a_crash() -> None:
    assert not issubclass(Crash, Exception)


def test_an_abort_is_no_effect(tmp_path: Path) -> None:
    store = CrashingStore(LocalStore(tmp_path))
    writer = store.writer("x")
    writer.abort()
    assert (store.log, store.list(), store.url, store.path) == ([("writer", "x")], [], str(tmp_path), tmp_path)
    assert store.can_rename


def test_a_gate_holds_every_effect_until_it_is_set() -> None:
    gate, memory = threading.Event(), MemoryStore()
    slow = SlowStore(memory, gate=gate)
    memory.put("draft/a", b"1")

    def work() -> None:
        slow.put("b", b"2")
        writer = slow.writer("c")
        writer.write(b"3")
        writer.commit()
        slow.writer("never").abort()
        writer = slow.writer("d", 1)
        assert writer.is_positional
        writer.write_at(0, b"4")
        writer.commit()
        assert slow.copy("d", "e")
        slow.rename("draft", "done")
        slow.delete(["b"])

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        assert slow.waiting.wait(60)
        assert [entry.key for entry in slow.list(recursive=True)] == ["draft/a"]
        assert slow.get("draft/a") == b"1"
        assert slow.reader("draft/a").read_into(0, [bytearray(1)]) == 1
        assert slow.stat("b") is None
        gate.set()
        working.result(60)
    assert sorted(memory.objects) == ["c", "d", "done/a", "e"]
    assert (slow.url, slow.path, slow.can_rename) == (memory.url, None, True)


def test_a_delay_is_slept(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    slow = SlowStore(MemoryStore(), delay_s=1.5)
    slow.put("a", b"")
    slow.copy("a", "b")
    writer = slow.writer("c", 1)
    writer.write_at(0, b"1")
    writer.commit()
    assert slept == [1.5] * 4


def test_a_pickled_memory_store_goes_its_own_way() -> None:
    import pickle

    store = MemoryStore()
    store.put("a", b"1")
    copy = pickle.loads(pickle.dumps(store))
    copy.put("b", b"2")
    assert ([e.key for e in store.list()], [e.key for e in copy.list()]) == (["a"], ["a", "b"])


def test_the_fakes_need_neither_pytest_nor_torch() -> None:
    code = "import sys, ckptmgr.testing; print({'pytest', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_misspelt_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Memory"):
        ckptmgr.testing.Memory  # noqa: B018
