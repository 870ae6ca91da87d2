"""What is there? `ls`, `show` and `latest`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import click

from ..errors import NotFoundError
from ..manifest import CheckpointInfo
from ..records import Records
from ..source import Problem
from .entries import STATE_NAME, EntrySummary, entries_of
from .roots import Root, root_command
from .tables import (
    age_of,
    age_text,
    count_text,
    marks_text,
    metrics_text,
    plain,
    print_json,
    print_table,
    record,
    size_of,
    size_text,
    state_of,
)

_COLUMNS = ("step", "epoch", "age", "size", "metrics", "state", "verified", "tags", "name", "latest")


@click.command(epilog="\b\nExample:\n  ckptmgr ls s3://bucket/runs/digits --option endpoint_url=http://127.0.0.1:9000")
@root_command
def ls(root: Root, as_json: bool) -> None:
    """List the checkpoints under URL, newest first."""
    infos, pointer, times = root.infos(), root.repository.pointer.read(), Records(root.store).verified()
    newest = _newest(infos)
    total, damaged = sum(map(size_of, infos)), sum(state_of(info) == "damaged" for info in infos)
    if as_json:
        print_json(
            {
                "url": root.store.url,
                "latest": None if newest is None else newest.name,
                "pointer": pointer,
                "count": len(infos),
                "damaged": damaged,
                "size": total,
                "checkpoints": [
                    record(info, root.url(info)) | {"verified": _iso(_when(info, times))} for info in infos
                ],
            }
        )
        return
    now = datetime.now(UTC)
    print_table(
        _COLUMNS, [_row(info, info is newest, times, now) for info in infos], right=("step", "epoch", "age", "size")
    )
    click.echo(
        f"\n{count_text(len(infos))}, {size_text(total)}"
        + (f", {damaged} damaged" if damaged else "")
        + f" in {root.store.url}"
    )
    if pointer is not None and all(info.name != pointer for info in infos):
        click.echo(f"ckptmgr: the pointer of {root.store.url} names {plain(pointer)!r}, which is not there", err=True)


def _row(
    info: CheckpointInfo, is_latest: bool, times: Mapping[tuple[str, str], datetime], now: datetime
) -> tuple[str, ...]:
    manifest = info.manifest
    return (
        str(info.step),
        "" if manifest is None or manifest.epoch is None else str(manifest.epoch),
        age_of(info, now),
        "" if manifest is None else size_text(manifest.size),
        "" if manifest is None else metrics_text(manifest.metrics),
        state_of(info),
        "" if (when := _when(info, times)) is None else age_text(now - when),
        marks_text(info, now),
        info.name,
        "<- latest" if is_latest else "",
    )


def _newest(infos: Sequence[CheckpointInfo]) -> CheckpointInfo | None:
    """What `latest` means, whatever the pointer says, which is a hint."""
    return next((info for info in infos if info.damaged is None), None)


@click.command(epilog="\b\nExample:\n  ckptmgr show runs/digits 300")
@root_command
@click.argument("step", default="latest")
def show(root: Root, step: str, as_json: bool) -> None:
    """Show all about one checkpoint.

    By default the newest that is not known to be damaged. Its files' sizes are compared, their bytes
    are not read: `verify` does that.
    """
    info = root.find(step)
    problems = root.repository.verify(info, "size")
    entries = None if any(problem.file == STATE_NAME for problem in problems) else entries_of(root.store, info)
    when = _when(info, Records(root.store).verified())
    (_show_json if as_json else _show_text)(root.url(info), info, problems, entries, when)


def _when(info: CheckpointInfo, times: Mapping[tuple[str, str], datetime]) -> datetime | None:
    """When all of its bytes were last read back, where that is recorded."""
    return None if info.manifest is None else times.get((info.name, info.manifest.nonce))


def _iso(when: datetime | None) -> str | None:
    return None if when is None else when.isoformat()


def _show_json(
    url: str,
    info: CheckpointInfo,
    problems: list[Problem],
    entries: list[EntrySummary] | None,
    verified: datetime | None,
) -> None:
    more: dict[str, Any] = {
        "verified": _iso(verified),
        "state": "damaged" if problems else state_of(info),
        "problems": [{"file": problem.file, "what": problem.what} for problem in problems],
    }
    if info.manifest is not None:
        more |= {
            "nonce": info.manifest.nonce,
            "config": info.manifest.config,
            "versions": dict(info.manifest.versions),
            "written": info.manifest.written,
            "files": [
                {"name": f.name, "size": f.size, "digest": f.digest, "shared": f.shared} for f in info.manifest.files
            ],
        }
    if entries is not None:
        more["entries"] = [{"name": e.name, "tensors": e.tensors, "size": e.size} for e in entries]
    print_json(record(info, url) | more)


def _show_text(
    url: str,
    info: CheckpointInfo,
    problems: list[Problem],
    entries: list[EntrySummary] | None,
    verified: datetime | None,
) -> None:
    now, manifest = datetime.now(UTC), info.manifest
    pins = [
        ("" if pin.tag is None else f"{pin.tag}, ") + ("for ever" if pin.expires is None else f"until {pin.expires}")
        for pin in info.pins
    ]
    fields: list[tuple[str, object]] = [
        ("url", url),
        ("step", info.step),
        ("state", "damaged" if problems else state_of(info)),
        ("damage", info.damaged),
        ("verified", None if verified is None else f"{verified.isoformat()} ({age_text(now - verified)})"),
        *(("problem", problem) for problem in problems if manifest is not None),
        ("tags", ", ".join(info.tags)),
        *(("pinned", pin) for pin in pins),
    ]
    if manifest is not None:
        fields += [
            ("epoch", manifest.epoch),
            ("metrics", " ".join(f"{name}={value:g}" for name, value in manifest.metrics.items())),
            ("time", f"{manifest.time.isoformat()} ({age_of(info, now)})"),
            ("size", f"{size_text(manifest.size)} ({manifest.size:,} bytes)"),
            ("shared", size_text(shared) if (shared := manifest.size - manifest.written) else None),
            ("run", f"{manifest.run}, attempt {manifest.attempt}"),
            ("parent", manifest.parent),
            ("format", manifest.format),
            ("world size", manifest.world_size),
            ("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
            ("config", manifest.config),
        ]
    width = max(len(name) for name, _ in fields)
    for name, value in fields:
        if value not in (None, ""):
            click.echo(f"{name.ljust(width)}  {plain(str(value))}")
    if entries:
        click.echo()
        rows = [
            (e.name, "" if e.tensors is None else str(e.tensors), "" if e.size is None else size_text(e.size))
            for e in entries
        ]
        print_table(("entry", "tensors", "size"), rows, right=("tensors", "size"))
    if manifest is not None and manifest.files:
        click.echo()
        files = [(file.name, size_text(file.size), "shared" if file.shared else "") for file in manifest.files]
        print_table(("file", "size", ""), files, right=("size",))


@click.command(epilog='\b\nExample:\n  aws s3 sync "$(ckptmgr latest s3://bucket/runs/digits)" best/')
@root_command
@click.option("--step", "as_step", is_flag=True, help="Print its step instead.")
def latest(root: Root, as_step: bool, as_json: bool) -> None:
    """Print the newest good checkpoint's URL.

    Good is what is not known to be damaged. Exits with 3 when there is none.
    """
    infos = root.infos()
    info = _newest(infos)
    if info is None:
        raise NotFoundError(f"all of the {count_text(len(infos))} in {root.store.url} are damaged")
    if as_json:
        print_json(record(info, root.url(info)))
    else:
        click.echo(info.step if as_step else root.url(info))
