"""How is a value of a plain Python or torch type written as a tagged dict, and read back?

`ENCODERS` is by exact type, so that a subclass is never flattened into its base; `DECODERS` is by
tag. An encoder gets the value and `sub(value, step)`, which encodes a part of it; a decoder gets
what stands under the tag, `sub(tree, step)`, and what stands beside the tag by keyword. A decoder
may raise any error for content that is not what its encoder writes.
"""

from __future__ import annotations

import base64
import math
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PosixPath, PurePosixPath, PureWindowsPath, WindowsPath
from types import SimpleNamespace
from typing import Any, TypeAlias
from uuid import UUID
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import torch

from .snapshot import Tree

Sub: TypeAlias = Callable[[Any, Any], Any]


class AbsentError(Exception):
    """A tree needs what this process does not have: a class, a library, a device. Says the way out."""


_INT64 = 1 << 63
_FACTORIES = {t.__name__: t for t in (bool, bytes, complex, dict, float, frozenset, int, list, set, str, tuple)}
_NOT_FINITE = {"nan": math.nan, "-nan": -math.nan, "inf": math.inf, "-inf": -math.inf}
_PATHS = {"Path": Path, "PurePosixPath": PurePosixPath, "PureWindowsPath": PureWindowsPath}


def is_plain(value: Any) -> bool:
    """Whether JSON holds the value as it is: null, true, a 64-bit whole number, a finite number, a text."""
    kind = type(value)
    if kind is str:
        return value.isascii() or not _has_surrogates(value)
    if kind is float:
        return math.isfinite(value)
    return value is None or kind is bool or (kind is int and -_INT64 <= value < _INT64)


def is_unsaved(tree: Tree) -> bool:
    """Whether the tree stands for a value that could not be saved."""
    return type(tree) is dict and tree.keys() == {"$unsaved"}


def to_text(data: bytes | bytearray) -> str:
    """Bytes as base64."""
    return base64.b64encode(data).decode()


def to_bytes(text: str) -> bytes:
    """Base64 as bytes. Raises `ValueError`."""
    return base64.b64decode(text, validate=True)


def _has_surrogates(text: str) -> bool:
    # JSON joins two halves of a character that were separate in the Python text.
    return any("\ud800" <= char <= "\udfff" for char in text)


# Containers


def encode_dict(value: dict[Any, Any], sub: Sub) -> Tree:
    """A JSON object where all keys are plain texts without a "$" in front, else pairs."""
    if all(type(key) is str and key[:1] != "$" and is_plain(key) for key in value):
        return {key: sub(item, key) for key, item in value.items()}
    return {
        "$dict": [[sub(key, "key"), sub(item, key if isinstance(key, str) else [key])] for key, item in value.items()]
    }


def _decode_pairs(content: Any, sub: Sub) -> dict[Any, Any]:
    pairs = [(sub(key, "key"), item) for key, item in content]
    decoded = {key: sub(item, key if isinstance(key, str) else [key]) for key, item in pairs if not is_unsaved(item)}
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key stands there twice")
    return decoded


def _listed(value: Iterable[Any], sub: Sub) -> list[Tree]:
    return [sub(item, i) for i, item in enumerate(value)]


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} stands where a {kind.__name__} belongs")
    return value


def _int64(value: Any) -> int:
    if type(value) is not int or not -_INT64 <= value < _INT64:
        raise ValueError(f"a {type(value).__name__} is no size, or one that is too large")
    return value


def _decode_list(content: Any, sub: Sub) -> list[Any]:
    return _listed(_checked(content, list), sub)


def _encode_defaultdict(value: defaultdict[Any, Any], sub: Sub) -> Tree:
    factory = value.default_factory
    known = factory is None or _FACTORIES.get(getattr(factory, "__name__", "")) is factory
    named = getattr(factory, "__name__", None) if known else sub(factory, "default_factory")
    return {"$defaultdict": sub(dict(value), None), "factory": named}


def _decode_defaultdict(content: Any, sub: Sub, *, factory: Any) -> defaultdict[Any, Any]:
    made = _FACTORIES[factory] if isinstance(factory, str) else sub(factory, "default_factory")
    return defaultdict(made, _checked(sub(content, None), dict))


