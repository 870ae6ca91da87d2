"""What can go wrong, grouped by what the caller does next.

Every error of this library is a `CheckpointError`, and also the built-in error that fits, so that
`except FileNotFoundError` works where people expect it. Messages say what happened, to which step
and URL, and what to do now.
"""

from __future__ import annotations

__all__ = [
    "AlreadyExistsError",
    "CheckpointError",
    "ConfigError",
    "CoordinationError",
    "DamagedError",
    "DeletedMeanwhileError",
    "FencedError",
    "FormatVersionError",
    "NotFoundError",
    "RankError",
    "SaveFailedError",
    "StateMismatchError",
    "StoreError",
    "StoreFullError",
]


class CheckpointError(Exception):
    """Base of every error that this library raises on purpose."""


# Correct the configuration or the call.


class ConfigError(CheckpointError, ValueError):
    """A setting is unknown, contradictory or out of range; names file, key and what is allowed."""


class StateMismatchError(CheckpointError, KeyError):
    """The checkpoint and the objects to restore do not fit; lists every difference at once."""

    # KeyError prints the repr of its argument, which would fold a many-line report into one line.
    __str__ = Exception.__str__


# Choose another step, another root, or another way.


class NotFoundError(CheckpointError, FileNotFoundError):
    """The step, tag, file or root asked for does not exist. Never means that the store was down."""


class DeletedMeanwhileError(NotFoundError):
    """A checkpoint was there and went while it was read: by its writer's keep rules, or by a person."""


class AlreadyExistsError(CheckpointError, FileExistsError):
    """Something is already there and would have been overwritten."""


class DamagedError(CheckpointError):
    """A checkpoint's bytes are not the bytes that were written."""


class FormatVersionError(CheckpointError):
    """Written by a newer ckptmgr than this one; names both format versions."""


# Mend the store, the disk or the network, then try again.


class StoreError(CheckpointError, OSError):
    """The store did not do what was asked: no space, no permission, no bucket, no network.

    `errno` is set where the cause had one, so `error.errno == errno.ENOSPC` finds a full disk.
    """

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class StoreFullError(StoreError):
    """There is no room left, or the quota is used up (`errno` ENOSPC or EDQUOT).

    `needed` and `free` are in bytes, None where nobody knows. What is free is what the file system says, of which a
    quota may leave less.
    """

    def __init__(
        self, message: str, errno: int | None = None, *, needed: int | None = None, free: int | None = None
    ) -> None:
        super().__init__(message, errno)
        self.needed, self.free = needed, free


# Another process is in the way, or a background save failed.


class FencedError(CheckpointError):
    """Another process writes to this root; names the holder and the way out."""


class SaveFailedError(CheckpointError):
    """A save did not commit; names its step. The checkpoints before it are untouched."""


class CoordinationError(CheckpointError):
    """The ranks could not agree; no further collective is attempted."""


class RankError(CheckpointError, RuntimeError):
    """Something that is not of this library failed on one rank, such as a predicate; names rank and cause."""
