"""Are the bytes still those that were written? `verify`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import click

from ..manifest import CheckpointInfo
from ..records import Records
from ..repository import Repository
from ..source import Problem
from ..store import Reader, Store
from .failures import DAMAGED
from .roots import Root, root_command
from .tables import count_text, plain, print_json, size_of, size_text

if TYPE_CHECKING:
    from typing_extensions import Buffer


@dataclass(frozen=True, slots=True)
class _Finding:
    """What verifying one checkpoint gave. `is_gone`: deleted while it was read, which is no damage."""

    info: CheckpointInfo
    problems: list[Problem]
    is_gone: bool

    @property
    def state(self) -> str:
        if self.is_gone:
            return "gone"
        return "damaged" if self.problems or self.info.damaged is not None else "ok"


@click.command(epilog="\b\nExample:\n  ckptmgr verify s3://bucket/runs/digits --all --level size")
@root_command
@click.argument("step", required=False)
@click.option(
    "--level",
    type=click.Choice(["size", "full"]),
    default="full",
    show_default=True,
    help="Compare sizes, or read every byte and check its digest.",
)
@click.option("--all", "every", is_flag=True, help="Verify every checkpoint under URL.")
@click.option("--unmark", is_flag=True, help="Take the mark of damage away where every byte is as written after all.")
def verify(root: Root, step: str | None, level: str, every: bool, unmark: bool, as_json: bool) -> None:
    """Check the files of a checkpoint, or of all.

    By default those of the newest that is not known to be damaged. Changes nothing, but with --unmark.
    """
    if every and step is not None:
        raise click.UsageError("give a STEP or --all, not both")
    if unmark and level != "full":
        raise click.UsageError("--unmark needs --level full: sizes alone do not show that a checkpoint is sound")
    infos = root.infos() if every else [root.find(step or "latest")]
    with _progress(infos, level) as advance:
        metered = Repository(cast(Store, _Metered(root.store, advance)))
        findings = [_verified(root.store, metered, info, level) for info in infos]
    if unmark:
        findings = [_unmarked(root.store, finding) for finding in findings]
    damaged = [finding for finding in findings if finding.state == "damaged"]
    if as_json:
        print_json(
            {
                "url": root.store.url,
                "level": level,
                "damaged": len(damaged),
                "checkpoints": [_record(root, finding) for finding in findings],
            }
        )
    else:
        for finding in findings:
            _print(finding)
        click.echo(f"{count_text(len(findings))} verified ({level}), {len(damaged)} damaged")
    if damaged:
        raise click.exceptions.Exit(DAMAGED)


def _verified(store: Store, metered: Repository, info: CheckpointInfo, level: str) -> _Finding:
    problems = metered.verify(info, level)
    if info.manifest is None:  # then the folder tells
        is_gone = store.stat(f"{info.name}/") is None
    else:
        is_gone = bool(problems) and not metered.is_there(info)
    return _Finding(info, problems, is_gone)


def _unmarked(store: Store, finding: _Finding) -> _Finding:
    """The finding, with what a resume or a scrub once noted taken away where nothing is wrong any more."""
    info = finding.info
    if finding.problems or finding.is_gone or info.damaged is None or info.manifest is None:
        return finding
    Records(store).unmark_damaged(info.name, info.manifest.nonce)
    return replace(finding, info=replace(info, damaged=None))


def _record(root: Root, finding: _Finding) -> dict[str, Any]:
    info = finding.info
    return {
        "step": info.step,
        "name": info.name,
        "url": root.url(info),
        "state": finding.state,
        "damage": info.damaged,
        "problems": [{"file": problem.file, "what": problem.what} for problem in finding.problems],
    }


def _print(finding: _Finding) -> None:
    info, state = finding.info, finding.state
    mark = click.style(state.ljust(7), fg="red" if state == "damaged" else None)
    click.echo(f"{mark}  {info.name}  {size_text(size_of(info))}")
    if state != "damaged":
        return
    for problem in finding.problems:
        click.echo(f"         {plain(str(problem))}")
    if not finding.problems:
        reason = plain(info.damaged or "")
        click.echo(f"         its bytes are as written, but it was marked: {reason} (--unmark takes the mark away)")


class _Metered:
    """A store that tells how many bytes are read from it."""

    def __init__(self, store: Store, advance: Callable[[int], None]) -> None:
        self._store, self._advance = store, advance

    def reader(self, key: str, *, by_many: bool = False) -> Reader:
        return cast(Reader, _MeteredReader(self._store.reader(key, by_many=by_many), self._advance))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class _MeteredReader:
    """An open file that counts what is read of it."""

    def __init__(self, reader: Reader, advance: Callable[[int], None]) -> None:
        self._reader, self._advance = reader, advance

    def read_into(self, start: int, buffers: Sequence[Buffer]) -> int:
        count = self._reader.read_into(start, buffers)
        self._advance(count)
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)


@contextmanager
def _progress(infos: list[CheckpointInfo], level: str) -> Iterator[Callable[[int], None]]:
    """A bar on stderr while bytes are read, where a person looks at it."""
    if level == "size" or not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("verify", total=sum(map(size_of, infos)))
        yield lambda count: bar.advance(task, count)
