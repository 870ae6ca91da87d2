"""What may go? `prune`, by the keep rules, and `rm`, by name. Both show first, and ask."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError
from ..manifest import CheckpointInfo
from .roots import Root, root_command
from .tables import count_text, plain, print_json, print_table, size_of, size_text

if TYPE_CHECKING:
    from ..config import CheckpointConfig
    from ..retention import Plan, Verdict
    from ..run import Run

yes_option = click.option("--yes", "-y", is_flag=True, help="Go ahead without asking.")


@contextmanager
def holding(run: Run) -> Iterator[None]:
    """The writer's lock for the length of a block. Raises `FencedError` naming the holder."""
    run.hold()
    try:
        yield
    finally:
        run.release()


def confirm(question: str, yes: bool) -> bool:
    if yes:
        return True
    if not sys.stdin.isatty():
        raise click.UsageError("this deletes, and there is no terminal to ask: give --yes to go ahead")
    return click.confirm(f"{question}?", err=True)


# By the keep rules


def _best(_: click.Context, __: click.Parameter, texts: Sequence[str]) -> list[dict[str, Any]]:
    bests = []
    for text in texts:
        rest, _colon, count = text.rpartition(":")
        if not (rest and count.isdecimal()):
            rest, count = text, "1"
        metric, _colon, mode = rest.rpartition(":")
        if not metric or mode not in ("min", "max"):
            raise click.BadParameter(f"{text!r} is not METRIC:min or METRIC:max, with :COUNT where more than one stays")
        bests.append({"metric": metric, "mode": mode, "count": int(count)})
    return bests


@click.command(epilog="\b\nExample:\n  ckptmgr prune runs/digits --keep-last 3 --keep-best val_loss:min:2 --dry-run")
@root_command
@click.option("--keep-last", "last", type=click.IntRange(1), metavar="N", help="Keep the N newest.")
@click.option(
    "--keep-every-steps", "every_steps", type=click.IntRange(1), metavar="N", help="Keep the first of every N steps."
)
@click.option(
    "--keep-best",
    "best",
    multiple=True,
    callback=_best,
    metavar="METRIC:MODE[:COUNT]",
    help="Keep the best by a metric, such as val_loss:min:2. May be repeated.",
)
@click.option("--keep-newer-than", "newer_than", metavar="TIME", help="Keep those younger than this, such as 24h.")
@click.option("--min-good", type=click.IntRange(1), metavar="N", help="Keep at least N undamaged ones.")
@click.option("--max-bytes", metavar="SIZE", help="Then drop until all fit in this, such as 500GB.")
@click.option("--archived", is_flag=True, help="Delete what rewinds put aside, and nothing else.")
@click.option("--dry-run", is_flag=True, help="Only say what would go, and why.")
@yes_option
def prune(root: Root, archived: bool, dry_run: bool, yes: bool, as_json: bool, **keep: Any) -> None:
    """Delete what no keep rule keeps.

    The rules are those of the configuration, with those given here in their places; a URL that is
    no configuration has only those given here. What is to stay is looked at first: what lacks bytes
    counts as damaged. Shows the plan and asks. Needs the writer's lock, so not while training runs,
    unless --dry-run.
    """
    keep = {name: value for name, value in keep.items() if value}
    if archived:
        if keep:
            raise click.UsageError("--archived deletes what rewinds put aside; keep rules say nothing of that")
        _prune_archived(root, dry_run=dry_run, yes=yes, as_json=as_json)
        return
    run = root.run(_with_rules(root, keep))
    _check_metrics(root, root.found(run.infos()), keep.get("best", ()))
    plan = run.plan()
    if not as_json:
        _print_plan(plan)
    is_wanted = bool(plan.drop) and not dry_run and confirm(f"Delete {count_text(len(plan.drop))}", yes)
    dropped: list[CheckpointInfo] = []
    if is_wanted:
        shown = {_identity(verdict.info) for verdict in plan.drop}
        with holding(run):
            # Planned again, now that nobody else writes; what was not shown does not go.
            chosen = [verdict.info for verdict in run.plan(marks=True).drop if _identity(verdict.info) in shown]
            dropped = run.drop(*chosen)
            _tell_kept(chosen, dropped)
    freed = sum(map(size_of, dropped))
    if as_json:
        print_json(
            {
                "url": root.store.url,
                "keep": [_verdict(verdict) for verdict in plan.keep],
                "drop": [_verdict(verdict) for verdict in plan.drop],
                "over_bytes": plan.over_bytes,
                "dropped": [info.name for info in dropped],
                "freed": freed,
            }
        )
    elif not dry_run:
        click.echo(f"deleted {count_text(len(dropped))}, {size_text(freed)}" if dropped else "nothing was deleted")


