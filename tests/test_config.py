"""What was the manager told? Defaults, sources and their order, and errors that say everything at once."""

from __future__ import annotations

import functools
import json
import os
import pickle
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from ckptmgr.config import (
    BestConfig,
    CheckpointConfig,
    KeepConfig,
    SaveConfig,
    StorageConfig,
    config_schema,
    load_config,
)
from ckptmgr.config.elsewhere import ELSEWHERE
from ckptmgr.errors import ConfigError
from ckptmgr.folder_names import NameTemplate
from ckptmgr.quantities import MAX_DURATION, format_duration, format_size, parse_duration, parse_size
from ckptmgr.retention import Best, KeepEverySteps, Last, NewerThan
from ckptmgr.triggers import AtSteps, Every, EveryEpochs, EverySteps, Moment, OnRequest, OnSignals, When

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("CKPTMGR_"):
            monkeypatch.delenv(name)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(*source: Any, **overrides: Any) -> list[str]:
    """The lines of the error that loading gives, without the folder of the file."""
    with pytest.raises(ConfigError) as caught:
        load_config(*source, **overrides)
    lines = re.sub(r"\S*/(?=run\.yaml)", "", str(caught.value)).splitlines()
    return [line.strip() for line in lines if not line.endswith("problems in the configuration:")]


def loss_is_low(moment: Moment) -> bool:
    return moment.metrics.get("loss", 1.0) < 0.1


not_callable = 5


# Where settings come from.


def test_a_root_alone_is_a_whole_configuration() -> None:
    assert load_config("s3://bucket/run") == CheckpointConfig(root="s3://bucket/run")


def test_a_path_that_is_no_yaml_file_is_a_root(tmp_path: Path) -> None:
    assert load_config(tmp_path).root == str(tmp_path)
    assert load_config(root=tmp_path).root == str(tmp_path)


