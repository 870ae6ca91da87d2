"""How are values of the user's own data classes written as tagged dicts, and read back?

Named tuples, dataclasses, enums and OmegaConf configs. A class named in a tree is looked up among
the modules already imported, must really be of its kind, and is filled without running its code.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from enum import Enum, Flag
from types import MemberDescriptorType, ModuleType
from typing import Any

import torch

from .plain_tags import AbsentError, Sub
from .snapshot import Tree


def encode_class(value: Any, sub: Sub) -> Tree:
    """The tagged dict of an instance of such a class, or NotImplemented for any other value."""
    kind = type(value)
    if isinstance(value, Enum):
        return _encode_enum(value)
    if _is_namedtuple(kind):
        if getattr(value, "__dict__", None) or not _is_found(kind):
            return NotImplemented
        names = list(kind._fields)
        return {
            "$namedtuple": _name(kind),
            "names": names,
            "values": [sub(v, n) for n, v in zip(names, value, strict=True)],
        }
    if _is_dataclass(kind) and _is_found(kind):
        fields = {name: getattr(value, name) for name in _slots(kind) if hasattr(value, name)} | getattr(
            value, "__dict__", {}
        )
        return {"$dataclass": _name(kind), "fields": sub(fields, None)}
    return _encode_omegaconf(value, sub)


def _name(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _find(name: str) -> Any:
    """What a name such as "package.module:Outer.Inner" stands for among imported modules, or None."""
    module, _, qualname = name.partition(":")
    scope: Any = sys.modules.get(module)
    found = None
    for part in qualname.split("."):
        # Only what is already there: getattr could run a module's or a metaclass's code.
        found = vars(scope).get(part) if isinstance(scope, type | ModuleType) else None
        scope = found if isinstance(found, type) else None
    return found


def _is_found(kind: type) -> bool:
    return _find(_name(kind)) is kind


def _resolve(name: Any, noun: str, is_kind: Callable[[type], bool]) -> Any:
    if not isinstance(name, str) or ":" not in name:
        raise ValueError(f"{name!r} is no class name")
    found = _find(name)
    if isinstance(found, type) and is_kind(found):
        return found
    raise AbsentError(
        f"it was saved as the {noun} {name}, which is not among the imported modules"
        + ("" if found is None else f" (what has this name there is no {noun})")
        + "; import its module before loading, or leave the entry out with skip= or only="
    )


def _is_namedtuple(kind: type) -> bool:
    fields = getattr(kind, "_fields", None)
    return issubclass(kind, tuple) and isinstance(fields, tuple) and all(isinstance(f, str) for f in fields)


def _decode_namedtuple(content: Any, sub: Sub, *, names: list[str], values: list[Tree]) -> Any:
    kind = _resolve(content, "named tuple", _is_namedtuple)
    if tuple(names) != kind._fields:
        raise AbsentError(
            f"the named tuple {content} has the fields {', '.join(kind._fields)} here "
            f"and {', '.join(names)} in the checkpoint"
        )
    return tuple.__new__(kind, [sub(value, name) for name, value in zip(names, values, strict=True)])


def _is_dataclass(kind: type) -> bool:
    """Whether the class is a dataclass whose bare instances can be made without its own code."""
    if not dataclasses.is_dataclass(kind) or issubclass(kind, torch.nn.Module):
        return False
    try:
        object.__new__(kind)
    except TypeError:
        return False
    return True


def _slots(kind: type) -> dict[str, MemberDescriptorType]:
    return {n: s for c in reversed(kind.__mro__) for n, s in vars(c).items() if isinstance(s, MemberDescriptorType)}


def _decode_dataclass(content: Any, sub: Sub, *, fields: Tree) -> Any:
    kind = _resolve(content, "dataclass", _is_dataclass)
    values = sub(fields, None)
    known = {field.name: field for field in dataclasses.fields(kind)}
    lacking = [n for n, f in known.items() if n not in values and f.default is dataclasses.MISSING]
    value = object.__new__(kind)
    slots, attributes = _slots(kind), getattr(value, "__dict__", None)
    unknown = [n for n in values if n not in slots and attributes is None]
    if lacking or unknown:
        raise AbsentError(
            f"the dataclass {content} has changed since it was saved: "
            + "; ".join(
                f"{what} {', '.join(names)}"
                for what, names in (("the checkpoint lacks", lacking), ("the class lacks", unknown))
                if names
            )
        )
    for name, default in ((n, f.default) for n, f in known.items() if n in slots and n not in values):
        slots[name].__set__(value, default)
    for name, item in values.items():
        if name in slots:
            slots[name].__set__(value, item)
        elif attributes is not None:
            attributes[name] = item
    return value


def _encode_enum(value: Enum) -> Tree:
    kind: Any = type(value)
    if not _is_found(kind):
        return NotImplemented
    if kind.__members__.get(value.name or "") is value:
        return {"$enum": _name(kind), "names": [value.name]}
    if isinstance(value, Flag) and kind.__members__:
        names = [member.name for member in kind if member in value]
        if _united(kind, names) == value:
            return {"$enum": _name(kind), "names": names}
    return NotImplemented


def _united(kind: Any, names: Any) -> Any:
    members = [kind.__members__[name] for name in names]
    if len(members) == 1:
        return members[0]
    if not issubclass(kind, Flag):
        raise ValueError(f"{names} is more than one member")
    any_member: Any = next(iter(kind.__members__.values()))
    united = Flag.__xor__(any_member, any_member)  # the flag without a bit
    for member in members:
        united = Flag.__or__(united, member)
    return united


def _decode_enum(content: Any, sub: Sub, *, names: list[str]) -> Any:
    kind = _resolve(content, "enum", lambda found: issubclass(found, Enum))
    if lacking := [name for name in names if name not in kind.__members__]:
        raise AbsentError(f"the enum {content} no longer has the member {', '.join(map(str, lacking))}")
    return _united(kind, names)


def _encode_omegaconf(value: Any, sub: Sub) -> Tree:
    conf = sys.modules.get("omegaconf")
    if conf is None or type(value) not in (conf.DictConfig, conf.ListConfig):
        return NotImplemented
    if value._is_none() or value._is_missing() or value._is_interpolation():
        return NotImplemented
    flags = [name for name in ("readonly", "struct") if value._get_flag(name)]
    return {"$omegaconf": sub(conf.OmegaConf.to_container(value, resolve=False), None), "flags": flags}


def _decode_omegaconf(content: Any, sub: Sub, *, flags: list[str]) -> Any:
    conf = sys.modules.get("omegaconf")
    if conf is None:
        raise AbsentError("it was saved as an OmegaConf config; import omegaconf before loading")
    container = sub(content, None)
    if type(container) not in (dict, list) or not set(flags) <= {"readonly", "struct"}:
        raise ValueError("no config")
    return conf.OmegaConf.create(container, flags=dict.fromkeys(flags, True))


DECODERS: dict[str, Callable[..., Any]] = {
    "$namedtuple": _decode_namedtuple,
    "$dataclass": _decode_dataclass,
    "$enum": _decode_enum,
    "$omegaconf": _decode_omegaconf,
}
