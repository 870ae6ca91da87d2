"""What may a root hold after a job was killed? The same operations on a set, and what lies between two of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from crash_job import Found, Op, Seen


class Root(NamedTuple):
    """What a root holds when nothing is under way."""

    there: frozenset[Seen] = frozenset()
    pins: frozenset[int] = frozenset()
    newest: Seen | None = None


def after(root: Root, op: Op, keep: int) -> Root:
    """What an operation makes of it."""
    name, *args = op
    if name == "save":
        step, version, how = args
        there = {one for one in root.there if one.step != step} | {Seen(step, version)}
        pins = root.pins | ({step} if how.get("pin") else set())
        return Root(rotated(there, pins, keep), pins, Seen(step, version))
    if name == "pin":
        return root._replace(pins=root.pins | {args[0]})
    if name == "unpin":
        return root._replace(pins=root.pins - {args[0]})
    if name == "delete":
        there = {one for one in root.there if one.step != args[0]}
        return Root(frozenset(there), root.pins, max(there, default=None))
    if name == "rewind" or (name == "resume" and args):
        step = args[0] if name == "rewind" else args[0]["step"]
        there = {one for one in root.there if one.step <= step}
        return Root(rotated(there, root.pins, keep), frozenset(pin for pin in root.pins if pin <= step), max(there))
    if name == "resume":
        return root._replace(there=rotated(set(root.there), root.pins, keep))
    return root


def rotated(there: set[Seen], pins: Any, keep: int) -> frozenset[Seen]:
    last = sorted(there)[-keep:]
    return frozenset(one for one in there if one in last or one.step in pins)


def violations(
    found: Found, lines: Sequence[tuple[int, str]], script: Sequence[Op], keep: int, start: Root, *, again: bool = False
) -> list[str]:
    """What the next process should not have found, given what the dead one had reported; `again` when another one
    had resumed after that, and died of it, too."""
    done = sorted(index for index, what in lines if what == "done")
    begun = max((index for index, what in lines if what == "begin"), default=-1)
    sure = next((index for index in range(len(script) + 1) if index not in done), 0)  # all before it are done
    roots = [start]
    for op in script[: begun + 1]:
        roots.append(after(roots[-1], op, keep))
    pairs = list(zip(roots[sure:], [*roots[sure + 1 :], roots[-1]], strict=True))
    if again:
        pairs += [(root, after(root, ("resume",), keep)) for root in roots[sure:]]
    legal = [pair for pair in pairs if not _between(found, *pair, keep)]
    told = [] if legal else [*_between(found, roots[sure], roots[min(sure + 1, len(roots) - 1)], keep)]
    return [*found.wrong, *told, *(f"litter: {name}" for name in found.litter)]


def _between(found: Found, old: Root, new: Root, keep: int) -> list[str]:
    """Why what was found is not what one operation leaves that was killed, if it is not."""
    told = []
    seen = frozenset(found.before)
    if strange := seen - old.there - new.there:
        told.append(f"holds {sorted(strange)}, which nobody saved")
    if lost := (old.there & new.there) - seen:
        told.append(f"lost {sorted(lost)}")
    gone, came = old.there - new.there - seen, new.there - old.there
    if gone and not came <= seen:
        told.append(f"let go of {sorted(gone)} before {sorted(came)} was there")
    newest = max(seen, default=None)
    if found.resumed != newest:
        told.append(f"resumed {found.resumed}, not {newest}")
    if not told and newest not in (old.newest, new.newest) and not came and len(gone) == 0:
        told.append(f"the newest is {newest}, neither {old.newest} nor {new.newest}")
    if found.skipped:
        told.append(f"skipped {found.skipped}")
    pins = old.pins | new.pins
    kept = {one for one in seen if one.step in old.pins & new.pins}
    if kept - set(found.saved):
        told.append(f"let go of {sorted(kept - set(found.saved))}, which are pinned")
    step = newest.step + 1 if newest else 1
    expected = [rotated(set(found.after) | {Seen(step, 7)}, held, keep) for held in (set(found.pins), pins)]
    if set(found.saved) not in expected:
        told.append(f"holds {found.saved} after the next save, not {[sorted(one) for one in expected]}")
    if not set(found.after) <= seen or (newest and newest not in found.after):
        told.append(f"holds {found.after} after the resume, and {sorted(seen)} before it")
    return told
