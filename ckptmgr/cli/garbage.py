"""What did dead processes leave behind, and what does it cost? `gc` lists it, and removes it when asked."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import click

from ..errors import StoreError
from ..litter import Litter, drop_uploads, litter
from .deletion import confirm, holding, yes_option
from .roots import Root, root_command
from .tables import age_text, count_text, print_json, print_table, size_text


@click.command(epilog="\b\nExample:\n  ckptmgr gc s3://bucket/runs/digits --yes")
@root_command
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@yes_option
def gc(root: Root, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Remove what is no part of any checkpoint.

    Drafts of saves that never became checkpoints, deletions that were interrupted, and, on S3 and OSS, the parts of
    large files that were never completed: nobody sees those, but they are paid for. The next training in the root
    removes all but the last by itself. What rewinds put aside stays: see prune --archived. Needs the writer's lock, so
    not while training runs, unless --dry-run.
    """
    found = litter(root.repository, _tell)
    if not as_json:
        _print(found)
    is_wanted = bool(found) and not dry_run and confirm(f"Delete {_summary(found)}", yes)
    gone = _remove(root, found) if is_wanted else []
    if as_json:
        freed = sum(one.bytes for one in gone)
        shown = [_as_json(one) for one in found]
        print_json({"url": root.store.url, "litter": shown, "removed": len(gone), "freed": freed})
    elif is_wanted:
        click.echo(f"removed {_summary(gone)}")
    elif found and not dry_run:
        click.echo("nothing was removed")


def _tell(exc: StoreError) -> None:
    click.echo(f"ckptmgr: the parts of unended uploads are not looked at: {exc}", err=True)


def _remove(root: Root, found: list[Litter]) -> list[Litter]:
    """What of `found` is gone then."""
    shown = {one.identity for one in found}
    sees_uploads = any(one.upload for one in found)

    def fail(exc: StoreError) -> None:
        if sees_uploads:
            raise exc

    with holding(root.run()):  # which sweeps drafts and deletions
        # Looked at again, now that nobody else writes; an upload that was not shown does not go.
        drop_uploads(root.store, [one for one in litter(root.repository, fail) if one.identity in shown])
        left = {one.identity for one in litter(root.repository, fail)}
    return [one for one in found if one.identity not in left]


def _summary(found: list[Litter]) -> str:
    return f"{count_text(len(found), 'piece')} of litter, {size_text(sum(one.bytes for one in found))}"


def _print(found: list[Litter]) -> None:
    now = time.time()
    ages = [age_text(timedelta(seconds=now - one.since)) if one.since else "" for one in found]
    rows = [(one.kind, size_text(one.bytes), age, one.key) for one, age in zip(found, ages, strict=True)]
    if rows:
        print_table(("kind", "size", "age", "key"), rows, right=("size",))
        click.echo()
    click.echo(_summary(found))


def _as_json(one: Litter) -> dict[str, object]:
    since = None if one.since is None else datetime.fromtimestamp(one.since, UTC).isoformat()
    return {"kind": one.kind, "key": one.key, "size": one.bytes, "since": since}
