"""Is a configuration right, and what may stand in it? `config check` and `config schema`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .roots import YAML, json_option
from .tables import print_json


@click.group()
def config() -> None:
    """Check configurations, and print their schema."""


@config.command(epilog="\b\nExample:\n  ckptmgr config schema > ckptmgr.schema.json")
@json_option
def schema(as_json: bool) -> None:
    """Print the JSON schema of configurations, for editors."""
    from ..config import config_schema

    print_json(config_schema())


@config.command(epilog="\b\nExample:\n  ckptmgr config check configs/s3.yaml")
@click.argument("file")
@json_option
def check(file: str, as_json: bool) -> None:
    """Print the resolved settings, or all errors.

    Defaults and CKPTMGR_ variables are included, storage options are left out. The predicate of
    save.when is imported, from the current folder too.
    """
    from ..config import load_config

    if not file.endswith(YAML):
        raise click.UsageError(f"FILE must end in {' or '.join(YAML)}")
    sys.path.insert(0, str(Path.cwd()))  # as for a training script that is started here
    checked = load_config(file)
    if as_json:
        print_json(checked.model_dump(mode="json", exclude={"storage"}))
    else:
        click.echo(checked.to_yaml(), nl=False)
