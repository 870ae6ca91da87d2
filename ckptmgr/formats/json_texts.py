"""How is much JSON written again and again when little of it changes? Part by part, unchanged parts from memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_DEPTH = 3  # levels that have parts of their own
_MOST_PARTS = 64  # keys of a level; one with more is one part
_WORTH = 4096  # characters; a shorter text is made anew as fast as it is looked up
_dumps = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode  # `json.dumps` makes one at each call


class JsonTexts:
    """Remembers the text of every large part of the last body. A part that is the very same object
    (`is`) has the same text: whoever gives bodies does not change them afterwards."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, ...], tuple[Any, str]] = {}

    def dump(self, body: Mapping[str, Any]) -> bytes:
        """The body as one line of JSON."""
        known, self._last = self._last, {}
        return f"{self._text(body, (), known)}\n".encode()

    def _text(self, part: Any, path: tuple[str, ...], known: Mapping[tuple[str, ...], tuple[Any, str]]) -> str:
        before = known.get(path)
        if before is not None and before[0] is part:
            self._last[path] = before
            return before[1]
        if isinstance(part, dict) and len(path) < _DEPTH and 0 < len(part) <= _MOST_PARTS:
            inner = (f"{_dumps(key)}:{self._text(item, (*path, key), known)}" for key, item in part.items())
            text = "{" + ",".join(inner) + "}"
        else:
            text = _dumps(part)
        if path and len(text) >= _WORTH:
            self._last[path] = (part, text)
        return text
