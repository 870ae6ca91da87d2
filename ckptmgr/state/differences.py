"""How do a checkpoint and the objects to restore differ? One report of everything at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .codec import join

_SHOWN = 20  # of each kind and object

_KINDS = {
    "missing": "in the object but not in the checkpoint",
    "unexpected": "in the checkpoint but not in the object",
    "mismatched": "different",
}


@dataclass
class Differences:
    """Collects differences by object; each is named by its path below the object.

    `entries` are the checkpoint's, `targets` the names of the objects to restore."""

    entries: list[str]
    targets: list[str]
    _found: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    casts: list[str] = field(default_factory=list)
    unsaved: list[str] = field(default_factory=list)

    def add(self, kind: str, where: str, details: Iterable[str]) -> None:
        if listed := list(details):
            self._found.setdefault(where, {}).setdefault(kind, []).extend(listed)

    def no_entry(self, name: str) -> None:
        """The checkpoint has nothing under an object's name."""
        self.add("entry", name, [""])

    def has(self, where: str) -> bool:
        return where in self._found

    def __bool__(self) -> bool:
        return bool(self._found)

    def names(self, kind: str) -> tuple[str, ...]:
        """All differences of a kind, as "entry.key"; a misshapen one with what differs."""
        named = [
            detail if kind == "mismatched" else join(where, [detail])
            for where, found in self._found.items()
            for detail in found.get(kind, ())
        ]
        if kind == "missing":
            named += [where for where, found in self._found.items() if "entry" in found] + self.unsaved
        return tuple(named)

    def text(self) -> str:
        """The report, with a guess at the cause and the ways out."""
        lines = ["the checkpoint does not fit the objects to restore; nothing was changed:"]
        for where, found in self._found.items():
            if "entry" in found:
                lines.append(f"  {where}: the checkpoint has no such entry; it has {', '.join(self.entries) or 'none'}")
            for kind, meaning in _KINDS.items():
                if details := found.get(kind):
                    lines.append(f"  {where}: {len(details)} {meaning}:")
                    lines += [f"    {detail}" for detail in details[:_SHOWN]]
                    if len(details) > _SHOWN:
                        lines.append(f"    and {len(details) - _SHOWN} more")
            if hint := _prefix_hint(found.get("missing", []), found.get("unexpected", [])):
                lines.append(f"  {where}: {hint}")
        lines.append(
            "Ways out: pass objects built as they were when this was saved, strict=False to load what fits and report "
            f"the rest, or skip={self._skippable()} to leave entries as they are"
        )
        return "\n".join(lines)

    def _skippable(self) -> list[str]:
        return [
            name
            for name in self.targets
            if any(where == name or where.startswith((f"{name}.", f"{name}[")) for where in self._found)
        ]


def _prefix_hint(missing: list[str], unexpected: list[str]) -> str | None:
    """What a prefix would mend, if one would."""
    for longer, shorter, verb in ((missing, unexpected, "adding"), (unexpected, missing, "removing")):
        for name in shorter:
            prefix = longer[0][: -len(name)] if longer and longer[0].endswith(f".{name}") else None
            have = set(shorter)
            if prefix and all(one.startswith(prefix) and one[len(prefix) :] in have for one in longer):
                return (
                    f"all {len(longer)} names fit after {verb} the prefix {prefix!r} "
                    f"{'in front of' if verb == 'adding' else 'from'} the checkpoint's names"
                )
    return None
