"""Does a credential ever stand where somebody else may read it? Every output of runs that succeed and that fail."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from ckptmgr import CheckpointError, CheckpointManager
from ckptmgr.cli import main
from ckptmgr.config import load_config
from ckptmgr.store import open_store
from ckptmgr.store.remote import FsspecStore

SECRET, TOKEN, PASSWORD, VARIABLE = "Secr3tKeyOfOurs", "T0kenOfOurs", "Passw0rdOfOurs", "Variabl3OfOurs"
ALL = (SECRET, TOKEN, PASSWORD, VARIABLE)


@pytest.fixture
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was said; at the end also what our loggers said, down to DEBUG."""
    monkeypatch.setenv("AWS_SESSION_TOKEN", VARIABLE)
    monkeypatch.setenv("OURS", VARIABLE)
    caplog.set_level(logging.DEBUG, logger="ckptmgr")
    said: list[str] = []
    yield said
    said += [record.getMessage() + (record.exc_text or "") for record in caplog.records if record.name[:7] == "ckptmgr"]
    assert leaks(said) == []


def leaks(said: list[str]) -> list[str]:
    return [text for text in said if any(secret in text for secret in ALL)]


def tried(said: list[str], call: Callable[[], Any]) -> None:
    """What a call answers or raises, as it is shown: with our part of each message on the way."""
    try:
        answer = call()
        said += [repr(answer), str(answer)]
    except CheckpointError as exc:
        said += [repr(exc), str(exc), "".join(traceback.format_exception(exc))]  # with what it came from


def every_way(said: list[str], url: str, options: dict[str, Any], profile: Any) -> int:
    def run() -> None:
        with CheckpointManager(
            url, background=False, storage={"options": options}, name="{run}-{step}", run="r"
        ) as made:
            said.extend([repr(made), str(made)])
            made.resume()
            info = made.save({"w": torch.ones(2)}, 1)
            said.extend([repr(info), repr(made.info()), repr(made.verify())])
            made.load()
            made.pin(1, "tag")

    config = load_config(url, storage={"options": options})
    store = open_store(url, options)
    calls: list[Callable[[], Any]] = [
        run,
        run,
        lambda: config.to_yaml(),
        lambda: config.fingerprint(),
        lambda: store,
        lambda: store.url,
        lambda: store.get("missing"),
        lambda: [store.get(entry.key) for entry in store.list(recursive=True) if entry.size < 1 << 20],
        lambda: FsspecStore(url, {**options, "no_such_option": SECRET}).list(),
        lambda: load_config(url, storage={"options": options, "odd": SECRET}),
        lambda: load_config(url, storage=SECRET),
        lambda: load_config(url, storage={"options": [SECRET]}),
    ]
    for call in calls:
        tried(said, call)
    flags = [f"--option={key}={value}" for key, value in options.items() if isinstance(value, str)]
    commands = [
        ["ls"],
        ["show", "1"],
        ["verify", "--all"],
        ["pins"],
        ["prune", "--dry-run"],
        ["rm", "9", "--yes"],
        ["show", "x"],
    ]
    commands = profile.sample(commands, quick=3)
    for words in commands:
        for more in ([], ["--json"], ["--debug"]):
            result = CliRunner().invoke(main, [words[0], url, *words[1:], *flags, *more])
            said += [result.output]
    return len(calls) + 3 * len(commands)


@pytest.mark.server
def test_no_secret_of_an_object_store_is_shown(heard, s3_moto, profile, tally):
    """With what opens the bucket, with what does not, and where nobody answers."""
    good = {**s3_moto.options, "secret": SECRET, "token": TOKEN}
    shut = {**good, "endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"max_attempts": 0}}}
    count = every_way(heard, f"{s3_moto.url}/run", good, profile)
    count += every_way(heard, "s3://no-such-bucket-of-ours/run", good, profile)
    for call in (lambda: open_store("s3://bucket/run", shut).list(),):
        tried(heard, call)
    tally("outputs without secrets", count + 1)


@pytest.mark.parametrize(
    "url",
    [
        f"ftp://user:{PASSWORD}@127.0.0.1:9/run",
        f"http://user:{PASSWORD}@127.0.0.1:9/run?token={TOKEN}",
        f"sftp://user:{PASSWORD}@127.0.0.1:9/run",
        f"nosuch://user:{PASSWORD}@host/run?sig={TOKEN}",
        f"simplecache::s3://user:{PASSWORD}@bucket/run?token={TOKEN}",
        f"s3://user:{PASSWORD}@bucket",
    ],
)
def test_no_password_in_a_url_is_shown(heard, url, tally):
    for call in (
        lambda: open_store(url),
        lambda: open_store(url).url,
        lambda: open_store(url).list(),
        lambda: CheckpointManager(url, storage={"options": {"password": PASSWORD}}),
        lambda: load_config(url).to_yaml() and "",
    ):
        tried(heard, call)
    for words in (["ls"], ["show", "1"]):
        heard.append(CliRunner().invoke(main, [words[0], url, *words[1:]]).output)
    tally("outputs without secrets", 7)


def test_no_value_from_the_environment_is_shown(heard, tmp_path: Path, tally):
    path = tmp_path / "c.yaml"
    path.write_text("root: s3://bucket/run\nstorage: {options: {secret: '${OURS}', more: {deep: ['${OURS}']}}}\n")
    config = load_config(path)
    assert config.storage.options["secret"] == VARIABLE
    heard += [config.to_yaml(), config.fingerprint()]
    path.write_text("root: s3://bucket/run\nstorage: {options: {secret: '${OURS}'}, odd: '${OURS}'}\n")
    tried(heard, lambda: load_config(path))
    heard.append(CliRunner().invoke(main, ["config", "check", str(path)]).output)
    tally("outputs without secrets", 4)