def test_overrides_win_over_the_environment_over_the_file_over_defaults(
    write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("root: from-file\nkeep: {last: 1, every_steps: 1, min_good: 1}\n")
    monkeypatch.setenv("CKPTMGR_KEEP__EVERY_STEPS", "2")
    monkeypatch.setenv("CKPTMGR_KEEP__MIN_GOOD", "2")
    config = load_config(path, keep={"min_good": 3})
    assert config == CheckpointConfig(root="from-file", keep=KeepConfig(last=1, every_steps=2, min_good=3))


def test_the_environment_wins_over_a_mapping_but_not_over_a_root_given_as_argument(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CKPTMGR_ROOT", "from-env")
    assert load_config().root == "from-env"
    assert load_config({"root": "from-mapping"}).root == "from-env"
    assert load_config("from-argument").root == "from-argument"


def test_a_finished_configuration_is_taken_as_it_is_under_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTMGR_KEEP__LAST", "9")
    config = CheckpointConfig(root="x", save=SaveConfig(every_steps=5, when=loss_is_low), keep=KeepConfig(last=2))
    assert load_config(config) == config
    changed = load_config(config, keep=KeepConfig(newer_than=timedelta(days=1)), run="r")
    assert changed.keep == KeepConfig(last=2, newer_than=timedelta(days=1))
    assert (changed.save, changed.run) == (config.save, "r")


def test_lists_and_mappings_in_the_environment_are_json_and_null_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPTMGR_SAVE__AT_STEPS", "[1, 100]")
    monkeypatch.setenv("CKPTMGR_SAVE__EVERY", "30m")
    monkeypatch.setenv("CKPTMGR_KEEP", '{"last": null, "best": {"metric": "loss", "mode": "max"}}')
    monkeypatch.setenv("CKPTMGR_KEEP__BEST__MODE", "min")
    monkeypatch.setenv("CKPTMGR_KEEP__NEWER_THAN", "null")
    monkeypatch.setenv("CKPTMGR_STORAGE__OPTIONS__CLIENT_KWARGS__REGION_NAME", "eu-1")
    config = load_config("x")
    assert (config.save.at_steps, config.save.every) == ([1, 100], timedelta(minutes=30))
    assert config.keep == KeepConfig(last=None, best=BestConfig(metric="loss", mode="min"))
    assert config.storage.options == {"client_kwargs": {"region_name": "eu-1"}}


def test_yaml_anchors_and_merges_work(write: Any) -> None:
    path = write("root: &r here\nrun: *r\nkeep: {best: [&b {metric: a, mode: min}, {<<: *b, metric: b}]}\n")
    config = load_config(path)
    assert config.run == "here"
    assert config.keep.best == [BestConfig(metric="a", mode="min"), BestConfig(metric="b", mode="min")]


def test_a_bare_off_means_off_though_yaml_reads_it_as_false(write: Any) -> None:
    verify = load_config(write("root: x\nverify: {on_save: off, on_resume: off}")).verify
    assert (verify.on_save, verify.on_resume) == ("off", "off")


# ${VAR} in files.


def test_variables_are_read_at_any_depth_with_defaults_and_an_escape(
    write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BUCKET", "b")
    monkeypatch.setenv("EMPTY", "")
    path = write(
        "root: s3://${BUCKET}/${PREFIX:-runs/x}\nrun: '$${BUCKET}'\nonly: ['${EMPTY:-model}']\n"
        "keep: {last: '${LAST:-7}'}\nstorage: {options: {a: {b: '${BUCKET}'}}}\n"
    )
    config = load_config(path)
    assert (config.root, config.run, config.only, config.keep.last) == ("s3://b/runs/x", "${BUCKET}", ["model"], 7)
    assert config.storage.options == {"a": {"b": "b"}}


def test_a_storage_option_whose_variable_is_empty_is_left_out_at_any_depth(write: Any) -> None:
    path = write("root: x\nstorage: {options: {url: '${NOT_SET:-}', inner: {url: '${NOT_SET:-}', kept: ''}}}")
    assert load_config(path).storage.options == {"inner": {"kept": ""}}


def test_every_variable_that_is_not_set_is_named_with_its_key_beside_other_problems(write: Any) -> None:
    path = write("root: ${NOT_SET}\nsave: {every_steps: '${NOR_THIS}', on_file: 'a${', every: 0}\n")
    assert problems(path) == [
        "run.yaml: root: the environment variable NOT_SET is not set; set it, or give a default: ${NOT_SET:-default}",
        "run.yaml: save.every_steps: the environment variable NOR_THIS is not set; set it, or give a default: "
        "${NOR_THIS:-default}",
        "run.yaml: save.on_file: ${ must be ${NAME} or ${NAME:-default}; $${ stands for a plain ${",
        "run.yaml: save.every: 0 given; must be a time above 0 such as 500ms, 0.5s, 30m, 1.5h or 2d; "
        "a plain number is in seconds",
    ]


def test_one_variable_that_is_not_set_is_an_error_by_itself(write: Any) -> None:
    assert problems(write("root: x/${NOT_SET}")) == [
        "run.yaml: root: the environment variable NOT_SET is not set; set it, or give a default: ${NOT_SET:-default}"
    ]


# Files that are no configuration.


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "run.yaml: is empty; it needs at least a root"),
        ("# nothing\n", "run.yaml: is empty; it needs at least a root"),
        ("- root\n", "run.yaml: holds a list; must be a mapping of settings"),
        ("root: &r {a: *r}\n", "run.yaml: is nested in itself"),
    ],
)
def test_a_file_that_is_no_mapping_is_named(write: Any, text: str, line: str) -> None:
    assert problems(write(text)) == [line]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("root: a\nroot: b\n", "key 'root' is given twice"),
        ("root: a\nkeep:\n  last: 1\n  last: 2\n", "key 'last' is given twice"),
        ("root: !!python/object/apply:os.getcwd []\n", "could not determine a constructor for the tag"),
        ("root: {\n", "while parsing a flow node"),
        ("root: 2024-99-99\n", "month must be in 1..12"),
        ("root: a\n---\nroot: b\n", "expected a single document"),
    ],
)
def test_what_is_not_plain_yaml_is_an_error_with_its_place(write: Any, text: str, words: str) -> None:
    message = "\n".join(problems(write(text)))
    assert message.startswith("run.yaml: is not plain YAML: ")
    assert words in message


