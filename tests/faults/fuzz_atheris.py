"""Feeds random bytes to whatever parses what others may have written, for as long as it is told to.

    python tests/faults/fuzz_atheris.py -max_total_time=300 [-seed=1]

Needs atheris (`pip install atheris`). Any error but one of ours ends it, with the input in a file beside.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import atheris  # noqa: E402 - the package is found from here on

with atheris.instrument_imports(include=["ckptmgr"]):
    from faults import parsers


logging.disable(logging.CRITICAL)


def once(data: bytes) -> None:
    if data:
        parse = parsers.PARSERS[data[0] % len(parsers.PARSERS)]
        parsers.only_ours(parse, data[1:])


if __name__ == "__main__":
    atheris.Setup(sys.argv, once)
    atheris.Fuzz()
