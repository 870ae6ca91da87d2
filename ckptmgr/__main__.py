"""What does `python -m ckptmgr` do? The same as the command `ckptmgr`."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    main(prog_name="ckptmgr")
