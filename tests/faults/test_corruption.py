"""Whatever happens to a file at rest, nobody gets wrong data: the newest good state with a warning, or an error."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pickle
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from ckptmgr import (
    AlreadyExistsError,
    CheckpointError,
    CheckpointManager,
    DamagedError,
    StoreError,
    retention,
    warm_start,
)
from ckptmgr import manifest as manifest_module
from ckptmgr import scatter as scatter_module
from ckptmgr.cli import main
from ckptmgr.listing import Listing
from ckptmgr.manifest import MANIFEST_NAME, PIECE_SIZE, Manifest
from ckptmgr.records import Records
from ckptmgr.repository import Repository
from ckptmgr.run import Run
from ckptmgr.store.local import LocalStore
from ckptmgr.store.local_reader import LocalReader
from ckptmgr.testing import Corruption, MemoryStore, corruptions

Tally = Callable[[str, int], None]

_LARGE = (1 << 20) + 4096 + 12  # bytes of the frozen weights: enough to be shared, and to be read past the page cache
_UNREAD = {".metadata", "values.distcp"}  # of format dcp: for other readers than ours


class Model(torch.nn.Module):
    def __init__(self, seed: int, frozen_bytes: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer = torch.nn.Linear(5, 3)
        if frozen_bytes:
            self.frozen = torch.nn.Parameter(torch.randn(frozen_bytes // 4), requires_grad=False)


@dataclass(frozen=True)
class Base:
    """A root with the checkpoints of the steps 1 to 3, and the states that they hold."""

    root: Path
    settings: dict[str, Any]
    frozen_bytes: int
    states: dict[int, dict[str, Any]] = field(default_factory=dict)

    def open(self, root: Path, **more: Any) -> CheckpointManager:
        return CheckpointManager(str(root), **{**self.settings, **more})

    def objects(self, seed: int = 7) -> tuple[Model, torch.optim.Optimizer]:
        model = Model(seed, self.frozen_bytes)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)


def made(root: Path, *, frozen_bytes: int = 0, **settings: Any) -> Base:
    always = {"fsync": False, "background": False, "run": "r", "save": {"on_signals": []}}
    base = Base(root, {**always, **settings}, frozen_bytes)
    model, optimizer = base.objects(seed=1)
    with base.open(root) as mgr:
        mgr.resume(model, optimizer)
        for step in (1, 2, 3):
            train(model, optimizer, step)
            if frozen_bytes and step == 2:
                with torch.no_grad():  # so that the steps 2 and 3 share a file, and 1 has its own
                    model.frozen.add_(1)
            mgr.save(state_of(model, optimizer, step), step, metrics={"loss": 1.0 / step})
            base.states[step] = copied(state_of(model, optimizer, step))
    return base


def train(model: Model, optimizer: torch.optim.Optimizer, step: int) -> None:
    optimizer.zero_grad()
    model.layer(torch.full((2, 5), float(step))).square().sum().backward()
    optimizer.step()


def state_of(model: Model, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    return {"model": model, "optimizer": optimizer, "tokens": step * 1000}


def copied(value: Any) -> Any:
    """Plain data, with the tensors' values of now."""
    if hasattr(value, "state_dict"):
        return copied(value.state_dict())
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list | tuple) else value


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return isinstance(right, dict) and left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(equal, left, right))
    return bool(left == right)


def odd_files(base: Base, root: Path) -> dict[int, list[str]]:
    """By step the names of the files that are not what was written, as a plain comparison finds them."""
    return {
        step: [
            file.relative_to(folder).as_posix()
            for file in sorted(folder.rglob("*"))
            if file.is_file() and not is_same(file, root / file.relative_to(base.root))
        ]
        for step in (1, 2, 3)
        for folder in [base.root / f"step-{step:08}"]
    }


def is_same(good: Path, file: Path) -> bool:
    if file.is_symlink() or not file.is_file():
        return False
    data = file.read_bytes()
    if data == good.read_bytes():
        return True
    try:
        return file.name == MANIFEST_NAME and Manifest.from_json(data) == Manifest.from_json(good.read_bytes())
    except CheckpointError:
        return False


def spoken(name: str) -> set[str]:
    """How a message names a file. With another's manifest in place it is every other file that is odd."""
    short = name.rpartition("/")[2]
    return {short, "model.", "state.json"} if short == MANIFEST_NAME else {short}


