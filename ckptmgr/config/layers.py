"""Where does each setting come from? Layers of settings (a file, the environment, arguments), and which one to blame.

Knows nothing of the schema but that it is a pydantic model, and what others call its keys.
"""

from __future__ import annotations

import difflib
import os
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ..errors import ConfigError
from .elsewhere import ELSEWHERE

ENVIRONMENT_PREFIX = "CKPTMGR_"

Key: TypeAlias = tuple[str | int, ...]

_VARIABLE = re.compile(r"(?P<escape>\$\$\{)|\$\{(?P<name>[A-Za-z_]\w*)(?::-(?P<default>[^}]*))?\}|(?P<broken>\$\{)")
_HIDDEN = "storage"  # the section whose values are never shown
_MOST_VALUES = 10_000
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong: in which source, under which key, and what is allowed."""

    source: str
    key: Key
    text: str

    def __str__(self) -> str:
        dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.key).lstrip(".")
        return ": ".join(part for part in (self.source, dotted, self.text) if part)


@dataclass(frozen=True, slots=True)
class Layer:
    """Settings from one source, nested, with the problems met while reading them."""

    source: str
    values: dict[str, Any]
    problems: tuple[Problem, ...] = field(default=())


def config_error(problems: Sequence[Problem]) -> ConfigError:
    """One error that lists every problem, a line each."""
    if len(problems) == 1:
        return ConfigError(str(problems[0]))
    return ConfigError("\n".join([f"{len(problems)} problems in the configuration:", *(f"  {p}" for p in problems)]))


def argument_layer(values: Mapping[str, Any], source: str = "argument") -> Layer:
    """Settings given in Python: mappings, or models of which only what was set counts."""
    return Layer(source, {key: _plain(value) for key, value in values.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        value = value.model_dump(exclude_unset=True)
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value


def merge(layers: Sequence[Layer]) -> dict[str, Any]:
    """All layers as one nested mapping; later layers win, key by key."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merged(merged, layer.values)
    return merged


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        under = result.get(key)
        if isinstance(value, Mapping) and isinstance(under, Mapping):
            value = _merged(under, value)
        result[key] = value
    return result


# A YAML file.


