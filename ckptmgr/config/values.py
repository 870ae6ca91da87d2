"""What may one setting be? Counts, durations, sizes, names, signals and predicates, as pydantic types.

Each says in one sentence what is allowed, for the error and for the JSON schema.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
from collections.abc import Callable
from datetime import timedelta
from functools import reduce
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, PlainSerializer, PlainValidator, WithJsonSchema

from ..quantities import (
    DURATION_HELP,
    DURATION_PATTERN,
    SIZE_HELP,
    SIZE_PATTERN,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
)
from ..triggers import Moment

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_+=@%~-][A-Za-z0-9._+=@%~-]*")
# Uncatchable, or sent by the kernel for a crash or a child, at moments that are no place to save.
_REFUSED = ["SIGKILL", "SIGSTOP", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGTRAP", "SIGSYS", "SIGCHLD"]
_SIGNALS = [s.name for s in sorted(signal.Signals) if s.name not in _REFUSED]
_PREDICATE_HELP = (
    "must be an import path such as mytrain.rules:loss_improved, or a callable(Moment) -> bool and no class"
)


def _count(value: Any) -> int:
    text = str(value).removesuffix(".0") if isinstance(value, int | float | str) and not isinstance(value, bool) else ""
    if not (text.isdecimal() and int(text) >= 1):
        raise ValueError("must be a whole number of at least 1")
    return int(text)


def _signal_name(name: str) -> str:
    if name not in _SIGNALS:
        raise ValueError(f"must be one of {', '.join(_SIGNALS)}")
    return name


def _plain_name(name: str) -> str:
    if not _PLAIN_NAME.fullmatch(name):
        raise ValueError("must be a file name of letters, digits and . _ + = @ % ~ - that does not begin with a dot")
    return name


def _root(value: Any) -> Any:
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    if isinstance(value, str) and not value.strip():
        raise ValueError("must be a folder or a URL such as s3://bucket/runs/name")
    return value


def _not_empty(value: Any) -> Any:
    if isinstance(value, list | tuple) and not value:
        raise ValueError("must name at least one entry; leave it out to save all")
    return value


def _off(value: Any) -> Any:
    return "off" if value is False else value  # YAML 1.1 reads a bare off as False


def resolved(path: str) -> Callable[[Moment], object]:
    """What an import path such as `pkg.module:name` names. Raises `ValueError` where that is no predicate."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(_PREDICATE_HELP)
    try:
        found = reduce(getattr, name.split("."), importlib.import_module(module))
    except Exception as exc:  # a module may raise anything while it is imported
        raise ValueError(f"can't be imported: {exc!r}") from exc
    return _checked_predicate(found)


def _checked_predicate(value: Any) -> Callable[[Moment], object]:
    if isinstance(value, type) or not callable(value):
        raise ValueError(_PREDICATE_HELP)
    return value  # type: ignore[no-any-return]


def _predicate(value: Any) -> str | Callable[[Moment], object] | None:
    if isinstance(value, str):
        resolved(value)
        return value
    return None if value is None else _checked_predicate(value)


def predicate_name(value: str | Callable[[Moment], object] | None) -> str | None:
    """A predicate's import path; for an object of a class, or a function in one, something like it."""
    if value is None or isinstance(value, str):
        return value
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}:{kind.__qualname__}"


Count: TypeAlias = Annotated[int, BeforeValidator(_count), WithJsonSchema({"type": "integer", "minimum": 1})]
Duration: TypeAlias = Annotated[
    timedelta,
    BeforeValidator(parse_duration),
    PlainSerializer(format_duration, when_used="json"),
    WithJsonSchema(
        {"type": ["string", "number"], "pattern": DURATION_PATTERN, "exclusiveMinimum": 0, "description": DURATION_HELP}
    ),
]
Size: TypeAlias = Annotated[
    int,
    BeforeValidator(parse_size),
    PlainSerializer(format_size, when_used="json"),
    WithJsonSchema({"type": ["string", "integer"], "pattern": SIZE_PATTERN, "minimum": 1, "description": SIZE_HELP}),
]
PlainName: TypeAlias = Annotated[str, AfterValidator(_plain_name)]
SignalName: TypeAlias = Annotated[
    str, AfterValidator(_signal_name), WithJsonSchema({"type": "string", "enum": _SIGNALS})
]
Predicate: TypeAlias = Annotated[
    str | Callable[[Moment], object] | None,
    PlainValidator(_predicate),
    PlainSerializer(predicate_name, when_used="json"),
    WithJsonSchema({"type": ["string", "null"], "pattern": r"^[\w.]+:[\w.]+$"}),
]
Root: TypeAlias = Annotated[str, BeforeValidator(_root)]
Text: TypeAlias = Annotated[str, Field(min_length=1)]
Entries: TypeAlias = Annotated[list[Text], BeforeValidator(_not_empty), Field(min_length=1)]
VerifyOnSave: TypeAlias = Annotated[Literal["off", "size", "full"], BeforeValidator(_off)]
VerifyOnResume: TypeAlias = Annotated[Literal["off", "size", "fast", "full"], BeforeValidator(_off)]
