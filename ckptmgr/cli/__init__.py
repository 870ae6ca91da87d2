"""What can be asked of a root from the shell? The command `ckptmgr`.

Looking, verifying, pinning, deleting and measuring; nothing here imports torch, and what only some commands
need (pydantic, fsspec, rich) is imported where they need it.
"""

from __future__ import annotations

import click

from .. import __version__
from .benchmark import bench
from .configuration import config
from .deletion import prune, rm
from .failures import GuardedGroup
from .garbage import gc
from .listing import latest, ls, show
from .pinning import pin, unpin
from .verification import verify

__all__ = ["main"]

_EPILOG = """\b
Exit codes:
  0    done
  1    damage was found
  2    the command line or the configuration is wrong
  3    no such checkpoint, step, tag or file
  4    another process writes to the root
  5    the store failed: network, permission, disk
  6    written by a newer ckptmgr
  70   a fault in ckptmgr itself
  130  interrupted
  141  nobody reads the output any more

\b
Example:
  ckptmgr ls runs/digits
"""


@click.group(cls=GuardedGroup, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ckptmgr")
def main() -> None:
    """See and tend the checkpoints under a root.

    URL is a folder, any fsspec URL (s3://, gs://, oss://, ...), or a .yaml configuration, whose
    root, storage options, names and keep rules are then used. STEP is a number, "latest", "best"
    (with a configuration that names a metric), a tag, or a folder's name.
    """


for _command in (ls, show, latest, verify, prune, pin, unpin, rm, gc, config, bench):
    main.add_command(_command)