def test_a_file_that_is_not_there_or_not_text_is_named(tmp_path: Path) -> None:
    missing, binary, folder = (tmp_path / name for name in ("none.yaml", "binary.yaml", "folder.yaml"))
    binary.write_bytes(b"\xff\xfe\xfa")
    folder.mkdir()
    for path, words in ((missing, "there is no such file"), (binary, "is not plain YAML"), (folder, "can't be read")):
        with pytest.raises(ConfigError, match=words) as caught:
            load_config(str(path))
        assert str(caught.value).startswith(f"{path}: ")


# Errors.


def test_one_error_lists_every_problem_with_source_key_what_was_given_and_what_is_allowed(
    write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(
        "formta: torch\n"
        "save: {every_stepz: 5, every_epochs: 0, at_steps: [1, -2], every_steps: true}\n"
        "keep: {last: 0, best: {mode: lowest}, max_bytes: 3 apples}\n"
        "on_error: ignore\n"
        "only: []\n"
    )
    monkeypatch.setenv("CKPTMGR_SAVE__EVRY", "5m")
    monkeypatch.setenv("CKPTMGR_KEEP__EVERY_STEPS", "x")
    monkeypatch.setenv("CKPTMGR_TEST_X", "1")
    monkeypatch.setenv("CKPTMGR_SAVE__ON_SIGNALS", "SIGTERM")
    found = problems(path, keep={"min_good": 0}, commit="symlink", background="maybe")
    count = "must be a whole number of at least 1"
    assert sorted(found) == sorted(
        [
            "run.yaml: root: is required",
            "run.yaml: formta: unknown key; did you mean format?",
            "run.yaml: save.every_stepz: unknown key; did you mean every_steps?",
            f"run.yaml: save.every_epochs: 0 given; {count}",
            f"run.yaml: save.at_steps[1]: -2 given; {count}",
            f"run.yaml: save.every_steps: True given; {count}",
            f"run.yaml: keep.last: 0 given; {count}",
            "run.yaml: keep.best.metric: is required",
            "run.yaml: keep.best.mode: 'lowest' given; must be 'min' or 'max'",
            "run.yaml: keep.max_bytes: '3 apples' given; must be a size above 0 such as 64MiB, 500GB or 1TB; "
            "a plain number is in bytes",
            "run.yaml: on_error: 'ignore' given; must be 'raise' or 'warn'",
            "run.yaml: only: [] given; must name at least one entry; leave it out to save all",
            "environment CKPTMGR_SAVE__EVRY: save.evry: unknown key; did you mean every?",
            f"environment CKPTMGR_KEEP__EVERY_STEPS: keep.every_steps: 'x' given; {count}",
            "environment CKPTMGR_TEST_X: unknown variable; did you mean CKPTMGR_LATEST?",
            "environment CKPTMGR_SAVE__ON_SIGNALS: 'SIGTERM' given; must be JSON, as it is a list or a mapping: "
            "Expecting value: line 1 column 1 (char 0)",
            f"argument: keep.min_good: 0 given; {count}",
            "argument: commit: 'symlink' given; must be 'auto', 'rename' or 'manifest'",
            "argument: background: 'maybe' given; must be a valid boolean, unable to interpret input",
        ]
    )


def test_a_section_that_is_no_mapping_says_which_keys_it_takes(write: Any) -> None:
    assert problems(write("root: x\nverify: fast\n")) == [
        "run.yaml: verify: 'fast' given; must be a mapping with some of: on_save, on_resume, scrub"
    ]


def test_an_unknown_key_that_resembles_none_lists_what_is_allowed() -> None:
    assert problems("x", verify={"zzz": 1}) == ["argument: verify.zzz: unknown key; allowed: on_save, on_resume, scrub"]


@pytest.mark.parametrize(
    ("given_", "meant"),
    [
        ({"every_steps": 5}, "every_steps: unknown key; did you mean save.every_steps or keep.every_steps?"),
        ({"save": {"last": 5}}, "save.last: unknown key; did you mean keep.last?"),
        ({"metric": "loss"}, "metric: unknown key; did you mean keep.best.metric?"),
        ({"keep": {"fsync": True}}, "keep.fsync: unknown key; did you mean fsync?"),
        ({"save_top_k": 3}, "save_top_k: unknown key; did you mean keep.best?"),
        ({"keep": {"max_to_keep": 3}}, "keep.max_to_keep: unknown key; did you mean keep.last?"),
    ],
)
def test_a_key_of_another_section_or_another_library_is_told_its_place(given_: dict[str, Any], meant: str) -> None:
    assert problems("x", **given_) == [f"argument: {meant}"]


def test_what_other_libraries_call_our_keys_are_no_keys_of_ours_and_lead_to_some() -> None:
    for theirs, ours in ELSEWHERE.items():
        section, _, key = ours.rpartition(".")
        fields = (CheckpointConfig.model_fields[section].annotation if section else CheckpointConfig).model_fields
        assert key in fields, ours
        assert theirs not in CheckpointConfig.model_fields


def test_a_list_of_bests_says_which_one_is_wrong() -> None:
    found = problems("x", keep={"best": [{"metric": "a", "mode": "min"}, {"metric": "", "mode": "min"}]})
    assert found == ["argument: keep.best[1].metric: '' given; String should have at least 1 character"]


def test_building_a_configuration_in_python_raises_the_same_error() -> None:
    with pytest.raises(ConfigError, match=r"^argument: every_steps: 0 given; must be a whole number of at least 1$"):
        SaveConfig(every_steps=0)
    with pytest.raises(ConfigError, match=r"(?s)^2 problems.*save\.every: 0 given.*keep\.lst: unknown key"):
        CheckpointConfig(root="x", save={"every": 0}, keep={"lst": 4})  # type: ignore[arg-type]


@pytest.mark.parametrize("given_", ["SIGFOO", "SIGKILL", "SIGSTOP", "SIGSEGV", "SIGCHLD", "sigterm"])
def test_signals_that_do_not_exist_or_cannot_be_waited_for_are_refused(given_: str) -> None:
    (line,) = problems("x", save={"on_signals": [given_]})
    assert line.startswith(f"argument: save.on_signals[0]: '{given_}' given; must be one of SIGHUP, SIGINT, SIGQUIT,")


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"root": " "}, "argument: root: ' ' given; must be a folder or a URL such as s3://bucket/runs/name"),
        (
            {"name": "a-{stp}"},
            "argument: name: 'a-{stp}' is not a template: KeyError('stp'); fields are {step}, {epoch}, {run}",
        ),
        (
            {"name": "{run}-{step}", "run": "my run"},
            "argument: name: '{run}-{step}' given; puts the run's name 'my run' into folder names, which take letters, "
            "digits and . _ + = @ % ~ - and begin with no dot",
        ),
        (
            {"name": "{run}-{step}", "run": ".hid"},
            "argument: name: '{run}-{step}' given; puts the run's name '.hid' into folder names, which take letters, "
            "digits and . _ + = @ % ~ - and begin with no dot",
        ),
        (
            {"name": "{run}-{step}", "run": "r" * 190},
            "argument: name: '{run}-{step}' given; gives folders with names of 201 characters with the run's name "
            f"'{'r' * 59}, more than 200: shorten one of them",
        ),
        (
            {"name": "{step:0201d}"},
            "argument: name: '{step:0201d}' gives folders with names of 201 characters, more than 200: shorten the "
            "template or the run's name",
        ),
        (
            {"latest": "step-00000005"},
            "argument: latest: 'step-00000005' given; looks like a folder of name: 'step-{step:08d}'; "
            "rename one of them",
        ),
        (
            {"save": {"on_file": "latest"}},
            "argument: latest: 'latest' given; is also the name in save.on_file; rename one of them",
        ),
        (
            {"save": {"on_file": "step-00000005"}},
            "argument: name: 'step-{step:08d}' given; gives folders like save.on_file, 'step-00000005'; "
            "rename one of them",
        ),
    ],
)
def test_names_that_would_be_taken_for_each_other_are_refused(overrides: dict[str, Any], line: str) -> None:
    assert problems("x" if "root" not in overrides else None, **overrides) == [line]