def _decode_counter(content: Any, sub: Sub) -> Counter[Any]:
    counter: Counter[Any] = Counter()
    dict.update(counter, _checked(sub(content, None), dict))  # Counter.update would add up
    return counter


def _decode_namespace(kind: type) -> Callable[[Any, Sub], Any]:
    def decode(content: Any, sub: Sub) -> Any:
        value = kind()
        value.__dict__.update(_checked(sub(content, None), dict))
        return value

    return decode


# Numbers, texts, bytes


def _encode_int(value: int, sub: Sub) -> Tree:
    # Hexadecimal: Python refuses decimal texts of more than 4300 digits.
    return value if is_plain(value) else {"$int": hex(value)}


def _encode_float(value: float, sub: Sub) -> Tree:
    if is_plain(value):
        return value
    return {"$float": "-nan" if value != value and math.copysign(1, value) < 0 else repr(value)}


def _encode_str(value: str, sub: Sub) -> Tree:
    return value if is_plain(value) else {"$str": to_text(value.encode("utf-8", "surrogatepass"))}


def _decode_path(content: Any, sub: Sub, *, kind: str) -> Any:
    return _PATHS[kind](_checked(sub(content, None), str))


def _encode_path(kind: str) -> Callable[[Any, Sub], Tree]:
    return lambda value, sub: {"$path": sub(str(value), None), "kind": kind}


# Time


def _encode_time(tag: str) -> Callable[[Any, Sub], Tree]:
    def encode(value: datetime | time, sub: Sub) -> Tree:
        naive = value.replace(tzinfo=None, fold=0)
        return {tag: naive.isoformat(), "fold": value.fold, "tz": sub(value.tzinfo, "tzinfo")}

    return encode


def _decode_time(kind: type[datetime] | type[time]) -> Callable[..., Any]:
    def decode(content: Any, sub: Sub, *, fold: int, tz: Any) -> Any:
        return kind.fromisoformat(content).replace(tzinfo=sub(tz, "tzinfo"), fold=fold)

    return decode


def _encode_zone(value: ZoneInfo, sub: Sub) -> Tree:
    return NotImplemented if value.key is None else {"$zoneinfo": value.key}


def _decode_zone(content: Any, sub: Sub) -> ZoneInfo:
    try:
        return ZoneInfo(content)
    except ZoneInfoNotFoundError as exc:
        raise AbsentError(f"the time zone {content!r} is not known here; install the package tzdata") from exc


# Torch


def _decode_torch_name(kind: type) -> Callable[[Any, Sub], Any]:
    def decode(content: Any, sub: Sub) -> Any:
        return _checked(vars(torch)[content], kind)  # getattr would import modules

    return decode


def _encode_torch_name(tag: str) -> Callable[[Any, Sub], Tree]:
    return lambda value, sub: {tag: str(value).removeprefix("torch.")}


def _encode_generator(value: torch.Generator, sub: Sub) -> Tree:
    return {"$generator": str(value.device), "state": to_text(bytes(value.get_state().tolist()))}


def _decode_generator(content: Any, sub: Sub, *, state: str) -> torch.Generator:
    try:
        generator = torch.Generator(torch.device(content))
    except (RuntimeError, AssertionError) as exc:
        raise AbsentError(f"a random generator of device {content!r} can't be made here: {exc}") from exc
    generator.set_state(torch.tensor(list(to_bytes(state)), dtype=torch.uint8))
    return generator


