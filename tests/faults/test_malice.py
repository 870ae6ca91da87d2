"""What can an enemy do who writes the folder that we read? Nothing but make a checkpoint unreadable."""

from __future__ import annotations

import io
import logging
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from faults import attacks
from faults.forgery import SECRET, Forged, Trap, build, copy, guarded, manager, model, state

from ckptmgr import (
    CheckpointError,
    ConfigError,
    DamagedError,
    StoreError,
    load_file,
    manifest,
    records,
    safe_open,
    warm_start,
)
from ckptmgr.cli import main
from ckptmgr.config import load_config
from ckptmgr.store import Entry, local
from ckptmgr.store.local import LocalStore

FORMATS = ("safetensors", "torch", "dcp")
HONEST = {step: model(step).state_dict() for step in (1, 2)}


# The ways in


def _is_honest(weights: Any) -> bool:
    """Whether these are the weights of a checkpoint as it was saved."""
    return any(
        weights.keys() == sound.keys() and all(torch.equal(weights[key], sound[key]) for key in sound)
        for sound in HONEST.values()
    )


def _resume(root: Path) -> None:
    own = model()
    with manager(root, keep={"last": 1}, save={"on_signals": []}) as made:
        start = made.resume(own)
        if start:
            assert _is_honest(own.state_dict()), "wrong weights"
        made.save(state(3), 10**4)  # and what goes with it: sweeping, rotation


def _load(root: Path, **how: Any) -> None:
    with manager(root, read_only=True) as made:
        weights = made.load(**how).get("model")
        # What the state itself says of them may be that there are none.
        assert not isinstance(weights, dict) or _is_honest(weights), "wrong weights"


def _load_unverified(root: Path) -> None:
    with manager(root, read_only=True, verify={"on_resume": "off"}) as made:
        made.load()  # any weights: nobody wanted to know
        if made.info().manifest.format == "safetensors":
            made.load(mmap=True)


def _warm_start(root: Path) -> None:
    own = model()
    warm_start(root, own)
    assert _is_honest(own.state_dict()), "wrong weights"


def _verify(root: Path) -> None:
    with manager(root, read_only=True) as made:
        made.all_steps()
        for step in ("latest", 2):
            made.verify(step)


def _command(*words: str) -> Callable[[Path], None]:
    def run(root: Path) -> None:
        result = CliRunner().invoke(main, [words[0], str(root), *words[1:]])
        assert result.exit_code < 70, result.output
        assert "Traceback" not in result.output
        assert all(char.isprintable() or char in "\n\u2588" for char in result.output), repr(result.output)

    run.__name__ = words[0]
    return run