@pytest.mark.parametrize("name", [".hidden", "a/b", "../up", "", "with space", ".ckptmgr"])
def test_files_of_our_own_have_plain_names(name: str) -> None:
    for overrides in ({"latest": name}, {"save": {"on_file": name}}):
        (line,) = problems("x", **overrides)
        assert line.endswith(
            "must be a file name of letters, digits and . _ + = @ % ~ - that does not begin with a dot"
        )


def test_a_template_with_epoch_and_run_is_fine() -> None:
    assert load_config("x", name="{run}-e{epoch}-{step}", run="r.1").name == "{run}-e{epoch}-{step}"


def test_a_name_that_is_too_long_is_refused_before_its_first_step_and_not_half_way() -> None:
    names = NameTemplate("{run}-{step}")
    assert load_config("x", name="{run}-{step}", run="r" * 189).run == "r" * 189
    assert names.format(1, None, "r" * 189) == "r" * 189 + "-1"
    assert len(names.format(9_999_999_999, None, "r" * 189)) == 200
    for step in (1, 9_999_999_999):
        with pytest.raises(ConfigError, match=r"gives run 'rr.* folders with names of 201 characters, more than 200:"):
            names.format(step, None, "r" * 190)
    with pytest.raises(ConfigError, match="of 201 characters"):
        NameTemplate("{run}-e{epoch}-{step}").format(1, 1, "r" * 178)