class _Loader(yaml.SafeLoader):
    """yaml.safe_load, but a key given twice is an error and not a silent choice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    "while reading a mapping", node.start_mark, f"key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def _count(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """How many values a node stands for: one with an alias counts wherever it stands. Raises `RecursionError`."""
    if node not in known:
        inner = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        known[node] = 1 + sum(_count(part, known) for part in parts)
    return known[node]


def file_layer(path: Path) -> Layer:
    """The settings in a YAML file, with `${VAR}` and `${VAR:-default}` read from the environment.

    Raises `ConfigError` for a file that can't be read or is not one mapping. Variables that are
    not set become problems of the layer.
    """
    source = str(path)
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if node is not None and _count(node, {}) > _MOST_VALUES:
            raise ConfigError(f"{source}: has more than {_MOST_VALUES:,} values; its aliases (*) repeat too much")
        values = None if node is None else loader.construct_document(node)
        problems: list[Problem] = []
        values = _interpolated(values, (), source, problems)
    except FileNotFoundError as exc:
        raise ConfigError(f"{source}: there is no such file (a root is a folder or URL not ending in .yaml)") from exc
    except OSError as exc:
        raise ConfigError(f"{source}: can't be read: {exc.strerror}") from exc
    except RecursionError as exc:
        raise ConfigError(f"{source}: is nested in itself") from exc
    # ValueError: not UTF-8, or a scalar such as a date that YAML recognizes but can't build.
    except (yaml.YAMLError, ValueError) as exc:
        raise ConfigError(f"{source}: is not plain YAML: {exc}") from exc
    if values is None:
        raise ConfigError(f"{source}: is empty; it needs at least a root")
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: holds a {type(values).__name__}; must be a mapping of settings")
    return Layer(source, {str(key): value for key, value in values.items()}, tuple(problems))


def _interpolated(value: Any, key: Key, source: str, problems: list[Problem]) -> Any:
    if isinstance(value, dict):
        inner = {k: (v, _interpolated(v, (*key, str(k)), source, problems)) for k, v in value.items()}
        # An option with an empty default is one that is not wanted, not one that is "".
        is_dropped = key[:1] == (_HIDDEN,)
        return {k: new for k, (old, new) in inner.items() if not (is_dropped and new == "" and old != "")}
    if isinstance(value, list):
        return [_interpolated(inner, (*key, index), source, problems) for index, inner in enumerate(value)]
    if not isinstance(value, str):
        return value

    def replaced(match: re.Match[str]) -> str:
        if match["escape"]:
            return "${"
        if match["broken"]:
            problems.append(Problem(source, key, "${ must be ${NAME} or ${NAME:-default}; $${ stands for a plain ${"))
            return match[0]
        found = os.environ.get(match["name"])
        if match["default"] is not None:
            return found or match["default"]
        if found is None:
            problems.append(
                Problem(
                    source,
                    key,
                    f"the environment variable {match['name']} is not set; set it, or give a default:"
                    f" ${{{match['name']}:-default}}",
                )
            )
            return match[0]
        return found

    return _VARIABLE.sub(replaced, value)


# The environment.


def environment_layers(model: type[BaseModel]) -> list[Layer]:
    """One layer for each variable `CKPTMGR_<FIELD>` or `CKPTMGR_<SECTION>__<FIELD>`; lists and mappings
    are JSON, `null` is None, and names below a free mapping are read in lower case."""
    names = sorted(name for name in os.environ if name.upper().startswith(ENVIRONMENT_PREFIX))
    if not names:
        return []
    # Slow to import, and most processes have no such variable.
    from pydantic_settings import EnvSettingsSource, SettingsError

    reader = EnvSettingsSource(
        model,  # type: ignore[arg-type]  # reads nothing but the fields
        env_prefix=ENVIRONMENT_PREFIX,
        env_nested_delimiter="__",
        env_parse_none_str="null",
    )
    variables, layers = reader.env_vars, []
    for name in names:
        source, values, problem = f"environment {name}", {}, None
        reader.env_vars = {name.lower(): variables[name.lower()]}
        try:
            values = reader()
        except SettingsError as exc:
            given = _shown(_key(name), os.environ[name])
            problem = f"{given} given; must be JSON, as it is a list or a mapping: {exc.__cause__}"
        if not values and problem is None:
            problem = f"unknown variable; {_suggestion(name.upper(), list(_variables(model)))}"
        layers.append(Layer(source, values, (Problem(source, (), problem),) if problem else ()))
    return layers


def _key(variable: str) -> Key:
    return tuple(variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("__"))


def _variables(model: type[BaseModel], prefix: str = ENVIRONMENT_PREFIX) -> Iterator[str]:
    for name in model.model_fields:
        yield prefix + name.upper()
        if inner := _model_at(model, (name,)):
            yield from _variables(inner, f"{prefix}{name.upper()}__")


# What is wrong, and where.


def problems_in(error: ValidationError, model: type[BaseModel], layers: Sequence[Layer]) -> list[Problem]:
    """A pydantic error as problems that name the source, the key, what was given and what is allowed."""
    problems = []
    for detail in error.errors(include_url=False):
        # The tag of a union's member is no key.
        key = tuple(part for part in detail["loc"] if not str(part).startswith("<"))
        problems.append(Problem(_source(key, layers), key, _text(key, model, detail)))
    return problems


def _text(key: Key, model: type[BaseModel], detail: Any) -> str:
    if detail["type"] == "extra_forbidden":
        return f"unknown key; {_where(str(key[-1]), model) or _suggestion(str(key[-1]), _fields(model, key[:-1]))}"
    if detail["type"] == "missing":
        return "is required"
    section = _model_at(model, key)
    if section and detail["type"] in ("model_type", "model_attributes_type"):
        allowed = f"must be a mapping with some of: {', '.join(section.model_fields)}"
    elif detail["type"] == "value_error":
        allowed = str(detail["ctx"]["error"]).removeprefix(f"{key[-1] if key else ''}: ")
    else:
        allowed = detail["msg"].replace("Input should be", "must be")
    given = _shown(key, detail["input"])
    return allowed if allowed.startswith(given) else f"{given} given; {allowed}"


def _shown(key: Key, value: Any) -> str:
    return "(hidden)" if key and key[0] in (_HIDDEN, "options") else _SHORT.repr(value)


def _where(word: str, model: type[BaseModel]) -> str | None:
    """Where a setting of this name is to be found, when it is in another section or has another name there."""
    known = dict.fromkeys(".".join(path) for path in _paths(model))
    there = " or ".join(path for path in known if path.rpartition(".")[2] == word) or ELSEWHERE.get(word)
    return f"did you mean {there}?" if there else None


def _paths(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    for name, info in model.model_fields.items():
        yield (name,)
        for inner in _models(info.annotation):
            yield from ((name, *path) for path in _paths(inner))


def _fields(model: type[BaseModel], key: Key) -> list[str]:
    section = _model_at(model, key)
    return list(section.model_fields) if section else []


def _suggestion(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}?" if close else f"allowed: {', '.join(known)}"


def _model_at(model: type[BaseModel], key: Key) -> type[BaseModel] | None:
    """The section of the schema under a key, through unions and lists; None where there is none."""
    found: type[BaseModel] | None = model
    for part in key:
        if found and isinstance(part, str):
            info = found.model_fields.get(part)
            found = next(_models(info.annotation), None) if info else None
    return found


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _source(key: Key, layers: Sequence[Layer]) -> str:
    """The highest layer that holds the key, or as much of it as any where it is missing; the lowest, but for the
    environment, where none holds any of it."""
    depths = [_depth(layer.values, key) for layer in layers]
    if not (deepest := max(depths)):
        return next(layer.source for layer in layers if not layer.source.startswith("environment"))
    return next(layer.source for layer, depth in reversed(list(zip(layers, depths, strict=True))) if depth == deepest)


def _depth(values: Any, key: Key) -> int:
    for depth, part in enumerate(key):
        is_there = part in values if isinstance(values, Mapping) else isinstance(values, list | tuple)
        if not is_there:
            return depth
        values = values[part]
    return len(key)