ENCODERS: dict[type, Callable[[Any, Sub], Tree]] = {
    type(None): lambda value, sub: value,
    bool: lambda value, sub: value,
    int: _encode_int,
    float: _encode_float,
    complex: lambda value, sub: {"$complex": [sub(value.real, "real"), sub(value.imag, "imag")]},
    str: _encode_str,
    bytes: lambda value, sub: {"$bytes": to_text(value)},
    bytearray: lambda value, sub: {"$bytearray": to_text(value)},
    dict: encode_dict,
    list: _listed,
    tuple: lambda value, sub: {"$tuple": _listed(value, sub)},
    set: lambda value, sub: {"$set": _listed(value, sub)},
    frozenset: lambda value, sub: {"$frozenset": _listed(value, sub)},
    OrderedDict: lambda value, sub: {"$ordered": sub(dict(value), None)},
    Counter: lambda value, sub: {"$counter": sub(dict(value), None)},
    defaultdict: _encode_defaultdict,
    deque: lambda value, sub: {"$deque": _listed(value, sub), "maxlen": value.maxlen},
    range: lambda value, sub: {"$range": _listed((value.start, value.stop, value.step), sub)},
    slice: lambda value, sub: {"$slice": _listed((value.start, value.stop, value.step), sub)},
    Namespace: lambda value, sub: {"$namespace": sub(value.__dict__, None)},
    SimpleNamespace: lambda value, sub: {"$simple_namespace": sub(value.__dict__, None)},
    datetime: _encode_time("$datetime"),
    time: _encode_time("$time"),
    date: lambda value, sub: {"$date": value.isoformat()},
    timedelta: lambda value, sub: {"$timedelta": [value.days, value.seconds, value.microseconds]},
    timezone: lambda value, sub: {"$timezone": _listed(value.__getinitargs__(), sub)},
    ZoneInfo: _encode_zone,
    PosixPath: _encode_path("Path"),
    WindowsPath: _encode_path("Path"),
    PurePosixPath: _encode_path("PurePosixPath"),
    PureWindowsPath: _encode_path("PureWindowsPath"),
    UUID: lambda value, sub: {"$uuid": str(value)},
    Decimal: lambda value, sub: {"$decimal": str(value)},
    Fraction: lambda value, sub: {"$fraction": _listed((value.numerator, value.denominator), sub)},
    torch.Size: lambda value, sub: {"$size": list(value)},
    torch.dtype: _encode_torch_name("$dtype"),
    torch.layout: _encode_torch_name("$layout"),
    torch.memory_format: _encode_torch_name("$memory_format"),
    torch.device: lambda value, sub: {"$device": str(value)},
    torch.Generator: _encode_generator,
}

DECODERS: dict[str, Callable[..., Any]] = {
    "$int": lambda content, sub: int(content, 16),
    "$float": lambda content, sub: _NOT_FINITE[content],
    "$complex": lambda content, sub: complex(*_decode_list(content, sub)),
    "$str": lambda content, sub: to_bytes(content).decode("utf-8", "surrogatepass"),
    "$bytes": lambda content, sub: to_bytes(content),
    "$bytearray": lambda content, sub: bytearray(to_bytes(content)),
    "$dict": _decode_pairs,
    "$tuple": lambda content, sub: tuple(_decode_list(content, sub)),
    "$set": lambda content, sub: set(_decode_list(content, sub)),
    "$frozenset": lambda content, sub: frozenset(_decode_list(content, sub)),
    "$ordered": lambda content, sub: OrderedDict(_checked(sub(content, None), dict)),
    "$counter": _decode_counter,
    "$defaultdict": _decode_defaultdict,
    "$deque": lambda content, sub, *, maxlen: deque(_decode_list(content, sub), maxlen),
    "$range": lambda content, sub: range(*_decode_list(content, sub)),
    "$slice": lambda content, sub: slice(*_decode_list(content, sub)),
    "$namespace": _decode_namespace(Namespace),
    "$simple_namespace": _decode_namespace(SimpleNamespace),
    "$datetime": _decode_time(datetime),
    "$time": _decode_time(time),
    "$date": lambda content, sub: date.fromisoformat(content),
    "$timedelta": lambda content, sub: timedelta(*content),
    "$timezone": lambda content, sub: timezone(*_decode_list(content, sub)),
    "$zoneinfo": _decode_zone,
    "$path": _decode_path,
    "$uuid": lambda content, sub: UUID(content),
    "$decimal": lambda content, sub: Decimal(_checked(content, str)),
    "$fraction": lambda content, sub: Fraction(*(_checked(part, int) for part in _decode_list(content, sub))),
    "$size": lambda content, sub: torch.Size(map(_int64, content)),
    "$dtype": _decode_torch_name(torch.dtype),
    "$layout": _decode_torch_name(torch.layout),
    "$memory_format": _decode_torch_name(torch.memory_format),
    "$device": lambda content, sub: torch.device(_checked(content, str)),
    "$generator": _decode_generator,
}