# Predicates.


def test_a_predicate_may_be_an_import_path_or_a_callable() -> None:
    for when in (f"{__name__}:loss_is_low", loss_is_low):
        trigger = load_config("x", save={"when": when, "on_signals": []}).trigger()
        assert trigger.triggers == (When(loss_is_low, f"{__name__}:loss_is_low"), OnRequest())
        assert trigger.due(Moment(1, metrics={"loss": 0.0})) == f"when: {__name__}:loss_is_low"


@pytest.mark.parametrize(
    ("when", "words"),
    [
        ("no_such_module_at_all:f", "can't be imported: ModuleNotFoundError"),
        (f"{__name__}:nothing_here", "can't be imported: AttributeError"),
        (f"{__name__}:not_callable", "must be an import path such as mytrain.rules:loss_improved"),
        (f"{__name__}:BaseModel", "must be an import path"),
        ("loss_is_low", "must be an import path"),
        (5, "must be an import path"),
    ],
)
def test_a_predicate_that_cannot_be_called_is_refused_when_loading(when: Any, words: str) -> None:
    (line,) = problems("x", save={"when": when})
    assert line.startswith(f"argument: save.when: {when!r} given; {words}")


# What becomes of it.


def test_every_way_to_be_due_becomes_a_trigger() -> None:
    save = {
        "every_steps": 5,
        "every_epochs": 1,
        "every": "30m",
        "at_steps": [1, 2],
        "on_signals": ["SIGTERM", "SIGUSR1"],
    }
    assert load_config("x", save=save).trigger(extra=[loss_is_low]).triggers == (
        EverySteps(5),
        EveryEpochs(1),
        Every(timedelta(minutes=30)),
        AtSteps((1, 2)),
        OnSignals(("SIGTERM", "SIGUSR1")),
        OnRequest(),
        When(loss_is_low),
    )


def test_every_way_to_keep_becomes_a_rule() -> None:
    keep = {
        "last": 2,
        "every_steps": 100,
        "newer_than": "24h",
        "best": [{"metric": "a", "mode": "min"}, {"metric": "b", "mode": "max", "count": 2}],
    }
    assert load_config("x", keep=keep).keep_rules() == (
        Last(2),
        KeepEverySteps(100),
        Best("a", "min", 1),
        Best("b", "max", 2),
        NewerThan(timedelta(days=1)),
    )
    assert load_config("x", keep={"last": None, "best": {"metric": "a", "mode": "min"}}).keep_rules() == (
        Best("a", "min", 1),
    )


def test_keep_without_any_rule_keeps_everything() -> None:
    assert load_config("x", keep={"last": None, "max_bytes": "1GB"}).keep_rules() == ()


def test_the_fingerprint_is_that_of_the_settings_and_not_of_their_spelling() -> None:
    config = load_config("x", save={"every": "30m"}, storage={"options": {"secret": "hidden"}})
    assert config.fingerprint() == load_config({"root": "x", "save": {"every": 1800}}).fingerprint()
    assert config.fingerprint() != load_config("x", save={"every": "31m"}).fingerprint()
    assert re.fullmatch(r"[0-9a-f]{32}", config.fingerprint())


