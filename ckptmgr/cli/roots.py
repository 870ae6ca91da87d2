"""Which root does a command line mean? A folder, a URL, or a configuration, with storage options."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..errors import NotFoundError
from ..folder_names import NameTemplate
from ..manifest import CheckpointInfo
from ..repository import Repository
from ..store import Store, open_store
from .failures import debug_option, keep_secret

if TYPE_CHECKING:
    from ..config import CheckpointConfig
    from ..run import Run

YAML = (".yaml", ".yml")


class Root:
    """The root that a command works on. Nothing is read of it before it is asked."""

    def __init__(self, source: str, options: Mapping[str, Any]) -> None:
        self._source, self._options = source, dict(options)
        keep_secret(source, self._options)
        # Reading the settings is slow, and a plain folder has none.
        has_settings = source.endswith(YAML) or any(name.upper().startswith("CKPTMGR_") for name in os.environ)
        self.config = self.configure() if has_settings else None

    def configure(self, **overrides: Any) -> CheckpointConfig:
        """The settings for this root, with the schema's defaults. Raises `ConfigError`."""
        from ..config import load_config

        # The predicate of a training script says nothing here, and may not be importable from here.
        config = load_config(self._source, save={"when": None}, storage={"options": self._options}, **overrides)
        keep_secret(config.root, config.storage.options)
        return config

    @property
    def address(self) -> tuple[str, dict[str, Any]]:
        """The root's URL with all that it carries, and its storage options: for use, never for show."""
        if self.config is None:
            return self._source, self._options
        return self.config.root, dict(self.config.storage.options)

    @functools.cached_property
    def store(self) -> Store:
        url, options = self.address
        if self.config is None:
            return open_store(url, options)
        deadline_s = self.config.storage.deadline.total_seconds()
        return open_store(url, options, fsync=self.config.fsync, deadline_s=deadline_s)

    @functools.cached_property
    def repository(self) -> Repository:
        """For reading, and for what needs no lock."""
        if self.config is None:
            return Repository(self.store)
        return Repository(self.store, names=NameTemplate(self.config.name), pointer=self.config.latest)

    def run(self, config: CheckpointConfig | None = None) -> Run:
        """For what needs the writer's lock, and for what the settings say."""
        from ..run import Run

        config = config or self.config or self.configure()
        return Run(self.store, config, takeover=False, read_only=False)

    def infos(self) -> list[CheckpointInfo]:
        """Every checkpoint, newest first. Raises `NotFoundError` when there is none."""
        return self.found(self.repository.infos())

    def found(self, infos: list[CheckpointInfo]) -> list[CheckpointInfo]:
        """The same, unless it is empty: then raises `NotFoundError`."""
        if infos:
            return infos
        hint = ""
        if self.repository.is_itself_one():
            hint = ": it is a checkpoint itself; give the folder above it, and its name as the STEP"
        raise NotFoundError(f"no checkpoint in {self.store.url}{hint}")

    def find(self, which: str) -> CheckpointInfo:
        """The checkpoint that a STEP means. Raises `NotFoundError`."""
        infos = self.infos()
        return self.run().find(which, infos) if which == "best" else self.repository.find(which, infos)

    def url(self, info: CheckpointInfo) -> str:
        return f"{self.store.url}/{info.name}"


def json_option(function: Any) -> Any:
    """Adds `--json` and `--debug`."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON: sizes in bytes, times in ISO 8601.")(
        debug_option(function)
    )


def root_command(function: Callable[..., None]) -> Any:
    """Gives a command its URL and what every command on a root takes; calls it with `root` and `as_json`."""

    @click.argument("url")
    @click.option(
        "--option",
        "options",
        multiple=True,
        metavar="KEY=VALUE",
        callback=_parsed,
        help="A storage option, such as endpoint_url=http://127.0.0.1:9000, or several as a JSON object. "
        "A VALUE that is JSON counts as JSON. May be repeated.",
    )
    @functools.wraps(function)
    def command(url: str, options: dict[str, Any], **rest: Any) -> None:
        function(root=Root(url, options), **rest)

    return json_option(command)


def _parsed(_: click.Context, __: click.Parameter, texts: Sequence[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for text in texts:
        key, separator, value = text.partition("=")
        if text.lstrip().startswith("{"):
            many = _json(text)
            if not isinstance(many, dict):
                raise click.BadParameter("what begins with { must be one JSON object")
            options.update(many)
        elif separator and key:
            options[key] = _json(value)
        else:
            # Not shown: it may be a secret without its name.
            raise click.BadParameter("give KEY=VALUE, or a JSON object")
    return options


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