def _identity(info: CheckpointInfo) -> tuple[str, str]:
    """Of all checkpoints that ever had its name, this one."""
    return info.name, info.manifest.nonce if info.manifest else ""


def _with_rules(root: Root, keep: dict[str, Any]) -> CheckpointConfig:
    """The settings to prune by. Raises `UsageError` when nobody gave a rule: defaults must not delete."""
    is_configured = root.config is not None and "keep" in root.config.model_fields_set
    if keep or is_configured:
        config = root.configure(keep=keep if is_configured else {"last": None, **keep})
        if config.keep_rules() or config.keep.max_bytes is not None:
            return config
    raise click.UsageError(
        "no keep rule, so nothing would go: give --keep-last, --keep-every-steps, --keep-best, --keep-newer-than or "
        "--max-bytes, or a configuration with a keep section as the URL"
    )


def _check_metrics(root: Root, infos: Sequence[CheckpointInfo], best: Sequence[dict[str, Any]]) -> None:
    """Raises `ConfigError` for a metric that was never saved: its rule would keep nothing, and what it was to keep
    would go."""
    from ..ledger import did_you_mean

    there = sorted({name for info in infos if info.manifest for name in info.manifest.metrics})
    for metric in (rule["metric"] for rule in best if rule["metric"] not in there):
        raise ConfigError(
            f"no checkpoint in {root.store.url} has a metric {metric}; metrics there: {', '.join(there) or 'none'}"
            + did_you_mean(metric, there)
        )


def _print_plan(plan: Plan) -> None:
    rows = [
        (what, str(verdict.info.step), size_text(size_of(verdict.info)), verdict.info.name, _why(verdict))
        for what, verdicts in (("keep", plan.keep), ("drop", plan.drop))
        for verdict in verdicts
    ]
    print_table(("plan", "step", "size", "name", "why"), rows, right=("step", "size"))
    total = len(plan.keep) + len(plan.drop)
    click.echo(f"\n{len(plan.drop)} of {count_text(total)} to drop, {size_text(plan.freed)} to free")
    if plan.over_bytes:
        click.echo(f"still {size_text(plan.over_bytes)} over the cap: the rest must stay", err=True)


def _why(verdict: Verdict) -> str:
    damage = () if verdict.info.damaged is None else (verdict.info.damaged,)
    return "; ".join((*verdict.reasons, *damage))


def _verdict(verdict: Verdict) -> dict[str, Any]:
    info = verdict.info
    return {
        "step": info.step,
        "name": info.name,
        "size": size_of(info),
        "reasons": list(verdict.reasons),
        "damage": info.damaged,
    }