def test_storage_options_are_never_shown(write: Any) -> None:
    config = load_config("x", storage={"options": {"secret": "hunter2"}}, save={"when": loss_is_low})
    assert config.storage.options == {"secret": "hunter2"}
    assert "hunter2" not in repr(config) + str(config) + config.to_yaml()
    with pytest.raises(ConfigError) as caught:
        load_config(write("root: x\nstorage: {options: hunter2, secret: hunter2}\nstorage_options: hunter2\n"))
    assert str(caught.value.__cause__)
    assert "hunter2" not in str(caught.value) + str(caught.value.__cause__)
    with pytest.raises(ConfigError, match=r"^argument: options: \(hidden\) given; must be a valid dictionary$"):
        StorageConfig(options="hunter2")  # type: ignore[arg-type]


def test_to_yaml_loads_back_as_the_same(write: Any) -> None:
    config = load_config(
        "x",
        save={"every": "90s", "when": loss_is_low, "at_steps": [3]},
        keep={"best": {"metric": "m", "mode": "max"}, "max_bytes": "3GiB"},
        verify={"on_save": "off"},
        run="läuft",
    )
    again = load_config(write(config.to_yaml()))
    assert again.model_copy(update={"save": config.save}) == config
    assert again.save.when == f"{__name__}:loss_is_low"
    assert again.to_yaml() == config.to_yaml()


@pytest.mark.parametrize("when", [lambda moment: True, functools.partial(loss_is_low), {}.get])
def test_to_yaml_refuses_a_predicate_that_has_no_import_path(when: Any) -> None:
    with pytest.raises(ConfigError, match=r"save\.when: .* is no import path of it"):
        load_config("x", save={"when": when}).to_yaml()


def test_a_callable_object_is_named_by_its_class() -> None:
    class Rule:
        def __call__(self, moment: Moment) -> bool:
            return True

    (when, _) = load_config("x", save={"when": Rule(), "on_signals": []}).trigger().triggers
    assert str(when.due(Moment(1))).endswith("Rule")


def test_a_configuration_is_frozen_and_travels_to_other_processes() -> None:
    config = load_config("x", keep={"last": 5})
    with pytest.raises(ValueError, match="frozen"):
        config.root = "y"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config


# Durations and sizes.


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *[("500ms", 0.5), ("0.5s", 0.5), ("30m", 1800), ("1.5h", 5400), ("2d", 172800), ("1 h", 3600), ("90", 90)],
        *[(60, 60), (0.25, 0.25), (timedelta(minutes=1), 60)],
    ],
)
def test_durations_read_as_people_write_them(text: Any, seconds: float) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *[("64MiB", 64 << 20), ("500GB", 500 * 10**9), ("1TB", 10**12), ("1.5KiB", 1536), ("5gb", 5 * 10**9)],
        *[("7B", 7), (12345, 12345), ("12345", 12345), (5e9, 5 * 10**9)],
    ],
)
def test_sizes_read_as_people_write_them(text: Any, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [0, "0", -1, "-1s", "0.0000001s", timedelta(0), float("nan"), float("inf"), True, None, "1e3", "h", []],
)
def test_a_time_that_is_none_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="must be a time above 0"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["9999999d", "100000.1d", 8_640_000_001, 1e30, timedelta.max])
def test_a_time_with_which_nothing_could_be_reckoned_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=r"must be at most 100000d \(about 270 years\); give a shorter time"):
        parse_duration(text)


@pytest.mark.parametrize(
    "key", ["save.every", "save.grace", "keep.newer_than", "storage.deadline", "ranks.timeout", "lease_ttl"]
)
def test_every_time_in_the_settings_has_that_bound(key: str) -> None:
    section, _, name = key.rpartition(".")
    longest, longer = ({section: {name: text}} if section else {name: text} for text in ("100000d", "100001d"))
    load_config("x", **longest)
    (line,) = problems("x", **longer)
    assert line.startswith(f"argument: {key}: ")
    assert "; must be at most 100000d" in line


