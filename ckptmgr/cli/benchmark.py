"""How fast is this storage, and how often should a training save? `bench`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ..errors import StoreError
from .failures import DAMAGED, without_secrets
from .roots import Root, root_command
from .tables import count_text, plain, print_json, print_table

if TYPE_CHECKING:
    from ..bench import Contender, Report

_PEERS = ("ckptmgr", "torch.save", "dcp")
_SAVING = {"first_stall": "first wait", "stall": "wait", "durable": "durable", "lost": "lost"}
_RESUMING = {"cold": "cold", "warm": "warm"}


def _size(_: click.Context, __: click.Parameter, text: str) -> int:
    from ..quantities import parse_size

    try:
        return parse_size(text)
    except ValueError as exc:
        raise click.BadParameter(str(exc)) from exc


def _peers(_: click.Context, __: click.Parameter, text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in _PEERS]:
        raise click.BadParameter(f"{', '.join(map(repr, unknown))} is none of {', '.join(_PEERS)}")
    return names


@click.command(epilog="\b\nExample:\n  ckptmgr bench s3://bucket/runs --size 4GiB --peers ckptmgr,torch.save")
@root_command
@click.option("--size", default="1GiB", show_default=True, callback=_size, help="Of model and optimizer together.")
@click.option(
    "--tensors", type=click.IntRange(min=4), help="How many tensors, all of one size; else shaped like a transformer."
)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True, help="Each in fresh processes.")
@click.option("--peers", default=",".join(_PEERS), show_default=True, callback=_peers, help="Whom to measure.")
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where the state lives."
)
def bench(
    root: Root, size: int, tensors: int | None, repeats: int, peers: list[str], device: str, as_json: bool
) -> None:
    """Measure how fast saves and resumes are under URL.

    Beside torch.save (T) and torch.distributed.checkpoint, and beside what the machine can do at best (L): the
    waiting of a training, the time until a save is durable, the training time that it costs all in, resuming and
    memory. Works in a sub-folder of its own, which it removes; needs three times the size in memory and on disk.
    """
    from ..bench import BUILT_IN, measure

    url, options = root.address
    contenders = [contender for name in peers for contender in BUILT_IN[name]]
    with _progress() as progress, _ended_like_interrupted():
        report = measure(
            url,
            options,
            contenders,
            size=size,
            tensors=tensors,
            repeats=repeats,
            device=device,
            progress=progress,
        )
    failures = [figures.failure for figures in report.contenders.values()]
    if all(failures):
        raise StoreError(f"nothing could be measured in {root.store.url}: {failures[0]}")
    if as_json:
        print_json(_veiled(report.record()))
    else:
        print_report(report, root.store.url)
    if report.wrong:
        raise click.exceptions.Exit(DAMAGED)


def print_report(report: Report, url: str) -> None:
    """The tables, what failed, and the advice."""
    from ..bench.report import size_text, time_text

    def cell(contender: Contender, name: str) -> str:
        value = report.contenders[contender].median(name)
        if value is None:
            return ""
        ratios = {"T": report.to_reference(contender, name), "L": report.to_limit(contender, name)}
        shown = [f"{ratio:.{2 if ratio < 10 else 0}f}{letter}" for letter, ratio in ratios.items() if ratio is not None]
        return " ".join([time_text(value), *shown])

    def memory(contender: Contender, name: str) -> str:
        value = report.contenders[contender].median(name)
        return "" if value is None else size_text(value)

    what = "of a transformer's shapes" if report.tensors is None else f"in {count_text(report.tensors, 'tensor')}"
    click.echo(f"{size_text(report.size)} {what}, {count_text(report.repeats, 'repeat')}, medians, in {url}\n")
    measured = [one for one, figures in report.contenders.items() if figures.samples]
    _table(
        ["save", *_SAVING.values(), "MiB/s", "memory"],
        [
            [
                one.name,
                *(cell(one, name) for name in _SAVING),
                f"{(report.throughput(one) or 0) / (1 << 20):,.0f}",
                memory(one, "save_bytes"),
            ]
            for one in measured
        ],
    )
    _table(
        ["resume", *_RESUMING.values(), "memory"],
        [[one.name, *(cell(one, name) for name in _RESUMING), memory(one, "resume_bytes")] for one in measured],
    )
    limits = {name: report.limits.median(name) for name in report.limits.samples}
    shown = [f"{name} {time_text(value)}" for name, value in limits.items() if value is not None]
    click.echo(f"T: torch.save, made durable, and torch.load. L: what this machine can do at best: {', '.join(shown)}.")
    if report.limits.failure:
        click.echo(f"limits failed: {plain(without_secrets(report.limits.failure))}")
    for one, figures in report.contenders.items():
        if figures.failure:
            click.echo(f"{one.name} failed: {plain(without_secrets(figures.failure))}")
        if figures.wrong:
            click.echo(click.style("WRONG", fg="red") + f": {one.name} gave back other values: {plain(figures.wrong)}")
    click.echo("")
    for sentence in report.advice():
        click.echo(sentence)


def _table(titles: list[str], rows: list[list[str]]) -> None:
    if rows:
        print_table(titles, rows, right=titles[1:])
        click.echo("")


def _veiled(record: dict[str, Any]) -> dict[str, Any]:
    for contender in record["contenders"]:
        contender["failure"] = contender["failure"] and without_secrets(contender["failure"])
    return record


@contextmanager
def _progress() -> Iterator[Callable[[int, int, str], None]]:
    """A line on stderr that says what is measured, where a person looks at it."""
    if not sys.stderr.isatty():
        yield lambda done, total, what: None
        return

    def show(done: int, total: int, what: str) -> None:
        click.echo(f"\r\x1b[K{done + 1} of {total}: {what}", nl=False, err=True)

    try:
        yield show
    finally:
        click.echo("\r\x1b[K", nl=False, err=True)


@contextmanager
def _ended_like_interrupted() -> Iterator[None]:
    """SIGTERM, such as `timeout` sends, cleans up as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