WAYS_IN: list[Callable[[Path], None]] = [
    _resume,
    _load,
    lambda root: _load(root, mmap=True),
    _warm_start,
    _load_unverified,
    _verify,
    _command("ls"),
    _command("show", "2"),
    _command("verify", "--all"),
    _command("prune", "--keep-last", "1", "--yes"),
    _command("rm", "2", "--yes"),
]


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sound root in each format."""
    folder = tmp_path_factory.mktemp("sound")
    for format in FORMATS:
        build(folder / format, format)
    return {format: folder / format for format in FORMATS}


def crimes_of(
    attack: Callable[[Forged], object], ways: list[Callable[[Path], None]], sound: Path, tmp: Path
) -> list[str]:
    """What happens that must not, when a root that was attacked is used in these ways."""
    found = []
    for number, way in enumerate(ways):
        place = tmp / f"{attack.__name__}-{number}"
        root, outside = place / "root", place / "outside"
        copy(sound, root)
        outside.mkdir()
        (outside / "secret").write_bytes(SECRET)
        (outside / "folder").mkdir()
        (outside / "folder" / "model.safetensors").write_bytes(SECRET)
        attack(Forged(root, outside))
        with guarded(root, outside) as crimes:
            try:
                way(root)
            except CheckpointError:
                pass
            except BaseException as exc:  # noqa: BLE001 - what else there may be is what is asked for
                crimes.append(f"{type(exc).__name__}: {exc}"[:300])
        found += [f"{attack.__name__}, {getattr(way, '__name__', way)}: {crime}" for crime in crimes]
    return found


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("format", FORMATS)
def test_an_attack_is_an_error_of_ours_or_an_older_checkpoint(format, sound, tmp_path, profile, tally, caplog):
    """Nothing executes, nothing outside is touched, memory and time are bounded, and no wrong data comes back."""
    caplog.set_level(logging.CRITICAL)
    found, tries = [], 0
    own = profile.sample(attacks.on(format), quick=44 if format == "safetensors" else 12)
    for number, attack in enumerate(own):
        # All ways in meet all kinds of attacks in the full profile, and one each in the quick one.
        ways = WAYS_IN if profile.is_full else [WAYS_IN[0 if number % 2 else number // 2 % len(WAYS_IN)]]
        found += crimes_of(attack, ways, sound[format], tmp_path)
        tries += len(ways)
    assert found == []
    tally("attacks", len(own))
    tally("attacks by way in", tries)


def attack_named(name: str, format: str = "safetensors") -> Callable[[Forged], object]:
    return next(attack for attack in attacks.on(format) if attack.__name__ == name)


_KEPT = ["tombstone of another's manifest", "tombstone of another's data", "tombstone of the records"]


@pytest.mark.parametrize("name", _KEPT)
def test_a_tombstone_takes_nothing_of_a_living_checkpoint(name, sound, tmp_path, tally):
    copy(sound["safetensors"], tmp_path / "root")
    forged = Forged(tmp_path / "root", tmp_path)
    attack_named(name)(forged)
    before = {path: path.read_bytes() for path in (forged.root / "step-00000001").rglob("*") if path.is_file()}
    with manager(forged.root, keep={"last": None}) as made:
        assert made.resume(model()).step == 2
        made.save(state(3), 3)
    assert {path: path.read_bytes() for path in before} == before
    tally("attacks")


def test_a_folder_deeper_than_python_calls_is_listed_and_deleted(tmp_path, tally):
    store = LocalStore(tmp_path / "root", fsync=False)
    store.put("step-00000001/file", b"")
    here = Path.cwd()
    os.chdir(tmp_path / "root" / "step-00000001")
    try:
        for _ in range(1200):
            os.mkdir("d")  # noqa: PTH102 - each in the one before
            os.chdir("d")
        Path("end").touch()
    finally:
        os.chdir(here)
    try:
        assert len(store.list("step-00000001", recursive=True)) == 2
    finally:
        store.delete(["step-00000001/"])
    assert store.list() == []
    tally("attacks")


# The check itself


def _all_names(name: Any) -> str:
    return str(name)


def _followed(path: str) -> int:
    return os.open(path, os.O_RDONLY)


def _any_key(key: str) -> str:
    return key


def test_the_check_fails_when_names_in_manifests_are_not_checked(sound, tmp_path, monkeypatch):
    """A planted bug."""
    monkeypatch.setattr(manifest, "checked_name", _all_names)
    monkeypatch.setattr(local, "checked_key", _any_key)
    attack = attack_named("tombstone files up")
    assert any("outside" in crime for crime in crimes_of(attack, [WAYS_IN[0]], sound["safetensors"], tmp_path))


def test_the_check_fails_when_names_of_tombstones_are_not_checked(sound, tmp_path, monkeypatch):
    """A planted bug."""
    monkeypatch.setattr(records, "_NAME", re.compile(".*"))
    monkeypatch.setattr(local, "checked_key", _any_key)
    attack = attack_named("tombstone outside")
    assert any("secret" in crime for crime in crimes_of(attack, [WAYS_IN[0]], sound["safetensors"], tmp_path))


def test_the_check_fails_when_pickles_are_trusted(sound, tmp_path, monkeypatch):
    """A planted bug."""
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: load(*args, **{**kwargs, "weights_only": False}))
    attack = attack_named("archive_in model.pt", "torch")
    assert any("mkdir" in crime for crime in crimes_of(attack, [WAYS_IN[0]], sound["torch"], tmp_path))


def test_the_check_fails_when_links_are_followed(sound, tmp_path, monkeypatch):
    """A planted bug."""
    monkeypatch.setattr(local, "open_file", _followed)
    attack = attack_named("record_that_is_no_file damaged link")
    monkeypatch.setattr(local, "scan", _scan_links)
    assert any("secret" in crime for crime in crimes_of(attack, [WAYS_IN[0]], sound["safetensors"], tmp_path))


def _scan_links(folder: str, prefix: str, recursive: bool) -> Any:
    paths = sorted(Path(folder).iterdir()) if Path(folder).is_dir() else []
    return [Entry(prefix + path.name, path.stat().st_size, None, path.is_dir()) for path in paths]


# What is not a checkpoint


def test_settings_run_nothing_and_end(tmp_path, tally):
    """A config is trusted to name a predicate, and nothing else of it is code or grows beyond its text."""
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
    merges = "a0: &a0 {k: 1}\n" + "".join(
        f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 12)
    )
    texts = {
        "object": f"root: !!python/object/apply:os.mkdir [{tmp_path}/sprung]",
        "name": "root: !!python/name:os.system",
        "module": "root: !!python/module:this",
        "bomb": f"{bomb}root: x",
        "merges": f"{merges}root: x",
        "itself": "root: &r [*r]",
        "deep": "root: " + "[" * 5000 + "]" * 5000,
        "digits": f"root: x\nsave: {{every_steps: {'9' * 5000}}}",
        "endless": "root: x\nsave: {every_steps: .inf}",
        "expression": "root: x\nsave: {when: \"os:system('id')\"}",
        "dunder": "root: x\nsave: {when: 'os:__builtins__'}",
        "template": "root: x\nname: '{step.__class__.__mro__}'",
        "template up": "root: x\nname: '../{step}'",
        "template absolute": "root: x\nname: '/etc/{step}'",
        "pointer up": "root: x\nlatest: ../latest",
        "request up": "root: x\nsave: {on_file: ../../x}",
        "run up": "root: x\nrun: ../../x\nname: '{run}-{step}'",
    }
    for name, text in texts.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        with guarded(tmp_path, tmp_path / "nothing") as crimes, pytest.raises(ConfigError):
            load_config(path)
        assert crimes == [], name
    assert not (tmp_path / "sprung").exists()
    tally("attacks", len(texts))


def test_a_variable_is_put_in_once(tmp_path, monkeypatch):
    """What the environment says is text: it names no further variable."""
    monkeypatch.setenv("SECRET_OF_OURS", "secret")
    monkeypatch.setenv("ROOT", "${SECRET_OF_OURS}")
    (tmp_path / "c.yaml").write_text("root: x/${ROOT}")
    assert load_config(tmp_path / "c.yaml").root == "x/${SECRET_OF_OURS}"


def _header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


_ROW = b'{"a":{"dtype":"U8","shape":[%s],"data_offsets":[%s]}}'
FILES = {
    "empty": b"",
    "short": b"\x00" * 7,
    "2^63": (1 << 63).to_bytes(8, "little") + b"{}",
    "longer than the file": (1 << 20).to_bytes(8, "little") + b"{}",
    "pickle": pickle.dumps(Trap(Path("sprung"))),
    "deep": _header(b"[" * 100_000),
    "no object": _header(b"[]"),
    "long digits": _header(_ROW % (b"9" * 5000, b"0,8")) + bytes(8),
    "overflow": _header(_ROW % (b"4294967296,4294967296", b"0,0")),
    "negative": _header(_ROW % (b"-8", b"0,8")) + bytes(8),
    "offset below": _header(_ROW % (b"8", b"-8,0")) + bytes(8),
    "offset beyond": _header(_ROW % (b"8", b"0,1099511627776")) + bytes(8),
    "hole": _header(_ROW % (b"8", b"8,16")) + bytes(16),
    "overlap": _header(
        b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[8],"data_offsets":[4,12]}}'
    )
    + bytes(12),
    "twice": _header(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}'),
    "rest": _header(_ROW % (b"8", b"0,8")) + bytes(9),
    "unknown dtype": _header((_ROW % (b"8", b"0,8")).replace(b"U8", b"os")) + bytes(8),
    "true": _header(_ROW % (b"true", b"0,1")) + bytes(1),
    "many dimensions": _header(_ROW % (b",".join([b"1"] * 1000), b"0,1")) + bytes(1),
}


def test_a_file_that_is_no_safetensors_file_is_damage(tmp_path, tally):
    for name, data in FILES.items():
        path = tmp_path / "x.safetensors"
        path.write_bytes(data)
        with guarded(tmp_path, tmp_path / "nothing") as crimes:
            with pytest.raises(DamagedError):
                load_file(path)
            with pytest.raises(DamagedError), safe_open(path) as file:
                file.get_tensor("a")
            with pytest.raises(DamagedError):
                warm_start(path, model())
        assert crimes == [], name
    tally("attacks", len(FILES))


def test_a_file_of_weights_runs_no_code_and_stays_its_size(tmp_path, tally):
    """`warm_start` from somebody else's file."""
    (tmp_path / "outside").mkdir()
    cases = [pickle.dumps(Trap(tmp_path / "outside" / "sprung")), attacks.deflated_zeros(1 << 22)]
    for old_style in (False, True):
        buffer = io.BytesIO()
        torch.save({"w": Trap(tmp_path / "outside" / "sprung")}, buffer, _use_new_zipfile_serialization=not old_style)
        cases.append(buffer.getvalue())
    for data in cases:
        (tmp_path / "x.pt").write_bytes(data)
        with guarded(tmp_path, tmp_path / "outside") as crimes, pytest.raises((ConfigError, DamagedError)):
            warm_start(tmp_path / "x.pt", model())
        assert crimes == []
    tally("attacks", len(cases))


def test_a_pipe_in_a_files_place_is_an_error(tmp_path, tally):
    for name in ("x.safetensors", "x.pt"):
        os.mkfifo(tmp_path / name)
        with guarded(tmp_path, tmp_path / "nothing"), pytest.raises(StoreError, match="no plain file"):
            warm_start(tmp_path / name, model())
    tally("attacks", 2)


def test_a_huge_sparse_file_is_too_little_memory_and_no_end_of_the_process(tmp_path, tally):
    header = _header(b'{"a":{"dtype":"U8","shape":[1099511627776],"data_offsets":[0,1099511627776]}}')
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + (1 << 40))
    with guarded(tmp_path, tmp_path / "nothing") as crimes, pytest.raises(StoreError, match="not enough memory"):
        load_file(tmp_path / "x.safetensors")
    assert crimes == []
    tally("attacks")
