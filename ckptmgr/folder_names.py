"""What is a checkpoint's folder called, and which step is in a name?

Pure: no I/O, no clock, no environment, no torch.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from .errors import ConfigError

MAX_LENGTH = 200  # characters; files take 255 bytes, and the names of records have the nonce and more besides
_SAMPLE_STEP = 1234567890  # long enough to show separators and exponents
_FOLDER = re.compile(r"[A-Za-z0-9_+=@%~-][A-Za-z0-9._+=@%~-]*")
_TOO_LONG = f"characters, more than {MAX_LENGTH}: shorten the template or the run's name"


class NameTemplate:
    """Folder names from a template such as `step-{step:08d}`; fields: step, epoch, run.

    Raises `ConfigError` for a template with other fields, without `{step}`, with characters
    that a folder name can't have on every store, or too long for one.
    """

    def __init__(self, template: str) -> None:
        self.template = template
        allowed = "fields are {step}, {epoch}, {run}"
        try:
            fields = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
            sample = template.format(step=_SAMPLE_STEP, epoch=1, run="run")
        except (ValueError, KeyError, IndexError, AttributeError) as exc:
            raise ConfigError(f"name: {template!r} is not a template: {exc!r}; {allowed}") from exc
        if unknown := set(fields) - {"step", "epoch", "run"}:
            raise ConfigError(f"name: {template!r} has unknown fields {sorted(unknown)}; {allowed}")
        if "step" not in fields:
            raise ConfigError(f"name: {template!r} must contain {{step}}, or two checkpoints would share a folder")
        if not _FOLDER.fullmatch(sample):
            raise ConfigError(
                f"name: {template!r} gives folders like {sample!r}; use letters, digits and . _ + = @ % ~ -"
            )
        if (length := self.length("")) > MAX_LENGTH:
            raise ConfigError(f"name: {template!r:.60} gives folders with names of {length} {_TOO_LONG}")
        self.needs_epoch = "epoch" in fields
        self._regex = self._compile()
        self._each = re.compile(rf"(?:{self._regex.pattern}|[^/]+)(?:/|\Z)")
        self._before_step = template.partition("{step")[0] if len(fields) == 1 and template.endswith("}") else None
        if self.step(sample) != _SAMPLE_STEP:
            raise ConfigError(f"name: {template!r} gives folders like {sample!r}, whose step can't be told from it")

    def _compile(self) -> re.Pattern[str]:
        regex, seen = "", False
        for literal, name, _, _ in string.Formatter().parse(self.template):
            regex += re.escape(literal)
            if name == "step":
                regex += "(?P=step)" if seen else r"(?P<step>[0-9]+)"
                seen = True
            elif name is not None:
                regex += r"[0-9]+" if name == "epoch" else r"[A-Za-z0-9._+=@%~-]+?"
        return re.compile(regex + r"(?:\.[0-9]+)?")  # ".2": a second checkpoint of the same step

    def format(self, step: int, epoch: int | None, run: str) -> str:
        """The folder for a step. Raises `ConfigError` when the template needs an epoch and the call gave
        none, and when the run's name makes it too long, or no folder that a listing would take for a checkpoint's."""
        if epoch is None and self.needs_epoch:
            raise ConfigError(f"name: {self.template!r} needs an epoch; pass epoch= with step {step}")
        name = self.template.format(step=step, epoch=epoch, run=run)
        if not _FOLDER.fullmatch(name):
            raise ConfigError(
                f"name: {self.template!r} gives step {step} of run {run!r} the folder {name!r}; use letters, digits "
                "and . _ + = @ % ~ -, and no dot in front"
            )
        if (length := self.length(run, step, epoch)) > MAX_LENGTH:
            raise ConfigError(
                f"name: {self.template!r:.60} gives run {run!r:.60} folders with names of {length} {_TOO_LONG}"
            )
        return name

    def length(self, run: str, step: int = 0, epoch: int | None = None) -> int:
        """How many characters the names of a run's folders have, at this step or a later one. Each is a byte."""
        step, epoch = max(step, _SAMPLE_STEP), max(epoch or 0, _SAMPLE_STEP)  # or it would be too long half-way
        return len(self.template.format(step=step, epoch=epoch, run=run))

    def step(self, name: str) -> int | None:
        """The step in a folder's name, matched whole, or None."""
        match = self._regex.fullmatch(name)
        return int(match["step"]) if match else None

    def steps(self, names: Sequence[str]) -> list[str]:
        """The digits of the step in each of many folders' names, or ""."""
        # One search for all: there may be ten thousand. Where each is digits behind the same text, none is needed.
        text = "/" + "/".join(names)
        if (before := self._before_step) is not None:
            rest = text.replace(f"/{before}", "/")
            if len(text) - len(rest) == len(names) * len(before):
                steps = rest[1:].split("/")
                if all(steps) and (digits := "".join(steps)).isascii() and digits.isdecimal():
                    return steps
        return self._each.findall(text, 1)


DEFAULT_NAMES = NameTemplate("step-{step:08d}")


def guessed_step(name: str) -> int:
    """The step that a folder of an unknown template seems to have: its last number, else 0."""
    numbers = re.findall(r"[0-9]+", re.sub(r"(?<=[0-9])\.[0-9]+$", "", name))  # ".2": a second one of the step
    return int(numbers[-1]) if numbers else 0