@pytest.mark.skipif(sys.platform == "win32", reason="Python waits for 49 days at most there")
def test_the_longest_time_can_be_waited_for() -> None:
    assert threading.Lock().acquire(timeout=MAX_DURATION.total_seconds())


@pytest.mark.parametrize("text", [0, "0", -1, "0.5B", "64M", "MB", True, None, float("inf"), "1e3", []])
def test_a_size_that_is_none_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match="must be a size above 0"):
        parse_size(text)


@given(st.timedeltas(timedelta(microseconds=1), MAX_DURATION))
def test_a_written_duration_reads_back_as_itself(duration: timedelta) -> None:
    assert parse_duration(format_duration(duration)) == duration


@given(st.integers(1, 10**18) | st.integers(1, 10**4).map(lambda n: n << 30))
def test_a_written_size_reads_back_as_itself(size: int) -> None:
    assert parse_size(format_size(size)) == size


# The schema and the shipped files.


def _fields(schema: dict[str, Any], part: dict[str, Any], key: str = "") -> Iterator[tuple[str, str]]:
    """Each field's dotted key and description; a section may have its own instead of its field's."""
    for name, field in part.get("properties", {}).items():
        yield f"{key}{name}", field.get("description") or _target(schema, field).get("description", "")
        yield from _fields(schema, field, f"{key}{name}.")
    for inner in (*part.get("oneOf", ()), *part.get("anyOf", ())):
        yield from _fields(schema, inner, key)
    if target := _target(schema, part):
        yield from _fields(schema, target, key)


def _target(schema: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    return schema["$defs"].get(part.get("$ref", "").rsplit("/", 1)[-1], {})  # type: ignore[no-any-return]


def test_the_schema_is_json_and_describes_every_field() -> None:
    schema = json.loads(json.dumps(config_schema()))
    described = dict(_fields(schema, schema))
    assert {"root", "save.every", "keep.best.metric", "storage.options"} <= described.keys()
    assert [key for key, words in described.items() if not words] == []
    assert schema["additionalProperties"] is False


def test_the_schema_shows_durations_and_sizes_as_text_with_a_pattern() -> None:
    defs = config_schema()["$defs"]
    every = defs["SaveConfig"]["properties"]["every"]["anyOf"][0]
    cap = defs["KeepConfig"]["properties"]["max_bytes"]["anyOf"][0]
    assert re.match(every["pattern"], "1.5h")
    assert not re.match(every["pattern"], "soon")
    assert re.match(cap["pattern"], "500GB")
    assert config_schema()["properties"]["lease_ttl"]["default"] == "1m"


def test_the_reference_file_names_every_option_with_exactly_its_default() -> None:
    path = CONFIGS / "reference.yaml"
    assert load_config(path) == CheckpointConfig(root="runs/example")

    def keys(values: Any, model: type[BaseModel]) -> None:
        assert list(values) == list(model.model_fields)
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                keys(values[name], field.annotation)

    keys(yaml.safe_load(path.read_text()), CheckpointConfig)


def test_the_reference_file_explains_every_option_in_the_words_of_the_schema() -> None:
    text = " ".join((CONFIGS / "reference.yaml").read_text().replace("#", "").replace("`", "").split())
    # What follows the first clause differs where the file adds an example.
    openings = {
        key: re.split(r"[,:;.]", words)[0]
        for key, words in _fields(config_schema(), config_schema())
        if "best." not in key
    }
    assert [key for key, words in openings.items() if words not in text] == []
    assert all(name in text for name in BestConfig.model_fields)


@pytest.mark.parametrize("name", ["minimal", "reference", "s3", "gcs", "oss"])
def test_the_shipped_files_load(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("S3_BUCKET", "GCS_BUCKET", "OSS_BUCKET"):
        monkeypatch.setenv(variable, "bucket")
    config = load_config(CONFIGS / f"{name}.yaml")
    assert (config.keep.last, config.storage.options) == (3, {})


def test_importing_the_configuration_imports_neither_torch_nor_fsspec() -> None:
    code = (
        "import sys, ckptmgr.config; print([m for m in ('torch', 'fsspec', 'pydantic_settings') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
