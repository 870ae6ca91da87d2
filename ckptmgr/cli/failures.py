"""What does the shell hear when something fails? One plain message on stderr, and an exit code that says what to do."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NoReturn

import click

from ..errors import (
    AlreadyExistsError,
    CheckpointError,
    ConfigError,
    DamagedError,
    FencedError,
    FormatVersionError,
    NotFoundError,
    StateMismatchError,
    StoreError,
)

DAMAGED = 1
_CODES: tuple[tuple[type[CheckpointError], int], ...] = (
    (DamagedError, DAMAGED),
    (ConfigError, 2),
    (StateMismatchError, 2),
    (AlreadyExistsError, 2),
    (NotFoundError, 3),
    (FencedError, 4),
    (StoreError, 5),
    (FormatVersionError, 6),
)
_FAULT, _INTERRUPTED, _BROKEN_PIPE = 70, 130, 141
_DEBUG, _SECRETS = "ckptmgr.debug", "ckptmgr.secrets"


class GuardedGroup(click.Group):
    """A group in which no error reaches the shell as a traceback, unless `--debug` asks for it."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except (click.Abort, KeyboardInterrupt):
            click.echo("\nckptmgr: interrupted", err=True)
            ctx.exit(_INTERRUPTED)
        except BrokenPipeError:
            # Whoever read our output has seen enough. Nothing more may be flushed there at exit.
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(_BROKEN_PIPE)
        except CheckpointError as exc:
            _fail(ctx, str(exc), next((code for kind, code in _CODES if isinstance(exc, kind)), _FAULT))
        except MemoryError as exc:
            _fail(ctx, f"not enough memory: {exc}".removesuffix(": "), dict(_CODES)[StoreError])
        except Exception as exc:  # noqa: BLE001 - the exit code 1 of an uncaught error would say "damage found"
            _fail(ctx, f"this is a fault in ckptmgr: {exc!r}; --debug shows where", _FAULT)


def _fail(ctx: click.Context, message: str, code: int) -> NoReturn:
    if ctx.meta.get(_DEBUG):
        message = f"{traceback.format_exc()}\n{message}"
    click.echo(f"ckptmgr: {without_secrets(message)}", err=True)
    ctx.exit(code)


def without_secrets(message: str) -> str:
    """Text of another library, fit to be shown."""
    for secret in click.get_current_context().meta.get(_SECRETS, ()):
        message = message.replace(secret, "***")
    return message


def debug_option(function: Any) -> Any:
    """Adds `--debug`."""

    def remember(ctx: click.Context, _: click.Parameter, value: bool) -> None:
        ctx.meta[_DEBUG] = value

    return click.option(
        "--debug", is_flag=True, expose_value=False, callback=remember, help="Show the traceback of an error."
    )(function)


def keep_secret(url: str, options: Mapping[str, Any]) -> None:
    """Take the texts of storage options, and a URL's password, out of whatever error is shown: other
    libraries' messages stand in tracebacks."""
    texts = [*([url] if "://" in url else []), *_texts(options)]
    secrets = {secret for text in texts for secret in _secrets(text)}
    click.get_current_context().meta[_SECRETS] = sorted(secrets, key=len, reverse=True)


def _texts(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [text for inner in value.values() for text in _texts(inner)]
    if isinstance(value, list | tuple):
        return [text for inner in value for text in _texts(inner)]
    return [value] if isinstance(value, str) else []


def _secrets(text: str) -> Iterable[str]:
    """What of an option, or of a URL, may be one. An address is what an error is about, and a very
    short text is a word of its message."""
    if "://" not in text:
        return [text] if len(text) > 3 else []
    from ..store.redaction import passwords

    return passwords(text)
