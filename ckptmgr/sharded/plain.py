"""In which words does an error reach all ranks? As one of ours, which can be pickled and is an `Exception`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch.distributed.checkpoint.api import CheckpointException

from ..errors import CheckpointError, RankError, StoreError


@contextmanager
def plainly(what: str, kind: type[CheckpointError]) -> Iterator[None]:
    """Within the block any error that is not ours becomes one of `kind`. One that can't be pickled would leave
    the other ranks waiting."""
    try:
        yield
    except StoreError as exc:
        raise StoreError(f"{what}: {exc}", exc.errno) from exc
    except CheckpointError as exc:
        raise type(exc)(f"{what}: {exc}") from exc
    except Exception as exc:
        raise kind(f"{what}: {type(exc).__name__}: {exc}") from exc


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turns what `dcp.save` and `dcp.load` raise into errors of ckptmgr:

        with ckptmgr.plain_errors():
            dcp.save(state_dict, storage_writer=ckptmgr.StoreWriter(url))

    DCP raises a `CheckpointException`, which `except Exception` does not catch. Instead of it comes, on every
    rank, the error of the lowest rank that failed: of the same class where it is one of ours, else a `RankError`.
    """
    try:
        yield
    except CheckpointException as exc:
        rank, (first, _) = min(exc.failures.items())
        others = f" (and {len(exc.failures) - 1} more ranks failed)" if len(exc.failures) > 1 else ""
        if isinstance(first, CheckpointError):
            raise type(first)(f"rank {rank}: {first}{others}") from exc
        raise RankError(f"rank {rank}: {type(first).__name__}: {first}{others}") from exc