def _prune_archived(root: Root, *, dry_run: bool, yes: bool, as_json: bool) -> None:
    run = root.run()
    asides = run.repository.archived()
    if not as_json:
        for aside in asides:
            click.echo(f"archived  {plain(aside.name)}  {size_text(aside.manifest.size)}")
        click.echo(f"{count_text(len(asides), 'archived checkpoint')}")
    is_wanted = bool(asides) and not dry_run and confirm("Delete their data for good", yes)
    dropped = []
    if is_wanted:
        shown = {aside.key for aside in asides}
        with holding(run):
            dropped = [aside for aside in run.repository.archived() if aside.key in shown]
            for aside in dropped:
                run.repository.drop_archived(aside, run.check)
    freed = sum(aside.manifest.size for aside in dropped)
    if as_json:
        print_json(
            {
                "url": root.store.url,
                "archived": [
                    {"step": aside.manifest.step, "name": aside.name, "size": aside.manifest.size} for aside in asides
                ],
                "dropped": [aside.name for aside in dropped],
                "freed": freed,
            }
        )
    elif not dry_run:
        click.echo(f"deleted {count_text(len(dropped))}, {size_text(freed)}" if is_wanted else "nothing was deleted")


# By name


@click.command(epilog="\b\nExample:\n  ckptmgr rm runs/digits 100 200")
@root_command
@click.argument("steps", nargs=-1, required=True, metavar="STEP...")
@click.option("--force", is_flag=True, help="Delete even the last good checkpoint.")
@yes_option
def rm(root: Root, steps: tuple[str, ...], force: bool, yes: bool, as_json: bool) -> None:
    """Delete checkpoints by STEP.

    Whatever the keep rules say, but pinned ones stay: unpin them first. Needs the writer's lock, so
    not while training runs.
    """
    run = root.run()
    chosen = _chosen(root, run, steps, force)
    is_wanted = confirm(f"Delete {_names(chosen)} ({size_text(sum(map(size_of, chosen)))})", yes)
    dropped: list[CheckpointInfo] = []
    if is_wanted:
        with holding(run):
            # Looked at again, now that nobody else writes: one may be pinned, or the last one, since.
            chosen = _chosen(root, run, [info.name for info in chosen], force, marks=True)
            dropped = run.drop_asked_for(*chosen)
            _tell_kept(chosen, dropped)
    freed = sum(map(size_of, dropped))
    if as_json:
        print_json({"url": root.store.url, "dropped": [info.name for info in dropped], "freed": freed})
    else:
        click.echo(f"deleted {_names(dropped)}, {size_text(freed)}" if dropped else "nothing was deleted")


def _names(infos: Sequence[CheckpointInfo]) -> str:
    return ", ".join(plain(info.name) for info in infos)


def _tell_kept(chosen: Sequence[CheckpointInfo], dropped: Sequence[CheckpointInfo]) -> None:
    """Say which ones stay all the same: a pin was put since they were chosen, or holds by the store's clock alone."""
    if kept := [info for info in chosen if info not in dropped]:
        click.echo(f"kept {_names(kept)}: pinned, ckptmgr unpin first", err=True)


def _chosen(root: Root, run: Run, steps: Sequence[str], force: bool, *, marks: bool = False) -> list[CheckpointInfo]:
    """The checkpoints that are meant, each once. Raises `NotFoundError`, and `ConfigError` where one must stay."""
    infos = root.found(run.infos())
    by_name = {}
    for step in steps:
        info = run.find(step, infos)
        if len(same := run.repository.find_all(step, infos)) > 1:
            raise ConfigError(f"{step} could mean {_names(same)}: give the folder's name; nothing was deleted")
        by_name[info.name] = info
    now = datetime.now(UTC)
    for info in by_name.values():
        if any(pin.holds(now) for pin in info.pins):
            raise ConfigError(f"{root.url(info)} is pinned: ckptmgr unpin it first; nothing was deleted")
    takes_good = any(info.damaged is None for info in by_name.values())
    left = [info for info in infos if info.damaged is None and info.name not in by_name]
    if not force and takes_good and not run.has_sound(left, marks=marks):
        why = ", as what would stay is damaged (ckptmgr verify --all)" if left else ""
        raise ConfigError(
            f"no good checkpoint would be left in {root.store.url}{why}: give --force; nothing was deleted"
        )
    return list(by_name.values())