def command(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def violations(base: Base, root: Path, caplog: pytest.LogCaptureFixture, **settings: Any) -> list[str]:
    """What does not hold of a damaged copy of the root."""
    odd = odd_files(base, root)
    sound = [step for step in (3, 2, 1) if not odd[step]]
    return [
        *told_by_commands(root, odd),
        *loaded_wrong(base, root, odd, sound),
        *resumed_wrong(base, root, odd, sound, caplog, settings),
    ]


def told_by_commands(root: Path, odd: dict[int, list[str]]) -> list[str]:
    found = []
    for arguments in (["ls", str(root)], ["ls", str(root), "--json"], ["show", str(root), "3"], ["latest", str(root)]):
        code, output = command(*arguments)
        if code not in (0, 1, 3):
            found.append(f"{arguments[0]} ends with {code}: {output}")
    code, output = command("verify", str(root), "--all", "--level", "full")
    is_damaged = any(odd.values())
    if (code == 1) != is_damaged:
        found.append(f"verify ends with {code}, damaged are {odd}: {output}")
    for step, names in odd.items():
        for name in names:
            is_told = any(text in output for text in spoken(name))
            if not is_told or f"step-{step:08}" not in output:
                found.append(f"verify does not name {name} of step {step}: {output}")
    return found


def loaded_wrong(base: Base, root: Path, odd: dict[int, list[str]], sound: list[int]) -> list[str]:
    found = []
    with base.open(root, read_only=True) as mgr:
        for step in (3, "latest"):
            try:
                state = mgr.load(step)
            except CheckpointError as exc:
                if step == "latest" and sound:
                    found.append(f"load() raises {exc!r} although step {sound[0]} is sound")
                elif step != "latest" and step in sound:
                    found.append(f"load({step}) raises {exc!r}")
            else:
                if state["tokens"] != 3000 and step == 3:
                    found.append("load(3) gives another step")
                if not equal(base.states[state["tokens"] // 1000], state):
                    found.append(f"load({step}) gives wrong data")
    model, _ = base.objects()
    try:
        warm_start(root, model)
    except CheckpointError as exc:
        if sound:
            found.append(f"warm_start raises {exc!r}")
    else:
        if not any(equal(state["model"], copied(model)) for state in base.states.values()):
            found.append("warm_start gives wrong weights")
    return found


def resumed_wrong(
    base: Base,
    root: Path,
    odd: dict[int, list[str]],
    sound: list[int],
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, Any],
) -> list[str]:
    found = []
    model, optimizer = base.objects()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "ckptmgr"), base.open(root, **settings) as mgr:
        try:
            resumed = mgr.resume(model, optimizer)
        except CheckpointError as exc:
            if sound:
                found.append(f"resume raises {exc!r} although step {sound[0]} is sound")
            elif not all(any(text in str(exc) for name in names for text in spoken(name)) for names in odd.values()):
                found.append(f"resume's error names not every file of {odd}: {exc}")
            return found
        step = resumed.step
        if not resumed:
            return [f"a fresh start, although {sound} are sound and {odd} are damaged"]
        if not equal(base.states[step], {**copied({"model": model, "optimizer": optimizer}), **resumed.values}):
            found.append(f"resume gives wrong data for step {step}")
        if sound and step < sound[0]:
            found.append(f"resume goes back to {step}, {sound[0]} is sound")
        if set(odd[step]) - _UNREAD:
            found.append(f"resume takes step {step}, of which {odd[step]} are damaged")
        for passed in range(step + 1, 4):
            reasons = [one.reason for one in resumed.skipped if one.url.endswith(f"step-{passed:08}")]
            names = {text for name in odd[passed] for text in spoken(name)}
            for told in (reasons, caplog.messages):
                if not any(name in line for name in names for line in told):
                    found.append(f"step {passed} was passed over for {odd[passed]}, and told is {told}")
        train(model, optimizer, 10)
        mgr.save(state_of(model, optimizer, 10), 10)
        after = copied(state_of(model, optimizer, 10))
    model, optimizer = base.objects()
    with base.open(root) as mgr:
        good = set(mgr.all_steps())
        usable = {step, *sound}
        loadable = {10, *(old for old in odd if not set(odd[old]) - _UNREAD)}
        if not {10, step} <= good or len(good & loadable) < min(3, 1 + len(usable)):  # keep.last is 3
            found.append(f"after a save {good} are good, {usable} were")
        if (resumed := mgr.resume(model, optimizer)).step != 10:
            found.append(f"the next resume goes on from {resumed.step}")
        elif not equal(after, {**copied({"model": model, "optimizer": optimizer}), **resumed.values}):
            found.append("the next resume gives wrong data")
    return found


SMALL: dict[str, dict[str, Any]] = {
    "safetensors": {},
    "torch": {"format": "torch"},
    "dcp": {"format": "dcp"},
    "manifest last": {"commit": "manifest"},
}


def newest_files(root: Path) -> list[Path]:
    return [file for file in sorted((root / "step-00000003").rglob("*")) if file.is_file()]


def older(file: Path) -> list[Path]:
    """The file of the same name in the checkpoint before."""
    if "step-00000003" not in file.parts:
        return []
    twins = Path(*file.parts[: file.parts.index("step-00000003")], "step-00000002")
    return [path for path in twins.rglob(file.name) if path.is_file() and not path.samefile(file)]


def all_of(files: Iterable[Path], outside: Path, flips: int = 4) -> list[Corruption]:
    outside.mkdir(exist_ok=True)
    found = (one for file in files for one in corruptions(file, 1, others=older(file), outside=outside, flips=flips))
    return [one for one in found if one.kind != "unreadable"]  # which is no damage


def copy_of(root: Path, target: Path) -> Path:
    """A copy, in which what were links to one file are so again."""
    shutil.rmtree(target, ignore_errors=True)
    known: dict[tuple[int, int], Path] = {}

    def copy(source: str, to: str) -> None:
        found = Path(source).stat()
        first = known.setdefault((found.st_dev, found.st_ino), Path(to))
        if first == Path(to):
            shutil.copyfile(source, to)
        else:
            Path(to).hardlink_to(first)

    shutil.copytree(root, target, copy_function=copy)
    return target


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SMALL)
def test_damage_anywhere_in_the_newest_checkpoint_costs_no_more_than_that_one(
    name: str, profile: Any, tally: Tally, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = made(tmp_path / "base", **SMALL[name])
    outside = tmp_path / "outside"
    numbers = profile.sample(range(len(all_of(newest_files(base.root), outside))), quick=11)
    found = []
    for number in numbers:
        root = copy_of(base.root, tmp_path / "copy")
        one = all_of(newest_files(root), outside)[number]
        one.apply()
        found += [f"{one}: {text}" for text in violations(base, root, caplog)]
    assert not found, "\n".join(found)
    tally("corruptions", len(numbers))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("commit", ["rename", "manifest"])
def test_damage_to_a_file_that_checkpoints_share_is_found_in_each_of_them(
    commit: str, profile: Any, tally: Tally, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that is large enough to be shared is read past the page cache, too."""
    base = made(tmp_path / "base", frozen_bytes=_LARGE, commit=commit)
    shared = [file.relative_to(base.root) for file in newest_files(base.root) if file.stat().st_nlink == 2]
    assert len(shared) == 1
    numbers = profile.sample(range(len(all_of([base.root / shared[0]], tmp_path / "outside"))), quick=5)
    found = []
    for number in numbers:
        root = copy_of(base.root, tmp_path / "copy")
        one = all_of([root / shared[0]], tmp_path / "outside")[number]
        one.apply()
        found += [f"{one}: {text}" for text in violations(base, root, caplog, verify={"on_resume": "full"})]
    assert not found, "\n".join(found)
    tally("corruptions", len(numbers))


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_damage_in_any_piece_of_a_large_file_is_found(
    tally: Tally, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = made(tmp_path / "base", frozen_bytes=PIECE_SIZE + (1 << 20))
    file = next(file for file in newest_files(base.root) if file.stat().st_size > PIECE_SIZE)
    for at in (PIECE_SIZE - 1, PIECE_SIZE, file.stat().st_size - 1):
        root = copy_of(base.root, tmp_path / "copy")
        with (root / file.relative_to(base.root)).open("r+b") as damaged:
            damaged.seek(at)
            byte = damaged.read(1)[0]
            damaged.seek(at)
            damaged.write(bytes([byte ^ 1]))
        assert violations(base, root, caplog) == []
    tally("corruptions", 3)


def recorded(root: Path) -> Base:
    """A root with every kind of record below `.ckptmgr`: the newest good checkpoint is of step 3."""
    base = made(root, keep={"last": 9})
    with base.open(root) as mgr:
        model, optimizer = base.objects()
        mgr.resume(model, optimizer)
        mgr.pin(1, tag="first")
        for step in (4, 5):
            mgr.save(state_of(model, optimizer, step), step)
        mgr.rewind(4)  # 5 is archived
    (root / "step-00000004" / "model.safetensors").write_bytes(b"damaged")
    with base.open(root, verify={"scrub": True}) as mgr:
        model, optimizer = base.objects()
        assert mgr.resume(model, optimizer).step == 3  # 4 is marked
    manifest = Manifest.from_json((root / "step-00000002" / MANIFEST_NAME).read_bytes())
    Records(LocalStore(root)).put_verified({("step-00000002", manifest.nonce): datetime.now(UTC)})
    gone = replace(manifest, nonce="0123456789abcdef", step=9)  # whose deletion was interrupted
    Records(LocalStore(root)).put_aside("trash", "step-00000009", gone)
    (root / "step-00000009").mkdir()
    (root / "step-00000009" / "state.json").write_bytes(b"{}")
    draft = root / ".ckptmgr" / "drafts" / "step-00000008.00112233445566ff"  # one that a dead process left
    draft.mkdir(parents=True)
    (draft / "model.safetensors").write_bytes(b"half")
    return base


def record_violations(base: Base, root: Path, one: Corruption) -> list[str]:
    found = told_of_records(root)
    model, optimizer = base.objects()
    try:
        with base.open(root, keep={"last": 2}) as mgr:
            resumed = mgr.resume(model, optimizer)
            if resumed.step != 3:
                found.append(f"resume goes on from {resumed.step}")
            elif not equal(base.states[3], {**copied({"model": model, "optimizer": optimizer}), **resumed.values}):
                found.append("resume gives wrong data")
            mgr.save(state_of(model, optimizer, 10), 10)
            steps = set(mgr.all_steps())
            is_plain = one.path.is_file() and not one.path.is_symlink()
            is_pin_lost = ".tag-first" in one.path.name and not is_plain
            if not {3, 10} <= steps or not (is_pin_lost or 1 in steps):
                found.append(f"{steps} are left")
    except CheckpointError as exc:
        if one.path.name != "lock" or one.kind not in ("folder", "link", "fifo"):
            found.append(f"raises {exc!r}")
    else:
        with base.open(root) as mgr:
            if mgr.latest_step() != 10 or mgr.resume(*base.objects()).step != 10:
                found.append("the next resume does not go on from the save")
    return found


def told_of_records(root: Path) -> list[str]:
    found = []
    for arguments in (["ls", str(root)], ["show", str(root), "3"], ["verify", str(root), "3"], ["latest", str(root)]):
        code, output = command(*arguments)
        if code:
            found.append(f"{arguments[0]} ends with {code}: {output}")
    return found


@pytest.mark.timeout(900)
def test_damage_to_what_stands_beside_the_checkpoints_costs_none_of_them(
    profile: Any, tally: Tally, tmp_path: Path
) -> None:
    """The pointer, the lock, pins, marks, archived and deleted manifests, drafts, what was verified when."""
    base = recorded(tmp_path / "base")

    def files(root: Path) -> list[Path]:
        return [root / "latest", *(file for file in sorted((root / ".ckptmgr").rglob("*")) if file.is_file())]

    numbers = profile.sample(range(len(all_of(files(base.root), tmp_path / "outside"))), quick=14)
    kinds = {file.relative_to(base.root).parts[-2] for file in files(base.root)[1:]}
    assert kinds == {".ckptmgr", "archive", "damaged", "pins", "trash", "step-00000008.00112233445566ff"}
    found = []
    for number in numbers:
        root = copy_of(base.root, tmp_path / "copy")
        one = all_of(files(root), tmp_path / "outside")[number]
        one.apply()
        found += [f"{one.path.relative_to(root)}: {one.name}: {text}" for text in record_violations(base, root, one)]
    assert not found, "\n".join(found)
    tally("corruptions", len(numbers))


def test_a_lock_whose_number_has_become_smaller_does_not_put_new_checkpoints_before_old_ones(tmp_path: Path) -> None:
    base = made(tmp_path)
    model, optimizer = base.objects()
    for step in (4, 5):
        with base.open(tmp_path) as mgr:
            mgr.resume(model, optimizer)
            mgr.save(state_of(model, optimizer, step), step)
            attempt = mgr.info().order[0]
    lock = tmp_path / ".ckptmgr" / "lock"
    text = lock.read_text()
    assert f'"attempt": {attempt},' in text
    lock.write_text(text.replace(f'"attempt": {attempt},', '"attempt": 1,'))
    with base.open(tmp_path) as mgr:
        mgr.resume(model, optimizer)
        mgr.save(state_of(model, optimizer, 6), 6)
        assert (mgr.latest_step(), mgr.info().order[0]) == (6, attempt + 1)


def at_rest(store: MemoryStore, folder: Path) -> list[Path]:
    """The objects as files."""
    for key, (data, _) in store.objects.items():
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.parts[-1] != "latest")


@pytest.mark.timeout(600)
def test_damage_in_an_object_store_costs_no_more_than_that_checkpoint(
    profile: Any, tally: Tally, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = MemoryStore(can_rename=False)
    base = made(tmp_path / "base", store=store)
    files = [file for file in at_rest(store, tmp_path / "rest") if "step-00000003" in file.parts]
    content = {"flip", "zero", "garbage", "truncate", "extend", "blocks", "json", "stale", "delete"}
    chosen = [one for one in all_of(files, tmp_path / "outside") if one.kind in content]
    found = []
    for one in (some := profile.sample(chosen, quick=12)):
        one_by_one = pickle.loads(pickle.dumps(store))
        key = one.path.relative_to(tmp_path / "rest").as_posix()
        good = one.path.read_bytes()
        one.apply()
        if one.path.exists():
            one_by_one.objects[key] = (one.path.read_bytes(), 0.0)
        else:
            del one_by_one.objects[key]
        one.path.write_bytes(good)
        found += [f"{one}: {text}" for text in store_violations(base, one_by_one, key, good, caplog)]
    assert not found, "\n".join(found)
    tally("corruptions", len(some))


def store_violations(
    base: Base, store: MemoryStore, key: str, good: bytes, caplog: pytest.LogCaptureFixture
) -> list[str]:
    harmless = False
    if key.endswith(MANIFEST_NAME) and key in store.objects:
        with contextlib.suppress(CheckpointError):
            harmless = Manifest.from_json(store.objects[key][0]) == Manifest.from_json(good)
    found = []
    expected = 3 if harmless else 2
    model, optimizer = base.objects()
    caplog.clear()
    with base.open(base.root, store=store) as mgr:
        resumed = mgr.resume(model, optimizer)
        if resumed.step != expected:
            found.append(f"resume takes step {resumed.step}")
        elif not equal(base.states[expected], {**copied({"model": model, "optimizer": optimizer}), **resumed.values}):
            found.append("resume gives wrong data")
        names = spoken(key)
        if not harmless and not any(name in one.reason for name in names for one in resumed.skipped):
            found.append(f"told is {resumed.skipped}")
        if not harmless and not any(name in line for name in names for line in caplog.messages):
            found.append(f"no warning names it: {caplog.messages}")
        problems = [problem for info in Repository(store).infos() for problem in Repository(store).verify(info)]
        if bool(problems) == harmless:
            found.append(f"verify finds {problems}")
        mgr.save(state_of(model, optimizer, 10), 10)
        if mgr.latest_step() != 10 or not {expected, expected - 1} <= set(mgr.all_steps()):
            found.append(f"after a save there are {mgr.all_steps()}")
    return found


class GarblingStore(MemoryStore):
    """Gives other bytes the first so many times that a file's bytes are asked for."""

    def __init__(self, times: int) -> None:
        super().__init__(can_rename=False)
        self.times = times
        self.asked = Counter[tuple[str, int]]()

    def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        data = super().get(key, start, end)
        if "model.safetensors" in key and end is not None:
            self.asked[key, start] += 1
            if self.asked[key, start] <= self.times:
                return data[:-1] + bytes([data[-1] ^ 1])
        return data


@pytest.mark.parametrize(("times", "step"), [(0, 3), (1, 3), (2, 2)])
def test_what_a_network_garbles_is_fetched_once_more_before_it_counts_as_damage(
    times: int, step: int, tmp_path: Path
) -> None:
    store = GarblingStore(0)
    base = made(tmp_path, store=store)
    store.times = times
    for key in list(store.objects):
        if not key.startswith("step-00000003"):
            store.asked.update({(key, 0): 9})  # what is garbled is the newest one
    model, optimizer = base.objects()
    with base.open(tmp_path, store=store) as mgr:
        resumed = mgr.resume(model, optimizer)
        assert (resumed.step, len(resumed.skipped)) == (step, 3 - step)
        assert equal(base.states[step], {**copied({"model": model, "optimizer": optimizer}), **resumed.values})


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs FIFOs")
@pytest.mark.parametrize("level", ["off", "size", "fast", "full"])
def test_what_is_no_file_neither_hangs_a_reader_nor_gives_it_data_at_any_level(level: str, tmp_path: Path) -> None:
    base = made(tmp_path / "base")
    for kind in ("fifo", "link", "folder", "delete"):
        for name in ("model.safetensors", "state.json"):
            root = copy_of(base.root, tmp_path / "copy")
            for one in corruptions(root / "step-00000003" / name, outside=tmp_path):
                if one.kind == kind:
                    one.apply()
                    break
            with base.open(root, read_only=True, verify={"on_resume": level}) as mgr:
                for mmap in (False, True):
                    with pytest.raises(CheckpointError, match=name):
                        mgr.load(3, mmap=mmap)
                    if level != "off" or kind == "delete":
                        assert mgr.load(mmap=mmap)["tokens"] == 2000


@pytest.mark.parametrize("mmap", [False, True])
def test_each_level_finds_what_it_promises(mmap: bool, tmp_path: Path) -> None:
    """`off` finds nothing, `size` other sizes, `fast` other bytes, but of what is mapped only with `full`."""
    base = made(tmp_path / "base")
    finds = {}
    for kind in ("flip", "truncate"):
        for level in ("off", "size", "fast", "full"):
            root = copy_of(base.root, tmp_path / "copy")
            file = root / "step-00000003" / "optimizer.safetensors"
            damage = [one for one in corruptions(file) if one.kind == kind][-1]
            damage.apply()
            with base.open(root, read_only=True, verify={"on_resume": level}) as mgr:
                try:
                    mgr.load(3, mmap=mmap)
                    finds[kind, level] = False
                except DamagedError:
                    finds[kind, level] = True
    assert finds["flip", "off"] is finds["flip", "size"] is False
    assert finds["flip", "fast"] is not mmap
    assert finds["flip", "full"] is True
    assert finds["truncate", "size"] is finds["truncate", "fast"] is finds["truncate", "full"] is True


def test_a_checkpoint_that_has_lost_its_manifest_is_told_of_and_never_counts_as_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Not an archived one, and not a folder with other things in it."""
    base = made(tmp_path)
    with base.open(tmp_path) as mgr:
        mgr.rewind(2)
    (tmp_path / "step-00000007").mkdir()
    (tmp_path / "step-00000007" / "notes.txt").write_text("mine")
    assert [info.step for info in Repository(LocalStore(tmp_path)).infos()] == [2, 1]
    for step in (1, 2):
        (tmp_path / f"step-0000000{step}" / MANIFEST_NAME).unlink()
    assert [(info.step, info.damaged) for info in Repository(LocalStore(tmp_path)).infos()] == [
        (2, "manifest.json is missing"),
        (1, "manifest.json is missing"),
    ]
    with base.open(tmp_path) as mgr, pytest.raises(DamagedError, match=r"step-00000002/manifest\.json"):
        mgr.resume(*base.objects())
    with base.open(tmp_path) as mgr, pytest.raises(AlreadyExistsError):
        mgr.save({"tokens": 1}, 9)
    code, output = command("verify", str(tmp_path), "--all")
    assert (code, "step-00000002" in output, "manifest.json is missing" in output) == (1, True, True)


def test_a_reader_does_not_take_a_save_in_flight_for_a_lost_manifest(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, fsync=False)
    repository = Repository(store, commit="manifest")
    draft = repository.begin(1, None, "r")
    with draft.create("state.json") as file:
        file.write(b"{}")
    assert Repository(store).infos() == []
    draft.abort()


@pytest.mark.parametrize("commit", ["rename", "manifest"])
@pytest.mark.parametrize("kind", ["folder", "fifo", "link"])
def test_a_step_can_be_saved_again_where_something_stands_in_its_manifests_place(
    commit: str, kind: str, tmp_path: Path
) -> None:
    base = made(tmp_path / "root", commit=commit)
    manifest = base.root / "step-00000003" / MANIFEST_NAME
    next(one for one in corruptions(manifest, outside=tmp_path) if one.kind == kind).apply()
    model, optimizer = base.objects()
    with base.open(base.root) as mgr:
        assert mgr.resume(model, optimizer).step == 2
        mgr.save(state_of(model, optimizer, 3), 3)
        assert mgr.load()["tokens"] == 3000


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO])
@pytest.mark.parametrize("name", [MANIFEST_NAME, "model.safetensors"])
def test_what_this_process_can_not_read_is_an_error_and_no_damage(name: str, code: int, tmp_path: Path) -> None:
    """It may be mended by a person: nothing older is taken instead, and nothing is marked."""

    class Refusing(LocalStore):
        def get(self, key: str, start: int = 0, end: int | None = None) -> bytes:
            self.check(key)
            return super().get(key, start, end)

        def reader(self, key: str, *, by_many: bool = False) -> LocalReader:
            self.check(key)
            return super().reader(key, by_many=by_many)

        def check(self, key: str) -> None:
            if key == f"step-00000003/{name}":
                raise StoreError(f"can't read {key}", code)

    base = made(tmp_path)
    with base.open(tmp_path, store=Refusing(tmp_path, fsync=False)) as mgr:
        with pytest.raises(StoreError, match=f"step-00000003/{name}") as caught:
            mgr.resume(*base.objects())
        assert caught.value.errno == code
    assert [info.damaged for info in Repository(LocalStore(tmp_path)).infos()] == [None] * 3


def test_each_corruption_does_something_and_the_same_for_the_same_seed(tmp_path: Path) -> None:
    base = made(tmp_path / "base")
    files = newest_files(base.root)
    for number, one in list(enumerate(all_of(files, tmp_path)))[::9]:
        copies = [copy_of(base.root, tmp_path / "copy" / each) for each in "ab"]
        for root in copies:
            all_of(newest_files(root), tmp_path)[number].apply()
        left, right = (look(root / one.path.relative_to(base.root)) for root in copies)
        assert left == right != look(one.path), one


def look(path: Path) -> object:
    if path.is_file() and not path.is_symlink():
        return path.read_bytes()
    return path.lstat().st_mode if os.path.lexists(path) else None


# Whether the checks above would see what goes wrong: bugs that are planted.


def _only_sizes(run: Any) -> bool:
    return bool(run.held == run.end)


def _not_of_json(run: Any) -> bool:
    return bool(run.held == run.end and (run.expected in (None, run.hash.digest()) or run.end > 600))


def _believing_the_pointer(run: Run, listing: Any = None) -> Iterator[Any]:
    infos = list(run._ours((listing or run.listing()).newest_first()))
    yield from sorted(infos, key=lambda info: info.name != run.repository.pointer.read())


BUGS: dict[str, tuple[Any, str, Any]] = {
    "no digest is checked": (scatter_module._Run, "is_good", property(_only_sizes)),
    "digests of some files are not checked": (scatter_module._Run, "is_good", property(_not_of_json)),
    "the pointer is believed": (Run, "newest_first", _believing_the_pointer),
    "the damaged count for retention": (retention, "_is_damaged", lambda info: False),
    "a manifest's digest is not checked": (manifest_module, "_canonical", lambda body: b""),
    "a lost manifest is no damage": (Listing, "_lost", lambda listing, names: set()),
}


def some_violations(base: Base, scratch: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Of a few corruptions that are chosen for being overlooked easily."""
    root = copy_of(base.root, scratch / "copy")
    (root / "latest").write_text("step-00000002\n")
    found = violations(base, root, caplog)
    for name, kind in (("optimizer.safetensors", "flip"), ("model.safetensors", "stale"), (MANIFEST_NAME, "delete")):
        root = copy_of(base.root, scratch / "copy")
        file = root / "step-00000003" / name
        next(one for one in reversed(list(corruptions(file, others=older(file)))) if one.kind == kind).apply()
        found += violations(base, root, caplog)
    root = copy_of(base.root, scratch / "copy")
    manifest = root / "step-00000003" / MANIFEST_NAME
    manifest.write_bytes(manifest.read_bytes().replace(b'"step": 3', b'"step": 7'))
    return found + violations(base, root, caplog)


def test_a_planted_bug_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = made(tmp_path / "base")
    assert some_violations(base, tmp_path, caplog) == []
    for bug, (target, name, wrong) in BUGS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, name, wrong)
            try:
                found = some_violations(base, tmp_path, caplog)
            except AssertionError as exc:  # in the library, which does not get on with the bug either
                found = [str(exc)]
        assert found != [], bug
