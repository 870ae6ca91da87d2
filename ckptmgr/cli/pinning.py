"""What must stay, whatever the keep rules say? `pin` and `unpin`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import click

from ..errors import NotFoundError
from .roots import Root, root_command
from .tables import count_text, print_json


def _duration(_: click.Context, __: click.Parameter, text: str | None) -> timedelta | None:
    from ..quantities import parse_duration

    try:
        return None if text is None else parse_duration(text)
    except ValueError as exc:
        raise click.BadParameter(f"{exc}, or none to pin for ever") from exc


@click.command(epilog="\b\nExample:\n  ckptmgr pin runs/digits 300 --tag paper --ttl 30d")
@root_command
@click.argument("step")
@click.option("--tag", help="A name for it, which then serves as a STEP.")
@click.option("--ttl", callback=_duration, metavar="TIME", help="For how long, such as 12h or 7d; for ever without.")
def pin(root: Root, step: str, tag: str | None, ttl: timedelta | None, as_json: bool) -> None:
    """Keep a checkpoint from every keep rule. Needs no lock: training may go on."""
    info = root.find(step)
    expires = None if ttl is None else datetime.now(UTC) + ttl
    root.repository.pin(info, tag, expires)
    if as_json:
        print_json({"step": info.step, "tag": tag, "expires": None if expires is None else expires.isoformat()})
    else:
        until = "" if expires is None else f" until {expires:%Y-%m-%d %H:%M} UTC"
        click.echo(f"pinned step {info.step}" + (f" as {tag}" if tag else "") + until)


@click.command(epilog="\b\nExample:\n  ckptmgr unpin runs/digits paper")
@root_command
@click.argument("step")
@click.option("--tag", help="Remove only the pin with this tag.")
def unpin(root: Root, step: str, tag: str | None, as_json: bool) -> None:
    """Remove a checkpoint's pins, or the one with a tag (`unpin URL TAG` too). The checkpoint itself may be gone."""
    which = root.find(step).name if step == "best" else step
    pins = root.repository.pins(which, tag)
    if not pins:
        what = f"step {step}" if step.isdecimal() else repr(step)
        raise NotFoundError(f"{what} in {root.store.url} has no pin" + (f" with tag {tag!r}" if tag else ""))
    count = root.repository.unpin(which, tag)
    if as_json:
        print_json({"step": pins[0].step, "tag": tag, "removed": count})
    else:
        click.echo(f"removed {count_text(count, 'pin')} of step {pins[0].step}")
